"""What stages leave for each other on disk: the run folder, the bundle folder, and how files get there whole.

Every file is written under a temporary name beside its place and renamed, so that a reader (or a power cut) meets
the old file or the new one, never half of one.
"""

from __future__ import annotations

import gzip
import io
import json
import os
import shutil
import tarfile
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict

from edgekit import runner
from edgekit.errors import ArtifactError
from edgekit.recipe import Recipe, read_recipe


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Gives a temporary path beside `path`; renames it to `path` at the end, or removes it after an error.

    Raises ArtifactError where the folder cannot be written (no rights, no space).
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".part" + path.suffix)
        os.close(handle)
    except OSError as error:
        raise ArtifactError(f"cannot write {path}: {error.strerror}") from None
    temporary = Path(name)
    try:
        yield temporary
        temporary.chmod(0o666 & ~_umask())  # mkstemp's 0600 would hide the file from other users
        temporary.replace(path)
    except OSError as error:
        raise ArtifactError(f"cannot write {path}: {error.strerror or error}") from None
    finally:
        temporary.unlink(missing_ok=True)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def write_bytes(path: Path, data: bytes) -> None:
    """Writes a whole file or nothing. Raises ArtifactError."""
    with replacing(path) as temporary:
        temporary.write_bytes(data)


def write_text(path: Path, text: str) -> None:
    """Writes UTF-8 with \\n line ends, whole or not at all. Raises ArtifactError."""
    write_bytes(path, text.encode())


def write_json(path: Path, value: object) -> None:
    """Writes indented JSON, whole or not at all. Raises ArtifactError."""
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def read_json(path: Path) -> dict[str, Any]:
    """Reads a JSON object. Raises ArtifactError when it is missing or damaged."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ArtifactError(f"cannot read {path}: {error.strerror}") from None
    except (ValueError, RecursionError) as error:
        raise ArtifactError(f"{path} is damaged ({error}): make it again") from None
    if not isinstance(value, dict):
        raise ArtifactError(f"{path} is damaged (not an object): make it again")
    return value


@dataclass(frozen=True)
class RunFolder:
    """runs/NAME: everything that one fine-tuning made, and what was made of it since."""

    path: Path

    @property
    def name(self) -> str:
        """The folder's own name."""
        return self.path.resolve().name

    @property
    def recipe(self) -> Path:
        """recipe.toml, resolved: nothing in it is left to a default."""
        return self.path / "recipe.toml"

    @property
    def spec(self) -> Path:
        """spec.json: preprocessing, class names, postprocessing."""
        return self.path / "spec.json"

    @property
    def split(self) -> Path:
        """split.csv: which image went where, by content."""
        return self.path / "split.csv"

    @property
    def check(self) -> Path:
        """check/: a few of the validation images, as they were; export and bundle prove themselves on them."""
        return self.path / "check"

    @property
    def history(self) -> Path:
        """history.csv: a row an epoch."""
        return self.path / "history.csv"

    @property
    def state(self) -> Path:
        """state/last.safetensors: what --resume continues from."""
        return self.path / "state" / "last.safetensors"

    @property
    def weights(self) -> Path:
        """model.safetensors: the best epoch's weights."""
        return self.path / "model.safetensors"

    @property
    def metrics(self) -> Path:
        """metrics.json, written by evaluate."""
        return self.path / "metrics.json"

    @property
    def onnx(self) -> Path:
        """model.onnx, written by export once it is proved."""
        return self.path / "model.onnx"

    @property
    def parity(self) -> Path:
        """parity.json: the proof's figures."""
        return self.path / "parity.json"

    @property
    def int8(self) -> Path:
        """model.int8.onnx, written by quantize where it kept its accuracy."""
        return self.path / "model.int8.onnx"

    @property
    def int8_weights(self) -> Path:
        """model.int8-weights.onnx, written by quantize: int8 weights, float arithmetic."""
        return self.path / "model.int8-weights.onnx"

    @property
    def quantization(self) -> Path:
        """quantize.json: what quantize measured, and what it chose."""
        return self.path / "quantize.json"

    @property
    def latency(self) -> Path:
        """latency/: a file a target and device, written by bench --run."""
        return self.path / "latency"

    @property
    def report(self) -> Path:
        """report.html, for people."""
        return self.path / "report.html"

    def read_recipe(self) -> Recipe:
        """Raises ConfigError when it is missing or not valid."""
        return read_recipe(self.recipe)

    def read_spec(self) -> runner.Spec:
        """Raises ArtifactError or RunnerError when it is missing or not valid."""
        return runner.Spec.from_dict(read_json(self.spec))

    def check_images(self) -> tuple[Path, ...]:
        """The files of check/, sorted. Raises ArtifactError when there are none."""
        files = tuple(sorted(p for p in self.check.glob("*") if p.is_file()))
        if not files:
            raise ArtifactError(f"no check images in {self.check}: `edgekit finetune` puts them there")
        return files


def open_run(path: Path) -> RunFolder:
    """An existing run folder with trained weights. Raises ArtifactError otherwise."""
    run = RunFolder(path)
    if not path.is_dir():
        raise ArtifactError(f"no run folder at {path}: make one with `edgekit finetune DATA`")
    for file in (run.recipe, run.spec, run.weights):
        if not file.is_file():
            hint = f"continue it with `edgekit finetune --resume {path}`" if run.recipe.is_file() else "is it a run?"
            raise ArtifactError(f"{path} has no {file.name} (edgekit finetune writes it): {hint}")
    return run


def read_proof(run: RunFolder) -> dict[str, Any]:
    """parity.json, once it is certain that it speaks of this model.onnx. Raises ArtifactError otherwise."""
    if not run.onnx.is_file() or not run.parity.is_file():
        raise ArtifactError(f"{run.path} has no proved model.onnx: run `edgekit export {run.path}` first")
    proof = read_json(run.parity)
    if proof.get("onnx_sha256") != runner.file_sha256(run.onnx):
        raise ArtifactError(f"{run.onnx} is not the one that was proved: run `edgekit export {run.path}` again")
    return proof


def is_about(row: Mapping[str, Any], version: str) -> bool:
    """Does a verdict of parity.json speak of an OpenCV: a version and its own engines, or "openvino"?"""
    if version == "openvino" or row["engine"] == "opencv-openvino":
        return bool(version == "openvino" and row["engine"] == "opencv-openvino")
    is_opencv = row["engine"].startswith("opencv-")
    return is_opencv and runner.opencv_version(row["version"]) == runner.opencv_version(version)


def is_exported(run: RunFolder, form: str) -> bool:
    """Is there a model.onnx, in this form, with its proof?"""
    try:
        return bool(read_proof(run).get("form") == form)
    except ArtifactError:
        return False


def read_quantization(run: RunFolder, target: str) -> dict[str, Any]:
    """quantize.json, once it is certain that it speaks of this model.onnx, this target and the int8 files here.

    Raises ArtifactError otherwise.
    """
    again = f"run `edgekit quantize {run.path} --target {target}`"
    if not run.quantization.is_file():
        raise ArtifactError(f"{run.path} was not quantized: {again}")
    record = read_json(run.quantization)
    if record.get("target") != target:
        raise ArtifactError(f"{run.quantization} is about the target {record.get('target')}, not {target}: {again}")
    if record.get("onnx_sha256") != read_proof(run)["onnx_sha256"]:
        raise ArtifactError(f"{run.quantization} is about another model.onnx than the one here: {again}")
    for variant in record["variants"]:
        file = run.path / variant["file"]
        if variant["file"] and (not file.is_file() or runner.file_sha256(file) != variant["sha256"]):
            raise ArtifactError(f"{file} is not the one that was measured: {again}")
    return record


def is_quantized(run: RunFolder, target: str) -> bool:
    """Is there a quantize.json for this target, about what is here?"""
    try:
        read_quantization(run, target)
    except ArtifactError:
        return False
    return True


def unused_name(folder: Path, name: str) -> Path:
    """folder/name, or folder/name-2, -3, … where that exists: a run is never overwritten."""
    candidate, count = folder / name, 1
    while candidate.exists():
        count += 1
        candidate = folder / f"{name}-{count}"
    return candidate


class Tolerances(BaseModel):
    """Largest allowed difference of an output on the device, as a share of the largest value of that output."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    outputs: float
    outputs_other_pixels: float  # where the device's decoder gave other pixels than the workstation's
    outputs_16bit: float  # where the device computes in fp16 or bf16


class Manifest(BaseModel):
    """manifest.json of a bundle, but for its own "sha256". The format's description is docs/bundle.md."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    schema_: str = runner.SCHEMA
    edgekit_version: str
    name: str
    target: str
    arch: tuple[str, ...]  # machine names as `uname -m` or Windows gives them
    spec: dict[str, Any]
    backend: str
    form: str  # lowering.Form: what the model is made fast for
    precision: str  # of the model: "fp32", "int8", "int8-weights"
    threads: int
    proved: tuple[dict[str, str], ...]  # {"opencv": "4.14.0", "engine": "classic"}, the fastest engine first
    refused: tuple[dict[str, str], ...]  # the same, where the network was found wrong or did not run
    files: dict[str, dict[str, Any]]  # {name: {"sha256", "size_bytes"}}
    tolerances: Tolerances
    latency_budget_ms: float | None
    provenance: dict[str, Any]

    def to_json(self) -> dict[str, Any]:
        """The file's content, with "schema" and "sha256" set."""
        content = self.model_dump(mode="json")
        content = {"schema": content.pop("schema_"), **content}
        return {**content, "sha256": runner.manifest_sha256(content)}


def file_table(folder: Path) -> dict[str, dict[str, Any]]:
    """{relative name with /: {"sha256", "size_bytes"}} of every file below a folder, sorted by name."""
    files = sorted(p for p in folder.rglob("*") if p.is_file())
    return {
        p.relative_to(folder).as_posix(): {"sha256": runner.file_sha256(p), "size_bytes": p.stat().st_size}
        for p in files
    }


@contextmanager
def replacing_folder(path: Path) -> Iterator[Path]:
    """Gives an empty temporary folder beside `path`; puts it in the place of `path` at the end.

    After an error the temporary folder is removed and the old one is as it was. Raises ArtifactError where the
    parent cannot be written, and where `path` is a file.
    """
    if path.exists() and not path.is_dir():
        raise ArtifactError(f"{path} is a file where a folder was to be made: move it away")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(dir=path.parent, prefix=f".{path.name}."))
        temporary.chmod(0o777 & ~_umask())
    except OSError as error:
        raise ArtifactError(f"cannot write {path}: {error.strerror}") from None
    try:
        yield temporary
        if path.exists():
            old = temporary.with_name(temporary.name + ".old")
            path.rename(old)
            temporary.rename(path)
            shutil.rmtree(old)
        else:
            temporary.rename(path)
    except OSError as error:
        raise ArtifactError(f"cannot write {path}: {error.strerror or error}") from None
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def write_archive(folder: Path, archive: Path) -> None:
    """Packs a folder as .tar.gz under its own name: the same files give the same bytes. Raises ArtifactError.

    (https://reproducible-builds.org/docs/archives/: sorted names, no times, no owners, fixed modes.)
    """
    buffer = io.BytesIO()
    with (
        gzip.GzipFile(fileobj=buffer, mode="wb", mtime=0) as packed,
        tarfile.open(fileobj=packed, mode="w", format=tarfile.PAX_FORMAT) as tar,
    ):
        for file in sorted(p for p in folder.rglob("*") if p.is_file()):
            entry = tarfile.TarInfo(f"{folder.name}/{file.relative_to(folder).as_posix()}")
            data = file.read_bytes()
            entry.size = len(data)
            entry.mode = 0o755 if file.name == "run.py" else 0o644
            tar.addfile(entry, io.BytesIO(data))
    write_bytes(archive, buffer.getvalue())
