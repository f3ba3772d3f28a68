"""YOLO: a text file an image, a line a box: class, then centre x, centre y, width, height as shares of the sides.

    data.yaml                                  names: a list or {number: name}; train, val, test: folders or lists
    images/train/x.jpg  labels/train/x.txt     (and so for val/ and test/; or without subsets, split by content)
    train/images/x.jpg  train/labels/x.txt

A line may instead have a polygon (class x y x y x y ...): its bounding box is taken. An image without a text file has
no boxes. Without data.yaml the names are in classes.txt (a name a line), or they are class_0, class_1 ...
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import yaml

from edgekit.errors import DataError
from edgekit.listings import (
    DrawnBox,
    DrawnBoxes,
    File,
    Listing,
    Problem,
    files_under,
    folders_of_subsets,
    not_used,
    refused_once,
    relative,
    settled,
    shown,
    split_by_suffix,
    visible,
)

NAMES_FILE = "classes.txt"
MAX_CLASSES = 10_000  # a larger number is no class
_SUBSETS = ("train", "val", "test")


def has_yolo(path: Path) -> bool:
    """Whether it is data.yaml, or a folder with that, or with labels/ that hold a .txt."""
    if path.is_file():
        return path.suffix.lower() in (".yaml", ".yml")
    if not path.is_dir():
        return False
    if _yaml_in(path) is not None:
        return True
    folders = [path, *(entry for entry in visible(path) if entry.is_dir())]
    labels = [folder / "labels" for folder in folders if (folder / "labels").is_dir()]
    return any(file.suffix.lower() == ".txt" for folder in labels for file in files_under(folder))


def list_yolo(path: Path) -> Listing:
    """Every image with its boxes. Raises DataError where data.yaml cannot be used, or where there are no images."""
    root = path.parent if path.is_file() else path
    data = path if path.is_file() else _yaml_in(path)
    if data is None:
        folders, problems = _folders(root)
        images = {subset: files_under(folder) for subset, folder in folders.items()}
        class_names = _names_beside(root)
    else:
        document = _read_yaml(data)
        images, problems = _from_yaml(document, data), []
        class_names = _names(document, data)
    files: list[File] = []
    read: set[Path] = set()
    for subset, paths in images.items():
        # Where the text files lie beside the images, they are no strangers.
        usable, others = split_by_suffix((p for p in paths if p.suffix.lower() != ".txt"), root)
        problems += others
        for image in usable:
            text = _text_path(image, root)
            read.add(text)
            label, found = _read(text, relative(image, root), class_names)
            problems += found
            if not found:
                files.append(File(image, label, subset))
    problems += not_used(_strays(read), root, "there is no image of its name")
    if class_names is None:
        class_names = _numbered(files)
    return Listing(root, tuple(class_names.values()), settled(files), tuple(problems))


# ---------------------------------------------------------------------------------------------------------------
# Where images lie


def _yaml_in(folder: Path) -> Path | None:
    return next((folder / name for name in ("data.yaml", "data.yml") if (folder / name).is_file()), None)


def _folders(root: Path) -> tuple[dict[str, Path], list[Problem]]:
    if (root / "images").is_dir():
        folders, beside = folders_of_subsets(root / "images")
    else:
        folders, beside = folders_of_subsets(root)
        beside = [entry for entry in beside if entry.name != NAMES_FILE]
        folders = {subset: _inner(folder) for subset, folder in folders.items()}
    return folders, not_used(beside, root, "lies beside the subsets' folders")


def _inner(folder: Path) -> Path:
    return folder / "images" if (folder / "images").is_dir() else folder


def _read_yaml(path: Path) -> dict[str, Any]:
    try:
        # The base loader makes nothing but text, lists and dictionaries: a class may be called "no" or "1".
        document = yaml.load(path.read_bytes(), Loader=yaml.BaseLoader)
    except (yaml.YAMLError, UnicodeDecodeError, RecursionError) as error:
        raise DataError(f"{path} is not valid YAML: {' '.join(str(error).split())}") from None
    if not isinstance(document, dict):
        raise DataError(f"{path} has no keys: expected names, train and val")
    return document


def _from_yaml(document: dict[str, Any], path: Path) -> dict[str, list[Path]]:
    """{subset: image files}. Raises DataError for a folder that is not there."""
    base = path.parent / str(document.get("path") or "")
    bases = [base, path.parent] if base != path.parent else [base]
    found: dict[str, list[Path]] = {}
    for subset in _SUBSETS:
        value = document.get(subset) or (document.get("valid") if subset == "val" else None) or []
        entries = value if isinstance(value, list) else [value]
        places = [_place(str(entry), bases) for entry in entries]
        if None in places and subset == "test":  # exports name a test folder whether there is one or not
            continue
        if None in places:
            where = shown(str(entries[places.index(None)]))
            raise DataError(f"{path} says that {subset} is {where}, which is not there: correct it, or path")
        if places:
            found[subset] = [image for place in places if place is not None for image in _images(place)]
    if "train" not in found:
        raise DataError(f"{path} has no train: expected the folder with the training images")
    return found


def _place(name: str, bases: Iterable[Path]) -> Path | None:
    """The folder or list of that name. Exports write ../train/images for a folder that lies beside the file."""
    inner = name
    while inner.startswith("../"):
        inner = inner[3:]
    bases = list(bases)
    tried = [base / text for text in dict.fromkeys((name, inner)) for base in bases]
    return next((path.resolve() for path in tried if path.exists()), None)


def _images(place: Path) -> list[Path]:
    if place.is_dir():
        return files_under(place)
    if place.suffix.lower() != ".txt":
        return [place]
    try:
        lines = place.read_text(encoding="utf-8-sig").splitlines()
    except UnicodeDecodeError:
        raise DataError(f"{place} is not UTF-8 text: expected the path of an image a line") from None
    return [place.parent / line.strip() for line in lines if line.strip()]


def _text_path(image: Path, root: Path) -> Path:
    """images/.../x.jpg → labels/.../x.txt, the last such folder; beside the image where there is none."""
    base = root if image.is_relative_to(root) else Path(image.anchor)
    parts = list(image.relative_to(base).parent.parts)
    if "images" in parts:
        last = len(parts) - 1 - parts[::-1].index("images")
        parts[last] = "labels"
    return base.joinpath(*parts, image.stem + ".txt")


def _strays(read: set[Path]) -> Iterator[Path]:
    for folder in sorted({text.parent for text in read}):
        if folder.is_dir() and "labels" in folder.parts:
            yield from (p for p in visible(folder) if p.suffix == ".txt" and p.name != NAMES_FILE and p not in read)


# ---------------------------------------------------------------------------------------------------------------
# Names and boxes


def _names(document: dict[str, Any], path: Path) -> dict[int, str] | None:
    """{number: class name}; None where the file names none. Raises DataError."""
    value = document.get("names")
    if not value:
        return None
    pairs = (
        list(value.items()) if isinstance(value, dict) else list(enumerate(value)) if isinstance(value, list) else []
    )
    if not pairs or not all(_is_number(str(key)) and isinstance(name, str) and name for key, name in pairs):
        raise DataError(f"{path} has names that are not a list or {{number: name}}: {shown(str(value)[:60])}")
    return {int(key): name for key, name in sorted(pairs, key=lambda pair: int(pair[0]))}


def _is_number(text: str) -> bool:
    return text.isdecimal() and len(text) < 10 and int(text) < MAX_CLASSES


def _names_beside(root: Path) -> dict[int, str] | None:
    path = next((p for p in (root / NAMES_FILE, root / "labels" / NAMES_FILE) if p.is_file()), None)
    if path is None:
        return None
    try:
        lines = path.read_text(encoding="utf-8-sig").rstrip().splitlines()
    except UnicodeDecodeError:
        raise DataError(f"{path} is not UTF-8 text: expected a name a line") from None
    if not all(line.strip() for line in lines) or not lines:
        raise DataError(f"{path} has an empty line: expected a name a line, the first for class 0")
    return {number: line.strip() for number, line in enumerate(lines)}


def _numbered(files: list[File]) -> dict[int, str]:
    """Names for classes that have none: class_0 up to the largest number in use."""
    drawn = [box for file in files if isinstance(file.label, DrawnBoxes) for box in file.label.boxes]
    last = max((int(box.class_name.removeprefix("class_")) for box in drawn), default=-1)
    return {number: f"class_{number}" for number in range(last + 1)}


def _read(path: Path, image: str, class_names: dict[int, str] | None) -> tuple[DrawnBoxes, list[Problem]]:
    """A text file → its boxes; or what is wrong with it, all of it fatal."""
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except FileNotFoundError:
        lines = []
    except UnicodeDecodeError:
        return DrawnBoxes(()), [Problem(image, "bad annotation", f"{path.name} is not text", True)]
    except OSError as error:
        return DrawnBoxes(()), [Problem(image, "bad annotation", f"{path.name}: {error.strerror or error}", True)]
    boxes: list[DrawnBox] = []
    problems: list[Problem] = []
    for n, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        place = f"line {n}"
        values = _numbers(line)
        if values is None:
            detail = (
                f"{path.name} {place} is no class with a box (4 numbers) or polygon (6 or more): {shown(line[:40])}"
            )
            problems.append(Problem(image, "bad annotation", detail, True))
        elif class_names is not None and int(values[0]) not in class_names:
            detail = f"{path.name} {place} has class {int(values[0])}, which has no name"
            problems.append(Problem(image, "unknown class", detail, True))
        else:
            number = int(values[0])
            name = f"class_{number}" if class_names is None else class_names[number]
            boxes.append(DrawnBox(f"{path.name} {place}", name, *_edges(values[1:])))
    return DrawnBoxes(tuple(boxes), in_shares=True), refused_once(problems)


def _numbers(line: str) -> list[float] | None:
    """The numbers of a line: a class ≥ 0, then those of a box or of a polygon; None for anything else."""
    try:
        values = [float(word) for word in line.split()]
    except ValueError:
        return None
    of_box_or_polygon = len(values) == 5 or (len(values) >= 7 and len(values) % 2 == 1)
    is_class = bool(values) and 0 <= values[0] < MAX_CLASSES and values[0].is_integer()
    return values if of_box_or_polygon and is_class and all(map(math.isfinite, values)) else None


def _edges(values: list[float]) -> tuple[float, float, float, float]:
    """[centre x, centre y, width, height], or [x, y, x, y, ...] → left, top, right, bottom."""
    if len(values) == 4:
        x, y, width, height = values
        return x - width / 2, y - height / 2, x + width / 2, y + height / 2
    return min(values[::2]), min(values[1::2]), max(values[::2]), max(values[1::2])
