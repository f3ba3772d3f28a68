import json
import time
from dataclasses import asdict, replace
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from edgekit import backbones, fake_quantization, runner
from edgekit.recipe import Recipe, make_recipe
from edgekit.samples import VOID, Mask, Sample
from edgekit.tasks import segment
from edgekit.tasks.segment import ClassMetrics, Metrics, Mistake, agreement, loss, metric, metrics, mistakes

NAMES = ("a", "b", "c")
SPEC = runner.Spec(
    task="segment",
    input_size=(64, 64),
    resize="stretch",
    interpolation="linear",
    color_order="rgb",
    mean_255=(0.0, 0.0, 0.0),
    std_255=(255.0, 255.0, 255.0),
    class_names=NAMES,
)


def recipe() -> Recipe:
    return make_recipe(
        {
            "task": "segment",
            "data": {"path": "x"},
            "model": {"backbone": "test_resnet", "pretrained": False},
        }
    )


def network(class_count: int = 3) -> torch.nn.Module:
    torch.manual_seed(0)
    return segment.build(recipe(), NAMES[:class_count], pretrained=True)


def rle(mask: np.ndarray) -> dict[str, object]:
    """COCO's uncompressed RLE: lengths of runs, column by column, zeros first."""
    flat = mask.T.reshape(-1)
    edges = np.flatnonzero(np.diff(flat)) + 1
    counts = np.diff([0, *edges, len(flat)]).tolist()
    return {"size": list(mask.shape), "counts": [0, *counts] if flat[0] else counts}


def answers_of(classes: object) -> list[dict[str, object]]:
    """A class map → plain answers."""
    found = np.array(classes)
    return [
        {"label": NAMES[k], "class_id": k, "share": float((found == k).mean()), "mask": rle(found == k)}
        for k in np.unique(found[found != VOID]).tolist()
    ]


def sample(folder: Path, name: str, classes: object) -> Sample:
    """A class map as a mask on disk, whose levels are not the class ids."""
    levels = (10, 0, 200, *range(201, 254))
    values = np.append(np.array(levels, np.uint8), np.zeros(256 - len(levels), np.uint8))
    values[VOID] = 77
    folder.mkdir(exist_ok=True)
    path = folder / f"{name}-mask.png"
    assert cv2.imwrite(str(path), values[np.array(classes, np.uint8)])
    return Sample(folder / f"{name}.jpg", Mask(path, "", levels), "")


# ---------------------------------------------------------------------------------------------------------------
# The network


def test_the_logits_are_a_quarter_of_the_image() -> None:
    model = network().eval()
    with torch.inference_mode():
        logits = model(torch.randn(2, 3, 64, 96))
    assert segment.OUTPUTS == ("logits",)
    assert logits.shape == (2, 3, 16, 24)
    assert logits.abs().max() < 1


def test_trunk_and_head_are_the_network() -> None:
    model = network()
    parts = [*segment.trunk(model).parameters(), *segment.head(model).parameters()]
    assert [id(each) for each in parts] == [id(each) for each in model.parameters()]
    assert [name for name, _ in backbones.stages(segment.trunk(model))][-1] == "layer4"


# ---------------------------------------------------------------------------------------------------------------
# The loss


def test_the_loss_worked_by_hand() -> None:
    logits = torch.log(torch.tensor([[[[0.8, 0.5, 0.4, 0.9]], [[0.2, 0.5, 0.6, 0.1]]]]))  # shares of two classes
    labels = np.array([[[0, 1, 1, VOID]]], np.uint8)
    weight = 2**-0.75  # of a pixel of class 1, which has two
    cross_entropy = -(np.log(0.8) + weight * (np.log(0.5) + np.log(0.6))) / (1 + 2 * weight)
    # Of the first and the third pixel. Class 0: the third one's error 0.4 and the first one's 0.2; with the one wrong
    # the IoU is 1/2, with both 0. Class 1: the third one's 0.4 and the first one's 0.2; with the one the IoU is 0.
    lovasz = ((0.5 * 0.4 + 0.5 * 0.2) + 0.4) / 2
    assert float(loss(logits, labels, recipe())) == pytest.approx(cross_entropy + lovasz)


def test_a_class_that_is_not_there_is_left_out() -> None:
    logits = torch.log(torch.tensor([[[[0.7]], [[0.2]], [[0.1]]]]))
    expected = -np.log(0.7) + 0.3
    assert float(loss(logits, np.array([[[0]]], np.uint8), recipe())) == pytest.approx(expected)


def test_the_loss_is_of_the_enlarged_logits() -> None:
    logits = torch.randn(2, 3, 4, 6, generator=torch.Generator().manual_seed(0))
    labels = np.random.default_rng(0).integers(0, 3, (2, 16, 24), dtype=np.uint8)
    enlarged = np.stack(
        [[cv2.resize(plane, (24, 16), interpolation=cv2.INTER_LINEAR) for plane in each] for each in logits.numpy()]
    )
    expected = loss(torch.from_numpy(enlarged), labels, recipe())
    assert float(loss(logits, labels, recipe())) == pytest.approx(float(expected), rel=1e-5)


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 2**32 - 1),
    cells=st.tuples(st.integers(1, 9), st.integers(1, 9)),
    step=st.sampled_from([1, 2, 3, 4, 8, 16]),
    class_count=st.integers(2, 5),
)
def test_the_runner_answers_with_the_class_of_the_logits_that_the_loss_enlarges(
    seed: int, cells: tuple[int, int], step: int, class_count: int
) -> None:
    """Else edges would be learnt in one place and cut in another. Where two classes are equal, rounding decides."""
    size = (cells[0] * step, cells[1] * step)
    spec = replace(SPEC, input_size=size, class_names=tuple(map(str, range(class_count))))
    logits = np.random.default_rng(seed).normal(0, 3, (1, class_count, *cells)).astype(np.float32)
    found = runner.class_map(runner.segment({"logits": logits}, spec, size), size)
    best, classes = segment._enlarged(torch.from_numpy(logits), size)[0].topk(2, dim=0)
    is_clear = (best[0] - best[1] > 1e-4).numpy()
    np.testing.assert_array_equal(found[is_clear], classes[0].numpy()[is_clear])
    assert np.count_nonzero(~is_clear) <= max(1, 0.01 * found.size)


@settings(max_examples=50, deadline=None)
@given(
    labels=hnp.arrays(np.uint8, (2, 4, 6), elements=st.sampled_from([0, 1, 2, VOID])),
    scale=st.sampled_from([0.0, 1.0, 1e4]),
    void=st.booleans(),
)
def test_the_loss_and_its_gradients_are_finite(labels: np.ndarray, scale: float, void: bool) -> None:
    logits = (torch.randn(2, 3, 2, 3, generator=torch.Generator().manual_seed(1)) * scale).requires_grad_()
    found = loss(logits, np.full_like(labels, VOID) if void else labels, recipe())
    found.backward()
    found = found.detach()
    assert bool(torch.isfinite(found))
    assert logits.grad is not None and bool(torch.isfinite(logits.grad).all())
    if void:
        assert float(found) == 0


def test_void_pixels_have_no_influence() -> None:
    labels = np.array([[[0, 1, VOID, VOID]]], np.uint8)
    logits = torch.randn(1, 2, 1, 4, generator=torch.Generator().manual_seed(1))
    other = logits.clone()
    other[..., 2:] = 7.0
    other[:, 1, :, 2:] = -3.0
    assert torch.equal(loss(logits, labels, recipe()), loss(other, labels, recipe()))


def test_the_loss_is_float32_under_autocast() -> None:
    with torch.autocast("cpu", torch.bfloat16):
        found = loss(torch.zeros(1, 2, 2, 2, dtype=torch.bfloat16), np.zeros((1, 8, 8), np.uint8), recipe())
    assert found.dtype == torch.float32


def specks(count: int) -> tuple[torch.Tensor, np.ndarray]:
    """Noise with a speck of 42 pixels in each image of 96x96: one pixel in 219 is of class 1."""
    random = np.random.default_rng(3)
    images = random.normal(0, 0.5, (count, 3, 96, 96)).astype(np.float32)
    labels = np.zeros((count, 96, 96), np.uint8)
    for image, label in zip(images, labels, strict=True):
        top, left = random.integers(0, 89, 2)
        label[top : top + 6, left : left + 7] = 1
        image[:, label == 1] += 1.5
    return torch.from_numpy(images), labels


def steps(images: torch.Tensor, labels: np.ndarray, is_ours: bool) -> float:
    """The rare class's IoU after 45 steps."""
    model = network(2).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
    for _ in range(45):
        logits = model(images)
        enlarged = F.interpolate(logits, size=labels.shape[1:], mode="bilinear")
        plain = F.cross_entropy(enlarged, torch.from_numpy(labels).long())
        optimizer.zero_grad()
        (loss(logits, labels, recipe()) if is_ours else plain).backward()
        optimizer.step()
    found = enlarged.argmax(1).numpy()
    return float(((found == 1) & (labels == 1)).sum() / ((found == 1) | (labels == 1)).sum())


def test_a_few_steps_find_a_rare_class() -> None:
    images, labels = specks(4)
    assert 1 / 220 < (labels == 1).mean() < 1 / 219
    assert steps(images, labels, is_ours=False) == 0
    assert steps(images, labels, is_ours=True) > 0.6


def test_a_fake_quantized_network_learns() -> None:
    model = network(2)
    fake_quantization.fake_quantize(model)
    model.train()
    loss(model(torch.randn(2, 3, 64, 64)), np.ones((2, 64, 64), np.uint8), recipe()).backward()
    assert all(each.grad is not None and bool(torch.isfinite(each.grad).all()) for each in model.parameters())


# ---------------------------------------------------------------------------------------------------------------
# Figures


def test_metrics_worked_by_hand(tmp_path: Path) -> None:
    truth = [
        sample(tmp_path, "0", [[0, 0, 0, 1], [0, 0, 1, VOID]]),
        sample(tmp_path, "1", [[1, 1], [VOID, 0]]),  # of another size
    ]
    found = [answers_of([[0, 0, 0, 0], [0, 2, 1, 1]]), answers_of([[1, 0], [0, 0]])]
    confusion = ((5, 0, 1), (2, 2, 0), (0, 0, 0))
    iou = (5 / 8, 2 / 4, 0.0)
    mean = pytest.approx(sum(iou) / 3)
    assert metrics(found, truth, NAMES) == Metrics(
        mean_iou=mean,
        pixel_accuracy=pytest.approx(7 / 10),
        per_class=(
            ClassMetrics("a", 6, iou[0], pytest.approx(5 / 7), pytest.approx(5 / 6), pytest.approx(10 / 13)),
            ClassMetrics("b", 4, iou[1], 1.0, 0.5, pytest.approx(2 / 3)),
            ClassMetrics("c", 0, 0.0, 0.0, 0.0, 0.0),
        ),
        confusion=confusion,
    )
    assert metric(found, truth) == mean
    json.dumps(metrics(found, truth, NAMES).to_dict())


def test_a_class_that_occurs_nowhere_is_left_out_of_the_mean(tmp_path: Path) -> None:
    truth = [sample(tmp_path, "0", [[0, 2]])]
    assert metrics([answers_of([[0, 2]])], truth, NAMES).mean_iou == 1.0
    # answered only where nobody knows what is there
    truth = [sample(tmp_path, "1", [[0, 2, VOID]])]
    assert metrics([answers_of([[0, 2, 1]])], truth, NAMES).mean_iou == 1.0 == metric([answers_of([[0, 2, 1]])], truth)
    # in the truth only
    assert metric([answers_of([[0, 0]])], [sample(tmp_path, "2", [[0, 2]])]) == pytest.approx(0.25)


def test_pixels_without_an_answer_are_wrong(tmp_path: Path) -> None:
    found = metrics([answers_of([[0, 1, VOID, VOID]])], [sample(tmp_path, "0", [[0, 1, 1, VOID]])], NAMES)
    assert (found.pixel_accuracy, found.mean_iou) == (pytest.approx(2 / 3), pytest.approx(0.75))
    assert found.confusion == ((1, 0, 0), (0, 1, 0), (0, 0, 0))


def test_masks_drawn_with_soft_edges(tmp_path: Path) -> None:
    path = tmp_path / "soft.png"
    assert cv2.imwrite(str(path), np.array([[0, 127, 128, 255]], np.uint8))
    assert metric([answers_of([[0, 0, 1, 1]])], [Sample(tmp_path / "0.jpg", Mask(path, ""), "")]) == 1.0


def test_nothing_to_measure(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no images"):
        metrics([], [], NAMES)
    found = metrics([answers_of([[0, 1]])], [sample(tmp_path, "0", [[VOID, VOID]])], NAMES)
    assert (found.mean_iou, found.pixel_accuracy) == (0.0, 0.0)
    assert mistakes([answers_of([[0, 1]])], [sample(tmp_path, "0", [[VOID, VOID]])], NAMES) == ()


@settings(max_examples=25, deadline=None)
@given(data=st.data(), count=st.integers(1, 4))
def test_metrics_agree_with_torchmetrics(
    data: st.DataObject, count: int, tmp_path_factory: pytest.TempPathFactory
) -> None:
    from torchmetrics.functional.classification import multiclass_confusion_matrix, multiclass_jaccard_index

    folder = tmp_path_factory.mktemp("masks")
    known = hnp.arrays(np.uint8, (count, 5, 4), elements=st.sampled_from([0, 1, 2, VOID]))
    truth = data.draw(known)
    truth[0, 0, 0] = 0
    found = data.draw(hnp.arrays(np.uint8, (count, 5, 4), elements=st.integers(0, 2)))
    figures = metrics(
        [answers_of(each) for each in found],
        [sample(folder, str(i), each) for i, each in enumerate(truth)],
        NAMES,
    )
    both = torch.from_numpy(found).long(), torch.from_numpy(truth).long()
    expected = multiclass_confusion_matrix(*both, num_classes=3, ignore_index=VOID)
    assert np.array(figures.confusion).tolist() == expected.tolist()
    each = multiclass_jaccard_index(*both, num_classes=3, ignore_index=VOID, average="none")
    assert [row.iou or 0.0 for row in figures.per_class] == pytest.approx(each.tolist(), abs=1e-6)


def test_mistakes_are_the_worst_images_first(tmp_path: Path) -> None:
    truth = [sample(tmp_path, str(i), [[0, 1, 1, VOID]]) for i in range(4)]
    found = [answers_of(row) for row in ([[0, 1, 1, 2]], [[0, 0, 1, 1]], [[2, 2, 2, 2]], [[0, 0, 1, 1]])]
    masks = [(str(each.label.path), each.label.levels) for each in truth if isinstance(each.label, Mask)]
    expected = (
        Mistake(str(truth[2].path), 0.0, *masks[2], tuple(found[2])),
        Mistake(str(truth[1].path), 0.5, *masks[1], tuple(found[1])),
        Mistake(str(truth[3].path), 0.5, *masks[3], tuple(found[3])),
    )
    assert mistakes(found, truth, NAMES) == expected
    assert mistakes(found, truth, NAMES, limit=1) == expected[:1]
    json.dumps([asdict(each) for each in expected])


def test_agreement_is_the_share_of_all_pixels() -> None:
    mine = [answers_of([[0, 1], [2, 2]]), answers_of([[1] * 6])]
    theirs = [answers_of([[0, 0], [2, 2]]), answers_of([[1, 1, 1, 0, 0, 0]])]
    assert agreement(mine, theirs, SPEC) == 6 / 10
    assert agreement(mine, mine, SPEC) == 1.0


def test_the_guards_figure_is_quick(tmp_path: Path) -> None:
    random = np.random.default_rng(0)
    classes = cv2.resize(random.integers(0, 3, (12, 16), dtype=np.uint8), (640, 480), interpolation=cv2.INTER_NEAREST)
    truth, found = [sample(tmp_path, "0", classes)] * 20, [answers_of(classes)] * 20
    start = time.process_time()
    assert metric(found, truth) == 1.0
    assert time.process_time() - start < 2
