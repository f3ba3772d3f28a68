"""Which images a process takes in which step."""

from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch

from edgekit.jobs import Job, Watch, steps_of, train_order
from edgekit.recipe import make_recipe


def job(images: int, device: str, rank: int = 0, processes: int = 1) -> Job:
    """Of eight images a step."""
    fabric = SimpleNamespace(device=torch.device(device), global_rank=rank, world_size=processes)
    recipe = make_recipe({"data": {"path": "photos"}, "train": {"batch_size": 8}})
    dataset = SimpleNamespace(train=tuple(range(images)))
    return Job(recipe, cast(Any, None), cast(Any, dataset), cast(Any, fabric), Watch())


@pytest.mark.parametrize(
    ("images", "processes", "device", "sizes"),
    [
        (20, 1, "cpu", [8, 8, 4]),
        (20, 1, "cuda", [8, 8]),
        (16, 1, "cuda", [8, 8]),
        (17, 1, "cpu", [8, 8]),  # BatchNorm cannot learn from one image
        (5, 1, "cuda", [5]),  # all that there is
        (20, 2, "cpu", [4, 4, 2]),
        (20, 2, "cuda", [4, 4]),
        (18, 2, "cpu", [4, 4]),
    ],
)
def test_whole_batches_and_what_is_left(images: int, processes: int, device: str, sizes: list[int]) -> None:
    for rank in range(processes):
        one = job(images, device, rank, processes)
        assert [len(batch) for batch in train_order(one, 3)] == sizes
        assert steps_of(one) == len(sizes)
    seen = [
        index for rank in range(processes) for b in train_order(job(images, device, rank, processes), 3) for index in b
    ]
    assert len(set(seen)) == len(seen)
