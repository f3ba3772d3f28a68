"""How long a backbone takes here: what is timed, and what a network that fails leaves."""

from dataclasses import replace
from pathlib import Path

import cv2
import numpy as np
import pytest
from graphs import network, saved

from edgekit import runner, timing
from edgekit.backbones import Backbone
from edgekit.timing import Timing, time_backbones, time_runs

NAMES = ("a", "b")
ROWS = [Backbone(name, 0, 0, (6, 8), "") for name in NAMES]
FAILED = Timing(None, 0, "", cv2.__version__, 0, runner.cpu_name(), "")


def said(what: str) -> Timing:
    """What is left where each engine of this OpenCV said the same."""
    return replace(FAILED, failure="; ".join(f"{engine} engine: {what}" for engine in runner.engines()))


def export_tiny(_: Backbone, folder: Path) -> dict[str, Path]:
    text = "(float[1,3,6,8] image) => (float[1,4,6,8] logits) { logits = Conv (image, w) }"
    path = saved(network(text, w=np.ones((4, 3, 1, 1), np.float32)), folder)
    return dict.fromkeys(runner.engines(), path)


@pytest.fixture
def tiny(monkeypatch: pytest.MonkeyPatch) -> None:
    """Instead of a backbone, one convolution for images of 6x8 pixels."""
    monkeypatch.setattr(timing, "_export", export_tiny)


class Clock:
    """Stands still but for the runs; each takes one of the given durations, the last of them for good."""

    def __init__(self, *durations_ms: int) -> None:
        self.now_ns = 0
        self.durations_ms = list(durations_ms)
        self.runs = 0

    def run(self) -> None:
        self.now_ns += 1_000_000 * self.durations_ms[min(self.runs, len(self.durations_ms) - 1)]
        self.runs += 1

    def perf_counter_ns(self) -> int:
        return self.now_ns


@pytest.mark.parametrize(
    ("durations_ms", "seconds", "expected"),
    [
        ([900, 900, 900, 50], 1.0, [50.0] * 20),  # the first three warm up
        ([900, 900, 900, 300], 1.0, [300.0] * 10),  # ten at least
        ([1, 1, 1, 5, 7], 0.0, [5.0, *[7.0] * 9]),
    ],
)
def test_time_runs(
    durations_ms: list[int], seconds: float, expected: list[float], monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = Clock(*durations_ms)
    monkeypatch.setattr(timing, "time", clock)
    assert time_runs(clock.run, seconds) == expected
    assert clock.runs == 3 + len(expected)


@pytest.mark.usefixtures("tiny")
def test_a_network_is_timed_through_this_opencv() -> None:
    calls: list[tuple[int, int]] = []
    timings = time_backbones(ROWS, 0.02, lambda done, total: calls.append((done, total)))
    assert calls == [(0, 2), (1, 2), (2, 2)]
    assert list(timings) == ["a", "b"]
    for found in timings.values():
        assert found.median_ms is not None
        assert 0 < found.median_ms < 1000
        assert found.runs >= 10
        assert found.engine in runner.engines()
        assert found.threads >= 1  # of the child: another test may have set the number here
        assert (found.opencv, found.cpu, found.failure) == (FAILED.opencv, FAILED.cpu, "")


@pytest.mark.usefixtures("tiny")
def test_the_fastest_engine_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    medians = {"dies": None, "slow": 3.0, "fast": 2.0}
    asked = []

    def run(model: Path, engine: str, size: tuple[int, int], seconds: float) -> Timing:
        asked.append((model.name, engine, size, seconds))
        return replace(FAILED, engine=engine, median_ms=medians[engine])

    monkeypatch.setattr(timing, "_run_child", run)
    monkeypatch.setattr(runner, "engines", lambda: tuple(medians))
    assert time_backbones(ROWS[:1], 1.5)["a"] == replace(FAILED, engine="fast", median_ms=2.0)
    assert asked == [("net.onnx", engine, (6, 8), 0.5) for engine in medians]


@pytest.mark.usefixtures("tiny")
@pytest.mark.parametrize(
    ("child", "failure"),
    [
        ("import os, signal; os.kill(os.getpid(), signal.SIGSEGV)", "the process ended with signal 11"),
        ("import sys; sys.exit(3)", "the process ended with exit code 3"),
        ("raise MemoryError('no room')", "MemoryError: no room"),
        ("print('{}')", "the process ended with exit code 0"),
        ("import time; time.sleep(60)", "no end within 0.5 s"),
    ],
)
def test_a_child_that_fails_is_a_line(child: str, failure: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(timing, "CHILD", child)
    monkeypatch.setattr(timing, "PATIENCE_S", 0.5 if "sleep" in child else 30.0)
    assert time_backbones(ROWS[:1], 0.0) == {"a": said(failure)}


def test_a_network_that_cannot_be_exported_does_not_stop_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    def export(row: Backbone, folder: Path) -> dict[str, Path]:
        if row.name == "a":
            raise RuntimeError("no such\n operator")
        return export_tiny(row, folder)

    monkeypatch.setattr(timing, "_export", export)
    timings = time_backbones(ROWS, 0.0)
    assert timings["a"] == replace(FAILED, failure="export: no such operator")
    assert timings["b"].runs >= 10


def test_a_network_that_opencv_cannot_load(monkeypatch: pytest.MonkeyPatch) -> None:
    def export(_: Backbone, folder: Path) -> dict[str, Path]:
        (folder / "bad.onnx").write_bytes(b"not ONNX")
        return dict.fromkeys(runner.engines(), folder / "bad.onnx")

    monkeypatch.setattr(timing, "_export", export)
    found = time_backbones(ROWS[:1], 0.0)["a"]
    assert found.median_ms is None
    assert found.failure.count(f"OpenCV {cv2.__version__} cannot load bad.onnx") == len(runner.engines())
