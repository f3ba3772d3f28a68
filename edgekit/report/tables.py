"""The terminal's tables, of records of every kind."""

from __future__ import annotations

import statistics
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from edgekit import runner
from edgekit.datasets import Problem
from edgekit.history import CAPTION, HEADER, History, history_rows
from edgekit.latency import ms_text, share_text
from edgekit.report.evaluation import (
    AGREEMENT,
    FIGURES,
    images_text,
    metrics_rows,
    per_class_rows,
    text_columns,
)
from edgekit.report.figures import NOTHING, Row, difference, megabytes, millions, milliseconds, rate
from edgekit.report.quantization import (
    float_layers_caption,
    float_layers_rows,
    quantization_caption,
    quantization_faults,
    quantization_rows,
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

NOTE_WIDTH = 26  # characters that a column of notes needs, at least


def metrics_table(metrics: Mapping[str, Any]) -> Table:
    """metrics.json → torch, onnx and bundle side by side, as far as they were evaluated."""
    return _table(metrics_rows(metrics), title=images_text(metrics))


def per_class_table(metrics: Mapping[str, Any]) -> Table:
    """metrics.json → the torch network's figures, a row a class."""
    rows = per_class_rows(metrics)
    table = _table(rows, left=text_columns(rows))
    return _narrow(table) if metrics["task"] == "segment" else table  # for 80 characters


def parity_table(parity: Mapping[str, Any]) -> Table:
    """parity.json → a row an engine that ran the exported model."""
    return _table(parity_rows(parity), left=(1, 2))


def parity_rows(parity: Mapping[str, Any]) -> list[Row]:
    """A header and a row an engine."""
    rows = [["engine", "version", "status", "relative error", "tolerance"]]
    for row in parity["verdicts"]:
        rows.append([row["engine"], row["version"], row["status"], difference(row["relative_error"])])
        rows[-1].append(f"{parity['tolerance']:.1e}")
    return rows


def quantize_table(record: Mapping[str, Any]) -> Table:
    """quantize.json → a row a variant and engine: size, accuracy, time, and which one a bundle gets.

    What is not ok has its status in the place of the figures, and its message under the table: an importer's message
    is a paragraph. The table fits into 80 characters.
    """
    caption = "\n".join([*quantization_faults(record), quantization_caption(record)])
    title = f"{record['images']} validation images"
    return _narrow(_table(quantization_rows(record), left=(2,), title=title, caption=caption))


def float_layers_table(record: Mapping[str, Any]) -> Table | None:
    """quantize.json → a row for each number of layers left in fp32; None where int8 needed no such search."""
    if not record["curve"]:
        return None
    return _narrow(_table(float_layers_rows(record), left=(3,), caption=float_layers_caption(record)))


def _narrow(table: Table, gap: int = 1) -> Table:
    """The same table with so many spaces between columns."""
    table.caption_justify = "left"
    table.padding = (0, gap - 1, 0, 0)
    return table


def verdicts_table(verdicts: Iterable[Verdict]) -> Table:
    """What each engine of each OpenCV makes of a model, with what went wrong."""
    rows = [["OpenCV", "engine", "status", "error", "from files", "ms", "what went wrong"]]
    for verdict in verdicts:
        errors = [difference(verdict.relative_error), difference(verdict.end_to_end_error)]
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
        counts = [str(row.images or NOTHING), difference(row.relative_error), seconds]
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
    return _narrow(_table(latency_rows(run)), gap=2)


def latency_rows(run: LatencyRun) -> list[Row]:
    """A header, a row a stage, and the whole."""
    rows = [["ms", "p50", "p90", "p99"]]
    for name, samples in run.samples_ms.items():
        rows.append([name.replace("_", " "), *(milliseconds(value) for value in runner.percentiles(samples).values())])
    return rows


def latency_lines(run: LatencyRun) -> list[str]:
    """What stands under latency_table: starts, throughput, memory, energy, and the conditions of it all."""
    starts = [("import", run.import_ms), ("load", run.load_ms), ("first image", run.first_ms)]
    medians = ", ".join(f"{name} {np.median(values):.0f} ms" for name, values in starts)
    count = len(run.samples_ms["end_to_end"])
    lines = [
        f"{medians} (medians of {len(run.first_ms)} processes)",
        f"{count} images one by one; {rate(run.images_per_second)} images/s with decoding beside",
    ]
    if run.peak_rss_bytes is not None and run.floor_rss_bytes is not None:
        above = megabytes(run.peak_rss_bytes - run.floor_rss_bytes)
        lines.append(f"memory: {megabytes(run.peak_rss_bytes)} at most, {above} over Python and OpenCV alone")
    if run.energy_mj is not None:
        lines.append(f"energy: {run.energy_mj:.1f} mJ an image, the whole board")
    subject, where = run.subject, {**dict.fromkeys(_CONDITIONS, NOTHING), **run.conditions}
    return [
        *lines,
        f"{subject.name} for {subject.target} ({subject.precision}) on {subject.device}: {where['cpu']}",
        f"OpenCV {where['opencv']}, {where['engine']} engine, {where['backend']}, {where['precision']}, "
        f"threads: {where['threads']}, cores: {where['cores']}",
    ]


_CONDITIONS = ("cpu", "opencv", "engine", "backend", "precision", "threads", "cores")


def threads_table(sweep: ThreadSweep) -> Table:
    """A row a number of threads, and which one is taken."""
    rows = [["threads", "p50, ms", "to the fastest", ""]]
    for row in sweep.rows:
        note = "taken: the fewest within 2 %" if row.threads == sweep.chosen else ""
        rows.append([str(row.threads), milliseconds(row.p50_ms), f"{row.ratio:.3f}", note])
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
    figure, _ = FIGURES[metrics["task"]][0]
    rows = [row for row in metrics_rows(metrics) if row[0] in ("", figure, AGREEMENT)]
    columns = rows[0][1:]
    median = f"{latency['end_to_end_ms']['p50']:.2f} ms"
    rows.append(["size", *(megabytes(size_bytes[name]) for name in columns)])
    rows.append(["median latency, one image", *(median if name == "bundle" else NOTHING for name in columns)])
    where = latency["conditions"]
    caption = f"latency: OpenCV {where['opencv']}, {where['engine']} engine, {where['threads']} threads, {where['cpu']}"
    return _table(rows, title=images_text(metrics), caption=caption)


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
        "params": [millions(row.params) for row in rows],
        "MACs": [millions(row.macs) for row in rows],
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
