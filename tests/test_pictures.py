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
    SCORE_BINS,
    bgr,
    classification,
    decoded,
    detect_mistake,
    detection,
    grey_png,
    mistake,
    rows_of,
    segment_mistake,
    segmentation,
    share_of,
    solid,
)

from edgekit import overlays, pictures
from edgekit.artifacts import write_bytes


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
    assert decoded(pictures.contact_sheet(classification([mistake(path)] * count))).shape[:2] == size


def test_contact_sheet_keeps_the_order_and_the_shapes(tmp_path: Path) -> None:
    red = solid(tmp_path / "red.png", (0, 0, 255))
    wide = solid(tmp_path / "wide.png", (255, 0, 0), height=20, width=400)
    three = [mistake(red), mistake(wide), mistake(tmp_path / "gone.png")]
    sheet = decoded(pictures.contact_sheet(classification(three))).astype(int)

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
    sheet = decoded(pictures.contact_sheet(classification([mistake(tmp_path / "board.png")])))
    squares = sheet[16:216, 16:216, 0].reshape(8, 25, 8, 25).transpose(0, 2, 1, 3)[:, :, 3:-3, 3:-3]
    assert np.abs(squares.astype(int) - board[:, :, None, None]).max() < 40  # JPEG


def test_contact_sheet_shows_the_whole_of_very_long_images(tmp_path: Path) -> None:
    path = solid(tmp_path / "line.png", (0, 255, 0), height=1, width=3000)
    assert decoded(pictures.contact_sheet(classification([mistake(path, *HOSTILE[:2])]))).shape == (276, 232, 3)


@pytest.mark.parametrize("metrics", [classification([]), classification([], "test"), detection(), segmentation()])
def test_contact_sheet_without_mistakes_says_so(metrics: dict[str, Any]) -> None:
    sheet = decoded(pictures.contact_sheet(metrics))
    assert sheet.shape[0] == 90 and sheet.min() < 100
    ink = np.flatnonzero((sheet < 128).any(axis=(0, 2)))
    assert ink.min() > 10 and ink.max() < sheet.shape[1] - 10, "the whole sentence is there"


def test_no_mistakes_is_said_of_the_task_and_the_subset() -> None:
    assert [pictures.no_mistakes(metrics) for metrics in (classification([]), detection(), segmentation())] == [
        "every validation image is right.",
        "every box is found, none is false.",
        "every pixel of the test images is right.",
    ]


def test_a_sheet_of_boxes_shows_what_was_missed_and_what_is_false(tmp_path: Path) -> None:
    photo = solid(tmp_path / "a.png", (90, 110, 130), height=40, width=80)
    sheet = decoded(pictures.contact_sheet(detection([detect_mistake(photo)] * 4)))
    assert sheet.shape == (16 + 2 * 394 + 20, 16 + 3 * 336, 3)
    cell = sheet[16 + 80 : 16 + 240, 16:336].astype(int)  # the photo is twice as wide as high
    assert np.abs(cell[150, 160] - (90, 110, 130)).max() < 12, "nothing there"
    assert np.abs(cell[75, 240] - overlays.WRONG).max() < 60, "the left edge of what is false"
    assert sheet[16 + 320 : 16 + 320 + 50, 16:336].min() < 100, "the caption"
    assert sheet[-25:, :336].min() < 150, "what the drawing means"
    second = sheet[16 + 394 : 16 + 394 + 320]
    assert (second[:, 352:] == 255).all() and (second[:, 16:336] < 245).all(axis=2).mean() > 0.9, "the fourth, alone"


def test_a_sheet_of_regions_names_the_colours(tmp_path: Path) -> None:
    photo = solid(tmp_path / "a.png", (90, 110, 130), height=40, width=80)
    truth = np.zeros((40, 80), np.uint8)
    mask = grey_png(tmp_path / "mask.png", truth)
    metrics = segmentation([segment_mistake(photo, mask, truth + 1)])
    sheet = decoded(pictures.contact_sheet(metrics)).astype(int)
    assert sheet.shape == (16 + 380 + 40, 352, 3)
    colors = [overlays.region_color(index)[::-1] for index in (1, 2)]
    for left, color in zip((16, 184), colors, strict=True):
        assert np.abs(sheet[16 + 380 + 18, left + 6] - color).max() < 40
    middle = 0.6 * np.array((90, 110, 130)) + 0.4 * np.array(colors[0])
    assert np.abs(sheet[176, 176] - middle).max() < 12, "filled, and the photo shines through"


@pytest.mark.parametrize("task", ["detect", "segment"])
def test_a_sheet_of_hostile_names_and_gone_files(tmp_path: Path, task: str) -> None:
    gone = tmp_path / "$x_1$ gone.png"
    if task == "detect":
        metrics = detection([detect_mistake(gone, HOSTILE)], HOSTILE)
    else:
        metrics = segmentation([segment_mistake(gone, gone, np.ones((4, 4), np.uint8), HOSTILE)], HOSTILE)
    sheet = decoded(pictures.contact_sheet(metrics)).astype(int)
    assert np.abs(sheet[40, 40] - 238).max() < 12 and sheet[170:185, 120:240].min() < 150, "the cell says so"


# Precision and recall


def test_average_precision_is_the_mean_over_the_recalls() -> None:
    curves = {"a": [0.5] * 101, "b": [1.0] * 51 + [0.0] * 50, "c": [1.0] * 101}
    assert list(pictures.average_precisions(curves).items()) == [("c", 1.0), ("b", 51 / 101), ("a", 0.5)]


@pytest.mark.parametrize("theme", pictures.THEMES)
def test_lines_of_precision_lie_where_their_figures_say(theme: pictures.ThemeName) -> None:
    """One class of precision 0.5 up to a recall of 1: a level line across the middle of the axes."""
    image = decoded(pictures.precision_recall_picture({"a": [0.5] * 101}, theme))
    rows, columns = np.nonzero((image == bgr(pictures.CURVES[theme][0])).all(axis=2))
    line = rows == np.bincount(rows).argmax()
    level, left, right = int(np.bincount(rows).argmax()), columns[line].min(), columns[line].max()
    assert 0.4 * image.shape[0] < level < 0.6 * image.shape[0]
    assert left < 0.12 * image.shape[1] and 0.6 * image.shape[1] < right
    assert tuple(image[0, 0]) == bgr(pictures.THEMES[theme].surface)


def test_every_class_has_a_line_of_its_own_up_to_eight() -> None:
    def picture(classes: int) -> np.ndarray:
        return decoded(pictures.precision_recall_picture({f"c{i}": [1 - i / 20] * 101 for i in range(classes)}))

    eight, nine = picture(8), picture(9)
    assert all(share_of(eight, color) > 0.0005 for color in pictures.CURVES["light"])
    assert abs(eight.shape[1] - nine.shape[1]) < 60 and eight.shape[0] == nine.shape[0]
    top = nine[: nine.shape[0] // 6, : nine.shape[1] // 2]
    assert share_of(top, pictures.THEMES["light"].muted) > 0, "the best is one of the crowd: a thin line"


@pytest.mark.parametrize("name", [*HOSTILE, "$\\frac$", "\x08", "", "n" * 300])
def test_any_class_can_have_a_curve(name: str) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        image = decoded(pictures.precision_recall_picture({name: [1.0] * 101, "other": [0.0] * 101}))
    assert 600 < image.shape[0] < 900 and 900 < image.shape[1] < 1500


def test_no_class_with_a_true_box_has_a_picture_too() -> None:
    image = decoded(pictures.precision_recall_picture({}))
    assert share_of(image, pictures.THEMES["light"].muted) > 0.0005


# Scores


@pytest.mark.parametrize("theme", pictures.THEMES)
def test_bars_of_accuracy_stand_at_their_scores(theme: pictures.ThemeName) -> None:
    image = decoded(pictures.reliability_picture({"calibration_error": 0.12, "score_bins": SCORE_BINS}, theme))
    colors = pictures.THEMES[theme]
    bars = (image == bgr(colors.right)).all(axis=2)
    heights, columns = bars.sum(axis=0), np.flatnonzero(bars.any(axis=0))
    (gap,) = np.flatnonzero(np.diff(columns) > 5)
    first, last = columns[: gap + 1], columns[gap + 1 :]
    assert heights[first].max() / heights[last].max() == pytest.approx(0.5 / (5 / 6), abs=0.03)
    assert len(first) == pytest.approx(len(last), abs=3)
    assert last[0] - first[0] == pytest.approx(5 * 5.2 * pictures.DPI / 15, abs=3)  # bins 9 and 14 of 5.2 inches
    assert share_of(image, colors.ink) > 0.002, "the dashed line"
    assert share_of(image, colors.muted) > 0.0002, "how many images"
    assert tuple(image[0, 0]) == bgr(colors.surface)


def test_bins_without_a_right_answer_have_a_picture_too() -> None:
    bins = [{"images": 3, "score": 0.5, "accuracy": 0.0}, {"images": 0, "score": None, "accuracy": None}]
    image = decoded(pictures.reliability_picture({"calibration_error": 0.5, "score_bins": bins}))
    assert share_of(image, pictures.THEMES["light"].right) == 0
    full = [{"images": 99_999, "score": 1.0, "accuracy": 1.0}] * 15
    assert decoded(pictures.reliability_picture({"calibration_error": 0.0, "score_bins": full})).shape == image.shape


# Shares of pixels


def test_counts_too_long_to_read_are_shares_of_the_true_class() -> None:
    def picture(*counts: int) -> bytes:
        return pictures.confusion_picture([list(counts[:2]), list(counts[2:])], ["a", "b"])

    assert picture(600_000, 200_000, 0, 1) == picture(300_000, 100_000, 0, 7), "the same shares"
    assert picture(60_000, 20_000, 0, 1) != picture(30_000, 10_000, 0, 1), "counts"


def test_only_all_of_a_class_is_a_hundred() -> None:
    counts = np.array([[1_000_000, 0, 0], [1, 999_999, 0], [500_000, 1, 499_999], [0, 0, 0]][:3])
    assert pictures._shares(counts).tolist() == [["100", "0.1", "0.1"], ["0.1", "99.9", "0.1"], ["50.0", "0.1", "50.0"]]
