"""Batches of labelled images for training, evaluation and calibration: decoded, resized, and augmented with OpenCV.

Pixels are decoded and resized by edgekit.runner alone, so training sees what the device will see.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from functools import partial
from typing import TypeAlias

import cv2
import numpy as np

from edgekit import runner
from edgekit.datasets import in_order
from edgekit.errors import DataError
from edgekit.recipe import Augment
from edgekit.samples import VOID, Box, Sample, read_mask

Labels: TypeAlias = "np.ndarray | tuple[np.ndarray, ...]"
Item: TypeAlias = "tuple[Sample, Sequence[int] | None]"
"""An image, and the seed of its changes; None: it is left as it is."""


@dataclass(frozen=True)
class Batch:
    """images: uint8 (N, h, w, 3) BGR; samples: where each came from; sizes: (height, width) of each photo, in pixels.

    labels: of classification int64 (N,), class ids; of detection N arrays, float32 (boxes, 5), each row a class id and
    the left, top, right and bottom edge in pixels of the network's input; of segmentation uint8 (N, h, w), class ids
    and VOID.
    """

    images: np.ndarray
    labels: Labels
    samples: tuple[Sample, ...]
    sizes: tuple[tuple[int, int], ...]


def batches(
    samples: Sequence[Sample],
    spec: runner.Spec,
    batch_size: int,
    *,
    augment: Augment | None = None,
    seed: int | None = None,
    workers: int | None = None,
    order: Sequence[Sequence[int]] | None = None,
) -> Iterator[Batch]:
    """Decodes and resizes the samples in threads, at least one batch ahead; the last batch may be smaller.

    seed: None keeps the order; a number >= 0 shuffles (give another one each epoch). augment needs a seed. Each
    image's changes are drawn from (seed, its index in samples) alone, so neither the batch size nor the number of
    workers (default: the CPUs, at most 8) has an influence. Without augment an image is exactly
    runner.resize(runner.read_image(path), spec), and boxes and masks are where runner.placement says. Boxes are cut at
    the input's edges; one of which less than KEPT_SHARE of the area or KEPT_PX a side is left there is left out.
    order: the indices of each batch, as `batch_order` gives them, instead of all in batches. Closing the iterator early
    ends its threads.
    Raises DataError, naming the file, where one has vanished or broken since the check.
    """
    if augment is not None and seed is None:
        raise ValueError("augment needs a seed")
    chosen_order = batch_order(len(samples), batch_size, seed) if order is None else order
    chosen = [items_of(samples, batch, None if augment is None else seed) for batch in chosen_order]
    load = partial(_load_item, spec=spec, augment=augment)
    flat = [item for items in chosen for item in items]
    with closing(in_order(load, flat, workers=workers, ahead=2 * batch_size)) as stream:
        for items in chosen:
            yield _batch(items, [next(stream) for _ in items])


def items_of(samples: Sequence[Sample], order: Sequence[int], seed: int | None) -> list[Item]:
    """A batch of an epoch: its changes are drawn from the epoch's seed and each image's index in samples."""
    return [(samples[index], None if seed is None else (seed, index)) for index in order]


def load_batch(items: Sequence[Item], spec: runner.Spec, augment: Augment) -> Batch:
    """A batch without threads: what `batches` gives for the same items. Raises DataError as it does."""
    return _batch(items, [_load_item(item, spec, augment) for item in items])


def batch_order(
    count: int, batch_size: int, seed: int | None, *, rank: int = 0, processes: int = 1, least: int = 1
) -> list[list[int]]:
    """The indices 0 .. count - 1 in batches, the last of which may be smaller.

    seed: None keeps the order; a number >= 0 shuffles. Of several processes each gets its share of every batch: every
    `processes`-th index from its rank on. Batches of which a process would get fewer than `least` are left out for all.
    """
    order = range(count) if seed is None else np.random.default_rng(seed).permutation(count).tolist()
    batches = [list(order[start : start + batch_size]) for start in range(0, count, batch_size)]
    return [batch[rank::processes] for batch in batches if len(batch) // processes >= least]


@dataclass(frozen=True)
class _Loaded:
    image: np.ndarray  # uint8 (h, w, 3)
    label: int | np.ndarray  # a class id, float32 (boxes, 5), or uint8 (h, w)
    size: tuple[int, int]  # (height, width) of the photo


def _batch(items: Sequence[Item], loaded: Sequence[_Loaded]) -> Batch:
    images, sizes = np.stack([one.image for one in loaded]), tuple(one.size for one in loaded)
    return Batch(images, _together([one.label for one in loaded]), tuple(sample for sample, _ in items), sizes)


def _together(labels: Sequence[int | np.ndarray]) -> Labels:
    maps = [label for label in labels if isinstance(label, np.ndarray)]
    if not maps:
        return np.array(labels, np.int64)
    return np.stack(maps) if maps[0].dtype == np.uint8 else tuple(maps)


def _load_item(item: Item, spec: runner.Spec, augment: Augment | None) -> _Loaded:
    sample, seed = item
    return _load(sample, spec, augment, seed)


def load_image(sample: Sample, spec: runner.Spec) -> np.ndarray:
    """One image as the device prepares it, uint8 (h, w, 3) BGR. Raises DataError as `load_view`."""
    return _load(sample, spec, None, None).image


def load_view(sample: Sample, spec: runner.Spec, augment: Augment | None, seed: int, view: int) -> np.ndarray:
    """One image, uint8 (h, w, 3) BGR, changed as (seed, view, the file's content) say, whatever images are beside it.

    Raises DataError, naming the file, where it has vanished or broken since the check.
    """
    return _load(sample, spec, augment, (seed, view, int(sample.sha256[:16], 16))).image


def _load(sample: Sample, spec: runner.Spec, augment: Augment | None, seed: Sequence[int] | None) -> _Loaded:
    try:
        image = runner.read_image(sample.path)
    except runner.RunnerError as error:
        raise DataError(f"{sample.path} was fine when the data was checked, and now: {error}") from None
    size = (image.shape[0], image.shape[1])
    if augment is None or seed is None:
        return _Loaded(runner.resize(image, spec), _label(sample, size, spec, _plain_view(size, spec)), size)
    change = _draw(augment, np.random.default_rng(seed))
    view = _view(size, spec, change)
    # A mirrored object would be one that no box is around.
    mirrors = spec.resize != "letterbox" and not isinstance(sample.label, tuple)
    image = _recolor(_warp(image, spec, view), change)
    if not mirrors:
        image[~_inside(view, size, spec)] = _bar_color(spec)
    return _Loaded(image, _label(sample, size, spec, view), size)


def _label(sample: Sample, size: tuple[int, int], spec: runner.Spec, view: _View) -> int | np.ndarray:
    if isinstance(sample.label, int):
        return sample.label
    if isinstance(sample.label, tuple):
        return _move_boxes(sample.label, spec, view)
    classes = read_mask(sample.label)
    if classes.shape != size:
        found = f"{classes.shape[1]} x {classes.shape[0]} pixels, its photo {size[1]} x {size[0]}"
        raise DataError(f"{sample.label.path} was fine when the data was checked, and now it has {found}")
    return _move_mask(classes, spec, view)


# ---------------------------------------------------------------------------------------------------------------
# Where the input's pixels lie in the photo


@dataclass(frozen=True)
class _View:
    """An affine map: photo (x, y) = linear @ input (x, y) + offset, in pixels from the upper left corner."""

    linear: np.ndarray  # float64 (2, 2)
    offset: np.ndarray  # float64 (2,)
    step: tuple[float, float]  # photo pixels an input pixel, along the input's x and y


def _plain_view(size: tuple[int, int], spec: runner.Spec) -> _View:
    place = runner.placement(size, spec)
    steps = (place.step_x, place.step_y)
    return _View(np.diag(steps), np.array([place.left, place.top]), steps)


def _view(size: tuple[int, int], spec: runner.Spec, change: _Change) -> _View:
    """size: (height, width) of the photo. Flipped, scaled, rotated and shifted about the input's centre.

    The rotation is one of the photo's own pixels, before "stretch" changes the aspect ratio: as if the camera had
    been turned. Without any change it is runner.placement.
    """
    place = runner.placement(size, spec)
    middle = np.array([spec.input_size[1] / 2, spec.input_size[0] / 2])
    steps = np.array([place.step_x, place.step_y])
    cos, sin = math.cos(math.radians(change.degrees)), math.sin(math.radians(change.degrees))
    flip = np.diag([-1.0 if change.flip else 1.0, 1.0])
    linear = np.array([[cos, -sin], [sin, cos]]) @ np.diag(change.scale * steps) @ flip
    center = [place.left, place.top] + steps * middle * (1 + 2 * np.array(change.shift))
    return _View(linear, center - linear @ middle, (change.scale * place.step_x, change.scale * place.step_y))


def _sources(view: _View, spec: runner.Spec) -> tuple[np.ndarray, np.ndarray]:
    """x and y in the photo of the middle of each input pixel, float64 (h, w) each."""
    height, width = spec.input_size
    xs, ys = np.arange(width) + 0.5, np.arange(height)[:, None] + 0.5
    (a, b), (c, d) = view.linear
    return a * xs + b * ys + view.offset[0], c * xs + d * ys + view.offset[1]


def _inside(view: _View, size: tuple[int, int], spec: runner.Spec) -> np.ndarray:
    """bool (h, w): whether the middle of the input's pixel lies in a photo of size (height, width)."""
    xs, ys = _sources(view, spec)
    inside: np.ndarray = (xs >= 0) & (xs < size[1]) & (ys >= 0) & (ys < size[0])
    return inside


def _bar_color(spec: runner.Spec) -> tuple[int, ...]:
    """BGR of what runner.resize puts beside a letterboxed photo."""
    color = tuple(round(value) for value in spec.mean_255)
    return color[::-1] if spec.color_order == "rgb" else color


# ---------------------------------------------------------------------------------------------------------------
# Boxes and masks


KEPT_SHARE = 0.3  # of a box's area in the input: of less one can hardly say what it is
KEPT_PX = 2.0  # a side of a box in the input


def _move_boxes(boxes: tuple[Box, ...], spec: runner.Spec, view: _View) -> np.ndarray:
    """Boxes in a photo → float32 (boxes, 5), those that are left of them in the input. (A turned box grows.)"""
    if not boxes:
        return np.zeros((0, 5), np.float32)
    edges = np.array([[box.left, box.top, box.right, box.bottom] for box in boxes])
    corners = edges[:, [[0, 1], [2, 1], [2, 3], [0, 3]]] - view.offset  # (boxes, 4, 2)
    moved = corners @ np.linalg.inv(view.linear).T
    low, high = moved.min(axis=1), moved.max(axis=1)
    limit = np.array([spec.input_size[1], spec.input_size[0]])
    cut_low, cut_high = low.clip(0, limit), high.clip(0, limit)
    sides = cut_high - cut_low
    kept = (sides >= KEPT_PX).all(axis=1) & (sides.prod(axis=1) >= KEPT_SHARE * (high - low).prod(axis=1))
    class_ids = np.array([box.class_id for box in boxes])
    rows: np.ndarray = np.column_stack([class_ids, cut_low, cut_high])[kept].astype(np.float32)
    return rows


def _move_mask(classes: np.ndarray, spec: runner.Spec, view: _View) -> np.ndarray:
    """uint8 (H, W) → uint8 (h, w): the class at the middle of each input pixel.

    Beyond the photo it is mirrored, as the photo is; VOID with "letterbox".
    """
    height, width = classes.shape
    xs, ys = (np.floor(values).astype(np.int64) for values in _sources(view, spec))
    moved: np.ndarray = classes[_mirrored(ys, height), _mirrored(xs, width)]
    if spec.resize == "letterbox":
        moved[(xs < 0) | (xs >= width) | (ys < 0) | (ys >= height)] = VOID
    return moved


def _mirrored(index: np.ndarray, length: int) -> np.ndarray:
    """Any index → 0 .. length - 1, as cv2.BORDER_REFLECT: -1 is 0, length is length - 1."""
    index = index % (2 * length)
    mirrored: np.ndarray = np.minimum(index, 2 * length - 1 - index)
    return mirrored


# ---------------------------------------------------------------------------------------------------------------
# Augmentation


@dataclass(frozen=True)
class _Change:
    """What is done to one image. The defaults change nothing."""

    flip: bool = False
    scale: float = 1.0  # side of the region shown, as a share of the region that runner.resize shows
    degrees: float = 0.0
    shift: tuple[float, float] = (0.0, 0.0)  # (x, y), as shares of that region's sides
    brightness: float = 0.0  # offset, as a share of white
    contrast: float = 1.0  # factor on the distance from the image's mean
    saturation: float = 1.0  # factor on the distance from grey


def _draw(augment: Augment, rng: np.random.Generator) -> _Change:
    return _Change(
        flip=bool(rng.random() < augment.horizontal_flip),
        scale=rng.uniform(*augment.scale),
        degrees=rng.uniform(-augment.rotate_degrees, augment.rotate_degrees),
        shift=(rng.uniform(-augment.translate, augment.translate), rng.uniform(-augment.translate, augment.translate)),
        brightness=rng.uniform(-augment.brightness, augment.brightness),
        contrast=1 + rng.uniform(-augment.contrast, augment.contrast),
        saturation=1 + rng.uniform(-augment.saturation, augment.saturation),
    )


# warpAffine of OpenCV 4 counts pixels in 16 bits.
WARP_LIMIT = 32766


def _warp(image: np.ndarray, spec: runner.Spec, view: _View) -> np.ndarray:
    """uint8 (H, W, 3) → uint8 (h, w, 3): what the view shows; the pixels are interpolated once, borders mirrored.

    Without any change the result is runner.resize's but for rounding and, with "crop", the pixels beyond the cut.
    "area": the whole photo is area-averaged first, to the density of pixels that the warp then samples.
    """
    (height, width), (h, w) = image.shape[:2], spec.input_size
    step_x, step_y = view.step
    shrinks = spec.interpolation == "area" and min(step_x, step_y) >= 1
    new_width = round(width / step_x) if shrinks else min(width, WARP_LIMIT)
    new_height = round(height / step_y) if shrinks else min(height, WARP_LIMIT)
    if (new_width, new_height) != (width, height):
        shrunk_size = (max(1, new_height), max(1, new_width))
        image = runner.resize(image, replace(spec, resize="stretch", input_size=shrunk_size))
    # Pixel i covers [i, i + 1) and is sampled at its middle, i + 0.5, as in cv2.resize.
    offset = view.offset + view.linear @ [0.5, 0.5]
    shrunk = np.array([image.shape[1] / width, image.shape[0] / height])
    matrix = np.column_stack([shrunk[:, None] * view.linear, shrunk * offset - 0.5])
    flags = cv2.INTER_LINEAR | cv2.WARP_INVERSE_MAP  # the matrix leads from the network's pixels to the photo's
    # BORDER_REFLECT repeats the outermost pixel first, so that half a pixel outside is what cv2.resize has there.
    return cv2.warpAffine(image, matrix, (w, h), flags=flags, borderMode=cv2.BORDER_REFLECT)


def _recolor(image: np.ndarray, change: _Change) -> np.ndarray:
    """uint8 (h, w, 3) BGR → the same, brightness, contrast and saturation changed in one linear map."""
    luma = np.array([0.114, 0.587, 0.299])  # of B, G, R: ITU-R BT.601
    mean = float(luma @ cv2.mean(image)[:3])
    saturate = change.saturation * np.eye(3) + (1 - change.saturation) * np.tile(luma, (3, 1))
    offset = 255 * change.brightness + (1 - change.contrast) * mean
    return cv2.transform(image, np.column_stack([change.contrast * saturate, np.full(3, offset)]))
