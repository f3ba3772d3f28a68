"""Tables, pictures and the page: the figures that they show are the files' figures, whatever the classes are called."""

import base64
import json
import warnings
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console
from rich.table import Table

from edgekit import report, runner
from edgekit.artifacts import RunFolder, write_bytes, write_json, write_text
from edgekit.backbones import Backbone
from edgekit.datasets import Dataset, Problem, Sample, write_split
from edgekit.errors import ArtifactError, ConfigError
from edgekit.recipe import make_recipe, to_toml

NAMES = ("cat", "dog", "newt")
HOSTILE = ("<script>alert(1)</script>", '"><img src=x onerror=alert(1)>', "{{ 7 * 7 }} & $x$ [red]猫")
# 10 images: 4 cats (one taken for a newt), 3 dogs, 3 newts (two taken for dogs)
CONFUSION = [[3, 0, 1], [0, 3, 0], [0, 2, 1]]


def column(names: tuple[str, ...] = NAMES, **changes: Any) -> dict[str, Any]:
    figures = ((1.0, 0.75, 6 / 7), (0.6, 1.0, 0.75), (0.5, 1 / 3, 0.4))
    rows = [
        {"label": name, "support": sum(CONFUSION[i]), "precision": p, "recall": r, "f1": f}
        for i, (name, (p, r, f)) in enumerate(zip(names, figures, strict=True))
    ]
    base = {"top1": 0.7, "top5": None, "macro_f1": 0.669, "agreement": 1.0, "images_per_second": 118.3}
    return {**base, "per_class": rows, "confusion": CONFUSION, **changes}


def metrics(names: tuple[str, ...] = NAMES, mistakes: list[dict[str, Any]] | None = None) -> dict[str, Any]:
    return {
        "task": "classify",
        "images": 10,
        "class_names": list(names),
        "columns": {
            "torch": column(names),
            "onnx": column(names, images_per_second=64.25),
            "bundle": column(names, top1=0.6, agreement=0.9, images_per_second=41.7),
        },
        "mistakes": mistakes or [],
    }


PARITY = {
    "onnx_sha256": "0" * 64,
    "tolerance": 1e-3,
    "versions": {"torch": "2.15.0", "onnx": "1.23.0"},
    "verdicts": [
        {"engine": engine, "version": version, "status": status, "relative_error": error, "message": message}
        | {"first_difference": first}
        for engine, version, status, error, message, first in (
            ("onnxruntime", "1.32.0", "ok", 3.14e-7, "", ""),
            ("opencv-new", "5.0.0", "wrong", 0.25, "differs by 0.25", "first at <Mul> node_12"),
            ("opencv-classic", "5.0.0", "died", None, "killed by SIGSEGV", ""),
        )
    ],
}
HISTORY = """epoch,phase,learning_rate,train_loss,val_loss,val_top1,seconds,images_per_second
1,head,0.005,1.6,1.2,0.5,61.0,40.0
2,stages,0.001,0.9,0.8,0.7,70.5,30.0
3,stages,0.0,0.7,0.75,0.7,70.5,32.0
"""


def rows_of(history: str) -> list[dict[str, str]]:
    header, *lines = [line.split(",") for line in history.splitlines()]
    return [dict(zip(header, line, strict=True)) for line in lines]


def decoded(data: bytes) -> np.ndarray:
    return runner.decode(data)


def bgr(color: str) -> tuple[int, ...]:
    return tuple(int(color[i : i + 2], 16) for i in (5, 3, 1))


def share_of(image: np.ndarray, color: str) -> float:
    return float((image == bgr(color)).all(axis=2).mean())


def solid(path: Path, color: tuple[int, int, int], height: int = 40, width: int = 40) -> Path:
    write_bytes(path, cv2.imencode(".png", np.full((height, width, 3), color, np.uint8))[1].tobytes())
    return path


def mistake(path: Path, label: str = "newt", predicted: str = "dog") -> dict[str, Any]:
    return {"path": str(path), "label": label, "predicted": predicted, "score": 0.875, "true_score": 0.0625}


# Figures


@pytest.mark.parametrize(
    ("share", "shown"),
    [(None, "-"), (0.0, "0.00 %"), (1.0, "100.00 %"), (0.978155, "97.82 %"), (0.99999, "99.99 %"), (1e-9, "0.01 %")],
)
def test_percent(share: float | None, shown: str) -> None:
    assert report.percent(share) == shown


@given(st.floats(0, 1))
def test_only_all_is_a_hundred_percent_and_only_none_is_zero(share: float) -> None:
    assert (report.percent(share) == "100.00 %") == (share == 1)
    assert (report.percent(share) == "0.00 %") == (share == 0)


def test_megabytes_are_millions_of_bytes() -> None:
    assert report.megabytes(13_449_999) == "13.4 MB"


# Terminal and Markdown


def cells(table: Table) -> list[list[str]]:
    """Header and rows, as text."""
    columns = [[str(column.header), *(str(cell) for cell in column.cells)] for column in table.columns]
    return [list(row) for row in zip(*columns, strict=True)]


def printed(table: Table) -> str:
    console = Console(width=120)
    with console.capture() as capture:
        console.print(table)
    return capture.get()


def test_metrics_table_has_the_columns_side_by_side() -> None:
    table = report.metrics_table(metrics())
    assert cells(table) == [
        ["", "torch", "onnx", "bundle"],
        ["top-1", "70.00 %", "70.00 %", "60.00 %"],
        ["top-5", "-", "-", "-"],
        ["macro F1", "66.90 %", "66.90 %", "66.90 %"],
        ["agreement with torch", "100.00 %", "100.00 %", "90.00 %"],
        ["images/s", "118", "64.2", "41.7"],
    ]
    assert printed(table).startswith("10 validation images")


def test_metrics_table_leaves_out_what_was_not_evaluated() -> None:
    only = metrics()
    only["columns"] = {"torch": column()}
    assert cells(report.metrics_table(only))[:2] == [["", "torch"], ["top-1", "70.00 %"]]


def test_markdown_metrics() -> None:
    assert report.markdown_metrics(metrics()) == (
        "|  | torch | onnx | bundle |\n"
        "| --- | ---: | ---: | ---: |\n"
        "| top-1 | 70.00 % | 70.00 % | 60.00 % |\n"
        "| top-5 | - | - | - |\n"
        "| macro F1 | 66.90 % | 66.90 % | 66.90 % |\n"
        "| agreement with torch | 100.00 % | 100.00 % | 90.00 % |\n"
        "| images/s | 118 | 64.2 | 41.7 |\n"
    )


def test_per_class_table_says_what_a_class_is_taken_for() -> None:
    assert cells(report.per_class_table(metrics())) == [
        ["class", "images", "precision", "recall", "F1", "most often taken for"],
        ["cat", "4", "100.00 %", "75.00 %", "85.71 %", "newt (1)"],
        ["dog", "3", "60.00 %", "100.00 %", "75.00 %", "-"],
        ["newt", "3", "50.00 %", "33.33 %", "40.00 %", "dog (2)"],
    ]


def test_class_names_are_not_read_as_markup() -> None:
    text = printed(report.per_class_table(metrics(HOSTILE)))
    assert HOSTILE[2] in text.replace("\n", "")


def test_parity_table() -> None:
    table = report.parity_table(PARITY)
    assert cells(table) == [
        ["engine", "version", "status", "relative error", "tolerance"],
        ["onnxruntime", "1.32.0", "ok", "3.1e-07", "1.0e-03"],
        ["opencv-new", "5.0.0", "wrong", "2.5e-01", "1.0e-03"],
        ["opencv-classic", "5.0.0", "died", "-", "1.0e-03"],
    ]
    assert [cell.style for cell in table.columns[2].cells] == ["green", "bold red", "bold red"]  # type: ignore[union-attr]


def test_problems_table_puts_what_stops_training_first() -> None:
    problems = [
        Problem("a.png", "grey", "1 channel", fatal=False),
        Problem("b.png", "grey", "1 channel", fatal=False),
        Problem("c.jpg", "truncated", "ends early", fatal=True),
        Problem("d.png", "alpha", "", fatal=False),
    ]
    assert cells(report.problems_table(iter(problems))) == [
        ["problem", "count", "stops training", "example"],
        ["truncated", "1", "yes", "c.jpg: ends early"],
        ["grey", "2", "no", "a.png: 1 channel"],
        ["alpha", "1", "no", "d.png"],
    ]


def test_demo_table() -> None:
    conditions = {"opencv": "5.0.0", "engine": "new", "threads": 2, "cpu": "Some CPU"}
    latency = {"end_to_end_ms": {"p50": 1.234, "p90": None, "p99": None}, "conditions": conditions}
    table = report.demo_table(metrics(), {"torch": 13_600_000, "onnx": 13_500_000, "bundle": 12_000_000}, latency)
    assert cells(table) == [
        ["", "torch", "onnx", "bundle"],
        ["top-1", "70.00 %", "70.00 %", "60.00 %"],
        ["agreement with torch", "100.00 %", "100.00 %", "90.00 %"],
        ["size", "13.6 MB", "13.5 MB", "12.0 MB"],
        ["median latency, one image", "-", "-", "1.23 ms"],
    ]
    assert str(table.caption) == "latency: OpenCV 5.0.0, new engine, 2 threads, Some CPU"


def test_backbones_table() -> None:
    rows = {
        "small": Backbone("small", 1_549_000, 24_500_000, (96, 128), "tiny", "mit"),
        "large": Backbone("large", 25_000_000, 4_000_000_000, (224, 224), "", "apache-2.0", "a-package"),
    }
    assert cells(report.backbones_table(rows)) == [
        ["backbone", "parameters", "multiply-adds", "input", "weights", "weights' licence", "note"],
        ["small", "1.5 M", "24 M", "128x96", "hub", "mit", "tiny"],
        ["large", "25.0 M", "4000 M", "224x224", "in a wheel", "apache-2.0", ""],
    ]


# Pictures


@pytest.mark.parametrize("classes", [1, 2, 20, 100, 250])
def test_confusion_picture_is_large_enough_to_read(classes: int) -> None:
    names = [f"class {i}" for i in range(classes)]
    height, width, _ = decoded(report.confusion_picture(np.diag(range(classes)).tolist(), names)).shape
    per_class = 72 if classes <= 2 else 50 if classes == 20 else 19 if classes == 100 else 8
    assert per_class * classes <= height <= 2600
    assert height * 0.8 <= width <= height * 1.8


def test_right_and_wrong_answers_have_their_colors() -> None:
    colors = report.THEMES["light"]
    right = decoded(report.confusion_picture([[5, 0], [0, 7]], ["a", "b"]))
    wrong = decoded(report.confusion_picture([[0, 5], [7, 0]], ["a", "b"]))
    assert share_of(right, colors.right) > 0.2 and share_of(right, colors.wrong) == 0
    assert share_of(wrong, colors.wrong) > 0.2 and share_of(wrong, colors.right) == 0


def test_rows_are_true_classes_and_columns_predicted_ones() -> None:
    image = decoded(report.confusion_picture([[0, 5], [0, 0]], ["a", "b"]))
    rows, columns = np.nonzero((image == bgr(report.THEMES["light"].wrong)).all(axis=2))
    empty = (image == bgr(report.THEMES["light"].empty)).all(axis=2)
    top, right = rows.max(), columns.min()  # the mistake's cell is the upper right one
    assert empty[top + 10 :, columns].any() and empty[rows.min() : top, :right].any()
    assert not empty[: rows.min() - 5].any() and not empty[:, columns.max() + 5 :].any()


def test_counts_are_written_up_to_20_classes() -> None:
    def picture(classes: int, count: int) -> bytes:
        return report.confusion_picture((np.eye(classes, dtype=int) * count).tolist(), [str(i) for i in range(classes)])

    assert picture(20, 1) != picture(20, 8)
    assert picture(21, 1) == picture(21, 8)  # the colours are shares, and those are the same


def test_a_dark_picture_lies_on_the_dark_surface() -> None:
    image = decoded(report.confusion_picture([[1, 0], [0, 1]], ["a", "b"], "dark"))
    assert tuple(image[0, 0]) == bgr(report.THEMES["dark"].surface)
    assert share_of(image, report.THEMES["dark"].right) > 0.2


@pytest.mark.parametrize(
    "name", ["猫", "😀", "\x08", "$x_1$", "$\\frac$", "مرحبا", "हिन्दी", "a\nb\tc", "\u200b", "", "n" * 300]
)
def test_any_class_name_can_be_drawn(name: str) -> None:
    height, width, _ = decoded(report.confusion_picture([[1, 0], [0, 1]], [name, "other"])).shape
    assert 300 < height < 1000 and 300 < width < 1000


@settings(max_examples=12, deadline=None)
@given(st.text(max_size=8))
def test_no_name_makes_matplotlib_warn(name: str) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert report.confusion_picture([[1, 0], [0, 1]], [name, "other"]).startswith(b"\x89PNG")


def test_names_without_glyphs_stay_apart() -> None:
    first, second = ("\U0010fffd", "\U0010fffc")  # no font has these
    one, two = (report.confusion_picture([[1, 0], [0, 1]], [name, "b"]) for name in (first, second))
    assert one != two


def test_curves_picture() -> None:
    image = decoded(report.curves_picture(rows_of(HISTORY)))
    assert image.shape[1] > 2 * image.shape[0] > 600
    colors = report.THEMES["light"]
    assert share_of(image, colors.right) > 0 and share_of(image, colors.wrong) > 0
    assert tuple(image[0, 0]) == bgr(colors.surface)


def test_the_boundary_between_phases_is_marked() -> None:
    def upright_lines(history: str) -> list[int]:
        image = decoded(report.curves_picture(rows_of(history)))
        dashes = (image == bgr(report.THEMES["light"].muted)).all(axis=2).mean(axis=0)
        return [int(x) for x in np.flatnonzero(dashes > 0.25)]

    assert upright_lines(HISTORY.replace("head", "stages")) == []
    lines = upright_lines(HISTORY)
    width = decoded(report.curves_picture(rows_of(HISTORY))).shape[1]
    assert len([x for x in lines if x < width / 2]) == len([x for x in lines if x > width / 2]) > 0, "in both panels"
    assert width * 0.15 < lines[0] < width * 0.25, "a third of the first panel's width: after epoch 1 of 3"


@pytest.mark.parametrize("losses", ["nan,nan", "inf,1.0", "1.0,1e300"])
def test_a_run_that_diverged_can_be_drawn(losses: str) -> None:
    history = HISTORY.replace("0.7,0.75", losses)
    assert decoded(report.curves_picture(rows_of(history))).shape[0] > 300


def test_one_epoch_can_be_drawn() -> None:
    assert decoded(report.curves_picture(rows_of(HISTORY)[:1])).shape[0] > 300


def test_the_users_own_matplotlib_settings_do_not_matter() -> None:
    import matplotlib as mpl

    plain = report.confusion_picture([[1, 0], [0, 1]], ["a", "b"])
    with mpl.rc_context({"font.size": 30, "axes.facecolor": "red", "axes.grid": True}):
        assert report.confusion_picture([[1, 0], [0, 1]], ["a", "b"]) == plain
        assert mpl.rcParams["font.size"] == 30


@pytest.mark.parametrize(("count", "size"), [(1, (276, 232)), (4, (276, 880)), (5, (536, 880)), (24, (1576, 880))])
def test_contact_sheet_has_four_columns(tmp_path: Path, count: int, size: tuple[int, int]) -> None:
    path = solid(tmp_path / "a.png", (0, 0, 255))
    assert decoded(report.contact_sheet([mistake(path)] * count)).shape[:2] == size


def test_contact_sheet_keeps_the_order_and_the_shapes(tmp_path: Path) -> None:
    red = solid(tmp_path / "red.png", (0, 0, 255))
    wide = solid(tmp_path / "wide.png", (255, 0, 0), height=20, width=400)
    sheet = decoded(report.contact_sheet([mistake(red), mistake(wide), mistake(tmp_path / "gone.png")])).astype(int)

    def close(row: int, left: int, color: tuple[int, int, int]) -> bool:
        return bool(np.abs(sheet[row, left] - color).max() < 12)  # JPEG

    assert close(20, 20, (0, 0, 255)) and close(210, 210, (0, 0, 255))  # fills its cell, 16..215
    assert close(116, 332, (255, 0, 0)) and close(116, 240, (255, 0, 0))  # the full width, a tenth as high
    assert close(40, 332, (238, 238, 238)) and close(195, 332, (238, 238, 238))
    assert close(40, 548, (238, 238, 238))  # a grey cell where the image is gone
    for left in (16, 232, 448):
        assert sheet[220:260, left : left + 200].min() < 100, "the text under the image"


def test_tiny_images_keep_their_pixels(tmp_path: Path) -> None:
    board = np.tile(np.uint8([[0, 255], [255, 0]]), (4, 4))  # 8×8, black and white in turn
    write_bytes(tmp_path / "board.png", cv2.imencode(".png", board)[1].tobytes())
    sheet = decoded(report.contact_sheet([mistake(tmp_path / "board.png")]))
    squares = sheet[16:216, 16:216, 0].reshape(8, 25, 8, 25).transpose(0, 2, 1, 3)[:, :, 3:-3, 3:-3]
    assert np.abs(squares.astype(int) - board[:, :, None, None]).max() < 40  # JPEG


def test_contact_sheet_shows_the_whole_of_very_long_images(tmp_path: Path) -> None:
    path = solid(tmp_path / "line.png", (0, 255, 0), height=1, width=3000)
    assert decoded(report.contact_sheet([mistake(path, *HOSTILE[:2])])).shape == (276, 232, 3)


def test_contact_sheet_without_mistakes_says_so() -> None:
    sheet = decoded(report.contact_sheet([]))
    assert sheet.shape == (90, 460, 3) and sheet.min() < 100


# The page


class Page(HTMLParser):
    """What a reader and a browser meet: tags, addresses, and each section's text and table cells."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.addresses: list[str] = []
        self.title = self.header = ""
        self.text: dict[str, str] = {}
        self.tables: dict[str, list[list[str]]] = {}
        self.headings: list[str] = []
        self._section, self._open = "", [""]
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.addresses += [value or "" for key, value in attrs if key in ("src", "href", "srcset", "action", "data")]
        if tag not in ("meta", "img", "source"):
            self._open.append(tag)
        if tag == "section":
            self._section = dict(attrs)["id"] or ""
            self.text[self._section] = ""
        elif tag == "tr":
            self.tables.setdefault(self._section, []).append([])
        elif tag in ("td", "th"):
            self.tables[self._section][-1].append("")
        elif tag == "h2":
            self.headings.append("")

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop() == tag, "tags are closed in order"
        if tag == "section":
            self._section = ""

    def handle_data(self, data: str) -> None:
        if self._open[-1] == "title":
            self.title += data
        if self._open[-1] in ("td", "th"):
            self.tables[self._section][-1][-1] += data
        if self._open[-1] == "h2":
            self.headings[-1] += data
        if self._section:
            self.text[self._section] += data
        if "header" in self._open:
            self.header += data

    def section(self, name: str) -> str:
        return " ".join(self.text[name].split())


def page_of(run: RunFolder) -> Page:
    assert report.write_report(run) == run.report
    return Page(run.report.read_text(encoding="utf-8"))


def make_run(folder: Path, names: tuple[str, ...] = NAMES) -> RunFolder:
    """A run folder with every file that the page reads; the weights and the ONNX file are placeholders."""
    run = RunFolder(folder)
    photo = solid(folder / "photos" / "newt" / "one.png", (0, 0, 255))
    split = tuple(Sample(photo, label, str(label) * 64) for label in range(len(names)))
    recipe = make_recipe({"name": folder.name, "data": {"path": "pets <b>"}})
    spec = runner.Spec("classify", (96, 128), "stretch", "linear", "rgb", (127.5,) * 3, (127.5,) * 3, names)
    write_text(run.recipe, to_toml(recipe))
    write_json(run.spec, spec.to_dict())
    write_split(Dataset(folder, names, split, split[:1], ()), run.split)
    write_text(run.history, HISTORY)
    write_json(run.metrics, metrics(names, [mistake(photo, names[2], names[1]), mistake(folder / "gone.png")]))
    write_json(run.parity, PARITY)
    write_bytes(run.weights, b"w" * 1_250_000)
    write_bytes(run.onnx, b"o" * 2_340_000)
    return run


@pytest.fixture
def run(tmp_path: Path) -> RunFolder:
    return make_run(tmp_path / "pets-1")


def test_the_page_shows_the_files_figures(run: RunFolder) -> None:
    page = page_of(run)
    assert page.title == "pets-1"
    assert page.headings == [
        "Summary",
        "Learning curves",
        "Side by side",
        "Classes",
        "Confusion matrix",
        "Worst mistakes",
        "Export parity",
        "How it was made",
        "Conditions",
    ]
    assert page.tables == {
        "metrics": cells(report.metrics_table(metrics())),
        "classes": cells(report.per_class_table(metrics())),
        "parity": cells(report.parity_table(PARITY)),
    }
    assert page.section("summary") == (
        "Summary 70.00 %top-1, torch 70.00 %top-1, onnx 60.00 %top-1, bundle 10val images 3classes 2.3 MBmodel.onnx "
        "Taskclassify Backbonetf_efficientnet_lite0 Started frompublished ImageNet weights Datapets <b> "
        "Images3 for training, 1 for validation Network input128x96 px, stretch, linear interpolation "
        "Classescat, dog, newt"
    )
    assert "newt → dog 87.50 %true class 6.25 %newt/one.png" in page.section("mistakes")
    assert "the image is not there any more" in page.section("mistakes")
    assert "opencv-new 5.0.0: differs by 0.25 first at <Mul> node_12" in page.section("parity")
    assert page.section("conditions").startswith(
        "Conditions Training3 epochs in 3 min 22 s, 32.0 images/s (median epoch) "
        "Device and precision asked forauto, auto Seeds0 (training), 0 (split) Data, SHA-256"
    )
    assert page.section("conditions").endswith(
        "Exported withtorch 2.15.0, onnx 1.23.0 "
        "Proved withonnxruntime 1.32.0, opencv-new 5.0.0, opencv-classic 5.0.0 "
        f"Weights, SHA-256{runner.file_sha256(run.weights)} ONNX, SHA-256{runner.file_sha256(run.onnx)}"
    )
    assert "not in the table yet" not in page.section("metrics")
    assert "The bundle gives the trained network's answer on 9 of 10 validation images." in page.header


def test_the_page_shows_the_recipe_as_it_is(run: RunFolder) -> None:
    shown = page_of(run).text["recipe"]
    assert run.recipe.read_text(encoding="utf-8").strip() in shown


def test_the_page_needs_nothing_else(run: RunFolder) -> None:
    page = page_of(run)
    html = run.report.read_text(encoding="utf-8")
    assert {"script", "link", "iframe", "object", "base"}.isdisjoint(page.tags)
    assert all(address.startswith(("data:image/", "#")) for address in page.addresses)
    assert "://" not in html and "url(" not in html and "@import" not in html
    ids = {f"#{name}" for name in page.text}
    assert {address for address in page.addresses if address.startswith("#")} <= ids


def test_the_pages_pictures_come_in_both_themes(run: RunFolder) -> None:
    pictures = [address for address in page_of(run).addresses if address.startswith("data:image/")]
    images = [runner.decode(base64.b64decode(address.split(",", 1)[1])) for address in pictures]
    surfaces = [tuple(image[0, 0]) for image in images]
    dark, light = (bgr(report.THEMES[theme].surface) for theme in ("dark", "light"))
    # curves, confusion: the dark source first, then the light image; then the one mistake whose image is there
    assert surfaces[:4] == [dark, light, dark, light]
    assert images[4].shape == (96, 96, 3) and np.abs(images[4].astype(int) - (0, 0, 255)).max() < 12
    assert len(images) == 5


def test_hostile_names_are_text(tmp_path: Path) -> None:
    run = make_run(tmp_path / "<b>bold & run", HOSTILE)
    page = page_of(run)
    assert page.title == "<b>bold & run"
    assert [row[0] for row in page.tables["classes"][1:]] == list(HOSTILE)
    assert "script" not in page.tags
    assert page.tags.count("img") == 3, "two pictures and a mistake, no image of a class name's"
    assert f"{HOSTILE[2]} → {HOSTILE[1]} 87.50 %" in page.section("mistakes")


@pytest.mark.parametrize(
    ("file", "sections", "command"),
    [
        ("metrics.json", ("metrics", "classes", "confusion", "mistakes"), "edgekit evaluate {run}."),
        ("parity.json", ("parity",), "edgekit export {run}."),
        ("history.csv", ("curves",), "edgekit finetune DATA."),
        ("recipe.toml", ("recipe",), "edgekit finetune DATA."),
    ],
)
def test_what_is_missing_names_its_command(run: RunFolder, file: str, sections: tuple[str, ...], command: str) -> None:
    (run.path / file).unlink()
    page = page_of(run)
    for name in page.text:
        assert ("Make it with" in page.section(name)) == (name in sections)
        if name in sections:
            assert page.section(name).endswith(command.format(run=run.path))


def test_columns_that_are_missing_name_their_commands(run: RunFolder) -> None:
    only = metrics()
    only["columns"] = {"torch": column()}
    write_json(run.metrics, only)
    page = page_of(run)
    text = page.section("metrics")
    assert f"edgekit export {run.path}, then edgekit evaluate {run.path}." in text
    assert f"edgekit evaluate {run.path} --bundle dist/pets-1-cpu." in text
    assert "The trained network is right on 70.00 % of 10 validation images." in page.header


def test_an_empty_run_folder_has_a_page_too(tmp_path: Path) -> None:
    page = page_of(RunFolder(tmp_path))
    assert all("Make it with" in page.section(name) for name in page.text)
    assert page.title == tmp_path.name and page.tables == {}


def test_a_run_without_mistakes(run: RunFolder) -> None:
    write_json(run.metrics, metrics())
    assert page_of(run).section("mistakes") == "Worst mistakes None: every validation image is right."


def test_the_same_files_give_the_same_page(run: RunFolder) -> None:
    first = report.write_report(run).read_bytes()
    assert report.write_report(run).read_bytes() == first


def test_no_folder_no_page(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match=r"no run folder at .*: make one with `edgekit finetune DATA`"):
        report.write_report(RunFolder(tmp_path / "none"))
    assert not (tmp_path / "none").exists()


def without_torch() -> dict[str, Any]:
    value = metrics()
    del value["columns"]["torch"]
    return value


def of_fewer_classes() -> dict[str, Any]:
    return {**metrics(), "class_names": ["cat", "dog"]}


@pytest.mark.parametrize(
    ("file", "text", "message"),
    [
        ("metrics.json", "{", "is damaged"),
        ("metrics.json", "{}", r"is not as this edgekit writes it \(images: Field required\): make it again"),
        ("metrics.json", json.dumps(without_torch()), r"\(no column for torch\)"),
        ("metrics.json", json.dumps(of_fewer_classes()), r"\(the figures of torch are not those of 2 classes\)"),
        (
            "parity.json",
            '{"tolerance": "x", "versions": {}, "verdicts": []}',
            r"\(tolerance: Input should be a valid number",
        ),
        ("history.csv", "epoch,phase\n1,head\n", r"history.csv is not as this edgekit writes it \(train_loss"),
    ],
)
def test_a_damaged_file_is_a_message_and_the_old_page_stays(run: RunFolder, file: str, text: str, message: str) -> None:
    before = report.write_report(run).read_bytes()
    (run.path / file).write_text(text, encoding="utf-8")
    with pytest.raises(ArtifactError, match=message):
        report.write_report(run)
    assert run.report.read_bytes() == before
    assert not list(run.path.glob(".report*"))


def test_a_damaged_recipe_is_a_message(run: RunFolder) -> None:
    run.recipe.write_text("name = ", encoding="utf-8")
    with pytest.raises(ConfigError, match="not valid TOML"):
        report.write_report(run)


def test_a_history_that_is_no_text_is_a_message(run: RunFolder) -> None:
    run.history.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ArtifactError, match=r"cannot read .*history\.csv"):
        report.read_history(run.history)
