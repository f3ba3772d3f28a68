"""Where the int8 goes: the three schemes that engines read.

weight_only   int8 weights, DequantizeLinear, float arithmetic     a file a quarter the size, right everywhere
qdq           that, and the maps that layers read as uint8         int8 kernels in OpenVINO and OpenCV 5.0
qoperator     QLinearConv and its like                             int8 kernels in OpenCV 4.x
"""

from __future__ import annotations

import logging
import tempfile
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
from onnx_ir.passes.common import RemoveUnusedNodesPass
from onnxruntime.quantization import CalibrationMethod, QuantFormat, QuantType, quantize_static
from onnxruntime.quantization.calibrate import TensorData, TensorsData, save_tensors_data

from edgekit.int8.calibration import grid
from edgekit.int8.layers import Layer, layers
from edgekit.int8.rounding import Rounded

Ranges = Mapping[str, tuple[float, float]]

# A layer that is left in float keeps its float weights too, where they are at most this share of all weights.
SMALL = 0.02


def weight_only(model: ir.Model, weights: Mapping[str, Rounded]) -> ir.Model:
    """A new model whose layers read their weights from int8, output by output; it computes in float."""
    return _written(model, weights, {}, frozenset())


def qdq(model: ir.Model, weights: Mapping[str, Rounded], ranges: Ranges, spared: Collection[str] = ()) -> ir.Model:
    """A new model whose layers, but for those `spared`, read int8 weights and uint8 maps; biases stay float.

    A spared layer computes in float; its weights are float where that costs little, or `weights` has none, else int8.
    """
    sizes = {layer.name: np.prod(layer.shape) for layer in layers(model)}
    float_weights = frozenset(name for name in spared if sizes[name] <= SMALL * sum(sizes.values()))
    read = {name: ranges[layer.source] for layer in layers(model) if (name := layer.name) not in spared}
    return _written(model, weights, read, float_weights)


def _written(
    model: ir.Model,
    weights: Mapping[str, Rounded],
    ranges: Ranges,  # by layer
    float_weights: frozenset[str],
) -> ir.Model:
    made = model.clone()
    nodes = {str(node.name): node for node in made.graph}
    maps: dict[str, ir.Value] = {}
    for layer in layers(made):
        node = nodes[layer.name]
        if layer.name not in float_weights and layer.name in weights:
            node.replace_input_with(1, _dequantized(made.graph, layer, weights[layer.name]))
        if layer.name in ranges:
            if layer.source not in maps:
                maps[layer.source] = _through_uint8(made.graph, node, ranges[layer.name])
            node.replace_input_with(0, maps[layer.source])
    _drop_clips(made.graph)
    RemoveUnusedNodesPass()(made)
    return made


def _dequantized(graph: ir.Graph, layer: Layer, weights: Rounded) -> ir.Value:
    name = layer.weights
    arrays = {
        f"{name}_int8": weights.integers,
        f"{name}_scale": weights.scales,
        f"{name}_zero": np.zeros(len(weights.scales), np.int8),
    }
    inputs = [_initializer(graph, key, array) for key, array in arrays.items()]
    node = ir.node("DequantizeLinear", inputs, {"axis": weights.axis}, name=f"{name}_dequantize")
    node.outputs[0].name = f"{name}_float"
    graph.insert_before(graph[0], node)
    return node.outputs[0]


def _through_uint8(graph: ir.Graph, node: ir.Node, limits: tuple[float, float]) -> ir.Value:
    """The node's first input, quantized and back."""
    source = node.inputs[0]
    assert source is not None  # a layer reads something
    scale, zero = grid(*limits)
    constants = [
        _initializer(graph, f"{source.name}_scale", np.array(scale, np.float32)),
        _initializer(graph, f"{source.name}_zero", np.array(zero, np.uint8)),
    ]
    quantize = ir.node("QuantizeLinear", [source, *constants], name=f"{source.name}_quantize")
    quantize.outputs[0].name = f"{source.name}_uint8"
    dequantize = ir.node("DequantizeLinear", [quantize.outputs[0], *constants], name=f"{source.name}_dequantize")
    dequantize.outputs[0].name = f"{source.name}_dequantized"
    graph.insert_before(node, [quantize, dequantize])
    return dequantize.outputs[0]


def _initializer(graph: ir.Graph, name: str, array: np.ndarray) -> ir.Value:
    tensor = ir.tensor(array, name=name)
    value = ir.Value(name=name, type=ir.TensorType(tensor.dtype), shape=ir.Shape(array.shape), const_value=tensor)
    graph.initializers[name] = value
    return value


def _drop_clips(graph: ir.Graph) -> None:
    """Takes Relu and Clip away where only quantization reads them: uint8 over [0, high] cuts off the same.

    The convolution before is then followed by quantization, which is what engines fuse.
    """
    for node in graph:
        if node.op_type not in ("Relu", "Clip") or not node.inputs or node.outputs[0].is_graph_output():
            continue
        readers = [user for user, _ in node.outputs[0].uses()]
        if readers and all(reader.op_type == "QuantizeLinear" and _cuts_like(node, reader) for reader in readers):
            assert node.inputs[0] is not None
            ir.convenience.replace_all_uses_with(node.outputs[0], node.inputs[0])


def _cuts_like(node: ir.Node, quantize: ir.Node) -> bool:
    """Does uint8 give the same with and without the node before it?"""
    scale, zero = (_number(quantize, index) for index in (1, 2))
    if scale is None or zero != 0:
        return False
    if node.op_type == "Relu":
        return True
    low = _number(node, 1) if len(node.inputs) > 1 else None
    high = _number(node, 2) if len(node.inputs) > 2 else None
    # a limit half a step above the highest level rounds to that level too
    return low == 0 and (high is None or high >= 254.5 * scale)


def _number(node: ir.Node, index: int) -> float | None:
    value = node.inputs[index]
    tensor = None if value is None else ir.convenience.get_const_tensor(value)
    return None if tensor is None or tensor.size != 1 else float(tensor.numpy().item())


def qoperator(
    model: ir.Model, weights: Mapping[str, Rounded], ranges: Ranges, spared: Collection[str] = ()
) -> onnx.ModelProto:
    """The whole network, but for the layers `spared`, in ONNX Runtime's integer operators, int8 throughout.

    onnxruntime.quantization writes them. ranges: of every float value of the network.
    """
    rounded = model.clone()
    for layer in layers(rounded):
        rounded.graph.initializers[layer.weights].const_value = ir.tensor(
            weights[layer.name].to_float(), name=layer.weights
        )
    found = {name: TensorData(lowest=np.float32(low), highest=np.float32(high)) for name, (low, high) in ranges.items()}
    with tempfile.TemporaryDirectory(prefix="edgekit-int8-") as folder, _quiet():
        source, cache, result = (Path(folder, name) for name in ("float.onnx", "ranges.json", "int8.onnx"))
        onnx.save(ir.to_proto(rounded), source)
        save_tensors_data(TensorsData(CalibrationMethod.MinMax, found), cache)
        quantize_static(
            source,
            result,
            None,
            quant_format=QuantFormat.QOperator,
            per_channel=True,
            weight_type=QuantType.QInt8,
            activation_type=QuantType.QInt8,  # cv2.dnn's integer layers know no other
            nodes_to_exclude=list(spared),
            calibration_cache_path=cache,
        )
        return onnx.load(result)


@contextmanager
def _quiet() -> Iterator[None]:
    """Without its advice to preprocess the model, which has been done: it goes to the root logger."""
    logger = logging.getLogger()
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)
