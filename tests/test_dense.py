"""Boxes and masks through the whole flow: data → training → proof → bundle → figures, on small composed canvases."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from edgekit import demo, runner
from edgekit.artifacts import RunFolder, read_json
from edgekit.bundle import bundle
from edgekit.datasets import guess_task, read_split
from edgekit.errors import DataError
from edgekit.evaluate import evaluate
from edgekit.finetune import finetune, resume
from edgekit.jobs import Watch
from edgekit.quantize import quantize
from edgekit.recipe import Task
from edgekit.targets import read_target

METRICS: dict[str, tuple[str, str]] = {"detect": ("mAP@0.5", "map50"), "segment": ("mean IoU", "mean_iou")}


@pytest.fixture(scope="module", params=["detect", "segment"])
def task(request: pytest.FixtureRequest) -> Task:
    return request.param  # type: ignore[no-any-return]


@pytest.fixture(scope="module")
def run(task: Task, canvases_run: Callable[[Task], Path]) -> RunFolder:
    return RunFolder(canvases_run(task))


@pytest.fixture(scope="module")
def built(run: RunFolder, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return bundle(run.path, read_target("cpu"), tmp_path_factory.mktemp("dist")).path


def test_the_canvases_are_what_they_seem(run: RunFolder, task: Task) -> None:
    split = read_split(run.split)
    assert guess_task(split.root) == task
    assert (len(split.train), len(split.val), split.task) == (48, 16, task)
    names = tuple(map(str, range(10)))
    assert split.class_names == (names if task == "detect" else ("background", *names))


def test_every_output_is_proved(run: RunFolder) -> None:
    proof = read_json(run.parity)
    assert proof["ok"] is True
    assert {row["status"] for row in proof["verdicts"]} == {"ok"}
    assert all(row["relative_error"] < 1e-4 for row in proof["verdicts"])


def test_the_bundle_has_torchs_figures(run: RunFolder, built: Path, task: Task) -> None:
    columns = evaluate(run.path, built).metrics["columns"]
    assert list(columns) == ["torch", "onnx", "bundle"]
    name = METRICS[task][1]
    assert columns["torch"][name] > 0.1  # it has begun to learn, else nothing is compared
    for other in ("onnx", "bundle"):
        assert columns[other][name] == pytest.approx(columns["torch"][name], abs=0.002)
        assert columns[other]["agreement"] > 0.999
    picture = "precision-recall.png" if task == "detect" else "confusion.png"
    for file in (picture, "mistakes.jpg"):
        assert min(runner.read_image(run.path / file).shape[:2]) > 50
    assert METRICS[task][0] in run.report.read_text(encoding="utf-8")


def test_the_best_epoch_is_the_one_that_is_kept(run: RunFolder, task: Task) -> None:
    header, *rows = run.history.read_text(encoding="utf-8").splitlines()
    table = [dict(zip(header.split(","), row.split(","), strict=True)) for row in rows]
    assert {row["metric"] for row in table} == {METRICS[task][0]}
    best = max(float(row["val_metric"]) for row in table)
    assert evaluate(run.path).metrics["columns"]["torch"][METRICS[task][1]] == pytest.approx(best, abs=1e-6)


def test_there_is_no_test_subset(run: RunFolder) -> None:
    with pytest.raises(DataError, match="no test subset"):
        evaluate(run.path, subset="test")


def test_answers_from_the_bundle(run: RunFolder, built: Path, task: Task, tmp_path: Path) -> None:
    option = {"detect": "--yolo", "segment": "--masks"}[task]
    command = [sys.executable, built / "run.py", "infer", run.check, "--draw", tmp_path / "drawn"]
    answer = subprocess.run(
        [*map(str, command), option, str(tmp_path / "out")], capture_output=True, text=True, check=True
    )
    lines = [json.loads(line) for line in answer.stdout.splitlines()]
    assert len(lines) == len(list((tmp_path / "out").iterdir())) == len(list((tmp_path / "drawn").iterdir())) == 8
    for line in lines:
        shares = [result["share"] for result in line["results"]] if task == "segment" else [1.0]
        assert sum(shares) == pytest.approx(1.0, abs=1e-4)


def test_int8_is_judged_by_the_tasks_metric(run: RunFolder, task: Task) -> None:
    """Whether it passes is the figures' matter; that they are the metric's, and consistent, is looked at."""
    found = quantize(run.path, read_target("cpu"), images=32).record
    assert found["metric"] == METRICS[task][0]
    fp32 = found["variants"][0]["figures"][0]
    torch = evaluate(run.path).metrics["columns"]["torch"][METRICS[task][1]]
    assert fp32["metric"] == pytest.approx(torch, abs=0.002)
    assert (fp32["drop"], fp32["agreement"]) == (0.0, 1.0)
    for variant in found["variants"][1:]:
        for row in variant["figures"]:
            if row["status"] == "ok":
                assert row["drop"] == pytest.approx(100 * (fp32["metric"] - row["metric"]), abs=0.5)


def test_a_resumed_run_is_the_same(run: RunFolder, task: Task, tmp_path: Path) -> None:
    """Interrupted after its first epoch, it ends with the weights of the run that was not."""
    data = read_split(run.split)
    recipe = demo.canvases_recipe(data.root, task)
    short = recipe.train.model_copy(update={"head_epochs": 1, "epochs": 1, "precision": "float32"})
    recipe = recipe.model_copy(update={"train": short})
    whole = finetune(recipe.model_copy(update={"name": "whole"}), data, tmp_path).run

    def stop(_: object) -> None:
        raise KeyboardInterrupt

    with pytest.raises(Exception, match="interrupted"):
        finetune(recipe.model_copy(update={"name": "broken"}), data, tmp_path, watch=Watch(on_epoch=stop))
    resume(tmp_path / "broken")
    assert (tmp_path / "broken" / "model.safetensors").read_bytes() == (whole / "model.safetensors").read_bytes()


def test_digits_do_not_lie_on_each_other() -> None:
    for _, _, canvas in demo._canvases({"train": 20}):
        for digit, left, top, right, bottom in canvas.boxes:
            inside = canvas.classes[top:bottom, left:right]
            assert (inside == digit + 1).any(axis=0).all() or (inside == digit + 1).any(axis=1).all()
        assert set(np.unique(canvas.classes)) - {0} == {digit + 1 for digit, *_ in canvas.boxes}
