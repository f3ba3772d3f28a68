"""Small ONNX networks for the tests, written in ONNX's own text form, and what ONNX Runtime makes of them."""

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx.parser
import onnxruntime


def network(text: str, opset: int = 18, **weights: Any) -> onnx.ModelProto:
    """`text`: "(float[1,3,8,8] image) => (float[] y) { y = ... }"; weights: arrays that it names.

    float[]: no declared shape. [name] before a node names it.
    """
    head = f'<ir_version: 8, opset_import: ["" : {opset}, "other" : 1]> net '
    model = onnx.parser.parse_model(head + text)
    model.graph.initializer.extend(onnx.numpy_helper.from_array(array, name) for name, array in weights.items())
    for node in model.graph.node:
        if not node.domain:
            node.ClearField("domain")  # the parser writes "" down, which other writers leave out
    return model


def saved(model: onnx.ModelProto, folder: Path) -> Path:
    path = folder / "net.onnx"
    onnx.save(model, path)
    return path


def random(*shape: int, seed: int = 0) -> np.ndarray:
    """Standard normal, float32."""
    return np.random.default_rng(seed).standard_normal(shape, np.float32)


def computed(model: onnx.ModelProto, blobs: np.ndarray) -> dict[str, np.ndarray]:
    """The outputs by name, fed with one sample at a time, as parity does."""
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    names = [output.name for output in session.get_outputs()]
    source = session.get_inputs()[0].name
    rows = [session.run(names, {source: blob[None]}) for blob in blobs]
    columns = zip(*rows, strict=True)
    return {name: np.concatenate(np.atleast_1d(*arrays)) for name, arrays in zip(names, columns, strict=True)}
