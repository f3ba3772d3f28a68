"""Labelled images: reading them, checking them and splitting them (batches.py serves them to training).

What lies where is read by image_folders.py (classification), box_files.py (detection) and mask_files.py
(segmentation); they say which formats there are.

`check_dataset` looks at every file once, and what it finds wrong becomes a `Problem`; `refuse_fatal` turns the
fatal ones into a DataError; `read_dataset` is both. Images are decoded by edgekit.runner, as on the device.
"""

from __future__ import annotations

import csv
import hashlib
import io
import os
import warnings
from collections import Counter, defaultdict, deque
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TypeVar

from edgekit import box_files, image_folders, mask_files
from edgekit.errors import ArtifactError, DataError
from edgekit.image_files import look_at_image
from edgekit.listings import (
    DrawnBoxes,
    File,
    Listing,
    check_class_names,
    relative,
)
from edgekit.listings import Problem as Problem  # what callers find in Dataset.problems
from edgekit.mask_files import MaskFacts
from edgekit.samples import Box, Label, Mask, Sample

MIN_IMAGES = 2  # different images a class needs: one to train on, one to validate with
FEW_IMAGES = 10  # below this a class is reported: its figures will be coarse
TOO_FEW = "too few images"  # the one fatal kind that leaving files out cannot mend

Progress = Callable[[int, int], None]
Item = TypeVar("Item")
Result = TypeVar("Result")


@dataclass(frozen=True)
class Dataset:
    """Labelled images in two subsets. root: the folder that relative paths start from (a CSV's own folder).

    task: "classify", "detect" or "segment". test: images that the data keeps apart for testing (of classification
    none: test/ is not read); neither training nor validation uses them.
    """

    root: Path
    class_names: tuple[str, ...]
    train: tuple[Sample, ...]
    val: tuple[Sample, ...]
    problems: tuple[Problem, ...]
    task: str = "classify"
    test: tuple[Sample, ...] = ()

    @property
    def sha256(self) -> str:
        """SHA-256 (hex) of the sorted (content, label, subset) rows: the same wherever the files lie.

        Of detection and segmentation it covers the task, the names and order of the classes, and the boxes or masks.
        """
        rows = [
            f"{sample.sha256} {_content(sample.label, self.class_names)} {subset}\n"
            for subset, samples in _subsets(self)
            for sample in samples
        ]
        if self.task != "classify":
            rows += [f"task {self.task}\n", f"classes {self.class_names}\n"]
        return hashlib.sha256("".join(sorted(rows)).encode()).hexdigest()


def _subsets(dataset: Dataset) -> tuple[tuple[str, tuple[Sample, ...]], ...]:
    return ("train", dataset.train), ("val", dataset.val), ("test", dataset.test)


def _content(label: Label, class_names: Sequence[str]) -> str:
    """What a label says, without where its file lies and without an order of the boxes."""
    if isinstance(label, int):
        return class_names[label]
    if isinstance(label, Mask):
        return f"{label.sha256} {label.levels}"
    return " ".join(sorted(_box_text(box) for box in label))


def _box_text(box: Box) -> str:
    return f"{box.class_id}:{box.left},{box.top},{box.right},{box.bottom}"


# ---------------------------------------------------------------------------------------------------------------
# Reading


def guess_task(path: Path) -> str:
    """The task: "detect" where the data has boxes, "segment" where it has masks/, else "classify". Never raises.

    Masks beside their photos (x.jpg, x.png) are not guessed: class folders may hold such files too.
    """
    try:
        if box_files.has_boxes(path):
            return "detect"
        return "segment" if mask_files.has_masks(path) else "classify"
    except OSError:
        return "classify"


def read_dataset(
    path: Path,
    task: str = "classify",
    *,
    val_fraction: float = 0.2,
    split_seed: int = 0,
    skip_bad: bool = False,
    progress: Progress | None = None,
) -> Dataset:
    """Reads, checks and splits a folder or file. Raises DataError; skip_bad leaves bad files out instead.

    The arguments are check_dataset's. Files left out, and all that is merely odd, are in Dataset.problems.
    """
    dataset = check_dataset(path, task, val_fraction=val_fraction, split_seed=split_seed, progress=progress)
    refuse_fatal(dataset.problems, skip_bad=skip_bad)
    return dataset


def check_dataset(
    path: Path,
    task: str = "classify",
    *,
    val_fraction: float = 0.2,
    split_seed: int = 0,
    progress: Progress | None = None,
) -> Dataset:
    """Reads every file once → the data set without its bad files, and all problems, fatal ones first.

    task: "classify", "detect" or "segment".

    val_fraction (0 to 1, both excluded): expected share of each stratum in val, where the data has no split of its
    own. A stratum is a class of classification, a folder of segmentation, and all the images of detection. An image
    goes to val when the hash of its content and split_seed, as a number in [0, 1), is below it. So copies of an image
    never part, and adding or removing other files moves nothing. The real share varies: in a stratum of n images by
    about sqrt(val_fraction * (1 - val_fraction) / n). One exception: every stratum of two images or more has one in
    each subset. Where no hash is below val_fraction the smallest goes to val (where all are, the largest to train), and
    that one image may move when images are added to such a stratum. Nothing can prevent that: of two images one must be
    in val, and no fixed side for each image does that for every pair.

    progress(done, total) is called after each file. Raises DataError where there is no data set to check: nothing
    at the path, no class folders, fewer than two classes, unusable class names, a CSV that is not one, no annotations
    or masks.
    """
    listing = _list(path, task)
    checked = list(_check_files(listing, progress))
    problems = [*listing.problems, *(problem for result in checked for problem in result.problems)]
    usable = [(file, result) for file, result in zip(listing.files, checked, strict=True) if _is_usable(result)]
    if task == "segment" and not listing.levels:
        facts = [result.label for _, result in usable if isinstance(result.label, MaskFacts)]
        names, levels = mask_files.guess_levels(facts, listing.root)
        listing = replace(listing, class_names=names, levels=levels)
    entries: list[_Entry] = []
    for file, result in usable:
        label, classes, odd = _label(result.label, listing, relative(file.path, listing.root))
        problems += odd
        if not any(problem.fatal for problem in odd):
            entries.append(_Entry(file, result.sha256, label, classes))
    for conflicts in (_two_labels, _in_two_subsets):
        bad = conflicts(entries, listing)
        problems += bad.values()
        entries = [entry for index, entry in enumerate(entries) if index not in bad]
    if not listing.is_split:
        entries = _split(entries, val_fraction, split_seed)
    problems += _size_problems(entries, listing) if task == "classify" else _occurrences(entries, listing)
    train, val, test = (
        tuple(Sample(e.file.path, e.label, e.sha256) for e in entries if e.file.subset == subset)
        for subset in ("train", "val", "test")
    )
    ordered = sorted(problems, key=lambda problem: (not problem.fatal, problem.kind))
    return Dataset(listing.root, listing.class_names, train, val, tuple(ordered), task, test)


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
    """The files, images and masks, that are no longer where they were when the data was read."""
    paths: list[Path] = []
    for sample in samples:
        paths += [sample.path, sample.label.path] if isinstance(sample.label, Mask) else [sample.path]
    return [path for path in paths if not path.is_file()]


# ---------------------------------------------------------------------------------------------------------------
# What there is


READERS: dict[str, tuple[Callable[[Path], Listing], str]] = {
    "classify": (image_folders.list_images, image_folders.WANTED),
    "detect": (box_files.list_boxes, box_files.WANTED),
    "segment": (mask_files.list_masks, mask_files.WANTED),
}


def _list(path: Path, task: str) -> Listing:
    reader, wanted = READERS[task]
    try:
        if not path.exists():
            raise DataError(f"no data at {path}: give {wanted}")
        path = path.resolve()
        listing = reader(path)
    except OSError as error:
        raise DataError(f"cannot read {error.filename or path}: {error.strerror or error}") from None
    check_class_names(listing.class_names, path)
    return listing


@dataclass(frozen=True)
class _Entry:
    file: File
    sha256: str
    label: Label
    classes: frozenset[int]  # that are in the image


# ---------------------------------------------------------------------------------------------------------------
# The check of each file


@dataclass(frozen=True)
class _Checked:
    sha256: str
    label: str | tuple[Box, ...] | MaskFacts | None
    problems: tuple[Problem, ...]


def _is_usable(result: _Checked) -> bool:
    return not any(problem.fatal for problem in result.problems)


def _check_files(listing: Listing, progress: Progress | None) -> Iterator[_Checked]:
    check = partial(_check_file, listing=listing)
    with warnings.catch_warnings():
        # PIL warns of damaged EXIF and of very large images. Of photos it only reads headers; OpenCV is the judge.
        warnings.filterwarnings("ignore", module=r"PIL\.")
        for done, result in enumerate(in_order(check, listing.files, workers=None, ahead=64), start=1):
            if progress is not None:
                progress(done, len(listing.files))
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


def _check_file(file: File, listing: Listing) -> _Checked:
    image = look_at_image(file.path, listing.root)
    if image.size is None:
        return _Checked("", None, image.problems)
    if isinstance(file.label, str):
        return _Checked(image.sha256, file.label, image.problems)
    name = relative(file.path, listing.root)
    if isinstance(file.label, DrawnBoxes):
        boxes, odd = box_files.fit_boxes(file.label, image.size, listing.class_names, name)
        return _Checked(image.sha256, boxes, image.problems + odd)
    mask = mask_files.look_at_mask(file.label, image.size, name)
    if isinstance(mask, Problem):
        return _Checked(image.sha256, None, (*image.problems, mask))
    return _Checked(image.sha256, mask, image.problems)


def _label(
    found: str | tuple[Box, ...] | MaskFacts | None, listing: Listing, name: str
) -> tuple[Label, frozenset[int], tuple[Problem, ...]]:
    """What the check found → the sample's label, the classes in it, and what is wrong with it."""
    assert found is not None
    if isinstance(found, str):
        class_id = listing.class_names.index(found)
        return class_id, frozenset([class_id]), ()
    if isinstance(found, MaskFacts):
        return mask_files.label_mask(found, listing.levels, listing.void, name)
    return found, frozenset(box.class_id for box in found), ()


def _two_labels(entries: Sequence[_Entry], listing: Listing) -> dict[int, Problem]:
    """Every copy of an image that has more than one label, by its index: none of the labels can be trusted."""
    contents = [_content(entry.label, listing.class_names) for entry in entries]
    copies: dict[str, dict[str, Path]] = defaultdict(dict)
    for entry, content in zip(entries, contents, strict=True):
        copies[entry.sha256].setdefault(content, entry.file.path)
    bad = {}
    for index, (entry, content) in enumerate(zip(entries, contents, strict=True)):
        others = [path for other, path in copies[entry.sha256].items() if other != content]
        if others:
            detail = _conflict(entry.label, listing.class_names, relative(others[0], listing.root))
            if others[0] == entry.file.path:
                detail = "listed under more than one label"
            bad[index] = Problem(relative(entry.file.path, listing.root), "two labels", detail, True)
    return bad


def _conflict(label: Label, class_names: Sequence[str], other: str) -> str:
    if isinstance(label, int):
        return f"labelled {class_names[label]!r}, and the same image is {other}"
    return f"the same image is {other}, with {'another mask' if isinstance(label, Mask) else 'other boxes'}"


_RANKS = {"": 0, "train": 0, "val": 1, "test": 2}
_SUBSET_WORDS = (("train", "training"), ("val", "validation"))


def _in_two_subsets(entries: Sequence[_Entry], listing: Listing) -> dict[int, Problem]:
    """The copies, by index, of images that are also in a subset that is kept for later: val or test.

    (val is kept as its maker chose it, and test even more so.)
    """
    latest: dict[str, File] = {}
    for entry in entries:
        if entry.sha256 not in latest or _RANKS[latest[entry.sha256].subset] <= _RANKS[entry.file.subset]:
            latest[entry.sha256] = entry.file
    bad = {}
    for index, entry in enumerate(entries):
        other, rank = latest[entry.sha256], _RANKS[entry.file.subset]
        if rank < _RANKS[other.subset]:
            subset, word = _SUBSET_WORDS[rank]
            same = f"the same image is {relative(other.path, listing.root)}; the {word} copy is the one to leave out"
            name = relative(entry.file.path, listing.root)
            bad[index] = Problem(name, f"in {subset} and {other.subset}", same, True)
    return bad


def _size_problems(entries: Sequence[_Entry], listing: Listing) -> Iterator[Problem]:
    """Classes too small to train on. Copies of one image count once. entries: split."""
    contents: dict[tuple[str, str], set[str]] = defaultdict(set)
    for entry in entries:
        contents[entry.file.stratum, entry.file.subset].add(entry.sha256)
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


def _occurrences(entries: Sequence[_Entry], listing: Listing) -> Iterator[Problem]:
    """Subsets and classes of boxes or masks too small to train on. Copies of one image count once. entries: split."""
    contents: dict[tuple[int, str], set[str]] = defaultdict(set)
    images = Counter(entry.file.subset for entry in entries)
    for entry in entries:
        for class_id in entry.classes:
            contents[class_id, entry.file.subset].add(entry.sha256)
    if not any(subset == "train" for _, subset in contents):
        lacks = "no usable images" if not images["train"] else "nothing labelled in its images"
        yield Problem("train", TOO_FEW, lacks, True)
    if not images["val"]:
        yield Problem("val", TOO_FEW, "no usable images", True)
    for class_id, name in enumerate(listing.class_names):
        train, val = contents[class_id, "train"], contents[class_id, "val"]
        count = len(train | val)
        if not train:
            where = "in no image" if not count else "in no training image"
            yield Problem(f"class {name!r}", "never occurs", f"{where}: it cannot be learnt", False)
            continue
        if not val:
            yield Problem(f"class {name!r}", "no validation images", "its accuracy will not be known", False)
        if count < FEW_IMAGES:
            noun = "image" if count == 1 else "different images"
            yield Problem(f"class {name!r}", "few images", f"{count} {noun}", False)


# ---------------------------------------------------------------------------------------------------------------
# The split


def _split(entries: Sequence[_Entry], val_fraction: float, seed: int) -> list[_Entry]:
    """The entries with their subsets, as check_dataset explains; those for testing stay."""
    stratum: dict[str, str] = {}  # of each content: copies in several folders count in the first
    for entry in entries:
        if entry.file.subset != "test":
            stratum.setdefault(entry.sha256, entry.file.stratum)
    contents: dict[str, set[str]] = defaultdict(set)
    for sha256, name in stratum.items():
        contents[name].add(sha256)
    val = {sha256 for own in contents.values() for sha256 in _val_contents(own, val_fraction, seed)}
    return [
        entry
        if entry.file.subset == "test"
        else replace(entry, file=replace(entry.file, subset="val" if entry.sha256 in val else "train"))
        for entry in entries
    ]


def _val_contents(contents: Iterable[str], val_fraction: float, seed: int) -> list[str]:
    """One stratum's contents (SHA-256, hex) → those that validate: at least one, and never all (of two or more)."""
    values = sorted((_split_value(sha256, seed), sha256) for sha256 in contents)
    below = sum(value < val_fraction for value, _ in values)
    return [sha256 for _, sha256 in values[: min(max(below, 1), len(values) - 1)]]


def _split_value(sha256: str, seed: int) -> float:
    """A number in [0, 1), uniform over contents; 52 bits, which a float holds exactly."""
    return int(hashlib.sha256(f"{seed}:{sha256}".encode()).hexdigest()[:13], 16) / 16**13


# ---------------------------------------------------------------------------------------------------------------
# split.csv


SPLIT_HEADER = ["subset", "label", "class", "sha256", "path"]
_Row = Sequence[object]


def write_split(dataset: Dataset, path: Path) -> None:
    """Writes split.csv: which file was in which subset, under which label. Raises ArtifactError.

    One table, header subset,label,class,sha256,path. The first row has the subset "root", the data's root as its
    path and the data set's own sha256; then a row "class" for each class; then a row for each sample.

    Of detection and segmentation the first row has the task as its label. The rows after a sample's say its label:
    "box" (a row each; path: left, top, right and bottom, with blanks between) or "mask" (label: the levels, so too).
    """
    task = "" if dataset.task == "classify" else dataset.task
    rows: list[_Row] = [SPLIT_HEADER, ["root", task, "", dataset.sha256, dataset.root]]
    rows += [["class", label, name, "", ""] for label, name in enumerate(dataset.class_names)]
    for subset, samples in _subsets(dataset):
        for sample in samples:
            rows += _sample_rows(sample, subset, dataset.class_names)
    partial_path = path.with_name(path.name + ".partial")
    try:
        # surrogateescape: file names that are not UTF-8 must survive.
        with partial_path.open("w", encoding="utf-8", errors="surrogateescape", newline="") as stream:
            csv.writer(stream).writerows(rows)
        partial_path.replace(path)
    except OSError as error:
        partial_path.unlink(missing_ok=True)
        raise ArtifactError(f"cannot write {path}: {error.strerror or error}") from None


def _sample_rows(sample: Sample, subset: str, class_names: Sequence[str]) -> list[_Row]:
    label = sample.label
    if isinstance(label, int):
        return [[subset, label, class_names[label], sample.sha256, sample.path]]
    rows: list[_Row] = [[subset, "", "", sample.sha256, sample.path]]
    if isinstance(label, Mask):
        return [*rows, ["mask", " ".join(map(str, label.levels)), "", label.sha256, label.path]]
    for box in label:
        edges = f"{box.left} {box.top} {box.right} {box.bottom}"
        rows.append(["box", box.class_id, class_names[box.class_id], "", edges])
    return rows


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
    except (ValueError, LookupError, csv.Error):
        raise ArtifactError(f"{path} is damaged or was changed: fine-tune again") from None


def _parse_split(text: str) -> Dataset:
    """Raises ValueError, LookupError or csv.Error for anything that write_split does not write."""
    header, root, *rows = csv.reader(io.StringIO(text, newline=""), strict=True)
    if header != SPLIT_HEADER or root[0] != "root" or not text.endswith("\n"):
        raise ValueError(header)
    task = root[1] or "classify"
    class_names = tuple(row[2] for row in rows if row[0] == "class")
    samples: dict[str, list[Sample]] = {"train": [], "val": [], "test": []}
    current = ""
    for kind, label, name, sha256, path in rows[len(class_names) :]:
        if kind in samples:
            current = kind
            written = _class_id(label, name, class_names) if task == "classify" else ()
            samples[current].append(Sample(Path(path), written, sha256))
        else:
            before = samples[current].pop()
            after = _parse_label(before.label, (kind, label, name, sha256, path), class_names)
            samples[current].append(replace(before, label=after))
    train, val, test = (tuple(samples[subset]) for subset in ("train", "val", "test"))
    dataset = Dataset(Path(root[4]), class_names, train, val, (), task, test)
    if dataset.sha256 != root[3]:
        raise ValueError(root[3])
    return dataset


def _parse_label(before: Label, row: Sequence[str], class_names: Sequence[str]) -> Label:
    """A sample's label so far and one more row of it → the label."""
    kind, label, name, sha256, path = row
    if kind == "mask":
        return Mask(Path(path), sha256, tuple(map(int, label.split())))
    if kind != "box" or not isinstance(before, tuple):
        raise ValueError(kind)
    left, top, right, bottom = map(float, path.split(" "))
    return (*before, Box(_class_id(label, name, class_names), left, top, right, bottom))


def _class_id(label: str, name: str, class_names: Sequence[str]) -> int:
    if class_names.index(name) != int(label):
        raise ValueError(label)
    return int(label)
