"""Segmentation data: photos and the masks that say which class each of their pixels has.

    images/x.jpg  masks/x.png                         (or labels/; a mask may be called x_mask.png)
    images/train/x.jpg  masks/train/x.png             (and so for val/ and test/)
    train/images/x.jpg  train/masks/x.png
    folder/x.jpg  folder/x.png                        side by side, also below train/, val/ and test/
    classes.csv: header value,name    or classes.txt: a name a line, for the values 0, 1, 2 ...

Which value is which class: as classes.csv or classes.txt says (a class called void, and 255 where it has no name, is
void). Without them: masks of 0 and 1, of 0 and 255, or with soft edges between 0 and 255 show the background and the
foreground; else values from 0 on are class_0, class_1 ..., and 255 is void.
"""

from __future__ import annotations

import csv
import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from edgekit.errors import DataError
from edgekit.listings import (
    File,
    Listing,
    Problem,
    files_under,
    folders_of_subsets,
    is_image,
    not_used,
    relative,
    settled,
    shown,
    split_by_suffix,
    visible,
)
from edgekit.samples import SOFT_EDGE, VOID, Mask, mask_values

WANTED = "a folder with images/ and masks/, or with x.jpg and x.png side by side"
TABLES = ("classes.csv", "classes.txt")
MASK_FOLDERS = ("masks", "labels")
MASK_ENDING = "_mask"
TWO_CLASSES = ("background", "foreground")
FEW_VALUES = 64  # more than so many values, without a table, are no classes
SOFT_SHARE = 0.9  # of the pixels are 0 or 255 in masks that were drawn with soft edges


def has_masks(path: Path) -> bool:
    """Whether it is a folder with images/ and masks/ (or labels/ with .png), or with those below train/."""
    if not path.is_dir():
        return False
    folders = [path, *(entry for entry in visible(path) if entry.is_dir() and entry.name.lower().startswith("train"))]
    return any((folder / "images").is_dir() and _mask_folder(folder) is not None for folder in folders)


def list_masks(root: Path) -> Listing:
    """Every image with the path of its mask. Raises DataError where there are none, or a bad table of classes."""
    if not root.is_dir():
        raise DataError(f"{root} is a file: give {WANTED}")
    pairs: list[tuple[str, Path, Path | None]] = []
    masks = _mask_folder(root)
    if masks is not None and (root / "images").is_dir():
        folders, beside = folders_of_subsets(root / "images")
        problems = not_used(beside, root, "lies beside the subsets' folders")
        for subset, folder in folders.items():
            found, strange = _twins(folder, masks / folder.relative_to(root / "images"), root)
            pairs += [(subset, *pair) for pair in found]
            problems += strange
    else:
        folders, beside = folders_of_subsets(root)
        beside = [entry for entry in beside if entry.name not in TABLES]
        problems = not_used(beside, root, "lies beside the subsets' folders")
        for subset, folder in folders.items():
            own = _mask_folder(folder)
            inside = own is not None and (folder / "images").is_dir()
            found, strange = _twins(folder / "images", own, root) if inside and own else _side_by_side(folder, root)
            pairs += [(subset, *pair) for pair in found]
            problems += strange
    problems += [
        Problem(relative(image, root), "no mask", "there is no mask of its name; an empty one says: nothing here", True)
        for _, image, mask in pairs
        if mask is None
    ]
    files = [
        File(image, mask, subset, str(image.parent.relative_to(root)))
        for subset, image, mask in pairs
        if mask is not None
    ]
    if not files:
        raise DataError(f"{root} has no image with a mask: give {WANTED}")
    table = _table(root)
    levels = tuple(value for value, name in table if name.lower() != "void")
    void = tuple(value for value, name in table if name.lower() == "void")
    names = tuple(name for _, name in table if name.lower() != "void")
    return Listing(root, names, settled(files), tuple(problems), levels, void)


# ---------------------------------------------------------------------------------------------------------------
# Which mask belongs to which image


Pairs = list[tuple[Path, "Path | None"]]


def _mask_folder(folder: Path) -> Path | None:
    """masks/, or labels/ where an image lies in it (YOLO's have text)."""
    for name in MASK_FOLDERS:
        if (folder / name).is_dir() and (name == "masks" or any(map(is_image, files_under(folder / name)))):
            return folder / name
    return None


def _twins(images: Path, masks: Path, root: Path) -> tuple[Pairs, list[Problem]]:
    """Each image below one folder with the mask of the same name, or that and _mask, below the other."""
    found, problems = split_by_suffix(files_under(images), root)
    drawn, others = split_by_suffix(files_under(masks) if masks.is_dir() else [], root)
    # Of x.jpg and x.png the latter is the mask that nothing was lost in.
    by_stem = {_stem(path, masks): path for path in sorted(drawn, key=lambda path: path.suffix.lower() == ".png")}
    stems = [_stem(image, images) for image in found]
    pairs: Pairs = [
        (image, by_stem.get(stem) or by_stem.get(stem + MASK_ENDING)) for image, stem in zip(found, stems, strict=True)
    ]
    return pairs, [*problems, *others, *_strays(drawn, pairs, root)]


def _side_by_side(folder: Path, root: Path) -> tuple[Pairs, list[Problem]]:
    """Images and masks in the same folders: x_mask.png of x.*, or x.png of x.jpg (or another image that is no .png)."""
    found, problems = split_by_suffix((path for path in files_under(folder) if path.name not in TABLES), root)
    ended = {_stem(p, folder).removesuffix(MASK_ENDING): p for p in found if p.stem.endswith(MASK_ENDING)}
    others = {path for path in found if not path.stem.endswith(MASK_ENDING)}
    pngs = {path for path in others if path.suffix.lower() == ".png"}
    photos = {_stem(path, folder) for path in others - pngs}
    masks = {_stem(path, folder): path for path in sorted(pngs) if _stem(path, folder) in photos}
    if masks and not ended:  # then a .png that is alone is a mask whose photo is gone, and not a photo
        masks |= {_stem(path, folder): path for path in sorted(pngs)}
    drawn = [*ended.values(), *masks.values()]
    masks |= ended
    pairs: Pairs = [(image, masks.get(_stem(image, folder))) for image in sorted(others - set(drawn))]
    return pairs, [*problems, *_strays(sorted(drawn), pairs, root)]


def _stem(path: Path, folder: Path) -> str:
    return path.relative_to(folder).with_suffix("").as_posix()


def _strays(masks: Iterable[Path], pairs: Pairs, root: Path) -> list[Problem]:
    used = {mask for _, mask in pairs}
    return [
        Problem(relative(mask, root), "no image", "a mask without an image of its name; left out", False)
        for mask in masks
        if mask not in used
    ]


# ---------------------------------------------------------------------------------------------------------------
# Which value is which class


def _table(root: Path) -> list[tuple[int, str]]:
    """[(value, name), ...] of classes.csv or classes.txt, or [] without them. Raises DataError."""
    path = next((root / name for name in TABLES if (root / name).is_file()), None)
    if path is None:
        return []
    try:
        with path.open(encoding="utf-8-sig", newline="") as stream:
            if path.suffix == ".csv":
                rows = [[field.strip() for field in row] for row in csv.reader(stream, strict=True) if any(row)]
            else:
                rows = [["value", "name"]]
                rows += [[str(n), line.strip()] for n, line in enumerate(stream.read().rstrip().splitlines())]
    except (UnicodeDecodeError, csv.Error) as error:
        raise DataError(f"{path} cannot be read: {error}") from None
    if not rows or [field.lower() for field in rows[0]] != ["value", "name"]:
        raise DataError(f"{path} must begin with the line value,name")
    for row in rows[1:]:
        if len(row) != 2 or not _is_byte(row[0]) or not row[1]:
            raise DataError(f"{path} has the line {shown(','.join(row))}: expected a value of 0 to 255 and a name")
    table = [(int(value), name) for value, name in rows[1:]]
    values = [value for value, _ in table]
    repeated = next((value for value in values if values.count(value) > 1), None)
    if repeated is not None:
        raise DataError(f"{path} has the value {repeated} twice")
    classes = sum(name.lower() != "void" for _, name in table)
    if not 2 <= classes < VOID:
        raise DataError(f"{path} names {classes} classes: expected 2 to {VOID - 1}")
    return table


def _is_byte(text: str) -> bool:
    return text.isdecimal() and len(text) <= 3 and int(text) <= 255


@dataclass(frozen=True)
class MaskFacts:
    """A mask's file, looked at. sha256 (hex): of its bytes. values: each that occurs, once, sorted."""

    path: Path
    sha256: str
    values: bytes
    extreme_pixels: int  # of value 0 or 255
    pixels: int


def look_at_mask(path: Path, size: tuple[int, int], name: str) -> MaskFacts | Problem:
    """Reads a mask for an image of size (height, width), upright. name: the image's, for the problem (fatal)."""
    try:
        data = path.read_bytes()
        values = mask_values(data)
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        return Problem(name, "unreadable mask", shown(f"{path.name}: {reason}"), True)
    if values.shape != size:
        detail = (
            f"{path.name} has {values.shape[1]} x {values.shape[0]} pixels, the upright image {size[1]} x {size[0]}"
        )
        return Problem(name, "mask size differs", shown(detail), True)
    counts = np.bincount(values.ravel(), minlength=256)
    present = bytes(np.flatnonzero(counts).tolist())
    return MaskFacts(path, hashlib.sha256(data).hexdigest(), present, int(counts[0] + counts[255]), values.size)


def guess_levels(facts: Sequence[MaskFacts], root: Path) -> tuple[tuple[str, ...], tuple[int, ...]]:
    """(class names, levels) of masks without a table, as the top of this file says. Raises DataError."""
    values = sorted({value for mask in facts for value in mask.values})
    if not values:
        return TWO_CLASSES, ()
    named = [value for value in values if value != VOID]
    if values == [0, 255]:
        return TWO_CLASSES, (0, 255)
    if named == [0, 1]:
        return TWO_CLASSES, (0, 1)
    count = max(named, default=0) + 1
    if 2 <= count <= FEW_VALUES and 2 * len(named) > count:
        return tuple(f"class_{value}" for value in range(count)), tuple(range(count))
    extreme = sum(mask.extreme_pixels for mask in facts) / sum(mask.pixels for mask in facts)
    if values[0] == 0 and values[-1] == 255 and extreme >= SOFT_SHARE:
        return TWO_CLASSES, ()
    some = ", ".join(map(str, values[:8])) + (" ..." if len(values) > 8 else "")
    raise DataError(
        f"{root} has masks with the values {some}, which do not tell the classes: write {TABLES[0]} there, with the "
        "header value,name and a line for each class"
    )


def label_mask(
    facts: MaskFacts, levels: tuple[int, ...], void: tuple[int, ...], name: str
) -> tuple[Mask, frozenset[int], tuple[Problem, ...]]:
    """The mask's record, the classes that are in it, and what is wrong with it. name: the image's."""
    mask = Mask(facts.path, facts.sha256, levels)
    if not levels:
        return mask, frozenset(int(value >= SOFT_EDGE) for value in facts.values), ()
    unknown = [value for value in facts.values if value not in (*levels, *void, VOID)]
    if unknown:
        detail = f"{facts.path.name} has the value{'s' * (len(unknown) > 1)} {', '.join(map(str, unknown[:5]))}"
        return mask, frozenset(), (Problem(name, "unknown class", shown(f"{detail}, which no class has"), True),)
    classes = frozenset(levels.index(value) for value in facts.values if value in levels)
    if not classes:
        return mask, classes, (Problem(name, "all void", f"no pixel of {shown(facts.path.name)} has a class", False),)
    return mask, classes, ()
