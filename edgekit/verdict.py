"""The statistics of the latency gate: when are two bundles' times different enough to fail a build?

A block is a pair of fresh processes, baseline and candidate, that took turns; its figure is ln(candidate / baseline).
The test is exact: were the true change at the limit, each block's distance from it would be as likely below as above,
so all ways of flipping the distances' signs are equally likely (Fisher's randomisation test for paired data; Pitman
1937, "Significance tests which may be applied to samples from any populations"). It knows no normal distribution, and
noise that hits both arms or single blocks makes it undecided instead of wrong.

Looking four times and stopping early spends the error of 1 % in four parts (Bonferroni), on each side.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from typing import Literal

import numpy as np

LOOKS = ((8, 1 / 256), (12, 0.002), (16, 0.002), (24, 0.002))
"""(blocks, error allowed at this look, each side): 0.99 % in all. With 8 blocks 1/256 is all on one side."""
HOPELESS = 0.15
"""From the second look on: where neither side is nearer to a proof than this, the change lies at the limit, and the
blocks that are left would not decide it. (To go on as until now would reach 0.002 in fewer than one case in fifty.)
Stopping undecided raises no error."""
CONFIDENCE = 0.99

Decision = Literal["PASS", "FAIL", "HOPELESS"]


def sign_flip_p(distances: Sequence[float]) -> float:
    """P(sum of the distances with random signs ≥ their sum), exact, over all 2^n ways; 1.0 for none.

    The ways are counted by meeting in the middle (Horowitz and Sahni 1974): sums of either half, sorted.
    """
    values = np.asarray(distances, np.float64)
    slack = 1e-12 * float(np.abs(values).sum())  # sums that are equal on paper count as equal
    half = len(values) // 2
    left, right = _signed_sums(values[:half]), np.sort(_signed_sums(values[half:]))
    reaching = len(right) - np.searchsorted(right, values.sum() - slack - left, side="left")
    return float(reaching.sum() / (len(left) * len(right)))


def _signed_sums(values: np.ndarray) -> np.ndarray:
    sums = np.zeros(1)
    for value in values:
        sums = np.concatenate([sums - value, sums + value])
    return sums


def judge(log_ratios: Sequence[float], limit: float, cases: int = 1) -> Decision | None:
    """The decision after these blocks, or None: go on. Meant for as many blocks as one of LOOKS has.

    limit: 0.05 is 5 % slower. cases: how many figures are gated together; they share the error allowed.
    FAIL: at least 99 % sure that it is slower by more than the limit. PASS: as sure that it is not.
    """
    place = [blocks for blocks, _ in LOOKS].index(len(log_ratios))
    allowed = LOOKS[place][1] / cases
    p_slower, p_faster = p_values(log_ratios, limit)
    if p_slower <= allowed:
        return "FAIL"
    if p_faster <= allowed:
        return "PASS"
    is_last = place == len(LOOKS) - 1
    return "HOPELESS" if is_last or (place > 0 and min(p_slower, p_faster) > HOPELESS) else None


def p_values(log_ratios: Sequence[float], limit: float) -> tuple[float, float]:
    """(p_slower, p_faster): how often chance makes blocks look this far above the limit, or this far below, or more."""
    distances = [ratio - math.log1p(limit) for ratio in log_ratios]
    return sign_flip_p(distances), sign_flip_p([-distance for distance in distances])


def interval(log_ratios: Sequence[float], confidence: float = CONFIDENCE) -> tuple[float, float] | None:
    """The changes that the same test does not rule out, as (low, high), 0.1 for 10 % slower; None below 8 blocks.

    By bisection: p_slower falls as the limit rises.
    """
    tail = (1 - confidence) / 2
    if 2.0 ** -len(log_ratios) > tail:
        return None
    outside = (min(log_ratios) - 1e-9, max(log_ratios) + 1e-9)

    def end(sign: int) -> float:
        inside = statistics.fmean(log_ratios)
        beyond = outside[0] if sign > 0 else outside[1]
        for _ in range(40):
            middle = (inside + beyond) / 2
            p = sign_flip_p([sign * (ratio - middle) for ratio in log_ratios])
            inside, beyond = (inside, middle) if p <= tail else (middle, beyond)
        return math.expm1(beyond)

    return end(1), end(-1)


def block_figure(arms: Sequence[str], medians: Sequence[float]) -> float:
    """The slices of one block, in order, each of arm "A" (baseline) or "B" → median over neighbours of ln(B / A)."""
    neighbours = list(zip(arms, medians, strict=True))
    pairs = [dict(neighbours[place : place + 2]) for place in range(0, len(neighbours), 2)]
    return statistics.median(math.log(pair["B"] / pair["A"]) for pair in pairs)


def is_warm(times_ms: Sequence[float], min_ms: float) -> bool:
    """Have these iterations warmed a process up? At least 10 and min_ms, and the last two fives agree within 2 %."""
    if len(times_ms) < 10 or sum(times_ms) < min_ms:
        return False
    last, before = statistics.median(times_ms[-5:]), statistics.median(times_ms[-10:-5])
    return abs(last - before) <= 0.02 * before
