"""Photos with truth and answer drawn on them: what is missed, false, right or wrong is where the records say."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from shown import (
    box,
    classification,
    detect_mistake,
    detection,
    grey_png,
    mistake,
    segment_mistake,
    segmentation,
    solid,
)

from edgekit import overlays
from edgekit.overlays import BLACK, RIGHT, WHITE, WRONG, Judged

PHOTO = (90, 110, 130)
CELL = (0, 0, 10, 10)


def judged(truth: list[dict[str, Any]], answers: list[dict[str, Any]]) -> Judged:
    return overlays.judged({"truth": truth, "answers": answers}, detection())  # from a score of 0.42 on


def test_what_became_of_boxes_and_answers() -> None:
    made = detect_mistake(Path("a.png"))
    (found, cat, dog), (right, false, doubtful) = made["truth"], made["answers"]
    assert overlays.judged(made, detection()) == Judged((found,), (cat, dog), (right,), (false,))
    assert doubtful["score"] < 0.42, "so it is no answer"


@pytest.mark.parametrize(("bottom", "is_right"), [(5.0, True), (4.99, False)])
def test_half_of_the_joint_area_is_enough(bottom: float, is_right: bool) -> None:
    """[0, 0, 10, 10] and its upper half: 50 of 100 square pixels."""
    found = judged([box("cat", *CELL)], [box("cat", 0, 0, 10, bottom, score=0.42)])
    assert (len(found.right), len(found.missed), len(found.false)) == ((1, 0, 0) if is_right else (0, 1, 1))


def test_another_class_is_another_object() -> None:
    found = judged([box("cat", *CELL)], [box("dog", *CELL, score=0.9)])
    assert len(found.missed) == len(found.false) == 1


def test_a_box_is_found_once_by_the_highest_score() -> None:
    low, high = box("cat", *CELL, score=0.5), box("cat", 0, 0, 10, 9, score=0.8)
    assert judged([box("cat", *CELL)], [low, high]) == Judged((box("cat", *CELL),), (), (high,), (low,))


def test_each_answer_takes_the_box_that_it_overlaps_most() -> None:
    one, other = box("cat", *CELL), box("cat", 0, 2, 10, 12)
    answers = [box("cat", 0, 2, 10, 12, score=0.9), box("cat", *CELL, score=0.8)]
    assert judged([one, other], answers) == Judged((one, other), (), tuple(answers), ())


def test_boxes_of_equal_edges_are_two_objects() -> None:
    same = [box("cat", *CELL), box("cat", *CELL)]
    found = judged(same, [box("cat", *CELL, score=0.9)])
    assert (len(found.found), len(found.missed)) == (1, 1)


edges = st.tuples(*(st.integers(0, 20),) * 2, *(st.integers(1, 10),) * 2).map(
    lambda t: (t[0], t[1], t[0] + t[2], t[1] + t[3])
)
true_boxes = st.builds(lambda label, four: box(label, *four), st.sampled_from(["cat", "dog"]), edges)
found_boxes = st.builds(
    lambda label, four, score: box(label, *four, score=score), st.sampled_from(["cat", "dog"]), edges, st.floats(0, 1)
)


@settings(deadline=None)
@given(st.lists(true_boxes, max_size=6), st.lists(found_boxes, max_size=6))
def test_nothing_is_counted_twice_or_lost(truth: list[dict[str, Any]], answers: list[dict[str, Any]]) -> None:
    found = judged(truth, answers)
    assert len(found.found) + len(found.missed) == len(truth) and len(found.found) == len(found.right)
    assert len(found.right) + len(found.false) == sum(answer["score"] >= 0.42 for answer in answers)


@settings(deadline=None)
@given(st.lists(true_boxes, max_size=6, unique_by=lambda each: (each["label"], *each["box"])))
def test_the_truth_as_an_answer_is_all_right(truth: list[dict[str, Any]]) -> None:
    found = judged(truth, [{**each, "score": 1.0} for each in truth])
    assert found.missed == found.false == () and found.found == tuple(truth)


def test_labels_are_counted() -> None:
    names = ["dog", "cat", "cat", "newt", "cat"]
    assert overlays.labels_of(box(name, *CELL) for name in names) == "cat (3), dog, newt"
    assert overlays.labels_of([]) == ""


def drawn_boxes(tmp_path: Path, **changes: Any) -> np.ndarray:
    photo = solid(tmp_path / "a.png", PHOTO, height=40, width=80)
    image = overlays.drawn({**detect_mistake(photo), **changes}, detection(), 400, 400)
    assert image is not None and image.shape == (200, 400, 3)
    return image


def place_of(image: np.ndarray, color: tuple[int, int, int]) -> tuple[int, int, int, int]:
    rows, columns = np.nonzero((image == color).all(axis=2))
    return int(columns.min()), int(rows.min()), int(columns.max()), int(rows.max())


def test_boxes_are_drawn_where_they_are(tmp_path: Path) -> None:
    """The photo is shown five times as large, so that [60, 8, 74, 30] lies at [300, 40, 370, 150]."""
    image = drawn_boxes(tmp_path)
    assert np.abs(np.array(place_of(image, WRONG)) - (300, 40, 370, 150)).max() <= 3
    assert np.abs(np.array(place_of(image, RIGHT)) - (25, 20, 120, 175)).max() <= 3
    left, top, right, bottom = place_of(image, BLACK)  # the two that were missed, [30, 4, 40, 34] and [44, 20, 54, 34]
    assert np.abs(np.array((left, top, right, bottom)) - (150, 20, 270, 170)).max() <= 4
    assert (image[100, 180] == PHOTO).all() and (image[100, 335] == PHOTO).all(), "nothing is filled"


def test_missed_and_false_boxes_stand_out_without_colours(tmp_path: Path) -> None:
    def widths(image: np.ndarray, row: int, columns: slice) -> int:
        return int((image[row, columns] != PHOTO).any(axis=1).sum())

    image = drawn_boxes(tmp_path)
    thin = widths(image, 100, slice(15, 30))  # the left edge of the answer that is right, and of its true box
    false, missed = widths(image, 100, slice(290, 312)), widths(image, 60, slice(140, 160))
    assert thin <= 2 and false >= 5 and missed >= 3
    edge = [tuple(color) for color in image[100, 290:312].tolist() if tuple(color) != PHOTO]
    assert edge[0] == edge[-1] == WHITE and set(edge[1:-1]) == {WRONG}, "a false answer has a white edge, for any photo"
    assert widths(drawn_boxes(tmp_path, truth=[], answers=[]), 100, slice(0, 400)) == 0
    alone = drawn_boxes(tmp_path, truth=[box("cat", 10, 4, 70, 34)], answers=[])
    edge = alone[40:150, 50]
    assert {tuple(color) for color in edge.tolist()} == {BLACK, WHITE}, "a missed box is dashed, black and white"
    is_white = (edge == 255).all(axis=1)
    assert 0.3 < is_white.mean() < 0.7 and np.diff(is_white.astype(int)).astype(bool).sum() > 6


def test_a_box_at_the_photos_edge_is_seen(tmp_path: Path) -> None:
    image = drawn_boxes(tmp_path, truth=[box("cat", 0, 0, 80, 40)], answers=[])
    for edge in (image[0], image[-1], image[:, 0], image[:, -1]):
        assert (edge != PHOTO).any(axis=1).mean() > 0.9


@pytest.mark.parametrize(("smallest", "largest", "side"), [(20, 200, 80), (120, 200, 120), (20, 60, 60), (50, 50, 50)])
def test_the_longer_side_is_the_photos_own_between_two_limits(
    tmp_path: Path, smallest: int, largest: int, side: int
) -> None:
    photo = solid(tmp_path / "a.png", PHOTO, height=40, width=80)
    image = overlays.drawn(mistake(photo), classification([]), smallest, largest)
    assert image is not None and image.shape == (side // 2, side, 3) and (image == PHOTO).all()


# Regions


def drawn_regions(tmp_path: Path, truth: np.ndarray, found: np.ndarray, side: int) -> np.ndarray:
    """truth, found: uint8 (40, 40), classes; in the truth 3 is void."""
    photo = solid(tmp_path / "a.png", PHOTO)
    mask = grey_png(tmp_path / "mask.png", np.array([0, 100, 200, 77], np.uint8)[truth])
    image = overlays.drawn(segment_mistake(photo, mask, found), segmentation(), side, side)
    assert image is not None and image.shape == (side, side, 3)
    return image


def bgr_of(class_id: int) -> tuple[int, ...]:
    return overlays.region_color(class_id)[::-1]


def test_the_answer_is_filled_and_a_line_runs_around_the_truth(tmp_path: Path) -> None:
    truth, found = np.zeros((2, 40, 40), np.uint8)
    truth[10:20, 10:20] = 1
    found[10:20, 25:35] = 2
    image = drawn_regions(tmp_path, truth, found, 40)
    filled = 0.6 * np.array(PHOTO) + 0.4 * np.array(bgr_of(2))
    assert np.abs(image[10:20, 25:35] - filled).max() <= 1
    assert (image[10:20, 10:20] == PHOTO).all(), "within the line the photo is as it was"
    assert (image[15, 8:10] == bgr_of(1)).all() and (image[15, 20:22] == bgr_of(1)).all(), "in the true class's colour"
    assert (image[15, 7] == WHITE).all() and (image[15, 22] == WHITE).all(), "and white outside, for any photo"
    image[7:23, 7:23] = image[10:20, 25:35] = PHOTO
    assert (image == PHOTO).all(), "and nothing else: class 0 is what lies behind"


def test_void_is_no_region(tmp_path: Path) -> None:
    truth = np.zeros((40, 40), np.uint8)
    truth[5:30, 5:30] = 3
    assert (drawn_regions(tmp_path, truth, np.zeros_like(truth), 40) == PHOTO).all()


def test_a_thin_crack_is_still_seen_when_the_photo_is_shrunk(tmp_path: Path) -> None:
    found = np.zeros((40, 40), np.uint8)
    found[:, 21] = 1
    image = drawn_regions(tmp_path, np.zeros_like(found), found, 20)
    assert (image[:, 10] != PHOTO).any(axis=1).all() and (image[:, [8, 12]] == PHOTO).all()


def test_regions_are_enlarged_with_their_photo(tmp_path: Path) -> None:
    found = np.zeros((40, 40), np.uint8)
    found[:, 20:] = 1
    image = drawn_regions(tmp_path, np.zeros_like(found), found, 480)
    assert (image[:, :230] == PHOTO).all() and (image[:, 250:] != PHOTO).any(axis=2).all()


def test_colours_of_classes_differ() -> None:
    colors = np.array([overlays.region_color(index) for index in range(1, 20)], float)
    apart = np.abs(colors[:, None] - colors[None]).sum(axis=2) + 1e9 * np.eye(len(colors))
    assert apart[:8, :8].min() > 100 and apart.min() > 30


@pytest.mark.parametrize("gone", ["photo", "mask"])
def test_what_is_gone_has_no_picture(tmp_path: Path, gone: str) -> None:
    photo, mask = solid(tmp_path / "photo.png", PHOTO), grey_png(tmp_path / "mask.png", np.zeros((40, 40), np.uint8))
    (tmp_path / f"{gone}.png").unlink()
    assert overlays.drawn(segment_mistake(photo, mask, np.zeros((40, 40), np.uint8)), segmentation(), 96, 240) is None
    if gone == "photo":
        assert overlays.drawn(detect_mistake(photo), detection(), 96, 240) is None
        assert overlays.drawn(mistake(photo), classification([]), 96, 240) is None
