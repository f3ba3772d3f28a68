"""Work without a clock: figures worked by hand, against ONNX Runtime and torch; what is not counted is named."""

import contextlib
import os
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest
from bundles import sign, write_bundle, write_model
from graphs import network, random, saved
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from edgekit import workload
from edgekit.artifacts import read_json, write_json
from edgekit.errors import ArtifactError, SetupError
from edgekit.int8 import scheme
from edgekit.int8.calibration import calibrate
from edgekit.int8.rounding import round_weights
from edgekit.report import workload_table
from edgekit.workload import (
    STANDS_FOR,
    Workload,
    amount,
    changes,
    instruction_changes,
    instructions_per_inference,
    read_workload,
)

FLAT = np.zeros((2, 3, 3, 3), np.float32)
NOTHING = Workload({}, 0, 0, 0, 0, ())
FUNCTION = """
<ir_version: 8, opset_import: ["" : 18, "local" : 1]>
net (float[1,4] x) => (float[1,4] y) { a = local.twice (x) y = local.twice (a) }
<domain: "local", opset_import: ["" : 18]>
twice (x) => (y) {
    w = Constant <value = float[4,4] {1,2,3,4,5,6,7,8,9,10,11,12,13,14,15,16}> ()
    y = MatMul (x, w)
}
"""


def work(folder: Path, text: str, **weights: Any) -> Workload:
    return read_workload(saved(network(text, **weights), folder))


def zeros(*shape: int, kind: type = np.float32) -> np.ndarray:
    return np.zeros(shape, kind)


# ---------------------------------------------------------------------------------------------------------------
# Multiply-adds


@pytest.mark.parametrize(
    ("text", "weights", "expected"),
    [
        # output elements × taps (a kernel of each input channel of the group)
        ("(float[1,3,8,8] x) => (float[] y) { y = Conv <pads=[1,1,1,1]> (x, w) }", (4, 3, 3, 3), 4 * 8 * 8 * 27),
        ("(float[1,3,8,8] x) => (float[] y) { y = Conv (x, w) }", (4, 3, 3, 3), 4 * 6 * 6 * 27),
        ("(float[1,3,8,8] x) => (float[] y) { y = Conv <strides=[2,1]> (x, w) }", (4, 3, 3, 3), 4 * 3 * 6 * 27),
        ("(float[1,3,8,8] x) => (float[] y) { y = Conv <dilations=[3,2]> (x, w) }", (4, 3, 3, 3), 4 * 2 * 4 * 27),
        ("(float[1,6,8,8] x) => (float[] y) { y = Conv <group=3> (x, w) }", (9, 2, 3, 5), 9 * 6 * 4 * 2 * 15),
        ("(float[1,6,8,8] x) => (float[] y) { y = Conv <group=6> (x, w) }", (6, 1, 3, 3), 6 * 6 * 6 * 9),
        ("(float[1,2,9] x) => (float[] y) { y = Conv (x, w) }", (5, 2, 3), 5 * 7 * 6),
        ("(float[2,3,8,8] x) => (float[] y) { y = Conv (x, w) }", (4, 3, 3, 3), 2 * 4 * 6 * 6 * 27),
        # input elements × taps (a kernel of each output channel of the group)
        ("(float[1,4,5,6] x) => (float[] y) { y = ConvTranspose <strides=[2,2]> (x, w) }", (4, 3, 3, 3), 120 * 27),
        ("(float[1,4,5,6] x) => (float[] y) { y = ConvTranspose <group=2> (x, w) }", (4, 3, 2, 2), 120 * 12),
        # output elements × depth
        ("(float[2,7] x) => (float[] y) { y = Gemm (x, w) }", (7, 5), 2 * 5 * 7),
        ("(float[7,2] x) => (float[] y) { y = Gemm <transA=1> (x, w) }", (7, 5), 2 * 5 * 7),
        ("(float[2,7] x) => (float[] y) { y = Gemm <transB=1> (x, w) }", (5, 7), 2 * 5 * 7),
        ("(float[7,2] x) => (float[] y) { y = Gemm <transA=1, transB=1> (x, w) }", (5, 7), 2 * 5 * 7),
        ("(float[2,7] x) => (float[] y) { y = MatMul (x, w) }", (7, 5), 2 * 5 * 7),
        ("(float[3,2,7] x) => (float[] y) { y = MatMul (x, w) }", (7, 5), 3 * 2 * 5 * 7),
        ("(float[3,1,2,7] x) => (float[] y) { y = MatMul (x, w) }", (4, 7, 5), 3 * 4 * 2 * 5 * 7),  # broadcast
        ("(float[7] x) => (float[] y) { y = MatMul (x, w) }", (7, 5), 5 * 7),
        ("(float[3,2,7] x) => (float[] y) { y = MatMul (x, w) }", (7,), 3 * 2 * 7),
        ("(float[7] x) => (float[] y) { y = MatMul (x, w) }", (7,), 7),
    ],
)
def test_multiply_adds_by_hand(tmp_path: Path, text: str, weights: tuple[int, ...], expected: int) -> None:
    assert work(tmp_path, text, w=zeros(*weights)).multiply_adds == expected


def test_a_bias_and_what_only_adds_is_not_counted(tmp_path: Path) -> None:
    text = """(float[1,3,4,4] x) => (float[1,2,1,1] y) {
        a = Conv (x, w, b) c = Relu (a) d = Add (c, c) y = GlobalAveragePool (d)
    }"""
    assert work(tmp_path, text, w=zeros(2, 3, 1, 1), b=zeros(2)).multiply_adds == 2 * 16 * 3


@pytest.mark.parametrize(
    ("text", "weights", "expected"),
    [
        ("(uint8[1,3,8,8] x) => (int32[] y) { y = ConvInteger <strides=[2,2]> (x, w) }", (4, 3, 3, 3), 4 * 9 * 27),
        ("(uint8[1,3,8,8] x) => (uint8[] y) { y = QLinearConv (x, s, z, w, s, z, s, z) }", (4, 3, 3, 3), 4 * 36 * 27),
        ("(uint8[2,7] x) => (int32[] y) { y = MatMulInteger (x, w) }", (7, 5), 2 * 5 * 7),
        ("(uint8[2,7] x) => (uint8[] y) { y = QLinearMatMul (x, s, z, w, s, z, s, z) }", (7, 5), 2 * 5 * 7),
    ],
)
def test_multiply_adds_of_integers(tmp_path: Path, text: str, weights: tuple[int, ...], expected: int) -> None:
    values = {"w": zeros(*weights, kind=np.uint8), "s": np.float32(1), "z": np.uint8(0)}
    found = work(tmp_path, text, **{name: array for name, array in values.items() if name == "w" or "s, z" in text})
    assert (found.multiply_adds, found.unknown) == (expected, ())


@st.composite
def convolutions(draw: st.DrawFn) -> tuple[str, tuple[int, ...], tuple[int, ...]]:
    """A node without padding, and the shapes of what it reads."""
    transposed = draw(st.booleans())
    groups, ins, outs = draw(st.integers(1, 3)), draw(st.integers(1, 3)), draw(st.integers(1, 3))
    kernel, dilations, strides = (draw(st.tuples(*[st.integers(1, 3)] * 2)) for _ in range(3))
    size = draw(st.tuples(*[st.integers(7, 12)] * 2))
    batch = draw(st.integers(1, 2))
    weights = (groups * ins, outs, *kernel) if transposed else (groups * outs, ins, *kernel)
    operator = "ConvTranspose" if transposed else "Conv"
    attributes = f"group={groups}, strides={list(strides)}, dilations={list(dilations)}"
    return f"{operator} <{attributes}>", (batch, groups * ins, *size), weights


@st.composite
def matrix_products(draw: st.DrawFn) -> tuple[str, tuple[int, ...], tuple[int, ...]]:
    rows, depth, columns = (draw(st.integers(1, 5)) for _ in range(3))
    if draw(st.booleans()):
        turned = draw(st.booleans()), draw(st.booleans())
        first = (depth, rows) if turned[0] else (rows, depth)
        second = (columns, depth) if turned[1] else (depth, columns)
        return f"Gemm <transA={int(turned[0])}, transB={int(turned[1])}>", first, second
    batches = draw(st.sampled_from([((), ()), ((3,), ()), ((), (3,)), ((2, 1), (3,)), ((2, 3), (1, 3))]))
    return "MatMul", (*batches[0], rows, depth), (*batches[1], depth, columns)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.one_of(convolutions(), matrix_products()))
def test_ones_add_up_to_the_multiply_adds(tmp_path: Path, case: tuple[str, tuple[int, ...], tuple[int, ...]]) -> None:
    """A product of ones, with no padding, is the number of its multiply-adds: ONNX Runtime counts."""
    node, image, weights = case
    shape = ",".join(map(str, image))
    net = network(f"(float[{shape}] x) => (float[] y) {{ y = {node} (x, w) }}", w=np.ones(weights, np.float32))
    session = onnxruntime.InferenceSession(net.SerializeToString(), providers=["CPUExecutionProvider"])
    (made,) = session.run(None, {"x": np.ones(image, np.float32)})
    found = read_workload(saved(net, tmp_path))
    assert found.multiply_adds == made.sum()
    assert found.activation_bytes == found.peak_activation_bytes == made.nbytes


@pytest.mark.slow
@pytest.mark.parametrize("form", ["", "opencv5"])
def test_multiply_adds_are_those_that_torch_counts(tmp_path: Path, form: str) -> None:
    """As exported, and as lowered for OpenCV 5; OpenCV 4's form has wider kernels, which are more work."""
    from edgekit.backbones import BACKBONES, build
    from edgekit.lowering import lower
    from edgekit.lowering.from_torch import from_torch

    row = BACKBONES["tf_efficientnet_lite0"]
    exported = from_torch(build(row.name, 1000, pretrained=False, weights=None).eval(), row.input_size, ("logits",))
    plain = read_workload(saved(lower(exported, "opencv5") if form else exported, tmp_path))
    assert (plain.multiply_adds, plain.unknown) == (row.macs, ())
    assert plain.operators["Conv"] == 49
    norms = 43_004  # parameters of the batch norms that are merged into the convolutions: two of four a channel
    assert abs(plain.weight_bytes - 4 * (row.params - norms)) < 100
    if form:
        wider = read_workload(saved(lower(exported, "opencv4"), tmp_path))
        assert wider.multiply_adds > plain.multiply_adds


# ---------------------------------------------------------------------------------------------------------------
# Bytes and operators


def test_a_small_graph_by_hand(tmp_path: Path) -> None:
    """Conv, Relu and a sum with the Conv's output, a Transpose; `h` is int64, and `w` and `b` are read twice."""
    text = """(float[1,3,4,4] x) => (float[1,4,4,2] y) {
        a = Conv (x, w, b)
        c = Relu (a)
        d = Add (a, c)
        e = Conv (x, w, b)
        f = Add (d, e)
        h = Constant <value_ints = [0, 2, 3, 1]> ()
        y = Transpose <perm=[0, 2, 3, 1]> (f)
    }"""
    map_bytes = 2 * 16 * 4
    assert work(tmp_path, text, w=zeros(2, 3, 1, 1), b=zeros(2)) == Workload(
        operators={"Add": 2, "Conv": 2, "Relu": 1, "Transpose": 1},
        multiply_adds=2 * 2 * 16 * 3,
        weight_bytes=(6 + 2) * 4 + 4 * 8,
        activation_bytes=6 * map_bytes,
        peak_activation_bytes=3 * map_bytes,  # a, c and d; later d, e and f
        unknown=(),
    )


@pytest.mark.parametrize(
    ("text", "peak"),
    [
        ("(float[8] x) => (float[8] y) { y = Relu (x) }", 1),
        ("(float[8] x) => (float[8] y) { a = Relu (x) b = Relu (a) c = Relu (b) y = Relu (c) }", 2),
        # the first value waits for the last node
        ("(float[8] x) => (float[8] y) { a = Relu (x) b = Relu (a) c = Relu (b) y = Add (a, c) }", 3),
        # an output stays, whoever reads it
        ("(float[8] x) => (float[8] a, float[8] y) { a = Relu (x) b = Relu (a) c = Relu (b) y = Relu (c) }", 3),
        # what nobody reads lives as long as its node runs
        ("(float[8] x) => (float[8] y) { a = Relu (x) y = Relu (x) }", 1),
        # the input is not counted
        ("(float[8] x) => (float[8] y) { a = Relu (x) y = Add (a, x) }", 2),
    ],
)
def test_peak_of_what_is_alive(tmp_path: Path, text: str, peak: int) -> None:
    assert work(tmp_path, text).peak_activation_bytes == peak * 32


@given(st.lists(st.tuples(st.integers(0, 9), st.integers(0, 9)), min_size=1, max_size=12))
@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_the_peak_lies_between_one_node_and_all(tmp_path: Path, reads: list[tuple[int, int]]) -> None:
    """Against a count node by node: what is made before or here, and read here, later, or given out."""
    pairs = [(min(a, place), min(b, place)) for place, (a, b) in enumerate(reads)]  # v0 is the input
    nodes = " ".join(f"v{place + 1} = Add (v{a}, v{b})" for place, (a, b) in enumerate(pairs))
    found = work(tmp_path, f"(float[5] v0) => (float[5] v{len(pairs)}) {{ {nodes} }}")

    def is_alive(value: int, place: int) -> bool:
        is_read = any(value in pair for pair in pairs[place:])
        return value <= place + 1 and (value == place + 1 or value == len(pairs) or is_read)

    alive = [sum(is_alive(value, place) for value in range(1, len(pairs) + 1)) for place in range(len(pairs))]
    assert found.peak_activation_bytes == 20 * max(alive)
    assert found.activation_bytes == 20 * len(pairs)


@pytest.mark.parametrize(
    ("element", "size_bytes"),
    [("float16", 30), ("int8", 15), ("double", 120), ("bool", 15), ("uint4", 8)],
)
def test_bytes_follow_the_element_type(tmp_path: Path, element: str, size_bytes: int) -> None:
    text = f"({element}[3,5] x) => ({element}[5,3] y) {{ y = Transpose (x) }}"
    net = network(text, opset=21)
    net.ir_version = 10  # the first with uint4
    found = read_workload(saved(net, tmp_path))
    assert found == Workload({"Transpose": 1}, 0, 0, size_bytes, size_bytes, ())


def test_unused_outputs_count_only_where_they_have_a_name(tmp_path: Path) -> None:
    text = "(float[1,1,4,4] x) => (float[1,1,2,2] y) { y, %s = MaxPool <kernel_shape=[2,2], strides=[2,2]> (x) }"
    assert work(tmp_path, text % "places").activation_bytes == 4 * 4 + 4 * 8
    net = network(text % "places")
    net.graph.node[0].output[1] = ""
    assert read_workload(saved(net, tmp_path)) == Workload({"MaxPool": 1}, 0, 0, 16, 16, ())


def test_weights_in_another_file_are_not_read(tmp_path: Path) -> None:
    net = network("(float[1,8] x) => (float[1,2000] y) { y = MatMul (x, w) }", w=random(8, 2000))
    onnx.save(net, tmp_path / "net.onnx", save_as_external_data=True, location="weights.bin")
    (tmp_path / "weights.bin").unlink()
    assert read_workload(tmp_path / "net.onnx") == Workload({"MatMul": 1}, 16_000, 64_000, 8000, 8000, ())


def test_initializers_among_the_inputs_are_weights(tmp_path: Path) -> None:
    net = network("(float[1,8] x, float[8,2] w) => (float[1,2] y) { v = Relu (w) y = MatMul (x, v) }", w=zeros(8, 2))
    assert read_workload(saved(net, tmp_path)) == Workload({"MatMul": 1, "Relu": 1}, 16, 64, 8, 8, ())


def test_what_depends_on_constants_alone_is_no_work(tmp_path: Path) -> None:
    """int8 weights that are read as floats: an operator, but nothing that an inference does."""
    text = """(float[1,8] x) => (float[1,8] y) {
        v = DequantizeLinear (w, s) u = MatMul (v, v) y = MatMul (x, u)
    }"""
    found = work(tmp_path, text, w=zeros(8, 8, kind=np.int8), s=np.float32(1))
    assert found == Workload({"DequantizeLinear": 1, "MatMul": 2}, 64, 64 + 4, 32, 32, ())


def test_int8_does_the_same_multiply_adds_on_a_quarter_of_the_bytes(tmp_path: Path) -> None:
    text = """(float[1,3,8,8] x) => (float[1,9] y) {
        [one] a = Conv <kernel_shape=[3,3]> (x, w) b = Relu (a) c = Flatten (b) [two] y = Gemm (c, v)
    }"""
    net = ir.from_proto(network(text, w=random(4, 3, 3, 3), v=random(144, 9)))
    found = calibrate(net, lambda: iter(random(4, 1, 3, 8, 8)), "minmax", every_value=True)
    weights = round_weights(net, found.moments)
    fp32, weight_only, qdq, qoperator = (
        read_workload(saved(ir.to_proto(variant) if isinstance(variant, ir.Model) else variant, tmp_path))
        for variant in (
            net,
            scheme.weight_only(net, weights),
            scheme.qdq(net, weights, found.ranges),
            scheme.qoperator(net, weights, found.ranges),
        )
    )
    assert fp32 == Workload({"Conv": 1, "Flatten": 1, "Gemm": 1, "Relu": 1}, 5184, 5616, 1764, 1152, ())
    assert fp32.multiply_adds == 4 * 36 * 27 + 144 * 9
    # the weights and the zero points are bytes, the scales floats: one an output
    assert weight_only == replace(
        fp32, operators={**fp32.operators, "DequantizeLinear": 2}, weight_bytes=108 + 1296 + 5 * (4 + 9)
    )
    assert qdq.multiply_adds == qoperator.multiply_adds == fp32.multiply_adds
    assert (qdq.operators["QuantizeLinear"], qdq.operators["DequantizeLinear"]) == (2, 4)
    assert set(qoperator.operators) == {
        *("DequantizeLinear", "Flatten", "QLinearConv", "QuantizeLinear", "com.microsoft.QGemm")
    }
    assert (qdq.unknown, qoperator.unknown) == ((), ())


def test_activations_are_the_bytes_that_onnx_runtime_makes(tmp_path: Path) -> None:
    """Its own integer operators have no shapes in ONNX; each of them is here."""
    text = """(float[1,3,8,8] x) => (float[1,5] y) {
        [n1] a = Conv <kernel_shape=[3,3], pads=[1,1,1,1]> (x, w)
        [n2] b = LeakyRelu (a)
        [n3] c = Sigmoid (b)
        [n4] d = Mul (b, c)
        [n5] e = Add (d, a)
        [n6] f = Concat <axis=1> (d, e)
        [n7] g = AveragePool <kernel_shape=[2,2], strides=[2,2]> (f)
        [n8] h = GlobalAveragePool (g)
        [n9] i = Flatten (h)
        [n10] j = Gemm (i, v)
        [n11] y = Softmax (j)
    }"""
    net = ir.from_proto(network(text, w=random(4, 3, 3, 3), v=random(8, 5)))
    found = calibrate(net, lambda: iter(random(4, 1, 3, 8, 8)), "minmax", every_value=True)
    made = scheme.qoperator(net, round_weights(net, found.moments), found.ranges)
    counted = read_workload(saved(made, tmp_path))
    own = {f"com.microsoft.{operator}" for operator in STANDS_FOR}
    assert set(counted.operators) == own | {"DequantizeLinear", "Flatten", "QLinearConv", "QuantizeLinear"}
    assert (counted.multiply_adds, counted.unknown) == (4 * 64 * 27 + 8 * 5, ())
    names = [name for node in made.graph.node for name in node.output]
    made.graph.ClearField("output")
    made.graph.output.extend(onnx.ValueInfoProto(name=name) for name in names)
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = onnxruntime.InferenceSession(made.SerializeToString(), options, providers=["CPUExecutionProvider"])
    arrays = session.run(names, {"x": random(1, 3, 8, 8)})
    assert counted.activation_bytes == sum(array.nbytes for array in arrays)


# ---------------------------------------------------------------------------------------------------------------
# What is not known


def test_an_unknown_batch_is_one_image(tmp_path: Path) -> None:
    text = """(float[%s,3,8,8] x) => (float[%s,6] y) {
        a = Conv <strides=[2,2]> (x, w) b = Flatten (a) y = MatMul (b, v)
    }"""
    weights = {"w": zeros(2, 3, 3, 3), "v": zeros(18, 6)}
    assert work(tmp_path, text % ("N", "N"), **weights) == work(tmp_path, text % ("1", "1"), **weights)
    assert work(tmp_path, text % ("N", "N"), **weights) == Workload(
        {"Conv": 1, "Flatten": 1, "MatMul": 1}, 18 * 27 + 18 * 6, (54 + 108) * 4, (18 + 18 + 6) * 4, 36 * 4, ()
    )


def test_another_unknown_size_is_named(tmp_path: Path) -> None:
    text = "(float[1,3,H,8] x, float[1,4] z) => (float[] y, float[] u) { y = Conv (x, w) u = MatMul (z, v) }"
    found = work(tmp_path, text, w=zeros(2, 3, 3, 3), v=zeros(4, 4))
    assert found == Workload(
        operators={"Conv": 1, "MatMul": 1},
        multiply_adds=16,
        weight_bytes=(54 + 16) * 4,
        activation_bytes=16,
        peak_activation_bytes=16,
        unknown=(
            "1 Conv: shapes are not known, so multiply-adds are not counted",
            "activations whose shapes are not known: 1",
        ),
    )


def test_a_function_counts_where_it_is_called_and_its_weights_once(tmp_path: Path) -> None:
    path = saved(onnx.parser.parse_model(FUNCTION), tmp_path)
    assert read_workload(path) == Workload({"MatMul": 2}, 2 * 16, 64, 32, 32, ())


def test_branches_are_operators_and_weights_and_named(tmp_path: Path) -> None:
    text = """(float[1,4] x, bool c) => (float[1,4] y) {
        a = Relu (x)
        b = If (c) <
            then_branch = yes () => (float[1,4] t) {
                w = Constant <value = float[2] {1,2}> () t = MatMul (a, v)
            },
            else_branch = no () => (float[1,4] e) { e = Relu (a) }
        >
        y = Relu (b)
    }"""
    assert work(tmp_path, text, v=zeros(4, 4)) == Workload(
        {"If": 1, "MatMul": 1, "Relu": 3}, 0, 64 + 8, 48, 32, ("1 If: what is inside is not counted",)
    )


def test_a_branch_may_have_weights_and_read_what_its_node_does_not(tmp_path: Path) -> None:
    """The condition is a constant, so only the branches read the input."""
    text = """(float[1,4] x) => (float[1,4] y) {
        c = Constant <value = bool {1}> ()
        b = If (c) <
            then_branch = yes () => (float[1,4] t) { t = Mul (x, w) },
            else_branch = no () => (float[1,4] e) { e = Relu (x) }
        >
        y = Relu (b)
    }"""
    net = network(text)
    net.graph.node[1].attribute[0].g.initializer.append(onnx.numpy_helper.from_array(zeros(1, 4), "w"))
    assert read_workload(saved(net, tmp_path)) == Workload(
        {"If": 1, "Mul": 1, "Relu": 2}, 0, 1 + 16, 32, 32, ("1 If: what is inside is not counted",)
    )


def test_a_node_that_does_not_fit_hides_only_itself(tmp_path: Path) -> None:
    text = "(float[5] x, float[4] z) => (float[] y, float[] u) { y = Add (x, z) u = MatMul (z, v) }"
    unknown = ("activations whose shapes are not known: 1",)
    assert work(tmp_path, text, v=zeros(4, 4)) == Workload({"Add": 1, "MatMul": 1}, 16, 64, 16, 16, unknown)


def test_what_multiplies_otherwise_is_named(tmp_path: Path) -> None:
    text = """(float[2,2] x) => (float[2,2] y) {
        a = Einsum <equation = "ij,jk->ik"> (x, x) b = Einsum <equation = "ij->ji"> (a) y = other.Gelu (b)
    }"""
    found = work(tmp_path, text)
    assert found.operators == {"Einsum": 2, "other.Gelu": 1}
    assert found.unknown == (
        "2 Einsum: multiply-adds are not counted",
        "1 other.Gelu: multiply-adds are not counted",
    )
    assert (found.multiply_adds, found.activation_bytes) == (0, 48)  # of y, the file itself gives the shape


def test_pooling_with_channels_last_has_no_shape_in_onnx(tmp_path: Path) -> None:
    text = "(uint8[1,8,8,3] x) => (uint8[] y) { y = other.QLinearGlobalAveragePool <channels_last=1> (x, s, z, s, z) }"
    net = network(text, s=np.float32(1), z=np.uint8(0))
    net.graph.node[0].domain = "com.microsoft"
    net.opset_import.append(onnx.helper.make_opsetid("com.microsoft", 1))
    name = "com.microsoft.QLinearGlobalAveragePool"
    unknown = (f"1 {name}: multiply-adds are not counted", "activations whose shapes are not known: 1")
    assert read_workload(saved(net, tmp_path)) == Workload({name: 1}, 0, 5, 0, 0, unknown)


def test_a_constant_without_a_value_is_named(tmp_path: Path) -> None:
    net = network("(float[1,4] x) => (float[1,4] y) { w = Constant <value_int = 1> () y = Relu (x) }")
    net.graph.node[0].ClearField("attribute")
    found = read_workload(saved(net, tmp_path))
    assert found == Workload({"Relu": 1}, 0, 0, 16, 16, ("weights whose values are not readable: 1",))


def test_sparse_weights_are_refused(tmp_path: Path) -> None:
    net = network("(float[1,4] x) => (float[1,4] y) { w = Constant <value_int = 1> () y = Relu (x) }")
    values, places = onnx.helper.make_tensor("v", 1, [1], [1.0]), onnx.helper.make_tensor("i", 7, [1], [2])
    sparse = onnx.helper.make_attribute("sparse_value", onnx.helper.make_sparse_tensor(values, places, [4]))
    net.graph.node[0].attribute[0].CopyFrom(sparse)
    with pytest.raises(ArtifactError, match=r"is not a readable ONNX model \(Sparse tensors are not supported yet"):
        read_workload(saved(net, tmp_path))


@pytest.mark.parametrize("data", [b"", b"no model at all", b"\x89PNG\r\n\x1a\n", bytes(100)])
def test_a_file_that_is_no_onnx(tmp_path: Path, data: bytes) -> None:
    (tmp_path / "net.onnx").write_bytes(data)
    with pytest.raises(ArtifactError, match=r"net\.onnx is not an? (readable )?ONNX model \(.+\): make it again"):
        read_workload(tmp_path / "net.onnx")


def test_no_file(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match=r"none\.onnx is not a readable ONNX model \(.*No such file"):
        read_workload(tmp_path / "none.onnx")
    with pytest.raises(ArtifactError, match="is not a readable ONNX model"):
        read_workload(tmp_path)


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
def test_a_damaged_file_is_read_or_refused(tmp_path: Path, data: st.DataObject) -> None:
    whole = network("(float[1,3,8,8] x) => (float[] y) { a = Conv <strides=[2,2]> (x, w) y = Relu (a) }", w=FLAT)
    content = bytearray(whole.SerializeToString())
    for _ in range(data.draw(st.integers(1, 4))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    path = tmp_path / "net.onnx"
    path.write_bytes(content[: data.draw(st.integers(0, len(content)))])
    with contextlib.suppress(ArtifactError):
        assert read_workload(path).multiply_adds >= 0


# ---------------------------------------------------------------------------------------------------------------
# Changes


def test_equal_work_has_no_changes() -> None:
    same = Workload({"Conv": 2}, 10, 20, 30, 40, ("1 If: what is inside is not counted",))
    assert changes(same, replace(same, operators={"Conv": 2})) == ()
    assert changes(NOTHING, NOTHING) == ()


def test_every_change_is_a_sentence() -> None:
    base = Workload(
        {"Conv": 3, "Relu": 12, "Sigmoid": 2, "Add": 5}, 42_000_000, 13_479_386, 4_000_000, 800_000, ("1 If: a",)
    )
    candidate = Workload(
        {"Conv": 3, "Transpose": 4, "Sigmoid": 3, "Add": 3}, 46_200_000, 3_400_000, 4_000_001, 799, ("1 Loop: b",)
    )
    assert changes(base, candidate) == (
        "multiply-adds 42.0 M → 46.2 M (+10.0 %)",
        "weights 13.5 MB → 3.4 MB (-74.8 %)",
        "activations 4,000,000 B → 4,000,001 B",
        "peak activations 800.0 kB → 799 B (-99.9 %)",
        "2 fewer Add (5 → 3)",
        "Relu no longer there (12 → 0)",
        "1 more Sigmoid (2 → 3)",
        "4 more Transpose (0 → 4)",
        "not known of the baseline: 1 If: a",
        "not known of the candidate: 1 Loop: b",
    )


def test_changes_from_and_to_nothing() -> None:
    some = replace(NOTHING, multiply_adds=1500, weight_bytes=12)
    assert changes(NOTHING, some) == ("multiply-adds 0 → 1.5 k", "weights 0 B → 12 B")
    assert changes(some, NOTHING) == ("multiply-adds 1.5 k → 0 (-100.0 %)", "weights 12 B → 0 B (-100.0 %)")


WORKLOADS = st.builds(
    Workload,
    st.dictionaries(st.sampled_from(["Conv", "Relu", "Add"]), st.integers(1, 3), max_size=3),
    *[st.integers(0, 3_000_000)] * 4,
    st.lists(st.sampled_from(["1 If: a", "1 Loop: b"]), unique=True, max_size=2).map(tuple),
)


@given(WORKLOADS, WORKLOADS)
def test_there_are_changes_where_there_is_a_difference(base: Workload, candidate: Workload) -> None:
    assert (changes(base, candidate) == ()) == (base == candidate)
    assert len(changes(base, candidate)) == len(changes(candidate, base))


@pytest.mark.parametrize(
    ("number", "unit", "text"),
    [
        (0, "", "0"),
        (999, "B", "999 B"),
        (1000, "B", "1.0 kB"),
        (999_949, "", "999.9 k"),
        (999_950, "", "1.0 M"),
        (31_352_192, "", "31.4 M"),
        (13_451_256, "B", "13.5 MB"),
        (4_089_184_256, "", "4.1 G"),
    ],
)
def test_amounts_as_people_read_them(number: int, unit: str, text: str) -> None:
    assert amount(number, unit) == text


def test_workload_table() -> None:
    fp32 = Workload({"Conv": 49, "Relu": 1}, 31_352_192, 13_451_256, 4_289_576, 786_432, ())
    int8 = Workload(
        {"Conv": 49, "QuantizeLinear": 3, "Transpose": 2}, 31_352_192, 900, 7, 7, ("1 [If]: a", "1 Loop: b")
    )
    table = workload_table({"base": fp32, "[bold]": int8})
    columns = [[str(column.header), *map(str, column.cells)] for column in table.columns]
    assert [list(row) for row in zip(*columns, strict=True)] == [
        ["", "base", "[bold]"],
        ["multiply-adds", "31.4 M", "31.4 M"],
        ["weights", "13.5 MB", "900 B"],
        ["activations", "4.3 MB", "7 B"],
        ["peak activations", "786.4 kB", "7 B"],
        ["nodes", "50", "54"],
        ["QuantizeLinear", "0", "3"],
        ["DequantizeLinear", "0", "0"],
        ["Transpose", "0", "2"],
    ]
    assert str(table.caption) == "not known of [bold]: 1 [If]: a\nnot known of [bold]: 1 Loop: b"


# ---------------------------------------------------------------------------------------------------------------
# Instructions


@pytest.fixture(scope="module")
def valgrind() -> None:
    if shutil.which("valgrind") is None:
        pytest.skip("valgrind is not installed")


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Its first image is small: under valgrind, decoding a photo takes longer than all the rest."""
    folder = write_bundle(tmp_path_factory.mktemp("workload") / "tiny")
    expected = read_json(folder / "check" / "expected.json")
    expected["images"].sort(key=lambda row: row["file"] != "roof.png")
    write_json(folder / "check" / "expected.json", expected)
    sign(folder)
    return folder


def test_without_valgrind(bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(SetupError, match="valgrind, which counts instructions, is not installed: apt-get install"):
        instructions_per_inference(bundle)


@pytest.mark.usefixtures("valgrind")
def test_without_a_bundle(bundle: Path, tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match=r"no bundle at .*none .*: make one with `edgekit bundle RUN`"):
        instructions_per_inference(tmp_path / "none")
    with pytest.raises(ArtifactError, match=r"cannot read .*expected\.json"):
        instructions_per_inference(bundle, images=tmp_path)
    (tmp_path / "check").mkdir()
    write_json(tmp_path / "check" / "expected.json", {"images": []})
    with pytest.raises(ArtifactError, match="has no check image: make the bundle again"):
        instructions_per_inference(bundle, images=tmp_path)


@pytest.mark.usefixtures("valgrind")
def test_a_bundle_that_does_not_run(bundle: Path, tmp_path: Path) -> None:
    damaged = Path(shutil.copytree(bundle, tmp_path / "damaged"))
    (damaged / "model.onnx").write_bytes(b"no model")
    with pytest.raises(ArtifactError, match=r"damaged does not run here: run\.py: .*model\.onnx"):
        instructions_per_inference(damaged)


@pytest.mark.usefixtures("valgrind")
def test_what_does_not_end(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(workload, "TIMEOUT_S", 0.001)
    with pytest.raises(SetupError, match=r"1 iterations of run\.py took more than 0\.001 s"):
        instructions_per_inference(bundle)


@pytest.mark.parametrize(
    ("line", "code", "reason"),
    [
        ("vex: unhandled instruction bytes: 0x62", 132, "vex: unhandled instruction bytes: 0x62"),
        ("I refs: 1,000", 1, "I refs: 1,000"),
        ("done", 0, "done"),
        ("", 0, "no reason given"),
    ],
)
def test_a_valgrind_that_does_not_count(
    bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, line: str, code: int, reason: str
) -> None:
    """An old one does not know all instructions: the program ends there. The count of such a one is none."""
    script = tmp_path / "valgrind"
    log = """for word in "$@"; do case $word in --log-file=*) echo "$line" > "${word#--log-file=}";; esac; done"""
    script.write_text(f"#!/bin/sh\nline='{line}'\n{log}\nexit {code}\n")
    script.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    with pytest.raises(SetupError, match=f"valgrind cannot run this bundle's OpenCV: {reason}$"):
        instructions_per_inference(bundle)


def test_instruction_changes() -> None:
    assert instruction_changes(17_453_526, 17_453_526) == ()
    assert instruction_changes(10_000_000, 10_005_000) == instruction_changes(10_000_000, 9_995_000) == ()
    assert instruction_changes(10_000_000, 10_005_001) == ("instructions 10,000,000 → 10,005,001 (+0.1 %)",)
    assert instruction_changes(17_453_526, 19_200_000) == ("instructions 17.5 M → 19.2 M (+10.0 %)",)


@pytest.mark.slow
@pytest.mark.usefixtures("valgrind")
def test_the_same_work_takes_the_same_instructions_and_more_work_more(bundle: Path, tmp_path: Path) -> None:
    """Other weights, another name and another place are the same work; one more 1×1 convolution is seen."""
    first = instructions_per_inference(bundle)
    other = Path(shutil.copytree(bundle, tmp_path / "a_copy_with_a_longer_name"))
    write_model(other / "model.onnx", seed=1)
    sign(other, name="another-run")
    again = instructions_per_inference(other, images=bundle)
    assert instruction_changes(first, again) == (), (first, again)

    longer = onnx.load(other / "model.onnx")
    (pool,) = (node for node in longer.graph.node if node.op_type == "GlobalAveragePool")
    pool.input[0] = "extra"
    extra = onnx.helper.make_node("Conv", ["r2", "w4"], ["extra"], kernel_shape=[1, 1])
    longer.graph.node.insert(list(longer.graph.node).index(pool), extra)
    longer.graph.initializer.append(onnx.numpy_helper.from_array(random(16, 16, 1, 1), "w4"))
    onnx.save(longer, other / "model.onnx")
    sign(other)
    more = instructions_per_inference(other, images=bundle)
    # 16 × 16 weights on 8 × 12 places: an instruction does 16 multiply-adds at most
    assert more - first > 16 * 16 * 8 * 12 / 16
    assert more < 1.5 * first
