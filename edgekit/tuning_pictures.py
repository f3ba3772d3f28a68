"""What a search of training settings found, as a picture."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from itertools import accumulate
from typing import TYPE_CHECKING, Any

from edgekit.pictures import DPI, THEMES, Theme, ThemeName, drawable, png, style, title_style

if TYPE_CHECKING:
    from matplotlib.axes import Axes

COLUMNS = 4  # of the settings' panels
LOGARITHMIC = {"learning_rate", "head_learning_rate", "weight_decay"}
FEW = {"unfrozen_fraction", "ema_decay", "mixup"}  # of a few values: side by side, as ema_decay's lie close to 1


def tuning_picture(trials: Sequence[Mapping[str, Any]], best: int, theme: ThemeName = "light") -> bytes:
    """Trials as tuning.Trial has them, one or more complete → a PNG: the metric a trial, and against each setting.

    best: the best one's number. Filled dots are complete trials, rings those that were given up early, with the best
    that they had reached; the line is the best so far. A trial in which no epoch ended is left out.
    """
    from matplotlib.figure import Figure

    colors = THEMES[theme]
    shown = [trial for trial in trials if trial["val_metric"] is not None and trial["state"] != "failed"]
    winner = next(trial for trial in shown if trial["number"] == best)
    settings = list(winner["settings"])
    rows = -(-len(settings) // COLUMNS)
    with style(colors):
        figure = Figure(figsize=(10, 2.8 + 2.4 * rows), dpi=DPI)
        grid = figure.add_gridspec(1 + rows, COLUMNS, hspace=0.55, wspace=0.15)
        top = figure.add_subplot(grid[0, :])
        _draw_trials(top, shown, winner, colors)
        for index, name in enumerate(settings):
            axes = figure.add_subplot(grid[1 + index // COLUMNS, index % COLUMNS], sharey=top)
            _draw_setting(axes, shown, winner, name, colors)
            axes.tick_params(labelleft=index % COLUMNS == 0)
            axes.tick_params(axis="x", labelsize=8)
        return png(figure)


def _draw_trials(axes: Axes, shown: Sequence[Mapping[str, Any]], winner: Mapping[str, Any], colors: Theme) -> None:
    from matplotlib.ticker import MaxNLocator

    complete = [trial for trial in shown if trial["state"] == "complete"]
    so_far = list(accumulate((100 * trial["val_metric"] for trial in complete), max))
    ends = [trial["number"] for trial in complete] + [shown[-1]["number"]]
    axes.step(ends, [*so_far, so_far[-1]], where="post", color=colors.muted, linewidth=1.2)
    _draw_points(axes, [trial["number"] for trial in shown], shown, winner, colors)
    at = (winner["number"], 100 * winner["val_metric"])
    axes.annotate(f"{at[1]:.2f}", at, (0, -16), textcoords="offset points", ha="center", color=colors.ink)
    axes.set_title(f"validation {drawable(winner['metric'])} of each trial, %", **title_style(colors))
    axes.set_xlabel("trial (filled: complete; ring: given up early; line: best so far)")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    axes.set_xlim(shown[0]["number"] - 0.5, shown[-1]["number"] + 0.5)
    axes.margins(y=0.18)
    _plain_axes(axes, colors)


def _draw_setting(
    axes: Axes, shown: Sequence[Mapping[str, Any]], winner: Mapping[str, Any], name: str, colors: Theme
) -> None:
    values = [trial["settings"][name] for trial in shown]
    if name in FEW:
        choices = sorted(set(values))
        axes.set_xticks(range(len(choices)), [f"{choice:g}" for choice in choices])
        values = [choices.index(value) for value in values]
    elif name in LOGARITHMIC:
        axes.set_xscale("log")
        ticks = _ticks(min(values), max(values))
        axes.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
        axes.minorticks_off()
    else:
        axes.locator_params(axis="x", nbins=4)
    _draw_points(axes, values, shown, winner, colors)
    axes.margins(x=0.12)
    axes.set_title(name, **title_style(colors))
    _plain_axes(axes, colors)


def _ticks(low: float, high: float) -> list[float]:
    """1, 2 and 5 times powers of ten between low and high; where there are fewer than two of them, low and high."""
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    found = [x for power in powers for x in (float(f"{digit}e{power}") for digit in (1, 2, 5)) if low <= x <= high]
    return found if len(found) > 1 else [float(f"{x:.2g}") for x in (low, high)]


def _draw_points(
    axes: Axes, x: Sequence[float], shown: Sequence[Mapping[str, Any]], winner: Mapping[str, Any], colors: Theme
) -> None:
    for place, trial in zip(x, shown, strict=True):
        color = colors.wrong if trial is winner else colors.right
        fill = color if trial["state"] == "complete" else "none"
        size = 8 if trial is winner else 5
        order = 4 if trial is winner else 3
        look: dict[str, Any] = {"color": color, "markerfacecolor": fill, "markersize": size, "zorder": order}
        axes.plot(place, 100 * trial["val_metric"], "o", **look)


def _plain_axes(axes: Axes, colors: Theme) -> None:
    axes.grid(axis="y", color=colors.line, linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.tick_params(which="both", length=0)
