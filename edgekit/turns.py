"""How much faster one model is than another: in one process they take turns, so that a busy machine slows all alike.

The process is a child with the OpenCV that is meant (`main` here): cv2.dnn can kill it.
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from edgekit import runner

if TYPE_CHECKING:
    from edgekit.parity import OpenCV

WARM_UP_ROUNDS = 3
MIN_ROUNDS = 15
PATIENCE_S = 120.0  # what loading and warming up may take, beside the seconds asked for
# -I: neither the user's variables nor the working directory decide what the child imports. This edgekit's place is
# given last, so that numpy and cv2 are the interpreter's own.
CHILD = "import sys; sys.path.append(sys.argv[1]); from edgekit.turns import main; main(sys.argv[2:])"


@dataclass(frozen=True)
class Turns:
    """What was measured, model by model, in the order in which they were given."""

    median_ms: tuple[float, ...]  # of the forward pass
    ratios: tuple[float, ...]  # median over the rounds of a model's time / the first model's in the same round
    rounds: int


def take_turns(
    opencv: OpenCV, engine: str, models: Sequence[Path], blob: np.ndarray, *, seconds: float, threads: int = 0
) -> Turns | None:
    """Times the forward passes of ONNX files on one image, float32 (1, 3, h, w); None where one of them does not run.

    Half of the time the models are loaded in the order given, half in the reverse: what is loaded first is placed
    otherwise in memory, and was measured up to 5 % slower for it. threads: 0 leaves OpenCV's choice.
    """
    orders = (list(range(len(models))), list(reversed(range(len(models)))))
    rounds: list[list[float]] = []
    for order in orders:
        times_ms = _child(opencv, engine, [models[index] for index in order], blob, seconds / 2, threads)
        if times_ms is None:
            return None
        rounds += [[row[order.index(index)] for index in range(len(models))] for row in times_ms]
    columns = list(zip(*rounds, strict=True))
    ratios = [statistics.median(row[index] / row[0] for row in rounds) for index in range(len(models))]
    return Turns(tuple(statistics.median(column) for column in columns), tuple(ratios), len(rounds))


def _child(
    opencv: OpenCV, engine: str, models: Sequence[Path], blob: np.ndarray, seconds: float, threads: int
) -> list[list[float]] | None:
    with tempfile.TemporaryDirectory(prefix="edgekit-turns-") as folder:
        image = Path(folder, "x.npy")
        np.save(image, blob)
        plugin = str(opencv.plugin.resolve()) if opencv.plugin else ""
        arguments = [engine, plugin, str(threads), str(seconds), str(image), *(str(path.resolve()) for path in models)]
        command = [str(opencv.python), "-I", "-c", CHILD, str(Path(__file__).parents[1]), *arguments]
        try:
            child = subprocess.run(
                command,
                cwd=folder,  # a core dump goes away with it
                stdin=subprocess.DEVNULL,
                capture_output=True,
                text=True,
                errors="replace",  # what a dying process prints need not be UTF-8
                timeout=PATIENCE_S + seconds,
                check=False,
            )
            rows: list[list[float]] = json.loads(child.stdout.splitlines()[-1])
        except (subprocess.TimeoutExpired, LookupError, ValueError):
            return None
        return rows if child.returncode == 0 else None


def time_rounds(sessions: Sequence[runner.Session], blob: np.ndarray, seconds: float) -> list[list[float]]:
    """A row a round, milliseconds of each session; who begins changes from round to round."""
    for _ in range(WARM_UP_ROUNDS):
        for session in sessions:
            session(blob)
    rows: list[list[float]] = []
    end = time.perf_counter() + seconds
    while len(rows) < MIN_ROUNDS or time.perf_counter() < end:
        row = [0.0] * len(sessions)
        for place in range(len(sessions)):
            index = (place + len(rows)) % len(sessions)
            start_ns = time.perf_counter_ns()
            sessions[index](blob)
            row[index] = (time.perf_counter_ns() - start_ns) / 1e6
        rows.append(row)
    return rows


def main(argv: Sequence[str]) -> None:
    """ENGINE PLUGIN THREADS SECONDS IMAGE MODEL... → one line of JSON, a row a round. What the child process runs."""
    engine, plugin, threads, seconds, image, *models = argv
    file = Path(plugin) if plugin else None
    try:
        sessions = [runner.Session(Path(model), engine, int(threads), file) for model in models]
        print(json.dumps(time_rounds(sessions, np.load(image), float(seconds))))
    except runner.RunnerError as error:
        sys.exit(str(error))
