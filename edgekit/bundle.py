"""bundle: a proved model.onnx and a target → a folder (and .tar.gz) that runs, and proves itself, on the device."""

from __future__ import annotations

import hashlib
import json
import math
import shutil
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from edgekit import __version__, plugin, runner, tasks
from edgekit.artifacts import (
    Manifest,
    RunFolder,
    Tolerances,
    file_table,
    is_about,
    open_run,
    read_json,
    read_proof,
    read_quantization,
    replacing_folder,
    write_archive,
    write_json,
    write_text,
)
from edgekit.cuda_layers import cpu_operators
from edgekit.datasets import read_split
from edgekit.errors import ArtifactError, ParityError
from edgekit.launch import run_py
from edgekit.parity import OTHER_PIXELS_TOLERANCE, SIXTEEN_BIT_TOLERANCE, int8_tolerance, reference
from edgekit.recipe import recipe_sha256
from edgekit.targets import Target

CHECK_TIMEOUT_S = 300


@dataclass(frozen=True)
class Bundled:
    """A bundle that passed its own check on this machine."""

    path: Path
    archive: Path
    size_bytes: int  # of the archive
    checked: dict[str, Any]  # what `run.py check --json` said
    proved: tuple[dict[str, str], ...]  # {"opencv", "engine"}, as in the manifest
    refused: tuple[dict[str, str], ...]  # the same, with a "reason"
    precision: str  # of the model: "fp32", "int8" or "int8-weights"
    why: str  # that one, in a sentence; "" where there was no choice
    cpu_operators: dict[str, int]  # for CUDA: what runs on the CPU there, with its number


def bundle(run: Path, target: Target, dist: Path = Path("dist"), precision: str = "") -> Bundled:
    """Builds dist/RUN-TARGET/ and dist/RUN-TARGET.tar.gz; the same inputs give the same bytes.

    precision: "fp32", "int8", "int8-weights", or "auto": what `quantize` chose for the target; "": the target's own.
    The bundle's check/ holds real validation images with the answers of the trained (torch) network, or of the int8
    network that the guard let pass. Its own `run.py check` must pass here, in a process of its own, before the folder
    appears: on the target's backend where this machine has it, else on OpenCV's own.

    Raises ArtifactError when the run was not exported, or not quantized where int8 is asked for, or model.onnx is not
    the one that was proved; SetupError when the target needs a plugin that is not in the cache; ParityError when the
    int8 asked for lost too much, or the check fails.
    """
    folder = open_run(run)
    proof = read_proof(folder)
    if proof.get("ok") is not True:  # an export on another OpenCV, after this model.onnx was made
        raise ArtifactError(f"the last export found {folder.onnx} wrong: see {folder.parity}, and export it again")
    if proof.get("form") != target.form:
        raise ArtifactError(
            f"{folder.onnx} is not in the form {target.form}, which {target.name} takes: "
            f"run `edgekit export {folder.path} --form {target.form}` first"
        )
    requirements = _requirements(target, proof)
    shipped = _shipped(folder, target, proof, precision or target.precision)
    plugin_file = plugin.find_plugin(target.arch[0]) if target.backend == "openvino/cpu" else None
    path = dist / f"{folder.name}-{target.name}"
    with replacing_folder(path) as temporary:
        shutil.copyfile(runner.__file__, temporary / "run.py")
        (temporary / "run.py").chmod(0o755)
        shutil.copyfile(shipped.file, temporary / "model.onnx")
        if plugin_file:
            shutil.copyfile(plugin_file, temporary / runner.PLUGIN_FILE)
        _write_check(folder, shipped, temporary / "check")
        write_text(temporary / "requirements.txt", "\n".join(requirements) + "\n")
        write_text(temporary / "README.md", _readme(folder, target, shipped))
        manifest = _manifest(folder, target, shipped, file_table(temporary))
        write_json(temporary / "manifest.json", manifest.to_json())
        checked = _check(temporary)
    archive = path.with_name(path.name + ".tar.gz")
    write_archive(path, archive)
    operators = cpu_operators(folder.onnx) if target.backend.startswith("cuda") else {}
    return Bundled(
        path,
        archive,
        archive.stat().st_size,
        checked,
        manifest.proved,
        manifest.refused,
        shipped.precision,
        shipped.why,
        operators,
    )


@dataclass(frozen=True)
class _Shipped:
    """The model file that the bundle gets."""

    file: Path
    precision: str
    tolerance: float  # of its outputs on the device
    rows: list[dict[str, Any]]  # what is known of it on each engine, the fastest first in each version
    why: str


def _shipped(folder: RunFolder, target: Target, proof: dict[str, Any], precision: str) -> _Shipped:
    if precision == "fp32":
        return _Shipped(folder.onnx, "fp32", proof["tolerance"], _rows(proof), "")
    record = read_quantization(folder, target.name)
    chosen = record["precision"] if precision == "auto" else precision
    why = record["why"] if precision == "auto" else f"{precision} was asked for"
    if chosen == "fp32":
        return _Shipped(folder.onnx, "fp32", proof["tolerance"], _rows(proof), why)
    made = [row for row in record["variants"] if row["file"] and row["name"].removesuffix("-mixed") == chosen]
    if not made:
        raise ParityError(f"no {chosen} network of {folder.path} passed the guard: {record['why']}")
    rows = [
        {**row, "version": row["opencv"], "engine": f"opencv-{row['engine']}", "best_ms": row["median_ms"]}
        for row in made[-1]["figures"]
    ]
    file, tolerance = folder.path / made[-1]["file"], made[-1]["tolerance"]
    if chosen == "int8":  # the check images may be harder ones than those that it was measured on
        blobs = _check_blobs(folder)
        tolerance = max(tolerance, int8_tolerance(reference(file, blobs), reference(folder.onnx, blobs)))
    return _Shipped(file, chosen, tolerance, _sorted(rows), why)


def _check_blobs(folder: RunFolder) -> np.ndarray:
    """The check images as network input: float32 (N, 3, h, w)."""
    spec = folder.read_spec()
    return np.concatenate([runner.preprocess(runner.read_image(file), spec) for file in folder.check_images()])


def _write_check(folder: RunFolder, shipped: _Shipped, check: Path) -> None:
    """Copies the run's check images and writes what the network must answer for them, from their bytes.

    outputs.npz holds its outputs, (N, ...) each; expected.json has a row an image, in the same order.
    """
    spec, files = folder.read_spec(), folder.check_images()
    images = [runner.read_image(file) for file in files]
    pixels = [runner.resize(image, spec) for image in images]
    outputs = _answers(folder, shipped, runner.normalize(np.stack(pixels), spec))
    check.mkdir()
    rows = []
    for number, (source, image) in enumerate(zip(files, images, strict=True)):
        shutil.copyfile(source, check / source.name)
        answer = {name: array[number : number + 1] for name, array in outputs.items()}
        results = runner.POSTPROCESS[spec.task](answer, spec, image.shape[:2])
        rows.append(
            {
                "file": source.name,
                "pixels_sha256": hashlib.sha256(pixels[number].tobytes()).hexdigest(),
                "results": runner.plain(results),
            }
        )
    arrays: dict[str, Any] = outputs
    np.savez(check / "outputs.npz", **arrays)  # without compression or a time: the same bytes each time
    write_json(check / "expected.json", {"images": rows})


def _answers(folder: RunFolder, shipped: _Shipped, blobs: np.ndarray) -> runner.Outputs:
    """The trained network's outputs; of int8, which is another network, its own in ONNX Runtime."""
    if shipped.precision == "fp32":
        return tasks.forward(tasks.load(folder), blobs, folder.read_spec().task)
    return reference(shipped.file, blobs)


def _requirements(target: Target, proof: dict[str, Any]) -> list[str]:
    """The target's, without the OpenCVs that it names and on which the network was found wrong.

    Raises ParityError where that is all of them.
    """
    failed = [version for version in target.prove_on if _rows(proof, version) and not _proved(_rows(proof, version))]
    if len(failed) == len(target.prove_on) or (target.backend == "openvino/cpu" and "openvino" in failed):
        raise ParityError(
            f"the network is wrong, or does not run, on every OpenCV of the target {target.name} "
            f"({', '.join(failed)}): choose another backbone (`edgekit backbones`) or target"
        )
    without = "".join(",!={}.{}.*".format(*version.split(".")) for version in failed if version != "openvino")
    is_pinned = target.backend == "openvino/cpu"  # the plugin is for one OpenCV
    return [line + without if line.startswith("opencv") and not is_pinned else line for line in target.requirements]


def _rows(proof: dict[str, Any], version: str = "") -> list[dict[str, Any]]:
    """What parity.json says of OpenCV's engines, or of those of one version; the fastest first in each version."""
    rows = [row for row in proof["verdicts"] if row["engine"].startswith("opencv-")]
    return _sorted([row for row in rows if not version or is_about(row, version)])


def _sorted(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return sorted(rows, key=lambda row: (runner.opencv_version(row["version"]), row["best_ms"] or math.inf))


def _proved(rows: list[dict[str, Any]]) -> tuple[dict[str, str], ...]:
    ok = [row for row in rows if row["status"] == "ok"]
    return tuple({"opencv": row["version"], "engine": row["engine"].removeprefix("opencv-")} for row in ok)


def _refused(rows: list[dict[str, Any]]) -> tuple[dict[str, str], ...]:
    bad = [row for row in rows if row["status"] != "ok"]
    return tuple(
        {"opencv": row["version"], "engine": row["engine"].removeprefix("opencv-"), "reason": row["status"]}
        for row in bad
    )


def _manifest(folder: RunFolder, target: Target, shipped: _Shipped, files: dict[str, dict[str, Any]]) -> Manifest:
    return Manifest(
        edgekit_version=__version__,
        name=folder.name,
        target=target.name,
        arch=target.arch,
        spec=folder.read_spec().to_dict(),
        backend=target.backend,
        form=target.form,
        precision=shipped.precision,
        threads=target.threads,
        proved=_proved(shipped.rows),
        refused=_refused(shipped.rows),
        files=files,
        tolerances=Tolerances(
            outputs=shipped.tolerance,
            outputs_other_pixels=max(shipped.tolerance, OTHER_PIXELS_TOLERANCE),
            outputs_16bit=SIXTEEN_BIT_TOLERANCE,
        ),
        latency_budget_ms=target.latency_budget_ms,
        provenance=_provenance(folder),
    )


def _provenance(folder: RunFolder) -> dict[str, Any]:
    """Where the network comes from: the same run gives the same answer, so no time stamps."""
    recipe = folder.read_recipe()
    metrics = read_json(folder.metrics) if folder.metrics.is_file() else {}
    figures = metrics.get("columns", {}).get("torch", {})
    return {
        "git_revision": _git_revision(folder.path),
        "recipe_sha256": recipe_sha256(recipe),
        "dataset_sha256": read_split(folder.split).sha256,
        "weights_sha256": runner.file_sha256(folder.weights),
        "backbone": recipe.model.backbone,
        "metrics": {name: figures[name] for name in _HEADLINES if name in figures},
    }


_HEADLINES = ("top1", "map50", "map", "mean_iou")  # as metrics.json calls them


def _git_revision(folder: Path) -> str | None:
    command = ["git", "-C", str(folder.resolve()), "rev-parse", "HEAD"]
    try:
        answer = subprocess.run(command, capture_output=True, text=True, check=False)
    except OSError:  # no git on this machine
        return None
    return answer.stdout.strip() or None if answer.returncode == 0 else None


def _check(folder: Path) -> dict[str, Any]:
    """Runs the bundle's own check as the device will. Raises ParityError where it does not pass."""
    command = run_py(folder, "check", "--json", "--allow-fallback")
    try:
        answer = subprocess.run(command, capture_output=True, text=True, timeout=CHECK_TIMEOUT_S, check=False)
    except subprocess.TimeoutExpired:
        raise ParityError(f"the bundle's check did not end within {CHECK_TIMEOUT_S} s on this machine") from None
    if answer.returncode not in (0, 1, 3) or not answer.stdout:
        last = (answer.stderr.strip().splitlines() or ["no message"])[-1]
        raise ParityError(f"the bundle's run.py failed here (exit {answer.returncode}): {last}")
    checked: dict[str, Any] = json.loads(answer.stdout)
    failed = [row for row in checked["images"] if not row["ok"]]
    if failed:
        raise ParityError(
            f"the bundle does not answer as the trained network: {len(failed)} of {len(checked['images'])} check "
            f"images differ, such as {failed[0]['file']} ({failed[0]['reason']}). Export it again"
        )
    return checked


def _readme(folder: RunFolder, target: Target, shipped: _Shipped) -> str:
    spec = folder.read_spec()
    classes = ", ".join(spec.class_names[:10]) + (", …" if len(spec.class_names) > 10 else "")
    return _README.format(
        name=folder.name,
        target=target.name,
        description=target.description,
        needs=f"Python {target.python}, numpy{_OTHERS[target.backend]} and OpenCV {target.opencv}",
        backend=target.backend,
        precision=shipped.precision,
        install=_indented(target.install),
        classes=f"{len(spec.class_names)} ({classes})",
        size="x".join(map(str, spec.input_size)),
        images=len(folder.check_images()),
        formats=_FORMATS[spec.task],
    )


def _indented(lines: Sequence[str]) -> str:
    return "\n".join(f"    {line}" for line in lines)


_OTHERS = {
    "opencv/cpu": "",
    "openvino/cpu": ", openvino",
    "cuda/fp32": ", CUDA, cuDNN",
    "cuda/fp16": ", CUDA, cuDNN",
}

_FORMATS = {
    "classify": "",
    "detect": """    python3 run.py infer DIR --yolo OUT     # a text file an image; --coco FILE: one COCO JSON
    python3 run.py infer DIR --min-score 0.5    # only boxes that it is surer of
""",
    "segment": """    python3 run.py infer DIR --masks OUT    # a PNG an image, each pixel its class; --coco FILE
""",
}

_README = """# {name} for {target}

{description}

Network input {size} px (height x width); classes: {classes}.
Needs {needs}; nothing else.
It runs through {backend} and is {precision}: where that is missing, `run.py` says so and stops.

## Install (once)

{install}

## Prove, then run

    python3 run.py check                    # does this device compute what was trained?
    python3 run.py infer photo.jpg          # a JSON line an image; also folders, globs, videos, rtsp:// URLs
    python3 run.py infer --camera 0         # live; --draw DIR writes pictures with the answers on them
{formats}    python3 run.py bench                    # latency here, stage by stage
    python3 run.py bench --try-targets      # every engine that is here: is it right, and how fast?
    python3 run.py info                     # what this bundle is

From Python: `from run import Model; Model("path/to/this/folder")(image)` with a BGR image, as cv2.imread gives it.

Exit codes: 0 ok, 1 the check failed, 2 bad usage or bad input, 3 ok on a fallback (`--allow-fallback`).

`run.py` refuses files that are not those that were built. `check/` holds {images} images of the validation data, with
the answers of the network that was measured: they travel with the bundle, so share it only with who may see them.
"""
