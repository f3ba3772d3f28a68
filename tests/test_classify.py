from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from edgekit import runner
from edgekit.recipe import Recipe, make_recipe
from edgekit.samples import Sample
from edgekit.tasks import classify
from edgekit.tasks.classify import (
    ClassMetrics,
    Metrics,
    Mistake,
    agreement,
    build,
    head,
    loss,
    metric,
    metrics,
    mistakes,
    trunk,
)

# Six images, worked by hand: truth a a a b b c, answers a a b b c c.
TRUTH = np.array([0, 0, 0, 1, 1, 2])
SCORES = np.array(
    [[0.8, 0.1, 0.1], [0.6, 0.3, 0.1], [0.2, 0.7, 0.1], [0.1, 0.8, 0.1], [0.1, 0.0, 0.9], [0.2, 0.3, 0.5]], np.float32
)
NAMES = ("a", "b", "c")
SPEC = runner.Spec("classify", (8, 8), "stretch", "linear", "rgb", (0, 0, 0), (1, 1, 1), NAMES)


def answers(scores: np.ndarray) -> list[runner.Results]:
    """Scores (N, C) → what the runner answers: every class, best first."""
    return [
        [
            {"label": f"class {k}", "class_id": k, "score": float(row[k])}
            for k in np.argsort(-row, kind="stable").tolist()
        ]
        for row in scores
    ]


def samples(labels: np.ndarray) -> list[Sample]:
    return [Sample(Path(f"{i}.png"), int(label), "") for i, label in enumerate(labels)]


def recipe(**model: object) -> Recipe:
    return make_recipe({"data": {"path": "x"}, "model": model})


def test_metrics_worked_by_hand() -> None:
    assert metrics(answers(SCORES), samples(TRUTH), NAMES) == Metrics(
        top1=4 / 6,
        top5=None,
        macro_f1=pytest.approx((0.8 + 0.5 + 2 / 3) / 3),
        per_class=(
            ClassMetrics("a", 3, 1.0, pytest.approx(2 / 3), pytest.approx(0.8)),
            ClassMetrics("b", 2, 0.5, 0.5, 0.5),
            ClassMetrics("c", 1, 0.5, 1.0, pytest.approx(2 / 3)),
        ),
        confusion=((2, 1, 0), (0, 1, 1), (0, 0, 1)),
    )
    assert metric(answers(SCORES), samples(TRUTH)) == 4 / 6


def test_a_class_without_images_does_not_count_and_one_never_predicted_counts_zero() -> None:
    scores = np.eye(4, dtype=np.float32)[[0, 0, 1]]
    found = metrics(answers(scores), samples(np.array([0, 3, 1])), ("a", "b", "c", "d"))
    assert [row.support for row in found.per_class] == [1, 1, 0, 1]
    assert found.per_class[3] == ClassMetrics("d", 1, 0.0, 0.0, 0.0)
    assert found.macro_f1 == pytest.approx((2 / 3 + 1 + 0) / 3)


def test_top5_is_given_from_six_classes() -> None:
    scores = np.tile(np.arange(7, dtype=np.float32), (2, 1))
    found = metrics(answers(scores), samples(np.array([2, 1])), tuple("abcdefg"))
    assert (found.top1, found.top5) == (0.0, 0.5)


def test_no_images() -> None:
    with pytest.raises(ValueError, match="no images"):
        metrics([], [], NAMES)


@settings(max_examples=25, deadline=None)
@given(data=st.data(), count=st.integers(1, 40), classes=st.integers(2, 8))
def test_metrics_agree_with_each_other(data: st.DataObject, count: int, classes: int) -> None:
    scores = data.draw(hnp.arrays(np.float32, (count, classes), elements=st.floats(0, 1, width=32)))
    labels = data.draw(hnp.arrays(np.int64, count, elements=st.integers(0, classes - 1)))
    given_, truth, names = answers(scores), samples(labels), tuple(map(str, range(classes)))
    found = metrics(given_, truth, names)
    confusion = np.array(found.confusion)
    assert confusion.sum() == count
    assert found.top1 == pytest.approx(np.trace(confusion) / count) == metric(given_, truth)
    assert found.top1 == (scores.argmax(axis=1) == labels).mean()  # of equals the first class
    if classes > 5:
        better = (scores > scores[np.arange(count), labels][:, None]).sum(axis=1)
        equal = (scores >= scores[np.arange(count), labels][:, None]).sum(axis=1)
        assert found.top5 is not None
        assert (equal <= 5).mean() - 1e-6 <= found.top5 <= (better < 5).mean() + 1e-6
    assert [row.support for row in found.per_class] == confusion.sum(axis=1).tolist()
    wrong = mistakes(given_, truth, names, limit=999)
    assert len(wrong) == count - np.trace(confusion)
    assert [m.score for m in wrong] == sorted((m.score for m in wrong), reverse=True)


def test_mistakes_are_the_wrong_answers_most_confident_first() -> None:
    expected = (
        Mistake("4.png", "b", "c", np.float32(0.9), 0.0),
        Mistake("2.png", "a", "b", np.float32(0.7), np.float32(0.2)),
    )
    assert mistakes(answers(SCORES), samples(TRUTH), NAMES) == expected
    assert mistakes(answers(SCORES), samples(TRUTH), NAMES, limit=1) == expected[:1]


def test_agreement_is_the_share_of_images_with_the_same_best_answer() -> None:
    others = SCORES.copy()
    others[[0, 3]] = (0.1, 0.1, 0.8)
    assert agreement(answers(SCORES), answers(others), SPEC) == 4 / 6
    assert agreement(answers(SCORES), answers(SCORES * 0.5), SPEC) == 1.0


def test_the_figures_are_those_of_the_networks_outputs() -> None:
    random = np.random.default_rng(0)
    logits, labels = random.normal(size=(50, 3)).astype(np.float32), random.integers(0, 3, 50)
    found = [runner.POSTPROCESS["classify"]({"logits": row[None]}, SPEC, 0) for row in logits]
    assert metric(found, samples(labels)) == float((logits.argmax(axis=1) == labels).mean())


def test_the_loss_is_smoothed_cross_entropy() -> None:
    logits = torch.tensor([[2.0, 0.0, -1.0]])
    log_p = torch.log_softmax(logits, dim=1)[0]
    expected = -(0.9 * log_p[0] + 0.1 / 3 * log_p.sum())
    assert loss(logits, np.array([0]), recipe()) == pytest.approx(float(expected), rel=1e-6)


@pytest.mark.parametrize("backbone", ["mobilenetv3_small_050", "torchvision:squeezenet1_1"])
def test_a_new_head_starts_with_small_logits(backbone: str) -> None:
    torch.manual_seed(0)
    model = build(recipe(backbone=backbone, pretrained=False), NAMES, pretrained=True).eval()
    with torch.inference_mode():
        logits = model(torch.randn(2, 3, 64, 64))
    assert logits.shape == (2, 3)
    assert logits.abs().max() < 1
    assert trunk(model) is model
    assert classify.OUTPUTS == ("logits",)
    assert sum(p.numel() for p in head(model).parameters()) < sum(p.numel() for p in model.parameters()) / 2
