"""A bundle's stages under pytest-benchmark, on the bundle's own images, one at a time.

    uv run pytest benchmarks --bundle dist/NAME-TARGET [--bundle dist/OTHER-TARGET ...]
    uv run pytest benchmarks --bundle dist/NAME-TARGET --benchmark-json latency.json   # with every sample

It measures and does not judge: `edgekit compare` does. Without --bundle there is nothing to measure, so plain `uv run
pytest` leaves this out.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from conftest import Measure, Opened


def test_preprocess(opened: Opened, measure: Measure) -> None:
    images = [opened.run.decode(data) for data in opened.data]
    measure("preprocess", lambda image: opened.run.preprocess(image, opened.model.spec), images)


def test_forward(opened: Opened, measure: Measure) -> None:
    measure("forward", opened.model.session, _blobs(opened))


def test_postprocess(opened: Opened, measure: Measure) -> None:
    answer = opened.run.POSTPROCESS[opened.model.spec.task]
    sizes = [opened.run.decode(data).shape[:2] for data in opened.data]
    outputs = [opened.model.session(blob) for blob in _blobs(opened)]
    items = list(zip(outputs, sizes, strict=True))
    measure("postprocess", lambda item: answer(item[0], opened.model.spec, item[1]), items)


def test_end_to_end(opened: Opened, measure: Measure) -> None:
    """From the bytes of the file to the answer."""
    measure("end_to_end", lambda data: opened.model(opened.run.decode(data)), opened.data)


def _blobs(opened: Opened) -> list[Any]:
    return [opened.run.preprocess(opened.run.decode(data), opened.model.spec) for data in opened.data]
