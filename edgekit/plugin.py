"""The OpenVINO plugin of cv2.dnn: one file that makes the stock OpenCV wheel several times as fast on a CPU.

Neither OpenCV's wheels nor distributions ship it, so it is built here (or given, already built) and kept in the
cache. It passes C++ objects to the OpenCV that loads it: it works with exactly one OpenCV and one OpenVINO.
"""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from edgekit.artifacts import replacing
from edgekit.environments import cache_folder, opencv_python
from edgekit.errors import ArtifactError, SetupError, UsageError

OPENCV = "4.14.0.94"
OPENVINO = "2026.4.1"
FILE_NAME = "libopencv_dnn_openvino.so"
ARCHES = {"x86_64": 62, "aarch64": 183}  # ELF's e_machine

ENTRY = b"opencv_dnn_plugin_init_v0\0"
PRECISION_VARIABLE = "OPENCV_DNN_OPENVINO_PRECISION"

Progress = Callable[[str, int, int], None]
"""(what is being done, how far, of how much; 0 of 0 where that is not known)."""


@dataclass(frozen=True)
class PluginFile:
    """What a plugin's own bytes say of it."""

    path: Path
    arch: str
    opencv: str  # "4.14.0"
    openvino: str  # the end of its library's name: "2641" for 2026.4.1
    has_precision: bool  # whether it computes in f32 unless asked otherwise

    @property
    def warning(self) -> str:
        """What to know before it is used; "" where there is nothing."""
        if self.has_precision:
            return ""
        harm = {
            "x86_64": "computes in bf16 by itself where the CPU can",
            "aarch64": "computes in f16, and int8 models wrong, on the cores of a Raspberry Pi 5",
        }[self.arch]
        return (
            f"{self.path} has no setting {PRECISION_VARIABLE}: it {harm}. "
            f"`edgekit opencv add openvino --arch {self.arch}` builds one that has"
        )


def find_plugin(arch: str) -> Path:
    """The cached plugin for an architecture ("x86_64" or "aarch64"), looked at again.

    Raises SetupError where there is none or it is damaged, ArtifactError never, UsageError for another architecture.
    """
    path = plugin_path(arch)
    command = f"`edgekit opencv add openvino --arch {arch}`"
    if not path.is_file():
        raise SetupError(f"no OpenVINO plugin for {arch} here: {command} builds it")
    try:
        read_plugin(path, arch)
    except ArtifactError as error:
        raise SetupError(f"{error}: remove it, {command} builds it again") from None
    return path


def plugin_path(arch: str) -> Path:
    """Where the cache has, or will have, the plugin. Raises UsageError for an unknown architecture."""
    if arch not in ARCHES:
        raise UsageError(f"no OpenVINO plugin for {arch!r}: give --arch {' or '.join(ARCHES)}")
    return cache_folder() / "plugins" / f"openvino-{OPENCV}-{OPENVINO}-{arch}" / FILE_NAME


def openvino_python() -> Path:
    """The interpreter of an environment with the OpenCV and the OpenVINO that the plugin is for. Raises SetupError."""
    return opencv_python(OPENCV, f"openvino=={OPENVINO}")


def read_plugin(path: Path, arch: str) -> PluginFile:
    """Checks that a file is the plugin for this architecture, our OpenCV and our OpenVINO. Raises ArtifactError."""
    try:
        data = path.read_bytes()
    except OSError as error:
        raise ArtifactError(f"cannot read {path}: {error.strerror}") from None
    found = _elf_arch(data)
    if not found:
        raise ArtifactError(f"{path} is no 64-bit shared library for Linux: {FILE_NAME} was expected")
    if found != arch:
        raise ArtifactError(f"{path} is for {found}, and {arch} was asked for: give --arch {found} or another file")
    if ENTRY not in data:
        raise ArtifactError(f"{path} is no plugin of cv2.dnn (it has no {ENTRY[:-1].decode()})")
    opencv = _first(rb"OpenCV version is '(\d+\.\d+\.\d+)", data)
    wanted = OPENCV.rpartition(".")[0]
    if opencv != wanted:
        raise ArtifactError(f"{path} was made for OpenCV {opencv or 'of an unknown version'}, not {wanted}")
    openvino = _first(rb"libopenvino\.so\.(\d+)\0", data)
    if openvino != openvino_soname():
        raise ArtifactError(f"{path} needs libopenvino.so.{openvino or '?'}, and openvino {OPENVINO} has another")
    return PluginFile(path, arch, opencv, openvino, f"{PRECISION_VARIABLE}\0".encode() in data)


def openvino_soname() -> str:
    """ "2026.4.1" → "2641", the end of its libraries' names."""
    year, minor, patch = OPENVINO.split(".")
    return f"{year[-2:]}{minor}{patch}"


def _elf_arch(data: bytes) -> str:
    """The architecture of a 64-bit little-endian ELF shared object; "" of anything else."""
    if data[:6] != b"\x7fELF\x02\x01" or len(data) < 64 or int.from_bytes(data[16:18], "little") != 3:
        return ""
    machine = int.from_bytes(data[18:20], "little")
    return next((arch for arch, code in ARCHES.items() if code == machine), f"ELF machine {machine}")


def _first(pattern: bytes, data: bytes) -> str:
    match = re.search(pattern, data)
    return match[1].decode() if match else ""


def add_openvino(arch: str, *, source: Path | None = None, progress: Progress = lambda name, done, total: None) -> Path:
    """Puts the plugin for an architecture into the cache, checked; one that is there is used again.

    source: a plugin that was built already, which replaces the one in the cache; None builds it.
    Raises ArtifactError where the file is not such a plugin, SetupError where something for the build is missing.
    """
    path = plugin_path(arch)
    if source is None:
        raise SetupError("the plugin cannot be built yet: give --from FILE")
    read_plugin(source, arch)
    progress(f"copying {source.name}", 0, 0)
    with replacing(path) as temporary:
        shutil.copyfile(source, temporary)
    return path
