"""What a float network's layers meet on real images: the range of each map, and how a window's taps go together."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime

from edgekit.int8.layers import Layer, layers

Method = Literal["mse", "percentile", "minmax"]
METHODS: tuple[Method, ...] = get_args(Method)


BINS = 2048  # of a histogram; onnxruntime's and TensorRT's number
PERCENTILE = 99.99
LEVELS = 255  # steps of uint8
VALUES = 20_000  # of a map that the histogram counts; twice as many at most
WINDOWS = 256  # at most, of a map that is looked at for its moments
MOMENT_IMAGES = 32  # at most, of the images, spread over them

Blobs = Callable[[], Iterable[np.ndarray]]  # the images, float32 (1, 3, h, w) each; asked for twice


@dataclass(frozen=True)
class Calibration:
    """What was found."""

    ranges: Mapping[str, tuple[float, float]]  # by the value's name: (low ≤ 0, high ≥ 0)
    moments: Mapping[str, np.ndarray]  # by the layer's name: float64 (groups, taps, taps), sums of x xᵀ over windows
    images: int


def calibrate(
    model: ir.Model,
    blobs: Blobs,
    method: Method = "mse",
    *,
    every_value: bool = False,
    progress: Callable[[int, int], None] = lambda *_: None,
) -> Calibration:
    """Runs the float network on the images, twice: once for the extremes, once for histograms and moments.

    Ranges are found for what layers read; every_value: for every float value of the network (the scheme qoperator).

    method, for the range that int8 is spread over: "minmax" is all that was seen; "percentile" leaves out 0.01 % at
    either end; "mse" has the smallest mean squared error of rounding and clipping, over the histogram (as in Nagel et
    al., arXiv:2106.08295, 3.1.1). progress(done, total): images, of both passes.
    """
    found = layers(model)
    names = {layer.source for layer in found} | (_float_values(model) if every_value else set())
    network = _Network(model, names)
    total = sum(1 for _ in blobs())
    lows, highs = dict.fromkeys(names, 0.0), dict.fromkeys(names, 0.0)  # 0 must be exact: padding is made of it
    for number, values in enumerate(network.run(blobs()), start=1):
        for name, array in values.items():
            lows[name], highs[name] = min(lows[name], float(array.min())), max(highs[name], float(array.max()))
        progress(number, 2 * total)
    histograms = {name: np.zeros(BINS, np.int64) for name in names}
    moments = {layer.name: np.zeros(_moments_shape(layer)) for layer in found}
    every, random = -(-total // MOMENT_IMAGES), np.random.default_rng(0)
    for number, values in enumerate(network.run(blobs())):
        for name, array in values.items():
            histograms[name] += _histogram(array, lows[name], highs[name])
        for layer in found if number % every == 0 else ():
            windows = _windows(values[layer.source], layer, random)
            moments[layer.name] += windows.transpose(0, 2, 1) @ windows
        progress(total + number + 1, 2 * total)
    ranges = {name: _range(histograms[name], lows[name], highs[name], method) for name in sorted(names)}
    return Calibration(ranges, moments, total)


def as_method(name: str) -> Method | None:
    """The method of that name; None where there is none."""
    return next((method for method in METHODS if method == name), None)


def _float_values(model: ir.Model) -> set[str]:
    """What the network computes with, and its input."""
    values = [*model.graph.inputs, *(value for node in model.graph for value in node.outputs)]
    return {str(value.name) for value in values if value.dtype in (None, ir.DataType.FLOAT)}


class _Network:
    """The float network in ONNX Runtime, with the values asked for as outputs."""

    def __init__(self, model: ir.Model, names: Iterable[str]) -> None:
        proto = ir.to_proto(model)
        self._input = proto.graph.input[0].name
        self._wants_input = self._input in names
        self._names = sorted(set(names) - {self._input})
        have = {output.name for output in proto.graph.output}
        new = (name for name in self._names if name not in have)
        proto.graph.output.extend(
            onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, None) for name in new
        )
        self._session = session(proto)

    def run(self, blobs: Iterable[np.ndarray]) -> Iterator[dict[str, np.ndarray]]:
        for blob in blobs:
            # no names would mean all outputs
            arrays = self._session.run(self._names, {self._input: blob}) if self._names else []
            own = {self._input: blob} if self._wants_input else {}
            yield {**dict(zip(self._names, arrays, strict=True)), **own}


def session(proto: onnx.ModelProto) -> onnxruntime.InferenceSession:
    """A model in ONNX Runtime, on the CPU."""
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4  # errors are raised; they need not be printed too
    return onnxruntime.InferenceSession(proto.SerializeToString(), options, providers=["CPUExecutionProvider"])


def _histogram(array: np.ndarray, low: float, high: float) -> np.ndarray:
    """int64 (BINS,): how many values fall into each, of a large map those of a few thousand places."""
    step = array.size // VALUES | 1  # odd: so that it is not always the same columns
    bins = ((array.ravel()[::step] - low) * (BINS / max(high - low, 1e-30))).astype(np.int32)
    return np.bincount(np.minimum(bins, BINS - 1), minlength=BINS)


def _range(histogram: np.ndarray, low: float, high: float, method: Method) -> tuple[float, float]:
    if method == "minmax" or high - low <= 0:
        return low, high
    width = (high - low) / BINS
    if method == "percentile":
        below = np.cumsum(histogram) / histogram.sum()
        share = 1 - PERCENTILE / 100
        first, last = np.searchsorted(below, [share, 1 - share])
        return min(low + first * width, 0.0), max(low + (last + 1) * width, 0.0)
    middles = low + (np.arange(BINS) + 0.5) * width
    shares = np.linspace(0.2, 1.0, 33)
    candidates = [(low * a, high * b) for a in (shares[::2] if low < 0 else (1.0,)) for b in shares]
    errors = [float(histogram @ (rounded(middles, *pair) - middles) ** 2) for pair in candidates if pair[1] > pair[0]]
    return candidates[int(np.argmin(errors))]


def rounded(values: np.ndarray, low: float, high: float) -> np.ndarray:
    """Values as uint8 over a range keeps them."""
    scale, zero = grid(low, high)
    return np.asarray((np.clip(np.round(values / scale) + zero, 0, LEVELS) - zero) * scale)


def grid(low: float, high: float) -> tuple[np.float32, int]:
    """A range that holds 0 → (scale, zero point) of uint8; 0 itself is exact."""
    scale = np.float32(max((high - low) / LEVELS, 1e-12))
    return scale, round(float(np.clip(-low / scale, 0, LEVELS)))


def _moments_shape(layer: Layer) -> tuple[int, int, int]:
    taps = layer.to_matrix(np.empty(layer.shape, np.bool_)).shape[2]
    return layer.groups, taps, taps


def _windows(array: np.ndarray, layer: Layer, random: np.random.Generator) -> np.ndarray:
    """A layer's input → float32 (groups, n ≤ WINDOWS, taps): what single outputs are made of."""
    if layer.op_type != "Conv":
        rows = array.reshape(1, -1, array.shape[-1])
        return rows[:, _some(rows.shape[1], random)]
    top, left, bottom, right = layer.pads
    padded = np.pad(array[0], ((0, 0), (top, bottom), (left, right)))
    reach = [(size - 1) * step + 1 for size, step in zip(layer.kernel, layer.dilations, strict=True)]
    (down, across), (skip_y, skip_x) = layer.strides, layer.dilations
    views = np.lib.stride_tricks.sliding_window_view(padded, reach, axis=(1, 2))[
        :, ::down, ::across, ::skip_y, ::skip_x
    ]
    rows, columns = np.divmod(_some(views.shape[1] * views.shape[2], random), views.shape[2])
    chosen = views[:, rows, columns]  # (channels, n, kh, kw)
    grouped = chosen.reshape(layer.groups, -1, *chosen.shape[1:]).transpose(0, 2, 1, 3, 4)
    return np.ascontiguousarray(grouped).reshape(layer.groups, len(rows), -1)


def _some(count: int, random: np.random.Generator) -> np.ndarray:
    return np.arange(count) if count <= WINDOWS else random.choice(count, WINDOWS, replace=False)


def sqnr_db(actual: Sequence[np.ndarray], expected: Sequence[np.ndarray]) -> float:
    """Signal to quantization noise, dB, over all the values of all the arrays: 10 log10(Σ y² / Σ (ŷ - y)²)."""
    noise = sum(float(((a - e).astype(np.float64) ** 2).sum()) for a, e in zip(actual, expected, strict=True))
    power = sum(float((e.astype(np.float64) ** 2).sum()) for e in expected)
    return float(10 * np.log10(max(power, 1e-30) / max(noise, 1e-30)))
