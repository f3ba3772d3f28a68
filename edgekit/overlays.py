"""A photo with the truth and a network's answer drawn on it: what a mistake looks like.

Detection: true boxes are dashed, black and white, and answers solid; what is missed or false is thick. Segmentation:
the answer is filled, and a line runs around the truth. So all can be told apart without colours too.
"""

from __future__ import annotations

import colorsys
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cv2
import numpy as np

from edgekit import runner
from edgekit.errors import DataError
from edgekit.samples import Mask, read_mask

Entry = Mapping[str, Any]  # a true box or an answer, as metrics.json has them

Corners = tuple[int, int, int, int]  # left, top, right, bottom

BLACK, WHITE = (0, 0, 0), (255, 255, 255)
RIGHT, WRONG = (255, 144, 30), (0, 100, 255)  # BGR, of answers: blue, and orange
IOU_THRESHOLD = 0.5  # a box with less is another object's


def drawn(mistake: Entry, metrics: Mapping[str, Any], smallest: int, largest: int) -> np.ndarray | None:
    """A mistake of metrics.json → its photo with truth and answer, uint8 (h, w, 3) BGR; None: a file is gone.

    The longer side is the photo's own, but at least `smallest` and at most `largest` pixels. Of classification it is
    the photo alone.
    """
    try:
        photo = runner.read_image(Path(mistake["path"]))
        image = fitted(photo, min(largest, max(smallest, *photo.shape[:2])))
        if metrics["task"] == "detect":
            return _with_boxes(image, image.shape[1] / photo.shape[1], judged(mistake, metrics))
        if metrics["task"] == "segment":
            return _with_regions(image, read_mask(Mask(Path(mistake["mask"]), "", tuple(mistake["levels"]))), mistake)
    except (runner.RunnerError, DataError):
        return None
    return image


def fitted(image: np.ndarray, side: int) -> np.ndarray:
    """uint8 (H, W, 3) → the same picture, its longer side `side` pixels; for eyes, not for networks."""
    scale = side / max(image.shape[:2])
    # Tiny images are shown as the pixels that they are: smoothed, 8 px of a digit are a blur.
    method = cv2.INTER_AREA if scale < 1 else cv2.INTER_CUBIC if scale < 4 else cv2.INTER_NEAREST
    size = (max(1, round(image.shape[1] * scale)), max(1, round(image.shape[0] * scale)))
    return np.asarray(cv2.resize(image, size, interpolation=method))


# ---------------------------------------------------------------------------------------------------------------
# Boxes


@dataclass(frozen=True)
class Judged:
    """An image's true boxes and answers, by what became of them."""

    found: tuple[Entry, ...]
    missed: tuple[Entry, ...]
    right: tuple[Entry, ...]
    false: tuple[Entry, ...]


def judged(mistake: Entry, metrics: Mapping[str, Any]) -> Judged:
    """A detection's mistake of metrics.json → what was found and what not, at the score where F1 is best.

    Answers choose in the order of their scores: each takes the true box of its class that it overlaps most, if its
    IoU is at least 0.5 and no other has it.
    """
    score = metrics["columns"]["torch"]["best_f1_score"]
    answers = sorted((a for a in mistake["answers"] if a["score"] >= score), key=lambda a: -a["score"])
    left, right, false = list(mistake["truth"]), [], []
    for answer in answers:
        rivals = [true for true in left if true["class_id"] == answer["class_id"]]
        best = max(rivals, key=lambda true: _iou(true["box"], answer["box"]), default=None)
        if best is not None and _iou(best["box"], answer["box"]) >= IOU_THRESHOLD:
            left = [true for true in left if true is not best]
            right.append(answer)
        else:
            false.append(answer)
    missed = {id(true) for true in left}
    found = tuple(true for true in mistake["truth"] if id(true) not in missed)
    return Judged(found, tuple(left), tuple(right), tuple(false))


def _iou(one: Sequence[float], other: Sequence[float]) -> float:
    width = min(one[2], other[2]) - max(one[0], other[0])
    height = min(one[3], other[3]) - max(one[1], other[1])
    shared = max(0.0, width) * max(0.0, height)
    areas = sum((right - left) * (bottom - top) for left, top, right, bottom in (one, other))
    return shared / (areas - shared) if shared else 0.0


def labels_of(boxes: Iterable[Entry]) -> str:
    """→ "RBC (3), Platelets": the commonest class first, with its count where there are several."""
    counts = Counter(str(box["label"]) for box in boxes).most_common()
    return ", ".join(f"{label} ({count})" if count > 1 else label for label, count in counts)


def _with_boxes(image: np.ndarray, scale: float, boxes: Judged) -> np.ndarray:
    """scale: pixels of `image` a pixel of the photo."""
    canvas, thin = image.copy(), max(1, round(max(image.shape[:2]) / 300))

    def corners(entry: Entry) -> Corners:
        left, top, right, bottom = (round(scale * edge) for edge in entry["box"])
        return left, top, max(left + 1, right - 1), max(top + 1, bottom - 1)

    for entry in boxes.right:
        _rectangle(canvas, corners(entry), RIGHT, thin)
    for entry in boxes.found:
        _dashed(canvas, corners(entry), thin, is_cased=False)
    for entry in boxes.false:
        _rectangle(canvas, corners(entry), WHITE, 5 * thin)
        _rectangle(canvas, corners(entry), WRONG, 3 * thin)
    for entry in boxes.missed:
        _dashed(canvas, corners(entry), 3 * thin, is_cased=True)
    return canvas


def _rectangle(canvas: np.ndarray, box: Corners, color: tuple[int, int, int], thickness: int) -> None:
    cv2.rectangle(canvas, box[:2], box[2:], color, thickness)


def _dashed(canvas: np.ndarray, box: Corners, thickness: int, *, is_cased: bool) -> None:
    """White dashes; cased: with black ones between them, so that they are seen on any photo."""
    line = np.zeros(canvas.shape[:2], np.uint8)
    cv2.rectangle(line, box[:2], box[2:], 1, thickness)
    rows, columns = np.nonzero(line)
    dash = (2 if is_cased else 4) * thickness
    is_white = (rows + columns) // dash % 2 == 0
    canvas[rows[is_white], columns[is_white]] = WHITE
    if is_cased:
        canvas[rows[~is_white], columns[~is_white]] = BLACK


# ---------------------------------------------------------------------------------------------------------------
# Regions


def region_color(class_id: int) -> tuple[int, int, int]:
    """RGB of a class from 1 on, each as far as may be from those before it. Class 0 is what lies behind: it has none.

    The hues are steps of the golden ratio around the circle, from orange.
    """
    red, green, blue = colorsys.hsv_to_rgb((0.06 + 0.618034 * (class_id - 1)) % 1, 0.8, 1.0)
    return round(255 * red), round(255 * green), round(255 * blue)


def _with_regions(image: np.ndarray, truth: np.ndarray, mistake: Entry) -> np.ndarray:
    """truth: uint8 (H, W), the class of each of the photo's pixels."""
    canvas, thin = image.copy(), max(1, round(max(image.shape[:2]) / 300))
    size = (image.shape[1], image.shape[0])
    for answer in mistake["answers"]:
        if answer["class_id"] > 0:
            region = _resized(runner.from_rle(answer["mask"]), size)
            canvas[region] = 0.6 * canvas[region] + 0.4 * np.array(region_color(answer["class_id"])[::-1])
    for class_id in np.unique(truth[truth != 255]):
        if class_id > 0:
            region = _resized(truth == class_id, size)
            inner, outer = _ring(region, 2 * thin), _ring(region, 3 * thin)
            canvas[outer] = WHITE
            canvas[inner] = region_color(int(class_id))[::-1]
    return canvas


def _resized(mask: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """bool (H, W) → bool of `size` (w, h). A thin crack stays one: a quarter of a pixel is enough to show it."""
    return np.asarray(cv2.resize(mask.astype(np.uint8) * 255, size, interpolation=cv2.INTER_AREA) >= 64)


def _ring(region: np.ndarray, width: int) -> np.ndarray:
    """bool (h, w) → bool: the pixels outside of the region that are at most `width` from it."""
    kernel = cv2.getStructuringElement(cv2.MORPH_ELLIPSE, (2 * width + 1, 2 * width + 1))
    return np.asarray((cv2.dilate(region.astype(np.uint8), kernel) > 0) & ~region)
