"""A number as people read it."""

from __future__ import annotations

from edgekit.latency import ms_text

NOTHING = "-"  # where there is no value
Row = list[str]  # of a table: a text a cell


def percent(share: float | None) -> str:
    """0..1 → "97.82 %"; None → "-". Only 1 itself reads 100.00 %, and only 0 reads 0.00 %."""
    if share is None:
        return NOTHING
    if 0 < share < 1:
        return f"{min(max(100 * share, 0.01), 99.99):.2f} %"
    return f"{100 * share:.2f} %"


def megabytes(size_bytes: int) -> str:
    """Bytes → "13.6 MB" (millions of bytes)."""
    return f"{size_bytes / 1e6:.1f} MB"


def points(drop: float) -> str:
    """Points of a metric lost → "0.24"; gained → "-0.12"; never "-0.00"."""
    return f"{round(drop, 2) + 0.0:.2f}"


def milliseconds(ms: float | None) -> str:
    """Three digits: 0.912, 9.99, 105; None → "-"."""
    return NOTHING if ms is None else ms_text(ms)


def ratio(share: float | None) -> str:
    """0.4251 → "0.43"; None → "-"."""
    return NOTHING if share is None else f"{share:.2f}"


def rate(per_second: float) -> str:
    """118.3 → "118"; 64.25 → "64.2"."""
    return f"{per_second:.0f}" if per_second >= 99.5 else f"{per_second:.1f}"


def difference(relative: float | None) -> str:
    """A share of the largest output → "3.1e-07"; None → "-"."""
    return NOTHING if relative is None else f"{relative:.1e}"


def duration(seconds: float) -> str:
    """202 → "3 min 22 s"."""
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest} s" if minutes else f"{rest} s"


def millions(count: int) -> str:
    """11_689_512 → "11.7 M"; from 100 millions on without a decimal, from 1000 on in thousands of them: "1.8 G"."""
    if count >= 999.5e6:
        return f"{count / 1e9:.1f} G"
    return f"{count / 1e6:.0f} M" if count >= 99.95e6 else f"{count / 1e6:.1f} M"
