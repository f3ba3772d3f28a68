"""For the new engine: ReLU6 becomes HardSigmoid, whose factor 6 the next convolution takes into its weights.

Fault: OpenCV 5.0's new engine fuses most activations into the convolution before them, but not Clip. Each Clip then
runs on its own, with the map turned from the engine's blocked layout to NCHW before it and back after it.
clip(x, 0, 6) is 6 * HardSigmoid(x; alpha = 1/6, beta = 0), HardSigmoid is fused, and the next layer is linear, so
that the 6 goes into its weights. The result differs by rounding.
Seen on: 5.0.0 new (EfficientNet-Lite0 takes a quarter longer with Clip). The classic engine fuses Clip and is a few
per cent faster with it, so this rewrite is for the new engine only. 4.6.0 cannot load Clip as torch's exporter writes
it, and loads this.
OpenVINO 2026.4 computes this HardSigmoid wrongly: it takes the plain form.
Issue: none known.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import onnx_ir as ir

SCALE_KEPT = {"AveragePool", "MaxPool", "GlobalAveragePool", "Flatten", "Reshape", "Identity"}  # f(6 x) = 6 f(x)
WEIGHT_INPUT = {"Conv": 1, "Gemm": 1}


def rewrite(model: ir.Model) -> None:
    """Clip(x, 0, m) → HardSigmoid(x) in place, where all that reads it are layers with constant weights."""
    for node in model.graph:
        top = _top(node)
        if top is None:
            continue
        readers = list(_linear_readers(node.outputs[0]))
        if None in readers:
            continue
        for reader in readers:
            assert reader is not None
            _scale_weights(model.graph, reader, top)
        node.op_type = "HardSigmoid"
        node.resize_inputs(1)
        node.attributes.clear()
        node.attributes.update({"alpha": ir.AttrFloat32("alpha", 1 / top), "beta": ir.AttrFloat32("beta", 0.0)})


def _top(node: ir.Node) -> float | None:
    """m of Clip(x, 0, m); None for any other node."""
    if node.op_type != "Clip" or node.domain != "" or len(node.inputs) != 3:
        return None
    low, high = (None if value is None else ir.convenience.get_const_tensor(value) for value in node.inputs[1:])
    if low is None or high is None or float(low.numpy()) != 0 or not 0 < float(high.numpy()) < 1e6:
        return None
    return float(high.numpy())


def _linear_readers(value: ir.Value) -> Iterator[ir.Node | None]:
    """The layers with weights that a value ends in; None for each end that is something else."""
    if value.is_graph_output() or not value.uses():
        yield None
    for node, index in value.uses():
        if node.op_type in SCALE_KEPT and index == 0:
            yield from _linear_readers(node.outputs[0])
        elif node.op_type in WEIGHT_INPUT and index == 0 and _weights(node) is not None:
            yield node
        else:
            yield None


def _weights(node: ir.Node) -> np.ndarray | None:
    value = node.inputs[WEIGHT_INPUT[node.op_type]]
    tensor = None if value is None else ir.convenience.get_const_tensor(value)
    return None if tensor is None or tensor.dtype != ir.DataType.FLOAT else tensor.numpy()


def _scale_weights(graph: ir.Graph, node: ir.Node, factor: float) -> None:
    """Gives a node weights of its own: another one may read the old ones."""
    index = WEIGHT_INPUT[node.op_type]
    weights = _weights(node)
    assert weights is not None
    old = node.inputs[index]
    name = f"{old.name if old is not None else node.name}_times_{factor:g}"
    if name in graph.initializers:
        name = f"{name}_{node.name}"
    tensor = ir.tensor(weights * np.float32(factor), name=name)
    value = ir.Value(name=name, type=ir.TensorType(tensor.dtype), shape=ir.Shape(weights.shape), const_value=tensor)
    graph.initializers[name] = value
    node.replace_input_with(index, value)
