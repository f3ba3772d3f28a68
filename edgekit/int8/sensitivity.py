"""Which layers int8 hurts most: each one alone in int8, all others in float."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from edgekit.int8.calibration import session, sqnr_db
from edgekit.int8.layers import layers
from edgekit.int8.rounding import Rounded
from edgekit.int8.scheme import Ranges, qdq


@dataclass(frozen=True)
class Sensitivity:
    """What one layer's int8 does to the network's outputs."""

    layer: str
    sqnr_db: float  # of the outputs; low: it hurts


def rank(
    model: ir.Model,
    weights: Mapping[str, Rounded],
    ranges: Ranges,
    blobs: Sequence[np.ndarray],
    progress: Callable[[int, int], None] = lambda *_: None,
) -> tuple[Sensitivity, ...]:
    """Every layer, the most sensitive first. blobs: images, float32 (1, 3, h, w) each, a few dozen."""
    expected = list(_outputs(model, blobs))
    names = [layer.name for layer in layers(model)]
    found = []
    for number, name in enumerate(names, start=1):
        others = [other for other in names if other != name]
        # the others' weights in float too: int8 ones would be noise of their own
        alone = qdq(model, {name: weights[name]}, ranges, spared=others)
        found.append(Sensitivity(name, sqnr_db(list(_outputs(alone, blobs)), expected)))
        progress(number, len(names))
    return tuple(sorted(found, key=lambda row: row.sqnr_db))


def _outputs(model: ir.Model, blobs: Iterable[np.ndarray]) -> Iterator[np.ndarray]:
    """All outputs of each image, in one row."""
    network = session(ir.to_proto(model))
    name = network.get_inputs()[0].name
    for blob in blobs:
        yield np.concatenate([array.ravel() for array in network.run(None, {name: blob})])
