"""Pascal VOC: an XML file an image.

    Annotations/NAME.xml  JPEGImages/NAME.jpg (or images/NAME.jpg)
    ImageSets/Main/{train,val,test,trainval}.txt (or ImageSets/*.txt): the names of each subset

xmin, ymin, xmax and ymax are pixels counted from 1, the last one included, as the format's makers have them: xmax
equals the width for a box that reaches the right edge. So the edges are xmin - 1, ymin - 1, xmax and ymax. Some writers
count from 0, which cannot be seen from one file; their boxes are then a pixel too large to the left and the top, which
is less than hands draw apart, and 0 is taken as the image's edge.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from pathlib import Path
from xml.etree import ElementTree

from edgekit.errors import DataError
from edgekit.listings import (
    DrawnBox,
    DrawnBoxes,
    File,
    Listing,
    Problem,
    files_under,
    natural,
    not_used,
    relative,
    settled,
    shown,
    split_by_suffix,
)

IMAGE_FOLDERS = ("JPEGImages", "images")


def has_voc(path: Path) -> bool:
    """Whether it is a folder with Annotations/ that hold an .xml."""
    folder = path / "Annotations"
    return folder.is_dir() and any(_is_xml(file) for file in files_under(folder))


def list_voc(root: Path) -> Listing:
    """Every image with its boxes. Raises DataError where there is no folder of images."""
    folder = next((root / name for name in IMAGE_FOLDERS if (root / name).is_dir()), None)
    if folder is None:
        raise DataError(f"{root} has Annotations/ but no JPEGImages/: the images belong there")
    found, problems = split_by_suffix(files_under(folder), root)
    images = {_stem(path, folder): path for path in reversed(found)}
    written = {_stem(path, root / "Annotations"): path for path in files_under(root / "Annotations") if _is_xml(path)}
    sets = _image_sets(root) or {"": sorted(images.keys() | written.keys())}
    parsed = {stem: _read(written[stem]) for stem in _listed(sets) if stem in written and stem in images}
    files: list[File] = []
    for subset, stems in sets.items():
        for stem in stems:
            label = parsed.get(stem)
            if isinstance(label, DrawnBoxes):
                files.append(File(images[stem], label, subset))
            else:
                problems.append(_why_left_out(stem, label, images, written, root))
    listed = _listed(sets)
    problems += not_used((path for stem, path in images.items() if stem not in listed), root, "in no list of ImageSets")
    names = {box.class_name for file in files if isinstance(file.label, DrawnBoxes) for box in file.label.boxes}
    return Listing(root, tuple(sorted(names, key=natural)), settled(files), tuple(problems))


def _is_xml(path: Path) -> bool:
    return path.suffix.lower() == ".xml"


def _stem(path: Path, folder: Path) -> str:
    return path.relative_to(folder).with_suffix("").as_posix()


def _listed(sets: dict[str, list[str]]) -> set[str]:
    return {stem for stems in sets.values() for stem in stems}


def _why_left_out(
    stem: str, fault: str | None, images: dict[str, Path], written: dict[str, Path], root: Path
) -> Problem:
    if stem not in images:
        return Problem(shown(stem), "missing", "there is no image of this name", True)
    if stem not in written:
        detail = f"there is no Annotations/{shown(stem)}.xml; left out"
        return Problem(relative(images[stem], root), "no annotation", detail, False)
    return Problem(relative(written[stem], root), "bad annotation", fault or "", True)


def _image_sets(root: Path) -> dict[str, list[str]]:
    """{"train": names, "val": ..., "test": ...}; empty where there are no lists."""
    for folder in (root / "ImageSets" / "Main", root / "ImageSets"):
        lists = {name: folder / f"{name}.txt" for name in ("train", "val", "test", "trainval")}
        sets = {name: _lines(path) for name, path in lists.items() if path.is_file()}
        both = sets.pop("trainval", [])
        if "train" not in sets and both:
            held_out = set(sets.get("val", ()))
            sets["train"] = [name for name in both if name not in held_out]
        if "train" in sets:
            return sets
    return {}


def _lines(path: Path) -> list[str]:
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except UnicodeDecodeError:
        raise DataError(f"{path} is not UTF-8 text: expected a name a line") from None
    return list(dict.fromkeys(line.strip() for line in lines if line.strip()))


class _PlainTree(ElementTree.TreeBuilder):
    """Refuses a document type, and with it entities, which a hostile file makes as large as it likes."""

    def doctype(self, _name: str, _pubid: str | None, _system: str | None) -> None:
        raise ValueError("it has a DOCTYPE, which annotations do not need")


def _read(path: Path) -> DrawnBoxes | str:
    """An XML file → its boxes, or what is wrong with it."""
    try:
        root = ElementTree.fromstring(path.read_bytes(), ElementTree.XMLParser(target=_PlainTree()))
        boxes = [_box(element, f"object {n}") for n, element in enumerate(root.iter("object"), start=1)]
        return DrawnBoxes(tuple(boxes), _size(root))
    except OSError as error:
        return error.strerror or str(error)
    except (ElementTree.ParseError, ValueError, LookupError) as error:
        return shown(str(error))


def _size(root: ElementTree.Element) -> tuple[int, int] | None:
    texts = [(root.findtext(f"size/{key}") or "").strip() for key in ("height", "width")]
    if not all(text.isdecimal() and int(text) > 0 for text in texts):  # some writers leave 0 there
        return None
    return int(texts[0]), int(texts[1])


def _box(element: ElementTree.Element, place: str) -> DrawnBox:
    """Raises ValueError."""
    name = (element.findtext("name") or "").strip()
    if not name:
        raise ValueError(f"{place} has no name")
    left, top, right, bottom = _numbers([element.findtext(f"bndbox/{key}") for key in _EDGES], place)
    return DrawnBox(place, name, _from_0(left), _from_0(top), right, bottom)


_EDGES = ("xmin", "ymin", "xmax", "ymax")


def _from_0(pixel: float) -> float:
    return max(pixel - 1, 0.0) if pixel >= 0 else pixel - 1


def _numbers(texts: Iterable[str | None], place: str) -> list[float]:
    values = []
    for key, text in zip(_EDGES, texts, strict=True):
        try:
            value = float(text or "")
        except ValueError:
            value = math.nan
        if not math.isfinite(value):
            raise ValueError(f"{place} has no number as its {key}")
        values.append(value)
    return values
