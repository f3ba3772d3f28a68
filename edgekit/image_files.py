"""The check of one image file: whole, decodable, and what about it is odd. Images are decoded as on the device."""

from __future__ import annotations

import hashlib
import io
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from edgekit import runner
from edgekit.listings import Problem, relative


@dataclass(frozen=True)
class ImageFacts:
    """sha256 (hex): of the file's bytes. size: (height, width) upright, in pixels; None where it cannot be used."""

    sha256: str
    size: tuple[int, int] | None
    problems: tuple[Problem, ...]


def look_at_image(path: Path, root: Path) -> ImageFacts:
    """Reads and decodes the file once. Never raises for what the file is."""
    name = relative(path, root)
    try:
        if not path.is_file():  # and so not a pipe, which would be waited on for ever
            kind, detail = ("unreadable", "not a file") if path.exists() else ("missing", "there is no such file")
            return ImageFacts("", None, (Problem(name, kind, detail, True),))
        data = path.read_bytes()
    except OSError as error:
        return ImageFacts("", None, (Problem(name, "unreadable", error.strerror or str(error), True),))
    size, problems = _look_at_bytes(data, name)
    return ImageFacts(hashlib.sha256(data).hexdigest(), size, problems)


def _look_at_bytes(data: bytes, name: str) -> tuple[tuple[int, int] | None, tuple[Problem, ...]]:
    if not data:
        return None, (Problem(name, "empty", "the file has 0 bytes", True),)
    if _is_cut_off(data):
        detail = f"the image goes on after the file's end at {len(data)} bytes"
        return None, (Problem(name, "truncated", detail, True),)
    try:
        height, width = runner.decode(data).shape[:2]
    except runner.RunnerError as error:
        return None, (Problem(name, "unreadable", str(error), True),)
    return (height, width), tuple(Problem(name, kind, detail, False) for kind, detail in _oddities(data))


def _is_cut_off(data: bytes) -> bool:
    """Whether a JPEG, PNG or WebP file lacks its end. Other formats: OpenCV refuses them when they are cut off.

    OpenCV 4.10 decodes the rest of a truncated JPEG as grey and only prints a warning (4.14 and 5.0 refuse it), so
    the end mark is looked for here. A second decoder (PIL) would cost a second decoding and finds no more.
    """
    if data.startswith(b"\xff\xd8"):
        return runner.jpeg_is_cut_off(data)
    if data.startswith(b"\x89PNG\r\n\x1a\n"):
        end = data.rfind(b"IEND")
        return end < 0 or end + 8 > len(data)  # its name is followed by a checksum of 4 bytes
    if data.startswith(b"RIFF") and data[8:12] == b"WEBP":
        return int.from_bytes(data[4:8], "little") + 8 > len(data)
    return False


def _oddities(data: bytes) -> list[tuple[str, str]]:
    """(kind, detail) of what OpenCV turns into 8-bit BGR, upright: legal, but worth knowing."""
    try:
        with Image.open(io.BytesIO(data)) as image:
            found = [
                ("grey", image.mode in ("1", "L", "LA", "I", "F") or image.mode.startswith("I;16")),
                ("palette", image.mode in ("P", "PA")),
                ("alpha", image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info),
                ("CMYK", image.mode == "CMYK"),
                ("16-bit", image.mode in ("I", "F") or any(";16" in str(tile) for tile in image.tile)),
            ]
            orientation = _orientation(image)
            detail = f"{image.format} of mode {image.mode}, {image.width} x {image.height}"
    except Exception:  # noqa: BLE001 - OpenCV has decoded it; whatever PIL trips over must not end the check
        return []
    odd = [(kind, detail) for kind, holds in found if holds]
    return odd + ([("EXIF rotation", f"orientation {orientation}; it is obeyed")] if orientation != 1 else [])


def _orientation(image: Image.Image) -> int:
    """EXIF orientation, 1 (upright) to 8."""
    if image.format == "PNG" and "exif" not in image.info:
        return 1  # getexif would decode all the pixels to look behind them
    value = image.getexif().get(0x0112, 1)
    return value if value in range(1, 9) else 1
