"""What detection and segmentation share: a trunk's feature maps made alike, each told what the coarser ones saw.

A feature pyramid (Lin et al., arXiv:1612.03144) of depthwise-separable convolutions. Its operators are those that every
engine of cv2.dnn computes right and fast: Conv, Relu, Add, and Resize by two with nearest neighbours.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

from edgekit import backbones
from edgekit.recipe import Recipe

# A new BatchNorm's share of each batch in its statistics: half of torch's memory, as few images make few steps, and
# a map has hundreds of values an image to take them from.
MOMENTUM = 0.2


def trunk(recipe: Recipe, strides: Sequence[int], *, pretrained: bool) -> nn.Module:
    """The recipe's backbone without its classifier. pretrained=False leaves the recipe's weights aside."""
    weights = Path(recipe.model.weights) if pretrained and recipe.model.weights else None
    use = pretrained and recipe.model.pretrained
    return backbones.trunk(recipe.model.backbone, strides, pretrained=use, weights=weights)


class Pyramid(nn.Module):
    """Maps (N, channels[i], h_i, w_i), the finest first and each half the one before → the same with `width` channels.

    Going up from the coarsest, each map is added to the next finer one, and a 3x3 convolution smooths the sum.
    """

    def __init__(self, channels: Sequence[int], width: int) -> None:
        super().__init__()
        self.lateral = nn.ModuleList(
            nn.Sequential(nn.Conv2d(count, width, 1, bias=False), norm(width)) for count in channels
        )
        self.smooth = nn.ModuleList(separable(width, width) for _ in channels)

    def forward(self, maps: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        alike = [layer(each) for layer, each in zip(self.lateral, maps, strict=True)]
        sums = alike[-1:]
        for finer in alike[-2::-1]:
            sums.insert(0, finer + double(sums[0]))
        return [layer(each) for layer, each in zip(self.smooth, sums, strict=True)]


def separable(inputs: int, outputs: int) -> nn.Sequential:
    """A 3x3 convolution in two: one per channel, then one across channels (Howard et al., arXiv:1704.04861)."""
    return nn.Sequential(
        nn.Conv2d(inputs, inputs, 3, padding=1, groups=inputs, bias=False),
        norm(inputs),
        nn.ReLU(inplace=True),
        nn.Conv2d(inputs, outputs, 1, bias=False),
        norm(outputs),
        nn.ReLU(inplace=True),
    )


def norm(channels: int) -> nn.BatchNorm2d:
    """A BatchNorm for a layer that starts new."""
    return nn.BatchNorm2d(channels, momentum=MOMENTUM)


def double(maps: torch.Tensor) -> torch.Tensor:
    """(N, C, h, w) → (N, C, 2h, 2w), each value four times."""
    return F.interpolate(maps, scale_factor=2.0, mode="nearest")


def last(inputs: int, outputs: int, bias: float) -> nn.Conv2d:
    """The 1x1 convolution that a head ends with: at first it says nearly `bias` everywhere."""
    layer = nn.Conv2d(inputs, outputs, 1)
    nn.init.normal_(layer.weight, std=0.01)
    nn.init.constant_(layer.bias, bias)  # type: ignore[arg-type]
    return layer
