"""Labelled images as every part of edgekit has them: a file, and what is true of it."""

from __future__ import annotations

import io
from dataclasses import dataclass
from pathlib import Path
from typing import TypeAlias

import numpy as np
from PIL import Image

from edgekit.errors import DataError

SOFT_EDGE = 128  # a value from here on is the second class where a mask was drawn with soft edges
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
        values = mask_values(mask.path.read_bytes())
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise DataError(f"cannot read the mask {mask.path}: {reason}") from None
    if not mask.levels:
        return (values >= SOFT_EDGE).astype(np.uint8)
    classes = np.full(256, VOID, np.uint8)
    classes[list(mask.levels)] = np.arange(len(mask.levels), dtype=np.uint8)
    labelled: np.ndarray = classes[values]
    return labelled


def mask_values(data: bytes) -> np.ndarray:
    """The bytes of a grey or palette image → uint8 (H, W), as stored (of a palette the index, not the colour).

    Raises ValueError, saying why, for anything else: colours, 16 bits, no image, cut off.
    """
    try:
        with Image.open(io.BytesIO(data)) as image:
            mode, pixels = image.mode, np.array(image)
    except Exception as error:  # noqa: BLE001 - PIL's decoders raise many kinds for a damaged file
        raise ValueError(f"PIL cannot decode it: {error}") from None
    if mode in ("L", "P"):
        return pixels
    if mode == "1":
        return pixels.astype(np.uint8) * 255
    if mode not in ("LA", "RGB", "RGBA"):
        raise ValueError(f"it is of mode {mode}: save it as an 8-bit grey or palette image")
    if mode != "LA" and (pixels[..., :1] != pixels[..., 1:3]).any():
        raise ValueError("it has colours: save it as an 8-bit grey or palette image of the classes' numbers")
    return pixels[..., 0]
