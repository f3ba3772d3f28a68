"""quantize: int8 that is kept only where it is accurate enough and faster, on the engine that will run it.

training images ─ calibrate, round ─► int8, int8-weights ─ the guard: validation images through cv2.dnn
                                          ▲                     │ too much lost: spare the worst layers
                                          └─────────────────────┘
                                      taking turns with fp32 ─► what a bundle gets, and why: quantize.json
"""

from __future__ import annotations

import math
import platform
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import onnxruntime

from edgekit import parity, plugin, report, runner, tasks
from edgekit.artifacts import RunFolder, is_about, open_run, read_proof, write_bytes, write_json
from edgekit.batches import batches
from edgekit.datasets import Dataset, missing, read_split
from edgekit.errors import ArtifactError, ConfigError, DataError, SetupError
from edgekit.int8 import calibration, rounding, scheme, sensitivity
from edgekit.lowering import lower
from edgekit.lowering.from_torch import from_torch
from edgekit.samples import Sample
from edgekit.targets import Target
from edgekit.turns import take_turns

IMAGES = 200
MIN_IMAGES = 32  # ranges that fewer images show are chance
RANKED = 24  # enough to put the layers in order
COMPARED = 32  # validation images on which an engine is compared with ONNX Runtime, output by output
PAYS = 0.95  # of fp32's time, on one engine at least: a gain that is smaller than this is not worth another arithmetic
SLOWED = 1.05  # and no other engine of the target may be slower than this
SECONDS = 4.0  # of timing, an engine
GUARD_S, IMAGE_S = 120.0, 1.0  # what the guard's pass may take: for loading, and for each image
SPARED = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64)  # layers left in float, step by step


Progress = Callable[[str, int, int], None]  # (what is done, done, total); total 0 where it is not known


@dataclass(frozen=True)
class Figure:
    """A variant on one engine. None: not measured."""

    opencv: str
    engine: str
    status: parity.Status
    message: str
    metric: float | None  # 0..1
    drop: float | None  # points (hundredths) below fp32 on the same engine; negative: better
    agreement: float | None  # 0..1, share of the images with fp32's answer on the same engine
    median_ms: float | None  # of the forward pass, the variants taking turns
    time_ratio: float | None  # to fp32's time in the same rounds


@dataclass(frozen=True)
class Variant:
    """A model file, and what it came to on each engine."""

    name: str  # fp32, int8-weights, int8, int8-mixed
    file: str  # in the run folder; "" where it was not kept
    size_bytes: int
    sha256: str
    float_layers: tuple[str, ...]
    tolerance: float  # how far an engine may be from ONNX Runtime with it, as a share of an output's largest value
    figures: tuple[Figure, ...]

    def is_within(self, max_drop: float) -> bool:
        """Does it run on every engine, and lose at most so many points?"""
        return all(row.status == "ok" and row.drop is not None and row.drop <= max_drop for row in self.figures)


@dataclass(frozen=True)
class Quantized:
    """What was measured and chosen; the content of quantize.json."""

    run: Path
    precision: str  # what a bundle for the target gets: "fp32" or "int8"
    why: str
    passed: bool  # did any form of int8 keep its accuracy?
    variants: tuple[Variant, ...]
    record: Mapping[str, Any]


@dataclass(frozen=True)
class _Engine:
    """An OpenCV and the engine of it that is meant."""

    opencv: parity.OpenCV
    name: str


@dataclass(frozen=True)
class _Guard:
    """What every variant is measured with."""

    folder: RunFolder
    task: Any
    spec: runner.Spec
    engines: tuple[_Engine, ...]
    samples: tuple[Sample, ...]
    sizes: tuple[tuple[int, int], ...]  # (height, width) of each photo
    blobs: np.ndarray  # the first of the samples as the network takes them: what ONNX Runtime answers too, and is timed
    threads: int
    times: bool  # can the target's speed be measured on this machine?
    not_judged: tuple[str, ...]  # OpenCVs of the target that cannot be had here, and why
    expected: dict[str, list[runner.Results]]  # fp32's answers on the samples, by engine


def quantize(
    run: Path,
    target: Target,
    *,
    max_drop: float = 1.0,
    images: int = IMAGES,
    method: calibration.Method = "mse",
    per_channel: bool = True,
    progress: Callable[[str, int, int], None] = lambda *_: None,
) -> Quantized:
    """Makes a run's int8 forms for a target, and measures whether they keep their accuracy and whether they pay.

    Calibrated on `images` training images through the runner's preprocessing. The guard: through every engine of the
    target, on all validation images, int8 may lose at most max_drop points of the task's metric against fp32 there;
    where it loses more, the layers that it hurts most are left in float, one after the other, until it holds or is no
    longer faster. Writes model.int8.onnx (where the guard holds), model.int8-weights.onnx, quantize.json, report.html.

    per_channel: False gives all outputs of a layer one scale, which is what careless tools do; for comparison.
    Raises ArtifactError when the run was not exported in the target's form, ConfigError for a target that has no use
    for int8, DataError when there are fewer than 32 training images, SetupError when none of the target's OpenCVs can
    be had here. That int8 is not good enough is no error: `passed` says so.
    """
    folder, proof = _proved(run, target)
    spec, split = folder.read_spec(), _split(folder, images)
    guard = _guard(folder, target, proof, split.val, progress)
    pixels = _pixels(split.train, spec, images)
    maker = _maker(folder, spec, target, pixels, method, per_channel, progress)
    with tempfile.TemporaryDirectory(prefix="edgekit-quantize-") as temporary:
        made = Path(temporary)
        variants = [
            _measure(guard, "fp32", folder.onnx, (), progress),
            _measure(guard, "int8-weights", maker.write(made / "int8-weights.onnx", None), (), progress),
            _measure(guard, "int8", maker.write(made / "int8.onnx", ()), (), progress),
        ]
        spared = _spare(guard, maker, made, variants[-1], runner.normalize(pixels[:RANKED], spec), max_drop, progress)
        variants += spared.mixed
        variants = _timed(guard, variants, made, progress)
        precision, why = _choice(variants, max_drop)
        variants = _keep(folder, variants, made, max_drop)
    record = {
        "target": target.name,
        "precision": precision,
        "why": why,
        "onnx_sha256": proof["onnx_sha256"],
        "metric": guard.task.METRIC,
        "images": len(split.val),
        "not_judged": list(guard.not_judged),
        "max_drop": max_drop,
        "calibration": {"images": len(pixels), "method": method},
        "variants": [asdict(variant) for variant in variants],
        "curve": spared.curve,
        "sensitivity": [asdict(row) for row in spared.ranking],
        "conditions": {
            "cpu": runner.cpu_name(),
            "threads": str(target.threads or "OpenCV's choice"),
            "onnxruntime": onnxruntime.__version__,
        },
    }
    write_json(folder.quantization, record)
    report.write_report(folder)
    return Quantized(run, precision, why, variants[-1].is_within(max_drop), tuple(variants), record)


def _proved(run: Path, target: Target) -> tuple[RunFolder, dict[str, Any]]:
    if target.backend.startswith("cuda"):
        raise ConfigError(
            f"OpenCV's CUDA backend computes int8 layers on the CPU: {target.name} gets fp32, computed in fp32 or fp16 "
            "as its backend says"
        )
    folder = open_run(run)
    proof = read_proof(folder)
    if proof.get("form") != target.form or proof.get("ok") is not True:
        raise ArtifactError(
            f"{folder.onnx} is not proved in the form {target.form}, which {target.name} takes: "
            f"run `edgekit export {folder.path} --form {target.form}` first"
        )
    return folder, proof


def _split(folder: RunFolder, images: int) -> Dataset:
    split = read_split(folder.split)
    gone = missing((*split.train, *split.val))
    if gone:
        raise DataError(f"{len(gone)} of the run's images are gone, such as {gone[0]}: put them back")
    found = min(images, len(split.train))
    if found < MIN_IMAGES:
        raise DataError(f"{found} images to calibrate with are too few: int8's ranges need {MIN_IMAGES} or more")
    return split


def _pixels(samples: Sequence[Sample], spec: runner.Spec, count: int) -> np.ndarray:
    """uint8 (n, h, w, 3): `count` of the samples, whatever their order in the data; the same ones every time."""
    chosen = sorted(samples, key=lambda sample: sample.sha256)[:count]
    return np.concatenate([batch.images for batch in batches(chosen, spec, 8)])


@dataclass(frozen=True)
class _Maker:
    """The network, ready to be written in each form."""

    model: ir.Model  # in the plain form: engines fuse integer layers as they are
    weights: Mapping[str, rounding.Rounded]
    ranges: scheme.Ranges
    tuned: ir.Model  # in the target's form, for what computes in float
    tuned_weights: Mapping[str, rounding.Rounded]
    is_integer: bool  # in ONNX Runtime's integer operators, which are what 4.x computes in int8

    def write(self, path: Path, spared: Sequence[str] | None) -> Path:
        """spared: the layers that stay in float; None: all of them, only the weights are int8."""
        if spared is None:
            made = ir.to_proto(scheme.weight_only(self.tuned, self.tuned_weights))
        elif self.is_integer:
            made = scheme.qoperator(self.model, self.weights, self.ranges, spared)
        else:
            made = ir.to_proto(scheme.qdq(self.model, self.weights, self.ranges, spared))
        made.producer_name = "edgekit"
        path.write_bytes(made.SerializeToString(deterministic=True))
        return path


def _maker(
    folder: RunFolder,
    spec: runner.Spec,
    target: Target,
    pixels: np.ndarray,
    method: calibration.Method,
    per_channel: bool,
    progress: Progress,
) -> _Maker:
    """Calibrates the trained network and rounds its weights."""
    progress("loading the network", 0, 0)
    module = tasks.load(folder)
    names = tasks.TASKS[spec.task].OUTPUTS
    exported = from_torch(module, spec.input_size, names)
    model, tuned = ir.from_proto(lower(exported, "plain")), ir.from_proto(lower(exported, target.form))
    is_integer = target.form.startswith("opencv4")
    calibrated = calibration.calibrate(
        model,
        lambda: (runner.normalize(image[None], spec) for image in pixels),
        method,
        every_value=is_integer,
        progress=lambda done, total: progress("calibrating", done, total),
    )
    weights = rounding.round_weights(
        model,
        calibrated.moments,
        per_channel=per_channel,
        progress=lambda done, total: progress("rounding the weights", done, total),
    )
    tuned_weights = rounding.carried_over(weights, model, tuned)
    return _Maker(model, weights, calibrated.ranges, tuned, tuned_weights, is_integer)


# ---------------------------------------------------------------------------------------------------------------
# The guard


def _guard(
    folder: RunFolder,
    target: Target,
    proof: dict[str, Any],
    samples: tuple[Sample, ...],
    progress: Progress,
) -> _Guard:
    engines, reasons = [], []
    for version in target.prove_on:
        rows = [row for row in proof["verdicts"] if row["status"] == "ok" and is_about(row, version)]
        if not rows:
            reasons.append(f"{version}: fp32 is not proved there (`edgekit verify {folder.path} --opencv {version}`)")
            continue
        progress(f"OpenCV {version}", 0, 0)
        try:
            found = parity.find_opencv(*plugin.interpreter(version))
        except SetupError as error:
            reasons.append(f"{version}: {error}")
            continue
        fastest = min(rows, key=lambda row: row["best_ms"] or math.inf)["engine"].removeprefix("opencv-")
        if fastest in runner.BACKENDS[target.backend]:  # the others are only fallen back to
            engines.append(_Engine(found, fastest))
    if not engines:
        raise SetupError(f"int8 cannot be judged for {target.name} here: {'; '.join(reasons)}")
    spec, task = folder.read_spec(), tasks.TASKS[folder.read_recipe().task]
    sizes = tuple(size for batch in batches(samples, spec, 8) for size in batch.sizes)
    blobs = runner.normalize(np.concatenate([batch.images for batch in batches(samples[:COMPARED], spec, 8)]), spec)
    times = platform.machine() in target.arch
    return _Guard(folder, task, spec, tuple(engines), samples, sizes, blobs, target.threads, times, tuple(reasons), {})


def _measure(guard: _Guard, name: str, path: Path, spared: Sequence[str], progress: Progress) -> Variant:
    """A variant's accuracy on every engine; fp32 comes first, the others are compared with it.

    Its outputs must be ONNX Runtime's too. That the labels are right is not enough: a kernel that is wrong in a few
    pixels may cost little accuracy here, and much on other images (OpenCV 5.0 on CPUs with AVX-VNNI).
    """
    own, is_int8 = parity.reference(path, guard.blobs), name in ("int8", "int8-mixed")
    float32 = parity.reference(guard.folder.onnx, guard.blobs)
    tolerance = parity.int8_tolerance(own, float32) if is_int8 else parity.INT8_WEIGHTS_TOLERANCE
    figures = []
    for engine in guard.engines:
        progress(f"{name} on OpenCV {engine.opencv.version}, {engine.name} engine: {len(guard.samples)} images", 0, 0)
        images = [sample.path for sample in guard.samples]
        run = parity.run_files(
            engine.opencv, engine.name, path, guard.folder.spec, images, timeout_s=GUARD_S + IMAGE_S * len(images)
        )
        first = {output: array[: len(guard.blobs)] for output, array in run.arrays.items()}
        if run.status == "ok":
            fault = parity.int8_fault(first, own, float32) if is_int8 else _fault(first, own, tolerance)
            run = replace(run, status="wrong", message=fault) if fault else run
        figures.append(_figure(guard, engine, run))
    digest = runner.file_sha256(path)
    return Variant(name, path.name, path.stat().st_size, digest, tuple(spared), tolerance, tuple(figures))


def _figure(guard: _Guard, engine: _Engine, run: parity.Run) -> Figure:
    figure = Figure(engine.opencv.version, engine.name, run.status, run.message, None, None, None, None, None)
    if run.status != "ok":
        return figure
    found = tasks.answers(run.arrays, guard.spec, guard.sizes)
    expected = guard.expected.setdefault(f"{engine.opencv.version} {engine.name}", found)
    metric, best = guard.task.metric(found, guard.samples), guard.task.metric(expected, guard.samples)
    agreement = guard.task.agreement(found, expected, guard.spec)
    return replace(figure, metric=metric, drop=100 * (best - metric), agreement=agreement)


def _fault(outputs: runner.Outputs, expected: runner.Outputs, tolerance: float) -> str:
    """What is wrong with an engine's outputs, beside ONNX Runtime's of the same file; "" where they agree."""
    worst = max(float(parity.relative_errors(outputs.get(name), array).max()) for name, array in expected.items())
    return "" if worst <= tolerance else f"differs by {worst:.2g} from ONNX Runtime; at most {tolerance:g} is allowed"


# ---------------------------------------------------------------------------------------------------------------
# Where too much is lost


@dataclass(frozen=True)
class _Spared:
    """What came of leaving layers in float; all empty where int8 was good enough, or does not run at all."""

    mixed: tuple[Variant, ...] = ()  # the last that was tried
    ranking: tuple[sensitivity.Sensitivity, ...] = ()  # the layers, the worst first
    curve: tuple[dict[str, Any], ...] = ()  # the way there, a row a step


def _spare(
    guard: _Guard,
    maker: _Maker,
    folder: Path,
    int8: Variant,
    blobs: np.ndarray,
    max_drop: float,
    progress: Progress,
) -> _Spared:
    """Where int8 lost too much: int8 with the worst layers in float, as few as hold the guard.

    Where none holds it, the last: then int8 is no longer faster, or hardly any layer is left.
    """
    if int8.is_within(max_drop) or any(row.status != "ok" for row in int8.figures):
        return _Spared()
    ranking = sensitivity.rank(
        maker.model,
        maker.weights,
        maker.ranges,
        [blob[None] for blob in blobs],
        progress=lambda done, total: progress("ranking the layers", done, total),
    )
    mixed, curve = int8, [_step(int8, _ratio(guard, folder / int8.file), "")]
    for count in (count for count in SPARED if count < len(ranking)):
        names = [row.layer for row in ranking[:count]]
        mixed = _measure(guard, "int8-mixed", maker.write(folder / "int8-mixed.onnx", names), names, progress)
        ratio = _ratio(guard, folder / mixed.file)
        curve.append(_step(mixed, ratio, names[-1]))
        if mixed.is_within(max_drop) or (ratio is not None and ratio > PAYS):
            break
    return _Spared((mixed,) if mixed is not int8 else (), ranking, tuple(curve))


def _step(variant: Variant, ratio: float | None, last: str) -> dict[str, Any]:
    drops = [row.drop for row in variant.figures if row.drop is not None]
    return {
        "float_layers": len(variant.float_layers),
        "drop": max(drops, default=None),
        "time_ratio": ratio,
        "last": last,
    }


def _ratio(guard: _Guard, path: Path) -> float | None:
    """A model's time / fp32's on the target's first engine; None where that cannot be measured here."""
    if not guard.times:
        return None
    engine, models = guard.engines[0], [guard.folder.onnx, path]
    turns = take_turns(engine.opencv, engine.name, models, guard.blobs[:1], seconds=SECONDS / 2, threads=guard.threads)
    return turns.ratios[1] if turns else None


# ---------------------------------------------------------------------------------------------------------------
# What is chosen


def _timed(guard: _Guard, variants: Sequence[Variant], folder: Path, progress: Progress) -> list[Variant]:
    """The variants with their times, on each engine those that run there, all taking turns."""
    if not guard.times:
        return list(variants)
    figures = [list(variant.figures) for variant in variants]
    for place, engine in enumerate(guard.engines):
        progress(f"timing on OpenCV {engine.opencv.version}, {engine.name} engine", 0, 0)
        right = [index for index, rows in enumerate(figures) if rows[place].status == "ok"]
        if 0 not in right:  # without fp32 there is nothing to compare with
            continue
        paths = [guard.folder.onnx if index == 0 else folder / variants[index].file for index in right]
        turns = take_turns(engine.opencv, engine.name, paths, guard.blobs[:1], seconds=SECONDS, threads=guard.threads)
        for order, index in enumerate(right if turns else ()):
            assert turns is not None
            figures[index][place] = replace(
                figures[index][place], median_ms=turns.median_ms[order], time_ratio=turns.ratios[order]
            )
    return [replace(variant, figures=tuple(rows)) for variant, rows in zip(variants, figures, strict=True)]


def _choice(variants: Sequence[Variant], max_drop: float) -> tuple[str, str]:
    """("fp32" or "int8", why, in a sentence) from measured variants; fp32 and int8-weights come first, int8 last."""
    int8 = variants[-1]
    small = f"int8 weights alone make the file {variants[0].size_bytes / variants[1].size_bytes:.1f} times smaller"
    spared = len(int8.float_layers)
    name = "int8" + (f" with {spared} layer{'s' * (spared > 1)} in float" if spared else "")
    broken = next((row for row in int8.figures if row.status != "ok"), None)
    if broken:
        where = f"OpenCV {broken.opencv}'s {broken.engine} engine"
        return "fp32", f"{name} is not right on {where} ({broken.status}: {broken.message}): shipping fp32; {small}"
    drop = max(row.drop for row in int8.figures if row.drop is not None)
    lost = f"loses {drop:.2f} points" if drop > 0 else "loses nothing"
    if drop > max_drop:
        return "fp32", f"{name} {lost}, and {max_drop:g} are allowed: shipping fp32; {small}"
    times = [(row, row.time_ratio) for row in int8.figures if row.time_ratio is not None]
    if len(times) < len(int8.figures):
        return "fp32", (
            f"{name} {lost}, but its speed on this target cannot be measured on {platform.machine()}: shipping fp32; "
            f"{small}"
        )
    told = ", ".join(f"{ratio:.2f} of fp32's time on OpenCV {row.opencv} ({row.engine})" for row, ratio in times)
    ratios = [ratio for _, ratio in times]
    if min(ratios) <= PAYS and max(ratios) <= SLOWED:
        return "int8", f"{name} {lost} and takes {told}: shipping int8"
    return "fp32", f"{name} {lost}, but takes {told}: shipping fp32; {small}"


def _keep(folder: RunFolder, variants: Sequence[Variant], made: Path, max_drop: float) -> list[Variant]:
    """Puts what the guard let pass into the run folder; what an earlier call left there goes."""
    places = {variants[0].name: folder.onnx, variants[1].name: folder.int8_weights, variants[-1].name: folder.int8}
    for variant in variants[1:]:
        path = places.get(variant.name)
        if path and variant.is_within(max_drop):
            write_bytes(path, (made / variant.file).read_bytes())
        elif path:
            path.unlink(missing_ok=True)
            del places[variant.name]
    return [replace(variant, file=places[variant.name].name if variant.name in places else "") for variant in variants]
