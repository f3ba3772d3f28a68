"""The pictures of a run: confusion matrix, training curves, the worst mistakes, what quantization costs and gains.

Drawn on matplotlib's Figure, not pyplot: no global state, and always the Agg renderer.
"""

from __future__ import annotations

import io
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import cv2
import numpy as np

from edgekit import runner

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
    "light": Theme("#f5f5f2", "#ffffff", "#f3f3f0", "#deded8", "#6a6a66", "#1c1c1a", "#1f6feb", "#d9480f", "#12946c"),
    "dark": Theme("#121214", "#1c1c1f", "#252529", "#37373c", "#9c9ca3", "#ececf0", "#5ea0ff", "#ff8a50", "#3ccf9f"),
}

DPI = 150
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
    """[true][predicted] image counts (C, C) → a PNG: a row a true class, a column a predicted one.

    A cell's strength is its share of the row, so that large classes do not outshine small ones.
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
            _write_counts(axes, counts, cells, cell_points=72 * side / classes)
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


def _write_counts(axes: Axes, counts: np.ndarray, cells: np.ndarray, cell_points: float) -> None:
    size = min(12.0, 0.8 * cell_points / (0.62 * len(str(counts.max()))))
    for (row, column), count in np.ndenumerate(counts):
        if count:
            luminance = float(cells[row, column] @ (0.299, 0.587, 0.114))
            ink = "#111111" if luminance > 0.55 else "#ffffff"
            axes.text(column, row, str(count), ha="center", va="center", fontsize=size, color=ink)


def curves_picture(history: Sequence[Mapping[str, Any]], theme: ThemeName = "light") -> bytes:
    """Rows of history.csv, at least one → a PNG: losses and metric by epoch, with the phases' boundaries."""
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
    best = max(history, key=lambda row: (float(row["val_metric"]), -float(row["val_loss"])))
    at = (int(best["epoch"]), 100 * float(best["val_metric"]))
    axes.plot(*at, "o", color=colors.wrong, markersize=8)
    offset = (0, -16)  # under the point: the curve's best is at its top
    axes.annotate(f"{at[1]:.2f}", at, offset, textcoords="offset points", ha="center", color=colors.ink)


@dataclass(frozen=True)
class Point:
    """A variant on an engine, as the picture of quantization shows it."""

    variant: str
    engine: str
    x: float  # what it costs: milliseconds, or megabytes (see Tradeoff.x_label)
    metric: float  # percent
    is_shipped: bool


@dataclass(frozen=True)
class Tradeoff:
    """What the picture of quantization shows: the points, and the guard's limits that they are held against."""

    x_label: str
    points: tuple[Point, ...]  # by variant, then by engine, as in quantize.json
    limits: tuple[float, ...]  # percent, different ones only: fp32's metric on an engine less the allowed drop


def engine_name(figure: Mapping[str, Any]) -> str:
    """A figure of quantize.json → "4.14.0 openvino"."""
    return f"{figure['opencv']} {figure['engine']}"


def shipped_variant(record: Mapping[str, Any]) -> str:
    """quantize.json → the name of the variant that a bundle gets.

    "int8" may be either of two variants: the one that kept its accuracy is shipped.
    """
    names = (record["precision"], f"{record['precision']}-mixed")
    found = [variant for variant in record["variants"] if variant["name"] in names]
    return str(next((v["name"] for v in found if _is_within(v, record["max_drop"])), found[-1]["name"]))


def _is_within(variant: Mapping[str, Any], max_drop: float) -> bool:
    """Did the variant run on every engine, and lose no more than is allowed?"""
    return all(figure["status"] == "ok" and figure["drop"] <= max_drop for figure in variant["figures"])


def tradeoff(record: Mapping[str, Any]) -> Tradeoff:
    """quantize.json → what its picture shows: the metric against the time of a forward pass.

    What has no time is left out. Where nothing has one, the metric is shown against the file's size instead.
    """
    ships = shipped_variant(record)
    pairs = [(v, figure) for v in record["variants"] for figure in v["figures"] if figure["status"] == "ok"]
    is_timed = any(figure["median_ms"] is not None for _, figure in pairs)
    points = tuple(
        Point(
            variant["name"],
            engine_name(figure),
            figure["median_ms"] if is_timed else variant["size_bytes"] / 1e6,
            100 * figure["metric"],
            variant["name"] == ships,
        )
        for variant, figure in pairs
        if figure["median_ms"] is not None or not is_timed
    )
    drawn = {point.engine for point in points}
    fp32 = [f for v, f in pairs if v["name"] == "fp32" and engine_name(f) in drawn]
    limits = tuple(sorted({100 * figure["metric"] - record["max_drop"] for figure in fp32}))
    return Tradeoff("milliseconds, one forward pass" if is_timed else "size of the file, MB", points, limits)


def quantization_picture(record: Mapping[str, Any], theme: ThemeName = "light") -> bytes:
    """quantize.json, of which something is ok → a PNG: the metric against time (or size, see tradeoff).

    Colours are variants and markers engines; a ring is around what a bundle gets; dashed: what the guard allows.
    """
    from matplotlib.figure import Figure

    colors, shown = THEMES[theme], tradeoff(record)
    variant_colors = _variant_colors(colors)
    engines = list(dict.fromkeys(point.engine for point in shown.points))
    markers = dict(zip(engines, (MARKERS * len(engines))[: len(engines)], strict=True))
    with style(colors):
        figure = Figure(figsize=(7, 4), dpi=DPI)
        axes = figure.add_axes((0, 0, 1, 1))
        for limit in shown.limits:
            axes.axhline(limit, color=colors.muted, linewidth=1, linestyle=DASHES, zorder=1)
        for point in shown.points:
            _draw_point(axes, point, markers[point.engine], variant_colors[point.variant], colors)
        axes.set_title(f"{short(drawable(record['metric']), 40)}, %", pad=14, **title_style(colors))
        axes.set_xlabel(shown.x_label)
        _set_x_axis(axes, [point.x for point in shown.points])
        axes.margins(y=0.12)
        axes.set_ylim(top=min(100.0, axes.get_ylim()[1]))
        axes.grid(color=colors.line, linewidth=0.8)
        axes.set_axisbelow(True)
        axes.spines[["top", "right", "left"]].set_visible(False)
        axes.tick_params(which="both", length=0)
        _add_keys(axes, shown, markers, colors)
        return png(figure)


DASHES = (0, (4, 3))  # of a limit
MARKERS = ("o", "s", "^", "D", "v", "P")  # of the engines, in turn


def _variant_colors(colors: Theme) -> dict[str, str]:
    return {"fp32": colors.ink, "int8-weights": colors.weights, "int8": colors.right, "int8-mixed": colors.wrong}


def _draw_point(axes: Axes, point: Point, marker: str, color: str, colors: Theme) -> None:
    """Outlined, and filled faintly: where points lie on each other, each can still be told."""
    if point.is_shipped:
        axes.plot(point.x, point.metric, "o", clip_on=False, **_ring(colors, 18))
    axes.plot(point.x, point.metric, marker, clip_on=False, zorder=3, **_marker(color))


def _marker(color: str) -> dict[str, Any]:
    return {"markersize": 9, "markerfacecolor": (color, 0.35), "markeredgecolor": color, "markeredgewidth": 1.8}


def _ring(colors: Theme, size: float) -> dict[str, Any]:
    return {"markersize": size, "markerfacecolor": "none", "markeredgecolor": colors.ink, "markeredgewidth": 1.2}


def _set_x_axis(axes: Axes, values: Sequence[float]) -> None:
    """From 0, or logarithmic where one engine is many times slower than another and would hide the others."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

    if max(values) <= 8 * min(values):
        axes.set_xlim(0, 1.08 * max(values))
        return
    axes.set_xscale("log")
    axes.set_xlim(0.8 * min(values), 1.25 * max(values))
    axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))


def _add_keys(axes: Axes, shown: Tradeoff, markers: Mapping[str, str], colors: Theme) -> None:
    """Beside the axes, where no point can be: what colours, markers, ring and dashes mean."""
    from matplotlib.lines import Line2D

    def key(label: str, marker: str, **look: Any) -> Line2D:
        return Line2D([], [], marker=marker, linestyle="none", label=label, **look)

    drawn = {point.variant for point in shown.points}
    keys = [key(name, "o", **_marker(color)) for name, color in _variant_colors(colors).items() if name in drawn]
    keys.append(key("", "none"))
    keys += [key(short(drawable(name), 28), marker, **_marker(colors.muted)) for name, marker in markers.items()]
    keys.append(key("", "none"))
    if any(point.is_shipped for point in shown.points):
        keys.append(key("what a bundle gets", "o", **_ring(colors, 12)))
    if shown.limits:
        keys.append(Line2D([], [], color=colors.muted, linewidth=1, linestyle=DASHES, label="lowest allowed"))
    legend = axes.legend(
        handles=keys, loc="upper left", bbox_to_anchor=(1.02, 1.0), frameon=False, labelcolor=colors.ink, fontsize=9
    )
    for text in legend.get_texts():
        text.set_parse_math(False)


@dataclass(frozen=True)
class FloatLayers:
    """What the picture of the search shows, by the number of layers left in fp32."""

    counts: tuple[int, ...]
    drops: tuple[float, ...]  # points of the metric
    timed: tuple[tuple[int, float], ...]  # (layers, time / fp32's time), of those that were timed
    chosen: int | None  # the count of what a bundle gets; None: it gets none of these


def float_layers(record: Mapping[str, Any]) -> FloatLayers:
    """quantize.json's curve → what its picture shows."""
    curve, ships = record["curve"], shipped_variant(record)
    shipped = next(variant for variant in record["variants"] if variant["name"] == ships)
    counts = tuple(step["float_layers"] for step in curve)
    is_of_curve = ships in ("int8", "int8-mixed") and len(shipped["float_layers"]) in counts
    return FloatLayers(
        counts,
        tuple(step["drop"] for step in curve),
        tuple((step["float_layers"], step["time_ratio"]) for step in curve if step["time_ratio"] is not None),
        len(shipped["float_layers"]) if is_of_curve else None,
    )


def sensitivity_picture(record: Mapping[str, Any], theme: ThemeName = "light") -> bytes:
    """quantize.json with a curve → a PNG: drop, and time as a share of fp32's, by the layers left in fp32.

    Dashed: the guard's limit, and fp32's time; a larger dot: what a bundle gets. Without a time there is only the
    first panel.
    """
    from matplotlib.figure import Figure

    colors, shown = THEMES[theme], float_layers(record)
    with style(colors):
        figure = Figure(figsize=(9, 3.3), dpi=DPI)
        figure.subplots_adjust(wspace=0.2)
        panels = figure.subplots(1, 2 if shown.timed else 1, squeeze=False)[0]
        drops = tuple(zip(shown.counts, shown.drops, strict=True))
        _draw_steps(panels[0], drops, record["max_drop"], shown.chosen, colors.wrong, colors)
        panels[0].set_title(f"drop, points of {short(drawable(record['metric']), 20)}", **title_style(colors))
        if shown.timed:
            _draw_steps(panels[1], shown.timed, 1.0, shown.chosen, colors.right, colors)
            panels[1].set_title("time / fp32's time", **title_style(colors))
        return png(figure)


def _draw_steps(
    axes: Axes, steps: Sequence[tuple[int, float]], level: float, chosen: int | None, color: str, colors: Theme
) -> None:
    """(layers in fp32, figure) pairs, a dashed line at `level`; of what a bundle gets, a larger dot and the figure."""
    from matplotlib.ticker import MaxNLocator

    values = [value for _, value in steps]
    axes.plot([count for count, _ in steps], values, "o-", markersize=4, color=color)
    axes.axhline(level, color=colors.muted, linewidth=1, linestyle=DASHES)
    axes.set_ylim(min(0.0, 1.15 * min(values)), 1.15 * max(level, 0.1, *values))
    axes.set_xlabel("layers left in fp32")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    axes.grid(axis="y", color=colors.line, linewidth=0.8)
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.tick_params(length=0)
    for count, value in steps:
        if count == chosen:
            axes.plot(count, value, "o", color=color, markersize=9)
            # not beside the point, where it would lie on the line or on the limit
            text = f"{value:.2f} with {count} {'layer' if count == 1 else 'layers'}"
            axes.set_title(text, loc="right", color=colors.muted, fontsize=10)


def title_style(colors: Theme) -> dict[str, Any]:
    """How the title of one panel is written: left, in ink, and no mathematics is read into it."""
    return {"loc": "left", "color": colors.ink, "fontsize": 11, "parse_math": False}


def contact_sheet(mistakes: Sequence[Mapping[str, Any]]) -> bytes:
    """The mistakes of metrics.json → a JPEG: each image with "true → predicted score" under it, the worst first.

    An image that cannot be read is a grey cell that says so. Without mistakes: a small picture that says so.
    """
    from matplotlib.figure import Figure

    colors, side, gap, text_height = THEMES["light"], 200, 16, 44  # pixels
    columns = min(4, len(mistakes))
    rows = -(-len(mistakes) // 4)
    width, height = (gap + columns * (side + gap), gap + rows * (side + text_height + gap)) if mistakes else (460, 90)
    with style(colors):
        figure = Figure(figsize=(width / 100, height / 100), dpi=100)
        canvas = np.full((height, width, 3), 255, np.uint8)
        for index, mistake in enumerate(mistakes):
            left = gap + index % 4 * (side + gap)
            top = gap + index // 4 * (side + text_height + gap)
            canvas[top : top + side, left : left + side] = _cell(Path(mistake["path"]), side)
            under = (left / width, 1 - (top + side + 6) / height)
            figure.text(*under, _caption(mistake), va="top", fontsize=8.5, linespacing=1.35, parse_math=False)
        if not mistakes:
            figure.text(
                0.5, 0.5, "No mistakes: every validation image is right.", ha="center", va="center", fontsize=12
            )
        figure.figimage(canvas)
        buffer = io.BytesIO()
        figure.savefig(buffer, format="jpeg", pil_kwargs={"quality": 90})
    return buffer.getvalue()


def _caption(mistake: Mapping[str, Any]) -> str:
    label, predicted = short(drawable(mistake["label"]), 26), short(drawable(mistake["predicted"]), 16)
    return f"{label}\n→ {predicted}  {100 * mistake['score']:.0f} %"


def _cell(path: Path, side: int) -> np.ndarray:
    """An image file → uint8 (side, side, 3) RGB, the whole image, with bars where its shape is another."""
    cell = np.full((side, side, 3), 238, np.uint8)
    try:
        image = fitted(runner.read_image(path), side)
    except runner.RunnerError:
        cv2.putText(
            cell, "image gone", (side // 2 - 44, side // 2), cv2.FONT_HERSHEY_SIMPLEX, 0.5, (90, 90, 90), 1, cv2.LINE_AA
        )
        return cell
    height, width = image.shape[:2]
    top, left = (side - height) // 2, (side - width) // 2
    cell[top : top + height, left : left + width] = image[..., ::-1]
    return cell


def fitted(image: np.ndarray, side: int) -> np.ndarray:
    """uint8 (H, W, 3) → the same picture, its longer side `side` pixels; for eyes, not for networks."""
    scale = side / max(image.shape[:2])
    # Tiny images are shown as the pixels that they are: smoothed, 8 px of a digit are a blur.
    method = cv2.INTER_AREA if scale < 1 else cv2.INTER_CUBIC if scale < 4 else cv2.INTER_NEAREST
    size = (max(1, round(image.shape[1] * scale)), max(1, round(image.shape[0] * scale)))
    return np.asarray(cv2.resize(image, size, interpolation=method))


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
