"""Global pooling, in any of its forms, becomes AveragePool with a window of the whole map.

Fault: torch's exporter writes ReduceMean over height and width. Since opset 18 the axes are an input, which older
importers do not read: they average over everything, and say nothing, or do not load it. Where it is read, CUDA has no
Reduce layer, so each one costs a trip to the CPU and back. And neither ReduceMean nor GlobalAveragePool works on the
blocked layout of the new engine: each map is turned to NCHW before it, and squeeze-and-excitation goes on so.
AveragePool does: MobileNetV3 small loses 20 of its 22 changes of layout (and 1 % of its time: docs/lowering.md).
Seen on: 4.6.0 (silently wrong or raised), 5.0.0 new (slow). Reported on: 4.8.0 (silently wrong values), CUDA (slow).
Right, and as fast: 4.10.0, 4.14.0, 5.0.0 classic.
Issues: opencv #25118 (axes as an input), #24198 (4.8.0), #24064 (CUDA).
"""

from __future__ import annotations

import onnx_ir as ir


def rewrite(model: ir.Model) -> None:
    """(N, C, H, W) ReduceMean[2, 3] and GlobalAveragePool → AveragePool in place, with Flatten where axes go away."""
    for node in tuple(model.graph):
        size = _map_size(node)
        if size is None:
            continue
        if node.op_type == "ReduceMean" and not node.attributes.get_int("keepdims", 1):
            _pool_before(node, size)
            _become(node, "Flatten", ir.AttrInt64("axis", 1))
        else:
            _become(node, "AveragePool", ir.AttrInt64s("kernel_shape", size))


def _map_size(node: ir.Node) -> tuple[int, int] | None:
    """(H, W) of the map that a node averages as a whole; None where it does something else, or the size is open."""
    is_pool = node.op_type == "GlobalAveragePool" or (node.op_type == "ReduceMean" and _axes(node) == {2, 3})
    if not is_pool or node.domain != "":
        return None
    shape = node.inputs[0].shape if node.inputs[0] is not None else None
    if shape is None or len(shape) != 4 or not shape.is_static():
        return None
    _, _, height, width = shape.numpy()
    return int(height), int(width)


def _axes(node: ir.Node) -> set[int]:
    """The axes averaged, counted from the front of four; empty for all, and for unknown ones."""
    axes = node.attributes.get_ints("axes", ())  # up to opset 17
    if len(node.inputs) > 1 and node.inputs[1] is not None:
        constant = ir.convenience.get_const_tensor(node.inputs[1])
        axes = () if constant is None else constant.numpy().reshape(-1).tolist()
    return {axis % 4 for axis in axes}


def _become(node: ir.Node, op_type: str, attribute: ir.Attr) -> None:
    node.op_type = op_type
    node.resize_inputs(1)
    node.attributes.clear()
    node.attributes[attribute.name] = attribute


def _pool_before(node: ir.Node, size: tuple[int, int]) -> None:
    source = node.inputs[0]
    assert source is not None and source.shape is not None  # _map_size has seen it
    pooled = ir.Value(
        name=f"{node.outputs[0].name}_pooled", type=source.type, shape=ir.Shape([*source.shape[:2], 1, 1])
    )
    pool = ir.node("AveragePool", [source], {"kernel_shape": size}, outputs=[pooled], name=f"{node.name}_pool")
    node.graph.insert_before(node, pool)  # type: ignore[union-attr]
    node.replace_input_with(0, pooled)
