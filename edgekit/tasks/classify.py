"""Classification: one label an image."""

from __future__ import annotations

from collections.abc import Sequence
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


@dataclass(frozen=True)
class ClassMetrics:
    """One class's share: precision, recall and F1 in 0..1; support: how many images truly are of it."""

    label: str
    support: int
    precision: float
    recall: float
    f1: float


@dataclass(frozen=True)
class Metrics:
    """Figures of one set of predictions, all in 0..1."""

    top1: float
    top5: float | None  # None where there are five classes or fewer: it would always be 1
    macro_f1: float  # the mean over the classes that occur, each counting alike
    per_class: tuple[ClassMetrics, ...]
    confusion: tuple[tuple[int, ...], ...]  # [true][predicted], images

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
    truth = torch.from_numpy(labels).to(outputs.device)
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
    return Metrics(
        top1=float((predicted == true).double().mean()),
        top5=top5,
        macro_f1=float(f1[support > 0].double().mean()),
        per_class=tuple(
            ClassMetrics(name, int(support[i]), float(precision[i]), float(recall[i]), float(f1[i]))
            for i, name in enumerate(class_names)
        ),
        confusion=tuple(tuple(int(n) for n in row) for row in confusion.tolist()),
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
