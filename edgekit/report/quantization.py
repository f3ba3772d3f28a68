"""quantize.json in rows and words."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from edgekit.quantization_pictures import engine_name, float_layers, shipped_variant
from edgekit.report.figures import NOTHING, Row, megabytes, milliseconds, percent, points, ratio

# What `agrees` counts, by the task's metric; of any other, images.
AGREES = {"mAP@0.5": "share of boxes that fp32 has too", "mean IoU": "share of pixels with fp32's class"}


def quantization_rows(record: Mapping[str, Any]) -> list[Row]:
    """A header and a row a variant and engine; what is not ok has its status and no figures."""
    fp32_bytes, ships = record["variants"][0]["size_bytes"], shipped_variant(record)
    rows = [["variant", "size", "OpenCV", record["metric"], "drop", "agrees", "ms", "time"]]
    for variant in record["variants"]:
        name, size_bytes = variant["name"], variant["size_bytes"]
        title = f"{name} *" if name == ships else name
        size = megabytes(size_bytes) + ("" if name == "fp32" else f" ({fp32_bytes / size_bytes:.1f}x)")
        for figure in variant["figures"]:
            cells = [figure["status"], *[NOTHING] * 4]
            if figure["status"] == "ok":
                cells = [percent(figure["metric"]), points(figure["drop"]), percent(figure["agreement"])]
                cells += [milliseconds(figure["median_ms"]), ratio(figure["time_ratio"])]
            rows.append([title, size, engine_name(figure), *cells])
    return rows


def quantization_faults(record: Mapping[str, Any]) -> list[str]:
    """A line for each row that is not ok: what it is, and the message."""
    return [
        f"{variant['name']} on {engine_name(figure)}, {figure['status']}: {' '.join(figure['message'].split())}"
        for variant in record["variants"]
        for figure in variant["figures"]
        if figure["status"] != "ok"
    ]


def quantization_caption(record: Mapping[str, Any]) -> str:
    """What stands under the table of variants."""
    metric, limit = record["metric"], points(record["max_drop"])
    agrees = AGREES.get(metric, "share of images with fp32's answer")
    return (
        f"* a bundle for {record['target']} gets it; drop: points of {metric} lost against fp32 on the same engine "
        f"(-0.12: gained), {limit} allowed; agrees: {agrees}; "
        "ms: median of the forward pass; time: ms / fp32's ms"
    )


def float_layers_rows(record: Mapping[str, Any]) -> list[Row]:
    """A header and a row a step of the search: the layers left in fp32, and what they cost and gain."""
    noise = {layer["layer"]: f"{layer['sqnr_db']:.1f}" for layer in record["sensitivity"]}
    chosen = float_layers(record).chosen
    rows = [["layers in fp32", "drop", "time", "the last one", "SQNR, dB"]]
    for step in record["curve"]:
        count = step["float_layers"]
        title = f"{count} *" if count == chosen else str(count)
        last = [step["last"] or NOTHING, noise.get(step["last"], NOTHING)]
        rows.append([title, points(step["drop"]), ratio(step["time_ratio"]), *last])
    return rows


def float_layers_caption(record: Mapping[str, Any]) -> str:
    """What stands under the table of the search."""
    return (
        f"* a bundle for {record['target']} gets it; the worst layers come first; SQNR: signal / noise of the int8 "
        "layer's output, the lower the worse"
    )
