"""The OpenVINO plugin of cv2.dnn: one file that makes the stock OpenCV wheel up to several times as fast.

Neither OpenCV's wheels nor distributions ship it, so it is built here (or given, already built) and kept in the
cache. It passes C++ objects to the OpenCV that loads it: it works with exactly one OpenCV and one OpenVINO.
"""

from __future__ import annotations

import json
import os
import platform
import re
import shlex
import shutil
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path

from edgekit import runner
from edgekit.artifacts import replacing, write_text
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
from edgekit.environments import cache_folder, opencv_python, unpack_wheel
from edgekit.errors import ArtifactError, ParityError, SetupError, UsageError
from edgekit.runner import PLUGIN_FILE, PRECISION_VARIABLE

OPENCV = "4.14.0.94"
OPENVINO = "2026.4.1"
FILE_NAME = PLUGIN_FILE
ARCHES = {"x86_64": 62, "aarch64": 183}  # ELF's e_machine

ENTRY = b"opencv_dnn_plugin_init_v0\0"


# What Ubuntu 22.04 and JetPack 6 have (Debian 12 has more). For arm64, openvino's own wheel needs the same glibc.
GLIBC, GLIBCXX = (2, 35), (3, 4, 30)


@dataclass(frozen=True)
class PluginFile:
    """What a plugin's own bytes say of it."""

    path: Path
    arch: str
    opencv: str  # "4.14.0"
    openvino: str  # the end of its library's name: "2641" for 2026.4.1
    has_precision: bool  # whether it computes in f32 unless asked otherwise
    glibc: tuple[int, ...]  # the newest that it needs
    glibcxx: tuple[int, ...]  # the same of libstdc++

    @property
    def warnings(self) -> tuple[str, ...]:
        """What to know before it is used; () where there is nothing."""
        harm = {
            "x86_64": "computes in bf16 by itself where the CPU can",
            "aarch64": "computes in f16, and int8 models wrong, on the cores of a Raspberry Pi 5",
        }[self.arch]
        precision = (
            f"{self.path} has no setting {PRECISION_VARIABLE}: it {harm}. "
            f"`edgekit opencv add openvino --arch {self.arch}` builds one that has"
        )
        libraries = (
            f"{self.path} needs glibc {_dotted(self.glibc)} and GLIBCXX_{_dotted(self.glibcxx)}: it is not loaded on "
            "Debian 12, Ubuntu 22.04 and JetPack 6. Build it on one of those"
        )
        new = self.glibc > GLIBC or self.glibcxx > GLIBCXX
        return (*([] if self.has_precision else [precision]), *([libraries] if new else []))


def find_plugin(arch: str) -> Path:
    """The cached plugin for an architecture ("x86_64" or "aarch64"), looked at again.

    Raises SetupError where there is none or it is damaged, UsageError for another architecture.
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


def interpreter(version: str) -> tuple[Path, Path | None]:
    """(interpreter, plugin) for an OpenCV as targets and `verify` name them: a version, or "openvino" with the plugin.

    Raises SetupError where they cannot be had here.
    """
    if version == "openvino":
        return openvino_python(), find_plugin(platform.machine())
    return opencv_python(version), None


def read_plugin(path: Path, arch: str) -> PluginFile:
    """Checks that a file is the plugin for this architecture, our OpenCV and our OpenVINO. Raises ArtifactError."""
    try:
        data = path.read_bytes()
    except OSError as error:
        raise ArtifactError(f"cannot read {path}: {error.strerror}") from None
    found = _elf_arch(data)
    if not found:
        raise ArtifactError(f"{path} is no whole 64-bit shared library for Linux: {FILE_NAME} was expected")
    if found != arch:
        raise ArtifactError(f"{path} is for {found}, and {arch} was asked for: give --arch {found} or another file")
    openvino = _first(rb"\0libopenvino\.so\.(\d+)\0", data)
    if ENTRY not in data or not openvino:
        raise ArtifactError(f"{path} is no OpenVINO plugin of cv2.dnn: {FILE_NAME} was expected")
    if openvino != openvino_soname():
        raise ArtifactError(f"{path} needs libopenvino.so.{openvino}, and openvino {OPENVINO} has {openvino_soname()}")
    opencv, wanted = _first(rb"OpenCV version is '(\d+\.\d+\.\d+)", data), OPENCV.rpartition(".")[0]
    if opencv != wanted:
        raise ArtifactError(f"{path} was made for OpenCV {opencv or 'of an unknown version'}, not {wanted}")
    has_precision = f"{PRECISION_VARIABLE}\0".encode() in data
    return PluginFile(path, arch, opencv, openvino, has_precision, _newest(b"GLIBC", data), _newest(b"GLIBCXX", data))


def openvino_soname() -> str:
    """ "2026.4.1" → "2641", the end of its libraries' names."""
    year, minor, patch = OPENVINO.split(".")
    return f"{year[-2:]}{minor}{patch}"


def _elf_arch(data: bytes) -> str:
    """The architecture of a whole 64-bit little-endian ELF shared object; "" of anything else."""
    if data[:6] != b"\x7fELF\x02\x01" or len(data) < 64 or int.from_bytes(data[16:18], "little") != 3:
        return ""
    table, size, count = (int.from_bytes(data[a:b], "little") for a, b in ((40, 48), (58, 60), (60, 62)))
    if table + size * count > len(data):  # the table of sections stands at the end
        return ""
    machine = int.from_bytes(data[18:20], "little")
    return next((arch for arch, code in ARCHES.items() if code == machine), f"ELF machine {machine}")


def _newest(library: bytes, data: bytes) -> tuple[int, ...]:
    """The newest symbol version of a library among those that the file needs; () where it names none."""
    found = re.findall(rb"\0" + library + rb"_(\d+(?:\.\d+)*)(?=\0)", data)
    return max((tuple(map(int, version.split(b"."))) for version in found), default=())


def _dotted(version: tuple[int, ...]) -> str:
    return ".".join(map(str, version))


def _first(pattern: bytes, data: bytes) -> str:
    match = re.search(pattern, data)
    return match[1].decode() if match else ""


def add_openvino(
    arch: str,
    *,
    source: Path | None = None,
    jobs: int | None = None,
    progress: Progress = lambda name, done, total: None,
) -> Path:
    """Puts the plugin for an architecture into the cache, checked; one that was built before is used again.

    source: a plugin that was built already, which replaces the one in the cache; None builds it.
    jobs: how many files are compiled at once; None: as many as the cores.
    Raises ArtifactError where the file is not such a plugin, SetupError where something for the build is missing,
    Interrupted at Ctrl-C: what was compiled is kept.
    """
    path = plugin_path(arch)
    if source is not None:
        read_plugin(source, arch)
        _place(source, path)
    elif not _is_good(path, arch):
        _build(plan_openvino(arch, jobs), arch, progress)
    return path


def _place(file: Path, path: Path) -> None:
    with replacing(path) as temporary:
        shutil.copyfile(file, temporary)


def _is_good(path: Path, arch: str) -> bool:
    try:
        return read_plugin(path, arch).has_precision
    except ArtifactError:
        return False


# ---------------------------------------------------------------------------------------------------------------
# Building it

# OpenVINO computes in bf16 or f16 where the CPU has it, and cv2.dnn has no way to ask otherwise. On Arm its int8
# kernels are wrong or do not compile: there, int8 layers are computed in floats unless asked otherwise.
PATCHED = "opencv/modules/dnn/src/ie_ngraph.cpp"
ANCHOR = "netExec = ie.compile_model(net, ieDevice, config);"
PATCH = """if (device_name == "CPU")
        {
            const std::string precision = utils::getConfigurationParameterString("VARIABLE", "f32");
            if (precision != "f32" && precision != "f16" && precision != "bf16" && precision != "auto")
                CV_Error(Error::StsBadArg, "VARIABLE=" + precision + ": f32, f16, bf16 or auto was expected");
            if (precision != "auto")
                config["INFERENCE_PRECISION_HINT"] = precision;
#ifdef __aarch64__
            if (!utils::getConfigurationParameterBool("OPENCV_DNN_OPENVINO_LPT", false))
                config["LP_TRANSFORMS_MODE"] = false;
#endif
        }
        """.replace("VARIABLE", PRECISION_VARIABLE)


def add_precision_setting(text: str) -> str:
    """ie_ngraph.cpp → the same with the precision from the environment; what has it already stays as it is.

    Raises SetupError where the place is not there: another OpenCV needs another patch.
    """
    if PRECISION_VARIABLE in text:
        return text
    if text.count(ANCHOR) != 1 or "ov::AnyMap config;" not in text.partition(ANCHOR)[0]:
        raise SetupError(
            f"{PATCHED} of OpenCV {OPENCV} is not as expected: it has no single {ANCHOR!r} after its configuration, "
            "where the setting of the precision belongs"
        )
    return text.replace(ANCHOR, PATCH + ANCHOR)


def plan_openvino(arch: str, jobs: int | None = None) -> Plan:
    """What a build of the plugin for an architecture does. Fetches nothing. Raises UsageError, SetupError."""
    result = plugin_path(arch)
    folder = (cache_folder() / "builds" / result.parent.name).absolute()  # the compiler runs elsewhere
    source, build = folder / "source" / "opencv", folder / "build"
    options = {
        "CMAKE_MAKE_PROGRAM": "ninja",  # by name: OpenCV writes what stands here, and in the next, into the library
        "PYTHON_DEFAULT_EXECUTABLE": "python3",
        "CMAKE_BUILD_TYPE": "Release",
        "CMAKE_INSTALL_PREFIX": "/usr",
        "CMAKE_CXX_STANDARD": "17",  # OpenVINO's headers
        "CMAKE_POSITION_INDEPENDENT_CODE": "ON",
        "CMAKE_C_COMPILER_LAUNCHER": str(folder / LAUNCHER),
        "CMAKE_CXX_COMPILER_LAUNCHER": str(folder / LAUNCHER),
        "CMAKE_MODULE_LINKER_FLAGS": LINK,
        "CMAKE_SKIP_RPATH": "ON",
        "BUILD_LIST": "core,imgproc,dnn",
        "BUILD_SHARED_LIBS": "OFF",
        "BUILD_ZLIB": "ON",
        "BUILD_INFO_SKIP_TIMESTAMP": "ON",
        "BUILD_INFO_SKIP_SYSTEM_VERSION": "ON",
        "DNN_PLUGIN_LIST": "openvino",
        "WITH_OPENVINO": "ON",
        "OpenVINO_DIR": str(folder / "openvino" / "openvino" / "cmake"),
        **dict.fromkeys((*OFF, *OFF_PLUGIN), "OFF"),
    }
    if arch != machine():
        options["CMAKE_TOOLCHAIN_FILE"] = str(source / "platforms" / "linux" / f"{arch}-gnu.toolchain.cmake")
    return Plan(
        what=f"the OpenVINO plugin for {arch}",
        tools=TOOLS,
        folder=folder,
        result=result,
        fetches=(
            f"{', '.join(TOOLS)}, into an environment of their own",
            f"the source package of opencv-python-headless {OPENCV} (96 MB)",
            f"the wheel of openvino {OPENVINO} for {arch} ({WHEEL_SIZES[arch]})",
        ),
        configure=(
            "cmake",
            "-G",
            "Ninja",
            "-S",
            str(source),
            "-B",
            str(build),
            *(f"-D{k}={v}" for k, v in options.items()),
        ),
        variables={},
        compile=("ninja", "-C", str(build), *(["-j", str(jobs)] if jobs else []), "opencv_dnn_openvino"),
        minutes="10 to 20 minutes on 2 cores",
        disk_bytes=10**9,
    )


LAUNCHER = "launch.sh"
# Nothing of this copy of OpenCV may meet that of the wheel that loads it. -s strips.
LINK = (
    "-s -Wl,-Bsymbolic -Wl,--exclude-libs,ALL -Wl,--gc-sections "
    "-Wl,--enable-new-dtags -Wl,-rpath,\\$ORIGIN/../openvino/libs"
)
OFF_PLUGIN = ("WITH_JPEG", "WITH_PNG", "WITH_V4L", "WITH_CUDA", "BUILD_opencv_python3")
WHEEL_SIZES = {"x86_64": "59 MB", "aarch64": "30 MB"}


def machine() -> str:
    """This machine's architecture, as ARCHES spells it."""
    return {"amd64": "x86_64", "arm64": "aarch64"}.get(platform.machine().lower(), platform.machine())


def _build(plan: Plan, arch: str, progress: Progress) -> None:
    _need_compiler(arch)
    if not (plan.folder / "build").is_dir():  # else most of it is written already
        need_disk(plan.disk_bytes)
    with only_one(plan.folder) as lock:
        progress("fetching cmake and ninja", 0, 0)
        tools(plan.tools)
        progress(f"fetching OpenCV {OPENCV}", 0, 0)
        unpack(fetch_source("opencv-python-headless", OPENCV), plan.folder / "source")
        file = plan.folder / "source" / PATCHED
        patched = add_precision_setting(file.read_text(encoding="utf-8"))
        if patched != file.read_text(encoding="utf-8"):
            write_text(file, patched)
        if not (plan.folder / "openvino").is_dir():
            progress(f"fetching OpenVINO {OPENVINO}", 0, 0)
            unpack_wheel(f"openvino=={OPENVINO}", f"{arch}-manylinux_2_35", plan.folder / "openvino")
        # A library would name the cache's folder, so the user's home, wherever OpenCV asserts something. (The same
        # among the compiler's flags would stand in the build information.)
        launcher = plan.folder / LAUNCHER
        launcher.write_text(f'#!/bin/sh\nexec "$@" {shlex.quote(f"-ffile-prefix-map={plan.folder}/=")}\n')
        launcher.chmod(0o755)
        configure_and_compile(plan, lock, progress)
        built = plan.folder / "build" / "lib" / FILE_NAME
        _check_built(built, arch, progress)
        _place(built, plan.result)
        shutil.rmtree(plan.folder)


def _need_compiler(arch: str) -> None:
    if platform.system() != "Linux":
        raise SetupError(f"the plugin is built on Linux, and this is {platform.system()}: give --from FILE")
    if arch == machine():
        need_compiler("c++", "g++")
    elif arch == "aarch64":
        need_compiler("aarch64-linux-gnu-g++", "g++-aarch64-linux-gnu")
    else:
        raise SetupError(f"a plugin for {arch} is built on such a machine, and this is {machine()}: give --from FILE")


def _check_built(built: Path, arch: str, progress: Progress) -> None:
    """What was built is the plugin, has the setting, and computes what OpenCV does (where it can run here)."""
    found = read_plugin(built, arch)
    if not found.has_precision:
        raise ArtifactError(
            f"{built} lacks its setting {PRECISION_VARIABLE}: remove {built.parents[2]} and build again"
        )
    if arch == machine():
        progress("proving the plugin", 0, 0)
        prove_plugin(built)


# ---------------------------------------------------------------------------------------------------------------
# Proving it


@dataclass(frozen=True)
class Trial:
    """What an interpreter's OpenCV made of the plugin, in a process of its own."""

    relative_error: float | None  # of a small network against OpenCV's own engine; None where it did not run
    precision: str  # that it computed in, "fp32" where it is as it should be
    message: str  # what went wrong, or ""


TRIAL_S = 120.0


def try_plugin(path: Path, python: Path, isolated: bool = True) -> Trial:
    """Runs a small network through the plugin in an interpreter's OpenCV, and through that OpenCV itself.

    isolated: without the user's own packages and PYTHONPATH; False for an interpreter that is used with them.
    """
    import numpy as np

    answers, said = {}, {"precision": "", "ran_on": ""}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "small.onnx").write_bytes(_small_model())
        np.save(folder / "x.npy", np.random.default_rng(0).standard_normal((1, 3, 32, 32)).astype(np.float32))
        for engine in ("classic", "openvino"):
            command = [str(python.absolute()), *(["-I"] if isolated else []), str(runner.__file__), "forward"]
            command += ["--model", "small.onnx", "--input", "x.npy", "--output", f"{engine}.npz", "--engine", engine]
            try:
                done = _run([*command, "--plugin", str(path.absolute())], folder)
            except subprocess.TimeoutExpired:
                return Trial(None, "", f"a network of two layers did not end within {TRIAL_S:g} s")
            if done.returncode:
                lines = done.stderr.strip().splitlines() or [f"the process ended with code {done.returncode}"]
                return Trial(None, "", lines[-1].removeprefix("run.py: "))
            said = json.loads(done.stdout.splitlines()[-1])
            with np.load(folder / f"{engine}.npz") as arrays:
                answers[engine] = arrays["y"]
    if not said["ran_on"].startswith("OpenVINO"):
        return Trial(None, "", f"the network ran on {said['ran_on']} instead")
    return Trial(runner.relative_difference(answers["openvino"], answers["classic"]), said["precision"], "")


def _run(command: list[str], folder: Path) -> subprocess.CompletedProcess[str]:
    variables = {key: value for key, value in os.environ.items() if key != PRECISION_VARIABLE}
    return subprocess.run(
        command, env=variables, cwd=folder, capture_output=True, text=True, timeout=TRIAL_S, check=False
    )


def prove_plugin(path: Path) -> Trial:
    """Tries a plugin for this machine with its OpenCV and OpenVINO. Raises SetupError where it does not load,
    ParityError where it computes something else than OpenCV does."""
    trial = try_plugin(path, openvino_python())
    if trial.relative_error is None:
        raise SetupError(
            f"{path} is not loaded by OpenCV {OPENCV} with openvino {OPENVINO}: {trial.message or 'no reason given'}"
        )
    if not trial.relative_error <= MAX_RELATIVE_ERROR:
        raise ParityError(f"{path} computes something else than OpenCV: relative error {trial.relative_error:.1e}")
    return trial


MAX_RELATIVE_ERROR = 1e-4  # f32 in another order; bf16 would be 1e-3 and more


def _small_model() -> bytes:
    """An ONNX network of two convolutions, with sums that are long enough to show a lower precision."""
    import numpy as np
    from onnx import TensorProto, helper, numpy_helper

    random = np.random.default_rng(1)
    first, second = (random.standard_normal(shape).astype(np.float32) for shape in ((64, 3, 5, 5), (8, 64, 3, 3)))
    graph = helper.make_graph(
        [
            helper.make_node("Conv", ["x", "w"], ["c"], kernel_shape=[5, 5], pads=[2, 2, 2, 2]),
            helper.make_node("Relu", ["c"], ["r"]),
            helper.make_node("Conv", ["r", "v"], ["y"], kernel_shape=[3, 3], pads=[1, 1, 1, 1]),
        ],
        "small",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [1, 3, 32, 32])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [1, 8, 32, 32])],
        [numpy_helper.from_array(first, "w"), numpy_helper.from_array(second, "v")],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 13)], ir_version=8)
    data: bytes = model.SerializeToString()
    return data
