"""Verdicts on small real networks, some of which OpenCV gets wrong or dies of."""

import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import onnx
import onnxruntime
import pytest
from graphs import computed, network, random, saved

from edgekit import runner
from edgekit.errors import ParityError, SetupError
from edgekit.lowering import lower
from edgekit.parity import OpenCV, Status, Verdict, compare, describe, find_opencv, require

BLOBS = random(3, 3, 8, 8)
ENGINES = ("onnxruntime", *(f"opencv-{engine}" for engine in runner.engines()))
ON_5_CLASSIC = pytest.mark.skipif(
    runner.opencv_version()[0] != 5, reason="what OpenCV 5.0's classic engine does is asked"
)

NET = network(
    """(float[1,3,8,8] image) => (float[1,4,8,8] features, float[1,4] logits) {
        [first] a = Conv <kernel_shape = [3, 3], pads = [1, 1, 1, 1]> (image, weight)
        [second] features = Relu (a)
        [third] p = GlobalAveragePool (features)
        [fourth] logits = Flatten (p)
    }""",
    weight=random(4, 3, 3, 3, seed=1),
)
GATE = network(  # OpenCV takes g · x for HardSwish(s): see lowering/hard_sigmoid.py
    """(float[1,3,8,8] image) => (float[1,4] logits) {
        x = Conv <kernel_shape = [3, 3], pads = [1, 1, 1, 1]> (image, weight)
        s = Conv <kernel_shape = [3, 3], pads = [1, 1, 1, 1]> (image, other)
        g = HardSigmoid <alpha = 0.16666667, beta = 0.5> (s)
        [times] m = Mul (x, g)
        r = Relu (m)
        p = GlobalAveragePool (r)
        logits = Flatten (p)
    }""",
    weight=random(4, 3, 3, 3, seed=1),
    other=random(4, 3, 3, 3, seed=2),
)
DEADLY = network(  # a quantized convolution without kernel_shape: see lowering/kernel_shape.py
    """(float[1,3,8,8] image) => (float[1,4,8,8] y) {
        q = QuantizeLinear (image, scale, zero)
        [deadly] c = QLinearConv <pads = [1, 1, 1, 1]> (q, scale, zero, weight, scale, zero, scale, zero)
        y = DequantizeLinear (c, scale, zero)
    }""",
    scale=np.array(0.05, np.float32),
    zero=np.array(0, np.int8),
    weight=np.ones((4, 3, 3, 3), np.int8),
)


def judged(
    model: onnx.ModelProto, folder: Path, expected: dict[str, np.ndarray] | None = None, **options: Any
) -> dict[str, Verdict]:
    """compare() with what ONNX Runtime computes, or else `expected`; by engine."""
    expected = computed(model, BLOBS) if expected is None else expected
    verdicts = compare(saved(model, folder), BLOBS, expected, **{"tolerance": 1e-4, **options})
    assert tuple(verdict.engine for verdict in verdicts) == ENGINES
    return {verdict.engine: verdict for verdict in verdicts}


def interpreter(folder: Path, on_forward: str) -> Path:
    """This interpreter, but for what it does in place of running a model (a line of sh)."""
    path = folder / "python"
    path.write_text(f'#!/bin/sh\ncase "$*" in *" forward "*) {on_forward};; esac\nexec "{sys.executable}" "$@"\n')
    path.chmod(0o755)
    return path


# ---------------------------------------------------------------------------------------------------------------
# Agreement


def test_a_network_that_all_engines_compute(tmp_path: Path) -> None:
    verdicts = judged(NET, tmp_path)
    versions = {"onnxruntime": onnxruntime.__version__}
    for engine, verdict in verdicts.items():
        error = verdict.relative_error
        assert verdict == Verdict(engine, versions.get(engine, cv2.__version__), "ok", error, "", "")
        assert error is not None and 0 <= error < 1e-5
    require(verdicts.values())  # raises nothing


def test_the_difference_is_a_share_of_the_largest_value_of_the_worst_sample(tmp_path: Path) -> None:
    expected = computed(NET, BLOBS)
    expected["logits"] = expected["logits"].copy()
    expected["logits"][1, expected["logits"][1].argmax()] *= 1.25  # 0.25 / 1.25 of the largest
    for tolerance, status in ((0.201, "ok"), (0.199, "wrong")):
        for verdict in judged(NET, tmp_path, expected, tolerance=tolerance).values():
            assert verdict.status == status
            assert verdict.relative_error == pytest.approx(0.2, rel=1e-4)


# ---------------------------------------------------------------------------------------------------------------
# Wrong


def test_expected_values_that_no_engine_computes(tmp_path: Path) -> None:
    expected = {name: array + 7 for name, array in computed(NET, BLOBS).items()}
    verdicts = judged(NET, tmp_path, expected)
    for engine, verdict in verdicts.items():
        error = verdict.relative_error
        assert verdict.status == "wrong"
        assert error is not None and 0.1 < error < 1
        assert verdict.message == f"outputs differ by {error:.2g} of the largest; at most 0.0001 is allowed"
        opencv_is_right = "not located: output by output, OpenCV does what ONNX Runtime does"
        assert verdict.first_difference == ("" if engine == "onnxruntime" else opencv_is_right)


def test_an_output_that_is_missing(tmp_path: Path) -> None:
    expected = {**computed(NET, BLOBS), "boxes": np.zeros((3, 4), np.float32)}
    for verdict in judged(NET, tmp_path, expected).values():
        found = (verdict.status, verdict.relative_error, verdict.message)
        assert found == ("wrong", None, "output 'boxes' is missing (it gave: features, logits)")


def test_an_output_of_another_shape(tmp_path: Path) -> None:
    expected = {**computed(NET, BLOBS), "logits": np.zeros((3, 5), np.float32)}
    for verdict in judged(NET, tmp_path, expected).values():
        found = (verdict.status, verdict.relative_error, verdict.message)
        assert found == ("wrong", None, "output 'logits' has shape (3, 4), expected (3, 5)")


def test_an_output_that_is_not_finite(tmp_path: Path) -> None:
    model = network("(float[1,3,8,8] image) => (float[1,3,8,8] y) { [log] l = Log (image) y = Neg (l) }")
    verdicts = judged(model, tmp_path, {"y": BLOBS})
    for engine, verdict in verdicts.items():
        found = (verdict.status, verdict.relative_error, verdict.message)
        assert found == ("wrong", None, "output 'y' holds NaN or infinite values")
        if engine != "onnxruntime":
            assert verdict.first_difference == (
                "node 1 of 2 'log' (Log), output 'l': output 'l' holds NaN or infinite values"
            )


def test_expected_values_that_are_not_finite_are_never_met(tmp_path: Path) -> None:
    expected = computed(NET, BLOBS)
    expected["logits"] = np.full_like(expected["logits"], np.inf)
    for verdict in judged(NET, tmp_path, expected).values():
        found = (verdict.status, verdict.relative_error, verdict.message)
        assert found == ("wrong", None, "the source's own output 'logits' holds NaN or infinite values")


def test_the_first_node_that_goes_wrong_is_named(tmp_path: Path) -> None:
    verdicts = judged(GATE, tmp_path)
    assert verdicts.pop("onnxruntime").status == "ok"
    for verdict in verdicts.values():
        assert verdict.status == "wrong"
        assert verdict.first_difference.startswith(
            "node 4 of 7 'times' (Conv, HardSigmoid → Mul), output 'm': outputs differ by "
        )
    assert {verdict.status for verdict in judged(lower(GATE), tmp_path).values()} == {"ok"}


def test_the_first_node_is_found_on_the_branch_that_goes_wrong(tmp_path: Path) -> None:
    """In the graph's order, right values lie between the wrong product and the sum that takes it in."""
    model = network(
        """(float[1,3,8,8] image) => (float[1,4,8,8] y) {
            x = Conv <kernel_shape = [3, 3], pads = [1, 1, 1, 1]> (image, weight)
            s = Conv <kernel_shape = [3, 3], pads = [1, 1, 1, 1]> (image, other)
            g = HardSigmoid <alpha = 0.16666667, beta = 0.5> (s)
            m = Mul (x, g)
            a = Relu (x)  b = Neg (a)  c = Exp (b)  d = Neg (c)  e = Exp (d)  f = Neg (e)
            y = Add (m, f)
        }""",
        weight=random(4, 3, 3, 3, seed=1),
        other=random(4, 3, 3, 3, seed=2),
    )
    for verdict in list(judged(model, tmp_path).values())[1:]:
        assert verdict.first_difference.startswith("node 4 of 11 (Conv, HardSigmoid → Mul), output 'm': ")


def test_the_sample_that_goes_wrong_is_the_one_that_is_searched(tmp_path: Path) -> None:
    """NaN for the second sample alone."""
    blobs = np.abs(BLOBS)
    blobs[1, 0, 0, 0] = -1
    model = network("(float[1,3,8,8] image) => (float[1,3,8,8] y) { [log] l = Log (image) y = Neg (l) }")
    expected = {"y": -np.log(np.abs(blobs))}
    for verdict in compare(saved(model, tmp_path), blobs, expected, tolerance=1e-4)[1:]:
        assert verdict.first_difference.startswith("node 1 of 2 'log' (Log), output 'l': ")


# ---------------------------------------------------------------------------------------------------------------
# No answer


def test_a_file_that_is_no_onnx(tmp_path: Path) -> None:
    path = tmp_path / "net.onnx"
    path.write_bytes(b"not a network")
    verdicts = compare(path, BLOBS, {"logits": np.zeros((3, 4), np.float32)}, tolerance=1e-4)
    assert [(verdict.engine, verdict.status, verdict.relative_error) for verdict in verdicts] == [
        (engine, "raised", None) for engine in ENGINES
    ]
    for verdict in verdicts:
        assert "the model" in verdict.message
        assert str(tmp_path) not in verdict.message + verdict.first_difference
    for verdict in verdicts[1:]:
        assert verdict.message.startswith(f"OpenCV {cv2.__version__} cannot load the model: ")
        assert verdict.first_difference.startswith("not located: ")


def test_an_output_without_an_axis_for_samples_ends_no_comparison(tmp_path: Path) -> None:
    model = network("(float[1,3,8,8] image) => (float y) { y = ReduceMean <keepdims = 0> (image) }")
    assert judged(model, tmp_path, {"y": np.zeros(3, np.float32)})["onnxruntime"].status == "raised"


@ON_5_CLASSIC
def test_a_network_that_kills_the_process(tmp_path: Path) -> None:
    verdicts = judged(DEADLY, tmp_path)
    assert verdicts["opencv-classic"] == Verdict(
        "opencv-classic",
        cv2.__version__,
        "died",
        None,
        "the process ended with SIGSEGV",
        "node 2 of 3 'deadly' (QuantizeLinear → QLinearConv), output 'c'",
    )
    assert (verdicts["onnxruntime"].status, verdicts["opencv-new"].status) == ("ok", "ok")


@pytest.mark.parametrize(
    ("line", "status", "message"),
    [
        ("kill -ABRT $$", "died", "the process ended with SIGABRT"),
        ("exit 77", "died", "the process ended with exit code 0x4d"),
        ("echo run.py: no such luck >&2; echo noise >&2; exit 2", "raised", "no such luck"),
        ("echo ValueError: odd >&2; exit 1", "raised", "ValueError: odd"),
        ("echo done; exit 0", "raised", "the runner gave no answer that can be read: 'done'"),
        ("exec sleep 60", "timed out", "no answer within 0.5 s for 3 images"),
    ],
)
def test_a_child_without_an_answer(line: str, status: Status, message: str, tmp_path: Path) -> None:
    python = interpreter(tmp_path, line)
    verdicts = judged(NET, tmp_path, python=python, timeout_s=0.5 if status == "timed out" else 60.0)
    assert verdicts.pop("onnxruntime").status == "ok"
    for engine, verdict in verdicts.items():
        assert replace(verdict, first_difference="") == Verdict(engine, cv2.__version__, status, None, message, "")
        assert verdict.first_difference  # a place, or why there is none


@pytest.mark.skipif(len(runner.engines()) == 1, reason="this OpenCV has one engine")
def test_an_engine_that_is_not_the_one_asked_for(tmp_path: Path) -> None:
    """OpenCV may fall back to another engine, and say so only when it is asked."""
    other = {"classic": "new", "new": "classic"}
    swap = "; ".join(f"s/^{engine}$/={other[engine]}/" for engine in other)
    script = (
        'for word in "$@"; do shift; set -- "$@" '
        f'"$(printf "%s" "$word" | sed "{swap}; s/^=//")"; done; exec "{sys.executable}" "$@"'
    )
    for verdict in list(judged(NET, tmp_path, python=interpreter(tmp_path, script)).values())[1:]:
        asked = verdict.engine.removeprefix("opencv-")
        assert (verdict.status, verdict.message) == (
            "raised",
            f"OpenCV ran its {other[asked]} engine, though {asked} was asked for",
        )


# ---------------------------------------------------------------------------------------------------------------
# The interpreter


def test_the_opencv_of_this_interpreter() -> None:
    here = OpenCV(Path(sys.executable), cv2.__version__, runner.engines())
    assert find_opencv() == find_opencv(Path(sys.executable)) == here


def test_the_users_variables_do_not_decide_what_the_child_imports(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "cv2.py").write_text("raise ImportError('another cv2')")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    assert {verdict.status for verdict in judged(NET, tmp_path).values()} == {"ok"}


def test_an_interpreter_that_is_not_there(tmp_path: Path) -> None:
    path = tmp_path / "python"
    with pytest.raises(SetupError, match=r"^cannot ask .*/python for its OpenCV: .*\. Is it a Python interpreter\?$"):
        compare(tmp_path / "net.onnx", BLOBS, {}, tolerance=1e-4, python=path)


def test_an_interpreter_without_opencv(tmp_path: Path) -> None:
    path = tmp_path / "python"
    path.write_text(f'#!/bin/sh\nexec "{sys.executable}" -S "$@"\n')  # -S: no site-packages
    path.chmod(0o755)
    with pytest.raises(SetupError) as raised:
        find_opencv(path)
    assert str(raised.value) == (
        f"no usable OpenCV in {path}: ModuleNotFoundError: No module named 'cv2'. Install opencv-python-headless there"
    )


# ---------------------------------------------------------------------------------------------------------------
# In words

OK = Verdict("onnxruntime", "1.22.0", "ok", 2e-7, "", "")
WRONG = Verdict("opencv-new", "5.0.0", "wrong", 0.25, "outputs differ by 0.25 of the largest", "node 4 of 7")
DIED = Verdict("opencv-classic", "5.0.0", "died", None, "the process ended with SIGSEGV", "")


def test_a_verdict_in_words() -> None:
    assert [describe(verdict) for verdict in (OK, WRONG, DIED)] == [
        "ONNX Runtime 1.22.0: ok",
        "OpenCV 5.0.0, new engine: wrong, outputs differ by 0.25 of the largest (first difference: node 4 of 7)",
        "OpenCV 5.0.0, classic engine: died, the process ended with SIGSEGV",
    ]


def test_what_is_required() -> None:
    require([OK])
    with pytest.raises(ParityError) as raised:
        require([OK, WRONG, DIED])
    assert str(raised.value) == (
        "the converted model does not compute what was trained: "
        "OpenCV 5.0.0, new engine: wrong, outputs differ by 0.25 of the largest (first difference: node 4 of 7); "
        "OpenCV 5.0.0, classic engine: died, the process ended with SIGSEGV. "
        "Choose another backbone (`edgekit backbones`), or report it with these figures"
    )
    assert raised.value.exit_code == 1


# ---------------------------------------------------------------------------------------------------------------
# A whole network


@pytest.mark.slow
def test_mobilenetv3_is_wrong_in_opencv_as_torch_exports_it_and_right_once_lowered(tmp_path: Path) -> None:
    import timm
    import torch

    from edgekit.export import to_onnx

    torch.manual_seed(0)
    model = timm.create_model("mobilenetv3_small_100", num_classes=10).eval()
    zeros, ones = (0.0, 0.0, 0.0), (1.0, 1.0, 1.0)
    spec = runner.Spec("classify", (64, 64), "stretch", "linear", "rgb", zeros, ones, tuple("0123456789"))
    naive = to_onnx(model, spec, 18)
    blobs = random(2, 3, 64, 64)
    with torch.inference_mode():
        expected = {"logits": model(torch.from_numpy(blobs)).numpy()}

    by_onnxruntime, *by_opencv = compare(saved(naive, tmp_path), blobs, expected, tolerance=1e-3)
    assert by_onnxruntime.status == "ok"
    for verdict in by_opencv:
        assert verdict.status == "wrong"
        assert "HardSigmoid → Mul), output " in verdict.first_difference
    verdicts = compare(saved(lower(naive), tmp_path), blobs, expected, tolerance=1e-3)
    assert [verdict.status for verdict in verdicts] == ["ok"] * len(ENGINES)
