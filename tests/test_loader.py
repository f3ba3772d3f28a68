"""The processes that prepare images for a GPU, here for a CPU: they give what threads give, and say what is wrong."""

from collections import namedtuple
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import cv2
import numpy as np
import pytest
import torch

from edgekit import backbones, loader, runner, sources
from edgekit.batches import Item, batch_order, batches, items_of
from edgekit.datasets import Dataset, read_dataset
from edgekit.errors import DataError
from edgekit.jobs import Job, Watch
from edgekit.loader import Loader, normalizer, worker_count
from edgekit.recipe import Augment, make_recipe

# Python 3.12 and later warn of forking beside threads; torch's loader forks on Linux.
pytestmark = pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")

SPEC = backbones.default_spec(
    "lcnet_050", tuple("0123456789"), input_size=(48, 64), resize="stretch", interpolation="linear"
)
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def dataset(digits: Path) -> Dataset:
    return read_dataset(digits)


@pytest.mark.parametrize("seed", [None, 7])
def test_processes_give_what_threads_give(dataset: Dataset, seed: int | None) -> None:
    cv2.dnn.blobFromImage(cv2.resize(np.zeros((900, 900, 3), np.uint8), (800, 800)))  # OpenCV has threads now
    order, samples = batch_order(len(dataset.train), 32, seed)[:5], dataset.train
    ready = Loader(SPEC, Augment(), CPU, 2)
    augment = None if seed is None else Augment()
    for _ in range(2):  # the same processes again
        found = list(ready.batches([items_of(samples, batch, seed) for batch in order]))
        threads = list(batches(samples, SPEC, 32, order=order, augment=augment, seed=seed))
        assert len(found) == len(threads) == 5
        for one, other in zip(found, threads, strict=True):
            np.testing.assert_array_equal(one.images.numpy(), runner.normalize(other.images, SPEC))
            assert one.images.is_contiguous(memory_format=torch.channels_last)
            np.testing.assert_array_equal(one.labels, other.labels)
            assert one.sizes == other.sizes


def test_an_iterator_that_is_left_disturbs_nothing(dataset: Dataset) -> None:
    ready = Loader(SPEC, Augment(), CPU, 2)
    asked = [items_of(dataset.val, batch, None) for batch in batch_order(len(dataset.val), 8, None)]
    stream = ready.batches(asked)
    next(stream)
    stream.close()
    assert [len(found.labels) for found in ready.batches(asked[:2])] == [8, 8]
    (found,) = ready.batches(asked[3:4])
    np.testing.assert_array_equal(found.labels, [sample.label for sample, _ in asked[3]])


def test_a_vanished_image_is_named(dataset: Dataset, tmp_path: Path) -> None:
    gone = replace(dataset.train[0], path=tmp_path / "gone.png")
    asked: list[list[Item]] = [[(dataset.train[1], None)], [(gone, (0, 1))]]
    stream = Loader(SPEC, Augment(), CPU, 1).batches(asked)
    next(stream)
    with pytest.raises(DataError, match=r"gone\.png was fine when the data was checked") as caught:
        next(stream)
    assert "Traceback" not in str(caught.value)


@pytest.mark.parametrize("color_order", ["rgb", "bgr"])
def test_normalizes_as_the_runner_does(color_order: str) -> None:
    spec = replace(SPEC, color_order=color_order, mean_255=(1.5, 120.25, 250.0), std_255=(0.5, 58.4, 3.0))
    images = np.random.default_rng(0).integers(0, 256, (2, 48, 64, 3), np.uint8)
    given = normalizer(spec, CPU)(torch.from_numpy(images))
    np.testing.assert_array_equal(given.numpy(), runner.normalize(images, spec))


Usage = namedtuple("Usage", "free")


@pytest.mark.parametrize(
    ("cpus", "processes", "free", "workers"),
    [
        (64, 1, 1 << 40, 16),
        (6, 1, 1 << 40, 6),
        (1, 1, 1 << 40, 1),
        (16, 4, 1 << 40, 4),
        (2, 4, 1 << 40, 1),
        (16, 1, 64 << 20, 5),  # a container's: 13 batches of 32 images of 224 x 224
        (16, 2, 64 << 20, 2),
        (16, 1, 8 << 20, 0),
    ],
)
def test_as_many_processes_as_there_is_room_for(
    cpus: int, processes: int, free: int, workers: int, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(loader.os, "sched_getaffinity", lambda _: set(range(cpus)), raising=False)
    monkeypatch.setattr(loader.shutil, "disk_usage", lambda _: Usage(free))
    monkeypatch.setattr(loader, "SHARED_MEMORY", tmp_path)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", str(processes))
    assert worker_count(replace(SPEC, input_size=(224, 224)), 32) == workers


def test_too_little_shared_memory_is_said(dataset: Dataset, monkeypatch: pytest.MonkeyPatch) -> None:
    notes: list[str] = []
    recipe = make_recipe({"data": {"path": "photos"}})
    fabric = SimpleNamespace(device=torch.device("cuda"), global_rank=0, world_size=1)
    job = Job(recipe, SPEC, dataset, cast(Any, fabric), Watch(on_note=notes.append))
    monkeypatch.setattr(sources, "worker_count", lambda spec, batch_size: 0)
    stream = sources._image_stream(job)
    assert notes == ["too little room in /dev/shm (docker run --shm-size): images are prepared much slower"]
    (found,) = stream(dataset.val, [[3, 1]], None)
    (expected,) = batches(dataset.val, SPEC, 2, order=[[3, 1]])
    np.testing.assert_array_equal(found.arrays[0], runner.normalize(expected.images, SPEC))
    np.testing.assert_array_equal(found.labels, expected.labels)
