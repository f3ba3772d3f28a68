"""Change points: silent on noise, found where there is a step, of the right size."""

import math
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edgekit.change_points import ChangePoint, _best_stretch, change_points

NOISE = 0.02  # of a measurement's p50


def series(seed: int, *levels: tuple[int, float], noise: str = "normal") -> np.ndarray:
    """(points, level) of each part → values with 2 % noise."""
    random = np.random.default_rng(seed)
    logs = np.concatenate([np.full(points, math.log(level)) for points, level in levels])
    if noise == "normal":
        return np.exp(logs + random.normal(0, NOISE, len(logs)))
    return np.exp(logs + NOISE / math.sqrt(3) * random.standard_t(3, len(logs)))


@pytest.mark.parametrize(
    ("points", "noise"), [(6, "normal"), (12, "normal"), (20, "normal"), (30, "normal"), (20, "heavy"), (30, "heavy")]
)
def test_false_alarms_in_500_series_of_noise(points: int, noise: str) -> None:
    """About 1 % at most, also where the noise has heavy tails (Student's t with 3 degrees of freedom).

    (2, 4, 5, 1, 3 and 2 of 500 with numpy 2.4.)
    """
    assert sum(bool(change_points(series(seed, (points, 10.0), noise=noise))) for seed in range(500)) <= 8


@pytest.mark.parametrize(
    ("before", "after", "step", "found"),
    [(10, 10, 0.05, 0.90), (10, 10, -0.05, 0.94), (10, 10, 0.10, 1.00), (3, 3, 0.20, 0.99), (10, 3, 0.08, 0.85)],
)
def test_how_often_a_step_is_found(before: int, after: int, step: float, found: float) -> None:
    hits, sizes = 0, []
    for seed in range(10_000, 10_200):
        steps = change_points(series(seed, (before, 10.0), (after, 10.0 * (1 + step))))
        hits += bool(steps)
        sizes += [item.change for item in steps if abs(item.place - before) <= 2]
    assert hits / 200 == pytest.approx(found, abs=0.04)
    assert len(sizes) >= 0.95 * hits and float(np.mean(sizes)) == pytest.approx(step, abs=0.012)


def test_a_step_that_was_taken_back_is_two_steps() -> None:
    found = [change_points(series(seed, (20, 10.0), (10, 10.5), (20, 10.0))) for seed in range(50)]
    right = [s for s in found if len(s) == 2 and abs(s[0].place - 20) <= 2 and abs(s[1].place - 30) <= 2]
    assert len(right) >= 40 and all(s[0].change > 0 > s[1].change for s in right)


def test_steps_without_noise_are_exact() -> None:
    values = [4.0] * 5 + [5.0] * 3 + [4.5] * 6
    first, second = change_points(values)
    assert (first.place, second.place) == (5, 8)
    assert first.change == pytest.approx(0.25) and second.change == pytest.approx(-0.1)


@pytest.mark.parametrize(
    "values",
    [
        [],
        [1.0],
        [1.0] * 50,
        [1.0, 1.0, 2.0, 2.0, 2.0],  # two points before it
        [1.0] * 3 + [1.019] * 3,  # too small a step
        [1.0] * 20 + [50.0] + [1.0] * 20,  # one stray measurement
        [1.0] * 20 + [50.0, 50.0] + [1.0] * 20,
        [1.0] * 10 + [9.0],
    ],
)
def test_no_step(values: list[float]) -> None:
    assert change_points(values) == ()


def test_a_step_of_two_percent_is_told() -> None:
    (step,) = change_points([1.0] * 3 + [1.0201] * 3)
    assert step == ChangePoint(3, pytest.approx(0.0201))


def test_one_stray_measurement_does_not_hide_a_step() -> None:
    hits = 0
    for seed in range(50):
        values = series(seed, (20, 10.0), (20, 10.5))
        values[seed % 40] *= 1.8
        hits += any(abs(step.place - 20) <= 2 for step in change_points(values))
    assert hits >= 45


def test_neighbouring_steps_are_told_apart() -> None:
    steps = change_points(series(1, (12, 10.0), (12, 11.0), (12, 12.5), (12, 9.0)))
    assert [step.place for step in steps] == [12, 24, 36]


@settings(max_examples=60, deadline=None)
@given(st.lists(st.floats(0.01, 1e4), max_size=30), st.floats(0.1, 10))
def test_steps_have_three_points_and_two_percent_and_no_unit(values: list[float], unit: float) -> None:
    steps = change_points(values)
    places = [0, *(step.place for step in steps), len(values)]
    assert all(after - before >= 3 for before, after in pairwise(places) if steps)
    assert all(abs(step.change) >= 0.02 for step in steps)
    assert steps == change_points(values)
    scaled = change_points([unit * value for value in values])
    assert [step.place for step in scaled] == [step.place for step in steps]


def test_the_best_stretch_is_the_one_of_all_that_explains_most() -> None:
    values = np.random.default_rng(7).normal(size=14)
    squares = ((values - values.mean()) ** 2).sum()
    shares = {}
    for start in range(14):
        for stop in range(start + 3, 15):
            parts = (start, stop - start, 14 - stop)
            if parts[1] == 14 or any(0 < part < 3 for part in parts):
                continue
            inside, outside = values[start:stop], np.delete(values, range(start, stop))
            if len(outside) >= 3:
                rest = ((inside - inside.mean()) ** 2).sum() + ((outside - outside.mean()) ** 2).sum()
                shares[start, stop] = 1 - rest / squares
    (score,), ((start, stop),) = _best_stretch(values[None], True)
    assert score == pytest.approx(max(shares.values())) == pytest.approx(shares[start, stop])
    (score,), ((start, stop),) = _best_stretch(values[None], False)
    one = {key: share for key, share in shares.items() if key[0] == 0}
    assert start == 0 and score == pytest.approx(max(one.values())) == pytest.approx(one[start, stop])
