"""COCO: one JSON file for all images of a subset.

    annotations/instances_train2017.json  train2017/x.jpg (or images/x.jpg ...)
    train/_annotations.coco.json  train/x.jpg             (and so for valid/ and test/)
    anything.json                                         given itself, or the only one in the folder; split by content

bbox is x, y, width, height in pixels, x and y from the corner of the image. Boxes of crowds (iscrowd) are left out:
they are around many things at once. The classes are in the order of the categories' ids.
"""

from __future__ import annotations

import json
import re
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from edgekit.errors import DataError
from edgekit.listings import (
    DrawnBox,
    DrawnBoxes,
    File,
    Listing,
    Problem,
    is_image,
    names,
    refused_once,
    relative,
    settled,
    shown,
    subset_of,
    visible,
)

HUGE = 1e9  # no photo has so many pixels on a side


def has_coco(path: Path) -> bool:
    """Whether it is a .json, or a folder with COCO's .json in it, in annotations/ or in train/."""
    return path.suffix.lower() == ".json" if path.is_file() else bool(_candidates(path))


def list_coco(path: Path) -> Listing:
    """Every image with its boxes. Raises DataError where a file is not COCO's JSON, or where files do not agree."""
    if path.is_file():
        root = path.parent.parent if path.parent.name.lower() == "annotations" else path.parent
        chosen: dict[str, Path] = {"": path}
        problems: list[Problem] = []
    else:
        root = path
        chosen, problems = _choose(_candidates(path), root)
    documents = {subset: _read(file) for subset, file in chosen.items()}
    categories = _categories(chosen, documents)
    files: list[File] = []
    seen: set[Path] = set()
    for subset, file in chosen.items():
        bases = _bases(file, subset, root)
        done = _files(documents[subset], file.name, subset, categories, bases, root)
        files += done.files
        problems += done.problems
        seen |= done.images
    problems += [
        Problem(relative(image, root), "no annotation", "in no .json; left out", False)
        for image in sorted({p for s in {image.parent for image in seen} for p in visible(s) if is_image(p)} - seen)
    ]
    return Listing(root, tuple(categories.values()), settled(files), tuple(problems))


# ---------------------------------------------------------------------------------------------------------------
# Which files


def _candidates(root: Path) -> list[Path]:
    """The .json files in the folder, in annotations/ and in the subsets' folders that look like COCO's."""
    if not root.is_dir():
        return []
    inner = [entry for entry in visible(root) if entry.is_dir()]
    folders = [root, *(entry for entry in inner if entry.name.lower() == "annotations" or subset_of(entry.name))]
    found = [
        file for folder in folders for file in visible(folder) if file.suffix.lower() == ".json" and _is_coco(file)
    ]
    return [file for file in found if file.name.startswith("instances_")] or found


def _is_coco(path: Path) -> bool:
    if not path.is_file():
        return False
    data = path.read_bytes()  # parsing it would take seconds where it is large
    return b'"images"' in data and b'"annotations"' in data


def _subset(path: Path) -> str:
    """The subset that the file's name or its folder's speaks of, or ""."""
    words = [word for word in re.split(r"[^a-z]+", path.stem.lower()) if subset_of(word)]
    return subset_of(words[0]) if words else subset_of(path.parent.name)


def _choose(found: Iterable[Path], root: Path) -> tuple[dict[str, Path], list[Problem]]:
    """One file a subset; where some have a subset, those without are not used."""
    by_subset: dict[str, list[Path]] = defaultdict(list)
    for path in found:
        by_subset[_subset(path)].append(path)
    loose = by_subset.pop("", []) if "train" in by_subset else []
    twice = next((paths for paths in by_subset.values() if len(paths) > 1), None)
    if twice:
        shown_names = names([relative(path, root) for path in twice])
        raise DataError(
            f"{root} has more than one .json for the same images: {shown_names}. Keep one, or give its path"
        )
    problems = [
        Problem(relative(path, root), "not used", "its name has no subset, other files' have", False) for path in loose
    ]
    return {subset: paths[0] for subset, paths in by_subset.items()}, problems


def _bases(file: Path, subset: str, root: Path) -> list[Path]:
    """The folders that file names may start from."""
    bases = [file.parent, root, root / "images"]
    for folder in (root, root / "images"):
        for entry in visible(folder) if folder.is_dir() else []:
            same_name = entry.name.lower() in file.stem.lower()  # instances_train2017.json, train2017/
            if entry.is_dir() and (same_name or (subset and subset_of(entry.name) == subset)):
                bases.append(entry)
    return bases


# ---------------------------------------------------------------------------------------------------------------
# What they hold


def _read(path: Path) -> dict[str, list[Any]]:
    try:
        document = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path} is not valid JSON: {error}") from None
    lists = ("images", "annotations", "categories")
    if not isinstance(document, dict) or not all(isinstance(document.get(key), list) for key in lists):
        raise DataError(f"{path} is not COCO's JSON: expected the lists {', '.join(lists)}")
    return {key: document[key] for key in lists}


def _categories(chosen: dict[str, Path], documents: dict[str, dict[str, list[Any]]]) -> dict[int, str]:
    """{category id: class name}, by id; the same in every file. Raises DataError."""
    first, *others = [(path, _names(documents[subset]["categories"], path)) for subset, path in chosen.items()]
    for path, categories in others:
        if categories != first[1]:
            raise DataError(f"{path} has other categories than {first[0].name}: they must have the same ids and names")
    used = {_key(a.get("category_id")) for d in documents.values() for a in d["annotations"] if isinstance(a, dict)}
    above = {str(c.get("supercategory")) for d in documents.values() for c in d["categories"]}
    # Roboflow's exports have a category for the whole project, above the others, that no box is of.
    return {key: name for key, name in sorted(first[1].items()) if key in used or name not in above}


def _names(categories: list[Any], path: Path) -> dict[int, str]:
    found: dict[int, str] = {}
    for category in categories:
        key = _key(category.get("id")) if isinstance(category, dict) else None
        name = category.get("name") if isinstance(category, dict) else None
        if key is None or key in found or not isinstance(name, str) or not name.strip():
            raise DataError(f"{path} has a category without an id and a name of its own: {str(category)[:80]!r}")
        found[key] = name.strip()
    if not found:
        raise DataError(f"{path} has no categories")
    return found


def _key(value: object) -> int | None:
    return value if isinstance(value, int) and not isinstance(value, bool) else None


@dataclass(frozen=True)
class _Done:
    files: tuple[File, ...]
    problems: tuple[Problem, ...]
    images: frozenset[Path]  # those that the document speaks of


def _files(
    document: dict[str, list[Any]],
    file_name: str,
    subset: str,
    categories: dict[int, str],
    bases: list[Path],
    root: Path,
) -> _Done:
    files: list[File] = []
    problems: list[Problem] = []
    images: set[Path] = set()
    known: set[object] = {_hashable(image.get("id")) for image in document["images"] if isinstance(image, dict)} - {
        None
    }
    rows: dict[Any, list[tuple[str, dict[str, Any]]]] = defaultdict(list)
    for n, row in enumerate(document["annotations"], start=1):
        place = f"annotation {n}"
        if isinstance(row, dict) and _hashable(row.get("image_id")) in known:
            rows[row["image_id"]].append((place, row))
        else:
            problems.append(Problem(f"{file_name} {place}", "bad annotation", "no image has its image_id", True))
    for n, image in enumerate(document["images"], start=1):
        if not (isinstance(image, dict) and isinstance(image.get("file_name"), str) and image["file_name"]):
            problems.append(Problem(f"{file_name} image {n}", "bad annotation", "it has no file_name", True))
            continue
        path = _image_path(image["file_name"], bases)
        images.add(path)
        label, found = _label(rows[_hashable(image.get("id"))], image, categories, relative(path, root))
        problems += found
        if not any(problem.fatal for problem in found):
            files.append(File(path, label, subset))
    return _Done(tuple(files), tuple(problems), frozenset(images))


def _hashable(value: object) -> object:
    return value if isinstance(value, (int, str)) else None


def _image_path(name: str, bases: list[Path]) -> Path:
    return next((base / name for base in bases if (base / name).is_file()), bases[0] / name)


def _label(
    rows: list[tuple[str, dict[str, Any]]], image: dict[str, Any], categories: dict[int, str], name: str
) -> tuple[DrawnBoxes, list[Problem]]:
    boxes: list[DrawnBox] = []
    problems: list[Problem] = []
    for place, row in rows:
        edges = _edges(row.get("bbox"))
        key = _key(row.get("category_id"))
        if row.get("iscrowd") not in (None, 0, False):
            problems.append(Problem(name, "crowd box", f"{place}; left out", False))
        elif edges is None:
            detail = f"{place} has no bbox of four numbers: {shown(str(row.get('bbox'))[:60])}"
            problems.append(Problem(name, "bad annotation", detail, True))
        elif key not in categories:
            detail = f"{place} has category_id {shown(str(row.get('category_id'))[:20])}, which no category has"
            problems.append(Problem(name, "unknown class", detail, True))
        else:
            boxes.append(DrawnBox(place, categories[key], *edges))
    height, width = (_key(image.get(key)) for key in ("height", "width"))
    return DrawnBoxes(tuple(boxes), (height, width) if height and width else None), refused_once(problems)


def _edges(bbox: object) -> tuple[float, float, float, float] | None:
    """[x, y, width, height] → left, top, right, bottom."""
    if not isinstance(bbox, list) or len(bbox) != 4:
        return None
    if not all(isinstance(v, (int, float)) and not isinstance(v, bool) and abs(v) < HUGE for v in bbox):
        return None
    x, y, width, height = (float(value) for value in bbox)
    return x, y, x + width, y + height
