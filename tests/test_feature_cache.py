"""Rows that outlive the process that computed them, and only whole ones."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edgekit.feature_cache import Shelf, make_room, open_shelf

HALF, SINGLE = np.dtype(np.float16), np.dtype(np.float32)
SHAPES = ((2, 3), (4,))
ROW_BYTES = 10 * 4


def sha(number: int) -> str:
    return f"{number:064x}"


def row(number: int) -> tuple[np.ndarray, np.ndarray]:
    return np.full((2, 3), number, np.float32), np.arange(number, number + 4, dtype=np.float32)


def shelf(folder: Path, key: str = "a") -> Shelf:
    return open_shelf(key, SHAPES, SINGLE, folder)


def assert_row(found: tuple[np.ndarray, ...] | None, number: int) -> None:
    assert found is not None
    for one, other in zip(found, row(number), strict=True):
        np.testing.assert_array_equal(one, other)


def test_what_was_put_is_there_now_and_later(tmp_path: Path) -> None:
    first = shelf(tmp_path)
    assert first.get(sha(1), 0) is None and not first.has(sha(1), 0)
    for number in range(5):
        first.put(sha(number), number % 2, row(number))
    assert_row(first.get(sha(3), 1), 3)
    first.put(sha(9), -1, row(9))  # after a row was read, so the file was mapped
    assert_row(first.get(sha(9), -1), 9)
    first.flush()
    later = shelf(tmp_path)
    for number in range(5):
        assert later.has(sha(number), number % 2) and not later.has(sha(number), 7)
        assert_row(later.get(sha(number), number % 2), number)
    assert later.get(sha(0), 1) is None
    assert first.row_bytes == ROW_BYTES and later.size_bytes == 6 * (ROW_BYTES + 40)
    assert shelf(tmp_path, "b").get(sha(0), 0) is None


def test_float16_is_kept_as_float16(tmp_path: Path) -> None:
    kept = open_shelf("h", [(3,)], HALF, tmp_path)
    kept.put(sha(1), 0, [np.array([0.1, 1e-3, 60000.0], np.float32)])
    found = kept.get(sha(1), 0)
    assert found is not None and found[0].dtype == np.float16
    np.testing.assert_allclose(found[0].astype(np.float32), [0.1, 1e-3, 60000.0], rtol=5e-4)


def test_several_writers_do_not_meet(tmp_path: Path) -> None:
    one, other = shelf(tmp_path), shelf(tmp_path)
    one.put(sha(1), 0, row(1))
    other.put(sha(2), 0, row(2))
    one.flush()
    other.flush()
    assert one.get(sha(2), 0) is None
    one.refresh()
    assert_row(one.get(sha(2), 0), 2)
    assert_row(one.get(sha(1), 0), 1)


@pytest.mark.parametrize("damage", ["cut the rows", "change a byte", "cut the index", "empty rows"])
def test_a_damaged_row_is_not_there(tmp_path: Path, damage: str) -> None:
    first = shelf(tmp_path)
    for number in range(3):
        first.put(sha(number), 0, row(number))
    first.flush()
    (rows,) = tmp_path.glob("a/*.rows")
    (index,) = tmp_path.glob("a/*.index")
    data = bytearray(rows.read_bytes())
    if damage == "cut the rows":
        rows.write_bytes(data[:-1])
    elif damage == "change a byte":
        data[2 * ROW_BYTES + 5] ^= 1
        rows.write_bytes(data)
    elif damage == "cut the index":
        index.write_bytes(index.read_bytes()[:-1])
    else:
        rows.write_bytes(b"")
    later = shelf(tmp_path)
    assert later.get(sha(2), 0) is None
    if damage != "empty rows":
        assert_row(later.get(sha(1), 0), 1)
    later.put(sha(2), 0, row(2))
    assert_row(later.get(sha(2), 0), 2)


def test_a_killed_writer_leaves_whole_rows_only(tmp_path: Path) -> None:
    script = (
        "import os, signal, sys\nfrom pathlib import Path\n"
        "from test_feature_cache import row, sha, shelf\n"
        "kept = shelf(Path(sys.argv[1]))\n"
        "for number in range(1000):\n"
        "    kept.put(sha(number), 0, row(number))\n"
        "    if number == 700:\n"
        "        kept.flush()\n"
        "os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(Path(__file__).parent), *sys.path])}
    assert subprocess.run([sys.executable, "-c", script, str(tmp_path)], env=environment, check=False).returncode == -9
    later = shelf(tmp_path)
    found = [number for number in range(1000) if later.get(sha(number), 0) is not None]
    assert found == list(range(701))
    for number in found:
        assert_row(later.get(sha(number), 0), number)


@given(
    puts=st.lists(st.tuples(st.integers(0, 5), st.integers(-1, 3), st.integers(0, 99)), max_size=20),
    reopen=st.lists(st.booleans(), min_size=20, max_size=20),
)
@settings(deadline=None, max_examples=30)
def test_the_last_one_put_is_the_one_that_is_there(
    tmp_path_factory: pytest.TempPathFactory, puts: list[tuple[int, int, int]], reopen: list[bool]
) -> None:
    """Whatever is put under one key is the same in edgekit; here it is not, to see which one is read."""
    folder = tmp_path_factory.mktemp("shelf")
    kept, expected = shelf(folder), {}
    for (number, view, value), again in zip(puts, reopen, strict=False):
        kept.put(sha(number), view, row(value))
        expected[number, view] = value
        assert_row(kept.get(sha(number), view), value)
        if again:
            kept.flush()
    for (number, view), value in expected.items():
        assert_row(kept.get(sha(number), view), value)


def test_room_is_made_by_what_was_not_used_for_longest(tmp_path: Path) -> None:
    for age, key in enumerate(("new", "middle", "old")):
        kept = shelf(tmp_path, key)
        for number in range(10):
            kept.put(sha(number), 0, row(number))
        kept.flush()
        os.utime(tmp_path / key, (1e9 - age, 1e9 - age))
    each = 10 * (ROW_BYTES + 40)
    assert make_room(0, 3 * each, (), tmp_path) == 0
    assert {path.name for path in tmp_path.iterdir()} == {"new", "middle", "old"}
    assert make_room(each, 3 * each, ("old",), tmp_path) == each
    assert {path.name for path in tmp_path.iterdir()} == {"new", "middle", "old"}
    assert make_room(2 * each, 3 * each, ("old",), tmp_path) == 2 * each
    assert {path.name for path in tmp_path.iterdir()} == {"new", "old"}
    assert make_room(10 * each, 3 * each, ("old",), tmp_path) == 3 * each
    assert {path.name for path in tmp_path.iterdir()} == {"old"}


def test_opening_a_shelf_makes_it_the_newest(tmp_path: Path) -> None:
    shelf(tmp_path)
    os.utime(tmp_path / "a", (1e9, 1e9))
    shelf(tmp_path)
    assert (tmp_path / "a").stat().st_mtime > 1e9 + 1
