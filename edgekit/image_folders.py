"""Classification data: where images lie and which class each has.

folder/CLASS/**/image.jpg                     one folder a class; split by datasets.py, by content
folder/train/CLASS/...  folder/val/CLASS/...  the data's own split (val/ may be called valid/ or validation/)
table.csv                                     header path,label and, where wanted, subset (train or val)
"""

from __future__ import annotations

import csv
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from edgekit.errors import DataError
from edgekit.listings import (
    SUBSET_NAMES,
    TEST_NAMES,
    File,
    Listing,
    Problem,
    files_under,
    is_image,
    names,
    natural,
    relative,
    shown,
    split_by_suffix,
    visible,
)

WANTED = "a folder with one folder a class, or a CSV with path,label"


def list_images(path: Path) -> Listing:
    """A folder or .csv → its images, labelled by class name. Raises DataError for anything else."""
    if path.is_dir():
        return _list_folder(path)
    if path.suffix.lower() == ".csv":
        return _list_csv(path)
    raise DataError(f"{path} is a file: give a folder with one folder a class, or a .csv with path,label")


def _list_folder(root: Path) -> Listing:
    layout = _subset_folders(root)
    used = {folder.name for folder in layout.values() if folder != root}
    loose = [entry for entry in visible(root) if entry.name not in used and (used or not entry.is_dir())]
    files: list[File] = []
    odd: list[Problem] = []
    class_names: list[str] = []
    for subset, folder in layout.items():
        entries = visible(folder)
        classes = [entry for entry in entries if entry.is_dir()]
        if not classes:
            raise DataError(_no_class_folders(folder, entries))
        if folder != root:
            loose += [entry for entry in entries if not entry.is_dir()]
        unknown = [c.name for c in classes if c.name not in class_names]
        if subset == "val" and unknown:
            raise DataError(
                f"{shown(str(folder))} has class folders that train lacks: {names(unknown)}. "
                "Add training images of these classes, or remove the folders"
            )
        class_names += unknown
        for c in classes:
            images, others = split_by_suffix(files_under(c), root)
            files += [File(image, c.name, subset, c.name) for image in images]
            odd += others
    if len(class_names) == 1:
        raise DataError(_one_class(next(iter(layout.values())) / class_names[0]))
    problems = [
        Problem(relative(entry, root), "not used", "lies beside the class folders, so it has no label", False)
        for entry in loose
    ]
    return Listing(root, tuple(sorted(class_names, key=natural)), tuple(files), (*problems, *odd))


def _subset_folders(root: Path) -> dict[str, Path]:
    """{"train": folder, "val": folder}, or {"": folder} where there is nothing but one folder to split.

    "train" may be the name of a class too, so subsets are meant only where train/ holds folders itself, or where
    all the folders have names of subsets.
    """
    folders = [entry for entry in visible(root) if entry.is_dir()]
    found: dict[str, list[Path]] = defaultdict(list)
    for folder in folders:
        found[SUBSET_NAMES.get(folder.name.lower(), "")].append(folder)
    holds_classes = any(entry.is_dir() for folder in found["train"] for entry in visible(folder))
    only_subsets = folders and all(f.name.lower() in (*SUBSET_NAMES, *TEST_NAMES) for f in folders)
    if not (holds_classes or only_subsets):
        return {"": root}
    for subset in ("train", "val"):
        if len(found[subset]) > 1:
            both = names([folder.name for folder in found[subset]])
            raise DataError(f"{root} has more than one folder for {subset}: {both}. Keep one of them")
    if not found["train"]:
        raise DataError(f"{root} has {names([f.name for f in folders])} but no train/: add train/ with class folders")
    if not found["val"]:
        return {"": found["train"][0]}
    return {"train": found["train"][0], "val": found["val"][0]}


def _no_class_folders(folder: Path, entries: Sequence[Path]) -> str:
    images = sum(map(is_image, entries))
    what = "is empty" if not entries else f"has no class folders ({images} loose images)"
    return f"{folder} {what}: put the images of each class in a folder of their own, named as the class"


def _one_class(folder: Path) -> str:
    message = f"{folder.parent} has one class folder only, {shown(folder.name)!r}: classification needs at least two"
    inner = [entry for entry in visible(folder) if entry.is_dir()]
    return message + (f". Did you mean {folder}?" if len(inner) > 1 else "")


def _list_csv(path: Path) -> Listing:
    rows = _csv_rows(path)
    header = [name.strip().lower() for name in rows[0][1]] if rows else []
    lacking = [name for name in ("path", "label") if name not in header]
    if lacking:
        found = ", ".join(header) or "nothing"
        raise DataError(
            f"{path} has no column {' and no column '.join(lacking)} (its first line has: {shown(found)}). "
            "The first line must name the columns: path,label or path,label,subset, separated by commas"
        )
    files: list[File] = []
    problems: list[Problem] = []
    parsed = [(line, _csv_file(path.parent, header, row)) for line, row in rows[1:]]
    is_split = any(isinstance(row, File) and row.subset == "val" for _, row in parsed)
    for line, row in parsed:
        where = f"{path.name} line {line}"
        if isinstance(row, str):
            problems.append(Problem(where, "bad row", row, True))
        elif row.subset in TEST_NAMES:
            problems.append(Problem(where, "not used", f"its subset is {row.subset}", False))
        elif is_split and not row.subset:
            problems.append(Problem(where, "bad row", "it has no subset, other lines have one", True))
        else:
            files.append(row if is_split else replace(row, subset=""))
    class_names = sorted({file.stratum for file in files}, key=natural)
    if len(class_names) < 2:
        what = "no usable line" if not class_names else f"one label only, {shown(class_names[0])!r}"
        also = f" ({problems[0].path}: {problems[0].detail})" if problems else ""
        raise DataError(f"{path} has {what}{also}: classification needs lines with at least two labels")
    return Listing(path.parent, tuple(class_names), tuple(files), tuple(problems))


def _csv_rows(path: Path) -> list[tuple[int, list[str]]]:
    """(line number, fields) of each line that is not blank."""
    try:
        with path.open(encoding="utf-8-sig", newline="") as stream:
            reader = csv.reader(stream, strict=True)
            return [(reader.line_num, row) for row in reader if row]
    except UnicodeDecodeError:
        raise DataError(f"{path} is not UTF-8 text: save it as CSV UTF-8") from None
    except csv.Error as error:
        raise DataError(f"{path} is not a valid CSV: {error}. Quote fields that hold commas or quotes") from None


def _csv_file(folder: Path, header: Sequence[str], row: Sequence[str]) -> File | str:
    """One line → its file, or what is wrong with the line."""
    if len(row) != len(header):
        return f"it has {len(row)} fields, the first line has {len(header)}"
    fields = {name: field.strip() for name, field in zip(header, row, strict=True)}
    empty = [name for name in ("path", "label") if not fields[name]]
    if empty:
        return f"it has no {' and no '.join(empty)}"
    if "\0" in fields["path"]:
        return "its path holds a NUL character"
    subset = fields.get("subset", "").lower()
    if subset and subset not in (*SUBSET_NAMES, *TEST_NAMES):
        return f"its subset is {shown(fields['subset'])!r}, expected train or val"
    return File(folder / fields["path"], fields["label"], SUBSET_NAMES.get(subset, subset), fields["label"])
