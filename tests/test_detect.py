import json
import math
import time
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from edgekit import backbones, fake_quantization, runner
from edgekit.recipe import Recipe, make_recipe
from edgekit.samples import Box, Sample
from edgekit.tasks import detect
from edgekit.tasks.detect import ClassMetrics, Metrics, Mistake, agreement, assign, loss, metric, metrics, mistakes

SMALL = "test_resnet"  # timm's own test network
NAMES = ("a", "b", "c")
SPEC = runner.Spec(
    task="detect",
    input_size=(64, 64),
    resize="stretch",
    interpolation="linear",
    color_order="rgb",
    mean_255=(0.0, 0.0, 0.0),
    std_255=(255.0, 255.0, 255.0),
    class_names=NAMES,
    strides=(8, 16, 32),
    score_threshold=0.3,
    iou_threshold=0.6,
)


def recipe(backbone: str = SMALL) -> Recipe:
    return make_recipe({"task": "detect", "data": {"path": "x"}, "model": {"backbone": backbone, "pretrained": False}})


def network(class_count: int = 3, backbone: str = SMALL) -> torch.nn.Module:
    torch.manual_seed(0)
    return detect.build(recipe(backbone), NAMES[:class_count], pretrained=True)


def maps(classes: float, boxes: float, class_count: int = 2, images: int = 1) -> list[torch.Tensor]:
    """Outputs for 64x64 pixels, the same in every cell: 64, 16 and 4 cells."""
    return [
        torch.full((images, channels, side, side), value)
        for side in (8, 4, 2)
        for channels, value in ((class_count, classes), (4, boxes))
    ]


def answer(class_id: int, score: float, *box: float) -> dict[str, object]:
    return {"label": NAMES[class_id], "class_id": class_id, "score": score, "box": [float(edge) for edge in box]}


def sample(name: str, *boxes: Box) -> Sample:
    return Sample(Path(name), boxes, "")


# ---------------------------------------------------------------------------------------------------------------
# The network


def test_the_outputs_are_a_pair_of_maps_a_stride() -> None:
    model = network().eval()
    with torch.inference_mode():
        outputs = model(torch.randn(2, 3, 64, 96))
    assert detect.OUTPUTS == ("classes_8", "boxes_8", "classes_16", "boxes_16", "classes_32", "boxes_32")
    assert [tuple(each.shape) for each in outputs] == [
        (2, channels, 64 // stride, 96 // stride) for stride in (8, 16, 32) for channels in (3, 4)
    ]


def test_a_new_head_sees_nothing_and_boxes_of_some_strides() -> None:
    model = network().eval()
    with torch.inference_mode():
        outputs = model(torch.randn(2, 3, 64, 64))
    for classes, boxes in zip(outputs[0::2], outputs[1::2], strict=True):
        assert ((classes.sigmoid() > 0.005) & (classes.sigmoid() < 0.02)).all()
        assert ((boxes.exp() > 2) & (boxes.exp() < 4)).all()


def test_trunk_and_head_are_the_network() -> None:
    model = network()
    parts = [*detect.trunk(model).parameters(), *detect.head(model).parameters()]
    assert [id(each) for each in parts] == [id(each) for each in model.parameters()]
    assert [name for name, _ in backbones.stages(detect.trunk(model))][-4:] == [f"layer{i}" for i in range(1, 5)]


# ---------------------------------------------------------------------------------------------------------------
# Which cells a box trains


def cells_of(*sides: int) -> torch.Tensor:
    """Centres of square maps over 64 pixels, as (cells, 2)."""
    return torch.cat(
        [
            torch.tensor([[(x + 0.5) * 64 / side, (y + 0.5) * 64 / side] for y in range(side) for x in range(side)])
            for side in sides
        ]
    )


def around(centres: torch.Tensor, distance: float) -> torch.Tensor:
    return torch.cat([centres - distance, centres + distance], dim=1)


def test_cells_inside_a_box_worked_by_hand() -> None:
    centres = cells_of(8)  # 4, 12, 20, ... 60
    boxes = around(centres, 8.0)  # 16x16 about each centre
    scores = torch.full((64, 2), 0.25)
    # The box from 4 to 28 holds the centres 12 and 20, in both directions: four cells.
    owner, target = assign(scores, boxes, centres, torch.tensor([[1.0, 4.0, 4.0, 28.0, 28.0]]))
    inside = [8 + 1, 8 + 2, 16 + 1, 16 + 2]
    assert (owner >= 0).nonzero().flatten().tolist() == inside
    # Each 16x16 box lies wholly inside the 24x24 one: IoU 256/576, all aligned alike.
    assert target[inside].tolist() == pytest.approx([256 / 576] * 4)
    assert float(target.sum()) == pytest.approx(4 * 256 / 576)


def test_alignment_weighs_score_and_iou() -> None:
    centres = cells_of(8)
    truth = torch.tensor([[0.0, 8.0, 0.0, 24.0, 8.0]])  # holds the centres (12, 4) and (20, 4)
    boxes = torch.zeros(64, 4)
    boxes[1] = torch.tensor([8.0, 0.0, 24.0, 8.0])  # IoU 1
    boxes[2] = torch.tensor([8.0, 0.0, 16.0, 8.0])  # IoU 1/2
    scores = torch.full((64, 1), 0.01)
    scores[2] = 0.64
    owner, target = assign(scores, boxes, centres, truth)
    assert (owner >= 0).nonzero().flatten().tolist() == [1, 2]
    # alignments 0.1 * 1 and 0.8 / 64, the larger one worth the better IoU
    assert target[[1, 2]].tolist() == pytest.approx([1.0, 0.8 / 64 / 0.1])


def test_the_best_cells_of_many_are_taken() -> None:
    centres = cells_of(8, 4, 2)
    owner, _ = assign(
        torch.full((84, 1), 0.01), around(centres, 10.0), centres, torch.tensor([[0.0, 0.0, 0.0, 64.0, 64.0]])
    )
    assert int((owner == 0).sum()) == detect.CELLS


def test_a_cell_goes_to_the_box_that_it_overlaps_most() -> None:
    centres = cells_of(8)
    truth = torch.tensor([[0.0, 0.0, 0.0, 16.0, 16.0], [1.0, 0.0, 0.0, 32.0, 32.0]])
    owner, _ = assign(torch.full((64, 2), 0.5), around(centres, 8.0), centres, truth)
    both = [0, 1, 8, 9]  # in the small box, whose IoU with these cells' boxes is the larger one
    assert owner[both].tolist() == [0, 0, 0, 0]
    assert int((owner == 1).sum()) in (9, 10)  # of the 16 in the large box 13; its four corners are equals


def test_a_box_smaller_than_a_cell_gets_the_nearest_one_and_is_worth_learning() -> None:
    centres = cells_of(8, 4, 2)
    boxes = around(centres, 0.5)  # none meets the box
    owner, target = assign(torch.full((84, 1), 0.01), boxes, centres, torch.tensor([[0.0, 9.5, 9.5, 11.0, 11.0]]))
    assert (owner >= 0).nonzero().flatten().tolist() == [9]  # the centre (12, 12)
    assert float(target[9]) == pytest.approx(detect.LEAST_TARGET)


def test_boxes_that_want_the_same_cell_each_get_one() -> None:
    centres = cells_of(8, 4, 2)
    truth = torch.tensor([[0.0, 2.0, 2.0, 6.0, 6.0]] * 5)
    owner, target = assign(torch.full((84, 1), 0.01), around(centres, 2.0), centres, truth)
    assert sorted(owner[owner >= 0].tolist()) == [0, 1, 2, 3, 4]
    assert owner[0] >= 0
    assert (target[owner >= 0] >= detect.LEAST_TARGET).all()


def test_more_boxes_than_cells() -> None:
    centres = cells_of(2)
    truth = torch.tensor([[0.0, 2.0, 2.0, 6.0, 6.0]] * 7)
    owner, _ = assign(torch.full((4, 1), 0.01), around(centres, 2.0), centres, truth)
    assert len(set(owner.tolist())) == 4


def test_no_boxes() -> None:
    owner, target = assign(torch.rand(84, 2), torch.rand(84, 4), cells_of(8, 4, 2), torch.zeros(0, 5))
    assert (owner == -1).all()
    assert not target.any()


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 10**6), count=st.integers(1, 40), largest=st.sampled_from([2.0, 10.0, 64.0]))
def test_every_box_gets_a_cell(seed: int, count: int, largest: float) -> None:
    random = torch.Generator().manual_seed(seed)
    centres = cells_of(8, 4, 2)
    corners = torch.rand(count, 2, generator=random) * 62
    sizes = 0.5 + torch.rand(count, 2, generator=random) * largest
    classes = torch.randint(0, 2, (count, 1), generator=random)
    truth = torch.cat([classes, corners, (corners + sizes).clamp(max=64)], dim=1)
    boxes = around(centres, 1.0) + torch.randn(84, 4, generator=random)
    owner, target = assign(torch.rand(84, 2, generator=random), boxes, centres, truth)
    has = owner >= 0
    assert sorted(set(owner[has].tolist())) == list(range(count))
    assert (target[has] > 0).all() and (target <= 1).all() and not target[~has].any()
    for box in range(count):
        assert float(target[owner == box].max()) >= detect.LEAST_TARGET - 1e-6
        assert int((owner == box).sum()) <= detect.CELLS


# ---------------------------------------------------------------------------------------------------------------
# The loss


# The loss of a cell that should see nothing and says -2: weighed by its score.
NOTHING = math.log1p(math.exp(-2)) / (1 + math.exp(2))


def test_the_loss_worked_by_hand() -> None:
    """One box about one cell's centre; that cell's box is right, so only the classes are wrong."""
    outputs = maps(classes=-2.0, boxes=math.log(2 / 8))
    label = np.array([[1, 2, 2, 6, 6]], np.float32)
    expected = (84 * 2 - 1) * NOTHING + math.log1p(math.exp(2))
    assert float(loss(outputs, (label,), recipe())) == pytest.approx(expected, rel=1e-5)


def test_the_boxes_share_of_the_loss_worked_by_hand() -> None:
    """The cell's box is 8x8 where 4x4 is right: IoU 1/4, the same middle, the same shape."""
    outputs = maps(classes=-2.0, boxes=math.log(4 / 8))
    label = np.array([[1, 2, 2, 6, 6]], np.float32)
    classes = (84 * 2 - 1) * NOTHING + math.log1p(math.exp(-2)) + 2 * 0.25
    assert float(loss(outputs, (label,), recipe())) == pytest.approx(classes + 2 * 0.75 * 0.25, rel=1e-5)


def test_rows_and_columns_are_not_mixed_up() -> None:
    """32x64 pixels: the box lies where only the width reaches."""
    outputs = [each[..., : each.shape[-1] // 2, :] for each in maps(classes=-2.0, boxes=math.log(2 / 8))]
    label = np.array([[1, 34, 2, 38, 6]], np.float32)
    expected = (42 * 2 - 1) * NOTHING + math.log1p(math.exp(2))
    assert float(loss(outputs, (label,), recipe())) == pytest.approx(expected, rel=1e-5)


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 2**32 - 1),
    size=st.tuples(st.integers(1, 4), st.integers(1, 4)).map(lambda sides: (32 * sides[0], 32 * sides[1])),
    class_count=st.integers(1, 3),
)
def test_the_runner_answers_with_the_boxes_that_the_loss_sees(
    seed: int, size: tuple[int, int], class_count: int
) -> None:
    """Else one thing would be learnt and another answered. No score is another's, so each box is known by its rank."""
    random = np.random.default_rng(seed)
    sides = [(size[0] // stride, size[1] // stride) for stride in detect.STRIDES]
    count = class_count * sum(height * width for height, width in sides)
    logits = iter(random.permutation(np.linspace(-6, 6, count)).astype(np.float32))
    outputs = {}
    for stride, side in zip(detect.STRIDES, sides, strict=True):
        shape = (1, class_count, *side)
        outputs[f"classes_{stride}"] = np.fromiter(logits, np.float32, math.prod(shape)).reshape(shape)
        outputs[f"boxes_{stride}"] = random.normal(0.5, 1.5, (1, 4, *side)).clip(-6, 5).astype(np.float32)
    spec = replace(SPEC, input_size=size, class_names=NAMES[:class_count], iou_threshold=1.0)
    answers = runner.detect(outputs, spec, size, min_score=0.0)

    maps = [torch.from_numpy(outputs[name]) for name in detect.OUTPUTS]
    boxes = detect._decode(detect._flat(maps[1::2]), *detect._cells(maps[0::2]))[0].numpy()
    order = np.argsort(-detect._flat(maps[0::2])[0].numpy().ravel())
    in_photo = boxes[order // class_count].clip(0, (size[1], size[0]) * 2)
    assert [answer["class_id"] for answer in answers] == (order % class_count).tolist()
    np.testing.assert_allclose([answer["box"] for answer in answers], in_photo, rtol=1e-5, atol=1e-3)


def test_a_rare_class_weighs_more() -> None:
    outputs = maps(classes=-2.0, boxes=math.log(2 / 8))
    label = np.array([[c, x - 2, 2, x + 2, 6] for c, x in ((0, 4), (0, 12), (0, 20), (0, 28), (1, 36))], np.float32)
    each = [count * math.log1p(math.exp(2)) + (84 - count) * NOTHING for count in (4, 1)]
    expected = ((5 / 4) ** 0.75 * each[0] + 5**0.75 * each[1]) / 5
    assert float(loss(outputs, (label,), recipe())) == pytest.approx(expected, rel=1e-5)


def test_images_without_boxes_are_background() -> None:
    outputs = maps(classes=-2.0, boxes=0.0, images=2)
    empty = np.zeros((0, 5), np.float32)
    assert float(loss(outputs, (empty, empty), recipe())) == pytest.approx(2 * 84 * 2 * NOTHING)


def test_labels_without_area_are_left_out() -> None:
    outputs = maps(classes=-2.0, boxes=0.0)
    flat = np.array([[0, 5, 5, 5, 9], [1, 9, 9, 4, 12]], np.float32)
    assert float(loss(outputs, (flat,), recipe())) == pytest.approx(84 * 2 * NOTHING)


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    scale=st.sampled_from([0.0, 1.0, 30.0, 1e4]),
    boxes=st.lists(
        hnp.arrays(np.float32, (4,), elements=st.floats(0, 64, width=32)).map(
            lambda edges: [1, *np.sort(edges[:2]), *np.sort(edges[2:])]
        ),
        max_size=6,
    ),
)
def test_the_loss_and_its_gradients_are_finite(seed: int, scale: float, boxes: list[list[float]]) -> None:
    random = torch.Generator().manual_seed(seed)
    outputs = [
        (torch.randn(each.shape, generator=random) * scale).requires_grad_() for each in maps(0.0, 0.0, images=2)
    ]
    label = np.array([[c, left, top, right, bottom] for c, left, right, top, bottom in boxes], np.float32)
    found = loss(outputs, (label.reshape(-1, 5), np.zeros((0, 5), np.float32)), recipe())
    found.backward()
    found = found.detach()
    assert found.dtype == torch.float32
    assert bool(torch.isfinite(found))
    assert all(bool(torch.isfinite(each.grad).all()) for each in outputs if each.grad is not None)


def test_the_loss_is_float32_under_autocast() -> None:
    outputs = [each.bfloat16() for each in maps(classes=-2.0, boxes=math.log(2 / 8))]
    label = np.array([[1, 2, 2, 6, 6]], np.float32)
    with torch.autocast("cpu", torch.bfloat16):
        found = loss(outputs, (label,), recipe())
    assert found.dtype == torch.float32
    assert float(found) == pytest.approx((84 * 2 - 1) * NOTHING + math.log1p(math.exp(2)), rel=1e-2)


def squares(count: int, seed: int) -> tuple[torch.Tensor, tuple[np.ndarray, ...]]:
    """Noise with a bright square (class 0) and a dark one (class 1) in each image, 64x64."""
    random = np.random.default_rng(seed)
    images = random.normal(0, 0.2, (count, 3, 64, 64)).astype(np.float32)
    labels = []
    for image in images:
        rows = []
        for class_id, half in ((0, 0), (1, 32)):
            side = int(random.integers(12, 28))
            left, top = int(random.integers(0, 64 - side)), half + int(random.integers(0, 32 - side))
            image[:, top : top + side, left : left + side] += 2 if class_id == 0 else -2
            rows.append([class_id, left, top, left + side, top + side])
        labels.append(np.array(rows, np.float32))
    return torch.from_numpy(images), tuple(labels)


def answers_of(outputs: tuple[torch.Tensor, ...], count: int) -> list[list[dict[str, object]]]:
    """What the contract says of the outputs, without the suppression of what overlaps: the best box of each class."""
    logits = [each.flatten(2) for each in outputs[0::2]]
    edges = []
    for stride, each in zip(detect.STRIDES, outputs[1::2], strict=True):
        rows, columns = torch.meshgrid(*(torch.arange(n) for n in each.shape[2:]), indexing="ij")
        x, y = (columns + 0.5) * stride, (rows + 0.5) * stride
        left, top, right, bottom = (each.exp() * stride).unbind(1)
        edges.append(torch.stack([x - left, y - top, x + right, y + bottom], 1).flatten(2))
    scores, boxes = torch.cat(logits, 2).sigmoid(), torch.cat(edges, 2)
    best = scores.argmax(2)
    return [
        [
            answer(c, float(scores[i, c, best[i, c]]), *boxes[i, :, best[i, c]].clamp(0, 64).tolist())
            for c in range(scores.shape[1])
        ]
        for i in range(count)
    ]


def test_a_few_steps_find_squares() -> None:
    model = network(2)
    images, labels = squares(8, seed=1)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    model.train()
    for _ in range(60):
        found = loss(model(images), labels, recipe())
        optimizer.zero_grad()
        found.backward()
        optimizer.step()
    model.eval()
    with torch.inference_mode():
        answers = answers_of(model(images), len(images))
    truth = [sample(str(i), *(Box(int(c), *edges) for c, *edges in label.tolist())) for i, label in enumerate(labels)]
    assert metric(answers, truth) > 0.9


def test_a_fake_quantized_network_learns() -> None:
    model = network(2)
    fake_quantization.fake_quantize(model)
    model.train()
    images, labels = squares(2, seed=1)
    loss(model(images), labels, recipe()).backward()
    assert all(each.grad is not None and bool(torch.isfinite(each.grad).all()) for each in model.parameters())
    plain = network(2)
    plain.load_state_dict(fake_quantization.plain_state(model))


# ---------------------------------------------------------------------------------------------------------------
# Figures


def true(class_id: int, *edges: float) -> dict[str, Any]:
    """A box of the truth as Mistake shows it."""
    return {"label": NAMES[class_id], "class_id": class_id, "box": list(edges)}


# Three boxes of "a"; the best answer is right, the next one lies in an image without boxes, the third is right.
TRUTH = [
    sample("0.png", Box(0, 0, 0, 10, 10), Box(0, 20, 20, 40, 40)),
    sample("1.png", Box(0, 5, 5, 25, 25)),
    sample("2.png"),
]
ANSWERS = [[answer(0, 0.9, 0, 0, 10, 10)], [answer(0, 0.7, 5, 5, 25, 25)], [answer(0, 0.8, 1, 1, 30, 30)]]


def test_metrics_worked_by_hand() -> None:
    # Precision 1 up to a recall of 1/3 (0, 0.01, ... 0.33), 2/3 up to 2/3 (0.34, ... 0.66), then 0.
    ap = pytest.approx((34 + 33 * 2 / 3) / 101)
    share = pytest.approx(2 / 3)
    assert metrics(ANSWERS, TRUTH, ("a", "b")) == Metrics(
        map=ap,
        map50=ap,
        map75=ap,
        best_f1_score=0.7,  # F1 from 0.9 on: 2/4, from 0.8: 2/5, from 0.7: 4/6
        per_class=(ClassMetrics("a", 3, ap, ap, share, share, share), ClassMetrics("b", 0, None, None, 0, 0, 0)),
        pr_curves={"a": pytest.approx((1.0,) * 34 + (2 / 3,) * 33 + (0.0,) * 34)},
    )
    assert metric(ANSWERS, TRUTH) == ap


def test_answers_in_images_without_boxes_are_false() -> None:
    assert metric([ANSWERS[0], ANSWERS[1], []], TRUTH) == pytest.approx(67 / 101)
    assert metric(ANSWERS, TRUTH) < 67 / 101


def test_a_box_that_is_off_counts_at_the_lower_ious() -> None:
    truth = [sample("0.png", Box(1, 0, 0, 10, 10))]
    found = metrics([[answer(1, 0.5, 0, 0, 15, 10)]], truth, NAMES)  # IoU 2/3: right at 0.5, 0.55, 0.6 and 0.65
    assert (found.map, found.map50, found.map75) == (pytest.approx(0.4), pytest.approx(1.0), 0.0)
    assert found.per_class[1] == ClassMetrics("b", 1, pytest.approx(1.0), pytest.approx(0.4), 1.0, 1.0, 1.0)


def test_the_mean_is_over_the_classes_with_boxes() -> None:
    truth = [sample("0.png", Box(0, 0, 0, 10, 10), Box(1, 0, 0, 10, 10))]
    found = [[answer(0, 0.9, 0, 0, 10, 10), answer(2, 0.8, 0, 0, 10, 10)]]
    figures = metrics(found, truth, NAMES)
    assert figures.map50 == pytest.approx(0.5) == metric(found, truth)
    assert list(figures.pr_curves) == ["a", "b"]
    assert figures.pr_curves["b"] == (0.0,) * 101


def test_one_box_is_found_once() -> None:
    truth = [sample("0.png", Box(0, 0, 0, 10, 10))]
    figures = metrics([[answer(0, 0.9, 0, 0, 10, 10), answer(0, 0.9, 0, 0, 10, 10)]], truth, NAMES)
    assert figures.per_class[0].precision == 0.5  # of one score both count together
    assert figures.map50 == pytest.approx(1.0)


def test_answers_of_one_score_count_together() -> None:
    """The best F1 is not where only the right one of those with 0.5 counted."""
    truth = [sample("0.png", Box(0, 0, 0, 10, 10), Box(0, 20, 20, 30, 30))]
    wrong = [answer(0, 0.5, 50, 50, 60, 60)] * 3
    found = [[answer(0, 0.9, 0, 0, 10, 10), answer(0, 0.5, 20, 20, 30, 30), *wrong]]
    assert metrics(found, truth, NAMES).best_f1_score == 0.9  # 2/3; with those of 0.5: 4/7


def test_nothing_to_measure() -> None:
    with pytest.raises(ValueError, match="no images"):
        metrics([], [], NAMES)
    empty = metrics([[]], [sample("0.png")], NAMES)
    assert (empty.map, empty.map50, empty.map75, empty.best_f1_score, empty.pr_curves) == (0.0, 0.0, 0.0, 1.0, {})
    assert metric([[]], [sample("0.png")]) == 0.0
    assert metrics([[]], TRUTH[1:2], NAMES).per_class[0] == ClassMetrics("a", 1, 0.0, 0.0, 0.0, 0.0, 0.0)


def test_figures_are_plain() -> None:
    found = metrics(ANSWERS, TRUTH, NAMES).to_dict()
    assert json.loads(json.dumps(found))["pr_curves"]["a"][0] == pytest.approx(1.0)
    json.dumps([asdict(each) for each in mistakes(ANSWERS, TRUTH, NAMES)])


def test_mistakes_are_those_with_most_wrong_first() -> None:
    truth = [
        *TRUTH,
        sample("3.png", Box(1, 0, 0, 10, 10), Box(2, 0, 0, 9, 9)),  # both missed, and a false one
        sample("4.png", Box(0, 0, 0, 10, 10)),  # all right
    ]
    found = [
        *ANSWERS,
        [answer(0, 0.75, 0, 0, 10, 10), answer(0, 0.02, 30, 30, 40, 40)],
        [answer(0, 0.95, 0, 0, 10, 10)],
    ]
    expected = (
        Mistake("3.png", 2, 1, (true(1, 0, 0, 10, 10), true(2, 0, 0, 9, 9)), (answer(0, 0.75, 0, 0, 10, 10),)),
        Mistake("0.png", 1, 0, (true(0, 0, 0, 10, 10), true(0, 20, 20, 40, 40)), (answer(0, 0.9, 0, 0, 10, 10),)),
        Mistake("2.png", 0, 1, (), (answer(0, 0.8, 1, 1, 30, 30),)),
    )
    assert mistakes(found, truth, NAMES) == expected
    assert mistakes(found, truth, NAMES, limit=1) == expected[:1]
    assert mistakes([[answer(0, 0.9, 5, 5, 25, 25)]], TRUTH[1:2], NAMES) == ()


def test_agreement_worked_by_hand() -> None:
    mine = [[answer(0, 0.9, 0, 0, 10, 10), answer(1, 0.8, 20, 0, 30, 10), answer(0, 0.29, 50, 50, 60, 60)], []]
    theirs = [[answer(0, 0.5, 0, 0, 15, 10), answer(2, 0.8, 20, 0, 30, 10)], [answer(0, 0.3, 0, 0, 1, 1)]]
    assert agreement(mine, theirs, SPEC) == 2 * 1 / 5  # one pair; the class differs; below the threshold; alone
    assert agreement(mine, mine, SPEC) == 1.0
    assert agreement([[]], [[]], SPEC) == 1.0
    # One to one: the two boxes of one cannot both be the same one of the other.
    assert agreement([[mine[0][0]] * 2], [[mine[0][0]]], SPEC) == pytest.approx(2 / 3)


def test_the_guards_figure_is_quick() -> None:
    random = np.random.default_rng(0)

    def edges(count: int) -> np.ndarray:
        corners = random.uniform(0, 300, (count, 2))
        return np.concatenate([corners, corners + random.uniform(5, 100, (count, 2))], axis=1)

    truth = [sample(str(i), *(Box(int(random.integers(3)), *row) for row in edges(15).tolist())) for i in range(100)]
    found = [[answer(int(random.integers(3)), random.random(), *row) for row in edges(100).tolist()] for _ in truth]
    start = time.process_time()
    metric(found, truth)
    assert time.process_time() - start < 1
