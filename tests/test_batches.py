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
from edgekit.samples import VOID, Box, Label, Mask, Sample

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


@pytest.mark.parametrize("resize", ["stretch", "crop", "letterbox"])
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
        assert batch.sizes == tuple(runner.read_image(s.path).shape[:2] for s in batch.samples)
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
@pytest.mark.parametrize("color_order", ["rgb", "bgr"])
@pytest.mark.parametrize("size", [(40, 56), (48, 64), (300, 400), (200, 64), (96, 200), (30, 50), (1, 90), (1, 1)])
def test_no_change_gives_the_runners_letterbox(size: tuple[int, int], color_order: str, interpolation: str) -> None:
    spec = replace(
        SPEC, resize="letterbox", interpolation=interpolation, color_order=color_order, mean_255=(10.4, 99.5, 200.0)
    )
    image = photo(1, *size)
    expected = runner.resize(image, spec)
    difference = np.abs(warped(image, NO_CHANGE, spec).astype(int) - expected)
    assert difference.max() <= 4
    place = runner.placement(size, spec)
    xs, ys = (np.arange(64) + 0.5) * place.step_x + place.left, (np.arange(48) + 0.5) * place.step_y + place.top
    bars = ~np.outer((ys > 0) & (ys < size[0]), (xs > 0) & (xs < size[1]))
    assert (difference[bars] == 0).all()
    # Brightness and contrast are the photo's, and leave the bars alone.
    recoloured = warped(image, only(brightness=0.2, contrast=0.4, saturation=0.5), spec, seed=3)
    np.testing.assert_array_equal(recoloured[bars], expected[bars])


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


# ---------------------------------------------------------------------------------------------------------------
# Boxes and masks


DARK = replace(SPEC, mean_255=(60.0, 60.0, 60.0))  # bars that are neither black nor white
RESIZES = ["stretch", "crop", "letterbox"]


def served(
    image: np.ndarray, label: Label | np.ndarray, spec: runner.Spec, augment: Augment | None = None, seed: int = 0
) -> tuple[np.ndarray, np.ndarray]:
    """One image and its label (a mask: its classes, uint8 (H, W)) → the input and its label in a batch of one."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        path = put(folder / "x.png", cv2.imencode(".png", image)[1].tobytes())
        if isinstance(label, np.ndarray):
            mask = put(folder / "mask.png", cv2.imencode(".png", label)[1].tobytes())
            label = Mask(mask, sha(mask), tuple(range(5)))
        sample = Sample(path, label, sha(path))
        (batch,) = batches((sample,), spec, 4, augment=augment, seed=None if augment is None else seed)
    assert (batch.samples, batch.sizes) == ((sample,), (image.shape[:2],))
    assert (batch.images.dtype, batch.images.shape) == (np.uint8, (1, *spec.input_size, 3))
    return batch.images[0], batch.labels[0]


@settings(max_examples=60, deadline=None)
@given(
    size=st.tuples(st.integers(1, 200), st.integers(1, 200)),
    resize=st.sampled_from(RESIZES),
    edges=st.lists(st.tuples(*[st.floats(0, 1)] * 4), max_size=4),
)
def test_without_augmentation_boxes_are_where_the_runner_places_them(
    size: tuple[int, int], resize: str, edges: list[tuple[float, float, float, float]]
) -> None:
    height, width = size
    spec = replace(SPEC, resize=resize)
    boxes = tuple(
        Box(n, min(a, b) * width, min(c, d) * height, max(a, b) * width, max(c, d) * height)
        for n, (a, b, c, d) in enumerate(edges)
        if a != b and c != d
    )
    _, made = served(photo(0, height, width), boxes, spec)
    place = runner.placement(size, spec)
    expected = []
    for box in boxes:
        left, right = ((x - place.left) / place.step_x for x in (box.left, box.right))
        top, bottom = ((y - place.top) / place.step_y for y in (box.top, box.bottom))
        cut = [max(left, 0), max(top, 0), min(right, 64), min(bottom, 48)]
        w, h = cut[2] - cut[0], cut[3] - cut[1]
        share = w * h / max((right - left) * (bottom - top), 1e-12)
        if abs(w - 2) < 1e-6 or abs(h - 2) < 1e-6 or abs(share - 0.3) < 1e-6:
            return  # on the limit: rounding decides
        if w >= 2 and h >= 2 and share >= 0.3:
            expected.append([box.class_id, *cut])
    assert (made.dtype, made.shape) == (np.float32, (len(expected), 5))
    np.testing.assert_allclose(made, np.array(expected).reshape(-1, 5), atol=1e-3)


@settings(max_examples=60, deadline=None)
@given(size=st.tuples(st.integers(1, 200), st.integers(1, 200)), resize=st.sampled_from(RESIZES))
def test_without_augmentation_a_mask_is_taken_at_the_middles_of_the_pixels(size: tuple[int, int], resize: str) -> None:
    height, width = size
    spec = replace(SPEC, resize=resize)
    classes = np.random.default_rng(height * width).integers(0, 5, size, np.uint8)
    _, made = served(photo(0, height, width), classes, spec)
    place = runner.placement(size, spec)
    expected = np.full((48, 64), VOID, np.uint8)
    for y in range(48):
        for x in range(64):
            column = int(np.floor(place.left + place.step_x * (x + 0.5)))
            row = int(np.floor(place.top + place.step_y * (y + 0.5)))
            if 0 <= row < height and 0 <= column < width:
                expected[y, x] = classes[row, column]
    assert made.dtype == np.uint8
    np.testing.assert_array_equal(made, expected)
    assert resize == "letterbox" or VOID not in made


AUGMENTS = st.builds(
    lambda flip, scale, degrees, shift: only(
        horizontal_flip=flip, scale=(scale, scale), rotate_degrees=degrees, translate=shift
    ),
    st.sampled_from([0, 1]),
    st.floats(0.6, 1.5),
    st.sampled_from([0, 0, 15, 180]),
    st.sampled_from([0, 0.2]),
)
SIZES = st.tuples(st.integers(60, 200), st.integers(60, 200))


@settings(max_examples=150, deadline=None)
@given(
    size=SIZES,
    resize=st.sampled_from(RESIZES),
    interpolation=st.sampled_from(["linear", "area"]),
    corner=st.tuples(st.floats(0, 0.7), st.floats(0, 0.7)),
    sides=st.tuples(st.floats(0.2, 1), st.floats(0.2, 1)),
    augment=AUGMENTS,
    seed=st.integers(0, 99),
)
def test_a_painted_rectangle_is_where_its_box_says(
    size: tuple[int, int],
    resize: str,
    interpolation: str,
    corner: tuple[float, float],
    sides: tuple[float, float],
    augment: Augment,
    seed: int,
) -> None:
    height, width = size
    left, top = int(corner[0] * width), int(corner[1] * height)
    right, bottom = min(left + int(sides[0] * width), width), min(top + int(sides[1] * height), height)
    image = np.zeros((height, width, 3), np.uint8)
    image[top:bottom, left:right] = 255
    spec = replace(DARK, resize=resize, interpolation=interpolation)
    made, boxes = served(image, (Box(1, left, top, right, bottom),), spec, augment, seed)

    white = made[..., 0] > 127
    if not len(boxes):  # what is left of it is small, or less than a third
        step = runner.placement(size, spec)
        area = (right - left) * (bottom - top) / (step.step_x * step.step_y * augment.scale[0] ** 2)
        assert white.sum() < 0.3 * 2 * area + 80  # 2: a turned rectangle's box has up to twice its area
        return
    ys, xs = np.nonzero(white)
    assert len(ys), boxes
    seen = np.array([xs.min(), ys.min(), xs.max() + 1, ys.max() + 1])
    class_id, *edges = boxes[0]
    assert class_id == 1
    if augment.rotate_degrees == 0:
        np.testing.assert_allclose(seen, edges, atol=1.5)
        return
    # Turned, its box reaches to corners that may lie beyond the input, so what one sees lies inside of the box.
    assert (seen[:2] > np.array(edges[:2]) - 1.5).all()
    assert (seen[2:] < np.array(edges[2:]) + 1.5).all()
    inside = all(2 < edge < limit - 2 for edge, limit in zip(edges, (64, 48, 64, 48), strict=True))
    if inside and white.sum() > 40:
        np.testing.assert_allclose(seen, edges, atol=3.5)  # a corner ends in less than a pixel


@settings(max_examples=150, deadline=None)
@given(
    size=SIZES,
    resize=st.sampled_from(RESIZES),
    interpolation=st.sampled_from(["linear", "area"]),
    augment=AUGMENTS,
    seed=st.integers(0, 99),
)
def test_a_mask_moves_as_its_photo(
    size: tuple[int, int], resize: str, interpolation: str, augment: Augment, seed: int
) -> None:
    height, width = size
    rng = np.random.default_rng(seed)
    classes = np.zeros(size, np.uint8)
    cv2.circle(classes, (int(rng.uniform(0, width)), int(rng.uniform(0, height))), min(size) // 3, 1, -1)
    cv2.rectangle(classes, (width // 8, height // 8), (width // 3, height // 2), 1, -1)
    image = np.repeat(classes[..., None], 3, axis=2) * 255
    spec = replace(DARK, resize=resize, interpolation=interpolation)
    made, moved = served(image, classes, spec, augment, seed)

    void = moved == VOID
    if resize != "letterbox":
        assert not void.any()
    assert (made[void] == 60).all()
    white = (made[..., 0] > 127).astype(np.uint8)
    shape = np.where(void, 0, moved)
    kernel = np.ones((5, 5), np.uint8)
    near_an_edge = (cv2.dilate(shape, kernel) != cv2.erode(shape, kernel)) | (
        cv2.dilate(void * np.uint8(1), kernel) > 0
    )
    near_an_edge[[0, -1]] = near_an_edge[:, [0, -1]] = True  # an edge may lie just beyond what is seen
    assert (white == shape)[~near_an_edge].all()


def test_beyond_the_photo_detection_sees_bars_and_segmentation_a_mirror() -> None:
    image = np.full((96, 128, 3), 255, np.uint8)
    wide = only(scale=(2, 2))
    for resize in ("stretch", "crop"):
        spec = replace(DARK, resize=resize)
        made, boxes = served(image, (Box(0, 0, 0, 128, 96),), spec, wide)
        np.testing.assert_array_equal(boxes, np.array([[0, 16, 12, 48, 36]], np.float32))
        assert (made[12:36, 16:48] == 255).all()
        assert (made[:12] == 60).all() and (made[:, :16] == 60).all() and (made[36:] == 60).all()
        made, moved = served(image, np.ones((96, 128), np.uint8), spec, wide)
        assert (made == 255).all() and (moved == 1).all()
    made, moved = served(image, np.ones((96, 128), np.uint8), replace(DARK, resize="letterbox"), wide)
    assert ((made[..., 0] == 60) == (moved == VOID)).all()
    assert (moved[12:36, 16:48] == 1).all() and (moved == 1).sum() == 24 * 32


@pytest.mark.parametrize(
    ("edges", "kept"),
    [
        ((52, 10, 82, 30), True),  # of 30 pixels 18 lie in the input, which begins at 64
        ((43, 10, 73, 30), True),  # 9 of 30
        ((42.9, 10, 72.9, 30), False),
        ((0, 10, 64, 30), False),
        ((100, 10, 102, 30), True),
        ((100, 10, 101.9, 30), False),
        ((100, 10, 120, 11.9), False),
    ],
)
def test_what_is_left_of_a_box_at_the_cut(edges: tuple[float, float, float, float], kept: bool) -> None:
    spec = replace(SPEC, resize="crop")  # shows columns 64 to 128 of this photo, pixel by pixel
    _, boxes = served(photo(0, 48, 192), (Box(1, *edges),), spec)
    left, top, right, bottom = edges
    expected = [[1, max(left - 64, 0), top, min(right - 64, 64), bottom]] if kept else []
    np.testing.assert_allclose(boxes, np.array(expected, np.float32).reshape(-1, 5), atol=1e-5)


def test_batches_of_boxes_and_masks(samples: tuple[Sample, ...], tmp_path: Path) -> None:
    sizes = [runner.read_image(sample.path).shape[:2] for sample in samples]
    boxed = [
        replace(s, label=(Box(0, 0, 0, *size[::-1]),) * (n % 3))
        for n, (s, size) in enumerate(zip(samples, sizes, strict=True))
    ]
    masked = []
    for n, (sample, size) in enumerate(zip(samples, sizes, strict=True)):
        path = put(tmp_path / f"{n}.png", cv2.imencode(".png", np.full(size, n % 2, np.uint8))[1].tobytes())
        masked.append(replace(sample, label=Mask(path, sha(path), (0, 1))))
    for augment, seed in ((None, None), (Augment(), 3)):
        for batch in batches(boxed, SPEC, 4, augment=augment, seed=seed):
            assert isinstance(batch.labels, tuple)
            assert [rows.shape for rows in batch.labels] == [(len(s.label), 5) for s in batch.samples]
            assert {rows.dtype for rows in batch.labels} == {np.dtype(np.float32)}
            assert batch.sizes == tuple(sizes[boxed.index(s)] for s in batch.samples)
        for batch in batches(masked, SPEC, 4, augment=augment, seed=seed):
            assert batch.labels.shape == (len(batch.samples), 48, 64)
            assert [int(m.max()) for m in batch.labels] == [masked.index(s) % 2 for s in batch.samples]


def test_a_mask_that_broke_since_the_check_is_named(samples: tuple[Sample, ...], tmp_path: Path) -> None:
    other = put(tmp_path / "other.png", cv2.imencode(".png", np.zeros((9, 9), np.uint8))[1].tobytes())
    for path, message in (
        (tmp_path / "gone.png", "cannot read the mask .*gone.png: No such file or directory"),
        (put(tmp_path / "bad.png", b"x"), "cannot read the mask .*bad.png: PIL cannot decode it"),
        (other, r"other.png was fine when the data was checked, and now it has 9 x 9 pixels, its photo 56 x 40"),
    ):
        with pytest.raises(DataError, match=message):
            list(batches([replace(samples[0], label=Mask(path, ""))], SPEC, 4))


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
