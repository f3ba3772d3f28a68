"""What does each speed rewrite gain? Whole networks with it and without it, interleaved in one process.

    uv run python benchmarks/rewrites_speed.py                              # every rewrite, the networks below
    uv run python benchmarks/rewrites_speed.py depthwise_5x5 --networks lcnet_100 --opencv 4.14 --threads 2

The ratio is the median of the rounds' own. Both files are checked against torch first.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import torch
from architectures import make_network
from lowering_speed import is_right, time_rounds
from onnx_ir.passes.common import RemoveUnusedNodesPass

from edgekit.environments import opencv_python
from edgekit.forms import Form
from edgekit.lowering import REWRITES, TUNING, depthwise_5x5, global_average_pool, relu6
from edgekit.lowering.from_torch import from_torch

Rewrite = Callable[[ir.Model], None]

# Rewrite → itself, the form of the model that has it, and the OpenCVs and engine that it is for.
MEASURED: dict[str, tuple[Rewrite, Form, tuple[str, ...], str]] = {
    "relu6": (relu6.rewrite, "opencv5", ("5.0",), "new"),
    "global_average_pool": (global_average_pool.rewrite, "opencv5", ("5.0",), "new"),
    "depthwise_5x5": (depthwise_5x5.rewrite, "opencv4", ("4.10", "4.14"), "classic"),
}
NETWORKS = ("tf_efficientnet_lite0", "mobilenetv3_large_100", "mobilenetv4_conv_small", "lcnet_100")


def export(name: str, folder: Path) -> tuple[onnx.ModelProto, np.ndarray]:
    """The network as torch's exporter writes it, and its answer to the image that goes to folder/blob.npy."""
    model, blobs = make_network(name)
    np.save(folder / "blob.npy", blobs[:1])
    with torch.inference_mode():
        expected = model(torch.from_numpy(blobs[:1])).numpy()
    return from_torch(model, blobs.shape[2:], ("logits",)), expected


def lower_without(exported: onnx.ModelProto, form: Form, left_out: Rewrite | None) -> onnx.ModelProto:
    """As edgekit.lowering.lower does it, less one rewrite."""
    model = ir.from_proto(exported)
    for rewrite in (*REWRITES, *TUNING[form]):
        if rewrite is not left_out:
            rewrite(model)
    RemoveUnusedNodesPass()(model)
    return ir.to_proto(model)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("rewrites", nargs="*", help=f"of {', '.join(MEASURED)}; default: all")
    parser.add_argument("--networks", default=",".join(NETWORKS), help="names, with commas between them")
    parser.add_argument("--opencv", help="versions, with commas between them; default: those that a rewrite is for")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--seconds", type=float, default=5.0, help="for each row")
    parser.add_argument("--folder", type=Path, default=Path("runs/rewrites_speed"))
    args = parser.parse_args()
    if not set(args.rewrites) <= set(MEASURED):
        parser.error(f"no such rewrite: {' '.join(args.rewrites)}")
    args.folder.mkdir(parents=True, exist_ok=True)
    files = [args.folder / "with.onnx", args.folder / "without.onnx"]
    print("| rewrite | network | OpenCV | without, ms | with, ms | with / without | file |")
    print("| --- | --- | --- | ---: | ---: | ---: | ---: |", flush=True)
    for network in args.networks.split(","):
        exported, expected = export(network, args.folder)
        for name in args.rewrites or MEASURED:
            rewrite, form, versions, engine = MEASURED[name]
            onnx.save(lower_without(exported, form, None), files[0])
            onnx.save(lower_without(exported, form, rewrite), files[1])
            if files[0].read_bytes() == files[1].read_bytes():
                print(f"| {name} | {network} | | nothing to rewrite | | | |", flush=True)
                continue
            growth = files[0].stat().st_size / files[1].stat().st_size - 1
            for version in args.opencv.split(",") if args.opencv else versions:
                python = opencv_python(version)
                wrong = [file.stem for file in files if not is_right(file, engine, args.folder, expected, python)]
                if wrong:
                    print(f"| {name} | {network} | {version} | not right {' and '.join(wrong)} it | | | |", flush=True)
                    continue
                rounds = time_rounds(files, engine, args.threads, args.seconds, args.folder / "blob.npy", python)
                done, before = np.median(rounds, axis=0)
                ratio = np.median(rounds[:, 0] / rounds[:, 1])
                row = f"{before:.2f} | {done:.2f} | {ratio:.3f} | {growth:+.1%}"
                print(f"| {name} | {network} | {version} | {row} |", flush=True)


if __name__ == "__main__":
    main()
