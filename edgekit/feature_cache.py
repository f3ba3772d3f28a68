"""Rows of numbers kept in the user's cache folder, memory-mapped: what frozen layers gave for an image.

A shelf holds rows of one kind, and its name is the SHA-256 of everything that the numbers depend on but the image: the
weights, the preprocessing, the augmentation. A row's own key is the SHA-256 of the image file and which view of it was
drawn. So nothing in the cache can be stale; what is no longer asked for is dropped when room is needed.

A shelf's folder has segments: NAME.rows, the rows one after the other, and NAME.index, of each row its key and its
CRC-32. Who writes makes a segment of its own, so that several processes may write at once, and appends the row first
and its key after it. A row that was cut off or damaged does not match its CRC and is computed again.
"""

from __future__ import annotations

import math
import mmap
import os
import shutil
import struct
import tempfile
import threading
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from edgekit.environments import cache_folder

WRITE_BYTES = 1 << 22  # of rows that are written at once
FREE_SHARE = 0.5  # of the disk's free room that the cache may take
_ENTRY = struct.Struct("<32siI")  # the image's SHA-256, the view, the row's CRC-32


def features_folder() -> Path:
    """Where the shelves are."""
    return cache_folder() / "features"


@dataclass(frozen=True)
class _Place:
    segment: Path
    row: int  # from 0
    crc: int


@dataclass
class Shelf:
    """Rows of one kind: a tuple of arrays each, of these shapes and this dtype. `open_shelf` makes one."""

    folder: Path
    shapes: tuple[tuple[int, ...], ...]
    dtype: np.dtype[np.floating[Any]]
    _places: dict[tuple[bytes, int], _Place] = field(default_factory=dict)
    _maps: dict[Path, mmap.mmap | bytes] = field(default_factory=dict)
    _writer: _Writer | None = None
    _lock: threading.Lock = field(default_factory=threading.Lock)

    @property
    def row_bytes(self) -> int:
        """Bytes of a row."""
        return row_bytes(self.shapes, self.dtype)

    @property
    def size_bytes(self) -> int:
        """Bytes of all its rows on disk."""
        return _size(self.folder)

    @property
    def count(self) -> int:
        """How many rows it has."""
        return len(self._places)

    def has(self, sha256: str, view: int) -> bool:
        """Whether the row was written; only `get` tells whether it is whole."""
        return (bytes.fromhex(sha256), view) in self._places

    def get(self, sha256: str, view: int) -> tuple[np.ndarray, ...] | None:
        """A row's arrays, or None where it is not there or damaged. Several threads may ask."""
        place = self._places.get((bytes.fromhex(sha256), view))
        if place is None:
            return None
        try:
            data = self._read(place)
        except OSError:  # another process made room, or what was not written yet finds none
            return None
        if len(data) != self.row_bytes or zlib.crc32(data) != place.crc:
            return None
        arrays, start = [], 0
        for shape in self.shapes:
            count = math.prod(shape)
            arrays.append(np.frombuffer(data, self.dtype, count, start).reshape(shape))
            start += count * self.dtype.itemsize
        return tuple(arrays)

    def put(self, sha256: str, view: int, arrays: Sequence[np.ndarray]) -> None:
        """Appends a row. Several threads may write. Raises OSError where the disk is full or cannot be written."""
        data = b"".join(np.ascontiguousarray(array, self.dtype).tobytes() for array in arrays)
        assert len(data) == self.row_bytes
        key, crc = bytes.fromhex(sha256), zlib.crc32(data)
        with self._lock:
            if self._writer is None:
                self._writer = _Writer.create(self.folder)
            row = self._writer.append(data, _ENTRY.pack(key, view, crc))
            self._places[key, view] = _Place(self._writer.path, row, crc)

    def clear(self) -> None:
        """Drops all rows. Raises OSError."""
        for file in self.folder.iterdir():
            file.unlink(missing_ok=True)
        self._places.clear()
        self._maps.clear()

    def flush(self) -> None:
        """Gives all that was written to the system, so that other processes find it. Raises OSError."""
        with self._lock:
            if self._writer is not None:
                self._writer.flush()

    def refresh(self) -> None:
        """Looks what is there, also what other processes have written since. Raises OSError."""
        for index in sorted(self.folder.glob("*.index"), key=_used):  # the newest last: it mends what was damaged
            entries = index.read_bytes()
            whole = len(entries) // _ENTRY.size * _ENTRY.size
            for row, (sha256, view, crc) in enumerate(_ENTRY.iter_unpack(entries[:whole])):
                self._places[sha256, view] = _Place(index.with_suffix(".rows"), row, crc)

    def _read(self, place: _Place) -> bytes:
        start = place.row * self.row_bytes
        with self._lock:
            mapped = self._maps.get(place.segment)
            if mapped is None or len(mapped) < start + self.row_bytes:
                if self._writer is not None and self._writer.path == place.segment:
                    self._writer.flush()
                mapped = self._maps[place.segment] = _map(place.segment)
        return mapped[start : start + self.row_bytes]


def row_bytes(shapes: Sequence[Sequence[int]], dtype: np.dtype[np.floating[Any]]) -> int:
    """Bytes of a row of arrays of these shapes."""
    return sum(math.prod(shape) for shape in shapes) * dtype.itemsize


def open_shelf(
    key: str, shapes: Sequence[Sequence[int]], dtype: np.dtype[np.floating[Any]], folder: Path | None = None
) -> Shelf:
    """The shelf of this key (hex), with what others left there. folder: of all shelves; None: `features_folder`.

    Raises OSError where the folder cannot be made.
    """
    path = (folder or features_folder()) / key
    path.mkdir(parents=True, exist_ok=True)
    os.utime(path)  # so that `make_room` knows what was used last
    shelf = Shelf(path, tuple(tuple(shape) for shape in shapes), dtype)
    shelf.refresh()
    return shelf


@dataclass
class _Writer:
    """Gathers rows and writes many at once; no file stays open."""

    path: Path
    count: int = 0  # of rows, those that are not written yet too
    rows: list[bytes] = field(default_factory=list)
    entries: list[bytes] = field(default_factory=list)

    @classmethod
    def create(cls, folder: Path) -> _Writer:
        handle, name = tempfile.mkstemp(dir=folder, suffix=".rows")
        os.close(handle)
        return cls(Path(name))

    def append(self, data: bytes, entry: bytes) -> int:
        self.rows.append(data)
        self.entries.append(entry)
        self.count += 1
        if len(self.rows) * len(data) >= WRITE_BYTES:
            self.flush()
        return self.count - 1

    def flush(self) -> None:
        rows, self.rows = self.rows, []
        entries, self.entries = self.entries, []
        for path, parts in ((self.path, rows), (self.path.with_suffix(".index"), entries)):
            with path.open("ab") as file:
                file.write(b"".join(parts))


def _map(path: Path) -> mmap.mmap | bytes:
    with path.open("rb") as file:
        if not os.fstat(file.fileno()).st_size:  # cut off before its first row; an empty file cannot be mapped
            return b""
        return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)


# ---------------------------------------------------------------------------------------------------------------
# Room


def make_room(wanted_bytes: int, limit_bytes: int, keep: Sequence[str] = (), folder: Path | None = None) -> int:
    """Removes the shelves that were not used for longest until those to keep may have `wanted_bytes` in all.

    limit_bytes: of all shelves together; of the disk's free room at most FREE_SHARE is used. keep: the keys of shelves
    that stay in any case. → the bytes that these may have, with what they have already, so that it is the same before
    and after they were filled. Raises OSError where the folder cannot be made.
    """
    root = folder or features_folder()
    root.mkdir(parents=True, exist_ok=True)
    paths = [path for path in sorted(root.iterdir(), key=_used) if path.is_dir()]
    own = sum(_size(path) for path in paths if path.name in keep)
    others = {path: _size(path) for path in paths if path.name not in keep}
    for path in others:
        if _room(root, own, others, limit_bytes) >= wanted_bytes:
            break
        shutil.rmtree(path, ignore_errors=True)  # where another process reads it and the system forbids it, it stays
        others[path] = _size(path) if path.exists() else 0
    return _room(root, own, others, limit_bytes)


def _room(root: Path, own_bytes: int, others: Mapping[Path, int], limit_bytes: int) -> int:
    free = int(FREE_SHARE * (shutil.disk_usage(root).free + own_bytes))
    return max(0, min(limit_bytes - sum(others.values()), free))


def _used(path: Path) -> float:
    return path.stat().st_mtime


def _size(path: Path) -> int:
    return sum(file.stat().st_size for file in path.iterdir())
