"""Labelled images as every part of edgekit has them: a file, and what is true of it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TypeAlias

import numpy as np
from PIL import Image

from edgekit.errors import DataError

VOID = 255  # in a class map: a pixel that nobody labelled; it is neither learnt nor measured


@dataclass(frozen=True)
class Box:
    """An object in a photo, upright as runner.decode gives it. Edges in pixels, 0 ≤ left < right ≤ width."""

    class_id: int
    left: float
    top: float
    right: float
    bottom: float


@dataclass(frozen=True)
class Mask:
    """A grey or palette image of the photo's size that holds a class for each pixel; sha256 (hex): of its file.

    levels: the value that stands for each class, in the order of the classes; any other value is void. Empty: there are
    two classes, and the second one is where the mask is 128 or more (masks that were drawn with soft edges).
    """

    path: Path
    sha256: str
    levels: tuple[int, ...] = ()


Label: TypeAlias = "int | tuple[Box, ...] | Mask"


@dataclass(frozen=True)
class Sample:
    """One usable image. path: absolute; sha256 (hex): of the file's bytes.

    label: of classification an index into class_names, of detection the boxes (there may be none), of segmentation
    the mask.
    """

    path: Path
    label: Label
    sha256: str


def read_mask(mask: Mask) -> np.ndarray:
    """A mask's file → uint8 (H, W): the class of each pixel, or VOID. Raises DataError where it cannot be read."""
    try:
        with Image.open(mask.path) as image:
            values = np.asarray(image if image.mode in ("L", "P") else image.convert("L"))
    except (OSError, ValueError, SyntaxError) as error:
        raise DataError(f"cannot read the mask {mask.path}: {error}") from None
    if not mask.levels:
        return (values >= 128).astype(np.uint8)
    classes = np.full(256, VOID, np.uint8)
    classes[list(mask.levels)] = np.arange(len(mask.levels), dtype=np.uint8)
    return classes[values]
