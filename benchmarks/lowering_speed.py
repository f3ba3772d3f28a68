"""Is a lowered model as fast as the best that torch's own exporters give? On the same OpenCV, interleaved.

    uv run python benchmarks/lowering_speed.py                              # the recommended backbones
    uv run python benchmarks/lowering_speed.py resnet18 --opencv 4.14 --threads 1

Three files a network: torch's exporter (dynamo) as it is, its older one (TorchScript, operator set 17), and ours. Those
that an engine computes rightly run in turn in one process, so that what disturbs one disturbs all; the ratio is that of
the medians. A naive file that is wrong, or kills the process, is no rival.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import warnings
from pathlib import Path

import numpy as np
import onnx
import torch
from architectures import CLASSES, TOLERANCE, photos, shake

from edgekit import backbones, parity, runner
from edgekit.environments import opencv_python
from edgekit.lowering import Engine, lower
from edgekit.lowering.from_torch import from_torch

# Times each model in turn; prints {file: median ms}.
CHILD = """
import json, runpy, statistics, sys, time
import numpy as np
found = runpy.run_path(sys.argv[1])
engine, threads, seconds, blob, *files = sys.argv[2:]
threads, seconds, blob = int(threads), float(seconds), np.load(blob)
sessions = {file: found["Session"](found["Path"](file), engine, threads) for file in files}
times = {file: [] for file in files}
for session in sessions.values():
    session(blob); session(blob)
end = time.perf_counter() + seconds
while time.perf_counter() < end or len(times[files[0]]) < 15:
    for file, session in sessions.items():
        start = time.perf_counter(); session(blob); times[file].append((time.perf_counter() - start) * 1e3)
print(json.dumps({file: statistics.median(t) for file, t in times.items()}))
"""


def write_models(name: str, folder: Path) -> tuple[dict[str, Path], np.ndarray, parity.Arrays]:
    """{"dynamo", "torchscript", "classic", "new": ONNX file}, the input images and torch's answers."""
    torch.manual_seed(0)
    model = backbones.build(name, CLASSES, pretrained=False, weights=None)
    names = tuple(str(i) for i in range(CLASSES))
    spec = backbones.default_spec(name, names, input_size=None, resize="crop", interpolation="area")
    blobs = photos(spec)
    shake(model, blobs)
    with torch.inference_mode():
        expected = {"logits": model(torch.from_numpy(blobs)).numpy()}
    files = {form: folder / f"{name}.{form}.onnx" for form in ("dynamo", "torchscript", "classic", "new")}
    zeros = torch.zeros(1, 3, *spec.input_size)
    shared = {"input_names": ["image"], "output_names": ["logits"]}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        program = torch.onnx.export(model, (zeros,), dynamo=True, opset_version=18, verbose=False, **shared)
        onnx.save(program.model_proto, files["dynamo"])
        torch.onnx.export(model, (zeros,), str(files["torchscript"]), dynamo=False, opset_version=17, **shared)
    exported = from_torch(model, spec.input_size, ("logits",))
    engines: tuple[Engine, ...] = ("classic", "new")
    for engine in engines:
        onnx.save(lower(exported, engine), files[engine])
    return files, blobs, expected


def right_in(files: dict[str, Path], blobs: np.ndarray, expected: parity.Arrays, python: Path) -> dict[str, set[str]]:
    """{engine: the forms of the model that it computes rightly}."""
    one = {name: outputs[:1] for name, outputs in expected.items()}
    right: dict[str, set[str]] = {}
    for form, file in files.items():
        for verdict in parity.compare(file, blobs[:1], one, tolerance=TOLERANCE, python=python):
            if verdict.status == "ok":
                right.setdefault(verdict.engine.removeprefix("opencv-"), set()).add(form)
    return right


def median_ms(files: list[Path], engine: str, threads: int, seconds: float, blob: Path, python: Path) -> list[float]:
    """Of each file, run in turn in one process."""
    command = [str(python), "-I", "-c", CHILD, str(runner.__file__), engine, str(threads), str(seconds), str(blob)]
    child = subprocess.run([*command, *map(str, files)], capture_output=True, text=True, check=True)
    return list(json.loads(child.stdout.splitlines()[-1]).values())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", default=list(backbones.BACKBONES))
    parser.add_argument("--opencv", default="4.10,4.14,5.0", help="versions, with commas between them")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--seconds", type=float, default=3.0, help="for each network and engine")
    parser.add_argument("--folder", type=Path, default=Path("runs/lowering_speed"))
    args = parser.parse_args()
    args.folder.mkdir(parents=True, exist_ok=True)
    print("| backbone | OpenCV | engine | ours, ms | dynamo, ms | TorchScript, ms | ours / best naive |")
    print("| --- | --- | --- | ---: | ---: | ---: | ---: |", flush=True)
    for name in args.names:
        files, blobs, expected = write_models(name, args.folder)
        np.save(args.folder / "blob.npy", blobs[:1])
        for version in args.opencv.split(","):
            python = opencv_python(version)
            for engine, forms in right_in(files, blobs, expected, python).items():
                if engine == "onnxruntime":
                    continue
                wanted = [form for form in (engine, "dynamo", "torchscript") if form in forms]
                chosen = [files[form] for form in wanted]
                times = median_ms(chosen, engine, args.threads, args.seconds, args.folder / "blob.npy", python)
                ms = dict(zip(wanted, times, strict=True))
                naive = [ms[form] for form in ("dynamo", "torchscript") if form in ms]
                cells = [f"{ms[form]:.2f}" if form in ms else "not right" for form in (engine, "dynamo", "torchscript")]
                ratio = f"{ms[engine] / min(naive):.3f}" if naive and engine in ms else "-"
                print(f"| {name} | {version} | {engine} | {' | '.join(cells)} | {ratio} |", flush=True)


if __name__ == "__main__":
    main()
