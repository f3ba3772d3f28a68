"""Every input and output declares a fixed shape; shapes in between are written down where they can be inferred.

Fault: a model with an output of no declared shape, which ONNX Runtime runs, does not load: "(-215:Assertion failed)
tensor.has_shape()". A size that is only known at run time loads and fails, or is wrong, later.
Seen on: 4.6.0, 4.10.0, 4.14.0; 5.0.0 classic and new.
Issue: opencv #18072 (sizes known only at run time); none is known for the missing shape itself.
"""

from __future__ import annotations

import onnx_ir as ir
from onnx_ir.passes.common import ShapeInferencePass

from edgekit.errors import ArtifactError


def rewrite(model: ir.Model) -> None:
    """Infers shapes in place. Raises ArtifactError where an input or output still has none that is fixed."""
    ShapeInferencePass()(model)
    for kind, values in (("input", model.graph.inputs), ("output", model.graph.outputs)):
        for value in values:
            if value.shape is None or not value.shape.is_static():
                found = "no shape" if value.shape is None else f"shape {value.shape}"
                raise ArtifactError(
                    f"the model's {kind} {value.name!r} has {found}; OpenCV needs fixed sizes. "
                    "Export the model with one fixed input size"
                )
