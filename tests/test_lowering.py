"""Each rewrite: the graph computes what it did, and in OpenCV too."""

from itertools import chain, combinations
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from graphs import computed, network, random, saved

from edgekit.errors import ArtifactError
from edgekit.lowering import kernel_shape, lower
from edgekit.parity import compare

BLOBS = random(2, 3, 8, 8)
WEIGHT = random(4, 3, 3, 3, seed=1)


def kinds(model: onnx.ModelProto) -> list[str]:
    return [node.op_type for node in model.graph.node]


def attributes(model: onnx.ModelProto, name: str) -> dict[str, object]:
    """The attributes of the node of that name."""
    (node,) = (node for node in model.graph.node if node.name == name)
    return {item.name: onnx.helper.get_attribute_value(item) for item in node.attribute}


def lowered(model: onnx.ModelProto, blobs: np.ndarray = BLOBS) -> onnx.ModelProto:
    """lower(), after checking all that it promises of every model."""
    before = model.SerializeToString()
    result = lower(model)
    assert model.SerializeToString() == before, "the argument was changed"
    onnx.checker.check_model(result, full_check=True)
    want, got = computed(model, blobs), computed(result, blobs)
    assert list(got) == list(want)
    for name in want:
        np.testing.assert_allclose(got[name], want[name], rtol=1e-5, atol=1e-6)
    assert lower(result).SerializeToString() == result.SerializeToString(), "a second time changes it again"
    return result


def statuses(model: onnx.ModelProto, folder: Path) -> dict[str, str]:
    """What ONNX Runtime and each engine of this OpenCV make of a model."""
    verdicts = compare(saved(model, folder), BLOBS, computed(model, BLOBS), tolerance=1e-4)
    assert len(verdicts) >= 2
    return {verdict.engine: verdict.status for verdict in verdicts}


def test_a_graph_with_nothing_to_rewrite_is_kept_as_it_is() -> None:
    model = network(
        """(float[1,3,8,8] image) => (float[1,4,8,8] y, float[1,4,8,8] z) {
            [conv] c = Conv <kernel_shape = [3, 3], pads = [1, 1, 1, 1]> (image, weight)
            [gate] g = HardSigmoid <alpha = 0.2, beta = 0.6> (c)
            [relu] y = Relu (g)
            [mul] z = Mul (c, y)
        }""",
        weight=WEIGHT,
    )
    result = lowered(model)
    assert list(result.graph.node) == list(model.graph.node)
    assert list(result.graph.initializer) == list(model.graph.initializer)
    assert (list(result.graph.input), list(result.graph.output)) == (list(model.graph.input), list(model.graph.output))


# ---------------------------------------------------------------------------------------------------------------
# hard_sigmoid

GATE = """(float[1,3,8,8] image) => (float[1,4,8,8] y) {{
    [a] x = Conv <kernel_shape = [3, 3], pads = [1, 1, 1, 1]> (image, weight)
    [b] s = Conv <kernel_shape = [3, 3], pads = [1, 1, 1, 1]> (image, other)
    [gate] g = HardSigmoid <{attributes}> (s)
    [mul] y = Mul (x, g)
}}"""


def gate(attributes: str) -> onnx.ModelProto:
    return network(GATE.format(attributes=attributes), weight=WEIGHT, other=random(4, 3, 3, 3, seed=2))


def test_opencv_loses_the_product_with_another_hard_sigmoid_unless_lowered(tmp_path: Path) -> None:
    model = gate("alpha = 0.16666667, beta = 0.5")
    before = statuses(model, tmp_path)
    assert before.pop("onnxruntime") == "ok"
    assert set(before.values()) == {"wrong"}, "OpenCV has mended it: say so in lowering/hard_sigmoid.py"
    assert set(statuses(lower(model), tmp_path).values()) == {"ok"}


@pytest.mark.parametrize(
    ("written", "left"),
    [
        ("alpha = 0.16666667, beta = 0.5", {"alpha": pytest.approx(1 / 6)}),
        ("alpha = 0.3, beta = 0.5", {"alpha": pytest.approx(0.3)}),
        ("alpha = 0.3", {"alpha": pytest.approx(0.3)}),
        ("beta = 0.25", {"beta": 0.25}),
        ("alpha = 0.3, beta = 0.0", {"alpha": pytest.approx(0.3), "beta": 0.0}),
    ],
)
def test_hard_sigmoid_leaves_out_the_default_beta_only(written: str, left: dict[str, object]) -> None:
    model = gate(written)
    result = lowered(model)
    assert attributes(result, "gate") == left
    assert kinds(result) == kinds(model)
    assert [node for node in result.graph.node if node.name != "gate"] == [
        node for node in model.graph.node if node.name != "gate"
    ]


# ---------------------------------------------------------------------------------------------------------------
# global_average_pool


def mean(first: str, attributes: str = "keepdims = 1", opset: int = 18, **weights: Any) -> onnx.ModelProto:
    """Relu → ReduceMean → Neg on (1, 3, 8, 8); `first`: what is written before the mean."""
    text = f"""(float[1,3,8,8] image) => (float[] y) {{
        [before] x = Relu (image)
        {first}
        [pool] m = ReduceMean <{attributes}> (x{", axes" if opset >= 18 else ""})
        [after] y = Neg (m)
    }}"""
    return network(text, opset, **weights)


@pytest.mark.parametrize(("first", "second"), [(2, 3), (-1, -2), (3, -2)])
@pytest.mark.parametrize("keepdims", [0, 1])
def test_a_mean_over_height_and_width_is_pooling(first: int, second: int, keepdims: int) -> None:
    keep = f"keepdims = {keepdims}"
    models = (
        mean("", keep, axes=np.array([first, second])),
        mean(f"axes = Constant <value_ints = [{first}, {second}]> ()", keep),
        mean("", f"axes = [{first}, {second}], {keep}", opset=17),
    )
    for model in models:
        result = lowered(model)
        assert kinds(result) == ["Relu", "GlobalAveragePool", *([] if keepdims else ["Flatten"]), "Neg"]
        assert list(result.graph.initializer) == []  # nothing reads the axes any more
        assert attributes(result, "pool") == ({} if keepdims else {"axis": 1})
        assert (result.graph.node[0], result.graph.node[-1]) == (model.graph.node[0], model.graph.node[-1])


def test_the_axes_are_kept_unless_the_node_says_otherwise() -> None:
    model = mean("", "noop_with_empty_axes = 0", axes=np.array([2, 3]))
    assert kinds(lowered(model)) == ["Relu", "GlobalAveragePool", "Neg"]


@pytest.mark.parametrize("rank", [3, 4, 5])
@pytest.mark.parametrize("keepdims", [0, 1])
@pytest.mark.parametrize("opset", [17, 18])
def test_every_mean_stays_what_it_was(rank: int, keepdims: int, opset: int) -> None:
    shape = (1, 2, 3, 4, 5)[:rank]
    for axes in chain.from_iterable(combinations(range(rank), count) for count in range(1, rank + 1)):
        signed = [axis - rank * (axis % 2) for axis in axes]
        written = f"<keepdims = {keepdims}> (image, axes)"
        if opset < 18:
            written = f"<keepdims = {keepdims}, axes = {signed}> (image)"
        model = network(
            f"(float[{','.join(map(str, shape))}] image) => (float[] y) {{ y = ReduceMean {written} }}",
            opset,
            **({"axes": np.array(signed)} if opset >= 18 else {}),
        )
        result = lowered(model, random(2, *shape[1:]))
        assert ("ReduceMean" not in kinds(result)) is (rank == 4 and axes == (2, 3)), axes


@pytest.mark.parametrize(
    "text",
    [
        "(float[1,3,8,8] image) => (float[] y) { y = ReduceMean (image) }",
        "(float[1,3,8,8] image) => (float[] y) { y = ReduceMean <noop_with_empty_axes = 1> (image) }",
        "(float[1,3,8,8] image) => (float[] y) { y = ReduceMax (image, axes) }",
    ],
)
def test_other_reductions_are_left_alone(text: str) -> None:
    model = network(text, axes=np.array([2, 3]))
    result = lowered(model)
    assert list(result.graph.node) == list(model.graph.node)


def test_axes_known_only_at_run_time_are_left_alone() -> None:
    model = network(
        "(float[1,3,8,8] image, int64[2] axes) => (float[1,3,1,1] y) { y = ReduceMean (image, axes) }",
    )
    assert list(lower(model).graph.node) == list(model.graph.node)


# ---------------------------------------------------------------------------------------------------------------
# kernel_shape

QUANTIZED = """(float[1,3,8,8] image) => (float[1,4,8,8] y) {
    [in] q = QuantizeLinear (image, scale, zero)
    [conv] c = QLinearConv <pads = [1, 1, 1, 1]> (q, scale, zero, weight, scale, zero, scale, zero)
    [out] y = DequantizeLinear (c, scale, zero)
}"""
QUANTIZED_WEIGHTS: dict[str, Any] = {
    "scale": np.array(0.05, np.float32),
    "zero": np.array(0, np.int8),
    "weight": np.round(random(4, 3, 3, 3) * 9).astype(np.int8),
}
CONVOLUTIONS = {
    "Conv": network(
        "(float[1,3,8,8] image) => (float[] y) { [conv] y = Conv (image, weight) }", weight=random(4, 3, 5, 3)
    ),
    "ConvTranspose": network(
        "(float[1,3,8,8] image) => (float[] y) { [conv] y = ConvTranspose (image, weight) }", weight=random(3, 4, 5, 3)
    ),
    "ConvInteger": network(
        """(float[1,3,8,8] image) => (float[] y) {
            q, s, z = DynamicQuantizeLinear (image)
            [conv] c = ConvInteger (q, weight, z)
            y = Cast <to = 1> (c)
        }""",
        weight=np.ones((4, 3, 5, 3), np.uint8),
    ),
    "QLinearConv": network(
        QUANTIZED.replace("[1, 1, 1, 1]", "[2, 1, 2, 1]"),
        **{**QUANTIZED_WEIGHTS, "weight": np.ones((4, 3, 5, 3), np.int8)},
    ),
}


@pytest.mark.parametrize("kind", CONVOLUTIONS)
def test_a_convolution_says_how_large_its_kernel_is(kind: str) -> None:
    model = CONVOLUTIONS[kind]
    result = lowered(model)
    assert attributes(result, "conv") == {**attributes(model, "conv"), "kernel_shape": [5, 3]}
    assert kinds(result) == kinds(model)
    assert [node for node in result.graph.node if node.name != "conv"] == [
        node for node in model.graph.node if node.name != "conv"
    ]


def test_a_convolution_over_one_axis() -> None:
    model = network(
        "(float[1,3,8] image) => (float[1,4,4] y) { [conv] y = Conv (image, weight) }", weight=random(4, 3, 5)
    )
    assert attributes(lowered(model, random(2, 3, 8)), "conv") == {"kernel_shape": [5]}


def test_weights_of_unknown_shape_and_another_domains_convolution_are_left_alone() -> None:
    model = network(
        """(float[1,3,8,8] image, float[4,3,n,n] weight) => (float[1,4,6,6] y, float[1,4,6,6] z) {
            [conv] y = Conv (image, weight)
            [foreign] z = other.Conv (image, fixed)
        }""",
        fixed=WEIGHT,
    )
    rewritten = ir.from_proto(model)
    kernel_shape.rewrite(rewritten)
    assert list(ir.to_proto(rewritten).graph.node) == list(model.graph.node)


def test_opencv_does_not_run_a_quantized_convolution_unless_lowered(tmp_path: Path) -> None:
    model = network(QUANTIZED, **QUANTIZED_WEIGHTS)
    before = statuses(model, tmp_path)
    assert before["onnxruntime"] == "ok"
    assert before["opencv-classic"] in ("raised", "died"), "OpenCV has mended it: say so in lowering/kernel_shape.py"
    assert set(statuses(lower(model), tmp_path).values()) == {"ok"}


# ---------------------------------------------------------------------------------------------------------------
# static_shapes


def test_shapes_are_written_down() -> None:
    model = network(
        "(float[1,3,8,8] image) => (y, z) { c = Conv (image, weight) y = Relu (c) z = Flatten (y) }", weight=WEIGHT
    )
    result = lowered(model)
    values = [*result.graph.output, *result.graph.value_info]
    shapes = {value.name: [size.dim_value for size in value.type.tensor_type.shape.dim] for value in values}
    assert shapes == {"y": [1, 4, 6, 6], "z": [1, 144], "c": [1, 4, 6, 6], "weight": [4, 3, 3, 3]}


def test_opencv_does_not_load_an_output_without_a_shape_unless_lowered(tmp_path: Path) -> None:
    model = network(
        "(float[1,3,8,8] image) => (y) { c = Conv <kernel_shape = [3, 3]> (image, weight) y = Relu (c) }", weight=WEIGHT
    )
    before = statuses(model, tmp_path)
    assert before.pop("onnxruntime") == "ok"
    assert set(before.values()) == {"raised"}, "OpenCV has mended it: say so in lowering/static_shapes.py"
    assert set(statuses(lower(model), tmp_path).values()) == {"ok"}


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("(float[N,3,8,8] image) => (float[N,3,8,8] y) { y = Relu (image) }", "input 'image' has shape [N,3,8,8]"),
        ("(float[1,3,?,8] image) => (float[1,3,8,8] y) { y = Relu (image) }", "input 'image' has shape [1,3,None,8]"),
        ("(float[] image) => (float[1,3,8,8] y) { y = Relu (image) }", "input 'image' has no shape"),
        ("(float[1,3,8,8] image) => (int64[4,n] y) { y = NonZero (image) }", "output 'y' has shape [4,n]"),
        ("(float[1,3,8,8] image) => (y) { y = other.Odd (image) }", "output 'y' has no shape"),
    ],
)
def test_an_input_or_output_of_no_fixed_shape_is_refused(text: str, found: str) -> None:
    with pytest.raises(ArtifactError) as raised:
        lower(network(text))
    assert str(raised.value) == (
        f"the model's {found}; OpenCV needs fixed sizes. Export the model with one fixed input size"
    )
