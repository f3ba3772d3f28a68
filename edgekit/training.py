"""The pieces of a training: rates, parameter groups, class weights, mixup, averaged weights."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from timm import optim
from torch import nn


def learning_rate(peak: float, step: int, steps: int, warmup_fraction: float) -> float:
    """The rate at a step (1..steps): a linear rise to `peak`, then half a cosine down towards 0
    (Loshchilov & Hutter, arXiv:1608.03983, without restarts)."""
    warmup = max(1, round(warmup_fraction * steps))
    if step <= warmup:
        return peak * step / warmup
    return peak * 0.5 * (1 + math.cos(math.pi * (step - warmup) / (steps - warmup + 1)))


def parameter_groups(
    model: nn.Module, learning: Sequence[nn.Module], weight_decay: float, layer_decay: float
) -> list[dict[str, Any]]:
    """Groups for torch's optimizers of all parameters of `model` that learn; none decays on biases and norms.

    learning: the parts that learn, in the network's order, the head last. A group's "share", 0..1, is what its rate is
    of the head's: layer_decay to the power of how many parts come after its own (as in BEiT, arXiv:2106.08254). What is
    in none of the parts has the smallest share.
    """
    shares = {
        parameter: layer_decay**depth
        for depth, part in enumerate(reversed(learning))
        for parameter in part.parameters()
    }
    least = min(shares.values(), default=1.0)
    groups = []
    # timm re-exports it without saying so
    for group in optim.param_groups_weight_decay(model, weight_decay):  # type: ignore[attr-defined]
        for share in sorted({shares.get(each, least) for each in group["params"]}, reverse=True):
            chosen = [each for each in group["params"] if shares.get(each, least) == share]
            groups.append({"params": chosen, "weight_decay": group["weight_decay"], "share": share})
    return groups


def class_weights(labels: np.ndarray, class_count: int, power: float) -> torch.Tensor:
    """int64 (N,) class ids → float32 (class_count,): (N / images of the class) to this power, 1 on average over images.

    A class without images weighs as one with a single image.
    """
    counts = np.bincount(labels, minlength=class_count).clip(min=1)
    weights = (len(labels) / counts) ** power
    return torch.from_numpy(weights / weights[labels].mean()).float()


def mixed(
    inputs: Sequence[torch.Tensor], alpha: float, rng: np.random.Generator
) -> tuple[tuple[torch.Tensor, ...], np.ndarray, float]:
    """Mixes each row with another one: → the inputs, whose rows were mixed in, and the rows' own share, 0.5..1.

    The share is drawn from Beta(alpha, alpha), one for all rows (Zhang et al., arXiv:1710.09412); of features inside
    the network it is manifold mixup (Verma et al., arXiv:1806.05236).
    """
    drawn = float(rng.beta(alpha, alpha))
    share, others = max(drawn, 1 - drawn), rng.permutation(len(inputs[0]))
    rows = torch.from_numpy(others)
    return tuple(share * each + (1 - share) * each[rows.to(each.device)] for each in inputs), others, share


class Average:
    """A running average of some of a network's tensors: an exponential one, whose memory grows to its full length.

    After n steps the average keeps min(decay, (1 + n) / (10 + n)) of itself at each step, so it is not held back by
    where training began (as TensorFlow's ExponentialMovingAverage does with num_updates).
    """

    def __init__(self, tensors: Mapping[str, torch.Tensor], decay: float, steps: int = 0) -> None:
        """tensors: the live ones, by name; they are looked at again in each step. steps: taken already."""
        self._live = dict(tensors)
        self._decay = decay
        self._steps = steps
        self.values = {name: tensor.detach().clone() for name, tensor in self._live.items()}

    def load(self, values: Mapping[str, torch.Tensor]) -> None:
        """Goes on from saved averages, all of them."""
        for name, value in self.values.items():
            value.copy_(values[name])

    @torch.no_grad()
    def update(self) -> None:
        """One step on."""
        self._steps += 1
        share = 1 - min(self._decay, (1 + self._steps) / (10 + self._steps))
        pairs = [(value, self._live[name].detach()) for name, value in self.values.items()]
        averaged = [pair for pair in pairs if pair[0].is_floating_point()]
        # All at once: on a GPU hundreds of small steps take longer than what they compute.
        torch._foreach_lerp_(*map(list, zip(*averaged, strict=True)), share)  # type: ignore[call-overload]
        for value, live in pairs:
            if not value.is_floating_point():
                value.copy_(live)

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """Within it the network has the averages."""
        self._swap()
        try:
            yield
        finally:
            self._swap()

    @torch.no_grad()
    def _swap(self) -> None:
        for name, value in self.values.items():
            live = self._live[name]
            kept = live.detach().clone()
            live.copy_(value)
            value.copy_(kept)
