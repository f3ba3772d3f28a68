"""Does cv2.dnn compute what torch does? Every edge architecture, on every OpenCV that devices have.

    uv run python benchmarks/architectures.py                        # all, about an hour on two cores
    uv run python benchmarks/architectures.py resnet18 vgg11 --opencv 4.14,5.0

Each network gets weights that make a fault visible: random ones, with BatchNorm statistics of its own activations and
no zero or vanishing scale anywhere (a layer scale of 1e-6, as ConvNeXt starts with, would hide a whole block). Its
input is two real photos. It is exported and lowered as `edgekit export` does, and judged by `edgekit.parity`: in
a child process, with a relative error of at most 1e-3 of the largest output. Results are kept in a JSON
file after each network, so that an interrupted run goes on where it was.
"""

from __future__ import annotations

import argparse
import json
import time
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
from sklearn.datasets import load_sample_image

from edgekit import backbones, parity, runner
from edgekit.environments import opencv_python
from edgekit.errors import EdgekitError
from edgekit.forms import FORMS, Form
from edgekit.lowering import lower
from edgekit.lowering.from_torch import from_torch
from edgekit.plugin import openvino_python

CLASSES = 10
TOLERANCE = 1e-3
TIMEOUT_S = 120.0
OPENCV = "4.6,4.10,4.14,5.0"
NAMES = """
mobilenetv1_100 mobilenetv2_100 mobilenetv3_small_050 mobilenetv3_small_100 mobilenetv3_large_100
tf_mobilenetv3_small_minimal_100 mobilenetv4_conv_small mobilenetv4_conv_medium mobilenetv4_hybrid_medium
efficientnet_b0 efficientnet_lite0 tf_efficientnet_lite0 tf_efficientnet_lite1 tf_efficientnet_lite2
tf_efficientnetv2_b0 efficientnet_es fbnetc_100 fbnetv3_b mnasnet_100 mnasnet_small semnasnet_075 spnasnet_100
tinynet_a tinynet_e lcnet_050 lcnet_100 hardcorenas_a hardcorenas_f ghostnet_100 ghostnetv2_100 ghostnetv3_100
repvgg_a0 mobileone_s0 mobileone_s1 regnetx_002 regnety_002 regnety_004 resnet18 resnet18d resnet50
hgnetv2_b0 hgnetv2_b1 fastvit_t8 fastvit_s12 repvit_m0_9 repvit_m1_0 efficientformer_l1 efficientformerv2_s0
edgenext_xx_small edgenext_small mobilevit_xxs mobilevit_s mobilevitv2_050 efficientvit_b0 efficientvit_m0
starnet_s1 convnext_atto convnext_femto convnextv2_atto tiny_vit_5m_224 deit_tiny_patch16_224 levit_128s
poolformer_s12 vgg11 densenet121 fasternet_t0 shvit_s1
torchvision:squeezenet1_0 torchvision:squeezenet1_1 torchvision:shufflenet_v2_x0_5 torchvision:shufflenet_v2_x1_0
torchvision:mobilenet_v2 torchvision:mobilenet_v3_small torchvision:mobilenet_v3_large torchvision:mnasnet0_5
torchvision:googlenet torchvision:efficientnet_b0 torchvision:regnet_y_400mf torchvision:resnet18
torchvision:vgg11_bn
""".split()  # noqa: SIM905 - eighty lines as a list


def photos(spec: runner.Spec) -> np.ndarray:
    """Two real photos as network input, float32 (2, 3, h, w)."""
    images = [load_sample_image(name)[..., ::-1] for name in ("china.jpg", "flower.jpg")]
    return np.concatenate([runner.preprocess(np.ascontiguousarray(image), spec) for image in images])


@torch.no_grad()
def shake(model: torch.nn.Module, blobs: np.ndarray) -> None:
    """Random weights in place, under which every layer counts and activations stay of ordinary size."""
    generator = torch.Generator().manual_seed(0)
    for name, parameter in model.named_parameters():
        if parameter.ndim <= 1 or min(parameter.shape) == parameter.numel() or float(parameter.abs().max()) < 1e-3:
            is_bias, starts_at_zero = "bias" in name, float(parameter.abs().max()) < 1e-3
            # a branch that starts at zero is one of many that add up: at full strength they would drown the rest
            low, high = (-0.2, 0.2) if is_bias else (0.1, 0.3) if starts_at_zero else (0.6, 1.2)
            parameter.copy_(torch.empty_like(parameter).uniform_(low, high, generator=generator))
    norms = [m for m in model.modules() if isinstance(m, torch.nn.modules.batchnorm._BatchNorm)]
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None  # a plain mean over what it sees
    model.train()
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    model(torch.from_numpy(np.concatenate([blobs, blobs[..., ::-1].copy()])))
    for norm in norms:
        # not quite the batch's own, or the statistics could be left out unnoticed
        norm.running_mean.mul_(torch.empty_like(norm.running_mean).uniform_(0.8, 1.2, generator=generator))
        norm.running_var.mul_(torch.empty_like(norm.running_var).uniform_(0.8, 1.2, generator=generator)).clamp_(1e-3)
    model.eval()


def make_network(name: str, size: int = 0) -> tuple[torch.nn.Module, np.ndarray]:
    """An architecture with weights under which every layer counts, and its input: float32 (2, 3, h, w)."""
    torch.manual_seed(0)
    model = backbones.build(name, CLASSES, pretrained=False, weights=None)
    names = tuple(str(i) for i in range(CLASSES))
    input_size = (size, size) if size else None
    blobs = photos(backbones.default_spec(name, names, input_size=input_size, resize="crop", interpolation="area"))
    shake(model, blobs)
    return model, blobs


def make_model(name: str, folder: Path, size: int = 0) -> tuple[dict[Form, Path], np.ndarray, parity.Arrays]:
    """A network by name → its ONNX file in each form, two input images and torch's answers."""
    model, blobs = make_network(name, size)
    with torch.inference_mode():
        expected = {"logits": model(torch.from_numpy(blobs)).numpy()}
    exported = from_torch(model, blobs.shape[2:], ("logits",))
    paths = {form: folder / f"{name.replace(':', '-')}.{form}.onnx" for form in FORMS}
    for form, path in paths.items():
        onnx.save(lower(exported, form), path)
    return paths, blobs, expected


def judge(name: str, versions: list[str], folder: Path, plugin: Path | None, size: int = 0) -> list[dict[str, Any]]:
    """→ a verdict an engine, as dictionaries."""
    paths, blobs, expected = make_model(name, folder, size)
    spread = float(expected["logits"].std() / np.abs(expected["logits"]).max())
    assert np.isfinite(expected["logits"]).all() and spread > 1e-2, f"the weights are not sane: {expected}"
    verdicts: list[parity.Verdict] = []
    for version in versions:
        try:
            python = opencv_python(version)
        except EdgekitError as error:
            verdicts.append(parity.Verdict("opencv", version, "raised", None, f"not proved: {error}", ""))
            continue
        limits: dict[str, Any] = {"tolerance": TOLERANCE, "timeout_s": TIMEOUT_S, "python": python}
        found = parity.compare(paths["opencv5"], blobs, expected, **limits)
        if version.startswith("4."):
            # Both forms are for it. The row is that of the one it is worse with.
            own: Form = "opencv4.6" if version.startswith("4.6") else "opencv4"
            other = parity.compare(paths[own], blobs, expected, **limits)
            found = tuple(max(pair, key=_badness) for pair in zip(found, other, strict=True))
        verdicts += found if not verdicts else found[1:]  # ONNX Runtime's is the same each time
    if plugin:  # OpenVINO has its own importer
        limits = {"tolerance": TOLERANCE, "timeout_s": TIMEOUT_S, "python": openvino_python()}
        verdicts += parity.compare(paths["plain"], blobs, expected, plugin=plugin, **limits)[1:]
    return [asdict(replace(verdict, message=verdict.message[:300])) for verdict in verdicts]


def _badness(verdict: parity.Verdict) -> tuple[bool, float]:
    return verdict.status != "ok", verdict.relative_error or 0.0


def markdown(results: dict[str, list[dict[str, Any]]]) -> str:
    """A row a network, a column an engine, and the share that is right."""
    columns = list(dict.fromkeys(f"{row['engine']} {row['version']}" for rows in results.values() for row in rows))
    lines = [f"| architecture | {' | '.join(columns)} |", f"| --- |{' --- |' * len(columns)}"]
    right = dict.fromkeys(columns, 0)
    for name, rows in results.items():
        found = {f"{row['engine']} {row['version']}": row for row in rows}
        cells = []
        for column in columns:
            row = found.get(column)
            is_right = row is not None and row["status"] == "ok"
            right[column] += is_right
            cells.append("-" if row is None else f"{row['relative_error']:.0e}" if is_right else row["status"])
        lines.append(f"| {name} | {' | '.join(cells)} |")
    shares = [f"{right[column]} of {len(results)}" for column in columns]
    return "\n".join([*lines, f"| **right** | {' | '.join(shares)} |"]) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", default=NAMES)
    parser.add_argument("--opencv", default=OPENCV, help="versions, with commas between them")
    parser.add_argument("--folder", type=Path, default=Path("runs/architectures"), help="models and results go here")
    parser.add_argument("--openvino-plugin", type=Path, help="judges OpenVINO too, through this plugin")
    parser.add_argument("--size", type=int, default=0, help="side of the images, pixels; 0: the backbone's own")
    parser.add_argument("--again", action="store_true", help="judge those too that have results already")
    args = parser.parse_args()
    args.folder.mkdir(parents=True, exist_ok=True)
    file = args.folder / "results.json"
    results: dict[str, list[dict[str, Any]]] = json.loads(file.read_text()) if file.exists() else {}
    for name in args.names:
        if name in results and not args.again:
            continue
        start = time.perf_counter()
        try:
            results[name] = judge(name, args.opencv.split(","), args.folder, args.openvino_plugin, args.size)
        except (EdgekitError, AssertionError, RuntimeError) as error:
            print(f"{name}: {type(error).__name__}: {error}", flush=True)
            continue
        file.write_text(json.dumps(results, indent=1))
        bad = [f"{row['engine']} {row['version']} {row['status']}" for row in results[name] if row["status"] != "ok"]
        print(f"{name:<34} {time.perf_counter() - start:5.0f} s  {'; '.join(bad) or 'right everywhere'}", flush=True)
    (args.folder / "results.md").write_text(markdown(results))
    print(markdown(results))


if __name__ == "__main__":
    main()
