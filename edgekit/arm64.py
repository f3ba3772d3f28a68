"""arm64: a bundle's own run.py on an arm64 Debian under qemu-user, so that proving it needs no Arm board.

    a Debian's files (mmdebstrap) + aarch64 wheels (uv) ─ qemu-aarch64 as a cortex-a53 ─► run.py check ─► verdict

qemu computes what the CPU would compute, and ends the process at an instruction that the CPU does not have. It says
nothing of speed: one inference takes seconds. Both parts are kept in the cache and used again.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from edgekit import runner
from edgekit.artifacts import read_json
from edgekit.environments import cache_folder, making, site_packages
from edgekit.errors import ArtifactError, SetupError, UsageError

TIMEOUT_S = 900.0  # for a check; one image of 224 px takes up to 7 s
MAKING_TIMEOUT_S = 1800.0  # for a Debian; with python3-opencv it fetches 300 MB

# What a processor that qemu emulates stands for.
CPUS = {
    "cortex-a53": "Raspberry Pi 3 and Zero 2, and every other ARMv8.0 core",
    "cortex-a57": "Jetson Nano and TX2",
    "cortex-a72": "Raspberry Pi 4",
    "cortex-a76": "Raspberry Pi 5",
    "neoverse-n1": "arm64 servers",
}

Status = Literal["ok", "failed", "refused", "not proved"]
Progress = Callable[[str], None]


@dataclass(frozen=True)
class Debian:
    """A release: its name for apt, and the OpenCV that it has as python3-opencv."""

    suite: str
    opencv: str


DEBIANS = {"debian-12": Debian("bookworm", "4.6.0"), "debian-13": Debian("trixie", "4.10.0")}
# What the wheels' Python is taken from; its glibc (2.36) is newer than what any wheel that a bundle names asks for.
WHEELS_DEBIAN = "debian-12"
WHEELS_PYTHON = "3.11"
WHEELS_PLATFORM = "aarch64-manylinux_2_36"
PYTHON_PACKAGES = ("python3", f"libpython{WHEELS_PYTHON}-stdlib", "libc6", "libstdc++6", "zlib1g")
LEFT_OUT = ("./dev", "./var", "./usr/share")  # of a Debian: device files that only root can make, texts, caches


@dataclass(frozen=True)
class System:
    """An arm64 system for run.py: a Debian's files, and where numpy and cv2 are."""

    root: Path
    packages: Path


@dataclass(frozen=True)
class Emulated:
    """What a bundle's `run.py check` said on one emulated CPU with one OpenCV."""

    cpu: str
    opencv: str  # as it was asked for: 4.14, 5.0.0.93, debian-12
    status: Status
    found: str = ""  # the version that ran
    engine: str = ""
    relative_error: float | None = None  # the largest of all images, as a share of the largest output
    images: int = 0
    seconds: float = 0.0  # under emulation: no latency
    reason: str = ""


def check_on_arm64(
    bundle: Path,
    opencvs: Sequence[str] = (),
    cpus: Sequence[str] = ("cortex-a53",),
    *,
    timeout_s: float = TIMEOUT_S,
    progress: Progress = lambda _: None,
) -> tuple[Emulated, ...]:
    """Runs a bundle's own check under qemu: a row for each CPU with each OpenCV.

    opencvs: versions of opencv-python-headless (4.14: the newest of them), or "debian-12", "debian-13" for the
    OpenCV of that Debian; none: those that the manifest names as proved. cpus: names in CPUS.
    An OpenCV that cannot be had is "not proved". "refused": run.py itself says that it does not run there, and why.
    Nothing is written into the bundle.

    Raises ArtifactError where there is no bundle, UsageError for an unknown CPU or where no OpenCV is named,
    SetupError where this machine lacks qemu-user or what makes a Debian.
    """
    script = bundle / "run.py"
    if not script.is_file():
        raise ArtifactError(f"no bundle at {bundle} (it has no run.py): make one with `edgekit bundle RUN`")
    refuse_cpus(cpus)
    versions = tuple(opencvs) or proved_opencvs(bundle)
    qemu = find_qemu()
    if not all(_debian_folder(*_debian_of(version)).is_dir() for version in versions):
        find_mmdebstrap()
    rows = []
    for version in versions:
        try:
            system = system_with(version, bundle / "requirements.txt", progress)
        except SetupError as error:
            rows += [Emulated(cpu, version, "not proved", reason=str(error)) for cpu in cpus]
            continue
        for cpu in cpus:
            progress(f"OpenCV {version} on {cpu}")
            rows.append(_check(qemu, system, cpu, version, script, timeout_s))
    return tuple(rows)


def refuse_cpus(cpus: Sequence[str]) -> None:
    """Raises UsageError for a CPU that proves nothing."""
    known = ", ".join(CPUS)
    for cpu in cpus:
        if cpu == "max":
            raise UsageError(
                "the CPU 'max' is no judge: it has every instruction, so it does not find those that a board lacks, "
                f"and what it computes with SVE was wrong where real cores were right. Give some of {known}"
            )
        if cpu not in CPUS:
            raise UsageError(f"no CPU named {cpu!r}: give some of {known}")


def proved_opencvs(bundle: Path) -> tuple[str, ...]:
    """The versions that a bundle's manifest names as proved with its own backend, each once.

    (It also names the workstation's OpenCV, which an OpenVINO bundle, say, does not run on.)
    Raises ArtifactError, and UsageError where there are none.
    """
    manifest = read_json(bundle / "manifest.json")
    try:
        engines = runner.BACKENDS[manifest["backend"]]
        versions = dict.fromkeys(row["opencv"] for row in manifest["proved"] if row["engine"] in engines)
    except (KeyError, TypeError):
        raise ArtifactError(f"{bundle / 'manifest.json'} is damaged: copy the bundle again") from None
    if not versions:
        raise UsageError(
            f"{bundle} names no OpenCV that it was proved on with {manifest['backend']}: "
            "give some, such as --opencv 4.14,debian-12"
        )
    return tuple(versions)


# ---------------------------------------------------------------------------------------------------------------
# The system: a Debian's files and aarch64 wheels


def system_with(opencv: str, requirements: Path, progress: Progress = lambda _: None) -> System:
    """An arm64 system with an OpenCV, from the cache or made now.

    opencv: "debian-12", "debian-13", or a version of opencv-python-headless, which is then installed with all that
    `requirements` (a bundle's requirements.txt; it may be missing) asks for. Raises SetupError where it cannot be had.
    """
    if opencv not in DEBIANS and not re.fullmatch(r"\d+(\.\d+){1,3}", opencv):
        raise SetupError(
            f"{opencv!r} is no OpenCV version: give one such as 4.10 or 4.14.0.94, or {' or '.join(DEBIANS)}"
        )
    root = debian(*_debian_of(opencv), progress)
    if opencv in DEBIANS:
        return System(root, root / "usr" / "lib" / "python3" / "dist-packages")
    pins = [f"opencv-python-headless=={opencv}" + ("" if opencv.count(".") == 3 else ".*")]
    if runner.opencv_version(opencv) < (4, 10, 0):  # numpy 2 came later
        pins.append("numpy<2")
    wanted = requirements.read_bytes() if requirements.is_file() else b""
    folder = cache_folder() / f"arm64-opencv-{opencv}-{hashlib.sha256(wanted).hexdigest()[:8]}"
    if not folder.is_dir():
        progress(f"fetching OpenCV {opencv} for arm64")
        files = ["-r", str(requirements.resolve())] if wanted else []
        site_packages(folder, [*files, *pins], platform=WHEELS_PLATFORM, python=WHEELS_PYTHON)
    return System(root, folder)


def _debian_of(opencv: str) -> tuple[str, tuple[str, ...]]:
    """The Debian that an OpenCV runs on, and the packages of it."""
    return (opencv, ("python3-opencv",)) if opencv in DEBIANS else (WHEELS_DEBIAN, PYTHON_PACKAGES)


def _debian_folder(name: str, packages: Sequence[str]) -> Path:
    return cache_folder() / f"arm64-{name}-{hashlib.sha256(','.join(packages).encode()).hexdigest()[:8]}"


def debian(name: str, packages: Sequence[str], progress: Progress = lambda _: None) -> Path:
    """The folder with the files of some packages of an arm64 Debian, and of all that they need.

    name: one of DEBIANS. Raises SetupError where this machine has no mmdebstrap or no Debian's apt, or it fails.
    """
    folder = _debian_folder(name, packages)
    if not folder.is_dir():
        mmdebstrap, source = find_mmdebstrap(), apt_source(DEBIANS[name].suite)
        progress(f"making an arm64 {name}, once")
        with making(folder) as made:
            _make_debian(made, [mmdebstrap, *mmdebstrap_arguments(name, packages)], source)
    return folder


def mmdebstrap_arguments(name: str, packages: Sequence[str]) -> list[str]:
    """What mmdebstrap is told, but for the archive that it is to write and the file that names the source."""
    options = ["--quiet", "--variant=extract", "--architectures=arm64", "--format=tar"]
    return [*options, f"--include={','.join(packages)}", DEBIANS[name].suite]


def apt_source(suite: str) -> str:
    """The line of a sources.list that gives a Debian from where this machine has its own. Raises SetupError."""
    apt = shutil.which("apt-get")
    if not apt:
        raise SetupError("an arm64 Debian can be made on a Debian only: run it there, or check the bundle on a board")
    fields = ["Created-By: Packages", "Origin: Debian", "Component: main"]
    asked = [apt, "indextargets", "--format", "$(CODENAME) $(REPO_URI)", *fields]
    lines = subprocess.run(asked, capture_output=True, text=True, check=False).stdout.split("\n")
    found = [line.split() for line in lines if line]
    # not bookworm-updates, bookworm-security: those archives have no whole Debian
    archives = [address for codename, address in found if "-" not in codename]
    if not archives:
        raise SetupError(
            "apt knows no Debian here, from which an arm64 one could be made: run it on Debian, "
            "after `apt-get update`, or check the bundle on a board"
        )
    keys = Path("/usr/share/keyrings/debian-archive-keyring.gpg")
    return f"deb {f'[signed-by={keys}] ' if keys.is_file() else ''}{archives[0]} {suite} main\n"


def _make_debian(folder: Path, mmdebstrap: Sequence[str], source: str) -> None:
    """Runs mmdebstrap and unpacks what it makes as the user who asks, so that no root is needed."""
    folder.mkdir()
    archive, sources = folder.with_suffix(".tar"), folder.with_suffix(".list")
    sources.write_text(source, encoding="utf-8")
    _do([*mmdebstrap, str(archive), str(sources)])
    left_out = [f"--exclude={path}" for path in LEFT_OUT]
    _do(["tar", "--extract", f"--file={archive}", f"--directory={folder}", "--no-same-owner", *left_out])
    if not (folder / "lib").exists():  # in Debian 13 it is a link that only a whole system has
        (folder / "lib").symlink_to("usr/lib")


def _do(command: Sequence[str]) -> None:
    """Raises SetupError where the command fails."""
    name = Path(command[0]).name
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=MAKING_TIMEOUT_S, check=False)
    except subprocess.TimeoutExpired:
        raise SetupError(f"{name} did not end within {MAKING_TIMEOUT_S:g} s: is the network slow?") from None
    if done.returncode:
        last = " ".join(done.stderr.split())[-400:] or "no message"
        raise SetupError(f"{name} ended with exit code {done.returncode}: {last}")


def find_qemu() -> str:
    """The emulator. Raises SetupError where there is none, and on systems that it does not exist for."""
    if sys.platform != "linux":
        raise SetupError("emulating arm64 needs Linux (qemu-user): run it there, or check the bundle on a board")
    return _find("qemu-aarch64-static", "qemu-aarch64")


def find_mmdebstrap() -> str:
    """What makes a Debian. Raises SetupError where it is not here."""
    return _find("mmdebstrap")


def _find(*names: str) -> str:
    found = [path for name in names if (path := shutil.which(name))]
    if not found:
        raise SetupError(
            f"{names[0]} is not here, which emulating arm64 needs: apt-get install -y qemu-user-static mmdebstrap"
        )
    return found[0]


# ---------------------------------------------------------------------------------------------------------------
# Running there


def python_command(qemu: str, system: System, *arguments: str) -> list[str]:
    """The arm64 system's Python with arguments, such as run.py's path and "check"; see python_environment."""
    return [qemu, str(system.root / "usr" / "bin" / "python3"), "-S", *arguments]


def python_environment(system: System, cpu: str) -> dict[str, str]:
    """The variables that python_command needs, and no others: this machine's settings are not the board's."""
    libraries = system.root / "usr" / "lib" / "aarch64-linux-gnu"
    return {
        "QEMU_CPU": cpu,
        "QEMU_LD_PREFIX": str(system.root),
        # qemu takes this machine's files where the Debian has none, so Python must not look for its library
        "PYTHONHOME": str(system.root / "usr"),
        "PYTHONPATH": str(system.packages),
        "PYTHONDONTWRITEBYTECODE": "1",
        "PYTHONUTF8": "1",
        "LD_LIBRARY_PATH": f"{libraries / 'blas'}:{libraries / 'lapack'}",  # links that only a whole system has
        "PATH": os.defpath,
    }


def _check(qemu: str, system: System, cpu: str, opencv: str, script: Path, timeout_s: float) -> Emulated:
    command = python_command(qemu, system, str(script.resolve()), "check", "--json")
    start = time.perf_counter()
    try:
        with tempfile.TemporaryDirectory() as elsewhere:  # where qemu may leave a core file
            answer = subprocess.run(
                command,
                env=python_environment(system, cpu),
                cwd=elsewhere,
                capture_output=True,
                text=True,
                timeout=timeout_s,
                check=False,
            )
    except subprocess.TimeoutExpired:
        return Emulated(cpu, opencv, "failed", seconds=timeout_s, reason=f"did not end within {timeout_s:g} s")
    seconds = round(time.perf_counter() - start, 1)
    if answer.returncode in (0, 1) and answer.stdout.startswith("{"):
        return _judged(cpu, opencv, json.loads(answer.stdout), seconds)
    status: Status = "refused" if answer.returncode == 2 else "failed"
    return Emulated(cpu, opencv, status, seconds=seconds, reason=_reason(answer, cpu))


def _judged(cpu: str, opencv: str, checked: dict[str, Any], seconds: float) -> Emulated:
    """What `run.py check --json` said, as a row."""
    rows, here = checked["images"], checked["conditions"]
    wrong = [row for row in rows if not row["ok"]]
    errors = [row["relative_error"] for row in rows]
    return Emulated(
        cpu,
        opencv,
        "ok" if checked["ok"] else "failed",
        here["opencv"],
        here["engine"],
        None if None in errors or not errors else max(errors),
        len(rows),
        seconds,
        f"{len(wrong)} of {len(rows)} images: {wrong[0]['file']}: {wrong[0]['reason']}" if wrong else "",
    )


def _reason(answer: subprocess.CompletedProcess[str], cpu: str) -> str:
    """Why there is no verdict: what run.py said last, or the signal that ended it."""
    code = -answer.returncode if answer.returncode < 0 else answer.returncode - 128
    if code == signal.SIGILL:
        return f"it uses an instruction that {cpu} does not have"
    if code > 0:
        return f"ended by {signal.Signals(code).name if code in set(signal.Signals) else f'signal {code}'}"
    last = (answer.stderr.strip().splitlines() or ["no message"])[-1].removeprefix("run.py: ")
    return last if answer.returncode == 2 else f"exit code {answer.returncode}: {last}"
