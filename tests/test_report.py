"""Tables, pictures and the page: the figures that they show are the files' figures, whatever the classes are called."""

import base64
import json
from collections.abc import Callable
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import latencies
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console
from rich.table import Table
from shown import (
    HISTORY,
    HOSTILE,
    NAMES,
    SCORE_BINS,
    bgr,
    box,
    detect_mistake,
    detection,
    grey_png,
    mistake,
    not_ok,
    quantize_record,
    segment_mistake,
    segmentation,
    solid,
    without_times,
)

from edgekit import pictures, quantization_pictures, report, runner
from edgekit.artifacts import RunFolder, write_bytes, write_json, write_text
from edgekit.backbones import LISTED, Backbone
from edgekit.datasets import Dataset, Problem, write_split
from edgekit.errors import ArtifactError, ConfigError
from edgekit.latency import LatencyRun, Subject
from edgekit.latency_files import keep, write_latency_json
from edgekit.recipe import make_recipe, to_toml
from edgekit.report import evaluation, figures
from edgekit.samples import Sample
from edgekit.threads import ThreadSweep, ThreadTime
from edgekit.timing import Timing

# 10 images: 4 cats (one taken for a newt), 3 dogs, 3 newts (two taken for dogs)
CONFUSION = [[3, 0, 1], [0, 3, 0], [0, 2, 1]]


def column(names: tuple[str, ...] = NAMES, **changes: Any) -> dict[str, Any]:
    figures = ((1.0, 0.75, 6 / 7), (0.6, 1.0, 0.75), (0.5, 1 / 3, 0.4))
    rows = [
        {"label": name, "support": sum(CONFUSION[i]), "precision": p, "recall": r, "f1": f}
        for i, (name, (p, r, f)) in enumerate(zip(names, figures, strict=True))
    ]
    base = {"top1": 0.7, "top5": None, "macro_f1": 0.669, "agreement": 1.0, "images_per_second": 118.3}
    base |= {"calibration_error": 0.12, "score_bins": SCORE_BINS}
    return {**base, "per_class": rows, "confusion": CONFUSION, **changes}


def metrics(names: tuple[str, ...] = NAMES, mistakes: list[dict[str, Any]] | None = None) -> dict[str, Any]:
    return {
        "task": "classify",
        "subset": "val",
        "images": 10,
        "class_names": list(names),
        "columns": {
            "torch": column(names),
            "onnx": column(names, images_per_second=64.25),
            "bundle": column(names, top1=0.6, agreement=0.9, images_per_second=41.7),
        },
        "mistakes": mistakes or [],
        "conditions": {"cpu": "A CPU @ 2 GHz", "device": "cpu", "torch": "2.15.0"},
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
        ["calibration error", "12.00 %", "12.00 %", "12.00 %"],
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
        "| calibration error | 12.00 % | 12.00 % | 12.00 % |\n"
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


DETECTED = [
    ["", "torch", "onnx", "bundle"],
    ["mAP@0.5", "62.50 %", "62.50 %", "61.23 %"],
    ["mAP (COCO)", "37.50 %", "37.50 %", "37.50 %"],
    ["mAP@0.75", "33.33 %", "33.33 %", "33.33 %"],
    ["agreement with torch", "100.00 %", "100.00 %", "99.80 %"],
    ["images/s", "31.2", "31.2", "31.2"],
]
DETECTED_CLASSES = [
    ["class", "boxes", "AP@0.5", "AP (COCO)", "precision", "recall", "F1"],
    ["cat", "12", "75.00 %", "50.00 %", "87.50 %", "80.00 %", "83.58 %"],
    ["dog", "5", "50.00 %", "25.00 %", "62.50 %", "60.00 %", "61.22 %"],
    ["newt", "0", "-", "-", "0.00 %", "0.00 %", "0.00 %"],
]
SEGMENTED = [
    ["", "torch", "bundle"],
    ["mean IoU", "65.51 %", "65.51 %"],
    ["pixel accuracy", "93.75 %", "93.75 %"],
    ["agreement with torch", "100.00 %", "99.99 %"],
    ["images/s", "9.5", "9.5"],
]
SEGMENTED_CLASSES = [
    ["class", "pixels", "IoU", "precision", "recall", "F1", "most often taken for"],
    ["cat", "95.00 %", "93.51 %", "98.63 %", "94.74 %", "96.65 %", "dog (5.26 %)"],
    ["dog", "5.00 %", "37.50 %", "42.86 %", "75.00 %", "54.55 %", "cat (25.00 %)"],
    ["newt", "0.00 %", "-", "0.00 %", "0.00 %", "0.00 %", "-"],
]


def test_tables_of_a_detection() -> None:
    assert cells(report.metrics_table(detection())) == DETECTED
    assert cells(report.per_class_table(detection())) == DETECTED_CLASSES
    assert printed(report.metrics_table(detection())).startswith("87 validation images")
    assert report.markdown_metrics(detection()).splitlines()[2] == "| mAP@0.5 | 62.50 % | 62.50 % | 61.23 % |"


def test_tables_of_a_segmentation() -> None:
    assert cells(report.metrics_table(segmentation())) == SEGMENTED
    assert cells(report.per_class_table(segmentation())) == SEGMENTED_CLASSES
    assert printed(report.metrics_table(segmentation())).startswith("72 test images")
    assert [column.justify for column in report.per_class_table(segmentation()).columns][-2:] == ["right", "left"]


def test_the_tables_of_classes_fit_into_80_characters() -> None:
    names = ("background", "scratch", "discoloured")
    for evaluated in (detection((), names), segmentation((), names)):
        console = Console(width=80)
        with console.capture() as capture:
            console.print(report.per_class_table(evaluated))
        lines = [line for line in capture.get().splitlines() if line.strip()]
        assert len(lines) == 5 and max(map(len, lines)) <= 80, "a header, a rule, a line a class"


def test_a_segmentation_without_labelled_pixels_has_tables_too() -> None:
    empty = segmentation()
    for row in empty["columns"]["torch"]["per_class"]:
        row |= {"pixels": 0, "iou": None}
    empty["columns"]["torch"]["confusion"] = [[0] * 3] * 3
    assert [row[1:3] for row in cells(report.per_class_table(empty))[1:]] == [["0.00 %", "-"]] * 3


@pytest.mark.parametrize("names", [NAMES, HOSTILE])
def test_class_names_of_every_task_are_text(names: tuple[str, ...]) -> None:
    for evaluated in (metrics(names), detection((), names), segmentation((), names)):
        assert [row[0] for row in cells(report.per_class_table(evaluated))[1:]] == list(names)


@pytest.mark.parametrize(
    ("evaluated", "columns", "sentence"),
    [
        (metrics(), 3, "The bundle gives the trained network's answer on 9 of 10 validation images."),
        (metrics(), 2, "The exported model gives the trained network's answer on 10 of 10 validation images."),
        (metrics() | {"subset": "test"}, 1, "The trained network is right on 70.00 % of 10 test images."),
        (detection(), 3, "The bundle's boxes agree with the trained network's to 99.80 % on 87 validation images."),
        (detection(), 1, "The trained network has a mAP@0.5 of 62.50 % on 87 validation images."),
        (segmentation(), 2, "The bundle gives the trained network's class to 99.99 % of the pixels of 72 test images."),
        (segmentation(), 1, "The trained network has a mean IoU of 65.51 % on 72 test images."),
    ],
)
def test_the_first_sentence_is_of_the_last_column(evaluated: dict[str, Any], columns: int, sentence: str) -> None:
    kept = dict(list(evaluated["columns"].items())[:columns])
    assert evaluation.verdict({**evaluated, "columns": kept}) == sentence


@pytest.mark.parametrize(
    ("metric", "agrees"),
    [
        ("top-1", "share of images with fp32's answer"),
        ("mAP@0.5", "share of boxes that fp32 has too"),
        ("mean IoU", "share of pixels with fp32's class"),
    ],
)
def test_quantize_table_says_what_agrees_by_the_metric(metric: str, agrees: str) -> None:
    table = report.quantize_table(quantize_record(engines=1) | {"metric": metric})
    assert f"agrees: {agrees}; ms:" in str(table.caption) and cells(table)[0][3] == metric


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


QUANTIZED = [
    ["variant", "size", "OpenCV", "top-1", "drop", "agrees", "ms", "time"],
    ["fp32", "13.6 MB", "4.14.0 openvino", "99.03 %", "0.00", "100.00 %", "8.90", "1.00"],
    ["fp32", "13.6 MB", "4.14.0 classic", "99.03 %", "0.00", "100.00 %", "14.2", "1.00"],
    ["int8-weights", "3.7 MB (3.7x)", "4.14.0 openvino", "99.27 %", "-0.24", "99.76 %", "11.7", "1.31"],
    ["int8-weights", "3.7 MB (3.7x)", "4.14.0 classic", "99.03 %", "0.00", "99.76 %", "17.6", "1.24"],
    ["int8", "3.6 MB (3.8x)", "4.14.0 openvino", "95.87 %", "3.16", "96.36 %", "3.83", "0.43"],
    ["int8", "3.6 MB (3.8x)", "4.14.0 classic", "95.63 %", "3.40", "96.36 %", "7.23", "0.51"],
    ["int8-mixed *", "4.3 MB (3.2x)", "4.14.0 openvino", "98.54 %", "0.49", "99.27 %", "4.36", "0.49"],
    ["int8-mixed *", "4.3 MB (3.2x)", "4.14.0 classic", "98.30 %", "0.73", "99.27 %", "8.03", "0.57"],
]


def test_quantize_table() -> None:
    table = report.quantize_table(quantize_record(engines=2))
    assert cells(table) == QUANTIZED
    assert printed(table).startswith("412 validation images")
    assert str(table.caption) == (
        "* a bundle for openvino gets it; drop: points of top-1 lost against fp32 on the same engine (-0.12: gained), "
        "1.00 allowed; agrees: share of images with fp32's answer; ms: median of the forward pass; time: ms / fp32's ms"
    )


def test_quantize_table_marks_fp32_where_that_is_shipped() -> None:
    rows = cells(report.quantize_table(quantize_record(("fp32", "int8"), 1, "fp32")))
    assert [row[0] for row in rows] == ["variant", "fp32 *", "int8"]


def test_quantize_table_says_what_went_wrong() -> None:
    record = quantize_record(("fp32", "int8"), engines=2)
    openvino, classic = record["variants"][1]["figures"]
    openvino |= {"median_ms": None, "time_ratio": None}
    not_ok(classic, "not proved", "no OpenCV\n  4.14.0 here")
    table = report.quantize_table(record)
    assert cells(table)[3:] == [
        ["int8 *", "3.6 MB (3.8x)", "4.14.0 openvino", "95.87 %", "3.16", "96.36 %", "-", "-"],
        ["int8 *", "3.6 MB (3.8x)", "4.14.0 classic", "not proved", "-", "-", "-", "-"],
    ]
    assert [cell.style for cell in table.columns[3].cells][2:] == ["", "bold red"]  # type: ignore[union-attr]
    first = str(table.caption).splitlines()[0]
    assert first == "int8 on 4.14.0 classic, not proved: no OpenCV 4.14.0 here"


def test_quantize_table_fits_into_80_characters() -> None:
    console = Console(width=80)
    with console.capture() as capture:
        console.print(report.quantize_table(quantize_record(("fp32", "int8-weights", "int8"), 4, "int8-weights")))
    lines = capture.get().splitlines()
    assert max(map(len, lines)) <= 80
    assert len([line for line in lines if line.startswith(" int8-weights * 3.7 MB (3.7x)")]) == 4, "nothing is folded"
    assert len([line for line in lines if line.startswith((" fp32", " int8"))]) == 12


def test_an_engines_text_is_not_read_as_markup() -> None:
    record = quantize_record(("fp32", "int8"), engines=1) | {"metric": "[bold]top", "target": "[red]x"}
    not_ok(record["variants"][1]["figures"][0], "raised", "[/] closes [nothing]")
    record["variants"][1]["figures"][0]["engine"] = "[red]"
    table = report.quantize_table(record)
    assert cells(table)[0][3] == "[bold]top" and cells(table)[2][2] == "4.14.0 [red]"
    text = " ".join(printed(table).split())
    assert "[bold]top" in text and "int8 on 4.14.0 [red], raised: [/] closes [nothing]" in text
    assert "a bundle for [red]x gets it" in text


@pytest.mark.parametrize(
    ("drop", "shown"), [(0.0, "0.00"), (-0.001, "0.00"), (-0.12, "-0.12"), (0.24, "0.24"), (64.125, "64.12")]
)
def test_points_are_of_what_was_lost(drop: float, shown: str) -> None:
    assert figures.points(drop) == shown


@pytest.mark.parametrize(
    ("ms", "shown"), [(None, "-"), (0.912, "0.912"), (9.994, "9.99"), (9.996, "10.0"), (105.25, "105")]
)
def test_milliseconds(ms: float | None, shown: str) -> None:
    assert figures.milliseconds(ms) == shown


SEARCHED = [
    ["layers in fp32", "drop", "time", "the last one", "SQNR, dB"],
    ["0", "3.10", "0.42", "-", "-"],
    ["1", "1.40", "0.45", "node_Conv_774", "9.2"],
    ["2 *", "0.70", "0.49", "node_Conv_865", "13.5"],
]


def test_float_layers_table() -> None:
    table = report.float_layers_table(quantize_record())
    assert table is not None and cells(table) == SEARCHED


def test_float_layers_table_without_times_and_sensitivities() -> None:
    record = without_times(quantize_record()) | {"sensitivity": [], "precision": "fp32"}
    table = report.float_layers_table(record)
    assert table is not None
    assert [row[2:] for row in cells(table)[1:]] == [
        ["-", "-", "-"],
        ["-", "node_Conv_774", "-"],
        ["-", "node_Conv_865", "-"],
    ]
    assert [row[0] for row in cells(table)[1:]] == ["0", "1", "2"], "none is shipped"


def test_there_is_no_float_layers_table_where_int8_needed_no_search() -> None:
    assert report.float_layers_table(quantize_record(("fp32", "int8"))) is None


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
    sizes = dict.fromkeys(("torch", "onnx", "bundle"), 13_600_000)
    for evaluated, figure in ((detection(), "mAP@0.5"), (segmentation(), "mean IoU")):
        rows = cells(report.demo_table(evaluated, sizes, latency))
        assert [row[0] for row in rows] == ["", figure, "agreement with torch", "size", "median latency, one image"]


WIDE, NARROW = 200, 60
ROWS = [
    Backbone(
        "small",
        1_549_000,
        24_560_000,
        (96, 128),
        "mit",
        recommended=True,
        note="tiny",
        imagenet_top1=57.951,
        opencv=("4.6", "4.10"),
    ),
    Backbone("large", 99_960_000, 4_089_000_000, (224, 224), ""),
]
RAN = Timing(12.345, 80, "new", "5.0.0", 2, "A CPU", "")
FAILED = Timing(None, 0, "", "5.0.0", 0, "A CPU", "new engine: the process ended with signal 11")


def test_backbones_table() -> None:
    assert cells(report.backbones_table(ROWS, {}, WIDE)) == [
        ["backbone", "params", "MACs", "input", "top-1", "OpenCV", "licence", "note"],
        ["small *", "1.5 M", "24.6 M", "128", "58.0 %", "4.6 4.10", "mit", "tiny"],
        ["large", "100 M", "4.1 G", "224", "-", "-", "-", ""],
    ]


def test_backbones_table_with_latencies() -> None:
    table = report.backbones_table(ROWS, {"large": FAILED, "small": RAN}, WIDE)
    assert [row[4:7] for row in cells(table)] == [
        ["top-1", "latency", "OpenCV"],
        ["58.0 %", "12.3 ms", "4.6 4.10"],
        ["-", "failed", "-"],
    ]
    assert [cell.style for cell in table.columns[5].cells] == ["", "bold red"]  # type: ignore[union-attr]


def test_backbones_table_of_a_narrow_terminal_keeps_what_matters() -> None:
    assert cells(report.backbones_table(ROWS, {"large": FAILED, "small": RAN}, NARROW))[:2] == [
        ["backbone", "params", "MACs", "top-1", "latency", "OpenCV", "licence"],
        ["small *", "1.5 M", "24.6 M", "58.0 %", "12.3 ms", "4.6 4.10", "mit"],
    ]


@pytest.mark.parametrize("width", [80, 120])
@pytest.mark.parametrize("timings", [{}, dict.fromkeys(LISTED, RAN)], ids=["", "measured"])
def test_backbones_table_fits(width: int, timings: dict[str, Timing]) -> None:
    """No line is wider than the terminal, and no name or figure is broken or cut."""
    proved = ("4.6", "4.10", "4.14", "5.0")
    rows = [replace(row, opencv=proved) for row in LISTED.values()]
    console = Console(width=width)
    with console.capture() as capture:
        console.print(report.backbones_table(rows, timings, width))
    lines = capture.get().splitlines()
    assert max(map(len, lines)) <= width
    first = [line.split()[0] for line in lines if line[1:2].strip() and line.split()[0] in LISTED]
    assert first == list(LISTED)
    assert "…" not in capture.get()


@pytest.mark.parametrize(
    ("count", "shown"),
    [
        (1_234_000, "1.2 M"),
        (99_940_000, "99.9 M"),
        (99_960_000, "100 M"),
        (999_400_000, "999 M"),
        (999_600_000, "1.0 G"),
        (4_089_184_256, "4.1 G"),
    ],
)
def test_backbones_table_counts_in_millions(count: int, shown: str) -> None:
    assert figures.millions(count) == shown


def latency_run(**changes: Any) -> LatencyRun:
    fields: dict[str, Any] = {
        "subject": Subject(
            name="digits",
            target="cpu",
            precision="int8",
            bundle_sha256="0",
            git_revision=None,
            measured_at="2026-01-01T00:00:00+00:00",
            device="pi@board",
        ),
        "samples_ms": {
            "decode": tuple(index / 100 for index in range(1, 102)),
            "forward": (12.0,) * 662,
            "end_to_end": (13.25, 13.5, 13.75),
        },
        "import_ms": (300.0, 210.0, 190.0),
        "load_ms": (12.4,),
        "first_ms": (30.0, 31.0),
        "images_per_second": 75.37,
        "floor_rss_bytes": 57_000_000,
        "peak_rss_bytes": 106_692_608,
        "conditions": {
            "opencv": "5.0.0",
            "engine": "new",
            "backend": "opencv/cpu",
            "precision": "int8",
            "threads": 4,
            "cores": 4,
            "cpu": "Raspberry Pi 4 Model B",
        },
    }
    return latencies.run(**{**fields, **changes})


def test_latency_table_has_a_row_a_stage_and_no_percentile_from_too_few_samples() -> None:
    assert cells(report.latency_table(latency_run())) == [
        ["ms", "p50", "p90", "p99"],
        ["decode", "0.510", "0.910", "-"],
        ["forward", "12.0", "12.0", "12.0"],
        ["end to end", "13.5", "-", "-"],
    ]


def test_latency_lines_say_the_rest() -> None:
    assert report.latency_lines(latency_run()) == [
        "import 210 ms, load 12 ms, first image 30 ms (medians of 2 processes)",
        "3 images one by one; 75.4 images/s with decoding beside",
        "memory: 106.7 MB at most, 49.7 MB over Python and OpenCV alone",
        "digits for cpu (int8) on pi@board: Raspberry Pi 4 Model B",
        "OpenCV 5.0.0, new engine, opencv/cpu, int8, threads: 4, cores: 4",
    ]
    told = report.latency_lines(latency_run(peak_rss_bytes=None, floor_rss_bytes=None, energy_mj=82.25))
    assert [line for line in told if line.startswith(("memory", "energy"))] == [
        "energy: 82.2 mJ an image, the whole board"
    ]


def test_threads_table_says_which_count_is_taken() -> None:
    rows = (ThreadTime(1, 7.1234, 1.9), ThreadTime(2, 3.8, 1.0149), ThreadTime(4, 3.75, 1.0))
    assert cells(report.threads_table(ThreadSweep(2, rows, 12, {}))) == [
        ["threads", "p50, ms", "to the fastest", ""],
        ["1", "7.12", "1.900", ""],
        ["2", "3.80", "1.015", "taken: the fewest within 2 %"],
        ["4", "3.75", "1.000", ""],
    ]
    assert "taken: the fewest within 2 %" in printed(report.threads_table(ThreadSweep(2, rows, 12, {})))


def test_comparison_table_has_a_row_a_gate() -> None:
    two = latencies.comparison(
        latencies.case(),
        latencies.case("INCONCLUSIVE", name="decode", low=None, high=None, base_ms=(), candidate_ms=(), change=None),
    )
    assert cells(report.comparison_table(two)) == [
        ["", "baseline", "candidate", "change", "99 % sure within", "wall time", "verdict"],
        ["answer", "10.2 ms", "11.5 ms", "+10.0 %", "+8.0 % to +12.5 %", "+11.0 %", "FAIL"],
        ["decode", "-", "-", "-", "-", "+11.0 %", "INCONCLUSIVE"],
    ]
    one = latencies.comparison(latencies.case(), clock="wall")
    assert cells(report.comparison_table(one)) == [
        ["", "baseline", "candidate", "change", "99 % sure within", "CPU time"],
        ["answer", "10.2 ms", "11.5 ms", "+10.0 %", "+8.0 % to +12.5 %", "+11.0 %"],
    ]
    assert "wall time: digits-cpu against digits-cpu" in printed(report.comparison_table(one))


def test_comparison_lines_say_how_much_was_measured_and_where() -> None:
    found = latencies.comparison(
        latencies.case(), rejected=("it got warmer", "it got warmer"), workload=("2 more Transpose (0 → 2)",)
    )
    assert report.comparison_lines(found) == [
        "3 pairs of processes in 30 s",
        "not counted: it got warmer",
        "OpenCV 5.0.0, new engine, opencv/cpu, threads: 1, A CPU",
        "in the graph: 2 more Transpose (0 → 2)",
    ]
    nothing = latencies.comparison(latencies.case("INCONCLUSIVE"), blocks=0, rejected=("hot",), conditions=({}, {}))
    assert report.comparison_lines(nothing) == ["not counted: hot"]


# The page


class Page(HTMLParser):
    """What a reader and a browser meet: tags, addresses, and each section's text and table cells."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.addresses: list[str] = []
        self.alts: list[str] = []
        self.title = self.header = ""
        self.text: dict[str, str] = {}
        self.tables: dict[str, list[list[str]]] = {}
        self.headings: list[str] = []
        self._section, self._open = "", [""]
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.addresses += [value or "" for key, value in attrs if key in ("src", "href", "srcset", "action", "data")]
        self.alts += [value or "" for key, value in attrs if key == "alt"]
        if tag not in ("meta", "img", "source", "br"):
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
    write_json(run.quantization, quantize_record(engines=2) | {"onnx_sha256": runner.file_sha256(run.onnx)})
    keep(latency_run(), run)
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
        "Scores",
        "Worst mistakes",
        "Export parity",
        "Quantization",
        "Latency",
        "How it was made",
        "Conditions",
    ]
    assert page.tables == {
        "metrics": cells(report.metrics_table(metrics())),
        "classes": cells(report.per_class_table(metrics())),
        "parity": cells(report.parity_table(PARITY)),
        "quantization": QUANTIZED + SEARCHED,
        "latency": cells(report.latency_table(latency_run())),
    }
    assert page.section("summary") == (
        "Summary 70.00 %top-1, torch 70.00 %top-1, onnx 60.00 %top-1, bundle 10val images 3classes "
        "int8-mixedprecision, openvino 13.5 msan image, cpu, pi@board 2.3 MBmodel.onnx "
        "Taskclassify Backbonetf_efficientnet_lite0 Started frompublished ImageNet weights Datapets <b> "
        "Images3 for training, 1 for validation Network input96x128 px (height x width), stretch, linear interpolation "
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
        "Evaluated withcpu A CPU @ 2 GHz, device cpu, torch 2.15.0 "
        "Exported withtorch 2.15.0, onnx 1.23.0 "
        "Proved withonnxruntime 1.32.0, opencv-new 5.0.0, opencv-classic 5.0.0 "
        "Quantized with200 calibration images, method mse "
        "Quantized models measured withcpu A CPU @ 2 GHz, threads 1, onnxruntime 1.32.0 "
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
    assert ["summary", *links(page)] == list(page.text)


def test_the_pages_pictures_come_in_both_themes(run: RunFolder) -> None:
    addresses = [address for address in page_of(run).addresses if address.startswith("data:image/")]
    images = [runner.decode(base64.b64decode(address.split(",", 1)[1])) for address in addresses]
    surfaces = [tuple(image[0, 0]) for image in images]
    dark, light = (bgr(pictures.THEMES[theme].surface) for theme in ("dark", "light"))
    # curves, confusion, scores: the dark source first, then the light image; then the one mistake whose image is there;
    # then quantization, and its search
    assert surfaces[:6] == [dark, light] * 3 and surfaces[7:] == [dark, light] * 2
    assert images[6].shape == (96, 96, 3) and np.abs(images[6].astype(int) - (0, 0, 255)).max() < 12
    assert [image.shape for image in images[7:]] == [
        runner.decode(picture(quantize_record(engines=2), theme)).shape
        for picture in (quantization_pictures.quantization_picture, quantization_pictures.sensitivity_picture)
        for theme in ("dark", "light")
    ]


def detect_run(folder: Path, names: tuple[str, ...] = NAMES) -> RunFolder:
    """The same run folder, of a detection with two mistakes: the photo of the second is gone."""
    run = make_run(folder, names)
    photo = solid(folder / "photos" / "a.png", PHOTO, height=40, width=80)
    mistakes = [detect_mistake(path, names) for path in (photo, folder / "gone.png")]
    write_json(run.metrics, detection(mistakes, names))
    write_text(run.history, HISTORY.replace("top-1", "mAP@0.5"))
    return run


def segment_run(folder: Path, names: tuple[str, ...] = NAMES) -> RunFolder:
    """The same run folder, of a segmentation with two mistakes: the mask of the second is gone."""
    run = make_run(folder, names)
    photo = solid(folder / "photos" / "a.png", PHOTO)
    found = np.zeros((40, 40), np.uint8)
    found[10:30, 10:25] = 1
    mask = grey_png(folder / "masks" / "a.png", 100 * np.roll(found, 5, axis=1))
    mistakes = [segment_mistake(photo, path, found, names) for path in (mask, folder / "gone.png")]
    write_json(run.metrics, segmentation(mistakes, names))
    write_text(run.history, HISTORY.replace("top-1", "mean IoU"))
    return run


PHOTO = (90, 110, 130)


def links(page: Page) -> list[str]:
    """The sections that the page leads to, in order."""
    return [address[1:] for address in page.addresses if address.startswith("#")]


def drawn_share(page: Page, size: tuple[int, int]) -> float:
    """Of the page's only drawn mistake, of `size` (height, width): the share of it that is not the plain photo."""
    (address,) = [address for address in page.addresses if address.startswith("data:image/jpeg")]
    image = runner.decode(base64.b64decode(address.split(",", 1)[1])).astype(int)
    assert image.shape[:2] == size
    return float((np.abs(image - PHOTO).max(axis=2) > 40).mean())


def test_the_page_of_a_detection(tmp_path: Path) -> None:
    page = page_of(detect_run(tmp_path / "cells"))
    assert page.headings[4:6] == ["Precision and recall", "Worst mistakes"] and "confusion" not in page.text
    assert page.tables["metrics"] == DETECTED and page.tables["classes"] == DETECTED_CLASSES
    assert "The bundle's boxes agree with the trained network's to 99.80 % on 87 validation images." in page.header
    assert "62.50 %mAP@0.5, torch 62.50 %mAP@0.5, onnx 61.23 %mAP@0.5, bundle 87val images" in page.section("summary")
    assert "Each column answers for the same 87 validation images. Agreement is the share of boxes" in page.section(
        "metrics"
    )
    assert "a score of at least 0.42, where F1 over all classes is best" in page.section("classes")
    assert page.section("mistakes").startswith(
        "Worst mistakes 2 missed, 1 falsemissed: cat, dogfalse: newtphotos/a.png "
        "the image is not there any more 2 missed, 1 falsemissed: cat, dogfalse: newtcells/gone.png Dashed: true boxes"
    )
    assert "solid: the answers with a score of at least 0.42." in page.section("mistakes")
    assert page.alts[:3] == [
        "Training and validation loss, and validation mAP@0.5, by epoch",
        "Precision against recall at an IoU of 0.5, a line a class",
        "photos/a.png: true boxes and answers, 2 missed, 1 false",
    ]
    assert ["summary", *links(page)] == list(page.text)
    assert 0.05 < drawn_share(page, (240, 480)) < 0.3, "lines"


def test_the_page_of_a_segmentation(tmp_path: Path) -> None:
    page = page_of(segment_run(tmp_path / "tiles"))
    assert page.headings[4:6] == ["Confusion matrix", "Worst mistakes"] and "precision" not in page.text
    assert page.tables["metrics"] == SEGMENTED and page.tables["classes"] == SEGMENTED_CLASSES
    assert "The bundle gives the trained network's class to 99.99 % of the pixels of 72 test images." in page.header
    assert "65.51 %mean IoU, torch 65.51 %mean IoU, bundle 72test images" in page.section("summary")
    assert "Agreement is the share of their pixels with torch's class." in page.section("metrics")
    assert page.section("mistakes").startswith(
        "Worst mistakes IoU 0.43photos/a.png the image is not there any more IoU 0.43photos/a.png A line runs around"
    )
    assert page.section("mistakes").endswith("dog newt"), "the colours' classes: all but the first"
    assert page.alts[:3] == [
        "Training and validation loss, and validation mean IoU, by epoch",
        "Confusion matrix of the pixels: true classes in rows, predicted classes in columns",
        "photos/a.png: true region and answer, IoU 0.43",
    ]
    assert ["summary", *links(page)] == list(page.text)
    assert 0.15 < drawn_share(page, (480, 480)) < 0.3, "the answer is 300 of 1600 pixels, and there is a line"


@pytest.mark.parametrize("make", [detect_run, segment_run])
def test_hostile_names_of_every_task_are_text(tmp_path: Path, make: Callable[..., RunFolder]) -> None:
    plain = page_of(make(tmp_path / "plain"))
    page = page_of(make(tmp_path / "<b>bold & run", HOSTILE))
    assert page.tags == plain.tags, "no tag is a class name's"
    assert [row[0] for row in page.tables["classes"][1:]] == list(HOSTILE)
    assert HOSTILE[2] in page.section("mistakes")


@pytest.mark.parametrize(
    ("evaluated", "text"),
    [(detection(), "every box is found, none is false."), (segmentation(), "every pixel of the test images is right.")],
)
def test_a_run_without_mistakes_of_every_task(run: RunFolder, evaluated: dict[str, Any], text: str) -> None:
    write_json(run.metrics, evaluated)
    assert page_of(run).section("mistakes") == f"Worst mistakes None: {text}"


def test_a_detection_that_is_not_evaluated_yet_has_its_own_sections(run: RunFolder) -> None:
    run.metrics.unlink()
    recipe = make_recipe({"name": "cells", "task": "detect", "data": {"path": "cells"}})
    write_text(run.recipe, to_toml(recipe))
    page = page_of(run)
    assert page.section("precision").endswith(f"Make it with edgekit evaluate {run.path}.")
    assert "confusion" not in page.text and "#precision" in page.addresses


def test_hostile_names_are_text(tmp_path: Path) -> None:
    run = make_run(tmp_path / "<b>bold & run", HOSTILE)
    page = page_of(run)
    assert page.title == "<b>bold & run"
    assert [row[0] for row in page.tables["classes"][1:]] == list(HOSTILE)
    assert "script" not in page.tags
    assert page.tags.count("img") == 6, "five pictures and a mistake, no image of a class name's"
    assert f"{HOSTILE[2]} → {HOSTILE[1]} 87.50 %" in page.section("mistakes")


def test_the_page_says_why_a_precision_is_shipped(run: RunFolder) -> None:
    text = page_of(run).section("quantization")
    record = quantize_record(engines=2)
    assert text.startswith(f"Quantization {record['why']} variant")
    assert str(report.quantize_table(record).caption) in text
    assert "another model.onnx" not in text


def test_the_page_says_that_the_figures_are_of_another_model(run: RunFolder) -> None:
    write_bytes(run.onnx, b"exported again")
    text = page_of(run).section("quantization")
    assert f"of another model.onnx than the run's. Make them again with edgekit quantize {run.path}." in text


def test_the_pages_quantization_without_search_and_without_anything_that_ran(run: RunFolder) -> None:
    record = quantize_record(("fp32", "int8"), engines=1, precision="fp32")
    write_json(run.quantization, record)
    page = page_of(run)
    assert "Layers left in fp32" not in page.section("quantization") and page.tags.count("picture") == 4
    for variant in record["variants"]:
        not_ok(variant["figures"][0], "timed out", "took <b>60 s</b>")
    write_json(run.quantization, record)
    bold, page = page.tags.count("b"), page_of(run)
    assert page.tags.count("picture") == 3 and page.tags.count("b") == bold
    assert "int8 on 4.14.0 openvino, timed out: took <b>60 s</b>" in page.section("quantization")


def test_the_page_shows_the_latency_on_each_device(run: RunFolder) -> None:
    subject = latencies.subject(device="pi@board/<b>", target="rpi5")
    slow = latencies.run(scale=2.0, subject=subject, conditions={}, warnings=("unstable: <b>",))
    assert keep(slow, run) == run.latency / "rpi5-pi@board__b_.json"
    page = page_of(run)
    assert page.tables["latency"] == [*cells(report.latency_table(latency_run())), *cells(report.latency_table(slow))]
    text = page.section("latency")
    assert text.startswith("Latency cpu on pi@board, 2026-01-01 ms") and "rpi5 on pi@board/<b>, 2026-01-02" in text
    assert text.count("doubtful: ") == text.count("doubtful: unstable: <b>") == 1
    for line in (*report.latency_lines(latency_run()), *report.latency_lines(slow)):
        assert line in text
    assert "10.8 msan image, rpi5, pi@board/<b>" in page.section("summary")
    assert keep(latency_run(images_per_second=1.5), run) == run.latency / "cpu-pi@board.json"
    assert len(page_of(run).tables["latency"]) == len(page.tables["latency"]), "the newer one takes its place"


def test_a_comparison_is_no_latency_of_a_run(run: RunFolder) -> None:
    write_latency_json(run.latency / "gate.json", latencies.comparison(latencies.case()))
    with pytest.raises(ArtifactError, match=r"gate.json is not what `edgekit bench --run` writes: take it away"):
        report.write_report(run)


def test_hostile_quantization_is_text(run: RunFolder) -> None:
    record: dict[str, Any] = quantize_record(engines=1) | {
        "why": HOSTILE[0],
        "metric": HOSTILE[1],
        "target": HOSTILE[2],
    }
    for variant in record["variants"]:
        variant["figures"][0]["engine"] = HOSTILE[1]
    record["curve"][1]["last"] = HOSTILE[0]
    images = page_of(run).tags.count("img")
    write_json(run.quantization, record)
    page = page_of(run)
    assert "script" not in page.tags and page.tags.count("img") == images
    assert page.tables["quantization"][0][3] == HOSTILE[1]
    assert page.tables["quantization"][1][2] == f"4.14.0 {HOSTILE[1]}"
    assert page.section("quantization").startswith(f"Quantization {HOSTILE[0]}")
    assert HOSTILE[2] in page.section("summary")


@pytest.mark.parametrize(
    ("file", "sections", "command"),
    [
        ("metrics.json", ("metrics", "classes", "confusion", "mistakes"), "edgekit evaluate {run}."),
        ("parity.json", ("parity",), "edgekit export {run}."),
        ("history.csv", ("curves",), "edgekit finetune DATA."),
        ("quantize.json", ("quantization",), "edgekit quantize {run}."),
        ("latency/cpu-pi@board.json", ("latency",), "edgekit bench dist/pets-1-cpu --run {run}."),
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


def without_scores(value: dict[str, Any]) -> dict[str, Any]:
    """metrics.json as it was before it had a calibration error."""
    for row in value["columns"].values():
        del row["calibration_error"], row["score_bins"]
    return value


def test_metrics_of_before_have_no_scores(run: RunFolder) -> None:
    before = without_scores(metrics())
    assert cells(report.metrics_table(before))[4] == ["calibration error", "-", "-", "-"]
    write_json(run.metrics, before)
    page = page_of(run)
    assert page.tables["metrics"] == cells(report.metrics_table(before))
    assert "Scores" not in page.headings and "#scores" not in page.addresses
    assert ["summary", *links(page)] == list(page.text)


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


@pytest.mark.parametrize("variants", [("fp32", "int8-weights", "int8", "int8-mixed"), ("fp32", "int8-mixed")])
def test_read_quantization_keeps_what_is_shown(tmp_path: Path, variants: tuple[str, ...]) -> None:
    record = quantize_record(variants)
    write_json(tmp_path / "quantize.json", record)
    read = report.read_quantization(tmp_path / "quantize.json")
    assert cells(report.quantize_table(read)) == cells(report.quantize_table(record))
    assert quantization_pictures.quantization_picture(read) == quantization_pictures.quantization_picture(record)
    assert quantization_pictures.sensitivity_picture(read) == quantization_pictures.sensitivity_picture(record)


def of_a_figure(**changes: Any) -> dict[str, Any]:
    record = quantize_record()
    record["variants"][1]["figures"][0] |= changes
    return record


@pytest.mark.parametrize(
    ("record", "message"),
    [
        (quantize_record() | {"variants": []}, "fp32 is not the first variant"),
        (quantize_record(("int8", "fp32")), "fp32 is not the first variant"),
        (quantize_record(engines=0), r"variants\.0\.figures: Tuple should have at least 1 item"),
        (quantize_record(precision="int4"), "precision: Input should be 'fp32', 'int8' or 'int8-weights'"),
        (quantize_record(("fp32", "int8"), precision="int8-weights"), "no variant for the precision int8-weights"),
        (of_a_figure(metric=99.03), r"variants\.1\.figures\.0\.metric: Input should be less than or equal to 1"),
        (of_a_figure(agreement=-0.1), r"\.agreement: Input should be greater than or equal to 0"),
        (of_a_figure(median_ms=0), r"\.median_ms: Input should be greater than 0"),
        (of_a_figure(time_ratio=float("inf")), r"\.time_ratio: Input should be a finite number"),
        (of_a_figure(status="fine"), r"\.status: Input should be 'ok', 'wrong'"),
        (of_a_figure(drop=None), r"figures\.0: no figures for openvino of OpenCV 4\.14\.0, which is ok"),
    ],
)
def test_a_quantization_of_another_version_is_a_message(tmp_path: Path, record: dict[str, Any], message: str) -> None:
    write_json(tmp_path / "quantize.json", record)
    with pytest.raises(ArtifactError, match=rf"quantize.json is not as this edgekit writes it \(.*{message}.*make it"):
        report.read_quantization(tmp_path / "quantize.json")


def test_the_run_folder_names_the_files_of_quantize() -> None:
    run = RunFolder(Path("runs/a"))
    names = [path.relative_to("runs/a").as_posix() for path in (run.quantization, run.int8, run.int8_weights)]
    assert names == ["quantize.json", "model.int8.onnx", "model.int8-weights.onnx"]


def without_torch() -> dict[str, Any]:
    value = metrics()
    del value["columns"]["torch"]
    return value


def of_fewer_classes() -> dict[str, Any]:
    return {**metrics(), "class_names": ["cat", "dog"]}


def changed(evaluated: dict[str, Any], **figures: Any) -> str:
    """metrics.json with other figures of torch."""
    evaluated["columns"] = {"torch": {**evaluated["columns"]["torch"], **figures}}
    return json.dumps(evaluated)


def with_mistake(evaluated: dict[str, Any], made: dict[str, Any], **changes: Any) -> str:
    return json.dumps({**evaluated, "mistakes": [{**made, **changes}]})


FOUND = np.zeros((4, 5), np.uint8)
MISSED = detect_mistake(Path("a.png"))
TORN = segment_mistake(Path("a.png"), Path("b.png"), FOUND)
SHORT = [{**TORN["answers"][0], "mask": {"size": [4, 5], "counts": [0, 19]}}]
OF_AN_OTHER = (
    (changed(metrics(), calibration_error=1.01), r"calibration_error: Input should be less than or equal to 1"),
    (changed(metrics(), score_bins=[{"images": -1, "score": None, "accuracy": None}]), r"score_bins\.0\.images: "),
    (changed(metrics(), score_bins=[{"images": 1, "score": 0.5, "accuracy": float("nan")}]), r"bins\.0\.accuracy: "),
    (changed(detection(), map50=1.01), r"\(columns\.torch\.map50: Input should be less than or equal to 1\)"),
    (changed(detection(), best_f1_score=None), r"best_f1_score: Input should be a valid number"),
    (changed(detection(), pr_curves={"cat": [1.0] * 100}), r"pr_curves\.cat: Tuple should have at least 101 items"),
    (changed(detection(), pr_curves={"cat": [float("nan")] * 101}), r"pr_curves\.cat\.0: "),
    (changed(detection(), per_class=[]), r"the figures of torch are not those of 3 classes"),
    (json.dumps({**detection(), "task": "segment"}), r"columns\.torch\.mean_iou: Field required"),
    (json.dumps({**detection(), "subset": "train"}), r"subset: Input should be 'val' or 'test'"),
    (
        with_mistake(detection(), MISSED, truth=[box("cat", 1, 2, 3)]),
        r"truth\.0\.box\.3: Field required",
    ),
    (with_mistake(detection(), MISSED, answers=[box("cat", 1, 2, 3, 4)]), r"answers\.0\.score: Field required"),
    (changed(segmentation(), mean_iou=float("inf")), r"mean_iou: "),
    (changed(segmentation(), confusion=[[1, 2, 3]] * 2), r"the figures of torch are not those of 3 classes"),
    (with_mistake(segmentation(), TORN, levels=[0, 256]), r"levels\.1: Input should be less than or equal to 255"),
    (with_mistake(segmentation(), TORN, answers=SHORT), r"the mask's runs are not those of 5x4 pixels"),
)


@pytest.mark.parametrize(("text", "message"), OF_AN_OTHER)
def test_metrics_of_another_version_are_a_message(run: RunFolder, text: str, message: str) -> None:
    run.metrics.write_text(text, encoding="utf-8")
    with pytest.raises(
        ArtifactError, match=rf"metrics\.json is not as this edgekit writes it .*{message}.*make it again"
    ):
        report.write_report(run)


def test_a_history_of_before_is_a_message(run: RunFolder) -> None:
    run.history.write_text(HISTORY.replace("metric,val_metric", "val_top1").replace("top-1,", ""), encoding="utf-8")
    with pytest.raises(ArtifactError, match=r"history\.csv is not as .* \(metric: Field required\)"):
        report.write_report(run)


@pytest.mark.parametrize(
    ("file", "text", "message"),
    [
        ("metrics.json", "{", "is damaged"),
        ("metrics.json", "{}", r"is not as this edgekit writes it \(task: Field required\): make it again"),
        ("metrics.json", '{"task": "pose"}', r"\(task: Input should be 'classify', 'detect' or 'segment'\)"),
        ("metrics.json", '{"task": "detect"}', r"\(subset: Field required\): make it again"),
        ("metrics.json", json.dumps(without_torch()), r"\(no column for torch\)"),
        ("metrics.json", json.dumps(of_fewer_classes()), r"\(the figures of torch are not those of 2 classes\)"),
        (
            "parity.json",
            '{"tolerance": "x", "versions": {}, "verdicts": []}',
            r"\(tolerance: Input should be a valid number",
        ),
        ("quantize.json", "[]", "is damaged"),
        (
            "quantize.json",
            "{}",
            r"quantize.json is not as this edgekit writes it \(target: Field required\): make it again",
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
