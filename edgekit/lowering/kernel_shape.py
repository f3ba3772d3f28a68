"""Every convolution says how large its kernel is, though the weights say it too.

Fault: `kernel_shape` is optional in ONNX (the weights' shape implies it), and OpenCV's importer needs it.
Seen on: Conv and ConvTranspose do not load on 4.6.0 and 4.10.0 (4.14.0 and 5.0.0 infer it); QLinearConv does not
load on 4.6.0, 4.10.0 and 4.14.0, and kills the process (SIGSEGV) on 5.0.0 classic.
Issues: opencv #28268, #28321 (Conv); none known for QLinearConv.
"""

from __future__ import annotations

import onnx_ir as ir

WEIGHT_INPUT = {"Conv": 1, "ConvTranspose": 1, "QLinearConv": 3, "ConvInteger": 1}


def rewrite(model: ir.Model) -> None:
    """Adds kernel_shape in place, wherever the weights' shape is known."""
    for node in model.graph:
        if node.op_type in WEIGHT_INPUT and node.domain == "" and "kernel_shape" not in node.attributes:
            weight = node.inputs[WEIGHT_INPUT[node.op_type]]
            if weight is not None and weight.shape is not None and weight.shape.is_static():
                # (out, in / groups, kernel height, kernel width); the first two change places in ConvTranspose
                node.attributes["kernel_shape"] = ir.AttrInt64s("kernel_shape", weight.shape.numpy()[2:])
