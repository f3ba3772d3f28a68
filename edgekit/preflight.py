"""Can an OpenCV run this network at all? Asked before hours of training, of the untrained network.

The proof after training is `export`'s and `verify`'s; this one tells early what would fail there.
"""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from pathlib import Path

import cv2
import numpy as np
import onnx
import torch

from edgekit import parity, runner
from edgekit.backbones import BACKBONES
from edgekit.environments import opencv_python
from edgekit.errors import ConfigError
from edgekit.lowering import lower
from edgekit.lowering.from_torch import from_torch

MIN_PROVED_SIZE = 64  # pixels; benchmarks/architectures.py judges the recommended ones at this size too
TOLERANCE = 1e-3  # of the largest output; a conversion fault is far larger
TIMEOUT_S = 120.0


def preflight(
    backbone: str,
    model: torch.nn.Module,
    spec: runner.Spec,
    output_names: Sequence[str],
    images: Sequence[Path],
    opencv: Sequence[str] = (),
) -> None:
    """Tries a network on the OpenCV here and on others; recommended backbones that were proved there are not tried.

    model: as it will be trained, on the CPU; left in eval mode; it gives a tensor, or a tuple of them, of these names.
    images: one or more real ones. opencv: versions, as
    `environments.opencv_python` takes them. Raises ConfigError where no engine of one of them computes what torch
    does, with the reason and a backbone that runs there, and SetupError where a version cannot be had.
    """
    others = [version for version in opencv if not _is_known(backbone, spec, version)]
    is_known_here = _is_known(backbone, spec, cv2.__version__)
    if is_known_here and not others:
        return
    model.eval()
    blobs = np.concatenate([runner.preprocess(runner.read_image(image), spec) for image in images])
    with torch.inference_mode():
        outputs = model(torch.from_numpy(blobs))
    tensors = outputs if isinstance(outputs, tuple) else (outputs,)
    expected = {name: tensor.numpy() for name, tensor in zip(output_names, tensors, strict=True)}
    with tempfile.TemporaryDirectory(prefix="edgekit-preflight-") as folder:
        path = Path(folder, "model.onnx")
        onnx.save(lower(from_torch(model, spec.input_size, output_names)), path)
        pythons = [*([] if is_known_here else [None]), *map(opencv_python, others)]
        for python in pythons:
            verdicts = parity.compare(path, blobs, expected, tolerance=TOLERANCE, timeout_s=TIMEOUT_S, python=python)
            if not parity.is_proved(verdicts):
                raise ConfigError(_refusal(backbone, model, verdicts))


def _is_known(backbone: str, spec: runner.Spec, version: str) -> bool:
    """Is it a recommended one that was proved on this version, as a classifier, at a size like this one?"""
    row = BACKBONES.get(backbone)
    return (
        spec.task == "classify"
        and row is not None
        and _minor(version) in row.opencv
        and min(spec.input_size) >= MIN_PROVED_SIZE
    )


def _minor(version: str) -> str:
    return "{}.{}".format(*runner.opencv_version(version))


def _refusal(backbone: str, model: torch.nn.Module, verdicts: Sequence[parity.Verdict]) -> str:
    version = verdicts[-1].version
    reasons = "; ".join(parity.describe(verdict) for verdict in verdicts if verdict.status != "ok")
    size = sum(parameter.numel() for parameter in model.parameters())
    rows = [row for row in BACKBONES.values() if _minor(version) in row.opencv]
    instead = min(rows, key=lambda row: abs(row.params - size), default=None)
    advice = f"Train {instead.name}, which does, or see `edgekit backbones`" if instead else "See `edgekit backbones`"
    return f"{backbone} does not run on OpenCV {version} as torch computes it: {reasons}. {advice}"
