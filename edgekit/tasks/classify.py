"""Classification: one label an image."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torchmetrics.functional.classification import (
    multiclass_accuracy,
    multiclass_confusion_matrix,
    multiclass_f1_score,
    multiclass_precision,
    multiclass_recall,
)

from edgekit import backbones, runner
from edgekit.recipe import Recipe
from edgekit.samples import Sample

OUTPUTS = ("logits",)
METRIC = "top-1"
ANSWERS: dict[str, Any] = {"top_k": 0}
TEMPERATURES = (0.05, 20.0)  # the least and the greatest that best_temperature gives
SCORE_BINS = 15  # of equal width, as in Guo et al., arXiv:1706.04599


@dataclass(frozen=True)
class ClassMetrics:
    """One class's share: precision, recall and F1 in 0..1; support: how many images truly are of it."""

    label: str
    support: int
    precision: float
    recall: float
    f1: float


@dataclass(frozen=True)
class ScoreBin:
    """The images whose best answer has a score of one range: how many, and what share of the answers is right.

    The ranges are SCORE_BINS from 0 to 1, in order, each without its upper end but for the last.
    """

    images: int
    score: float | None  # their mean, 0..1; None where there are no images
    accuracy: float | None  # 0..1; None where there are no images


@dataclass(frozen=True)
class Metrics:
    """Figures of one set of predictions, all in 0..1."""

    top1: float
    top5: float | None  # None where there are five classes or fewer: it would always be 1
    macro_f1: float  # the mean over the classes that occur, each counting alike
    per_class: tuple[ClassMetrics, ...]
    confusion: tuple[tuple[int, ...], ...]  # [true][predicted], images
    calibration_error: float  # the mean distance of a bin's score from its accuracy (ECE, Guo et al.), by images
    score_bins: tuple[ScoreBin, ...]

    def to_dict(self) -> dict[str, Any]:
        """Plain lists, strings and numbers, for JSON."""
        return asdict(self)


@dataclass(frozen=True)
class Mistake:
    """An image whose best answer is not its label; scores in 0..1."""

    path: str
    label: str
    predicted: str
    score: float  # of the wrong answer
    true_score: float


def build(recipe: Recipe, class_names: Sequence[str], *, pretrained: bool) -> torch.nn.Module:
    """The recipe's backbone with a new head: float32 (N, 3, h, w) → logits (N, C).

    pretrained=False leaves the recipe's weights aside (they are about to be loaded from elsewhere).
    """
    use = pretrained and recipe.model.pretrained
    weights = Path(recipe.model.weights) if pretrained and recipe.model.weights else None
    model = backbones.build(recipe.model.backbone, len(class_names), pretrained=use, weights=weights)
    for name in backbones.classifier_names(model):
        _start_small(model.get_submodule(name))
    return model


def _start_small(classifier: torch.nn.Module) -> None:
    """Some libraries' own start gives logits of ±10: the first steps would only undo that."""
    for layer in classifier.modules():
        if isinstance(layer, torch.nn.Linear | torch.nn.Conv2d):
            torch.nn.init.normal_(layer.weight, std=0.01)
            if layer.bias is not None:
                torch.nn.init.zeros_(layer.bias)


def trunk(model: torch.nn.Module) -> torch.nn.Module:
    """The network that `backbones.stages` opens: the whole of it."""
    return model


def head(model: torch.nn.Module) -> torch.nn.Module:
    """The last layer, new for these classes."""
    return backbones.head(model)


def loss(
    outputs: torch.Tensor, labels: np.ndarray, recipe: Recipe, class_weights: torch.Tensor | None = None
) -> torch.Tensor:
    """Logits (N, C), class ids int64 (N,) → cross-entropy with label smoothing (Szegedy et al., arXiv:1512.00567).

    class_weights: float32 (C,); the mean over the images is not divided by their weights' sum, so that a batch of rare
    ones counts for more.
    """
    truth = torch.from_numpy(labels).to(outputs.device, non_blocking=True)
    if class_weights is None:
        return F.cross_entropy(outputs.float(), truth, label_smoothing=recipe.train.label_smoothing)
    each = F.cross_entropy(outputs.float(), truth, label_smoothing=recipe.train.label_smoothing, reduction="none")
    return (each * class_weights[truth]).mean()


def metric(answers: Sequence[runner.Results], samples: Sequence[Sample]) -> float:
    """Answers and the truth → the figure that an accuracy guard looks at, 0..1: top-1."""
    return float((_best(answers) == _labels(samples)).mean())


def agreement(answers: Sequence[runner.Results], others: Sequence[runner.Results], _: runner.Spec) -> float:
    """The share of images, 0..1, on which two networks give the same best answer."""
    return float((_best(answers) == _best(others)).mean())


def metrics(answers: Sequence[runner.Results], samples: Sequence[Sample], class_names: Sequence[str]) -> Metrics:
    """Answers of all classes and the truth, in the same order → the figures.

    A class that is never predicted has precision 0. Raises ValueError when there are no images.
    """
    if not samples:
        raise ValueError("no images to measure")
    count = len(class_names)
    scores = torch.from_numpy(_scores(answers, count))
    predicted, true = torch.from_numpy(_best(answers)), torch.from_numpy(_labels(samples))
    each: dict[str, Any] = {"num_classes": count, "average": "none", "zero_division": 0}
    precision = multiclass_precision(predicted, true, **each)
    recall = multiclass_recall(predicted, true, **each)
    f1 = multiclass_f1_score(predicted, true, **each)
    confusion = multiclass_confusion_matrix(predicted, true, num_classes=count)
    support = confusion.sum(dim=1)
    top5 = None
    if count > 5:
        top5 = float(multiclass_accuracy(scores, true, num_classes=count, average="micro", top_k=5))
    bins = _score_bins(answers, _labels(samples))
    return Metrics(
        top1=float((predicted == true).double().mean()),
        top5=top5,
        macro_f1=float(f1[support > 0].double().mean()),
        per_class=tuple(
            ClassMetrics(name, int(support[i]), float(precision[i]), float(recall[i]), float(f1[i]))
            for i, name in enumerate(class_names)
        ),
        confusion=tuple(tuple(int(n) for n in row) for row in confusion.tolist()),
        calibration_error=_calibration_error(bins),
        score_bins=bins,
    )


def mistakes(
    answers: Sequence[runner.Results], samples: Sequence[Sample], class_names: Sequence[str], limit: int = 24
) -> tuple[Mistake, ...]:
    """The wrong answers, the most confident first."""
    scores, predicted, labels = _scores(answers, len(class_names)), _best(answers), _labels(samples)
    wrong = [int(i) for i in np.flatnonzero(predicted != labels)]
    wrong.sort(key=lambda i: (-scores[i, predicted[i]], str(samples[i].path)))
    return tuple(
        Mistake(
            path=str(samples[i].path),
            label=class_names[labels[i]],
            predicted=class_names[predicted[i]],
            score=float(scores[i, predicted[i]]),
            true_score=float(scores[i, labels[i]]),
        )
        for i in wrong[:limit]
    )


def best_temperature(logits: np.ndarray, labels: np.ndarray) -> float:
    """float (N, C), class ids int64 (N,) → the temperature, in TEMPERATURES, whose scores fit these images best.

    That is where the negative log-likelihood has its one minimum (Guo et al., arXiv:1706.04599). Where all images are
    right by far, it falls without an end as the scores go to 1; but N right answers in a row only show an accuracy of
    (N + 1) / (N + 2) (Laplace's rule of succession). So scores are made sharper only up to where the mean of the best
    answers' is that. 1 where all classes are alike in every image. Raises ValueError where there are no images, or the
    logits are not finite.
    """
    if not len(logits) or not np.isfinite(logits).all():
        raise ValueError("no images, or logits that are not finite")
    below = logits.astype(np.float64)
    below -= below.max(axis=1, keepdims=True)
    if not below.any():  # all classes alike: so are the scores, at any temperature
        return 1.0
    true = below[np.arange(len(labels)), labels].mean()
    known = (len(labels) + 1) / (len(labels) + 2)

    def is_high(temperature: float) -> bool:
        """Whether the negative log-likelihood rises from here on, by its slope over 1 / temperature."""
        expected = (runner.softmax(below, temperature) * below).sum(axis=1).mean()
        return bool(expected <= true)

    def is_modest(temperature: float) -> bool:
        """Whether the scores claim no more than the images can show."""
        return bool(runner.softmax(below, temperature).max(axis=1).mean() <= known)

    likeliest = _least(is_high)
    return likeliest if likeliest >= 1 else max(likeliest, min(1.0, _least(is_modest)))


def _least(holds: Callable[[float], bool]) -> float:
    """The least of TEMPERATURES from which on it holds, to a relative 1e-6; the greatest where it holds for none."""
    low, high = TEMPERATURES
    if holds(low):
        return low
    while high / low > 1 + 1e-6:
        middle = math.sqrt(low * high)
        low, high = (low, middle) if holds(middle) else (middle, high)
    return high


def _score_bins(answers: Sequence[runner.Results], labels: np.ndarray) -> tuple[ScoreBin, ...]:
    scores = np.array([results[0]["score"] for results in answers])
    right = _best(answers) == labels
    numbers = np.minimum((scores * SCORE_BINS).astype(int), SCORE_BINS - 1)
    return tuple(
        ScoreBin(int(inside.sum()), float(scores[inside].mean()), float(right[inside].mean()))
        if inside.any()
        else ScoreBin(0, None, None)
        for inside in (numbers == number for number in range(SCORE_BINS))
    )


def _calibration_error(bins: Sequence[ScoreBin]) -> float:
    images = sum(each.images for each in bins)
    distances = (
        each.images * abs(each.score - each.accuracy)
        for each in bins
        if each.score is not None and each.accuracy is not None
    )
    return sum(distances) / images


def _labels(samples: Sequence[Sample]) -> np.ndarray:
    return np.array([sample.label for sample in samples], np.int64)


def _best(answers: Sequence[runner.Results]) -> np.ndarray:
    return np.array([results[0]["class_id"] for results in answers], np.int64)


def _scores(answers: Sequence[runner.Results], class_count: int) -> np.ndarray:
    """float64 (N, C); 0 for a class that an image has no answer of."""
    scores = np.zeros((len(answers), class_count))
    for row, results in zip(scores, answers, strict=True):
        row[[each["class_id"] for each in results]] = [each["score"] for each in results]
    return scores
