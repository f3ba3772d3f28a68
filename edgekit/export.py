"""export: a trained network → model.onnx, which is there only once it has been compared with torch.

The comparison goes through ONNX Runtime and every engine of the OpenCV that is here, on real images of the run.
"""

from __future__ import annotations

import contextlib
import io
import logging
import warnings
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
from timm.utils.model import reparameterize_model

from edgekit import runner, tasks
from edgekit.artifacts import open_run, replacing, write_json
from edgekit.lowering import lower
from edgekit.parity import Verdict, compare, require
from edgekit.recipe import Recipe


@dataclass(frozen=True)
class Exported:
    """A model.onnx that computes what torch computes."""

    model: Path
    sha256: str
    size_bytes: int
    verdicts: tuple[Verdict, ...]


def export(run: Path, progress: Callable[[str], None] = lambda text: None) -> Exported:
    """Writes model.onnx: input `image` float32 (1, 3, h, w), output `logits` float32 (1, C), one file, fixed shapes.

    parity.json gets the figures either way. Where an engine differs from torch by more than the recipe's tolerance,
    crashes or hangs, ParityError names it and the first differing node, and model.onnx stays as it was (or absent).
    Raises ArtifactError when the folder is not a finished run. The same weights give the same bytes.
    """
    folder = open_run(run)
    recipe, spec = folder.read_recipe(), folder.read_spec()
    model = tasks.load(folder)
    blobs = np.concatenate([runner.preprocess(runner.read_image(path), spec) for path in folder.check_images()])
    expected = tasks.forward(model, blobs)  # before any change that is made for export
    progress("writing ONNX")
    exported = lower(to_onnx(model, spec, recipe.export.opset))
    onnx.checker.check_model(exported, full_check=True)
    with replacing(folder.onnx) as temporary:
        onnx.save(exported, temporary)
        progress("comparing with torch")
        verdicts = compare(temporary, blobs, expected, tolerance=recipe.export.tolerance)
        sha256 = runner.file_sha256(temporary)
        write_json(folder.parity, _figures(recipe, verdicts, len(blobs), sha256))
        require(verdicts)
    return Exported(folder.onnx, sha256, folder.onnx.stat().st_size, verdicts)


def to_onnx(model: torch.nn.Module, spec: runner.Spec, opset: int) -> onnx.ModelProto:
    """torch → ONNX by torch's own exporter, with nothing in it that depends on this machine."""
    # RepVGG, MobileOne and their like: the branches that exist for training only are folded into one convolution.
    model = reparameterize_model(model.eval()).requires_grad_(False)
    image = torch.zeros(1, 3, *spec.input_size)
    with _quiet():
        program = torch.onnx.export(
            model,
            (image,),
            dynamo=True,
            opset_version=opset,
            input_names=["image"],
            output_names=["logits"],
            verbose=False,
        )
    assert program is not None  # dynamo=True always gives one
    return _anonymous(program.model_proto)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """The exporter tells its own developers a great deal; what matters to a user, the comparison finds."""
    loggers = [logging.getLogger(name) for name in ("torch.onnx", "onnxscript", "onnx_ir")]
    levels = [logger.level for logger in loggers]
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
        warnings.simplefilter("ignore")
        for logger in loggers:
            logger.setLevel(logging.ERROR)
        try:
            yield
        finally:
            for logger, level in zip(loggers, levels, strict=True):
                logger.setLevel(level)


def _anonymous(model: onnx.ModelProto) -> onnx.ModelProto:
    """Without names of source files, stack traces and versions: the exporter writes them to every node and value."""
    clean = onnx.ModelProto()
    clean.CopyFrom(model)
    clean.graph.name = "edgekit"
    clean.producer_name, clean.producer_version, clean.doc_string = "edgekit", "", ""
    del clean.metadata_props[:]
    del clean.graph.metadata_props[:]
    clean.graph.doc_string = ""
    graph = clean.graph
    for item in [*graph.node, *graph.value_info, *graph.input, *graph.output, *graph.initializer]:
        item.doc_string = ""
        del item.metadata_props[:]
    return clean


def _figures(recipe: Recipe, verdicts: tuple[Verdict, ...], images: int, sha256: str) -> dict[str, Any]:
    return {
        "onnx_sha256": sha256,
        "tolerance": recipe.export.tolerance,
        "images": images,
        "torch": torch.__version__,
        "onnx": onnx.__version__,
        "verdicts": [asdict(verdict) for verdict in verdicts],
    }
