"""A run's records and files → terminal tables, Markdown, and one HTML page that needs nothing else."""

from __future__ import annotations

import base64
import csv
import statistics
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, TypeVar

import cv2
import numpy as np
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from edgekit import runner
from edgekit.artifacts import RunFolder, read_json, write_text
from edgekit.datasets import Problem, read_split
from edgekit.errors import ArtifactError
from edgekit.history import CAPTION, HEADER, History, history_rows
from edgekit.latency import ms_text, share_text
from edgekit.pictures import (
    THEMES,
    ThemeName,
    confusion_picture,
    curves_picture,
    engine_name,
    fitted,
    float_layers,
    quantization_picture,
    sensitivity_picture,
    shipped_variant,
    tradeoff,
)

if TYPE_CHECKING:
    from rich.table import Table

    from edgekit.arm64 import Emulated
    from edgekit.backbones import Backbone
    from edgekit.latency import Comparison, LatencyRun
    from edgekit.parity import Verdict
    from edgekit.threads import ThreadSweep
    from edgekit.timing import Timing
    from edgekit.workload import Workload

NOTHING = "-"  # in a cell that has no value
NOTE_WIDTH = 26  # characters that a column of notes needs, at least

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


def _points(drop: float) -> str:
    """Points of a metric lost → "0.24"; gained → "-0.12"; never "-0.00"."""
    return f"{round(drop, 2) + 0.0:.2f}"


def _ms(milliseconds: float | None) -> str:
    return NOTHING if milliseconds is None else ms_text(milliseconds)


def _ratio(share: float | None) -> str:
    return NOTHING if share is None else f"{share:.2f}"


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


def _quantization_rows(record: Mapping[str, Any]) -> list[Row]:
    """A header and a row a variant and engine; what is not ok has its status and no figures."""
    fp32_bytes, ships = record["variants"][0]["size_bytes"], shipped_variant(record)
    rows = [["variant", "size", "OpenCV", record["metric"], "drop", "agrees", "ms", "time"]]
    for variant in record["variants"]:
        name, size_bytes = variant["name"], variant["size_bytes"]
        title = f"{name} *" if name == ships else name
        size = megabytes(size_bytes) + ("" if name == "fp32" else f" ({fp32_bytes / size_bytes:.1f}x)")
        for figure in variant["figures"]:
            cells = [figure["status"], *[NOTHING] * 4]
            if figure["status"] == "ok":
                cells = [percent(figure["metric"]), _points(figure["drop"]), percent(figure["agreement"])]
                cells += [_ms(figure["median_ms"]), _ratio(figure["time_ratio"])]
            rows.append([title, size, engine_name(figure), *cells])
    return rows


def _quantization_faults(record: Mapping[str, Any]) -> list[str]:
    """A line for each row that is not ok: what it is, and the message."""
    return [
        f"{variant['name']} on {engine_name(figure)}, {figure['status']}: {' '.join(figure['message'].split())}"
        for variant in record["variants"]
        for figure in variant["figures"]
        if figure["status"] != "ok"
    ]


def _quantization_caption(record: Mapping[str, Any]) -> str:
    metric, limit = record["metric"], _points(record["max_drop"])
    return (
        f"* a bundle for {record['target']} gets it; drop: points of {metric} lost against fp32 on the same engine "
        f"(-0.12: gained), {limit} allowed; agrees: share of images with fp32's answer; "
        "ms: median of the forward pass; time: ms / fp32's ms"
    )


def _float_layers_rows(record: Mapping[str, Any]) -> list[Row]:
    """A header and a row a step of the search: the layers left in fp32, and what they cost and gain."""
    noise = {layer["layer"]: f"{layer['sqnr_db']:.1f}" for layer in record["sensitivity"]}
    chosen = float_layers(record).chosen
    rows = [["layers in fp32", "drop", "time", "the last one", "SQNR, dB"]]
    for step in record["curve"]:
        count = step["float_layers"]
        title = f"{count} *" if count == chosen else str(count)
        last = [step["last"] or NOTHING, noise.get(step["last"], NOTHING)]
        rows.append([title, _points(step["drop"]), _ratio(step["time_ratio"]), *last])
    return rows


def _float_layers_caption(record: Mapping[str, Any]) -> str:
    return (
        f"* a bundle for {record['target']} gets it; the worst layers come first; SQNR: signal / noise of the int8 "
        "layer's output, the lower the worse"
    )


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


def quantize_table(record: Mapping[str, Any]) -> Table:
    """quantize.json → a row a variant and engine: size, accuracy, time, and which one a bundle gets.

    What is not ok has its status in the place of the figures, and its message under the table: an importer's message
    is a paragraph. The table fits into 80 characters.
    """
    caption = "\n".join([*_quantization_faults(record), _quantization_caption(record)])
    title = f"{record['images']} validation images"
    return _narrow(_table(_quantization_rows(record), left=(2,), title=title, caption=caption))


def float_layers_table(record: Mapping[str, Any]) -> Table | None:
    """quantize.json → a row for each number of layers left in fp32; None where int8 needed no such search."""
    if not record["curve"]:
        return None
    return _narrow(_table(_float_layers_rows(record), left=(3,), caption=_float_layers_caption(record)))


def _narrow(table: Table, gap: int = 1) -> Table:
    """The same table with so many spaces between columns."""
    table.caption_justify = "left"
    table.padding = (0, gap - 1, 0, 0)
    return table


def verdicts_table(verdicts: Iterable[Verdict]) -> Table:
    """What each engine of each OpenCV makes of a model, with what went wrong."""
    rows = [["OpenCV", "engine", "status", "error", "from files", "ms", "what went wrong"]]
    for verdict in verdicts:
        errors = [_error(verdict.relative_error), _error(verdict.end_to_end_error)]
        ms = NOTHING if verdict.best_ms is None else f"{verdict.best_ms:.1f}"
        # an importer's own message is a paragraph; where the search found the node, that says it better
        is_located = verdict.first_difference and not verdict.first_difference.startswith("not located")
        fault = verdict.first_difference if is_located else verdict.message
        rows.append([verdict.version, verdict.engine.removeprefix("opencv-"), verdict.status, *errors, ms, fault])
    caption = "error: share of the largest output; ms: the fastest of these forward passes on this machine"
    return _table(rows, left=(1, 2, 6), caption=caption)


def emulated_table(rows: Iterable[Emulated]) -> Table:
    """What a bundle's own check said on each emulated CPU with each OpenCV; emulated_reasons says why."""
    table = [["CPU", "OpenCV", "engine", "status", "images", "error", "s"]]
    for row in rows:
        opencv = f"{row.opencv} ({row.found})" if row.found else row.opencv
        seconds = f"{row.seconds:.0f}" if row.seconds else NOTHING
        counts = [str(row.images or NOTHING), _error(row.relative_error), seconds]
        table.append([row.cpu, opencv, row.engine or NOTHING, row.status, *counts])
    caption = "error: share of the largest output; s: the check's seconds under emulation, which say nothing of speed"
    return _table(table, left=(1, 2, 3), caption=caption)


def emulated_reasons(rows: Iterable[Emulated]) -> list[str]:
    """A line for each reason why a row is not ok: the CPUs, the OpenCV, the reason."""
    cpus: dict[tuple[str, str], list[str]] = defaultdict(list)
    for row in rows:
        if row.reason:
            cpus[row.opencv, row.reason].append(row.cpu)
    return [f"OpenCV {opencv} on {', '.join(names)}: {reason}" for (opencv, reason), names in cpus.items()]


def latency_table(run: LatencyRun) -> Table:
    """A row a stage, and the whole; latency_lines says the rest."""
    rows = [["ms", "p50", "p90", "p99"]]
    for name, samples in run.samples_ms.items():
        rows.append([name.replace("_", " "), *(_ms(value) for value in runner.percentiles(samples).values())])
    return _narrow(_table(rows), gap=2)


def latency_lines(run: LatencyRun) -> list[str]:
    """What stands under latency_table: starts, throughput, memory, energy, and the conditions of it all."""
    starts = [("import", run.import_ms), ("load", run.load_ms), ("first image", run.first_ms)]
    medians = ", ".join(f"{name} {np.median(values):.0f} ms" for name, values in starts)
    count = len(run.samples_ms["end_to_end"])
    lines = [
        f"{medians} (medians of {len(run.first_ms)} processes)",
        f"{count} images one by one; {_rate(run.images_per_second)} images/s with decoding beside",
    ]
    if run.peak_rss_bytes is not None and run.floor_rss_bytes is not None:
        above = megabytes(run.peak_rss_bytes - run.floor_rss_bytes)
        lines.append(f"memory: {megabytes(run.peak_rss_bytes)} at most, {above} over Python and OpenCV alone")
    if run.energy_mj is not None:
        lines.append(f"energy: {run.energy_mj:.1f} mJ an image, the whole board")
    subject, where = run.subject, run.conditions
    return [
        *lines,
        f"{subject.name} for {subject.target} ({subject.precision}) on {subject.device}: {where['cpu']}",
        f"OpenCV {where['opencv']}, {where['engine']} engine, {where['backend']}, {where['precision']}, "
        f"threads: {where['threads']}, cores: {where['cores']}",
    ]


def threads_table(sweep: ThreadSweep) -> Table:
    """A row a number of threads, and which one is taken."""
    rows = [["threads", "p50, ms", "to the fastest", ""]]
    for row in sweep.rows:
        note = "taken: the fewest within 2 %" if row.threads == sweep.chosen else ""
        rows.append([str(row.threads), _ms(row.p50_ms), f"{row.ratio:.3f}", note])
    return _narrow(_table(rows, left=(3,)), gap=2)


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


def comparison_table(found: Comparison) -> Table:
    """What `edgekit compare` measured: a row a gate, and under what conditions.

    Of a single gate the verdict is left out: it is the whole's, which is told before.
    """
    clocks = ("CPU time", "wall time") if found.clock == "cpu" else ("wall time", "CPU time")
    rows = [["", "baseline", "candidate", "change", "99 % sure within", clocks[1], "verdict"]]
    for case in found.cases:
        medians = [
            f"{ms_text(statistics.median(ms))} ms" if ms else NOTHING for ms in (case.base_ms, case.candidate_ms)
        ]
        ends = NOTHING if case.low is None else f"{share_text(case.low)} to {share_text(case.high)}"
        rows.append([case.name, *medians, share_text(case.change), ends, share_text(case.other_change), case.verdict])
    if len(found.cases) == 1:
        rows = [row[:-1] for row in rows]
    names = [f"{subject.name}-{subject.target}" for subject in (found.base, found.candidate)]
    return _narrow(_table(rows, title=f"{clocks[0]}: {' against '.join(names)}"), gap=2)


def comparison_lines(found: Comparison) -> list[str]:
    """What stands under comparison_table: how much was measured, where, and what changed in the graph."""
    lines = [f"{found.blocks} pairs of processes in {found.seconds:.0f} s"] if found.blocks else []
    lines += [f"not counted: {reason}" for reason in dict.fromkeys(found.rejected)]
    where = found.conditions[1]
    if where:  # else nothing was measured
        lines.append(
            f"OpenCV {where['opencv']}, {where['engine']} engine, {where['backend']}, threads: {where['threads']}, "
            f"{where['cpu']}"
        )
    return [*lines, *(f"in the graph: {change}" for change in found.workload)]


def backbones_table(rows: Sequence[Backbone], timings: Mapping[str, Timing], width: int) -> Table:
    """What helps to choose a backbone: size, work and accuracy, what was proved, the weights' licence.

    timings: of each row by its name; empty: not measured. width: of the terminal, in characters; where it is small,
    notes and input sizes are left out.
    """
    columns = {
        "backbone": [f"{row.name} *" if row.recommended else row.name for row in rows],
        "params": [_millions(row.params) for row in rows],
        "MACs": [_millions(row.macs) for row in rows],
        "input": [str(row.input_size[1]) for row in rows],
        "top-1": [NOTHING if row.imagenet_top1 is None else f"{row.imagenet_top1:.1f} %" for row in rows],
        "latency": [_latency(timings[row.name]) for row in rows] if timings else [],
        "OpenCV": [" ".join(row.opencv) or NOTHING for row in rows],
        "licence": [row.weights_license or NOTHING for row in rows],
        "note": [row.note for row in rows],
    }
    gap = 2
    if not timings:
        del columns["latency"]
    if _width(columns, gap) > width:
        del columns["note"]
    if _width(columns, gap) > width:
        del columns["input"]
        gap = 1
    names = list(columns)
    texts = [names, *map(list, zip(*columns.values(), strict=True))]
    left = [index for index, name in enumerate(names) if name in ("OpenCV", "licence", "note")]
    caption = "* recommended; MACs: multiply-adds, one image; top-1: ImageNet; OpenCV: proved on"
    table = _table(texts, left=left, caption=caption)
    table.caption_justify = "left"
    table.padding = (0, gap - 1, 0, 0)  # narrower than usual, for 80 characters
    for index, column in enumerate(table.columns):
        column.no_wrap = index not in left  # a name or a figure on two lines is hard to read
    return table


def workload_table(rows: Mapping[str, Workload]) -> Table:
    """What one inference of each graph costs, a column a graph; under the table, what could not be counted of it."""
    from edgekit.workload import amount

    counted = ("QuantizeLinear", "DequantizeLinear", "Transpose")
    titles = ["", "multiply-adds", "weights", "activations", "peak activations", "nodes", *counted]
    columns = [
        [
            name,
            amount(row.multiply_adds, ""),
            *(amount(size, "B") for size in (row.weight_bytes, row.activation_bytes, row.peak_activation_bytes)),
            str(sum(row.operators.values())),
            *(str(row.operators.get(operator, 0)) for operator in counted),
        ]
        for name, row in rows.items()
    ]
    texts = [list(texts) for texts in zip(titles, *columns, strict=True)]
    caption = "\n".join(f"not known of {name}: {line}" for name, row in rows.items() for line in row.unknown)
    return _table(texts, title="One inference", caption=caption)


def _width(columns: Mapping[str, list[str]], gap: int) -> int:
    """What a table needs, in characters; of the notes, which may be wrapped, only a part."""
    needed = {name: max(map(len, [name, *cells])) for name, cells in columns.items()}
    if "note" in needed:
        needed["note"] = min(needed["note"], NOTE_WIDTH)
    return sum(needed.values()) + gap * len(needed) + 1


def _millions(count: int) -> str:
    """11_689_512 → "11.7 M"; from 100 millions on without a decimal, from 1000 on in thousands of them: "1.8 G"."""
    if count >= 999.5e6:
        return f"{count / 1e9:.1f} G"
    return f"{count / 1e6:.0f} M" if count >= 99.95e6 else f"{count / 1e6:.1f} M"


def _latency(timing: Timing) -> str:
    return "failed" if timing.median_ms is None else f"{timing.median_ms:.1f} ms"


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


_CELL_STYLES = {
    "ok": "green",
    "wrong": "bold red",
    "raised": "bold red",
    "died": "bold red",
    "timed out": "bold red",
    "failed": "bold red",
    "refused": "bold red",
    "not proved": "bold red",
}


def history_table(history: History) -> Table:
    """Latency over commits, a row a series: from where to where it went, and where its level changed."""
    title = f"latency over commits: {history.stage.replace('_', ' ')}"
    rows = [list(HEADER), *history_rows(history)]
    return _narrow(_table(rows, left=(1, 2, 5), title=title, caption=CAPTION))


def markdown_metrics(metrics: Mapping[str, Any]) -> str:
    """metrics.json → the side by side table in GitHub's Markdown, ending in a line feed."""
    header, *rows = _metrics_rows(metrics)
    rule = ["---", *("---:" for _ in header[1:])]
    return "".join(f"| {' | '.join(row)} |\n" for row in (header, rule, *rows))


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
    conditions: dict[str, str]

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


Share = Annotated[float, Field(ge=0, le=1)]


class _Finite(_Record):
    """A record whose figures are drawn: not a number and infinity are no figures."""

    model_config = ConfigDict(allow_inf_nan=False)


class _Figure(_Finite):
    opencv: str
    engine: str
    status: Literal["ok", "wrong", "raised", "died", "timed out", "not proved"]
    message: str
    metric: Share | None
    drop: float | None
    agreement: Share | None
    median_ms: Annotated[float, Field(gt=0)] | None
    time_ratio: Annotated[float, Field(gt=0)] | None

    @model_validator(mode="after")
    def _has_figures(self) -> _Figure:
        if self.status == "ok" and None in (self.metric, self.drop, self.agreement):
            raise ValueError(f"no figures for {self.engine} of OpenCV {self.opencv}, which is ok")
        return self


class _Variant(_Record):
    name: Literal["fp32", "int8-weights", "int8", "int8-mixed"]
    size_bytes: Annotated[int, Field(gt=0)]
    float_layers: tuple[str, ...]
    figures: Annotated[tuple[_Figure, ...], Field(min_length=1)]


class _Step(_Finite):
    float_layers: int
    drop: float
    time_ratio: Annotated[float, Field(gt=0)] | None
    last: str


class _Layer(_Finite):
    layer: str
    sqnr_db: float


class _Calibration(_Record):
    images: int
    method: str


class _Quantization(_Finite):
    target: str
    precision: Literal["fp32", "int8", "int8-weights"]
    why: str
    onnx_sha256: str
    metric: str
    images: int
    max_drop: float
    calibration: _Calibration
    variants: tuple[_Variant, ...]
    curve: tuple[_Step, ...]
    sensitivity: tuple[_Layer, ...]
    conditions: dict[str, str]

    @model_validator(mode="after")
    def _fits(self) -> _Quantization:
        names = [variant.name for variant in self.variants]
        if names[:1] != ["fp32"]:
            raise ValueError("fp32 is not the first variant")
        if self.precision not in {name.removesuffix("-mixed") for name in names}:
            raise ValueError(f"no variant for the precision {self.precision}")
        return self


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


def read_quantization(path: Path) -> dict[str, Any]:
    """quantize.json, for the tables and pictures here. Raises ArtifactError when it is not as `quantize` writes it."""
    return _checked(_Quantization, read_json(path), path)


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
    quantization = read_quantization(run.quantization) if run.quantization.is_file() else None
    history = read_history(run.history) if run.history.is_file() else []
    return {
        "name": run.name,
        "run": str(run.path),
        "themes": THEMES,
        "metrics": metrics,
        "verdict": _verdict(metrics) if metrics else "",
        "tiles": _tiles(run, metrics, quantization),
        "summary": _summary(run),
        "curves": _both_themes(lambda theme: curves_picture(history, theme)) if history else None,
        "metrics_rows": _metrics_rows(metrics) if metrics else None,
        "per_class_rows": _per_class_rows(metrics) if metrics else None,
        "confusion": _confusion_pictures(metrics) if metrics else None,
        "mistakes": [_shown_mistake(mistake) for mistake in metrics["mistakes"]] if metrics else None,
        "parity_rows": _parity_rows(parity) if parity else None,
        "faults": [row for row in parity["verdicts"] if row["status"] != "ok"] if parity else [],
        "quantization": _quantization_facts(run, quantization) if quantization else None,
        "recipe": run.recipe.read_text(encoding="utf-8") if run.recipe.is_file() else None,
        "conditions": _conditions(run, history, metrics, parity, quantization),
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


def _tiles(
    run: RunFolder, metrics: Mapping[str, Any] | None, quantization: Mapping[str, Any] | None
) -> list[tuple[str, str]]:
    tiles = []
    if metrics:
        tiles += [(f"top-1, {name}", percent(column["top1"])) for name, column in metrics["columns"].items()]
        tiles += [("val images", str(metrics["images"])), ("classes", str(len(metrics["class_names"])))]
    if quantization:
        tiles += [(f"precision, {quantization['target']}", shipped_variant(quantization))]
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
    run: RunFolder,
    history: Sequence[Mapping[str, Any]],
    metrics: Mapping[str, Any] | None,
    parity: Mapping[str, Any] | None,
    quantization: Mapping[str, Any] | None,
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
    if metrics:
        rows += [("Evaluated with", _listed(metrics["conditions"]))]
    if parity:
        versions = _listed(parity["versions"])
        rows += [("Exported with", versions)] if versions else []
        rows += [("Proved with", ", ".join(f"{row['engine']} {row['version']}" for row in parity["verdicts"]))]
    if quantization:
        calibration = quantization["calibration"]
        rows += [("Quantized with", f"{calibration['images']} calibration images, method {calibration['method']}")]
        rows += [("Quantized models measured with", _listed(quantization["conditions"]))]
    files = (("Weights, SHA-256", run.weights), ("ONNX, SHA-256", run.onnx))
    return rows + [(title, runner.file_sha256(path)) for title, path in files if path.is_file()]


def _listed(values: Mapping[str, str]) -> str:
    return ", ".join(f"{name} {value}" for name, value in values.items())


def _quantization_facts(run: RunFolder, record: Mapping[str, Any]) -> dict[str, Any]:
    """What the page's section shows of quantize.json."""
    drawn = tradeoff(record)
    return {
        "why": record["why"],
        "is_old": run.onnx.is_file() and runner.file_sha256(run.onnx) != record["onnx_sha256"],
        "rows": _quantization_rows(record),
        "faults": _quantization_faults(record),
        "caption": _quantization_caption(record),
        "x": drawn.x_label,
        "picture": _both_themes(lambda theme: quantization_picture(record, theme)) if drawn.points else None,
        "float_layers_rows": _float_layers_rows(record),
        "float_layers_caption": _float_layers_caption(record),
        "curve": _both_themes(lambda theme: sensitivity_picture(record, theme)) if record["curve"] else None,
    }


def _confusion_pictures(metrics: Mapping[str, Any]) -> dict[ThemeName, str]:
    confusion = metrics["columns"]["torch"]["confusion"]
    return _both_themes(lambda theme: confusion_picture(confusion, metrics["class_names"], theme))


def _shown_mistake(mistake: Mapping[str, Any]) -> dict[str, str]:
    """A mistake as text, with a small copy of its image; "" where the file cannot be read any more."""
    path = Path(mistake["path"])
    try:
        image = runner.read_image(path)
        image = fitted(image, min(240, max(96, *image.shape[:2])))  # 240: sharp on a screen of two pixels a point
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
