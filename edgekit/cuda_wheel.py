"""An OpenCV wheel with the CUDA backend of cv2.dnn, compiled where CUDA and cuDNN are: a Jetson, a GPU workstation.

PyPI's wheels have no CUDA, and JetPack's own OpenCV has none either. The wheel is for one compute capability and for
the CUDA that it was compiled with.
"""

from __future__ import annotations

import os
import platform
import re
import shlex
import shutil
import subprocess
import sysconfig
import zipfile
from dataclasses import dataclass
from pathlib import Path

from edgekit.compiling import (
    OFF,
    TOOLS,
    Plan,
    Progress,
    configure_and_compile,
    fetch_source,
    need_compiler,
    need_disk,
    only_one,
    tools,
    unpack,
)
from edgekit.environments import cache_folder
from edgekit.errors import ArtifactError, SetupError, UsageError
from edgekit.plugin import OPENCV

PACKAGE = "opencv-contrib-python-headless"
BOARDS = {"nano": "5.3", "tx2": "6.2", "xavier": "7.2", "orin": "8.7"}
DEFAULT_HOME = Path("/usr/local/cuda")
MODULES = "core,imgproc,imgcodecs,videoio,dnn,calib3d,python3,cudev"  # without calib3d the packaging fails at the end
# What the source package's pyproject.toml asks for.
REQUIRES = (
    *("numpy==2.0.2; python_version < '3.13'", "numpy==2.1.3; python_version >= '3.13'"),
    *("setuptools==59.2.0; python_version < '3.12'", "setuptools<70; python_version >= '3.12'"),
    *("packaging", "scikit-build>=0.18", "wheel"),
)
HEADERS = {"cudnn.h": "cuDNN", "cublas_v2.h": "cuBLAS", "nppi.h": "NPP"}
ON_JETSON = "sudo apt-get install nvidia-jetpack (or: cuda-toolkit and libcudnn with their -dev packages)"
ELSEWHERE = "install NVIDIA's CUDA toolkit and cuDNN, with their headers, and put nvcc on the PATH"


@dataclass(frozen=True)
class Toolkit:
    """The CUDA of this machine."""

    home: Path  # the folder that has its include/
    version: tuple[int, int]
    computes: tuple[str, ...]  # that it compiles for, "8.7"; () where it is too old to say


def compute_capability(arch: str) -> str:
    """A board's name or a compute capability → the latter, "8.7". Raises UsageError."""
    compute = BOARDS.get(arch.lower(), arch)
    if not re.fullmatch(r"\d{1,2}\.\d", compute):
        boards = ", ".join(f"{name} ({value})" for name, value in BOARDS.items())
        raise UsageError(f"{arch!r} is no compute capability: give one such as 8.6, or a board: {boards}")
    return compute


def find_toolkit(compute: str) -> Toolkit:
    """Raises SetupError, which says all that is missing and how to get it, where it cannot compile for `compute`."""
    remedy = ON_JETSON if Path("/etc/nv_tegra_release").exists() else ELSEWHERE
    nvcc = _nvcc()
    if nvcc is None:
        raise SetupError(f"no nvcc here, CUDA's compiler (looked on the PATH and in /usr/local/cuda): {remedy}")
    toolkit = read_toolkit(nvcc)
    if toolkit.computes and compute not in toolkit.computes:
        raise SetupError(
            f"CUDA {_dotted(toolkit)} does not compile for {compute}, only for {', '.join(toolkit.computes)}: "
            "use the CUDA of the board itself (JetPack 4 has 10.2 for 5.3, JetPack 5 and 6 have 11.4 and 12 for 8.7)"
        )
    places = include_folders(toolkit.home)
    missing = [name for header, name in HEADERS.items() if not any((place / header).is_file() for place in places)]
    if missing:
        looked = ", ".join(map(str, places))
        raise SetupError(f"no headers of {' and '.join(missing)} here (looked in {looked}): {remedy}")
    return toolkit


def _nvcc() -> Path | None:
    homes = [os.environ[name] for name in ("CUDA_HOME", "CUDA_PATH") if os.environ.get(name)]
    candidates = [*(str(Path(home, "bin", "nvcc")) for home in homes), "nvcc", "/usr/local/cuda/bin/nvcc"]
    found = next(filter(None, map(shutil.which, candidates)), None)
    return Path(found) if found else None


def read_toolkit(nvcc: Path) -> Toolkit:
    """Asks nvcc for its version and what it compiles for. Raises SetupError where it does not answer."""
    said = subprocess.run([str(nvcc), "--version"], capture_output=True, text=True, check=False).stdout
    release = re.search(r"release (\d+)\.(\d+)", said)
    if not release:
        raise SetupError(f"{nvcc} does not say its version: is it CUDA's compiler?")
    listed = subprocess.run([str(nvcc), "--list-gpu-arch"], capture_output=True, text=True, check=False).stdout
    computes = tuple(f"{code[:-1]}.{code[-1]}" for code in sorted(re.findall(r"compute_(\d+)\b", listed), key=int))
    own = nvcc.resolve().parent.parent
    home = own if (own / "include" / "cuda_runtime.h").is_file() else DEFAULT_HOME  # nvcc may be a script elsewhere
    return Toolkit(home, (int(release[1]), int(release[2])), computes)


def include_folders(home: Path) -> list[Path]:
    """Where OpenCV's build would find headers beside a toolkit."""
    multiarch = sysconfig.get_config_var("MULTIARCH") or ""
    places = [home / "include", Path("/usr/include"), Path("/usr/include", multiarch)]
    return [place for place in dict.fromkeys(places) if place.is_dir()]


def toolkit_here(compute: str) -> tuple[Toolkit, str]:
    """The CUDA that a build here would use and what it would lack; JetPack 6's where there is none."""
    try:
        return find_toolkit(compute), ""
    except SetupError as error:
        nvcc = _nvcc()
        return read_toolkit(nvcc) if nvcc else Toolkit(DEFAULT_HOME, (12, 6), ()), str(error)


def _dotted(toolkit: Toolkit) -> str:
    return ".".join(map(str, toolkit.version))


def plan_cuda(compute: str, toolkit: Toolkit, jobs: int | None = None) -> Plan:
    """What a build for a compute capability with this CUDA does. Fetches nothing."""
    version = toolkit.version
    name = f"cuda-{OPENCV}-{compute}-cuda{version[0]}.{version[1]}"
    folder = (cache_folder() / "builds" / name).absolute()
    options = {
        "BUILD_LIST": MODULES,
        "BUILD_SHARED_LIBS": "OFF",
        "BUILD_JPEG": "ON",
        "BUILD_PNG": "ON",
        "BUILD_ZLIB": "ON",
        "CUDA_ARCH_BIN": compute,
        "CUDA_ARCH_PTX": "",
        "CUDA_TOOLKIT_ROOT_DIR": str(toolkit.home),
        "OPENCV_DNN_CUDA": "ON",
        "PYTHON3_LIMITED_API": "ON",
        "WITH_CUBLAS": "ON",
        "WITH_CUDA": "ON",
        "WITH_CUDNN": "ON",
        **dict.fromkeys((*OFF, "WITH_CUFFT", "WITH_NVCUVENC", "WITH_NVCUVID"), "OFF"),
    }
    if version >= (11, 0):  # older ones know C++14 at most
        options["CMAKE_CXX_STANDARD"] = "17"
    if version >= (12, 8):
        options["CUDA_NVCC_FLAGS"] = "--compress-mode=size"
    wheels = cache_folder() / "wheels" / name
    # In an environment that stays: in pip's own the path of cmake changes, and all kernels would be compiled again.
    pip = ("python", "-m", "pip", "wheel", "--verbose", "--no-deps", "--no-build-isolation")
    return Plan(
        tools=(*TOOLS, *REQUIRES),
        what=f"the wheel of {PACKAGE} {OPENCV} with CUDA {version[0]}.{version[1]} for compute capability {compute}",
        folder=folder,
        result=wheels,
        fetches=(
            f"{', '.join((*TOOLS, *REQUIRES))}, into an environment of their own",
            f"the source package of {PACKAGE} {OPENCV} (150 MB)",
        ),
        configure=(),  # the package's own build runs cmake, with CMAKE_ARGS
        variables={
            "CMAKE_ARGS": shlex.join(f"-D{key}={value}" for key, value in options.items()),
            "CMAKE_BUILD_PARALLEL_LEVEL": str(jobs or os.cpu_count() or 1),
        },
        compile=(*pip, "--wheel-dir", str(folder / "wheels"), str(folder / "source")),
        minutes="16 minutes on 2 fast cores, 1 to 3 hours on a Jetson",
        disk_bytes=6 * 10**9,
    )


def add_cuda(compute: str, *, jobs: int | None = None, progress: Progress = lambda name, done, total: None) -> Path:
    """Builds the wheel into the cache and gives its path; one that was built before is used again.

    Raises SetupError where something is missing, Interrupted at Ctrl-C: what was compiled is kept.
    """
    toolkit = find_toolkit(compute)
    plan = plan_cuda(compute, toolkit, jobs)
    found = next(plan.result.glob("*.whl"), None)
    if found:
        return found
    if platform.system() != "Linux":
        raise SetupError(f"the wheel is built on Linux, and this is {platform.system()}")
    need_compiler("c++", "g++")
    if not (plan.folder / "source").is_dir():  # else it was begun, and much of it is written already
        need_disk(plan.disk_bytes)
    with only_one(plan.folder) as lock:
        progress("fetching cmake and ninja", 0, 0)
        tools(plan.tools)
        progress(f"fetching OpenCV {OPENCV}", 0, 0)
        unpack(fetch_source(PACKAGE, OPENCV), plan.folder / "source")
        configure_and_compile(plan, lock, progress)
        built = next((plan.folder / "wheels").glob("*.whl"), None)
        if built is None:
            raise SetupError(f"the build ended without a wheel, the log is {plan.folder / 'build.log'}")
        check_wheel(built)
        plan.result.parent.mkdir(parents=True, exist_ok=True)
        built.parent.rename(plan.result)
        shutil.rmtree(plan.folder)
    return plan.result / built.name


def check_wheel(wheel: Path) -> None:
    """The wheel's OpenCV was linked with cuDNN, so that it has the CUDA backend. Raises ArtifactError."""
    try:
        with zipfile.ZipFile(wheel) as archive:
            names = [name for name in archive.namelist() if re.search(r"/cv2(\.[\w-]+)?\.so$", name)]
            data = archive.read(names[0]) if names else b""
    except (OSError, zipfile.BadZipFile) as error:
        raise ArtifactError(f"{wheel} is no wheel ({error}): remove it and build again") from None
    if not re.search(rb"\0libcudnn\.so\.\d+\0", data):
        raise ArtifactError(f"{wheel} has an OpenCV without cuDNN: its build did not find CUDA, see the log")
