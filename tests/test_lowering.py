"""Each rewrite keeps what the graph computes (ONNX Runtime says so), and OpenCV computes it right afterwards."""

from __future__ import annotations

from pathlib import Path

import cv2
import numpy as np
import onnx
import onnx.parser
import onnxruntime
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edgekit import parity, runner
from edgekit.environments import opencv_python
from edgekit.errors import ArtifactError, SetupError
from edgekit.lowering import REWRITES, TUNING, lower

RANDOM = np.random.default_rng(0)
IMAGES = RANDOM.standard_normal((2, 3, 6, 8)).astype(np.float32)
ENGINES = runner.engines()
OPENCV_4 = cv2.__version__.startswith("4.")

# The block of MobileNetV3 and its kin: c * hard_sigmoid(conv(mean(c))), as torch's exporter writes it.
SQUEEZE_EXCITE = """
    [stem] c = Conv<pads=[1, 1, 1, 1], kernel_shape=[3, 3]>(image, w)
    [pool] m = ReduceMean<keepdims=1>(c, axes)
    [fc] f = Conv<kernel_shape=[1, 1]>(m, v)
    [gate] g = HardSigmoid<alpha=0.1666666716337204, beta=0.5>(f)
    [scale] logits = Mul(c, g)
"""
# GELU as torch's exporter writes it up to operator set 19.
GELU = """
    [stem] c = Conv<pads=[1, 1, 1, 1], kernel_shape=[3, 3]>(image, w)
    d = Div(c, sqrt2)
    e = Erf(d)
    a = Add(e, one)
    [half] h = Mul(half, a)
    [gelu] logits = Mul(c, h)
"""
QUANTIZED = """
    x = QuantizeLinear(image, s, z)
    [qconv] y = QLinearConv<pads=[1, 1, 1, 1]>(x, s, z, q, s, z, s, z)
    logits = DequantizeLinear(y, s, z)
"""
WEIGHTS = {
    "w": RANDOM.standard_normal((4, 3, 3, 3)).astype(np.float32),
    "v": RANDOM.standard_normal((4, 4, 1, 1)).astype(np.float32),
    "wide": RANDOM.standard_normal((4, 3, 3, 5)).astype(np.float32),
    "grouped": RANDOM.standard_normal((6, 1, 3, 3)).astype(np.float32),
    "up": RANDOM.standard_normal((3, 4, 2, 2)).astype(np.float32),
    "q": RANDOM.integers(-127, 128, (4, 3, 3, 3)).astype(np.int8),
    "s": np.array(0.05, np.float32),
    "z": np.array(0, np.int8),
    "axes": np.array([2, 3], np.int64),
    "sqrt2": np.array(2**0.5, np.float32),
    "one": np.array(1, np.float32),
    "half": np.array(0.5, np.float32),
    "zero": np.array(0, np.float32),
    "minus": np.array(-1, np.float32),
    "six": np.array(6, np.float32),
    "fc": RANDOM.standard_normal((5, 4)).astype(np.float32),
}


def make(body: str, shape: str = "1, 4, 6, 8", *, opset: int = 18, **more: np.ndarray) -> onnx.ModelProto:
    """A model from image (1, 3, 6, 8) to logits of a shape; its weights are those of WEIGHTS that the body names."""
    output = f"float[{shape}] logits" if shape else "float logits"
    header = f'<ir_version: 8, opset_import: ["": {opset}]> graph (float[1, 3, 6, 8] image) => ({output})'
    model = onnx.parser.parse_model(f"{header} {{ {body} }}")
    used = {name for node in model.graph.node for name in node.input}
    tensors = {name: array for name, array in {**WEIGHTS, **more}.items() if name in used}
    model.graph.initializer.extend(onnx.numpy_helper.from_array(array, name) for name, array in tensors.items())
    return model


def run(model: onnx.ModelProto) -> np.ndarray:
    """ONNX Runtime's logits for IMAGES, graph optimizations off: what the graph says, node by node."""
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    return np.concatenate([session.run(["logits"], {"image": image[None]})[0] for image in IMAGES])


def statuses(model: onnx.ModelProto, folder: Path, opencv: str = "") -> dict[str, str]:
    """Engine → status, against ONNX Runtime; on the OpenCV here, or in an environment with another one."""
    path = folder / "model.onnx"
    onnx.save(model, path)
    python = environment(opencv) if opencv else None
    verdicts = parity.compare(path, IMAGES, {"logits": run(model)}, tolerance=1e-4, python=python)
    return {verdict.engine: verdict.status for verdict in verdicts}


def environment(opencv: str) -> Path:
    try:
        return opencv_python(opencv)
    except SetupError as error:
        pytest.skip(str(error))


def everywhere(status: str) -> dict[str, str]:
    return {"onnxruntime": "ok", **{f"opencv-{engine}": status for engine in ENGINES}}


def ops(model: onnx.ModelProto) -> list[str]:
    return [node.op_type for node in model.graph.node]


def attributes(node: onnx.NodeProto) -> dict[str, object]:
    return {attribute.name: onnx.helper.get_attribute_value(attribute) for attribute in node.attribute}


# ---------------------------------------------------------------------------------------------------------------
# lower


@pytest.mark.parametrize("body", [SQUEEZE_EXCITE, GELU, QUANTIZED])
def test_lower_is_pure_idempotent_and_keeps_names(body: str) -> None:
    model = make(body)
    before = model.SerializeToString()
    lowered = lower(model)
    assert model.SerializeToString() == before
    onnx.checker.check_model(lowered, full_check=True)
    assert lower(lowered) == lowered
    assert [node.name for node in lowered.graph.node] == [node.name for node in model.graph.node]
    assert [value.name for value in (*lowered.graph.input, *lowered.graph.output)] == ["image", "logits"]
    np.testing.assert_allclose(run(lowered), run(model), rtol=1e-5, atol=1e-6)


def test_lower_removes_the_constants_that_nothing_reads_any_more() -> None:
    assert [tensor.name for tensor in lower(make(SQUEEZE_EXCITE)).graph.initializer] == ["w", "v"]


def test_every_rewrite_says_what_it_is_for() -> None:
    for rewrite in (*REWRITES, *(rewrite for rewrites in TUNING.values() for rewrite in rewrites)):
        text = __import__(rewrite.__module__, fromlist=["rewrite"]).__doc__
        assert all(f"\n{word}" in text for word in ("Fault:", "Seen on:", "Issue")), rewrite.__module__


# ---------------------------------------------------------------------------------------------------------------
# Faults that the OpenCV here need not have: without the rewrite, and with it, on one that has


CONV = "logits = Conv(image, w)"
RELU6 = """
    [stem] c = Conv<kernel_shape=[3, 3]>(image, w)
    [relu6] r = Clip(c, zero, six)
    [head] logits = Conv<kernel_shape=[1, 1]>(r, v)
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("body", "opencv", "fault"),
    [
        (SQUEEZE_EXCITE, "4.6", "raised"),
        (SQUEEZE_EXCITE, "4.10", "wrong"),
        (SQUEEZE_EXCITE, "4.14", "wrong"),
        (GELU, "4.10", "died"),
        (GELU, "4.14", "died"),
        (CONV, "4.6", "raised"),
        (CONV, "4.10", "raised"),
        (RELU6, "4.6", "raised"),
    ],
)
def test_the_fault_is_there_and_is_cured(body: str, opencv: str, fault: str, tmp_path: Path) -> None:
    model = make(body, "1, 4, 4, 6" if body in (CONV, RELU6) else "1, 4, 6, 8")
    right = {"onnxruntime": "ok", "opencv-classic": "ok"}
    assert statuses(model, tmp_path, opencv) == {**right, "opencv-classic": fault}
    assert statuses(lower(model), tmp_path, opencv) == right


# ---------------------------------------------------------------------------------------------------------------
# constants


TABLE = """
    t = Conv<kernel_shape=[3, 3], pads=[1, 1, 1, 1]>(table, w)
    c = Conv<kernel_shape=[3, 3], pads=[1, 1, 1, 1]>(image, w)
    logits = Add(c, t)
"""


def test_what_does_not_depend_on_the_image_is_computed_once(tmp_path: Path) -> None:
    model = make(TABLE, table=np.linspace(-1, 1, 144, dtype=np.float32).reshape(1, 3, 6, 8))
    assert set(statuses(model, tmp_path).values()) == {"ok", "raised"}
    lowered = lower(model)
    assert ops(lowered) == ["Conv", "Add"]
    np.testing.assert_allclose(run(lowered), run(model), rtol=1e-5, atol=1e-5)
    assert statuses(lowered, tmp_path) == everywhere("ok")


# ---------------------------------------------------------------------------------------------------------------
# average_pool


def pool(ceil: int, include: int, pads: list[int], stride: int, producer: str) -> onnx.ModelProto:
    """An average over 3×3; the parser cannot infer the output's shape, so it is taken from ONNX's own inference."""
    written = (
        f"ceil_mode={ceil}, count_include_pad={include}, pads={pads}, strides=[{stride}, {stride}], kernel_shape=[3, 3]"
    )
    model = make(f"logits = AveragePool<{written}>(image)", "")
    model.graph.output[0].type.tensor_type.ClearField("shape")
    model.producer_name = producer
    return onnx.shape_inference.infer_shapes(model)


@pytest.mark.parametrize("producer", ["pytorch", ""])
@pytest.mark.parametrize(
    ("ceil", "pads", "stride"), [(0, [1] * 4, 1), (0, [1, 0, 1, 2], 2), (1, [1] * 4, 2), (1, [0] * 4, 2)]
)
@pytest.mark.parametrize("include", [0, 1])
def test_average_pool_is_right_whoever_made_the_file(
    include: int, ceil: int, pads: list[int], stride: int, producer: str, tmp_path: Path
) -> None:
    model = pool(ceil, include, pads, stride, producer)
    lowered = lower(model)
    assert lowered.producer_name == ""
    assert ops(lowered) == (["Pad", "AveragePool"] if include and any(pads) else ["AveragePool"])
    np.testing.assert_allclose(run(lowered), run(model), rtol=1e-5, atol=1e-6)
    assert statuses(lowered, tmp_path) == everywhere("ok")


@pytest.mark.parametrize(("include", "producer"), [(0, "pytorch"), (1, "")])
def test_the_classic_engine_believes_the_producer_and_not_the_attribute(
    include: int, producer: str, tmp_path: Path
) -> None:
    found = statuses(pool(0, include, [1] * 4, 2, producer), tmp_path)
    assert found.pop("opencv-classic") == "wrong"
    assert set(found.values()) == {"ok"}


@pytest.mark.skipif(OPENCV_4, reason="OpenCV 4.x has no new engine")
def test_the_new_engine_counts_what_ceil_mode_adds(tmp_path: Path) -> None:
    assert statuses(pool(1, 1, [0] * 4, 2, "pytorch"), tmp_path)["opencv-new"] == "wrong"


# ---------------------------------------------------------------------------------------------------------------
# one_pixel


def pixel(window: str, weights: np.ndarray, group: int) -> onnx.ModelProto:
    """A convolution of the mean of the image, which is one pixel."""
    body = f"p = GlobalAveragePool(image)\n [taps] logits = Conv<{window}, group={group}>(p, taps)"
    return make(body, f"1, {len(weights)}, 1, 1", taps=weights)


@pytest.mark.parametrize(
    "window",
    [
        "kernel_shape=[3, 3], pads=[1, 1, 1, 1]",
        "kernel_shape=[3, 3], pads=[1, 1, 1, 1], strides=[2, 2]",
        "kernel_shape=[3, 3], pads=[2, 0, 0, 2]",
        "kernel_shape=[3, 3], pads=[2, 2, 2, 2], dilations=[2, 2]",
    ],
)
@pytest.mark.parametrize("group", [1, 3])
def test_one_pixel_keeps_the_tap_that_meets_it(window: str, group: int, tmp_path: Path) -> None:
    model = pixel(window, WEIGHTS["w"] if group == 1 else WEIGHTS["grouped"], group)
    lowered = lower(model)
    assert attributes(lowered.graph.node[-1]) == {"kernel_shape": [1, 1], "group": group}
    np.testing.assert_allclose(run(lowered), run(model), rtol=1e-5, atol=1e-6)
    assert statuses(lowered, tmp_path) == everywhere("ok")


def test_one_pixel_leaves_larger_maps_alone() -> None:
    model = make("logits = Conv<kernel_shape=[3, 3], pads=[1, 1, 1, 1]>(image, w)")
    assert attributes(lower(model).graph.node[0]) == attributes(model.graph.node[0])
    # from one pixel to nine: every tap counts
    body = "p = GlobalAveragePool(image)\n logits = Conv<kernel_shape=[3, 3], pads=[2, 2, 2, 2]>(p, w)"
    assert attributes(lower(make(body, "1, 4, 3, 3")).graph.node[-1])["kernel_shape"] == [3, 3]


def test_one_pixel_cures_the_depthwise_convolution(tmp_path: Path) -> None:
    depthwise = RANDOM.standard_normal((3, 1, 3, 3)).astype(np.float32)
    model = pixel("kernel_shape=[3, 3], pads=[1, 1, 1, 1]", depthwise, 3)
    assert statuses(model, tmp_path)["opencv-classic"] == "wrong"
    assert statuses(lower(model), tmp_path) == everywhere("ok")


# ---------------------------------------------------------------------------------------------------------------
# relu6


HEAD = "[head] logits = Conv<kernel_shape=[1, 1]>(r, v)"


@pytest.mark.parametrize(
    "tail",
    [
        HEAD,
        "p = GlobalAveragePool(r)\n f = Flatten(p)\n logits = Gemm<transB=1>(f, fc)",
        # the same weights are read by two, one of which takes no ReLU6
        "e = Conv<kernel_shape=[1, 1]>(c, v)\n h = Conv<kernel_shape=[1, 1]>(r, v)\n logits = Add(e, h)",
        # two that read one ReLU6
        "h = Conv<kernel_shape=[1, 1]>(r, v)\n i = Conv<kernel_shape=[1, 1]>(r, v)\n logits = Add(h, i)",
    ],
)
def test_relu6_becomes_hard_sigmoid_and_the_next_layer_takes_the_six(tail: str, tmp_path: Path) -> None:
    model = make(RELU6.replace(HEAD, tail), "1, 5" if "Gemm" in tail else "1, 4, 4, 6")
    lowered = lower(model, "opencv5")
    onnx.checker.check_model(lowered, full_check=True)
    assert "Clip" not in ops(lowered) and len(ops(lowered)) == len(ops(model))
    gate = next(node for node in lowered.graph.node if node.op_type == "HardSigmoid")
    assert attributes(gate) == {"alpha": np.float32(1 / 6), "beta": 0.0}
    assert gate.name == next(node.name for node in model.graph.node if node.op_type == "Clip")
    assert run(model).std() > 0.1
    np.testing.assert_allclose(run(lowered), run(model), rtol=1e-4, atol=1e-4)
    assert statuses(lowered, tmp_path) == everywhere("ok")
    assert lower(model, "plain").graph.node[1].op_type == "Clip"


@pytest.mark.parametrize(
    ("old", "new"),
    [
        (f"[relu6] r = Clip(c, zero, six)\n    {HEAD}", "logits = Clip(c, zero, six)"),  # the output itself
        (HEAD, "h = Conv<kernel_shape=[1, 1]>(r, v)\n logits = Add(h, r)"),  # read by a layer that is not linear, too
        (HEAD, "m = ReduceMax<keepdims=1>(r)\n w2 = Mul(v, m)\n logits = Conv<kernel_shape=[1, 1]>(c, w2)"),
        ("zero, six", "minus, six"),
        ("c, zero, six", "c, zero"),
    ],
)
def test_relu6_stays_where_the_six_has_no_place_to_go(old: str, new: str) -> None:
    model = make(RELU6.replace(old, new), "1, 4, 4, 6")
    lowered = lower(model, "opencv5")
    assert ops(lowered) == ops(model)
    np.testing.assert_array_equal(run(lowered), run(model))


@pytest.mark.skipif(OPENCV_4, reason="OpenCV 4.x has no new engine")
def test_the_new_engine_fuses_hard_sigmoid_and_not_clip(tmp_path: Path) -> None:
    """Tells when OpenCV fuses Clip: the rewrite is then of no use."""

    def layers(model: onnx.ModelProto) -> tuple[int, int]:
        onnx.save(model, tmp_path / "model.onnx")
        net = cv2.dnn.readNetFromONNX(str(tmp_path / "model.onnx"), cv2.dnn.ENGINE_NEW)
        net.setInput(IMAGES[:1])
        net.forward()
        return sum(net.getLayersCount(kind) for kind in ("Clip", "HardSigmoid")), net.getLayersCount("TransformLayout")

    assert layers(lower(make(RELU6, "1, 4, 4, 6"), "plain")) == (1, 3)
    assert layers(lower(make(RELU6, "1, 4, 4, 6"), "opencv5")) == (0, 1)


# ---------------------------------------------------------------------------------------------------------------
# depthwise_5x5


def depthwise(
    window: tuple[int, int], size: tuple[int, int], stride: int, pads: list[int], bias: bool, clip: bool
) -> onnx.ModelProto:
    """A depthwise convolution of four maps of a size, with or without a bias, and ReLU6 after it."""
    top, left = size[0] - 4, size[1] - 6  # the first convolution gives 4x6 and what is padded
    more = {"taps": RANDOM.standard_normal((4, 1, *window)).astype(np.float32), "b": np.arange(4, dtype=np.float32)}
    out = [(size[i] + pads[i] + pads[i + 2] - window[i]) // stride + 1 for i in (0, 1)]
    body = f"""
        c = Conv<kernel_shape=[3, 3], pads=[{top}, {left}, 0, 0]>(image, w)
        [deep] d = Conv<group=4, kernel_shape=[{window[0]}, {window[1]}], strides=[{stride}, {stride}], pads={pads}>
            (c, taps{", b" if bias else ""})
        {"logits = Clip(d, zero, six)" if clip else "logits = Identity(d)"}
    """
    return make(body, f"1, 4, {out[0]}, {out[1]}", **more)


@settings(max_examples=60, deadline=None)
@given(
    window=st.tuples(st.integers(4, 7), st.integers(4, 7)),
    size=st.tuples(st.integers(7, 40), st.integers(7, 20)),
    stride=st.integers(1, 3),
    pads=st.lists(st.integers(0, 3), min_size=4, max_size=4),
    bias=st.booleans(),
)
def test_depthwise_by_rows_computes_the_same(
    window: tuple[int, int], size: tuple[int, int], stride: int, pads: list[int], bias: bool
) -> None:
    model = depthwise(window, size, stride, pads, bias, clip=False)
    lowered = lower(model, "opencv4")
    onnx.checker.check_model(lowered, full_check=True)
    kernels = [attributes(node)["kernel_shape"] for node in lowered.graph.node if node.op_type == "Conv"]
    assert kernels[1:] and all(kernel == [1, window[1]] for kernel in kernels[1:])
    np.testing.assert_allclose(run(lowered), run(model), rtol=1e-4, atol=1e-4)


DEPTHWISE = [  # window, map, stride, padding, bias, bands
    ((5, 5), (7, 7), 1, [2, 2, 2, 2], True, 1),
    ((5, 5), (14, 14), 2, [1, 1, 2, 2], True, 1),  # as TensorFlow pads
    ((5, 5), (29, 28), 1, [2, 2, 2, 2], True, 4),  # the last of them shorter
    ((5, 5), (56, 20), 2, [2, 2, 2, 2], False, 4),
    ((7, 7), (14, 14), 1, [3, 3, 3, 3], False, 1),
]


@pytest.mark.parametrize(("window", "size", "stride", "pads", "bias", "bands"), DEPTHWISE)
def test_depthwise_by_rows_is_right_in_every_engine(
    window: tuple[int, int], size: tuple[int, int], stride: int, pads: list[int], bias: bool, bands: int, tmp_path: Path
) -> None:
    lowered = lower(depthwise(window, size, stride, pads, bias, clip=True), "opencv4")
    assert "deep" in [node.name for node in lowered.graph.node]
    assert ops(lowered).count("Conv") == 1 + bands
    assert statuses(lowered, tmp_path) == everywhere("ok")


@pytest.mark.slow
@pytest.mark.parametrize("opencv", ["4.6", "4.10", "4.14"])
def test_depthwise_by_rows_is_right_in_opencv_4(opencv: str, tmp_path: Path) -> None:
    """OpenCV folds the nodes that make the weights; where it did not, the convolution would not load."""
    for window, size, stride, pads, bias, _ in DEPTHWISE:
        lowered = lower(depthwise(window, size, stride, pads, bias, clip=False), "opencv4")
        assert statuses(lowered, tmp_path, opencv) == {"onnxruntime": "ok", "opencv-classic": "ok"}


def test_depthwise_by_rows_is_for_the_classic_engines_cpu_code_only() -> None:
    model = depthwise((5, 5), (14, 14), 1, [2, 2, 2, 2], bias=True, clip=True)
    assert ops(lower(model, "plain")) == ["Conv", "Conv", "Clip"]
    assert ops(lower(model, "opencv5")).count("Conv") == 2 and "Reshape" not in ops(lower(model, "opencv5"))
    relu6 = make(RELU6, "1, 4, 4, 6")
    for form, activation in (("opencv4", "Clip"), ("opencv4.6", "HardSigmoid")):  # 4.6 cannot read Clip
        assert "Reshape" in ops(lower(model, form))
        assert {"Clip", "HardSigmoid"} & set(ops(lower(relu6, form))) == {activation}


@pytest.mark.parametrize(
    ("window", "attribute", "channels"),
    [
        ((3, 3), "group=4", 1),  # the engine has fast code for it: by rows it takes half as long again
        ((5, 1), "group=4", 1),
        ((5, 5), "group=4, dilations=[2, 2]", 1),
        ((5, 5), "group=2", 2),  # not depthwise
        ((5, 5), "group=1", 4),
        ((5, 5), 'group=4, auto_pad="SAME_UPPER"', 1),
    ],
)
def test_depthwise_by_rows_leaves_others_alone(window: tuple[int, int], attribute: str, channels: int) -> None:
    taps = RANDOM.standard_normal((4, channels, *window)).astype(np.float32)
    body = f"""
        c = Conv<kernel_shape=[3, 3], pads=[9, 9, 9, 9]>(image, w)
        logits = Conv<kernel_shape=[{window[0]}, {window[1]}], {attribute}>(c, taps)
    """
    model = make(body, "", taps=taps)
    model.graph.output[0].type.tensor_type.ClearField("shape")
    model = onnx.shape_inference.infer_shapes(model)
    assert ops(lower(model, "opencv4")) == ["Conv", "Conv"]


def test_depthwise_by_rows_keeps_the_file_small() -> None:
    taps = RANDOM.standard_normal((256, 1, 5, 5)).astype(np.float32)
    body = """
        c = Conv<kernel_shape=[1, 1], pads=[4, 3, 4, 3]>(image, wider)
        d = Conv<group=256, kernel_shape=[5, 5], pads=[2, 2, 2, 2]>(c, taps)
        logits = Conv<group=256, kernel_shape=[5, 5], pads=[2, 2, 2, 2]>(d, taps)
    """
    model = make(body, "1, 256, 14, 14", taps=taps, wider=np.ones((256, 3, 1, 1), np.float32))
    # a row of zeros for five of taps, and 4 kB of nodes; the wide weights themselves are 2 MB
    assert lower(model, "opencv4").ByteSize() < lower(model).ByteSize() + 2 * (taps.nbytes * 1.2 + 4000)


# ---------------------------------------------------------------------------------------------------------------
# hard_sigmoid


@pytest.mark.parametrize(
    ("written", "kept"),
    [
        ("alpha=0.1666666716337204, beta=0.5", {"alpha": np.float32(1 / 6)}),
        ("beta=0.5", {}),
        ("alpha=0.25, beta=0.4", {"alpha": 0.25, "beta": np.float32(0.4)}),
        ("alpha=0.25", {"alpha": 0.25}),
    ],
)
def test_hard_sigmoid_drops_beta_where_it_is_the_default(written: str, kept: dict[str, float]) -> None:
    model = make(f"logits = HardSigmoid<{written}>(image)", "1, 3, 6, 8")
    lowered = lower(model)
    assert attributes(lowered.graph.node[0]) == kept
    np.testing.assert_array_equal(run(lowered), run(model))


def test_hard_sigmoid_cures_squeeze_and_excitation(tmp_path: Path) -> None:
    # GlobalAveragePool, so that nothing but HardSigmoid is left to rewrite.
    body = SQUEEZE_EXCITE.replace("ReduceMean<keepdims=1>(c, axes)", "GlobalAveragePool(c)")
    model = make(body)
    assert statuses(model, tmp_path) == everywhere("wrong")
    assert statuses(lower(model), tmp_path) == everywhere("ok")


def test_hard_sigmoid_keeps_hard_swish_right(tmp_path: Path) -> None:
    body = "h = HardSigmoid<alpha=0.1666666716337204, beta=0.5>(image)\n logits = Mul(image, h)"
    assert statuses(lower(make(body, "1, 3, 6, 8")), tmp_path) == everywhere("ok")


# ---------------------------------------------------------------------------------------------------------------
# gelu


def test_gelu_halves_last_and_computes_the_same_bits() -> None:
    model = make(GELU)
    lowered = lower(model)
    assert [list(node.input) for node in lowered.graph.node[-2:]] == [["c", "a"], ["h", "half"]]
    np.testing.assert_array_equal(run(lowered), run(model))


@pytest.mark.parametrize("swapped", [("half, a", "a, half"), ("c, h", "h, c")])
def test_gelu_takes_the_factors_in_any_order(swapped: tuple[str, str], tmp_path: Path) -> None:
    model = make(GELU.replace(*swapped))
    lowered = lower(model)
    np.testing.assert_array_equal(run(lowered), run(model))
    assert statuses(lowered, tmp_path) == everywhere("ok")


def test_gelu_cures_the_death_of_the_process(tmp_path: Path) -> None:
    model = make(GELU)
    assert statuses(model, tmp_path) == everywhere("died")
    assert statuses(lower(model), tmp_path) == everywhere("ok")


@pytest.mark.parametrize(
    "body",
    [
        GELU.replace("half, a", "third, a"),
        GELU.replace("logits = Mul(c, h)", "p = Mul(c, h)\n logits = Add(p, h)"),  # the inner product is read twice
        GELU.replace("Erf(d)", "Tanh(d)"),
        "t = Mul(image, half)\n logits = Mul(image, t)",
    ],
)
def test_gelu_leaves_other_products_alone(body: str) -> None:
    third = np.array(1 / 3, np.float32)
    model = make(body, "1, 3, 6, 8" if "stem" not in body else "1, 4, 6, 8", third=third)
    assert [list(node.input) for node in lower(model).graph.node] == [list(node.input) for node in model.graph.node]


# ---------------------------------------------------------------------------------------------------------------
# global_average_pool


@settings(max_examples=60, deadline=None)
@given(
    axes=st.lists(st.integers(-4, 3), max_size=4, unique_by=lambda axis: axis % 4),
    keepdims=st.integers(0, 1),
    opset=st.sampled_from([17, 18]),
)
def test_pooling_replaces_the_mean_over_height_and_width_only(axes: list[int], keepdims: int, opset: int) -> None:
    shape = [(1, 3, 6, 8)[i] if i not in {axis % 4 for axis in axes} else 1 for i in range(4)] if axes else [1] * 4
    if not keepdims:
        shape = [size for i, size in enumerate(shape) if axes and i not in {axis % 4 for axis in axes}]
    written = f", axes={axes}" if opset == 17 and axes else ""
    inputs = "image, over" if opset == 18 and axes else "image"
    body = f"logits = ReduceMean<keepdims={keepdims}{written}>({inputs})"
    model = make(body, ", ".join(map(str, shape)), opset=opset, over=np.array(axes, np.int64))
    if not shape:
        model.graph.output[0].type.tensor_type.shape.Clear()  # the parser has no notation for a scalar
    lowered = lower(model)
    pooled = ["AveragePool"] if keepdims else ["AveragePool", "Flatten"]
    assert ops(lowered) == (pooled if {axis % 4 for axis in axes} == {2, 3} else ["ReduceMean"])
    if ops(lowered) == pooled:
        assert attributes(lowered.graph.node[0]) == {"kernel_shape": [6, 8]}
    if shape:  # run() joins batches
        np.testing.assert_allclose(run(lowered), run(model), rtol=1e-5, atol=1e-6)


def test_pooling_needs_four_dimensions_and_constant_axes() -> None:
    body = "r = Reshape(image, to)\n logits = ReduceMean(r, axes)"
    assert ops(lower(make(body, "1, 3, 1, 1, 1", to=np.array([1, 3, 6, 8, 1])))) == ["Reshape", "ReduceMean"]
    body = "sizes = Shape(image)\n over = Sub(sizes, less)\n logits = ReduceMean(image, over)"
    assert ops(lower(make(body, "1, 3, 1, 1", less=np.array([1, 3, 4, 5]))))[-1] == "ReduceMean"


@pytest.mark.skipif(OPENCV_4, reason="OpenCV 4.x has no new engine")
@pytest.mark.parametrize("pool", ["GlobalAveragePool(c)", "ReduceMean<keepdims=1>(c, axes)"])
def test_pooling_keeps_the_new_engines_layout(pool: str, tmp_path: Path) -> None:
    """Tells when OpenCV pools in its blocked layout: the window is then of no use."""
    body = SQUEEZE_EXCITE.replace("ReduceMean<keepdims=1>(c, axes)", pool).replace(", beta=0.5", "")

    def changes_of_layout(model: onnx.ModelProto) -> int:
        onnx.save(model, tmp_path / "model.onnx")
        net = cv2.dnn.readNetFromONNX(str(tmp_path / "model.onnx"), cv2.dnn.ENGINE_NEW)
        net.setInput(IMAGES[:1])
        net.forward()
        return int(net.getLayersCount("TransformLayout"))

    assert changes_of_layout(make(body)) > changes_of_layout(lower(make(body)))


@pytest.mark.parametrize("keepdims", [0, 1])
def test_pooling_is_right_in_every_engine(keepdims: int, tmp_path: Path) -> None:
    body = f"c = Conv<kernel_shape=[3, 3]>(image, w)\n logits = ReduceMean<keepdims={keepdims}>(c, axes)"
    assert statuses(lower(make(body, "1, 4, 1, 1" if keepdims else "1, 4")), tmp_path) == everywhere("ok")


# ---------------------------------------------------------------------------------------------------------------
# kernel_shape


@pytest.mark.parametrize(
    ("body", "shape", "kernel"),
    [
        ("logits = Conv(image, w)", "1, 4, 4, 6", [3, 3]),
        ("logits = Conv(image, wide)", "1, 4, 4, 4", [3, 5]),
        ("logits = Conv<group=3>(image, grouped)", "1, 6, 4, 6", [3, 3]),
        ("logits = ConvTranspose(image, up)", "1, 4, 7, 9", [2, 2]),
        (QUANTIZED, "1, 4, 6, 8", [3, 3]),
        ("k = Identity(w)\n logits = Conv(image, k)", "1, 4, 4, 6", [3, 3]),  # known by shape inference only
        ("logits = Conv<kernel_shape=[3, 3]>(image, w)", "1, 4, 4, 6", [3, 3]),
    ],
)
def test_kernel_shape_is_written(body: str, shape: str, kernel: list[int]) -> None:
    model = make(body, shape)
    lowered = lower(model)
    written = [attributes(node)["kernel_shape"] for node in lowered.graph.node if "Conv" in node.op_type]
    assert written == [kernel]
    np.testing.assert_array_equal(run(lowered), run(model))


def test_kernel_shape_cures_the_quantized_convolution(tmp_path: Path) -> None:
    found = statuses(make(QUANTIZED), tmp_path)
    expected = {"opencv-classic": "raised"} if OPENCV_4 else {"opencv-new": "ok", "opencv-classic": "died"}
    assert found == {"onnxruntime": "ok", **expected}
    assert statuses(lower(make(QUANTIZED)), tmp_path) == everywhere("ok")


# ---------------------------------------------------------------------------------------------------------------
# static_shapes


def test_a_missing_output_shape_is_declared(tmp_path: Path) -> None:
    model = make("logits = Conv<kernel_shape=[3, 3]>(image, w)", "")
    model.graph.output[0].type.tensor_type.ClearField("shape")
    assert statuses(model, tmp_path) == everywhere("raised")
    lowered = lower(model)
    assert [size.dim_value for size in lowered.graph.output[0].type.tensor_type.shape.dim] == [1, 4, 4, 6]
    assert statuses(lowered, tmp_path) == everywhere("ok")


def test_a_size_that_is_not_fixed_is_refused() -> None:
    model = make("logits = Relu(image)", "N, 3, 6, 8")
    model.graph.input[0].type.tensor_type.shape.dim[0].dim_param = "N"
    with pytest.raises(ArtifactError, match=r"input 'image' has shape \[N,3,6,8\]; OpenCV needs fixed sizes\. Export"):
        lower(model)


def test_an_output_whose_shape_depends_on_values_is_refused() -> None:
    model = make("logits = Compress<axis=3>(image, keep)", "")
    model.graph.input.append(onnx.helper.make_tensor_value_info("keep", onnx.TensorProto.BOOL, [8]))
    model.graph.output[0].type.tensor_type.ClearField("shape")
    with pytest.raises(ArtifactError, match="output 'logits' has "):
        lower(model)
