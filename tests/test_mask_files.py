"""Photos and masks: which belong together, which value is which class, and what is refused."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import cv2
import numpy as np
import pytest
from conftest import DATA
from pictures import photo, put, sha
from PIL import Image

from edgekit import datasets
from edgekit.datasets import Dataset, Problem
from edgekit.errors import DataError
from edgekit.samples import VOID, Mask, Sample, read_mask

HEIGHT, WIDTH = 40, 56


def put_photo(path: Path, seed: int) -> Path:
    return put(path, cv2.imencode(path.suffix, photo(seed, HEIGHT, WIDTH))[1].tobytes())


def put_mask(path: Path, *values: int, mode: str = "L") -> Path:
    """The values as stripes from left to right; their lightness in "RGB"."""
    stripes = np.array(values, np.uint8)[np.arange(WIDTH) * len(values) // WIDTH]
    image = Image.fromarray(np.tile(stripes, (HEIGHT, 1)))
    if mode == "P":
        image.putpalette(np.random.default_rng(0).integers(0, 256, 768, np.uint8).tobytes())
    path.parent.mkdir(parents=True, exist_ok=True)
    (image if mode in ("L", "P") else image.convert(mode)).save(path)
    return path


def pairs(
    root: Path, count: int, first: int, *values: int, image: str = "images/{}.jpg", mask: str = "masks/{}.png"
) -> Path:
    for n in range(first, first + count):
        put_photo(root / image.format(n), n)
        put_mask(root / mask.format(n), *(values or (0, 1)))
    return root


def masks(dataset: Dataset) -> dict[str, str]:
    """Path of each image below the root → that of its mask."""
    return {
        sample.path.relative_to(dataset.root).as_posix(): sample.label.path.relative_to(dataset.root).as_posix()
        for sample in (*dataset.train, *dataset.val, *dataset.test)
    }


def sizes(dataset: Dataset) -> tuple[int, int, int]:
    return len(dataset.train), len(dataset.val), len(dataset.test)


def found(dataset: Dataset) -> list[tuple[str, str, bool]]:
    """Problems but for the figures of classes, sorted."""
    return sorted((p.path, p.kind, p.fatal) for p in dataset.problems if not p.path.startswith("class "))


# ---------------------------------------------------------------------------------------------------------------
# Layouts


LAYOUTS = [
    ("images/{}.jpg", "masks/{}.png"),
    ("images/inner/{}.png", "masks/inner/{}.png"),
    ("images/{}.jpeg", "masks/{}_mask.png"),
    ("images/{}.png", "labels/{}.png"),
    ("images/{}.webp", "masks/{}.bmp"),
    ("{}.jpg", "{}.png"),
    ("b/{}.bmp", "b/{}.png"),
    ("a/{}.png", "a/{}_mask.png"),
    ("{}.jpg", "{}_mask.png"),
]


@pytest.mark.parametrize(("image", "mask"), LAYOUTS)
def test_images_and_masks_of_the_same_name(tmp_path: Path, image: str, mask: str) -> None:
    pairs(tmp_path, 12, 0, 0, 1, image=image, mask=mask)
    dataset = datasets.read_dataset(tmp_path, "segment")
    assert masks(dataset) == {image.format(n): mask.format(n) for n in range(12)}
    assert (dataset.task, dataset.class_names) == ("segment", ("background", "foreground"))
    assert len(dataset.val) >= 1
    assert found(dataset) == []


@pytest.mark.parametrize(
    ("image", "mask"),
    [
        ("images/SUBSET/{}.jpg", "masks/SUBSET/{}.png"),
        ("SUBSET/images/{}.jpg", "SUBSET/masks/{}.png"),
        ("SUBSET/images/{}.png", "SUBSET/labels/{}_mask.png"),
        ("SUBSET/a/{}.jpg", "SUBSET/a/{}.png"),
    ],
)
@pytest.mark.parametrize("val", ["val", "valid", "Validation"])
def test_the_datas_own_subsets(tmp_path: Path, image: str, mask: str, val: str) -> None:
    for subset, first, count in (("train", 0, 3), (val, 10, 2), ("test", 20, 1)):
        pairs(tmp_path, count, first, image=image.replace("SUBSET", subset), mask=mask.replace("SUBSET", subset))
    dataset = datasets.read_dataset(tmp_path, "segment")
    assert sizes(dataset) == (3, 2, 1)
    assert found(dataset) == []
    put(tmp_path / image.split("SUBSET")[0] / "notes.txt", b"x")
    assert [kind for _, kind, _ in found(datasets.read_dataset(tmp_path, "segment"))] == ["not used"]


def test_without_val_training_images_are_split_and_test_stays(tmp_path: Path) -> None:
    for subset, first, count in (("train", 0, 12), ("test", 20, 3)):
        pairs(tmp_path / subset, count, first)
    dataset = datasets.read_dataset(tmp_path, "segment")
    assert {sample.path.stem for sample in dataset.test} == {"20", "21", "22"}
    assert len(dataset.train) + len(dataset.val) == 12
    assert dataset.val


def test_a_sample_is_the_photo_and_its_mask(tmp_path: Path) -> None:
    pairs(tmp_path / "train", 1, 0, 0, 2, 1, 255)
    pairs(tmp_path / "val", 1, 5, 0, 2)
    (photo_0, mask_0), (photo_5, mask_5) = (
        (tmp_path / s / "images" / f"{n}.jpg", tmp_path / s / "masks" / f"{n}.png")
        for s, n in (("train", 0), ("val", 5))
    )
    levels = (0, 1, 2)
    assert datasets.read_dataset(tmp_path, "segment") == Dataset(
        root=tmp_path,
        class_names=("class_0", "class_1", "class_2"),
        train=(Sample(photo_0, Mask(mask_0, sha(mask_0), levels), sha(photo_0)),),
        val=(Sample(photo_5, Mask(mask_5, sha(mask_5), levels), sha(photo_5)),),
        problems=(
            Problem("class 'class_0'", "few images", "2 different images", False),
            Problem("class 'class_1'", "few images", "1 image", False),
            Problem("class 'class_2'", "few images", "2 different images", False),
            Problem("class 'class_1'", "no validation images", "its accuracy will not be known", False),
        ),
        task="segment",
    )


def test_side_by_side_a_mask_is_no_image(tmp_path: Path) -> None:
    pairs(tmp_path, 6, 0, image="{}.jpg", mask="{}.png")
    put_mask(tmp_path / "alone.png", 0, 1)
    put_photo(tmp_path / "bare.jpg", 90)
    put(tmp_path / "README.md", b"#")
    dataset = datasets.read_dataset(tmp_path, "segment", skip_bad=True)
    assert masks(dataset) == {f"{n}.jpg": f"{n}.png" for n in range(6)}
    assert found(dataset) == [
        ("README.md", "not an image", False),
        ("alone.png", "no image", False),
        ("bare.jpg", "no mask", True),
    ]


def test_with_an_ending_a_png_is_an_image(tmp_path: Path) -> None:
    pairs(tmp_path, 6, 0, image="{}.png", mask="{}_mask.png")
    put_photo(tmp_path / "bare.png", 90)
    put_mask(tmp_path / "gone_mask.png", 0, 1)
    dataset = datasets.read_dataset(tmp_path, "segment", skip_bad=True)
    assert masks(dataset) == {f"{n}.png": f"{n}_mask.png" for n in range(6)}
    assert found(dataset) == [("bare.png", "no mask", True), ("gone_mask.png", "no image", False)]


def test_in_two_folders_what_has_no_twin_is_told(tmp_path: Path) -> None:
    pairs(tmp_path, 6, 0)
    put_photo(tmp_path / "images" / "bare.jpg", 90)
    put_mask(tmp_path / "masks" / "gone.png", 0, 1)
    put(tmp_path / "images" / "Thumbs.db", b"x")
    put(tmp_path / "masks" / "notes.txt", b"x")
    dataset = datasets.read_dataset(tmp_path, "segment", skip_bad=True)
    assert found(dataset) == [
        ("images/bare.jpg", "no mask", True),
        ("masks/gone.png", "no image", False),
        ("masks/notes.txt", "not an image", False),
    ]
    with pytest.raises(
        DataError, match=r"^1 file cannot be used: images/bare.jpg \(no mask: there is no mask of its nam"
    ):
        datasets.read_dataset(tmp_path, "segment")


def test_each_folder_is_split_on_its_own(tmp_path: Path) -> None:
    pairs(tmp_path, 2, 0, image="a/{}.jpg", mask="a/{}.png")
    pairs(tmp_path, 2, 100, image="b/{}.jpg", mask="b/{}.png")
    pairs(tmp_path, 30, 200, image="c/{}.jpg", mask="c/{}.png")
    pairs(tmp_path, 1, 300, image="d/{}.jpg", mask="d/{}.png")
    for seed in range(4):
        dataset = datasets.read_dataset(tmp_path, "segment", split_seed=seed)
        val = [sample.path.parent.name for sample in dataset.val]
        assert (val.count("a"), val.count("b"), val.count("d")) == (1, 1, 0)
        assert 1 <= val.count("c") < 20
        assert len(dataset.train) + len(dataset.val) == 35


def test_copies_in_several_folders_stay_together(tmp_path: Path) -> None:
    for folder in "abc":
        pairs(tmp_path, 6, 0, image=folder + "/{}.jpg", mask=folder + "/{}.png")
    for seed in range(4):
        dataset = datasets.read_dataset(tmp_path, "segment", split_seed=seed)
        assert not {s.sha256 for s in dataset.train} & {s.sha256 for s in dataset.val}
        assert len(dataset.train) + len(dataset.val) == 18


# ---------------------------------------------------------------------------------------------------------------
# Values and classes


def classes_of(root: Path) -> tuple[tuple[str, ...], tuple[int, ...], list[int]]:
    """(class names, levels, the classes that the first training image's mask has)."""
    dataset = datasets.read_dataset(root, "segment")
    labels = [sample.label for sample in (*dataset.train, *dataset.val)]
    (levels,) = {label.levels for label in labels}
    return dataset.class_names, levels, sorted({int(v) for label in labels for v in np.unique(read_mask(label))})


TWO = ("background", "foreground")


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ((0, 1), (TWO, (0, 1), [0, 1])),
        ((0, 255), (TWO, (0, 255), [0, 1])),
        ((0, 1, 255), (TWO, (0, 1), [0, 1, VOID])),
        ((0, 1, 2), (("class_0", "class_1", "class_2"), (0, 1, 2), [0, 1, 2])),
        ((1, 2, 255), (("class_0", "class_1", "class_2"), (0, 1, 2), [1, 2, VOID])),
        ((0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 3, 90, 250, 255, 255, *[0] * 36), (TWO, (), [0, 1])),
    ],
)
@pytest.mark.parametrize("mode", ["L", "P"])
def test_values_tell_the_classes(tmp_path: Path, values: tuple[int, ...], expected: object, mode: str) -> None:
    for n in range(4):
        put_photo(tmp_path / "images" / f"{n}.jpg", n)
        put_mask(tmp_path / "masks" / f"{n}.png", *values, mode=mode)
    assert classes_of(tmp_path) == expected


@pytest.mark.parametrize("mode", ["1", "LA", "RGB", "RGBA"])
def test_grey_masks_may_be_stored_otherwise(tmp_path: Path, mode: str) -> None:
    for n in range(4):
        put_photo(tmp_path / "images" / f"{n}.jpg", n)
        put_mask(tmp_path / "masks" / f"{n}.png", 0, 255, mode=mode)
    assert classes_of(tmp_path) == (TWO, (0, 255), [0, 1])


@pytest.mark.parametrize(
    "values", [(0,), (255,), (0, 128, 255), (0, 9), (0, 38, 75), (0, 200), tuple(range(0, 256, 5))]
)
def test_values_that_tell_nothing_need_a_table(tmp_path: Path, values: tuple[int, ...]) -> None:
    with pytest.raises(DataError, match=r"masks with the values .* which do not tell the classes: write classes.csv"):
        datasets.read_dataset(pairs(tmp_path, 3, 0, *values), "segment")
    put(tmp_path / "classes.csv", ("value,name\n" + "".join(f"{v},n{v}\n" for v in {*values, 7})).encode())
    assert set(datasets.read_dataset(tmp_path, "segment").class_names) == {f"n{v}" for v in {*values, 7}}


@pytest.mark.parametrize(
    ("name", "text", "expected"),
    [
        ("classes.csv", "\ufeffValue, Name\r\n38,road\r\n0,sky\r\n", (("road", "sky"), (38, 0), [0, 1, VOID])),
        ("classes.csv", "value,name\n0,sky\n38,road\n255,car\n", (("sky", "road", "car"), (0, 38, 255), [0, 1, 2])),
        ("classes.csv", "value,name\n0,Void\n38,road\n40,car\n", (("road", "car"), (38, 40), [0, VOID])),
        ("classes.txt", "\n".join(f"c{n}" for n in range(40)) + "\n\n", (None, tuple(range(40)), [0, 38, VOID])),
    ],
)
def test_a_table_of_classes(tmp_path: Path, name: str, text: str, expected: tuple[object, ...]) -> None:
    put(pairs(tmp_path, 4, 0, 0, 38, 255) / name, text.encode())
    names, levels, used = classes_of(tmp_path)
    assert (names if expected[0] else None, levels, used) == expected


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("classes.csv", "", r"must begin with the line value,name"),
        ("classes.csv", "name,value\na,0", r"must begin with the line value,name"),
        ("classes.csv", "value,name\n0,a\n256,b", r"has the line 256,b: expected a value of 0 to 255 and a name"),
        ("classes.csv", "value,name\n0,a\n1,", r"has the line 1,: expected"),
        ("classes.csv", "value,name\n0,a\n0,b", r"has the value 0 twice"),
        ("classes.csv", "value,name\n0,a\n1,void", r"names 1 classes: expected 2 to 254"),
        ("classes.csv", 'value,name\n0,"a', r"cannot be read: "),
        ("classes.txt", "a\n\nb", r"has the line 1,: expected"),
        ("classes.txt", "a", r"names 1 classes: expected 2 to 254"),
        ("classes.txt", "\n".join(map(str, range(255))), r"names 255 classes: expected 2 to 254"),
        ("classes.txt", "cat\nCat", r"class names that differ by case only: 'cat', 'Cat'"),
    ],
)
def test_a_bad_table_is_refused(tmp_path: Path, name: str, text: str, message: str) -> None:
    put(pairs(tmp_path, 4, 0) / name, text.encode())
    with pytest.raises(DataError, match=message) as caught:
        datasets.read_dataset(tmp_path, "segment")
    assert "\n" not in str(caught.value)


def test_bad_masks_are_named_and_left_out(tmp_path: Path) -> None:
    pairs(tmp_path, 12, 0, 0, 1)
    put(tmp_path / "classes.txt", b"a\nb\nc")
    names = ("colours", "deep", "cut", "page", "size", "unknown", "void")
    for n, name in enumerate(names, start=100):
        put_photo(tmp_path / "images" / f"{name}.jpg", n)
    folder = tmp_path / "masks"
    Image.fromarray(photo(1, HEIGHT, WIDTH)).save(folder / "colours.png")
    Image.fromarray(np.zeros((HEIGHT, WIDTH), np.uint16)).save(folder / "deep.png")
    put(folder / "cut.png", put_mask(folder / "cut.png", *range(3), mode="P").read_bytes()[:-90])
    put(folder / "page.png", b"<html>")
    Image.fromarray(np.zeros((WIDTH, HEIGHT), np.uint8)).save(folder / "size.png")
    put_mask(folder / "unknown.png", 0, 3, 77, 255)
    put_mask(folder / "void.png", 255)

    dataset = datasets.read_dataset(tmp_path, "segment", skip_bad=True)

    assert found(dataset) == sorted(
        [
            *((f"images/{name}.jpg", "unreadable mask", True) for name in ("colours", "deep", "cut", "page")),
            ("images/size.jpg", "mask size differs", True),
            ("images/unknown.jpg", "unknown class", True),
            ("images/void.jpg", "all void", False),
        ]
    )
    details = {problem.path: problem.detail for problem in dataset.problems}
    assert details["images/colours.jpg"] == (
        "colours.png: it has colours: save it as an 8-bit grey or palette image of the classes' numbers"
    )
    assert details["images/size.jpg"] == "size.png has 40 x 56 pixels, the upright image 56 x 40"
    assert details["images/unknown.jpg"] == "unknown.png has the values 3, 77, which no class has"
    assert details["class 'c'"] == "in no image: it cannot be learnt"
    assert sum(sizes(dataset)) == 13


def test_a_mask_has_the_size_of_the_upright_photo(tmp_path: Path) -> None:
    pairs(tmp_path, 6, 0)
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(photo(99, WIDTH, HEIGHT)).save(tmp_path / "images" / "turned.jpg", exif=exif)
    put_mask(tmp_path / "masks" / "turned.png", 0, 1)
    assert found(datasets.read_dataset(tmp_path, "segment")) == [("images/turned.jpg", "EXIF rotation", False)]


def test_the_same_image_with_another_mask(tmp_path: Path) -> None:
    pairs(tmp_path, 6, 0)
    for name, values in (("copy", (0, 1)), ("other", (1, 0))):
        put_photo(tmp_path / "images" / f"{name}.jpg", 3 if name == "copy" else 4)
        put_mask(tmp_path / "masks" / f"{name}.png", *values)
    dataset = datasets.read_dataset(tmp_path, "segment", skip_bad=True)
    assert found(dataset) == [("images/4.jpg", "two labels", True), ("images/other.jpg", "two labels", True)]
    assert "the same image is images/4.jpg, with another mask" in [problem.detail for problem in dataset.problems]


REFUSED: dict[str, tuple[Callable[[Path], Path], str]] = {
    "nothing": (lambda root: root / "nowhere", r"no data at .*nowhere: give a folder with images/ and masks/"),
    "a file": (lambda root: put(root / "x.csv", b"path,label"), r"x.csv is a file: give a folder with images/"),
    "photos only": (lambda root: put_photo(root / "images" / "0.jpg", 0).parents[1], r"has no image with a mask: give"),
    "val only": (lambda root: pairs(root / "val", 2, 0).parent, r"has 'val' but no train/: add train/"),
    "two vals": (
        lambda root: pairs(pairs(pairs(root / "train", 2, 0).parent / "val", 2, 5).parent / "valid", 2, 9).parent,
        r"more than one folder for a subset: 'val', 'valid'. Keep one",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_not_segmentation_data_is_refused_in_one_line(tmp_path: Path, name: str) -> None:
    make, message = REFUSED[name]
    with pytest.raises(DataError, match=message) as caught:
        datasets.read_dataset(make(tmp_path), "segment")
    assert "\n" not in str(caught.value)


def test_magnetic_tiles() -> None:
    root = DATA / "magnetic-tiles"
    if not root.is_dir():
        pytest.skip("the magnetic tiles (../shared/data/magnetic-tiles) are not on this machine")
    dataset = datasets.read_dataset(root, "segment")
    assert (dataset.class_names, {s.label.levels for s in (*dataset.train, *dataset.val)}) == (TWO, {()})
    assert len(dataset.train) + len(dataset.val) == 1344
    assert len(dataset.val) == pytest.approx(0.2 * 1344, abs=45)
    folders = {"Blowhole", "Break", "Crack", "Fray", "Free", "Uneven"}
    assert {s.path.parent.name for s in dataset.val} == {s.path.parent.name for s in dataset.train} == folders
    assert datasets.problem_counts(dataset.problems) == {"grey": 1344}
