"""A padded convolution of a map of one pixel keeps the one tap that meets the pixel.

Fault: a depthwise 3x3 convolution with padding gives garbage where the map is a single pixel, as the last stages of
MobileNets have it for 32 px images. The other taps see padding only, so that a 1x1 convolution computes the same.
Seen on: 4.6.0, 4.10.0, 4.14.0, 5.0.0 classic: silently wrong. Right on: 5.0.0 new.
Issue: none known.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir


def rewrite(model: ir.Model) -> None:
    """Conv with constant weights, from one pixel to one pixel → 1x1 Conv without padding, in place."""
    for node in model.graph:
        if node.op_type == "Conv" and node.domain == "" and _is_pixel(node.inputs[0]) and _is_pixel(node.outputs[0]):
            weights = ir.convenience.get_const_tensor(node.inputs[1]) if node.inputs[1] is not None else None
            pads = node.attributes.get_ints("pads", ())
            if weights is not None and len(pads) == 4 and any(pads):
                _keep_tap(model.graph, node, weights.numpy(), pads[0], pads[1])


def _is_pixel(value: ir.Value | None) -> bool:
    return value is not None and value.shape is not None and len(value.shape) == 4 and tuple(value.shape[2:]) == (1, 1)


def _keep_tap(graph: ir.Graph, node: ir.Node, weights: np.ndarray, top: int, left: int) -> None:
    """top, left: the padding there, which is the place of the tap; with dilation it counts in steps of that."""
    dilation = node.attributes.get_ints("dilations", (1, 1))
    row, column = top // dilation[0], left // dilation[1]
    name = f"{node.inputs[1].name}_tap_{node.name}"  # type: ignore[union-attr]
    tap = np.ascontiguousarray(weights[:, :, row : row + 1, column : column + 1])
    tensor = ir.tensor(tap, name=name)
    value = ir.Value(name=name, type=ir.TensorType(tensor.dtype), shape=ir.Shape(tap.shape), const_value=tensor)
    graph.initializers[name] = value
    node.replace_input_with(1, value)
    for gone in ("pads", "strides", "dilations", "auto_pad"):
        node.attributes.pop(gone, None)
    node.attributes["kernel_shape"] = ir.AttrInt64s("kernel_shape", [1, 1])
