"""evaluate: how good the trained network is, and whether its conversions still are.

Torch, ONNX and bundle are measured by one function on the same images, so that three columns stand side by side.
"""

from __future__ import annotations

import json
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import onnxruntime
import torch

from edgekit import pictures, report, runner, tasks
from edgekit.artifacts import RunFolder, open_run, write_bytes, write_json
from edgekit.batches import batches
from edgekit.datasets import missing, read_split
from edgekit.errors import ArtifactError, DataError
from edgekit.launch import run_py
from edgekit.samples import Sample
from edgekit.tasks import classify

# A column of the comparison: validation samples → a row of class scores (C,) an image, in order.
Predict = Callable[[Sequence[Sample]], Iterator[np.ndarray]]


@dataclass(frozen=True)
class Evaluation:
    """What metrics.json holds, and where it is."""

    run: Path
    metrics: dict[str, Any]


def evaluate(
    run: Path, bundle: Path | None = None, *, on_image: Callable[[str, int, int], None] = lambda *_: None
) -> Evaluation:
    """Measures the run's network on its validation images: in torch, as model.onnx where export has made it, and
    as `bundle` where one is given. Writes metrics.json, confusion.png, mistakes.jpg and report.html.

    on_image(column, done, total) follows the work. Raises ArtifactError or DataError when something is missing.
    """
    folder = open_run(run)
    spec, samples = folder.read_spec(), read_split(folder.split).val
    gone = missing(samples)
    if gone:
        raise DataError(f"{len(gone)} of the run's validation images are gone, such as {gone[0]}: put them back")
    labels = np.array([sample.label for sample in samples], np.int64)
    scores: dict[str, np.ndarray] = {}
    columns: dict[str, dict[str, Any]] = {}
    for name, predict in _columns(folder, spec, bundle).items():
        start = time.perf_counter()
        rows = []
        for row in predict(samples):
            rows.append(row)
            on_image(name, len(rows), len(samples))
        scores[name] = np.stack(rows)
        same = scores[name].argmax(axis=1) == scores["torch"].argmax(axis=1)
        columns[name] = {
            **classify.metrics(scores[name], labels, spec.class_names).to_dict(),
            "agreement": float(same.mean()),
            "images_per_second": len(samples) / (time.perf_counter() - start),
        }
    worst = classify.mistakes(scores["torch"], labels, [sample.path for sample in samples], spec.class_names)
    metrics = {
        "task": spec.task,
        "images": len(samples),
        "class_names": list(spec.class_names),
        "columns": columns,
        "mistakes": [vars(mistake) for mistake in worst],
        "conditions": {
            "cpu": runner.cpu_name(),
            "device": _device(),
            "torch": torch.__version__,
            "onnxruntime": onnxruntime.__version__,
            "opencv": cv2.__version__,
        },
    }
    _write(folder, metrics)
    return Evaluation(run, metrics)


def _write(folder: RunFolder, metrics: dict[str, Any]) -> None:
    confusion = metrics["columns"]["torch"]["confusion"]
    write_bytes(folder.path / "confusion.png", pictures.confusion_picture(confusion, metrics["class_names"]))
    write_bytes(folder.path / "mistakes.jpg", pictures.contact_sheet(metrics["mistakes"]))
    write_json(folder.metrics, metrics)
    report.write_report(folder)


def _columns(folder: RunFolder, spec: runner.Spec, bundle: Path | None) -> dict[str, Predict]:
    columns: dict[str, Predict] = {"torch": lambda samples: _torch_scores(folder, spec, samples)}
    if folder.onnx.is_file():
        columns["onnx"] = lambda samples: _onnx_scores(folder.onnx, spec, samples)
    if bundle is not None:
        columns["bundle"] = lambda samples: _bundle_scores(bundle, spec, samples)
    return columns


def _device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"


def _torch_scores(folder: RunFolder, spec: runner.Spec, samples: Sequence[Sample]) -> Iterator[np.ndarray]:
    model = tasks.load(folder).to(_device()).to(memory_format=torch.channels_last)
    for batch in batches(samples, spec, 32):
        yield from runner.softmax(tasks.forward(model, runner.normalize(batch.images, spec))["logits"])


def _onnx_scores(model: Path, spec: runner.Spec, samples: Sequence[Sample]) -> Iterator[np.ndarray]:
    session = onnxruntime.InferenceSession(model, providers=["CPUExecutionProvider"])
    for batch in batches(samples, spec, 8):
        for blob in runner.normalize(batch.images, spec):
            (logits,) = session.run(["logits"], {session.get_inputs()[0].name: blob[None]})
            yield runner.softmax(logits[0])


def _bundle_scores(bundle: Path, spec: runner.Spec, samples: Sequence[Sample]) -> Iterator[np.ndarray]:
    """The bundle's own run.py, in a process of its own: from the bytes of each file to its scores."""
    command = run_py(bundle, "infer", "--list", "-", "--top-k", "0", "--allow-fallback")
    names = "".join(f"{sample.path}\n" for sample in samples)
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, encoding="utf-8") as child:
        assert child.stdin is not None and child.stdout is not None
        child.stdin.write(names)
        child.stdin.close()
        for line in child.stdout:
            yield _scores_of(json.loads(line), spec)
    if child.returncode not in (0, 3):  # 3: on a fallback, which its own warning says
        raise ArtifactError(f"the bundle {bundle} failed on the validation images (exit {child.returncode})")


def _scores_of(answer: dict[str, Any], spec: runner.Spec) -> np.ndarray:
    if "error" in answer:
        raise DataError(f"the bundle cannot read {answer['source']}: {answer['error']}")
    scores = np.zeros(len(spec.class_names), np.float32)
    for result in answer["results"]:
        scores[result["class_id"]] = result["score"]
    return scores
