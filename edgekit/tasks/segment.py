"""Segmentation: a class a pixel.

The pyramid's maps are added up at its finest level (Kirillov et al., Panoptic FPN's semantic branch, arXiv:1901.02446),
and a small head says of each 4x4 pixels which class they are.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any, cast

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from edgekit import backbones, runner
from edgekit.recipe import Recipe
from edgekit.samples import VOID, Mask, Sample, read_mask
from edgekit.tasks import pyramid

OUTPUTS = ("logits",)
METRIC = "mean IoU"
ANSWERS: dict[str, Any] = {}

STRIDES = (4, 8, 16, 32)
BALANCE = 0.75  # a pixel's weight is its class's pixels to the power of minus this: 1 makes all classes count alike
WIDTH = 64  # channels of the pyramid; a map at stride 4 has four times the cells of detection's finest one


# ---------------------------------------------------------------------------------------------------------------
# The network


class Segmenter(nn.Module):
    """float32 (N, 3, h, w), sides multiples of 32 → logits float32 (N, C, h/4, w/4)."""

    def __init__(self, trunk: nn.Module, class_count: int) -> None:
        super().__init__()
        self.trunk = trunk
        self.head = Head(backbones.feature_channels(trunk, STRIDES), class_count)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        logits: torch.Tensor = self.head(backbones.feature_maps(self.trunk, images, STRIDES))
        return logits


class Head(nn.Module):
    """The trunk's maps → the logits."""

    def __init__(self, channels: Sequence[int], class_count: int) -> None:
        super().__init__()
        self.pyramid = pyramid.Pyramid(channels, WIDTH)
        self.classes = nn.Sequential(
            pyramid.separable(WIDTH, WIDTH), pyramid.separable(WIDTH, WIDTH), pyramid.last(WIDTH, class_count, 0.0)
        )

    def forward(self, maps: Sequence[torch.Tensor]) -> torch.Tensor:
        finest_last = self.pyramid(maps)[::-1]
        merged = finest_last[0]
        for finer in finest_last[1:]:  # doubling step by step is the same as enlarging each at once, and cheaper
            merged = finer + pyramid.double(merged)
        logits: torch.Tensor = self.classes(merged)
        return logits


def build(recipe: Recipe, class_names: Sequence[str], *, pretrained: bool) -> nn.Module:
    """The recipe's backbone with a new segmentation head: see Segmenter.

    pretrained=False leaves the recipe's weights aside (they are about to be loaded from elsewhere).
    """
    return Segmenter(pyramid.trunk(recipe, STRIDES, pretrained=pretrained), len(class_names))


def trunk(model: nn.Module) -> nn.Module:
    """The backbone inside."""
    return cast("Segmenter", model).trunk


def head(model: nn.Module) -> nn.Module:
    """All that is new: the pyramid and what follows it."""
    return cast("Segmenter", model).head


# ---------------------------------------------------------------------------------------------------------------
# The loss


def loss(outputs: torch.Tensor, labels: np.ndarray, recipe: Recipe) -> torch.Tensor:  # noqa: ARG001 (every task's loss)
    """Logits (N, C, h/k, w/k) and class maps uint8 (N, h, w) → balanced cross-entropy plus Lovász loss.

    The logits are enlarged to the labels' size first, as the runner does: shrunken labels would lose what is thinner
    than a cell, and edges are then learnt where they will be cut. Of the pixels that are not VOID.

    Most data sets have classes that are one pixel in hundreds. In the plain mean those are not found for a long time;
    so a pixel weighs the less, the more pixels its class has in the batch, and the Lovász loss, which is near to one
    minus the mean IoU, keeps the rare classes from being answered too often.
    """
    truth = torch.from_numpy(labels).to(outputs.device, non_blocking=True).long()
    logits = _enlarged(outputs.float(), truth.shape[1:])
    pixels = torch.bincount(truth[truth != VOID], minlength=logits.shape[1]).float()
    weights = torch.where(pixels > 0, pixels.clamp(min=1) ** -BALANCE, 0)
    weights /= (weights * pixels).sum().clamp(min=1)
    cross_entropy = F.cross_entropy(logits, truth, weight=weights, ignore_index=VOID, reduction="sum")
    # of every second row and column: sorting the pixels is dear
    return cross_entropy + _lovasz_loss(logits[..., ::2, ::2], truth[..., ::2, ::2])


def _enlarged(logits: torch.Tensor, size: Sequence[int]) -> torch.Tensor:
    """float32 (N, C, h/k, w/k) → (N, C, h, w); size: (h, w). What the runner chooses each pixel's class from."""
    return F.interpolate(logits, size=tuple(size), mode="bilinear", align_corners=False)


def _lovasz_loss(logits: torch.Tensor, truth: torch.Tensor) -> torch.Tensor:
    """(N, C, h, w), int64 (N, h, w) → 0..1, the mean over the classes that are there (Berman et al., arXiv:1705.08790).

    A class's pixels in the order of their errors, the largest first: each error is weighed by how much more of the IoU
    is lost when its pixel is wrong too.
    """
    known = truth != VOID
    shares, truth = logits.softmax(dim=1).movedim(1, -1)[known], truth[known]
    there = torch.bincount(truth).nonzero().flatten().tolist()
    losses = [_jaccard_loss(shares[:, class_id], truth == class_id) for class_id in there]
    return torch.stack(losses).mean() if losses else shares.sum()


def _jaccard_loss(shares: torch.Tensor, is_there: torch.Tensor) -> torch.Tensor:
    """One class's shares, 0..1 (pixels,), and where it truly is, bool (pixels,), at least once."""
    errors, order = torch.where(is_there, 1 - shares, shares).sort(descending=True)
    there = is_there[order].float()
    lost = 1 - (there.sum() - there.cumsum(0)) / (there.sum() + (1 - there).cumsum(0))
    return errors @ lost.diff(prepend=lost.new_zeros(1))


# ---------------------------------------------------------------------------------------------------------------
# Figures


@dataclass(frozen=True)
class ClassMetrics:
    """One class's share, 0..1, over the pixels of all images; F1 is also called the Dice score."""

    label: str
    pixels: int  # that truly are of it
    iou: float | None  # None where it is in neither the truth nor the answers
    precision: float
    recall: float
    f1: float


@dataclass(frozen=True)
class Metrics:
    """Figures of one set of answers, over the pixels of all images at the photos' size; VOID ones are left out."""

    mean_iou: float  # 0..1, over the classes that occur in the truth or in the answers
    pixel_accuracy: float  # 0..1
    per_class: tuple[ClassMetrics, ...]
    confusion: tuple[tuple[int, ...], ...]  # [true][predicted], pixels

    def to_dict(self) -> dict[str, Any]:
        """Plain lists, strings and numbers, for JSON."""
        return asdict(self)


@dataclass(frozen=True)
class Mistake:
    """An image whose class map is not all right."""

    path: str
    iou: float  # 0..1, mean over the classes in its truth or its answers
    mask: str  # path of the truth
    levels: tuple[int, ...]  # its classes' values
    answers: tuple[dict[str, Any], ...]  # plain


def metric(answers: Sequence[runner.Results], samples: Sequence[Sample]) -> float:
    """Plain answers and the truth → the figure that an accuracy guard looks at, 0..1: the mean IoU."""
    return _mean_iou(_confusion(answers, samples, VOID))  # a class map has no more classes than that


def metrics(answers: Sequence[runner.Results], samples: Sequence[Sample], class_names: Sequence[str]) -> Metrics:
    """Plain answers of all classes and the truth, in the same order → the figures; 0 where there is nothing to count.

    Raises ValueError when there are no images.
    """
    if not samples:
        raise ValueError("no images to measure")
    count = len(class_names)
    table = _confusion(answers, samples, count)
    true, right, predicted = table.sum(axis=1), table.diagonal(), table.sum(axis=0)[:-1]
    return Metrics(
        mean_iou=_mean_iou(table),
        pixel_accuracy=_share(right.sum(), table.sum()),
        per_class=tuple(
            ClassMetrics(
                label=name,
                pixels=int(true[k]),
                iou=_share(right[k], true[k] + predicted[k] - right[k]) if true[k] + predicted[k] else None,
                precision=_share(right[k], predicted[k]),
                recall=_share(right[k], true[k]),
                f1=_share(2 * right[k], true[k] + predicted[k]),
            )
            for k, name in enumerate(class_names)
        ),
        confusion=tuple(tuple(row) for row in table[:, :count].tolist()),
    )


def mistakes(
    answers: Sequence[runner.Results], samples: Sequence[Sample], class_names: Sequence[str], limit: int = 24
) -> tuple[Mistake, ...]:
    """The images whose answers are least like their masks, the worst first."""
    rows = []
    for results, sample, table in zip(answers, samples, _confusions(answers, samples, len(class_names)), strict=True):
        iou = _mean_iou(table)
        if iou < 1 and table.any():
            rows.append((iou, str(sample.path), _mask(sample), results))
    rows.sort(key=lambda row: row[:2])
    return tuple(
        Mistake(path, iou, str(mask.path), mask.levels, tuple(results)) for iou, path, mask, results in rows[:limit]
    )


def agreement(answers: Sequence[runner.Results], others: Sequence[runner.Results], _: runner.Spec) -> float:
    """The share of all pixels, 0..1, to which two networks give the same class."""
    same = total = 0
    for mine, theirs in zip(answers, others, strict=True):
        equal = _class_map(mine) == _class_map(theirs)
        same += int(equal.sum())
        total += equal.size
    return same / total


def _confusion(answers: Sequence[runner.Results], samples: Sequence[Sample], count: int) -> np.ndarray:
    table = np.zeros((count, count + 1), np.int64)
    for each in _confusions(answers, samples, count):
        table += each
    return table


def _confusions(answers: Sequence[runner.Results], samples: Sequence[Sample], count: int) -> Iterator[np.ndarray]:
    """Of each image int64 (count, count + 1): pixels by [true][predicted]; the last column: those without an answer."""
    for results, sample in zip(answers, samples, strict=True):
        truth, predicted = read_mask(_mask(sample)), _class_map(results)
        known = truth != VOID
        pairs = truth[known].astype(np.int64) * (count + 1) + np.minimum(predicted[known], count)
        yield np.bincount(pairs, minlength=count * (count + 1)).reshape(count, count + 1)


def _class_map(results: runner.Results) -> np.ndarray:
    """Plain answers → uint8 (H, W): the class of each pixel, VOID where there is no answer."""
    classes = np.full(results[0]["mask"]["size"], VOID, np.uint8)
    for each in results:
        classes[runner.from_rle(each["mask"])] = each["class_id"]
    return classes


def _mask(sample: Sample) -> Mask:
    assert isinstance(sample.label, Mask)  # datasets gives segmentation nothing else
    return sample.label


def _mean_iou(table: np.ndarray) -> float:
    """table: int64 (C, C + 1), as _confusions gives it. 0 where no class occurs."""
    right = table.diagonal()
    either = table.sum(axis=1) + table.sum(axis=0)[:-1] - right
    occurs = either > 0
    return float((right[occurs] / either[occurs]).mean()) if occurs.any() else 0.0


def _share(part: np.integer[Any], whole: np.integer[Any]) -> float:
    return float(part / whole) if whole else 0.0
