"""report.html: all that is known of a run on one page, which needs nothing else."""

from __future__ import annotations

import base64
from collections.abc import Callable, Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import Any

import cv2
import numpy as np

from edgekit import overlays, runner
from edgekit.artifacts import RunFolder, write_text
from edgekit.datasets import read_split
from edgekit.errors import ArtifactError
from edgekit.latency import LatencyRun
from edgekit.latency_files import kept
from edgekit.pictures import (
    THEMES,
    ThemeName,
    confusion_picture,
    curves_picture,
    no_mistakes,
    precision_recall_picture,
    region_keys,
    reliability_picture,
)
from edgekit.quantization_pictures import quantization_picture, sensitivity_picture, shipped_variant, tradeoff
from edgekit.report.evaluation import (
    FIGURES,
    agreement_note,
    classes_note,
    images_text,
    metrics_rows,
    per_class_rows,
    text_columns,
    verdict,
)
from edgekit.report.figures import duration, megabytes, milliseconds, percent, rate
from edgekit.report.quantization import (
    float_layers_caption,
    float_layers_rows,
    quantization_caption,
    quantization_faults,
    quantization_rows,
)
from edgekit.report.records import read_history, read_metrics, read_parity, read_quantization
from edgekit.report.tables import latency_lines, latency_rows, parity_rows


def write_report(run: RunFolder) -> Path:
    """Writes report.html: one file, no script, nothing loaded from elsewhere; → its path.

    What the run folder does not have yet is named with the command that makes it. Raises ArtifactError or ConfigError
    when there is no such folder or one of its files is damaged.
    """
    if not run.path.is_dir():
        raise ArtifactError(f"no run folder at {run.path}: make one with `edgekit finetune DATA`")
    write_text(run.report, _render(_facts(run)))
    return run.report


def _render(facts: Mapping[str, Any]) -> str:
    import jinja2

    source = resources.files(__package__).joinpath("page.html.j2").read_text(encoding="utf-8")
    # Class names and paths are the user's: everything is escaped unless it is marked safe, and nothing is.
    environment = jinja2.Environment(
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    return environment.from_string(source).render(facts)


def _facts(run: RunFolder) -> dict[str, Any]:
    """All that the template shows; None for what the run folder does not have yet."""
    metrics = read_metrics(run.metrics) if run.metrics.is_file() else None
    parity = read_parity(run.parity) if run.parity.is_file() else None
    quantization = read_quantization(run.quantization) if run.quantization.is_file() else None
    history = read_history(run.history) if run.history.is_file() else []
    latency = kept(run)
    return {
        "name": run.name,
        "run": str(run.path),
        "themes": THEMES,
        "task": metrics["task"] if metrics else run.read_recipe().task if run.recipe.is_file() else "classify",
        "evaluation": _evaluation_facts(metrics) if metrics else None,
        "tiles": _tiles(run, metrics, quantization, latency),
        "summary": _summary(run),
        "curves": _both_themes(lambda theme: curves_picture(history, theme)) if history else None,
        "metric": history[0]["metric"] if history else None,
        "parity_rows": parity_rows(parity) if parity else None,
        "faults": [row for row in parity["verdicts"] if row["status"] != "ok"] if parity else [],
        "quantization": _quantization_facts(run, quantization) if quantization else None,
        "latency": [_latency_facts(record) for record in latency],
        "recipe": run.recipe.read_text(encoding="utf-8") if run.recipe.is_file() else None,
        "conditions": _conditions(run, history, metrics, parity, quantization),
    }


def _evaluation_facts(metrics: Mapping[str, Any]) -> dict[str, Any]:
    """What the page's sections show of metrics.json."""
    torch, names = metrics["columns"]["torch"], metrics["class_names"]
    classes = per_class_rows(metrics)
    is_detection = metrics["task"] == "detect"
    has_bins = torch.get("calibration_error") is not None and bool(torch["score_bins"])  # files of before have none
    return {
        "verdict": verdict(metrics),
        "images": images_text(metrics),
        "columns": list(metrics["columns"]),
        "rows": metrics_rows(metrics),
        "agreement": agreement_note(metrics),
        "class_rows": classes,
        "text_columns": text_columns(classes),
        "classes_note": classes_note(metrics),
        "class_count": len(names),
        "picture": _both_themes(
            lambda theme: (
                precision_recall_picture(torch["pr_curves"], theme)
                if is_detection
                else confusion_picture(torch["confusion"], names, theme)
            )
        ),
        "reliability": _both_themes(lambda theme: reliability_picture(torch, theme)) if has_bins else None,
        "mistakes": [_shown_mistake(mistake, metrics) for mistake in metrics["mistakes"]],
        "no_mistakes": no_mistakes(metrics),
        "score": f"{torch['best_f1_score']:.2f}" if is_detection else "",
        "region_keys": [(name, "#" + bytes(color).hex()) for name, color in region_keys(metrics)],
    }


def _tiles(
    run: RunFolder,
    metrics: Mapping[str, Any] | None,
    quantization: Mapping[str, Any] | None,
    latency: Sequence[LatencyRun],
) -> list[tuple[str, str]]:
    tiles = []
    if metrics:
        title, key = FIGURES[metrics["task"]][0]
        tiles += [(f"{title}, {name}", percent(column[key])) for name, column in metrics["columns"].items()]
        tiles += [
            (f"{metrics['subset']} images", str(metrics["images"])),
            ("classes", str(len(metrics["class_names"]))),
        ]
    if quantization:
        tiles += [(f"precision, {quantization['target']}", shipped_variant(quantization))]
    for record in latency:
        median_ms = float(np.median(record.samples_ms["end_to_end"]))
        tiles += [(f"an image, {record.subject.target}, {record.subject.device}", f"{milliseconds(median_ms)} ms")]
    model = run.onnx if run.onnx.is_file() else run.weights
    return tiles + ([(model.name, megabytes(model.stat().st_size))] if model.is_file() else [])


def _summary(run: RunFolder) -> list[tuple[str, str]]:
    rows = []
    if run.recipe.is_file():
        recipe = run.read_recipe()
        start = recipe.model.weights or ("published ImageNet weights" if recipe.model.pretrained else "random weights")
        rows += [("Task", recipe.task), ("Backbone", recipe.model.backbone), ("Started from", start)]
        rows += [("Data", recipe.data.path)]
    if run.split.is_file():
        data = read_split(run.split)
        rows += [("Images", f"{len(data.train)} for training, {len(data.val)} for validation")]
    if run.spec.is_file():
        spec = run.read_spec()
        height, width = spec.input_size
        size = f"{height}x{width} px (height x width)"
        rows += [("Network input", f"{size}, {spec.resize}, {spec.interpolation} interpolation")]
        rows += [("Classes", ", ".join(spec.class_names))]
    return rows


def _conditions(
    run: RunFolder,
    history: Sequence[Mapping[str, Any]],
    metrics: Mapping[str, Any] | None,
    parity: Mapping[str, Any] | None,
    quantization: Mapping[str, Any] | None,
) -> list[tuple[str, str]]:
    rows = []
    if history:
        seconds = sum(row["seconds"] for row in history)
        per_second = float(np.median([row["images_per_second"] for row in history]))
        rows += [
            ("Training", f"{len(history)} epochs in {duration(seconds)}, {rate(per_second)} images/s (median epoch)")
        ]
    if run.recipe.is_file():
        train, data = run.read_recipe().train, run.read_recipe().data
        rows += [("Device and precision asked for", f"{train.device}, {train.precision}")]
        rows += [("Seeds", f"{train.seed} (training), {data.split_seed} (split)")]
    if run.split.is_file():
        rows += [("Data, SHA-256", read_split(run.split).sha256)]
    if metrics:
        rows += [("Evaluated with", _listed(metrics["conditions"]))]
    if parity:
        versions = _listed(parity["versions"])
        rows += [("Exported with", versions)] if versions else []
        rows += [("Proved with", ", ".join(f"{row['engine']} {row['version']}" for row in parity["verdicts"]))]
    if quantization:
        calibration = quantization["calibration"]
        rows += [("Quantized with", f"{calibration['images']} calibration images, method {calibration['method']}")]
        rows += [("Quantized models measured with", _listed(quantization["conditions"]))]
    files = (("Weights, SHA-256", run.weights), ("ONNX, SHA-256", run.onnx))
    return rows + [(title, runner.file_sha256(path)) for title, path in files if path.is_file()]


def _listed(values: Mapping[str, str]) -> str:
    return ", ".join(f"{name} {value}" for name, value in values.items())


def _quantization_facts(run: RunFolder, record: Mapping[str, Any]) -> dict[str, Any]:
    """What the page's section shows of quantize.json."""
    drawn = tradeoff(record)
    return {
        "why": record["why"],
        "is_old": run.onnx.is_file() and runner.file_sha256(run.onnx) != record["onnx_sha256"],
        "rows": quantization_rows(record),
        "faults": quantization_faults(record),
        "caption": quantization_caption(record),
        "x": drawn.x_label,
        "picture": _both_themes(lambda theme: quantization_picture(record, theme)) if drawn.points else None,
        "float_layers_rows": float_layers_rows(record),
        "float_layers_caption": float_layers_caption(record),
        "curve": _both_themes(lambda theme: sensitivity_picture(record, theme)) if record["curve"] else None,
    }


def _latency_facts(record: LatencyRun) -> dict[str, Any]:
    """What the page's section shows of a measurement."""
    subject = record.subject
    return {
        "title": f"{subject.target} on {subject.device}, {subject.measured_at[:10]}",
        "rows": latency_rows(record),
        "lines": latency_lines(record),
        "warnings": record.warnings,
    }


def _shown_mistake(mistake: Mapping[str, Any], metrics: Mapping[str, Any]) -> dict[str, str]:
    """A mistake as text, with a small copy of its image; "" where a file cannot be read any more."""
    # twice the pixels that a page has: sharp on a screen of two pixels a point. Lines need more than a photo alone.
    smallest, largest = (96, 240) if metrics["task"] == "classify" else (480, 480)
    image = overlays.drawn(mistake, metrics, smallest, largest)
    thumbnail = ""
    if image is not None:
        jpeg = cv2.imencode(".jpg", image, (cv2.IMWRITE_JPEG_QUALITY, 85))[1]
        thumbnail = _data_uri(jpeg.tobytes(), "jpeg")
    file = "/".join(Path(mistake["path"]).parts[-2:])
    return {"file": file, "thumbnail": thumbnail, **_mistake_texts(mistake, metrics)}


def _mistake_texts(mistake: Mapping[str, Any], metrics: Mapping[str, Any]) -> dict[str, str]:
    if metrics["task"] == "detect":
        boxes = overlays.judged(mistake, metrics)
        texts = {"missed": overlays.labels_of(boxes.missed), "false": overlays.labels_of(boxes.false)}
        return {"title": f"{mistake['missed']} missed, {mistake['false']} false", **texts}
    if metrics["task"] == "segment":
        return {"title": f"IoU {mistake['iou']:.2f}"}
    scores = {key: percent(mistake[key]) for key in ("score", "true_score")}
    return {"label": mistake["label"], "predicted": mistake["predicted"], **scores}


def _both_themes(picture: Callable[[ThemeName], bytes]) -> dict[ThemeName, str]:
    return {theme: _data_uri(picture(theme), "png") for theme in THEMES}


def _data_uri(data: bytes, kind: str) -> str:
    return f"data:image/{kind};base64,{base64.b64encode(data).decode()}"
