"""How long a backbone takes for one image on this machine, through cv2.dnn.

The network has random weights: time does not depend on their values. It is exported and lowered as `edgekit export`
does, for each engine of the installed OpenCV, which runs it in a child process (`main` here), because cv2.dnn can kill
the process. The fastest engine counts.
"""

from __future__ import annotations

import json
import math
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import cv2
import numpy as np

from edgekit import runner
from edgekit.backbones import IMAGENET_CLASSES, Backbone, build

if TYPE_CHECKING:
    from edgekit.forms import Form

WARM_UP_RUNS = 3
MIN_RUNS = 10
FORM_OF: dict[str, Form] = {"new": "opencv5", "classic": "opencv4"}  # of a model, for each engine
PATIENCE_S = 120.0  # what loading, warming up and MIN_RUNS may take, beside the seconds asked for
# -I: neither the user's variables nor the working directory decide what the child imports. This edgekit may be found
# through either, so its place is given.
PYTHON = [sys.executable, "-I", "-c"]
CHILD = "import sys; sys.path.append(sys.argv[1]); from edgekit.timing import main; main(sys.argv[2:])"


@dataclass(frozen=True)
class Timing:
    """The fastest engine's time for one image, and under what it was measured; or why there is none."""

    median_ms: float | None  # of the forward pass alone; None: it failed on every engine
    runs: int
    engine: str  # "classic" or "new"; empty where it failed
    opencv: str
    threads: int  # of OpenCV; 0 where it failed
    cpu: str
    failure: str  # what each engine said; empty where one ran


def time_backbones(
    rows: Iterable[Backbone], seconds: float, progress: Callable[[int, int], None] = lambda done, total: None
) -> dict[str, Timing]:
    """Measures each for about `seconds` (shared by the engines), at its own input size; {name: timing}.

    progress: called before each backbone, and at the end, with how many are done and how many there are.
    What cannot be exported or run has a timing that says so: nothing is raised for it.
    """
    rows = list(rows)
    timings = {}
    for done, row in enumerate(rows):
        progress(done, len(rows))
        timings[row.name] = _time_backbone(row, seconds)
    progress(len(rows), len(rows))
    return timings


def _time_backbone(row: Backbone, seconds: float) -> Timing:
    # The folder is the child's working directory too: a core dump goes away with it.
    with tempfile.TemporaryDirectory(prefix="edgekit-timing-") as folder:
        try:
            models = _export(row, Path(folder))
        except Exception as error:  # noqa: BLE001 - any network by name: torch's exporter may raise anything
            return _failed(f"export: {_one_line(str(error))}")
        share_s = seconds / len(models)
        found = {engine: _run_child(model, engine, row.input_size, share_s) for engine, model in models.items()}
    best = min(found.values(), key=lambda timing: timing.median_ms or math.inf)
    if best.median_ms is None:
        return _failed("; ".join(f"{engine} engine: {timing.failure}" for engine, timing in found.items()))
    return best


def _failed(failure: str) -> Timing:
    return Timing(None, 0, "", cv2.__version__, 0, runner.cpu_name(), failure)


def _one_line(text: str) -> str:
    return " ".join(text.split())[:300]


def _export(row: Backbone, folder: Path) -> dict[str, Path]:
    """{engine: ONNX file}, each lowered for one of this OpenCV's engines."""
    import onnx

    from edgekit.lowering import lower
    from edgekit.lowering.from_torch import from_torch

    network = build(row.name, IMAGENET_CLASSES, pretrained=False, weights=None).eval()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the exporter's advice is for who writes the network
        exported = from_torch(network, row.input_size, ("logits",))
    models = {}
    for engine in runner.engines():
        models[engine] = folder / f"{engine}.onnx"
        onnx.save(lower(exported, FORM_OF[engine]), models[engine])
    return models


# ---------------------------------------------------------------------------------------------------------------
# The child process


def _run_child(model: Path, engine: str, size: tuple[int, int], seconds: float) -> Timing:
    """Runs `main` on a model in a process of its own, with the model's folder as working directory."""
    arguments = [str(Path(__file__).parents[1]), model.name, engine, *map(str, size), str(seconds)]
    try:
        child = subprocess.run(
            [*PYTHON, CHILD, *arguments],
            cwd=model.parent,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            errors="replace",  # what a dying process prints need not be UTF-8
            timeout=PATIENCE_S + seconds,
            check=False,
        )
    except subprocess.TimeoutExpired:
        return _failed(f"no end within {PATIENCE_S + seconds:g} s")
    if child.returncode < 0:
        return _failed(f"the process ended with signal {-child.returncode}")
    try:
        return Timing(**json.loads(child.stdout.splitlines()[-1]))
    except (IndexError, ValueError, TypeError):
        said = child.stderr.strip().splitlines()[-1:] or [f"the process ended with exit code {child.returncode}"]
        return _failed(_one_line(said[0]))


def time_runs(forward: Callable[[], object], seconds: float) -> list[float]:
    """Milliseconds of each run, in order: for as long as asked, and MIN_RUNS at least, after WARM_UP_RUNS."""
    for _ in range(WARM_UP_RUNS):
        forward()
    times_ns: list[int] = []
    end_ns = time.perf_counter_ns() + round(seconds * 1e9)
    while len(times_ns) < MIN_RUNS or time.perf_counter_ns() < end_ns:
        start_ns = time.perf_counter_ns()
        forward()
        times_ns.append(time.perf_counter_ns() - start_ns)
    return [ns / 1e6 for ns in times_ns]


def _time_model(model: Path, engine: str, size: tuple[int, int], seconds: float) -> Timing:
    """Runs an ONNX file in this process, on OpenCV's own choice of threads."""
    try:
        session = runner.Session(model, engine=engine)
        if session.engine != engine:
            return _failed(f"OpenCV ran its {session.engine} engine instead")
        blob = np.random.default_rng(0).standard_normal((1, 3, *size)).astype(np.float32)
        times_ms = time_runs(lambda: session(blob), seconds)
    except runner.RunnerError as error:
        return _failed(_one_line(str(error)))
    median_ms = statistics.median(times_ms)
    return Timing(median_ms, len(times_ms), engine, cv2.__version__, session.threads, runner.cpu_name(), "")


def main(argv: Sequence[str]) -> None:
    """MODEL ENGINE HEIGHT WIDTH SECONDS → one line of JSON, a Timing. What the child process runs."""
    model, engine, height, width, seconds = argv
    print(json.dumps(asdict(_time_model(Path(model), engine, (int(height), int(width)), float(seconds)))))
