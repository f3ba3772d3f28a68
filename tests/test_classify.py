import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from torchmetrics.functional.classification import multiclass_calibration_error

from edgekit import runner
from edgekit.recipe import Recipe, make_recipe
from edgekit.samples import Sample
from edgekit.tasks import classify
from edgekit.tasks.classify import (
    ClassMetrics,
    Metrics,
    Mistake,
    ScoreBin,
    agreement,
    best_temperature,
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
        # right with 0.8, 0.6, 0.8, 0.5; wrong with 0.7 and 0.9
        calibration_error=pytest.approx((0.5 + 0.4 + 0.7 + 2 * 0.2 + 0.9) / 6),
        score_bins=(
            *[ScoreBin(0, None, None)] * 7,
            ScoreBin(1, 0.5, 1.0),
            ScoreBin(0, None, None),
            ScoreBin(1, pytest.approx(0.6), 1.0),
            ScoreBin(1, pytest.approx(0.7), 0.0),
            ScoreBin(0, None, None),
            ScoreBin(2, pytest.approx(0.8), 1.0),
            ScoreBin(1, pytest.approx(0.9), 0.0),
            ScoreBin(0, None, None),
        ),
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
    assert sum(each.images for each in found.score_bins) == count and len(found.score_bins) == 15
    right = sum(each.images * each.accuracy for each in found.score_bins if each.accuracy is not None)
    assert right == pytest.approx(count * found.top1)
    assert 0 <= found.calibration_error <= 1
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


# Scores that mean something


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 2**32 - 1), st.integers(1, 200), st.integers(2, 8))
def test_the_calibration_error_is_torchmetrics(seed: int, count: int, classes: int) -> None:
    random = np.random.default_rng(seed)
    scores, labels = random.dirichlet(np.ones(classes), count), random.integers(0, classes, count)
    found = metrics(answers(scores), samples(labels), tuple(map(str, range(classes))))
    theirs = multiclass_calibration_error(torch.tensor(scores), torch.tensor(labels), classes, n_bins=15, norm="l1")
    assert found.calibration_error == pytest.approx(float(theirs), abs=1e-6)  # theirs is of float32


def test_a_score_of_one_belongs_to_the_last_bin() -> None:
    """(torchmetrics gives it one of its own: a bundle, whose scores have six digits, would have another error.)"""
    scores = np.array([[1.0, 0.0], [0.98, 0.02]])
    found = metrics(answers(scores), samples(np.array([0, 1])), ("a", "b"))
    assert found.score_bins[14] == ScoreBin(2, pytest.approx(0.99), 0.5)
    assert found.calibration_error == pytest.approx(0.49)


def likelihood(logits: np.ndarray, labels: np.ndarray, temperature: float) -> float:
    """Mean negative log-likelihood."""
    scaled = torch.from_numpy(logits).double() / temperature
    return float(torch.nn.functional.cross_entropy(scaled, torch.from_numpy(labels)))


def slope(logits: np.ndarray, labels: np.ndarray, temperature: float) -> float:
    """Of the negative log-likelihood over 1 / temperature."""
    sharpness = torch.tensor(1 / temperature, dtype=torch.float64, requires_grad=True)
    loss = torch.nn.functional.cross_entropy(torch.from_numpy(logits).double() * sharpness, torch.from_numpy(labels))
    (found,) = torch.autograd.grad(loss, sharpness)
    return float(found)


def mean_best_score(logits: np.ndarray, temperature: float) -> float:
    return float(runner.softmax(logits.astype(np.float64), temperature).max(axis=1).mean())


@st.composite
def predictions(draw: st.DrawFn, scale: float = 30.0) -> tuple[np.ndarray, np.ndarray]:
    """Logits (N, C) and labels (N,), of which a drawn part is right."""
    count, classes = draw(st.integers(1, 30)), draw(st.integers(1, 6))
    random = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    logits = (random.normal(size=(count, classes)) * draw(st.floats(0.01, scale))).astype(np.float32)
    is_right = random.random(count) < draw(st.sampled_from([0.0, 0.5, 0.9, 1.0]))
    return logits, np.where(is_right, logits.argmax(axis=1), random.integers(0, classes, count))


@settings(max_examples=150, deadline=None)
@given(predictions())
def test_the_best_temperature_is_the_likeliest_or_a_bound(found: tuple[np.ndarray, np.ndarray]) -> None:
    logits, labels = found
    temperature = best_temperature(logits, labels)
    assert 0.05 <= temperature <= 20
    if logits.shape[1] == 1:
        assert temperature == 1
        return
    tolerance = 1e-5 * max(1.0, float(np.square(logits).max()) / temperature)
    known = (len(labels) + 1) / (len(labels) + 2)
    falls = slope(logits, labels, temperature)  # below 0: sharper scores would be likelier
    if temperature == 20:
        assert falls > 0
    elif falls < -tolerance:  # the scores claim as much as the images show, or never so much
        claimed = mean_best_score(logits, temperature)
        assert (
            temperature == 0.05 or claimed == pytest.approx(known, abs=1e-4) or (temperature == 1 and claimed > known)
        )
    else:
        assert abs(falls) <= tolerance
    if temperature < 1:
        assert mean_best_score(logits, temperature) <= known
    assert likelihood(logits, labels, temperature) <= likelihood(logits, labels, 1.0) + 1e-9
    scaled = runner.softmax(logits.astype(np.float64), temperature)
    assert (scaled[np.arange(len(labels)), logits.argmax(axis=1)] == scaled.max(axis=1)).all()


@settings(max_examples=100, deadline=None)
@given(predictions(scale=5.0), st.floats(0.1, 10))
def test_logits_k_times_as_large_have_a_temperature_k_times_as_high(
    found: tuple[np.ndarray, np.ndarray], k: float
) -> None:
    logits, labels = found
    larger = (logits * np.float32(k)).astype(np.float32)
    before, after = best_temperature(logits, labels), best_temperature(larger, labels)
    inside = (0.05, 1.0, 20.0)  # 1 is a bound where the scores claim as much already as the images can show
    if before not in inside and after not in inside:
        assert after == pytest.approx(k * before, rel=1e-4)


@pytest.mark.parametrize(
    ("logits", "labels", "temperature"),
    [
        ([[2.0, 0.0], [2.0, 0.0], [2.0, 0.0], [2.0, 0.0]], [0, 0, 0, 1], 2 / math.log(3)),  # 3/4 right: odds of 3
        ([[20.0, 0.0]] * 4, [0, 0, 0, 1], 20 / math.log(3)),
        ([[0.2, 0.0]] * 4, [0, 0, 0, 1], 0.2 / math.log(3)),
        ([[2.0, 0.0]] * 4, [1, 1, 1, 0], 20.0),  # worse than a guess
        ([[2.0, 0.0]] * 2, [0, 1], 20.0),  # no better than one
        ([[9.0, 0.0]], [1], 20.0),
        ([[0.5, 0.0]], [0], 0.5 / math.log(2)),  # one image, right: a score of 2/3
        ([[0.5, 0.0]] * 98, [0] * 98, 0.5 / math.log(99)),  # 98 right: 99/100
        ([[9.0, 0.0]], [0], 1.0),  # it claims more than that by itself, and is likelier so
        ([[1e4, 0.0]] * 3, [0, 0, 0], 1.0),
        ([[3e38, -3e38]], [0], 1.0),
        ([[3e38, -3e38]], [1], 20.0),
        ([[1e-3, 0.0]], [0], 0.05),
        ([[1.0, 1.0, 0.0]], [0], 0.05),  # never above a half: nothing is claimed
        ([[4.0], [5.0]], [0, 0], 1.0),
        ([[4.0, 4.0]], [1], 1.0),
    ],
)
def test_temperatures_worked_by_hand(logits: list[list[float]], labels: list[int], temperature: float) -> None:
    assert best_temperature(np.array(logits, np.float32), np.array(labels)) == pytest.approx(temperature, rel=2e-6)


@pytest.mark.parametrize("logits", [np.zeros((0, 3)), np.array([[math.nan, 0.0]]), np.array([[math.inf, 0.0]])])
def test_no_temperature_without_numbers(logits: np.ndarray) -> None:
    with pytest.raises(ValueError, match="no images, or logits that are not finite"):
        best_temperature(logits.astype(np.float32), np.zeros(len(logits), np.int64))


def test_scores_at_the_best_temperature_are_calibrated() -> None:
    """Labels drawn from the scores at temperature 1, logits three times as large: overconfident until divided."""
    random = np.random.default_rng(0)
    logits = random.normal(size=(4000, 3)) * 2
    labels = (random.random((4000, 1)) > runner.softmax(logits).cumsum(axis=1)).sum(axis=1).clip(max=2)
    shown = (3 * logits).astype(np.float32)
    temperature = best_temperature(shown, labels)
    assert temperature == pytest.approx(3, rel=0.1)

    def error(spec: runner.Spec) -> float:
        found = [runner.POSTPROCESS["classify"]({"logits": row[None]}, spec, 0) for row in shown]
        return metrics(found, samples(labels), NAMES).calibration_error

    assert error(SPEC) > 0.1 and error(replace(SPEC, temperature=temperature)) < 0.02
