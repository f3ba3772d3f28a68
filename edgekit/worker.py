"""A bundle's own `run.py worker`: a process that times as many iterations as it is asked for, and else waits."""

from __future__ import annotations

import json
import subprocess
import tempfile
import threading
from collections.abc import Sequence
from types import TracebackType
from typing import Any

from edgekit.errors import ArtifactError

PATIENCE_S = 120.0  # for one answer; a process that takes longer hangs


class Worker:
    """A fresh process, ready to answer. Leaving the `with` block ends it."""

    def __init__(self, command: Sequence[str]) -> None:
        """command: that runs `run.py worker ...`, here or through ssh. Waits until the network is loaded.

        Raises ArtifactError with what run.py said where it cannot.
        """
        self._stderr = tempfile.TemporaryFile()  # noqa: SIM115 - closed with the process
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._stderr, text=True, encoding="utf-8"
        )
        try:
            self.ready: dict[str, Any] = self._read()
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> Worker:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()

    def time(self, iterations: int) -> dict[str, Any]:
        """→ {"wall_ns": {stage: [an int an iteration]}, "cpu_ns": the same, "peak_rss_bytes", "environment"}.

        Raises ArtifactError where the process dies or hangs.
        """
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(json.dumps({"iterations": iterations}) + "\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            pass  # what it said last is read next
        return self._read()

    def close(self) -> None:
        """Ends the process."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        try:
            self._process.stdin.close()  # the end of its input is its end
            self._process.wait(timeout=5)
        except (OSError, subprocess.TimeoutExpired):
            self._process.kill()
            self._process.wait()
        self._process.stdout.close()
        self._stderr.close()

    def _read(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        overdue = threading.Timer(PATIENCE_S, self._process.kill)
        overdue.start()
        try:
            answer: dict[str, Any] = json.loads(self._process.stdout.readline())
        except ValueError:
            raise ArtifactError(self._last_words()) from None
        finally:
            overdue.cancel()
        return answer

    def _last_words(self) -> str:
        code = self._process.wait()
        self._stderr.seek(0)
        lines = self._stderr.read().decode("utf-8", "replace").strip().splitlines()
        if any("invalid choice: 'worker'" in line for line in lines):
            return "this bundle was built by an edgekit whose run.py cannot take turns: bundle its run again"
        said = [line.removeprefix("run.py: ") for line in lines if line.startswith("run.py: ")] or lines[-1:]
        return said[-1] if said else f"run.py worker ended with exit code {code}"
