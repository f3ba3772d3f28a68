"""Environments with one OpenCV: they hold it and numpy, are made once, and a failure leaves nothing behind."""

import subprocess
from pathlib import Path

import pytest

from edgekit import environments
from edgekit.environments import cache_folder, opencv_python
from edgekit.errors import SetupError


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv(environments.CACHE_VARIABLE, str(tmp_path / "cache"))
    return tmp_path / "cache"


def test_the_cache_is_where_the_user_says_or_where_the_system_keeps_such_things(
    cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert cache_folder() == cache
    monkeypatch.setenv(environments.CACHE_VARIABLE, "")
    assert cache_folder().name == "edgekit" and cache_folder().is_absolute()


@pytest.mark.parametrize("version", ["", "4", "latest", "4.10; rm", "4.10.*", "../4.10", "1.2.3.4.5"])
def test_what_is_no_version_is_refused(cache: Path, version: str) -> None:
    with pytest.raises(SetupError, match=r"is no OpenCV version: give one such as 4\.10"):
        opencv_python(version)
    assert not cache.exists()


@pytest.mark.slow
@pytest.mark.parametrize(("version", "numpy"), [("4.6", "1"), ("4.10.0.84", "2")])
def test_an_environment_holds_that_opencv_and_numpy_only(cache: Path, version: str, numpy: str) -> None:
    try:
        python = opencv_python(version)
    except SetupError as error:
        pytest.skip(str(error))
    code = "import cv2, numpy, importlib.util as u; print(cv2.__version__, numpy.__version__, u.find_spec('torch'))"
    said = subprocess.run([str(python), "-I", "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert said[0].startswith(version.removesuffix(".84")) and said[1].startswith(f"{numpy}.") and said[2] == "None"
    made = python.stat().st_ctime_ns
    assert opencv_python(version) == python and python.stat().st_ctime_ns == made
    assert [path.name[:6] for path in cache.iterdir()] == ["opencv"]


@pytest.mark.slow
def test_a_version_that_does_not_exist_leaves_nothing(cache: Path) -> None:
    with pytest.raises(SetupError, match=r"cannot make an environment with opencv-python-headless==4\.99\.\*: "):
        opencv_python("4.99")
    assert list(cache.iterdir()) == []
