"""The layers that are worth quantizing: convolutions and products with constant weights."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

# The axis of the weights that counts the outputs.
OUTPUT_AXIS = {"Conv": 0, "Gemm": 1, "MatMul": 1}


@dataclass(frozen=True)
class Layer:
    """A node with constant weights, as a product of matrices: of each group (outputs, taps)."""

    name: str
    op_type: str
    source: str  # the value that it reads
    weights: str  # the initializer's name
    shape: tuple[int, ...]  # of the weights, as the file has them
    groups: int
    output_axis: int  # of `shape`
    kernel: tuple[int, int]  # (1, 1) for a product
    strides: tuple[int, int]
    dilations: tuple[int, int]
    pads: tuple[int, int, int, int]  # top, left, bottom, right

    def to_matrix(self, weights: np.ndarray) -> np.ndarray:
        """Weights as the file has them → (groups, outputs of each, taps)."""
        rows = weights if self.output_axis == 0 else weights.T
        return rows.reshape(self.groups, rows.shape[0] // self.groups, -1)

    def from_matrix(self, matrix: np.ndarray) -> np.ndarray:
        """The inverse of to_matrix."""
        rows = matrix.reshape(matrix.shape[0] * matrix.shape[1], -1)
        return np.ascontiguousarray((rows if self.output_axis == 0 else rows.T).reshape(self.shape))


def layers(model: ir.Model) -> tuple[Layer, ...]:
    """Every such node, in the graph's order. Two nodes that share their weights are left alone."""
    found = [layer for node in model.graph if (layer := _layer(node))]
    uses = [layer.weights for layer in found]
    return tuple(layer for layer in found if uses.count(layer.weights) == 1)


def _layer(node: ir.Node) -> Layer | None:
    if node.op_type not in OUTPUT_AXIS or node.domain != "" or len(node.inputs) < 2:
        return None
    source, weights = node.inputs[0], node.inputs[1]
    constant = None if weights is None else ir.convenience.get_const_tensor(weights)
    if constant is None or constant.dtype != ir.DataType.FLOAT or source is None or source.const_value is not None:
        return None
    shape = tuple(int(size) for size in constant.shape.numpy())
    is_conv, axis = node.op_type == "Conv", OUTPUT_AXIS[node.op_type]
    if len(shape) != (4 if is_conv else 2) or node.attributes.get_int("transA", 0) != 0:
        return None
    pads = node.attributes.get_ints("pads", (0, 0, 0, 0))
    return Layer(
        name=str(node.name),
        op_type=node.op_type,
        source=str(source.name),
        weights=str(weights.name) if weights else "",
        shape=shape,
        groups=node.attributes.get_int("group", 1),
        output_axis=0 if node.attributes.get_int("transB", 0) != 0 else axis,
        kernel=(shape[2], shape[3]) if is_conv else (1, 1),
        strides=_pair(node.attributes.get_ints("strides", (1, 1))),
        dilations=_pair(node.attributes.get_ints("dilations", (1, 1))),
        pads=(pads[0], pads[1], pads[2], pads[3]),
    )


def _pair(values: Sequence[int]) -> tuple[int, int]:
    return int(values[0]), int(values[1])


def constant(model: ir.Model, name: str) -> np.ndarray:
    """An initializer's array."""
    tensor = model.graph.initializers[name].const_value
    assert tensor is not None  # what `layers` found is constant
    return tensor.numpy()
