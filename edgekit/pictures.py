"""The pictures of a run: confusion matrix, curves of precision and of training, the worst mistakes.

Drawn on matplotlib's Figure, not pyplot: no global state, and always the Agg renderer.
"""

from __future__ import annotations

import io
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import cv2
import numpy as np

from edgekit import overlays

if TYPE_CHECKING:
    from contextlib import AbstractContextManager

    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

ThemeName = Literal["light", "dark"]


@dataclass(frozen=True)
class Theme:
    """Colours, as CSS writes them, of the pictures and of the page around them."""

    page: str
    surface: str  # behind pictures and tables
    empty: str  # of a matrix cell that no image fell into
    line: str
    muted: str
    ink: str
    right: str  # a right answer, and what was learnt on
    wrong: str  # a wrong answer, and what was not learnt on
    weights: str  # the variant with only the weights in int8; fp32 has the ink, int8 `right`, int8-mixed `wrong`


THEMES: dict[ThemeName, Theme] = {
    "light": Theme("#f5f5f2", "#ffffff", "#f3f3f0", "#deded8", "#6a6a66", "#1c1c1a", "#1864d9", "#c2410c", "#12946c"),
    "dark": Theme("#121214", "#1c1c1f", "#252529", "#37373c", "#9c9ca3", "#ececf0", "#5ea0ff", "#ff8a50", "#3ccf9f"),
}

DPI = 150
DASHES = (0, (4, 3))  # of a limit
LONGEST_COUNT = 99_999  # that a cell of a matrix can show
# DejaVu Sans comes with matplotlib. For the scripts that it lacks: what Linux, macOS and Windows have, where installed.
FONTS = (
    "DejaVu Sans",
    "Noto Sans CJK JP",
    "Droid Sans Fallback",
    "Arial Unicode MS",
    "Microsoft YaHei",
    "Malgun Gothic",
)


def confusion_picture(
    confusion: Sequence[Sequence[int]], class_names: Sequence[str], theme: ThemeName = "light"
) -> bytes:
    """[true][predicted] counts of images or pixels (C, C) → a PNG: a row a true class, a column a predicted one.

    A cell's strength is its share of the row, so that large classes do not outshine small ones. Counts that are too
    long to be read, as those of pixels are, are written as shares of the row.
    """
    counts, colors = np.asarray(confusion, np.int64), THEMES[theme]
    classes = len(class_names)
    side = min(14.0, max(7.0, 0.13 * classes)) if classes > 6 else 1.1 * classes  # inches
    with style(colors):
        figure, axes = _square(side)
        cells = _cell_colors(counts, colors)
        axes.imshow(cells, interpolation="nearest", aspect="equal")
        _label_classes(axes, class_names, cell_points=72 * side / classes)
        if classes <= 40:  # above, the lines would be as wide as the cells
            axes.hlines(np.arange(classes - 1) + 0.5, -0.5, classes - 0.5, colors.surface, linewidth=1.5)
            axes.vlines(np.arange(classes - 1) + 0.5, -0.5, classes - 0.5, colors.surface, linewidth=1.5)
        if classes <= 20:
            is_long = counts.max() > LONGEST_COUNT
            texts = np.where(counts > 0, _shares(counts) if is_long else counts.astype(str), "")
            _write_cells(axes, texts, cells, cell_points=72 * side / classes)
            axes.set_ylabel("true class, % of each row" if is_long else "true class", labelpad=8)
        return png(figure)


def _square(side: float) -> tuple[Figure, Axes]:
    """Axes that are the whole figure, `side` inches; labels lie outside and are kept by the tight bounding box."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(side, side), dpi=DPI)
    return figure, figure.add_axes((0, 0, 1, 1))


def _cell_colors(counts: np.ndarray, colors: Theme) -> np.ndarray:
    """int (C, C) → RGB in 0..1, float (C, C, 3). The square root lets a single mistake be seen."""
    from matplotlib.colors import to_rgb

    share = counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)
    diagonal = np.eye(len(counts), dtype=bool)
    strength = np.where(diagonal, 0.1 + 0.9 * share, 0.15 + 0.85 * np.sqrt(share)) * (counts > 0)
    full = np.where(diagonal[..., None], to_rgb(colors.right), to_rgb(colors.wrong))
    return np.asarray(to_rgb(colors.empty) * (1 - strength[..., None]) + full * strength[..., None])


def _label_classes(axes: Axes, class_names: Sequence[str], cell_points: float) -> None:
    step = math.ceil(len(class_names) / 100)  # labels of more classes than that would overlap
    ticks = range(0, len(class_names), step)
    labels = [short(drawable(class_names[index]), 24) for index in ticks]
    size = min(11.0, max(6.0, 0.75 * cell_points * step))
    upright = max(len(label) for label in labels) * 0.62 * size < cell_points * step
    axes.set_xticks(ticks, labels, rotation=0 if upright else 90, fontsize=size, parse_math=False)
    axes.set_yticks(ticks, labels, fontsize=size, parse_math=False)
    axes.set_xlabel("predicted class", labelpad=8)
    axes.set_ylabel("true class", labelpad=8)
    axes.tick_params(length=0, pad=5)
    axes.spines[:].set_visible(False)


def _shares(counts: np.ndarray) -> np.ndarray:
    """int (C, C) → text (C, C): percent of the row, "97.8". Only all of it reads 100."""
    shares = counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)
    texts = np.char.mod("%.1f", np.clip(100 * shares, 0.1, 99.9))
    return np.where(shares == 1, "100", texts)


def _write_cells(axes: Axes, texts: np.ndarray, cells: np.ndarray, cell_points: float) -> None:
    """texts (C, C), "" for nothing, on cells of these colours, RGB in 0..1 (C, C, 3)."""
    size = min(12.0, 0.8 * cell_points / (0.62 * max(1, *map(len, texts.flat))))
    for (row, column), text in np.ndenumerate(texts):
        if text:
            luminance = float(cells[row, column] @ (0.299, 0.587, 0.114))
            ink = "#111111" if luminance > 0.55 else "#ffffff"
            axes.text(column, row, text, ha="center", va="center", fontsize=size, color=ink)


def precision_recall_picture(pr_curves: Mapping[str, Sequence[float]], theme: ThemeName = "light") -> bytes:
    """Precisions (0..1) at recalls 0, 0.01 .. 1 by class → a PNG: a line a class, and beside it the class's AP.

    The best class comes first. Of many classes the worst have colours, the others are thin lines that only show where
    most lie.
    """
    from matplotlib.figure import Figure

    colors = THEMES[theme]
    ap = average_precisions(pr_curves)
    crowd, named = list(ap)[: -len(CURVES[theme])], list(ap)[-len(CURVES[theme]) :]
    with style(colors):
        figure = Figure(figsize=(5.2, 4.2), dpi=DPI)
        axes = figure.add_axes((0, 0, 1, 1))
        for index, name in enumerate(crowd):
            label = f"{len(crowd)} better class{'es' if len(crowd) > 1 else ''}" if index == 0 else None
            axes.plot(range(101), _percents(pr_curves[name]), color=colors.muted, linewidth=0.6, label=label)
        for name, look in zip(named, _curve_looks(theme), strict=False):
            label = f"{short(drawable(name), 24)}  {100 * ap[name]:.1f} %"
            axes.plot(range(101), _percents(pr_curves[name]), label=label, clip_on=False, **look)
        if not pr_curves:
            axes.text(50, 50, "no class has a true box", ha="center", va="center", color=colors.muted)
        axes.set_title("precision, % (at an IoU of 0.5)", pad=12, **title_style(colors))
        axes.set_xlabel("recall, %")
        axes.set_xlim(0, 100)
        axes.set_ylim(0, 100)
        axes.grid(color=colors.line, linewidth=0.8)
        axes.set_axisbelow(True)
        axes.spines[["top", "right", "left"]].set_visible(False)
        axes.tick_params(length=0)
        if pr_curves:
            _add_legend(axes, colors, "AP@0.5")
        return png(figure)


def reliability_picture(figures: Mapping[str, Any], theme: ThemeName = "light") -> bytes:
    """A classification's column of metrics.json → a PNG: the share of right answers by the best answer's score.

    A bar for each of its score_bins, with the number of images on it; dashed, where scores mean what they say. The
    calibration error is in the title.
    """
    from matplotlib.figure import Figure

    colors, bins = THEMES[theme], figures["score_bins"]
    width = 100 / len(bins)
    with style(colors):
        figure = Figure(figsize=(5.2, 4.2), dpi=DPI)
        axes = figure.add_axes((0, 0, 1, 1))
        lefts, heights = [index * width for index in range(len(bins))], [100 * (row["accuracy"] or 0) for row in bins]
        bars = axes.bar(lefts, heights, width, align="edge", color=colors.right, edgecolor=colors.surface)
        axes.bar_label(bars, [row["images"] or "" for row in bins], padding=2, fontsize=8, color=colors.muted)
        axes.plot((0, 100), (0, 100), color=colors.ink, linewidth=1.2, linestyle=DASHES)
        title = f"right answers, % (calibration error {100 * figures['calibration_error']:.2f} %)"
        axes.set_title(title, pad=18, **title_style(colors))
        axes.set_xlabel("score of the best answer, %")
        axes.set_xlim(0, 100)
        axes.set_ylim(0, 100)
        axes.grid(axis="y", color=colors.line, linewidth=0.8)
        axes.set_axisbelow(True)
        axes.spines[["top", "right", "left"]].set_visible(False)
        axes.tick_params(length=0)
        return png(figure)


def average_precisions(pr_curves: Mapping[str, Sequence[float]]) -> dict[str, float]:
    """→ each class's AP, 0..1, the best class first: the mean of its precisions, as COCO's evaluation has it."""
    found = {name: sum(curve) / len(curve) for name, curve in pr_curves.items()}
    return dict(sorted(found.items(), key=lambda item: -item[1]))


# Of the classes in a picture of precision, so that each differs from its neighbours in lightness too.
CURVES: dict[ThemeName, tuple[str, ...]] = {
    "light": ("#1f6feb", "#d9480f", "#12946c", "#9c36b5", "#a17400", "#0b4a8f", "#c2255c", "#5c6b00"),
    "dark": ("#5ea0ff", "#ff8a50", "#3ccf9f", "#d98bf0", "#f0c040", "#a8c8ff", "#ff7aa8", "#c0d050"),
}
LINES = ("-", (0, (5, 2)), (0, (1, 1.2)), (0, (6, 2, 1, 2)))  # in turn: not by colours alone


def _curve_looks(theme: ThemeName) -> list[dict[str, Any]]:
    return [{"color": color, "linestyle": LINES[index % len(LINES)]} for index, color in enumerate(CURVES[theme])]


def _percents(shares: Sequence[float]) -> list[float]:
    return [100 * share for share in shares]


def _add_legend(axes: Axes, colors: Theme, title: str) -> None:
    """Beside the axes, where no line can be."""
    legend = axes.legend(
        title=title,
        loc="upper left",
        bbox_to_anchor=(1.02, 1.0),
        frameon=False,
        labelcolor=colors.ink,
        fontsize=9,
        handlelength=2.6,
        alignment="left",
    )
    legend.get_title().set_color(colors.muted)
    for text in legend.get_texts():
        text.set_parse_math(False)


def curves_picture(history: Sequence[Mapping[str, Any]], theme: ThemeName = "light") -> bytes:
    """Rows of history.csv, at least one → a PNG: losses and the validation metric by epoch, and where phases end."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    colors = THEMES[theme]
    epochs = [int(row["epoch"]) for row in history]
    with style(colors):
        figure = Figure(figsize=(9, 3.3), dpi=DPI)
        loss, metric = figure.subplots(1, 2)
        figure.subplots_adjust(wspace=0.2)
        for name, title, color in (("train_loss", "training", colors.right), ("val_loss", "validation", colors.wrong)):
            loss.plot(epochs, [float(row[name]) for row in history], "o-", markersize=4, color=color, label=title)
        loss.legend(loc="upper right", frameon=False, labelcolor=colors.ink)
        metric.plot(epochs, [100 * float(row["val_metric"]) for row in history], "o-", markersize=4, color=colors.wrong)
        for axes, title in ((loss, "loss"), (metric, f"validation {history[0]['metric']}, %")):
            axes.set_title(title, loc="left", color=colors.ink, fontsize=11, pad=18)
            axes.set_xlabel("epoch")
            axes.set_xlim(epochs[0] - 0.5, epochs[-1] + 0.5)
            axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
            axes.grid(axis="y", color=colors.line, linewidth=0.8)
            axes.spines[["top", "right", "left"]].set_visible(False)
            axes.tick_params(length=0)
            _mark_phases(axes, history, colors)
        _mark_best(metric, history, colors)
        return png(figure)


def _mark_phases(axes: Axes, history: Sequence[Mapping[str, Any]], colors: Theme) -> None:
    """A dashed line where a phase ends and the next begins, with their names on either side above it."""
    for before, row in pairwise(history):
        if row["phase"] == before["phase"]:
            continue
        start = int(row["epoch"]) - 0.5
        axes.axvline(start, color=colors.muted, linewidth=1, linestyle=(0, (3, 3)))
        for name, offset, side in ((before["phase"], -4, "right"), (row["phase"], 4, "left")):
            axes.annotate(
                drawable(str(name)),
                (start, 1),
                xycoords=("data", "axes fraction"),
                xytext=(offset, 4),
                textcoords="offset points",
                horizontalalignment=side,
                fontsize=9,
                color=colors.muted,
                parse_math=False,
            )


def _mark_best(axes: Axes, history: Sequence[Mapping[str, Any]], colors: Theme) -> None:
    """A larger dot, and the figure, at the epoch whose weights are kept: the best metric, then the lowest loss."""
    from matplotlib.patheffects import withStroke

    best = max(history, key=lambda row: (float(row["val_metric"]), -float(row["val_loss"])))
    at = (int(best["epoch"]), 100 * float(best["val_metric"]))
    axes.plot(*at, "o", color=colors.wrong, markersize=8)
    offset = (0, -16)  # under the point: the curve's best is at its top
    text = axes.annotate(f"{at[1]:.2f}", at, offset, textcoords="offset points", ha="center", color=colors.ink)
    text.set_path_effects([withStroke(linewidth=4, foreground=colors.surface)])  # a steep curve runs through it


def title_style(colors: Theme) -> dict[str, Any]:
    """How the title of one panel is written: left, in ink, and no mathematics is read into it."""
    return {"loc": "left", "color": colors.ink, "fontsize": 11, "parse_math": False}


SUBSETS = {"val": "validation", "test": "test"}
NO_MISTAKES = {
    "classify": "every {} image is right.",
    "detect": "every box is found, none is false.",
    "segment": "every pixel of the {} images is right.",
}


def no_mistakes(metrics: Mapping[str, Any]) -> str:
    """→ "every validation image is right.": what there is to say where metrics.json has no mistakes."""
    return NO_MISTAKES[metrics["task"]].format(SUBSETS[metrics["subset"]])


@dataclass(frozen=True)
class _Sheet:
    """How a contact sheet is laid out; pixels."""

    columns: int
    side: int  # of a cell
    text_height: int
    foot: str = ""  # what the drawing means


_SHEETS = {
    "classify": _Sheet(4, 200, 44),
    "detect": _Sheet(3, 320, 58, "dashed: true boxes; solid: answers; thick: missed or false"),
    "segment": _Sheet(3, 320, 44, "line: the true region; filled: the answer"),
}
GAP, KEY_HEIGHT = 16, 20  # pixels


def contact_sheet(metrics: Mapping[str, Any]) -> bytes:
    """metrics.json → a JPEG of its mistakes, the worst first: each photo with truth and answer, and a caption under it.

    What the drawing means is said at the foot. An image that cannot be read is a grey cell that says so. Without
    mistakes: a small picture that says so.
    """
    mistakes, sheet = metrics["mistakes"], _SHEETS[metrics["task"]]
    if not mistakes:
        text = _Text(230, 45, f"No mistakes: {no_mistakes(metrics)}", {"ha": "center", "va": "center", "fontsize": 12})
        return _jpeg(np.full((90, 460, 3), 255, np.uint8), [text])
    side, columns = sheet.side, min(sheet.columns, len(mistakes))
    cell_height = side + sheet.text_height + GAP
    foot = GAP + -(-len(mistakes) // columns) * cell_height
    keys = region_keys(metrics)
    keys_a_row = max(1, columns * (side + GAP) // 168)
    height = foot + (KEY_HEIGHT * (1 + -(-len(keys) // keys_a_row)) if sheet.foot else 0)
    canvas = np.full((height, GAP + columns * (side + GAP), 3), 255, np.uint8)
    texts = [_Text(GAP, foot - 8, sheet.foot, {"color": THEMES["light"].muted})] if sheet.foot else []
    for index, mistake in enumerate(mistakes):
        left, top = GAP + index % columns * (side + GAP), GAP + index // columns * cell_height
        canvas[top : top + side, left : left + side] = _cell(overlays.drawn(mistake, metrics, side, side), side)
        texts.append(_Text(left, top + side + 6, _caption(mistake, metrics), {"linespacing": 1.35}))
    for index, (name, color) in enumerate(keys):
        left, top = GAP + index % keys_a_row * 168, foot + 12 + index // keys_a_row * KEY_HEIGHT
        canvas[top : top + 12, left : left + 12] = color
        texts.append(_Text(left + 18, top - 1, short(drawable(name), 20)))
    return _jpeg(canvas, texts)


def region_keys(metrics: Mapping[str, Any]) -> list[tuple[str, tuple[int, int, int]]]:
    """Of a segmentation the classes that are drawn, with their RGB; of another task none."""
    names = metrics["class_names"] if metrics["task"] == "segment" else []
    return [(name, overlays.region_color(index)) for index, name in enumerate(names) if index > 0]


@dataclass(frozen=True)
class _Text:
    """Words on a contact sheet, under the point (x, y) and right of it; pixels."""

    x: int
    y: int
    words: str
    look: Mapping[str, Any] = field(default_factory=dict)


def _jpeg(canvas: np.ndarray, texts: Sequence[_Text]) -> bytes:
    """uint8 (H, W, 3) RGB with texts on it."""
    from matplotlib.figure import Figure

    height, width = canvas.shape[:2]
    with style(THEMES["light"]):
        figure = Figure(figsize=(width / 100, height / 100), dpi=100)
        for text in texts:
            look = {"va": "top", "fontsize": 8.5, "parse_math": False, **text.look}
            figure.text(text.x / width, 1 - text.y / height, text.words, **look)
        figure.figimage(canvas)
        buffer = io.BytesIO()
        figure.savefig(buffer, format="jpeg", pil_kwargs={"quality": 90})
    return buffer.getvalue()


def _caption(mistake: Mapping[str, Any], metrics: Mapping[str, Any]) -> str:
    if metrics["task"] == "detect":
        boxes = overlays.judged(mistake, metrics)
        lines = [f"{mistake['missed']} missed, {mistake['false']} false"]
        lines += [f"missed: {overlays.labels_of(boxes.missed)}"] if boxes.missed else []
        lines += [f"false: {overlays.labels_of(boxes.false)}"] if boxes.false else []
        return "\n".join(short(drawable(line), 52) for line in lines)
    if metrics["task"] == "segment":
        return f"IoU {mistake['iou']:.2f}\n{short(drawable(Path(mistake['path']).name), 52)}"
    label, predicted = short(drawable(mistake["label"]), 26), short(drawable(mistake["predicted"]), 16)
    return f"{label}\n→ {predicted}  {100 * mistake['score']:.0f} %"


def _cell(image: np.ndarray | None, side: int) -> np.ndarray:
    """uint8 (h, w, 3) BGR → uint8 (side, side, 3) RGB, the whole image, with bars where its shape is another."""
    cell = np.full((side, side, 3), 238, np.uint8)
    if image is None:
        cv2.putText(
            cell, "image gone", (side // 2 - 44, side // 2), cv2.FONT_HERSHEY_SIMPLEX, 0.5, (90, 90, 90), 1, cv2.LINE_AA
        )
        return cell
    height, width = image.shape[:2]
    top, left = (side - height) // 2, (side - width) // 2
    cell[top : top + height, left : left + width] = image[..., ::-1]
    return cell


def style(colors: Theme) -> AbstractContextManager[None]:
    """matplotlib's own defaults, whatever the user's matplotlibrc says, in the theme's colours."""
    import matplotlib.style

    settings = {
        "font.family": _fonts(),
        "font.size": 10,
        "lines.linewidth": 2,
        "figure.facecolor": colors.surface,
        "axes.facecolor": colors.surface,
        "axes.edgecolor": colors.line,
        "axes.labelcolor": colors.muted,
        "text.color": colors.ink,
        "xtick.color": colors.muted,
        "ytick.color": colors.muted,
        "xtick.labelcolor": colors.ink,
        "ytick.labelcolor": colors.ink,
    }
    return matplotlib.style.context(settings, after_reset=True)


def png(figure: Figure) -> bytes:
    """The figure as a PNG, cut to what is drawn."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", bbox_inches="tight", pad_inches=0.15)
    return buffer.getvalue()


@cache
def _fonts() -> list[str]:
    from matplotlib.font_manager import fontManager

    installed = {font.name for font in fontManager.ttflist if font.weight == 400}  # matplotlib logs about other weights
    return [name for name in FONTS if name in installed]


@cache
def _glyphs() -> frozenset[int]:
    """The code points that _fonts() can draw between them."""
    from matplotlib.font_manager import FontProperties, findfont, get_font

    files = [findfont(FontProperties(family=name)) for name in _fonts()]
    return frozenset(code for file in files for code in get_font(file).get_charmap())


def drawable(text: str) -> str:
    """The text with a code such as \\u732b for each character that no font here has.

    (matplotlib would warn and draw the same box for each.)
    """
    words = " ".join(text.split())
    return "".join(c if ord(c) in _glyphs() else c.encode("unicode_escape").decode() for c in words)


def short(text: str, length: int) -> str:
    """The text, at most `length` characters: where it is longer, its start and a "…"."""
    return text if len(text) <= length else text[: length - 1] + "…"
