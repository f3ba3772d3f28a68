"""The gate, driven by workers that replay 24 recorded blocks: a bundle with itself, on a busy machine."""

import json
import math
import statistics
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import latencies
import pytest

from edgekit import blocks, latency, verdict
from edgekit.blocks import PROFILES, Arm, incomparable
from edgekit.compare import MAX_REJECTED, Evidence, Question, advise, conclude, confirm, gather
from edgekit.errors import UsageError
from edgekit.runner import STAGES

RECORDED = json.loads(Path(__file__).with_name("recorded_blocks.json").read_text(encoding="utf-8"))
CONDITIONS = {**dict.fromkeys(blocks.SAME, "same"), "fallback": ""}
CALM = {"throttled": None, "throttle_events": None, "mhz": None, "temperature_c": None}
SUBJECT = latencies.subject()
CI = Question(seed=1)


@dataclass
class Lab:
    """Starts workers that replay; remembers what was asked of them."""

    factor: Mapping[Arm, float] = field(default_factory=lambda: {"A": 1.0, "B": 1.0})
    stage: str = "forward"  # that has the factor
    conditions: Mapping[Arm, dict[str, Any]] = field(default_factory=lambda: {"A": CONDITIONS, "B": CONDITIONS})
    weather: Callable[[int, Arm, int], dict[str, Any]] = lambda block, arm, requests: CALM
    wall: float = 1.0  # wall time / CPU time
    started: list[Arm] = field(default_factory=list)
    closed: list[Arm] = field(default_factory=list)
    asked: list[tuple[int, Arm, int]] = field(default_factory=list)  # (block, arm, iterations)

    def start(self, arm: Arm) -> "Replay":
        self.started.append(arm)
        return Replay(self, arm, (len(self.started) - 1) // 2)

    def slices(self, block: int) -> list[tuple[Arm, int]]:
        return [(arm, count) for number, arm, count in self.asked if number == block]


class Replay:
    def __init__(self, lab: Lab, arm: Arm, block: int) -> None:
        self.ready = {"conditions": lab.conditions[arm], "environment": lab.weather(block, arm, 0)}
        self.lab, self.arm, self.block, self.requests = lab, arm, block, 0
        self.rows = iter(RECORDED[block % len(RECORDED)][arm])

    def time(self, iterations: int) -> dict[str, Any]:
        self.lab.asked.append((self.block, self.arm, iterations))
        self.requests += 1
        # a slice (3 iterations and one before that is thrown away) is what was recorded; anything else is warming up
        row = [10**12, *next(self.rows)] if iterations == 4 else [20_000_000] * iterations
        cpu = {stage: row if stage == "forward" else [1000] * iterations for stage in STAGES}
        cpu[self.lab.stage] = [round(ns * self.lab.factor[self.arm]) for ns in cpu[self.lab.stage]]
        wall = {stage: [round(ns * self.lab.wall) for ns in times] for stage, times in cpu.items()}
        return {"wall_ns": wall, "cpu_ns": cpu, "environment": self.lab.weather(self.block, self.arm, self.requests)}

    def close(self) -> None:
        self.lab.closed.append(self.arm)


def recorded_figure(block: int, arms: list[Arm], factor: float = 1.0) -> float:
    """A block's figure from the recorded numbers, by the words of its definition."""
    rows = {arm: iter(RECORDED[block][arm]) for arm in "AB"}
    medians = [statistics.median(next(rows[arm])) * (factor if arm == "B" else 1) + 2000 for arm in arms]
    ratios = []
    for place in range(0, len(arms), 2):
        pair = dict(zip(arms[place : place + 2], medians[place : place + 2], strict=True))
        ratios.append(math.log(pair["B"] / pair["A"]))
    return statistics.median(ratios)


def test_equal_bundles_pass_with_the_recorded_figures() -> None:
    lab = Lab()
    evidence = gather(lab.start, CI)
    found = conclude(evidence, CI, SUBJECT, SUBJECT)
    assert (found.verdict, found.blocks, found.rejected) == ("PASS", found.looks[-1], ())
    figures = [
        recorded_figure(block, [arm for arm, count in lab.slices(block) if count == 4]) for block in range(found.blocks)
    ]
    assert found.cases[0].log_ratios == pytest.approx(figures, abs=1e-5)
    assert found.cases[0].change == pytest.approx(math.expm1(statistics.fmean(figures)), abs=1e-5)
    assert found.cases[0].other_change == found.cases[0].change  # wall and CPU were recorded alike
    assert (found.cases[0].low, found.cases[0].high) == verdict.interval(found.cases[0].log_ratios)
    assert len(found.cases[0].base_ms) == len(found.cases[0].candidate_ms) == 16 * found.blocks


@pytest.mark.parametrize(("factor", "verdict_"), [(1.5, "FAIL"), (1.2, "FAIL"), (0.5, "PASS"), (1.05, "INCONCLUSIVE")])
def test_what_is_known_is_found(factor: float, verdict_: str) -> None:
    found = conclude(gather(Lab({"A": 1.0, "B": factor}).start, CI), CI, SUBJECT, SUBJECT)
    assert found.verdict == found.cases[0].verdict == verdict_


def test_a_block_is_two_fresh_processes_warmed_alike_that_take_turns() -> None:
    lab = Lab()
    blocks_ = gather(lab.start, CI).blocks
    assert len(lab.started) == len(lab.closed) == 2 * len(blocks_)
    for block in range(len(blocks_)):
        assert sorted(lab.started[2 * block : 2 * block + 2]) == ["A", "B"]
        warm = [(arm, count) for arm, count in lab.slices(block) if count != 4]
        slices = [arm for arm, count in lab.slices(block) if count == 4]
        # 20 ms an iteration: ten make 150 ms, and are the least
        assert sorted(warm) == ([("A", 5)] * 2 + [("B", 5)] * 2 if block == 0 else [("A", 10), ("B", 10)])
        assert lab.slices(block)[-32:] == [
            (arm, 4) for arm in slices
        ]  # 20 ms are one iteration; at least 3, and 1 more
        assert "".join(slices) in ("ABBA" * 8, "BAAB" * 8)


def test_all_orders_are_drawn_and_the_seed_repeats_them() -> None:
    def orders(seed: int) -> list[tuple[Arm, Arm, Arm]]:
        lab = Lab({"A": 1.0, "B": 1.05})
        count = len(gather(lab.start, replace(CI, seed=seed)).blocks)
        return [(lab.started[2 * b], lab.slices(b)[0][0], lab.slices(b)[-32][0]) for b in range(count)]

    drawn = [order for seed in range(12) for order in orders(seed)]
    assert len(set(drawn)) == 8  # who is started first, warmed first, measured first: independent
    for place in range(3):
        assert 0.35 < [order[place] for order in drawn].count("A") / len(drawn) < 0.65
    assert orders(7) == orders(7) != orders(8)


def test_the_slower_to_warm_decides_for_both() -> None:
    class Slow(Replay):
        def time(self, iterations: int) -> dict[str, Any]:
            answer = super().time(iterations)
            if self.arm == "B" and self.requests < 4:  # each five are faster than the last
                answer["wall_ns"]["forward"] = [10**8 // self.requests] * iterations
            return answer

    lab = Lab()
    worker: dict[Arm, Replay] = {arm: Slow(lab, arm, 0) for arm in ("A", "B")}
    plan = blocks.make_plan([worker["A"], worker["B"]], PROFILES["ci"])
    assert plan.warm_up == 25
    assert sum(count for _, arm, count in lab.asked if arm == "A") == 25
    assert sum(count for _, arm, count in lab.asked if arm == "B") == 25


def test_a_warm_up_that_never_settles_ends() -> None:
    class Restless(Replay):
        def time(self, iterations: int) -> dict[str, Any]:
            answer = super().time(iterations)
            answer["wall_ns"]["forward"] = [(20 + 10 * (self.requests % 2)) * 10**6] * iterations
            return answer

    lab = Lab()
    plan = blocks.make_plan([Restless(lab, "A", 0), Replay(lab, "B", 0)], PROFILES["ci"])
    assert plan.warm_up == 50  # 5 of 30 ms and 5 of 20 ms, again and again, are 1,200 ms after 50: eight times 150


PI_HOT = {**CALM, "throttled": ["under-voltage"]}


@pytest.mark.parametrize(
    ("weather", "reason"),
    [
        (lambda block, arm, n: PI_HOT if block == 2 and n == 5 else CALM, "held back (under-voltage)"),
        (
            lambda block, arm, n: {**CALM, "throttle_events": 7 + (block == 2 and n > 5)},
            "held back (thermal throttling)",
        ),
        (
            lambda block, arm, n: {**CALM, "mhz": 1560.0 if block == 2 and arm == "B" else 1500.0},
            "1500 MHz for the baseline and 1560 MHz for the candidate",
        ),
        (lambda block, arm, n: {**CALM, "temperature_c": 50 + (block == 2) * n / 5}, "getting warmer (50 to 53 °C)"),
    ],
)
def test_what_the_device_says_rejects_a_block(weather: Callable[[int, Arm, int], dict[str, Any]], reason: str) -> None:
    evidence = gather(Lab(weather=weather).start, CI)
    assert len(evidence.rejected) == 1
    assert reason in evidence.rejected[0]
    assert len(evidence.blocks) in (8, 12, 16, 24)
    assert conclude(evidence, CI, SUBJECT, SUBJECT).rejected == evidence.rejected


@pytest.mark.parametrize(
    "weather",
    [
        lambda block, arm, n: {**CALM, "throttled": [], "throttle_events": 7},
        lambda block, arm, n: {**CALM, "mhz": 1525.0 if arm == "B" else 1500.0},
        lambda block, arm, n: {**CALM, "temperature_c": 50 + 4 * block},  # from block to block, not within one
    ],
)
def test_what_does_not_matter_rejects_nothing(weather: Callable[[int, Arm, int], dict[str, Any]]) -> None:
    assert gather(Lab(weather=weather).start, CI).rejected == ()


def test_a_device_that_is_never_calm_gives_no_verdict() -> None:
    evidence = gather(Lab(weather=lambda block, arm, n: PI_HOT).start, CI)
    found = conclude(evidence, CI, SUBJECT, SUBJECT)
    assert (found.verdict, found.blocks, len(found.rejected)) == ("INCONCLUSIVE", 0, MAX_REJECTED)
    assert "8 blocks had to be rejected, the last because the device was held back (under-voltage)" in found.reason


def test_no_block_is_rejected_for_its_latency() -> None:
    slow = [{arm: [[9 * ns for ns in row] for row in rows] for arm, rows in RECORDED[0].items()}]
    assert statistics.median(slow[0]["A"][0]) > 0
    evidence = gather(Lab({"A": 1.0, "B": 9.0}).start, CI)
    assert (evidence.rejected, set(evidence.decided.values())) == ((), {"FAIL"})


@pytest.mark.parametrize("key", blocks.SAME)
def test_other_conditions_are_incomparable(key: str) -> None:
    lab = Lab({"A": 1.0, "B": 9.0}, conditions={"A": CONDITIONS, "B": {**CONDITIONS, key: "other"}})
    found = conclude(gather(lab.start, CI), CI, SUBJECT, SUBJECT)
    assert (found.verdict, found.cases[0].verdict) == ("INCOMPARABLE", "INCOMPARABLE")
    assert found.reason == f"measured under different conditions: {key}: {CONDITIONS[key]} against other"
    assert len(lab.started) == 2  # nothing more was measured


def test_precision_may_differ_since_it_is_the_bundles_own() -> None:
    assert incomparable({**CONDITIONS, "precision": "fp32"}, {**CONDITIONS, "precision": "int8"}) == ""


def test_the_time_allowed_is_kept_and_named() -> None:
    question, lab = replace(CI, max_seconds=20.0), Lab({"A": 1.0, "B": 1.05})
    evidence = gather(lab.start, question, clock=lambda: 1.5 * len(lab.started))  # three seconds a block
    found = conclude(evidence, question, SUBJECT, SUBJECT)
    assert (found.verdict, found.blocks, found.seconds) == ("INCONCLUSIVE", 6, 18.0)  # a seventh would end after 21
    assert "the 20 seconds allowed were over after 6 blocks" in found.reason


def test_gates_are_judged_together_and_named() -> None:
    question = replace(CI, gates=("answer", "forward", "preprocess"))
    found = conclude(gather(Lab({"A": 1.0, "B": 1.5}).start, question), question, SUBJECT, SUBJECT)
    assert found.verdict == "FAIL"
    assert found.reason.startswith("answer: +4")
    verdicts = {case.name: case.verdict for case in found.cases}
    assert verdicts == {"answer": "FAIL", "forward": "FAIL", "preprocess": "PASS"}
    assert found.looks == (8, 12)  # a third of 1/256 is more than eight blocks can show


def test_a_slow_stage_is_found_by_its_own_gate() -> None:
    question = replace(CI, gates=("decode",))
    slow_decode = Lab({"A": 1.0, "B": 1.5}, stage="decode")
    assert conclude(gather(slow_decode.start, question), question, SUBJECT, SUBJECT).verdict == "FAIL"
    slow_decode = Lab({"A": 1.0, "B": 1.5}, stage="decode")
    # reading the file is no part of the answer to an image
    assert conclude(gather(slow_decode.start, CI), CI, SUBJECT, SUBJECT).verdict == "PASS"


def test_the_profile_names_the_clock() -> None:
    question = replace(CI, profile=PROFILES["device"])
    found = conclude(gather(Lab(wall=3.0).start, question), question, SUBJECT, SUBJECT)
    assert (found.profile, found.clock) == ("device", "wall")
    cpu = conclude(gather(Lab(wall=3.0).start, CI), CI, SUBJECT, SUBJECT)
    assert found.cases[0].base_ms[0] == pytest.approx(3 * cpu.cases[0].base_ms[0], rel=1e-3)


def test_processes_are_ended_where_the_second_cannot_start() -> None:
    lab = Lab()

    def start(arm: Arm) -> Replay:
        if lab.started:
            raise RuntimeError("no memory")
        return lab.start(arm)

    with pytest.raises(RuntimeError):
        gather(start, CI)
    assert lab.closed == lab.started


def test_a_fail_is_confirmed_or_not() -> None:
    first = conclude(gather(Lab({"A": 1.0, "B": 1.5}).start, CI), CI, SUBJECT, SUBJECT)
    again = conclude(gather(Lab().start, CI), CI, SUBJECT, SUBJECT)
    assert (first.verdict, again.verdict) == ("FAIL", "PASS")
    both = confirm(first, first)
    assert (both.verdict, both.confirms, both.reason) == ("FAIL", first, first.reason)
    once = confirm(first, again)
    assert (once.verdict, once.confirms) == ("INCONCLUSIVE", first)
    assert once.reason == f"it failed once ({first.reason}), and the repetition did not: {again.reason}"


def test_a_changed_graph_is_named_where_the_clock_does_not_tell() -> None:
    changes = ("multiply-adds 10 M → 11 M (+10.0 %)",)
    undecided = gather(Lab({"A": 1.0, "B": 1.05}).start, CI)
    found = conclude(undecided, CI, SUBJECT, SUBJECT, changes)
    assert found.workload == changes
    assert found.warnings == ("the clock does not tell, but the graph does other work: see workload",)
    assert conclude(undecided, CI, SUBJECT, SUBJECT).warnings == ()
    assert conclude(gather(Lab().start, CI), CI, SUBJECT, SUBJECT, changes).warnings == ()


def test_running_elsewhere_than_the_bundle_is_for_is_named() -> None:
    elsewhere = {**CONDITIONS, "fallback": "this bundle is for rpi5"}
    lab = Lab(conditions={"A": elsewhere, "B": elsewhere})
    found = conclude(gather(lab.start, CI), CI, SUBJECT, SUBJECT)
    ours = [warning for warning in found.warnings if "rpi5" in warning]
    assert ours == ["it did not run where the bundle is to run: this bundle is for rpi5"]


def measured(factor: float, conditions: dict[str, Any]) -> latency.LatencyRun:
    samples = dict.fromkeys((*STAGES, "end_to_end"), (1.0 * factor, 2.0 * factor, 9.0 * factor))
    return latencies.run(samples_ms=samples, conditions=conditions)


def test_a_stored_measurement_is_advice_only() -> None:
    found = advise(measured(1.0, CONDITIONS), measured(3.0, {**CONDITIONS, "cpu": "other"}), 0.05)
    assert found.verdict == "ADVISORY"
    assert found.reason.startswith("end to end +200.0 %. A stored measurement cannot fail a build")
    assert [case.name for case in found.cases] == ["end_to_end", *STAGES]
    assert found.cases[0].change == pytest.approx(2.0)
    assert found.cases[0].reason == "median 2.00 ms, now 6.00 ms"
    assert found.warnings == ("measured under different conditions: cpu: same against other",)


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"limit": 0.0}, "the limit is 0 %"),
        ({"limit": -0.05}, "the limit is -5 %"),
        ({"limit": 10.0}, "the limit is 1000 %"),
        ({"gates": ()}, "found none"),
        ({"gates": ("answer", "sleep")}, "found answer, sleep"),
        ({"gates": ("answer", "answer")}, "found answer, answer"),
    ],
)
def test_questions_that_make_no_sense(settings: dict[str, Any], says: str) -> None:
    with pytest.raises(UsageError, match=says):
        Question(**settings)


def test_evidence_of_nothing() -> None:
    nothing = Evidence((), (), (), {}, "", "the 1 seconds allowed were over after 0 blocks", 1.0)
    found = conclude(nothing, CI, SUBJECT, SUBJECT)
    assert (found.verdict, found.reason) == ("INCONCLUSIVE", "the 1 seconds allowed were over after 0 blocks")
    assert found.cases[0] == latency.Case(
        name="answer",
        verdict="INCONCLUSIVE",
        reason=found.reason,
        change=None,
        low=None,
        high=None,
        p_slower=None,
        p_faster=None,
        log_ratios=(),
        other_change=None,
        base_ms=(),
        candidate_ms=(),
    )
