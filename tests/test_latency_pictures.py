"""The pictures of latency: what they show, and that nothing a device says can break them."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from latencies import HOSTILE, case, comparison, run, subject
from shown import bgr, decoded, share_of

from edgekit.latency import Comparison, LatencyRun, ms_text, share_text
from edgekit.latency_pictures import latency_picture, shown_until
from edgekit.pictures import THEMES, ThemeName


@pytest.mark.parametrize(
    ("ms", "text"),
    [
        (0.02154, "0.0215"),
        (1.0, "1.00"),
        (9.996, "10.0"),
        (12.34, "12.3"),
        (123.4, "123"),
        (1234.5, "1234"),
        (0.0, "0"),
    ],
)
def test_milliseconds_have_three_digits(ms: float, text: str) -> None:
    assert ms_text(ms) == text


@pytest.mark.parametrize(
    ("change", "text"),
    [(None, "-"), (0.0712, "+7.1 %"), (-0.05, "-5.0 %"), (0.0, "+0.0 %"), (-0.0001, "+0.0 %"), (2.0, "+200.0 %")],
)
def test_changes_have_a_sign(change: float | None, text: str) -> None:
    assert share_text(change) == text


def test_a_long_tail_is_cut_off() -> None:
    spread = [float(ms) for ms in range(10, 21)]  # quartiles 12.5 and 17.5: the fence is at 42.5
    assert shown_until(spread) == 20.0
    assert shown_until([*spread, 40.0]) == 40.0
    assert shown_until([*spread * 5, 500.0, 900.0]) == 20.0
    assert shown_until([3.0]) == 3.0 and shown_until([2.0] * 10) == 2.0


def _of(samples: list[float]) -> LatencyRun:
    return run(samples_ms={"end_to_end": tuple(samples)})


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_a_run_is_a_histogram_with_its_percentiles(theme: ThemeName) -> None:
    samples = np.random.default_rng(0).gamma(20, 0.5, 700)
    few, many = (
        decoded(latency_picture(_of(list(samples[:63])), theme)),
        decoded(latency_picture(_of(list(samples)), theme)),
    )
    colors = THEMES[theme]
    for image in (few, many):
        assert tuple(image[0, 0]) == bgr(colors.surface)
        height, width, _ = image.shape
        assert 450 < height < 800 and 1000 < width < 1500
    assert len(_uprights(few, colors.ink)) == 1, "p50 alone"
    assert len(_uprights(many, colors.ink)) == 3, "p50, p90 and p99"


def _uprights(image: np.ndarray, color: str) -> list[float]:
    """Where the upright lines of a colour are, dashed ones too, as shares of the width."""
    columns = (image == bgr(color)).all(axis=2).mean(axis=0) > 0.2
    return [float(x) / image.shape[1] for x in np.flatnonzero(np.diff(columns.astype(int)) == 1)]


def test_percentiles_beyond_the_axis_are_told_and_not_drawn() -> None:
    samples = [10.0 + 0.01 * (index % 50) for index in range(700)] + [500.0 + index for index in range(40)]
    p50, p90 = _uprights(decoded(latency_picture(_of(samples))), THEMES["light"].ink)  # p99 is 532
    assert 0.45 < p50 < 0.6 and 0.85 < p90 < 0.95


def test_a_comparison_has_a_row_a_case() -> None:
    one = decoded(latency_picture(comparison(case())))
    two = decoded(latency_picture(comparison(case(), case(name="forward"))))
    assert two.shape[0] > 1.6 * one.shape[0] and abs(two.shape[1] - one.shape[1]) < 40
    colors = THEMES["light"]
    for color in (colors.right, colors.wrong):  # dots and change; the limit
        assert share_of(one, color) > 0
    left = one[:, : one.shape[1] // 2]
    rows = np.flatnonzero((left == bgr(colors.wrong)).all(axis=2).mean(axis=1) > 0.3)
    change = np.flatnonzero((left == bgr(colors.right)).all(axis=2).mean(axis=1) > 0.5)
    zero = np.flatnonzero((left == bgr(colors.muted)).all(axis=2).mean(axis=1) > 0.5)
    assert len(rows) and len(change) and len(zero)
    assert change.max() < rows.min() and rows.max() < zero.min(), "+10 % is above the limit of 5 %, that above 0"


NOTHING = {"change": None, "low": None, "high": None, "log_ratios": (), "base_ms": (), "candidate_ms": ()}


@pytest.mark.parametrize(
    "record",
    [
        run(samples_ms={}),
        run(samples_ms={"end_to_end": ()}),
        comparison(reason=HOSTILE * 20),
        comparison(case("INCOMPARABLE", **NOTHING)),
    ],
)
def test_nothing_measured_is_said(record: LatencyRun | Comparison) -> None:
    height, width, _ = decoded(latency_picture(record)).shape
    assert 50 < height < 200 and 400 < width < 1400


@pytest.mark.parametrize(
    "record",
    [
        _of([5.0]),
        _of([5.0, 5.0]),
        _of([0.0] * 100),
        _of([1e-6, 1e6]),
        run(subject=subject(name=HOSTILE, precision="$x$")),
        comparison(case(name=HOSTILE, log_ratios=(0.0,), base_ms=(1.0,), candidate_ms=())),
        comparison(case(log_ratios=(), low=None, change=None)),
        comparison(case(log_ratios=tuple([3.0] * 24), base_ms=(), candidate_ms=())),
        comparison(case(base_ms=tuple([1.0] * 50), candidate_ms=(*[1.0] * 50, 1e5))),
    ],
)
def test_odd_records_can_be_drawn(record: LatencyRun | Comparison) -> None:
    height, width, _ = decoded(latency_picture(record)).shape
    assert 400 < height < 900 and 900 < width < 1800


@settings(max_examples=15, deadline=None)
@given(st.lists(st.floats(0, 1e4), min_size=1, max_size=80))
def test_any_samples_can_be_drawn(samples: list[float]) -> None:
    assert latency_picture(_of(samples)).startswith(b"\x89PNG")
