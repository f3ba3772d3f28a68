"""HardSigmoid does not spell out beta = 0.5, which is its default.

Fault: Mul(x, HardSigmoid(y)) is fused to HardSwish(y) even where x is not y, and the product with x is lost: every
squeeze-and-excitation block of MobileNetV3, LCNet, GhostNet, HardCoRe-NAS and LR-ASPP. The fusion's pattern
(`HardSwishSubgraph` in onnx_graph_simplifier.cpp) does not check that its two inputs are one; it does ask that
alpha = 1/6 and beta = 0.5 are both written, as torch's exporter writes them.
Seen on: 4.6.0, 4.10.0, 4.14.0, 5.0.0 classic and new: silently wrong.
Issue: none known.
"""

from __future__ import annotations

import onnx_ir as ir


def rewrite(model: ir.Model) -> None:
    """Removes beta = 0.5 in place."""
    for node in model.graph:
        if node.op_type == "HardSigmoid" and node.domain == "" and node.attributes.get_float("beta", 0.5) == 0.5:
            node.attributes.pop("beta", None)
