"""The device's end of copying a bundle there: sent as text to the device's own Python (edgekit/device.py).

Standard library only, and nothing newer than Python 3.6, so that an old one can still say that it is too old.
"""

import contextlib
import io
import json
import os
import shutil
import sys
import tarfile
import tempfile
import time
from pathlib import Path

KEPT_DAYS = 30  # a bundle that no command asked for since then makes room for others


def main(arguments: list) -> None:  # type: ignore[type-arg] # list[str] would be evaluated, by Python 3.9 and later only
    """NAME: where the bundle is, or would be, as {"folder": path, "there": bool}. NAME SIZE: takes it first, as a tar.

    The tar is standard input, SIZE bytes. What cannot be done ends with exit code 1 and the reason on stderr.
    """
    if sys.version_info < (3, 8):
        sys.exit("its Python is {}.{}, and run.py needs 3.8 or newer".format(*sys.version_info))
    folder = Path.home() / ".cache" / "edgekit" / "bundles" / arguments[0]
    try:
        if len(arguments) > 1:
            data = sys.stdin.buffer.read()
            if len(data) != int(arguments[1]):
                sys.exit(f"only {len(data)} of {arguments[1]} bytes came through")
            folder.parent.mkdir(parents=True, exist_ok=True)
            _drop_old(folder.parent)
            _unpack(data, folder)
        elif folder.is_dir():
            os.utime(folder)
    except OSError as error:
        sys.exit(f"{error.strerror}: {error.filename or folder}")
    print(json.dumps({"folder": str(folder), "there": folder.is_dir()}))


def _drop_old(cache: Path) -> None:
    for folder in cache.iterdir():
        with contextlib.suppress(FileNotFoundError):  # another process drops it too
            if time.time() - folder.stat().st_mtime > KEPT_DAYS * 86400:
                shutil.rmtree(str(folder), ignore_errors=True)


def _unpack(data: bytes, folder: Path) -> None:
    """The folder appears whole or not at all: it is filled beside its place and renamed."""
    with tempfile.TemporaryDirectory(dir=str(folder.parent), prefix=".making-") as temporary:
        made = Path(temporary, "made")
        with tarfile.open(fileobj=io.BytesIO(data)) as tar:
            # Newer Pythons want a filter, older ones have none.
            tar.extraction_filter = getattr(tarfile, "data_filter", lambda member, _: member)
            tar.extractall(str(made))
        if hasattr(os, "sync"):  # else a power cut might leave the name with empty files
            os.sync()
        try:
            made.rename(folder)
        except OSError:  # another process was first
            if not folder.is_dir():
                raise


if __name__ == "__main__":
    main(sys.argv[1:])
