"""For the classic engine on a CPU: a depthwise convolution larger than 3x3 takes the rows of the map as channels.

Fault: the classic engine has fast code for depthwise 3x3, and for convolutions that are not depthwise. A larger
depthwise one goes through code that copies every tap of every pixel, to use it once: 2 GMAC/s, where others have 10 to
50. With the H rows of a map as the H channels of a group, which is a view and no copy, the same is a convolution by 1x5
from rows to rows, whose weights are a band matrix: two to four times the multiplications, a fifth of the copies, and
the fast code. High maps are cut into bands of rows. It takes 0.3 to 0.8 of the time. The result differs by rounding.
The wide weights are made from the 5x5 ones by nodes that the importers fold when they load the file, so that the file
stays small. (`constants` folds them too: lowering a lowered model is right, but its file is larger.)
Seen on: 4.6.0, 4.10.0, 4.14.0, 5.0.0 classic. The new engine and OpenVINO have fast depthwise code, and take a quarter
longer with this form: it is not for them.
Issue: none known.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

# Rows of output that one convolution makes: more cost multiplications by zero, fewer cost layers and copies.
ROWS_AT_ONCE = 14
ROWS_A_BAND = 8


@dataclass(frozen=True)
class _Depthwise:
    """A depthwise convolution, as far as its rows go."""

    taps: np.ndarray  # (C, kh, kw)
    bias: np.ndarray | None  # (C,)
    in_shape: tuple[int, int, int, int]  # N, C, H, W
    out_shape: tuple[int, int, int, int]
    stride: tuple[int, int]
    pads: tuple[int, int, int, int]  # top, left, bottom, right


@dataclass(frozen=True)
class _Band:
    """Rows of output that one convolution makes, and the rows of input that it reads; each [first, end)."""

    out_rows: tuple[int, int]
    in_rows: tuple[int, int]
    skipped: int  # rows that its first window has above the map


def rewrite(model: ir.Model) -> None:
    """Depthwise Conv larger than 3x3, with constant weights → Reshape, Conv by one row, Reshape; in place."""
    for node in tuple(model.graph):
        layer = _depthwise(node)
        if layer is not None:
            _Writer(model.graph, node).write(layer)


def _depthwise(node: ir.Node) -> _Depthwise | None:
    """None where the node is something else, or something that is fast."""
    if node.op_type != "Conv" or node.domain != "" or node.attributes.get_string("auto_pad", "NOTSET") != "NOTSET":
        return None
    weights, bias = (_constant(node, index) for index in (1, 2))
    in_shape, out_shape = _shape(node.inputs[0]), _shape(node.outputs[0])
    if weights is None or weights.ndim != 4 or in_shape is None or out_shape is None:
        return None
    if bias is None and len(node.inputs) > 2:
        return None
    channels, window = in_shape[1], weights.shape[2:]
    if weights.shape[:2] != (channels, 1) or node.attributes.get_int("group", 1) != channels or channels == 1:
        return None
    pads = node.attributes.get_ints("pads", (0, 0, 0, 0))
    is_padding = max(pads[0], pads[2]) >= window[0]  # a row of output may then see no row of the map
    if min(window) <= 3 or is_padding or set(node.attributes.get_ints("dilations", (1, 1))) != {1}:
        return None
    stride = node.attributes.get_ints("strides", (1, 1))
    return _Depthwise(
        weights[:, 0], bias, in_shape, out_shape, (stride[0], stride[1]), (pads[0], pads[1], pads[2], pads[3])
    )


def _constant(node: ir.Node, index: int) -> np.ndarray | None:
    value = node.inputs[index] if index < len(node.inputs) else None
    tensor = None if value is None else ir.convenience.get_const_tensor(value)
    return None if tensor is None or tensor.dtype != ir.DataType.FLOAT else tensor.numpy()


def _shape(value: ir.Value | None) -> tuple[int, int, int, int] | None:
    if value is None or value.shape is None or len(value.shape) != 4 or not value.shape.is_static():
        return None
    batch, channels, height, width = (int(size) for size in value.shape.numpy())
    return batch, channels, height, width


def _bands(layer: _Depthwise) -> Iterator[_Band]:
    height, in_height, window = layer.out_shape[2], layer.in_shape[2], layer.taps.shape[1]
    rows = height if height <= ROWS_AT_ONCE else ROWS_A_BAND
    for first in range(0, height, rows):
        end = min(first + rows, height)
        top = first * layer.stride[0] - layer.pads[0]
        bottom = (end - 1) * layer.stride[0] - layer.pads[0] + window
        yield _Band((first, end), (max(top, 0), min(bottom, in_height)), max(-top, 0))


class _Writer:
    """Writes what takes a node's place before it, and gives it the node's name and output."""

    def __init__(self, graph: ir.Graph, node: ir.Node) -> None:
        self.graph, self.node, self.count = graph, node, 0

    def write(self, layer: _Depthwise) -> None:
        source, bands = self.node.inputs[0], list(_bands(layer))
        assert source is not None  # _depthwise has seen its shape
        band_weights = self._band_weights(layer, bands[0])
        parts = [self._band(layer, band, source, band_weights) for band in bands]
        last = self._node("Concat", parts, axis=2) if len(parts) > 1 else parts[0]
        made = last.producer()
        assert made is not None
        last.name, last.type, last.shape = (
            self.node.outputs[0].name,
            self.node.outputs[0].type,
            self.node.outputs[0].shape,
        )
        made.name = self.node.name
        ir.convenience.replace_nodes_and_values(self.graph, self.node, [self.node], [], self.node.outputs, [last])

    def _band_weights(self, layer: _Depthwise, band: _Band) -> ir.Value:
        """(C, rows of output, rows of input, kw): in each row of output the taps stand a stride further to the right.

        With rows of input as many as the band's windows span; those of a band at the edge are cut from it.
        """
        channels, window, width = layer.taps.shape
        rows, stride = band.out_rows[1], layer.stride[0]
        span = (rows - 1) * stride + window
        taps = self._tensor(layer.taps)
        gap = [self._tensor(np.zeros((channels, 1, width), np.float32))] * (span + stride - window)
        # One row of output after the other, each a stride longer than the span: so each starts a stride further on.
        strip = self._slice(self._node("Concat", [taps, *gap] * rows, axis=1), {1: (0, rows * span)})
        return self._reshape(strip, (channels, rows, span, width))

    def _band(self, layer: _Depthwise, band: _Band, source: ir.Value, band_weights: ir.Value) -> ir.Value:
        batch, channels, height, width = layer.in_shape
        rows, in_rows = band.out_rows[1] - band.out_rows[0], band.in_rows[1] - band.in_rows[0]
        if in_rows < height:
            source = self._slice(source, {2: band.in_rows})
        columns = layer.taps.shape[2]
        weights = self._slice(band_weights, {1: (0, rows), 2: (band.skipped, band.skipped + in_rows)})
        inputs = [
            self._reshape(source, (batch, channels * in_rows, 1, width)),
            self._reshape(weights, (channels * rows, in_rows, 1, columns)),
        ]
        if layer.bias is not None:
            column = self._tensor(layer.bias[:, None])
            inputs.append(self._reshape(self._node("Concat", [column] * rows, axis=1), (channels * rows,)))
        made = self._node(
            "Conv",
            inputs,
            group=channels,
            kernel_shape=(1, columns),
            strides=(1, layer.stride[1]),
            pads=(0, layer.pads[1], 0, layer.pads[3]),
        )
        return self._reshape(made, (batch, channels, rows, layer.out_shape[3]))

    def _node(self, op_type: str, inputs: Sequence[ir.Value], **attributes: int | tuple[int, ...]) -> ir.Value:
        self.count += 1
        name = f"{self.node.name}_rows_{self.count}"
        node = ir.node(op_type, inputs, attributes, outputs=[ir.Value(name=name)], name=name)
        self.graph.insert_before(self.node, node)
        return node.outputs[0]

    def _reshape(self, value: ir.Value, shape: tuple[int, ...]) -> ir.Value:
        return self._node("Reshape", [value, self._tensor(np.array(shape, np.int64))])

    def _slice(self, value: ir.Value, ranges: dict[int, tuple[int, int]]) -> ir.Value:
        """value[first:end] along each axis."""
        first, end = np.array(list(ranges.values()), np.int64).T
        axes = np.array(list(ranges), np.int64)
        return self._node("Slice", [value, *(self._tensor(array) for array in (first, end, axes))])

    def _tensor(self, array: np.ndarray) -> ir.Value:
        self.count += 1
        name = f"{self.node.name}_rows_{self.count}"
        tensor = ir.tensor(np.ascontiguousarray(array), name=name)
        value = ir.Value(name=name, type=ir.TensorType(tensor.dtype), shape=ir.Shape(array.shape), const_value=tensor)
        self.graph.initializers[name] = value
        return value
