"""Does a converted model compute what its source computes, in every engine that will run it?

cv2.dnn can be silently wrong, and it can kill the process. So each of its engines runs the model in a child
process (`runner.py forward`), and anything but an agreement is a verdict with the first node that goes wrong.
ONNX Runtime runs in this process. The interpreter of the child may be another one, with another OpenCV.
"""

from __future__ import annotations

import json
import math
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime

from edgekit import runner
from edgekit.errors import ParityError, SetupError

Status = Literal["ok", "wrong", "raised", "died", "timed out", "not proved"]
Arrays = dict[str, np.ndarray]

# Another JPEG decoder may move a pixel by a level or two; a conversion fault moves the outputs far more.
OTHER_PIXELS_TOLERANCE = 0.05
# bfloat16 keeps 8 bits of a number, so each layer rounds at 0.4 %; in fifty layers the roundings mostly cancel.
SIXTEEN_BIT_TOLERANCE = 0.05
# Float arithmetic on int8 weights; OpenVINO keeps such weights in another form and is off by up to 0.003.
INT8_WEIGHTS_TOLERANCE = 0.01
# Of int8's own error: engines round differently, which was seen to make 0.1 to 1.1 of it. OpenCV 5.0's fault: 4.5.
INT8_SLACK, INT8_FLOOR = 2.0, 0.01
DISCOVERY_TIMEOUT_S = 60.0
PROBES_PER_TIMEOUT = 8  # the search for the first difference may take as long as one run; a probe this part of it
# Asked of the runner itself, so that there is one definition of the engines.
ASK_ENGINES = (
    "import json, runpy, sys; found = runpy.run_path(sys.argv[1]);"
    "print(json.dumps([found['cv2'].__version__, found['engines']()]))"
)


@dataclass(frozen=True)
class Verdict:
    """What one engine makes of a model."""

    engine: str  # "onnxruntime", or "opencv-" with one of runner.ENGINES
    version: str  # of ONNX Runtime or OpenCV
    status: Status
    relative_error: float | None  # largest difference as a share of the output's largest value; None: no figure
    message: str  # "" where ok
    first_difference: str  # the first node that goes wrong, in words; "" where ok, and for ONNX Runtime
    end_to_end_error: float | None = None  # as relative_error, from the bytes of image files; None: not measured
    best_ms: float | None = None  # the fastest forward pass there, in a process of its own; None: not measured
    precision: str = "fp32"  # of the arithmetic: where it is "fp16" or "bf16", SIXTEEN_BIT_TOLERANCE holds


@dataclass(frozen=True)
class OpenCV:
    """An interpreter and the OpenCV in it."""

    python: Path
    version: str
    engines: tuple[str, ...]
    plugin: Path | None = None  # gives it OpenVINO; then that is the one engine meant


@dataclass(frozen=True)
class Run:
    """What came of running a model: arrays, (N, ...) each, or why there are none."""

    status: Status
    message: str
    arrays: Arrays
    answer: dict[str, Any]  # what `runner.py forward` said of it


_Forward = Callable[[Path, np.ndarray, float], Run]  # (model, (N, 3, h, w), timeout in seconds)


def compare(
    model: Path,
    blobs: np.ndarray,
    expected: Arrays,
    *,
    tolerance: float,
    timeout_s: float = 120.0,
    python: Path | None = None,
    plugin: Path | None = None,
) -> tuple[Verdict, ...]:
    """Runs an ONNX file through ONNX Runtime and every engine of an OpenCV, and judges each.

    blobs: float32 (N, 3, h, w), fed one at a time. expected: the source's outputs by name, (N, ...) each.
    tolerance: largest allowed difference, as a share of an output's largest value in that sample.
    timeout_s: for one engine, over all samples. The search for the first difference may take as long again.
    python: the interpreter whose OpenCV is meant; None: this one. plugin: judge OpenVINO through this plugin there,
    and none of OpenCV's own engines.
    Raises SetupError where that interpreter has no usable OpenCV. All else is in the verdicts.
    """
    opencv = find_opencv(python, plugin)
    run = _mask_path(_run_onnxruntime(model, blobs), model)
    verdicts = [_judge("onnxruntime", onnxruntime.__version__, run, expected, tolerance)]
    for engine in opencv.engines:
        forward = _opencv_forward(opencv, engine)
        run = _mask_path(forward(model, blobs, timeout_s), model)
        verdict = _judge(f"opencv-{engine}", opencv.version, run, expected, tolerance)
        if verdict.status != "ok":
            worst = _worst_sample(run.arrays, expected)
            limit = _tolerance(run, tolerance)
            found = _first_difference(model, blobs[worst][None], verdict.status, forward, limit, timeout_s)
            verdict = replace(verdict, first_difference=found)
        verdicts.append(verdict)
    return tuple(verdicts)


def compare_files(
    verdicts: Iterable[Verdict],
    model: Path,
    spec: Path,
    images: Sequence[Path],
    pixels_sha256: Sequence[str],
    expected: Arrays,
    *,
    tolerance: float,
    tolerance_other_pixels: float,
    timeout_s: float = 120.0,
    python: Path | None = None,
    plugin: Path | None = None,
) -> tuple[Verdict, ...]:
    """The verdicts, those of OpenCV's engines that are "ok" put to one more proof: from image files to outputs.

    spec: a run's spec.json. images: files, N of them. pixels_sha256: of each, decoded and resized by the source; where
    OpenCV there gives other pixels, `tolerance_other_pixels` holds for that image. expected: the source's outputs,
    (N, ...) each. Raises SetupError where the interpreter has no usable OpenCV.
    """
    opencv = find_opencv(python, plugin)

    def prove(verdict: Verdict) -> Verdict:
        if verdict.status != "ok" or not verdict.engine.startswith("opencv-"):
            return verdict
        run = run_files(opencv, verdict.engine.removeprefix("opencv-"), model, spec, images, timeout_s=timeout_s)
        if run.status != "ok":
            return replace(verdict, status=run.status, message=f"from image files: {run.message}")
        same = np.array(run.answer["pixels_sha256"]) == np.array(pixels_sha256)
        allowed = np.where(same, _tolerance(run, tolerance), _tolerance(run, tolerance_other_pixels))
        errors = np.max([relative_errors(run.arrays.get(name), want) for name, want in expected.items()], axis=0)
        worst = float(errors.max())
        verdict = replace(
            verdict, end_to_end_error=worst if math.isfinite(worst) else None, best_ms=run.answer["best_ms"]
        )
        if (errors <= allowed).all():
            return verdict
        at = int(np.argmax(errors - allowed))
        pixels = "the same pixels" if same[at] else "other pixels"
        fault = f"from {images[at].name}, {pixels}: differs by {errors[at]:.2g}; at most {allowed[at]:g} is allowed"
        return replace(verdict, status="wrong", message=fault)

    return tuple(map(prove, verdicts))


def is_proved(verdicts: Sequence[Verdict]) -> bool:
    """Is ONNX Runtime right, and at least one engine of OpenCV?"""
    right = {verdict.engine for verdict in verdicts if verdict.status == "ok"}
    return "onnxruntime" in right and len(right) > 1


def require(verdicts: Sequence[Verdict]) -> None:
    """Raises ParityError, in one message, unless ONNX Runtime is right and so is an engine of OpenCV.

    One right engine is enough: the runner opens it, and refuses those that are known to be wrong.
    """
    failed = [verdict for verdict in verdicts if verdict.status != "ok"]
    if not is_proved(verdicts):
        raise ParityError(
            f"the converted model does not compute what was trained: {'; '.join(map(describe, failed))}. "
            "Choose another backbone (`edgekit backbones`), or report it with these figures"
        )


def describe(verdict: Verdict) -> str:
    """A verdict in a few words, for messages and tables."""
    library = "ONNX Runtime" if verdict.engine == "onnxruntime" else "OpenCV"
    engine = "" if verdict.engine == "onnxruntime" else f", {verdict.engine.partition('-')[2]} engine"
    text = f"{library} {verdict.version}{engine}: {verdict.status}"
    text += f", {verdict.message}" if verdict.message else ""
    return text + (f" (first difference: {verdict.first_difference})" if verdict.first_difference else "")


def find_opencv(python: Path | None = None, plugin: Path | None = None) -> OpenCV:
    """The OpenCV that an interpreter (None: this one) imports, asked in a child process; plugin: as for `compare`.

    Raises SetupError where there is none, or it does not import.
    """
    python = python or Path(sys.executable)
    command = [str(python), "-I", "-c", ASK_ENGINES, str(runner.__file__)]
    try:
        child = _run_child(command, DISCOVERY_TIMEOUT_S)
        version, engines = json.loads(child.stdout)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise SetupError(f"cannot ask {python} for its OpenCV: {error}. Is it a Python interpreter?") from None
    except ValueError:
        reason = _last_line(child.stderr) or "it said nothing"
        raise SetupError(f"no usable OpenCV in {python}: {reason}. Install opencv-python-headless there") from None
    return OpenCV(python, version, ("openvino",) if plugin else tuple(engines), plugin)


# ---------------------------------------------------------------------------------------------------------------
# Running


def run_files(opencv: OpenCV, engine: str, model: Path, spec: Path, images: Sequence[Path], *, timeout_s: float) -> Run:
    """Runs an ONNX file on image files, each decoded, resized and normalized there, as spec.json says; in a child."""
    with tempfile.TemporaryDirectory(prefix="edgekit-parity-") as folder:
        names = Path(folder, "images")
        names.write_bytes(b"".join(os.fsencode(image.resolve()) + b"\n" for image in images))
        source = ["--spec", str(spec.resolve()), "--images", f"@{names}"]
        return _mask_path(_run_opencv(opencv, engine, model, source, timeout_s), model)


def reference(model: Path, blobs: np.ndarray) -> Arrays:
    """ONNX Runtime's outputs of a file by name, (N, ...) each; blobs as for `compare`. Raises ParityError."""
    run = _mask_path(_run_onnxruntime(model, blobs), model)
    if run.status != "ok":
        raise ParityError(f"ONNX Runtime cannot run {model.name}: {run.message}")
    return run.arrays


def _run_onnxruntime(model: Path, blobs: np.ndarray) -> Run:
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4  # errors are raised; they need not be printed too
    try:
        session = onnxruntime.InferenceSession(str(model), options, providers=["CPUExecutionProvider"])
        names = [output.name for output in session.get_outputs()]
        source = session.get_inputs()[0].name
        columns = zip(*(session.run(names, {source: blob[None]}) for blob in blobs), strict=True)
        return Run("ok", "", {name: np.concatenate(arrays) for name, arrays in zip(names, columns, strict=True)}, {})
    except Exception as error:  # noqa: BLE001 - its errors have no common base but Exception
        return Run("raised", " ".join(str(error).split()), {}, {})


def _opencv_forward(opencv: OpenCV, engine: str) -> _Forward:
    def forward(model: Path, blobs: np.ndarray, timeout_s: float) -> Run:
        with tempfile.TemporaryDirectory(prefix="edgekit-parity-") as folder:
            source = Path(folder, "x.npy")
            np.save(source, np.ascontiguousarray(blobs, dtype=np.float32))
            return _run_opencv(opencv, engine, model, ["--input", str(source)], timeout_s)

    return forward


def _run_opencv(opencv: OpenCV, engine: str, model: Path, source: list[str], timeout_s: float) -> Run:
    """`runner.py forward` in a child process; source: its options that say what to run the model on."""
    # The folder is the child's working directory too: a core dump goes away with it.
    with tempfile.TemporaryDirectory(prefix="edgekit-parity-") as folder:
        answer = Path(folder, "y.npz")
        # -I: neither the user's variables nor the package's own folder decide what the child imports
        command = [str(opencv.python), "-I", str(runner.__file__), "forward", "--model", str(model.resolve())]
        command += ["--engine", engine, "--output", str(answer), *source]
        command += ["--plugin", str(opencv.plugin.resolve())] if opencv.plugin else []
        try:
            child = _run_child(command, timeout_s, folder)
        except subprocess.TimeoutExpired:
            return Run("timed out", f"no answer within {timeout_s:g} s", {}, {})
        return _read_answer(child, engine, answer)


def _run_child(command: list[str], timeout_s: float, folder: str | None = None) -> subprocess.CompletedProcess[str]:
    """Raises OSError and TimeoutExpired (the child is then killed)."""
    return subprocess.run(
        command,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        errors="replace",  # what a dying process prints need not be UTF-8
        timeout=timeout_s,
        cwd=folder,
        check=False,
    )


def _read_answer(child: subprocess.CompletedProcess[str], engine: str, answer: Path) -> Run:
    if child.returncode in (1, 2):  # 2: a message of the runner; 1: a traceback
        return Run("raised", _last_line(child.stderr), {}, {})
    if child.returncode:
        return Run("died", f"the process ended with {_death(child.returncode)}", {}, {})
    try:
        said = json.loads(child.stdout.splitlines()[-1])
        used = said["engine"]
        with np.load(answer) as arrays:
            run = Run("ok", "", dict(arrays), said)
    except (ValueError, LookupError, OSError):
        return Run("raised", f"the runner gave no answer that can be read: {_last_line(child.stdout)!r}", {}, {})
    if used != engine:
        return Run("raised", f"OpenCV ran its {used} engine, though {engine} was asked for", {}, {})
    if engine == "openvino" and not said["ran_on"].startswith("OpenVINO"):
        return Run("raised", f"OpenCV ran it on {said['ran_on']}, though OpenVINO was asked for", {}, {})
    return run


def _death(code: int) -> str:
    """-11 → "SIGSEGV"; a code that is no signal (Windows) in hexadecimal."""
    try:
        return signal.Signals(-code).name
    except ValueError:
        return f"exit code {code & 0xFFFFFFFF:#x}"


def _last_line(text: str) -> str:
    """The runner's own message where there is one, else the last line: OpenCV's log comes before either."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    own = [line.removeprefix("run.py:").strip() for line in lines if line.startswith("run.py:")]
    return (own or lines or [""])[-1]


def _mask_path(run: Run, model: Path) -> Run:
    """The message without the model's folder, which is of no use to who reads it later or elsewhere."""
    message = run.message
    for path in (str(model.resolve()), str(model)):
        message = message.replace(path, "the model")
    return replace(run, message=message)


# ---------------------------------------------------------------------------------------------------------------
# Judging


def _judge(engine: str, version: str, run: Run, expected: Arrays, tolerance: float) -> Verdict:
    status, message = run.status, run.message
    tolerance = _tolerance(run, tolerance)
    relative_error: float | None = None
    if status == "ok":
        errors = {name: float(relative_errors(run.arrays.get(name), want).max()) for name, want in expected.items()}
        worst = max(errors, key=errors.__getitem__)
        relative_error = errors[worst] if math.isfinite(errors[worst]) else None
        if not errors[worst] <= tolerance:
            status = "wrong"
            message = f"output {worst!r} {_fault(run.arrays.get(worst), expected[worst], errors[worst], tolerance)}"
    return Verdict(engine, version, status, relative_error, message, "", precision=_precision(run))


def _precision(run: Run) -> str:
    return str(run.answer.get("precision", "fp32"))


def _tolerance(run: Run, tolerance: float) -> float:
    """What is allowed for the arithmetic that ran."""
    return tolerance if _precision(run) == "fp32" else max(tolerance, SIXTEEN_BIT_TOLERANCE)


def _fault(actual: np.ndarray | None, expected: np.ndarray, error: float, tolerance: float) -> str:
    """What is wrong with an output, as the end of a sentence about it."""
    if actual is None:
        return "is missing"
    if actual.shape != expected.shape:
        return f"has shape {actual.shape}, expected {expected.shape}"
    if not np.isfinite(expected).all():
        return "holds NaN or infinite values in the source itself"
    if not np.isfinite(actual).all():
        return "holds NaN or infinite values"
    return f"differs by {error:.2g} of its largest value; at most {tolerance:g} is allowed"


def relative_errors(actual: np.ndarray | None, expected: np.ndarray) -> np.ndarray:
    """float64 (N,): runner.relative_difference a sample; infinite where there is no figure."""
    if actual is None or actual.shape != expected.shape or not np.isfinite(expected).all():
        return np.full(len(expected), math.inf)
    return np.array([runner.relative_difference(got, want) for got, want in zip(actual, expected, strict=True)])


def _worst_sample(arrays: Arrays, expected: Arrays) -> int:
    return int(np.argmax(np.max([relative_errors(arrays.get(name), want) for name, want in expected.items()], axis=0)))


def int8_tolerance(int8: Arrays, float32: Arrays) -> float:
    """How far an engine may be from ONNX Runtime with an int8 network on one image, as a share of the largest output.

    int8, float32: ONNX Runtime's outputs of that network and of the float one on the same images, (N, ...) each. What
    rounds otherwise is carried on through the layers just as int8's own error is: it is measured by that.
    """
    error = max(float(relative_errors(int8[name], array).max()) for name, array in float32.items())
    return max(INT8_FLOOR, INT8_SLACK * error)


def int8_fault(actual: Arrays, int8: Arrays, float32: Arrays) -> str:
    """What is wrong with an engine's outputs of an int8 network; "" where nothing is. Arguments: as int8_tolerance.

    Over all the images, root mean square: a single image may be one that the network is not sure of.
    """
    for name, right in int8.items():
        got = actual.get(name)
        if got is None or got.shape != right.shape or not np.isfinite(got).all():
            return f"output {name!r} {_fault(got, right, math.inf, 0)}"
        off, own = _rms(got - right), _rms(right - float32[name])
        if off > max(INT8_SLACK * own, INT8_FLOOR * _rms(float32[name])):
            times = off / max(own, 1e-12)
            return (
                f"output {name!r} differs from ONNX Runtime's by {times:.1f} times int8's own error; at most "
                f"{INT8_SLACK:g} are allowed"
            )
    return ""


def _rms(array: np.ndarray) -> float:
    return float(np.sqrt(np.mean(array.astype(np.float64) ** 2)))


# ---------------------------------------------------------------------------------------------------------------
# Finding the first node that goes wrong


class _NotFoundError(Exception):
    """The search ended without a node; its text says why."""


def _first_difference(
    model: Path, blob: np.ndarray, status: Status, forward: _Forward, tolerance: float, timeout_s: float
) -> str:
    try:
        with tempfile.TemporaryDirectory(prefix="edgekit-parity-") as folder:
            return _Search(model, blob, status, forward, tolerance, timeout_s, Path(folder)).describe_first()
    except Exception as error:  # noqa: BLE001 - a diagnosis that fails must not hide the verdict that it explains
        return f"not located: {' '.join(str(error).split())[:300]}"


class _Search:
    """Bisection over the graph, cut off after one value at a time, against ONNX Runtime's value there."""

    def __init__(
        self,
        model: Path,
        blob: np.ndarray,
        status: Status,
        forward: _Forward,
        tolerance: float,
        timeout_s: float,
        folder: Path,
    ) -> None:
        self._model = ir.from_proto(onnx.load(model))
        self._blob, self._status, self._forward, self._tolerance = blob, status, forward, tolerance
        self._folder = folder
        self._probe_s = timeout_s / PROBES_PER_TIMEOUT
        self._deadline = time.monotonic() + timeout_s
        self._known: dict[str, Run] = {}
        self._nodes = list(self._model.graph)
        self._values = _computed_values(self._model.graph)
        self._references = self._reference_values()

    def describe_first(self) -> str:
        """Raises _NotFoundError, and whatever onnx_ir, onnx and ONNX Runtime may raise."""
        outputs = [value for value in self._model.graph.outputs if value.name in self._values]
        bad = next((value for value in outputs if self._is_bad(value)), None)
        if bad is None:
            other = next((probe for probe in self._known.values() if probe.status != "ok"), None)
            agrees = "output by output, OpenCV does what ONNX Runtime does"
            raise _NotFoundError(f"the search met something else: {other.status}, {other.message}" if other else agrees)
        return self._describe(self._first_bad(bad))

    def _first_bad(self, bad: ir.Value) -> ir.Value:
        """The earliest bad value that a bad one rests on: bad itself, and all that its node reads is good."""
        path = self._ancestors(bad)
        low, high = -1, len(path) - 1  # path[high] is bad; path[low], where there is one, is not
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (low, middle) if self._is_bad(path[middle]) else (middle, high)
        # path[low] may lie on another branch than path[high]: what the node reads decides.
        for source in _sources(path[high]):
            if source.name in self._values and self._is_bad(source):
                return self._first_bad(source)
        return path[high]

    def _is_bad(self, value: ir.Value) -> bool:
        # A wrong value is bad whatever comes of it later. A failure of another kind than the model's own may be the
        # cutting's doing.
        return self._probe(value).status in (self._status, "wrong")

    def _probe(self, value: ir.Value) -> Run:
        """What becomes of the model cut off after a value; the message of a wrong one is about that value."""
        name = str(value.name)
        if name not in self._known:
            left_s = self._deadline - time.monotonic()
            if left_s <= 0:
                raise _NotFoundError("the search took too long")
            path = self._folder / "cut.onnx"
            onnx.save(self._cut(value), path)
            run = self._forward(path, self._blob, min(self._probe_s, left_s))
            actual, reference = run.arrays.get(name), self._references[name]
            error = runner.relative_difference(actual, reference)
            if run.status == "ok" and not error <= self._tolerance:
                run = replace(run, status="wrong", message=_fault(actual, reference, error, self._tolerance))
            self._known[name] = replace(run, arrays={})
        return self._known[name]

    def _cut(self, value: ir.Value) -> onnx.ModelProto:
        """The model up to a value, which becomes its output, with its shape declared."""
        graph = ir.convenience.extract(self._model.graph, list(self._model.graph.inputs), [value])
        array = self._references[str(value.name)]
        graph.outputs[0].shape = ir.Shape(array.shape)
        graph.outputs[0].dtype = ir.DataType.from_numpy(array.dtype)
        return ir.to_proto(
            ir.Model(graph, ir_version=self._model.ir_version, functions=[*self._model.functions.values()])
        )

    def _reference_values(self) -> Arrays:
        """ONNX Runtime's value of every computed tensor, for the one sample."""
        everything = self._model.clone()
        values = {value.name: value for node in everything.graph for value in node.outputs}
        everything.graph.outputs[:] = [values[name] for name in self._values]
        path = self._folder / "all.onnx"
        onnx.save(ir.to_proto(everything), path)
        run = _run_onnxruntime(path, self._blob)
        if run.status != "ok":
            raise _NotFoundError(f"ONNX Runtime has no values to compare with ({run.message})")
        return run.arrays

    def _ancestors(self, value: ir.Value) -> list[ir.Value]:
        """The computed values that a value rests on, itself last, in the graph's order."""
        found, waiting = {value.name}, [value]
        while waiting:
            for source in _sources(waiting.pop()):
                if source.name not in found:
                    found.add(source.name)
                    waiting.append(source)
        return [candidate for name, candidate in self._values.items() if name in found]

    def _describe(self, value: ir.Value) -> str:
        node = value.producer()
        assert node is not None  # only computed values are probed
        makers = (source.producer() for source in _sources(value))
        kinds = dict.fromkeys(maker.op_type for maker in makers if maker is not None)
        flow = f"{', '.join(kinds)} → {node.op_type}" if kinds else node.op_type
        name = f" {node.name!r}" if node.name else ""
        place = f"node {self._nodes.index(node) + 1} of {len(self._nodes)}{name} ({flow}), output {value.name!r}"
        probe = self._probe(value)
        return f"{place} {probe.message}" if probe.status == "wrong" else place


def _computed_values(graph: ir.Graph) -> dict[str, ir.Value]:
    """The float tensors that depend on the graph's input, by name, in the graph's order."""
    dependent = set(graph.inputs)
    found: dict[str, ir.Value] = {}
    for node in graph:
        if any(source in dependent for source in node.inputs):
            for value in node.outputs:
                dependent.add(value)
                # cv2.dnn has few types besides float32, and gives no scalars
                if value.name and value.dtype in (None, ir.DataType.FLOAT) and value.shape != ():
                    found[value.name] = value
    return found


def _sources(value: ir.Value) -> Iterator[ir.Value]:
    node = value.producer()
    return iter(()) if node is None else (source for source in node.inputs if source is not None)
