"""Class maps: from a network's output to the pixels of a photo, and the runs that a mask is told as."""

import json
import math
import time
from dataclasses import replace

import bundles
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from edgekit import runner
from edgekit.runner import Results, RunnerError, Size, Spec

SPEC = replace(
    bundles.SPEC, task="segment", input_size=(32, 48), class_names=("background", "crack", "fray", "hole", "void")
)
RESIZES = st.sampled_from(["stretch", "crop", "letterbox"])
SIDES = st.integers(1, 300)
masks = hnp.arrays(bool, st.tuples(st.integers(1, 12), st.integers(1, 12)))


def logits_of(classes: np.ndarray, count: int = 5) -> dict[str, np.ndarray]:
    """A network's output that is sure of each cell's class."""
    return {"logits": (10 * np.eye(count, dtype=np.float32)[classes]).transpose(2, 0, 1)[None].copy()}


def class_map(results: Results, size: Size) -> np.ndarray:
    """int (height, width); -1 where no mask is. Masks never overlap."""
    classes = np.full(size, -1)
    for result in results:
        assert result["mask"].dtype == bool and result["mask"].shape == size
        assert (classes[result["mask"]] == -1).all()
        classes[result["mask"]] = result["class_id"]
    return classes


# ---------------------------------------------------------------------------------------------------------------
# segment


def test_an_answer_is_worked_by_hand() -> None:
    """Cells of 4 × 4; the photo is twice as high and as wide as the input."""
    cells = np.zeros((8, 12), int)
    cells[:, 9:], cells[:, :2] = 2, 3
    results = runner.segment(logits_of(cells), SPEC, (64, 96))
    assert [(r["label"], r["class_id"], r["share"]) for r in results] == [
        ("background", 0, 7 / 12),
        ("fray", 2, 0.25),
        ("hole", 3, 2 / 12),
    ]
    assert [set(result) for result in results] == [{"label", "class_id", "share", "mask"}] * 3
    assert np.array_equal(class_map(results, (64, 96)), cells.repeat(8, axis=0).repeat(8, axis=1))
    plain = runner.plain(results)
    assert json.loads(json.dumps(plain)) == plain and type(plain[0]["share"]) is float  # no numpy types
    assert plain[1]["mask"] == {"size": [64, 96], "counts": [64 * 72, 64 * 24]}
    assert plain[2]["mask"] == {"size": [64, 96], "counts": [0, 64 * 16, 64 * 80]}


def test_the_largest_are_first_and_the_small_are_left_out_when_asked() -> None:
    cells = np.repeat([4, 1, 2, 1, 0, 4, 4, 3], 12).reshape(8, 12)  # 3, 2, 1, 1, 1 rows of 8
    for top_k, min_score, classes in (
        (None, None, [4, 1, 0, 2, 3]),
        (0, 0, [4, 1, 0, 2, 3]),
        (2, None, [4, 1]),
        (None, 0.125, [4, 1, 0, 2, 3]),
        (None, 0.2, [4, 1]),
        (1, 0.2, [4]),
        (None, 1.0, []),
    ):
        results = runner.segment(logits_of(cells), SPEC, (320, 48), top_k, min_score)
        assert [result["class_id"] for result in results] == classes


@settings(deadline=None, max_examples=80)
@given(
    st.integers(0, 2**32 - 1), st.integers(1, 6), st.sampled_from([1, 2, 3, 4, 8]), st.integers(1, 9), st.integers(1, 9)
)
def test_the_class_map_is_torchs_bilinear_argmax(seed: int, count: int, k: int, rows: int, columns: int) -> None:
    logits = np.random.default_rng(seed).normal(0, 3, (1, count, rows, columns)).astype(np.float32)
    spec = replace(SPEC, input_size=(rows * k, columns * k), class_names=tuple("abcdef"[:count]))
    full = F.interpolate(torch.from_numpy(logits), size=spec.input_size, mode="bilinear", align_corners=False)[0]
    best = full.topk(min(2, count), dim=0)
    is_sure = np.ones(spec.input_size, bool) if count == 1 else (best.values[0] - best.values[1] > 1e-4).numpy()
    found = class_map(runner.segment({"logits": logits}, spec, spec.input_size), spec.input_size)
    assert np.array_equal(found[is_sure], best.indices[0].numpy()[is_sure])
    assert (found >= 0).all()


def test_of_equal_classes_the_first_is_taken() -> None:
    (result,) = runner.segment({"logits": np.zeros((1, 5, 8, 12), np.float32)}, SPEC, (10, 10))
    assert (result["class_id"], result["share"]) == (0, 1.0)
    (result,) = runner.segment({"logits": np.full((1, 5, 8, 12), -3e38, np.float32)}, SPEC, (10, 10))
    assert (result["class_id"], result["share"]) == (0, 1.0)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_an_output_that_is_no_number_has_no_answer(value: float) -> None:
    outputs = logits_of(np.zeros((8, 12), int))
    outputs["logits"][0, 3, 2, 1] = value
    with pytest.raises(RunnerError, match="not finite"):
        runner.segment(outputs, SPEC, (64, 96))


@settings(deadline=None, max_examples=150)
@given(SIDES, SIDES, RESIZES, st.integers(1, 64), st.integers(1, 64), st.integers(0, 2**32 - 1))
@example(1, 300, "letterbox", 32, 48, 0)
@example(300, 1, "crop", 48, 32, 0)
def test_each_pixel_of_the_photo_has_the_class_at_its_middle(
    height: int, width: int, resize: str, h: int, w: int, seed: int
) -> None:
    """A network that answers for each pixel of its input; pixels that a crop leaves out are of no class."""
    spec = replace(SPEC, input_size=(h, w), resize=resize)
    classes = np.random.default_rng(seed).integers(0, 5, (h, w))
    size = (height, width)
    found = class_map(runner.segment(logits_of(classes), spec, size), size)
    place = runner.placement(size, spec)
    xs = (np.arange(width) + 0.5 - place.left) / place.step_x
    ys = (np.arange(height) + 0.5 - place.top) / place.step_y
    # Where a middle falls on the border of two pixels of the input, rounding decides which of the two it is.
    is_clear = (np.abs(ys - ys.round()) > 1e-6)[:, None] & (np.abs(xs - xs.round()) > 1e-6)
    is_inside = ((ys > 0) & (ys < h))[:, None] & ((xs > 0) & (xs < w))
    at = classes[np.clip(np.floor(ys), 0, h - 1).astype(int)[:, None], np.clip(np.floor(xs), 0, w - 1).astype(int)]
    if resize == "letterbox":
        assert is_inside.all()
    assert np.array_equal(found[is_clear], np.where(is_inside, at, -1)[is_clear])


@st.composite
def photos_of_blocks(draw: st.DrawFn) -> tuple[Spec, Size, int]:
    """A spec and the size of a photo that has a whole number of pixels for each of the input's; and that number."""
    zoom = draw(st.integers(1, 5))
    h, w = 4 * draw(st.integers(1, 10)), 4 * draw(st.integers(1, 10))
    resize = draw(RESIZES)
    height, width = h, w
    if resize == "crop":  # more of the photo, an even part to both sides
        height, width = (h + 2 * draw(st.integers(0, 9)), w) if draw(st.booleans()) else (h, w + 2 * 3)
    elif resize == "letterbox":
        height, width = (draw(st.integers(1, h)), w) if draw(st.booleans()) else (h, draw(st.integers(1, w)))
    return replace(SPEC, input_size=(h, w), resize=resize), (zoom * height, zoom * width), zoom


@settings(deadline=None, max_examples=150)
@given(photos_of_blocks(), st.integers(0, 2**32 - 1))
def test_a_painted_mask_comes_back_whole(photo: tuple[Spec, Size, int], seed: int) -> None:
    """Each class is a shade of grey: the photo goes through `resize`, and what the input shows is what is answered."""
    spec, (height, width), zoom = photo
    blocks = np.random.default_rng(seed).integers(0, 5, (height // zoom, width // zoom))
    painted = blocks.repeat(zoom, axis=0).repeat(zoom, axis=1)
    image = np.repeat(40 * painted[..., None] + 20, 3, axis=2).astype(np.uint8)
    seen = runner.resize(image, replace(spec, interpolation="area"))
    region = runner._region((height, width), spec)
    assume(region.width == zoom * region.new_width and region.height == zoom * region.new_height)
    classes = (seen[..., 0].astype(int) // 40).clip(0, 4)
    found = class_map(runner.segment(logits_of(classes), spec, (height, width)), (height, width))
    answered = found >= 0
    assert answered.sum() == region.width * region.height
    assert np.array_equal(found[answered], painted[answered])


def test_a_full_hd_photo_takes_a_few_milliseconds_a_class() -> None:
    """Loose, for any machine; classes at the photo's size would be over ten times slower."""
    spec = replace(SPEC, input_size=(512, 512), class_names=tuple("abcdefghijklmnopqrstu"))
    logits = np.random.default_rng(0).normal(0, 1, (1, 21, 128, 128)).astype(np.float32)
    times = []
    for _ in range(3):
        start = time.process_time()
        results = runner.segment({"logits": logits}, spec, (1080, 1920))
        times.append(time.process_time() - start)
    assert len(results) == 21
    assert min(times) < 0.3


# ---------------------------------------------------------------------------------------------------------------
# Runs


@pytest.mark.parametrize(
    ("mask", "counts"),
    [
        ([[0]], [1]),
        ([[1]], [0, 1]),
        ([[0, 1], [0, 1]], [2, 2]),
        ([[1, 0], [1, 0]], [0, 2, 2]),
        ([[0, 1, 1], [1, 0, 1]], [1, 2, 1, 2]),  # down the columns: 0 1, 1 0, 1 1
        ([[1, 1, 1]], [0, 3]),
        ([[1], [0], [1]], [0, 1, 1, 1]),
    ],
)
def test_runs_are_worked_by_hand(mask: list[list[int]], counts: list[int]) -> None:
    array = np.array(mask, bool)
    ((answer),) = runner.plain([{"label": "a", "mask": array}])
    assert answer == {"label": "a", "mask": {"size": list(array.shape), "counts": counts}}
    assert np.array_equal(runner.from_rle(answer["mask"]), array)


@given(masks)
def test_a_mask_survives_its_runs(mask: np.ndarray) -> None:
    (answer,) = runner.plain([{"class_id": 1, "share": 0.5, "mask": mask}])
    assert json.loads(json.dumps(answer)) == answer
    assert sum(answer["mask"]["counts"]) == mask.size and 0 not in answer["mask"]["counts"][1:]
    assert runner.plain([answer]) == [answer]
    back = runner.from_rle(answer["mask"])
    assert back.dtype == bool and back.flags.c_contiguous and np.array_equal(back, mask)


def test_runs_of_another_image_are_refused() -> None:
    with pytest.raises(ValueError, match="cannot reshape"):
        runner.from_rle({"size": [2, 3], "counts": [1, 4]})


def test_results_without_masks_are_plain() -> None:
    results = [{"label": "a", "class_id": 0, "score": 0.25}, {"label": "b", "box": [0.0, 1.0, 2.0, 3.0]}]
    assert runner.plain(results) == results and runner.plain([]) == []
