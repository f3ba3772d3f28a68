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
from edgekit.samples import Sample

Labels: TypeAlias = "np.ndarray | tuple[np.ndarray, ...]"


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
) -> Iterator[Batch]:
    """Decodes and resizes the samples in threads, at least one batch ahead; the last batch may be smaller.

    seed: None keeps the order; a number >= 0 shuffles (give another one each epoch). augment needs a seed. Each
    image's changes are drawn from (seed, its index in samples) alone, so neither the batch size nor the number of
    workers (default: the CPUs, at most 8) has an influence. Without augment an image is exactly
    runner.resize(runner.read_image(path), spec). Closing the iterator early ends its threads.
    Raises DataError, naming the file, where one has vanished or broken since the check.
    """
    if augment is not None and seed is None:
        raise ValueError("augment needs a seed")
    order = range(len(samples)) if seed is None else np.random.default_rng(seed).permutation(len(samples)).tolist()
    items = [(index, samples[index]) for index in order]
    load = partial(_load, spec=spec, augment=augment, seed=seed)
    with closing(in_order(load, items, workers=workers, ahead=2 * batch_size)) as images:
        for start in range(0, len(items), batch_size):
            chosen = tuple(sample for _, sample in items[start : start + batch_size])
            pixels = np.stack([next(images) for _ in chosen])
            yield Batch(pixels, np.array([sample.label for sample in chosen], np.int64), chosen)


def _load(item: tuple[int, Sample], spec: runner.Spec, augment: Augment | None, seed: int | None) -> np.ndarray:
    index, sample = item
    try:
        image = runner.read_image(sample.path)
    except runner.RunnerError as error:
        raise DataError(f"{sample.path} was fine when the data was checked, and now: {error}") from None
    if augment is None or seed is None:
        return runner.resize(image, spec)
    return _change(image, spec, _draw(augment, np.random.default_rng((seed, index))))


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


def _change(image: np.ndarray, spec: runner.Spec, change: _Change) -> np.ndarray:
    """uint8 (H, W, 3) BGR → uint8 (h, w, 3) BGR, changed; the pixels are interpolated once."""
    return _recolor(_warp(image, spec, change), change)


# warpAffine of OpenCV 4 counts pixels in 16 bits.
WARP_LIMIT = 32766


def _warp(image: np.ndarray, spec: runner.Spec, change: _Change) -> np.ndarray:
    """uint8 (H, W, 3) → uint8 (h, w, 3): flipped, scaled, rotated and shifted about the centre, borders mirrored.

    The rotation is one of the photo's own pixels, before "stretch" changes the aspect ratio: as if the camera had
    been turned. Without any change the result is runner.resize's but for rounding (and, with "crop", for up to half
    a photo pixel, since runner.resize cuts at whole pixels).
    "area": the whole photo is area-averaged first, to the density of pixels that the warp then samples.
    """
    (height, width), (h, w) = image.shape[:2], spec.input_size
    region_width, region_height = float(width), float(height)
    if spec.resize == "crop":
        region_width, region_height = min(width, height * w / h), min(height, width * h / w)
    # Photo pixels a network pixel, along x and y.
    step_x, step_y = change.scale * region_width / w, change.scale * region_height / h
    shrinks = spec.interpolation == "area" and min(step_x, step_y) >= 1
    new_width = round(width / step_x) if shrinks else min(width, WARP_LIMIT)
    new_height = round(height / step_y) if shrinks else min(height, WARP_LIMIT)
    if (new_width, new_height) != (width, height):
        shrunk_size = (max(1, new_height), max(1, new_width))
        image = runner.resize(image, replace(spec, resize="stretch", input_size=shrunk_size))

    cos, sin = math.cos(math.radians(change.degrees)), math.sin(math.radians(change.degrees))
    flip = -1 if change.flip else 1
    linear = np.array([[cos, -sin], [sin, cos]]) @ np.diag([flip * step_x, step_y])
    center = [width / 2 + change.shift[0] * region_width, height / 2 + change.shift[1] * region_height]
    # Pixel i covers [i, i + 1) and is sampled at its middle, i + 0.5, as in cv2.resize.
    offset = center + linear @ [0.5 - w / 2, 0.5 - h / 2]
    shrunk = np.array([image.shape[1] / width, image.shape[0] / height])
    matrix = np.column_stack([shrunk[:, None] * linear, shrunk * offset - 0.5])
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
