"""AveragePool says in its own attributes alone what it averages, and pads nothing.

Fault: the classic importer does not read count_include_pad. It counts the padding where the file says that PyTorch
made it (`producer_name`), and does not where it does not say so. The new engine reads it, and is wrong where
ceil_mode cuts the last window off too.
Seen on: 4.6.0, 4.10.0, 4.14.0, 5.0.0 classic: silently wrong, in both directions (EfficientFormer, PoolFormer);
5.0.0 new: silently wrong with count_include_pad = 1 and ceil_mode = 1.
Issue: none known.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import onnx_ir as ir


def rewrite(model: ir.Model) -> None:
    """Clears the producer's name; where padding counts, it becomes a Pad node, in place."""
    model.producer_name = None
    model.producer_version = None
    for node in tuple(model.graph):
        if node.op_type == "AveragePool" and node.domain == "" and node.attributes.get_int("count_include_pad"):
            pads = node.attributes.get_ints("pads", ())
            if any(pads):
                _pad_before(node, pads)
                node.attributes.pop("pads")
            node.attributes.pop("count_include_pad")


def _pad_before(node: ir.Node, pads: Sequence[int]) -> None:
    source, graph = node.inputs[0], node.graph
    assert source is not None and isinstance(graph, ir.Graph)
    half = len(pads) // 2
    amounts = np.array([0, 0, *pads[:half], 0, 0, *pads[half:]], np.int64)  # of batch and channels: none
    name = f"{node.outputs[0].name}_pads"
    tensor = ir.tensor(amounts, name=name)
    constant = ir.Value(name=name, type=ir.TensorType(tensor.dtype), shape=ir.Shape(amounts.shape), const_value=tensor)
    graph.initializers[name] = constant
    padded = ir.Value(name=f"{node.outputs[0].name}_padded", type=source.type, shape=_padded_shape(source, amounts))
    graph.insert_before(node, ir.node("Pad", [source, constant], outputs=[padded], name=f"{node.name}_pad"))
    node.replace_input_with(0, padded)


def _padded_shape(source: ir.Value, amounts: np.ndarray) -> ir.Shape | None:
    if source.shape is None or not source.shape.is_static():
        return None
    added = amounts.reshape(2, -1).sum(axis=0)
    return ir.Shape([int(size) + int(more) for size, more in zip(source.shape.numpy(), added, strict=True)])
