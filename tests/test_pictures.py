"""Pictures: what they show can be read, whatever the classes are called."""

import warnings
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from shown import (
    HISTORY,
    HOSTILE,
    bgr,
    decoded,
    mistake,
    not_ok,
    quantize_record,
    rows_of,
    share_of,
    solid,
    without_times,
)

from edgekit import pictures
from edgekit.artifacts import write_bytes
from edgekit.pictures import FloatLayers, Point, Tradeoff


@pytest.mark.parametrize("classes", [1, 2, 20, 100, 250])
def test_confusion_picture_is_large_enough_to_read(classes: int) -> None:
    names = [f"class {i}" for i in range(classes)]
    height, width, _ = decoded(pictures.confusion_picture(np.diag(range(classes)).tolist(), names)).shape
    per_class = 72 if classes <= 2 else 50 if classes == 20 else 19 if classes == 100 else 8
    assert per_class * classes <= height <= 2600
    assert height * 0.8 <= width <= height * 1.8


def test_right_and_wrong_answers_have_their_colors() -> None:
    colors = pictures.THEMES["light"]
    right = decoded(pictures.confusion_picture([[5, 0], [0, 7]], ["a", "b"]))
    wrong = decoded(pictures.confusion_picture([[0, 5], [7, 0]], ["a", "b"]))
    assert share_of(right, colors.right) > 0.2 and share_of(right, colors.wrong) == 0
    assert share_of(wrong, colors.wrong) > 0.2 and share_of(wrong, colors.right) == 0


def test_rows_are_true_classes_and_columns_predicted_ones() -> None:
    image = decoded(pictures.confusion_picture([[0, 5], [0, 0]], ["a", "b"]))
    rows, columns = np.nonzero((image == bgr(pictures.THEMES["light"].wrong)).all(axis=2))
    empty = (image == bgr(pictures.THEMES["light"].empty)).all(axis=2)
    top, right = rows.max(), columns.min()  # the mistake's cell is the upper right one
    assert empty[top + 10 :, columns].any() and empty[rows.min() : top, :right].any()
    assert not empty[: rows.min() - 5].any() and not empty[:, columns.max() + 5 :].any()


def test_counts_are_written_up_to_20_classes() -> None:
    def picture(classes: int, count: int) -> bytes:
        return pictures.confusion_picture(
            (np.eye(classes, dtype=int) * count).tolist(), [str(i) for i in range(classes)]
        )

    assert picture(20, 1) != picture(20, 8)
    assert picture(21, 1) == picture(21, 8)  # the colours are shares, and those are the same


def test_a_dark_picture_lies_on_the_dark_surface() -> None:
    image = decoded(pictures.confusion_picture([[1, 0], [0, 1]], ["a", "b"], "dark"))
    assert tuple(image[0, 0]) == bgr(pictures.THEMES["dark"].surface)
    assert share_of(image, pictures.THEMES["dark"].right) > 0.2


@pytest.mark.parametrize(
    "name", ["猫", "😀", "\x08", "$x_1$", "$\\frac$", "مرحبا", "हिन्दी", "a\nb\tc", "\u200b", "", "n" * 300]
)
def test_any_class_name_can_be_drawn(name: str) -> None:
    height, width, _ = decoded(pictures.confusion_picture([[1, 0], [0, 1]], [name, "other"])).shape
    assert 300 < height < 1000 and 300 < width < 1000


@settings(max_examples=12, deadline=None)
@given(st.text(max_size=8))
def test_no_name_makes_matplotlib_warn(name: str) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert pictures.confusion_picture([[1, 0], [0, 1]], [name, "other"]).startswith(b"\x89PNG")


def test_names_without_glyphs_stay_apart() -> None:
    first, second = ("\U0010fffd", "\U0010fffc")  # no font has these
    one, two = (pictures.confusion_picture([[1, 0], [0, 1]], [name, "b"]) for name in (first, second))
    assert one != two


def test_curves_picture() -> None:
    image = decoded(pictures.curves_picture(rows_of(HISTORY)))
    assert image.shape[1] > 2 * image.shape[0] > 600
    colors = pictures.THEMES["light"]
    assert share_of(image, colors.right) > 0 and share_of(image, colors.wrong) > 0
    assert tuple(image[0, 0]) == bgr(colors.surface)


def test_the_boundary_between_phases_is_marked() -> None:
    def upright_lines(history: str) -> list[int]:
        image = decoded(pictures.curves_picture(rows_of(history)))
        dashes = (image == bgr(pictures.THEMES["light"].muted)).all(axis=2).mean(axis=0)
        return [int(x) for x in np.flatnonzero(dashes > 0.25)]

    assert upright_lines(HISTORY.replace("head", "stages")) == []
    lines = upright_lines(HISTORY)
    width = decoded(pictures.curves_picture(rows_of(HISTORY))).shape[1]
    assert len([x for x in lines if x < width / 2]) == len([x for x in lines if x > width / 2]) > 0, "in both panels"
    assert width * 0.15 < lines[0] < width * 0.25, "a third of the first panel's width: after epoch 1 of 3"


@pytest.mark.parametrize("losses", ["nan,nan", "inf,1.0", "1.0,1e300"])
def test_a_run_that_diverged_can_be_drawn(losses: str) -> None:
    history = HISTORY.replace("0.7,0.75", losses)
    assert decoded(pictures.curves_picture(rows_of(history))).shape[0] > 300


def test_one_epoch_can_be_drawn() -> None:
    assert decoded(pictures.curves_picture(rows_of(HISTORY)[:1])).shape[0] > 300


def test_the_users_own_matplotlib_settings_do_not_matter() -> None:
    import matplotlib as mpl

    plain = pictures.confusion_picture([[1, 0], [0, 1]], ["a", "b"])
    with mpl.rc_context({"font.size": 30, "axes.facecolor": "red", "axes.grid": True}):
        assert pictures.confusion_picture([[1, 0], [0, 1]], ["a", "b"]) == plain
        assert mpl.rcParams["font.size"] == 30


@pytest.mark.parametrize(("count", "size"), [(1, (276, 232)), (4, (276, 880)), (5, (536, 880)), (24, (1576, 880))])
def test_contact_sheet_has_four_columns(tmp_path: Path, count: int, size: tuple[int, int]) -> None:
    path = solid(tmp_path / "a.png", (0, 0, 255))
    assert decoded(pictures.contact_sheet([mistake(path)] * count)).shape[:2] == size


def test_contact_sheet_keeps_the_order_and_the_shapes(tmp_path: Path) -> None:
    red = solid(tmp_path / "red.png", (0, 0, 255))
    wide = solid(tmp_path / "wide.png", (255, 0, 0), height=20, width=400)
    sheet = decoded(pictures.contact_sheet([mistake(red), mistake(wide), mistake(tmp_path / "gone.png")])).astype(int)

    def close(row: int, left: int, color: tuple[int, int, int]) -> bool:
        return bool(np.abs(sheet[row, left] - color).max() < 12)  # JPEG

    assert close(20, 20, (0, 0, 255)) and close(210, 210, (0, 0, 255))  # fills its cell, 16..215
    assert close(116, 332, (255, 0, 0)) and close(116, 240, (255, 0, 0))  # the full width, a tenth as high
    assert close(40, 332, (238, 238, 238)) and close(195, 332, (238, 238, 238))
    assert close(40, 548, (238, 238, 238))  # a grey cell where the image is gone
    for left in (16, 232, 448):
        assert sheet[220:260, left : left + 200].min() < 100, "the text under the image"


def test_tiny_images_keep_their_pixels(tmp_path: Path) -> None:
    board = np.tile(np.uint8([[0, 255], [255, 0]]), (4, 4))  # 8×8, black and white in turn
    write_bytes(tmp_path / "board.png", cv2.imencode(".png", board)[1].tobytes())
    sheet = decoded(pictures.contact_sheet([mistake(tmp_path / "board.png")]))
    squares = sheet[16:216, 16:216, 0].reshape(8, 25, 8, 25).transpose(0, 2, 1, 3)[:, :, 3:-3, 3:-3]
    assert np.abs(squares.astype(int) - board[:, :, None, None]).max() < 40  # JPEG


def test_contact_sheet_shows_the_whole_of_very_long_images(tmp_path: Path) -> None:
    path = solid(tmp_path / "line.png", (0, 255, 0), height=1, width=3000)
    assert decoded(pictures.contact_sheet([mistake(path, *HOSTILE[:2])])).shape == (276, 232, 3)


def test_contact_sheet_without_mistakes_says_so() -> None:
    sheet = decoded(pictures.contact_sheet([]))
    assert sheet.shape == (90, 460, 3) and sheet.min() < 100


# Quantization


def test_tradeoff_is_the_metric_against_milliseconds() -> None:
    shown = pictures.tradeoff(quantize_record(("fp32", "int8"), engines=2))
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
    points = pictures.tradeoff(record).points
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
    assert pictures.tradeoff(record).limits == (48.0, 73.0)
    not_ok(record["variants"][0]["figures"][1], "wrong")
    assert pictures.tradeoff(record).limits == (73.0,)


def test_tradeoff_has_no_limit_of_an_engine_that_has_no_point() -> None:
    record = quantize_record(("fp32", "int8"), engines=2)
    record["variants"][0]["figures"][1]["metric"] = 0.5
    for variant in record["variants"]:
        variant["figures"][1]["median_ms"] = None
    assert pictures.tradeoff(record).limits == (pytest.approx(100 * 408 / 412 - 1.0),)


def test_tradeoff_without_any_time_is_against_the_files_size() -> None:
    shown = pictures.tradeoff(without_times(quantize_record(engines=1)))
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
    assert pictures.shipped_variant(quantize_record(variants, precision=precision)) == name


def test_of_two_int8_variants_the_one_within_the_guard_is_shipped() -> None:
    record = quantize_record()
    record["max_drop"] = 3.5
    assert pictures.shipped_variant(record) == "int8"
    not_ok(record["variants"][2]["figures"][3], "timed out")
    assert pictures.shipped_variant(record) == "int8-mixed"


def test_float_layers_are_the_steps_of_the_search() -> None:
    record = quantize_record()
    assert pictures.float_layers(record) == FloatLayers(
        (0, 1, 2), (3.1, 1.4, 0.7), ((0, 0.42), (1, 0.45), (2, 0.49)), chosen=2
    )
    record["curve"][1]["time_ratio"] = None
    record["precision"] = "fp32"
    assert pictures.float_layers(record) == FloatLayers((0, 1, 2), (3.1, 1.4, 0.7), ((0, 0.42), (2, 0.49)), chosen=None)


def places_of(image: np.ndarray, color: str) -> tuple[np.ndarray, np.ndarray]:
    """Rows and columns of a colour's pixels within the axes: the keys are the right quarter."""
    return np.nonzero((image[:, : int(0.75 * image.shape[1])] == bgr(color)).all(axis=2))


@pytest.mark.parametrize("theme", pictures.THEMES)
def test_points_lie_where_their_figures_say(theme: pictures.ThemeName) -> None:
    colors = pictures.THEMES[theme]
    image = decoded(pictures.quantization_picture(quantize_record(engines=1), theme))
    assert 650 < image.shape[0] < 850 and 1300 < image.shape[1] < 1600
    assert tuple(image[0, 0]) == bgr(colors.surface)
    # one engine: int8 is left of int8-mixed, both of int8-weights; int8-weights is above int8-mixed, int8 under both
    rows, columns = zip(*(places_of(image, c) for c in (colors.right, colors.wrong, colors.weights)), strict=True)
    assert columns[0].mean() < columns[1].mean() < columns[2].min()
    assert rows[2].max() < rows[1].min() and rows[1].max() < rows[0].min()
    dashes = np.flatnonzero((image == bgr(colors.muted)).all(axis=2).mean(axis=1) > 0.25)
    assert len(dashes) >= 1 and rows[1].max() < dashes.min() and dashes.max() < rows[0].min(), "the guard parts them"


def test_the_shipped_variant_has_a_ring() -> None:
    colors = pictures.THEMES["light"]
    shipped, other = (
        decoded(pictures.quantization_picture(quantize_record(("fp32", "int8"), 1, precision)))
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
        rows, columns = places_of(decoded(pictures.quantization_picture(record)), pictures.THEMES["light"].right)
        width = 3 * (int(np.ptp(columns)) + 1)
        tops.append((rows < rows.min() + 3).sum() / width)
        bottoms.append((rows > rows.max() - 3).sum() / width)
    assert [top > 0.6 for top in tops] == [False, True, False, False]
    assert [top < 0.3 for top in tops] == [False, False, True, True]
    assert [bottom > 0.6 for bottom in bottoms] == [False, True, True, False]


def test_more_engines_do_not_make_the_picture_larger() -> None:
    few, many = (decoded(pictures.quantization_picture(quantize_record(engines=n))).shape for n in (1, 4))
    assert few[0] == many[0] and abs(few[1] - many[1]) < 60


def test_a_slow_engine_does_not_hide_the_others() -> None:
    """27 times slower: on a linear axis, the fast engine's points would all be within a pixel or two of each other."""
    record = quantize_record(("fp32", "int8"), engines=2)
    for variant in record["variants"]:
        variant["figures"][1]["median_ms"] *= 100
    image = decoded(pictures.quantization_picture(record))
    columns = places_of(image, pictures.THEMES["light"].right)[1]
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
        for picture in (pictures.quantization_picture(record), pictures.sensitivity_picture(record)):
            height, width, _ = decoded(picture).shape
            assert 450 < height < 850 and 1000 < width < 1600


@pytest.mark.parametrize("text", [*HOSTILE, "$\\frac$", "\x08", "", "n" * 300])
def test_any_engine_and_metric_can_be_drawn(text: str) -> None:
    record: dict[str, Any] = quantize_record(engines=1) | {"metric": text}
    for variant in record["variants"]:
        variant["figures"][0]["engine"] = text
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        width = decoded(pictures.quantization_picture(record)).shape[1]
        assert width < 1900
        assert decoded(pictures.sensitivity_picture(record)).shape[1] < 1400


@pytest.mark.parametrize("theme", pictures.THEMES)
def test_sensitivity_picture_has_a_panel_for_drop_and_one_for_time(theme: pictures.ThemeName) -> None:
    colors = pictures.THEMES[theme]
    image = decoded(pictures.sensitivity_picture(quantize_record(), theme))
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
    image = decoded(pictures.sensitivity_picture(without_times(quantize_record())))
    colors = pictures.THEMES["light"]
    assert share_of(image, colors.right) == 0
    columns = np.nonzero((image == bgr(colors.wrong)).all(axis=2))[1]
    assert columns.max() - columns.min() > 0.8 * image.shape[1]
