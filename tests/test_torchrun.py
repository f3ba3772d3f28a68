"""Several processes that torchrun starts share a training; on the loopback alone."""

import csv
import json
import os
import re
import shutil
import socket
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from test_finetune import EVERYTHING, small

from edgekit import runner, tasks
from edgekit.artifacts import RunFolder, write_text
from edgekit.batches import batches
from edgekit.datasets import read_split
from edgekit.evaluate import evaluate
from edgekit.recipe import to_toml
from edgekit.tasks import classify
from edgekit.training import class_weights

pytestmark = pytest.mark.slow

SETTINGS = {**EVERYTHING, "head_epochs": 1, "epochs": 2, "mixup": 0.0, "precision": "float32"}


@dataclass(frozen=True)
class Place:
    """A folder with a recipe; its runs and their cache of features go there."""

    folder: Path
    digits: Path

    def recipe(self, name: str, **train: object) -> Path:
        path = self.folder / f"{name}.toml"
        write_text(path, to_toml(small(self.digits, name, **{**SETTINGS, **train})))
        return path

    def edgekit(self, processes: int, *words: object) -> subprocess.CompletedProcess[str]:
        return self.python(processes, "-m", "edgekit", *words)

    def python(self, processes: int, *words: object) -> subprocess.CompletedProcess[str]:
        """`python` with these words, in so many processes."""
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        torchrun = ["torch.distributed.run", f"--nproc-per-node={processes}", "--master-addr=127.0.0.1"]
        start = ["-m", *torchrun, f"--master-port={port}"] if processes > 1 else []
        environment = {
            **os.environ,
            "OMP_NUM_THREADS": "1",
            "GLOO_SOCKET_IFNAME": "lo",
            "EDGEKIT_CACHE": str(self.folder / "cache"),
        }
        command = [sys.executable, *start, *map(str, words)]
        return subprocess.run(
            command, capture_output=True, text=True, check=False, env=environment, cwd=self.folder, timeout=600
        )

    def trained(self, processes: int, *words: object) -> tuple[Path, subprocess.CompletedProcess[str]]:
        answer = self.edgekit(processes, "finetune", *words, "--json")
        assert answer.returncode == 0, answer.stdout + answer.stderr
        (line,) = answer.stdout.splitlines()  # one process alone prints its result
        return Path(json.loads(line)["run"]), answer


@pytest.fixture(scope="module")
def place(digits: Path, tmp_path_factory: pytest.TempPathFactory) -> Place:
    return Place(tmp_path_factory.mktemp("torchrun"), digits)


def history(run: Path) -> list[dict[str, Any]]:
    with (run / "history.csv").open(encoding="utf-8") as stream:
        return [{key: _number(value) for key, value in row.items()} for row in csv.DictReader(stream)]


def _number(text: str) -> float | str:
    return float(text) if re.fullmatch(r"[\d.e-]+", text) else text


@pytest.fixture(scope="module")
def alone(place: Place) -> Path:
    return place.trained(1, "--recipe", place.recipe("alone"), "--runs", place.folder / "one")[0]


@pytest.fixture(scope="module")
def both(place: Place) -> tuple[Path, subprocess.CompletedProcess[str]]:
    return place.trained(2, "--recipe", place.recipe("both"), "--runs", place.folder / "two")


def test_two_processes_make_one_run_and_speak_once(
    place: Place, both: tuple[Path, subprocess.CompletedProcess[str]]
) -> None:
    run, answer = both
    assert [path.name for path in (place.folder / "two").iterdir()] == ["both"]
    names = {path.name for path in (place.folder / run).rglob("*") if path.is_file()}
    assert {"recipe.toml", "spec.json", "history.csv", "model.safetensors", "last.safetensors"} <= names
    assert not [name for name in names if name.startswith(".") or ".part" in name]
    said = answer.stderr.splitlines()
    assert len([line for line in said if "300 images" in line or "240" in line]) <= 1
    assert [len([line for line in said if f"epoch  {number} " in line]) for number in (1, 2, 3)] == [1, 1, 1]


def test_two_processes_learn_what_one_learns(
    place: Place, alone: Path, both: tuple[Path, subprocess.CompletedProcess[str]]
) -> None:
    """Not the same: each process's BatchNorm sees its half of a batch, and keeps the first one's statistics."""
    one, two = history(place.folder / alone), history(place.folder / both[0])
    assert [row["epoch"] for row in one] == [row["epoch"] for row in two]
    assert one[0]["train_loss"] == pytest.approx(two[0]["train_loss"], rel=0.01), "the head has no BatchNorm"
    for left, right in zip(one, two, strict=True):
        assert left["learning_rate"] == pytest.approx(right["learning_rate"])
        assert left["train_loss"] == pytest.approx(right["train_loss"], rel=0.05)
        assert left["val_metric"] == pytest.approx(right["val_metric"], abs=0.15)


def test_each_validation_image_is_counted_once(
    place: Place, both: tuple[Path, subprocess.CompletedProcess[str]]
) -> None:
    """In all processes by the weights that are kept, which are the first one's: BatchNorm counts in each its own."""
    run = RunFolder(place.folder / both[0])
    best = max(history(run.path), key=lambda row: (row["val_metric"], -row["val_loss"]))
    figures = evaluate(run.path).metrics
    assert figures["columns"]["torch"]["top1"] == best["val_metric"]
    split, spec, recipe = read_split(run.split), run.read_spec(), run.read_recipe()
    assert figures["images"] == len(split.val)
    saved, model = load_file(run.state), tasks.load(run)
    last = {k.removeprefix("model."): v for k, v in saved.items() if k.startswith("model.")}
    last |= {k.removeprefix("average."): v for k, v in saved.items() if k.startswith("average.")}
    model.load_state_dict(last)
    (batch,) = batches(split.val, spec, 1000)
    logits = tasks.forward(model, runner.normalize(batch.images, spec), "classify")["logits"]
    labels = np.array([sample.label for sample in split.train])
    weights = class_weights(labels, len(spec.class_names), recipe.train.class_balance)
    loss = classify.loss(torch.from_numpy(logits), batch.labels, recipe, weights)
    assert history(run.path)[-1]["val_loss"] == pytest.approx(float(loss), rel=1e-5)


STOPPING = """
import sys
from pathlib import Path
from edgekit.datasets import read_dataset
from edgekit.finetune import finetune
from edgekit.jobs import Watch
from edgekit.recipe import read_recipe

def stop(epoch):
    if epoch.epoch == 2:
        raise KeyboardInterrupt

recipe = read_recipe(Path(sys.argv[1]))
finetune(recipe, read_dataset(Path(recipe.data.path)), Path(sys.argv[2]), watch=Watch(on_epoch=stop))
"""


@pytest.mark.parametrize(("first", "second"), [(2, 1), (1, 2)])
def test_a_run_goes_on_with_another_number_of_processes(place: Place, alone: Path, first: int, second: int) -> None:
    name = f"from-{first}"
    script = place.folder / "stopping.py"
    write_text(script, STOPPING)
    answer = place.python(first, script, place.recipe(name), place.folder / "stopped")
    assert answer.returncode != 0 and "Interrupted: interrupted: 2 of 3 epochs are kept" in answer.stderr
    run = place.folder / "stopped" / name
    before = history(run)
    assert [row["epoch"] for row in before] == [1, 2]
    resumed, _ = place.trained(second, "--resume", run)
    assert resumed == run
    after, whole = history(run), history(place.folder / alone)
    assert after[:2] == before and [row["epoch"] for row in after] == [1, 2, 3]
    assert after[2]["train_loss"] == pytest.approx(whole[2]["train_loss"], rel=0.05)
    assert after[2]["val_metric"] == pytest.approx(whole[2]["val_metric"], abs=0.15)


def test_too_few_images_for_the_processes_are_said(place: Place, tmp_path: Path) -> None:
    """Not trained on nothing."""
    few = tmp_path / "few"
    for label in ("0", "1"):
        (few / label).mkdir(parents=True)
        for image in sorted((place.digits / label).iterdir())[:2]:
            shutil.copyfile(image, few / label / image.name)
    answer = place.edgekit(2, "finetune", few, "--backbone", "lcnet_050", "--no-pretrained", "--image-size", "64")
    assert answer.returncode != 0 and "edgekit: too few training images" in answer.stderr
