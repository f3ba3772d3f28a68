"""How many threads are best: what is tried, how the turns are held against each other, and which count is taken."""

import json
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path
from typing import Any

import bundles
import pytest
from hypothesis import given
from hypothesis import strategies as st
from sshd import Sshd

from edgekit import threads
from edgekit.device import here, over_ssh, place
from edgekit.errors import ArtifactError
from edgekit.threads import ThreadSweep, ThreadTime, candidates, choose, compare_turns, sweep_threads, times_ms


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return bundles.write_bundle(tmp_path_factory.mktemp("built") / "bundle")


@pytest.mark.parametrize(
    ("cores", "counts"),
    [(1, [1]), (2, [1, 2]), (3, [1, 2, 3]), (4, [1, 2, 4]), (6, [1, 2, 4, 6]), (9, [1, 2, 4, 8, 9])],
)
def test_powers_of_two_and_all_cores_are_tried(cores: int, counts: list[int]) -> None:
    assert candidates(cores) == counts


@given(st.integers(1, 1000))
def test_no_count_is_tried_twice_or_is_more_than_the_cores(cores: int) -> None:
    counts = candidates(cores)
    assert counts == sorted(set(counts)) and counts[0] == 1 and counts[-1] == cores
    assert all(larger <= 2 * smaller for smaller, larger in pairwise(counts))


def test_an_iteration_is_the_sum_of_its_stages() -> None:
    stages = {"decode": [1, 10], "preprocess": [2, 20], "forward": [3, 30], "postprocess": [4, 40]}
    wall_ns = {stage: [1_000_000 * ms for ms in times] for stage, times in stages.items()}
    assert times_ms({"wall_ns": wall_ns, "cpu_ns": {}}) == [10.0, 100.0]


def test_counts_are_held_against_each_other_round_by_round() -> None:
    """In the second round the machine was three times slower, in the third one turn was disturbed."""
    turns = {
        4: [[5.0, 5.0, 5.0], [15.0, 15.0, 15.0], [5.0, 5.0, 99.0]],
        1: [[10.0, 10.0, 99.0], [30.0, 30.0, 30.0], [10.0, 10.0, 10.0]],
        2: [[6.0, 6.0, 6.0], [18.0, 18.0, 18.0], [60.0, 60.0, 60.0]],
    }
    assert compare_turns(turns) == (
        ThreadTime(1, 10.0, 2.0),
        ThreadTime(2, 18.0, pytest.approx(1.2)),
        ThreadTime(4, 5.0, 1.0),
    )


def test_the_fastest_count_is_the_one_that_wins_most_rounds() -> None:
    """Over all rounds the second one's median is twice the first one's, because of when the machine was slow."""
    slow = (1, 10, 100, 1, 10)
    turns = {
        1: [[10.0 * factor] for factor in slow],
        2: [[10.0 * factor * ratio] for factor, ratio in zip(slow, (0.8, 2, 0.8, 0.8, 2), strict=True)],
    }
    assert compare_turns(turns) == (ThreadTime(1, 100.0, 1.25), ThreadTime(2, 200.0, 1.0))


@given(
    st.dictionaries(
        st.integers(1, 64),
        st.lists(st.floats(0.1, 1e3), min_size=5, max_size=5),
        min_size=1,
    )
)
def test_the_chosen_count_is_the_smallest_good_one(medians: dict[int, list[float]]) -> None:
    rows = compare_turns({count: [[ms] for ms in row] for count, row in medians.items()})
    assert [row.threads for row in rows] == sorted(medians)
    assert any(row.ratio == 1.0 for row in rows)
    chosen = choose(rows)
    best = min(row.ratio for row in rows)
    for row in rows:
        assert (row.ratio > 1.02 * best) if row.threads < chosen else True
        assert row.threads != chosen or row.ratio <= 1.02 * best


@pytest.mark.parametrize(("ratios", "chosen"), [((1.019, 1.0), 1), ((1.021, 1.0), 2), ((1.0, 1.0), 1), ((1.0, 1.5), 1)])
def test_two_percent_are_not_worth_another_thread(ratios: tuple[float, float], chosen: int) -> None:
    assert choose([ThreadTime(count, 5.0, ratio) for count, ratio in enumerate(ratios, start=1)]) == chosen


def test_every_count_runs_in_a_process_of_its_own(built: Path) -> None:
    told: list[tuple[str, int, int]] = []
    placed = place(here(), built)
    sweep = sweep_threads(placed, rounds=3, progress=lambda *step: told.append(step))
    cores = json.loads(
        subprocess.run([sys.executable, built / "run.py", "info", "--json"], capture_output=True, check=True).stdout
    )["here"]["cores"]
    assert [row.threads for row in sweep.rows] == candidates(cores)
    assert sweep.rounds == 3 and sweep.chosen == choose(sweep.rows)
    assert all(row.p50_ms > 0 and row.ratio > 0 for row in sweep.rows)
    assert sweep.environment["ticks"] is None or sweep.environment["ticks"] > 0
    assert told[-3:] == [("trying numbers of threads", done, 3) for done in range(3)]
    assert len(told) == len(sweep.rows) + 3


class Counting:
    """A worker's manners without a process: each iteration takes 180 ms / threads, on no clock."""

    def __init__(self, command: list[str], log: list[tuple[int, int]]) -> None:
        self.threads = int(command[command.index("--threads") + 1])
        self.log = log
        self.ready = {"conditions": {"cores": 4}, "environment": {"threads": self.threads}}

    def time(self, iterations: int) -> dict[str, Any]:
        self.log.append((self.threads, iterations))
        ns = [60_000_000 // self.threads] * iterations
        return {"wall_ns": {"decode": [0] * iterations, "preprocess": ns, "forward": ns, "postprocess": ns}}


def test_turns_are_in_random_order_and_of_about_100_ms(built: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    log: list[tuple[int, int]] = []

    @contextmanager
    def started(command: list[str]) -> Iterator[Counting]:
        yield Counting(command, log)

    monkeypatch.setattr(threads, "Worker", started)
    monkeypatch.setattr(threads, "SLICE_MS", 1000.0)
    sweep = sweep_threads(place(here(), built), rounds=20, seed=7)
    assert log[:3] == [(1, 10), (2, 10), (4, 10)]  # each is warmed up, then 1000 ms / its time a turn
    rounds = [log[start : start + 3] for start in range(3, len(log), 3)]
    assert [sorted(turns) for turns in rounds] == [[(1, 6), (2, 11), (4, 22)]] * 20
    assert len({tuple(turns) for turns in rounds}) == 6
    rows = (ThreadTime(1, 180.0, 4.0), ThreadTime(2, 90.0, 2.0), ThreadTime(4, 45.0, 1.0))
    assert sweep == ThreadSweep(4, rows, 20, {"threads": 1})


def test_a_device_over_ssh(built: Path, sshd: Sshd) -> None:
    sweep = sweep_threads(place(over_ssh(sshd.host, sys.executable, sshd.ssh_config), built), rounds=1)
    assert sweep.rows[0].threads == 1 and sweep.rounds == 1


def test_a_bundle_that_cannot_run_is_told(built: Path, tmp_path: Path) -> None:
    other = Path(shutil.copytree(built, tmp_path / "other"))
    bundles.sign(other, arch=["other"])
    with pytest.raises(ArtifactError, match="this bundle is for cpu"):
        sweep_threads(place(here(), other), rounds=1)
    assert sweep_threads(place(here(), other), rounds=1, allow_fallback=True).rounds == 1
