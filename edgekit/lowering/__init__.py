"""Graph rewrites that make an ONNX model load, compute the right thing and run fast in cv2.dnn.

Each file is one rewrite, `rewrite(model)`, which keeps what the graph computes. It opens with the OpenCV fault
that it is for, the versions and engines that have it, and OpenCV's issue. A rewrite does not ask which OpenCV is
installed: a model is made once and runs on many.
"""

from __future__ import annotations

from collections.abc import Callable

import onnx
import onnx_ir as ir
from onnx_ir.passes.common import RemoveUnusedNodesPass

from edgekit.lowering import gelu, global_average_pool, hard_sigmoid, kernel_shape, static_shapes

# In this order. static_shapes comes first: it writes down the shapes that the others read.
REWRITES: tuple[Callable[[ir.Model], None], ...] = (
    static_shapes.rewrite,
    global_average_pool.rewrite,
    kernel_shape.rewrite,
    hard_sigmoid.rewrite,
    gelu.rewrite,
)


def lower(model: onnx.ModelProto) -> onnx.ModelProto:
    """A model that computes the same (to rounding) and that cv2.dnn runs as it should; the argument is not changed.

    Inputs, outputs and node names are kept. Raises ArtifactError where an input or output has no fixed shape.
    """
    lowered = ir.from_proto(model)
    for rewrite in REWRITES:
        rewrite(lowered)
    RemoveUnusedNodesPass()(lowered)  # the constants that a rewritten node no longer reads
    return ir.to_proto(lowered)
