"""Models that take turns: who begins, what is counted, and what is left of one that does not run."""

from pathlib import Path

import numpy as np
import pytest
from graphs import network, random

from edgekit import parity, runner, turns
from edgekit.turns import take_turns, time_rounds

BLOB = random(1, 3, 32, 32)


class Clock:
    """Moves on only when a session runs."""

    def __init__(self) -> None:
        self.now_ns = 0
        self.calls: list[str] = []

    def perf_counter_ns(self) -> int:
        return self.now_ns

    def perf_counter(self) -> float:
        return self.now_ns / 1e9


class Session:
    def __init__(self, clock: Clock, name: str, ms: int) -> None:
        self.clock, self.name, self.ms = clock, name, ms

    def __call__(self, _: np.ndarray) -> runner.Outputs:
        self.clock.now_ns += self.ms * 1_000_000
        self.clock.calls.append(self.name)
        return {}


@pytest.mark.parametrize(("seconds", "rounds"), [(0.0, 15), (0.6, 100)])
def test_every_round_times_every_session_and_another_one_begins(
    seconds: float, rounds: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = Clock()
    monkeypatch.setattr(turns, "time", clock)
    sessions = [Session(clock, "a", 1), Session(clock, "b", 2), Session(clock, "c", 3)]
    assert time_rounds(sessions, BLOB, seconds) == [[1.0, 2.0, 3.0]] * rounds  # type: ignore[arg-type]
    timed = "".join(clock.calls[9:])  # after three rounds of warming up
    assert timed == ("abcbcacab" * rounds)[: 3 * rounds]


def write(folder: Path, name: str, layers: int) -> Path:
    """A chain of convolutions, each as much work."""
    nodes = " ".join(f"x{i + 1} = Conv <kernel_shape = [3, 3], pads = [1, 1, 1, 1]> (x{i}, w)" for i in range(layers))
    text = f"(float[1,3,32,32] image) => (float[1,3,32,32] y) {{ x0 = Identity (image) {nodes} y = Relu (x{layers}) }}"
    path = folder / name
    path.write_bytes(network(text, w=random(3, 3, 3, 3) / 5).SerializeToString())
    return path


def test_more_work_takes_longer_whatever_its_place(tmp_path: Path) -> None:
    short, long = write(tmp_path, "short.onnx", 2), write(tmp_path, "long.onnx", 60)
    opencv = parity.find_opencv()
    forth = take_turns(opencv, opencv.engines[0], [short, long], BLOB, seconds=0.2, threads=1)
    back = take_turns(opencv, opencv.engines[0], [long, short], BLOB, seconds=0.2, threads=1)
    assert forth is not None and back is not None
    assert forth.ratios[0] == back.ratios[0] == 1.0
    assert forth.ratios[1] > 3
    assert back.ratios[1] < 1 / 3
    assert forth.rounds >= 30  # 15 in either order of loading
    assert all(ms > 0 for ms in forth.median_ms)


def test_a_model_that_does_not_run_gives_no_figures(tmp_path: Path) -> None:
    good, bad = write(tmp_path, "good.onnx", 1), tmp_path / "bad.onnx"
    bad.write_bytes(b"not ONNX")
    opencv = parity.find_opencv()
    assert take_turns(opencv, opencv.engines[0], [good, bad], BLOB, seconds=0) is None


@pytest.mark.parametrize(
    "child", ["import os, signal; os.kill(os.getpid(), signal.SIGSEGV)", "print('[[1.0]]'); 1 / 0"]
)
def test_a_child_that_dies_gives_no_figures(child: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(turns, "CHILD", child)
    opencv = parity.find_opencv()
    assert take_turns(opencv, opencv.engines[0], [write(tmp_path, "a.onnx", 1)], BLOB, seconds=0) is None
