"""Isolated environments, each with numpy and one OpenCV from PyPI: what a device has, made on the workstation.

They are kept in the user's cache folder and used again. uv makes them: it takes seconds where pip takes a minute.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import platformdirs
from uv import find_uv_bin

from edgekit.errors import SetupError

TIMEOUT_S = 600.0
CACHE_VARIABLE = "EDGEKIT_CACHE"


def cache_folder() -> Path:
    """Where edgekit keeps what can be made again: $EDGEKIT_CACHE, else the system's place for caches."""
    return Path(os.environ.get(CACHE_VARIABLE) or platformdirs.user_cache_dir("edgekit", appauthor=False))


def opencv_python(version: str, *extra: str) -> Path:
    """The interpreter of an environment that holds opencv-python-headless of a version, what it needs, and `extra`.

    version: exact ("4.14.0.94") or the beginning of one ("4.14": the newest that PyPI has).
    extra: further requirements, such as "openvino==2026.4.1".
    Raises SetupError where there is no such version, no registry to get it from, or no Python for it.
    """
    if not re.fullmatch(r"\d+(\.\d+){1,3}", version):
        raise SetupError(f"{version!r} is no OpenCV version: give one such as 4.10 or 4.14.0.94")
    requirement = f"opencv-python-headless=={version}" + ("" if version.count(".") == 3 else ".*")
    # numpy 2 came after 4.9 was built
    old = tuple(int(part) for part in version.split(".")[:2]) < (4, 10)
    return environment("-".join(("opencv", version, *extra)), requirement, *(["numpy<2"] if old else []), *extra)


def environment(name: str, *requirements: str) -> Path:
    """The interpreter of an environment of this name in the cache, made with these requirements where there is none.

    Raises SetupError where it cannot be made.
    """
    name = re.sub(r"[^\w.]+", "-", name)
    folder = cache_folder() / f"{name}-py{sys.version_info.major}.{sys.version_info.minor}"
    python = folder / ("Scripts/python.exe" if os.name == "nt" else "bin/python")
    if not python.exists():
        _make(folder, list(requirements))
    return python


def site_packages(folder: Path, arguments: Sequence[str], *, platform: str, python: str) -> None:
    """Fills a new folder with wheels for another machine, whole or not at all; nothing of them is run.

    arguments: requirements, "-r" and a file of them, "--no-deps". platform: as uv names it ("aarch64-manylinux_2_36").
    python: such as "3.11". Raises SetupError where they cannot be had.
    """
    wanted = ("--python-platform", platform, "--python-version", python, "--only-binary", ":all:")
    with making(folder) as made:
        try:
            _uv(made.parent, "pip", "install", "--target", str(made), *wanted, *arguments)
        except SetupError as error:
            wheels = " and ".join(argument for argument in arguments if not argument.startswith("-"))
            raise SetupError(f"cannot fetch wheels of {wheels} for {platform}: {error}") from None


def unpack_wheel(requirement: str, platform: str, folder: Path) -> None:
    """Unpacks one wheel for any platform, as uv names them ("aarch64-manylinux_2_35"), into a new folder: whole or not.

    Raises SetupError where it cannot be had.
    """
    site_packages(folder, ["--no-deps", requirement], platform=platform, python="3.12")


@contextmanager
def making(folder: Path) -> Iterator[Path]:
    """Gives a path beside a folder and moves what was made there to its place, so that a half-made one is never used.

    Where another process was first, its folder stays and this one is dropped.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=".making-") as temporary:
        made = Path(temporary, "made")
        yield made
        try:
            made.rename(folder)
        except OSError:  # another process was first
            if not folder.is_dir():
                raise


def _make(folder: Path, requirements: list[str]) -> None:
    """Makes the environment."""
    with making(folder) as made:
        try:
            _uv(made.parent, "venv", "--python", sys.executable, "--relocatable", str(made))
            _uv(made.parent, "pip", "install", "--only-binary", ":all:", "--python", str(made), *requirements)
        except SetupError as error:
            raise SetupError(f"cannot make an environment with {' and '.join(requirements)}: {error}") from None


def _uv(folder: Path, *arguments: str) -> None:
    """Runs uv in a folder that is no project, so that the settings of the one here do not count."""
    command = [find_uv_bin(), *arguments, "--quiet"]
    try:
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=TIMEOUT_S, check=False)
    except subprocess.TimeoutExpired:
        raise SetupError(f"uv did not end within {TIMEOUT_S:g} s: is the network slow?") from None
    if done.returncode:
        raise SetupError(" ".join(done.stderr.split())[-400:] or f"uv ended with exit code {done.returncode}")
