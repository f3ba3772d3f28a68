"""benchmarks/: the pytest-benchmark suite on real bundles, as a user runs it."""

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import cv2
import pytest
from bundles import sign, write_bundle

from edgekit import runner
from edgekit.errors import ArtifactError
from edgekit.latency_files import read_latency_json

ROOT = Path(__file__).parents[1]
STAGES = ("preprocess", "forward", "postprocess", "end_to_end")
QUICK = ("--benchmark-max-time=0.02", "--benchmark-min-rounds=3")


def pytest_run(*words: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-q", *map(str, words)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)


@pytest.fixture(scope="module")
def bundles(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """One that asks for one thread; one of another precision that leaves the number to OpenCV."""
    first, second = (write_bundle(tmp_path_factory.mktemp("bundles") / name) for name in ("a", "b"))
    sign(second, threads=0, precision="int8-weights", name="other")
    return [first, second]


@pytest.fixture(scope="module")
def measured(bundles: list[Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The JSON file of the suite on both."""
    path = tmp_path_factory.mktemp("out") / "suite.json"
    options = [word for folder in bundles for word in ("--bundle", folder)]
    answer = pytest_run("benchmarks", *options, "--benchmark-json", path, *QUICK)
    assert answer.returncode == 0, answer.stdout + answer.stderr
    assert "8 passed" in answer.stdout
    with pytest.raises(ArtifactError, match="from the suite in benchmarks/, which keeps samples and no record"):
        read_latency_json(path)
    raw: dict[str, Any] = json.loads(path.read_text("utf-8"))
    return raw


def test_each_stage_of_each_bundle_is_measured(measured: dict[str, Any]) -> None:
    found = {(row["group"], row["name"]) for row in measured["benchmarks"]}
    assert found == {
        *(("tiny-cpu", f"test_{stage}[tiny-cpu-fp32]") for stage in STAGES),
        *(("other-cpu", f"test_{stage}[other-cpu-int8-weights]") for stage in STAGES),
    }
    for row in measured["benchmarks"]:
        assert len(row["stats"]["data"]) == row["stats"]["rounds"] >= 3, "raw samples are kept"


def test_each_entry_says_what_it_was_taken_under(measured: dict[str, Any], bundles: list[Path]) -> None:
    manifests = [json.loads((folder / "manifest.json").read_text("utf-8")) for folder in bundles]
    for row in measured["benchmarks"]:
        manifest = manifests[row["group"] == "other-cpu"]
        block = dict(row["extra_info"]["edgekit"])
        before, after = block.pop("environment")
        assert before.keys() == after.keys() == runner.environment().keys()
        conditions = block.pop("conditions")
        assert (conditions["opencv"], conditions["cpu"]) == (cv2.__version__, runner.cpu_name())
        assert block == {
            "schema": "edgekit.latency/1",
            "kind": "benchmark",
            "stage": row["name"].removeprefix("test_").split("[")[0],
            "clock": "wall",
            "bundle_sha256": manifest["sha256"],
            "bundle_precision": manifest["precision"],
            "git_revision": None,
        }


def test_a_bundle_does_not_get_the_threads_of_the_one_before(measured: dict[str, Any]) -> None:
    threads = {row["group"]: row["extra_info"]["edgekit"]["conditions"]["threads"] for row in measured["benchmarks"]}
    probe = [sys.executable, "-c", "import cv2; print(cv2.getNumThreads())"]
    default = int(subprocess.run(probe, capture_output=True, text=True, check=True).stdout)
    assert threads == {"tiny-cpu": 1, "other-cpu": default}


def test_what_a_bundle_runs_is_its_own_run_py(bundles: list[Path], tmp_path: Path) -> None:
    broken = write_bundle(tmp_path / "broken")
    source = (broken / "run.py").read_text(encoding="utf-8")
    wrong = source.replace("def preprocess(", "def preprocess(*_):\n    raise ZeroDivisionError\n\n\ndef _preprocess(")
    (broken / "run.py").write_text(wrong, encoding="utf-8")
    sign(broken)
    answer = pytest_run("benchmarks", "--bundle", broken, "--bundle", bundles[0], "--benchmark-disable")
    assert answer.returncode == 1 and "ZeroDivisionError" in answer.stdout
    assert "4 failed, 4 passed" in answer.stdout, "the other bundle has a run.py of its own"


def test_a_bundle_that_is_not_at_home_is_skipped_with_the_reason(bundles: list[Path], tmp_path: Path) -> None:
    stranger = write_bundle(tmp_path / "stranger")
    sign(stranger, arch=("riscv64",), target="board")
    answer = pytest_run("benchmarks", "--bundle", stranger, "--bundle", bundles[0], *QUICK)
    assert answer.returncode == 0, answer.stdout
    assert "4 passed, 4 skipped" in answer.stdout
    assert "this bundle is for board (riscv64), and this machine is" in answer.stdout


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "the benchmarks measure bundles: give at least one, --bundle dist/NAME-TARGET"),
        (["--bundle", "{folder}"], "--bundle: no bundle at .*: cannot read manifest.json"),
        (["--bundle", "{folder}/none"], "--bundle: no bundle at .*none"),
    ],
)
def test_usage(words: list[str], message: str, tmp_path: Path) -> None:
    answer = pytest_run("benchmarks", *(word.format(folder=tmp_path) for word in words))
    assert answer.returncode == pytest.ExitCode.USAGE_ERROR
    assert "Traceback" not in answer.stderr
    assert re.search(message, answer.stderr)


def test_a_damaged_bundle_is_a_usage_error(tmp_path: Path) -> None:
    folder = write_bundle(tmp_path / "damaged")
    (folder / "model.onnx").write_bytes(b"")
    answer = pytest_run("benchmarks", "--bundle", folder)
    assert answer.returncode == pytest.ExitCode.USAGE_ERROR
    assert "model.onnx is not the file that was built" in answer.stderr


def test_plain_pytest_leaves_the_suite_out(pytestconfig: pytest.Config) -> None:
    assert pytestconfig.getini("testpaths") == ["tests"]
