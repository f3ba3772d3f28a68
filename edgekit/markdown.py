"""Markdown of any text, as GitHub and GitLab show it (https://github.github.com/gfm/): parts of a summary."""

from __future__ import annotations

import re
from collections.abc import Sequence


def plain(text: str) -> str:
    """Any text as one line that is shown as it is."""
    line = " ".join(text.encode("utf-8", "backslashreplace").decode().split())
    return re.sub(r"([\\`*_\[\]<>|~#])", r"\\\1", line).replace("&", "&amp;")


def table(header: Sequence[str], rows: Sequence[Sequence[str]], left: Sequence[int] = ()) -> str:
    """Cells of any text; the first column and those in `left` are aligned left, the others right. "" without a row."""
    if not rows:
        return ""
    rule = ["---" if index in (0, *left) else "---:" for index in range(len(header))]
    lines = [[plain(cell) for cell in header], rule, *([plain(cell) for cell in row] for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def bullets(title: str, lines: Sequence[str]) -> str:
    """A title and a list of any texts; "" where there are none."""
    return "\n".join([f"**{title}**", "", *(f"- {plain(line)}" for line in lines)]) if lines else ""


def details(title: str, *parts: str) -> str:
    """A block that opens on a click, of parts that are Markdown; "" where all are empty."""
    inside = "\n\n".join(part for part in parts if part)
    return f"<details><summary>{title}</summary>\n\n{inside}\n\n</details>" if inside else ""
