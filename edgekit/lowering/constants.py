"""What does not depend on the image is computed once, here.

Fault: some networks compute a table at run time, such as EdgeNeXt its position encoding, by layers whose input is a
constant. The importers make such layers from constant weights and a computed input only.
Seen on: 4.6.0, 4.10.0, 4.14.0, 5.0.0 classic: a convolution of a constant does not load; 5.0.0 new: it does not run.
Issue: none known.
"""

from __future__ import annotations

import onnx_ir as ir
from onnxscript.optimizer import fold_constants

MAX_ELEMENTS = 1 << 24  # 64 MB of float32: more would be no table


def rewrite(model: ir.Model) -> None:
    """Replaces each node that reads constants only by its value, in place."""
    fold_constants(model, input_size_limit=MAX_ELEMENTS, output_size_limit=MAX_ELEMENTS)
