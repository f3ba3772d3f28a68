"""What the frozen layers give for images: right, kept under the right names, and not needed to be kept."""

import re
import resource
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from test_finetune import small
from test_frozen import learning, network

from edgekit import backbones, feature_cache, frozen, runner, sources
from edgekit.batches import load_image, load_view
from edgekit.datasets import Dataset, read_dataset
from edgekit.features import PLAIN, Features, open_features
from edgekit.finetune import finetune
from edgekit.jobs import Watch
from edgekit.recipe import Augment
from edgekit.samples import Sample

SPEC = backbones.default_spec(
    "lcnet_050", tuple("0123456789"), input_size=(64, 64), resize="stretch", interpolation="linear"
)
MANY = 1 << 40


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cold cache."""
    monkeypatch.setenv("EDGEKIT_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "features"


@pytest.fixture(scope="module")
def dataset(digits: Path) -> Dataset:
    return read_dataset(digits)


@dataclass
class Counted:
    """A trunk that counts how often it is computed."""

    trunk: frozen.Trunk
    calls: list[int] = field(default_factory=list)

    def ready(self, size: tuple[int, int] = (64, 64)) -> frozen.Frozen:
        images = np.zeros((1, 3, *size), np.float32)
        computed = frozen.engine(self.trunk, images, torch.device("cpu"))

        def run(blob: np.ndarray, count: int) -> frozen.Parts:
            self.calls.append(count)
            return computed.run(blob, count)

        return replace(computed, run=run)


def two_parts(bias: float = 0.0) -> frozen.Trunk:
    model = network("lcnet_050")
    with torch.no_grad():
        model.get_parameter("bn1.bias").add_(bias)
    images = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    for module in model.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.momentum = None  # the mean of all batches: statistics as a trained network has them, not 0 and 1
    model.train()(images)
    model.eval()
    return frozen.cuts(model, [learning(model, 0), learning(model, 2)], images)[0]


def opened(
    computed: frozen.Frozen,
    dataset: Dataset,
    views: int = 2,
    limit: int = MANY,
    spec: runner.Spec = SPEC,
    augment: Augment = Augment(),  # noqa: B008 (it is frozen)
    seed: int = 3,
) -> tuple[Features, int]:
    found = open_features(computed, spec, augment, seed, dataset.train, dataset.val, views, limit)
    assert found is not None
    return found


def filled(found: Features, dataset: Dataset, views: int = 1) -> Features:
    for view in range(views):
        found.fill(dataset.train, view, 1, lambda done, total: None)
    found.fill(dataset.val, PLAIN, 1, lambda done, total: None)
    return found


def row(found: Features, sample: Sample, view: int, part: int) -> tuple[np.ndarray, ...]:
    (batch,) = found.batches([sample], view, part, [[0]])
    return tuple(array[0] for array in batch.arrays)


def by_torch(trunk: frozen.Trunk, image: np.ndarray) -> list[np.ndarray]:
    values: tuple[torch.Tensor, ...] = (torch.from_numpy(runner.normalize(image[None], SPEC)),)
    given = []
    with torch.no_grad():
        for part in trunk.parts:
            values = part(*values)
            given.append(values[0][0].numpy())
    return given


def test_rows_are_what_torch_gives(dataset: Dataset) -> None:
    trunk = two_parts()
    found, _ = opened(Counted(trunk).ready(), dataset)
    filled(found, dataset, 2)
    for sample in dataset.val[:5]:
        for part, expected in enumerate(by_torch(trunk, load_image(sample, SPEC))):
            np.testing.assert_allclose(
                row(found, sample, PLAIN, part)[0], expected, rtol=1e-4, atol=1e-5 * np.abs(expected).max()
            )
    for sample in dataset.train[:5]:
        for view in (0, 1):
            image = load_view(sample, SPEC, Augment(), 3, view)
            for part, expected in enumerate(by_torch(trunk, image)):
                given = row(found, sample, view, part)[0]
                assert given.dtype == np.float32
                np.testing.assert_allclose(given, expected, rtol=2e-3, atol=2e-3 * np.abs(expected).max())
    assert not np.array_equal(row(found, dataset.train[0], 0, 1)[0], row(found, dataset.train[0], 1, 1)[0])


def test_many_images_at_once_are_kept_as_one_at_a_time(dataset: Dataset) -> None:
    """As on a GPU. The last of the 32s is not full."""
    trunk = two_parts()
    counted = Counted(trunk)
    one, _ = opened(counted.ready(), dataset)
    filled(one, dataset)
    whole = frozen._gpu_run(frozen._Chain(trunk.parts), torch.device("cpu"))
    many, _ = opened(replace(counted.ready(), run=whole, batch_size=32, keys=("a", "b")), dataset)
    told: list[tuple[int, int]] = []
    many.fill(dataset.train, 0, 1, lambda done, total: told.append((done, total)))
    count = len(dataset.train)
    assert told == [(min(done + 32, count), count) for done in range(0, count, 32)]
    for sample in (dataset.train[0], dataset.train[33], dataset.train[-1]):
        for part in (0, 1):
            found, expected = (row(each, sample, 0, part)[0] for each in (many, one))
            np.testing.assert_allclose(found, expected, rtol=2e-3, atol=1e-3 * np.abs(expected).max())
    many.is_full = True  # nothing more is kept: computed for each batch
    (batch,) = many.batches(dataset.val, PLAIN, 1, [list(range(40))])
    (kept,) = one.batches(dataset.val, PLAIN, 1, [list(range(40))])
    np.testing.assert_allclose(batch.arrays[0], kept.arrays[0], rtol=1e-3, atol=1e-3 * np.abs(kept.arrays[0]).max())


def test_batches_come_in_the_order_asked_for(dataset: Dataset) -> None:
    found, _ = opened(Counted(two_parts()).ready(), dataset)
    batches = list(found.batches(dataset.train, 0, 1, [[5, 2, 9], [1]]))
    chosen = [[dataset.train[index] for index in order] for order in ([5, 2, 9], [1])]
    assert [batch.samples for batch in batches] == [tuple(samples) for samples in chosen]
    assert [batch.labels.tolist() for batch in batches] == [[s.label for s in samples] for samples in chosen]
    for batch, samples in zip(batches, chosen, strict=True):
        for index, sample in enumerate(samples):
            np.testing.assert_array_equal(batch.arrays[0][index], row(found, sample, 0, 1)[0])


def test_a_second_run_computes_nothing(dataset: Dataset) -> None:
    trunk = two_parts()
    first, second = Counted(trunk), Counted(trunk)
    cold = filled(opened(first.ready(), dataset)[0], dataset, 2)
    told: list[tuple[int, int]] = []
    warm, views = opened(second.ready(), dataset)
    second.calls.clear()  # one image, to see how large rows are
    warm.fill(dataset.train, 1, 1, lambda done, total: told.append((done, total)))
    rows = [row(each, dataset.train[7], 1, 1)[0] for each in (cold, warm)]
    np.testing.assert_array_equal(*rows)
    assert (views, second.calls, told) == (2, [], [])
    assert len(first.calls) == 1 + 2 * len(dataset.train) + len(dataset.val)


@pytest.mark.parametrize("change", ["seed", "augment", "size", "weights", "resize", "mean"])
def test_what_changes_the_numbers_changes_the_shelf(dataset: Dataset, cache: Path, change: str) -> None:
    filled(opened(Counted(two_parts()).ready(), dataset)[0], dataset)
    before = {path.name for path in cache.iterdir()}
    assert len(before) == 4
    options = {
        "seed": {"seed": 4},
        "augment": {"augment": Augment(rotate_degrees=1.0)},
        "size": {"spec": replace(SPEC, input_size=(32, 64))},
        "resize": {"spec": replace(SPEC, resize="crop")},
        "mean": {"spec": replace(SPEC, mean_255=(1.0, 2.0, 3.0))},
        "weights": {},
    }[change]
    trunk = two_parts(bias=0.1 if change == "weights" else 0.0)
    computed = Counted(trunk).ready((32, 64) if change == "size" else (64, 64))
    other = opened(computed, dataset, **options)[0]  # type: ignore[arg-type]
    assert not any(shelf.count for shelf in other.train)
    after = {path.name for path in cache.iterdir()}
    assert len(after - before) == (2 if change in ("seed", "augment") else 4)


def test_what_moves_no_pixel_keeps_the_shelf(dataset: Dataset, cache: Path) -> None:
    """Such as the temperature, which a finished run's spec has."""
    filled(opened(Counted(two_parts()).ready(), dataset)[0], dataset)
    spec = replace(SPEC, temperature=1.5, class_names=tuple("abcdefghij"))
    again = opened(Counted(two_parts()).ready(), dataset, spec=spec)[0]
    assert all(shelf.count == len(dataset.train) for shelf in again.train) and len(list(cache.iterdir())) == 4


def sizes(dataset: Dataset) -> tuple[int, int]:
    """Bytes of a view of the training images, and of the validation images."""
    found, _ = opened(Counted(two_parts()).ready(), dataset)
    view, plain = (sum(shelf.row_bytes for shelf in shelves) for shelves in (found.train, found.plain))
    return view * len(dataset.train), plain * len(dataset.val)


@pytest.mark.parametrize("views", [0, 1, 2, 3])
def test_where_there_is_less_room_there_are_fewer_views(dataset: Dataset, views: int) -> None:
    view_bytes, plain_bytes = sizes(dataset)
    limit = plain_bytes + views * view_bytes + view_bytes // 2
    computed = Counted(two_parts()).ready()
    found = open_features(computed, SPEC, Augment(), 3, dataset.train, dataset.val, 3, limit)
    if not views:
        assert found is None
        return
    assert found is not None and found[1] == views
    filled(found[0], dataset, views)
    again, fitting = opened(computed, dataset, 3, limit)
    assert fitting == views, "a warm run must see as many views as the cold one"
    assert all(shelf.count == views * len(dataset.train) for shelf in again.train)


def test_other_images_rows_go_where_they_are_in_the_way(dataset: Dataset) -> None:
    view_bytes, plain_bytes = sizes(dataset)
    computed = Counted(two_parts()).ready()
    filled(opened(computed, dataset, 2)[0], dataset, 2)
    third = len(dataset.train) // 3
    part = replace(dataset, train=dataset.train[:third])
    roomy, _ = opened(computed, part, 2, MANY)
    assert all(shelf.count == 2 * len(dataset.train) for shelf in roomy.train)
    tight, views = opened(computed, part, 2, plain_bytes + 2 * view_bytes)
    assert views == 2 and all(shelf.count == 2 * len(dataset.train) for shelf in tight.train), "there was room"
    more = replace(dataset, train=tuple(replace(s, sha256=s.sha256[::-1]) for s in dataset.train))
    other, views = opened(computed, more, 2, plain_bytes + 2 * view_bytes)
    assert views == 2 and not any(shelf.count for shelf in other.train)
    assert not [file for shelf in other.train for file in shelf.folder.iterdir()]


def test_a_damaged_row_is_computed_again(dataset: Dataset) -> None:
    trunk = two_parts()
    cold = filled(opened(Counted(trunk).ready(), dataset)[0], dataset)
    expected = [row(cold, sample, 0, 0)[0] for sample in dataset.train]
    (file,) = cold.train[0].folder.glob("*.rows")
    data = bytearray(file.read_bytes())
    data[10 * cold.train[0].row_bytes + 5] ^= 1
    file.write_bytes(data)
    for calls in (1, 0):  # the second run finds the mended row
        counted = Counted(trunk)
        warm = opened(counted.ready(), dataset)[0]
        counted.calls.clear()
        for sample, wanted in zip(dataset.train, expected, strict=True):
            np.testing.assert_array_equal(row(warm, sample, 0, 0)[0], wanted)
        assert len(counted.calls) == calls
        warm.fill([], 0, 0, lambda done, total: None)  # writes what is not written yet


def test_a_shelf_that_another_process_removed_is_not_missed(dataset: Dataset) -> None:
    trunk = two_parts()
    computed = Counted(trunk).ready()
    found = filled(opened(computed, dataset)[0], dataset)
    later = opened(computed, dataset)[0]
    expected = row(found, dataset.train[3], 0, 1)[0]
    feature_cache.make_room(MANY, 0)
    np.testing.assert_array_equal(row(later, dataset.train[3], 0, 1)[0], expected)
    later.refresh()
    later.fill(dataset.train, 1, 1, lambda done, total: None)
    assert later.is_full


@contextmanager
def largest_file(size_bytes: int) -> Iterator[Callable[[], None]]:
    """→ what makes the disk full: files end at this size. They may grow again after the block."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        yield lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (size_bytes, before[1]))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.parametrize("when", ["filled", "drawn"])
def test_rows_are_the_same_on_a_full_disk(dataset: Dataset, when: str) -> None:
    """Rounded as if they had been kept. Full while rows are filled, or when those are read that were not written."""
    trunk = two_parts()
    kept = filled(opened(Counted(trunk).ready(), dataset, seed=8)[0], dataset)
    expected = [row(kept, sample, 0, 1)[0] for sample in dataset.train]
    feature_cache.make_room(MANY, 0)
    full = opened(Counted(trunk).ready(), dataset, seed=8)[0]
    with largest_file(2 * full.train[1].row_bytes + 7) as fill_disk:
        fill_disk()
        if when == "filled":
            filled(full, dataset)
            assert full.is_full
        for _ in range(2):
            for sample, wanted in zip(dataset.train, expected, strict=True):
                np.testing.assert_array_equal(row(full, sample, 0, 1)[0], wanted)


def test_training_goes_on_when_the_disk_is_full(digits: Path, dataset: Dataset, tmp_path: Path) -> None:
    """With the same weights."""
    recipe = small(digits, "whole", views=2)
    whole = finetune(recipe, dataset, tmp_path)
    feature_cache.make_room(MANY, 0)
    notes: list[str] = []
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    with largest_file(3000) as fill_disk:
        full = finetune(
            recipe.model_copy(update={"name": "full"}),
            dataset,
            tmp_path,
            watch=Watch(
                on_image=lambda name, done, total: fill_disk(),
                on_step=lambda step: resource.setrlimit(resource.RLIMIT_FSIZE, before),
                on_note=notes.append,
            ),
        )
    assert [note for note in notes if "the disk is full" in note] and len(notes) <= 2
    rows = [file.stat().st_size for file in feature_cache.features_folder().glob("*/*.rows")]
    assert 3000 in rows, "nothing was cut off"
    for name in ("model.safetensors", "state/last.safetensors"):
        one, other = load_file(whole.run / name), load_file(full.run / name)
        assert all(torch.equal(one[key], other[key]) for key in one), name


def test_where_nothing_can_be_kept_it_is_said(
    digits: Path, dataset: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And training learns from the images; here the cache's place is a file."""
    monkeypatch.setenv("EDGEKIT_CACHE", str(tmp_path / "file"))
    (tmp_path / "file").touch()
    notes: list[str] = []
    finetune(small(digits, "a", epochs=0), dataset, tmp_path, watch=Watch(on_note=notes.append))
    assert notes == ["no room for the frozen layers' features: they are computed again in each epoch"]


def test_fewer_views_than_asked_for_are_said(
    digits: Path, dataset: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    notes: list[str] = []
    finetune(small(digits, "a", epochs=0), dataset, tmp_path, watch=Watch(on_note=notes.append))
    assert notes == []
    found = sum(file.stat().st_size for file in feature_cache.features_folder().glob("*/*.rows"))
    feature_cache.make_room(MANY, 0)
    monkeypatch.setattr(sources, "CACHE_BYTES", 2 * found)
    finetune(small(digits, "b", epochs=0), dataset, tmp_path, watch=Watch(on_note=notes.append))
    (note,) = notes
    assert re.fullmatch(r"there is room for the features of [123] views of each image, not 4", note)
