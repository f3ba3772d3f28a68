"""metrics.json in rows and words: what the terminal, Markdown and the page say of each task."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from edgekit.pictures import SUBSETS
from edgekit.report.figures import NOTHING, Row, percent, rate

# Of each task what a column is told by, with its key in metrics.json; the first is the task's one figure.
FIGURES: dict[str, tuple[tuple[str, str], ...]] = {
    "classify": (
        ("top-1", "top1"),
        ("top-5", "top5"),
        ("macro F1", "macro_f1"),
        ("calibration error", "calibration_error"),
    ),
    "detect": (("mAP@0.5", "map50"), ("mAP (COCO)", "map"), ("mAP@0.75", "map75")),
    "segment": (("mean IoU", "mean_iou"), ("pixel accuracy", "pixel_accuracy")),
}
AGREEMENT = "agreement with torch"
TAKEN_FOR = "most often taken for"
RATES = (("precision", "precision"), ("recall", "recall"), ("F1", "f1"))
CLASS_FIGURES: dict[str, tuple[tuple[str, str], ...]] = {
    "classify": RATES,
    "detect": (("AP@0.5", "ap50"), ("AP (COCO)", "ap"), *RATES),
    "segment": (("IoU", "iou"), *RATES),
}


def images_text(metrics: Mapping[str, Any]) -> str:
    """→ "87 validation images"."""
    return f"{metrics['images']} {SUBSETS[metrics['subset']]} images"


def metrics_rows(metrics: Mapping[str, Any]) -> list[Row]:
    """A header and a row a figure; a column for torch and each conversion that was evaluated."""
    columns = metrics["columns"]
    figures: list[tuple[str, str, Callable[[Any], str]]] = [
        *((title, key, percent) for title, key in FIGURES[metrics["task"]]),
        (AGREEMENT, "agreement", percent),
        ("images/s", "images_per_second", rate),
    ]
    # a metrics.json of before has no calibration error
    rows = [[title, *(show(column.get(key)) for column in columns.values())] for title, key, show in figures]
    return [["", *columns], *rows]


def per_class_rows(metrics: Mapping[str, Any]) -> list[Row]:
    """A header and a row a class, of the torch column."""
    task, torch = metrics["task"], metrics["columns"]["torch"]
    classes, figures = torch["per_class"], CLASS_FIGURES[task]
    size = {"classify": "images", "detect": "boxes", "segment": "pixels"}[task]
    rows = [["class", size, *(title for title, _ in figures)]]
    rows += [[row["label"], _size(row, classes), *(percent(row[key]) for _, key in figures)] for row in classes]
    if task == "detect":
        return rows
    shares = task == "segment"
    taken = [_taken_for(row, index, metrics["class_names"], shares) for index, row in enumerate(torch["confusion"])]
    return [[*row, last] for row, last in zip(rows, [TAKEN_FOR, *taken], strict=True)]


def _size(row: Mapping[str, Any], classes: Sequence[Mapping[str, Any]]) -> str:
    """How much there is of a class: images, boxes, or the share of all pixels."""
    if "pixels" not in row:
        return str(row["support"])
    return percent(row["pixels"] / max(1, sum(other["pixels"] for other in classes)))


def _taken_for(row: Sequence[int], index: int, names: Sequence[str], shares: bool) -> str:
    """row: images (or pixels) of class `index` by predicted class → the commonest wrong answer, "three (2)"."""
    wrong = {other: count for other, count in enumerate(row) if other != index and count}
    worst = max(wrong, key=wrong.__getitem__, default=None)
    if worst is None:
        return NOTHING
    return f"{names[worst]} ({percent(wrong[worst] / sum(row)) if shares else wrong[worst]})"


def text_columns(rows: Sequence[Row]) -> list[int]:
    """The columns of per_class_rows, beside the first, that hold words."""
    return [index for index, title in enumerate(rows[0]) if title == TAKEN_FOR]


def markdown_metrics(metrics: Mapping[str, Any]) -> str:
    """metrics.json → the side by side table in GitHub's Markdown, ending in a line feed."""
    header, *rows = metrics_rows(metrics)
    rule = ["---", *("---:" for _ in header[1:])]
    return "".join(f"| {' | '.join(row)} |\n" for row in (header, rule, *rows))


def verdict(metrics: Mapping[str, Any]) -> str:
    """The page's first sentence: does what is shipped compute what was trained?"""
    task, images = metrics["task"], images_text(metrics)
    last = list(metrics["columns"])[-1]
    if last == "torch":
        title, key = FIGURES[task][0]
        figure = percent(metrics["columns"]["torch"][key])
        if task == "classify":
            return f"The trained network is right on {figure} of {images}."
        return f"The trained network has a {title} of {figure} on {images}."
    agreement = metrics["columns"][last]["agreement"]
    what = {"onnx": "The exported model", "bundle": "The bundle"}.get(last, last)
    if task == "detect":
        return f"{what}'s boxes agree with the trained network's to {percent(agreement)} on {images}."
    if task == "segment":
        return f"{what} gives the trained network's class to {percent(agreement)} of the pixels of {images}."
    same = round(agreement * metrics["images"])
    return f"{what} gives the trained network's answer on {same} of {images}."


def agreement_note(metrics: Mapping[str, Any]) -> str:
    """What the page says of the row of agreements."""
    return {
        "classify": "Agreement is the share of them with torch's answer.",
        "detect": "Agreement is the share of boxes, torch's and the column's together, that have a box of the same "
        "class and an IoU of at least 0.5 on the other side.",
        "segment": "Agreement is the share of their pixels with torch's class.",
    }[str(metrics["task"])]


def classes_note(metrics: Mapping[str, Any]) -> str:
    """What the page says under the table of classes; "" where it says all itself."""
    if metrics["task"] != "detect":
        return ""
    score = metrics["columns"]["torch"]["best_f1_score"]
    return (
        f"Precision, recall and F1: of the boxes with a score of at least {score:.2f}, where F1 over all classes is "
        "best; a box is right where it has its class and an IoU of at least 0.5."
    )
