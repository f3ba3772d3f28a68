"""Reading, checking, splitting and serving labelled images, on real image files."""

from __future__ import annotations

import hashlib
import io
import os
import tempfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import cv2
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pictures import photo, put, sha
from PIL import Image

from edgekit import datasets
from edgekit.datasets import Dataset, Problem
from edgekit.errors import ArtifactError, DataError
from edgekit.samples import Box, Label, Mask, Sample

SIGNS = Path(__file__).parents[1] / "../shared/data/signs/Dataset"
needs_signs = pytest.mark.skipif(not SIGNS.is_dir(), reason=f"the hand-sign photos are not at {SIGNS}")


def encoded(seed: int, suffix: str = ".png") -> bytes:
    return cv2.imencode(suffix, photo(seed))[1].tobytes()


def put_class(folder: Path, count: int, first_seed: int) -> list[Path]:
    return [put(folder / f"{n:03}.png", encoded(first_seed + n)) for n in range(count)]


def two_classes(root: Path, count: int = 12) -> Path:
    put_class(root / "a", count, 0)
    put_class(root / "b", count, 1000)
    return root


def rows(dataset: Dataset) -> list[tuple[str, str, str]]:
    """(subset, class, path below the root), sorted."""
    return sorted(
        (subset, dataset.class_names[s.label], s.path.relative_to(dataset.root).as_posix())
        for subset, samples in (("train", dataset.train), ("val", dataset.val))
        for s in samples
    )


def found(dataset: Dataset) -> set[tuple[str, str, bool]]:
    return {(problem.path, problem.kind, problem.fatal) for problem in dataset.problems}


def pil_bytes(image: Image.Image, form: str, **options: object) -> bytes:
    stream = io.BytesIO()
    image.save(stream, form, **options)
    return stream.getvalue()


# ---------------------------------------------------------------------------------------------------------------
# Layouts


def test_folder_with_its_own_split_is_read_as_it_is(tmp_path: Path) -> None:
    train = [*put_class(tmp_path / "train" / "10", 10, 0), *put_class(tmp_path / "train" / "2", 10, 100)]
    val = put_class(tmp_path / "val" / "2", 1, 200)

    dataset = datasets.read_dataset(tmp_path)

    assert dataset == Dataset(
        root=tmp_path,
        class_names=("2", "10"),
        train=tuple(Sample(path, 1 if path.parent.name == "10" else 0, sha(path)) for path in train),
        val=tuple(Sample(path, 0, sha(path)) for path in val),
        problems=(Problem("class '10'", "no validation images", "its accuracy will not be known", False),),
    )


@pytest.mark.parametrize(("train", "val"), [("train", "valid"), ("train", "validation"), ("Training", "Val")])
def test_other_names_of_the_subsets(tmp_path: Path, train: str, val: str) -> None:
    for subset, seed in ((train, 0), (val, 50)):
        put_class(tmp_path / subset / "a", 10, seed)
        put_class(tmp_path / subset / "b", 10, seed + 100)
    dataset = datasets.read_dataset(tmp_path)
    assert (len(dataset.train), len(dataset.val), dataset.class_names, dataset.problems) == (20, 20, ("a", "b"), ())


def test_train_without_val_is_split_and_the_test_folder_is_listed_as_not_used(tmp_path: Path) -> None:
    two_classes(tmp_path / "train", 20)
    put_class(tmp_path / "test" / "a", 2, 5000)
    put(tmp_path / "train" / "loose.png", encoded(1))
    dataset = datasets.read_dataset(tmp_path)
    flat = datasets.read_dataset(tmp_path / "train")
    assert (dataset.train, dataset.val) == (flat.train, flat.val)
    assert found(dataset) == {("test", "not used", False), ("train/loose.png", "not used", False)}


@pytest.mark.parametrize("names", [("valid", "invalid"), ("train", "car"), ("test", "pass")])
def test_classes_may_have_the_names_of_subsets(tmp_path: Path, names: tuple[str, str]) -> None:
    for seed, name in enumerate(names):
        put_class(tmp_path / name, 10, 100 * seed)
    dataset = datasets.read_dataset(tmp_path)
    assert dataset.class_names == tuple(sorted(names))
    assert len(dataset.train) + len(dataset.val) == 20
    assert dataset.val


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        (("10", "2", "1"), ("1", "2", "10")),
        (("b", "a", "B2"), ("B2", "a", "b")),
        (("x", "11", "9"), ("9", "11", "x")),
        (("01", "1", "²"), ("01", "1", "²")),
    ],
)
def test_order_of_the_classes(tmp_path: Path, names: tuple[str, ...], expected: tuple[str, ...]) -> None:
    for seed, name in enumerate(names):
        put_class(tmp_path / name, 2, 100 * seed)
    assert datasets.read_dataset(tmp_path).class_names == expected


def test_nested_files_are_found_hidden_ones_ignored_and_others_listed(tmp_path: Path) -> None:
    two_classes(tmp_path, 10)
    put(tmp_path / "a" / "camera 1" / "day" / "x.PNG", encoded(77))
    for hidden in (".DS_Store", "__MACOSX/a/._x.png", "a/Thumbs.db", "a/.ipynb_checkpoints/x.png", ".git/c/x.png"):
        put(tmp_path / hidden, b"not an image")
    put(tmp_path / "a" / "notes.txt", b"blurred: 3")
    put(tmp_path / "README.md", b"#")
    put(tmp_path / "loose.png", encoded(5))

    dataset = datasets.read_dataset(tmp_path)

    expected = {f"{name}/{n:03}.png" for name in "ab" for n in range(10)} | {"a/camera 1/day/x.PNG"}
    assert {path for _, _, path in rows(dataset)} == expected
    assert found(dataset) == {
        ("a/notes.txt", "not an image", False),
        ("README.md", "not used", False),
        ("loose.png", "not used", False),
    }


def test_links_are_followed_once(tmp_path: Path) -> None:
    two_classes(tmp_path / "data", 10)
    outside = put_class(tmp_path / "elsewhere", 2, 500)[0].parent
    (tmp_path / "data" / "a" / "more").symlink_to(outside)
    (tmp_path / "data" / "a" / "loop").symlink_to(tmp_path / "data" / "a")
    dataset = datasets.read_dataset(tmp_path / "data")
    assert sum(s.label == 0 for s in (*dataset.train, *dataset.val)) == 12
    assert dataset.problems == ()


def test_a_relative_path_gives_absolute_samples(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    two_classes(tmp_path / "data")
    monkeypatch.chdir(tmp_path)
    relative = datasets.read_dataset(Path("data"))
    assert relative == datasets.read_dataset(tmp_path / "data")
    assert all(sample.path.is_absolute() for sample in relative.train)


def csv_data(folder: Path, text: str, name: str = "table.csv", encoding: str = "utf-8") -> Path:
    for n in range(10):
        put(folder / "images" / f"{n}.png", encoded(n))
    return put(folder / name, text.encode(encoding))


def test_csv_with_subsets(tmp_path: Path) -> None:
    lines = [
        "\ufeffLabel , path,subset,weight",
        "cat,images/0.png,train,1",
        'dog,"images/1.png",TRAIN,1',
        "",
        " cat ,images/2.png,validation,1",
        f"dog,{tmp_path / 'images/3.png'},train,1",
        "dog,images/4.png,test,1",
    ]
    dataset = datasets.read_dataset(csv_data(tmp_path, "\r\n".join(lines)))
    images = tmp_path / "images"
    assert dataset == Dataset(
        root=tmp_path,
        class_names=("cat", "dog"),
        train=tuple(Sample(images / f"{n}.png", int(n > 0), sha(images / f"{n}.png")) for n in (0, 1, 3)),
        val=(Sample(images / "2.png", 0, sha(images / "2.png")),),
        problems=(
            Problem("class 'cat'", "few images", "2 different images", False),
            Problem("class 'dog'", "few images", "2 different images", False),
            Problem("class 'dog'", "no validation images", "its accuracy will not be known", False),
            Problem("table.csv line 7", "not used", "its subset is test", False),
        ),
    )


@pytest.mark.parametrize("subset", ["", ",train"])
def test_csv_without_val_is_split_as_a_folder_is(tmp_path: Path, subset: str) -> None:
    two_classes(tmp_path / "data", 20)
    lines = [f"{c}/{n:03}.png,{c}{subset}" for c in "ab" for n in range(20)]
    header = "path,label,subset" if subset else "path,label"
    table = put(tmp_path / "data" / "t.csv", "\n".join([header, *lines]).encode())
    from_csv, from_folder = datasets.read_dataset(table), datasets.read_dataset(tmp_path / "data")
    assert (from_csv.train, from_csv.val, from_csv.sha256) == (
        from_folder.train,
        from_folder.val,
        from_folder.sha256,
    )


def test_bad_csv_lines_are_listed_and_can_be_skipped(tmp_path: Path) -> None:
    good = [f"images/{n}.png,{'ab'[n % 2]},{'train' if n < 6 else 'val'}" for n in range(8)]
    bad = [
        "images/8.png,,train",
        ",a,train",
        "images/8.png,a",
        "images/8.png,a,dev",
        "images/8.png,b,",
        "gone.png,a,val",
    ]
    table = csv_data(tmp_path, "\n".join(["path,label,subset", *good, *bad]))
    with pytest.raises(DataError, match=r"^6 files cannot be used: table.csv line 10 \(bad row: it has no label\);"):
        datasets.read_dataset(table)
    dataset = datasets.read_dataset(table, skip_bad=True)
    assert (len(dataset.train), len(dataset.val)) == (6, 2)
    assert [(p.path, p.kind, p.detail) for p in dataset.problems if p.fatal] == [
        ("table.csv line 10", "bad row", "it has no label"),
        ("table.csv line 11", "bad row", "it has no path"),
        ("table.csv line 12", "bad row", "it has 2 fields, the first line has 3"),
        ("table.csv line 13", "bad row", "its subset is 'dev', expected train or val"),
        ("table.csv line 14", "bad row", "it has no subset, other lines have one"),
        ("gone.png", "missing", "there is no such file"),
    ]


# ---------------------------------------------------------------------------------------------------------------
# What is refused outright


def folder_of(*names: str) -> Callable[[Path], Path]:
    def make(root: Path) -> Path:
        for seed, name in enumerate(names):
            put(root / name / "0.png" if not name.endswith(".png") else root / name, encoded(seed))
        return root

    return make


def table_of(text: str, encoding: str = "utf-8") -> Callable[[Path], Path]:
    return lambda root: csv_data(root, text, encoding=encoding)


REFUSED: dict[str, tuple[Callable[[Path], Path], str]] = {
    "missing": (lambda root: root / "nowhere", r"no data at .*nowhere: give a folder"),
    "empty folder": (lambda root: root, r"is empty: put the images of each class in a folder"),
    "hidden files only": (lambda root: put(root / ".DS_Store", b"x").parent, r"is empty: put the images"),
    "loose images": (folder_of("0.png", "1.png"), r"has no class folders \(2 loose images\): put"),
    "one class": (folder_of("cat"), r"has one class folder only, 'cat': classification needs at least two$"),
    "one level too high": (folder_of("all/cat", "all/dog"), r"one class folder only, 'all'.* Did you mean .*/all\?$"),
    "an archive": (lambda root: put(root / "data.zip", b"PK"), r"data.zip is a file: give a folder"),
    "val without train": (folder_of("val/a", "val/b"), r"has 'val' but no train/: add train/"),
    "val and valid": (
        folder_of("train/a", "train/b", "val/a", "valid/a"),
        r"more than one folder for val: 'val', 'valid'",
    ),
    "train without classes": (folder_of("train", "val"), r"train has no class folders \(1 loose images\)"),
    "val without classes": (folder_of("train/a", "train/b", "val"), r"val has no class folders \(1 loose images\)"),
    "class in val only": (
        folder_of("train/a", "train/b", "val/c"),
        r"val has class folders that train lacks: 'c'. Add",
    ),
    "names by case": (folder_of("cat", "Cat", "dog"), r"class names that differ by case only: 'Cat', 'cat': merge"),
    "name by unicode form": (folder_of("\u00e9", "e\u0301"), r"class names that differ by case only"),
    "name with line break": (folder_of("cat\ndog", "x"), r"control characters: 'cat\\ndog': rename"),
    "empty CSV": (table_of(""), r"has no column path and no column label \(its first line has: nothing\)"),
    "CSV without label": (table_of("path,class\na,b"), r"has no column label \(its first line has: path, class\)"),
    "CSV with semicolons": (table_of("path;label\na;b"), r"no column path and no column label .* separated by commas"),
    "CSV of a header": (table_of("path,label\n"), r"has no usable line: classification"),
    "CSV of one label": (table_of("path,label\nimages/0.png,a\nimages/1.png,a"), r"has one label only, 'a':"),
    "CSV of empty labels": (table_of("path,label\nx.png,\n"), r"no usable line \(table.csv line 2: it has no label\)"),
    "CSV in UTF-16": (table_of("path,label\nx,y", "utf-16"), r"is not UTF-8 text: save it as CSV UTF-8"),
    "CSV with an open quote": (table_of('path,label\n"x,y'), r"is not a valid CSV: "),
    "one image a class": (folder_of("a", "b"), r"^too few images: class 'a' has 1 usable image \(needs at least 2\); "),
    "a class without images": (
        lambda root: put(two_classes(root) / "docs" / "readme.txt", b"x").parents[1],
        r"^too few images: class 'docs' has 0 usable different images \(needs at least 2\)\. Add",
    ),
    "empty val": (
        lambda root: put(two_classes(root / "train").parent / "val" / "a" / "x.txt", b"x").parents[2],
        r"^too few images: val has no usable images",
    ),
    "nothing to train a class on": (
        table_of(
            "path,label,subset\n"
            + "\n".join(f"images/{n}.png,{'ab'[n % 2]},{'train' if n % 2 else 'val'}" for n in range(10))
        ),
        r"class 'a' has 5 usable different images, none of them to train on",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
@pytest.mark.parametrize("skip_bad", [False, True])
def test_what_is_not_a_data_set_is_refused_in_one_line(tmp_path: Path, name: str, skip_bad: bool) -> None:
    make, message = REFUSED[name]
    with pytest.raises(DataError, match=message) as caught:
        datasets.read_dataset(make(tmp_path), skip_bad=skip_bad)
    assert "\n" not in str(caught.value)


# ---------------------------------------------------------------------------------------------------------------
# The check of each file


def photo_bytes(suffix: str) -> bytes:
    noise = np.random.default_rng(0).integers(0, 256, (90, 120, 3), dtype=np.uint8)
    return cv2.imencode(suffix, noise)[1].tobytes()


def progressive() -> bytes:
    return cv2.imencode(".jpg", photo(1, 300, 400), [cv2.IMWRITE_JPEG_PROGRESSIVE, 1])[1].tobytes()


def with_thumbnail(data: bytes) -> bytes:
    """The JPEG with a whole small JPEG in its EXIF segment."""
    exif = b"Exif\0\0" + encoded(1, ".jpg")
    return data[:2] + b"\xff\xe1" + (len(exif) + 2).to_bytes(2, "big") + exif + data[2:]


WHOLE = {
    "x.jpg": photo_bytes(".jpg"),
    "progressive.jpg": progressive(),
    "thumbnail.jpg": with_thumbnail(photo_bytes(".jpg")),
    "fill bytes.jpg": photo_bytes(".jpg")[:2] + b"\xff" + photo_bytes(".jpg")[2:],
    "trailer.jpg": photo_bytes(".jpg") + b"MPF trailer",
    "x.png": photo_bytes(".png"),
    "trailer.png": photo_bytes(".png") + bytes(100),
    "x.webp": photo_bytes(".webp"),
    "x.bmp": photo_bytes(".bmp"),
    "x.tif": photo_bytes(".tif"),
    "x.ppm": photo_bytes(".ppm"),
    "x.jp2": photo_bytes(".jp2"),
}
KIND_WHEN_CUT = {".jpg": "truncated", ".png": "truncated", ".webp": "truncated"}


@pytest.mark.parametrize("name", WHOLE)
def test_whole_files_have_no_problem(tmp_path: Path, name: str) -> None:
    put(two_classes(tmp_path) / "a" / name, WHOLE[name])
    assert datasets.read_dataset(tmp_path).problems == ()


@pytest.mark.parametrize("name", [name for name in WHOLE if not name.startswith("trailer")])
def test_files_that_are_cut_off_are_found_wherever_the_cut_is(tmp_path: Path, name: str) -> None:
    two_classes(tmp_path)
    whole = WHOLE[name]
    cuts = [len(whole) * percent // 100 for percent in (25, 50, 75, 99)] + [len(whole) - 1]
    for cut in cuts:
        put(tmp_path / "a" / f"{cut}-{name}", whole[:cut])
    kind = KIND_WHEN_CUT.get(Path(name).suffix, "unreadable")
    assert found(datasets.read_dataset(tmp_path, skip_bad=True)) == {(f"a/{cut}-{name}", kind, True) for cut in cuts}


def test_a_photo_whose_second_half_was_never_written_is_truncated(tmp_path: Path) -> None:
    data = photo_bytes(".jpg")
    put(two_classes(tmp_path) / "a" / "x.jpg", data[: len(data) // 2] + bytes(len(data) // 2))
    assert found(datasets.check_dataset(tmp_path)) == {("a/x.jpg", "truncated", True)}


def test_bad_files_stop_the_reading_or_are_left_out_and_listed(tmp_path: Path) -> None:
    two_classes(tmp_path)
    put(tmp_path / "a" / "empty.png", b"")
    put(tmp_path / "a" / "page.jpg", b"<!doctype html><title>404</title>")
    put(tmp_path / "b" / "cut.jpg", photo_bytes(".jpg")[:900])
    (tmp_path / "b" / "link.png").symlink_to(tmp_path / "gone.png")
    os.mkfifo(tmp_path / "b" / "pipe.png")

    with pytest.raises(DataError) as caught:
        datasets.read_dataset(tmp_path)
    assert str(caught.value) == (
        "5 files cannot be used: a/empty.png (empty: the file has 0 bytes); "
        "b/link.png (missing: there is no such file); "
        "b/cut.jpg (truncated: the image goes on after the file's end at 900 bytes); and 2 more. "
        "Repair or remove them, or leave them out with --skip-bad"
    )
    dataset = datasets.read_dataset(tmp_path, skip_bad=True)
    assert dataset.problems == (
        Problem("a/empty.png", "empty", "the file has 0 bytes", True),
        Problem("b/link.png", "missing", "there is no such file", True),
        Problem("b/cut.jpg", "truncated", "the image goes on after the file's end at 900 bytes", True),
        Problem("a/page.jpg", "unreadable", "not an image that OpenCV can decode", True),
        Problem("b/pipe.png", "unreadable", "not a file", True),
    )
    assert {path for _, _, path in rows(dataset)} == {f"{name}/{n:03}.png" for name in "ab" for n in range(12)}


def test_bad_files_and_small_classes_are_told_together_and_only_files_can_be_skipped(tmp_path: Path) -> None:
    two_classes(tmp_path)
    put(tmp_path / "c" / "0.png", encoded(2000))
    put(tmp_path / "c" / "copy.png", encoded(2000))
    put(tmp_path / "c" / "1.png", b"")
    few = "too few images: class 'c' has 1 usable image (needs at least 2). Add images, or remove the class"
    with pytest.raises(DataError) as caught:
        datasets.read_dataset(tmp_path)
    assert str(caught.value) == (
        "1 file cannot be used: c/1.png (empty: the file has 0 bytes). "
        f"Repair or remove it, or leave it out with --skip-bad. {few}"
    )
    with pytest.raises(DataError) as caught:
        datasets.read_dataset(tmp_path, skip_bad=True)
    assert str(caught.value) == few


@pytest.mark.parametrize(("count", "kinds"), [(2, {"few images"}), (9, {"few images"}), (10, set())])
def test_small_classes_are_reported(tmp_path: Path, count: int, kinds: set[str]) -> None:
    two_classes(tmp_path)
    put_class(tmp_path / "c", count, 3000)
    assert {p.kind for p in datasets.read_dataset(tmp_path).problems} == kinds


GREY = cv2.cvtColor(photo(3), cv2.COLOR_BGR2GRAY)
RGB = Image.fromarray(photo(3))
ORIENTED = Image.Exif()
ORIENTED[0x0112] = 6
UPRIGHT = Image.Exif()
UPRIGHT[0x0112] = 1

ODD: dict[str, tuple[bytes, set[str]]] = {
    "grey.jpg": (pil_bytes(Image.fromarray(GREY), "JPEG"), {"grey"}),
    "grey.png": (pil_bytes(Image.fromarray(GREY), "PNG"), {"grey"}),
    "bits.png": (pil_bytes(Image.fromarray(GREY).convert("1"), "PNG"), {"grey"}),
    "grey alpha.png": (pil_bytes(Image.fromarray(GREY).convert("LA"), "PNG"), {"grey", "alpha"}),
    "grey16.png": (cv2.imencode(".png", GREY.astype(np.uint16) * 257)[1].tobytes(), {"grey", "16-bit"}),
    "colour16.png": (cv2.imencode(".png", photo(3).astype(np.uint16) * 257)[1].tobytes(), {"16-bit"}),
    "grey16.tif": (pil_bytes(Image.fromarray(GREY.astype(np.uint16) * 257), "TIFF"), {"grey", "16-bit"}),
    "palette.png": (pil_bytes(RGB.convert("P"), "PNG"), {"palette"}),
    "palette alpha.png": (pil_bytes(RGB.convert("P"), "PNG", transparency=3), {"palette", "alpha"}),
    "alpha.png": (pil_bytes(RGB.convert("RGBA"), "PNG"), {"alpha"}),
    "alpha.webp": (cv2.imencode(".webp", np.dstack([photo(3), GREY]))[1].tobytes(), {"alpha"}),
    "cmyk.jpg": (pil_bytes(RGB.convert("CMYK"), "JPEG"), {"CMYK"}),
    "turned.jpg": (pil_bytes(RGB, "JPEG", exif=ORIENTED), {"EXIF rotation"}),
    "turned.png": (pil_bytes(RGB, "PNG", exif=ORIENTED), {"EXIF rotation"}),
    "upright.jpg": (pil_bytes(RGB, "JPEG", exif=UPRIGHT), set()),
    "plain.jpg": (pil_bytes(RGB, "JPEG"), set()),
}


@pytest.mark.parametrize("name", ODD)
def test_odd_modes_are_reported_and_used(tmp_path: Path, name: str) -> None:
    data, kinds = ODD[name]
    put(two_classes(tmp_path) / "a" / name, data)
    dataset = datasets.read_dataset(tmp_path)
    assert found(dataset) == {(f"a/{name}", kind, False) for kind in kinds}
    assert len(dataset.train) + len(dataset.val) == 25


def test_a_damaged_exif_block_warns_nobody_and_stops_nothing(tmp_path: Path) -> None:
    data = pil_bytes(RGB, "JPEG", exif=ORIENTED)
    start = data.index(b"Exif\0\0")
    put(two_classes(tmp_path) / "a" / "x.jpg", data[: start + 14] + b"\xff" * 8 + data[start + 22 :])
    assert found(datasets.read_dataset(tmp_path)) <= {("a/x.jpg", "EXIF rotation", False)}


def test_problem_names_are_safe_to_print(tmp_path: Path) -> None:
    put(two_classes(tmp_path) / "a" / "line\nbreak.png", b"")
    Path(os.fsdecode(os.fsencode(tmp_path / "a") + b"/caf\xe9.png")).write_bytes(b"")
    assert found(datasets.check_dataset(tmp_path)) == {
        ("a/line\\nbreak.png", "empty", True),
        ("a/caf\\udce9.png", "empty", True),
    }


def test_the_same_image_in_train_and_val(tmp_path: Path) -> None:
    for subset, seed in (("train", 0), ("val", 50)):
        put_class(tmp_path / subset / "a", 10, seed)
        put_class(tmp_path / subset / "b", 10, seed + 100)
    put(tmp_path / "train" / "a" / "leak.png", encoded(50))
    with pytest.raises(DataError, match=r"train/a/leak.png \(in train and val: the same image is val/a/000.png; the t"):
        datasets.read_dataset(tmp_path)
    dataset = datasets.read_dataset(tmp_path, skip_bad=True)
    assert (len(dataset.train), len(dataset.val)) == (20, 20)
    assert found(dataset) == {("train/a/leak.png", "in train and val", True)}


def test_the_same_image_under_two_labels(tmp_path: Path) -> None:
    put(two_classes(tmp_path) / "b" / "twin.png", encoded(3))
    with pytest.raises(DataError, match=r"2 files cannot be used: a/003.png \(two labels: labelled 'a', and the same"):
        datasets.read_dataset(tmp_path)
    dataset = datasets.read_dataset(tmp_path, skip_bad=True)
    assert found(dataset) == {("a/003.png", "two labels", True), ("b/twin.png", "two labels", True)}
    assert len(dataset.train) + len(dataset.val) == 23


def test_one_file_listed_under_two_labels(tmp_path: Path) -> None:
    lines = [f"images/{n}.png,{'ab'[n % 2]}" for n in range(10)]
    table = csv_data(tmp_path, "\n".join(["path,label", *lines, "images/0.png,b"]))
    with pytest.raises(DataError, match=r"images/0.png \(two labels: listed under more than one label\); images/0.png"):
        datasets.read_dataset(table)


def test_problem_counts() -> None:
    kinds = ["grey", "empty", "grey", "alpha", "alpha", "grey"]
    counts = datasets.problem_counts([Problem("x", kind, "", False) for kind in kinds])
    assert list(counts.items()) == [("grey", 3), ("alpha", 2), ("empty", 1)]


def test_progress_is_told_once_a_file(tmp_path: Path) -> None:
    told: list[tuple[int, int]] = []
    datasets.read_dataset(two_classes(tmp_path), progress=lambda done, total: told.append((done, total)))
    assert told == [(done, 24) for done in range(1, 25)]


# ---------------------------------------------------------------------------------------------------------------
# The split


def below(contents: set[str], fraction: float, seed: int) -> set[str]:
    """The rule, written once more: the first 52 bits of sha256("SEED:CONTENT") as a fraction of 2**52."""
    return {c for c in contents if int(hashlib.sha256(f"{seed}:{c}".encode()).hexdigest()[:13], 16) < fraction * 2**52}


def val_of(dataset: Dataset, label: int) -> tuple[set[str], set[str]]:
    """(val, all) contents of a class."""
    val = {s.sha256 for s in dataset.val if s.label == label}
    return val, val | {s.sha256 for s in dataset.train if s.label == label}


@settings(max_examples=30, deadline=None)
@given(
    before=st.integers(2, 14),
    added=st.integers(0, 14),
    fraction=st.floats(0.05, 0.95),
    seed=st.integers(-3, 2**40),
)
def test_adding_files_moves_no_old_one(before: int, added: int, fraction: float, seed: int) -> None:
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder).resolve()
        put_class(root / "a", before, 0)
        put_class(root / "b", 2, 1000)
        old = datasets.read_dataset(root, val_fraction=fraction, split_seed=seed)
        put_class(root / "a" / "added", added, 500)
        new = datasets.read_dataset(root, val_fraction=fraction, split_seed=seed)
    old_val, old_all = val_of(old, 0)
    new_val, new_all = val_of(new, 0)
    assert (len(old_all), len(new_all)) == (before, before + added)
    for val, contents in ((old_val, old_all), (new_val, new_all)):
        chosen = below(contents, fraction, seed)
        assert 0 < len(val) < len(contents)
        assert len(val ^ chosen) <= (1 if chosen in (set(), contents) else 0)
    moved = old_val ^ (new_val & old_all)
    corner = below(old_all, fraction, seed) in (set(), old_all)
    assert len(moved) <= (1 if corner else 0)
    assert val_of(old, 1) == val_of(new, 1)


def test_the_split_depends_on_content_and_seed_not_on_names(tmp_path: Path) -> None:
    two_classes(tmp_path / "one", 40)
    for n in range(40):
        put(tmp_path / "two" / "a" / f"renamed {100 - n}.png", encoded(n))
        put(tmp_path / "two" / "b" / f"{n}.png", encoded(1000 + n))
    one, two, other = (
        datasets.read_dataset(tmp_path / "one"),
        datasets.read_dataset(tmp_path / "two"),
        datasets.read_dataset(tmp_path / "one", split_seed=1),
    )
    assert {s.sha256 for s in one.val} == {s.sha256 for s in two.val}
    assert {s.sha256 for s in one.val} != {s.sha256 for s in other.val}
    assert one.sha256 == two.sha256 != other.sha256


def test_copies_of_an_image_stay_together(tmp_path: Path) -> None:
    put_class(tmp_path / "a", 4, 0)
    put_class(tmp_path / "a" / "copies", 4, 0)
    put_class(tmp_path / "b", 4, 100)
    dataset = datasets.read_dataset(tmp_path)
    assert not {s.sha256 for s in dataset.train} & {s.sha256 for s in dataset.val}
    assert len(dataset.train) + len(dataset.val) == 12


def test_the_hash_covers_contents_classes_and_subsets_only(tmp_path: Path) -> None:
    sample = [Sample(tmp_path / str(n), n % 2, str(n) * 64) for n in range(4)]
    dataset = Dataset(tmp_path, ("a", "b"), tuple(sample[:3]), tuple(sample[3:]), ())
    moved = tuple(replace(s, path=tmp_path / "elsewhere") for s in dataset.train)
    same = [replace(dataset, root=Path("/")), replace(dataset, train=moved), replace(dataset, train=moved[::-1])]
    other = [
        replace(dataset, class_names=("a", "c")),
        replace(dataset, train=dataset.train[:2]),
        replace(dataset, train=dataset.val, val=dataset.train),
        replace(dataset, train=(replace(sample[0], label=1), *sample[1:3])),
        replace(dataset, train=(replace(sample[0], sha256="9" * 64), *sample[1:3])),
    ]
    assert {d.sha256 for d in same} == {dataset.sha256}
    assert len({dataset.sha256, *(d.sha256 for d in other)}) == 6


NAMES = st.text(st.characters(exclude_characters="\0/", exclude_categories=("Cs",)), min_size=1, max_size=12)
SAMPLES = st.lists(
    st.tuples(NAMES, st.integers(0, 1), st.text("0123456789abcdef", min_size=64, max_size=64)), max_size=5
)


@settings(max_examples=60, deadline=None)
@given(names=st.lists(NAMES, min_size=2, max_size=2, unique=True), train=SAMPLES, val=SAMPLES, root=NAMES)
def test_a_split_survives_the_round_trip(
    names: list[str], train: list[tuple[str, int, str]], val: list[tuple[str, int, str]], root: str
) -> None:
    subsets = [tuple(Sample(Path("/", name), label, digest) for name, label, digest in rows) for rows in (train, val)]
    dataset = Dataset(Path("/", root), tuple(names), *subsets, (Problem("x", "grey", "", False),))
    with tempfile.TemporaryDirectory() as folder:
        datasets.write_split(dataset, Path(folder, "split.csv"))
        assert datasets.read_split(Path(folder, "split.csv")) == replace(dataset, problems=())
        assert [p.name for p in Path(folder).iterdir()] == ["split.csv"]


def test_the_split_file_is_plain_csv_and_keeps_names_that_are_not_utf8(tmp_path: Path) -> None:
    broken = Path(os.fsdecode(b"/data/caf\xe9.png"))
    dataset = Dataset(
        Path("/data"), ("a", "b"), (Sample(Path("/data/x,1.png"), 0, "1f"),), (Sample(broken, 1, "2f"),), ()
    )
    datasets.write_split(dataset, tmp_path / "split.csv")
    assert (tmp_path / "split.csv").read_bytes().decode("latin-1").split("\r\n") == [
        "subset,label,class,sha256,path",
        f"root,,,{dataset.sha256},/data",
        "class,0,a,,",
        "class,1,b,,",
        'train,0,a,1f,"/data/x,1.png"',
        "val,1,b,2f,/data/caf\xe9.png",
        "",
    ]
    assert datasets.read_split(tmp_path / "split.csv") == dataset


def test_any_loss_in_the_split_file_is_noticed(tmp_path: Path) -> None:
    path = tmp_path / "split.csv"
    datasets.write_split(datasets.read_dataset(two_classes(tmp_path / "data", 3)), path)
    whole = path.read_text()
    lines = whole.splitlines(keepends=True)
    shorter = [whole[:cut] for cut in range(len(whole) - 1)]
    shorter += ["".join(lines[:n] + lines[n + 1 :]) for n in range(len(lines))]
    shorter += [whole.replace("train,", "val,", 1), whole.replace(",a,", ",b,"), whole.replace("train,0", "train,x", 1)]
    for text in shorter:
        path.write_text(text)
        with pytest.raises(ArtifactError, match=r"split.csv is damaged or was changed: fine-tune again$"):
            datasets.read_split(path)


def test_a_split_that_cannot_be_read_or_written(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match=r"no split at .*split.csv \(No such file or directory\): fine-tune again"):
        datasets.read_split(tmp_path / "split.csv")
    (tmp_path / "split.csv").write_bytes(b"\xff\xfe\0binary")
    with pytest.raises(ArtifactError, match="damaged"):
        datasets.read_split(tmp_path / "split.csv")
    dataset = Dataset(tmp_path, ("a", "b"), (), (), ())
    with pytest.raises(ArtifactError, match=r"cannot write .*split.csv: No such file or directory"):
        datasets.write_split(dataset, tmp_path / "nowhere" / "split.csv")
    (tmp_path / "folder").mkdir()
    with pytest.raises(ArtifactError, match=r"cannot write .*folder: Is a directory"):
        datasets.write_split(dataset, tmp_path / "folder")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["folder", "split.csv"]


def test_missing_names_the_files_that_are_gone(tmp_path: Path) -> None:
    dataset = datasets.read_dataset(two_classes(tmp_path))
    assert datasets.missing(dataset.train) == []
    dataset.train[3].path.unlink()
    assert datasets.missing(dataset.train) == [dataset.train[3].path]


# ---------------------------------------------------------------------------------------------------------------
# Boxes and masks


EDGES = st.tuples(*[st.floats(0, 1e6)] * 4)
BOXES = st.lists(st.builds(lambda class_id, edges: Box(class_id, *edges), st.integers(0, 1), EDGES), max_size=4)
DIGESTS = st.text("0123456789abcdef", min_size=64, max_size=64)
MASKS = st.builds(
    lambda name, digest, levels: Mask(Path("/", name), digest, tuple(levels)),
    NAMES,
    DIGESTS,
    st.lists(st.integers(0, 255), unique=True, max_size=5),
)
LABELS = {"detect": BOXES.map(tuple), "segment": MASKS}


@settings(max_examples=60, deadline=None)
@given(data=st.data(), task=st.sampled_from(["detect", "segment"]), names=st.lists(NAMES, min_size=2, unique=True))
def test_boxes_and_masks_survive_the_round_trip(data: st.DataObject, task: str, names: list[str]) -> None:
    rows = st.lists(st.tuples(NAMES, LABELS[task], DIGESTS), max_size=4)
    train, val, test = (tuple(Sample(Path("/", n), label, d) for n, label, d in data.draw(rows)) for _ in range(3))
    dataset = Dataset(Path("/data"), tuple(names), train, val, (), task, test)
    with tempfile.TemporaryDirectory() as folder:
        datasets.write_split(dataset, Path(folder, "split.csv"))
        assert datasets.read_split(Path(folder, "split.csv")) == dataset


def labelled(task: str) -> Dataset:
    root = Path("/data")
    labels: dict[str, list[Label]] = {
        "detect": [(Box(1, 0.5, 1.0, 2.25, 1 / 3 + 3), Box(0, 0.0, 0.0, 9.0, 9.0)), (), (Box(0, 1.0, 1.0, 2.0, 2.0),)],
        "segment": [Mask(root / f"{n}.png", f"m{n}", (0, 2)) for n in range(3)],
    }
    one, two, three = (Sample(root / f"{n}.jpg", label, f"{n}f") for n, label in enumerate(labels[task]))
    return Dataset(root, ("a", "b"), (one,), (two,), (), task, (three,))


def test_the_split_file_of_boxes_and_masks_is_plain_csv(tmp_path: Path) -> None:
    rows = {
        "detect": [
            "train,,,0f,/data/0.jpg",
            "box,1,b,,0.5 1.0 2.25 3.3333333333333335",
            "box,0,a,,0.0 0.0 9.0 9.0",
            "val,,,1f,/data/1.jpg",
            "test,,,2f,/data/2.jpg",
            "box,0,a,,1.0 1.0 2.0 2.0",
        ],
        "segment": [
            "train,,,0f,/data/0.jpg",
            "mask,0 2,,m0,/data/0.png",
            "val,,,1f,/data/1.jpg",
            "mask,0 2,,m1,/data/1.png",
            "test,,,2f,/data/2.jpg",
            "mask,0 2,,m2,/data/2.png",
        ],
    }
    for task, expected in rows.items():
        dataset = labelled(task)
        datasets.write_split(dataset, tmp_path / "split.csv")
        head = ["subset,label,class,sha256,path", f"root,{task},,{dataset.sha256},/data", "class,0,a,,", "class,1,b,,"]
        assert (tmp_path / "split.csv").read_text().splitlines() == [*head, *expected]
        assert datasets.read_split(tmp_path / "split.csv") == dataset


@pytest.mark.parametrize("task", ["detect", "segment"])
def test_any_loss_in_a_split_of_boxes_or_masks_is_noticed(tmp_path: Path, task: str) -> None:
    path = tmp_path / "split.csv"
    datasets.write_split(labelled(task), path)
    whole = path.read_text()
    lines = whole.splitlines(keepends=True)
    shorter = [whole[:cut] for cut in range(len(whole) - 1)]
    shorter += ["".join(lines[:n] + lines[n + 1 :]) for n in range(len(lines))]
    shorter += [
        whole.replace(old, new, 1) for old, new in ((task, ""), ("val,", "test,"), ("9.0 ", "9.1 "), ("0 2", "0 3"))
    ]
    for text in shorter:
        if text == whole:
            continue
        path.write_text(text)
        with pytest.raises(ArtifactError, match=r"split.csv is damaged or was changed: fine-tune again$"):
            datasets.read_split(path)


def test_the_hash_covers_boxes_masks_and_the_test_subset() -> None:
    dataset = labelled("detect")
    (one,) = dataset.train
    same = [
        replace(dataset, root=Path("/")),
        replace(dataset, train=(replace(one, path=Path("/x")),)),
        replace(dataset, train=(replace(one, label=one.label[::-1]),)),  # the order of boxes says nothing
    ]
    other = [
        replace(dataset, class_names=("a", "c")),
        replace(dataset, class_names=("b", "a")),
        replace(dataset, test=()),
        replace(dataset, test=(), val=(*dataset.val, *dataset.test)),
        replace(dataset, train=(replace(one, label=one.label[:1]),)),
        replace(dataset, train=(replace(one, label=(replace(one.label[0], left=0.25), one.label[1])),)),
        replace(dataset, train=(replace(one, label=(replace(one.label[0], class_id=0), one.label[1])),)),
    ]
    assert {d.sha256 for d in same} == {dataset.sha256}
    assert len({dataset.sha256, *(d.sha256 for d in other)}) == 1 + len(other)

    dataset = labelled("segment")
    (one,) = dataset.train
    moved = replace(dataset, train=(replace(one, label=replace(one.label, path=Path("/x"))),))
    other = [
        replace(dataset, train=(replace(one, label=replace(one.label, **change)),))
        for change in ({"sha256": "x"}, {"levels": (0, 3)}, {"levels": ()})
    ]
    assert moved.sha256 == dataset.sha256
    assert len({dataset.sha256, *(d.sha256 for d in other)}) == 4


def test_missing_names_masks_too(tmp_path: Path) -> None:
    samples = [Sample(put(tmp_path / f"{n}.jpg", b""), Mask(put(tmp_path / f"{n}.png", b""), ""), "") for n in range(3)]
    samples[1].label.path.unlink()
    samples[2].path.unlink()
    assert datasets.missing(samples) == [tmp_path / "1.png", tmp_path / "2.jpg"]


GUESSES: dict[str, tuple[tuple[str, ...], str]] = {
    "class folders": (("a/0.png", "b/0.png"), "classify"),
    "class folders named like others": (("images/0.png", "labels/0.png.bak", "masks.txt"), "classify"),
    "photos beside masks": (("a/0.jpg", "a/0.png"), "classify"),
    "nothing": ((), "classify"),
    "VOC": (("Annotations/0.xml", "JPEGImages/0.jpg"), "detect"),
    "COCO": (("annotations/instances_train.json", "train/0.jpg"), "detect"),
    "COCO beside": (("train/_annotations.coco.json", "train/0.jpg"), "detect"),
    "YOLO": (("data.yaml", "images/0.jpg"), "detect"),
    "YOLO without yaml": (("labels/train/0.txt", "images/train/0.jpg"), "detect"),
    "YOLO by subset": (("train/labels/0.txt", "train/images/0.jpg"), "detect"),
    "masks": (("images/0.jpg", "masks/0.png"), "segment"),
    "masks in labels": (("images/0.jpg", "labels/0.png"), "segment"),
    "masks by subset": (("images/train/0.jpg", "masks/train/0.png"), "segment"),
    "masks in subsets": (("train/images/0.jpg", "train/masks/0.png", "val/images/1.jpg"), "segment"),
}


@pytest.mark.parametrize("name", GUESSES)
def test_the_task_is_guessed_from_what_there_is(tmp_path: Path, name: str) -> None:
    paths, task = GUESSES[name]
    for path in paths:
        put(tmp_path / path, b'{"images": [], "annotations": []}')
    assert datasets.guess_task(tmp_path) == task


def test_the_task_is_guessed_from_a_file(tmp_path: Path) -> None:
    for name, task in (("x.csv", "classify"), ("x.json", "detect"), ("x.yaml", "detect"), ("gone.json", "classify")):
        assert datasets.guess_task(tmp_path / name if name == "gone.json" else put(tmp_path / name, b"x")) == task


# ---------------------------------------------------------------------------------------------------------------
# Real photos


@needs_signs
def test_hand_signs() -> None:
    dataset = datasets.read_dataset(SIGNS)
    assert dataset.class_names == tuple("0123456789")
    assert len(dataset.train) + len(dataset.val) == 2062
    assert len(dataset.val) == pytest.approx(0.2 * 2062, abs=40)
    assert datasets.problem_counts(dataset.problems) == {"EXIF rotation": 3}
    with pytest.raises(DataError, match=r"one class folder only, 'Dataset'.* Did you mean .*Dataset\?"):
        datasets.read_dataset(SIGNS.parent)
