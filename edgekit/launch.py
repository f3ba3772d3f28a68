"""How a bundle's own run.py is started on this machine: with the interpreter that has what the bundle runs through."""

from __future__ import annotations

import contextlib
import platform
import sys
from pathlib import Path

from edgekit import plugin
from edgekit.artifacts import read_json
from edgekit.errors import SetupError


def run_py(bundle: Path, *arguments: str) -> list[str]:
    """The command line of `run.py ARGUMENTS`. An OpenVINO bundle gets an environment with the OpenCV and the openvino
    that it names; where that cannot be had, and for all others, it is this interpreter, and run.py says what it lacks.

    Raises ArtifactError where there is no readable manifest.
    """
    manifest = read_json(bundle / "manifest.json")
    python = Path(sys.executable)
    if manifest.get("backend") == "openvino/cpu" and platform.machine() in manifest.get("arch", ()):
        with contextlib.suppress(SetupError):
            python = plugin.openvino_python()
    return [str(python), str(bundle / "run.py"), *arguments]
