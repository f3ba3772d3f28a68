"""The suite of test_latency.py: which bundles it measures, and each one opened by its own run.py."""

from __future__ import annotations

import importlib.util
import itertools
import json
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import cv2
import pytest

from edgekit import runner
from edgekit.latency_files import SCHEMA


@dataclass(frozen=True)
class Opened:
    """A bundle that runs here."""

    run: ModuleType  # its own run.py
    model: Any  # run.Model
    data: tuple[bytes, ...]  # its check images, as files


Measure = Callable[[str, Callable[[Any], Any], Sequence[Any]], None]


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--bundle", action="append", default=[], metavar="DIR", help="measure this bundle; may be repeated"
    )


BUNDLES = pytest.StashKey[list[tuple[Path, dict[str, Any]]]]()


def pytest_sessionstart(session: pytest.Session) -> None:
    """Reads the bundles' manifests. Raises UsageError where there is none, or one that is no bundle."""
    folders = [Path(name) for name in session.config.getoption("--bundle")]
    if not folders:
        raise pytest.UsageError(
            "the benchmarks measure bundles: give at least one, --bundle dist/NAME-TARGET (`edgekit bundle` makes them)"
        )
    try:
        session.config.stash[BUNDLES] = [(folder, runner.read_manifest(folder)) for folder in folders]
    except runner.RunnerError as error:
        raise pytest.UsageError(f"--bundle: {error}") from None


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "opened" in metafunc.fixturenames:
        bundles = metafunc.config.stash[BUNDLES]
        ids = [f"{manifest['name']}-{manifest['target']}-{manifest['precision']}" for _, manifest in bundles]
        # For the session: all of one bundle's stages, then the next bundle's. So one network is in memory at a time.
        metafunc.parametrize("opened", [folder for folder, _ in bundles], ids=ids, indirect=True, scope="session")


@pytest.fixture(scope="session")
def opened(request: pytest.FixtureRequest) -> Iterator[Opened]:
    """Skips where the bundle is not at home on this machine, and says why."""
    folder: Path = request.param
    run = _run_py(folder)
    cv2.setNumThreads(-1)  # a bundle that leaves the number to OpenCV must not get the one before's
    try:
        model = run.Model(folder)
    except run.RunnerError as error:
        pytest.skip(str(error))
    rows = json.loads((folder / "check" / "expected.json").read_text("utf-8"))["images"]
    yield Opened(run, model, tuple((folder / "check" / row["file"]).read_bytes() for row in rows))
    del sys.modules[run.__name__]


def _run_py(folder: Path) -> ModuleType:
    """The bundle's own run.py as a module of its own: the one of another bundle may be older."""
    name = f"run_of_{runner.file_sha256(folder / 'manifest.json')[:12]}"
    spec = importlib.util.spec_from_file_location(name, folder / "run.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def measure(benchmark: Any, opened: Opened) -> Measure:
    """measure(stage, function, items): times function(item), one item after the other, again and again.

    Beside the samples, the file (--benchmark-json) has in extra_info.edgekit what they were taken under.
    """

    def run(stage: str, function: Callable[[Any], Any], items: Sequence[Any]) -> None:
        manifest, turns = opened.model.manifest, itertools.cycle(items)
        benchmark.group = f"{manifest['name']}-{manifest['target']}"
        for item in items:
            function(item)  # the first answer prepares the network
        before = runner.environment()
        benchmark(lambda: function(next(turns)))
        benchmark.extra_info["edgekit"] = {
            "schema": SCHEMA,
            "kind": "benchmark",
            "stage": stage,
            "clock": "wall",
            "bundle_sha256": manifest["sha256"],
            "bundle_precision": manifest["precision"],
            "git_revision": manifest["provenance"].get("git_revision"),
            "conditions": opened.model.conditions(),
            "environment": [before, runner.environment()],
        }

    return run
