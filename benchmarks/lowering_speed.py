"""Is a lowered model as fast as the best that torch's own exporters give? On the same OpenCV, interleaved.

    uv run python benchmarks/lowering_speed.py                              # the recommended backbones
    uv run python benchmarks/lowering_speed.py resnet18 --opencv 4.14 --threads 1

Three files a network: torch's exporter (dynamo) as it is, its older one (TorchScript, operator set 17), and ours. Those
that an engine computes rightly run in turn in one process, so that what disturbs one disturbs all; the ratio is the
median of the rounds' own. A naive file that is wrong, or kills the process, is no rival.
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
from architectures import TOLERANCE, make_network

from edgekit import backbones, parity, runner
from edgekit.environments import opencv_python
from edgekit.forms import FORMS
from edgekit.lowering import lower
from edgekit.lowering.from_torch import from_torch
from edgekit.timing import FORM_OF

# Times each model in turn; prints the rounds, a list of ms each.
CHILD = """
import json, random, runpy, sys, time
import numpy as np
found = runpy.run_path(sys.argv[1])
engine, threads, seconds, blob, *files = sys.argv[2:]
threads, seconds, blob = int(threads), float(seconds), np.load(blob)[:1]
sessions = {file: found["Session"](found["Path"](file), engine, threads) for file in files}
rounds = []
for session in sessions.values():
    session(blob); session(blob)
end = time.perf_counter() + seconds
while time.perf_counter() < end or len(rounds) < 15:
    row = [0.0] * len(files)
    for file in random.sample(files, len(files)):  # the one that runs after a larger one finds a colder cache
        start = time.perf_counter(); sessions[file](blob); row[files.index(file)] = (time.perf_counter() - start) * 1e3
    rounds.append(row)
print(json.dumps(rounds))
"""


def write_models(name: str, folder: Path) -> tuple[dict[str, Path], np.ndarray, np.ndarray]:
    """{"dynamo", "torchscript", and each of our forms: ONNX file}, an input image and torch's answer."""
    model, blobs = make_network(name)
    with torch.inference_mode():
        expected = model(torch.from_numpy(blobs[:1])).numpy()
    files = {form: folder / f"{name}.{form}.onnx" for form in ("dynamo", "torchscript", *FORMS)}
    zeros = torch.zeros(1, *blobs.shape[1:])
    shared = {"input_names": ["image"], "output_names": ["logits"]}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        program = torch.onnx.export(model, (zeros,), dynamo=True, opset_version=18, verbose=False, **shared)
        onnx.save(program.model_proto, files["dynamo"])
        torch.onnx.export(model, (zeros,), str(files["torchscript"]), dynamo=False, opset_version=17, **shared)
    exported = from_torch(model, blobs.shape[2:], ("logits",))
    for form in FORMS:
        onnx.save(lower(exported, form), files[form])
    return files, blobs[:1], expected


def is_right(file: Path, engine: str, folder: Path, expected: np.ndarray, python: Path) -> bool:
    """Does an engine compute torch's answer from the image in folder/blob.npy?"""
    answer = folder / "answer.npz"
    command = [str(python), "-I", str(runner.__file__), "forward", "--model", str(file), "--engine", engine]
    child = subprocess.run(
        [*command, "--input", str(folder / "blob.npy"), "--output", str(answer)], capture_output=True, check=False
    )
    if child.returncode:
        return False
    return runner.relative_difference(np.load(answer)["logits"], expected) <= TOLERANCE


def time_rounds(files: list[Path], engine: str, threads: int, seconds: float, blob: Path, python: Path) -> np.ndarray:
    """ms (rounds, files): all run in turn in one process; then again in others, each time loaded in another order.

    The one that is loaded first is up to 5 % slower on the classic engine, whichever it is.
    """
    command = [str(python), "-I", "-c", CHILD, str(runner.__file__), engine, str(threads)]
    parts = []
    for shift in range(len(files)):
        order = [*files[shift:], *files[:shift]]
        arguments = [str(seconds / len(files)), str(blob), *map(str, order)]
        child = subprocess.run([*command, *arguments], capture_output=True, text=True, check=True)
        rounds = np.array(json.loads(child.stdout.splitlines()[-1]))
        parts.append(np.roll(rounds, shift, axis=1))
    return np.concatenate(parts)


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
        files, blob, expected = write_models(name, args.folder)
        np.save(args.folder / "blob.npy", blob)
        for version in args.opencv.split(","):
            python = opencv_python(version)
            for engine in parity.find_opencv(python).engines:
                forms = (FORM_OF[engine], "dynamo", "torchscript")
                wanted = [form for form in forms if is_right(files[form], engine, args.folder, expected, python)]
                chosen = [files[form] for form in wanted]
                rounds = time_rounds(chosen, engine, args.threads, args.seconds, args.folder / "blob.npy", python)
                ms = dict(zip(wanted, np.median(rounds, axis=0), strict=True))
                cells = [f"{ms[form]:.2f}" if form in ms else "not right" for form in forms]
                is_compared = wanted[0] == forms[0] and len(wanted) > 1
                # round by round, as what disturbs one lasts; against the rival that is faster over all
                rival = 1 + int(np.argmin(np.median(rounds[:, 1:], axis=0))) if is_compared else 0
                ratio = f"{np.median(rounds[:, 0] / rounds[:, rival]):.3f}" if is_compared else "-"
                print(f"| {name} | {version} | {engine} | {' | '.join(cells)} | {ratio} |", flush=True)


if __name__ == "__main__":
    main()
