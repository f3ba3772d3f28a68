"""Bundles on emulated arm64: what is asked of the machine; what a CPU lacks is found; a wrong bundle does not pass."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from bundles import sign, write_bundle, write_model

from edgekit import arm64, environments
from edgekit.arm64 import Emulated, System, check_on_arm64
from edgekit.errors import ArtifactError, SetupError, UsageError

ROOT = Path(__file__).parents[1]
PROVED = [
    {"opencv": "5.0.0", "engine": "new"},
    {"opencv": "5.0.0", "engine": "classic"},
    {"opencv": "4.6.0", "engine": "classic"},
]


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    arch = ("x86_64", "aarch64")
    return write_bundle(tmp_path_factory.mktemp("arm64") / "tiny", proved=PROVED, arch=arch)


@pytest.fixture
def copy(bundle: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(bundle, tmp_path / "copy"))


@pytest.fixture
def empty_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv(environments.CACHE_VARIABLE, str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture(scope="module")
def system() -> System:
    """An arm64 Debian with OpenCV 5.0; skips, with the reason, where it cannot be had."""
    try:
        arm64.find_qemu()
        return arm64.system_with("5.0", Path("none"))
    except SetupError as error:
        pytest.skip(str(error))


def verify(bundle: Path, *args: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "edgekit.cli", "verify", str(bundle), *args]
    settings = {**os.environ, "PYTHONPATH": str(ROOT), "COLUMNS": "100", "NO_COLOR": "1"}
    return subprocess.run(command, capture_output=True, text=True, env=settings, check=False)


# -- what is refused before anything is made


def test_a_cpu_that_proves_nothing_is_refused(bundle: Path, empty_cache: Path) -> None:
    with pytest.raises(UsageError, match=r"'max' is no judge: it has every instruction.*Give some of cortex-a53, "):
        check_on_arm64(bundle, cpus=["cortex-a53", "max"])
    with pytest.raises(UsageError, match=r"no CPU named 'pentium': give some of cortex-a53, "):
        check_on_arm64(bundle, cpus=["pentium"])
    assert not empty_cache.exists()


def test_what_is_no_bundle_or_names_no_opencv(copy: Path, tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match=r"no bundle at .*nothing \(it has no run.py\)"):
        check_on_arm64(tmp_path / "nothing")
    sign(copy, proved=())
    no_opencv = r"names no OpenCV that it was proved on with opencv/cpu: give some, such as --opencv 4\.14,debian-12"
    with pytest.raises(UsageError, match=no_opencv):
        check_on_arm64(copy)


def test_without_versions_it_is_those_that_were_proved_with_the_bundles_backend(copy: Path) -> None:
    sign(copy, proved=[*PROVED, {"opencv": "4.14.0", "engine": "openvino"}])
    assert arm64.proved_opencvs(copy) == ("5.0.0", "4.6.0")
    sign(copy, backend="openvino/cpu")
    assert arm64.proved_opencvs(copy) == ("4.14.0",)


def test_a_machine_that_cannot_emulate_says_what_to_install(
    bundle: Path, empty_cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    programs = tmp_path / "bin"
    programs.mkdir()
    monkeypatch.setenv("PATH", str(programs))
    install = r"apt-get install -y qemu-user-static mmdebstrap$"
    with pytest.raises(SetupError, match=rf"qemu-aarch64-static is not here.*{install}"):
        check_on_arm64(bundle)
    (programs / "qemu-aarch64").symlink_to("/bin/true")
    with pytest.raises(SetupError, match=rf"mmdebstrap is not here.*{install}"):
        check_on_arm64(bundle)
    (programs / "mmdebstrap").symlink_to("/bin/true")
    (row,) = check_on_arm64(bundle, ["debian-12"])
    assert (row.status, row.images) == ("not proved", 0) and "can be made on a Debian only" in row.reason
    (programs / "apt-get").symlink_to("/bin/true")  # knows no archive
    (row,) = check_on_arm64(bundle, ["debian-12"])
    assert row.status == "not proved" and row.reason.startswith("apt knows no Debian here")
    monkeypatch.setattr(sys, "platform", "darwin")
    with pytest.raises(SetupError, match="needs Linux"):
        check_on_arm64(bundle)
    assert not empty_cache.exists()


@pytest.mark.parametrize(
    ("args", "said"),
    [
        ((), "a bundle is verified with --arch arm64; on this machine it checks itself: edgekit run "),
        (("--cpu", "cortex-a53"), "a bundle is verified with --arch arm64; "),
        (("--arch", "riscv64"), "a bundle is verified with --arch arm64, not riscv64; "),
        (("--arch", "arm64", "--cpu", "max"), "the CPU 'max' is no judge"),
        (("--arch", "arm64", "--opencv", ","), "no OpenCV version: give some"),
    ],
)
def test_the_command_refuses_what_does_not_fit(bundle: Path, args: tuple[str, ...], said: str) -> None:
    done = verify(bundle, *args)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith(f"edgekit: {said}") and len(done.stderr.splitlines()) == 1


# -- what is run


def test_a_debian_comes_from_where_this_machine_has_its_own() -> None:
    try:
        line = arm64.apt_source("trixie")
    except SetupError as error:
        pytest.skip(str(error))
    *_, address, suite, component = line.split()
    assert line.startswith("deb ") and line.count("\n") == 1
    assert (suite, component) == ("trixie", "main") and "://" in address and "security" not in address


def test_what_mmdebstrap_and_qemu_are_told() -> None:
    assert arm64.mmdebstrap_arguments("debian-13", ("python3-opencv", "libc6")) == [
        "--quiet",
        "--variant=extract",
        "--architectures=arm64",
        "--format=tar",
        "--include=python3-opencv,libc6",
        "trixie",
    ]
    there = System(Path("/root-of-it"), Path("/packages"))
    assert arm64.python_command("qemu", there, "run.py", "check") == [
        "qemu",
        "/root-of-it/usr/bin/python3",
        "-S",
        "run.py",
        "check",
    ]
    settings = arm64.python_environment(there, "cortex-a72")
    assert (settings["QEMU_CPU"], settings["QEMU_LD_PREFIX"]) == ("cortex-a72", "/root-of-it")
    assert (settings["PYTHONHOME"], settings["PYTHONPATH"]) == ("/root-of-it/usr", "/packages")
    assert settings["PYTHONDONTWRITEBYTECODE"] == "1" and "HOME" not in settings


# sdot v0.4s, v1.16b, v2.16b; ret. The Cortex-A53 has no dot product, the A76 has.
DOT_PRODUCT = """
import ctypes, json, mmap
code = mmap.mmap(-1, 4096, prot=mmap.PROT_READ | mmap.PROT_WRITE | mmap.PROT_EXEC)
code.write(b"\\x20\\x94\\x82\\x4e\\xc0\\x03\\x5f\\xd6")
ctypes.CFUNCTYPE(None)(ctypes.addressof(ctypes.c_char.from_buffer(code)))()
row = {"ok": True, "relative_error": 0.5}
print(json.dumps({"ok": True, "images": [row], "conditions": {"opencv": "5.0.0", "engine": "new"}}))
"""


@pytest.mark.slow
@pytest.mark.usefixtures("system")
def test_an_instruction_that_the_cpu_does_not_have_is_found(copy: Path) -> None:
    (copy / "run.py").write_text(DOT_PRODUCT, encoding="utf-8")
    lacks, has = check_on_arm64(copy, ["5.0"], ["cortex-a53", "cortex-a76"])
    assert (lacks.status, lacks.reason) == ("failed", "it uses an instruction that cortex-a53 does not have")
    assert has == Emulated("cortex-a76", "5.0", "ok", "5.0.0", "new", 0.5, 1, has.seconds)


@pytest.mark.slow
@pytest.mark.usefixtures("system")
@pytest.mark.parametrize(
    ("code", "status", "reason"),
    [
        ("raise SystemExit('bad')", "failed", "exit code 1: bad"),
        ("import os; os.abort()", "failed", "ended by SIGABRT"),
        ("import time; time.sleep(60)", "failed", "did not end within 2 s"),
        ("import sys; print('run.py: not on this one', file=sys.stderr); sys.exit(2)", "refused", "not on this one"),
    ],
)
def test_a_check_that_does_not_answer(copy: Path, code: str, status: str, reason: str) -> None:
    (copy / "run.py").write_text(code, encoding="utf-8")
    (row,) = check_on_arm64(copy, ["5.0"], timeout_s=2)
    assert (row.status, row.reason, row.images) == (status, reason, 0)


@pytest.mark.slow
@pytest.mark.usefixtures("system")
def test_a_right_bundle_is_proved_with_pypis_opencv_and_with_debians(bundle: Path) -> None:
    before = sorted((path, path.stat().st_mtime_ns) for path in bundle.rglob("*"))
    done = verify(bundle, "--arch", "arm64", "--opencv", "5.0,debian-12,4.99", "--json")
    said = json.loads(done.stdout)
    assert (done.returncode, said["arch"], said["ok"]) == (3, "arm64", False), "4.99 cannot be had"
    new, old, missing = said["rows"]
    assert (new["found"], new["engine"], new["status"], new["images"]) == ("5.0.0", "new", "ok", 4)
    assert (old["found"], old["engine"], old["status"], old["images"]) == ("4.6.0", "classic", "ok", 4)
    assert all(0 < row["relative_error"] < 1e-5 and row["cpu"] == "cortex-a53" for row in (new, old))
    assert missing["status"] == "not proved" and "opencv-python-headless==4.99.*" in missing["reason"]
    assert sorted((path, path.stat().st_mtime_ns) for path in bundle.rglob("*")) == before


@pytest.mark.slow
@pytest.mark.usefixtures("system")
def test_a_wrong_bundle_fails_and_one_that_refuses_is_not_proved_either(copy: Path) -> None:
    sign(copy, proved=PROVED[2:], refused=[{**row, "reason": "wrong"} for row in PROVED[:2]])
    (refused,) = check_on_arm64(copy, ["5.0"])
    assert refused.status == "refused"
    assert refused.reason.startswith("OpenCV 5.0.0 does not compute this network as it was trained")
    sign(copy, arch=("x86_64",))
    (elsewhere,) = check_on_arm64(copy, ["5.0"])
    assert elsewhere.status == "refused" and "this machine is aarch64" in elsewhere.reason
    write_model(copy / "model.onnx", seed=1)
    (damaged,) = check_on_arm64(copy, ["5.0"])
    assert damaged.status == "refused" and "model.onnx is not the file that was built" in damaged.reason
    sign(copy, proved=PROVED, refused=(), arch=("aarch64",))
    done = verify(copy, "--arch", "arm64", "--opencv", "5.0")
    assert done.returncode == 1
    assert "OpenCV 5.0 on cortex-a53: 4 of 4 images: china.jpg: outputs differ by" in done.stdout


@pytest.mark.slow
def test_infer_answers_there_as_it_does_here(bundle: Path, system: System) -> None:
    command = [str(bundle / "run.py"), "infer", "check"]
    emulated = subprocess.run(
        arm64.python_command(arm64.find_qemu(), system, *command),
        env=arm64.python_environment(system, "cortex-a53"),
        cwd=bundle,
        capture_output=True,
        text=True,
        check=True,
    )
    here = subprocess.run([sys.executable, *command], cwd=bundle, capture_output=True, text=True, check=True)
    labels = [
        [[result["label"] for result in json.loads(line)["results"]] for line in done.stdout.splitlines()]
        for done in (emulated, here)
    ]
    assert labels[0] == labels[1] and len(labels[0]) == 4
