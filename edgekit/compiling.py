"""Compiling OpenCV from its source package: the tools, the sources, and a run that goes on where it was stopped.

cmake and ninja come from PyPI into an environment of their own; only the compiler has to be there. A build works in
a folder of the cache, which is removed when it has succeeded and used again when it has not.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import tarfile
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from edgekit.environments import cache_folder, environment
from edgekit.errors import Interrupted, SetupError

Progress = Callable[[str, int, int], None]
"""(what is being done, how far, of how much; 0 of 0 where that is not known)."""

TOOLS = ("cmake>=3.28,<4", "ninja>=1.11", "pip>=24")  # 4.x drops what OpenCV's look for CUDA needs
STEP = re.compile(r"^\s*\[(\d+)/(\d+)\]")  # ninja's "[12/497] Building ..."
# OpenCV's options that what edgekit needs of it does without: nothing of them is looked for, fetched or compiled.
OFF = (
    *("WITH_1394", "WITH_ADE", "WITH_AVIF", "WITH_EIGEN", "WITH_FFMPEG", "WITH_FLATBUFFERS", "WITH_GSTREAMER"),
    *("WITH_GTK", "WITH_IPP", "WITH_ITT", "WITH_JASPER", "WITH_LAPACK", "WITH_OPENCL", "WITH_OPENEXR"),
    *("WITH_OPENJPEG", "WITH_QUIRC", "WITH_TIFF", "WITH_VA", "WITH_VULKAN", "WITH_WEBP"),
    *("WITH_CAROTENE", "WITH_KLEIDICV"),  # fetched, or compiled for a minute, on Arm
    *("BUILD_DOCS", "BUILD_EXAMPLES", "BUILD_JAVA", "BUILD_PERF_TESTS", "BUILD_TESTS", "BUILD_opencv_apps"),
)


@dataclass(frozen=True)
class Plan:
    """A build, before anything is done: what `--dry-run` shows."""

    what: str
    tools: tuple[str, ...]  # requirements of the environment that it runs in
    folder: Path  # where it works, in the cache
    result: Path
    fetches: tuple[str, ...]
    configure: tuple[str, ...]  # the command; its paths are in `folder`
    variables: Mapping[str, str]  # of the environment, for `configure` and `compile`
    compile: tuple[str, ...]
    minutes: str
    disk_bytes: int


def tools(requirements: tuple[str, ...] = TOOLS) -> Path:
    """The folder of the programs of an environment with these, made where the cache has none. Raises SetupError."""
    mark = hashlib.sha256("\n".join(requirements).encode()).hexdigest()[:8]
    return environment(f"build-tools-{mark}", *requirements).parent


def need_compiler(program: str, package: str) -> str:
    """The path of a compiler. Raises SetupError, which names the package that brings it, where there is none."""
    found = shutil.which(program)
    if not found:
        raise SetupError(f"no {program} here, which compiles the plugin: sudo apt-get install {package}")
    return found


def need_disk(size_bytes: int) -> None:
    """Raises SetupError where the cache's disk has less free space than a build takes."""
    folder = cache_folder()
    folder.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(folder).free
    if free < size_bytes:
        raise SetupError(
            f"{free / 1e9:.1f} GB free at {folder}, and the build takes {size_bytes / 1e9:.1f} GB: "
            "free some, or set EDGEKIT_CACHE to a folder on another disk"
        )


@contextlib.contextmanager
def only_one(folder: Path) -> Iterator[int]:
    """Holds a folder against a second build in it; gives the lock's descriptor, for the children to hold too.

    Raises SetupError where another build holds it.
    """
    import fcntl  # not on Windows

    folder.mkdir(parents=True, exist_ok=True)
    with (folder.parent / f"{folder.name}.lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise SetupError(f"another edgekit is building in {folder}: wait for it, or stop it") from None
        yield lock.fileno()


def fetch_source(package: str, version: str) -> Path:
    """The source package from PyPI, kept in the cache. Raises SetupError where it cannot be had."""
    folder = cache_folder() / "downloads"
    archive = folder / f"{package.replace('-', '_')}-{version}.tar.gz"
    if archive.is_file():
        return archive
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder, prefix=".fetching-") as temporary:
        command = (str(tools() / "python"), "-m", "pip", "download", "--quiet", "--disable-pip-version-check")
        wanted = ("--no-deps", "--no-binary", package, "--dest", temporary, f"{package}=={version}")
        try:
            done = subprocess.run([*command, *wanted], capture_output=True, text=True, timeout=1800, check=False)
        except subprocess.TimeoutExpired:
            raise SetupError(f"{package} {version} did not arrive within 30 minutes: is the network slow?") from None
        found = next(Path(temporary).glob("*.tar.gz"), None)
        if done.returncode or not found:
            raise SetupError(f"cannot fetch the source of {package} {version}: {' '.join(done.stderr.split())[-400:]}")
        found.replace(archive)
    return archive


def unpack(archive: Path, folder: Path) -> None:
    """Unpacks a source package so that its content is `folder`, whole or not at all. Raises SetupError."""
    if folder.is_dir():
        return
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=".unpacking-") as temporary:
        try:
            with tarfile.open(archive) as tar:
                if hasattr(tarfile, "data_filter"):
                    tar.extractall(temporary, filter="data")
                else:  # Python before 3.10.12
                    tar.extractall(temporary)
        except (OSError, tarfile.TarError, EOFError) as error:
            raise SetupError(f"cannot unpack {archive} ({error}): remove it, it is fetched again") from None
        next(Path(temporary).iterdir()).rename(folder)


def configure_and_compile(plan: Plan, lock: int, progress: Progress) -> None:
    """Runs the plan's two commands; the first only where it was not run just so before.

    Raises SetupError with the log's errors where one fails, Interrupted at Ctrl-C.
    """
    log = plan.folder / "build.log"
    variables = {**os.environ, **plan.variables, "PATH": f"{tools(plan.tools)}{os.pathsep}{os.environ.get('PATH', '')}"}
    variables.pop("NINJA_STATUS", None)
    configured, asked = plan.folder / "configured.json", json.dumps([plan.configure, dict(plan.variables)])
    if plan.configure and not (configured.is_file() and configured.read_text(encoding="utf-8") == asked):
        configured.unlink(missing_ok=True)
        progress("configuring", 0, 0)
        run(plan.configure, variables, log, lock, lambda line: None)
        configured.write_text(asked, encoding="utf-8")

    def follow(line: str) -> None:
        step = STEP.match(line)
        if step:
            progress("compiling", int(step[1]), int(step[2]))

    progress("compiling", 0, 0)
    run(plan.compile, variables, log, lock, follow)


def run(
    command: Sequence[str], variables: Mapping[str, str], log: Path, lock: int, on_line: Callable[[str], None]
) -> None:
    """Runs a command to its end, its output in a log and line by line to `on_line`.

    Raises SetupError with the output's errors where it fails, Interrupted at Ctrl-C, when the child has ended.
    """
    with log.open("a", encoding="utf-8", buffering=1) as file:
        file.write(f"$ {shlex.join(command)}\n")
        begin = file.tell()
        with subprocess.Popen(
            command,
            env=variables,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            pass_fds=(lock,),
            start_new_session=True,  # a group of its own, so that all of it can be stopped: pip waits for its child
        ) as process:
            assert process.stdout is not None
            try:
                for line in process.stdout:
                    file.write(line)
                    on_line(line)
                code = process.wait()
            except KeyboardInterrupt:
                raise Interrupted("stopped; what was compiled is kept: the same command goes on from there") from None
            finally:
                if process.poll() is None:
                    os.killpg(process.pid, signal.SIGINT)  # ninja removes what it was writing
    if code:
        said = log.read_bytes()[begin:].decode(errors="replace")
        raise SetupError(f"{Path(command[0]).name} failed, the log is {log}: {_errors(said)}")


def _errors(said: str) -> str:
    """The lines of a build's output that say what went wrong, else its last ones."""
    lines = [line.strip() for line in said.splitlines() if line.strip()]
    wrong = [line for line in lines if re.search(r"\b(fatal error|error|Error)\b", line)]
    return " | ".join(wrong[:3] or lines[-3:])[:600]
