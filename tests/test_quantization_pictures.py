"""Pictures of what quantization costs and gains: the points lie where the figures say."""

import warnings
from typing import Any

import numpy as np
import pytest
from shown import HOSTILE, bgr, decoded, not_ok, quantize_record, share_of, without_times

from edgekit import quantization_pictures
from edgekit.pictures import THEMES, ThemeName
from edgekit.quantization_pictures import FloatLayers, Point, Tradeoff


def test_tradeoff_is_the_metric_against_milliseconds() -> None:
    shown = quantization_pictures.tradeoff(quantize_record(("fp32", "int8"), engines=2))
    openvino, classic = "4.14.0 openvino", "4.14.0 classic"
    assert shown == Tradeoff(
        "milliseconds, one forward pass",
        (
            Point("fp32", openvino, 8.9, pytest.approx(100 * 408 / 412), is_shipped=False),
            Point("fp32", classic, 14.2, pytest.approx(100 * 408 / 412), is_shipped=False),
            Point("int8", openvino, pytest.approx(3.827), pytest.approx(100 * 395 / 412), is_shipped=True),
            Point("int8", classic, pytest.approx(14.2 * 0.43**0.8), pytest.approx(100 * 394 / 412), is_shipped=True),
        ),
        (pytest.approx(100 * 408 / 412 - 1.0),),
    )


def test_tradeoff_leaves_out_what_has_no_time_or_is_not_ok() -> None:
    record = quantize_record(("fp32", "int8"), engines=3)
    record["variants"][0]["figures"][1]["median_ms"] = None  # fp32 has no time on 4.14.0 classic
    not_ok(record["variants"][1]["figures"][2], "died")
    points = quantization_pictures.tradeoff(record).points
    assert [(point.variant, point.engine) for point in points] == [
        ("fp32", "4.14.0 openvino"),
        ("fp32", "5.0.0 classic"),
        ("int8", "4.14.0 openvino"),
        ("int8", "4.14.0 classic"),
    ]


def test_tradeoff_has_a_limit_for_each_different_fp32_metric() -> None:
    record = quantize_record(("fp32", "int8"), engines=3)
    record["max_drop"] = 2.0
    for figure, metric in zip(record["variants"][0]["figures"], (0.75, 0.5, 0.75), strict=True):
        figure["metric"] = metric
    assert quantization_pictures.tradeoff(record).limits == (48.0, 73.0)
    not_ok(record["variants"][0]["figures"][1], "wrong")
    assert quantization_pictures.tradeoff(record).limits == (73.0,)


def test_tradeoff_has_no_limit_of_an_engine_that_has_no_point() -> None:
    record = quantize_record(("fp32", "int8"), engines=2)
    record["variants"][0]["figures"][1]["metric"] = 0.5
    for variant in record["variants"]:
        variant["figures"][1]["median_ms"] = None
    assert quantization_pictures.tradeoff(record).limits == (pytest.approx(100 * 408 / 412 - 1.0),)


def test_tradeoff_without_any_time_is_against_the_files_size() -> None:
    shown = quantization_pictures.tradeoff(without_times(quantize_record(engines=1)))
    assert shown.x_label == "size of the file, MB"
    assert [point.x for point in shown.points] == [13.6, 3.7, 3.6, 4.3]


@pytest.mark.parametrize(
    ("variants", "precision", "name"),
    [
        (("fp32", "int8"), "fp32", "fp32"),
        (("fp32", "int8-weights", "int8"), "int8-weights", "int8-weights"),
        (("fp32", "int8"), "int8", "int8"),
        (("fp32", "int8", "int8-mixed"), "int8", "int8-mixed"),  # int8 lost 3.16 points, of 1 allowed
    ],
)
def test_shipped_variant(variants: tuple[str, ...], precision: str, name: str) -> None:
    assert quantization_pictures.shipped_variant(quantize_record(variants, precision=precision)) == name


def test_of_two_int8_variants_the_one_within_the_guard_is_shipped() -> None:
    record = quantize_record()
    record["max_drop"] = 3.5
    assert quantization_pictures.shipped_variant(record) == "int8"
    not_ok(record["variants"][2]["figures"][3], "timed out")
    assert quantization_pictures.shipped_variant(record) == "int8-mixed"


def test_float_layers_are_the_steps_of_the_search() -> None:
    record = quantize_record()
    assert quantization_pictures.float_layers(record) == FloatLayers(
        (0, 1, 2), (3.1, 1.4, 0.7), ((0, 0.42), (1, 0.45), (2, 0.49)), chosen=2
    )
    record["curve"][1]["time_ratio"] = None
    record["precision"] = "fp32"
    assert quantization_pictures.float_layers(record) == FloatLayers(
        (0, 1, 2), (3.1, 1.4, 0.7), ((0, 0.42), (2, 0.49)), chosen=None
    )


def places_of(image: np.ndarray, color: str) -> tuple[np.ndarray, np.ndarray]:
    """Rows and columns of a colour's pixels within the axes: the keys are the right quarter."""
    return np.nonzero((image[:, : int(0.75 * image.shape[1])] == bgr(color)).all(axis=2))


@pytest.mark.parametrize("theme", THEMES)
def test_points_lie_where_their_figures_say(theme: ThemeName) -> None:
    colors = THEMES[theme]
    image = decoded(quantization_pictures.quantization_picture(quantize_record(engines=1), theme))
    assert 650 < image.shape[0] < 850 and 1300 < image.shape[1] < 1600
    assert tuple(image[0, 0]) == bgr(colors.surface)
    # one engine: int8 is left of int8-mixed, both of int8-weights; int8-weights is above int8-mixed, int8 under both
    rows, columns = zip(*(places_of(image, c) for c in (colors.right, colors.wrong, colors.weights)), strict=True)
    assert columns[0].mean() < columns[1].mean() < columns[2].min()
    assert rows[2].max() < rows[1].min() and rows[1].max() < rows[0].min()
    dashes = np.flatnonzero((image == bgr(colors.muted)).all(axis=2).mean(axis=1) > 0.25)
    assert len(dashes) >= 1 and rows[1].max() < dashes.min() and dashes.max() < rows[0].min(), "the guard parts them"


def test_the_shipped_variant_has_a_ring() -> None:
    colors = THEMES["light"]
    shipped, other = (
        decoded(quantization_pictures.quantization_picture(quantize_record(("fp32", "int8"), 1, precision)))
        for precision in ("int8", "fp32")
    )
    row, column = (int(place.mean()) for place in places_of(shipped, colors.right))
    around = np.s_[row - 25 : row + 26, column - 25 : column + 26]
    assert share_of(shipped[around], colors.ink) > 0.02 and share_of(other[around], colors.ink) == 0


def test_engines_have_markers_of_their_own() -> None:
    """int8 alone, as the first to the fourth engine: a circle, a square, a triangle, a diamond."""
    tops, bottoms = [], []  # the uppermost and lowest three rows of the marker: their share of its width
    for index in range(4):
        record = quantize_record(("fp32", "int8"), engines=4, precision="fp32")
        record["variants"][1]["figures"] = record["variants"][1]["figures"][index : index + 1]
        rows, columns = places_of(decoded(quantization_pictures.quantization_picture(record)), THEMES["light"].right)
        width = 3 * (int(np.ptp(columns)) + 1)
        tops.append((rows < rows.min() + 3).sum() / width)
        bottoms.append((rows > rows.max() - 3).sum() / width)
    assert [top > 0.6 for top in tops] == [False, True, False, False]
    assert [top < 0.3 for top in tops] == [False, False, True, True]
    assert [bottom > 0.6 for bottom in bottoms] == [False, True, True, False]


def test_more_engines_do_not_make_the_picture_larger() -> None:
    few, many = (decoded(quantization_pictures.quantization_picture(quantize_record(engines=n))).shape for n in (1, 4))
    assert few[0] == many[0] and abs(few[1] - many[1]) < 60


def test_a_slow_engine_does_not_hide_the_others() -> None:
    """27 times slower: on a linear axis, the fast engine's points would all be within a pixel or two of each other."""
    record = quantize_record(("fp32", "int8"), engines=2)
    for variant in record["variants"]:
        variant["figures"][1]["median_ms"] *= 100
    image = decoded(quantization_pictures.quantization_picture(record))
    columns = places_of(image, THEMES["light"].right)[1]
    assert columns.max() - columns.min() > 0.4 * image.shape[1]
    assert columns.min() > 0.02 * image.shape[1], "the marker is within the axes"


@pytest.mark.parametrize("change", ["perfect", "nothing right", "no drop allowed", "one point", "no time", "no fp32"])
def test_any_figures_can_be_drawn(change: str) -> None:
    record = quantize_record()
    figures = [figure for variant in record["variants"] for figure in variant["figures"]]
    if change in ("perfect", "nothing right"):
        for figure in figures:
            figure |= {"metric": float(change == "perfect"), "drop": 0.0}
        record["curve"] = [{"float_layers": 0, "drop": 0.0, "time_ratio": 0.4, "last": ""}]
        record["max_drop"] = 0.0
    elif change == "no drop allowed":
        record |= {"max_drop": 0.0, "curve": [step | {"drop": -step["drop"]} for step in record["curve"]]}
    elif change == "one point":
        for figure in figures[1:]:
            not_ok(figure, "raised")
        record["curve"] = record["curve"][:1]
    elif change == "no time":
        without_times(record)
    else:
        for figure in record["variants"][0]["figures"]:
            not_ok(figure, "died")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for picture in (
            quantization_pictures.quantization_picture(record),
            quantization_pictures.sensitivity_picture(record),
        ):
            height, width, _ = decoded(picture).shape
            assert 450 < height < 850 and 1000 < width < 1600


@pytest.mark.parametrize("text", [*HOSTILE, "$\\frac$", "\x08", "", "n" * 300])
def test_any_engine_and_metric_can_be_drawn(text: str) -> None:
    record: dict[str, Any] = quantize_record(engines=1) | {"metric": text}
    for variant in record["variants"]:
        variant["figures"][0]["engine"] = text
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        width = decoded(quantization_pictures.quantization_picture(record)).shape[1]
        assert width < 1900
        assert decoded(quantization_pictures.sensitivity_picture(record)).shape[1] < 1400


@pytest.mark.parametrize("theme", THEMES)
def test_sensitivity_picture_has_a_panel_for_drop_and_one_for_time(theme: ThemeName) -> None:
    colors = THEMES[theme]
    image = decoded(quantization_pictures.sensitivity_picture(quantize_record(), theme))
    assert tuple(image[0, 0]) == bgr(colors.surface) and image.shape[1] > 2 * image.shape[0] > 900
    half = image.shape[1] // 2
    drop, time = image[:, :half], image[:, half:]
    assert share_of(drop, colors.wrong) > 0 == share_of(drop, colors.right)
    assert share_of(time, colors.right) > 0 == share_of(time, colors.wrong)
    rows, columns = np.nonzero((drop == bgr(colors.wrong)).all(axis=2))
    dashes = np.flatnonzero((drop == bgr(colors.muted)).all(axis=2).mean(axis=1) > 0.25)
    left, right = rows[columns < columns.min() + 5], rows[columns > columns.max() - 5]
    assert left.mean() < dashes.min() and right.mean() > dashes.max(), "3.1 is above the limit of 1.0, 0.7 under it"


def test_sensitivity_picture_without_times_has_one_panel() -> None:
    image = decoded(quantization_pictures.sensitivity_picture(without_times(quantize_record())))
    colors = THEMES["light"]
    assert share_of(image, colors.right) == 0
    columns = np.nonzero((image == bgr(colors.wrong)).all(axis=2))[1]
    assert columns.max() - columns.min() > 0.8 * image.shape[1]
