"""torch → ONNX, as torch's exporter writes it: what the rewrites start from."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import onnx
import torch
from timm.utils.model import reparameterize_model

from edgekit.errors import ConfigError

INPUT_NAME = "image"
OPSET = 18  # the lowest that torch writes: the older the set, the more OpenCVs read it


def from_torch(module: torch.nn.Module, size: Sequence[int], output_names: Sequence[str]) -> onnx.ModelProto:
    """A network in eval mode → ONNX for one image of `size` (height, width), without traces of this machine.

    Input `image` float32 (1, 3, h, w). The argument is not changed. Raises ConfigError where torch cannot export it.
    """
    # Blocks that train with several branches run as one convolution (RepVGG, MobileOne, FastViT, ...).
    module = reparameterize_model(module)
    try:
        with _quiet():
            program = torch.onnx.export(
                module,
                (torch.zeros(1, 3, *size),),
                dynamo=True,
                opset_version=OPSET,
                input_names=[INPUT_NAME],
                output_names=list(output_names),
                external_data=False,
                verbose=False,
            )
    except torch.onnx.errors.OnnxExporterError as error:
        reason = str(error).strip().splitlines()[0]
        raise ConfigError(f"torch cannot export this network to ONNX ({reason}): choose another backbone") from None
    assert program is not None  # with dynamo there always is one
    model: onnx.ModelProto = program.model_proto
    _remove_traces(model)
    model.graph.name = "model"
    return model


def _remove_traces(message: Any) -> None:
    """Clears the exporter's notes in a protobuf message and all below it: source files, stack traces, scopes.

    They name this machine's folders, and no engine reads them.
    """
    for field, value in message.ListFields():
        if field.name in ("metadata_props", "doc_string"):
            message.ClearField(field.name)
        elif field.message_type is not None:
            for part in (value,) if hasattr(value, "ListFields") else value:
                _remove_traces(part)


@contextmanager
def _quiet() -> Iterator[None]:
    """Keeps the exporter's advice, which is for who writes the network, off the user's terminal."""
    loggers = [logging.getLogger(name) for name in ("torch.onnx", "onnxscript")]
    levels = [logger.level for logger in loggers]
    try:
        for logger in loggers:
            logger.setLevel(logging.ERROR)
        yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
