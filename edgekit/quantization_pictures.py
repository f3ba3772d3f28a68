"""What quantization costs and gains, as pictures of quantize.json."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from edgekit.pictures import DASHES, DPI, THEMES, Theme, ThemeName, drawable, png, short, style, title_style

if TYPE_CHECKING:
    from matplotlib.axes import Axes


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
