"""bench, compare and history as a user runs them, on real bundles."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from bundles import sign, write_bundle
from sshd import Sshd

from edgekit.artifacts import RunFolder, write_archive
from edgekit.bundle import bundle
from edgekit.latency import Comparison, LatencyRun
from edgekit.latency_files import kept
from edgekit.report import latency_lines
from edgekit.targets import read_target


def edgekit(*words: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "edgekit.cli", *map(str, words)], capture_output=True, text=True, check=False
    )


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_bundle(tmp_path_factory.mktemp("base") / "tiny-cpu")


@pytest.fixture(scope="module")
def slower(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """It computes its network 30 times for an answer."""
    folder = write_bundle(tmp_path_factory.mktemp("slower") / "tiny-cpu")
    source = (folder / "run.py").read_text(encoding="utf-8")
    once = "    outputs = model.session(blob)\n"
    assert source.count(once) == 1
    repeated = once.replace("model.session(blob)", "[model.session(blob) for _ in range(30)][-1]")
    (folder / "run.py").write_text(source.replace(once, repeated), encoding="utf-8")
    sign(folder)
    return folder


def test_a_bundle_is_no_regression_of_itself(base: Path, tmp_path: Path) -> None:
    """Of 299 such comparisons none may fail; so one that does is a fault of the gate."""
    answer = edgekit("compare", base, base, "--json", "--save", tmp_path / "out", "--max-seconds", "20")
    assert answer.returncode == 0, answer.stderr
    found = Comparison.model_validate_json(answer.stdout)
    assert found.verdict in ("PASS", "INCONCLUSIVE")
    assert (found.profile, found.clock, found.fail_if, found.workload) == ("ci", "cpu", 0.05, ())
    assert found.conditions[0]["threads"] == found.conditions[1]["threads"] == 1
    assert found.base.bundle_sha256 == found.candidate.bundle_sha256
    written = {path.name for path in (tmp_path / "out").iterdir()}
    assert written == {
        "latency.json",
        "summary.md",
        "histogram.png",
        "junit.xml",
        "bencher.json",
        "github-action-benchmark.json",
    }
    assert json.loads((tmp_path / "out" / "latency.json").read_text("utf-8"))["benchmarks"][0]["extra_info"]["edgekit"]


def test_a_slower_bundle_fails_and_is_confirmed(base: Path, slower: Path, tmp_path: Path) -> None:
    archive = tmp_path / "base.tar.gz"
    write_archive(base, archive)
    answer = edgekit("compare", archive, slower, "--confirm")
    assert answer.returncode == 1, answer.stderr
    assert answer.stdout.startswith("FAIL: +")
    assert "slower by more than 5 %" in answer.stdout
    assert "Once more" in answer.stderr


def test_another_engine_is_not_comparable(base: Path, tmp_path: Path) -> None:
    import cv2

    if not hasattr(cv2.dnn, "ENGINE_CLASSIC"):
        pytest.skip("this OpenCV has one engine")
    other = write_bundle(tmp_path / "other")
    sign(other, proved=[{"opencv": cv2.__version__, "engine": "classic"}])
    answer = edgekit("compare", base, other)
    assert answer.returncode == 4, answer.stdout + answer.stderr
    assert "INCOMPARABLE: measured under different conditions: engine: new against classic" in answer.stdout


def test_no_verdict_is_an_error_only_where_it_is_asked_for(base: Path) -> None:
    for options, code in (((), 0), (("--strict",), 3)):
        answer = edgekit("compare", base, base, "--max-seconds", "1", *options)
        assert (answer.returncode, answer.stdout[:13]) == (code, "INCONCLUSIVE:"), answer.stderr
        assert "the 1 seconds allowed were over after 1 blocks" in answer.stdout


def test_a_bundle_of_an_older_edgekit_says_so(base: Path, tmp_path: Path) -> None:
    older = write_bundle(tmp_path / "older")
    source = (older / "run.py").read_text(encoding="utf-8")
    (older / "run.py").write_text(source.replace('"worker", parents', '"labourer", parents'), encoding="utf-8")
    sign(older)
    answer = edgekit("compare", older, base)
    assert answer.returncode == 2
    told = "the baseline: this bundle was built by an edgekit whose run.py cannot take turns: bundle its run again"
    assert told in answer.stderr


def test_a_bench_leaves_what_history_and_advice_read(base: Path, tmp_path: Path) -> None:
    for number in (1, 2):
        answer = edgekit("bench", base, "--seconds", "0.2", "--save", tmp_path / "results" / str(number), "--json")
        assert answer.returncode == 0, answer.stderr
    measured = json.loads(answer.stdout)
    assert measured.pop("threads") is None  # none were tried
    run = LatencyRun.model_validate(measured)
    assert (run.subject.name, run.conditions["threads"], len(run.first_ms)) == ("tiny", 1, 6)
    history = edgekit("history", tmp_path / "results", "--json", "--save", tmp_path / "history")
    assert history.returncode == 0, history.stderr
    (series,) = json.loads(history.stdout)["series"]
    assert (series["bundle"], len(series["points"]), series["steps"]) == ("tiny-cpu", 2, [])
    assert {path.name for path in (tmp_path / "history").iterdir()} == {"history.json", "history.md", "history.png"}
    stored = tmp_path / "results" / "1" / "latency.json"
    for candidate in (base, tmp_path / "results" / "2" / "latency.json"):
        advice = edgekit("compare", stored, candidate)
        assert (advice.returncode, advice.stdout[:20]) == (0, "ADVISORY: end to end"), advice.stderr
    assert edgekit("compare", stored, stored, "--strict").returncode == 3


def test_a_bench_is_kept_in_the_bundles_run(finished_run: Path, base: Path, tmp_path: Path) -> None:
    run = RunFolder(Path(shutil.copytree(finished_run, tmp_path / "digits")))
    built = bundle(run.path, read_target("cpu"), tmp_path / "dist").path
    refused = edgekit("bench", base, "--run", run.path)
    assert refused.returncode == 2 and f"is not a bundle of {run.path}" in refused.stderr.replace("\n", " ")
    assert not run.latency.exists()
    answer = edgekit("bench", built, "--seconds", "0.2", "--run", run.path, "--json")
    assert answer.returncode == 0, answer.stderr
    (record,) = kept(run)
    assert record.model_dump(mode="json") == {k: v for k, v in json.loads(answer.stdout).items() if k != "threads"}
    assert latency_lines(record)[0] in run.report.read_text(encoding="utf-8")


def test_a_comparison_is_no_measurement_to_compare_with(base: Path, tmp_path: Path) -> None:
    edgekit("compare", base, base, "--max-seconds", "1", "--save", tmp_path)
    answer = edgekit("compare", tmp_path / "latency.json", base)
    assert answer.returncode == 2
    assert "is a comparison, not a measurement" in answer.stderr


def test_the_best_number_of_threads_is_what_is_measured(base: Path) -> None:
    answer = edgekit("bench", base, "--threads", "auto", "--seconds", "0.2", "--json")
    assert answer.returncode == 0, answer.stderr
    measured = json.loads(answer.stdout)
    tried = [row["threads"] for row in measured["threads"]["rows"]]
    assert tried == sorted(set(tried)) and tried[0] == 1
    assert measured["conditions"]["threads"] == measured["threads"]["chosen"]
    assert measured["conditions"]["threads"] in tried


def test_a_device_over_ssh(base: Path, slower: Path, sshd: Sshd) -> None:
    there = ["--device", sshd.host, "--python", sys.executable, "--ssh-config", sshd.ssh_config]
    measured = edgekit("bench", base, "--seconds", "0.2", *there)
    assert measured.returncode == 0, measured.stderr
    assert f"tiny for cpu (fp32) on {sshd.host}" in measured.stdout
    answer = edgekit("compare", base, slower, "--profile", "device", "--max-seconds", "5", *there)
    assert answer.returncode == 0, answer.stdout + answer.stderr
    assert answer.stdout.startswith("INCONCLUSIVE: +")  # too few blocks for a verdict, but what they say is clear
    assert "wall time: tiny-cpu against tiny-cpu" in answer.stdout
