"""Graph rewrites that make an ONNX model load, compute the right thing and run fast in cv2.dnn.

Each file is one rewrite, `rewrite(model)`, which keeps what the graph computes. It opens with the OpenCV fault
that it is for, the versions and engines that have it, and OpenCV's issue. A rewrite does not ask which OpenCV is
installed: a model is made once and runs on many.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import onnx
import onnx_ir as ir
from onnx_ir.passes.common import RemoveUnusedNodesPass

from edgekit.forms import Form
from edgekit.lowering import (
    average_pool,
    constants,
    depthwise_5x5,
    gelu,
    global_average_pool,
    hard_sigmoid,
    kernel_shape,
    one_pixel,
    relu6,
    static_shapes,
)

# In this order. The first two come first: they make the constants and shapes that the others read.
REWRITES: tuple[Callable[[ir.Model], None], ...] = (
    constants.rewrite,
    static_shapes.rewrite,
    average_pool.rewrite,
    global_average_pool.rewrite,
    kernel_shape.rewrite,
    one_pixel.rewrite,
    hard_sigmoid.rewrite,
    gelu.rewrite,
)

# What makes one engine faster and another slower. All compute the same from each.
TUNING: Mapping[Form, tuple[Callable[[ir.Model], None], ...]] = {
    "opencv5": (relu6.rewrite,),
    "opencv4": (depthwise_5x5.rewrite,),
    "opencv4.6": (relu6.rewrite, depthwise_5x5.rewrite),
    "plain": (),
}


def lower(model: onnx.ModelProto, form: Form = "opencv5") -> onnx.ModelProto:
    """A model that computes the same (to rounding) and that cv2.dnn runs as it should; the argument is not changed.

    form: where it is to be fast; it is right in every engine. Inputs, outputs and node names are kept. Raises
    ArtifactError where an input or output has no fixed shape.
    """
    lowered = ir.from_proto(model)
    for rewrite in (*REWRITES, *TUNING[form]):
        rewrite(lowered)
    RemoveUnusedNodesPass()(lowered)  # the constants that a rewritten node no longer reads
    return ir.to_proto(lowered)
