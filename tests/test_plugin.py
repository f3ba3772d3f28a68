"""The OpenVINO plugin and the CUDA wheel: what is taken for one, the plan of a build, and what stops it."""

import json
import os
import re
import signal
import subprocess
import sys
import tarfile
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

from edgekit import compiling, cuda_wheel, environments, opencv, plugin
from edgekit.cli import main
from edgekit.errors import ArtifactError, Interrupted, SetupError, UsageError
from edgekit.plugin import FILE_NAME, PluginFile, Trial, add_openvino, add_precision_setting, find_plugin, read_plugin

WHEELS = Path(__file__).parents[2] / "shared" / "wheels"
BUILD = "EDGEKIT_TEST_BUILD"

# The shape of the place in OpenCV's source, not its text.
SOURCE = """void load()
{
        ov::AnyMap config;
        prepare(config);
        netExec = ie.compile_model(net, ieDevice, config);
}
"""


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv(environments.CACHE_VARIABLE, str(tmp_path / "cache"))
    return tmp_path / "cache"


def built(name: str) -> Path:
    """One of the plugins that were built elsewhere; skips where it is absent."""
    file = WHEELS / name / FILE_NAME
    if not file.is_file():
        pytest.skip(f"{file} is not on this machine")
    return file


def edgekit(*args: object, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> tuple[int, str, str]:
    monkeypatch.setattr(sys, "argv", ["edgekit", *map(str, args)])
    with pytest.raises(SystemExit) as stopped:
        main()
    said = capsys.readouterr()
    return int(stopped.value.code or 0), said.out, said.err


# ---------------------------------------------------------------------------------------------------------------
# What is taken for a plugin


@pytest.mark.parametrize(
    ("folder", "arch", "has_precision"),
    [("", "x86_64", False), ("aarch64", "aarch64", False), ("aarch64-f32", "aarch64", True)],
)
def test_a_plugin_says_what_it_is_for(folder: str, arch: str, has_precision: bool) -> None:
    file = built(folder)
    found = read_plugin(file, arch)
    assert found == PluginFile(file, arch, "4.14.0", "2641", has_precision, (2, 34), (3, 4, 29))
    assert len(found.warnings) == (0 if has_precision else 1)


def test_a_plugin_that_needs_a_newer_system_than_devices_have_says_so() -> None:
    found = PluginFile(Path("p.so"), "aarch64", "4.14.0", "2641", True, (2, 38), (3, 4, 29))
    (warning,) = found.warnings
    assert warning.startswith("p.so needs glibc 2.38 and GLIBCXX_3.4.29: it is not loaded on Debian 12")


def changed(data: bytes, old: bytes, new: bytes) -> bytes:
    assert old in data and len(old) == len(new)
    return data.replace(old, new)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda data: b"no plugin\n", "no whole 64-bit shared library"),
        (lambda data: b"", "no whole 64-bit shared library"),
        (lambda data: data[:-1000], "no whole 64-bit shared library"),
        (lambda data: changed(data, b"plugin_init_v0\0", b"plugin_init_v1\0"), "is no OpenVINO plugin of cv2.dnn"),
        (
            lambda data: changed(data, b"version is '4.14.0", b"version is '4.13.0"),
            "made for OpenCV 4.13.0, not 4.14.0",
        ),
        (
            lambda data: changed(data, b"openvino.so.2641", b"openvino.so.2640"),
            r"needs libopenvino\.so\.2640, and .* 2641",
        ),
    ],
    ids=["text", "empty", "cut off", "no entry", "other OpenCV", "other OpenVINO"],
)
def test_what_is_no_such_plugin_is_refused_and_leaves_nothing(make, message: str, cache: Path, tmp_path: Path) -> None:
    file = tmp_path / FILE_NAME
    file.write_bytes(make(built("aarch64-f32").read_bytes()))
    with pytest.raises(ArtifactError, match=message):
        add_openvino("aarch64", source=file)
    assert not cache.exists()


def test_a_shared_library_that_is_no_plugin_is_refused() -> None:
    import cv2

    library = next(Path(cv2.__file__).parent.glob("cv2*.so"), None)  # it names the plugin's entry: it looks for it
    if library is None or plugin.machine() != "x86_64":
        pytest.skip("no cv2*.so for x86-64 here")
    with pytest.raises(ArtifactError, match=r"is no OpenVINO plugin of cv2\.dnn"):
        read_plugin(library, "x86_64")


def test_a_plugin_is_placed_in_the_cache_and_found_there(cache: Path) -> None:
    with pytest.raises(SetupError, match="`edgekit opencv add openvino --arch aarch64` builds it"):
        find_plugin("aarch64")
    path = add_openvino("aarch64", source=built("aarch64-f32"))
    assert path == cache / "plugins" / "openvino-4.14.0.94-2026.4.1-aarch64" / FILE_NAME
    assert find_plugin("aarch64") == path and [each.name for each in path.parent.iterdir()] == [FILE_NAME]
    assert path.read_bytes() == built("aarch64-f32").read_bytes()
    assert add_openvino("aarch64") == path  # it is there: nothing is built
    path.write_bytes(path.read_bytes()[:100000])
    with pytest.raises(SetupError, match=r"no whole 64-bit shared library.*remove it, .*builds it again"):
        find_plugin("aarch64")


def test_the_command_says_what_it_took_and_warns(
    cache: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    run = ("opencv", "add", "openvino", "--from", built("aarch64"))
    code, out, err = edgekit(*run, "--arch", "x86_64", capsys=capsys, monkeypatch=monkeypatch)
    assert code == 2 and out == "" and "is for aarch64, and x86_64 was asked for: give --arch aarch64" in err
    assert not cache.exists()
    code, out, err = edgekit(*run, "--arch", "aarch64", "--json", capsys=capsys, monkeypatch=monkeypatch)
    said = json.loads(out)
    assert code == 0 and said["path"] == str(find_plugin("aarch64")) and said["size_bytes"] == 7094600
    assert not said["has_precision"] and said["warnings"][0] in err and "int8 models wrong" in err
    code, out, err = edgekit(*run, "--arch", "riscv64", capsys=capsys, monkeypatch=monkeypatch)
    assert code == 2 and err == "edgekit: no OpenVINO plugin for 'riscv64': give --arch x86_64 or aarch64\n"


# ---------------------------------------------------------------------------------------------------------------
# The build


def test_the_precision_is_set_where_the_device_is_configured() -> None:
    patched = add_precision_setting(SOURCE)
    before, _, after = patched.partition("netExec = ")
    assert SOURCE.startswith(before.partition("if (device_name")[0]) and after == SOURCE.partition("netExec = ")[2]
    assert 'getConfigurationParameterString("OPENCV_DNN_OPENVINO_PRECISION", "f32")' in before
    assert before.index("prepare(config)") < before.index('config["INFERENCE_PRECISION_HINT"] = precision')
    assert before.count("{") - before.count("}") == 1 and patched.count("VARIABLE") == 0
    assert add_precision_setting(patched) == patched


@pytest.mark.parametrize("text", ["", SOURCE.replace("ov::AnyMap config;", ""), SOURCE + SOURCE.replace("void", "int")])
def test_another_source_is_not_patched(text: str) -> None:
    with pytest.raises(SetupError, match=r"ie_ngraph\.cpp of OpenCV 4\.14\.0\.94 is not as expected"):
        add_precision_setting(text)


@pytest.mark.parametrize("arch", ["x86_64", "aarch64"])
def test_the_plan_is_shown_and_nothing_is_done(
    arch: str, cache: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    command = ("opencv", "add", "openvino", "--arch", arch, "--jobs", 3, "--dry-run")
    code, out, _ = edgekit(*command, capsys=capsys, monkeypatch=monkeypatch)
    lines = out.splitlines()
    assert code == 0 and not cache.exists()
    assert lines[0] == f"the OpenVINO plugin for {arch}, 10 to 20 minutes on 2 cores, 1.0 GB while it is built"
    assert [line.split()[0] for line in lines[1:]] == ["fetch", "fetch", "fetch", "run", "run", "makes"]
    options = set(plugin.plan_openvino(arch).configure)
    assert {"-DDNN_PLUGIN_LIST=openvino", "-DBUILD_LIST=core,imgproc,dnn", "-DBUILD_SHARED_LIBS=OFF"} <= options
    assert {"-DWITH_IPP=OFF", "-DWITH_FFMPEG=OFF", "-DWITH_OPENCL=OFF"} <= options
    crossed = any(option.startswith("-DCMAKE_TOOLCHAIN_FILE=") for option in options)
    assert crossed == (arch != plugin.machine())
    assert lines[-2].endswith(" -j 3 opencv_dnn_openvino")
    monkeypatch.setenv(environments.CACHE_VARIABLE, "here")
    assert plugin.plan_openvino(arch).folder == Path.cwd() / "here" / "builds" / f"openvino-4.14.0.94-2026.4.1-{arch}"


@pytest.mark.skipif(sys.platform != "linux", reason="the plugin is built on Linux")
def test_a_build_that_lacks_something_says_what_before_anything_is_fetched(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(compiling.shutil, "disk_usage", lambda path: SimpleNamespace(free=5 * 10**8))
    monkeypatch.setattr(plugin, "machine", lambda: "x86_64")
    compilers = ("x86_64", "c++", "g++"), ("aarch64", "aarch64-linux-gnu-g++", "g++-aarch64-linux-gnu")
    for arch, program, package in compilers:
        with monkeypatch.context() as without:
            without.setenv("PATH", str(tmp_path))
            said = f"no {program} here, which compiles the plugin: sudo apt-get install {package}"
            with pytest.raises(SetupError, match=f"^{re.escape(said)}$"):
                add_openvino(arch)
    assert not cache.exists()
    monkeypatch.setattr(plugin, "need_compiler", lambda program, package: program)
    with pytest.raises(SetupError, match=r"0\.5 GB free at .*and the build takes 1\.0 GB: .*EDGEKIT_CACHE"):
        add_openvino("x86_64")
    assert list(cache.iterdir()) == []


@pytest.fixture
def lock(tmp_path: Path):
    with compiling.only_one(tmp_path / "work") as descriptor:
        yield descriptor


@pytest.mark.skipif(sys.platform != "linux", reason="the plugin is built on Linux")
class TestRunning:
    """A run of a command: its steps, its failure, Ctrl-C, and the folder's lock."""

    def run(self, code: str, log: Path, lock: int) -> list[str]:
        lines: list[str] = []
        compiling.run([sys.executable, "-c", code], os.environ, log, lock, lines.append)
        return lines

    def test_its_lines_are_followed_and_logged(self, tmp_path: Path, lock: int) -> None:
        lines = self.run("print('[3/8] Building'); print('  [8/8] Linking'); print('x [1/2]')", tmp_path / "log", lock)
        steps = [match.groups() for line in lines if (match := compiling.STEP.match(line))]
        assert steps == [("3", "8"), ("8", "8")]
        assert (tmp_path / "log").read_text().splitlines()[1:] == ["[3/8] Building", "  [8/8] Linking", "x [1/2]"]

    def test_a_failure_shows_the_compilers_words(self, tmp_path: Path, lock: int) -> None:
        (tmp_path / "log").write_text("error: of an earlier run\n")
        code = "print('a.cpp:3: fatal error: x.h: No such file'); print('more'); raise SystemExit(1)"
        with pytest.raises(SetupError, match=r"failed, the log is \S*log: a\.cpp:3: fatal error: x\.h: No such file$"):
            self.run(code, tmp_path / "log", lock)

    def test_ctrl_c_ends_the_child_first(self, tmp_path: Path, lock: int) -> None:
        def interrupt(_: str) -> None:
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(5)

        # Like pip, it does not end before its own child has.
        code = (
            "import signal, subprocess, sys; signal.signal(signal.SIGINT, lambda *_: None)\n"
            "sleeps = 'import os, time; print(os.getpid(), flush=True); time.sleep(60)'\n"
            "subprocess.run([sys.executable, '-c', sleeps])"
        )
        begin = time.monotonic()
        with pytest.raises(Interrupted, match="the same command goes on from there"):
            compiling.run([sys.executable, "-c", code], os.environ, tmp_path / "log", lock, interrupt)
        grandchild = int((tmp_path / "log").read_text().splitlines()[3])
        assert not Path("/proc", str(grandchild)).exists() and time.monotonic() - begin < 30

    @pytest.mark.usefixtures("lock")
    def test_a_folder_is_built_in_once_at_a_time(self, tmp_path: Path) -> None:
        with pytest.raises(SetupError, match="another edgekit is building"), compiling.only_one(tmp_path / "work"):
            pass


def test_an_archive_is_unpacked_whole_or_not_at_all(tmp_path: Path) -> None:
    (tmp_path / "package-1").mkdir()
    (tmp_path / "package-1" / "file").write_bytes(os.urandom(100_000))
    archive = tmp_path / "package-1.tar.gz"
    with tarfile.open(archive, "w:gz") as tar:
        tar.add(tmp_path / "package-1", "package-1")
    whole = archive.read_bytes()
    work = tmp_path / "work"
    work.mkdir()
    archive.write_bytes(whole[:50_000])
    with pytest.raises(SetupError, match=r"cannot unpack .*: remove it"):
        compiling.unpack(archive, work / "source")
    assert list(work.iterdir()) == []
    archive.write_bytes(whole)
    compiling.unpack(archive, work / "source")
    assert [path.relative_to(work).as_posix() for path in work.rglob("*")] == ["source", "source/file"]


@pytest.mark.slow
def test_a_package_that_cannot_be_fetched_leaves_nothing(cache: Path) -> None:
    try:
        compiling.tools()
    except SetupError as error:
        pytest.skip(str(error))
    with pytest.raises(
        SetupError, match=r"cannot fetch the source of opencv-python-headless 4\.14\.0\.999: .*No matching"
    ):
        compiling.fetch_source("opencv-python-headless", "4.14.0.999")
    with pytest.raises(SetupError, match=r"cannot fetch wheels of openvino==1999\.1 for aarch64-manylinux_2_35: "):
        environments.unpack_wheel("openvino==1999.1", "aarch64-manylinux_2_35", cache / "builds" / "openvino")
    assert list((cache / "downloads").iterdir()) == list((cache / "builds").iterdir()) == []


@pytest.mark.slow
@pytest.mark.parametrize("arch", ["x86_64", "aarch64"])
def test_the_plugin_is_built_from_source(arch: str, cache: Path) -> None:
    if os.environ.get(BUILD) != arch:
        pytest.skip(f"it takes 20 minutes: set {BUILD}={arch} to build")
    steps: list[tuple[str, int, int]] = []
    path = add_openvino(arch, progress=lambda *step: steps.append(step))
    found = read_plugin(path, arch)
    assert found.has_precision and found.opencv == "4.14.0" and path.stat().st_size < 10**7
    assert str(cache).encode() not in path.read_bytes() and str(Path.home()).encode() not in path.read_bytes()
    done, total = steps[-1 if arch != plugin.machine() else -2][1:]
    assert done == total > 400
    assert not list((cache / "builds").glob("*/"))


# ---------------------------------------------------------------------------------------------------------------
# The plugin at work


@pytest.mark.slow
@pytest.mark.skipif(plugin.machine() != "x86_64", reason="the plugin here is for x86-64")
def test_a_plugin_is_proved_with_its_opencv_and_not_loaded_by_another(tmp_path: Path) -> None:
    file = built("")
    try:
        right = environments.opencv_python(plugin.OPENCV, f"openvino=={plugin.OPENVINO}")
        without = environments.opencv_python(plugin.OPENCV)
    except SetupError as error:
        pytest.skip(str(error))
    trial = plugin.try_plugin(file, right)
    assert trial.relative_error is not None and trial.relative_error < 1e-2 and trial.message == ""
    has_precision = plugin.read_plugin(file, "x86_64").has_precision
    assert trial.precision == "fp32" if has_precision else trial.precision in ("fp32", "bf16")
    alone = plugin.try_plugin(file, without)
    assert alone.relative_error is None
    assert "has no OpenVINO: the Python package openvino is not installed" in alone.message
    with pytest.raises(SetupError, match="is not loaded by OpenCV"):
        plugin.prove_plugin(tmp_path / FILE_NAME)


# ---------------------------------------------------------------------------------------------------------------
# check


@pytest.mark.parametrize(
    ("targets", "version", "trial", "value", "ok", "advice"),
    [
        (["cpu"], "4.14.0", Trial(None, "", ""), "cpu, in this OpenCV itself", True, ""),
        ([], "4.14.0", Trial(2e-6, "fp32", ""), "fp32, by the plugin; off OpenCV's own result by 2e-06", True, ""),
        (
            *([], "4.14.0", Trial(3e-3, "bf16", ""), "bf16, by the plugin; off OpenCV's own result by 3e-03", False),
            "a lower precision, or wrong: `edgekit opencv add openvino` builds one that is right",
        ),
        (
            *([], "5.0.0", Trial(None, "", "")),
            *("absent: its plugin is for OpenCV 4.14.0, and this is 5.0.0", None, opencv.INSTALL),
        ),
        ([], "4.14.0", Trial(None, "", "no openvino"), "absent: no openvino", None, opencv.INSTALL),
    ],
)
def test_the_openvino_backend(
    targets: list[str], version: str, trial: Trial, value: str, ok: bool | None, advice: str
) -> None:
    assert opencv.judge_openvino(targets, version, trial) == opencv.Finding("backend openvino", value, ok, advice)


def test_the_cuda_backend_and_the_command_for_this_gpu() -> None:
    orin = opencv.jetson_device("NVIDIA Jetson Orin Nano Developer Kit")
    assert orin == ("NVIDIA Jetson Orin Nano Developer Kit 8.7",)
    assert opencv.jetson_device("NVIDIA Jetson Nano Developer Kit")[0].endswith(" 5.3")
    assert opencv.jetson_device("NVIDIA Jetson Xavier NX Developer Kit")[0].endswith(" 7.2")
    assert opencv.jetson_device("Raspberry Pi 4 Model B Rev 1.4") == opencv.jetson_device("") == ()
    assert opencv.judge_cuda([], orin).advice == "edgekit opencv add cuda --arch 8.7"
    assert opencv.judge_cuda(["cuda", "cuda_fp16"], orin).ok is True
    assert opencv.judge_cuda([], ()).value == "absent, no GPU seen"


@pytest.mark.usefixtures("cache")
def test_check_on_this_machine(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    import cv2

    code, out, _ = edgekit("opencv", "check", "--json", capsys=capsys, monkeypatch=monkeypatch)
    said = json.loads(out)
    assert code == 0 and said["version"] == cv2.__version__ and said["threads"] == cv2.getNumThreads()
    assert said["backends"]["opencv"][0] == "cpu" and set(said["backends"]) == {"opencv", "openvino", "cuda"}
    advice = {row["topic"]: row["advice"] for row in said["findings"]}
    assert "edgekit opencv add openvino --arch aarch64" in advice["plugin aarch64"]
    code, out, _ = edgekit("opencv", "check", capsys=capsys, monkeypatch=monkeypatch)
    assert code == 0 and [line.split()[1] for line in out.splitlines()].count("plugin") == 2


@pytest.mark.parametrize("command", [("check",), ("add", "openvino"), ("add", "cuda")])
def test_every_command_explains_itself(
    command: tuple[str, ...], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    code, out, _ = edgekit("opencv", *command, "--help", capsys=capsys, monkeypatch=monkeypatch)
    usage, summary, more, *options = out.split("\n\n")
    assert code == 0 and " ".join(("edgekit opencv", *command)) in usage
    assert summary.strip().endswith(".") and len(more) > 40 and "--json" in options[-1]


# ---------------------------------------------------------------------------------------------------------------
# CUDA


def test_a_board_is_its_compute_capability() -> None:
    assert [cuda_wheel.compute_capability(arch) for arch in ("orin", "Nano", "8.9", "12.0")] == [
        "8.7",
        "5.3",
        "8.9",
        "12.0",
    ]
    for arch in ("pi", "8", "sm_87", "8.7; rm"):
        with pytest.raises(UsageError, match=r"is no compute capability: give one such as 8\.6, or a board: nano"):
            cuda_wheel.compute_capability(arch)


def test_the_plan_suits_the_cuda_that_is_there(cache: Path) -> None:
    choices = [("8.7", (12, 6)), ("5.3", (10, 2)), ("9.0", (13, 0))]
    home = cuda_wheel.DEFAULT_HOME
    orin, nano, new = (cuda_wheel.plan_cuda(arch, cuda_wheel.Toolkit(home, cuda, ())) for arch, cuda in choices)
    options = [set(plan.variables["CMAKE_ARGS"].split()) for plan in (orin, nano, new)]
    common = {
        "-DOPENCV_DNN_CUDA=ON",
        "-DWITH_CUDNN=ON",
        "-DWITH_CUBLAS=ON",
        "-DPYTHON3_LIMITED_API=ON",
        "-DCUDA_ARCH_PTX=",
    }
    assert all(common <= each for each in options)
    assert {"-DCUDA_ARCH_BIN=8.7", "-DCMAKE_CXX_STANDARD=17"} == options[0] - options[1]
    assert {"-DCUDA_ARCH_BIN=5.3"} == options[1] - options[0]
    assert {"-DCUDA_ARCH_BIN=9.0", "-DCUDA_NVCC_FLAGS=--compress-mode=size"} == options[2] - options[0]
    assert len({plan.result for plan in (orin, nano, new)}) == 3 and not cache.exists()


def test_no_nvcc_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if Path("/usr/local/cuda/bin/nvcc").exists():
        pytest.skip("there is an nvcc here")
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(SetupError, match=r"no nvcc here, CUDA's compiler .*: install NVIDIA's CUDA toolkit and cuDNN"):
        cuda_wheel.find_toolkit("8.7")


def test_an_nvcc_says_what_it_compiles_for(monkeypatch: pytest.MonkeyPatch) -> None:
    nvcc = cuda_wheel._nvcc()
    if nvcc is None:
        pytest.skip("no nvcc here")
    toolkit = cuda_wheel.read_toolkit(nvcc)
    assert toolkit.version >= (10, 0)
    if toolkit.version >= (13, 0):
        assert "9.0" in toolkit.computes and "5.3" not in toolkit.computes
        with pytest.raises(SetupError, match=r"does not compile for 5\.3, only for 7\.5.*JetPack 4 has 10\.2 for 5\.3"):
            cuda_wheel.find_toolkit("5.3")
    monkeypatch.setattr(cuda_wheel, "include_folders", lambda home: [Path(__file__).parent])
    with pytest.raises(SetupError, match=r"no headers of cuDNN and cuBLAS and NPP here \(looked in .*tests\): "):
        cuda_wheel.find_toolkit(toolkit.computes[-1] if toolkit.computes else "5.3")


def test_a_wheel_without_cudnn_is_no_cuda_wheel(tmp_path: Path) -> None:
    names = {"cuda": "opencv_contrib*cu130*.whl", "plain": "opencv_python_headless*.whl"}
    wheels = {kind: next(WHEELS.glob(pattern), None) for kind, pattern in names.items()}
    if None in wheels.values():
        pytest.skip(f"no wheels in {WHEELS}")
    cuda_wheel.check_wheel(wheels["cuda"])
    with pytest.raises(ArtifactError, match="has an OpenCV without cuDNN"):
        cuda_wheel.check_wheel(wheels["plain"])
    (tmp_path / "x.whl").write_bytes(b"no zip")
    with pytest.raises(ArtifactError, match="is no wheel"):
        cuda_wheel.check_wheel(tmp_path / "x.whl")


def test_the_import_is_cheap() -> None:
    """So that `edgekit opencv add --help` and a wrong architecture are instant."""
    code = "import sys, edgekit.plugin, edgekit.cuda_wheel; print(sorted({'onnx', 'torch'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"
