"""One block of a comparison: a fresh process of the baseline and one of the candidate, which take turns.

    start both (random order) ─ warm both up (random order) ─ slices ABBA ABBA ... or BAAB BAAB ... ─► ln(B / A)

What differs between two processes besides their code (memory layout, caches, the machine's mood) is drawn anew with
each block, and the other arm's next slice is never further than some ten milliseconds away. A block is never
rejected for its latency, only for what the device says about itself: held back, getting warmer, another frequency.
"""

from __future__ import annotations

import math
import random
import statistics
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any, Literal, Protocol

from edgekit import verdict
from edgekit.latency import Clock

Arm = Literal["A", "B"]  # the baseline, the candidate
ARMS: tuple[Arm, Arm] = ("A", "B")
CLOCKS: tuple[Clock, Clock] = ("cpu", "wall")
ANSWER = ("preprocess", "forward", "postprocess")
# Of ABBA: sixteen slices an arm. Many short ones: a neighbour's burst of work, a tenth of a second long, then slows
# both arms, or few pairs of many. Standard deviation of a block's figure, one bundle twice on a busy machine, about the
# same time in all: 4 rounds of 50 ms slices 4.3 %, 8 of 20 ms 1.7 %, 16 of 10 ms 2.2 %; on a quiet machine 0.7 %.
ROUNDS = 8
MIN_ITERATIONS = 3  # a slice
WARM_UP_STEP = 5  # iterations
MAX_WARM_UP = 8  # times the least: on a busy machine medians may never agree, and every block warms up so long
MAX_REJECTED = 8  # blocks; then the device is too unsteady to say anything
FREQUENCY_APART = 0.02  # between the arms of a block
RISEN_C = 2.0  # within a block
SAME = (
    "machine",
    "cpu",
    "cpu_features",
    "opencv",
    "opencv_build",
    "backend",
    "engine",
    "threads",
    "python",
    "fallback",
)
"""Conditions that must be equal: a difference in one of them is no change of the bundle."""


@dataclass(frozen=True)
class Profile:
    """How blocks are measured."""

    name: Literal["ci", "device"]
    clock: Clock
    threads: int | None  # None: the manifest's
    pinned: bool
    warm_up_ms: float
    slice_ms: float


PROFILES = {
    # CPU time does not count what other jobs on the machine take; one thread is all that it is exact for
    "ci": Profile("ci", "cpu", threads=1, pinned=True, warm_up_ms=150.0, slice_ms=20.0),
    # what the user waits for; and boards need a second to settle on a frequency
    "device": Profile("device", "wall", threads=None, pinned=False, warm_up_ms=1000.0, slice_ms=50.0),
}


class Timed(Protocol):
    """What is asked of a worker (worker.Worker)."""

    ready: dict[str, Any]

    def time(self, iterations: int) -> dict[str, Any]:
        """Times so many iterations."""
        ...

    def close(self) -> None:
        """Ends it."""
        ...


Start = Callable[[Arm], Timed]


@dataclass(frozen=True)
class Plan:
    """What every block does alike, as the first one found it out."""

    warm_up: int  # iterations
    slice: int


@dataclass(frozen=True)
class Block:
    """One pair of processes. medians_ms: of every slice, in order, by gate and clock."""

    arms: tuple[Arm, ...]
    medians_ms: Mapping[tuple[str, Clock], tuple[float, ...]]
    conditions: tuple[dict[str, Any], dict[str, Any]]
    fault: str  # why it does not count; "" where it does

    def figure(self, gate: str, clock: Clock) -> float:
        """ln(candidate / baseline)."""
        return verdict.block_figure(self.arms, self.medians_ms[gate, clock])

    def of(self, arm: Arm, gate: str, clock: Clock) -> tuple[float, ...]:
        """The medians of one arm's slices."""
        return tuple(ms for name, ms in zip(self.arms, self.medians_ms[gate, clock], strict=True) if name == arm)


def run_block(
    start: Start, profile: Profile, gates: Sequence[str], plan: Plan | None, dice: random.Random
) -> tuple[Block, Plan]:
    """Measures one pair; the first one has no plan yet and makes it."""
    with ExitStack() as stack:
        workers: dict[Arm, Timed] = {}
        for arm in dice.sample(ARMS, 2):
            workers[arm] = start(arm)
            stack.callback(workers[arm].close)
        order = dice.sample(ARMS, 2)
        if plan is None:
            plan = make_plan([workers[arm] for arm in order], profile)
        else:
            for arm in order:
                workers[arm].time(plan.warm_up)
        first, second = dice.sample(ARMS, 2)
        arms = (first, second, second, first) * ROUNDS
        answers = [workers[arm].time(1 + plan.slice) for arm in arms]
        conditions = (workers["A"].ready["conditions"], workers["B"].ready["conditions"])
        before = [workers[arm].ready["environment"] for arm in ARMS]
    medians = {
        (gate, clock): tuple(statistics.median(times_ms(answer, gate, clock)[1:]) for answer in answers)
        for gate in gates
        for clock in CLOCKS
    }
    return Block(arms, medians, conditions, fault(before, arms, [answer["environment"] for answer in answers])), plan


def make_plan(workers: Sequence[Timed], profile: Profile) -> Plan:
    """Warms both up until each is warm, and both by the same count. → how all blocks are to be."""
    counts, last_ms = [], 0.0
    for worker in workers:
        done: list[float] = []
        while not verdict.is_warm(done, profile.warm_up_ms) and sum(done) < MAX_WARM_UP * profile.warm_up_ms:
            done += _iteration_ms(worker.time(WARM_UP_STEP))
        counts.append(len(done))
        last_ms = max(last_ms, statistics.median(done[-WARM_UP_STEP:]))
    for worker, count in zip(workers, counts, strict=True):
        if count < max(counts):
            worker.time(max(counts) - count)
    return Plan(max(counts), max(MIN_ITERATIONS, math.ceil(profile.slice_ms / last_ms)))


def times_ms(answer: Mapping[str, Any], gate: str, clock: Clock) -> list[float]:
    """A worker's answer → the gate's time in every iteration."""
    stages = answer[f"{clock}_ns"]
    names = ANSWER if gate == "answer" else (gate,)
    return [sum(row) / 1e6 for row in zip(*(stages[name] for name in names), strict=True)]


def _iteration_ms(answer: Mapping[str, Any]) -> list[float]:
    """Wall time of all the stages."""
    return [sum(row) / 1e6 for row in zip(*answer["wall_ns"].values(), strict=True)]


def fault(before: Sequence[Mapping[str, Any]], arms: Sequence[Arm], after: Sequence[Mapping[str, Any]]) -> str:
    """Why a block does not count, by what the device said before it and after each slice; "" where it does."""
    held_back = {reason for row in (*before, *after) for reason in row["throttled"] or ()}
    events = [row["throttle_events"] for row in (*before, *after) if row["throttle_events"] is not None]
    if held_back or (events and max(events) > min(events)):
        return f"the device was held back ({', '.join(sorted(held_back)) or 'thermal throttling'})"
    mhz = {
        arm: [row["mhz"] for name, row in zip(arms, after, strict=True) if name == arm and row["mhz"]] for arm in ARMS
    }
    if mhz["A"] and mhz["B"]:
        base, candidate = statistics.fmean(mhz["A"]), statistics.fmean(mhz["B"])
        if abs(candidate - base) > FREQUENCY_APART * base:
            return f"the cores ran at {base:.0f} MHz for the baseline and {candidate:.0f} MHz for the candidate"
    degrees = [row["temperature_c"] for row in after if row["temperature_c"] is not None]
    if degrees and degrees[-1] - degrees[0] > RISEN_C:
        return f"the device was still getting warmer ({degrees[0]:.0f} to {degrees[-1]:.0f} °C)"
    return ""


def incomparable(base: Mapping[str, Any], candidate: Mapping[str, Any]) -> str:
    """Which conditions differ, in words; "" where a difference in latency is the bundles' own."""
    return "; ".join(
        f"{key}: {base.get(key)} against {candidate.get(key)}" for key in SAME if base.get(key) != candidate.get(key)
    )
