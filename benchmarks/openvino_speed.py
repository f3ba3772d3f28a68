"""How fast is a bundle through OpenVINO? Against OpenVINO itself, ONNX Runtime and OpenCV's own engines, interleaved.

    uv run edgekit opencv add openvino                             # once: the plugin
    uv run python benchmarks/openvino_speed.py                     # four backbones, one and two threads, fp32
    uv run python benchmarks/openvino_speed.py resnet18 --threads 2 --precision bf16

Each runtime has a process of its own, which waits on a pipe while the others run; they take turns, in random order, so
that what disturbs one disturbs all. A turn is one inference that is thrown away and some that are timed: figures are
medians over the turns, the ratios medians of the turns' own. The input is a real photo, the weights are random. Each
runtime must answer as ONNX Runtime does, to 1e-3 of the largest output, or 0.2 in bf16.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import random
import subprocess
import sys
from pathlib import Path

import numpy as np
from lowering_speed import write_models

from edgekit import plugin, runner
from edgekit.environments import opencv_python

NAMES = ("tf_efficientnet_lite0", "mobilenetv2_100", "mobilenetv3_large_100", "resnet18")
TURN_RUNS = 10
LIMITS = {"f32": 1e-3, "bf16": 0.2}  # random weights forgive less than trained ones

# A process that answers {"runs": N} with the milliseconds of N inferences; its first line is its answer for the photo.
CHILD = """
import json, runpy, sys, time
import numpy as np
kind, runner, model, blob, threads, precision, plugin = sys.argv[1:]
threads, x = int(threads), np.load(blob)
if kind == "openvino":
    import openvino
    settings = {"INFERENCE_NUM_THREADS": threads, "INFERENCE_PRECISION_HINT": precision, "PERFORMANCE_HINT": "LATENCY"}
    request = openvino.Core().compile_model(model, "CPU", settings).create_infer_request()
    forward = lambda: request.infer([x])[0]
elif kind == "onnxruntime":
    import onnxruntime
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")  # it would take the others' time
    session = onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
    forward = lambda: session.run(None, {"image": x})[0]
else:  # an engine of run.py's
    found = runpy.run_path(runner)
    session = found["Session"](found["Path"](model), kind.split()[-1], threads, plugin and found["Path"](plugin))
    forward = lambda: session(x)["logits"]
print(json.dumps(np.asarray(forward()).tolist()), flush=True)
for line in sys.stdin:
    times = []
    for _ in range(json.loads(line)["runs"] + 1):
        start = time.perf_counter(); forward(); times.append((time.perf_counter() - start) * 1e3)
    print(json.dumps(times[1:]), flush=True)
"""
OURS, NATIVE = "run.py openvino", "openvino"  # the others: "run.py ENGINE" and "onnxruntime"


class Worker:
    """One runtime in a process of its own, idle until it is its turn."""

    def __init__(self, kind: str, python: Path | str, model: Path, blob: Path, threads: int, precision: str) -> None:
        file = plugin.find_plugin(platform.machine()) if kind == OURS else ""
        arguments = [kind, str(runner.__file__), str(model), str(blob), str(threads), precision, str(file)]
        self._child = subprocess.Popen(
            [str(python), "-I", "-c", CHILD, *arguments],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, runner.PRECISION_VARIABLE: precision},
        )
        self.answer = np.array(self._read(), np.float32)

    def _read(self) -> list[float]:
        assert self._child.stdout is not None
        row: list[float] = json.loads(self._child.stdout.readline())
        return row

    def turn(self) -> float:
        """The median ms of TURN_RUNS inferences."""
        assert self._child.stdin is not None
        self._child.stdin.write(json.dumps({"runs": TURN_RUNS}) + "\n")
        self._child.stdin.flush()
        return float(np.median(self._read()))

    def end(self) -> None:
        self._child.communicate()


def measure(name: str, folder: Path, threads: int, precision: str, turns: int) -> dict[str, np.ndarray]:
    """{runtime: ms (turns,)}, for those that answer as ONNX Runtime does."""
    files, blob, _ = write_models(name, folder)
    np.save(folder / "blob.npy", blob)
    openvino, stock = plugin.openvino_python(), opencv_python("5.0")
    runtimes = {
        "onnxruntime": (sys.executable, files["plain"]),
        OURS: (openvino, files["plain"]),
        NATIVE: (openvino, files["plain"]),
        "run.py classic": (openvino, files["opencv4"]),
        "run.py new": (stock, files["opencv5"]),
    }
    workers = {
        kind: Worker(kind, python, model, folder / "blob.npy", threads, precision)
        for kind, (python, model) in runtimes.items()
    }
    expected = workers["onnxruntime"].answer
    for kind, worker in workers.items():
        error = runner.relative_difference(worker.answer, expected)
        assert error <= LIMITS[precision], f"{kind} is wrong for {name}: {error:.1e}"
    rows: dict[str, list[float]] = {kind: [] for kind in workers}
    for turn in range(turns + 1):
        for kind in random.sample(list(workers), len(workers)):
            ms = workers[kind].turn()
            if turn:  # the first warms up
                rows[kind].append(ms)
    for worker in workers.values():
        worker.end()
    return {kind: np.array(values) for kind, values in rows.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", default=NAMES)
    parser.add_argument("--threads", default="1,2", help="numbers, with commas between them")
    parser.add_argument("--precision", choices=LIMITS, default="f32", help="of both ways to OpenVINO")
    parser.add_argument("--turns", type=int, default=30)
    parser.add_argument("--folder", type=Path, default=Path("runs/openvino_speed"))
    args = parser.parse_args()
    args.folder.mkdir(parents=True, exist_ok=True)
    head = f"run.py + OpenVINO {args.precision}, ms"
    print(f"| backbone | threads | {head} | OpenVINO | ONNX Runtime | OpenCV 4.14 | OpenCV 5.0 | ours / OpenVINO |")
    print("| --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: |", flush=True)
    for name in args.names:
        for threads in map(int, args.threads.split(",")):
            rows = measure(name, args.folder, threads, args.precision, args.turns)
            columns = (OURS, NATIVE, "onnxruntime", "run.py classic", "run.py new")
            cells = " | ".join(f"{np.median(rows[kind]):.2f}" for kind in columns)
            ratio = np.median(rows[OURS] / rows[NATIVE])
            print(f"| {name} | {threads} | {cells} | {ratio:.3f} |", flush=True)


if __name__ == "__main__":
    main()
