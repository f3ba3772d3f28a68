"""verify: does model.onnx compute what was trained, on the OpenCVs that devices have? → rows in parity.json

    model.onnx ─ an environment with that OpenCV, each of its engines, a child process each ─► verdicts

Each engine is proved twice: on the very input that torch had, and end to end, from the bytes of image files.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from edgekit import parity, plugin, runner, tasks
from edgekit.artifacts import RunFolder, is_about, open_run, read_proof, write_json
from edgekit.errors import SetupError

VERSIONS = ("4.6", "4.10", "4.14", "5.0")  # Debian 12; Debian 13; the last 4.x; the first 5
OPENVINO = "openvino"  # in the place of a version: the OpenCV that the plugin is for, with it
TIMEOUT_S = 180.0  # for an engine, all images


@dataclass(frozen=True)
class Verified:
    """The verdicts on each version asked for, by that version; "not proved" where it cannot be had."""

    run: Path
    verdicts: Mapping[str, tuple[parity.Verdict, ...]]

    @property
    def failed(self) -> tuple[str, ...]:
        """The versions on which no engine computes what was trained."""
        return tuple(version for version, rows in self.verdicts.items() if _outcome(rows) == "failed")

    @property
    def not_proved(self) -> tuple[str, ...]:
        """The versions that cannot be had here."""
        return tuple(version for version, rows in self.verdicts.items() if _outcome(rows) == "not proved")


def verify(
    run: Path, versions: Sequence[str] = VERSIONS, *, progress: Callable[[str], None] = lambda _: None
) -> Verified:
    """Proves a run's model.onnx on OpenCVs from PyPI, in environments of their own; parity.json gets the rows.

    versions: exact (4.14.0.94), the beginning of one (4.14: the newest of them), or "openvino": OpenVINO, through the
    plugin in the cache. progress is told what is done.
    A version that cannot be had here is "not proved", and no error. Raises ArtifactError when the run was not exported
    or is damaged.
    """
    folder = open_run(run)
    read_proof(folder)
    spec, images = folder.read_spec(), folder.check_images()
    pixels = [runner.resize(runner.read_image(image), spec) for image in images]
    blobs = runner.normalize(np.stack(pixels), spec)
    expected = tasks.forward(tasks.load(folder), blobs, folder.read_spec().task)
    tolerance = folder.read_recipe().export.tolerance
    found: dict[str, tuple[parity.Verdict, ...]] = {}
    for version in versions:
        progress(f"OpenCV {version}" if version != OPENVINO else "OpenVINO through OpenCV")
        try:
            python, file = plugin.interpreter(version)
        except SetupError as error:
            found[version] = (parity.Verdict("opencv", version, "not proved", None, str(error), ""),)
            continue
        limits: dict[str, Any] = {"tolerance": tolerance, "timeout_s": TIMEOUT_S, "python": python, "plugin": file}
        _, *verdicts = parity.compare(folder.onnx, blobs, expected, **limits)  # the first is ONNX Runtime's
        found[version] = parity.compare_files(
            verdicts,
            folder.onnx,
            folder.spec,
            images,
            [hashlib.sha256(image.tobytes()).hexdigest() for image in pixels],
            expected,
            tolerance_other_pixels=parity.OTHER_PIXELS_TOLERANCE,
            **limits,
        )
    _keep(folder, [verdict for rows in found.values() for verdict in rows])
    return Verified(run, found)


def unproved(run: Path, versions: Iterable[str]) -> tuple[str, ...]:
    """Those of the versions on which parity.json names no engine as right: what was wrong there may be mended."""
    rows = [row for row in read_proof(RunFolder(run))["verdicts"] if row["status"] == "ok"]
    return tuple(version for version in versions if not any(is_about(row, version) for row in rows))


def _keep(folder: RunFolder, verdicts: Iterable[parity.Verdict]) -> None:
    """Puts verdicts into parity.json, in the place of older ones on the same engine and version."""
    proof = read_proof(folder)
    rows = {(row["engine"], row["version"]): row for row in proof["verdicts"]}
    rows |= {(verdict.engine, verdict.version): asdict(verdict) for verdict in verdicts}
    write_json(folder.parity, {**proof, "verdicts": list(rows.values())})


def _outcome(rows: Iterable[parity.Verdict]) -> str:
    statuses = {row.status for row in rows}
    return "ok" if "ok" in statuses else "not proved" if statuses == {"not proved"} else "failed"
