"""The pictures of latency: a run's samples, what a comparison saw block by block, and the p50 over commits."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Sequence
from itertools import pairwise
from typing import TYPE_CHECKING

import numpy as np

from edgekit import runner
from edgekit.latency import Case, Comparison, LatencyRun, ms_text, share_text
from edgekit.pictures import DASHES, DPI, THEMES, Theme, ThemeName, drawable, png, short, style, title_style

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from edgekit.history import History, Series

TAIL = 5.0  # interquartile ranges above the third quartile: what lies beyond would press the rest into a corner
BINS = (16, 60)
LABEL = 12  # points from one row of labels to the next
CROWDED = 0.1  # of the axis' width: labels nearer than that overlap
MAX_PANELS = 24  # of a history: a picture of more is too tall to be shown
MAX_NAMES = 30  # of commits below a panel
CALM = 0.05  # of a series' level: y spans at least that much to either side, so that noise does not look like news


def latency_picture(record: LatencyRun | Comparison, theme: ThemeName = "light") -> bytes:
    """A PNG. Of a run: the histogram of end_to_end, with its percentiles. Of a comparison, a row a gated case: the
    change in each block, in time order, with the limit and the 99 % interval, and both bundles' slice medians.

    Where there is no sample, a picture that says so.
    """
    colors = THEMES[theme]
    with style(colors):
        if isinstance(record, LatencyRun):
            samples = record.samples_ms.get("end_to_end", ())
            return _run_picture(record, samples, colors) if samples else _empty_picture("end_to_end was not measured")
        cases = [case for case in record.cases if case.log_ratios or case.base_ms or case.candidate_ms]
        return _comparison_picture(record, cases, colors) if cases else _empty_picture(record.reason)


def _empty_picture(reason: str) -> bytes:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 1.2), dpi=DPI)
    lines = textwrap.wrap(drawable(f"Nothing was measured: {reason}"), 90, max_lines=3, placeholder=" …")
    figure.text(0.5, 0.5, "\n".join(lines), ha="center", va="center", parse_math=False)
    return png(figure)


def shown_until(samples_ms: Sequence[float]) -> float:
    """Where a histogram's x axis ends: at the largest sample that is not of a long tail (TAIL)."""
    q1, q3 = np.percentile(samples_ms, (25, 75))
    fence = float(q3 + TAIL * max(q3 - q1, 0.005 * q3))
    return max(float(ms) for ms in samples_ms if ms <= fence)


def _edges(samples_ms: Sequence[float], end: float) -> list[float]:
    """Bins by the rule of Freedman and Diaconis (1981), within BINS; at least a thousandth of the value wide in all."""
    values = np.asarray(samples_ms)
    values = values[values <= end]
    low, high = float(values.min()), max(end, float(values.min()) * 1.001 + 1e-9)
    q1, q3 = np.percentile(values, (25, 75))
    width = 2 * (q3 - q1) / np.cbrt(len(values))
    count = math.ceil((high - low) / width) if width > 0 else BINS[0]
    return [float(edge) for edge in np.linspace(low, high, min(max(count, BINS[0]), BINS[1]) + 1)]


def _run_picture(record: LatencyRun, samples: Sequence[float], colors: Theme) -> bytes:
    from matplotlib.figure import Figure

    end = shown_until(samples)
    figure = Figure(figsize=(8, 3.4), dpi=DPI)
    axes = figure.add_axes((0, 0, 1, 1))
    axes.hist(samples, bins=_edges(samples, end), color=colors.right, alpha=0.85)
    marks = {name: ms for name, ms in runner.percentiles(samples).items() if ms is not None}
    near = {name: ms for name, ms in marks.items() if ms <= end}
    for name, ms in near.items():
        axes.axvline(ms, color=colors.ink, linewidth=1.2, linestyle="-" if name == "p50" else DASHES)
    rows = _write_above(axes, [(ms, f"{name} {ms_text(ms)}", colors.ink) for name, ms in near.items()])
    notes = [f"{name} {ms_text(ms)} ms, beyond" for name, ms in marks.items() if ms > end]
    if beyond := sum(ms > end for ms in samples):
        notes.append(f"{beyond} of {len(samples)} beyond {ms_text(end)} ms, up to {ms_text(max(samples))} ms")
    _plain_axes(axes, colors)
    name = drawable(f"{record.subject.name}-{record.subject.target}, {record.subject.precision}")
    axes.set_title(
        f"{short(name, 48)}: {len(samples)} images, end to end", pad=14 + LABEL * rows, **title_style(colors)
    )
    axes.set_xlabel("; ".join(["milliseconds, from file to answer", *notes]))
    return png(figure)


def _write_above(axes: Axes, labels: Sequence[tuple[float, str, str]], width: float = CROWDED) -> int:
    """(x, text, colour) in rising order: writes each above the axes at its x; → how many rows they took.

    A text that is nearer than `width` (of the axis') to the one before goes into the row above it.
    """
    low, high = axes.get_xlim()
    row, before, rows = 0, -math.inf, 0
    for value, text, color in labels:
        place = (value - low) / (high - low)
        row = row + 1 if place - before < width else 0
        before, rows = place, max(rows, row + 1)
        axes.annotate(
            text,
            (value, 1),
            xycoords=("data", "axes fraction"),
            xytext=(0, 5 + LABEL * row),
            textcoords="offset points",
            ha="center",
            fontsize=9,
            color=color,
            parse_math=False,
        )
    return rows


def _plain_axes(axes: Axes, colors: Theme) -> None:
    axes.grid(axis="y", color=colors.line, linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.tick_params(length=0)


def _comparison_picture(record: Comparison, cases: Sequence[Case], colors: Theme) -> bytes:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 2.9 * len(cases)), dpi=DPI)
    figure.subplots_adjust(wspace=0.16, hspace=0.6)
    panels = figure.subplots(len(cases), 2, squeeze=False)
    for row, case in zip(panels, cases, strict=True):
        _draw_blocks(row[0], record, case, colors)
        _draw_medians(row[1], record, case, colors)
    return png(figure)


def _draw_blocks(axes: Axes, record: Comparison, case: Case, colors: Theme) -> None:
    """A dot a block; a band from `low` to `high`; a line at the change, at 0 and at the limit."""
    from matplotlib.ticker import FuncFormatter, MaxNLocator

    changes = [100 * math.expm1(ratio) for ratio in case.log_ratios]
    places = range(1, len(changes) + 1)
    limit = 100 * record.fail_if
    axes.axhline(0, color=colors.muted, linewidth=1)
    axes.axhline(limit, color=colors.wrong, linewidth=1.2, linestyle=DASHES)
    if case.low is not None and case.high is not None:
        axes.axhspan(100 * case.low, 100 * case.high, color=colors.right, alpha=0.16, linewidth=0)
    if case.change is not None:
        axes.axhline(100 * case.change, color=colors.right, linewidth=1.2)
    axes.plot(places, changes, "o", color=colors.right, markersize=5)
    _plain_axes(axes, colors)
    axes.set_xlim(0.5, max(len(changes), 1) + 0.5)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:+g} %" if value else "0 %"))
    axes.margins(y=0.12)
    limit_text = share_text(record.fail_if)
    axes.set_xlabel(f"block, in time order; dashed: limit {limit_text}; band: 99 % interval", fontsize=9)
    title = f"{drawable(case.name)}: {case.verdict}"
    change = "" if case.change is None else f", {share_text(case.change)}"
    axes.set_title(f"{short(title, 30)}{change}", **title_style(colors))


def _draw_medians(axes: Axes, record: Comparison, case: Case, colors: Theme) -> None:
    """Both bundles' slice medians, one histogram over the other, in the same bins."""
    from matplotlib.ticker import MaxNLocator

    arms = ((case.base_ms, "baseline", colors.muted), (case.candidate_ms, "candidate", colors.right))
    both, note = [*case.base_ms, *case.candidate_ms], ""
    if both:
        end = shown_until(both)
        edges = _edges(both, end)
        for samples, name, color in arms:
            axes.hist(samples, bins=edges, color=color, alpha=0.5, label=name)
        if beyond := sum(ms > end for ms in both):
            note = f"; {beyond} beyond, up to {ms_text(max(both))}"
        legend = axes.legend(loc="lower left", ncols=2, frameon=False, labelcolor=colors.ink, fontsize=10)
        legend.set_bbox_to_anchor((-0.02, 0.98))  # above the axes, where no bar can be
    _plain_axes(axes, colors)
    axes.yaxis.set_major_locator(MaxNLocator(integer=True, nbins=5))
    clock = {"cpu": "CPU", "wall": "wall"}[record.clock]
    axes.set_xlabel(f"milliseconds of {clock} time, a median a slice{note}", fontsize=9)


def history_picture(history: History, theme: ThemeName = "light") -> bytes:
    """A PNG: a panel a series, p50 over commits, the level between steps, and each step with its size in percent."""
    from matplotlib.figure import Figure

    from edgekit.history import conditions_texts

    colors, shown = THEMES[theme], history.series[:MAX_PANELS]
    with style(colors):
        if not shown:
            return _empty_picture(f"no file has a figure of {history.stage}")
        figure = Figure(figsize=(10, 3.2 * len(shown)), dpi=DPI if len(shown) <= 8 else 100)
        figure.subplots_adjust(hspace=0.85)
        panels = figure.subplots(len(shown), 1, squeeze=False)[:, 0]
        for axes, series, under in zip(panels, shown, conditions_texts(history.series), strict=False):
            rows = _draw_series(axes, series, colors)
            head = drawable(f"{series.bundle} on {series.device}: {history.stage.replace('_', ' ')}, p50 in ms")
            axes.set_title(short(head, 90), pad=22 + LABEL * rows, **title_style(colors))
            _write_below_title(axes, short(drawable(under), 120), 7 + LABEL * rows, colors)
        if left := len(history.series) - len(shown):
            panels[-1].set_xlabel(f"{left} more series are not shown")
        return png(figure)


def _write_below_title(axes: Axes, text: str, height: float, colors: Theme) -> None:
    """height: above the axes, in points."""
    axes.annotate(
        text,
        (0, 1),
        xycoords="axes fraction",
        xytext=(0, height),
        textcoords="offset points",
        fontsize=9,
        color=colors.muted,
        parse_math=False,
    )


def _draw_series(axes: Axes, series: Series, colors: Theme) -> int:
    """→ how many rows of text are above the axes. Commits are equally far apart, whenever they were measured."""
    values = [point.p50_ms for point in series.points]
    top, level = shown_until(values), float(np.median(values))
    low, high = min(*values, level * (1 - CALM)), max(top, level * (1 + CALM))
    margin = 0.08 * (high - low)
    axes.set_ylim(low - margin, high + margin)
    near = [value if value <= top else math.nan for value in values]
    axes.plot(range(len(values)), near, "o-", color=colors.right, markersize=4, linewidth=0.8, zorder=3)
    for place, value in enumerate(values):
        if value > top:  # at the edge, with its figure: on the axis it would press the others flat
            at = (place, high + margin / 2)
            axes.plot(*at, "^", color=colors.ink, markersize=7, zorder=4)
            axes.annotate(ms_text(value), at, (6, -3), textcoords="offset points", fontsize=8)
    ends = [0, *(step.place for step in series.steps), len(values)]
    for begin, end in pairwise(ends):
        axes.hlines(float(np.median(values[begin:end])), begin - 0.4, end - 0.6, colors.ink, linewidth=1.2, zorder=2)
    steps = [(step, colors.wrong if step.change > 0 else colors.weights) for step in series.steps]
    for step, color in steps:
        axes.axvline(step.place - 0.5, color=color, linewidth=1.4, linestyle=DASHES)
    axes.set_xlim(-0.6, len(values) - 0.4)
    every = math.ceil(len(values) / MAX_NAMES)
    places = range(0, len(values), every)
    names = [short(drawable(series.points[place].revision), 15) for place in places]
    axes.set_xticks(places, names, rotation=60, ha="right", rotation_mode="anchor", fontsize=8, parse_math=False)
    _plain_axes(axes, colors)
    named = [(step.place - 0.5, f"{drawable(step.revision)} {share_text(step.change)}", color) for step, color in steps]
    return _write_above(axes, named, 2 * CROWDED)
