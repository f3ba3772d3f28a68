"""What does int8 cost or gain, engine by engine? A run's network in fp32 and three forms of int8, interleaved.

    uv run edgekit opencv add openvino                                 # once: the plugin
    uv run python benchmarks/int8_speed.py runs/NAME                   # at the run's own input size
    uv run python benchmarks/int8_speed.py runs/NAME runs/OTHER --size 224

fp32 and int8-weights, which computes in float, are in the engine's own form, as `edgekit quantize` makes them; QDQ and
QOperator are made from the plain form. On each engine all that are right there take turns in one process, half of the
time loaded in the reverse order; figures are medians of the forward pass, one image, and in brackets the median of the
rounds' own ratios to fp32. ONNX Runtime does the same in this process. With --size the trained network is exported at
another size: its answers are then worse, but the time is that of a network trained there.

Right means: on a few validation images, the outputs are ONNX Runtime's of the same file, to edgekit.parity's tolerances
(of the largest output). What is wrong, or does not run, is not timed; stderr says why.
"""

from __future__ import annotations

import argparse
import json
import platform
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import cast

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime

from edgekit import parity, plugin, runner, tasks
from edgekit.artifacts import open_run
from edgekit.batches import batches
from edgekit.datasets import read_split
from edgekit.errors import SetupError
from edgekit.forms import FORMS, Form
from edgekit.int8 import calibration, rounding, scheme
from edgekit.lowering import lower
from edgekit.lowering.from_torch import from_torch
from edgekit.samples import Sample
from edgekit.turns import Turns, take_turns, time_rounds

ENGINES: tuple[tuple[str, str, str, Form], ...] = (  # in the table, OpenCV, engine, fp32's form
    ("OpenCV 4.14", "4.14", "classic", "opencv4"),
    ("OpenCV 5.0, new", "5.0", "new", "opencv5"),
    ("OpenCV 5.0, classic", "5.0", "classic", "opencv4"),
    ("OpenCV 4.14 + OpenVINO", "openvino", "openvino", "plain"),
)
NAMES = ("fp32", "int8-weights", "int8 QDQ", "int8 QOperator")
COMPARED = 8  # validation images
TIMEOUT_S = 120.0


@dataclass(frozen=True)
class Files:
    """A network, written in all forms, and images for it."""

    fp32: Mapping[str, Path]  # by form
    weights: Mapping[str, Path]  # int8-weights, by form
    int8: Mapping[str, Path]  # the rest of NAMES
    spec: Path
    images: tuple[Path, ...]
    blobs: np.ndarray  # the same as the network takes them: float32 (n, 3, h, w)

    def of(self, form: Form) -> dict[str, Path]:
        """All that an engine is asked for; fp32 comes first."""
        return {"fp32": self.fp32[form], "int8-weights": self.weights[form], **self.int8}

    def limit(self, name: str, path: Path) -> float:
        """How far an engine may be from ONNX Runtime."""
        if name in self.int8:
            return parity.int8_tolerance(
                parity.reference(path, self.blobs), parity.reference(self.fp32["plain"], self.blobs)
            )
        return 1e-3 if name == "fp32" else parity.INT8_WEIGHTS_TOLERANCE


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def write_files(run: Path, folder: Path, size: int, images: int) -> Files:
    """size: 0 means the run's own; images: for calibration."""
    found = open_run(run)
    own, split = found.read_spec(), read_split(found.split)
    spec = replace(own, input_size=(size, size)) if size else own
    exported = from_torch(tasks.load(found), spec.input_size, ("logits",))
    fp32: dict[str, Path] = {form: folder / f"{form}.onnx" for form in FORMS}
    for form in FORMS:
        onnx.save(lower(exported, form), fp32[form])
    model = ir.from_proto(onnx.load(fp32["plain"]))
    blobs = load(sorted(split.train, key=lambda sample: sample.sha256)[:images], spec)
    calibrated = calibration.calibrate(model, lambda: (blob[None] for blob in blobs), every_value=True)
    weights = rounding.round_weights(model, calibrated.moments)
    small: dict[str, Path] = {form: folder / f"{form}-weights.onnx" for form in FORMS}
    for form in FORMS:
        tuned = ir.from_proto(onnx.load(fp32[form]))
        own_weights = rounding.carried_over(weights, model, tuned)
        onnx.save(ir.to_proto(scheme.weight_only(tuned, own_weights)), small[form])
    made = {
        "int8 QDQ": ir.to_proto(scheme.qdq(model, weights, calibrated.ranges)),
        "int8 QOperator": scheme.qoperator(model, weights, calibrated.ranges),
    }
    int8 = {name: folder / f"{name.replace(' ', '-')}.onnx" for name in made}
    for name, path in int8.items():
        onnx.save(made[name], path)
    spec_file = folder / "spec.json"
    spec_file.write_text(json.dumps(spec.to_dict()), encoding="utf-8")
    compared = split.val[:COMPARED]
    return Files(fp32, small, int8, spec_file, tuple(sample.path for sample in compared), load(compared, spec))


def load(samples: Sequence[Sample], spec: runner.Spec) -> np.ndarray:
    return np.concatenate([runner.normalize(batch.images, spec) for batch in batches(samples, spec, 8)])


# ---------------------------------------------------------------------------------------------------------------
# One engine


def fault(opencv: parity.OpenCV, engine: str, path: Path, files: Files, limit: float) -> tuple[str, str]:
    """("wrong", "raised", ..., and why); ("", "") where an engine computes what ONNX Runtime does."""
    run = parity.run_files(opencv, engine, path, files.spec, files.images, timeout_s=TIMEOUT_S)
    if run.status != "ok":
        return run.status, run.message
    expected = parity.reference(path, files.blobs)
    worst = max(float(parity.relative_errors(run.arrays.get(name), array).max()) for name, array in expected.items())
    return ("", "") if worst <= limit else ("wrong", f"off by {worst:.2g} of the largest output; allowed: {limit:.2g}")


def on_opencv(
    label: str, version: str, engine: str, models: Mapping[str, Path], files: Files, seconds: float
) -> list[str]:
    """A cell for each model."""
    try:
        opencv = parity.find_opencv(*plugin.interpreter(version))
    except SetupError as error:
        say(f"{label}: {error}")
        return ["not here"] * len(models)
    cells = {}
    for name, path in models.items():
        status, why = fault(opencv, engine, path, files, files.limit(name, path))
        if status:
            cells[name] = status
            say(f"{label}: {name}: {status}: {why}")
    right = [name for name in models if name not in cells]
    chosen = [models[name] for name in right]
    turns = take_turns(opencv, engine, chosen, files.blobs[:1], seconds=seconds, threads=1) if right else None
    return written(models, cells, right, turns)


def on_onnxruntime(models: Mapping[str, Path], blob: np.ndarray, seconds: float) -> list[str]:
    """A cell for each model, in this process."""
    names = list(models)
    rounds = []
    for order in (names, names[::-1]):  # as take_turns does it
        sessions = [session(models[name]) for name in order]
        # it only calls them
        rows = np.array(time_rounds(cast("list[runner.Session]", sessions), blob, seconds / 2))
        rounds.append(rows[:, [order.index(name) for name in names]])
    ms = np.concatenate(rounds)
    ratios = np.median(ms / ms[:, :1], axis=0)
    return written(models, {}, names, Turns(tuple(np.median(ms, axis=0)), tuple(ratios), len(ms)))


def session(path: Path) -> Callable[[np.ndarray], object]:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    found = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    return lambda blob: found.run(None, {"image": blob})


def written(
    models: Mapping[str, Path], faults: Mapping[str, str], right: Sequence[str], turns: Turns | None
) -> list[str]:
    """The cells, in the models' order: "12.3 (0.45)", or what is wrong."""
    cells = dict(faults)
    for place, name in enumerate(right):
        if turns is None:
            cells[name] = "not timed"
        elif name == "fp32" or right[0] != "fp32":  # without fp32 there is nothing to compare with
            cells[name] = f"{turns.median_ms[place]:.1f}"
        else:
            cells[name] = f"{turns.median_ms[place]:.1f} ({turns.ratios[place]:.2f})"
    return [cells[name] for name in models]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", type=Path)
    parser.add_argument("--size", type=int, default=0, help="pixels; default: each run's own")
    parser.add_argument("--images", type=int, default=64, help="for calibration")
    parser.add_argument("--seconds", type=float, default=8.0, help="of timing, each network and engine")
    args = parser.parse_args()
    print(f"{runner.cpu_name()} ({platform.machine()}), one thread, onnxruntime {onnxruntime.__version__}\n")
    print(f"| backbone | px | engine | {', ms | '.join(NAMES)}, ms |")
    print(f"| --- | ---: | --- | {' | '.join(['---:'] * len(NAMES))} |", flush=True)
    for run in args.runs:
        with tempfile.TemporaryDirectory(prefix="int8-speed-") as temporary:
            say(f"{run}: quantizing")
            files = write_files(run, Path(temporary), args.size, args.images)
            start = f"| {open_run(run).read_recipe().model.backbone} | {files.blobs.shape[2]}"
            for label, version, engine, form in ENGINES:
                cells = on_opencv(f"{run}, {label}", version, engine, files.of(form), files, args.seconds)
                print(f"{start} | {label} | {' | '.join(cells)} |", flush=True)
            cells = on_onnxruntime(files.of("plain"), files.blobs[:1], args.seconds)
            print(f"{start} | ONNX Runtime | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
