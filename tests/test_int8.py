"""int8 from a float network: what is measured on images, how weights are rounded, what is written."""

from collections.abc import Callable, Iterable

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from graphs import computed, network, random
from hypothesis import given, settings
from hypothesis import strategies as st

from edgekit.int8 import calibration, rounding, scheme, sensitivity
from edgekit.int8.calibration import BINS, Calibration, calibrate, grid, rounded, sqnr_db
from edgekit.int8.layers import constant, layers
from edgekit.int8.rounding import LIMIT, Rounded, round_matrix, round_weights

IMAGES = random(20, 3, 8, 8)


def blobs(images: np.ndarray = IMAGES) -> Callable[[], Iterable[np.ndarray]]:
    return lambda: (image[None] for image in images)


def model(text: str, **weights: np.ndarray) -> ir.Model:
    return ir.from_proto(network(text, **weights))


def two_layers() -> ir.Model:
    """Conv → Clip(0, 6) → Conv → Flatten → Gemm, as ReLU6 networks have it."""
    text = """(float[1,3,8,8] image) => (float[1,5] logits) {
        [first] a = Conv <kernel_shape = [3, 3], pads = [1, 1, 1, 1], strides = [2, 2]> (image, w1, b1)
        low = Constant <value_float = 0.0> ()
        high = Constant <value_float = 6.0> ()
        [clip] b = Clip (a, low, high)
        [second] c = Conv <kernel_shape = [3, 3], pads = [1, 1, 1, 1], group = 6> (b, w2, b2)
        [flatten] d = Flatten (c)
        [last] logits = Gemm <transB = 1> (d, w3, b3)
    }"""
    return model(
        text,
        w1=random(6, 3, 3, 3, seed=1),
        b1=random(6, seed=2),
        w2=random(6, 1, 3, 3, seed=3),
        b2=random(6, seed=4),
        w3=random(5, 96, seed=5),
        b3=random(5, seed=6),
    )


def outputs(net: ir.Model | onnx.ModelProto, images: np.ndarray = IMAGES) -> np.ndarray:
    proto = ir.to_proto(net) if isinstance(net, ir.Model) else net
    onnx.checker.check_model(proto, full_check=True)
    (array,) = computed(proto, images).values()
    return array


def operators(net: ir.Model | onnx.ModelProto) -> list[str]:
    proto = ir.to_proto(net) if isinstance(net, ir.Model) else net
    return [node.op_type for node in proto.graph.node]


# ---------------------------------------------------------------------------------------------------------------
# Layers


def test_layers_are_found_in_order_with_what_they_read() -> None:
    found = layers(two_layers())
    assert [(row.name, row.op_type, row.source, row.weights, row.groups) for row in found] == [
        ("first", "Conv", "image", "w1", 1),
        ("second", "Conv", "b", "w2", 6),
        ("last", "Gemm", "d", "w3", 1),
    ]
    assert [(row.kernel, row.strides, row.pads, row.output_axis) for row in found] == [
        ((3, 3), (2, 2), (1, 1, 1, 1), 0),
        ((3, 3), (1, 1), (1, 1, 1, 1), 0),
        ((1, 1), (1, 1), (0, 0, 0, 0), 0),
    ]


@pytest.mark.parametrize(
    "text",
    [
        # weights that are computed, weights that two layers share, a product of two maps, a constant that is multiplied
        "(float[1,4] x, float[4,4] w) => (float[1,4] y) { y = MatMul (x, w) }",
        "(float[1,4] x) => (float[1,4] y) { a = MatMul (x, v) y = MatMul (a, v) }",
        "(float[1,4,4] x) => (float[1,4,4] y) { y = MatMul (x, x) }",
        "(float[1,4] x) => (float[4,4] y) { y = MatMul (v, v) }",
        "(float[4,1] x) => (float[1,4] y) { y = Gemm <transA = 1> (x, v) }",
    ],
)
def test_what_is_no_such_layer(text: str) -> None:
    assert layers(model(text, v=random(4, 4))) == ()


@given(st.sampled_from([1, 2, 3]), st.integers(1, 4), st.integers(1, 3), st.integers(1, 3))
def test_a_matrix_goes_back_to_the_weights(groups: int, outs: int, ins: int, side: int) -> None:
    weights = random(groups * outs, ins, side, side)
    text = f"(float[1,{groups * ins},9,9] x) => (float[] y) {{ y = Conv <group = {groups}> (x, w) }}"
    (layer,) = layers(model(text, w=weights))
    matrix = layer.to_matrix(weights)
    assert matrix.shape == (groups, outs, ins * side * side)
    np.testing.assert_array_equal(layer.from_matrix(matrix), weights)


def test_a_gemm_counts_its_outputs_along_the_other_axis_without_trans_b() -> None:
    weights = random(4, 6)
    (layer,) = layers(model("(float[1,4] x) => (float[1,6] y) { y = Gemm (x, w) }", w=weights))
    np.testing.assert_array_equal(layer.to_matrix(weights), weights.T[None])
    np.testing.assert_array_equal(layer.from_matrix(weights.T[None]), weights)


# ---------------------------------------------------------------------------------------------------------------
# Calibration


@settings(deadline=None, max_examples=25)
@given(
    st.sampled_from([1, 2, 4]),
    st.integers(1, 3),
    st.integers(1, 3),
    st.integers(1, 2),
    st.integers(1, 2),
    st.tuples(*[st.integers(0, 2)] * 4),
)
def test_moments_are_those_of_the_windows(
    groups: int, height: int, width: int, stride: int, dilation: int, pads: tuple[int, int, int, int]
) -> None:
    """wᵀ M w is the sum of squares of what the convolution gives, whatever its geometry."""
    weights = random(8, 4 // groups, height, width)
    text = (
        f"(float[1,4,9,8] x) => (float[] y) {{ [c] y = Conv <group = {groups}, strides = [{stride}, 1], dilations = "
        f"[1, {dilation}], pads = [{', '.join(map(str, pads))}], kernel_shape = [{height}, {width}]> (x, w) }}"
    )
    net, images = model(text, w=weights), random(3, 4, 9, 8, seed=1)
    found = calibrate(net, blobs(images)).moments["c"]
    matrix = layers(net)[0].to_matrix(weights).astype(np.float64)
    energies = np.einsum("got,gtu,gou->go", matrix, found, matrix).ravel()
    (array,) = computed(ir.to_proto(net), images).values()
    np.testing.assert_allclose(energies, (array.astype(np.float64) ** 2).sum(axis=(0, 2, 3)), rtol=1e-4)


def test_minmax_is_all_that_was_seen_and_zero() -> None:
    net = model("(float[1,3,8,8] image) => (float[] y) { a = Abs (image) [c] y = Conv (a, w) }", w=random(2, 3, 1, 1))
    assert calibrate(net, blobs(), "minmax").ranges == {"a": (0.0, float(np.abs(IMAGES).max()))}
    assert calibrate(net, blobs(), "minmax", every_value=True).ranges.keys() == {"image", "a", "y"}


def test_outliers_are_cut_off_by_percentile_and_mse() -> None:
    images = random(20, 3, 32, 32)
    images[0, 0, 0, 0] = 1000.0
    net = model("(float[1,3,32,32] image) => (float[] y) { [c] y = Conv (image, w) }", w=random(2, 3, 1, 1))
    high = {method: calibrate(net, blobs(images), method).ranges["image"][1] for method in calibration.METHODS}
    assert high["minmax"] == 1000.0
    assert high["percentile"] < 10  # all but 6 of 61,440 values; a bin is half a unit wide
    assert high["mse"] < 1000.0


@settings(deadline=None)
@given(st.lists(st.floats(-50, 50, width=32), min_size=1, max_size=40))
def test_mse_is_never_worse_than_minmax(values: list[float]) -> None:
    array = np.array(values, np.float32)
    low, high = min(float(array.min()), 0.0), max(float(array.max()), 0.0)
    histogram = calibration._histogram(array, low, high)
    assert histogram.sum() == len(values)
    best = calibration._range(histogram, low, high, "mse")
    middles = low + (np.arange(BINS) + 0.5) * (high - low) / BINS
    error = [histogram @ (rounded(middles, *pair) - middles) ** 2 for pair in (best, (low, high)) if pair[1] > pair[0]]
    assert low <= best[0] <= 0 <= best[1] <= high
    assert not error or error[0] <= error[-1]


@given(st.floats(-100, 0), st.floats(0, 100))
def test_zero_is_exact_in_every_range(low: float, high: float) -> None:
    assert rounded(np.zeros(3), low, high).tolist() == [0, 0, 0]
    scale, zero = grid(low, high)
    assert scale > 0
    assert 0 <= zero <= 255


def test_progress_counts_both_passes() -> None:
    calls: list[tuple[int, int]] = []
    found = calibrate(two_layers(), blobs(), progress=lambda done, total: calls.append((done, total)))
    assert calls == [(number, 40) for number in range(1, 41)]
    assert found.images == 20


@pytest.mark.parametrize(
    ("name", "method"), [("mse", "mse"), ("percentile", "percentile"), ("minmax", "minmax"), ("entropy", None)]
)
def test_methods_by_name(name: str, method: str | None) -> None:
    assert calibration.as_method(name) == method


def test_sqnr() -> None:
    assert sqnr_db([np.array([1.1, 2.0])], [np.array([1.0, 2.0])]) == pytest.approx(10 * np.log10(5 / 0.01))
    assert sqnr_db([np.ones(2)], [np.ones(2)]) > 200  # no noise at all


# ---------------------------------------------------------------------------------------------------------------
# Rounding


def loss(matrix: np.ndarray, moments: np.ndarray, integers: np.ndarray, scales: np.ndarray) -> float:
    error = integers * scales[..., None].astype(np.float64) - matrix
    return float(np.einsum("got,gtu,gou->", error, moments, error))


@settings(deadline=None, max_examples=50)
@given(st.integers(1, 3), st.integers(1, 5), st.integers(1, 90), st.integers(0, 10**6))
def test_rounded_weights_stay_on_the_grid(groups: int, outs: int, taps: int, seed: int) -> None:
    matrix = random(groups, outs, taps, seed=seed)
    windows = random(groups, 2 * taps, taps, seed=seed + 1) + 1.0  # as after ReLU: they go together
    integers, scales = round_matrix(matrix, windows.transpose(0, 2, 1) @ windows)
    assert integers.dtype == np.int8
    assert scales.dtype == np.float32
    # the largest keeps its place, so that who reads the float weights finds the same scale
    np.testing.assert_array_equal(np.abs(integers).max(axis=2), LIMIT)
    largest = np.abs(matrix).argmax(axis=2)[..., None]
    np.testing.assert_array_equal(np.abs(np.take_along_axis(integers, largest, axis=2)), LIMIT)
    np.testing.assert_allclose(scales, np.abs(matrix).max(axis=2) / LIMIT, rtol=1e-6)


def test_rounding_loses_far_less_than_to_the_nearest_where_taps_go_together() -> None:
    matrix = random(1, 16, 72)
    windows = 0.2 * random(1, 500, 72, seed=1) + random(1, 500, 1, seed=2) + 1.0
    moments = (windows.transpose(0, 2, 1) @ windows).astype(np.float64)
    scales = np.abs(matrix).max(axis=2) / np.float32(LIMIT)
    nearest = np.round(matrix / scales[..., None])
    ours = loss(matrix, moments, *round_matrix(matrix, moments))
    assert ours < 0.1 * loss(matrix, moments, nearest, scales)


def test_taps_that_do_not_go_together_are_rounded_to_the_nearest() -> None:
    matrix = random(2, 4, 9)
    integers, scales = round_matrix(matrix, np.tile(np.eye(9), (2, 1, 1)))
    np.testing.assert_array_equal(integers, np.round(matrix / scales[..., None]))


def test_an_output_of_zeros_and_taps_never_seen() -> None:
    matrix = random(1, 2, 4)
    matrix[0, 1] = 0
    integers, scales = round_matrix(matrix, np.zeros((1, 4, 4)))
    assert integers[0, 1].tolist() == [0, 0, 0, 0] or np.abs(integers[0, 1]).max() == LIMIT
    assert np.isfinite(scales).all()
    np.testing.assert_array_equal(integers[0, 0], np.round(matrix[0, 0] / scales[0, 0]))


def test_weights_have_the_files_shapes_and_one_scale_an_output() -> None:
    net = two_layers()
    found = round_weights(net, calibrate(net, blobs()).moments)
    assert {name: (row.integers.shape, row.scales.shape, row.axis) for name, row in found.items()} == {
        "first": ((6, 3, 3, 3), (6,), 0),
        "second": ((6, 1, 3, 3), (6,), 0),
        "last": ((5, 96), (5,), 0),
    }
    for layer in layers(net):
        weights = constant(net, layer.weights)
        difference = np.abs(found[layer.name].to_float() - weights).max()
        assert difference < 0.05 * np.abs(weights).max()


def test_one_scale_a_layer_where_asked_for() -> None:
    net = two_layers()
    found = round_weights(net, calibrate(net, blobs()).moments, per_channel=False)
    for layer in layers(net):
        weights, row = constant(net, layer.weights), found[layer.name]
        assert len(set(row.scales.tolist())) == 1
        assert np.abs(row.to_float() - weights).max() <= 0.5001 * row.scales[0]


def test_weights_are_carried_over_to_another_form() -> None:
    net = two_layers()
    weights = round_weights(net, calibrate(net, blobs()).moments)
    other = net.clone()  # as ReLU6 becomes HardSigmoid: the next layer takes the factor into its weights
    other.graph.initializers["w2"].const_value = ir.tensor(constant(net, "w2") * np.float32(6))
    other.graph.initializers["w3"].const_value = ir.tensor(constant(net, "w3") + np.float32(0.1))
    found = rounding.carried_over(weights, net, other)
    assert found.keys() == {"first", "second"}  # the last one is another layer now
    np.testing.assert_array_equal(found["second"].integers, weights["second"].integers)
    np.testing.assert_allclose(found["second"].to_float(), 6 * weights["second"].to_float(), rtol=1e-6)
    np.testing.assert_allclose(found["first"].to_float(), weights["first"].to_float(), rtol=1e-6)


# ---------------------------------------------------------------------------------------------------------------
# Schemes


def quantized() -> tuple[ir.Model, dict[str, Rounded], Calibration]:
    net = two_layers()
    found = calibrate(net, blobs(), "minmax", every_value=True)
    return net, round_weights(net, found.moments), found


def with_weights(net: ir.Model, weights: dict[str, Rounded]) -> ir.Model:
    """The float network with what int8 keeps of its weights."""
    made = net.clone()
    for layer in layers(net):
        made.graph.initializers[layer.weights].const_value = ir.tensor(weights[layer.name].to_float())
    return made


def test_weight_only_computes_with_the_rounded_weights() -> None:
    net, weights, _ = quantized()
    made = scheme.weight_only(net, weights)
    np.testing.assert_allclose(outputs(made), outputs(with_weights(net, weights)), rtol=1e-5, atol=1e-5)
    assert operators(made).count("DequantizeLinear") == 3
    assert "QuantizeLinear" not in operators(made)
    large = [value for value in made.graph.initializers.values() if value.const_value and value.const_value.size > 50]
    assert {value.dtype for value in large} == {ir.DataType.INT8}


def test_qdq_rounds_what_layers_read_and_nothing_else() -> None:
    net, weights, found = quantized()
    made = scheme.qdq(net, weights, found.ranges)
    proto = onnx.shape_inference.infer_shapes(ir.to_proto(with_weights(net, weights)))
    by_hand = ir.from_proto(proto)  # with the types of what is between, where it is cut
    # the same by hand: each layer alone, its input rounded
    image = rounded(IMAGES, *found.ranges["image"]).astype(np.float32)
    parts = {"image": image}
    for source, name in (("a", "b"), ("c", "d"), ("logits", "logits")):
        reader = {"a": "image", "c": "b", "logits": "d"}[source]
        part = ir.Model(
            ir.convenience.extract(by_hand.graph, [_value(by_hand, reader)], [_value(by_hand, source)]),
            ir_version=8,
        )
        array = computed(ir.to_proto(part), parts[reader])[source]
        if name == "b":
            array = np.clip(array, 0, 6)
        parts[name] = array.reshape(len(array), -1) if name == "d" else array
        if name != "logits":
            parts[name] = rounded(parts[name], *found.ranges[name]).astype(np.float32)
    # a value at the middle between two steps may fall either way
    assert sqnr_db([outputs(made)], [parts["logits"]]) > 50
    assert sqnr_db([outputs(made)], [outputs(net)]) > 25


def _value(net: ir.Model, name: str) -> ir.Value:
    values = {value.name: value for node in net.graph for value in node.outputs}
    values |= {value.name: value for value in net.graph.inputs}
    return values[name]


def test_the_clip_before_uint8_is_dropped_and_only_where_uint8_cuts_off_the_same() -> None:
    net, weights, found = quantized()
    assert "Clip" not in operators(scheme.qdq(net, weights, found.ranges))
    wider = {**found.ranges, "b": (0.0, 8.0)}  # 8 lies above the clip
    made = scheme.qdq(net, weights, wider)
    assert "Clip" in operators(made)
    signed = {**found.ranges, "b": (-1.0, 5.0)}  # uint8's lowest is -1, the clip's 0
    assert "Clip" in operators(scheme.qdq(net, weights, signed))
    assert "Clip" in operators(scheme.qdq(net, weights, found.ranges, spared=["second"]))  # who reads it reads floats


def test_relu_stays_where_a_float_layer_reads_it_too() -> None:
    text = """(float[1,3,8,8] image) => (float[1,4,8,8] y) {
        a = Relu (image) [p] b = Conv (a, w1) [q] c = Conv (a, w2) y = Add (b, c)
    }"""
    net = model(text, w1=random(4, 3, 1, 1), w2=random(4, 3, 1, 1, seed=1))
    found = calibrate(net, blobs())
    weights = round_weights(net, found.moments)
    assert "Relu" not in operators(scheme.qdq(net, weights, found.ranges))
    made = scheme.qdq(net, weights, found.ranges, spared=["q"])
    assert "Relu" in operators(made)
    assert sqnr_db([outputs(made)], [outputs(net)]) > 30


def test_dropping_the_clip_changes_nothing() -> None:
    net, weights, found = quantized()
    with_clip = scheme.qdq(net, weights, {**found.ranges, "b": (-1e-9, found.ranges["b"][1])})
    assert sqnr_db([outputs(scheme.qdq(net, weights, found.ranges))], [outputs(with_clip)]) > 45


def test_spared_layers_are_float() -> None:
    net, weights, found = quantized()
    every = [layer.name for layer in layers(net)]
    made = scheme.qdq(net, weights, found.ranges, spared=every)
    assert "QuantizeLinear" not in operators(made)
    noise = [
        sqnr_db([outputs(scheme.qdq(net, weights, found.ranges, spared=every[:count]))], [outputs(net)])
        for count in range(4)
    ]
    assert noise[0] < noise[2]  # the last layer's weights are most of all, and stay int8
    assert noise[3] > noise[0]


def test_a_small_spared_layer_keeps_its_float_weights_and_a_large_one_does_not(monkeypatch: pytest.MonkeyPatch) -> None:
    net, weights, found = quantized()  # 162, 54 and 480 weights
    monkeypatch.setattr(scheme, "SMALL", 0.1)
    made = scheme.qdq(net, weights, found.ranges, spared=["second", "last"])
    assert {"w2", "w3_int8", "w1_int8"} <= made.graph.initializers.keys()
    assert not {"w3", "w1", "w2_int8"} & made.graph.initializers.keys()


def test_the_model_given_is_left_as_it_was() -> None:
    net, weights, found = quantized()
    before = ir.to_proto(net).SerializeToString(deterministic=True)
    scheme.weight_only(net, weights)
    scheme.qdq(net, weights, found.ranges)
    scheme.qoperator(net, weights, found.ranges)
    assert ir.to_proto(net).SerializeToString(deterministic=True) == before


def test_a_map_that_two_layers_read_is_rounded_once() -> None:
    text = """(float[1,3,8,8] image) => (float[1,4,8,8] y) {
        [a] p = Conv (image, w1) [b] q = Conv (image, w2) y = Add (p, q)
    }"""
    net = model(text, w1=random(4, 3, 1, 1), w2=random(4, 3, 1, 1, seed=1))
    found = calibrate(net, blobs())
    made = scheme.qdq(net, round_weights(net, found.moments), found.ranges)
    assert operators(made).count("QuantizeLinear") == 1
    assert sqnr_db([outputs(made)], [outputs(net)]) > 30


def test_qoperator_is_integer_throughout() -> None:
    net, weights, found = quantized()
    made = scheme.qoperator(net, weights, found.ranges)
    assert {"QLinearConv", "QuantizeLinear", "DequantizeLinear"} <= set(operators(made))
    assert not {"Conv", "Gemm", "Clip"} & set(operators(made))
    arrays = {tensor.name: onnx.numpy_helper.to_array(tensor) for tensor in made.graph.initializer}
    # ONNX Runtime found the scales that the weights were rounded for
    np.testing.assert_array_equal(arrays["w1_quantized"], weights["first"].integers)
    assert sqnr_db([outputs(made)], [outputs(net)]) > 20
    assert "Conv" in operators(scheme.qoperator(net, weights, found.ranges, spared=["first"]))


# ---------------------------------------------------------------------------------------------------------------
# Sensitivity


def test_the_layer_that_suffers_most_comes_first() -> None:
    net, weights, found = quantized()
    ranges = {**found.ranges, "b": (0.0, 600.0)}  # a range a hundred times too wide for the second layer
    calls: list[tuple[int, int]] = []
    ranking = sensitivity.rank(
        net, weights, ranges, [image[None] for image in IMAGES], lambda done, total: calls.append((done, total))
    )
    assert ranking[0].layer == "second"
    assert sorted(row.layer for row in ranking) == ["first", "last", "second"]
    assert [row.sqnr_db for row in ranking] == sorted(row.sqnr_db for row in ranking)
    assert ranking[0].sqnr_db < ranking[1].sqnr_db - 10
    assert calls == [(1, 3), (2, 3), (3, 3)]


def test_rounding_module_has_the_papers_block_size() -> None:
    """More taps than a block: the rest of the matrix is made up for between blocks too."""
    assert rounding.BLOCK == 64
    matrix = random(1, 3, 200)
    windows = 0.1 * random(1, 800, 200, seed=1) + random(1, 800, 1, seed=2)
    moments = (windows.transpose(0, 2, 1) @ windows).astype(np.float64)
    scales = np.abs(matrix).max(axis=2) / np.float32(LIMIT)
    ours = loss(matrix, moments, *round_matrix(matrix, moments))
    assert ours < 0.1 * loss(matrix, moments, np.round(matrix / scales[..., None]), scales)
