"""Boxes: from a network's outputs to pixels of a photo; and where the network's input lies in one."""

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import bundles
import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from torchvision.ops import batched_nms

from edgekit import runner
from edgekit.runner import Outputs, Results, RunnerError, Size, Spec

SPEC = replace(
    bundles.SPEC,
    task="detect",
    input_size=(64, 96),
    class_names=("red", "white", "platelet"),
    strides=(8, 16, 32),
    score_threshold=0.3,
    iou_threshold=0.5,
)
RESIZES = st.sampled_from(["stretch", "crop", "letterbox"])
SIDES = st.integers(1, 900)
NOTHING = -30.0  # the logit of a cell that sees no object


def outputs_of(spec: Spec, rng: np.random.Generator | None = None) -> Outputs:
    """All cells empty, or random ones."""
    outputs = {}
    for stride in spec.strides:
        cells = (spec.input_size[0] // stride, spec.input_size[1] // stride)
        classes = (1, len(spec.class_names), *cells)
        outputs[f"classes_{stride}"] = np.full(classes, NOTHING, np.float32)
        outputs[f"boxes_{stride}"] = np.zeros((1, 4, *cells), np.float32)
        if rng:
            outputs[f"classes_{stride}"] = rng.normal(-1, 2, classes).astype(np.float32)
            outputs[f"boxes_{stride}"] = rng.normal(0.5, 0.7, (1, 4, *cells)).astype(np.float32)
    return outputs


def show(outputs: Outputs, stride: int, cell: tuple[int, int], class_id: int, logit: float, box: Any) -> None:
    """Makes one cell (row, column) see a box, whose edges are pixels of the network's input."""
    y, x = (cell[0] + 0.5) * stride, (cell[1] + 0.5) * stride
    distances = np.array([x - box[0], y - box[1], box[2] - x, box[3] - y])
    outputs[f"classes_{stride}"][0, class_id, cell[0], cell[1]] = logit
    outputs[f"boxes_{stride}"][0, :, cell[0], cell[1]] = np.log(distances / stride)


def slow_detect(outputs: Outputs, spec: Spec, size: Size, min_score: float) -> Results:
    """Cell by cell, box by box, as one would explain it."""
    place, found = runner.placement(size, spec), []
    for stride in spec.strides:
        logits, logarithms = outputs[f"classes_{stride}"][0], outputs[f"boxes_{stride}"][0]
        for class_id, row, column in np.ndindex(*logits.shape):
            score = 1 / (1 + math.exp(-float(logits[class_id, row, column])))
            if score < min_score:
                continue
            left, top, right, bottom = (math.exp(float(value)) * stride for value in logarithms[:, row, column])
            x, y = (column + 0.5) * stride, (row + 0.5) * stride
            xs = [min(max(place.left + place.step_x * edge, 0), size[1]) for edge in (x - left, x + right)]
            ys = [min(max(place.top + place.step_y * edge, 0), size[0]) for edge in (y - top, y + bottom)]
            if xs[0] < xs[1] and ys[0] < ys[1]:
                found.append((score, class_id, [xs[0], ys[0], xs[1], ys[1]]))
    kept: list[tuple[float, int, list[float]]] = []
    for box in sorted(found, key=lambda box: -box[0]):
        if not any(box[1] == other[1] and iou(box[2], other[2]) > spec.iou_threshold for other in kept):
            kept.append(box)
    return [
        {"label": spec.class_names[class_id], "class_id": class_id, "score": score, "box": box}
        for score, class_id, box in kept
    ]


def iou(a: list[float], b: list[float]) -> float:
    width, height = min(a[2], b[2]) - max(a[0], b[0]), min(a[3], b[3]) - max(a[1], b[1])
    shared = max(width, 0) * max(height, 0)
    areas = [(box[2] - box[0]) * (box[3] - box[1]) for box in (a, b)]
    return shared / (sum(areas) - shared)


def assert_same(actual: Results, expected: Results) -> None:
    assert [(found["label"], found["class_id"]) for found in actual] == [
        (wanted["label"], wanted["class_id"]) for wanted in expected
    ]
    for found, wanted in zip(actual, expected, strict=True):
        assert set(found) == {"label", "class_id", "score", "box"}
        assert found["score"] == pytest.approx(wanted["score"], rel=1e-9)
        assert found["box"] == pytest.approx(wanted["box"], abs=1e-6)


# ---------------------------------------------------------------------------------------------------------------
# detect


@settings(deadline=None, max_examples=40)
@given(st.integers(0, 2**32 - 1), SIDES, SIDES, RESIZES, st.sampled_from([0.05, 0.2, 0.8]))
def test_boxes_are_those_of_the_slow_and_plain_way(
    seed: int, height: int, width: int, resize: str, min_score: float
) -> None:
    spec = replace(SPEC, resize=resize)
    outputs = outputs_of(spec, np.random.default_rng(seed))
    expected = slow_detect(outputs, spec, (height, width), min_score)
    assert_same(runner.detect(outputs, spec, (height, width), min_score=min_score), expected)
    assert_same(runner.detect(outputs, spec, (height, width), 4, min_score), expected[:4])
    assert_same(runner.detect(outputs, spec, (height, width), 0, min_score), expected)


def test_a_box_is_worked_by_hand() -> None:
    """Cell (1, 2) of stride 16 has its middle at x = 40, y = 24; the photo is 10 times as wide, 5 times as high."""
    outputs = outputs_of(SPEC)
    outputs["classes_16"][0, 1, 1, 2] = math.log(3)  # 3 to 1: 0.75
    outputs["boxes_16"][0, :, 1, 2] = np.log([2, 0.5, 1, 1.5])  # 32, 8, 16 and 24 pixels
    (result,) = runner.detect(outputs, SPEC, (320, 960))
    assert (result["label"], result["class_id"]) == ("white", 1)
    assert result["score"] == pytest.approx(0.75)
    assert result["box"] == pytest.approx([80, 80, 560, 240], abs=1e-3)
    assert json.loads(json.dumps([result])) == [result]  # no numpy types
    assert runner.plain([result]) == [result]


def test_the_threshold_is_the_specs_unless_another_is_asked_for() -> None:
    outputs = outputs_of(SPEC)
    for column, score in enumerate((0.9, 0.5, 0.31, 0.29, 0.02)):
        logit = math.log(score / (1 - score))
        show(outputs, 16, (1, column), 0, logit, [column * 16 + 2, 20, column * 16 + 12, 28])
    scores = {
        least: [round(result["score"], 6) for result in runner.detect(outputs, SPEC, (64, 96), min_score=least)]
        for least in (None, 0.5, 0.01, 0.95, 1.0)
    }
    assert scores == {None: [0.9, 0.5, 0.31], 0.5: [0.9, 0.5], 0.01: [0.9, 0.5, 0.31, 0.29, 0.02], 0.95: [], 1.0: []}
    assert len(runner.detect(outputs, SPEC, (64, 96), min_score=0)) > 5  # the empty cells too


def test_equal_scores_keep_the_order_of_strides_classes_rows_and_columns() -> None:
    outputs = outputs_of(SPEC)
    places = [(8, 1, (0, 3)), (8, 1, (1, 0)), (8, 2, (0, 0)), (16, 0, (2, 2)), (32, 0, (0, 1)), (32, 0, (1, 0))]
    for stride, class_id, (row, column) in reversed(places):
        x, y = (column + 0.5) * stride, (row + 0.5) * stride
        show(outputs, stride, (row, column), class_id, 2.0, [x - 1, y - 1, x + 1, y + 1])
    found = runner.detect(outputs, SPEC, SPEC.input_size)
    middles = [((row + 0.5) * stride, (column + 0.5) * stride) for stride, _, (row, column) in places]
    assert [result["class_id"] for result in found] == [class_id for _, class_id, _ in places]
    assert np.array([result["box"][1::-1] for result in found]) + 1 == pytest.approx(np.array(middles), abs=1e-5)
    assert found == runner.detect(outputs, SPEC, SPEC.input_size)


@settings(deadline=None, max_examples=150)
@given(st.data(), st.sampled_from([0.25, 0.5, 0.75]))
def test_suppression_is_torchvisions(data: st.DataObject, threshold: float) -> None:
    count = data.draw(st.integers(0, 40))
    corners = data.draw(hnp.arrays(np.float64, (count, 2), elements=st.integers(0, 40)))
    sizes = data.draw(hnp.arrays(np.float64, (count, 2), elements=st.integers(1, 30)))
    class_ids = data.draw(hnp.arrays(np.int64, count, elements=st.integers(0, 2)))
    boxes = np.hstack([corners, corners + sizes])
    for a, b in zip(*np.triu_indices(count, 1), strict=True):  # a tie is torchvision's own rounding to decide
        assume(abs(iou(boxes[a].tolist(), boxes[b].tolist()) - threshold) > 1e-6)
    scores = torch.arange(count, 0, -1, dtype=torch.float64)
    expected = batched_nms(torch.from_numpy(boxes), scores, torch.from_numpy(class_ids), threshold)
    assert runner._suppress(boxes, class_ids, threshold) == expected.tolist()


def test_equal_boxes_of_two_classes_both_stay_and_touching_ones_too() -> None:
    boxes = np.array([[0, 0, 10, 10], [0, 0, 10, 10], [10, 0, 20, 10], [0, 0, 10, 10], [5, 5, 5, 9]], float)
    assert runner._suppress(boxes, np.array([0, 1, 0, 0, 0]), 0.0) == [0, 1, 2]
    assert runner._suppress(boxes, np.array([0, 1, 0, 0, 0]), 1.0) == [0, 1, 2, 3]  # the last one has no area
    assert runner._suppress(np.zeros((0, 4)), np.zeros(0, int), 0.5) == []


def test_boxes_reach_no_further_than_the_photo_and_those_outside_are_dropped() -> None:
    spec = replace(SPEC, resize="letterbox")
    size = (100, 300)  # 32 rows of the input, with bars of 16 above and below
    outputs = outputs_of(spec)
    show(outputs, 8, (4, 5), 0, 3.0, [-200, -200, 400, 500])
    show(outputs, 8, (0, 2), 1, 2.0, [1, 1, 90, 15.9])  # in the bar above
    show(outputs, 8, (7, 2), 2, 1.0, [1, 40, 90, 63])
    found = runner.detect(outputs, spec, size)
    assert [result["label"] for result in found] == ["red", "platelet"]
    assert found[0]["box"] == [0, 0, 300, 100]
    assert found[1]["box"] == pytest.approx([3.125, 75, 281.25, 100], abs=1e-3)


def test_only_so_many_boxes_are_looked_at_the_best_ones() -> None:
    spec = replace(SPEC, input_size=(256, 512), iou_threshold=1.0)
    outputs = outputs_of(spec, np.random.default_rng(0))
    found = runner.detect(outputs, spec, (256, 512), min_score=0)
    everything = np.concatenate([outputs[f"classes_{stride}"].ravel() for stride in spec.strides])
    assert len(found) == runner.CANDIDATES < len(everything)
    best = np.sort(1 / (1 + np.exp(-everything.astype(float))))[::-1][: runner.CANDIDATES]
    assert [result["score"] for result in found] == pytest.approx(best)


@pytest.mark.parametrize("value", [3e38, -3e38, 800.0, -800.0])
def test_any_finite_output_gives_boxes_in_the_photo_without_a_warning(value: float) -> None:
    outputs = outputs_of(SPEC)
    outputs["classes_8"][0, 0, 3, 3] = abs(value)
    outputs["classes_8"][0, 1] = -abs(value)
    outputs["boxes_8"][:] = value
    found = runner.detect(outputs, SPEC, (70, 90), min_score=0)
    assert all(0 <= edge <= 90 for result in found for edge in result["box"])
    if value > 0:
        assert found[0] == {"label": "red", "class_id": 0, "score": 1.0, "box": [0, 0, 90, 70]}


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("name", ["classes_8", "boxes_32"])
def test_an_output_that_is_no_number_has_no_answer(name: str, value: float) -> None:
    outputs = outputs_of(SPEC)
    outputs[name][0, 0, 0, 0] = value
    with pytest.raises(RunnerError, match="not finite"):
        runner.detect(outputs, SPEC, (64, 96))


# ---------------------------------------------------------------------------------------------------------------
# Where the input lies in a photo


@st.composite
def photos_with_a_box(draw: st.DrawFn) -> tuple[Spec, Size, np.ndarray]:
    """A spec, a photo's size, and a box in it: [left, top, right, bottom]."""
    input_size = (32 * draw(st.integers(1, 4)), 32 * draw(st.integers(1, 4)))
    spec = replace(SPEC, resize=draw(RESIZES), input_size=input_size, strides=(1, 8, 32))
    height, width = draw(SIDES), draw(SIDES)
    xs, ys = (sorted(draw(st.tuples(st.floats(0, side), st.floats(0, side)))) for side in (width, height))
    return spec, (height, width), np.array([xs[0], ys[0], xs[1], ys[1]])


def to_input(size: Size, spec: Spec, box: np.ndarray) -> np.ndarray:
    """A box in the photo → in the network's input, from what each way of resizing means."""
    (height, width), (h, w) = size, spec.input_size
    if spec.resize == "stretch":
        part, target = (0, 0, width, height), (0, 0, w, h)
    elif spec.resize == "crop":
        part_width, part_height = min(width, max(1, round(height * w / h))), min(height, max(1, round(width * h / w)))
        part, target = ((width - part_width) // 2, (height - part_height) // 2, part_width, part_height), (0, 0, w, h)
    else:
        new_width, new_height = min(w, max(1, round(h * width / height))), min(h, max(1, round(w * height / width)))
        part, target = (0, 0, width, height), ((w - new_width) // 2, (h - new_height) // 2, new_width, new_height)
    xs = target[0] + (box[[0, 2]] - part[0]) * target[2] / part[2]
    ys = target[1] + (box[[1, 3]] - part[1]) * target[3] / part[3]
    return np.array([xs[0], ys[0], xs[1], ys[1]])


@settings(deadline=None, max_examples=300)
@given(photos_with_a_box(), st.data())
def test_an_objects_box_comes_back_in_pixels_of_the_photo(
    photo: tuple[Spec, Size, np.ndarray], data: st.DataObject
) -> None:
    """Any cell of any stride whose middle lies in the box may be the one that sees it."""
    spec, size, box = photo
    seen = to_input(size, spec, box)
    stride = data.draw(st.sampled_from(spec.strides))
    middles = [np.arange(side // stride) * stride + stride / 2 for side in spec.input_size]
    rows = np.flatnonzero((middles[0] > seen[1] + 1e-3) & (middles[0] < seen[3] - 1e-3))
    columns = np.flatnonzero((middles[1] > seen[0] + 1e-3) & (middles[1] < seen[2] - 1e-3))
    assume(len(rows) and len(columns))
    outputs = outputs_of(spec)
    show(outputs, stride, (int(data.draw(st.sampled_from(rows))), int(data.draw(st.sampled_from(columns)))), 2, 4, seen)
    (result,) = runner.detect(outputs, spec, size)
    assert result["label"] == "platelet"
    assert np.abs(np.array(result["box"]) - box).max() < 1e-3


@settings(deadline=None, max_examples=150)
@given(photos_with_a_box())
def test_a_painted_box_is_seen_where_the_input_has_it(photo: tuple[Spec, Size, np.ndarray]) -> None:
    """White on black, through `resize` itself: where its edges are in the input, to a pixel, is where they must be."""
    spec, size, box = photo
    left, top, right, bottom = box.round().astype(int)
    assume(left < right and top < bottom)
    image = np.zeros((*size, 3), np.uint8)
    image[top:bottom, left:right] = 255
    light = runner.resize(image, replace(spec, mean_255=(0.0, 0.0, 0.0)))[..., 1] > 127
    assume(light.any())
    place = runner.placement(size, spec)
    for edges, step, start, wanted, side in (
        (np.flatnonzero(light.any(axis=0)), place.step_x, place.left, (left, right), size[1]),
        (np.flatnonzero(light.any(axis=1)), place.step_y, place.top, (top, bottom), size[0]),
    ):
        for edge, want in zip((edges[0], edges[-1] + 1), wanted, strict=True):
            is_cut_by_the_crop = spec.resize == "crop" and edge in (0, *spec.input_size)
            found = start + step * edge
            assert is_cut_by_the_crop or abs(found - want) <= step + 0.51, (found, want, side)


@pytest.mark.parametrize(
    ("resize", "size", "expected"),
    [
        ("stretch", (640, 480), runner.Placement(0, 0, 5, 10)),
        ("letterbox", (640, 480), runner.Placement(-240, 0, 10, 10)),  # 48 columns in the middle of 96
        ("letterbox", (160, 480), runner.Placement(0, -80, 5, 5)),  # 32 rows in the middle of 64
        ("crop", (640, 480), runner.Placement(0, 160, 5, 5)),
        ("crop", (64, 960), runner.Placement(432, 0, 1, 1)),
        ("stretch", (1, 1), runner.Placement(0, 0, 1 / 96, 1 / 64)),
    ],
)
def test_placements_are_worked_by_hand(resize: str, size: Size, expected: runner.Placement) -> None:
    assert runner.placement(size, replace(SPEC, resize=resize)) == expected


@settings(deadline=None)
@given(
    st.integers(1, 200),
    st.integers(1, 200),
    st.integers(1, 64),
    st.integers(1, 64),
    st.sampled_from(["linear", "area"]),
    st.sampled_from(["rgb", "bgr"]),
)
def test_a_letterbox_is_the_resized_image_between_bars_of_the_mean(
    height: int, width: int, to_height: int, to_width: int, interpolation: str, order: str
) -> None:
    spec = replace(
        SPEC, input_size=(to_height, to_width), resize="letterbox", interpolation=interpolation, color_order=order
    )
    image = np.random.default_rng(height * width).integers(0, 256, (height, width, 3), np.uint8)
    framed = runner.resize(image, spec)
    new_height = min(to_height, max(1, round(to_width * height / width)))
    new_width = min(to_width, max(1, round(to_height * width / height)))
    assert new_height == to_height or new_width == to_width  # one pair of bars at most
    top, left = (to_height - new_height) // 2, (to_width - new_width) // 2
    middle = (slice(top, top + new_height), slice(left, left + new_width))
    plain = replace(spec, resize="stretch", input_size=(new_height, new_width))
    assert framed.dtype == np.uint8 and framed.shape == (to_height, to_width, 3)
    assert np.array_equal(framed[middle], runner.resize(image, plain))
    bars = np.ones((to_height, to_width), bool)
    bars[middle] = False
    mean = [124, 116, 104] if order == "bgr" else [104, 116, 124]  # of 123.675, 116.28, 103.53 in the spec's order
    assert (framed[bars] == mean).all()


def test_bars_are_next_to_nothing_for_the_network() -> None:
    spec = replace(SPEC, resize="letterbox")
    blob = runner.preprocess(np.full((10, 300, 3), 255, np.uint8), spec)[0]
    assert np.abs(blob[:, 0]).max() < 0.5 / 57 and blob[:, 32].min() > 2


def test_a_network_in_opencv_gives_what_detect_reads(tmp_path: Path) -> None:
    """Outputs of several strides by name, of a real session, whose cells are worked by hand."""
    spec = replace(SPEC, resize="letterbox")
    bundles.write_detector(tmp_path / "model.onnx", spec)
    session = runner.Session(tmp_path / "model.onnx")
    image = np.full((128, 192, 3), (104, 116, 124), np.uint8)  # grey, which is no class
    image[32:64, 64:128] = 255  # what the cells (1, 2) and (1, 3) of stride 16 see, twice as large
    outputs = session(runner.preprocess(image, spec))
    assert sorted(outputs) == sorted(f"{kind}_{stride}" for kind in ("boxes", "classes") for stride in spec.strides)
    found = [result for result in runner.detect(outputs, spec, (128, 192), min_score=0.5) if result["class_id"] == 0]
    boxes = {tuple(round(edge, 3) for edge in result["box"]) for result in found}
    assert {(32.0, 16.0, 128.0, 80.0), (64.0, 16.0, 160.0, 80.0)} <= boxes  # 3 cells wide, 2 high
    for left, top, right, bottom in boxes:
        assert 32 <= (top + bottom) / 2 <= 64 and 64 <= (left + right) / 2 <= 128
