"""Shared by the tests: one real run, small but whole, made once a session."""

import os
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import sshd as servers

if TYPE_CHECKING:
    from edgekit.recipe import Task

CPU = Path("/proc/cpuinfo")
if CPU.is_file() and "avx_vnni" in CPU.read_text(encoding="utf-8").split():
    # OpenCV 5.0 computes int8 wrongly there: one test is about that, the others about int8. cv2 reads it at its start.
    os.environ["OPENCV_CPU_DISABLE"] = "AVX_VNNI"

ROOT = Path(__file__).parents[1]
DATA = ROOT.parent / "shared" / "data"


@pytest.fixture(scope="session")
def signs() -> Path:
    """2,062 photos of hand signs in 10 classes; skips where they are absent."""
    folder = DATA / "signs" / "Dataset"
    if not folder.is_dir():
        pytest.skip("the hand-sign photos (../shared/data/signs) are not on this machine")
    return folder


@pytest.fixture(scope="session")
def digits(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An image folder of 300 real handwritten digits in 10 classes (scikit-learn's, 8×8 PNG)."""
    from edgekit.demo import write_digits

    folder = tmp_path_factory.mktemp("data") / "digits"
    write_digits(folder)
    for label in folder.iterdir():
        for extra in sorted(label.iterdir())[30:]:
            extra.unlink()
    return folder


@pytest.fixture(scope="session")
def finished_run(digits: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run folder trained for two epochs on the digits, exported (so proved)."""
    from edgekit.datasets import read_dataset
    from edgekit.demo import digits_recipe
    from edgekit.export import export
    from edgekit.finetune import finetune

    recipe = digits_recipe(digits, "digits")
    recipe = recipe.model_copy(update={"train": recipe.train.model_copy(update={"epochs": 1})})
    run = finetune(recipe, read_dataset(digits), tmp_path_factory.mktemp("runs")).run
    export(run)
    return run


@pytest.fixture(scope="session")
def canvases_run(tmp_path_factory: pytest.TempPathFactory) -> "Callable[[Task], Path]":
    """Of detect or segment: a run folder trained for a few epochs on 48 canvases of digits, exported (so proved)."""
    from edgekit import demo
    from edgekit.datasets import read_dataset
    from edgekit.export import export
    from edgekit.finetune import finetune

    @cache
    def make(task: "Task") -> Path:
        data = tmp_path_factory.mktemp("canvases") / task
        (demo.write_boxes if task == "detect" else demo.write_masks)(data, {"train": 48, "val": 16})
        recipe = demo.canvases_recipe(data, task)
        recipe = recipe.model_copy(update={"train": recipe.train.model_copy(update={"head_epochs": 1, "epochs": 6})})
        run = finetune(recipe, read_dataset(data, task), tmp_path_factory.mktemp("runs")).run
        export(run)
        return run

    return make


@pytest.fixture(scope="session")
def sshd(tmp_path_factory: pytest.TempPathFactory) -> Iterator[servers.Sshd]:
    """A device over ssh: this machine's loopback. Skips where there is no OpenSSH server."""
    with servers.serving(tmp_path_factory.mktemp("sshd")) as served:
        yield served
