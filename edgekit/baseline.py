"""A baseline bundle, wherever it is kept: a folder, the archive that `edgekit bundle` made, or the URL of one."""

from __future__ import annotations

import tarfile
import tempfile
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from edgekit import runner
from edgekit.errors import ArtifactError, UsageError

MAX_BYTES = 4 << 30  # of an archive and of what is in it; more is no bundle
PATIENCE_S = 60.0  # for the server to send something


@contextmanager
def opened(place: str, sha256: str = "") -> Iterator[Path]:
    """Gives the bundle's folder; what was unpacked or fetched is gone afterwards.

    place: a folder, a .tar.gz, or an http(s) URL of one. sha256: of the archive, hex; a URL needs it, as what a server
    sends is run. Raises UsageError or ArtifactError.
    """
    is_url = place.startswith(("http://", "https://"))
    if is_url and not sha256:
        raise UsageError(f"what a server sends is run here, so say what it must be: --base-sha256 (of {place})")
    if Path(place).is_dir():
        if sha256:
            raise UsageError(f"--base-sha256 is of an archive, and {place} is a folder")
        yield Path(place)
        return
    with tempfile.TemporaryDirectory(prefix="edgekit-baseline-") as name:
        archive = Path(name, "bundle.tar.gz") if is_url else Path(place)
        if is_url:
            _fetch(place, archive)
        yield _unpack(archive, Path(name, "unpacked"), place, sha256)


def _fetch(url: str, path: Path) -> None:
    try:
        with urllib.request.urlopen(url, timeout=PATIENCE_S) as answer, path.open("wb") as stream:
            while block := answer.read(1 << 20):
                stream.write(block)
                if stream.tell() > MAX_BYTES:
                    raise ArtifactError(f"{url} is larger than {MAX_BYTES >> 30} GB: it is no bundle")
    except OSError as error:  # URLError is one
        if isinstance(error, urllib.error.HTTPError):
            error.close()  # it is the server's answer too
        raise ArtifactError(f"cannot fetch the baseline {url}: {getattr(error, 'reason', error)}") from None


def _unpack(archive: Path, folder: Path, place: str, sha256: str) -> Path:
    """→ the one folder in the archive."""
    try:
        found = runner.file_sha256(archive)
    except OSError as error:
        raise ArtifactError(f"no baseline at {place}: {error.strerror}") from None
    if sha256 and found != sha256.lower():
        raise ArtifactError(f"{place} has sha256 {found}, and {sha256} was expected: it is not the baseline you mean")
    try:
        with tarfile.open(archive, "r:gz") as tar:
            members = tar.getmembers()
            if sum(member.size for member in members) > MAX_BYTES:
                raise ArtifactError(f"{place} unpacks to more than {MAX_BYTES >> 30} GB: it is no bundle")
            tar.extractall(folder, members, filter="data")  # nothing outside the folder, no links out, no devices
    except (tarfile.TarError, OSError, EOFError) as error:
        raise ArtifactError(f"{place} is neither a bundle's folder nor its .tar.gz ({error})") from None
    manifests = sorted(folder.glob("*/manifest.json"))
    if len(manifests) != 1:
        raise ArtifactError(f"{place} holds {len(manifests)} bundles, and one was expected")
    return manifests[0].parent
