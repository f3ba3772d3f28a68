"""Detection: a box and a label an object.

The network answers in one shot and has no anchors: each cell of three maps says which class lies there and how far the
box's four edges are (Tian et al., FCOS, arXiv:1904.01355). Which cells a box trains is decided by how well they already
find it (Feng et al., TOOD, arXiv:2108.07755, section 3.2).
"""

from __future__ import annotations

import contextlib
import io
import math
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import chain
from typing import Any, cast

import numpy as np
import torch
import torch.nn.functional as F
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval
from torch import nn
from torchvision.ops import box_iou, complete_box_iou_loss

from edgekit import backbones, runner
from edgekit.recipe import Recipe
from edgekit.samples import Box, Sample
from edgekit.tasks import pyramid

STRIDES = backbones.DETECT_STRIDES
OUTPUTS = tuple(f"{kind}_{stride}" for stride in STRIDES for kind in ("classes", "boxes"))
METRIC = "mAP@0.5"
ANSWERS: dict[str, Any] = {"min_score": 0.01}

WIDTH = 96  # channels of the pyramid
FIRST_SCORE = 0.01  # of every cell, so that the many that see nothing do not drown the few (arXiv:1708.02002, 4.1)
FIRST_DISTANCE = 3.0  # strides to each edge

CELLS = 13  # at most, that a box trains, as in TOOD
SCORE_POWER, IOU_POWER = 0.5, 6.0  # alignment = score^0.5 IoU^6: at first, when all scores are alike, IoU decides
LEAST_TARGET = 0.1  # of a box's best cell: with none, a box that is not met at all would never be learnt
BALANCE = 0.75  # a class's weight is its share of the batch's targets to the power of minus this
BOX_WEIGHT = 2.0  # of the boxes' loss beside the classes', as in TOOD
LOG_DISTANCES = (-6.0, 12.0)  # what is believed of an output in training: exp stays finite, and no box is flat
TINY = 1e-30  # above 0 in float32

IOU_THRESHOLDS = tuple(0.5 + 0.05 * step for step in range(10))  # COCO's
RECALLS = tuple(step / 100 for step in range(101))
MOST_ANSWERS = 100  # of a class and image count, as in COCO


# ---------------------------------------------------------------------------------------------------------------
# The network


class Detector(nn.Module):
    """float32 (N, 3, h, w), sides multiples of 32 → a map of classes and one of boxes a stride, as OUTPUTS.

    classes_{s}: float32 (N, C, h/s, w/s), logits. boxes_{s}: float32 (N, 4, h/s, w/s), the logarithm of the distance
    from the cell's centre to the left, top, right and bottom edge, in units of s.
    """

    def __init__(self, trunk: nn.Module, class_count: int) -> None:
        super().__init__()
        self.trunk = trunk
        self.head = Head(backbones.feature_channels(trunk, STRIDES), class_count)

    def forward(self, images: torch.Tensor) -> tuple[torch.Tensor, ...]:
        outputs: tuple[torch.Tensor, ...] = self.head(backbones.feature_maps(self.trunk, images, STRIDES))
        return outputs


class Head(nn.Module):
    """The trunk's maps → the detector's outputs."""

    def __init__(self, channels: Sequence[int], class_count: int) -> None:
        super().__init__()
        self.pyramid = pyramid.Pyramid(channels, WIDTH)
        bias = math.log(FIRST_SCORE / (1 - FIRST_SCORE))
        self.classes = nn.ModuleList(_tower(class_count, bias) for _ in channels)
        self.boxes = nn.ModuleList(_tower(4, math.log(FIRST_DISTANCE)) for _ in channels)

    def forward(self, maps: Sequence[torch.Tensor]) -> tuple[torch.Tensor, ...]:
        levels = zip(self.classes, self.boxes, self.pyramid(maps), strict=True)
        return tuple(chain.from_iterable((classes(each), boxes(each)) for classes, boxes, each in levels))


def _tower(outputs: int, bias: float) -> nn.Sequential:
    return nn.Sequential(
        pyramid.separable(WIDTH, WIDTH), pyramid.separable(WIDTH, WIDTH), pyramid.last(WIDTH, outputs, bias)
    )


def build(recipe: Recipe, class_names: Sequence[str], *, pretrained: bool) -> nn.Module:
    """The recipe's backbone with a new detection head: see Detector.

    pretrained=False leaves the recipe's weights aside (they are about to be loaded from elsewhere).
    """
    return Detector(pyramid.trunk(recipe, STRIDES, pretrained=pretrained), len(class_names))


def trunk(model: nn.Module) -> nn.Module:
    """The backbone inside."""
    return cast("Detector", model).trunk


def head(model: nn.Module) -> nn.Module:
    """All that is new: the pyramid and the towers."""
    return cast("Detector", model).head


# ---------------------------------------------------------------------------------------------------------------
# The loss


def loss(outputs: Sequence[torch.Tensor], labels: Sequence[np.ndarray], recipe: Recipe) -> torch.Tensor:  # noqa: ARG001 (every task's loss)
    """The network's outputs and each image's boxes, float32 (n, 5) [class, left, top, right, bottom] → what is wrong.

    Of every cell and class binary cross-entropy, whose target at the cells that a box trains is how well they fit it
    (0..1) and elsewhere 0, and of those cells' boxes the complete IoU loss (Zheng et al., arXiv:1911.08287), weighted
    by that target; both over the sum of the targets. Labels without area are left out.
    """
    logits = _flat(outputs[0::2])
    centres, strides = _cells(outputs[0::2])
    boxes = _decode(_flat(outputs[1::2]), centres, strides)
    truths = [_truth(each).to(logits.device) for each in labels]
    scores = logits.detach().sigmoid()

    targets = torch.zeros_like(logits)
    weights, predicted, wanted = [], [], []
    for image, truth in enumerate(truths):
        owner, target = assign(scores[image], boxes[image].detach(), centres, truth)
        cells = (owner >= 0).nonzero().flatten()
        mine = truth[owner[cells]]
        targets[image, cells, mine[:, 0].long()] = target[cells]
        weights.append(target[cells])
        predicted.append(boxes[image, cells])
        wanted.append(mine[:, 1:])
    weight = torch.cat(weights)
    box_losses: torch.Tensor = complete_box_iou_loss(torch.cat(predicted), torch.cat(wanted))
    return (_class_loss(logits, targets) + BOX_WEIGHT * (box_losses * weight).sum()) / weight.sum().clamp(min=1)


def _class_loss(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Both (N, cells, C) → the sum of the binary cross-entropies, so weighted that what is rare is learnt soon.

    There are thousands of cells to a box: one that should see nothing weighs as much as the score that it gives (as in
    VarifocalNet, arXiv:2008.13367). And classes whose boxes are few weigh more.
    """
    each = targets.sum(dim=(0, 1))
    balance = torch.where(each > 0, (each.sum().clamp(min=1) / each.clamp(min=1)) ** BALANCE, 1)
    weights = torch.where(targets > 0, 1, logits.detach().sigmoid()) * balance
    return F.binary_cross_entropy_with_logits(logits, targets, weight=weights, reduction="sum")


def _flat(maps: Sequence[torch.Tensor]) -> torch.Tensor:
    """(N, C, h, w) a stride → float32 (N, cells, C), stride by stride, row by row."""
    return torch.cat([each.float().flatten(2) for each in maps], dim=2).transpose(1, 2)


def _cells(maps: Sequence[torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    """→ float32 (cells, 2), the centres (x, y) in pixels of the input, and (cells, 1), their strides."""
    centres, strides = [], []
    for stride, each in zip(STRIDES, maps, strict=True):
        height, width = each.shape[2:]
        rows = (torch.arange(height, device=each.device) + 0.5) * stride
        columns = (torch.arange(width, device=each.device) + 0.5) * stride
        centres.append(torch.cartesian_prod(rows, columns).flip(1))
        strides.append(torch.full((height * width, 1), float(stride), device=each.device))
    return torch.cat(centres), torch.cat(strides)


def _decode(raw: torch.Tensor, centres: torch.Tensor, strides: torch.Tensor) -> torch.Tensor:
    """Outputs (N, cells, 4) → boxes (N, cells, 4): left, top, right, bottom in pixels of the input."""
    distances = raw.clamp(*LOG_DISTANCES).exp() * strides
    return torch.cat([centres - distances[..., :2], centres + distances[..., 2:]], dim=-1)


def _truth(label: np.ndarray) -> torch.Tensor:
    boxes = torch.from_numpy(label).float().reshape(-1, 5)
    return boxes[(boxes[:, 3] > boxes[:, 1]) & (boxes[:, 4] > boxes[:, 2])]


@torch.no_grad()
def assign(
    scores: torch.Tensor, boxes: torch.Tensor, centres: torch.Tensor, truth: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Which cells of an image each of its boxes trains, and with what target.

    scores: float32 (cells, C) in 0..1; boxes: float32 (cells, 4), what the cells say now; centres: float32 (cells, 2);
    truth: float32 (n, 5) [class, left, top, right, bottom]. → int64 (cells,), the index of the cell's box or -1, and
    float32 (cells,), targets in 0..1, 0 where there is no box.

    A box gets those CELLS of the cells with their centre inside it (of none: the nearest cell) that are aligned best. A
    cell that several boxes want goes to the one that it overlaps most. Every box gets a cell, while there are enough.
    """
    count = len(truth)
    owner = torch.full((len(centres),), -1, dtype=torch.int64, device=centres.device)
    target = torch.zeros(len(centres), device=centres.device)
    if not count:
        return owner, target
    iou = box_iou(truth[:, 1:], boxes)
    inside = ((centres > truth[:, None, 1:3]) & (centres < truth[:, None, 3:5])).all(dim=2)
    alignment = scores.T[truth[:, 0].long()] ** SCORE_POWER * iou**IOU_POWER
    alignment = alignment.clamp(min=TINY) * inside

    best = alignment.topk(min(CELLS, len(centres)), dim=1).indices
    wanted = torch.zeros_like(inside).scatter_(1, best, True) & inside
    owner = torch.where(wanted.any(dim=0), iou.masked_fill(~wanted, -1).argmax(dim=0), owner)
    _serve_the_rest(owner, alignment, centres, truth)

    cells = (owner >= 0).nonzero().flatten()
    mine = owner[cells]
    own_alignment, own_iou = alignment[mine, cells].clamp(min=TINY), iou[mine, cells]
    best_alignment = torch.zeros_like(alignment[:, 0]).scatter_reduce_(0, mine, own_alignment, "amax")
    best_iou = torch.zeros_like(alignment[:, 0]).scatter_reduce_(0, mine, own_iou, "amax")
    target[cells] = own_alignment / best_alignment[mine] * best_iou[mine].clamp(min=LEAST_TARGET, max=1)
    return owner, target


def _serve_the_rest(owner: torch.Tensor, alignment: torch.Tensor, centres: torch.Tensor, truth: torch.Tensor) -> None:
    """Gives each box without a cell one that is not another's only one, in place: the best aligned one inside the box,
    else the nearest. alignment: float32 (boxes, cells), 0 outside the box.
    """
    counts = torch.bincount(owner[owner >= 0], minlength=len(alignment))
    for box in (counts == 0).nonzero().flatten().tolist():
        taken = (owner >= 0) & (counts[owner.clamp(min=0)] == 1)
        if bool(taken.all()):
            return
        away = ((truth[box, 1:3] + truth[box, 3:5]) / 2 - centres).square().sum(dim=1).masked_fill(taken, torch.inf)
        fits = alignment[box].masked_fill(taken, 0)
        cell = fits.argmax() if bool(fits.any()) else away.argmin()  # the finest of equals: they come first
        if owner[cell] >= 0:
            counts[owner[cell]] -= 1
        owner[cell] = box
        counts[box] = 1


# ---------------------------------------------------------------------------------------------------------------
# Figures


@dataclass(frozen=True)
class ClassMetrics:
    """One class's share; a class without boxes has no average precision and counts in no mean.

    precision, recall, f1: of the answers with a score of Metrics.best_f1_score or more, IoU 0.5.
    """

    label: str
    support: int  # how many boxes there truly are
    ap50: float | None
    ap: float | None  # mean over COCO's ten IoUs
    precision: float
    recall: float
    f1: float


@dataclass(frozen=True)
class Metrics:
    """Figures of one set of answers, all in 0..1; average precision as COCO defines it, over the classes with boxes."""

    map: float  # mean over IoU 0.5, 0.55, ... 0.95
    map50: float
    map75: float
    best_f1_score: float  # the score from which on the answers of all classes together have the best F1 at IoU 0.5
    per_class: tuple[ClassMetrics, ...]
    pr_curves: dict[str, tuple[float, ...]]  # of each class with boxes: precision at recall 0, 0.01, ... 1; IoU 0.5

    def to_dict(self) -> dict[str, Any]:
        """Plain lists, strings and numbers, for JSON."""
        return asdict(self)


@dataclass(frozen=True)
class Mistake:
    """An image with wrong answers; those with a score of Metrics.best_f1_score or more count, IoU 0.5."""

    path: str
    missed: int  # boxes that no answer found
    false: int  # answers that found no box
    truth: tuple[dict[str, Any], ...]  # {"label", "class_id", "box": [left, top, right, bottom]} in photo pixels
    answers: tuple[dict[str, Any], ...]  # those that count


@dataclass(frozen=True)
class _Matches:
    """The answers of one class in one image at IoU 0.5, best first."""

    image: int
    class_id: int
    truth: int  # boxes
    scores: np.ndarray  # float64 (answers,)
    right: np.ndarray  # bool (answers,)


def metric(answers: Sequence[runner.Results], samples: Sequence[Sample]) -> float:
    """Plain answers and the truth → the figure that an accuracy guard looks at, 0..1: mAP at IoU 0.5."""
    classes = 1 + max((box.class_id for sample in samples for box in _boxes(sample)), default=0)
    return _mean(_evaluate(answers, samples, classes, IOU_THRESHOLDS[:1]).eval["precision"][0, :, :, 0, 0])


def metrics(answers: Sequence[runner.Results], samples: Sequence[Sample], class_names: Sequence[str]) -> Metrics:
    """Plain answers (made with a low min_score) and the truth, in the same order → the figures.

    Raises ValueError when there are no images.
    """
    if not samples:
        raise ValueError("no images to measure")
    found = _evaluate(answers, samples, len(class_names), IOU_THRESHOLDS)
    precision: np.ndarray = found.eval["precision"][:, :, :, 0, 0]  # (10 IoUs, 101 recalls, C); -1: no boxes
    matches = list(_matches(found))
    threshold = _best_f1_score(matches)
    return Metrics(
        map=_mean(precision),
        map50=_mean(precision[0]),
        map75=_mean(precision[5]),
        best_f1_score=threshold,
        per_class=tuple(
            _class_metrics(name, precision[:, :, k], [each for each in matches if each.class_id == k], threshold)
            for k, name in enumerate(class_names)
        ),
        pr_curves={
            name: tuple(precision[0, :, k].tolist()) for k, name in enumerate(class_names) if precision[0, 0, k] >= 0
        },
    )


def mistakes(
    answers: Sequence[runner.Results], samples: Sequence[Sample], class_names: Sequence[str], limit: int = 24
) -> tuple[Mistake, ...]:
    """The images with most missed and false boxes first, of equals the one with the most confident answer."""
    matches = list(_matches(_evaluate(answers, samples, len(class_names), IOU_THRESHOLDS[:1])))
    threshold = _best_f1_score(matches)
    missed, false = [0] * len(samples), [0] * len(samples)
    for each in matches:
        counts = each.scores >= threshold
        right = int(each.right[counts].sum())
        missed[each.image] += each.truth - right
        false[each.image] += int(counts.sum()) - right
    rows = [
        Mistake(
            path=str(sample.path),
            missed=missed[i],
            false=false[i],
            truth=tuple(_shown(box, class_names) for box in _boxes(sample)),
            answers=tuple(answer for answer in answers[i] if answer["score"] >= threshold),
        )
        for i, sample in enumerate(samples)
        if missed[i] or false[i]
    ]
    rows.sort(key=lambda row: (-row.missed - row.false, -max((a["score"] for a in row.answers), default=0), row.path))
    return tuple(rows[:limit])


def _shown(box: Box, class_names: Sequence[str]) -> dict[str, Any]:
    edges = [box.left, box.top, box.right, box.bottom]
    return {"label": class_names[box.class_id], "class_id": box.class_id, "box": edges}


def agreement(answers: Sequence[runner.Results], others: Sequence[runner.Results], spec: runner.Spec) -> float:
    """The share of two networks' boxes, 0..1, that the other one has too: same class, IoU 0.5 or more, one to one.

    Boxes with a score of spec.score_threshold or more count. 1 where neither has any.
    """
    matched = total = 0
    for mine, theirs in zip(answers, others, strict=True):
        left, right = (
            [each for each in results if each["score"] >= spec.score_threshold] for results in (mine, theirs)
        )
        matched += _matched(left, right)
        total += len(left) + len(right)
    return 2 * matched / total if total else 1.0


def _matched(left: runner.Results, right: runner.Results) -> int:
    """How many pairs of the same class with IoU 0.5 or more there are, one to one, the closest first."""
    if not left or not right:
        return 0
    iou = box_iou(*(torch.tensor([each["box"] for each in results], dtype=torch.float64) for results in (left, right)))
    same = np.equal.outer([each["class_id"] for each in left], [each["class_id"] for each in right])
    values = np.where(same, iou.numpy(), 0)
    count = 0
    while values.max() >= 0.5:
        row, column = np.unravel_index(values.argmax(), values.shape)
        values[row], values[:, column] = 0, 0
        count += 1
    return count


def _boxes(sample: Sample) -> tuple[Box, ...]:
    assert isinstance(sample.label, tuple)  # datasets gives detection nothing else
    return sample.label


def _evaluate(
    answers: Sequence[runner.Results], samples: Sequence[Sample], class_count: int, thresholds: Sequence[float]
) -> Any:
    """COCO's own evaluation at some IoUs, done and accumulated; without its distinction of sizes."""
    truths = [
        (image, box.class_id, (box.left, box.top, box.right, box.bottom), 1.0)
        for image, sample in enumerate(samples)
        for box in _boxes(sample)
    ]
    found = [
        (image, each["class_id"], each["box"], each["score"])
        for image, (results, _) in enumerate(zip(answers, samples, strict=True))
        for each in results
    ]
    with contextlib.redirect_stdout(io.StringIO()):  # it tells its progress
        evaluation = COCOeval(
            _coco(truths, len(samples), class_count), _coco(found, len(samples), class_count), iouType="bbox"
        )
        evaluation.params.iouThrs = np.array(thresholds)
        evaluation.params.recThrs = np.array(RECALLS)
        evaluation.params.maxDets = [MOST_ANSWERS]
        evaluation.params.areaRng, evaluation.params.areaRngLbl = [[0, math.inf]], ["all"]
        evaluation.evaluate()
        evaluation.accumulate()
    return evaluation


def _coco(rows: Sequence[tuple[int, int, Sequence[float], float]], images: int, classes: int) -> Any:
    """(image, class, edges, score) → a COCO data set. Its numbers start from 1: to COCO 0 is "no box"."""
    coco = COCO()
    coco.dataset = {
        "images": [{"id": image} for image in range(images)],
        "categories": [{"id": class_id} for class_id in range(classes)],
        "annotations": [
            {
                "id": number,
                "image_id": image,
                "category_id": class_id,
                "bbox": [left, top, right - left, bottom - top],
                "area": (right - left) * (bottom - top),
                "iscrowd": 0,
                "score": score,
            }
            for number, (image, class_id, (left, top, right, bottom), score) in enumerate(rows, start=1)
        ],
    }
    coco.createIndex()
    return coco


def _matches(evaluation: Any) -> Iterator[_Matches]:
    for each in evaluation.evalImgs:
        if each is not None:
            yield _Matches(
                image=int(each["image_id"]),
                class_id=int(each["category_id"]),
                truth=len(each["gtIds"]),
                scores=np.array(each["dtScores"], np.float64),
                right=each["dtMatches"][0] > 0,
            )


def _best_f1_score(matches: Sequence[_Matches]) -> float:
    """The least score whose answers, and those above, have the best F1; of equals the highest. 1 without answers."""
    scores = np.concatenate([np.empty(0), *(each.scores for each in matches)])
    right = np.concatenate([np.empty(0, bool), *(each.right for each in matches)])
    if not len(scores):
        return 1.0
    order = np.argsort(-scores, kind="stable")
    scores = scores[order]
    f1 = 2 * right[order].cumsum() / (np.arange(1, len(scores) + 1) + sum(each.truth for each in matches))
    ends = np.append(scores[1:] < scores[:-1], True)  # answers of one score count together
    return float(scores[np.where(ends, f1, -1).argmax()])


def _class_metrics(label: str, precision: np.ndarray, matches: Sequence[_Matches], threshold: float) -> ClassMetrics:
    """precision: (10 IoUs, 101 recalls)."""
    truth = sum(each.truth for each in matches)
    counting = sum(int((each.scores >= threshold).sum()) for each in matches)
    right = sum(int(each.right[each.scores >= threshold].sum()) for each in matches)
    return ClassMetrics(
        label=label,
        support=truth,
        ap50=_mean(precision[0]) if truth else None,
        ap=_mean(precision) if truth else None,
        precision=right / counting if counting else 0.0,
        recall=right / truth if truth else 0.0,
        f1=2 * right / (counting + truth) if counting + truth else 0.0,
    )


def _mean(precision: np.ndarray) -> float:
    """Over what has boxes; 0 where nothing has."""
    known = precision[precision >= 0]
    return float(known.mean()) if known.size else 0.0
