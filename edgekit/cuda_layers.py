"""Which layers of a model OpenCV's CUDA backend lacks: each is a trip to the CPU and back; only OpenCV's log says so.

Read off OpenCV 4.14's DNN module (`supportBackend` of each layer); a GPU was not needed for it, and not asked.
"""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import onnx

_NAMES = """
ArgMax ArgMin Attention CumSum DequantizeLinear Einsum Equal Expand Gather GatherElements GatherND Greater
GreaterOrEqual Less LessOrEqual Mean Pow QLinearConv QuantizeLinear ReduceL1 ReduceL2 ReduceLogSum ReduceLogSumExp
ReduceMax ReduceMean ReduceMin ReduceProd ReduceSum ReduceSumSquare Scatter ScatterElements ScatterND Tile TopK Where
"""
CPU_ONLY = frozenset(_NAMES.split())


def cpu_operators(model: Path) -> dict[str, int]:
    """The operators of an ONNX file that run on the CPU there, with their number, the commonest first."""
    graph = onnx.load(model, load_external_data=False).graph
    found = Counter(node.op_type for node in graph.node if node.op_type in CPU_ONLY and node.domain in ("", "ai.onnx"))
    return dict(found.most_common())
