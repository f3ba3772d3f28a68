"""GELU multiplies by 0.5 last.

Fault: torch's exporter writes x * (0.5 * (1 + erf(x / sqrt 2))). OpenCV's GELU fusion (`GeluSubGraph` in
onnx_graph_simplifier.cpp) matches it, as products commute, then takes the other factor of the last product for the
constant 0.5. It is x, the output of a node, and reading it as a constant kills the process while the file loads.
(x * (1 + erf(x / sqrt 2))) * 0.5 is fused to OpenCV's Gelu as it should be; halving is exact in any place.
Seen on: 4.10.0, 4.14.0, 5.0.0 classic and new: SIGSEGV. Right on: 4.6.0, which does not fuse it.
Issue: none known.
"""

from __future__ import annotations

import onnx_ir as ir


def rewrite(model: ir.Model) -> None:
    """x * (0.5 * gate) → (x * gate) * 0.5 in place, where gate is 1 + erf(...)."""
    for outer in model.graph:
        if outer.op_type == "Mul":
            factors = [value.producer() for value in outer.inputs if value is not None]
            inner = next((node for node in factors if node is not None and _is_halved_gate(node)), None)
            if inner is not None:
                _reorder(outer, inner)


def _is_halved_gate(node: ir.Node) -> bool:
    """Is it 0.5 * (1 + erf(...)), and read only once?"""
    if node.op_type != "Mul" or len(node.outputs[0].uses()) != 1 or node.outputs[0].is_graph_output():
        return False
    return any(_is_gate(value) and _is_half(_other_factor(node, value)) for value in node.inputs)


def _reorder(outer: ir.Node, inner: ir.Node) -> None:
    x = _other_factor(outer, inner.outputs[0])
    gate = next(value for value in inner.inputs if _is_gate(value))
    half = _other_factor(inner, gate)
    inner.replace_input_with(0, x)
    inner.replace_input_with(1, gate)
    outer.replace_input_with(0, inner.outputs[0])
    outer.replace_input_with(1, half)
    inner.outputs[0].shape = outer.outputs[0].shape  # x may be the larger one


def _other_factor(product: ir.Node, factor: ir.Value | None) -> ir.Value | None:
    return product.inputs[1] if product.inputs[0] is factor else product.inputs[0]


def _is_gate(value: ir.Value | None) -> bool:
    """Is it a sum with erf?"""
    node = value.producer() if value is not None else None
    if node is None or node.op_type != "Add":
        return False
    summands = (summand.producer() for summand in node.inputs if summand is not None)
    return any(summand is not None and summand.op_type == "Erf" for summand in summands)


def _is_half(value: ir.Value | None) -> bool:
    constant = ir.convenience.get_const_tensor(value) if value is not None else None
    return constant is not None and constant.size == 1 and float(constant.numpy().item()) == 0.5
