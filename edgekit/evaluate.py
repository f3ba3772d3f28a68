"""evaluate: how good the trained network is, and whether its conversions still are.

Torch, ONNX and bundle are measured by one function on the same images, so that three columns stand side by side.
"""

from __future__ import annotations

import json
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import cv2
import onnxruntime
import torch

from edgekit import pictures, report, runner, tasks
from edgekit.artifacts import RunFolder, open_run, write_bytes, write_json
from edgekit.batches import batches
from edgekit.datasets import missing, read_split
from edgekit.errors import ArtifactError, DataError
from edgekit.launch import run_py
from edgekit.samples import Sample

# A column of the comparison: labelled images → an image's answers each, ready for JSON, in order.
Predict = Callable[[Sequence[Sample]], Iterator[runner.Results]]


@dataclass(frozen=True)
class Evaluation:
    """What metrics.json holds, and where it is."""

    run: Path
    metrics: dict[str, Any]


def evaluate(
    run: Path,
    bundle: Path | None = None,
    *,
    subset: str = "val",
    on_image: Callable[[str, int, int], None] = lambda *_: None,
) -> Evaluation:
    """Measures the run's network on its validation images: in torch, as model.onnx where export has made it, and
    as `bundle` where one is given. Writes metrics.json, confusion.png or precision-recall.png, mistakes.jpg and
    report.html.

    subset: "val", or "test" where the data has one of its own. on_image(column, done, total) follows the work. Raises
    ArtifactError or DataError when something is missing.
    """
    folder = open_run(run)
    spec, samples = folder.read_spec(), _samples(folder, subset)
    task = tasks.TASKS[spec.task]
    answers: dict[str, list[runner.Results]] = {}
    columns: dict[str, dict[str, Any]] = {}
    for name, predict in _columns(folder, spec, bundle).items():
        start = time.perf_counter()
        answers[name] = []
        for answer in predict(samples):
            answers[name].append(answer)
            on_image(name, len(answers[name]), len(samples))
        seconds = time.perf_counter() - start
        columns[name] = {
            **task.metrics(answers[name], samples, spec.class_names).to_dict(),
            "agreement": task.agreement(answers[name], answers["torch"], spec),
            "images_per_second": len(samples) / seconds,
        }
    metrics = {
        "task": spec.task,
        "subset": subset,
        "images": len(samples),
        "class_names": list(spec.class_names),
        "columns": columns,
        "mistakes": [asdict(mistake) for mistake in task.mistakes(answers["torch"], samples, spec.class_names)],
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


def _samples(folder: RunFolder, subset: str) -> tuple[Sample, ...]:
    split = read_split(folder.split)
    samples = {"val": split.val, "test": split.test}[subset]
    if not samples:
        raise DataError(f"the data of {folder.path} has no {subset} subset of its own: leave --subset out")
    gone = missing(samples)
    if gone:
        noun = {"val": "validation", "test": "test"}[subset]
        raise DataError(f"{len(gone)} of the run's {noun} images are gone, such as {gone[0]}: put them back")
    return samples


def _write(folder: RunFolder, metrics: dict[str, Any]) -> None:
    torch_column = metrics["columns"]["torch"]
    if metrics["task"] == "detect":
        curves = pictures.precision_recall_picture(torch_column["pr_curves"])
        write_bytes(folder.path / "precision-recall.png", curves)
    else:
        confusion = pictures.confusion_picture(torch_column["confusion"], metrics["class_names"])
        write_bytes(folder.path / "confusion.png", confusion)
    write_bytes(folder.path / "mistakes.jpg", pictures.contact_sheet(metrics))
    write_json(folder.metrics, metrics)
    report.write_report(folder)


def _columns(folder: RunFolder, spec: runner.Spec, bundle: Path | None) -> dict[str, Predict]:
    columns: dict[str, Predict] = {"torch": lambda samples: _torch_answers(folder, spec, samples)}
    if folder.onnx.is_file():
        columns["onnx"] = lambda samples: _onnx_answers(folder.onnx, spec, samples)
    if bundle is not None:
        columns["bundle"] = lambda samples: _bundle_answers(bundle, spec, samples)
    return columns


def _device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"


def _torch_answers(folder: RunFolder, spec: runner.Spec, samples: Sequence[Sample]) -> Iterator[runner.Results]:
    model = tasks.load(folder).to(_device()).to(memory_format=torch.channels_last)
    for batch in batches(samples, spec, 32):
        outputs = tasks.forward(model, runner.normalize(batch.images, spec), spec.task)
        yield from tasks.answers(outputs, spec, batch.sizes)


def _onnx_answers(model: Path, spec: runner.Spec, samples: Sequence[Sample]) -> Iterator[runner.Results]:
    session = onnxruntime.InferenceSession(model, providers=["CPUExecutionProvider"])
    names = [output.name for output in session.get_outputs()]
    for batch in batches(samples, spec, 8):
        for blob, size in zip(runner.normalize(batch.images, spec), batch.sizes, strict=True):
            arrays = session.run(names, {session.get_inputs()[0].name: blob[None]})
            yield from tasks.answers(dict(zip(names, arrays, strict=True)), spec, [size])


def _bundle_answers(bundle: Path, spec: runner.Spec, samples: Sequence[Sample]) -> Iterator[runner.Results]:
    """The bundle's own run.py, in a process of its own: from the bytes of each file to its answer."""
    options = [f"--{name.replace('_', '-')}={value}" for name, value in tasks.TASKS[spec.task].ANSWERS.items()]
    command = run_py(bundle, "infer", "--list", "-", *options, "--allow-fallback")
    names = "".join(f"{sample.path}\n" for sample in samples)
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, encoding="utf-8") as child:
        assert child.stdin is not None and child.stdout is not None
        child.stdin.write(names)
        child.stdin.close()
        for line in child.stdout:
            answer = json.loads(line)
            if "error" in answer:
                raise DataError(f"the bundle cannot read {answer['source']}: {answer['error']}")
            yield answer["results"]
    if child.returncode not in (0, 3):  # 3: on a fallback, which its own warning says
        raise ArtifactError(f"the bundle {bundle} failed on the images (exit {child.returncode})")
