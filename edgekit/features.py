"""What the frozen part of a network gives for images and for augmented views of them: computed once, then kept.

The rows of training images are float16 (half the room; augmentation changes far more than that rounding), those of
validation images float32, so that figures are those of the whole network.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import cv2
import numpy as np

from edgekit import feature_cache, runner
from edgekit.batches import load_image, load_view
from edgekit.datasets import in_order
from edgekit.feature_cache import Shelf
from edgekit.frozen import Frozen, Parts
from edgekit.recipe import Augment
from edgekit.samples import Sample

FORM = 1  # of what is computed for an image; another number where the same key would give other values

PLAIN = -1  # the view of an image as it is


@dataclass(frozen=True)
class FeatureBatch:
    """arrays: what the frozen part gives, float32 (N, ...) each; labels: int64 (N,); samples: where each came from."""

    arrays: tuple[np.ndarray, ...]
    labels: np.ndarray
    samples: tuple[Sample, ...]


@dataclass
class Features:
    """The features of a run's images. `open_features` makes one."""

    frozen: Frozen
    spec: runner.Spec
    augment: Augment
    seed: int
    train: tuple[Shelf, ...]  # one for each of the trunk's parts
    plain: tuple[Shelf, ...]
    is_full: bool = field(default=False)  # a row could not be written: what is computed from now on is not kept

    def fill(self, samples: Sequence[Sample], view: int, part: int, on_image: Callable[[int, int], None]) -> None:
        """Computes what is missing of a view for the trunk's parts up to `part` (from 0), in all threads.

        view: from 0, or PLAIN. on_image: called with how many are done, and of how many.
        """
        shelves = self._shelves(view)[: part + 1]
        missing = [sample for sample in samples if not all(shelf.has(sample.sha256, view) for shelf in shelves)]
        if self.is_full:
            return
        compute, done = partial(self._compute, view=view, part=part), 0
        with closing(in_order(compute, _chunks(missing, self.frozen.batch_size), workers=None, ahead=AHEAD)) as stream:
            for rows in stream:
                done += len(rows)
                on_image(done, len(missing))
        for shelf in shelves:
            self._keep(shelf.flush)

    def refresh(self) -> None:
        """Looks what other processes of the run have computed."""
        for shelf in (*self.train, *self.plain):
            self._keep(shelf.refresh)

    def batches(
        self, samples: Sequence[Sample], view: int, part: int, order: Sequence[Sequence[int]]
    ) -> Iterator[FeatureBatch]:
        """A part's rows, a batch for each list of indices in `order`; what is not kept is computed again."""
        load = partial(self._batch, view=view, part=part)
        chosen = [[samples[index] for index in batch] for batch in order]
        with closing(in_order(load, chosen, workers=None, ahead=BATCHES_AHEAD)) as stream:
            yield from stream

    def _batch(self, samples: Sequence[Sample], view: int, part: int) -> FeatureBatch:
        kept = [self._shelves(view)[part].get(sample.sha256, view) for sample in samples]
        gone = [sample for sample, row in zip(samples, kept, strict=True) if row is None]
        chunks = _chunks(gone, self.frozen.batch_size)
        computed = iter([parts[part] for chunk in chunks for parts in self._compute(chunk, view, part)])
        rows = [next(computed) if row is None else row for row in kept]
        arrays = tuple(np.stack(column).astype(np.float32) for column in zip(*rows, strict=True))
        return FeatureBatch(arrays, np.array([sample.label for sample in samples], np.int64), tuple(samples))

    def _compute(self, samples: Sequence[Sample], view: int, part: int) -> list[Parts]:
        """→ each sample's rows of the parts up to `part`, which are kept if they can be."""
        images = np.stack([self._image(sample, view) for sample in samples])
        parts = self.frozen.run(runner.normalize(images, self.spec), part + 1)
        shelves = self._shelves(view)[: part + 1]
        # Rounded as a shelf keeps them also where it cannot, so that training does not depend on what was kept.
        rounded = [_rounded(arrays, shelf.dtype) for shelf, arrays in zip(shelves, parts, strict=True)]
        found = [tuple(tuple(array[index] for array in part) for part in rounded) for index in range(len(samples))]
        for sample, rows in zip(samples, found, strict=True):
            for shelf, arrays in zip(shelves, rows, strict=True):
                self._keep(partial(shelf.put, sample.sha256, view, arrays))
        return found

    def _image(self, sample: Sample, view: int) -> np.ndarray:
        if view == PLAIN:
            return load_image(sample, self.spec)
        return load_view(sample, self.spec, self.augment, self.seed, view)

    def _keep(self, write: Callable[[], object]) -> None:
        try:
            if not self.is_full:
                write()
        except OSError:
            self.is_full = True

    def _shelves(self, view: int) -> tuple[Shelf, ...]:
        return self.plain if view == PLAIN else self.train


def _rounded(arrays: Sequence[np.ndarray], dtype: np.dtype[np.floating[Any]]) -> tuple[np.ndarray, ...]:
    limit = np.finfo(dtype).max
    return tuple(array.clip(-limit, limit).astype(dtype) for array in arrays)


AHEAD = 16  # chunks of images in the threads' hands
BATCHES_AHEAD = 4


def _chunks(samples: Sequence[Sample], size: int) -> list[Sequence[Sample]]:
    return [samples[start : start + size] for start in range(0, len(samples), size)]


def open_features(
    frozen: Frozen,
    spec: runner.Spec,
    augment: Augment,
    seed: int,
    train: Sequence[Sample],
    val: Sequence[Sample],
    views: int,
    limit_bytes: int,
) -> tuple[Features, int] | None:
    """The features of images prepared as `spec` and `augment` say, and how many views of each there is room for.

    views: so many are wanted. limit_bytes: of all that is kept for any run. None where not even one view fits, or the
    cache's folder cannot be written.
    """
    height, width = spec.input_size
    shapes = [
        [array.shape[1:] for array in part]
        for part in frozen.run(np.zeros((1, 3, height, width), np.float32), frozen.part_count)
    ]
    pixels = {key: value for key, value in spec.to_dict().items() if key in _PIXELS}
    plain_keys = [_key(key, pixels) for key in frozen.keys]
    train_keys = [_key(key, pixels, augment.model_dump(), seed) for key in frozen.keys]
    half, single = np.dtype(np.float16), np.dtype(np.float32)
    view_bytes = len(train) * sum(feature_cache.row_bytes(part, half) for part in shapes)
    plain_bytes = len(val) * sum(feature_cache.row_bytes(part, single) for part in shapes)
    try:
        room = feature_cache.make_room(views * view_bytes + plain_bytes, limit_bytes, plain_keys + train_keys)
        plain = tuple(feature_cache.open_shelf(*each, single) for each in zip(plain_keys, shapes, strict=True))
        kept = tuple(feature_cache.open_shelf(*each, half) for each in zip(train_keys, shapes, strict=True))
        fitting = min(views, (room - plain_bytes) // view_bytes)
        others = sum(_other_bytes(shelf, train, range(fitting)) for shelf in kept)
        others += sum(_other_bytes(shelf, val, [PLAIN]) for shelf in plain)
        if others and room - others < fitting * view_bytes + plain_bytes:
            for shelf in (*plain, *kept):
                shelf.clear()
    except OSError:
        return None
    return (Features(frozen, spec, augment, seed, kept, plain), fitting) if fitting >= 1 else None


def _other_bytes(shelf: Shelf, samples: Sequence[Sample], views: Sequence[int]) -> int:
    """Bytes of the rows that belong to other images, or other views of them."""
    keys = {(sample.sha256, view) for sample in samples for view in views}
    return shelf.row_bytes * (shelf.count - sum(shelf.has(*key) for key in keys))


_PIXELS = ("input_size", "resize", "interpolation", "color_order", "mean_255", "std_255")  # what of a Spec moves pixels


def _key(*values: object) -> str:
    return hashlib.sha256(json.dumps([FORM, cv2.__version__, *values], sort_keys=True).encode()).hexdigest()
