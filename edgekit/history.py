"""Latency over commits: the records under a folder, as series of what can be held against each other.

Two figures are of one series where bundle, precision, device and all that a figure depends on are the same: CPU, OpenCV
and its build, engine, threads, Python. Where a level changes inside a series, change_points says so.
"""

from __future__ import annotations

import statistics
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from datetime import datetime, timezone
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict

from edgekit import runner
from edgekit.artifacts import write_bytes, write_json, write_text
from edgekit.blocks import SAME
from edgekit.change_points import change_points
from edgekit.errors import ArtifactError, UsageError
from edgekit.latency import Clock, Comparison, LatencyRun, ms_text, share_text
from edgekit.latency_files import (
    CLOCKS,
    OTHER_JSON,
    Record,
    bundle_name,
    measured_subject,
    read_latency_json,
    short_revision,
)
from edgekit.markdown import bullets, details, table

DEFAULT_STAGE = "end_to_end"
STAGES = (*runner.STAGES, DEFAULT_STAGE, "answer")  # "answer" is of comparisons only, end_to_end of runs only
COMPARABLE = (*SAME, "precision")  # by the rule that `edgekit compare` goes by
FILES = ("history.json", "history.md", "history.png")


class _Record(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Point(_Record):
    """One measurement of a series."""

    revision: str  # short; "bundle 3f2a91c" where the bundle has no git revision
    measured_at: str
    p50_ms: float
    samples: int
    file: str  # relative to the folder


class Step(_Record):
    """Where the level of a series changes."""

    place: int  # of the first point after it, from 0
    revision: str  # that point's
    change: float  # 0.1 is 10 % slower than before


class Series(_Record):
    """Points that can be held against each other, in the order of their measurement."""

    device: str
    bundle: str  # NAME-TARGET
    precision: str  # of the bundle's file
    measured: Literal["alone", "side by side"]  # by `edgekit bench`, or as a comparison's candidate
    clock: Clock
    conditions: dict[str, str]  # of COMPARABLE, what the records tell
    points: tuple[Point, ...]
    steps: tuple[Step, ...]


class History(_Record):
    """What a folder tells about one stage."""

    stage: str
    series: tuple[Series, ...]  # by bundle, device and conditions
    warnings: tuple[str, ...]  # a line a file that is no point of it: which, and why


def read_history(folder: Path, stage: str = DEFAULT_STAGE) -> History:
    """Reads all latency files (.json) below a folder; stage: one of STAGES.

    Of a comparison its candidate is a point, in a series of its own: with another clock, or side by side with another
    process, a stage takes another time. Raises UsageError for an unknown stage, ArtifactError where there is no such
    folder or no JSON file in it.
    """
    if stage not in STAGES:
        raise UsageError(f"no stage is called {stage!r} (there are: {', '.join(STAGES)})")
    if not folder.is_dir():
        raise ArtifactError(f"no folder at {folder}: name the one that `edgekit bench --save` wrote into")
    files = _json_files(folder)
    if not files:
        raise ArtifactError(f"no latency files below {folder}: `edgekit bench BUNDLE --save {folder}/NAME` writes one")
    found: dict[_Key, list[tuple[datetime, Point]]] = defaultdict(list)
    skipped = []
    for file in files:
        name = file.relative_to(folder).as_posix()
        try:
            key, moment, point = _point(read_latency_json(file), stage, name)
        except ArtifactError as error:
            skipped.append(f"{name}: {error}".replace(str(file), "it"))
            continue
        twin = next((other for when, other in found[key] if when == moment and _is_same(other, point)), None)
        if twin:
            skipped.append(f"{name}: the same measurement as {twin.file}")
        else:
            found[key].append((moment, point))
    return History(stage=stage, series=tuple(_series(*item) for item in sorted(found.items())), warnings=tuple(skipped))


def _json_files(folder: Path) -> list[Path]:
    """Sorted; without hidden ones (half-written), what `save` writes for other programs, and an earlier history."""
    files = (path for path in folder.rglob("*.json") if path.is_file())
    others = {*OTHER_JSON, *FILES}
    return sorted(file for file in files if file.name not in others and not file.name.startswith("."))


_Key = tuple[str, str, str, str, str, tuple[tuple[str, str], ...]]  # bundle, device, precision, measured, clock, ...


def _point(record: Record, stage: str, file: str) -> tuple[_Key, datetime, Point]:
    """Raises ArtifactError where the record has no figure of that stage, or no time that can be ordered."""
    subject = measured_subject(record)
    samples, measured, clock, conditions = _measured(record, stage)
    moment = _moment(subject.measured_at)
    known = tuple((name, str(conditions[name])) for name in COMPARABLE if conditions.get(name) not in (None, ""))
    key = (bundle_name(subject), subject.device, subject.precision, measured, clock, known)
    point = Point(
        revision=short_revision(subject),
        measured_at=subject.measured_at,
        p50_ms=statistics.median(samples),
        samples=len(samples),
        file=file,
    )
    if point.p50_ms <= 0:
        raise ArtifactError(f"its {stage} takes no time on its clock")
    return key, moment, point


def _measured(record: Record, stage: str) -> tuple[Sequence[float], str, Clock, Mapping[str, Any]]:
    """(samples in ms, how they were measured, by which clock, under which conditions)."""
    if isinstance(record, LatencyRun):
        stages = {name: samples for name, samples in record.samples_ms.items() if samples}
        found = (stages.get(stage), "alone", "wall", record.conditions)
    else:
        stages = {case.name: case.candidate_ms for case in record.cases if case.candidate_ms}
        found = (stages.get(stage), "side by side", record.clock, record.conditions[1])
    samples, measured, clock, conditions = found
    if samples is None:
        kind = "comparison" if isinstance(record, Comparison) else "run"
        raise ArtifactError(f"it is a {kind} without {stage} (it has: {', '.join(stages) or 'no samples'})")
    return samples, measured, "cpu" if clock == "cpu" else "wall", conditions


def _moment(text: str) -> datetime:
    try:
        moment = datetime.fromisoformat(text.replace("Z", "+00:00"))  # Python 3.10 does not know the Z
    except ValueError:
        raise ArtifactError(f"its measured_at, {text!r}, is not a time in ISO 8601") from None
    return moment if moment.tzinfo else moment.replace(tzinfo=timezone.utc)


def _is_same(one: Point, other: Point) -> bool:
    return one.model_copy(update={"file": other.file}) == other


def _series(key: _Key, found: Sequence[tuple[datetime, Point]]) -> Series:
    bundle, device, precision, measured, clock, conditions = key
    points = tuple(point for _, point in sorted(found, key=lambda item: (item[0], item[1].file)))
    steps = change_points([point.p50_ms for point in points])
    return Series.model_validate(
        {
            "device": device,
            "bundle": bundle,
            "precision": precision,
            "measured": measured,
            "clock": clock,
            "conditions": dict(conditions),
            "points": points,
            "steps": tuple(
                Step(place=step.place, revision=points[step.place].revision, change=step.change) for step in steps
            ),
        }
    )


# ---------------------------------------------------------------------------------------------------------------
# As text


HEADER = ("bundle", "device", "under", "points", "first → last p50, ms", "change points")
CAPTION = "p50: median of a measurement; a change point: from that commit on, against the ones before"


def history_rows(history: History) -> list[list[str]]:
    """A row a series, for the columns of HEADER."""
    rows = []
    for series, under in zip(history.series, conditions_texts(history.series), strict=True):
        first, last = series.points[0].p50_ms, series.points[-1].p50_ms
        times = f"{ms_text(first)} → {ms_text(last)} ({share_text(last / first - 1)})"
        steps = ", ".join(f"{step.revision} {share_text(step.change)}" for step in series.steps)
        rows.append([series.bundle, series.device, under, str(len(series.points)), times, steps or "none"])
    return rows


def conditions_texts(series: Iterable[Series]) -> list[str]:
    """A text a series, such as "fp32, OpenCV 5.0.0 new, threads: 1, A CPU".

    Where two would read alike, it also has what they differ in.
    """
    rows = list(series)
    texts = [_conditions_text(row) for row in rows]
    wholes = [(row.bundle, row.device, text) for row, text in zip(rows, texts, strict=True)]
    doubled = [index for index, whole in enumerate(wholes) if wholes.count(whole) > 1]
    for index in doubled:
        alike = [rows[other].conditions for other in doubled if wholes[other] == wholes[index]]
        own = rows[index].conditions
        differing = [key for key in COMPARABLE if len({conditions.get(key) for conditions in alike}) > 1]
        texts[index] = ", ".join(
            [texts[index], *(f"{key.replace('_', ' ')} {own.get(key, 'unknown')}" for key in differing)]
        )
    return texts


def _conditions_text(series: Series) -> str:
    own = series.conditions
    arithmetic = own.get("precision", series.precision)
    precision = series.precision if arithmetic == series.precision else f"{series.precision} computed in {arithmetic}"
    opencv = " ".join(filter(None, ("OpenCV", own.get("opencv"), own.get("engine"))))
    parts = [precision, opencv, f"threads: {own.get('threads', '?')}", own.get("cpu", "")]
    if series.measured == "side by side":
        parts.append(f"{CLOCKS[series.clock]} side by side")
    return ", ".join(filter(None, parts))


def history_markdown(history: History) -> str:
    """The history as Markdown: a table of the series, and what was left out."""
    parts = [
        f"## Latency over commits: {history.stage.replace('_', ' ')}",
        table(HEADER, history_rows(history), left=(1, 2, 5)) or "No file has a figure of it.",
        f"{CAPTION}." if history.series else "",
        details(f"Left out: {len(history.warnings)}", bullets("Files without a point", history.warnings)),
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def save_history(history: History, folder: Path) -> tuple[Path, ...]:
    """Writes history.json, history.md and history.png; → the files. Raises ArtifactError where it cannot."""
    from edgekit.latency_pictures import history_picture

    as_json, markdown, picture = (folder / name for name in FILES)
    write_json(as_json, history.model_dump(mode="json"))
    write_text(markdown, history_markdown(history))
    write_bytes(picture, history_picture(history))
    return as_json, markdown, picture
