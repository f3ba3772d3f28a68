"""export: the trained network as model.onnx, proved against torch through every engine that may run it.

    model.safetensors ─ torch.onnx ─ lower ─► parity ─► model.onnx, parity.json

model.onnx appears only once it is proved; parity.json keeps the figures either way.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import torch

from edgekit import parity, runner, tasks
from edgekit.artifacts import RunFolder, open_run, replacing, write_json
from edgekit.errors import ArtifactError, ParityError
from edgekit.forms import Form
from edgekit.lowering import lower
from edgekit.lowering.from_torch import from_torch

CHECK_IMAGES = 8  # at most; one forward pass an engine and image


@dataclass(frozen=True)
class Exported:
    """A proved model."""

    model: Path
    sha256: str
    size_bytes: int
    verdicts: tuple[parity.Verdict, ...]


def export(run: Path, form: Form = "opencv5", progress: Callable[[str], None] | None = None) -> Exported:
    """Writes a run's model.onnx: float32 image (1, 3, h, w) → the task's outputs, weights inside, fixed shapes.

    It is compared with the trained network, on the run's check images, through ONNX Runtime and each engine of the
    OpenCV here; parity.json gets the figures. The same weights give the same bytes.

    form: where the model is to be fast; it is right in every engine. progress is told what is being done.

    Raises ArtifactError for a run that is damaged, ConfigError for a network that torch cannot export, and ParityError
    where ONNX Runtime or every engine of OpenCV computes something else; a model.onnx of an earlier export is then
    left as it was.
    """
    say = progress or (lambda _: None)
    folder = open_run(run)
    recipe = folder.read_recipe()
    blobs = _check_blobs(folder)
    module = tasks.load(folder)
    expected = tasks.forward(module, blobs, folder.read_spec().task)
    if not all(np.isfinite(array).all() for array in expected.values()):
        raise ParityError(f"{folder.weights} gives NaN or infinite outputs: train it again, with a lower learning_rate")
    say(f"exporting {recipe.model.backbone} to ONNX")
    model = lower(from_torch(module, blobs.shape[2:], tuple(expected)), form)
    onnx.checker.check_model(model, full_check=True)
    with replacing(folder.onnx) as temporary:
        # deterministic: the same weights must give the same file, byte for byte
        temporary.write_bytes(model.SerializeToString(deterministic=True))
        say(f"comparing with torch on {len(blobs)} images, engine by engine")
        verdicts = parity.compare(temporary, blobs, expected, tolerance=recipe.export.tolerance)
        sha256, size_bytes = runner.file_sha256(temporary), temporary.stat().st_size
        record = _record(verdicts, recipe.export.tolerance, len(blobs), sha256, size_bytes)
        write_json(folder.parity, {**record, "form": form})
        parity.require(verdicts)
    return Exported(folder.onnx, sha256, size_bytes, verdicts)


def _check_blobs(folder: RunFolder) -> np.ndarray:
    """The run's check images as network input: float32 (N, 3, h, w)."""
    spec = folder.read_spec()
    return np.concatenate([_check_blob(path, spec) for path in folder.check_images()[:CHECK_IMAGES]])


def _check_blob(path: Path, spec: runner.Spec) -> np.ndarray:
    try:
        return runner.preprocess(runner.read_image(path), spec)
    except runner.RunnerError as error:
        raise ArtifactError(f"cannot read the check image {path}: {error}. Put the original back") from None


def _record(
    verdicts: tuple[parity.Verdict, ...], tolerance: float, images: int, sha256: str, size_bytes: int
) -> dict[str, Any]:
    """What parity.json holds."""
    return {
        "ok": parity.is_proved(verdicts),
        "onnx_sha256": sha256,
        "onnx_size_bytes": size_bytes,
        "images": images,
        "tolerance": tolerance,
        "verdicts": [asdict(verdict) for verdict in verdicts],
        "versions": {
            "torch": torch.__version__,
            "onnx": onnx.__version__,
            "onnxruntime": onnxruntime.__version__,
            "opencv": next(verdict.version for verdict in verdicts if verdict.engine.startswith("opencv-")),
        },
    }
