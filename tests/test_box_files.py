"""Boxes as three formats have them: what is read, what is left out, what is refused."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import cv2
import pytest
from conftest import DATA
from hypothesis import given, settings
from hypothesis import strategies as st
from pictures import photo, put, sha
from PIL import Image

from edgekit import datasets
from edgekit.box_files import fit_boxes
from edgekit.datasets import Dataset, Problem
from edgekit.errors import DataError
from edgekit.listings import DrawnBox, DrawnBoxes
from edgekit.samples import Box, Sample

HEIGHT, WIDTH = 40, 56


def put_photo(path: Path, seed: int) -> Path:
    return put(path, cv2.imencode(path.suffix, photo(seed, HEIGHT, WIDTH))[1].tobytes())


def boxes(dataset: Dataset) -> dict[str, tuple[tuple[str, float, float, float, float], ...]]:
    """Path below the root → its boxes, with the names of their classes."""
    return {
        s.path.relative_to(dataset.root).as_posix(): tuple(
            (dataset.class_names[b.class_id], b.left, b.top, b.right, b.bottom) for b in s.label
        )
        for s in (*dataset.train, *dataset.val, *dataset.test)
    }


def subsets(dataset: Dataset) -> dict[str, list[str]]:
    return {
        subset: [sample.path.stem for sample in samples]
        for subset, samples in (("train", dataset.train), ("val", dataset.val), ("test", dataset.test))
    }


def found(dataset: Dataset) -> list[tuple[str, str, bool]]:
    """Problems but for the figures of classes, sorted."""
    return sorted((p.path, p.kind, p.fatal) for p in dataset.problems if not p.path.startswith("class "))


def details(dataset: Dataset, kind: str) -> list[str]:
    return [problem.detail for problem in dataset.problems if problem.kind == kind]


# ---------------------------------------------------------------------------------------------------------------
# Fitting boxes to the image


def fitted(*edges: float, size: tuple[int, int] = (100, 200), **options: Any) -> tuple[Any, list[str]]:
    drawn = DrawnBoxes((DrawnBox("box 1", "b", *edges),), **options)
    made, problems = fit_boxes(drawn, size, ("a", "b"), "x.jpg")
    return made, [problem.kind for problem in problems if problem.kind != "no boxes"]


@pytest.mark.parametrize(
    ("edges", "expected", "kinds"),
    [
        ((0, 0, 200, 100), (0, 0, 200, 100), []),
        ((-0.4, 10, 30, 100.5), (0, 10, 30, 100), []),
        ((-0.6, 10, 30, 20), (0, 10, 30, 20), ["clipped box"]),
        ((10, 10, 202, 20), (10, 10, 200, 20), ["clipped box"]),
        ((10, 10, 202.1, 20), None, ["box outside the image"]),
        ((10, -2.1, 20, 20), None, ["box outside the image"]),
        ((-2, 10, 0, 20), None, ["box outside the image"]),
        ((200, 10, 201, 20), None, ["box outside the image"]),
        ((300, 300, 310, 310), None, ["box outside the image"]),
        ((10, 10, 10, 20), None, ["empty box"]),
        ((10, 20, 30, 10), None, ["empty box"]),
        ((500, 20, 400, 10), None, ["empty box"]),
    ],
)
def test_a_box_is_cut_left_out_or_refused(
    edges: tuple[float, ...], expected: tuple[float, ...] | None, kinds: list[str]
) -> None:
    made, problems = fitted(*edges)
    assert made == (() if expected is None else (Box(1, *expected),))
    assert problems == kinds


def test_shares_are_of_the_images_own_sides_and_rounding_is_no_problem() -> None:
    assert fitted(0.25, 0.5, 1.0000004, 1.0, in_shares=True) == ((Box(1, 50, 50, 200, 100),), [])


def test_a_size_that_differs_is_told_and_no_boxes_too() -> None:
    made, problems = fit_boxes(DrawnBoxes((), (200, 100)), (100, 200), ("a",), "x.jpg")
    assert made == ()
    assert problems == (
        Problem("x.jpg", "size differs", "the annotation is of 100 x 200 pixels, the image has 200 x 100", False),
        Problem("x.jpg", "no boxes", "kept, as an image with nothing to find", False),
    )


@settings(max_examples=200, deadline=None)
@given(edges=st.tuples(*[st.floats(-50, 250)] * 4))
def test_a_fitted_box_has_area_and_lies_in_the_image(edges: tuple[float, float, float, float]) -> None:
    made, problems = fitted(*edges)
    assert len(made) + sum(kind in ("empty box", "box outside the image") for kind in problems) == 1
    for box in made:
        assert 0 <= box.left < box.right <= 200
        assert 0 <= box.top < box.bottom <= 100


# ---------------------------------------------------------------------------------------------------------------
# Pascal VOC


def voc_object(name: str, *edges: float | str) -> str:
    inner = "".join(f"<{k}>{v}</{k}>" for k, v in zip(("xmin", "ymin", "xmax", "ymax"), edges, strict=True))
    return f"<object><name>{name}</name><bndbox>{inner}</bndbox></object>"


def voc_xml(*objects: str, size: tuple[int, int] = (WIDTH, HEIGHT)) -> bytes:
    head = f"<size><width>{size[0]}</width><height>{size[1]}</height><depth>3</depth></size>"
    return f"<annotation><filename>wrong.png</filename>{head}{''.join(objects)}</annotation>".encode()


def voc(root: Path, count: int = 6, **lists: str) -> Path:
    """NAME is 0, 1, ...: each with a dog of 10 x 20 pixels, 0 with a cat as well."""
    for n in range(count):
        put_photo(root / "JPEGImages" / f"{n}.png", n)
        extra = [voc_object("cat", 0, 1, 56, 40)] if n == 0 else []
        put(root / "Annotations" / f"{n}.xml", voc_xml(voc_object("dog", 11, 6, 20, 25), *extra))
    for name, text in lists.items():
        put(root / "ImageSets" / "Main" / f"{name}.txt", text.encode())
    return root


def test_voc_counts_pixels_from_one_to_the_last(tmp_path: Path) -> None:
    dataset = datasets.read_dataset(voc(tmp_path, train="0\n1\n2", val="3 \n4\n", test="5"), "detect")
    dog = Box(1, 10, 5, 20, 25)
    paths = [tmp_path / "JPEGImages" / f"{n}.png" for n in range(6)]
    every = [Sample(path, (dog,), sha(path)) for path in paths]
    every[0] = Sample(paths[0], (dog, Box(0, 0, 0, 56, 40)), sha(paths[0]))
    assert dataset == Dataset(
        root=tmp_path,
        class_names=("cat", "dog"),
        train=tuple(every[:3]),
        val=tuple(every[3:5]),
        test=(every[5],),
        task="detect",
        problems=(
            Problem("class 'cat'", "few images", "1 image", False),
            Problem("class 'dog'", "few images", "5 different images", False),
            Problem("class 'cat'", "no validation images", "its accuracy will not be known", False),
        ),
    )


@pytest.mark.parametrize(
    ("lists", "expected"),
    [
        ({"trainval": "0\n1\n2\n3", "val": "2\n3"}, {"train": ["0", "1"], "val": ["2", "3"], "test": []}),
        ({"train": "0", "trainval": "0\n1\n2\n3", "val": "1"}, {"train": ["0"], "val": ["1"], "test": []}),
    ],
)
def test_voc_trainval_counts_where_there_is_no_train(
    tmp_path: Path, lists: dict[str, str], expected: dict[str, list[str]]
) -> None:
    dataset = datasets.read_dataset(voc(tmp_path, **lists), "detect")
    assert subsets(dataset) == expected
    used = {stem for stems in expected.values() for stem in stems}
    assert found(dataset) == [(f"JPEGImages/{n}.png", "not used", False) for n in range(6) if str(n) not in used]


@pytest.mark.parametrize("lists", [{}, {"trainval": "0\n1\n2\n3\n4", "test": "5"}, {"train": "0\n1\n2\n3"}])
def test_voc_without_val_is_split_and_test_stays(tmp_path: Path, lists: dict[str, str]) -> None:
    dataset = datasets.read_dataset(voc(tmp_path, **lists), "detect")
    assert dataset.val
    assert subsets(dataset)["test"] == (["5"] if "test" in lists else [])
    all_of = datasets.read_dataset(voc(tmp_path / "all"), "detect")
    below = {s.sha256 for s in all_of.val}
    assert {s.sha256 for s in dataset.val} <= below or len(dataset.val) == 1


def test_voc_lists_may_lie_one_level_higher(tmp_path: Path) -> None:
    voc(tmp_path)
    put(tmp_path / "ImageSets" / "train.txt", b"0\n1")
    put(tmp_path / "ImageSets" / "val.txt", b"2")
    assert subsets(datasets.read_dataset(tmp_path, "detect")) == {"train": ["0", "1"], "val": ["2"], "test": []}


def test_voc_problems_are_named_and_left_out(tmp_path: Path) -> None:
    voc(tmp_path)
    bad = {
        "entities": b'<!DOCTYPE x [<!ENTITY a "aaaa">]><annotation>&a;</annotation>',
        "open": b"<annotation>",
        "words": voc_xml(voc_object("dog", 1, 1, "x", 5)),
        "nan": voc_xml(voc_object("dog", 1, 1, "nan", 5)),
        "nameless": voc_xml(voc_object(" ", 1, 1, 5, 5)),
        "outside": voc_xml(voc_object("dog", 1, 1, 60, 5)),
        "empty": voc_xml(),
        "flat": voc_xml(voc_object("dog", 9, 1, 8, 5)),
        "from zero": voc_xml(voc_object("dog", 0, 0, 55, 39)),
        "other size": voc_xml(voc_object("dog", 1, 1, 5, 5), size=(100, 100)),
        "without size": voc_xml(voc_object("dog", 1, 1, 5, 5), size=(0, 0)),
    }
    for n, (name, data) in enumerate(bad.items(), start=100):
        put_photo(tmp_path / "JPEGImages" / f"{name}.png", n)
        put(tmp_path / "Annotations" / f"{name}.xml", data)
    put_photo(tmp_path / "JPEGImages" / "unlabelled.png", 200)
    put(tmp_path / "Annotations" / "gone.xml", voc_xml())
    put(tmp_path / "JPEGImages" / "notes.txt", b"x")

    dataset = datasets.read_dataset(tmp_path, "detect", skip_bad=True)

    assert found(dataset) == sorted(
        [
            ("Annotations/entities.xml", "bad annotation", True),
            ("Annotations/open.xml", "bad annotation", True),
            ("Annotations/words.xml", "bad annotation", True),
            ("Annotations/nan.xml", "bad annotation", True),
            ("Annotations/nameless.xml", "bad annotation", True),
            ("JPEGImages/outside.png", "box outside the image", True),
            ("gone", "missing", True),
            ("JPEGImages/empty.png", "no boxes", False),
            ("JPEGImages/flat.png", "empty box", False),
            ("JPEGImages/flat.png", "no boxes", False),
            ("JPEGImages/other size.png", "size differs", False),
            ("JPEGImages/unlabelled.png", "no annotation", False),
            ("JPEGImages/notes.txt", "not an image", False),
        ]
    )
    made = boxes(dataset)
    assert set(made) == {f"JPEGImages/{n}.png" for n in range(6)} | {
        f"JPEGImages/{name}.png" for name in ("empty", "flat", "from zero", "other size", "without size")
    }
    assert made["JPEGImages/from zero.png"] == (("dog", 0, 0, 55, 39),)
    assert "object 1 has no number as its xmax" in details(dataset, "bad annotation")
    assert "it has a DOCTYPE, which annotations do not need" in details(dataset, "bad annotation")
    with pytest.raises(
        DataError, match=r"^7 files cannot be used: Annotations/entities.xml \(bad annotation: it has a"
    ):
        datasets.read_dataset(tmp_path, "detect")


def test_an_xml_that_grows_when_it_is_read_is_refused_at_once(tmp_path: Path) -> None:
    entities = "".join(f'<!ENTITY a{n} "{f"&a{n - 1};" * 10}">' for n in range(1, 12))
    inner = "<annotation><object><name>&a11;</name></object></annotation>"
    bomb = f'<!DOCTYPE x [<!ENTITY a0 "{"a" * 100}">{entities}]>{inner}'
    for n, encoding in enumerate(("utf-8", "utf-16")):
        put_photo(voc(tmp_path) / "JPEGImages" / f"bomb{n}.png", 300 + n)
        put(tmp_path / "Annotations" / f"bomb{n}.xml", bomb.encode(encoding))
    assert (
        details(datasets.check_dataset(tmp_path, "detect"), "bad annotation")
        == ["it has a DOCTYPE, which annotations do not need"] * 2
    )


# ---------------------------------------------------------------------------------------------------------------
# COCO


CATEGORIES = [{"id": 7, "name": "dog"}, {"id": 3, "name": "cat"}]


def coco(path: Path, names: list[str], annotations: list[dict[str, Any]], **changes: Any) -> Path:
    """images: ids 1, 2, ... of the given file names."""
    images = [{"id": n, "file_name": name, "width": WIDTH, "height": HEIGHT} for n, name in enumerate(names, start=1)]
    document = {"images": images, "annotations": annotations, "categories": CATEGORIES} | changes
    return put(path, json.dumps(document).encode())


def annotation(image: Any, category: Any = 7, bbox: Any = (10, 5, 10, 20), **more: Any) -> dict[str, Any]:
    return {"id": 1, "image_id": image, "category_id": category, "bbox": bbox, "iscrowd": 0} | more


def coco_photos(folder: Path, count: int, first: int) -> list[str]:
    return [put_photo(folder / f"{first + n}.png", first + n).name for n in range(count)]


def test_coco_with_a_file_a_subset(tmp_path: Path) -> None:
    for subset, first in (("train", 0), ("val", 10), ("test", 20)):
        names = coco_photos(tmp_path / f"{subset}2017", 3, first)
        rows = [annotation(1), annotation(1, 3, [0.5, 0, 55.5, 40]), annotation(3)]
        coco(tmp_path / "annotations" / f"instances_{subset}2017.json", names, rows)
    coco(tmp_path / "annotations" / "captions_train2017.json", ["0.png"], [])

    dataset = datasets.read_dataset(tmp_path, "detect")

    assert dataset.class_names == ("cat", "dog")
    assert boxes(dataset) == {
        f"{subset}2017/{first + n}.png": made
        for subset, first in (("train", 0), ("val", 10), ("test", 20))
        for n, made in enumerate(
            ((("dog", 10, 5, 20, 25), ("cat", 0.5, 0, 56, 40)), (), (("dog", 10, 5, 20, 25),)),
        )
    }
    assert [len(dataset.train), len(dataset.val), len(dataset.test)] == [3, 3, 3]
    assert found(dataset) == [
        (f"{s}2017/{n}.png", "no boxes", False) for s, n in (("test", 21), ("train", 1), ("val", 11))
    ]


def test_coco_as_roboflow_exports_it(tmp_path: Path) -> None:
    categories = [
        {"id": 0, "name": "animals", "supercategory": "none"},
        {"id": 1, "name": "dog", "supercategory": "animals"},
        {"id": 2, "name": "cat", "supercategory": "animals"},
    ]
    for subset, first in (("train", 0), ("valid", 10), ("test", 20)):
        names = coco_photos(tmp_path / subset, 2, first)
        rows = [annotation(1, 1), annotation(2, 2)]
        coco(tmp_path / subset / "_annotations.coco.json", names, rows, categories=categories)
    dataset = datasets.read_dataset(tmp_path, "detect")
    assert dataset.class_names == ("dog", "cat")
    assert subsets(dataset) == {"train": ["0", "1"], "val": ["10", "11"], "test": ["20", "21"]}
    assert found(dataset) == []


@pytest.mark.parametrize("given", ["folder", "file", "in annotations"])
def test_one_coco_file_is_split_by_content(tmp_path: Path, given: str) -> None:
    names = coco_photos(tmp_path / "images", 12, 0)
    folder = tmp_path / "annotations" if given == "in annotations" else tmp_path
    path = coco(folder / "train.json", names, [annotation(n) for n in range(1, 13)])
    put_photo(tmp_path / "images" / "unlisted.png", 500)
    dataset = datasets.read_dataset(tmp_path if given == "folder" else path, "detect")
    assert dataset.root == tmp_path
    assert len(dataset.train) + len(dataset.val) == 12
    assert dataset.val
    assert found(dataset) == [("images/unlisted.png", "no annotation", False)]


def test_coco_problems_are_named_and_left_out(tmp_path: Path) -> None:
    names = coco_photos(tmp_path, 14, 0)
    rows = [annotation(n) for n in range(1, 9)]
    rows += [
        annotation(9, 99),
        annotation(10, bbox=[1, 2, 3]),
        annotation(11, bbox=[1, 2, 3, None]),
        annotation(12, bbox=[1, 2, float("nan"), 4]),
        annotation(13, bbox=[50, 2, 20, 4]),
        annotation(14, bbox=[50, 2, 0, 4]),
        annotation(14, iscrowd=1, bbox="whatever"),
        annotation(99),
        annotation([1]),
        "no object",  # type: ignore[list-item]
    ]
    path = coco(tmp_path / "data.json", names, rows)
    document = json.loads(path.read_text())
    document["images"] += [{"id": 20}, {"id": 21, "file_name": "gone.png"}]
    path.write_text(json.dumps(document))

    dataset = datasets.read_dataset(tmp_path, "detect", skip_bad=True)

    assert len(dataset.train) + len(dataset.val) == 9
    assert found(dataset) == sorted(
        [
            ("8.png", "unknown class", True),
            ("9.png", "bad annotation", True),
            ("10.png", "bad annotation", True),
            ("11.png", "bad annotation", True),
            ("12.png", "box outside the image", True),
            ("13.png", "empty box", False),
            ("13.png", "crowd box", False),
            ("13.png", "no boxes", False),
            ("data.json annotation 16", "bad annotation", True),
            ("data.json annotation 17", "bad annotation", True),
            ("data.json annotation 18", "bad annotation", True),
            ("data.json image 15", "bad annotation", True),
            ("gone.png", "missing", True),
        ]
    )
    assert details(dataset, "unknown class") == ["annotation 9 has category_id 99, which no category has"]


ODD = [
    None,
    True,
    1,
    -1,
    0,
    10**400,
    1e300,
    "",
    "x",
    "x" * 300,
    "\0",
    "../x",
    "/",
    [],
    [1],
    {},
    {"a": [{}]},
    float("inf"),
]


@settings(max_examples=150, deadline=None)
@given(
    path=st.sampled_from(
        [
            *(("images", key) for key in ("id", "file_name", "width", "height")),
            *(("annotations", key) for key in ("image_id", "category_id", "bbox", "iscrowd")),
            *(("categories", key) for key in ("id", "name", "supercategory")),
        ]
    ),
    odd=st.sampled_from(ODD),
)
def test_whatever_a_json_holds_it_is_read_or_refused(
    tmp_path_factory: pytest.TempPathFactory, path: tuple[str, str], odd: Any
) -> None:
    root = tmp_path_factory.mktemp("coco")
    names = coco_photos(root, 3, 0)
    file = coco(root / "x.json", names, [annotation(n) for n in (1, 2, 3)])
    document = json.loads(file.read_text())
    key, field = path
    for value in (odd, {field: odd}):
        document[key][1] = value if isinstance(value, dict) and field not in value else document[key][1] | {field: odd}
        file.write_text(json.dumps(document))
        try:
            dataset = datasets.check_dataset(root, "detect")
        except DataError as error:
            assert "\n" not in str(error)
        else:
            assert len(dataset.train) + len(dataset.val) >= 1


def two_jsons(**changes: Any) -> Callable[[Path], Path]:
    def make(root: Path) -> Path:
        for subset in ("train", "val"):
            names = coco_photos(root / subset, 2, 0)
            coco(root / f"{subset}.json", names, [annotation(1)], **(changes if subset == "val" else {}))
        return root

    return make


def text_at(name: str, text: str) -> Callable[[Path], Path]:
    def make(root: Path) -> Path:
        put_photo(root / "images" / "0.png", 0)
        return put(root / name, text.encode()).parent

    return make


REFUSED: dict[str, tuple[Callable[[Path], Path], str]] = {
    "nothing": (lambda root: root / "nowhere", r"no data at .*nowhere: give a folder with Pascal VOC, COCO or YOLO"),
    "no boxes": (
        lambda root: put_photo(root / "a" / "0.png", 0).parents[1],
        r"has no boxes that edgekit can read: exp",
    ),
    "an archive": (lambda root: put(root / "x.zip", b"PK"), r"x.zip has no boxes that edgekit can read"),
    "VOC without images": (lambda root: put(root / "Annotations" / "0.xml", b"").parents[1], r"but no JPEGImages/"),
    "VOC of test only": (
        lambda root: voc(root, train="", test="0\n1"),
        r"^too few images: train has no usable images; val has no usable images. Add",
    ),
    "VOC list in UTF-16": (
        lambda root: put(voc(root) / "ImageSets" / "train.txt", "0".encode("utf-16")).parents[1],
        r"train.txt is not UTF-8 text: expected a name a line",
    ),
    "VOC without a box": (
        lambda root: [voc(root), *(p.write_bytes(voc_xml()) for p in (root / "Annotations").iterdir())][0],
        r"^too few images: train has nothing labelled in its images",
    ),
    "JSON of something": (text_at("images.json", '{"images": [], "annotations": 1}'), r"is not COCO's JSON: expected"),
    "broken JSON": (text_at("x.json", '{"images": [], "annotations": ['), r"x.json is not valid JSON: "),
    "deep JSON": (text_at("x.json", '"images" "annotations"' + "[" * 9), r"x.json is not valid JSON: "),
    "nameless category": (two_jsons(categories=[{"id": 3, "name": ""}]), r"has a category without an id and a name"),
    "category twice": (two_jsons(categories=[*CATEGORIES, CATEGORIES[0]]), r"has a category without an id and a name"),
    "no categories": (two_jsons(categories=[]), r"val.json has no categories"),
    "other categories": (
        two_jsons(categories=[{"id": 3, "name": "cat"}, {"id": 7, "name": "bird"}]),
        r"val.json has other categories than train.json: they must have the same ids and names",
    ),
    "two JSONs": (
        lambda root: coco(coco(root / "a.json", [], []).with_name("b.json"), [], []).parent,
        r"has more than one .json for the same images: 'a.json', 'b.json'. Keep one, or give its path",
    ),
    "YAML of nothing": (text_at("data.yaml", "- a"), r"data.yaml has no keys: expected names, train and val"),
    "broken YAML": (text_at("data.yaml", "names: [a"), r"data.yaml is not valid YAML: "),
    "YAML without train": (text_at("data.yaml", "names: [a, b]"), r"has no train: expected the folder with the train"),
    "YAML with a wrong folder": (
        text_at("data.yaml", "names: [a, b]\ntrain: nowhere"),
        r"says that train is nowhere, which is not there: correct it, or path",
    ),
    "YAML with odd names": (text_at("data.yaml", "names: {x: a}\ntrain: images"), r"has names that are not a list or"),
    "YAML with one name": (text_at("data.yaml", "names: a\ntrain: images"), r"has names that are not a list or"),
    "names by case": (text_at("data.yaml", "names: [a, A]\ntrain: images"), r"class names that differ by case only"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_not_detection_data_is_refused_in_one_line(tmp_path: Path, name: str) -> None:
    make, message = REFUSED[name]
    with pytest.raises(DataError, match=message) as caught:
        datasets.read_dataset(make(tmp_path), "detect")
    assert "\n" not in str(caught.value)


# ---------------------------------------------------------------------------------------------------------------
# YOLO


BOX_LINE = "1 0.25 0.5 0.5 0.25\n"  # 14..42 and 15..25 of 56 x 40
YOLO_BOX = ("dog", 0.0, 15.0, 28.0, 25.0)


def yolo(root: Path, image: str, label: str, first: int, count: int = 2) -> None:
    for n in range(first, first + count):
        put_photo(root / image / f"{n}.png", n)
        put(root / label / f"{n}.txt", BOX_LINE.encode())


@pytest.mark.parametrize(
    ("text", "folders"),
    [
        ("names: [cat, dog]\ntrain: images/train\nval: images/val\ntest: images/test\nnc: 2", "images/{}"),
        ("path: .\nnames: {0: cat, 1: dog}\ntrain: images/train\nval: [images/val]\ntest:", "images/{}"),
        ("path: ../elsewhere\nnames:\n  0: cat\n  1: dog\ntrain: images/train\nval: images/val", "images/{}"),
        ("names: ['cat', 'dog']\ntrain: ../train/images\nval: ../valid/images\ntest: ../test/images", "{}/images"),
        ("names: [cat, dog]\ntrain: train.txt\nval: val.txt", "images/{}"),
    ],
)
@pytest.mark.parametrize("given", ["folder", "file"])
def test_yolo_with_data_yaml(tmp_path: Path, text: str, folders: str, given: str) -> None:
    names = {"train": 0, "valid" if "valid" in text else "val": 10, "test": 20}
    for subset, first in names.items():
        folder = folders.format(subset)
        if subset != "test" or "test: " in text:
            yolo(tmp_path, folder, folder.replace("images", "labels"), first)
        put(tmp_path / f"{subset}.txt", f"./images/{subset}/{first}.png\n\nimages/{subset}/{first + 1}.png".encode())
    path = put(tmp_path / "data.yaml", text.encode())
    dataset = datasets.read_dataset(tmp_path if given == "folder" else path, "detect")
    assert dataset.class_names == ("cat", "dog")
    test = ["20", "21"] if "test: " in text else []
    assert subsets(dataset) == {"train": ["0", "1"], "val": ["10", "11"], "test": test}
    assert set(boxes(dataset).values()) == {(YOLO_BOX,)}
    assert found(dataset) == []


@pytest.mark.parametrize("layout", ["images/{}", "{}/images"])
@pytest.mark.parametrize("names", ["cat\ndog\n", None])
def test_yolo_without_data_yaml(tmp_path: Path, layout: str, names: str | None) -> None:
    for subset, first in (("train", 0), ("val", 10), ("test", 20)):
        folder = layout.format(subset)
        yolo(tmp_path, folder, folder.replace("images", "labels"), first)
    if names:
        put(tmp_path / "classes.txt", names.encode())
    dataset = datasets.read_dataset(tmp_path, "detect")
    assert dataset.class_names == (("cat", "dog") if names else ("class_0", "class_1"))
    assert subsets(dataset) == {"train": ["0", "1"], "val": ["10", "11"], "test": ["20", "21"]}


def test_yolo_lines(tmp_path: Path) -> None:
    texts = {
        "box": "0 0.5 0.5 0.5 0.5\n\n",
        "polygon": "1 0.25 0.25 0.75 0.5 0.5 0.75",
        "both": "1.0 0.25 0.25 0.75 0.5 0.5 0.75\r\n0 0.5 0.5 1 1",
        "empty": "",
        "a hair outside": "0 0.500001 0.5 1 1",
        "score": "0 0.5 0.5 0.5 0.5 0.9",
        "odd polygon": "0 0.1 0.1 0.2 0.2 0.3 0.3 0.4",
        "words": "dog 0.5 0.5 0.5 0.5",
        "negative class": "-1 0.5 0.5 0.5 0.5",
        "half a class": "0.5 0.5 0.5 0.5 0.5",
        "infinite": "0 0.5 inf 0.5 0.5",
        "no class": "2 0.5 0.5 0.5 0.5",
        "pixels": "0 28 20 10 10",
        "flat": "0 0.5 0.5 0 0.5",
    }
    for n, (name, text) in enumerate(texts.items()):
        put_photo(tmp_path / "images" / f"{name}.png", n)
        put(tmp_path / "labels" / f"{name}.txt", text.encode())
    put_photo(tmp_path / "images" / "without.png", 50)
    put_photo(tmp_path / "images" / "binary.png", 51)
    put(tmp_path / "labels" / "binary.txt", b"\xff\xfe\0")
    put(tmp_path / "labels" / "stray.txt", b"")
    put(tmp_path / "labels" / "classes.txt", b"cat\ndog")

    dataset = datasets.read_dataset(tmp_path, "detect", skip_bad=True)

    whole, middle = (0.0, 0.0, 56.0, 40.0), (14.0, 10.0, 42.0, 30.0)
    made = boxes(dataset)
    assert made.pop("images/a hair outside.png")[0] == pytest.approx(("cat", 0.000056, *whole[1:]))
    assert made == {
        "images/box.png": (("cat", *middle),),
        "images/polygon.png": (("dog", *middle),),
        "images/both.png": (("dog", *middle), ("cat", *whole)),
        "images/empty.png": (),
        "images/flat.png": (),
        "images/without.png": (),
    }
    bad = ("score", "odd polygon", "words", "negative class", "half a class", "infinite", "binary")
    assert found(dataset) == sorted(
        [
            *((f"images/{name}.png", "bad annotation", True) for name in bad),
            ("images/no class.png", "unknown class", True),
            ("images/pixels.png", "box outside the image", True),
            ("images/flat.png", "empty box", False),
            *((f"images/{name}.png", "no boxes", False) for name in ("empty", "flat", "without")),
            ("labels/stray.txt", "not used", False),
        ]
    )
    assert details(dataset, "unknown class") == ["no class.txt line 1 has class 2, which has no name"]


def test_a_file_is_refused_once_however_many_lines_are_bad(tmp_path: Path) -> None:
    yolo(tmp_path, "images", "labels", 0, 12)
    put(tmp_path / "labels" / "3.txt", (BOX_LINE + "x\n" * 4).encode())
    put(tmp_path / "labels" / "4.txt", b"0 28 20 1 1\n" * 3)
    with pytest.raises(DataError) as caught:
        datasets.read_dataset(tmp_path, "detect")
    assert str(caught.value) == (
        "2 files cannot be used: images/3.png (bad annotation: 3.txt line 2 is no class with a box (4 numbers) or "
        "polygon (6 or more): x; and 3 more); images/4.png (box outside the image: 4.txt line 1: 1540, 780, 1596, 820 "
        "in 56 x 40; and 2 more). Repair or remove them, or leave them out with --skip-bad"
    )


def test_names_stay_text_whatever_yaml_makes_of_them(tmp_path: Path) -> None:
    yolo(tmp_path, "images", "labels", 0)
    put(tmp_path / "data.yaml", b"names: [no, 1]\ntrain: images")
    assert datasets.read_dataset(tmp_path, "detect").class_names == ("no", "1")


def test_yaml_makes_no_objects(tmp_path: Path) -> None:
    yolo(tmp_path, "images", "labels", 0)
    mark = tmp_path / "mark"
    text = f"names: !!python/object/apply:os.mkdir ['{mark}']\ntrain: images"
    put(tmp_path / "data.yaml", text.encode())
    datasets.check_dataset(tmp_path, "detect")
    assert not mark.exists()


# ---------------------------------------------------------------------------------------------------------------
# All formats


def test_the_same_image_with_other_boxes(tmp_path: Path) -> None:
    voc(tmp_path)
    put_photo(tmp_path / "JPEGImages" / "copy.png", 3)
    put_photo(tmp_path / "JPEGImages" / "other.png", 4)
    put(tmp_path / "Annotations" / "copy.xml", voc_xml(voc_object("dog", 11, 6, 20, 25)))
    put(tmp_path / "Annotations" / "other.xml", voc_xml(voc_object("dog", 11, 6, 20, 26)))
    dataset = datasets.read_dataset(tmp_path, "detect", skip_bad=True)
    assert found(dataset) == [("JPEGImages/4.png", "two labels", True), ("JPEGImages/other.png", "two labels", True)]
    assert details(dataset, "two labels") == [
        "the same image is JPEGImages/other.png, with other boxes",
        "the same image is JPEGImages/4.png, with other boxes",
    ]
    assert ("copy" in subsets(dataset)["val"]) == ("3" in subsets(dataset)["val"])


def test_an_image_in_more_than_one_subset(tmp_path: Path) -> None:
    dataset = datasets.check_dataset(voc(tmp_path, train="0\n1\n2", val="1\n3\n4", test="2\n4\n5"), "detect")
    assert subsets(dataset) == {"train": ["0"], "val": ["1", "3"], "test": ["2", "4", "5"]}
    assert [(p.path, p.kind, p.detail) for p in dataset.problems if p.fatal] == [
        (
            "JPEGImages/4.png",
            "in val and test",
            "the same image is JPEGImages/4.png; the validation copy is the one to leave out",
        )
        if kind == "in val and test"
        else (
            f"JPEGImages/{n}.png",
            kind,
            f"the same image is JPEGImages/{n}.png; the training copy is the one to leave out",
        )
        for n, kind in ((2, "in train and test"), (1, "in train and val"), (4, "in val and test"))
    ]


def test_boxes_are_of_the_upright_photo(tmp_path: Path) -> None:
    voc(tmp_path)
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(photo(99, WIDTH, HEIGHT)).save(tmp_path / "JPEGImages" / "turned.jpg", exif=exif)
    put(tmp_path / "Annotations" / "turned.xml", voc_xml(voc_object("dog", 1, 1, WIDTH, HEIGHT)))
    dataset = datasets.read_dataset(tmp_path, "detect")
    assert boxes(dataset)["JPEGImages/turned.jpg"] == (("dog", 0, 0, WIDTH, HEIGHT),)
    assert found(dataset) == [("JPEGImages/turned.jpg", "EXIF rotation", False)]


def test_a_broken_image_is_left_out_with_its_boxes(tmp_path: Path) -> None:
    put(voc(tmp_path) / "JPEGImages" / "2.png", b"")
    os.mkfifo(tmp_path / "JPEGImages" / "pipe.png")
    put(tmp_path / "Annotations" / "pipe.xml", voc_xml(voc_object("dog", 1, 1, 5, 5)))
    dataset = datasets.read_dataset(tmp_path, "detect", skip_bad=True)
    assert found(dataset) == [("JPEGImages/2.png", "empty", True), ("JPEGImages/pipe.png", "unreadable", True)]
    assert len(boxes(dataset)) == 5


def test_blood_cells() -> None:
    if not (DATA / "bccd").is_dir():
        pytest.skip("the blood smears (../shared/data/bccd) are not on this machine")
    dataset = datasets.read_dataset(DATA / "bccd", "detect")
    assert (len(dataset.train), len(dataset.val), len(dataset.test)) == (205, 87, 72)
    assert dataset.class_names == ("Platelets", "RBC", "WBC")
    drawn = [box.class_id for sample in (*dataset.train, *dataset.val, *dataset.test) for box in sample.label]
    assert [drawn.count(class_id) for class_id in range(3)] == [361, 4155, 372]
    assert dataset.problems == ()
