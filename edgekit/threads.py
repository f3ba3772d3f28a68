"""How many threads a bundle is fastest with on a device: counts are tried in turns, and the smallest good one is taken.

A process for each count, all started before anything is timed. Only one of them works at a time, the others wait on
their pipes; in every round each has its turn, in random order, so that a busy or warming machine slows all alike.
"""

from __future__ import annotations

import random
import statistics
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

from edgekit.device import Placed, command
from edgekit.runner import STAGES
from edgekit.worker import Worker

ROUNDS = 12
SLICE_MS = 100.0  # a turn lasts about so long
MIN_ITERATIONS = 5  # a turn; the median leaves out the first, which finds the caches cold
WARM_UP = 10  # iterations
WITHIN = 1.02  # of the fastest: more threads for less than that are not worth what they take from others


@dataclass(frozen=True)
class ThreadTime:
    """One count's figures."""

    threads: int
    p50_ms: float  # from file bytes to answer
    ratio: float  # to the fastest count's, round by round; the median of the rounds


@dataclass(frozen=True)
class ThreadSweep:
    """What came of trying them all."""

    chosen: int
    rows: tuple[ThreadTime, ...]  # by threads
    rounds: int
    environment: dict[str, Any]  # runner.environment() before anything was timed


def sweep_threads(
    placed: Placed,
    *,
    rounds: int = ROUNDS,
    allow_fallback: bool = False,
    seed: int = 0,
    progress: Callable[[str, int, int], None] = lambda name, done, total: None,
) -> ThreadSweep:
    """Tries 1, 2, 4, ... and all of the device's cores. seed: of the random orders.

    Raises ArtifactError where the bundle cannot run there, or its run.py knows no worker.
    """
    dice = random.Random(seed)
    options = ["--allow-fallback"] if allow_fallback else []
    with ExitStack() as stack:

        def start(threads: int) -> Worker:
            return stack.enter_context(Worker(command(placed, "worker", "--threads", str(threads), *options)))

        progress("starting a process for each number of threads", 0, 0)
        workers = {1: start(1)}
        first = workers[1].ready
        counts = candidates(first["conditions"]["cores"])
        for threads in counts[1:]:
            progress("starting a process for each number of threads", len(workers), len(counts))
            workers[threads] = start(threads)
        iterations = {threads: _iterations(times_ms(worker.time(WARM_UP))) for threads, worker in workers.items()}
        turns: dict[int, list[list[float]]] = {threads: [] for threads in workers}
        for done in range(rounds):
            progress("trying numbers of threads", done, rounds)
            for threads in dice.sample(list(workers), len(workers)):
                turns[threads].append(times_ms(workers[threads].time(iterations[threads])))
    rows = compare_turns(turns)
    return ThreadSweep(choose(rows), rows, rounds, first["environment"])


def candidates(cores: int) -> list[int]:
    """1, 2, 4, ... below the number of cores, and that."""
    return [*(2**power for power in range((cores - 1).bit_length())), cores]


def times_ms(answer: Mapping[str, Any]) -> list[float]:
    """A worker's answer → ms of each iteration, from file bytes to answer."""
    return [sum(stages) / 1e6 for stages in zip(*(answer["wall_ns"][stage] for stage in STAGES), strict=True)]


def _iterations(warm_up_ms: Sequence[float]) -> int:
    """How many make a turn; the second half of the warm-up is warm."""
    return max(MIN_ITERATIONS, round(SLICE_MS / statistics.median(warm_up_ms[len(warm_up_ms) // 2 :])))


def compare_turns(turns: Mapping[int, Sequence[Sequence[float]]]) -> tuple[ThreadTime, ...]:
    """{threads: a turn a round, of ms} → a row a count.

    Counts are held against each other within a round only: from round to round the machine may change.
    """
    medians = {threads: [statistics.median(turn) for turn in rounds] for threads, rounds in turns.items()}
    yardstick = [statistics.geometric_mean(row) for row in zip(*medians.values(), strict=True)]
    scores = {
        threads: statistics.median(ms / unit for ms, unit in zip(row, yardstick, strict=True))
        for threads, row in medians.items()
    }
    fastest = medians[min(scores, key=scores.__getitem__)]
    return tuple(
        ThreadTime(
            threads,
            statistics.median(ms for turn in turns[threads] for ms in turn),
            statistics.median(ms / best for ms, best in zip(row, fastest, strict=True)),
        )
        for threads, row in sorted(medians.items())
    )


def choose(rows: Sequence[ThreadTime]) -> int:
    """The smallest count that is within 2 % of the fastest."""
    best = min(row.ratio for row in rows)
    return min(row.threads for row in rows if row.ratio <= WITHIN * best)
