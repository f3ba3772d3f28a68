"""What the tests of the report and of its pictures share: a history, records, images of one colour, ways to look."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import cv2
import numpy as np

from edgekit import runner
from edgekit.artifacts import write_bytes

HOSTILE = ("<script>alert(1)</script>", '"><img src=x onerror=alert(1)>', "{{ 7 * 7 }} & $x$ [red]猫")
HISTORY = """epoch,phase,learning_rate,train_loss,val_loss,metric,val_metric,seconds,images_per_second
1,head,0.005,1.6,1.2,top-1,0.5,61.0,40.0
2,stages,0.001,0.9,0.8,top-1,0.7,70.5,30.0
3,stages,0.0,0.7,0.75,top-1,0.7,70.5,32.0
"""


def rows_of(history: str) -> list[dict[str, str]]:
    header, *lines = [line.split(",") for line in history.splitlines()]
    return [dict(zip(header, line, strict=True)) for line in lines]


def decoded(data: bytes) -> np.ndarray:
    return runner.decode(data)


def bgr(color: str) -> tuple[int, ...]:
    return tuple(int(color[i : i + 2], 16) for i in (5, 3, 1))


def share_of(image: np.ndarray, color: str) -> float:
    return float((image == bgr(color)).all(axis=2).mean())


def solid(path: Path, color: tuple[int, int, int], height: int = 40, width: int = 40) -> Path:
    write_bytes(path, cv2.imencode(".png", np.full((height, width, 3), color, np.uint8))[1].tobytes())
    return path


def mistake(path: Path, label: str = "newt", predicted: str = "dog") -> dict[str, Any]:
    return {"path": str(path), "label": label, "predicted": predicted, "score": 0.875, "true_score": 0.0625}


def classification(mistakes: Sequence[dict[str, Any]], subset: str = "val") -> dict[str, Any]:
    """What a contact sheet needs of a classification's metrics.json."""
    return {"task": "classify", "subset": subset, "class_names": ["cat", "dog", "newt"], "mistakes": list(mistakes)}


# 10 images of a classification, of which 7 are right; the other bins of scores have none
SCORE_BINS = [{"images": 0, "score": None, "accuracy": None} for _ in range(15)]
SCORE_BINS[9] = {"images": 4, "score": 0.625, "accuracy": 0.5}
SCORE_BINS[14] = {"images": 6, "score": 0.95, "accuracy": 5 / 6}

# Detection: three classes, of which the third has no true box; precision falls from 1 at a class's own recall.
NAMES = ("cat", "dog", "newt")


def detection(mistakes: Sequence[dict[str, Any]] = (), names: tuple[str, ...] = NAMES) -> dict[str, Any]:
    """metrics.json of a detection, evaluated as torch, ONNX and bundle."""
    figures = ((12, 0.75, 0.5, 0.875, 0.8, 0.8358), (5, 0.5, 0.25, 0.625, 0.6, 0.6122), (0, None, None, 0.0, 0.0, 0.0))
    keys = ("support", "ap50", "ap", "precision", "recall", "f1")
    column = {
        "map": 0.375,
        "map50": 0.625,
        "map75": 0.3333,
        "best_f1_score": 0.42,
        "per_class": [
            {"label": name, **dict(zip(keys, row, strict=True))} for name, row in zip(names, figures, strict=True)
        ],
        "pr_curves": {
            name: [1.0] * count + [0.0] * (101 - count) for name, count in zip(names[:2], (76, 51), strict=True)
        },
        "agreement": 1.0,
        "images_per_second": 31.25,
    }
    return {
        "task": "detect",
        "subset": "val",
        "images": 87,
        "class_names": list(names),
        "columns": {"torch": column, "onnx": column, "bundle": {**column, "map50": 0.6123, "agreement": 0.99804}},
        "mistakes": list(mistakes),
        "conditions": {"cpu": "A CPU @ 2 GHz"},
    }


def box(label: str, *edges: float, score: float | None = None, names: tuple[str, ...] = NAMES) -> dict[str, Any]:
    """A true box, or with a score an answer; edges: left, top, right, bottom."""
    found = {"label": label, "class_id": names.index(label), "box": list(edges)}
    return found if score is None else {**found, "score": score}


def detect_mistake(path: Path, names: tuple[str, ...] = NAMES) -> dict[str, Any]:
    """Of a photo of 80x40: a cat found, a cat and a dog missed, a newt that is not there; and a doubtful answer."""
    cat, dog, newt = names
    edges = {"found": (4, 4, 24, 34), "missed": (30, 4, 40, 34), "dog": (44, 20, 54, 34), "false": (60, 8, 74, 30)}
    truth = [box(cat, *edges["found"], names=names), box(cat, *edges["missed"], names=names)]
    truth.append(box(dog, *edges["dog"], names=names))
    answers = [box(cat, 5, 4, 24, 35, score=0.875, names=names), box(newt, *edges["false"], score=0.5, names=names)]
    answers.append(box(dog, *edges["dog"], score=0.41, names=names))
    return {"path": str(path), "missed": 2, "false": 1, "truth": truth, "answers": answers}


def segmentation(mistakes: Sequence[dict[str, Any]] = (), names: tuple[str, ...] = NAMES) -> dict[str, Any]:
    """metrics.json of a segmentation, evaluated as torch and bundle on a test set; the third class never occurs."""
    confusion = [[900_000, 50_000, 0], [12_500, 37_500, 0], [0, 0, 0]]
    figures = (
        (950_000, 0.9351, 0.9863, 0.9474, 0.9665),
        (50_000, 0.375, 0.4286, 0.75, 0.5455),
        (0, None, 0.0, 0.0, 0.0),
    )
    keys = ("pixels", "iou", "precision", "recall", "f1")
    column = {
        "mean_iou": 0.6551,
        "pixel_accuracy": 0.9375,
        "per_class": [
            {"label": name, **dict(zip(keys, row, strict=True))} for name, row in zip(names, figures, strict=True)
        ],
        "confusion": confusion,
        "agreement": 1.0,
        "images_per_second": 9.5,
    }
    return {
        "task": "segment",
        "subset": "test",
        "images": 72,
        "class_names": list(names),
        "columns": {"torch": column, "bundle": {**column, "agreement": 0.99987}},
        "mistakes": list(mistakes),
        "conditions": {"cpu": "A CPU @ 2 GHz"},
    }


def segment_mistake(path: Path, mask: Path, found: np.ndarray, names: tuple[str, ...] = NAMES) -> dict[str, Any]:
    """found: uint8 (H, W), the class that the network gave each pixel. The mask has the levels 0, 100 and 200."""
    answers = [
        {"label": names[i], "class_id": int(i), "share": float((found == i).mean()), "mask": rle(found == i)}
        for i in np.unique(found)
    ]
    return {"path": str(path), "iou": 0.4321, "mask": str(mask), "levels": [0, 100, 200], "answers": answers}


def rle(mask: np.ndarray) -> dict[str, Any]:
    """bool (H, W) → COCO's uncompressed RLE: runs down the columns, zeros first."""
    pixels = mask.T.ravel()
    edges = [0, *(np.flatnonzero(np.diff(pixels)) + 1).tolist(), pixels.size]
    runs = np.diff(edges).tolist()
    return {"size": list(mask.shape), "counts": [0, *runs] if pixels[0] else runs}


def from_rle(mask: dict[str, Any]) -> np.ndarray:
    """The inverse of rle."""
    pixels = np.repeat(np.arange(len(mask["counts"])) % 2 == 1, mask["counts"])
    return pixels.reshape(mask["size"][::-1]).T


if not hasattr(runner, "from_rle"):  # the runner is about to have it
    runner.from_rle = from_rle


def grey_png(path: Path, values: np.ndarray) -> Path:
    """uint8 (H, W) or (H, W, 3) → a PNG."""
    write_bytes(path, cv2.imencode(".png", values)[1].tobytes())
    return path


# Variants of quantize.json, as an EfficientNet-Lite0 of 412 validation images gives them:
# size in bytes, wrong answers, images with another answer than fp32, time / fp32's time, layers in fp32
VARIANTS: dict[str, tuple[int, int, int, float, tuple[str, ...]]] = {
    "fp32": (13_600_000, 4, 0, 1.0, ()),
    "int8-weights": (3_700_000, 3, 1, 1.31, ()),
    "int8": (3_600_000, 17, 15, 0.43, ()),
    "int8-mixed": (4_300_000, 6, 3, 0.49, ("node_Conv_774", "node_Conv_865")),
}
# OpenCV, engine, milliseconds of fp32
ENGINES = (("4.14.0", "openvino", 8.9), ("4.14.0", "classic", 14.2), ("5.0.0", "classic", 13.1), ("5.0.0", "new", 11.6))
IMAGES = 412


def quantize_figure(opencv: str, engine: str, wrong: int, others: int, ms: float, ratio: float) -> dict[str, Any]:
    metric, fp32 = (1 - count / IMAGES for count in (wrong, VARIANTS["fp32"][1]))
    figures = {"metric": metric, "drop": 100 * (fp32 - metric), "agreement": 1 - others / IMAGES}
    times = {"median_ms": ms * ratio, "time_ratio": ratio}
    return {"opencv": opencv, "engine": engine, "status": "ok", "message": "", **figures, **times}


def quantize_record(
    variants: Sequence[str] = tuple(VARIANTS), engines: int = len(ENGINES), precision: str = "int8"
) -> dict[str, Any]:
    """quantize.json of these variants on the first of ENGINES; where int8-mixed is among them, with its search."""
    rows = []
    for place, name in enumerate(variants):
        size_bytes, wrong, others, ratio, float_layers = VARIANTS[name]
        figures = [
            # engines differ a little: in time, and by an image
            quantize_figure(opencv, engine, wrong + index % 2 * (place > 0), others, ms, ratio ** (1 - 0.2 * index))
            for index, (opencv, engine, ms) in enumerate(ENGINES[:engines])
        ]
        file = "model.onnx" if name == "fp32" else f"model.{name.removesuffix('-mixed')}.onnx"
        rows.append({"name": name, "file": file, "size_bytes": size_bytes, "sha256": str(place) * 64})
        rows[-1] |= {"float_layers": list(float_layers), "figures": figures}
    steps = ((0, 3.1, 0.42, ""), (1, 1.4, 0.45, "node_Conv_774"), (2, 0.7, 0.49, "node_Conv_865"))
    curve = [dict(zip(("float_layers", "drop", "time_ratio", "last"), step, strict=True)) for step in steps]
    noisy = [{"layer": "node_Conv_774", "sqnr_db": 9.25}, {"layer": "node_Conv_865", "sqnr_db": 13.5}]
    is_searched = "int8-mixed" in variants
    return {
        "target": "openvino",
        "precision": precision,
        "why": "int8 kept its accuracy (0.24 points lost) and takes 0.43 of the time on OpenVINO: shipping int8",
        "onnx_sha256": "0" * 64,
        "metric": "top-1",
        "images": IMAGES,
        "max_drop": 1.0,
        "calibration": {"images": 200, "method": "mse"},
        "variants": rows,
        "curve": curve if is_searched else [],
        "sensitivity": noisy if is_searched else [],
        "conditions": {"cpu": "A CPU @ 2 GHz", "threads": "1", "onnxruntime": "1.32.0"},
    }


def not_ok(figure: dict[str, Any], status: str, message: str = "it went wrong") -> None:
    """Makes a figure of quantize.json one of a variant that did not run."""
    figure |= dict.fromkeys(("metric", "drop", "agreement", "median_ms", "time_ratio"))
    figure |= {"status": status, "message": message}


def without_times(record: dict[str, Any]) -> dict[str, Any]:
    """The same quantize.json where nothing was timed."""
    for variant in record["variants"]:
        for figure in variant["figures"]:
            figure |= {"median_ms": None, "time_ratio": None}
    for step in record["curve"]:
        step["time_ratio"] = None
    return record
