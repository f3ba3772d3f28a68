"""ReduceMean over height and width, as torch's exporter writes global pooling, becomes GlobalAveragePool.

Fault: since opset 18 the axes are an input, which older importers do not read: they average over everything, and
say nothing. Where it is read, CUDA has no Reduce layer, so each one costs a trip to the CPU and back.
Seen on: 4.6.0 (silently wrong: another shape). Reported on: 4.8.0 (silently wrong values), CUDA (slow).
Right on: 4.10.0, 4.14.0, 5.0.0 classic and new.
Issues: opencv #25118 (axes as an input), #24198 (4.8.0), #24064 (CUDA).
"""

from __future__ import annotations

import onnx_ir as ir


def rewrite(model: ir.Model) -> None:
    """(N, C, H, W) ReduceMean[2, 3] → GlobalAveragePool in place, with Flatten where the axes are not kept."""
    for node in tuple(model.graph):
        if node.op_type == "ReduceMean" and node.domain == "" and _axes(node) == {2, 3}:
            if node.attributes.get_int("keepdims", 1):
                _become(node, "GlobalAveragePool")
            else:
                _pool_before(node)
                _become(node, "Flatten", axis=1)


def _axes(node: ir.Node) -> set[int]:
    """The axes averaged, counted from the front; empty for all, unknown ones, and maps that are not 4-dimensional."""
    shape = node.inputs[0].shape if node.inputs[0] is not None else None
    if shape is None or len(shape) != 4:
        return set()
    axes = node.attributes.get_ints("axes", ())  # up to opset 17
    if len(node.inputs) > 1 and node.inputs[1] is not None:
        constant = ir.convenience.get_const_tensor(node.inputs[1])
        axes = () if constant is None else constant.numpy().reshape(-1).tolist()
    return {axis % 4 for axis in axes}


def _become(node: ir.Node, op_type: str, **attributes: int) -> None:
    node.op_type = op_type
    node.resize_inputs(1)
    node.attributes.clear()
    node.attributes.update({name: ir.AttrInt64(name, value) for name, value in attributes.items()})


def _pool_before(node: ir.Node) -> None:
    source = node.inputs[0]
    assert source is not None and source.shape is not None  # _axes has seen it
    pooled = ir.Value(
        name=f"{node.outputs[0].name}_pooled", type=source.type, shape=ir.Shape([*source.shape[:2], 1, 1])
    )
    pool = ir.node("GlobalAveragePool", [source], outputs=[pooled], name=f"{node.name}_pool")
    node.graph.insert_before(node, pool)  # type: ignore[union-attr]
    node.replace_input_with(0, pooled)
