"""What latency records are written as: our own file, and what other programs read of it.

The native file is pytest-benchmark's JSON (its `--benchmark-json`: machine_info, commit_info and a list of benchmarks,
each with "stats" in seconds; https://pytest-benchmark.readthedocs.io), so that `pytest-benchmark compare FILE` and
everything else that reads such files reads ours. The record is in the first benchmark's extra_info.edgekit, without the
samples: these are the benchmarks' own "data". pytest-benchmark itself is not needed to write or to read it.
"""

from __future__ import annotations

import json
import math
import re
import statistics
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

from pydantic import ValidationError

from edgekit import runner
from edgekit.artifacts import RunFolder, read_json, write_bytes, write_json, write_text
from edgekit.errors import ArtifactError
from edgekit.latency import Case, Clock, Comparison, LatencyRun, Subject, ms_text, share_text
from edgekit.latency_pictures import latency_picture
from edgekit.markdown import bullets, details, plain, table

Record = LatencyRun | Comparison

SCHEMA = "edgekit.latency/1"
PYTEST_BENCHMARK = "5.3.1"  # whose format the native file has, and whose statistics
NATIVE = "latency.json"
OTHER_JSON = ("github-action-benchmark.json", "bencher.json")  # what `save` writes beside it, for other programs
NOTHING = "-"  # in a cell that has no value
ARROW = " → "  # from the baseline to the candidate
CLOCKS: dict[Clock, str] = {"cpu": "CPU time", "wall": "wall time"}
TIMERS: dict[Clock, str] = {"cpu": "process_time", "wall": "perf_counter"}  # of Python's module time
STAGES = {"end_to_end": "end to end"}  # where a stage's name is not a word


def bundle_name(subject: Subject) -> str:
    """What the bundle's folder is called: NAME-TARGET."""
    return f"{subject.name}-{subject.target}"


def measured_subject(record: Record) -> Subject:
    """The bundle that a record is about; of a comparison the candidate."""
    return record.subject if isinstance(record, LatencyRun) else record.candidate


@dataclass(frozen=True)
class _Row:
    """One benchmark of a record: a stage of a run, or an arm of a comparison's case."""

    group: str
    parameters: dict[str, str]  # {"stage"} or {"case", "arm"}: with the group, what it is
    clock: Clock
    samples_ms: tuple[float, ...]  # at least one; of a comparison's case, a median a slice

    @property
    def name(self) -> str:
        return f"{self.group}[{'-'.join(self.parameters.values())}]"


def _rows(record: Record) -> Iterator[_Row]:
    """Whatever has a sample, in the record's order."""
    group = bundle_name(measured_subject(record))
    if isinstance(record, LatencyRun):
        yield from (_Row(group, {"stage": name}, "wall", ms) for name, ms in record.samples_ms.items() if ms)
        return
    for case in record.cases:
        for arm, samples_ms in (("base", case.base_ms), ("candidate", case.candidate_ms)):
            if samples_ms:
                yield _Row(group, {"case": case.name, "arm": arm}, record.clock, samples_ms)


# ---------------------------------------------------------------------------------------------------------------
# The native file


def write_latency_json(path: Path, record: Record) -> None:
    """Writes the native file. Samples are kept to a picosecond. Raises ArtifactError where it cannot be written."""
    write_json(path, latency_json(record))


def latency_json(record: Record) -> dict[str, Any]:
    """A record as pytest-benchmark's JSON.

    Each benchmark's extra_info.edgekit has what it is ({"stage"} or {"case", "arm"}), its percentiles_ms, and in
    "missing" why one of them is null; the first one's also has "record". Where nothing was measured, there is no
    benchmark, and that block is in the file's own extra_info.
    """
    head = {"schema": SCHEMA, "kind": _kind(record)}
    whole = {**head, "record": _without_samples(record)}
    benchmarks = [_benchmark(row, head) for row in _rows(record)]
    if benchmarks:
        benchmarks[0]["extra_info"]["edgekit"]["record"] = whole["record"]
    conditions = record.conditions if isinstance(record, LatencyRun) else record.conditions[1]
    return {
        "machine_info": _machine_info(measured_subject(record), conditions),
        "commit_info": _commit_info(measured_subject(record)),
        **({} if benchmarks else {"extra_info": {"edgekit": whole}}),
        "benchmarks": benchmarks,
        "datetime": measured_subject(record).measured_at,
        "version": PYTEST_BENCHMARK,
    }


def _kind(record: Record) -> str:
    return "run" if isinstance(record, LatencyRun) else "comparison"


def _without_samples(record: Record) -> dict[str, Any]:
    """As JSON, with () for what the benchmarks have. The comparison that one confirms stays whole."""
    if isinstance(record, LatencyRun):
        return record.model_copy(update={"samples_ms": dict.fromkeys(record.samples_ms, ())}).model_dump(mode="json")
    cases = tuple(case.model_copy(update={"base_ms": (), "candidate_ms": ()}) for case in record.cases)
    return record.model_copy(update={"cases": cases}).model_dump(mode="json")


def _machine_info(subject: Subject, conditions: Mapping[str, Any]) -> dict[str, Any]:
    """The device, as pytest-benchmark names things: its cpu.brand_raw is py-cpuinfo's."""
    return {
        "node": subject.device,
        "machine": conditions.get("machine"),
        "processor": conditions.get("machine"),
        "python_version": conditions.get("python"),
        "cpu": {"brand_raw": conditions.get("cpu")},
        "opencv": conditions.get("opencv"),
    }


def _commit_info(subject: Subject) -> dict[str, Any]:
    """Of the commit that the bundle was built from only its name is known."""
    unknown = dict.fromkeys(("time", "author_time", "dirty"))
    return {
        "id": subject.git_revision or "unversioned",  # pytest-benchmark's word
        **unknown,
        "project": subject.name,
        "branch": "(unknown)",
    }


def _benchmark(row: _Row, head: Mapping[str, Any]) -> dict[str, Any]:
    percentiles = runner.percentiles(row.samples_ms)
    figures = {"percentiles_ms": percentiles, "missing": missing_percentiles(row.samples_ms)}
    return {
        "group": row.group,
        "name": row.name,
        "fullname": f"edgekit::{row.name}",
        "params": row.parameters,
        "param": "-".join(row.parameters.values()),
        "extra_info": {"edgekit": {**head, **row.parameters, "clock": row.clock, **figures}},
        "options": {"timer": TIMERS[row.clock]},
        "stats": stats(row.samples_ms),
    }


def missing_percentiles(samples_ms: Sequence[float]) -> dict[str, str]:
    """{percentile: why it is null}, by the rules of runner.percentiles."""
    count = len(samples_ms)
    return {
        name: f"{name} needs {needed} samples, and there are {count}"
        for name, needed in runner.PERCENTILES.items()
        if count < needed
    }


def stats(samples_ms: Sequence[float]) -> dict[str, Any]:
    """At least one sample, in ms → a benchmark's "stats" in seconds, as pytest-benchmark computes them.

    (https://github.com/ionelmc/pytest-benchmark, src/pytest_benchmark/stats.py: quartiles by methods 2 and 3 of
    https://en.wikipedia.org/wiki/Quartile, Tukey's fences at 1.5 interquartile ranges.)
    """
    data = [round(ms / 1e3, 12) for ms in samples_ms]
    ordered = sorted(data)
    count, mean, total = len(data), statistics.mean(data), sum(data)
    deviation = statistics.stdev(data) if count > 1 else 0
    q1, q3 = _quartile(ordered), _quartile(ordered[::-1])
    low, high = q1 - 1.5 * (q3 - q1), q3 + 1.5 * (q3 - q1)
    inside = [value for value in ordered if low <= value <= high]
    far = sum(not mean - deviation <= value <= mean + deviation for value in data)
    return {
        "min": ordered[0],
        "max": ordered[-1],
        "mean": mean,
        "stddev": deviation,
        "rounds": count,
        "median": statistics.median(data),
        "iqr": q3 - q1,
        "q1": q1,
        "q3": q3,
        "iqr_outliers": count - len(inside),
        "stddev_outliers": far,
        "outliers": f"{far};{count - len(inside)}",
        "ld15iqr": inside[0] if inside else ordered[0],
        "hd15iqr": inside[-1] if inside else ordered[-1],
        "ops": count / total if total else 0,
        "total": total,
        "data": data,
        "iterations": 1,
    }


def _quartile(ordered: Sequence[float]) -> float:
    """The quartile at the beginning of a sorted sequence; of one sorted downwards it is the upper one."""
    whole, rest = divmod(len(ordered), 4)
    if len(ordered) == 1:
        return ordered[0]
    if rest in (0, 2):
        return statistics.median(ordered[: len(ordered) // 2])
    first, second = (whole - 1, whole) if rest == 1 else (whole + 1, whole)
    return 0.25 * ordered[first] + 0.75 * ordered[second]


def read_latency_json(path: Path) -> Record:
    """Reads what write_latency_json wrote. Raises ArtifactError for any other file, and says what to do."""
    raw = read_json(path)
    writes = f"`edgekit bench --save DIR` and `edgekit compare --save DIR` write one (DIR/{NATIVE})"
    if not isinstance(benchmarks := raw.get("benchmarks"), list):
        raise ArtifactError(f"{path} is no latency record: {writes}")
    try:
        holder = (benchmarks or [raw])[0]
        block = holder.get("extra_info", {}).get("edgekit")
    except (AttributeError, TypeError):
        raise _damaged(path, "benchmarks") from None
    if not isinstance(block, dict):
        raise ArtifactError(f"{path} was written by pytest-benchmark, and has no record of edgekit's: {writes}")
    if block.get("schema") != SCHEMA:
        raise ArtifactError(
            f"{path} has schema {block.get('schema')!r}, and this edgekit reads {SCHEMA!r}: measure again"
        )
    if block.get("kind") == "benchmark":
        raise ArtifactError(f"{path} is from the suite in benchmarks/, which keeps samples and no record: {writes}")
    if block.get("kind") not in ("run", "comparison"):
        raise _damaged(path, "kind")
    return _read_record(path, block, benchmarks)


def _damaged(path: Path, what: str) -> ArtifactError:
    return ArtifactError(f"{path} is not as edgekit writes it ({what}): measure again")


def _read_record(path: Path, block: Mapping[str, Any], benchmarks: Sequence[Any]) -> Record:
    try:
        samples = dict(_samples_ms(benchmark) for benchmark in benchmarks)
        record = block["record"]
        if block["kind"] == "run":
            named = {(stage, ""): list(ms) for stage, ms in record["samples_ms"].items()} | samples
            return LatencyRun.model_validate({**record, "samples_ms": {stage: ms for (stage, _), ms in named.items()}})
        cases = [
            {
                **case,
                **{f"{arm}_ms": samples.get((case["name"], arm), case[f"{arm}_ms"]) for arm in ("base", "candidate")},
            }
            for case in record["cases"]
        ]
        return Comparison.model_validate({**record, "cases": cases})
    except ValidationError as error:
        first = error.errors()[0]
        raise _damaged(path, f"{'.'.join(map(str, first['loc']))}: {first['msg']}") from None
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise _damaged(path, f"{type(error).__name__}: {error}") from None


def _samples_ms(benchmark: Mapping[str, Any]) -> tuple[tuple[str, str], list[float]]:
    """A benchmark → ((stage, "") or (case, arm), its samples). Raises ValueError where one of them is no duration."""
    block, data = benchmark["extra_info"]["edgekit"], benchmark["stats"]["data"]
    if not all(isinstance(value, int | float) and 0 <= value < math.inf for value in data):
        raise ValueError("a sample is not a duration")
    # To a picosecond, so that the nanoseconds of the clock come back as they were.
    samples_ms = [round(value * 1e3, 9) for value in data]
    return (block["stage"], "") if "stage" in block else (block["case"], block["arm"]), samples_ms


# ---------------------------------------------------------------------------------------------------------------
# What other programs read


def github_action_benchmark_json(record: Record) -> list[dict[str, Any]]:
    """For github-action-benchmark's tool customSmallerIsBetter: [{"name", "unit", "value", "range", "extra"}].

    (https://github.com/benchmark-action/github-action-benchmark: an array of such objects; range and extra are texts.)
    Medians in ms, with half the interquartile range; of a run also what a process takes to begin, and the peak memory;
    of a comparison the candidate only, since the baseline was a point of the chart before.
    """
    facts = [f"{key} {value}" for key, value in _shown_conditions(record)]
    entries = [_github_entry(_tracked_name(row), "ms", row.samples_ms, facts) for row in _tracked(record)]
    if isinstance(record, LatencyRun):
        name = bundle_name(record.subject)
        starts = {"import": record.import_ms, "load": record.load_ms, "first image": record.first_ms}
        entries += [_github_entry(f"{name}[{what}]", "ms", ms, facts) for what, ms in starts.items() if ms]
        if record.peak_rss_bytes is not None:
            entries.append(_github_entry(f"{name}[peak memory]", "MB", (record.peak_rss_bytes / 1e6,), facts))
    return entries


def _github_entry(name: str, unit: str, samples: Sequence[float], facts: Sequence[str]) -> dict[str, Any]:
    ordered = sorted(samples)
    extra = "\n".join([f"median of {len(samples)}", *facts])
    spread = (_quartile(ordered[::-1]) - _quartile(ordered)) / 2
    value = round(statistics.median(samples), 6)
    # With decimals always: the action reads a number only where something follows its first digit.
    return {"name": name, "unit": unit, "value": value, "range": f"± {spread:.4f}", "extra": extra}


def bencher_json(record: Record) -> dict[str, dict[str, dict[str, float]]]:
    """For Bencher, its Metric Format: {benchmark: {"latency": {"value", "lower_value", "upper_value"}}}, in ns.

    (https://bencher.dev/docs/reference/bencher-metric-format/: "latency" and "throughput" are the slugs of its own
    measures, in nanoseconds and operations per second; any other name would make a new measure. A benchmark's key is
    looked up as a UUID, a slug, then a name, and a name's suffix "-bencher-ignore" is taken off. Ours end with a
    bracket, so they are names and stay whole.) The value is the median, the ends are the quartiles.
    """
    report: dict[str, dict[str, dict[str, float]]] = {}
    for row in _tracked(record):
        ordered = sorted(row.samples_ms)
        figures = (statistics.median(ordered), _quartile(ordered), _quartile(ordered[::-1]))
        names = ("value", "lower_value", "upper_value")
        latency = {name: round(ms * 1e6, 3) for name, ms in zip(names, figures, strict=True)}
        report[_tracked_name(row)] = {"latency": latency}
    if isinstance(record, LatencyRun):
        whole = f"{bundle_name(record.subject)}[decoding beside answering]"
        report[whole] = {"throughput": {"value": round(record.images_per_second, 3)}}
    return report


def _tracked(record: Record) -> list[_Row]:
    """What is a point of a chart over commits: the stages of a run, the candidate's cases of a comparison."""
    return [row for row in _rows(record) if row.parameters.get("arm") != "base"]


def _tracked_name(row: _Row) -> str:
    """A comparison's figures have the clock in their name: they are no figures of a run, nor of the other profile."""
    if "stage" in row.parameters:
        return row.name
    return f"{row.group}[{row.parameters['case']}, {CLOCKS[row.clock]} side by side]"


def junit_xml(record: Comparison) -> bytes:
    """A JUnit report, UTF-8: a test case a gated case.

    FAIL is a failure, INCOMPARABLE an error; INCONCLUSIVE and ADVISORY are skipped, with the reason: no verdict was
    reached. There is no published standard; this is what GitLab
    (https://docs.gitlab.com/ci/testing/unit_test_reports/: it shows a case's classname as its suite, and the elements'
    text) and Jenkins (https://github.com/jenkinsci/xunit-plugin, junit-10.xsd; it shows the attribute "message") read.
    """
    outcomes = [(case.name, case.verdict, case.reason, _figures_text(record, case)) for case in record.cases]
    outcomes = outcomes or [("compare", record.verdict, record.reason, "")]  # else the report would say nothing at all
    elements = [_OUTCOMES.get(verdict, "") for _, verdict, _, _ in outcomes]
    counts = {plural: str(elements.count(one)) for one, plural in _PLURALS.items()}
    seconds = f"{record.seconds:.3f}"
    suite = {"name": "edgekit compare", "tests": str(len(outcomes)), **counts, "time": seconds}
    about = {"timestamp": record.candidate.measured_at, "hostname": record.candidate.device}
    root = ElementTree.Element("testsuites")
    parent = ElementTree.SubElement(root, "testsuite", _xml_attributes({**suite, **about}))
    for (name, verdict, reason, figures), element in zip(outcomes, elements, strict=True):
        # The cases are measured in one go, so each has its share of the time.
        place = {"classname": f"edgekit.{bundle_name(record.candidate)}", "name": name}
        time_s = f"{record.seconds / len(outcomes):.3f}"
        case = ElementTree.SubElement(parent, "testcase", _xml_attributes({**place, "time": time_s}))
        if element:
            told = _xml_attributes({"type": verdict.lower(), "message": f"{verdict}: {reason}"})
            ElementTree.SubElement(case, element, told).text = _xml_text(f"{verdict}: {reason}\n{figures}".strip())
        if figures:
            ElementTree.SubElement(case, "system-out").text = _xml_text(figures)
    ElementTree.indent(root)
    return bytes(ElementTree.tostring(root, encoding="utf-8", xml_declaration=True)) + b"\n"


_OUTCOMES = {"FAIL": "failure", "INCOMPARABLE": "error", "INCONCLUSIVE": "skipped", "ADVISORY": "skipped"}
_PLURALS = {"failure": "failures", "error": "errors", "skipped": "skipped"}
_NOT_XML = re.compile("[^\t\n\r\x20-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")  # https://www.w3.org/TR/xml/#charsets


def _xml_text(text: str) -> str:
    """The text with a code such as \\x1b for each character that cannot stand in XML, not even escaped."""
    return _NOT_XML.sub(lambda found: found.group().encode("unicode_escape").decode(), text)


def _xml_attributes(values: Mapping[str, str]) -> dict[str, str]:
    return {name: _xml_text(" ".join(value.split())) for name, value in values.items()}


def _figures_text(record: Comparison, case: Case) -> str:
    """ "+7.1 % (99 %: +6.0 % to +8.2 %), 12.3 ms → 13.2 ms, CPU time, 12 blocks; the limit is +5 %", or ""."""
    if case.change is None:
        return ""
    interval = f" (99 %: {share_text(case.low)} to {share_text(case.high)})" if case.low is not None else ""
    medians = [ms_text(statistics.median(samples)) for samples in (case.base_ms, case.candidate_ms) if samples]
    times = f", {' → '.join(medians)} ms" if medians else ""
    blocks = "block" if record.blocks == 1 else "blocks"
    return (
        f"{share_text(case.change)}{interval}{times}, {CLOCKS[record.clock]}, {record.blocks} {blocks}; "
        f"the limit is {share_text(record.fail_if)}"
    )


# ---------------------------------------------------------------------------------------------------------------
# Markdown


def markdown_summary(record: Record) -> str:
    """A record as GitHub's and GitLab's Markdown, for a job summary or a comment: what matters first."""
    parts = _run_parts(record) if isinstance(record, LatencyRun) else _comparison_parts(record)
    return "\n\n".join(part for part in parts if part) + "\n"


def _run_parts(record: LatencyRun) -> list[str]:
    subject = record.subject
    whole = record.samples_ms.get("end_to_end", ())
    median = f"{ms_text(statistics.median(whole))} ms" if whole else "not measured"
    return [
        f"## {plain(bundle_name(subject))}: {median} from file to answer (p50)",
        f"{plain(subject.precision)}, {_revision(subject)}, {plain(subject.measured_at)}",
        table(["ms", "p50", "p90", "p99", "samples"], [_stage_row(*item) for item in record.samples_ms.items()]),
        _why_missing(record.samples_ms),
        table(["", "figure"], _other_figures(record)),
        _under(record),
        bullets("Warnings", record.warnings),
        details("Conditions", _conditions_table(record), _environment_table(record.environment)),
    ]


def _stage_row(stage: str, samples_ms: Sequence[float]) -> list[str]:
    if not samples_ms:
        return [STAGES.get(stage, stage), *[NOTHING] * 3, "0"]
    shown = [NOTHING if ms is None else ms_text(ms) for ms in runner.percentiles(samples_ms).values()]
    return [STAGES.get(stage, stage), *shown, str(len(samples_ms))]


def _why_missing(samples_ms: Mapping[str, Sequence[float]]) -> str:
    """A sentence a reason, each once: the stages of one run have the same count of samples."""
    reasons = [reason for samples in samples_ms.values() if samples for reason in missing_percentiles(samples).values()]
    return ". ".join(dict.fromkeys(reasons)) + "." if reasons else ""


def _other_figures(record: LatencyRun) -> list[list[str]]:
    """Of what is measured in fresh processes the median, and beside it all of them, which are few."""
    starts = {
        "import of numpy and OpenCV": record.import_ms,
        "load: verifying the bundle, reading the network": record.load_ms,
        "first image": record.first_ms,
    }
    rows = []
    for name, samples in starts.items():
        if samples:
            each = f" ({', '.join(map(ms_text, samples))})" if len(samples) > 1 else ""
            rows.append([name, f"{ms_text(statistics.median(samples))} ms{each}"])
    rows.append(["images a second, decoding beside answering", f"{record.images_per_second:.1f}"])
    if record.peak_rss_bytes is not None:
        floor = record.floor_rss_bytes
        above = "" if floor is None else f", {(record.peak_rss_bytes - floor) / 1e6:.1f} MB over Python and OpenCV"
        rows.append(["memory", f"{record.peak_rss_bytes / 1e6:.1f} MB at most{above}"])
    energy = (
        "not measured (it takes a meter, and some time)" if record.energy_mj is None else f"{record.energy_mj:.1f} mJ"
    )
    return [*rows, ["energy an image, the whole board", energy]]


def _environment_table(environment: Sequence[Mapping[str, Any]]) -> str:
    keys = dict.fromkeys(key for moment in environment for key in moment)
    titles = ["before", "after"] if len(environment) == 2 else [str(index + 1) for index in range(len(environment))]
    return table(["", *titles], [[key, *(_value(moment.get(key)) for moment in environment)] for key in keys])


def _comparison_parts(record: Comparison) -> list[str]:
    first = record.confirms
    repeats = f"This repeats a comparison that ended in {first.verdict}: {plain(first.reason)}" if first else ""
    arms = f"{_revision(record.base)} → {_revision(record.candidate)}"
    rejected = f", {len(record.rejected)} rejected" if record.rejected else ""
    blocks = "block" if record.blocks == 1 else "blocks"
    how = (
        f"The limit is {share_text(record.fail_if)} of {CLOCKS[record.clock]} (profile {record.profile}). "
        f"{record.blocks} {blocks}{rejected}, {record.seconds:.0f} s, seed {record.seed}."
    )
    header = ["gate", "verdict", "change", "99 % interval", "baseline, ms", "candidate, ms", _other_clock(record)]
    return [
        f"## {record.verdict}: {plain(record.reason)}",
        f"{plain(bundle_name(record.candidate))}, {arms}",
        repeats,
        table(header, [_case_row(case) for case in record.cases], left=(1,)),
        _reasons(record),
        how,
        _under(record),
        bullets("Warnings", record.warnings),
        bullets("What changed in the network itself", record.workload),
        details("Blocks", _blocks_table(record), bullets("Rejected blocks", record.rejected)),
        details("Conditions", _conditions_table(record)),
    ]


def _other_clock(record: Comparison) -> str:
    return f"change of {CLOCKS['wall' if record.clock == 'cpu' else 'cpu']}"


def _case_row(case: Case) -> list[str]:
    interval = f"{share_text(case.low)} to {share_text(case.high)}" if case.low is not None else NOTHING
    medians = [
        ms_text(statistics.median(samples)) if samples else NOTHING for samples in (case.base_ms, case.candidate_ms)
    ]
    return [case.name, case.verdict, share_text(case.change), interval, *medians, share_text(case.other_change)]


def _reasons(record: Comparison) -> str:
    """A line a case that says more than the verdict's own reason."""
    lines = [f"{case.name}: {case.reason}" for case in record.cases if case.reason not in ("", record.reason)]
    return bullets("Reasons", lines)


def _blocks_table(record: Comparison) -> str:
    """A row a block, in time order: each case's change in that block alone."""
    count = max((len(case.log_ratios) for case in record.cases), default=0)
    rows = []
    for block in range(count):
        figures = [case.log_ratios[block] if block < len(case.log_ratios) else None for case in record.cases]
        rows.append([str(block + 1), *(share_text(None if x is None else math.expm1(x)) for x in figures)])
    return table(["block", *(case.name for case in record.cases)], rows)


def _shown_conditions(record: Record) -> list[tuple[str, str]]:
    """(name, value) of each condition; where a comparison's arms differ, "baseline → candidate"."""
    both = (record.conditions,) if isinstance(record, LatencyRun) else record.conditions
    keys = dict.fromkeys(key for conditions in both for key in conditions)
    values = ((key, list(dict.fromkeys(_value(conditions.get(key)) for conditions in both))) for key in keys)
    return [(key, ARROW.join(found)) for key, found in values if found != [NOTHING]]


def _under(record: Record) -> str:
    """One sentence of what matters most; where the arms of a comparison differ, their difference."""
    shown = dict(_shown_conditions(record))
    words = {"opencv": "OpenCV {}", "engine": "{} engine", "backend": "{}", "precision": "{}", "threads": "threads: {}"}
    parts = [f"on {measured_subject(record).device}", *(words[key].format(shown[key]) for key in words if key in shown)]
    parts += [shown["cpu"]] if "cpu" in shown else []
    differing = [f"{key} {value}" for key, value in shown.items() if ARROW in value and key not in words]
    return plain(f"Measured {', '.join([*parts, *differing])}.")


def _conditions_table(record: Record) -> str:
    rows = [[key.replace("_", " "), value] for key, value in _shown_conditions(record)]
    return table(["condition", "value"], rows, left=(1,))


def _value(value: Any) -> str:
    """Anything that JSON has → one line; nothing, "" and null → "-"."""
    if value is None or value in ("", [], {}):
        return NOTHING
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:.4g}" if abs(value) < 1e4 else f"{value:.0f}"
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str).strip("[]")


def _revision(subject: Subject) -> str:
    return f"`{short_revision(subject)}`"


def short_revision(subject: Subject) -> str:
    """The first characters of the git revision; where the bundle has none, of its own SHA-256: "bundle 3f2a91c"."""
    text = subject.git_revision[:7] if subject.git_revision else f"bundle {subject.bundle_sha256[:7]}"
    return " ".join(text.replace("`", "").split())


# ---------------------------------------------------------------------------------------------------------------
# All of them


def keep(record: LatencyRun, run: RunFolder) -> Path:
    """Writes what was measured of a run's bundle into the run; → the file.

    What was measured before of this target on this device is replaced. Raises ArtifactError where it cannot be written.
    """
    device = re.sub(r"[^\w.@-]", "_", record.subject.device)
    path = run.latency / f"{record.subject.target}-{device}.json"
    write_latency_json(path, record)
    return path


def kept(run: RunFolder) -> tuple[LatencyRun, ...]:
    """What `keep` left in a run, by the names of its files. Raises ArtifactError where one of them is damaged."""
    records = [(path, read_latency_json(path)) for path in sorted(run.latency.glob("*.json"))]
    for path, record in records:
        if not isinstance(record, LatencyRun) or "end_to_end" not in record.samples_ms:
            raise ArtifactError(f"{path} is not what `edgekit bench --run` writes: take it away")
    return tuple(record for _, record in records if isinstance(record, LatencyRun))


def save(record: Record, folder: Path) -> tuple[Path, ...]:
    """Writes a record in every form that it has, under fixed names; → the files.

    latency.json, github-action-benchmark.json, bencher.json, junit.xml (of a comparison), summary.md, histogram.png. A
    junit.xml that lies there from an earlier comparison is removed before a run is written. Raises ArtifactError where
    the folder cannot be written.
    """
    names = [NATIVE, *OTHER_JSON, "junit.xml", "summary.md", "histogram.png"]
    native, github, bencher, junit, summary, histogram = (folder / name for name in names)
    write_latency_json(native, record)
    write_json(github, github_action_benchmark_json(record))
    write_json(bencher, bencher_json(record))
    if isinstance(record, Comparison):
        write_bytes(junit, junit_xml(record))
    else:
        junit.unlink(missing_ok=True)
    write_text(summary, markdown_summary(record))
    write_bytes(histogram, latency_picture(record))
    written = (native, github, bencher, junit, summary, histogram)
    return tuple(path for path in written if path != junit or isinstance(record, Comparison))
