"""Where the level of a series of latencies changes, and by how much.

Circular binary segmentation (Olshen, Venkatraman, Lucito and Wigler 2004, "Circular binary segmentation for the
analysis of array-based DNA copy number data", Biostatistics 5(4), 557-572): find the stretch whose own mean explains
most of the squares, ask how often noise alone would give one that explains as much, and do the same with the parts.
Asking for a stretch and not only for one split finds a change that was taken back later, which plain binary
segmentation misses. The series is one of logarithms, so that a step is a share and not milliseconds.

Why not a library: ruptures (1.1.10, BSD; wheels for Python 3.10 to 3.13) brings scipy, 120 MB in all, and its searches
want a penalty or a number of steps that someone has to guess; none of them says how sure a step is. E-divisive
(Matteson and James 2014, JASA 109(505), 334-345), which MongoDB marks its benchmarks with (Daly et al. 2020, ICPE,
67-75), asks by shuffling, and three points against three can be shuffled in 20 ways only: it can say nothing there.

A drift is not noise, and is marked as steps: neither this nor any of those can tell the two apart.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

MIN_POINTS = 3  # on either side of a step
MIN_CHANGE = 0.02  # a smaller step is none
ALPHA_ONE, ALPHA_TWO = 0.0075, 0.0025  # of a step that stays, and of one that is taken back: 1 % in all
STRAY = 4.0  # deviations of the noise
ENOUGH_TO_SHUFFLE = 24  # points: from there on the series' own values are the noise, whatever their distribution
DRAWS, BATCH = 4000, 500


@dataclass(frozen=True)
class ChangePoint:
    """A step of a series."""

    place: int  # of the first point after it, from 0
    change: float  # of the medians: 0.1 is 10 % slower than before


def change_points(values: Sequence[float]) -> tuple[ChangePoint, ...]:
    """Values above 0, in order → the steps, in order. The same values always give the same steps.

    A step of less than MIN_CHANGE is left out. Where there is only noise, at most 1 series in 100 has a step (6 to 100
    points of normal noise or of Student's t with 3 degrees of freedom; 3 in 100 at 20 points of exponential noise). Of
    steps of 5 % in noise of 2 %, 90 % are found after 10 points on either side, 43 % after 5; of 20 %, all after 3.
    """
    logs = np.log(np.asarray(values, np.float64))
    places = _worth_telling(logs, _splits(_without_strays(logs)))
    levels = _levels(logs, places)
    steps = zip(places, pairwise(levels), strict=True)
    return tuple(ChangePoint(place, math.expm1(after - before)) for place, (before, after) in steps)


def _without_strays(logs: np.ndarray) -> np.ndarray:
    """Pulls what is far from its four neighbours to STRAY deviations from their median: one such measurement would
    outweigh all the steps. What holds for MIN_POINTS or more is the median there, and stays.
    """
    if len(logs) < 2 * MIN_POINTS:
        return logs
    near = np.array([np.median(logs[max(0, place - 2) : place + 3]) for place in range(len(logs))])
    differences = np.abs(np.diff(logs))
    deviation = 1.4826 * float(np.median(differences)) / math.sqrt(2)  # of normal noise, whatever the steps are
    return np.asarray(np.clip(logs, near - STRAY * deviation, near + STRAY * deviation))


def _splits(values: np.ndarray, first: int = 0) -> list[int]:
    """Places of the steps in float (N,), sorted; `first` is added to each."""
    if len(values) < 2 * MIN_POINTS:
        return []
    for is_stretch, alpha in ((False, ALPHA_ONE), (True, ALPHA_TWO)):
        (score,), ((start, stop),) = _best_stretch(values[None], is_stretch)
        if _is_beyond_noise(values, float(score), is_stretch, alpha):
            break
    else:
        return []
    ends = [int(end) for end in (start, stop) if 0 < end < len(values)]
    parts = pairwise((0, *ends, len(values)))
    inner = [place for begin, end in parts for place in _splits(values[begin:end], first + begin)]
    return sorted([*(first + end for end in ends), *inner])


def _best_stretch(rows: np.ndarray, is_stretch: bool) -> tuple[np.ndarray, np.ndarray]:
    """float (R, N) → (share of each row's squares that the best stretch explains, (R,); its [start, stop), (R, 2)).

    A stretch, and what lies before and after it, have MIN_POINTS values or more, or none. is_stretch: it may start
    anywhere; else it starts at the beginning, and there is one step.
    """
    count = rows.shape[1]
    centred = rows - rows.mean(axis=1, keepdims=True)
    sums = np.concatenate([np.zeros((len(rows), 1)), np.cumsum(centred, axis=1)], axis=1)
    best, places = np.zeros(len(rows)), np.zeros((len(rows), 2), np.int64)
    for length in range(MIN_POINTS, count - MIN_POINTS + 1):
        starts = np.arange(count - length + 1) if is_stretch else np.zeros(1, np.int64)
        rest = count - length - starts
        starts = starts[((starts == 0) | (starts >= MIN_POINTS)) & ((rest == 0) | (rest >= MIN_POINTS))]
        gains = (sums[:, starts + length] - sums[:, starts]) ** 2 * (count / (length * (count - length)))
        chosen = gains.argmax(axis=1)
        gain, start = gains[np.arange(len(rows)), chosen], starts[chosen]
        is_better = gain > best
        best = np.where(is_better, gain, best)
        places = np.where(is_better[:, None], np.stack([start, start + length], axis=1), places)
    total = (centred**2).sum(axis=1)
    return np.divide(best, total, out=np.zeros(len(rows)), where=total > 1e-20), places


def _is_beyond_noise(values: np.ndarray, score: float, is_stretch: bool, alpha: float) -> bool:
    """Does noise alone reach the score in a share of at most `alpha` of the draws? Ends early where it is clear."""
    reached = 0
    for noise in _noise(values):
        scores, _ = _best_stretch(noise, is_stretch)
        reached += int(np.count_nonzero(scores >= score - 1e-12))
        if 1 + reached > alpha * (1 + DRAWS):  # the series itself counts as a draw, so that no share is 0
            return False
    return True


def _noise(values: np.ndarray) -> Iterator[np.ndarray]:
    """Series of the same length without a step, BATCH rows at a time, DRAWS in all; by a fixed seed."""
    random = np.random.default_rng(len(values))
    for _ in range(DRAWS // BATCH):
        if len(values) >= ENOUGH_TO_SHUFFLE:
            yield random.permuted(np.tile(values, (BATCH, 1)), axis=1)
        else:  # too few for shuffles to differ: normal noise (its scale cancels out in the share of the squares)
            yield random.standard_normal((BATCH, len(values)))


def _levels(logs: np.ndarray, places: Sequence[int]) -> list[float]:
    """The median of each part: a mean would let one stray measurement of three make a step."""
    return (
        [float(np.median(logs[begin:end])) for begin, end in pairwise((0, *places, len(logs)))] if len(logs) else [0.0]
    )


def _worth_telling(logs: np.ndarray, places: Sequence[int]) -> list[int]:
    """Without the steps below MIN_CHANGE: the smallest is taken away first, since that changes its neighbours."""
    kept = list(places)
    while kept:
        sizes = [abs(math.expm1(after - before)) for before, after in pairwise(_levels(logs, kept))]
        smallest = min(range(len(sizes)), key=sizes.__getitem__)
        if sizes[smallest] >= MIN_CHANGE:
            break
        del kept[smallest]
    return kept
