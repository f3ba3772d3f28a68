"""What labelled data consists of before anyone has looked into the images: files, what is written about them, subsets.

The readers of each format (image_folders.py, voc_files.py, coco_files.py, yolo_files.py, mask_files.py) make a
`Listing`; datasets.py checks it.
"""

from __future__ import annotations

import os
import unicodedata
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from edgekit import runner
from edgekit.errors import DataError

SUBSET_NAMES = {"train": "train", "training": "train", "val": "val", "valid": "val", "validation": "val"}
TEST_NAMES = ("test", "testing")  # kept apart on purpose by whoever made the data
HIDDEN_NAMES = ("__macosx", "thumbs.db", "desktop.ini")  # as well as all names with a leading dot


@dataclass(frozen=True)
class Problem:
    """Something the check found. path: a file (relative to the data's root), a CSV line or a class.

    kind, fatal: "unreadable", "truncated", "empty", "missing", "bad row", "two labels", "in train and val",
    "too few images". kind, not fatal: "few images", "no validation images", "not an image", "not used", "grey",
    "palette", "alpha", "CMYK", "16-bit", "EXIF rotation".
    Of boxes and masks, fatal: "bad annotation", "unknown class", "box outside the image", "in train and test",
    "in val and test", "no mask", "unreadable mask", "mask size differs". Not fatal: "clipped box", "empty box",
    "crowd box", "no boxes", "no annotation", "size differs", "no image", "all void", "never occurs".
    """

    path: str
    kind: str
    detail: str
    fatal: bool


@dataclass(frozen=True)
class DrawnBox:
    """A box as it is written, unchecked. place: where, for messages ("line 3"). Edges as DrawnBoxes says."""

    place: str
    class_name: str
    left: float
    top: float
    right: float
    bottom: float


@dataclass(frozen=True)
class DrawnBoxes:
    """All boxes of an image. Edges in pixels, from the corner of the upper left one; or in_shares of the image's sides.

    size: (height, width) that the image has as it is written; None where nothing is written.
    """

    boxes: tuple[DrawnBox, ...]
    size: tuple[int, int] | None = None
    in_shares: bool = False


@dataclass(frozen=True)
class File:
    """An image and what is written about it: a class name, boxes, or the path of a mask.

    subset: "train", "val", "test", or "" where the split is made here. stratum: each is split on its own.
    """

    path: Path
    label: str | DrawnBoxes | Path
    subset: str
    stratum: str = ""


@dataclass(frozen=True)
class Listing:
    """levels: of masks, the values that a table gives to the classes; void: values that it calls void.

    class_names: empty for masks without a table, whose values tell the classes.
    """

    root: Path
    class_names: tuple[str, ...]
    files: tuple[File, ...]
    problems: tuple[Problem, ...]
    levels: tuple[int, ...] = ()
    void: tuple[int, ...] = ()

    @property
    def is_split(self) -> bool:
        """Whether the data has a validation subset of its own."""
        return any(file.subset in ("train", "val") for file in self.files)


# ---------------------------------------------------------------------------------------------------------------
# Folders


def visible(folder: Path) -> list[Path]:
    """What the folder holds, sorted, without hidden things."""
    return sorted(entry for entry in folder.iterdir() if not is_hidden(entry.name))


def is_hidden(name: str) -> bool:
    """Whether the name is one that file managers and editors leave behind."""
    return name.startswith(".") or name.lower() in HIDDEN_NAMES


def files_under(folder: Path) -> list[Path]:
    """All visible files below the folder, sorted; links to folders are followed, each real folder once."""

    def fail(error: OSError) -> None:  # os.walk would silently leave out what it cannot list
        raise error

    seen: set[Path] = set()
    files: list[Path] = []
    for here, folders, names in os.walk(folder, onerror=fail, followlinks=True):
        real = Path(here).resolve()
        folders[:] = [] if real in seen else sorted(name for name in folders if not is_hidden(name))
        if real not in seen:
            files += [Path(here, name) for name in names if not is_hidden(name)]
        seen.add(real)
    return sorted(files)


def split_by_suffix(paths: Iterable[Path], root: Path) -> tuple[list[Path], list[Problem]]:
    """The images among the files, and a problem for each of the others."""
    images: list[Path] = []
    odd: list[Problem] = []
    detail = f"its name ends in none of {' '.join(runner.IMAGE_SUFFIXES)}"
    for path in paths:
        if is_image(path):
            images.append(path)
        else:
            odd.append(Problem(relative(path, root), "not an image", detail, False))
    return images, odd


def is_image(path: Path) -> bool:
    """Whether the file's name ends as an image's."""
    return path.suffix.lower() in runner.IMAGE_SUFFIXES


def subset_of(name: str) -> str:
    """The name of a folder or list → "train", "val", "test", or "" where it names no subset."""
    return "test" if name.lower() in TEST_NAMES else SUBSET_NAMES.get(name.lower(), "")


def folders_of_subsets(folder: Path) -> tuple[dict[str, Path], list[Path]]:
    """({"train": ..., "val": ..., "test": ...}, what lies beside them); ({"": folder}, []) where there is no train/.

    Raises DataError where a subset has two folders (val/ and valid/), or where there is val/ without train/.
    """
    found: dict[str, list[Path]] = defaultdict(list)
    for entry in visible(folder):
        found[subset_of(entry.name) if entry.is_dir() else ""].append(entry)
    beside = found.pop("", [])
    twice = next((entries for entries in found.values() if len(entries) > 1), None)
    if twice:
        raise DataError(f"{folder} has more than one folder for a subset: {names([e.name for e in twice])}. Keep one")
    if not found:
        return {"": folder}, []
    if "train" not in found:
        have = names([entry.name for entries in found.values() for entry in entries])
        raise DataError(f"{folder} has {have} but no train/: add train/")
    return {subset: entries[0] for subset, entries in found.items()}, beside


def not_used(paths: Iterable[Path], root: Path, why: str) -> list[Problem]:
    """A problem for each path that nothing reads."""
    return [Problem(relative(path, root), "not used", why, False) for path in paths]


def refused_once(problems: Sequence[Problem]) -> list[Problem]:
    """One image's problems, of the fatal ones only the first, which says how many more there are."""
    fatal = [problem for problem in problems if problem.fatal]
    if len(fatal) < 2:
        return list(problems)
    first = replace(fatal[0], detail=f"{fatal[0].detail}; and {len(fatal) - 1} more")
    return [first, *(problem for problem in problems if not problem.fatal)]


def settled(files: Sequence[File]) -> tuple[File, ...]:
    """The files; where none is for validation, those for training are left to be split."""
    if any(file.subset == "val" for file in files):
        return tuple(files)
    return tuple(replace(file, subset="") if file.subset == "train" else file for file in files)


# ---------------------------------------------------------------------------------------------------------------
# Names


def check_class_names(class_names: Sequence[str], path: Path) -> None:
    """Refuses names that a terminal, a table or another file system would damage. Raises DataError."""
    odd = [name for name in class_names if not name.isprintable()]
    if odd:
        raise DataError(f"{path} has class names with line breaks or other control characters: {names(odd)}: rename")
    same: dict[str, list[str]] = defaultdict(list)
    for name in class_names:
        same[unicodedata.normalize("NFC", name).casefold()].append(name)
    clash = next((group for group in same.values() if len(group) > 1), None)
    if clash:
        raise DataError(f"{path} has class names that differ by case only: {names(clash)}: merge or rename them")


def natural(name: str) -> tuple[bool, int, str]:
    """Sort key: whole numbers first, by value ("2" before "10"); then the other names."""
    return (not name.isdecimal(), int(name) if name.isdecimal() else 0, name)


def names(words: Sequence[str]) -> str:
    """The first five, quoted."""
    return ", ".join(map(repr, words[:5])) + (f" and {len(words) - 5} more" if len(words) > 5 else "")


def shown(text: str) -> str:
    """The text, its control characters and broken encodings escaped: for one line of a terminal."""
    return text if text.isprintable() else repr(text)[1:-1]


def relative(path: Path, root: Path) -> str:
    """The path as messages show it: relative to the root where it lies below."""
    return shown(str(path.relative_to(root) if path.is_relative_to(root) else path))
