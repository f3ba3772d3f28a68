"""Float weights → int8, so that what a layer gives on real images changes least.

Rounding each weight to the nearest step loses more than eight bits need to: the values under a window go up and down
together, so that errors of one sign add up. Here the weights of an output are rounded one after the other, and those
that are still float make up for the error so far, as the moments of the layer's inputs say (GPTQ: Frantar et al.,
arXiv:2210.17323, here with one scale an output and for convolutions). No image is needed but those of the calibration.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

import numpy as np
import onnx_ir as ir

from edgekit.int8.layers import constant, layers

LIMIT = 127  # symmetric: -128 is not used
DAMPING = 0.01  # of the moments' mean diagonal: taps that were hardly seen must not run away
BLOCK = 64  # taps after which the rest is made up for; the paper's lazy batches


@dataclass(frozen=True)
class Rounded:
    """A layer's weights as integers: weights ≈ integers * scales, output by output."""

    integers: np.ndarray  # int8, the weights' own shape
    scales: np.ndarray  # float32 (outputs,)
    axis: int  # of the outputs, in that shape

    def to_float(self) -> np.ndarray:
        """float32, the weights' own shape."""
        shape = [1] * self.integers.ndim
        shape[self.axis] = -1
        return np.asarray(self.integers * self.scales.reshape(shape), np.float32)


def round_weights(
    model: ir.Model,
    moments: Mapping[str, np.ndarray],
    *,
    per_channel: bool = True,
    progress: Callable[[int, int], None] = lambda *_: None,
) -> dict[str, Rounded]:
    """{layer's name: its weights} for the layers of a float network; moments as `calibrate` finds them.

    per_channel: False rounds to the nearest step of one scale for the whole layer, as careless tools do.
    progress(done, total): layers.
    """
    found, known = {}, layers(model)
    for number, layer in enumerate(known):
        progress(number, len(known))
        matrix = layer.to_matrix(constant(model, layer.weights))
        integers, scales = round_matrix(matrix, moments[layer.name]) if per_channel else _one_scale(matrix)
        found[layer.name] = Rounded(layer.from_matrix(integers), scales.ravel(), layer.output_axis)
    return found


def carried_over(weights: Mapping[str, Rounded], model: ir.Model, other: ir.Model) -> dict[str, Rounded]:
    """The rounded weights for another form of the same network, where a layer's may be a multiple of what they were.

    Layers that are made otherwise there are left out.
    """
    before = {layer.name: constant(model, layer.weights) for layer in layers(model)}
    found = {}
    for layer in layers(other):
        old, new = before.get(layer.name), constant(other, layer.weights)
        if old is None or old.shape != new.shape:
            continue
        factor = float((new.astype(np.float64) * old).sum() / max(float((old.astype(np.float64) ** 2).sum()), 1e-30))
        if np.allclose(new, factor * old, rtol=1e-5, atol=1e-5 * float(np.abs(new).max())):
            found[layer.name] = replace(weights[layer.name], scales=weights[layer.name].scales * np.float32(factor))
    return found


def _one_scale(matrix: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    scale = np.float32(max(np.abs(matrix).max() / LIMIT, 1e-30))
    return np.round(matrix / scale).astype(np.int8), np.full(matrix.shape[:2], scale)


def _scales(matrix: np.ndarray) -> np.ndarray:
    """float32 (groups, outputs): the largest weight of an output is ±127; an output of zeros has the scale 1."""
    largest = np.abs(matrix).max(axis=2)
    return np.where(largest > 0, largest / LIMIT, 1).astype(np.float32)


def round_matrix(matrix: np.ndarray, moments: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(groups, outputs, taps) and moments (groups, taps, taps) → int8 and scales float32 (groups, outputs).

    The largest weight of an output stays ±127, so that whoever reads the float weights back finds the same scale.
    """
    scales = _scales(matrix)
    kept = np.abs(matrix).argmax(axis=2)
    damped = moments + _damping(moments)
    order = np.argsort(-np.einsum("gtt->gt", damped).mean(axis=0))  # the strongest first: the others make up for them
    damped = damped[:, order][:, :, order]
    left = matrix.astype(np.float64)[..., order]
    upper = np.linalg.cholesky(np.linalg.inv(damped)).transpose(0, 2, 1)
    done = np.zeros_like(left)
    for start in range(0, len(order), BLOCK):
        end = min(start + BLOCK, len(order))
        errors = np.zeros((*left.shape[:2], end - start))
        for tap in range(start, end):
            steps = np.clip(np.round(left[..., tap] / scales), -LIMIT, LIMIT)
            steps = np.where(kept == order[tap], np.sign(matrix[..., order[tap]]) * LIMIT, steps)
            done[..., tap] = steps
            error = (left[..., tap] - steps * scales) / upper[:, None, tap, tap]
            errors[..., tap - start] = error
            left[..., tap + 1 : end] -= error[..., None] * upper[:, None, tap, tap + 1 : end]
        left[..., end:] -= errors @ upper[:, start:end, end:]
    return done[..., np.argsort(order)].astype(np.int8), scales


def _damping(moments: np.ndarray) -> np.ndarray:
    """(groups, taps, taps), diagonal."""
    mean = np.einsum("gtt->gt", moments).mean(axis=1)
    return DAMPING * np.where(mean > 0, mean, 1)[:, None, None] * np.eye(moments.shape[1])
