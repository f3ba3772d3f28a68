"""The verdicts, each from a model that really does it: right, silently wrong, raising, deadly, too slow."""

from __future__ import annotations

import json
import sys
import venv
from dataclasses import replace
from pathlib import Path
from typing import Any

import bundles
import cv2
import numpy as np
import onnx
import onnx.parser
import onnxruntime
import pytest

from edgekit import parity, runner
from edgekit.errors import ParityError, SetupError
from edgekit.parity import OpenCV, Verdict, compare, compare_files, describe, find_opencv, is_proved, require

RANDOM = np.random.default_rng(0)
IMAGES = RANDOM.standard_normal((3, 3, 6, 6)).astype(np.float32)
WEIGHTS = {
    "w": RANDOM.standard_normal((4, 3, 3, 3)).astype(np.float32),
    "v": RANDOM.standard_normal((4, 4, 1, 1)).astype(np.float32),
    "length": np.array([2], np.int64),
    "sqrt2": np.array(2**0.5, np.float32),
    "one": np.array(1, np.float32),
    "half": np.array(0.5, np.float32),
}
OPENCV = [f"opencv-{engine}" for engine in runner.engines()]
STEM = "[stem] c = Conv<pads=[1, 1, 1, 1], kernel_shape=[3, 3]>(image, w)\n"
RIGHT = STEM + "[relu] r = Relu(c)\n [pool] p = GlobalAveragePool(r)\n [head] logits = Conv<kernel_shape=[1, 1]>(p, v)"
# OpenCV takes c * HardSigmoid(f) for HardSwish(f): silently wrong (see lowering/hard_sigmoid.py).
WRONG = """
    [pool] p = GlobalAveragePool(c)
    [fc] f = Conv<kernel_shape=[1, 1]>(p, v)
    [gate] g = HardSigmoid<alpha=0.1666666716337204, beta=0.5>(f)
    [scale] s = Mul(c, g)
"""
# OpenCV takes c for the constant 0.5 of GELU: the process dies (see lowering/gelu.py).
DEADLY = """
    d = Div(c, sqrt2)
    e = Erf(d)
    a = Add(e, one)
    h = Mul(half, a)
    [gelu] g = Mul(c, h)
"""


def save(folder: Path, body: str, shape: str = "1, 4, 1, 1") -> Path:
    """A model from image (1, 3, 6, 6) to logits of a shape, with those of WEIGHTS that it names."""
    header = f'<ir_version: 8, opset_import: ["": 18]> graph (float[1, 3, 6, 6] image) => (float[{shape}] logits)'
    model = onnx.parser.parse_model(f"{header} {{ {body} }}")
    used = {name for node in model.graph.node for name in node.input}
    tensors = [onnx.numpy_helper.from_array(array, name) for name, array in WEIGHTS.items() if name in used]
    model.graph.initializer.extend(tensors)
    onnx.save(model, folder / "model.onnx")
    return folder / "model.onnx"


def reference(model: Path) -> dict[str, np.ndarray]:
    """ONNX Runtime's logits for IMAGES."""
    session = onnxruntime.InferenceSession(model, providers=["CPUExecutionProvider"])
    return {"logits": np.concatenate([session.run(["logits"], {"image": image[None]})[0] for image in IMAGES])}


def by_engine(verdicts: tuple[Verdict, ...]) -> dict[str, Verdict]:
    return {verdict.engine: verdict for verdict in verdicts}


# ---------------------------------------------------------------------------------------------------------------
# The statuses


def test_a_right_model_is_ok_in_every_engine(tmp_path: Path) -> None:
    model = save(tmp_path, RIGHT)
    verdicts = compare(model, IMAGES, reference(model), tolerance=1e-5)
    versions = {"onnxruntime": onnxruntime.__version__, **dict.fromkeys(OPENCV, cv2.__version__)}
    assert {v.engine: v.version for v in verdicts} == versions
    for verdict in verdicts:
        assert verdict == Verdict(verdict.engine, verdict.version, "ok", verdict.relative_error, "", "")
        assert verdict.relative_error is not None
        assert 0 <= verdict.relative_error <= 1e-6
    require(verdicts)


def test_the_error_is_the_largest_share_of_any_sample_and_output(tmp_path: Path) -> None:
    model = save(tmp_path, STEM + "[big] logits = Identity(c)", "1, 4, 6, 6")
    right = reference(model)["logits"]
    # Sample 0 is off by 1 % of its own largest value, sample 2 by 5 % of its own, which is smaller in absolute terms.
    images, shifted = IMAGES.copy(), right.copy()
    images[2] /= 100
    shifted[2] /= 100
    for sample, share in ((0, 0.01), (2, 0.05)):
        largest = np.abs(shifted[sample]).max()
        at = np.unravel_index(np.abs(shifted[sample]).argmin(), shifted[sample].shape)
        shifted[sample][at] += share * largest
    for verdict in compare(model, images, {"logits": shifted}, tolerance=0.06):
        assert verdict.status == "ok"
        assert verdict.relative_error == pytest.approx(0.05, rel=1e-3)
    wrong = compare(model, images, {"logits": shifted}, tolerance=0.04)
    for verdict in wrong:
        message = "output 'logits' differs by 0.05 of its largest value; at most 0.04 is allowed"
        assert (verdict.status, verdict.message) == ("wrong", message)
    # Here every engine is right and the "source" is not: no node is to blame.
    differences = {v.engine: v.first_difference for v in wrong}
    agreement = "not located: output by output, OpenCV does what ONNX Runtime does"
    assert differences == {"onnxruntime": "", **dict.fromkeys(OPENCV, agreement)}


@pytest.mark.parametrize(
    ("name", "shape", "value", "message"),
    [
        ("scores", (3, 4, 1, 1), 0.0, "output 'scores' is missing"),
        ("logits", (3, 4), 0.0, "output 'logits' has shape (3, 4, 1, 1), expected (3, 4)"),
        ("logits", (3, 4, 1, 1), np.nan, "output 'logits' holds NaN or infinite values in the source itself"),
    ],
)
def test_what_cannot_be_measured_is_wrong(
    name: str, shape: tuple[int, ...], value: float, message: str, tmp_path: Path
) -> None:
    model = save(tmp_path, RIGHT)
    for verdict in compare(model, IMAGES, {name: np.full(shape, value, np.float32)}, tolerance=0.05):
        assert (verdict.status, verdict.relative_error, verdict.message) == ("wrong", None, message)


def test_nan_is_wrong(tmp_path: Path) -> None:
    model = save(tmp_path, STEM + "[log] l = Log(c)\n logits = GlobalAveragePool(l)")
    for verdict in compare(model, IMAGES, {"logits": np.ones((3, 4, 1, 1), np.float32)}, tolerance=0.05):
        assert (verdict.status, verdict.message) == ("wrong", "output 'logits' holds NaN or infinite values")


def test_silently_wrong_names_the_node(tmp_path: Path) -> None:
    model = save(tmp_path, STEM + WRONG + "[tail] logits = GlobalAveragePool(s)")
    verdicts = by_engine(compare(model, IMAGES, reference(model), tolerance=1e-4))
    assert verdicts["onnxruntime"].status == "ok"
    for engine in OPENCV:
        assert verdicts[engine].status == "wrong"
        assert verdicts[engine].first_difference == (
            "node 5 of 6 'scale' (Conv, HardSigmoid → Mul), output 's' has shape (1, 4, 1, 1), expected (1, 4, 6, 6)"
        )


@pytest.mark.slow
def test_the_first_bad_node_is_found_on_a_branch_beside_many_good_ones(tmp_path: Path) -> None:
    branch = "".join(f"b{i + 1} = Sigmoid(b{i})\n" for i in range(5)).replace("(b0)", "(c)")
    model = save(tmp_path, STEM + WRONG + branch + "[sum] t = Add(s, b5)\n [tail] logits = GlobalAveragePool(t)")
    for engine, verdict in by_engine(compare(model, IMAGES, reference(model), tolerance=1e-4)).items():
        if engine != "onnxruntime":
            assert verdict.first_difference.startswith("node 5 of 12 'scale' (Conv, HardSigmoid → Mul), output 's' has")


def test_a_dead_process_is_a_verdict_with_its_signal_and_node(tmp_path: Path) -> None:
    model = save(tmp_path, STEM + DEADLY + "[tail] logits = GlobalAveragePool(g)")
    verdicts = by_engine(compare(model, IMAGES, reference(model), tolerance=1e-4))
    assert verdicts["onnxruntime"].status == "ok"
    for engine in OPENCV:
        assert verdicts[engine] == Verdict(
            engine,
            cv2.__version__,
            "died",
            None,
            "the process ended with SIGSEGV",
            "node 6 of 7 'gelu' (Conv, Mul → Mul), output 'g'",
        )


def test_an_operator_that_opencv_lacks_raises(tmp_path: Path) -> None:
    reverse = "[reverse] b = ReverseSequence<batch_axis=0, time_axis=1>(image, length)\n"
    model = save(tmp_path, reverse + "[stem] logits = Conv<kernel_shape=[3, 3]>(b, w)", "1, 4, 4, 4")
    verdicts = by_engine(compare(model, IMAGES, reference(model), tolerance=1e-4))
    assert verdicts["onnxruntime"].status == "ok"
    for engine in OPENCV:
        assert (verdicts[engine].status, verdicts[engine].relative_error) == ("raised", None)
        assert verdicts[engine].message.startswith(f"OpenCV {cv2.__version__} cannot ")
        assert str(tmp_path) not in verdicts[engine].message
        assert verdicts[engine].first_difference == "node 1 of 2 'reverse' (ReverseSequence), output 'b'"


def test_a_file_that_no_engine_reads_raises_everywhere(tmp_path: Path) -> None:
    model = tmp_path / "model.onnx"
    model.write_bytes(b"not a model")
    for verdict in compare(model, IMAGES, {"logits": np.zeros((3, 4), np.float32)}, tolerance=1e-4):
        assert verdict.status == "raised"
        assert verdict.message
        assert str(tmp_path) not in verdict.message
        assert verdict.first_difference.startswith("not located: ") == (verdict.engine != "onnxruntime")


def test_no_answer_in_time(tmp_path: Path) -> None:
    model = save(tmp_path, RIGHT)
    verdicts = by_engine(compare(model, IMAGES, reference(model), tolerance=1e-4, timeout_s=0.02))
    assert verdicts["onnxruntime"].status == "ok"
    for engine in OPENCV:
        assert verdicts[engine].status == "timed out"
        assert verdicts[engine].message == "no answer within 0.02 s"
        assert verdicts[engine].first_difference


# ---------------------------------------------------------------------------------------------------------------
# The child process


def test_the_child_sees_neither_the_users_variables_nor_the_package(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "cv2.py").write_text("raise ImportError('the wrong cv2')")
    (tmp_path / "numpy.py").write_text("raise ImportError('the wrong numpy')")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    model = save(tmp_path, RIGHT)
    require(compare(model.relative_to(tmp_path), IMAGES, reference(model), tolerance=1e-5))


def test_find_opencv() -> None:
    assert find_opencv() == OpenCV(Path(sys.executable), cv2.__version__, runner.engines())
    assert find_opencv(Path(sys.executable)) == find_opencv()


def test_an_interpreter_without_opencv(tmp_path: Path) -> None:
    venv.create(tmp_path / "bare", with_pip=False)
    python = tmp_path / "bare" / "bin" / "python"
    with pytest.raises(SetupError, match=r"no usable OpenCV in .*ModuleNotFoundError: No module named '.*Install"):
        find_opencv(python)


def test_an_interpreter_that_is_none(tmp_path: Path) -> None:
    with pytest.raises(SetupError, match=r"cannot ask .*missing for its OpenCV: .*Is it a Python interpreter\?"):
        find_opencv(tmp_path / "missing")


@pytest.fixture
def stand_in(tmp_path: Path) -> Path:
    """An "interpreter" that claims a new engine, and whose `forward` does what answer.sh says.

    No OpenCV known here falls back, or garbles its answer; the next one may.
    """
    python = tmp_path / "python"
    claim = json.dumps(["9.9.9", ["new"]])
    python.write_text(f"#!/bin/sh\nif [ \"$2\" = -c ]; then echo '{claim}'; else . {tmp_path}/answer.sh; fi\n")
    python.chmod(0o755)
    return python


@pytest.mark.parametrize(
    ("script", "status", "message"),
    [
        (
            f"shift 2; {sys.executable} -I {runner.__file__} $(echo $* | sed 's/--engine new/--engine classic/')",
            "raised",
            "OpenCV ran its classic engine, though new was asked for",
        ),
        ("echo hello", "raised", "the runner gave no answer that can be read: 'hello'"),
        ("true", "raised", "the runner gave no answer that can be read: ''"),
        (
            "echo '[ERROR] log' >&2; echo 'run.py: the reason' >&2; echo '[WARN] log' >&2; exit 2",
            "raised",
            "the reason",
        ),
        ("echo 'Traceback' >&2; echo 'KeyError: 1' >&2; exit 1", "raised", "KeyError: 1"),
        ("kill -ABRT $$", "died", "the process ended with SIGABRT"),
        ("exit 137", "died", "the process ended with exit code 0x89"),
    ],
)
def test_what_a_child_may_answer(script: str, status: str, message: str, stand_in: Path, tmp_path: Path) -> None:
    (tmp_path / "answer.sh").write_text(script)
    model = save(tmp_path, RIGHT)
    _, verdict = compare(model, IMAGES, reference(model), tolerance=1e-4, python=stand_in)
    assert replace(verdict, first_difference="") == Verdict("opencv-new", "9.9.9", status, None, message, "")
    assert verdict.first_difference


def test_a_search_that_meets_something_else_says_so(stand_in: Path, tmp_path: Path) -> None:
    # The model dies late; its parts, which get an eighth of the time, run out of that first.
    (tmp_path / "answer.sh").write_text("sleep 0.4; kill -ABRT $$")
    model = save(tmp_path, RIGHT)
    _, verdict = compare(model, IMAGES, reference(model), tolerance=1e-4, timeout_s=1.6, python=stand_in)
    assert verdict.status == "died"
    assert verdict.first_difference == "not located: the search met something else: timed out, no answer within 0.2 s"


# ---------------------------------------------------------------------------------------------------------------
# Words

OK = Verdict("opencv-new", "5.0.0", "ok", 1e-7, "", "")
BAD = Verdict(
    "opencv-classic", "4.14.0", "wrong", 0.5, "output 'logits' differs", "node 3 of 9 'mul' (Mul), output 'y'"
)
DEAD = Verdict("onnxruntime", "1.22.0", "raised", None, "no kernel", "")


def test_require_names_every_failure_and_what_to_do() -> None:
    require([OK, replace(DEAD, status="ok")])
    with pytest.raises(ParityError) as caught:
        require([OK, BAD, DEAD])
    assert caught.value.exit_code == 1
    assert str(caught.value) == (
        "the converted model does not compute what was trained: "
        "OpenCV 4.14.0, classic engine: wrong, output 'logits' differs "
        "(first difference: node 3 of 9 'mul' (Mul), output 'y'); "
        "ONNX Runtime 1.22.0: raised, no kernel. "
        "Choose another backbone (`edgekit backbones`), or report it with these figures"
    )


def test_one_right_engine_is_enough_beside_onnx_runtime() -> None:
    ort = replace(DEAD, status="ok")
    require([ort, BAD, OK])
    for verdicts in ([ort], [OK], [OK, BAD], [ort, BAD], [DEAD, OK]):
        assert not is_proved(verdicts)
        with pytest.raises(ParityError):
            require(verdicts)


# ---------------------------------------------------------------------------------------------------------------
# From image files


@pytest.fixture
def from_files(tmp_path: Path) -> dict[str, Any]:
    """The arguments of compare_files, for a small network and four photos."""
    folder = bundles.write_bundle(tmp_path)
    rows, outputs = bundles.read_expected(folder)
    (tmp_path / "spec.json").write_text(json.dumps(bundles.SPEC.to_dict()), encoding="utf-8")
    return {
        "model": folder / "model.onnx",
        "spec": tmp_path / "spec.json",
        "images": [folder / "check" / row["file"] for row in rows],
        "pixels_sha256": [row["pixels_sha256"] for row in rows],
        "expected": outputs,
        "tolerance": 1e-4,
        "tolerance_other_pixels": 0.05,
    }


HERE = [Verdict(engine, cv2.__version__, "ok", 1e-7, "", "") for engine in OPENCV]


def test_from_files_the_same_outputs(from_files: dict[str, Any]) -> None:
    ort, broken = replace(DEAD, status="ok"), replace(HERE[0], status="died")
    first, *proved, last = compare_files([ort, *HERE, broken], **from_files)
    assert (first, last) == (ort, broken), "what is no engine of OpenCV, or failed already, is left alone"
    for before, verdict in zip(HERE, proved, strict=True):
        assert verdict.end_to_end_error is not None and verdict.best_ms is not None
        assert 0 <= verdict.end_to_end_error < 1e-5 and 0 < verdict.best_ms < 1000
        assert replace(verdict, end_to_end_error=None, best_ms=None) == before


@pytest.mark.parametrize(("same_pixels", "status"), [(True, "wrong"), (False, "ok")])
def test_other_pixels_have_their_own_tolerance(from_files: dict[str, Any], same_pixels: bool, status: str) -> None:
    logits = from_files["expected"]["logits"]
    logits[2, 0] += 0.01 * np.abs(logits[2]).max()
    if not same_pixels:
        from_files["pixels_sha256"][2] = "0" * 64
    (verdict,) = compare_files(HERE[:1], **from_files)
    assert verdict.status == status
    assert verdict.end_to_end_error == pytest.approx(0.01, rel=0.02)
    if status == "wrong":
        name = from_files["images"][2].name
        assert verdict.message == f"from {name}, the same pixels: differs by 0.01; at most 0.0001 is allowed"


def test_an_image_that_cannot_be_read_there(from_files: dict[str, Any]) -> None:
    from_files["images"][1].write_bytes(b"no image")
    (verdict,) = compare_files(HERE[:1], **from_files)
    assert (verdict.status, verdict.message) == ("raised", "from image files: not an image that OpenCV can decode")


def test_describe() -> None:
    assert [describe(OK), describe(DEAD)] == [
        "OpenCV 5.0.0, new engine: ok",
        "ONNX Runtime 1.22.0: raised, no kernel",
    ]


FLOAT32 = {"y": np.array([[1.0, -2.0], [4.0, 0.0]], np.float32)}
INT8 = {"y": np.array([[1.0, -1.8], [4.2, 0.0]], np.float32)}  # off by 0.1 and 0.05 of the row's largest; rms 0.141


def test_int8_is_allowed_twice_its_own_error_on_an_image() -> None:
    assert parity.int8_tolerance(INT8, FLOAT32) == pytest.approx(0.2)
    assert parity.int8_tolerance(FLOAT32, FLOAT32) == 0.01


@pytest.mark.parametrize(
    ("added", "message"),
    [
        (0.0, ""),
        (0.28, ""),  # twice the error is 0.2828
        (0.29, "output 'y' differs from ONNX Runtime's by 2.1 times int8's own error; at most 2 are allowed"),
        (np.nan, "output 'y' holds NaN or infinite values"),
    ],
)
def test_an_engine_may_round_otherwise_and_no_more(added: float, message: str) -> None:
    assert parity.int8_fault({"y": INT8["y"] + np.float32(added)}, INT8, FLOAT32) == message


def test_int8_outputs_that_are_missing_or_of_another_shape() -> None:
    assert parity.int8_fault({}, INT8, FLOAT32) == "output 'y' is missing"
    assert "has shape (1, 2), expected (2, 2)" in parity.int8_fault({"y": INT8["y"][:1]}, INT8, FLOAT32)
    # where int8 loses nothing at all, a hundredth of the outputs is allowed
    assert parity.int8_fault({"y": FLOAT32["y"] + np.float32(0.02)}, FLOAT32, FLOAT32) == ""
    assert parity.int8_fault({"y": FLOAT32["y"] + np.float32(0.03)}, FLOAT32, FLOAT32) != ""
