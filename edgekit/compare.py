"""compare: did the candidate get slower than the baseline? A verdict that a build can depend on.

    blocks (blocks.py): fresh pairs of processes that take turns ─► ln(candidate / baseline)
    after 8, 12, 16 and 24 of them (verdict.py): PASS and FAIL at 99 % ─► else more, at last INCONCLUSIVE

Both bundles run here, now, side by side: a figure from another machine or another hour cannot tell 5 %.
"""

from __future__ import annotations

import math
import random
import secrets
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from edgekit import runner, verdict
from edgekit.blocks import ARMS, PROFILES, Arm, Block, Plan, Profile, Start, incomparable, run_block
from edgekit.device import Device, Placed, command, here, place
from edgekit.errors import ArtifactError, UsageError
from edgekit.latency import GATES, Case, Clock, Comparison, LatencyRun, Subject, Verdict, share_text, subject_of
from edgekit.worker import Worker
from edgekit.workload import changes, read_workload

MAX_REJECTED = 8  # blocks; a device that is so unsteady gives no answer
Progress = Callable[[str, int, int], None]  # (what is done, done, total)


@dataclass(frozen=True)
class Question:
    """What is asked of the blocks. Raises UsageError for a limit or gates that make no sense."""

    limit: float = 0.05  # slower by more than this fails
    gates: tuple[str, ...] = ("answer",)
    profile: Profile = PROFILES["ci"]
    max_seconds: float = math.inf
    seed: int = field(default_factory=lambda: secrets.randbelow(2**32))

    def __post_init__(self) -> None:
        if not 0 < self.limit < 10:
            raise UsageError(f"the limit is {100 * self.limit:g} %: give one above 0 and below 1000 %")
        unknown = sorted(set(self.gates) - set(GATES))
        if unknown or not self.gates or len(set(self.gates)) < len(self.gates):
            raise UsageError(
                f"gates are {', '.join(GATES)}, each at most once; found {', '.join(self.gates) or 'none'}"
            )


@dataclass(frozen=True)
class Evidence:
    """What was measured, and what it decided."""

    blocks: tuple[Block, ...]
    rejected: tuple[str, ...]
    looks: tuple[int, ...]
    decided: Mapping[str, verdict.Decision]  # gate → decision
    differs: str  # conditions in which the two are not alike
    stopped: str  # why no more was measured, where something is not decided
    seconds: float


def compare(
    base: Path,
    candidate: Path,
    question: Question,
    *,
    device: Device | None = None,
    allow_fallback: bool = False,
    progress: Progress = lambda what, done, total: None,
) -> Comparison:
    """Compares two bundle folders on a device (None: this machine), on the baseline's check images.

    A network on a GPU is judged by wall time, whatever the profile: the CPU only waits for it.
    Raises ArtifactError, RunnerError or SetupError where one of them cannot run there.
    """
    device = device or here()
    manifests = [runner.read_manifest(bundle) for bundle in (base, candidate)]
    if any(manifest["backend"].startswith("cuda") for manifest in manifests):
        question = replace(question, profile=replace(question.profile, clock="wall"))
    profile = question.profile
    placed: dict[Arm, Placed] = {arm: place(device, path) for arm, path in zip(ARMS, (base, candidate), strict=True)}
    options = ["--images", placed["A"].folder]
    options += [] if profile.threads is None else ["--threads", str(profile.threads)]
    options += ["--pin"] if profile.pinned else []
    options += [] if "decode" in question.gates else ["--decoded"]  # it can take longer than all the rest
    options += ["--allow-fallback"] if allow_fallback else []

    def start(arm: Arm) -> Worker:
        try:
            return Worker(command(placed[arm], "worker", *options))
        except ArtifactError as error:
            raise ArtifactError(f"the {'baseline' if arm == 'A' else 'candidate'}: {error}") from None

    evidence = gather(start, question, progress=progress)
    changed = changes(read_workload(base / "model.onnx"), read_workload(candidate / "model.onnx"))
    subjects = [subject_of(manifest, device.name) for manifest in manifests]
    return conclude(evidence, question, subjects[0], subjects[1], changed)


def gather(
    start: Start,
    question: Question,
    *,
    dice: random.Random | None = None,
    progress: Progress = lambda what, done, total: None,
    clock: Callable[[], float] = time.monotonic,
) -> Evidence:
    """Measures block after block until every gate is decided, one fails, or there is no use in going on.

    start: gives a fresh worker of the baseline ("A") or the candidate ("B"). dice: draws the orders; default: by the
    question's seed. clock: in seconds.
    """
    began = clock()
    dice = dice or random.Random(question.seed)
    looks = [blocks for blocks, _ in verdict.LOOKS]
    counted: list[Block] = []
    rejected: list[str] = []
    looked: list[int] = []
    decided: dict[str, verdict.Decision] = {}
    plan: Plan | None = None
    differs = stopped = ""
    longest = 0.0  # seconds, of a block
    while not (differs or stopped or _is_decided(decided, question.gates)):
        progress("blocks", len(counted), next(look for look in looks if look > len(counted)))
        at = clock()
        block, plan = run_block(start, question.profile, question.gates, plan, dice)
        longest = max(longest, clock() - at)
        differs = incomparable(*block.conditions)
        if block.fault:
            rejected.append(block.fault)
        else:
            counted.append(block)
            if len(counted) in looks:
                looked.append(len(counted))
                decided |= _look(counted, question, decided)
        if len(rejected) == MAX_REJECTED:
            stopped = f"{MAX_REJECTED} blocks had to be rejected, the last because {block.fault}"
        elif clock() - began + longest > question.max_seconds:
            stopped = f"the {question.max_seconds:g} seconds allowed were over after {len(counted)} blocks"
    return Evidence(tuple(counted), tuple(rejected), tuple(looked), decided, differs, stopped, clock() - began)


def _is_decided(decided: Mapping[str, verdict.Decision], gates: Sequence[str]) -> bool:
    return "FAIL" in decided.values() or set(decided) == set(gates)


def _look(
    blocks: Sequence[Block], question: Question, decided: Mapping[str, verdict.Decision]
) -> dict[str, verdict.Decision]:
    """What these blocks decide of the gates that are open still."""
    clock, found = question.profile.clock, {}
    for gate in question.gates:
        figures = [block.figure(gate, clock) for block in blocks]
        decision = verdict.judge(figures, question.limit, len(question.gates))
        if gate not in decided and decision:
            found[gate] = decision
    return found


# ---------------------------------------------------------------------------------------------------------------
# From evidence to a verdict


def conclude(
    evidence: Evidence, question: Question, base: Subject, candidate: Subject, workload: tuple[str, ...] = ()
) -> Comparison:
    """The record of it. workload: what changed in the graph itself."""
    cases = tuple(_case(gate, evidence, question) for gate in question.gates)
    verdict_, reason = _overall(cases)
    first = evidence.blocks[0].conditions if evidence.blocks else ({}, {})
    return Comparison(
        verdict=verdict_,
        reason=reason,
        base=base,
        candidate=candidate,
        fail_if=question.limit,
        profile=question.profile.name,
        clock=question.profile.clock,
        cases=cases,
        blocks=len(evidence.blocks),
        rejected=evidence.rejected,
        looks=evidence.looks,
        seed=question.seed,
        seconds=evidence.seconds,
        conditions=first,
        workload=workload,
        warnings=_warnings(first, workload, verdict_),
        confirms=None,
    )


def _case(gate: str, evidence: Evidence, question: Question) -> Case:
    clock = question.profile.clock
    other: Clock = "wall" if clock == "cpu" else "cpu"
    figures = [block.figure(gate, clock) for block in evidence.blocks]
    others = [block.figure(gate, other) for block in evidence.blocks]
    ends = verdict.interval(figures)
    p_slower, p_faster = verdict.p_values(figures, question.limit) if figures else (None, None)
    verdict_ = _verdict(evidence, gate)
    return Case(
        name=gate,
        verdict=verdict_,
        reason=_reason(verdict_, figures, ends, question.limit, evidence),
        change=math.expm1(statistics.fmean(figures)) if figures else None,
        low=ends[0] if ends else None,
        high=ends[1] if ends else None,
        p_slower=p_slower,
        p_faster=p_faster,
        log_ratios=tuple(figures),
        other_change=math.expm1(statistics.fmean(others)) if others else None,
        base_ms=tuple(ms for block in evidence.blocks for ms in block.of("A", gate, clock)),
        candidate_ms=tuple(ms for block in evidence.blocks for ms in block.of("B", gate, clock)),
    )


def _verdict(evidence: Evidence, gate: str) -> Verdict:
    if evidence.differs:
        return "INCOMPARABLE"
    decision = evidence.decided.get(gate, "HOPELESS")
    return "INCONCLUSIVE" if decision == "HOPELESS" else decision


def _reason(
    verdict_: Verdict, figures: Sequence[float], ends: tuple[float, float] | None, limit: float, evidence: Evidence
) -> str:
    if evidence.differs:
        return f"measured under different conditions: {evidence.differs}"
    if not figures:
        return evidence.stopped
    change = share_text(math.expm1(statistics.fmean(figures)))
    change += f" (99 %: {share_text(ends[0])} to {share_text(ends[1])})" if ends else ""
    allowed = f"{100 * limit:g} %"
    if verdict_ == "PASS":
        return f"{change}, which is not slower by more than {allowed}"
    if verdict_ == "FAIL":
        return f"{change}, which is slower by more than {allowed}"
    spread = f", which vary by {100 * statistics.stdev(figures):.1f} %," if len(figures) > 1 else ""
    return f"{change}: " + (evidence.stopped or f"{len(figures)} blocks{spread} do not tell it from {allowed}")


def _overall(cases: Sequence[Case]) -> tuple[Verdict, str]:
    """The verdict of the worst case, and its reason."""
    order: tuple[Verdict, ...] = ("INCOMPARABLE", "FAIL", "INCONCLUSIVE", "PASS")
    worst = min(cases, key=lambda case: order.index(case.verdict))
    return worst.verdict, worst.reason if len(cases) == 1 else f"{worst.name}: {worst.reason}"


def _warnings(
    conditions: Sequence[Mapping[str, object]], workload: tuple[str, ...], verdict_: Verdict
) -> tuple[str, ...]:
    """What the reader should know besides."""
    found = [
        f"it did not run where the bundle is to run: {row['fallback']}" for row in conditions if row.get("fallback")
    ]
    if workload and verdict_ == "INCONCLUSIVE":
        found.append("the clock does not tell, but the graph does other work: see workload")
    return tuple(dict.fromkeys(found))


def confirm(first: Comparison, second: Comparison) -> Comparison:
    """A FAIL and its repetition → what is to be believed: FAIL where both fail, INCONCLUSIVE where they disagree."""
    if second.verdict == "FAIL":
        return second.model_copy(update={"confirms": first})
    reason = f"it failed once ({first.reason}), and the repetition did not: {second.reason}"
    return second.model_copy(update={"verdict": "INCONCLUSIVE", "reason": reason, "confirms": first})


def advise(base: LatencyRun, candidate: LatencyRun, limit: float) -> Comparison:
    """Two measurements of different times, held against each other: never a verdict, and the reason says why."""
    differs = incomparable(base.conditions, candidate.conditions)
    cases = tuple(_advice(gate, base, candidate) for gate in ("end_to_end", *runner.STAGES) if gate in base.samples_ms)
    reason = (
        f"end to end {share_text(cases[0].change)}. A stored measurement cannot fail a build: the same file "
        "differs by more than this from hour to hour. Keep the baseline's bundle, and compare with that"
    )
    return Comparison(
        verdict="ADVISORY",
        reason=reason,
        base=base.subject,
        candidate=candidate.subject,
        fail_if=limit,
        profile="device",
        clock="wall",
        cases=cases,
        blocks=0,
        rejected=(),
        looks=(),
        seed=0,
        seconds=0.0,
        conditions=(base.conditions, candidate.conditions),
        workload=(),
        warnings=(f"measured under different conditions: {differs}",) if differs else (),
        confirms=None,
    )


def _advice(gate: str, base: LatencyRun, candidate: LatencyRun) -> Case:
    before, after = (statistics.median(run.samples_ms[gate]) for run in (base, candidate))
    return Case(
        name=gate,
        verdict="ADVISORY",
        reason=f"median {before:.2f} ms, now {after:.2f} ms",
        change=after / before - 1,
        low=None,
        high=None,
        p_slower=None,
        p_faster=None,
        log_ratios=(),
        other_change=None,
        base_ms=base.samples_ms[gate],
        candidate_ms=candidate.samples_ms[gate],
    )
