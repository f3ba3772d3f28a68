"""Batches are what the runner makes, and augmentation depends on the seed and the image alone."""

from __future__ import annotations

import tempfile
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import cv2
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pictures import SPEC, photo, put, sha

from edgekit import runner
from edgekit.batches import Batch, batches
from edgekit.errors import DataError
from edgekit.recipe import Augment
from edgekit.samples import Sample

NO_CHANGE = Augment(
    horizontal_flip=0, scale=(1, 1), rotate_degrees=0, translate=0, brightness=0, contrast=0, saturation=0
)


@pytest.fixture(scope="module")
def samples(tmp_path_factory: pytest.TempPathFactory) -> tuple[Sample, ...]:
    """Eleven images of two classes and of several sizes and shapes; the last has one pixel."""
    folder = tmp_path_factory.mktemp("images")
    sizes = [(40, 56), (200, 90), (48, 64), (300, 400), (30, 100)] * 2 + [(1, 1)]
    made = []
    for n, (height, width) in enumerate(sizes):
        path = put(folder / f"{n}.png", cv2.imencode(".png", photo(n, height, width))[1].tobytes())
        made.append(Sample(path, n % 2, sha(path)))
    return tuple(made)


@pytest.mark.parametrize("resize", ["stretch", "crop"])
@pytest.mark.parametrize("interpolation", ["linear", "area"])
def test_without_augmentation_a_batch_is_what_the_runner_makes(
    samples: tuple[Sample, ...], resize: str, interpolation: str
) -> None:
    spec = replace(SPEC, resize=resize, interpolation=interpolation)
    made = list(batches(samples, spec, 4))
    assert [batch.images.shape for batch in made] == [(4, 48, 64, 3), (4, 48, 64, 3), (3, 48, 64, 3)]
    assert sum((batch.samples for batch in made), ()) == samples
    for batch in made:
        assert batch.images.dtype == np.uint8
        assert batch.labels.dtype == np.int64
        assert batch.labels.tolist() == [s.label for s in batch.samples]
        for image, sample in zip(batch.images, batch.samples, strict=True):
            np.testing.assert_array_equal(image, runner.resize(runner.read_image(sample.path), spec))


def by_sample(batches: Iterator[Batch]) -> dict[Path, np.ndarray]:
    return {s.path: image for batch in batches for s, image in zip(batch.samples, batch.images, strict=True)}


def test_a_seed_shuffles_and_leaves_the_pixels_alone(samples: tuple[Sample, ...]) -> None:
    orders = [[s.path for batch in batches(samples, SPEC, 4, seed=seed) for s in batch.samples] for seed in (1, 1, 2)]
    in_order = [s.path for s in samples]
    assert orders[0] == orders[1]
    assert len({tuple(order) for order in (*orders, in_order)}) == 3
    assert all(sorted(order) == sorted(in_order) for order in orders)
    plain, shuffled = (by_sample(batches(samples, SPEC, 4, seed=seed)) for seed in (None, 5))
    for path, image in plain.items():
        np.testing.assert_array_equal(image, shuffled[path])


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 2**63), size=st.integers(1, 13), workers=st.integers(1, 4))
def test_augmentation_depends_on_the_seed_and_the_index_alone(
    samples: tuple[Sample, ...], seed: int, size: int, workers: int
) -> None:
    augment = Augment()
    expected = by_sample(batches(samples, SPEC, 4, augment=augment, seed=seed))
    actual = by_sample(batches(samples, SPEC, size, augment=augment, seed=seed, workers=workers))
    other = by_sample(batches(samples, SPEC, 4, augment=augment, seed=seed + 1))
    assert actual.keys() == expected.keys()
    for path, image in expected.items():
        np.testing.assert_array_equal(actual[path], image)
    assert any((other[path] != image).any() for path, image in expected.items())


def test_copies_at_different_indices_are_changed_differently(samples: tuple[Sample, ...]) -> None:
    (batch,) = batches((samples[0], samples[0]), SPEC, 2, augment=Augment(), seed=0)
    assert (batch.images[0] != batch.images[1]).any()


def warped(image: np.ndarray, augment: Augment, spec: runner.Spec = SPEC, seed: int = 0) -> np.ndarray:
    with tempfile.TemporaryDirectory() as folder:
        path = put(Path(folder, "x.png"), cv2.imencode(".png", image)[1].tobytes())
        (batch,) = batches((Sample(path, 0, ""),), spec, 1, augment=augment, seed=seed)
    return np.asarray(batch.images[0])


def only(**changes: object) -> Augment:
    return NO_CHANGE.model_copy(update=changes)


def distance(a: np.ndarray, b: np.ndarray) -> float:
    return float(np.abs(a.astype(int) - b).mean())


@pytest.mark.parametrize("interpolation", ["linear", "area"])
@pytest.mark.parametrize("size", [(40, 56), (48, 64), (1, 1), (2, 9), (300, 400), (200, 64), (96, 200), (30, 50)])
def test_no_change_gives_the_runners_picture(size: tuple[int, int], interpolation: str) -> None:
    spec = replace(SPEC, interpolation=interpolation)
    image = photo(1, *size)
    difference = np.abs(warped(image, NO_CHANGE, spec).astype(int) - runner.resize(image, spec))
    assert difference.mean() < 1
    assert difference.max() <= 4


@pytest.mark.parametrize("interpolation", ["linear", "area"])
@pytest.mark.parametrize("size", [(48, 64), (300, 400), (200, 64), (96, 200), (30, 50)])  # cut at whole pixels
def test_no_change_gives_the_runners_crop(size: tuple[int, int], interpolation: str) -> None:
    spec = replace(SPEC, resize="crop", interpolation=interpolation)
    image = photo(1, *size)
    difference = np.abs(warped(image, NO_CHANGE, spec).astype(int) - runner.resize(image, spec))
    # The warp sees the pixels beyond the cut too, and mixes them into the outermost ones.
    assert difference[1:-1, 1:-1].max() <= 4
    assert difference.mean() < 1


def test_flip() -> None:
    image = photo(1, 96, 128)
    assert distance(warped(image, only(horizontal_flip=1)), runner.resize(image, SPEC)[:, ::-1]) < 1


def test_scale_shows_the_centre_or_the_mirrored_surroundings() -> None:
    image = photo(1, 96, 128)
    assert distance(warped(image, only(scale=(0.5, 0.5))), runner.resize(image[24:72, 32:96], SPEC)) < 1
    wider = cv2.copyMakeBorder(image, 48, 48, 64, 64, cv2.BORDER_REFLECT)
    assert distance(warped(image, only(scale=(2, 2))), runner.resize(wider, SPEC)) < 1


def test_rotation_is_of_the_photo_not_of_the_stretched_picture() -> None:
    augment, spec = only(rotate_degrees=180), replace(SPEC, input_size=(48, 96))
    disc = np.zeros((200, 200, 3), np.uint8)
    cv2.circle(disc, (100, 100), 40, (255, 255, 255), -1, cv2.LINE_AA)
    for seed in range(5):
        # A round thing stays the same ellipse, however the camera is turned.
        assert distance(warped(disc, augment, spec, seed), runner.resize(disc, spec)) < 2


def test_rotation_turns_by_at_most_the_given_angle() -> None:
    bar = np.zeros((101, 101, 3), np.uint8)
    bar[49:52] = 255
    spec = replace(SPEC, input_size=(101, 101))
    angles = []
    for seed in range(40):
        ys, xs = np.nonzero(warped(bar, only(rotate_degrees=20), spec, seed)[20:81, 20:81, 0] > 128)
        angles.append(np.degrees(np.arctan(np.polyfit(xs, ys, 1)[0])))
    assert -20.5 < min(angles) < -14
    assert 14 < max(angles) < 20.5


def test_translation_shifts_by_at_most_the_given_share() -> None:
    dot = np.zeros((100, 100, 3), np.uint8)
    dot[48:52, 48:52] = 255
    spec = replace(SPEC, input_size=(100, 100))
    shifts = []
    for seed in range(40):
        ys, xs = np.nonzero(warped(dot, only(translate=0.2), spec, seed)[..., 0] > 128)
        shifts.append((xs.mean() - 49.5, ys.mean() - 49.5))
    low, high = np.min(shifts, axis=0), np.max(shifts, axis=0)
    assert (low > -20.6).all() and (low < -14).all()
    assert (high > 14).all() and (high < 20.6).all()


def test_area_averages_where_linear_skips_pixels() -> None:
    stripes = np.zeros((480, 640, 3), np.uint8)
    stripes[:, ::2] = 255  # finer than the network's pixels: their average is grey
    area = warped(stripes, only(scale=(0.9, 0.9), rotate_degrees=5), replace(SPEC, interpolation="area"))
    assert np.abs(area.astype(int) - 128).max() < 16
    assert warped(stripes, only(scale=(0.9, 0.9), rotate_degrees=5)).std() > 16


def test_crop_keeps_the_aspect_ratio() -> None:
    disc = np.zeros((100, 300, 3), np.uint8)
    cv2.circle(disc, (150, 50), 30, (255, 255, 255), -1, cv2.LINE_AA)
    spec = replace(SPEC, resize="crop", input_size=(64, 64))
    for seed in range(3):
        picture = warped(disc, only(rotate_degrees=180), spec, seed)
        ys, xs = np.nonzero(picture[..., 0] > 128)
        assert abs(np.ptp(xs) - np.ptp(ys)) <= 1
        assert np.ptp(xs) == pytest.approx(60 * 64 / 100, abs=1.5)


def test_a_photo_wider_than_opencv_4_can_warp() -> None:
    image = photo(1, 10, 40_000)
    assert distance(warped(image, NO_CHANGE), runner.resize(image, SPEC)) < 1


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 2**31), brightness=st.floats(0, 0.2), contrast=st.floats(0, 0.5), saturation=st.floats(0, 1))
def test_colours_change_within_their_bounds(seed: int, brightness: float, contrast: float, saturation: float) -> None:
    image = cv2.resize(photo(1), (64, 48)) // 4 + 60  # darker than grey; nothing is clipped at black or white
    before = runner.resize(image, SPEC).astype(float)
    luma = np.array([0.114, 0.587, 0.299])

    after = warped(image, only(brightness=brightness), seed=seed).astype(float)
    assert np.ptp(after - before) <= 1
    assert abs((after - before).mean()) <= 255 * brightness + 0.6

    after = warped(image, only(contrast=contrast), seed=seed).astype(float)
    assert 1 - contrast - 0.02 <= after.std() / before.std() <= 1 + contrast + 0.02
    assert (after @ luma).mean() == pytest.approx((before @ luma).mean(), abs=0.6)

    after = warped(image, only(saturation=saturation), seed=seed).astype(float)
    np.testing.assert_allclose(after @ luma, before @ luma, atol=1.0)
    chroma = [(pixels - (pixels @ luma)[..., None]).std() for pixels in (before, after)]
    assert 1 - saturation - 0.02 <= chroma[1] / chroma[0] <= 1 + saturation + 0.02


def test_colours_change_up_to_their_bounds() -> None:
    image = cv2.resize(photo(1), (64, 48)) // 4 + 96
    before = runner.resize(image, SPEC).astype(float)
    luma = np.array([0.114, 0.587, 0.299])

    def chroma(pixels: np.ndarray) -> float:
        return float((pixels - (pixels @ luma)[..., None]).std())

    brightness, contrast, saturation = (
        [warped(image, only(**{name: 0.3}), seed=seed).astype(float) for seed in range(30)]
        for name in ("brightness", "contrast", "saturation")
    )
    for values in (
        [(after - before).mean() / 255 for after in brightness],
        [after.std() / before.std() - 1 for after in contrast],
        [chroma(after) / chroma(before) - 1 for after in saturation],
    ):
        assert -0.31 < min(values) < -0.22
        assert 0.22 < max(values) < 0.31


def test_each_change_takes_place() -> None:
    image = photo(1, 96, 128)
    plain = warped(image, NO_CHANGE)
    for change in ("brightness", "contrast", "saturation", "translate", "rotate_degrees"):
        value = 30 if change == "rotate_degrees" else 0.3
        assert max(distance(warped(image, only(**{change: value}), seed=seed), plain) for seed in range(4)) > 2, change


def test_no_samples_give_no_batches() -> None:
    assert list(batches((), SPEC, 4)) == []


def test_augmenting_without_a_seed_is_a_mistake_of_ours(samples: tuple[Sample, ...]) -> None:
    with pytest.raises(ValueError, match="augment needs a seed"):
        next(batches(samples, SPEC, 4, augment=Augment()))


def test_a_file_that_broke_since_the_check_is_named(samples: tuple[Sample, ...], tmp_path: Path) -> None:
    gone = replace(samples[0], path=tmp_path / "gone.png")
    broken = replace(samples[0], path=put(tmp_path / "broken.png", b"x"))
    for bad, reason in ((gone, "No such file or directory"), (broken, "not an image that OpenCV can decode")):
        with pytest.raises(DataError) as caught:
            list(batches([*samples, bad], SPEC, 4))
        assert str(caught.value) == f"{bad.path} was fine when the data was checked, and now: {reason}"
    assert not data_threads()


def data_threads() -> list[str]:
    return [thread.name for thread in threading.enumerate() if thread.name.startswith("edgekit-data")]


def test_closing_early_ends_the_threads(samples: tuple[Sample, ...]) -> None:
    stream = batches(samples * 50, SPEC, 4, augment=Augment(), seed=0, workers=3)
    next(stream)
    assert len(data_threads()) == 3
    stream.close()  # type: ignore[attr-defined]
    assert data_threads() == []


def test_a_batch_is_prepared_while_the_last_one_is_used(samples: tuple[Sample, ...], tmp_path: Path) -> None:
    data = samples[0].path.read_bytes()
    copies = [replace(samples[0], path=put(tmp_path / f"{n}.png", data)) for n in range(20)]
    stream = batches(copies, SPEC, 4, workers=2)
    next(stream)
    time.sleep(0.5)  # more than the threads need to read four small files, with nobody asking for them
    for sample in copies[4:8]:
        sample.path.unlink()
    assert next(stream).samples == tuple(copies[4:8])
