"""What commands print on stdout: a table, or one JSON object."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Annotated

import typer

AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON object instead of text.")]


def is_first_process() -> bool:
    """Whether this one of the processes that torchrun started is to speak; a process alone is."""
    return os.environ.get("RANK", "0") == "0"


def print_table(table: object) -> None:
    """A rich table, as wide as the terminal."""
    from rich.console import Console

    Console().print(table)


def print_json(value: object) -> None:
    """A value of records, paths and plain values, on one line."""
    typer.echo(json.dumps(value, default=_plain, ensure_ascii=False))


def _plain(value: object) -> object:
    return str(value) if isinstance(value, Path) else vars(value)
