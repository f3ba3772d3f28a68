"""Labelled images: reading them, checking them and splitting them (batches.py serves them to training).

    folder/CLASS/**/image.jpg                     one folder a class; split here, by content
    folder/train/CLASS/...  folder/val/CLASS/...  the data's own split (val/ may be called valid/ or validation/)
    table.csv                                     header path,label and, where wanted, subset (train or val)

`check_dataset` looks at every file once, and what it finds wrong becomes a `Problem`; `refuse_fatal` turns the
fatal ones into a DataError; `read_dataset` is both. Images are decoded by edgekit.runner, as on the device.
"""

from __future__ import annotations

import csv
import hashlib
import io
import os
import unicodedata
import warnings
from collections import Counter, defaultdict, deque
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TypeVar

from PIL import Image

from edgekit import runner
from edgekit.errors import ArtifactError, DataError
from edgekit.samples import Sample

MIN_IMAGES = 2  # different images a class needs: one to train on, one to validate with
FEW_IMAGES = 10  # below this a class is reported: its figures will be coarse
TOO_FEW = "too few images"  # the one fatal kind that leaving files out cannot mend

SUBSET_NAMES = {"train": "train", "training": "train", "val": "val", "valid": "val", "validation": "val"}
UNUSED_SUBSETS = ("test", "testing")  # kept apart on purpose by whoever made the data: listed, never read
HIDDEN_NAMES = ("__macosx", "thumbs.db", "desktop.ini")  # as well as all names with a leading dot

Progress = Callable[[int, int], None]
Item = TypeVar("Item")
Result = TypeVar("Result")


@dataclass(frozen=True)
class Problem:
    """Something the check found. path: a file (relative to the data's root), a CSV line or a class.

    kind, fatal: "unreadable", "truncated", "empty", "missing", "bad row", "two labels", "in train and val",
    "too few images". kind, not fatal: "few images", "no validation images", "not an image", "not used", "grey",
    "palette", "alpha", "CMYK", "16-bit", "EXIF rotation".
    """

    path: str
    kind: str
    detail: str
    fatal: bool


@dataclass(frozen=True)
class Dataset:
    """Labelled images in two subsets. root: the folder that relative paths start from (a CSV's own folder)."""

    root: Path
    class_names: tuple[str, ...]
    train: tuple[Sample, ...]
    val: tuple[Sample, ...]
    problems: tuple[Problem, ...]

    @property
    def sha256(self) -> str:
        """SHA-256 (hex) of the sorted (content, class, subset) rows: the same wherever the files lie."""
        rows = [
            f"{sample.sha256} {self.class_names[_class_id(sample)]} {subset}\n"
            for subset, samples in (("train", self.train), ("val", self.val))
            for sample in samples
        ]
        return hashlib.sha256("".join(sorted(rows)).encode()).hexdigest()


def _class_id(sample: Sample) -> int:
    assert isinstance(sample.label, int)
    return sample.label


# ---------------------------------------------------------------------------------------------------------------
# Reading


def read_dataset(
    path: Path,
    *,
    val_fraction: float = 0.2,
    split_seed: int = 0,
    skip_bad: bool = False,
    progress: Progress | None = None,
) -> Dataset:
    """Reads, checks and splits a folder or CSV. Raises DataError; skip_bad leaves bad files out instead.

    The arguments are check_dataset's. Files left out, and all that is merely odd, are in Dataset.problems.
    """
    dataset = check_dataset(path, val_fraction=val_fraction, split_seed=split_seed, progress=progress)
    refuse_fatal(dataset.problems, skip_bad=skip_bad)
    return dataset


def check_dataset(
    path: Path, *, val_fraction: float = 0.2, split_seed: int = 0, progress: Progress | None = None
) -> Dataset:
    """Reads every file once → the data set without its bad files, and all problems, fatal ones first.

    val_fraction (0 to 1, both excluded): expected share of each class in val, where the data has no split of its
    own. An image goes to val when the hash of its content and split_seed, as a number in [0, 1), is below it. So
    copies of an image never part, and adding or removing other files moves nothing. The real share varies: in a
    class of n images by about sqrt(val_fraction * (1 - val_fraction) / n). One exception: every class has an image
    in both subsets. Where no hash is below val_fraction the smallest goes to val (where all are, the largest to
    train), and that one image may move when images are added to such a class. Nothing can prevent that: of two
    images one must be in val, and no fixed side for each image does that for every pair.

    progress(done, total) is called after each file. Raises DataError where there is no data set to check: nothing
    at the path, no class folders, fewer than two classes, unusable class names, a CSV that is not one.
    """
    listing = _list(path)
    checked = list(_check_files(listing, progress))
    problems = [*listing.problems, *(problem for result in checked for problem in result.problems)]
    entries = [
        _Entry(file, result.sha256)
        for file, result in zip(listing.files, checked, strict=True)
        if not any(problem.fatal for problem in result.problems)
    ]
    for conflicts in (_two_labels, _in_both_subsets):
        bad = conflicts(entries, listing.root)
        problems += bad.values()
        entries = [entry for index, entry in enumerate(entries) if index not in bad]
    if not listing.is_split:
        entries = _split(entries, val_fraction, split_seed)
    problems += _size_problems(entries, listing)
    labels = {name: index for index, name in enumerate(listing.class_names)}
    train, val = (
        tuple(Sample(e.file.path, labels[e.file.class_name], e.sha256) for e in entries if e.file.subset == subset)
        for subset in ("train", "val")
    )
    ordered = sorted(problems, key=lambda problem: (not problem.fatal, problem.kind))
    return Dataset(listing.root, listing.class_names, train, val, tuple(ordered))


def refuse_fatal(problems: Iterable[Problem], *, skip_bad: bool = False) -> None:
    """Raises DataError for fatal problems; with skip_bad only for classes with too few images."""
    fatal = [problem for problem in problems if problem.fatal]
    files = [problem for problem in fatal if problem.kind != TOO_FEW]
    classes = [problem for problem in fatal if problem.kind == TOO_FEW]
    parts = []
    if files and not skip_bad:
        noun, them = ("file", "it") if len(files) == 1 else ("files", "them")
        parts.append(
            f"{len(files)} {noun} cannot be used: {_first_few(files)}. "
            f"Repair or remove {them}, or leave {them} out with --skip-bad"
        )
    if classes:
        parts.append(f"{TOO_FEW}: {_first_few(classes)}. Add images, or remove the class")
    if parts:
        raise DataError(". ".join(parts))


def _first_few(problems: Sequence[Problem]) -> str:
    shown = [f"{problem.path} ({problem.kind}: {problem.detail})" for problem in problems[:3]]
    if problems[0].kind == TOO_FEW:
        shown = [f"{problem.path} has {problem.detail}" for problem in problems[:3]]
    return "; ".join(shown) + (f"; and {len(problems) - 3} more" if len(problems) > 3 else "")


def problem_counts(problems: Iterable[Problem]) -> dict[str, int]:
    """How many problems there are of each kind, the most frequent first."""
    return dict(Counter(problem.kind for problem in problems).most_common())


def missing(samples: Iterable[Sample]) -> list[Path]:
    """The files that are no longer where they were when the data was read."""
    return [sample.path for sample in samples if not sample.path.is_file()]


# ---------------------------------------------------------------------------------------------------------------
# What there is: folders and tables → a list of files


@dataclass(frozen=True)
class _File:
    path: Path
    class_name: str
    subset: str  # "train", "val", or "" where the split is made here


@dataclass(frozen=True)
class _Listing:
    root: Path
    class_names: tuple[str, ...]
    files: tuple[_File, ...]
    problems: tuple[Problem, ...]

    @property
    def is_split(self) -> bool:
        return any(file.subset for file in self.files)


@dataclass(frozen=True)
class _Entry:
    file: _File
    sha256: str


def _list(path: Path) -> _Listing:
    try:
        if not path.exists():
            raise DataError(f"no data at {path}: give a folder with one folder a class, or a CSV with path,label")
        path = path.resolve()
        if path.is_dir():
            listing = _list_folder(path)
        elif path.suffix.lower() == ".csv":
            listing = _list_csv(path)
        else:
            raise DataError(f"{path} is a file: give a folder with one folder a class, or a .csv with path,label")
    except OSError as error:
        raise DataError(f"cannot read {error.filename or path}: {error.strerror or error}") from None
    _check_class_names(listing.class_names, path)
    return listing


def _list_folder(root: Path) -> _Listing:
    layout = _subset_folders(root)
    used = {folder.name for folder in layout.values() if folder != root}
    loose = [entry for entry in _visible(root) if entry.name not in used and (used or not entry.is_dir())]
    files: list[_File] = []
    class_names: list[str] = []
    for subset, folder in layout.items():
        entries = _visible(folder)
        classes = [entry for entry in entries if entry.is_dir()]
        if not classes:
            raise DataError(_no_class_folders(folder, entries))
        if folder != root:
            loose += [entry for entry in entries if not entry.is_dir()]
        unknown = [c.name for c in classes if c.name not in class_names]
        if subset == "val" and unknown:
            raise DataError(
                f"{_shown(str(folder))} has class folders that train lacks: {_names(unknown)}. "
                "Add training images of these classes, or remove the folders"
            )
        class_names += unknown
        files += [_File(file, c.name, subset) for c in classes for file in _files_under(c)]
    if len(class_names) == 1:
        raise DataError(_one_class(next(iter(layout.values())) / class_names[0]))
    problems = [
        Problem(_relative(entry, root), "not used", "lies beside the class folders, so it has no label", False)
        for entry in loose
    ]
    known, odd = _by_suffix(files, root)
    return _Listing(root, tuple(sorted(class_names, key=_natural)), tuple(known), (*problems, *odd))


def _subset_folders(root: Path) -> dict[str, Path]:
    """{"train": folder, "val": folder}, or {"": folder} where there is nothing but one folder to split.

    "train" may be the name of a class too, so subsets are meant only where train/ holds folders itself, or where
    all the folders have names of subsets.
    """
    folders = [entry for entry in _visible(root) if entry.is_dir()]
    found: dict[str, list[Path]] = defaultdict(list)
    for folder in folders:
        found[SUBSET_NAMES.get(folder.name.lower(), "")].append(folder)
    holds_classes = any(entry.is_dir() for folder in found["train"] for entry in _visible(folder))
    only_subsets = folders and all(f.name.lower() in (*SUBSET_NAMES, *UNUSED_SUBSETS) for f in folders)
    if not (holds_classes or only_subsets):
        return {"": root}
    for subset in ("train", "val"):
        if len(found[subset]) > 1:
            both = _names([folder.name for folder in found[subset]])
            raise DataError(f"{root} has more than one folder for {subset}: {both}. Keep one of them")
    if not found["train"]:
        raise DataError(f"{root} has {_names([f.name for f in folders])} but no train/: add train/ with class folders")
    if not found["val"]:
        return {"": found["train"][0]}
    return {"train": found["train"][0], "val": found["val"][0]}


def _no_class_folders(folder: Path, entries: Sequence[Path]) -> str:
    images = sum(entry.suffix.lower() in runner.IMAGE_SUFFIXES for entry in entries)
    what = "is empty" if not entries else f"has no class folders ({images} loose images)"
    return f"{folder} {what}: put the images of each class in a folder of their own, named as the class"


def _one_class(folder: Path) -> str:
    message = f"{folder.parent} has one class folder only, {_shown(folder.name)!r}: classification needs at least two"
    inner = [entry for entry in _visible(folder) if entry.is_dir()]
    return message + (f". Did you mean {folder}?" if len(inner) > 1 else "")


def _visible(folder: Path) -> list[Path]:
    return sorted(entry for entry in folder.iterdir() if not _is_hidden(entry.name))


def _is_hidden(name: str) -> bool:
    return name.startswith(".") or name.lower() in HIDDEN_NAMES


def _files_under(folder: Path) -> list[Path]:
    """All visible files below the folder, sorted; links to folders are followed, each real folder once."""

    def fail(error: OSError) -> None:  # os.walk would silently leave out what it cannot list
        raise error

    seen: set[Path] = set()
    files: list[Path] = []
    for here, folders, names in os.walk(folder, onerror=fail, followlinks=True):
        real = Path(here).resolve()
        folders[:] = [] if real in seen else sorted(name for name in folders if not _is_hidden(name))
        if real not in seen:
            files += [Path(here, name) for name in names if not _is_hidden(name)]
        seen.add(real)
    return sorted(files)


def _by_suffix(files: Iterable[_File], root: Path) -> tuple[list[_File], list[Problem]]:
    known: list[_File] = []
    odd: list[Problem] = []
    for file in files:
        if file.path.suffix.lower() in runner.IMAGE_SUFFIXES:
            known.append(file)
        else:
            detail = f"its name ends in none of {' '.join(runner.IMAGE_SUFFIXES)}"
            odd.append(Problem(_relative(file.path, root), "not an image", detail, False))
    return known, odd


def _list_csv(path: Path) -> _Listing:
    rows = _csv_rows(path)
    header = [name.strip().lower() for name in rows[0][1]] if rows else []
    lacking = [name for name in ("path", "label") if name not in header]
    if lacking:
        found = ", ".join(header) or "nothing"
        raise DataError(
            f"{path} has no column {' and no column '.join(lacking)} (its first line has: {_shown(found)}). "
            "The first line must name the columns: path,label or path,label,subset, separated by commas"
        )
    files: list[_File] = []
    problems: list[Problem] = []
    parsed = [(line, _csv_file(path.parent, header, row)) for line, row in rows[1:]]
    is_split = any(isinstance(row, _File) and row.subset == "val" for _, row in parsed)
    for line, row in parsed:
        where = f"{path.name} line {line}"
        if isinstance(row, str):
            problems.append(Problem(where, "bad row", row, True))
        elif row.subset in UNUSED_SUBSETS:
            problems.append(Problem(where, "not used", f"its subset is {row.subset}", False))
        elif is_split and not row.subset:
            problems.append(Problem(where, "bad row", "it has no subset, other lines have one", True))
        else:
            files.append(row if is_split else replace(row, subset=""))
    class_names = sorted({file.class_name for file in files}, key=_natural)
    if len(class_names) < 2:
        what = "no usable line" if not class_names else f"one label only, {_shown(class_names[0])!r}"
        also = f" ({problems[0].path}: {problems[0].detail})" if problems else ""
        raise DataError(f"{path} has {what}{also}: classification needs lines with at least two labels")
    return _Listing(path.parent, tuple(class_names), tuple(files), tuple(problems))


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


def _csv_file(folder: Path, header: Sequence[str], row: Sequence[str]) -> _File | str:
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
    if subset and subset not in (*SUBSET_NAMES, *UNUSED_SUBSETS):
        return f"its subset is {_shown(fields['subset'])!r}, expected train or val"
    return _File(folder / fields["path"], fields["label"], SUBSET_NAMES.get(subset, subset))


def _check_class_names(class_names: Sequence[str], path: Path) -> None:
    """Refuses names that a terminal, a table or another file system would damage. Raises DataError."""
    odd = [name for name in class_names if not name.isprintable()]
    if odd:
        raise DataError(f"{path} has class names with line breaks or other control characters: {_names(odd)}: rename")
    same: dict[str, list[str]] = defaultdict(list)
    for name in class_names:
        same[unicodedata.normalize("NFC", name).casefold()].append(name)
    clash = next((names for names in same.values() if len(names) > 1), None)
    if clash:
        raise DataError(f"{path} has class names that differ by case only: {_names(clash)}: merge or rename them")


def _natural(name: str) -> tuple[bool, int, str]:
    """Sort key: whole numbers first, by value ("2" before "10"); then the other names."""
    return (not name.isdecimal(), int(name) if name.isdecimal() else 0, name)


def _names(names: Sequence[str]) -> str:
    return ", ".join(repr(name) for name in names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")


def _shown(text: str) -> str:
    """The text, its control characters and broken encodings escaped: for one line of a terminal."""
    return text if text.isprintable() else repr(text)[1:-1]


def _relative(path: Path, root: Path) -> str:
    return _shown(str(path.relative_to(root) if path.is_relative_to(root) else path))


# ---------------------------------------------------------------------------------------------------------------
# The check of each file


@dataclass(frozen=True)
class _Checked:
    sha256: str
    problems: tuple[Problem, ...]


def _check_files(listing: _Listing, progress: Progress | None) -> Iterator[_Checked]:
    check = partial(_check_file, root=listing.root)
    paths = [file.path for file in listing.files]
    with warnings.catch_warnings():
        # PIL warns of damaged EXIF and of very large images. It only reads headers here; OpenCV is the judge.
        warnings.filterwarnings("ignore", module=r"PIL\.")
        for done, result in enumerate(in_order(check, paths, workers=None, ahead=64), start=1):
            if progress is not None:
                progress(done, len(paths))
            yield result


def in_order(
    function: Callable[[Item], Result], items: Iterable[Item], *, workers: int | None, ahead: int
) -> Generator[Result, None, None]:
    """function(item) for each item, in order, computed by threads up to `ahead` items before it is asked for.

    (Executor.map would submit all items at once, and so hold every image of an epoch.)
    """
    # OpenCV and hashlib let go of the interpreter's lock, so threads are enough.
    pool = ThreadPoolExecutor(workers or min(8, os.cpu_count() or 1), thread_name_prefix="edgekit-data")
    waiting: deque[Future[Result]] = deque()
    try:
        for item in items:
            waiting.append(pool.submit(function, item))
            if len(waiting) > ahead:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def _check_file(path: Path, root: Path) -> _Checked:
    name = _relative(path, root)
    try:
        if not path.is_file():  # and so not a pipe, which would be waited on for ever
            kind, detail = ("unreadable", "not a file") if path.exists() else ("missing", "there is no such file")
            return _Checked("", (Problem(name, kind, detail, True),))
        data = path.read_bytes()
    except OSError as error:
        return _Checked("", (Problem(name, "unreadable", error.strerror or str(error), True),))
    return _Checked(hashlib.sha256(data).hexdigest(), tuple(_content_problems(data, name)))


def _content_problems(data: bytes, name: str) -> Iterator[Problem]:
    if not data:
        yield Problem(name, "empty", "the file has 0 bytes", True)
    elif _is_cut_off(data):
        yield Problem(name, "truncated", f"the image goes on after the file's end at {len(data)} bytes", True)
    else:
        try:
            runner.decode(data)
        except runner.RunnerError as error:
            yield Problem(name, "unreadable", str(error), True)
        else:
            yield from (Problem(name, kind, detail, False) for kind, detail in _oddities(data))


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


def _two_labels(entries: Sequence[_Entry], root: Path) -> dict[int, Problem]:
    """Every copy of an image that has more than one label, by its index: none of the labels can be trusted."""
    copies: dict[str, dict[str, Path]] = defaultdict(dict)
    for entry in entries:
        copies[entry.sha256].setdefault(entry.file.class_name, entry.file.path)
    bad = {}
    for index, entry in enumerate(entries):
        others = [path for name, path in copies[entry.sha256].items() if name != entry.file.class_name]
        if others:
            detail = f"labelled {entry.file.class_name!r}, and the same image is {_relative(others[0], root)}"
            if others[0] == entry.file.path:
                detail = "listed under more than one label"
            bad[index] = Problem(_relative(entry.file.path, root), "two labels", detail, True)
    return bad


def _in_both_subsets(entries: Sequence[_Entry], root: Path) -> dict[int, Problem]:
    """The training copies, by index, of images that are in val too. (val is kept as its maker chose it.)"""
    in_val = {entry.sha256: entry.file.path for entry in entries if entry.file.subset == "val"}
    return {
        index: Problem(
            _relative(entry.file.path, root),
            "in train and val",
            f"the same image is {_relative(in_val[entry.sha256], root)}; the training copy is the one to leave out",
            True,
        )
        for index, entry in enumerate(entries)
        if entry.file.subset == "train" and entry.sha256 in in_val
    }


def _size_problems(entries: Sequence[_Entry], listing: _Listing) -> Iterator[Problem]:
    """Classes too small to train on. Copies of one image count once. entries: split."""
    contents: dict[tuple[str, str], set[str]] = defaultdict(set)
    for entry in entries:
        contents[entry.file.class_name, entry.file.subset].add(entry.sha256)
    for name in listing.class_names:
        train, val = contents[name, "train"], contents[name, "val"]
        count = len(train | val)
        if count < MIN_IMAGES or not train:
            lacks = "" if train or not count else ", none of them to train on"
            noun = "image" if count == 1 else "different images"
            detail = f"{count} usable {noun}{lacks} (needs at least {MIN_IMAGES})"
            yield Problem(f"class {name!r}", TOO_FEW, detail, True)
            continue
        if not val:
            yield Problem(f"class {name!r}", "no validation images", "its accuracy will not be known", False)
        if count < FEW_IMAGES:
            yield Problem(f"class {name!r}", "few images", f"{count} different images", False)
    if listing.is_split and not any(entry.file.subset == "val" for entry in entries):
        yield Problem("val", TOO_FEW, "no usable images", True)


# ---------------------------------------------------------------------------------------------------------------
# The split


def _split(entries: Sequence[_Entry], val_fraction: float, seed: int) -> list[_Entry]:
    """The entries with their subsets, as check_dataset explains."""
    contents: dict[str, set[str]] = defaultdict(set)
    for entry in entries:
        contents[entry.file.class_name].add(entry.sha256)
    # Nothing has two labels by now, so one set serves all classes.
    val = {sha256 for own in contents.values() for sha256 in _val_contents(own, val_fraction, seed)}
    return [
        _Entry(replace(entry.file, subset="val" if entry.sha256 in val else "train"), entry.sha256) for entry in entries
    ]


def _val_contents(contents: Iterable[str], val_fraction: float, seed: int) -> list[str]:
    """One class's contents (SHA-256, hex) → those that validate: at least one, and never all (of two or more)."""
    values = sorted((_split_value(sha256, seed), sha256) for sha256 in contents)
    below = sum(value < val_fraction for value, _ in values)
    return [sha256 for _, sha256 in values[: min(max(below, 1), len(values) - 1)]]


def _split_value(sha256: str, seed: int) -> float:
    """A number in [0, 1), uniform over contents; 52 bits, which a float holds exactly."""
    return int(hashlib.sha256(f"{seed}:{sha256}".encode()).hexdigest()[:13], 16) / 16**13


SPLIT_HEADER = ["subset", "label", "class", "sha256", "path"]


def write_split(dataset: Dataset, path: Path) -> None:
    """Writes split.csv: which file was in which subset, under which label. Raises ArtifactError.

    One table, header subset,label,class,sha256,path. The first row has the subset "root", the data's root as its
    path and the data set's own sha256; then a row "class" for each class; then a row for each sample.
    """
    rows: list[Sequence[object]] = [SPLIT_HEADER, ["root", "", "", dataset.sha256, dataset.root]]
    rows += [["class", label, name, "", ""] for label, name in enumerate(dataset.class_names)]
    for subset, samples in (("train", dataset.train), ("val", dataset.val)):
        rows += [[subset, s.label, dataset.class_names[_class_id(s)], s.sha256, s.path] for s in samples]
    partial_path = path.with_name(path.name + ".partial")
    try:
        # surrogateescape: file names that are not UTF-8 must survive.
        with partial_path.open("w", encoding="utf-8", errors="surrogateescape", newline="") as stream:
            csv.writer(stream).writerows(rows)
        partial_path.replace(path)
    except OSError as error:
        partial_path.unlink(missing_ok=True)
        raise ArtifactError(f"cannot write {path}: {error.strerror or error}") from None


def read_split(path: Path) -> Dataset:
    """The data set that write_split wrote, without its problems. The files themselves are not looked at.

    Raises ArtifactError when the split is missing, or is not what was written.
    """
    try:
        with path.open(encoding="utf-8", errors="surrogateescape", newline="") as stream:
            text = stream.read()
        return _parse_split(text)
    except OSError as error:
        raise ArtifactError(f"no split at {path} ({error.strerror}): fine-tune again, it is written first") from None
    except (ValueError, IndexError, csv.Error):
        raise ArtifactError(f"{path} is damaged or was changed: fine-tune again") from None


def _parse_split(text: str) -> Dataset:
    """Raises ValueError, IndexError or csv.Error for anything that write_split does not write."""
    header, root, *rows = csv.reader(io.StringIO(text, newline=""), strict=True)
    if header != SPLIT_HEADER or root[0] != "root" or not text.endswith("\n"):
        raise ValueError(header)
    class_names = tuple(row[2] for row in rows if row[0] == "class")
    samples: dict[str, list[Sample]] = {"train": [], "val": []}
    for subset, label, name, sha256, path in rows[len(class_names) :]:
        if class_names.index(name) != int(label) or subset not in samples:
            raise ValueError(label)
        samples[subset].append(Sample(Path(path), int(label), sha256))
    dataset = Dataset(Path(root[4]), class_names, tuple(samples["train"]), tuple(samples["val"]), ())
    if dataset.sha256 != root[3]:
        raise ValueError(root[3])
    return dataset
