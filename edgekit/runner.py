"""The device half of edgekit: one file, standard library + numpy + OpenCV.

`edgekit bundle` copies this file byte for byte into every bundle as `run.py`; training, evaluation, calibration
and proofs import it as `edgekit.runner`. So the pixels that a network was trained on, and the answer that is
read from its output, are made by the same code everywhere.

    python3 run.py infer SOURCE ...   images, folders, globs, videos, URLs, --camera N  → a JSON line each
    python3 run.py check              the bundle's own images against the trained model's answers
    python3 run.py bench              latency here, stage by stage
    python3 run.py info               what this bundle is, and what it meets on this device

    from run import Model
    results = Model("bundle")(cv2.imread("photo.jpg"))

Exit codes: 0 ok, 1 the check failed, 2 bad usage or bad input, 3 ok, but on another backend than the bundle is for
(--allow-fallback), 130 interrupted.
Python >= 3.8, OpenCV >= 4.5.4 and 5.0, numpy 1 and 2.
"""

from __future__ import annotations

import argparse
import colorsys
import contextlib
import ctypes
import glob
import hashlib
import importlib.util
import io
import itertools
import json
import math
import os
import platform
import re
import subprocess
import sys
import time
import zipfile
from collections import Counter, deque
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Callable, Dict, Generator, Iterator, List, Sequence, Tuple

_IMPORT_STARTED = time.perf_counter()
try:
    import cv2
    import numpy as np
except ImportError as error:
    if __name__ != "__main__":
        raise
    needs = Path(__file__).resolve().with_name("requirements.txt")
    print(f"run.py: {error}. It needs numpy and OpenCV: python3 -m pip install -r {needs}", file=sys.stderr)
    sys.exit(2)

IMPORT_MS = (time.perf_counter() - _IMPORT_STARTED) * 1e3  # of numpy and OpenCV, where nothing had them before
SCHEMA = "edgekit.bundle/1"
IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".webp", ".tif", ".tiff", ".ppm", ".pgm", ".jp2")
VIDEO_SUFFIXES = (".mp4", ".avi", ".mov", ".mkv", ".webm", ".m4v", ".mpg", ".mpeg", ".ts", ".wmv", ".mjpeg")

Results = List[Dict[str, Any]]
Outputs = Dict[str, np.ndarray]
Size = Tuple[int, int]  # (height, width) in pixels


class RunnerError(Exception):
    """Something that the person at the device can mend. Ends a command with exit code 2."""


# ---------------------------------------------------------------------------------------------------------------
# Spec: what goes into the network and what comes out


@dataclass(frozen=True)
class Spec:
    """All that turns an image into the network's input and its output into an answer.

    Saved at fine-tuning (spec.json) and copied unchanged into the bundle's manifest.
    """

    task: str  # "classify", "detect" or "segment"
    input_size: tuple[int, int]  # (height, width) in pixels
    resize: str  # "stretch": all of the image, aspect ratio lost; kept: "crop": its centre, "letterbox": all, with bars
    interpolation: str  # "linear", or "area": averages where the image shrinks
    color_order: str  # what the network was trained on: "rgb" or "bgr"
    mean_255: tuple[float, float, float]  # in 0..255, in color_order
    std_255: tuple[float, float, float]  # in 0..255, in color_order
    class_names: tuple[str, ...]
    # Detection only:
    strides: tuple[int, ...] = ()  # pixels of the input from cell to cell, of each pair of outputs
    score_threshold: float = 0.0  # 0..1: a box with a lower score is no answer
    iou_threshold: float = 0.0  # 0..1: of two boxes of a class that overlap more, the one with the lower score goes
    # Classification only:
    temperature: float = 1.0  # above 0: the logits are divided by it before softmax

    def to_dict(self) -> dict[str, Any]:
        """Plain lists, strings and numbers, for JSON; without the fields that this task does not have."""
        values = {key: list(value) if isinstance(value, tuple) else value for key, value in asdict(self).items()}
        return {key: value for key, value in values.items() if key in _fields_of(self.task)}

    @staticmethod
    def from_dict(raw: dict[str, Any]) -> Spec:
        """The inverse of to_dict. Raises RunnerError for a missing, unknown or impossible value."""
        if not isinstance(raw, dict):
            raise RunnerError(f"the spec is a {type(raw).__name__}. Build the bundle again")
        choices = {
            "task": tuple(POSTPROCESS),
            "resize": ("stretch", "crop", "letterbox"),
            "interpolation": ("linear", "area"),
            "color_order": ("rgb", "bgr"),
        }
        for key, allowed in choices.items():
            if raw.get(key, allowed[0]) not in allowed:
                raise RunnerError(f"the spec's {key} is {raw[key]!r}; this run.py knows {', '.join(allowed)}")
        if raw.get("task") == "classify":
            raw = {"temperature": 1.0, **raw}  # specs of before have none
        odd = sorted(set(raw) ^ _fields_of(raw.get("task")))
        if odd:
            raise RunnerError(f"the spec's keys differ from this run.py's: {', '.join(odd)}. Build the bundle again")
        values: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in raw.items()}
        spec = Spec(**values)
        most_classes = VOID if spec.task == "segment" else math.inf  # a class map has 8 bits
        possible = {
            "input_size": _all_are(spec.input_size, int, 2) and min(spec.input_size) >= 1,
            "mean_255": _all_are(spec.mean_255, (int, float), 3) and all(map(math.isfinite, spec.mean_255)),
            "std_255": _all_are(spec.std_255, (int, float), 3) and all(0 < std < math.inf for std in spec.std_255),
            "class_names": _all_are(spec.class_names, str) and 1 <= len(spec.class_names) <= most_classes,
            "strides": _all_are(spec.strides, int) and min(spec.strides, default=int(spec.task != "detect")) >= 1,
            "score_threshold": _is_share(spec.score_threshold),
            "iou_threshold": _is_share(spec.iou_threshold),
            "temperature": _all_are((spec.temperature,), (int, float)) and 0 < spec.temperature <= sys.float_info.max,
        }
        for key, holds in possible.items():
            if not holds:
                raise RunnerError(f"the spec's {key} cannot be {repr(raw[key])[:80]}. Build the bundle again")
        return spec


def _fields_of(task: Any) -> set[str]:
    owners = {**dict.fromkeys(("strides", "score_threshold", "iou_threshold"), "detect"), "temperature": "classify"}
    return {field for field in Spec.__dataclass_fields__ if owners.get(field, task) == task}


def _is_share(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and 0 <= value <= 1


def _all_are(values: Any, kind: Any, count: int | None = None) -> bool:
    """Whether it is a tuple of `count` values of a kind. A bool is no number here."""
    right = isinstance(values, tuple) and all(isinstance(v, kind) and not isinstance(v, bool) for v in values)
    return right and count in (None, len(values))


# ---------------------------------------------------------------------------------------------------------------
# Image → network input


def decode(data: bytes) -> np.ndarray:
    """The bytes of an image file → uint8 (H, W, 3) BGR, upright (EXIF obeyed), 8 bits, without alpha.

    (EXIF in PNG is obeyed from OpenCV 4.6, in WebP from 4.13.) Raises RunnerError where they are empty, cut off, or
    cannot be decoded.
    """
    if not data:
        raise RunnerError("the file is empty")
    if jpeg_is_cut_off(data):
        raise RunnerError("the JPEG file is cut off: copy it again")
    # imdecode and not imread: imread cannot open paths with other alphabets on Windows.
    try:
        image = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_COLOR)
    except cv2.error as error:
        raise RunnerError(f"OpenCV cannot decode it: {_first_line(error)}") from None
    if image is None:
        raise RunnerError("not an image that OpenCV can decode")
    return image


def jpeg_is_cut_off(data: bytes) -> bool:
    """Whether the bytes begin as a JPEG and lack its end mark.

    OpenCV refuses such a file from 4.11 on. Before, it fills the rest with grey, or with what the memory held.
    """
    if not data.startswith(b"\xff\xd8"):
        return False
    # From segment to segment up to the pixels: a thumbnail inside the EXIF segment has an end mark of its own.
    position = 2
    while position + 4 <= len(data) and data[position] == 0xFF:
        marker = data[position + 1]
        if marker == 0xDA:  # start of scan: after it, FF D9 can only be the end mark
            return data.find(b"\xff\xd9", position) < 0
        is_fill = marker == 0xFF
        position += 1 if is_fill else 2 + int.from_bytes(data[position + 2 : position + 4], "big")
    return position + 4 > len(data)  # else: no JPEG structure; the decoder will say so


def read_image(path: Path) -> np.ndarray:
    """An image file → uint8 (H, W, 3) BGR. Raises RunnerError where it cannot be read or decoded."""
    try:
        data = path.read_bytes()
    except (OSError, ValueError) as error:  # ValueError: a name with a zero byte
        raise RunnerError(getattr(error, "strerror", "") or str(error)) from None
    return decode(data)


def resize(image: np.ndarray, spec: Spec) -> np.ndarray:
    """uint8 (H, W, 3) → uint8 (h, w, 3), the network's size. Raises RunnerError for anything else than such an image.

    "linear" is bit for bit the same on every OpenCV. "area" is computed in float: the same in the x86-64 wheels
    from 4.5.4 to 5.0, a level apart at most elsewhere.
    """
    shape: tuple[int, ...] = getattr(image, "shape", ())
    dtype = getattr(image, "dtype", None)
    if dtype != np.uint8 or len(shape) != 3 or shape[2] != 3 or 0 in shape:
        found = f"{type(image).__name__}, {dtype}, shape {shape}"
        raise RunnerError(f"expected an image as an array, uint8, shape (height, width, 3), BGR; found {found}")
    height, width = spec.input_size
    region = _region(_size(image), spec)
    image = image[region.top : region.top + region.height, region.left : region.left + region.width]
    shrinks = region.height >= region.new_height and region.width >= region.new_width
    # INTER_LINEAR has per-platform fast paths that round differently; INTER_LINEAR_EXACT is specified bit for bit.
    flag = cv2.INTER_AREA if spec.interpolation == "area" and shrinks else cv2.INTER_LINEAR_EXACT
    try:
        image = cv2.resize(image, (region.new_width, region.new_height), interpolation=flag)
    except cv2.error as error:  # no memory; 4.5.4 also refuses an image of one pixel
        raise RunnerError(f"OpenCV {cv2.__version__} cannot resize it: {_first_line(error)}") from None
    if (region.new_height, region.new_width) == (height, width):
        return image
    bar = tuple(round(value) for value in spec.mean_255)  # what the network sees as nothing
    framed = np.empty((height, width, 3), np.uint8)
    framed[:] = bar[::-1] if spec.color_order == "rgb" else bar
    framed[region.y : region.y + region.new_height, region.x : region.x + region.new_width] = image
    return framed


def _size(image: np.ndarray) -> Size:
    return image.shape[0], image.shape[1]


@dataclass(frozen=True)
class _Region:
    """The part of a photo that the network sees, and the part of its input where that lies; whole pixels."""

    left: int  # of the photo
    top: int
    width: int
    height: int
    x: int  # of the input
    y: int
    new_width: int
    new_height: int


def _region(size: Size, spec: Spec) -> _Region:
    """size: of the photo."""
    height, width = size
    h, w = spec.input_size
    if spec.resize == "crop":  # the largest centred part with the input's aspect ratio
        part_height = min(height, max(1, round(width * h / w)))
        part_width = min(width, max(1, round(height * w / h)))
        left, top = (width - part_width) // 2, (height - part_height) // 2
        return _Region(left, top, part_width, part_height, 0, 0, w, h)
    if spec.resize == "letterbox":  # the largest centred part of the input with the photo's aspect ratio
        new_height = min(h, max(1, round(w * height / width)))
        new_width = min(w, max(1, round(h * width / height)))
        return _Region(0, 0, width, height, (w - new_width) // 2, (h - new_height) // 2, new_width, new_height)
    return _Region(0, 0, width, height, 0, 0, w, h)


@dataclass(frozen=True)
class Placement:
    """Where the network's input lies in a photo, in pixels: photo x = left + step_x * input x, and so for y.

    Both count from the upper left corner of the upper left pixel, so that the middle of that pixel is at 0.5.
    """

    left: float
    top: float
    step_x: float
    step_y: float


def placement(size: Size, spec: Spec) -> Placement:
    """size: (height, width) of a photo → where `resize` takes the network's input from."""
    region = _region(size, spec)
    step_x, step_y = region.width / region.new_width, region.height / region.new_height
    return Placement(region.left - region.x * step_x, region.top - region.y * step_y, step_x, step_y)


def normalize(images: np.ndarray, spec: Spec) -> np.ndarray:
    """uint8 (N, h, w, 3) BGR → float32 (N, 3, h, w) in the spec's colour order, (x - mean) / std."""
    blob: np.ndarray = cv2.dnn.blobFromImages(list(images), swapRB=spec.color_order == "rgb")
    blob -= np.array(spec.mean_255, np.float32).reshape(1, 3, 1, 1)
    blob *= np.float32(1.0) / np.array(spec.std_255, np.float32).reshape(1, 3, 1, 1)
    return blob


def preprocess(image: np.ndarray, spec: Spec) -> np.ndarray:
    """uint8 (H, W, 3) BGR → float32 (1, 3, h, w)."""
    return normalize(resize(image, spec)[None], spec)


# ---------------------------------------------------------------------------------------------------------------
# Network output → answer


def softmax(logits: np.ndarray, temperature: float = 1.0) -> np.ndarray:
    """float (..., C) → float (..., C), each row ≥ 0 and summing to 1: softmax of logits / temperature."""
    exponents = np.exp((logits - logits.max(axis=-1, keepdims=True)) / temperature)
    scores: np.ndarray = exponents / exponents.sum(axis=-1, keepdims=True)
    return scores


def classify(
    outputs: Outputs, spec: Spec, size: Size, top_k: int | None = None, min_score: float | None = None
) -> Results:
    """{"logits": (1, C)} → classes, best first, as {"label", "class_id", "score"}.

    top_k: at most so many; 0: all; None: 5. min_score: none with a lower score; None: 0. size: not looked at.
    Raises RunnerError where the network gave NaN or infinite values.
    """
    del size
    logits = outputs["logits"].reshape(-1).astype(np.float64)
    _require_finite(logits)
    scores = softmax(logits, spec.temperature)
    order = np.argsort(-logits, kind="stable")[: (5 if top_k is None else top_k) or None]
    return [_named(spec, i, score=float(scores[i])) for i in order if scores[i] >= (min_score or 0)]


CANDIDATES = 3000  # boxes that suppression looks at, the best ones: its time grows with their square (0.1 s on a PC)


def detect(
    outputs: Outputs, spec: Spec, size: Size, top_k: int | None = None, min_score: float | None = None
) -> Results:
    """{"classes_S": (1, C, h/S, w/S), "boxes_S": (1, 4, h/S, w/S)} of each stride S → the boxes, best first.

    classes: logits; a score is the logistic function of one. boxes: the logarithms of the distances from the middle of
    the cell, (column + 0.5, row + 0.5), to the left, top, right and bottom edge; the unit is S pixels of the input.
    size: (height, width) of the photo. top_k: at most so many; 0 or None: all. min_score: none with a lower score;
    None: the spec's score_threshold.

    → {"label", "class_id", "score", "box"}; box: [left, top, right, bottom] in pixels of the photo, inside it.
    Of two boxes of one class with an IoU above the spec's iou_threshold, the one with the lower score is left out; only
    the CANDIDATES best are looked at. Raises RunnerError where the network gave NaN or infinite values.
    """
    threshold = spec.score_threshold if min_score is None else min_score
    candidates = np.hstack([_candidates(outputs, stride, threshold) for stride in spec.strides])
    best = np.argsort(-candidates[1], kind="stable")[:CANDIDATES]
    class_ids, logits, boxes = candidates[0, best].astype(int), candidates[1, best], candidates[2:, best].T
    place = placement(size, spec)
    steps, starts = (place.step_x, place.step_y) * 2, (place.left, place.top) * 2
    boxes = np.clip(boxes * steps + starts, 0, (size[1], size[0]) * 2)
    kept = _suppress(boxes, class_ids, spec.iou_threshold)[: top_k or None]
    scores = np.exp(-np.logaddexp(0, -logits))  # 1 / (1 + exp(-logit)) without an overflow
    return [_named(spec, class_ids[i], score=float(scores[i]), box=boxes[i].tolist()) for i in kept]


def _candidates(outputs: Outputs, stride: int, threshold: float) -> np.ndarray:
    """float64 (6, n): class id, logit, left, top, right, bottom in the input, of what has the score; class by class."""
    logits, logarithms = outputs[f"classes_{stride}"][0], outputs[f"boxes_{stride}"][0]
    _require_finite(logits, logarithms)
    limit = math.log(threshold / (1 - threshold)) if 0 < threshold < 1 else math.inf if threshold > 0 else -math.inf
    class_ids, rows, columns = np.nonzero(logits >= limit)
    middles = (np.stack([columns, rows] * 2) + 0.5) * stride
    # e ** 50 pixels are more than any photo has; much more would be an overflow
    distances = np.exp(np.minimum(logarithms[:, rows, columns].astype(np.float64), 50)) * stride
    edges = middles + distances * np.array([[-1], [-1], [1], [1]])
    return np.vstack([class_ids, logits[class_ids, rows, columns], edges])


def _suppress(boxes: np.ndarray, class_ids: np.ndarray, iou_threshold: float) -> list[int]:
    """Boxes (n, 4), the best first → the indices of those that stay, in order. Boxes without an area never do."""
    sizes = boxes[:, 2:] - boxes[:, :2]
    kept: list[int] = []
    for class_id in set(class_ids.tolist()):
        own = np.flatnonzero((class_ids == class_id) & (sizes > 0).all(axis=1))
        ranks = list(map(float, range(len(own), 0, -1)))  # instead of scores, which OpenCV compares in float32
        rectangles = np.hstack([boxes[own, :2], sizes[own]]).tolist()
        stay = cv2.dnn.NMSBoxes(rectangles, ranks, 0.0, iou_threshold)  # an empty tuple where there are none
        kept += own[np.array(stay, int).ravel()].tolist()
    return sorted(kept)


VOID = 255  # in a class map: a pixel of no class


def segment(
    outputs: Outputs, spec: Spec, size: Size, top_k: int | None = None, min_score: float | None = None
) -> Results:
    """{"logits": (1, C, h/k, w/k)} → the classes that are in the photo, the largest first.

    size: (height, width) of the photo. top_k: at most so many; 0 or None: all. min_score: none with a smaller share;
    None: 0.

    → {"label", "class_id", "share", "mask"}; share: of the photo's pixels, 0..1; mask: bool (height, width). What a
    "crop" leaves out is of no class. Raises RunnerError where the network gave NaN or infinite values.
    """
    small = _best_classes(outputs["logits"][0], spec)
    classes = _to_photo(small, spec, size)
    results = []
    for class_id in np.flatnonzero(np.bincount(small.ravel())).tolist():
        mask = classes == class_id
        share = int(np.count_nonzero(mask)) / mask.size
        if share and share >= (min_score or 0):
            results.append(_named(spec, class_id, share=share, mask=mask))
    return sorted(results, key=lambda result: -result["share"])[: top_k or None]


def _best_classes(logits: np.ndarray, spec: Spec) -> np.ndarray:
    """float32 (C, h/k, w/k) → uint8 (h, w), the class with the largest logit; of equals the first."""
    _require_finite(logits)
    height, width = spec.input_size
    best = np.full((height, width), -np.inf, np.float32)
    classes = np.zeros((height, width), np.uint8)
    for class_id, plane in enumerate(logits):  # one by one: all of them in full size take much memory, and longer
        full = cv2.resize(plane, (width, height), interpolation=cv2.INTER_LINEAR)
        np.copyto(classes, np.uint8(class_id), where=full > best)
        np.maximum(best, full, out=best)
    return classes


def _to_photo(classes: np.ndarray, spec: Spec, size: Size) -> np.ndarray:
    """uint8 (h, w) of the input → uint8 (height, width) of the photo: of each pixel what lies at its middle."""
    region = _region(size, spec)
    rows = region.y + _nearest(region.height, region.new_height)
    columns = region.x + _nearest(region.width, region.new_width)
    photo = np.full(size, VOID, np.uint8)
    part = photo[region.top : region.top + region.height, region.left : region.left + region.width]
    part[:] = classes.take(columns, axis=1).take(rows, axis=0)
    return photo


def _nearest(count: int, old: int) -> np.ndarray:
    """For each of `count` new pixels the old one at its middle. (cv2's INTER_NEAREST takes the one at its corner.)"""
    return (2 * np.arange(count) + 1) * old // (2 * count)


def _require_finite(*arrays: np.ndarray) -> None:
    if not all(np.isfinite(array).all() for array in arrays):
        raise RunnerError("the network's output is not finite: run `python3 run.py check`")


def _named(spec: Spec, class_id: Any, **facts: Any) -> dict[str, Any]:
    return {"label": spec.class_names[class_id], "class_id": int(class_id), **facts}


POSTPROCESS: dict[str, Callable[..., Results]] = {"classify": classify, "detect": detect, "segment": segment}


def plain(results: Results) -> Results:
    """The same for JSON: each mask as COCO's uncompressed RLE, {"size": [height, width], "counts": [...]}.

    counts: how many pixels are false, then how many true, and so on, down the columns from left to right. What is plain
    already stays.
    """
    return [
        {**result, "mask": _rle(result["mask"])} if isinstance(result.get("mask"), np.ndarray) else result
        for result in results
    ]


def _rle(mask: np.ndarray) -> dict[str, Any]:
    pixels = cv2.transpose(mask.view(np.uint8)).ravel()  # twice as fast as numpy's
    changes = np.flatnonzero(pixels[1:] != pixels[:-1]) + 1
    starts = [0, 0] if pixels[0] else [0]
    return {"size": list(mask.shape), "counts": np.diff(np.concatenate([starts, changes, [mask.size]])).tolist()}


def from_rle(rle: dict[str, Any]) -> np.ndarray:
    """The inverse: → bool (height, width). Raises ValueError where the counts are not those of such an image."""
    height, width = rle["size"]
    is_true = np.arange(len(rle["counts"])) % 2 == 1
    return np.ascontiguousarray(np.repeat(is_true, rle["counts"]).reshape(width, height).T)


def class_map(results: Results, size: Size) -> np.ndarray:
    """The masks of an answer, plain or not, in one: uint8 (height, width), the class of each pixel, or VOID."""
    classes = np.full(size, VOID, np.uint8)
    for result in results:
        np.copyto(classes, np.uint8(result["class_id"]), where=_mask(result))
    return classes


def _mask(result: dict[str, Any]) -> np.ndarray:
    return result["mask"] if isinstance(result["mask"], np.ndarray) else from_rle(result["mask"])


# ---------------------------------------------------------------------------------------------------------------
# Session: one network, one engine, one backend


def opencv_version(text: str = cv2.__version__) -> tuple[int, int, int]:
    """(major, minor, patch) of an OpenCV, the one in use if none is named; suffixes like "-pre" are left out."""
    major, minor, patch = (int(number) for number in (*re.findall(r"\d+", text.split("-")[0]), "0", "0", "0")[:3])
    return major, minor, patch


def engines() -> tuple[str, ...]:
    """OpenCV's own inference engines here: "classic" in 4.x; "new", its default, and "classic" in 5.0."""
    return ("new", "classic") if hasattr(cv2.dnn, "ENGINE_NEW") else ("classic",)


# What computes a network: an engine of OpenCV's own, or a library behind it. Of each backend the best engine first.
BACKENDS = {
    "opencv/cpu": ("new", "classic"),
    "openvino/cpu": ("openvino",),
    "cuda/fp32": ("cuda",),
    "cuda/fp16": ("cuda-fp16",),
}
ENGINES = tuple(engine for names in BACKENDS.values() for engine in names)


def _pair(engine: str) -> tuple[int, int]:
    """cv2.dnn's (backend, target) of an engine."""
    return {
        "openvino": (cv2.dnn.DNN_BACKEND_INFERENCE_ENGINE, cv2.dnn.DNN_TARGET_CPU),
        "cuda": (cv2.dnn.DNN_BACKEND_CUDA, cv2.dnn.DNN_TARGET_CUDA),
        "cuda-fp16": (cv2.dnn.DNN_BACKEND_CUDA, cv2.dnn.DNN_TARGET_CUDA_FP16),
    }.get(engine, (cv2.dnn.DNN_BACKEND_OPENCV, cv2.dnn.DNN_TARGET_CPU))


def _is_here(engine: str) -> bool:
    """Has this OpenCV the engine's backend? Asking for one that it lacks may run on the CPU, silently."""
    backend, target = _pair(engine)
    return target in cv2.dnn.getAvailableTargets(backend)


def why_missing(engine: str, plugin: Path | None = None, threads: int = 0) -> str:
    """ "" where this machine can open an engine, else what is missing. plugin, threads: as Session takes them."""
    if engine in BACKENDS["opencv/cpu"]:
        have = ", ".join(engines())
        return "" if engine in engines() else f"OpenCV {cv2.__version__} has no engine {engine!r} (it has: {have})"
    if engine == "openvino":
        has_own, reason = _is_built_with_openvino(), "there is no plugin for it"
        if plugin and not has_own:
            reason = _load_openvino(plugin, threads)
        remedy = "`python3 -m pip install -r requirements.txt` brings both packages that it needs"
        missing = f"OpenCV {cv2.__version__} has no OpenVINO: {reason or 'it took no plugin'} ({remedy})"
        return "" if _is_here(engine) else missing
    if _is_here(engine):
        return ""
    if cv2.dnn.getAvailableTargets(cv2.dnn.DNN_BACKEND_CUDA):
        return "this GPU has no fp16 in OpenCV's CUDA backend"
    return (
        f"OpenCV {cv2.__version__} has no CUDA backend, or sees no GPU (the wheels on PyPI have none; "
        "`edgekit opencv add cuda` builds one that has, on the device)"
    )


# ---------------------------------------------------------------------------------------------------------------
# OpenVINO: a plugin gives it to the stock wheel, and the Python package `openvino` has its libraries

PLUGIN_FILE = "libopencv_dnn_openvino.so"
PRECISION_VARIABLE = "OPENCV_DNN_OPENVINO_PRECISION"  # read by plugins that `edgekit opencv add openvino` builds


def _is_built_with_openvino() -> bool:
    """Whether it is in this OpenCV itself: no plugin is looked at then."""
    return re.search(r"OpenVINO:\s+YES", cv2.getBuildInformation()) is not None


def _load_openvino(plugin: Path, threads: int) -> str:
    """Makes a plugin known to OpenCV, which looks for it once, when the backend is first asked for.

    → "" or the reason why it cannot work. The variables and libraries are this process's own.
    """
    try:
        data = plugin.read_bytes()
    except OSError as error:
        return f"cannot read {plugin} ({error.strerror})"
    made_for = re.search(rb"OpenCV version is '(\d+\.\d+\.\d+)'", data)
    if made_for and made_for.group(1).decode() != "{}.{}.{}".format(*opencv_version()):
        return f"the plugin is for OpenCV {made_for.group(1).decode()} only"
    needed = re.search(rb"libopenvino\.so\.\d+", data)
    package = importlib.util.find_spec("openvino")
    if package is None or not package.submodule_search_locations:
        return "the Python package openvino is not installed"
    libraries = Path(package.submodule_search_locations[0], "libs")
    names = ("libtbb.so.12", needed.group().decode() if needed else "libopenvino.so")
    try:
        for name in names:  # the plugin's own run path does not lead there, but what is loaded is not looked for
            ctypes.CDLL(str(libraries / name), mode=ctypes.RTLD_GLOBAL)
    except OSError as error:
        return f"the package openvino is not the version that the plugin is for ({_first_line(error)})"
    os.environ["OPENCV_DNN_PLUGIN_PATH"] = str(plugin.resolve().parent)
    if threads:  # cv2.setNumThreads does not reach the plugin's own copy of OpenCV's core
        os.environ["OPENCV_FOR_THREADS_NUM"] = str(threads)
    return ""


def _openvino_precision(plugin: Path | None) -> str:
    """What OpenVINO computes a float32 network in. By itself it takes 16 bits on every CPU that has them."""
    asked = "auto"
    if plugin and not _is_built_with_openvino() and PRECISION_VARIABLE.encode() in plugin.read_bytes():
        asked = os.environ.get(PRECISION_VARIABLE, "f32")
    if asked != "auto":
        return {"f32": "fp32", "f16": "fp16"}.get(asked, asked)
    has = _cpu_features()
    if has & {"avx512_bf16", "amx_bf16"}:
        return "bf16"
    return "fp16" if has & {"asimdhp", "avx512_fp16", "amx_fp16"} else "fp32"


def _cpu_features() -> set[str]:
    """The instruction sets that Linux lists, such as "avx2" or "asimddp"; empty elsewhere."""
    lines = _text(Path("/proc/cpuinfo")).splitlines()
    return {word for line in lines if line.lower().startswith(("flags", "features")) for word in line.split()[2:]}


def _text(path: Path) -> str:
    """A small file of the system's, or "" where it has none."""
    try:
        return path.read_text(encoding="utf-8", errors="replace").strip(" \0\n")
    except OSError:
        return ""


class Session:
    """A loaded ONNX file. It stays on the engine and backend that it was opened with.

    (Switching the backend of a live net gives wrong results: opencv #14965.)
    """

    def __init__(self, model: Path, engine: str = "auto", threads: int = 0, plugin: Path | None = None) -> None:
        """engine: one of ENGINES, or "auto": OpenCV's own choice of its own. threads: 0 leaves OpenCV's choice.

        plugin: the file that gives this OpenCV its OpenVINO backend; the first one in a process counts, with its
        threads. Raises RunnerError, also where the engine is not here: another one is never taken instead.
        """
        if engine not in ("auto", *ENGINES):
            raise RunnerError(f"no engine is called {engine!r} (there are: {', '.join(ENGINES)})")
        missing = "" if engine == "auto" else why_missing(engine, plugin, threads)
        if missing:
            raise RunnerError(missing)
        if threads:
            cv2.setNumThreads(threads)
        try:
            self._net = _read_net(_opencv_path(model), engine)
        except cv2.error as error:
            raise RunnerError(f"OpenCV {cv2.__version__} cannot load {model}: {_first_line(error)}") from None
        if self._net.empty():  # 5.0's new engine gives such a net where 4.x raises
            raise RunnerError(f"OpenCV {cv2.__version__} cannot load {model}")
        self._output_names = list(self._net.getUnconnectedOutLayersNames())
        self.engine = engine
        if engine in ("auto", *BACKENDS["opencv/cpu"]):
            # 5.0 may fall back to classic, so what runs is seen, not assumed: only classic has an input layer.
            self.engine = "classic" if "__NetInputLayer__" in self._net.getLayerTypes() else "new"
        if self.engine not in ("new", "openvino"):  # a build with OpenVINO would take that by itself
            backend, target = _pair(self.engine)
            self._net.setPreferableBackend(backend)
            self._net.setPreferableTarget(target)
        self.backend = next(backend for backend, names in BACKENDS.items() if self.engine in names)
        own = {"openvino": _openvino_precision(plugin), "cuda-fp16": "fp16"}
        self.precision = own.get(self.engine, "fp32")  # of the arithmetic, whatever the file holds
        self.threads = threads if threads and self.engine == "openvino" else cv2.getNumThreads()

    def __call__(self, blob: np.ndarray) -> Outputs:
        """float32 (1, 3, h, w) → {output name: float32 array}. Raises RunnerError where OpenCV fails."""
        try:
            self._net.setInput(blob)
            arrays = self._net.forward(self._output_names)
        except cv2.error as error:
            raise RunnerError(f"OpenCV {cv2.__version__} cannot run the model: {_first_line(error)}") from None
        return dict(zip(self._output_names, arrays))

    def ran_on(self) -> str:
        """After an answer: where, as OpenCV's own record of the network tells: "OpenVINO/CPU", "OCV/CPU", "CUDA/CUDA".

        Empty for 5.0's new engine, which has no other place. A layer that CUDA lacks runs on the CPU all the same, and
        only OpenCV's log says so (OPENCV_LOG_LEVEL=INFO).
        """
        if self.engine == "new":
            return ""
        return ", ".join(sorted(set(re.findall(r"\\l([A-Za-z]+/[A-Z0-9_]+)\\n", self._net.dump()))))


def _read_net(model: str, engine: str) -> Any:
    if engine == "openvino":  # the whole file is OpenVINO's own to read: no fault of OpenCV's importer, and int8 stays
        return cv2.dnn.readNet(model, "", "openvino")
    if len(engines()) == 1:  # the argument does not exist in 4.x
        return cv2.dnn.readNetFromONNX(model)
    codes = {"auto": cv2.dnn.ENGINE_AUTO, "new": cv2.dnn.ENGINE_NEW}  # CUDA works with the classic one only
    return cv2.dnn.readNetFromONNX(model, codes.get(engine, cv2.dnn.ENGINE_CLASSIC))


def _opencv_path(path: os.PathLike[str] | str) -> str:
    """A path as OpenCV takes it, UTF-8 whatever the locale. Raises RunnerError where the name is not UTF-8."""
    try:
        return os.fsencode(path).decode("utf-8")
    except UnicodeError:  # OpenCV's Python functions end the process with a segmentation fault
        raise RunnerError(f"OpenCV cannot open {str(path)!a}, whose name is not UTF-8: rename it") from None


def _first_line(error: Exception) -> str:
    return " ".join(str(error).split())[:300]


# ---------------------------------------------------------------------------------------------------------------
# Bundle: the manifest, and the model behind it


def file_sha256(path: Path) -> str:
    """SHA-256 (hex) of a file's bytes. Raises OSError."""
    digest = hashlib.sha256()
    with path.open("rb") as stream:
        for block in iter(lambda: stream.read(1 << 20), b""):
            digest.update(block)
    return digest.hexdigest()


def manifest_sha256(manifest: dict[str, Any]) -> str:
    """SHA-256 (hex) of a manifest's canonical JSON, without its own "sha256" key."""
    rest = {key: value for key, value in manifest.items() if key != "sha256"}
    return hashlib.sha256(json.dumps(rest, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def read_manifest(bundle: Path) -> dict[str, Any]:
    """Reads manifest.json and verifies it and every file that it lists. Raises RunnerError at the first mismatch."""
    path = bundle / "manifest.json"
    try:
        manifest: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        schema = manifest["schema"]
    except OSError as error:
        raise RunnerError(f"no bundle at {bundle}: cannot read manifest.json ({error.strerror})") from None
    except (ValueError, KeyError, TypeError, RecursionError):
        raise RunnerError(f"{path} is damaged: copy the bundle again") from None
    if schema != SCHEMA:
        raise RunnerError(f"{path} has schema {schema!r}; this run.py reads {SCHEMA!r}. Use the bundle's own run.py")
    if manifest.get("sha256") != manifest_sha256(manifest):
        raise RunnerError(f"{path} was changed after it was built: copy the bundle again")
    for name, entry in sorted(manifest["files"].items()):
        try:
            actual = file_sha256(bundle / name)
        except OSError as error:
            raise RunnerError(f"the bundle's {name} cannot be read ({error.strerror}): copy the bundle again") from None
        if actual != entry["sha256"]:
            raise RunnerError(f"the bundle's {name} is not the file that was built: copy the bundle again")
    return manifest


class Model:
    """A bundle, verified and loaded: `Model("bundle")(image)`."""

    def __init__(
        self,
        bundle: os.PathLike[str] | str,
        threads: int | None = None,
        engine: str | None = None,
        allow_fallback: bool = False,
        prove: bool = True,
    ) -> None:
        """threads: None takes the manifest's, 0 OpenCV's choice. engine: None takes the fastest that was proved here.

        allow_fallback: on a machine that lacks the bundle's backend, or is of another kind than the bundle's, use
        OpenCV's own engines on the CPU, and say why in `fallback`. prove: of an int8 network, first answer one of the
        bundle's own images: int8 kernels differ from CPU to CPU, and some are wrong.

        Raises RunnerError, also where the network was found wrong on this OpenCV.
        """
        self.bundle = Path(bundle)
        self.manifest = read_manifest(self.bundle)
        self.spec = Spec.from_dict(self.manifest["spec"])
        threads = self.manifest["threads"] if threads is None else threads
        file = self.bundle / PLUGIN_FILE
        plugin = file if file.is_file() else None
        reason = misplaced(self.manifest, plugin, threads, engine)
        if reason and not allow_fallback:
            raise RunnerError(f"{reason}. To run on OpenCV's own engine all the same: --allow-fallback")
        self.fallback = reason  # "" where the bundle runs on what it was built for
        backend = backend_of(engine) if engine else "opencv/cpu" if reason else self.manifest["backend"]
        chosen = choose_engine(self.manifest, engine, backend)
        try:
            self.session = Session(self.bundle / "model.onnx", chosen, threads, plugin)
        except RunnerError as error:
            if engines_here(self.manifest["proved"]):
                raise
            raise RunnerError(f"{error}. Use an OpenCV that it was proved on: {proved_on(self.manifest)}") from None
        self.precision = "int8" if self.manifest["precision"] == "int8" else self.session.precision
        if prove and self.precision == "int8":
            self._prove()

    def _prove(self) -> None:
        outputs = _expected_outputs(self.bundle)
        row = _check_image(self, _expected(self.bundle)[0], {name: array[:1] for name, array in outputs.items()})
        if row["ok"]:
            return
        faulty = self.session.engine == "new" and "avx_vnni" in _cpu_features()
        known = (
            " OpenCV 5.0's int8 is known to be wrong on CPUs with AVX-VNNI, as this one: OPENCV_CPU_DISABLE=AVX_VNNI "
            "in the environment avoids it, and is slow."
        )
        raise RunnerError(
            f"this int8 network is computed wrongly here ({row['reason']}; OpenCV {cv2.__version__}, "
            f"{self.session.engine} engine, {cpu_name()}).{known if faulty else ''} Ship it in fp32: "
            "`edgekit bundle RUN --precision fp32`"
        )

    def __call__(self, image: np.ndarray, top_k: int | None = None, min_score: float | None = None) -> Results:
        """uint8 (H, W, 3) BGR → results, best first: see `classify`, `detect` and `segment`, whichever the task is."""
        outputs = self.session(preprocess(image, self.spec))
        return POSTPROCESS[self.spec.task](outputs, self.spec, _size(image), top_k, min_score)

    def conditions(self) -> dict[str, Any]:
        """What a figure from this model depends on, as found here."""
        return {
            "opencv": cv2.__version__,
            "engine": self.session.engine,
            "backend": self.session.backend,
            "fallback": self.fallback,
            "precision": self.precision,
            "threads": self.session.threads,
            "cores": len(_cores()) or os.cpu_count() or 1,
            "machine": platform.machine(),
            "cpu": cpu_name(),
            "cpu_features": _short_sha256(" ".join(sorted(_cpu_features()))),
            "opencv_build": _short_sha256(cv2.getBuildInformation()),
            "python": platform.python_version(),
            "proved_on_this_opencv": self.session.engine in engines_here(self.manifest["proved"]),
        }


def misplaced(manifest: dict[str, Any], plugin: Path | None, threads: int, engine: str | None) -> str:
    """Why a bundle is not at home on this machine, with this engine (None: the bundle's own); "" where it is."""
    machine, backend = platform.machine(), manifest["backend"]
    if machine not in manifest["arch"]:
        where = ", ".join(manifest["arch"])
        return (
            f"this bundle is for {manifest['target']} ({where}), and this machine is {machine}: use one that is for it"
        )
    if engine is not None and backend_of(engine) != backend:
        return f"this bundle is to run through {backend}, and the engine {engine} belongs to {backend_of(engine)}"
    if backend == "opencv/cpu":  # which of its engines, choose_engine finds
        return ""
    missing = why_missing(BACKENDS[backend][0], plugin, threads)
    return f"this bundle is to run through {backend}, and {missing}" if missing else ""


def engines_here(rows: list[dict[str, str]]) -> list[str]:
    """The engines of those rows of the manifest's "proved" or "refused" that speak of this OpenCV, in their order."""
    return [row["engine"] for row in rows if opencv_version(row["opencv"]) == opencv_version()]


def proved_on(manifest: dict[str, Any]) -> str:
    """ "4.14.0 (classic), 5.0.0 (new)", or "none"."""
    return ", ".join(f"{row['opencv']} ({row['engine']})" for row in manifest["proved"]) or "none"


def backend_of(engine: str) -> str:
    """The backend that an engine belongs to. Raises RunnerError for an unknown name."""
    for backend, names in BACKENDS.items():
        if engine in names:
            return backend
    raise RunnerError(f"no engine is called {engine!r} (there are: {', '.join(ENGINES)})")


def choose_engine(manifest: dict[str, Any], asked: str | None, backend: str) -> str:
    """The engine to open: the one asked for, else the backend's fastest that was proved on this OpenCV.

    Where none was proved it is the backend's only one, and "auto" for OpenCV's own. Raises RunnerError where the
    network was found wrong with it on this OpenCV.
    """
    proved, refused = (
        [engine for engine in engines_here(manifest[rows]) if engine in BACKENDS[backend]]
        for rows in ("proved", "refused")
    )
    engine = asked or (proved or ["auto" if backend == "opencv/cpu" else BACKENDS[backend][0]])[0]
    if backend.startswith("cuda") and "classic" in engines_here(manifest["refused"]):
        refused.append(engine)  # CUDA has the network from the classic importer
    if engine in refused or (engine == "auto" and refused):
        raise RunnerError(
            f"OpenCV {cv2.__version__} does not compute this network as it was trained (engine: {', '.join(refused)}). "
            f"Install one that does: {proved_on(manifest)}"
        )
    return engine


def _short_sha256(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def cpu_name() -> str:
    """The processor's name as the system tells it, else its architecture."""
    for path, key in (("/proc/device-tree/model", ""), ("/proc/cpuinfo", "model name")):
        with contextlib.suppress(OSError):
            text = Path(path).read_text(encoding="utf-8", errors="replace")
            lines = [line.split(":")[-1].strip(" \0\t") for line in text.splitlines() if line.startswith(key)]
            if lines:
                return lines[0]
    return platform.processor() or platform.machine()


# ---------------------------------------------------------------------------------------------------------------
# Sources: what `infer` reads


@dataclass(frozen=True)
class Frame:
    """One image to answer for, or the reason why there is none."""

    source: str
    image: np.ndarray | None = None
    error: str = ""
    frame: int | None = None  # number in a video or camera stream, from 0
    seconds: float | None = None  # position in a video file, where its frame rate is known
    fps: float = 0.0  # of a video; 0: a still image or unknown


def frames(sources: Sequence[str]) -> Generator[Frame, None, None]:
    """Files, folders, globs, videos and URLs → frames, in order. What cannot be read is a Frame with an error."""
    for source in sources:
        if "://" in source:
            yield from _video_frames(source, source, live=not source.startswith(("http", "file")))
            continue
        try:
            paths = _expand(source)
        except RunnerError as error:
            yield Frame(source, error=str(error))
            continue
        for path in paths:
            # OpenCV does not say why it cannot open a video: reading a missing one as an image does.
            if path.suffix.lower() in VIDEO_SUFFIXES and path.is_file():
                yield from _video_frames(str(path), str(path))
            else:
                yield _still(path)


def _expand(source: str) -> list[Path]:
    """The files that a source means, sorted. Raises RunnerError where there are none."""
    path = Path(source)
    try:
        is_folder, exists = path.is_dir(), path.exists()
    except OSError as error:  # a name that is too long
        raise RunnerError(error.strerror or str(error)) from None
    if not source:  # as in `infer "$FORGOTTEN"`, which would mean all of the working directory
        raise RunnerError("a source with an empty name")
    if is_folder:
        matches = [path]
    elif not exists and glob.has_magic(source):
        matches = [Path(name) for name in glob.glob(source, recursive=True)]  # noqa: PTH207 - it may be absolute
    else:
        return [path]
    files = {file for match in matches for file in (_media(match) if match.is_dir() else [match])}
    if not files:
        raise RunnerError("no image or video in this folder" if is_folder else "nothing matches")
    return sorted(files)


def _media(folder: Path) -> list[Path]:
    """The images and videos below a folder, by their suffix. Links that lead nowhere too: their errors are told."""

    def refuse(error: OSError) -> None:
        raise RunnerError(f"cannot read the folder {error.filename}: {error.strerror}")

    suffixes = IMAGE_SUFFIXES + VIDEO_SUFFIXES
    files = (Path(base, name) for base, _, names in os.walk(folder, onerror=refuse) for name in names)
    return [file for file in files if file.suffix.lower() in suffixes]


def _still(path: Path) -> Frame:
    try:
        return Frame(str(path), image=read_image(path))
    except RunnerError as error:
        return Frame(str(path), error=str(error))


def _video_frames(name: str, address: Any, live: bool = False) -> Generator[Frame, None, None]:
    """address: a path, a URL or a camera's number, as cv2.VideoCapture takes it. live: it has no end of its own."""
    try:
        capture = cv2.VideoCapture(address if isinstance(address, int) else _opencv_path(address))
    except RunnerError as error:
        yield Frame(name, error=str(error))
        return
    try:
        fps = float(capture.get(cv2.CAP_PROP_FPS))
        fps = fps if 0 < fps <= 1000 else 0.0  # unknown: OpenCV says 0, -1, NaN or a time base such as 90000
        is_timed = fps > 0 and not live
        number = 0
        while True:
            ok, image = capture.read()
            if not ok:
                break
            yield Frame(name, image=image, frame=number, seconds=number / fps if is_timed else None, fps=fps)
            number += 1
        if number == 0:
            yield Frame(name, error="cannot be opened as a video: missing, damaged, or a codec this OpenCV lacks")
        elif live:
            yield Frame(name, error=f"the stream broke off after {number} frames")
    finally:
        capture.release()


# ---------------------------------------------------------------------------------------------------------------
# Drawing


def draw(image: np.ndarray, results: Results, spec: Spec) -> np.ndarray:
    """uint8 (H, W, 3) BGR → a copy with the answers on it; images of less than 320 px are drawn larger.

    Of classification the three best are written under the image. Boxes have their labels; classes of a segmentation are
    a half transparent paint, with a legend, but for a first class that is called "background". All images of one size
    give drawings of one size, so that they can be a video.
    """
    factor = math.ceil(320 / max(_size(image)))
    canvas = cv2.resize(image, None, fx=factor, fy=factor, interpolation=cv2.INTER_NEAREST)
    if spec.task == "detect":
        return _draw_boxes(canvas, results, factor)
    if spec.task == "segment":
        return _draw_masks(canvas, results, _size(image))
    return _draw_classes(canvas, results, min(3, len(spec.class_names)))


def _draw_classes(canvas: np.ndarray, results: Results, lines: int) -> np.ndarray:
    """A canvas of at least 320 px with so many lines below."""
    width = max(320, canvas.shape[1])
    shown = results[:lines]
    step = max(18, width * 3 // 64)  # from line to line; everything else is a share of it
    below = step * lines + step // 3
    more = width - canvas.shape[1]
    canvas = cv2.copyMakeBorder(canvas, 0, below, 0, more, cv2.BORDER_CONSTANT, value=_DARK)
    margin = step // 3
    right = margin + _text_width("100.0 %", step)  # where the scores end
    column = right + 2 * margin
    for row, result in enumerate(shown):
        label = _cut(_drawable(result), width - column - margin, step)
        y = canvas.shape[0] - step * (lines - row - 1) - step // 2
        color = (255, 255, 255) if row == 0 else (170, 170, 170)
        score = f"{100 * result['score']:.1f} %"
        for x, text in ((right - _text_width(score, step), score), (column, label)):
            _write(canvas, text, x, y, step, color)
    return canvas


def _draw_boxes(canvas: np.ndarray, results: Results, factor: int) -> np.ndarray:
    step = _step(canvas)
    thickness = max(2, round(step / 12))
    for result in reversed(results):  # the best on top
        left, top, right, bottom = (round(factor * edge) for edge in result["box"])
        color = colour(result["class_id"])
        cv2.rectangle(canvas, (left, top), (max(left, right - 1), max(top, bottom - 1)), color, thickness)
    for result in reversed(results):
        left, top = (round(factor * edge) for edge in result["box"][:2])
        text = f"{_drawable(result)} {100 * result['score']:.0f} %"
        _tag(canvas, text, left - thickness // 2, top - step if top >= step else top, colour(result["class_id"]), step)
    return canvas


def _draw_masks(canvas: np.ndarray, results: Results, size: Size) -> np.ndarray:
    shown = [result for result in results if result["class_id"] or result["label"].lower() != "background"]
    for result in shown:
        mask: np.ndarray = _mask(result).view(np.uint8)
        if canvas.shape[:2] != size:
            mask = cv2.resize(mask, canvas.shape[1::-1], interpolation=cv2.INTER_NEAREST)
        left, top, width, height = cv2.boundingRect(mask)
        paint = np.full((16, width, 3), colour(result["class_id"]), np.uint8)
        for y in range(top, top + height, 16):  # strips stay in the cache: a sixth of the time
            place = (slice(y, y + 16), slice(left, left + width))
            part = canvas[place]
            canvas[place] = cv2.copyTo(cv2.addWeighted(part, 0.5, paint[: len(part)], 0.5, 0), mask[place], part)
    step = _step(canvas)
    for row, result in enumerate(shown[: max(1, canvas.shape[0] // 2 // step)]):
        text = f"{_drawable(result)} {100 * result['share']:.1f} %"
        _tag(canvas, text, 0, row * step, colour(result["class_id"]), step)
    return canvas


_DARK = (32, 32, 32)


def colour(class_id: int) -> tuple[int, int, int]:
    """BGR, 0..255: of each class another hue, neighbours far apart (steps of the golden ratio)."""
    bgr = colorsys.hsv_to_rgb(0.618034 * class_id % 1, 0.8, 0.95)[::-1]
    return round(255 * bgr[0]), round(255 * bgr[1]), round(255 * bgr[2])


def _step(canvas: np.ndarray) -> int:
    """The height of a line of text on an image, in px."""
    return max(16, max(_size(canvas)) // 40)


def _tag(canvas: np.ndarray, text: str, x: int, y: int, ground: tuple[int, int, int], step: int) -> None:
    """Text on a coloured ground, whose corner (x, y) is moved to where all of it is in the image."""
    margin = step // 6
    text = _cut(text, canvas.shape[1] - 2 * margin, step)
    width = _text_width(text, step) + 2 * margin
    x, y = max(0, min(x, canvas.shape[1] - width)), max(0, min(y, canvas.shape[0] - step))
    cv2.rectangle(canvas, (x, y), (x + width - 1, y + step - 1), ground, cv2.FILLED)
    is_light = 0.114 * ground[0] + 0.587 * ground[1] + 0.299 * ground[2] > 128
    _write(canvas, text, x + margin, y + step * 3 // 4, step, _DARK if is_light else (255, 255, 255))


def _drawable(result: dict[str, Any]) -> str:
    """Its label. OpenCV 4's putText has ASCII only; the JSON line always has the true one."""
    return result["label"] if result["label"].isascii() else f"class {result['class_id']}"


def _write(canvas: np.ndarray, text: str, x: int, y: int, step: int, color: tuple[int, int, int]) -> None:
    """x, y: of the text's lower left corner."""
    cv2.putText(canvas, text, (x, y), cv2.FONT_HERSHEY_SIMPLEX, step / 38, color, max(1, round(step / 24)), cv2.LINE_AA)


def _cut(text: str, width: int, step: int) -> str:
    """The text, shortened with dots to at most `width` px."""
    shown, length = text, len(text)
    while length and _text_width(shown, step) > width:
        length -= 1
        shown = text[:length].rstrip() + "..."
    return shown


def _text_width(text: str, step: int) -> int:
    """Of lines that are `step` px high."""
    return int(cv2.getTextSize(text, cv2.FONT_HERSHEY_SIMPLEX, step / 38, max(1, round(step / 24)))[0][0])


# ---------------------------------------------------------------------------------------------------------------
# Writers: the files that `infer` makes beside its lines. Each has add(frame, results) and close()


class NewFiles:
    """Names of new files in a folder.

    A file that is there already is never written over: the folder may be the one that the images are in.
    """

    def __init__(self, folder: Path) -> None:
        """Makes the folder. Raises RunnerError where it cannot."""
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise RunnerError(f"cannot make the folder {folder}: {error.strerror}") from None
        self._folder = folder
        self._names: dict[str, int] = {}

    def name(self, source: str, suffix: str) -> Path:
        """NAME.jpg, or NAME-2.jpg, NAME-3.jpg, ... where that exists."""
        stem = Path(source.split("?")[0].rstrip("/")).stem.replace(":", "-") or "source"
        while True:
            count = self._names[stem] = self._names.get(stem, 0) + 1
            path = self._folder / f"{stem if count == 1 else f'{stem}-{count}'}{suffix}"
            if not path.exists():
                return path


class Drawings(NewFiles):
    """Writes drawn images (JPEG) and videos (Motion JPEG in AVI, which every OpenCV can write) into a folder."""

    def __init__(self, folder: Path, spec: Spec) -> None:
        """Makes the folder. Raises RunnerError where it cannot."""
        super().__init__(folder)
        self._spec = spec
        self._video: tuple[Any, Any] | None = None  # (source, (width, height)), and its writer

    def add(self, frame: Frame, results: Results) -> None:
        """Draws one frame. Frames of one video and size follow each other and go into one file. Raises RunnerError."""
        assert frame.image is not None
        canvas = draw(frame.image, results, self._spec)
        if frame.frame is None:
            _write_image(self.name(frame.source, ".jpg"), canvas)
            return
        size = canvas.shape[1::-1]
        if self._video is None or self._video[0] != (frame.source, size) or frame.frame == 0:
            self.close()
            path = self.name(frame.source, ".avi")
            writer = cv2.VideoWriter(_opencv_path(path), cv2.VideoWriter.fourcc(*"MJPG"), frame.fps or 25.0, size)
            if not writer.isOpened():
                raise RunnerError(f"OpenCV {cv2.__version__} cannot write the video {path}")
            self._video = (frame.source, size), writer
        self._video[1].write(canvas)

    def close(self) -> None:
        """Ends the video that is being written."""
        if self._video is not None:
            self._video[1].release()
            self._video = None


class Behind:
    """A writer that works in a thread of its own, on one frame after the other, while the caller goes on.

    At most two frames are waiting or being written; the caller waits for the first of them where it brings a third.
    What the writer raises is raised at a later `add`, or at `close`, which waits until all is written.
    """

    def __init__(self, writer: Drawings) -> None:
        self._writer = writer
        self._pool = ThreadPoolExecutor(1, initializer=_give_way)
        self._waiting: deque[Future[None]] = deque()

    def add(self, frame: Frame, results: Results) -> None:
        while len(self._waiting) >= 2:
            self._waiting.popleft().result()
        self._waiting.append(self._pool.submit(self._writer.add, frame, results))

    def close(self) -> None:
        try:
            while self._waiting:
                self._waiting.popleft().result()
        finally:
            self._pool.shutdown()
            self._writer.close()


def _give_way() -> None:
    """Where cores are few, the network goes first. (Only on Linux has each thread a niceness of its own.)"""
    if sys.platform == "linux":
        os.nice(10)


class Masks(NewFiles):
    """Writes class maps of a segmentation into a folder: grey PNG of the photo's size, each pixel its class or VOID."""

    def add(self, frame: Frame, results: Results) -> Path:
        """→ the file. Raises RunnerError where it cannot be written."""
        assert frame.image is not None
        path = self.name(frame.source, ".png")
        _write_image(path, class_map(results, _size(frame.image)))
        return path


class Yolo(NewFiles):
    """Writes boxes into a folder, a text file an image: class_id, middle x and y, width, height, score a line.

    All but the class are shares: of the photo's width or height, of 1.
    """

    def add(self, frame: Frame, results: Results) -> None:
        """Raises RunnerError where the file cannot be written."""
        assert frame.image is not None
        height, width = _size(frame.image)
        lines = []
        for result in results:
            left, top, right, bottom = result["box"]
            shares = (left + right) / 2 / width, (top + bottom) / 2 / height, (right - left) / width
            figures = (*shares, (bottom - top) / height, result["score"])
            lines.append(" ".join([str(result["class_id"]), *(f"{figure:.6f}" for figure in figures)]) + "\n")
        _write_file(self.name(frame.source, ".txt"), "".join(lines).encode())

    def close(self) -> None:
        """Nothing is left to be done."""


class Coco:
    """Boxes or masks of all the images, in one JSON file as COCO has it: images, categories, annotations.

    A category's id is the class id; a frame of a video has its number beside the file's name. Of a segmentation, which
    has no scores, there is an annotation for each class.
    """

    def __init__(self, path: Path, spec: Spec) -> None:
        """Raises RunnerError where the file's folder is missing."""
        if not path.absolute().parent.is_dir():
            raise RunnerError(f"cannot write {path}: there is no folder {path.parent}")
        self._path = path
        self._categories = [{"id": number, "name": name} for number, name in enumerate(spec.class_names)]
        self._images: list[dict[str, Any]] = []
        self._annotations: list[dict[str, Any]] = []

    def add(self, frame: Frame, results: Results) -> None:
        assert frame.image is not None
        height, width = _size(frame.image)
        image = {"id": len(self._images) + 1, "file_name": frame.source, "width": width, "height": height}
        self._images.append(image if frame.frame is None else {**image, "frame": frame.frame})
        for result in results:
            named = {"id": len(self._annotations) + 1, "image_id": image["id"], "category_id": result["class_id"]}
            self._annotations.append({**named, **_coco_shape(result), "iscrowd": 0})

    def close(self) -> None:
        """Writes the file. Raises RunnerError where it cannot."""
        whole = {"images": self._images, "categories": self._categories, "annotations": self._annotations}
        temporary = self._path.with_name(self._path.name + ".part")
        _write_file(temporary, json.dumps(whole, ensure_ascii=False).encode("utf-8", "backslashreplace"))
        try:
            temporary.replace(self._path)
        except OSError as error:
            raise RunnerError(f"cannot write {self._path}: {error.strerror}") from None


def _coco_shape(result: dict[str, Any]) -> dict[str, Any]:
    if "box" in result:
        left, top, right, bottom = result["box"]
        box = [round(value, 2) for value in (left, top, right - left, bottom - top)]
        return {"bbox": box, "area": round((right - left) * (bottom - top), 2), "score": round(result["score"], 6)}
    mask = result["mask"]
    rectangle = list(cv2.boundingRect(mask.view(np.uint8)))
    return {"bbox": rectangle, "area": int(np.count_nonzero(mask)), "segmentation": _rle(mask)}


def _write_image(path: Path, image: np.ndarray) -> None:
    try:
        ok, data = cv2.imencode(path.suffix, image)
    except cv2.error:
        ok = False
    if not ok:
        height, width = _size(image)
        raise RunnerError(f"OpenCV {cv2.__version__} cannot write {path}: {width} x {height} pixels are too many")
    _write_file(path, data.tobytes())


def _write_file(path: Path, data: bytes) -> None:
    try:
        path.write_bytes(data)
    except OSError as error:
        raise RunnerError(f"cannot write {path}: {error.strerror}") from None


# ---------------------------------------------------------------------------------------------------------------
# Check: does this device compute what was trained?


def check(model: Model) -> list[dict[str, Any]]:
    """Runs the bundle's own images, from file bytes to answer, against the trained model's stored answers.

    → a row an image: {"file", "ok", "pixels_identical", "relative_error", "expected", "actual", "reason"}. expected and
    actual: plain results, of classification the best one.
    relative_error: largest difference of any output, as a share of that output's largest value.
    Where the decoded and resized pixels are the workstation's, bit for bit, the outputs must agree within the
    manifest's tolerance. Where another JPEG decoder gave other pixels, the looser `outputs_other_pixels` holds, and
    where the arithmetic has 16 bits, `outputs_16bit`.
    """
    rows, outputs = _expected(model.bundle), _expected_outputs(model.bundle)
    if any(len(array) != len(rows) for array in outputs.values()):
        raise RunnerError(f"the bundle's {_OUTPUTS} is not of the images that it has: build the bundle again")
    return [
        _check_image(model, row, {name: array[i : i + 1] for name, array in outputs.items()})
        for i, row in enumerate(rows)
    ]


def _expected(bundle: Path) -> list[dict[str, Any]]:
    """check/expected.json: a row an image, {"file", "pixels_sha256", "results"}; results: plain."""
    rows: list[dict[str, Any]] = json.loads((bundle / "check" / "expected.json").read_text("utf-8"))["images"]
    return rows


_OUTPUTS = "check/outputs.npz"


def _expected_outputs(bundle: Path) -> Outputs:
    """check/outputs.npz: {output name: float32 (N, ...)}, a row an image of expected.json, in its order.

    Raises RunnerError where it is missing or damaged.
    """
    try:
        data = (bundle / _OUTPUTS).read_bytes()
    except OSError as error:
        raise RunnerError(
            f"the bundle's {_OUTPUTS} cannot be read ({error.strerror}): build the bundle again"
        ) from None
    try:
        arrays = np.load(io.BytesIO(data))
        outputs = {name: arrays[name] for name in arrays.files}
    except (ValueError, EOFError, AttributeError, zipfile.BadZipFile):
        outputs = {}
    if not outputs or not all(array.ndim for array in outputs.values()):
        raise RunnerError(f"the bundle's {_OUTPUTS} is damaged: build the bundle again")
    return outputs


def _check_image(model: Model, expected: dict[str, Any], wanted: Outputs) -> dict[str, Any]:
    """expected: its row in expected.json. wanted: its outputs."""
    tolerances = model.manifest["tolerances"]
    outputs: Outputs = {}
    identical, reason, size = False, "", (0, 0)
    try:
        image = read_image(model.bundle / "check" / expected["file"])
        pixels, size = resize(image, model.spec), _size(image)
        identical = hashlib.sha256(pixels.tobytes()).hexdigest() == expected["pixels_sha256"]
        outputs = model.session(normalize(pixels[None], model.spec))
    except RunnerError as error:
        reason = str(error)
    allowed = ["outputs"] if identical else ["outputs", "outputs_other_pixels"]
    allowed += [] if model.session.precision == "fp32" else ["outputs_16bit"]
    tolerance = max(tolerances[name] for name in allowed)
    relative_error = max(relative_difference(outputs.get(name), array) for name, array in wanted.items())
    if not reason and not relative_error <= tolerance:
        reason = f"outputs differ by {relative_error:.2g} of the largest; at most {tolerance:g} is allowed"
    shown = 1 if model.spec.task == "classify" else None
    actual = POSTPROCESS[model.spec.task](outputs, model.spec, size, shown) if relative_error < math.inf else []
    return {
        "file": expected["file"],
        "ok": not reason,
        "pixels_identical": identical,
        "relative_error": relative_error if math.isfinite(relative_error) else None,
        "expected": expected["results"][:shown],
        "actual": plain(actual),
        "reason": reason,
    }


def relative_difference(actual: np.ndarray | None, expected: np.ndarray) -> float:
    """max |actual - expected| / max |expected|; infinite for a missing output, another shape or a NaN."""
    if actual is None or actual.shape != expected.shape or not np.isfinite(actual).all():
        return math.inf
    return float(np.abs(actual - expected).max() / max(float(np.abs(expected).max()), 1e-12))


# ---------------------------------------------------------------------------------------------------------------
# Bench: latency, stage by stage

STAGES = ("decode", "preprocess", "forward", "postprocess")


def bench(model: Model, seconds: float = 5.0, min_iterations: int = 20) -> dict[str, Any]:
    """Latency on the bundle's own images, one at a time, in ms: {"first_ms", "iterations", "end_to_end_ms", ...}.

    Warms up for a fifth of the time. Then iterations with a mark after each stage and whole ones without any mark take
    turns; so the stages can be held against `end_to_end`, which they are no part of. At last, for a fifth of the time,
    images are decoded in one thread and answered in another: "images_per_second" and, of the whole board, "energy_mj".
    """
    data = [(model.bundle / "check" / row["file"]).read_bytes() for row in _expected(model.bundle)]
    before = environment()
    first_ms = sum(wall for wall, _ in _time_stages(model, data[0])) / 1e6
    warm_until = time.perf_counter() + seconds / 5
    while time.perf_counter() < warm_until:
        _time_stages(model, data[0])
    samples: dict[str, list[float]] = {stage: [] for stage in (*STAGES, "end_to_end")}
    stop = time.perf_counter() + seconds
    while time.perf_counter() < stop or len(samples["end_to_end"]) < min_iterations:
        item = data[len(samples["end_to_end"]) % len(data)]
        for stage, (wall_ns, _) in zip(STAGES, _time_stages(model, item)):
            samples[stage].append(wall_ns / 1e6)
        start_ns = time.perf_counter_ns()
        model(decode(item))
        samples["end_to_end"].append((time.perf_counter_ns() - start_ns) / 1e6)
    images_per_second, energy_mj = _throughput(model, data, seconds / 5)
    return {
        "iterations": len(samples["end_to_end"]),
        "first_ms": first_ms,
        **{f"{stage}_ms": percentiles(values) for stage, values in samples.items()},
        "images_per_second": images_per_second,
        "energy_mj": energy_mj,
        "samples_ms": samples,
        "peak_rss_bytes": peak_rss_bytes(),
        "environment": [before, environment()],
        "conditions": model.conditions(),
    }


def _time_stages(model: Model, data: bytes | np.ndarray) -> list[tuple[int, int]]:
    """One image through the stages → (wall time, CPU time of all this process's threads) of each, in ns.

    data: a file's bytes, or what was decoded before: then decoding takes no time.
    """
    marks = [(time.perf_counter_ns(), time.process_time_ns())]
    image = decode(data) if isinstance(data, bytes) else data
    marks.append((time.perf_counter_ns(), time.process_time_ns()))
    blob = preprocess(image, model.spec)
    marks.append((time.perf_counter_ns(), time.process_time_ns()))
    outputs = model.session(blob)
    marks.append((time.perf_counter_ns(), time.process_time_ns()))
    POSTPROCESS[model.spec.task](outputs, model.spec, _size(image))
    marks.append((time.perf_counter_ns(), time.process_time_ns()))
    return [(end[0] - start[0], end[1] - start[1]) for start, end in zip(marks, marks[1:])]


METER_S = 0.05  # from one reading of the power to the next: reading takes about a millisecond
MIN_READINGS = 10  # fewer make no mean


def _throughput(
    model: Model, data: Sequence[bytes], seconds: float, power_w: Callable[[], float | None] | None = None
) -> tuple[float, float | None]:
    """Images a second, from file bytes to answer, with the next one decoded while one is answered; and mJ an image.

    The energy is the mean power over the rate; None where the board has no meter, or the time was too short.
    power_w: reads the meter.
    """
    read = power_w or (lambda: _power_w(Path("/sys")))
    readings_w: list[float | None] = []
    stream = ahead(decode(item) for item in itertools.cycle(data))
    with contextlib.closing(stream):
        model(next(stream))  # the thread has begun
        has_meter = read() is not None  # where there is none, nothing is looked for while the time counts
        start = now = read_at = time.perf_counter()
        count = 0
        while count == 0 or now - start < seconds:
            model(next(stream))
            count += 1
            now = time.perf_counter()
            if has_meter and now - read_at >= METER_S:
                readings_w.append(read())
                read_at = now
    rate = count / (now - start)
    watts = [reading for reading in readings_w if reading is not None]
    return rate, sum(watts) / len(watts) / rate * 1e3 if len(watts) >= MIN_READINGS else None


def ahead(items: Generator[Any, None, None], depth: int = 2) -> Generator[Any, None, None]:
    """The same items in the same order, each made in a thread of its own while the caller works on the ones before.

    (OpenCV lets other threads run while it decodes and while it computes.) At most `depth` are waiting. What making one
    raises is raised here. Where the caller closes this early, `items` is closed before it returns.
    """
    end = object()
    with contextlib.closing(items), ThreadPoolExecutor(1) as pool:
        waiting = deque(pool.submit(next, items, end) for _ in range(depth))
        while True:
            item = waiting.popleft().result()
            if item is end:
                return
            waiting.append(pool.submit(next, items, end))
            yield item


def peak_rss_bytes() -> int | None:
    """The most memory that this process had resident at once, since it began; None where the system does not tell.

    (VmHWM, not getrusage's ru_maxrss: that one counts what the parent had before this program was started.)
    """
    found = re.search(r"VmHWM:\s+(\d+) kB", _text(Path("/proc/self/status")))
    return int(found.group(1)) * 1024 if found else None


PI_THROTTLED = {0: "under-voltage", 1: "frequency capped", 2: "throttled", 3: "soft temperature limit"}


def environment(root: Path = Path("/")) -> dict[str, Any]:
    """What may make a figure doubtful, as the system tells it now; null for what it does not tell.

    governor and mhz (the mean) of the cores that this process may use; temperature_c: of the hottest zone; throttled:
    what a Raspberry Pi says is being held back; throttle_events: how often x86 cores or a Jetson were held back, ever;
    load: runnable processes, mean of a minute; ticks: of the clock, on all cores, ever; steal: those of them that a
    hypervisor took; power_w: of the whole board, where it has a meter (INA3221).
    """
    system = root / "sys"
    frequency = [system / f"devices/system/cpu/cpu{core}/cpufreq" for core in _cores()]
    khz = [float(text) for text in (_text(folder / "scaling_cur_freq") for folder in frequency) if text]
    governors = {_text(folder / "scaling_governor") for folder in frequency} - {""}
    zones = [_number(path) for path in system.glob("class/thermal/thermal_zone*/temp")]
    held_back = _text(system / "devices/platform/soc/soc:firmware/get_throttled")
    bits = int(held_back, 16) if held_back else 0
    counters = (
        "devices/system/cpu/cpu*/thermal_throttle/core_throttle_count",
        "class/hwmon/hwmon*/oc*_event_cnt",
    )
    events = [_number(path) for pattern in counters for path in system.glob(pattern)]
    # user, nice, system, idle, iowait, irq, softirq, steal; what a guest took is in user already
    ticks = [int(word) for word in _text(root / "proc/stat").split("\n", 1)[0].split()[1:9]]
    return {
        "governor": ", ".join(sorted(governors)) or None,
        "mhz": sum(khz) / len(khz) / 1e3 if khz else None,
        "temperature_c": max((zone / 1e3 for zone in zones if zone), default=None),
        "throttled": [name for bit, name in PI_THROTTLED.items() if bits >> bit & 1] if held_back else None,
        "throttle_events": int(sum(event or 0 for event in events)) if events else None,
        "load": os.getloadavg()[0] if hasattr(os, "getloadavg") else None,
        "ticks": sum(ticks) if len(ticks) == 8 else None,
        "steal": ticks[7] if len(ticks) == 8 else None,
        "power_w": _power_w(system),
    }


def _cores() -> list[int]:
    """The cores that this process may use; empty where the system does not tell."""
    return sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else []


def _number(path: Path) -> float | None:
    with contextlib.suppress(ValueError):
        return float(_text(path))
    return None


def _power_w(system: Path) -> float | None:
    """The first channel (the whole board's input) of the first INA3221; mV times mA."""
    for name in sorted(system.glob("class/hwmon/hwmon*/name")):
        if _text(name) == "ina3221":
            volts, amperes = _number(name.with_name("in1_input")), _number(name.with_name("curr1_input"))
            if volts is not None and amperes is not None:
                return volts * amperes / 1e6
    return None


PERCENTILES = {"p50": 1, "p90": 64, "p99": 662}  # the samples that each needs


def percentiles(samples: Sequence[float]) -> dict[str, float | None]:
    """p50 always; p90 from 64 samples and p99 from 662, else None.

    From there on two samples or more lie above the true percentile with 99 % confidence, so that one stray sample
    does not make the figure: p ** n + n * (1 - p) * p ** (n - 1) ≤ 1 % at n = 64 for p = 0.9 and 662 for p = 0.99.
    """
    return {
        name: float(np.percentile(samples, int(name[1:]))) if len(samples) >= needed else None
        for name, needed in PERCENTILES.items()
    }


# ---------------------------------------------------------------------------------------------------------------
# Commands


def _infer(args: argparse.Namespace) -> int:
    sources = [*args.sources, *(_read_list(args.list) if args.list else ())]
    if bool(sources) == (args.camera is not None):
        raise RunnerError("infer needs a SOURCE (image, folder, glob, video, URL) or --list FILE, or else --camera N")
    model = _open(args)
    _warn_unproved(model)
    masks, writers = _writers(args, model.spec)
    stream = frames(sources) if sources else _video_frames(f"camera:{args.camera}", args.camera, live=True)
    # three threads: a frame is computed, the next decoded, the last told
    computed = ahead(_computed(ahead(_prepared(stream, model.spec)), model.session, args.frames))
    failed = False
    with contextlib.ExitStack() as stack:
        for item in (computed, *writers):
            stack.enter_context(contextlib.closing(item))
        for frame, outputs, error in computed:
            results, error = _answer(model.spec, frame, outputs, error, args)
            mask = masks.add(frame, results) if masks and not error else None
            # what is told is written too, even where the run is interrupted in between
            for writer in writers if not error else ():
                writer.add(frame, results)
            line = _line(frame, results, error, mask)
            fallback = {"fallback": model.session.backend} if model.fallback else {}
            print(json.dumps({**line, **fallback}, ensure_ascii=False), flush=True)
            failed = failed or bool(error)
    return 2 if failed else _done(model)


def _prepared(
    stream: Generator[Frame, None, None], spec: Spec
) -> Generator[tuple[Frame, np.ndarray | None, str], None, None]:
    """Each frame with the network's input, or the reason why there is none: one bad image does not end it."""
    with contextlib.closing(stream):
        for frame in stream:
            blob, error = None, frame.error
            try:
                blob = None if frame.image is None else preprocess(frame.image, spec)
            except RunnerError as found:
                error = str(found)
            yield frame, blob, error


def _computed(
    stream: Generator[tuple[Frame, np.ndarray | None, str], None, None], session: Session, limit: int
) -> Generator[tuple[Frame, Outputs, str], None, None]:
    """Each frame with the outputs, or why there are none. limit: so many frames; 0: all."""
    with contextlib.closing(stream):
        for number, (frame, blob, error) in enumerate(stream, start=1):
            outputs: Outputs = {}
            try:
                outputs = {} if blob is None else session(blob)
            except RunnerError as found:
                error = str(found)
            yield frame, outputs, error
            if number == limit:
                return


def _answer(spec: Spec, frame: Frame, outputs: Outputs, error: str, args: argparse.Namespace) -> tuple[Results, str]:
    """(results, "") or ([], the reason why there are none)."""
    if error or frame.image is None:
        return [], error
    try:
        return POSTPROCESS[spec.task](outputs, spec, _size(frame.image), args.top_k, args.min_score), ""
    except RunnerError as found:
        return [], str(found)


def _writers(args: argparse.Namespace, spec: Spec) -> tuple[Masks | None, list[Behind | Coco | Yolo]]:
    """Those that the options ask for. Raises RunnerError where one does not fit the task."""
    fitting = {"masks": ("segment",), "coco": ("detect", "segment"), "yolo": ("detect",)}
    for option, tasks in fitting.items():
        if getattr(args, option) and spec.task not in tasks:
            raise RunnerError(f"--{option} is for the task {' or '.join(tasks)}, and this bundle's is {spec.task}")
    writers: list[Behind | Coco | Yolo] = []
    if args.draw:
        writers.append(Behind(Drawings(args.draw, spec)))
    if args.coco:
        writers.append(Coco(args.coco, spec))
    if args.yolo:
        writers.append(Yolo(args.yolo))
    return Masks(args.masks) if args.masks else None, writers


def _open(args: argparse.Namespace) -> Model:
    """The bundle's model as the options want it; says on stderr where it runs on something else."""
    # `check` looks at all the images and says more; the first inference is bench's to time
    prove = args.command not in ("check", "bench", "worker")
    model = Model(args.bundle, args.threads, args.engine, args.allow_fallback, prove)
    if model.fallback:
        print(f"run.py: warning: {model.fallback}. It runs on {_ran(model)} instead", file=sys.stderr)
    return model


def _warn_unproved(model: Model) -> None:
    if not model.fallback and model.session.engine not in engines_here(model.manifest["proved"]):
        print(
            f"run.py: warning: this bundle was not proved on OpenCV {cv2.__version__} with the {model.session.engine} "
            f"engine (proved on: {proved_on(model.manifest)}). Run `python3 run.py check` before you trust its answers",
            file=sys.stderr,
        )


def _ran(model: Model) -> str:
    return f"{model.session.backend} ({model.session.engine} engine, {model.precision})"


def _done(model: Model) -> int:
    """The exit code of a command that succeeded: 3 where it ran on something else than the bundle is for."""
    if model.fallback:
        print(f"run.py: warning: that was {_ran(model)}: {model.fallback}", file=sys.stderr)
    return 3 if model.fallback else 0


def _line(frame: Frame, results: Results, error: str, mask: Path | None) -> dict[str, Any]:
    """mask: the file that has all the masks: then the results have none."""
    line: dict[str, Any] = {"source": frame.source}
    if frame.frame is not None:
        line["frame"] = frame.frame
    if frame.seconds is not None:
        line["seconds"] = round(frame.seconds, 6)
    if error:
        return {**line, "error": error}
    if mask:
        line["mask"] = str(mask)
        results = [{key: value for key, value in result.items() if key != "mask"} for result in results]
    return {**line, "results": [_rounded(result) for result in plain(results)]}


def _rounded(result: dict[str, Any]) -> dict[str, Any]:
    """Scores and shares to 6 digits, edges to hundredths of a pixel."""
    for key in ("score", "share"):
        if key in result:
            result = {**result, key: round(result[key], 6)}
    return {**result, "box": [round(edge, 2) for edge in result["box"]]} if "box" in result else result


def _read_list(path: str) -> list[str]:
    try:
        data = sys.stdin.buffer.read() if path == "-" else Path(path).read_bytes()
    except OSError as error:
        raise RunnerError(f"cannot read the list {path}: {error.strerror}") from None
    if b"\0" in data:
        raise RunnerError(f"the list {path} is not a text of one source a line")
    data = data[3:] if data.startswith(b"\xef\xbb\xbf") else data  # the mark that Windows editors put first
    lines = [line.rstrip(b"\r") for line in data.split(b"\n")]
    return [os.fsdecode(line) for line in lines if line.strip()]  # a name need not be UTF-8


def _check(args: argparse.Namespace) -> int:
    model = _open(args)
    rows = check(model)
    passed = bool(rows) and all(row["ok"] for row in rows)
    if args.json:
        print(json.dumps({"ok": passed, "images": rows, "conditions": model.conditions()}, ensure_ascii=False))
        return _done(model) if passed else 1
    for row in rows:
        error = "none" if row["relative_error"] is None else f"{row['relative_error']:.1e}"
        pixels = "same pixels" if row["pixels_identical"] else "other pixels"
        got = _summary(row["actual"])
        verdict = "ok    " if row["ok"] else "FAILED"
        print(f"{verdict} {row['file']:<28} {pixels:<12} difference {error:<8} {got}  {row['reason']}".rstrip())
    where = f"OpenCV {cv2.__version__}, {_ran(model)}, {cpu_name()}"
    total = f"{sum(row['ok'] for row in rows)} of {len(rows)} images as trained"
    print(f"{'check passed' if passed else 'CHECK FAILED'}: {total}. {where}")
    return _done(model) if passed else 1


def _summary(results: Results) -> str:
    """An answer in a few words: the best class; "5 boxes: 3 RBC, 2 WBC"; or the largest classes with their shares."""
    if not results:
        return "-"
    if "share" in results[0]:
        return ", ".join(f"{100 * result['share']:.1f} % {result['label']}" for result in results[:3])
    if "box" not in results[0]:
        return str(results[0]["label"])
    counts = Counter(result["label"] for result in results).most_common()
    boxes = "1 box" if len(results) == 1 else f"{len(results)} boxes"
    return f"{boxes}: " + ", ".join(f"{count} {label}" for label, count in counts)


def _bench(args: argparse.Namespace) -> int:
    if args.try_targets:
        return _try_targets(args)
    floor_bytes = peak_rss_bytes()
    start = time.perf_counter()
    model = _open(args)
    load_ms = (time.perf_counter() - start) * 1e3
    report = {"import_ms": IMPORT_MS, "load_ms": load_ms, "floor_rss_bytes": floor_bytes, **bench(model, args.seconds)}
    if args.json:
        print(json.dumps(report))
        return _done(model)
    print(f"{'ms':<14}{'p50':>9}{'p90':>9}{'p99':>9}")
    for stage in (*STAGES, "end_to_end"):
        print(f"{stage:<14}", *map(_figure, report[f"{stage}_ms"].values()), sep="")
    conditions = report["conditions"]
    print(
        f"import {IMPORT_MS:.0f} ms, load {load_ms:.0f} ms, first inference {report['first_ms']:.0f} ms; "
        f"{report['iterations']} iterations; {report['images_per_second']:.0f} images/s with decoding beside"
    )
    if floor_bytes and report["peak_rss_bytes"]:
        above = report["peak_rss_bytes"] - floor_bytes
        print(f"memory: {report['peak_rss_bytes'] / 1e6:.0f} MB at most, {above / 1e6:.0f} MB over Python and OpenCV")
    if report["energy_mj"] is not None:
        print(f"energy: {report['energy_mj']:.1f} mJ an image, the whole board")
    print(
        f"OpenCV {conditions['opencv']}, {conditions['engine']} engine, {conditions['backend']}, "
        f"{conditions['precision']}, {conditions['threads']} threads, {conditions['cpu']}"
    )
    return _done(model)


def _figure(value: float | None) -> str:
    return f"{'-':>9}" if value is None else f"{value:>9.2f}"


def _try_targets(args: argparse.Namespace) -> int:
    """Checks and times the network on every engine that is here, each in processes of its own. → 0 if one is right."""
    rows = [_try_engine(args, engine) for engine in ENGINES]
    right = [row for row in rows if row["check"] == "as trained"]
    best = min(right, key=lambda row: row["forward_ms"])["engine"] if right else None
    if args.json:
        print(json.dumps({"best": best, "engines": rows}))
        return 0 if right else 1
    print(f"{'engine':<12}{'backend':<15}{'precision':<11}{'forward':>9}{'in all':>9}  check")
    for row in rows:
        figures = _figure(row["forward_ms"]) + _figure(row["total_ms"])
        print(f"{row['engine']:<12}{row['backend']:<15}{row['precision']:<11}{figures}  {row['check']}")
    print(
        "medians in ms, one image at a time. "
        + (f"The fastest that is right: --engine {best}" if best else "None is right")
    )
    return 0 if right else 1


def _try_engine(args: argparse.Namespace, engine: str) -> dict[str, Any]:
    """One engine's row: what its check says, and the median latency where it runs."""
    row = {"engine": engine, "backend": backend_of(engine), "precision": "-", "forward_ms": None, "total_ms": None}
    options = ["--bundle", str(args.bundle), "--engine", engine, "--json", "--allow-fallback"]
    options += [] if args.threads is None else ["--threads", str(args.threads)]
    checked = _run_self("check", *options)
    if checked.returncode not in (0, 1, 3):  # it cannot be opened, or it killed the process
        lines = [line[len("run.py: ") :] for line in checked.stderr.splitlines() if line.startswith("run.py: ")]
        return {**row, "check": (lines or [f"the process died (exit {checked.returncode})"])[-1]}
    answer = json.loads(checked.stdout)
    report = json.loads(_run_self("bench", "--seconds", str(args.seconds), *options).stdout)
    return {
        **row,
        "precision": answer["conditions"]["precision"],
        "forward_ms": report["forward_ms"]["p50"],
        "total_ms": report["end_to_end_ms"]["p50"],
        "check": "as trained" if answer["ok"] else "WRONG",
    }


def _run_self(*arguments: str) -> subprocess.CompletedProcess[str]:
    """A command of this file, in a process of its own."""
    command = [sys.executable, str(Path(__file__).resolve()), *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def _worker(args: argparse.Namespace) -> int:
    """Says when it is ready, then times so many iterations a request and answers, a JSON object a line each.

    Between requests it waits on its input, and takes no time of the other worker. It ends where its input does.
    """
    if args.pin and hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})  # the first core is the one that interrupts take
    floor_bytes = peak_rss_bytes()
    start = time.perf_counter()
    model = _open(args)
    load_ms = (time.perf_counter() - start) * 1e3
    folder = args.images or model.bundle
    data: list[Any] = [(folder / "check" / row["file"]).read_bytes() for row in _expected(folder)]
    first_ms = sum(wall for wall, _ in _time_stages(model, data[0])) / 1e6
    if args.decoded:
        data = [decode(item) for item in data]
    ready = {"import_ms": IMPORT_MS, "load_ms": load_ms, "first_ms": first_ms, "floor_rss_bytes": floor_bytes}
    print(json.dumps({**ready, "conditions": model.conditions(), "environment": environment()}), flush=True)
    for line in sys.stdin:
        rows = [_time_stages(model, data[index % len(data)]) for index in range(json.loads(line)["iterations"])]
        times = {
            name: {stage: [row[place][clock] for row in rows] for place, stage in enumerate(STAGES)}
            for clock, name in enumerate(("wall_ns", "cpu_ns"))
        }
        answer = {**times, "peak_rss_bytes": peak_rss_bytes(), "environment": environment()}
        print(json.dumps(answer), flush=True)
    return _done(model)


def _info(args: argparse.Namespace) -> int:
    model = _open(args)
    manifest = model.manifest
    facts = {
        "name": manifest["name"],
        "target": manifest["target"],
        "task": model.spec.task,
        "classes": list(model.spec.class_names),
        "input_size": list(model.spec.input_size),
        "edgekit": manifest["edgekit_version"],
        "proved": manifest["proved"],
        "provenance": manifest["provenance"],
        "here": model.conditions(),
    }
    if args.json:
        print(json.dumps(facts, ensure_ascii=False))
        return _done(model)
    for key, value in facts.items():
        print(f"{key:<12} {value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)}")
    return _done(model)


def _forward(args: argparse.Namespace) -> int:
    session = Session(args.model, args.engine, plugin=args.plugin)
    pixels_sha256: list[str] = []
    rows, times_ms = [], []
    for blob in _forward_blobs(args, pixels_sha256):
        start = time.perf_counter()
        rows.append(session(blob))
        times_ms.append((time.perf_counter() - start) * 1e3)
    arrays: dict[str, Any] = {name: np.concatenate([row[name] for row in rows]) for name in rows[0]}
    np.savez(args.output, **arrays)
    answer = {
        "opencv": cv2.__version__,
        **({"pixels_sha256": pixels_sha256} if args.images else {}),
        "engine": session.engine,
        "precision": session.precision,
        "ran_on": session.ran_on(),
        "outputs": sorted(arrays),
        "best_ms": min(times_ms),  # the fastest: the first one prepares the network, and others may have been disturbed
    }
    print(json.dumps(answer))
    return 0


def _forward_blobs(args: argparse.Namespace, pixels_sha256: list[str]) -> Iterator[np.ndarray]:
    """float32 (1, 3, h, w) each; of image files the pixels' SHA-256 are put into the list."""
    if not args.images:
        try:
            yield from np.load(args.input)[:, None]
        except (OSError, ValueError) as error:
            raise RunnerError(f"cannot read {args.input}: {_first_line(error)}") from None
        return
    try:
        spec = Spec.from_dict(json.loads(args.spec.read_text("utf-8")))
    except (OSError, ValueError) as error:
        raise RunnerError(f"cannot read {args.spec}: {_first_line(error)}") from None
    for path in args.images:
        pixels = resize(read_image(path), spec)
        pixels_sha256.append(hashlib.sha256(pixels.tobytes()).hexdigest())
        yield normalize(pixels[None], spec)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="run.py",
        description="Runs this bundle's network with OpenCV. Start with: python3 run.py check",
        epilog="Exit codes: 0 ok, 1 the check failed, 2 bad usage or bad input, 3 ok on a fallback.",
    )
    commands = parser.add_subparsers(dest="command", metavar="COMMAND")
    common = argparse.ArgumentParser(add_help=False)
    common.add_argument("--bundle", type=Path, default=Path(__file__).resolve().parent, help="default: run.py's folder")
    common.add_argument(
        "--engine",
        choices=ENGINES,
        metavar="NAME",
        help=f"{', '.join(ENGINES)}; default: the fastest that was proved here",
    )
    common.add_argument(
        "--allow-fallback",
        action="store_true",
        help="where the bundle's backend is missing, use OpenCV's own: every answer says so, and the exit code is 3",
    )
    common.add_argument("--threads", type=_count, help="OpenCV threads (default: the manifest's; 0: OpenCV's choice)")

    infer = commands.add_parser("infer", parents=[common], help="answer for images, videos or a camera, as JSON lines")
    infer.add_argument(
        "sources", nargs="*", metavar="SOURCE", help="image, folder, glob, video file or URL (rtsp://...)"
    )
    infer.add_argument("--list", metavar="FILE", help="more sources, one a line (-: standard input)")
    infer.add_argument("--camera", type=_count, metavar="N", help="the camera's number, instead of sources")
    infer.add_argument(
        "--frames", type=_count, default=0, metavar="N", help="stop after N frames (default 0: at the end)"
    )
    infer.add_argument(
        "--top-k", type=_count, metavar="K", help="answers a frame (default: 5 of a classification, else all; 0: all)"
    )
    infer.add_argument(
        "--min-score",
        type=_share,
        metavar="S",
        help="no lower scores, of a segmentation no smaller shares, 0 to 1 (default: the bundle's threshold for boxes)",
    )
    infer.add_argument(
        "--draw", type=Path, metavar="DIR", help="also write the images or video with the answers on them"
    )
    infer.add_argument(
        "--masks", type=Path, metavar="DIR", help="of a segmentation: grey PNG files, each pixel its class (255: none)"
    )
    infer.add_argument("--coco", type=Path, metavar="FILE", help="boxes or masks of all images in one COCO JSON file")
    infer.add_argument("--yolo", type=Path, metavar="DIR", help="boxes: a text file an image, as YOLO has them")
    infer.set_defaults(run=_infer)

    check_ = commands.add_parser("check", parents=[common], help="prove that this device computes what was trained")
    check_.set_defaults(run=_check)

    bench_ = commands.add_parser("bench", parents=[common], help="measure the latency here, stage by stage")
    bench_.add_argument("--seconds", type=_positive, default=5.0, metavar="S", help="how long to measure (default 5)")
    bench_.add_argument(
        "--try-targets", action="store_true", help="check and time every engine that is here, and name the best"
    )
    bench_.set_defaults(run=_bench)

    worker = commands.add_parser(
        "worker", parents=[common], help="time iterations on request (used by edgekit compare)"
    )
    worker.add_argument("--pin", action="store_true", help="stay on one core, the last that it may use")
    worker.add_argument("--decoded", action="store_true", help="decode the images once, and not in every iteration")
    worker.add_argument("--images", type=Path, metavar="BUNDLE", help="take this bundle's check images")
    worker.set_defaults(run=_worker)

    info = commands.add_parser("info", parents=[common], help="what this bundle is, and what it meets here")
    info.set_defaults(run=_info)
    for command in (check_, bench_, info):
        command.add_argument("--json", action="store_true", help="one JSON object")

    forward = commands.add_parser(
        "forward",
        help="raw outputs for arrays or images (used by edgekit's proofs)",
        fromfile_prefix_chars="@",  # more images than a command line takes
    )
    forward.add_argument("--model", type=Path, required=True, help="an ONNX file")
    forward.add_argument("--engine", default="auto", help=f"auto, {', '.join(ENGINES)}")
    forward.add_argument("--plugin", type=Path, metavar="FILE", help=f"{PLUGIN_FILE}, for the engine openvino")
    source = forward.add_mutually_exclusive_group(required=True)
    source.add_argument("--input", type=Path, help=".npy, float32 (N, 3, h, w)")
    source.add_argument(
        "--images", type=Path, nargs="+", help="image files, prepared as --spec says (@FILE: one a line)"
    )
    forward.add_argument("--spec", type=Path, default=Path("spec.json"), help="spec.json of a run")
    forward.add_argument("--output", type=Path, required=True, help=".npz to write")
    forward.set_defaults(run=_forward)
    return parser


def _count(text: str) -> int:
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"expected a whole number, 0 or more, found {text!r}")
    return int(text)


def _share(text: str) -> float:
    with contextlib.suppress(ValueError):
        if 0 <= float(text) <= 1:
            return float(text)
    raise argparse.ArgumentTypeError(f"expected a number from 0 to 1, found {text!r}")


def _positive(text: str) -> float:
    with contextlib.suppress(ValueError):
        if 0 < float(text) < math.inf:
            return float(text)
    raise argparse.ArgumentTypeError(f"expected a number above 0, found {text!r}")


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command; → its exit code."""
    parser = _parser()
    args = parser.parse_args(argv)
    if args.command is None:
        parser.print_help(sys.stderr)
        return 2
    with contextlib.suppress(AttributeError, ValueError):  # a replaced stream cannot be reconfigured
        # A file name that is not UTF-8 comes out as \udc.., which is how JSON writes it.
        sys.stdout.reconfigure(encoding="utf-8", errors="backslashreplace")  # type: ignore[union-attr]
    try:
        code = int(args.run(args))
        sys.stdout.flush()  # here, where a closed pipe is still caught
    except RunnerError as error:
        print(f"run.py: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:  # `run.py infer ... | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    return code


if __name__ == "__main__":
    sys.exit(main())
