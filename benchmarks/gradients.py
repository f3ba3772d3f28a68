"""What edgekit/gradients.py gains: the gradients that torch computes slowly in bfloat16 on a CPU, and whole steps.

    uv run python benchmarks/gradients.py

Both ways take turns; each figure is the median of the rounds. A step is that of EfficientNet-Lite0's last stages on a
batch of 32, as `edgekit finetune` trains them.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from contextlib import nullcontext

import torch
import torch.nn.functional as F
from torch import nn

from edgekit import backbones, runner
from edgekit.gradients import FastGradients

BATCH = 32
ROUNDS = 15
LAYERS = [  # channels, side, kernel, stride
    (1152, 7, 5, 1),
    (672, 14, 5, 1),
    (672, 14, 5, 2),
    (240, 28, 5, 1),
    (144, 56, 5, 2),
    (240, 28, 3, 2),
]


def milliseconds(function: Callable[[], object]) -> float:
    start = time.perf_counter()
    function()
    return 1000 * (time.perf_counter() - start)


def both_ways(step: Callable[[], object]) -> tuple[float, float]:
    """Milliseconds of torch's own way and of ours."""
    times: tuple[list[float], list[float]] = ([], [])
    for _ in range(ROUNDS + 2):
        for way, found in zip((nullcontext(), FastGradients()), times, strict=True):
            with torch.autocast("cpu", torch.bfloat16), way:
                found.append(milliseconds(step))
    own, ours = (statistics.median(found[2:]) for found in times)
    return own, ours


def layer_step(channels: int, side: int, kernel: int, stride: int) -> Callable[[], object]:
    image = torch.randn(BATCH, channels, side, side).contiguous(memory_format=torch.channels_last).requires_grad_()
    layer = nn.Conv2d(channels, channels, kernel, stride, kernel // 2, groups=channels, bias=False)
    layer = layer.to(memory_format=torch.channels_last)
    gradient = torch.randn_like(layer(image)).bfloat16()
    return lambda: layer(image).backward(gradient)


def network_step() -> Callable[[], object]:
    model = backbones.build(backbones.DEFAULT, 10, pretrained=False, weights=None).train()
    stages = [module for _, module in backbones.stages(model)][-4:]
    blocks = [stage for stage in stages if isinstance(stage, nn.Sequential)]
    tail = nn.Sequential(*blocks, *stages[len(blocks) :], nn.AdaptiveAvgPool2d(1), nn.Flatten(), backbones.head(model))
    tail = tail.to(memory_format=torch.channels_last)
    features = torch.randn(BATCH, 112, 14, 14).contiguous(memory_format=torch.channels_last)
    labels = torch.randint(0, 10, (BATCH,))
    return lambda: F.cross_entropy(tail(features).float(), labels).backward()


def main() -> None:
    print(f"{runner.cpu_name()}, torch {torch.__version__}, {torch.get_num_threads()} threads, batches of {BATCH}\n")
    print("| forwards and backwards | torch, ms | edgekit, ms | share |")
    print("| --- | ---: | ---: | ---: |")
    for channels, side, kernel, stride in LAYERS:
        own, ours = both_ways(layer_step(channels, side, kernel, stride))
        name = f"depthwise {kernel}x{kernel}, stride {stride}, {channels} x {side} x {side}"
        print(f"| {name} | {own:.1f} | {ours:.1f} | {ours / own:.2f} |")
    own, ours = both_ways(network_step())
    print(f"| EfficientNet-Lite0's last four stages | {own:.0f} | {ours:.0f} | {ours / own:.2f} |")


if __name__ == "__main__":
    main()
