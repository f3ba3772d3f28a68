"""What the OpenCV here can really do in cv2.dnn, and the command that gets what it cannot."""

from __future__ import annotations

import platform
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from edgekit import doctor, plugin
from edgekit.doctor import Finding
from edgekit.errors import SetupError, UsageError

INSTALL = f"uv pip install opencv-python-headless=={plugin.OPENCV} openvino=={plugin.OPENVINO}"


@dataclass(frozen=True)
class Abilities:
    """Of the OpenCV that this Python imports."""

    version: str  # "4.14.0"
    path: str
    engines: tuple[str, ...]
    threads: int
    backends: dict[str, list[str]]  # {backend: targets}, as it is imported here; the plugin is not in it
    plugin: plugin.Trial  # the same OpenCV with the plugin, in a process of its own
    cuda_devices: tuple[str, ...]  # that the driver names
    findings: tuple[Finding, ...]


def check() -> Abilities:
    """Looks at the OpenCV of this Python. Raises SetupError where it cannot be imported."""
    found = doctor.opencv()
    try:
        import cv2

        from edgekit import runner
    except ImportError:
        raise SetupError(f"OpenCV {found.value}: {found.advice}") from None
    backends, trial, devices = doctor.backend_targets(), _try_plugin(), cuda_devices()
    threads = cv2.getNumThreads()
    findings = (
        found,
        doctor.opencv_packages(),
        doctor.opencv_engines(),
        Finding("threads", f"{threads} of {doctor.cores().value} cores", None),
        Finding("backend opencv", ", ".join(backends["opencv"]) or "absent", bool(backends["opencv"])),
        judge_openvino(backends["openvino"], cv2.__version__, trial),
        *map(cached_plugin, plugin.ARCHES),
        judge_cuda(backends["cuda"], devices),
    )
    version, path = cv2.__version__, str(Path(cv2.__file__).parent)
    return Abilities(version, path, runner.engines(), threads, backends, trial, devices, findings)


def _try_plugin() -> plugin.Trial:
    """Loads the cached plugin for this machine into this Python's OpenCV, as run.py would."""
    try:
        path = plugin.find_plugin(plugin.machine())
    except (SetupError, UsageError) as error:
        return plugin.Trial(None, "", str(error))
    return plugin.try_plugin(path, Path(sys.executable), isolated=False)


def judge_openvino(targets: list[str], version: str, trial: plugin.Trial) -> Finding:
    """The backend's own targets, OpenCV's version and the trial of the plugin → a finding."""
    topic, wanted = "backend openvino", plugin.OPENCV.rpartition(".")[0]
    if targets:
        return Finding(topic, f"{', '.join(targets)}, in this OpenCV itself", True)
    if trial.relative_error is not None:
        value = f"{trial.precision}, by the plugin; off OpenCV's own result by {trial.relative_error:.0e}"
        right = trial.relative_error <= plugin.MAX_RELATIVE_ERROR
        advice = "" if right else "a lower precision, or wrong: `edgekit opencv add openvino` builds one that is right"
        return Finding(topic, value, right, advice)
    if version != wanted:
        return Finding(topic, f"absent: its plugin is for OpenCV {wanted}, and this is {version}", None, INSTALL)
    return Finding(topic, f"absent: {trial.message or 'the plugin is not loaded'}", None, INSTALL)


def cached_plugin(arch: str) -> Finding:
    """Whether bundles with the OpenVINO plugin can be made for an architecture."""
    topic = f"plugin {arch}"
    try:
        found = plugin.read_plugin(plugin.find_plugin(arch), arch)
    except SetupError as error:
        return Finding(topic, "not in the cache", None, str(error))
    return Finding(topic, str(found.path), None if found.warnings else True, " ".join(found.warnings))


def judge_cuda(targets: list[str], devices: tuple[str, ...]) -> Finding:
    """The backend's targets and the GPUs that the driver names → a finding."""
    topic, seen = "backend cuda", ", ".join(devices) or "no GPU seen"
    if targets:
        return Finding(topic, f"{', '.join(targets)} on {seen}", True)
    if not devices:
        return Finding(topic, f"absent, {seen}", None, "on a Jetson: edgekit opencv add cuda --arch orin")
    compute = devices[0].rpartition(" ")[2]
    return Finding(topic, f"absent, and there is {seen}", None, f"edgekit opencv add cuda --arch {compute}")


def cuda_devices() -> tuple[str, ...]:
    """ "NAME COMPUTE" of every GPU that NVIDIA's driver names, such as "NVIDIA H100 9.0"; a Jetson by its board."""
    program = shutil.which("nvidia-smi")
    if program:
        command = [program, "--query-gpu=name,compute_cap", "--format=csv,noheader"]
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=30, check=False)
        except subprocess.TimeoutExpired:
            return ()
        rows = [line.rpartition(",") for line in done.stdout.splitlines() if done.returncode == 0]
        devices = tuple(f"{name.strip()} {compute.strip()}" for name, _, compute in rows)
        if devices and all(device.rpartition(" ")[2].replace(".", "").isdigit() for device in devices):
            return devices
    return jetson_device(_board())


def jetson_device(board: str) -> tuple[str, ...]:
    """A board's own name ("NVIDIA Jetson Orin Nano …") → its GPU as `cuda_devices` names it; () for other boards."""
    words = board.lower().split()
    if "jetson" not in words and "orin" not in words:
        return ()
    for name, compute in (("orin", "8.7"), ("xavier", "7.2"), ("tx2", "6.2"), ("nano", "5.3")):
        if name in words:
            return (f"{board} {compute}",)
    return ()


def _board() -> str:
    if platform.system() != "Linux":
        return ""
    try:
        return Path("/proc/device-tree/model").read_text(encoding="utf-8", errors="replace").strip("\0\n ")
    except OSError:
        return ""
