"""Pictures: what they show can be read, whatever the classes are called."""

import warnings
from pathlib import Path

import cv2
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from shown import HISTORY, HOSTILE, bgr, decoded, mistake, rows_of, share_of, solid

from edgekit import pictures
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
