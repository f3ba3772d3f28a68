"""The gate's statistics, on numbers worked by hand."""

import itertools
import math
import random
import statistics

import pytest
from hypothesis import given
from hypothesis import strategies as st

from edgekit import verdict

finite = st.floats(-1, 1, allow_nan=False).map(lambda value: round(value, 4))


def test_p_counts_the_ways_of_flipping_signs() -> None:
    # sums of ±1 ±2 ±3: 6, 4, 2, 0, 0, -2, -4, -6; the sum here is 1 + 2 - 3 = 0
    assert verdict.sign_flip_p([1, 2, -3]) == 5 / 8
    assert verdict.sign_flip_p([1, 2, 3]) == 1 / 8
    assert verdict.sign_flip_p([-1, 2, 3]) == 2 / 8
    assert verdict.sign_flip_p([-1, -2, -3]) == 1
    assert verdict.sign_flip_p([0.5]) == 1 / 2
    assert verdict.sign_flip_p([]) == 1


def test_p_of_values_that_are_equal_on_paper_counts_them_as_equal() -> None:
    # all ± of eight equal values with k minus signs have the same sum, however it was added up: C(8, 0) + C(8, 1)
    values = [0.1] * 7 + [-0.1]
    assert verdict.sign_flip_p(values) == 9 / 256


@given(st.lists(finite, min_size=1, max_size=9))
def test_p_is_what_trying_all_signs_gives(values: list[float]) -> None:
    total = sum(values) - 1e-9
    ways = [
        sum(s * v for s, v in zip(signs, values, strict=True)) >= total
        for signs in itertools.product((-1, 1), repeat=len(values))
    ]
    assert verdict.sign_flip_p(values) == statistics.fmean(ways)


def test_p_of_24_blocks_is_exact() -> None:
    assert verdict.sign_flip_p([1.0] * 24) == 2.0**-24
    assert verdict.sign_flip_p([2.0**k for k in range(24)]) == 2.0**-24  # each way has another sum
    assert verdict.sign_flip_p([-1.0] + [2.0**k for k in range(1, 24)]) == 2 * 2.0**-24


def test_the_looks_spend_one_percent_a_side() -> None:
    assert sum(allowed for _, allowed in verdict.LOOKS) <= 0.01
    for blocks, allowed in verdict.LOOKS:
        assert 2.0**-blocks <= allowed  # else no data could decide it


SLOWER, FASTER = math.log(1.06), math.log(1.04)


@pytest.mark.parametrize(
    ("figures", "decision"),
    [
        ([SLOWER] * 8, "FAIL"),
        ([FASTER] * 8, "PASS"),
        ([0.0] * 8, "PASS"),
        ([SLOWER] * 7 + [FASTER], None),  # 1 of 8 on the other side: p = 9/256
        ([FASTER] * 7 + [SLOWER], None),
        ([SLOWER, FASTER] * 4, None),  # the first look never gives up
        ([SLOWER, FASTER] * 6, "HOPELESS"),
        ([SLOWER] * 9 + [FASTER] * 3, None),  # p about 0.07: worth four more
        ([SLOWER] * 12, "FAIL"),
        ([SLOWER] * 11 + [FASTER], None),  # 13/4096 > 0.002
        ([SLOWER] * 15 + [FASTER], "FAIL"),  # 17/65536
        ([SLOWER] * 17 + [FASTER] * 7, "HOPELESS"),  # the last look always decides
    ],
)
def test_decisions(figures: list[float], decision: str | None) -> None:
    assert verdict.judge(figures, 0.05) == decision


def test_gates_that_are_judged_together_share_the_error() -> None:
    assert verdict.judge([0.0] * 8, 0.05, cases=2) is None  # 1/256 is not under 1/512
    assert verdict.judge([0.0] * 12, 0.05, cases=2) == "PASS"  # 1/4096


@given(st.lists(st.floats(-0.2, 0.2), min_size=12, max_size=12), st.floats(0.01, 0.1))
def test_arms_that_change_places_change_the_verdict_of_the_opposite_limit(figures: list[float], limit: float) -> None:
    slower, faster = verdict.p_values(figures, limit)
    swapped = verdict.p_values([-figure for figure in figures], 1 / (1 + limit) - 1)
    assert swapped == pytest.approx((faster, slower), abs=2**-11)


def test_false_alarms_and_power_are_what_is_promised() -> None:
    """Simulated blocks with 2 % noise: no FAIL of equals in 400, all of 200 slowdowns of 10 % found."""
    dice = random.Random(0)

    def gate(change: float) -> str:
        figures: list[float] = []
        for blocks, _ in verdict.LOOKS:
            figures += [random_block(change) for _ in range(blocks - len(figures))]
            decision = verdict.judge(figures, 0.05)
            if decision:
                return decision
        raise AssertionError

    def random_block(change: float) -> float:
        return math.log1p(change) + dice.gauss(0, 0.02)

    assert [gate(0.0) for _ in range(400)].count("FAIL") == 0
    assert [gate(0.10) for _ in range(200)].count("FAIL") >= 199
    at_the_limit = [gate(0.05) for _ in range(400)]
    assert at_the_limit.count("FAIL") <= 8  # 1 % each side
    assert at_the_limit.count("HOPELESS") >= 380


def test_the_interval_is_what_the_test_does_not_rule_out() -> None:
    figures = [0.01, 0.02, 0.03, 0.00, 0.015, 0.025, 0.018, 0.022, 0.012, 0.028]
    interval = verdict.interval(figures)
    assert interval is not None
    low, high = map(math.log1p, interval)
    assert min(figures) < low < statistics.fmean(figures) < high < max(figures)
    for end, sign in ((low, 1), (high, -1)):
        inside = verdict.sign_flip_p([sign * (figure - end - sign * 1e-6) for figure in figures])
        outside = verdict.sign_flip_p([sign * (figure - end + sign * 1e-6) for figure in figures])
        assert outside <= 0.005 < inside


def test_the_interval_of_eight_blocks_ends_at_the_outermost_and_seven_have_none() -> None:
    figures = [0.01, 0.02, 0.03, 0.0, 0.015, 0.025, 0.018, 0.05]
    assert verdict.interval(figures[:7]) is None
    assert verdict.interval(figures) == pytest.approx((math.expm1(0.0), math.expm1(0.05)), abs=1e-6)


def test_the_figure_of_a_block() -> None:
    # neighbours: A B, B A, A B, B A
    arms = "ABBAABBA"
    medians = [10.0, 11.0, 12.0, 10.0, 10.0, 11.0, 33.0, 10.0]  # one slice was disturbed: 3.3 times
    logs = sorted([math.log(1.1), math.log(1.2), math.log(1.1), math.log(3.3)])
    assert verdict.block_figure(arms, medians) == pytest.approx((logs[1] + logs[2]) / 2)
    swapped = arms.translate(str.maketrans("AB", "BA"))
    assert verdict.block_figure(swapped, medians) == pytest.approx(-(logs[1] + logs[2]) / 2)


@pytest.mark.parametrize(
    ("times_ms", "min_ms", "warm"),
    [
        ([10.0] * 10, 100.0, True),
        ([10.0] * 9, 0.0, False),  # too few
        ([10.0] * 10, 101.0, False),  # too short
        ([10.3] * 5 + [10.0] * 5, 0.0, False),  # still 3 % faster than before
        ([10.2] * 5 + [10.0] * 5, 0.0, True),  # 1.96 %
        ([99.0, 50.0] + [10.0] * 10, 0.0, True),  # how it began does not count
        ([10.0] * 9 + [99.0], 0.0, True),  # a median bears one stray
    ],
)
def test_warm(times_ms: list[float], min_ms: float, warm: bool) -> None:
    assert verdict.is_warm(times_ms, min_ms) is warm
