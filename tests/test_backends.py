"""Bundles for other backends than OpenCV's own: they run there, are refused elsewhere, and never fall back silently."""

import json
import platform
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import bundles
import cv2
import pytest

from edgekit import plugin, runner
from edgekit.bundle import bundle
from edgekit.environments import CACHE_VARIABLE, opencv_python
from edgekit.errors import EdgekitError, SetupError
from edgekit.evaluate import evaluate
from edgekit.export import export
from edgekit.quantize import quantize
from edgekit.runner import RunnerError
from edgekit.targets import read_target
from edgekit.verify import unproved, verify

MACHINE = platform.machine()
ELSEWHERE = "aarch64" if MACHINE != "aarch64" else "x86_64"
PROVED = [{"opencv": "4.14.0", "engine": "openvino"}]
GIVEN = Path(__file__).parents[2] / "shared" / "wheels" / plugin.FILE_NAME


@pytest.fixture(scope="module")
def plugin_file() -> Path:
    """The plugin in the cache, else one that was built elsewhere; skips where there is neither."""
    try:
        return plugin.find_plugin(MACHINE)
    except EdgekitError as error:
        if MACHINE == "x86_64" and GIVEN.is_file():
            return GIVEN
        pytest.skip(str(error))


@pytest.fixture(scope="module")
def openvino_python() -> Path:
    try:
        return plugin.openvino_python()
    except SetupError as error:
        pytest.skip(str(error))


@pytest.fixture(scope="module")
def openvino(plugin_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bundle that is to run through OpenVINO. To use, not to change."""
    folder = bundles.write_bundle(tmp_path_factory.mktemp("openvino") / "bundle")
    shutil.copyfile(plugin_file, folder / runner.PLUGIN_FILE)
    bundles.sign(folder, target="openvino", backend="openvino/cpu", proved=PROVED)
    return folder


@pytest.fixture(scope="module")
def cuda(tmp_path_factory: pytest.TempPathFactory) -> Path:
    if cv2.dnn.getAvailableTargets(cv2.dnn.DNN_BACKEND_CUDA):
        pytest.skip("the OpenCV here has CUDA")
    return bundles.write_bundle(tmp_path_factory.mktemp("cuda") / "bundle", target="cuda", backend="cuda/fp16")


def run(bundle: Path, *arguments: str, python: Path | str = sys.executable) -> subprocess.CompletedProcess[str]:
    command = [str(python), "-I", str(bundle / "run.py"), *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def refusal(bundle: Path, *arguments: str, python: Path | str = sys.executable) -> str:
    """What `run.py` says where it does not run: one line, exit code 2, nothing on stdout."""
    answer = run(bundle, *arguments, python=python)
    assert (answer.returncode, answer.stdout, answer.stderr.count("\n")) == (2, "", 1), answer
    return answer.stderr.removeprefix("run.py: ")


@pytest.mark.slow
def test_an_openvino_bundle_sets_its_plugin_up_and_runs_through_it(openvino: Path, openvino_python: Path) -> None:
    answer = run(openvino, "check", "--json", "--threads", "1", python=openvino_python)
    assert (answer.returncode, answer.stderr) == (0, "")
    said = json.loads(answer.stdout)
    here = said["conditions"]
    assert said["ok"] and len(said["images"]) == 4
    assert {key: here[key] for key in ("opencv", "engine", "backend", "fallback", "threads")} == {
        "opencv": "4.14.0",
        "engine": "openvino",
        "backend": "openvino/cpu",
        "fallback": "",
        "threads": 1,
    }
    # what it computes in is said, and is what the figures show
    worst = max(row["relative_error"] for row in said["images"])
    assert worst < 1e-4 if here["precision"] == "fp32" else 1e-5 < worst < 0.05
    assert here["proved_on_this_opencv"]


@pytest.mark.slow
def test_openvino_computes_by_openvino_and_not_by_opencv(openvino: Path, openvino_python: Path, tmp_path: Path) -> None:
    """OpenCV's own record of the network names where it ran; and OpenCV's own engine is another session."""
    images = [str(path) for path in sorted((openvino / "check").glob("*.jpg"))]
    (tmp_path / "spec.json").write_text(json.dumps(bundles.SPEC.to_dict()))
    command = ["forward", "--model", str(openvino / "model.onnx"), "--spec", str(tmp_path / "spec.json")]
    command += ["--output", str(tmp_path / "y.npz"), "--images", *images]
    file = str(openvino / runner.PLUGIN_FILE)
    ran = {}
    for engine in ("openvino", "classic"):
        answer = run(openvino, *command, "--engine", engine, "--plugin", file, python=openvino_python)
        ran[engine] = json.loads(answer.stdout)["ran_on"]
    assert ran == {"openvino": "OpenVINO/CPU", "classic": "OCV/CPU"}


@pytest.mark.slow
def test_an_openvino_bundle_names_what_is_missing(openvino: Path) -> None:
    with_another_opencv = refusal(openvino, "check")
    if runner.opencv_version() != (4, 14, 0):
        assert "is to run through openvino/cpu, and OpenCV" in with_another_opencv
        assert (
            "has no OpenVINO: the plugin is for OpenCV 4.14.0 only (`python3 -m pip install -r" in with_another_opencv
        )
    try:
        stock = opencv_python(plugin.OPENCV)
    except SetupError as error:
        pytest.skip(str(error))
    without_openvino = refusal(openvino, "infer", str(openvino / "check"), python=stock)
    assert (
        "OpenCV 4.14.0 has no OpenVINO: the Python package openvino is not installed (`python3 -m pip"
        in without_openvino
    )
    assert without_openvino.rstrip().endswith("--allow-fallback")


@pytest.mark.slow
def test_a_bundle_without_its_plugin_is_damaged(openvino: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(openvino, tmp_path / "copy")
    (copy / runner.PLUGIN_FILE).unlink()
    assert "libopencv_dnn_openvino.so cannot be read (No such file" in refusal(copy, "check")
    (copy / runner.PLUGIN_FILE).write_bytes(b"\x7fELF")
    assert "libopencv_dnn_openvino.so is not the file that was built" in refusal(copy, "check")


def test_a_cuda_bundle_is_refused_where_there_is_no_cuda(cuda: Path) -> None:
    said = refusal(cuda, "check")
    assert said.startswith("this bundle is to run through cuda/fp16, and OpenCV")
    assert "has no CUDA backend, or sees no GPU" in said and "`edgekit opencv add cuda` builds one" in said


def test_a_fallback_is_said_in_every_result_and_by_the_exit_code(cuda: Path) -> None:
    answer = run(cuda, "infer", str(cuda / "check"), "--allow-fallback", "--top-k", "1")
    lines = [json.loads(line) for line in answer.stdout.splitlines()]
    assert answer.returncode == 3
    assert [line["fallback"] for line in lines] == ["opencv/cpu"] * 4
    first, last = answer.stderr.splitlines()
    assert first.startswith("run.py: warning: this bundle is to run through cuda/fp16") and "instead" in first
    assert last.startswith(f"run.py: warning: that was opencv/cpu ({runner.engines()[0]} engine, fp32): this bundle is")
    for command in (["check", "--json"], ["bench", "--json", "--seconds", "0.1"], ["info", "--json"]):
        answer = run(cuda, *command, "--allow-fallback")
        said = json.loads(answer.stdout)
        where = said["here" if command[0] == "info" else "conditions"]
        assert (answer.returncode, where["backend"]) == (3, "opencv/cpu")
        assert where["fallback"].startswith("this bundle is to run through cuda/fp16")


def test_a_check_that_fails_on_a_fallback_has_failed(cuda: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(cuda, tmp_path / "copy")
    bundles.write_model(copy / "model.onnx", seed=1)
    bundles.sign(copy)
    assert run(copy, "check", "--allow-fallback").returncode == 1


@pytest.mark.parametrize("backend", ["opencv/cpu", "cuda/fp32"])
def test_a_bundle_for_another_machine_is_refused(backend: str, tmp_path: Path) -> None:
    bundle = bundles.write_bundle(tmp_path / "b", target="rpi5", arch=(ELSEWHERE,), backend=backend)
    assert refusal(bundle, "check").startswith(
        f"this bundle is for rpi5 ({ELSEWHERE}), and this machine is {MACHINE}: use one that"
    )
    assert run(bundle, "check", "--allow-fallback").returncode == 3


def test_an_engine_of_another_backend_is_no_silent_choice(cuda: Path) -> None:
    with pytest.raises(RunnerError, match="to run through cuda/fp16, and the engine classic belongs to opencv/cpu"):
        runner.Model(cuda, engine="classic")
    model = runner.Model(cuda, engine="classic", allow_fallback=True)
    assert (model.session.engine, model.session.backend) == ("classic", "opencv/cpu") and model.fallback


@pytest.mark.parametrize("engine", ["openvino", "cuda", "cuda-fp16"])
def test_a_session_never_takes_another_engine(engine: str, cuda: Path) -> None:
    with pytest.raises(RunnerError, match=r"^OpenCV .* has no (OpenVINO|CUDA)"):
        runner.Session(cuda / "model.onnx", engine)


def test_try_targets_tries_every_engine_and_names_the_fastest_that_is_right(cuda: Path) -> None:
    answer = run(cuda, "bench", "--try-targets", "--json", "--seconds", "0.2")
    said: dict[str, Any] = json.loads(answer.stdout)
    rows = {row["engine"]: row for row in said["engines"]}
    assert answer.returncode == 0 and tuple(rows) == runner.ENGINES and said["best"] in runner.engines()
    for engine, row in rows.items():
        assert row["backend"] == runner.backend_of(engine)
        if engine in runner.engines():
            assert row["check"] == "as trained" and 0 < row["forward_ms"] < row["total_ms"]
        else:
            assert row["forward_ms"] is None and " has no " in row["check"]
    *table, last = run(cuda, "bench", "--try-targets", "--seconds", "0.1").stdout.splitlines()
    assert [row.split()[0] for row in table] == ["engine", *runner.ENGINES]
    assert any(last.endswith(f"The fastest that is right: --engine {engine}") for engine in runner.engines())


@pytest.mark.slow
def test_a_run_becomes_bundles_for_openvino(
    finished_run: Path, plugin_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Verified through OpenVINO, bundled with the plugin, checked through it, and as good as torch."""
    run = shutil.copytree(finished_run, tmp_path / "runs" / "digits")
    export(run, "plain")
    monkeypatch.setenv(CACHE_VARIABLE, str(tmp_path / "cache"))
    if not plugin.read_plugin(plugin_file, MACHINE).has_precision:
        # It would compute in bf16 where the CPU can, which is too coarse for a network that has hardly been trained.
        monkeypatch.setenv("OV_CPU_MAX_ISA", "AVX512_CORE_VNNI")
    target = read_target("openvino").model_copy(
        update={"prove_on": ("openvino",), "arch": (MACHINE,), "precision": "fp32"}
    )
    with pytest.raises(SetupError, match=r"no OpenVINO plugin .* here: `edgekit opencv add openvino --arch"):
        bundle(run, target, tmp_path / "dist")
    assert verify(run, ["openvino"]).not_proved == ("openvino",)
    plugin.add_openvino(MACHINE, source=plugin_file)
    verified = verify(run, ["openvino"])
    if verified.not_proved:
        pytest.skip(verified.verdicts["openvino"][0].message)
    (row,) = verified.verdicts["openvino"]
    assert (row.engine, row.version, row.status) == ("opencv-openvino", "4.14.0", "ok"), row
    assert unproved(run, ["openvino", "4.14.0.94"]) == ("4.14.0.94",)
    built = bundle(run, target, tmp_path / "dist")
    assert (built.path / runner.PLUGIN_FILE).read_bytes() == plugin_file.read_bytes()
    assert {"opencv": "4.14.0", "engine": "openvino"} in built.proved
    here = built.checked["conditions"]
    assert (here["backend"], here["fallback"], here["precision"]) == ("openvino/cpu", "", row.precision)
    assert "openvino==" in (built.path / "requirements.txt").read_text("utf-8")
    columns = evaluate(run, built.path).metrics["columns"]
    # bf16 may move an answer that torch itself was unsure of
    assert columns["bundle"]["agreement"] == 1 if row.precision == "fp32" else columns["bundle"]["agreement"] > 0.95
    quantized = quantize(run, target, max_drop=10.0, images=64)
    assert [row.status for row in quantized.variants[-1].figures] == ["ok"]
    int8 = bundle(run, target, tmp_path / "dist", "int8")
    assert int8.checked["conditions"]["precision"] == "int8"
    assert all(row["ok"] for row in int8.checked["images"])
    assert int8.proved == ({"opencv": "4.14.0", "engine": "openvino"},)
    assert evaluate(run, int8.path).metrics["columns"]["bundle"]["agreement"] > 0.8
    other = target.model_copy(update={"name": "elsewhere", "arch": (ELSEWHERE,)})
    with pytest.raises(SetupError, match=f"no OpenVINO plugin for {ELSEWHERE}"):
        bundle(run, other, tmp_path / "dist")


@pytest.mark.slow
@pytest.mark.usefixtures("cuda")
def test_a_run_becomes_a_cuda_bundle_that_is_checked_without_a_gpu(finished_run: Path, tmp_path: Path) -> None:
    run = shutil.copytree(finished_run, tmp_path / "runs" / "digits")
    export(run, "plain")
    built = bundle(run, read_target("jetson"), tmp_path / "dist")
    assert built.cpu_operators == {}
    assert built.checked["ok"] and built.checked["conditions"]["backend"] == "opencv/cpu"
    reason = "this bundle is to run through cuda" if MACHINE == "aarch64" else "this bundle is for jetson (aarch64)"
    assert built.checked["conditions"]["fallback"].startswith(reason)
    assert not any("cuda" in row["engine"] for row in built.proved)
    readme = (built.path / "README.md").read_text("utf-8")
    assert "It runs through cuda/fp32" in readme and "edgekit opencv add cuda --arch 8.7" in readme
