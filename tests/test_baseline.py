"""Baselines from folders, archives and servers."""

import functools
import hashlib
import http.server
import io
import tarfile
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from edgekit.baseline import opened
from edgekit.errors import ArtifactError, UsageError


def archive_of(path: Path, names: dict[str, bytes]) -> str:
    """Writes a .tar.gz; → its sha256."""
    with tarfile.open(path, "w:gz") as tar:
        for name, data in names.items():
            entry = tarfile.TarInfo(name)
            entry.size = len(data)
            tar.addfile(entry, io.BytesIO(data))
    return hashlib.sha256(path.read_bytes()).hexdigest()


@pytest.fixture
def archive(tmp_path: Path) -> tuple[Path, str]:
    path = tmp_path / "signs-cpu.tar.gz"
    return path, archive_of(path, {"signs-cpu/manifest.json": b"{}", "signs-cpu/check/00.png": b"png"})


@pytest.fixture
def server(tmp_path: Path) -> Iterator[str]:
    class Quiet(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *_: object) -> None:
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Quiet, directory=tmp_path)) as running:
        thread = threading.Thread(target=running.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{running.server_address[1]}"
        running.shutdown()
        thread.join()


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


WHOLE = {"manifest.json": b"{}", "check/00.png": b"png"}


def test_a_folder_is_taken_as_it_is(tmp_path: Path) -> None:
    with opened(str(tmp_path)) as folder:
        assert folder == tmp_path


def test_an_archive_is_unpacked_and_gone_afterwards(archive: tuple[Path, str]) -> None:
    for sha256 in ("", archive[1], archive[1].upper()):
        with opened(str(archive[0]), sha256) as folder:
            assert (folder.name, contents(folder)) == ("signs-cpu", WHOLE)
        assert not folder.exists()


def test_a_server_s_archive_is_fetched(archive: tuple[Path, str], server: str) -> None:
    with opened(f"{server}/{archive[0].name}", archive[1]) as folder:
        assert contents(folder) == WHOLE
    assert not folder.exists()


def test_what_a_server_sends_needs_a_hash_and_must_have_it(archive: tuple[Path, str], server: str) -> None:
    with pytest.raises(UsageError, match="--base-sha256"), opened(f"{server}/{archive[0].name}"):
        pass
    with (
        pytest.raises(ArtifactError, match="not the baseline you mean"),
        opened(f"{server}/{archive[0].name}", "0" * 64),
    ):
        pass
    with pytest.raises(ArtifactError, match="File not found"), opened(f"{server}/no", "0" * 64):
        pass


def test_a_server_that_is_not_there() -> None:
    with (
        pytest.raises(ArtifactError, match="cannot fetch the baseline"),
        opened("http://127.0.0.1:9/b.tar.gz", "0" * 64),
    ):
        pass


def test_no_archive(tmp_path: Path, archive: tuple[Path, str]) -> None:
    (tmp_path / "text.tar.gz").write_text("no archive")
    cut = tmp_path / "cut.tar.gz"
    cut.write_bytes(archive[0].read_bytes()[:-30])
    for path, says in (("absent", "No such file"), ("text.tar.gz", "neither"), ("cut.tar.gz", "neither")):
        with pytest.raises(ArtifactError, match=says), opened(str(tmp_path / path)):
            pass
    with pytest.raises(UsageError, match="is a folder"), opened(str(tmp_path), "0" * 64):
        pass


@pytest.mark.parametrize(
    ("names", "says"),
    [
        ({"../manifest.json": b"{}"}, "neither"),
        ({"/tmp/x/manifest.json": b"{}"}, "holds 0 bundles|neither"),
        ({"a/run.py": b""}, "holds 0 bundles"),
        ({"a/manifest.json": b"{}", "b/manifest.json": b"{}"}, "holds 2 bundles"),
    ],
)
def test_archives_that_are_no_bundle(tmp_path: Path, names: dict[str, bytes], says: str) -> None:
    archive_of(tmp_path / "x.tar.gz", names)
    with pytest.raises(ArtifactError, match=says), opened(str(tmp_path / "x.tar.gz")):
        pass
    assert [path.name for path in tmp_path.iterdir()] == ["x.tar.gz"]
