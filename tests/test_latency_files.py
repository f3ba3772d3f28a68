"""The files that latency records are written as: whole, exact, and read by the programs that they are for."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
from bundles import write_bundle
from hypothesis import given, settings
from hypothesis import strategies as st
from latencies import CONDITIONS, HOSTILE, STAGES, case, comparison, run, subject
from pytest_benchmark.stats import Stats

from edgekit import latency_files, runner
from edgekit.artifacts import write_json
from edgekit.errors import ArtifactError
from edgekit.latency import Comparison, LatencyRun
from edgekit.latency_files import (
    bencher_json,
    github_action_benchmark_json,
    junit_xml,
    latency_json,
    markdown_summary,
    read_latency_json,
    save,
    write_latency_json,
)

Record = LatencyRun | Comparison
RECORDS = {
    "run": run(),
    "run without an end_to_end": run(samples_ms={"forward": (1.5,), "end_to_end": ()}),
    "run without a sample": run(samples_ms={}),
    "comparison": comparison(case(), case("PASS", name="forward", candidate_ms=(1.0,))),
    "comparison that was repeated": comparison(case(), confirms=comparison(case(base_ms=(9.5,)))),
    "comparison without a case": comparison(),
    "comparison without a sample": comparison(case("INCOMPARABLE", base_ms=(), candidate_ms=(), log_ratios=())),
}

# ---------------------------------------------------------------------------------------------------------------
# The native file


@pytest.mark.parametrize("record", RECORDS.values(), ids=RECORDS)
def test_a_record_is_read_as_it_was_written(record: Record, tmp_path: Path) -> None:
    write_latency_json(tmp_path / "latency.json", record)
    assert read_latency_json(tmp_path / "latency.json") == record


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(0, 10**11), min_size=1, max_size=12))
def test_half_nanoseconds_come_back_exactly(tmp_path_factory: pytest.TempPathFactory, halves: list[int]) -> None:
    """The clock gives whole nanoseconds, and a median of them at most half ones. 50 s are more than any stage takes."""
    record = run(samples_ms={"forward": tuple(half / 2e6 for half in halves)})
    path = tmp_path_factory.getbasetemp() / "half.json"
    write_latency_json(path, record)
    assert read_latency_json(path) == record


def test_a_real_bundle_s_figures_are_kept(tmp_path: Path) -> None:
    model = runner.Model(write_bundle(tmp_path / "bundle"))
    report = runner.bench(model, seconds=0.05)
    record = run(
        samples_ms=report["samples_ms"],
        first_ms=(report["first_ms"],),
        conditions=report["conditions"],
        environment=report["environment"],
    )
    write_latency_json(tmp_path / "latency.json", record)
    assert read_latency_json(tmp_path / "latency.json") == record


@settings(max_examples=200, deadline=None)
@given(st.lists(st.integers(1, 10**9), min_size=1, max_size=25))
def test_statistics_are_pytest_benchmark_s_own(samples_ns: list[int]) -> None:
    theirs = Stats()
    for ns in samples_ns:
        theirs.update(ns / 1e9)
    ours = latency_files.stats([ns / 1e6 for ns in samples_ns])
    assert ours.pop("data") == theirs.data and ours.pop("iterations") == 1
    assert ours == theirs.as_dict()


def test_a_benchmark_has_what_pytest_benchmark_s_have() -> None:
    (benchmark,) = latency_json(run(samples_ms={"forward": (4.0, 1.0, 2.0, 3.0)}))["benchmarks"]
    block = benchmark.pop("extra_info")["edgekit"]
    assert {key: block[key] for key in block if key != "record"} == {
        "schema": "edgekit.latency/1",
        "kind": "run",
        "stage": "forward",
        "clock": "wall",
        "percentiles_ms": {"p50": 2.5, "p90": None, "p99": None},
        "missing": {
            "p90": "p90 needs 64 samples, and there are 4",
            "p99": "p99 needs 662 samples, and there are 4",
        },
    }
    assert benchmark == {
        "group": "digits-cpu",
        "name": "digits-cpu[forward]",
        "fullname": "edgekit::digits-cpu[forward]",
        "params": {"stage": "forward"},
        "param": "forward",
        "options": {"timer": "perf_counter"},
        "stats": {
            "min": 0.001,
            "max": 0.004,
            "mean": 0.0025,
            "stddev": pytest.approx(0.00129099444873),
            "rounds": 4,
            "median": 0.0025,
            "iqr": 0.002,
            "q1": 0.0015,
            "q3": 0.0035,
            "iqr_outliers": 0,
            "stddev_outliers": 2,
            "outliers": "2;0",
            "ld15iqr": 0.001,
            "hd15iqr": 0.004,
            "ops": 400.0,
            "total": 0.01,
            "data": [0.004, 0.001, 0.002, 0.003],
            "iterations": 1,
        },
    }


def test_the_head_says_which_machine_and_commit() -> None:
    raw = latency_json(comparison(case(), conditions=({**CONDITIONS, "cpu": "Other"}, CONDITIONS)))
    assert [entry["name"] for entry in raw.pop("benchmarks")] == [
        "digits-cpu[answer-base]",
        "digits-cpu[answer-candidate]",
    ]
    unknown = {"time": None, "author_time": None, "dirty": None}
    assert raw == {
        "machine_info": {
            "node": "bench-host",
            "machine": "x86_64",
            "processor": "x86_64",
            "python_version": "3.11.7",
            "cpu": {"brand_raw": "A CPU"},
            "opencv": "5.0.0",
        },
        "commit_info": {"id": "3" * 40, **unknown, "project": "digits", "branch": "(unknown)"},
        "datetime": "2026-01-02T03:04:05+00:00",
        "version": "5.3.1",
    }
    assert latency_json(run(subject=subject(None)))["commit_info"]["id"] == "unversioned"


@pytest.mark.parametrize("record", [run(samples_ms={"forward": (1.000123,)}), comparison(case(base_ms=(1.000123,)))])
def test_a_sample_is_stored_once(record: Record) -> None:
    def numbers(value: Any) -> list[float]:
        if isinstance(value, dict):
            return [number for key, inner in value.items() if key != "stats" for number in numbers(inner)]
        if isinstance(value, list):
            return [number for inner in value for number in numbers(inner)]
        return [value] if isinstance(value, float) else []

    raw = latency_json(record)
    assert raw["benchmarks"][0]["stats"]["data"] == [0.001000123]
    records = [entry["extra_info"]["edgekit"].get("record") for entry in raw["benchmarks"]]
    assert records[0] and not any(records[1:])
    assert 1.000123 not in numbers(records) and 0.001000123 not in numbers(records)


def _pytest_benchmark(folder: Path, *arguments: str) -> str:
    command = [sys.executable, "-m", "pytest_benchmark", *arguments]
    answer = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    assert answer.returncode == 0, answer.stderr
    assert "Failed to load" not in answer.stderr
    return answer.stdout


def test_pytest_benchmark_compares_our_files(tmp_path: Path) -> None:
    for name, record in (("old", run()), ("new", run(scale=2.0)), ("side", comparison(case()))):
        write_latency_json(tmp_path / f"{name}.json", record)
    shown = _pytest_benchmark(tmp_path, "compare", "old.json", "new.json", "--columns=median,rounds")
    assert "benchmark 'digits-cpu': 10 tests" in shown
    for stage in STAGES:
        assert shown.count(f"digits-cpu[{stage}]") == 2
    shown = _pytest_benchmark(tmp_path, "compare", "side.json", "--group-by=param:case", "--time-unit=ms")
    assert "benchmark 'case=answer': 2 tests" in shown and "(time in ms)" in shown
    rows = [line.split() for line in shown.splitlines() if line.startswith("digits-cpu[")]
    assert {row[0]: row[1] for row in rows} == {
        "digits-cpu[answer-base]": "10.0000",
        "digits-cpu[answer-candidate]": "11.0000",
    }


def test_a_record_without_samples_does_not_disturb_pytest_benchmark(tmp_path: Path) -> None:
    write_latency_json(tmp_path / "a.json", comparison())
    write_latency_json(tmp_path / "b.json", run())
    assert "5 tests" in _pytest_benchmark(tmp_path, "compare", "a.json", "b.json")


def _changed(change: Any) -> dict[str, Any]:
    raw = json.loads(json.dumps(latency_json(comparison(case()))))
    change(raw["benchmarks"], raw["benchmarks"][0]["extra_info"])
    return raw  # type: ignore[no-any-return]


@pytest.mark.parametrize(
    ("raw", "message"),
    [
        ({"iterations": 20}, "is no latency record: `edgekit bench --save DIR`"),
        ({"benchmarks": 5}, "is no latency record"),
        ({"benchmarks": []}, "written by pytest-benchmark, and has no record of edgekit's: `edgekit bench --save DIR`"),
        (_changed(lambda rows, extra: extra.clear()), "written by pytest-benchmark, and has no record"),
        ({"benchmarks": [3]}, "not as edgekit writes it"),
        ({"benchmarks": [{"extra_info": []}]}, "not as edgekit writes it"),
        (
            _changed(lambda rows, extra: extra["edgekit"].update(schema="edgekit.latency/2")),
            "reads 'edgekit.latency/1'",
        ),
        (_changed(lambda rows, extra: extra["edgekit"].update(kind="benchmark")), "from the suite in benchmarks/"),
        (_changed(lambda rows, extra: extra["edgekit"].update(kind=["run"])), "not as edgekit writes it"),
        (_changed(lambda rows, extra: extra["edgekit"].pop("record")), "not as edgekit writes it"),
        (_changed(lambda rows, extra: extra["edgekit"]["record"].update(more=1)), "more: Extra inputs"),
        (_changed(lambda rows, extra: extra["edgekit"]["record"].update(seed="x")), r"not as .* \(seed: "),
        (_changed(lambda rows, extra: rows[1]["stats"].pop("data")), "not as edgekit writes it"),
        (_changed(lambda rows, extra: rows[1].pop("extra_info")), "not as edgekit writes it"),
        (_changed(lambda rows, extra: rows[1]["stats"]["data"].append(-1.0)), "a sample is not a duration"),
        (_changed(lambda rows, extra: rows[1]["stats"]["data"].append(float("nan"))), "a sample is not a duration"),
        (_changed(lambda rows, extra: rows[1]["stats"]["data"].append("1")), "a sample is not a duration"),
    ],
)
def test_another_file_is_refused_with_what_to_do(raw: dict[str, Any], message: str, tmp_path: Path) -> None:
    write_json(tmp_path / "x.json", raw)
    with pytest.raises(ArtifactError, match=message):
        read_latency_json(tmp_path / "x.json")


@pytest.mark.parametrize("text", ["", "[]", "{", "[" * 100_000, '{"a": ' * 100_000])
def test_a_damaged_file_is_refused(text: str, tmp_path: Path) -> None:
    (tmp_path / "x.json").write_text(text)
    with pytest.raises(ArtifactError, match=r"x\.json is damaged"):
        read_latency_json(tmp_path / "x.json")


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match=r"cannot read .*none\.json"):
        read_latency_json(tmp_path / "none.json")


# ---------------------------------------------------------------------------------------------------------------
# What other programs read


def test_github_action_benchmark() -> None:
    conditions = {"opencv": "5.0.0", "threads": 2, "fallback": "", "mhz": None}
    record = run(samples_ms={"forward": (4.0, 1.0, 2.0, 3.0)}, conditions=conditions)
    extra = "\nopencv 5.0.0\nthreads 2"

    def entry(name: str, value: float, spread: str, count: int, unit: str = "ms") -> dict[str, Any]:
        return {
            "name": f"digits-cpu[{name}]",
            "unit": unit,
            "value": value,
            "range": f"± {spread}",
            "extra": f"median of {count}{extra}",
        }

    assert github_action_benchmark_json(record) == [
        entry("forward", 2.5, "1.0000", 4),
        entry("import", 150.0, "37.5000", 3),
        entry("load", 80.0, "0.0000", 1),
        entry("first image", 42.0, "2.0000", 2),
        entry("peak memory", 112.0, "0.0000", 1, "MB"),
    ]
    compared = github_action_benchmark_json(comparison(case(), case(name="forward"), clock="wall"))
    assert [(row["name"], row["value"], row["unit"]) for row in compared] == [
        ("digits-cpu[answer, wall time side by side]", 11.5, "ms"),
        ("digits-cpu[forward, wall time side by side]", 11.5, "ms"),
    ]
    assert github_action_benchmark_json(comparison()) == []


def test_bencher_has_nanoseconds_under_its_own_measures() -> None:
    assert bencher_json(run(samples_ms={"forward": (4.0, 1.0, 2.0, 3.0)})) == {
        "digits-cpu[forward]": {
            "latency": {"value": 2_500_000.0, "lower_value": 1_500_000.0, "upper_value": 3_500_000.0}
        },
        "digits-cpu[decoding beside answering]": {"throughput": {"value": 61.25}},
    }
    assert bencher_json(comparison(case())) == {
        "digits-cpu[answer, CPU time side by side]": {
            "latency": {"value": 11_500_000.0, "lower_value": 11_125_000.0, "upper_value": 11_875_000.0}
        },
    }
    name = "x-bencher-ignore"  # as a benchmark's name, Bencher would take the suffix off
    assert all(key.endswith("]") for key in bencher_json(run(subject=subject(target=name))))


VERDICTS = ("PASS", "FAIL", "INCONCLUSIVE", "INCOMPARABLE", "ADVISORY")


def test_junit_has_a_case_a_gate() -> None:
    cases = [case(verdict, name=f"gate{index}", reason=f"why {index}") for index, verdict in enumerate(VERDICTS)]
    root = ElementTree.fromstring(junit_xml(comparison(*cases, verdict="FAIL")))
    (suite,) = root
    assert (
        root.tag == "testsuites"
        and suite.tag == "testsuite"
        and suite.attrib
        == {
            "name": "edgekit compare",
            "tests": "5",
            "failures": "1",
            "errors": "1",
            "skipped": "2",
            "time": "30.000",
            "timestamp": "2026-01-02T03:04:05+00:00",
            "hostname": "bench-host",
        }
    )
    shown = [(item.attrib, [child.tag for child in item], item[0].get("message")) for item in suite]
    attributes = [{"classname": "edgekit.digits-cpu", "name": f"gate{index}", "time": "6.000"} for index in range(5)]
    assert shown == [
        (attributes[0], ["system-out"], None),
        (attributes[1], ["failure", "system-out"], "FAIL: why 1"),
        (attributes[2], ["skipped", "system-out"], "INCONCLUSIVE: why 2"),
        (attributes[3], ["error", "system-out"], "INCOMPARABLE: why 3"),
        (attributes[4], ["skipped", "system-out"], "ADVISORY: why 4"),
    ]
    figures = "+10.0 % (99 %: +8.0 % to +12.5 %), 10.2 → 11.5 ms, CPU time, 3 blocks; the limit is +5.0 %"
    assert suite[1][0].text == f"FAIL: why 1\n{figures}" and suite[0][0].text == figures


@pytest.mark.parametrize("verdict", ["PASS", "INCOMPARABLE"])
def test_junit_without_cases_still_says_the_verdict(verdict: str) -> None:
    root = ElementTree.fromstring(junit_xml(comparison(verdict=verdict)))
    ((item,),) = root
    assert item.get("name") == "compare" and item.get("time") == "30.000"
    assert [child.tag for child in item] == ([] if verdict == "PASS" else ["error"])


@settings(max_examples=100, deadline=None)
@given(st.text(max_size=20))
def test_any_text_can_stand_in_junit(text: str) -> None:
    data = junit_xml(comparison(case(reason=text, name=text, change=None)))
    ((item,),) = ElementTree.fromstring(data)
    shown = "".join(
        c if c in "\t\n\r" or " " <= c < "\ufffe" or c > "\uffff" else c.encode("unicode_escape").decode() for c in text
    )
    assert item.get("name") == " ".join(shown.split()) or "\\x" in shown  # a space such as \x1c is written out
    assert item[0].text is not None and item[0].text.startswith("FAIL:")


def test_junit_writes_out_what_xml_cannot_hold() -> None:
    ((item,),) = ElementTree.fromstring(junit_xml(comparison(case(reason=HOSTILE, change=None))))
    assert item[0].text == "FAIL: a|b <b>*x*</b> `c` \\x1b[31m & \\x00\nnew ]]> 猫"
    assert item[0].get("message") == "FAIL: a|b <b>*x*</b> `c` \\x1b[31m & \\x00 new ]]> 猫"


# ---------------------------------------------------------------------------------------------------------------
# Markdown

RUN_SUMMARY = """## digits-cpu: 5.75 ms from file to answer (p50)

fp32, `1111111`, 2026-01-02T03:04:05+00:00

| ms | p50 | p90 | p99 | samples |
| --- | ---: | ---: | ---: | ---: |
| decode | 1.75 | - | - | 4 |
| preprocess | 2.75 | - | - | 4 |
| forward | 3.75 | - | - | 4 |
| postprocess | 4.75 | - | - | 4 |
| end to end | 5.75 | - | - | 4 |

p90 needs 64 samples, and there are 4. p99 needs 662 samples, and there are 4.

|  | figure |
| --- | ---: |
| import of numpy and OpenCV | 150 ms (200, 100, 150) |
| load: verifying the bundle, reading the network | 80.0 ms |
| first image | 42.0 ms (40.0, 44.0) |
| images a second, decoding beside answering | 61.2 |
| memory | 112.0 MB at most, 62.0 MB over Python and OpenCV |
| energy an image, the whole board | not measured (it takes a meter, and some time) |

Measured on bench-host, OpenCV 5.0.0, new engine, opencv/cpu, fp32, threads: 1, A CPU.

**Warnings**

- the load is 3 on 2 cores

<details><summary>Conditions</summary>

| condition | value |
| --- | --- |
| opencv | 5.0.0 |
| engine | new |
| backend | opencv/cpu |
| precision | fp32 |
| threads | 1 |
| machine | x86\\_64 |
| cpu | A CPU |
| python | 3.11.7 |
| proved on this opencv | yes |

|  | before | after |
| --- | ---: | ---: |
| load | 0.5 | 1.25 |
| governor | performance | performance |

</details>
"""
COMPARISON_SUMMARY = """## FAIL: answer is 10.0 % slower, and 5 % are allowed

digits-cpu, `2222222` → `3333333`

This repeats a comparison that ended in FAIL: the first

| gate | verdict | change | 99 % interval | baseline, ms | candidate, ms | change of wall time |
| --- | --- | ---: | ---: | ---: | ---: | ---: |
| answer | FAIL | +10.0 % | +8.0 % to +12.5 % | 10.2 | 11.5 | +11.0 % |
| forward | INCONCLUSIVE | - | - | - | 1.00 | - |

**Reasons**

- answer: 99 % sure that it is slower by more than 5 %
- forward: too few blocks

The limit is +5.0 % of CPU time (profile ci). 3 blocks, 1 rejected, 30 s, seed 7.

Measured on bench-host, OpenCV 5.0.0, new engine, opencv/cpu, fp32, threads: 1 → 2, A CPU.

**What changed in the network itself**

- Conv: 49 → 51

<details><summary>Blocks</summary>

| block | answer | forward |
| --- | ---: | ---: |
| 1 | +9.4 % | +1.0 % |
| 2 | +10.5 % | - |
| 3 | +10.0 % | - |

**Rejected blocks**

- block 2: throttled

</details>

<details><summary>Conditions</summary>

| condition | value |
| --- | --- |
| opencv | 5.0.0 |
| engine | new |
| backend | opencv/cpu |
| precision | fp32 |
| threads | 1 → 2 |
| machine | x86\\_64 |
| cpu | A CPU |
| python | 3.11.7 |
| proved on this opencv | yes |

</details>
"""


def test_the_summary_of_a_run() -> None:
    assert markdown_summary(run(warnings=("the load is 3 on 2 cores",))) == RUN_SUMMARY


def test_the_summary_of_a_comparison() -> None:
    nothing = dict.fromkeys(("change", "low", "high", "other_change"))
    forward = case(
        "INCONCLUSIVE", name="forward", reason="too few blocks", log_ratios=(0.01,), base_ms=(), candidate_ms=(1.0,)
    )
    record = comparison(
        case(),
        forward.model_copy(update=nothing),
        workload=("Conv: 49 → 51",),
        rejected=("block 2: throttled",),
        conditions=(CONDITIONS, {**CONDITIONS, "threads": 2}),
        confirms=comparison(case(), reason="the first"),
    )
    assert markdown_summary(record) == COMPARISON_SUMMARY


@pytest.mark.parametrize("record", RECORDS.values(), ids=RECORDS)
def test_every_record_has_a_summary(record: Record) -> None:
    text = markdown_summary(record)
    assert text.startswith("## ") and text.endswith("\n") and "\n\n\n" not in text


def test_a_summary_shows_any_text_as_it_is() -> None:
    record = run(subject=subject(name=HOSTILE), warnings=(HOSTILE,), conditions={"cpu": HOSTILE, "opencv": HOSTILE})
    text = markdown_summary(record)
    assert r"a\|b \<b\>\*x\*\</b\> \`c\`" in text
    plain = text.replace("<details><summary>Conditions</summary>", "").replace("</details>", "")
    assert "<b>" not in plain and "*x*" not in plain.replace("\\*", "")
    widths = {line.replace("\\|", "").count("|") for line in plain.splitlines() if line.startswith("|")}
    assert widths == {3, 4, 6}, "a bar in a cell would make a column"


# ---------------------------------------------------------------------------------------------------------------
# All of them


@pytest.mark.parametrize("record", RECORDS.values(), ids=RECORDS)
def test_all_files_are_saved_under_fixed_names(record: Record, tmp_path: Path) -> None:
    written = save(record, tmp_path / "new" / "folder")
    names = {"latency.json", "github-action-benchmark.json", "bencher.json", "summary.md", "histogram.png"}
    names |= {"junit.xml"} if isinstance(record, Comparison) else set()
    assert {path.name for path in written} == names == {path.name for path in (tmp_path / "new" / "folder").iterdir()}
    assert read_latency_json(written[0]) == record
    assert runner.read_image(tmp_path / "new" / "folder" / "histogram.png").shape[0] > 60
    for path in written:
        if path.suffix == ".json":
            json.loads(path.read_text("utf-8"), parse_constant=pytest.fail)  # NaN is no JSON


def test_a_run_leaves_no_verdict_of_an_earlier_comparison(tmp_path: Path) -> None:
    save(comparison(case()), tmp_path)
    (tmp_path / "notes.txt").write_text("mine")
    save(run(), tmp_path)
    assert not (tmp_path / "junit.xml").exists() and (tmp_path / "notes.txt").read_text() == "mine"


def test_a_folder_that_cannot_be_made_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ArtifactError, match="cannot write"):
        save(run(), tmp_path / "file")
