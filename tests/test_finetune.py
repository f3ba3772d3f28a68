import csv
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from edgekit import runner, tasks
from edgekit.artifacts import RunFolder
from edgekit.batches import batches
from edgekit.datasets import read_dataset, read_split
from edgekit.demo import digits_recipe
from edgekit.errors import ArtifactError, ConfigError, DataError, Interrupted
from edgekit.finetune import Epoch, Step, best_epoch, finetune, learning_rate, resume
from edgekit.recipe import Recipe


def small(digits: Path, name: str, **train: object) -> Recipe:
    """Two quick epochs on a small network with random weights."""
    recipe = digits_recipe(digits, name)
    settings = {"head_epochs": 1, "epochs": 2, "unfrozen_fraction": 0.3, **train}
    return recipe.model_copy(
        update={
            "model": recipe.model.model_copy(update={"backbone": "mobilenetv3_small_050", "pretrained": False}),
            "train": recipe.train.model_copy(update=settings),
        }
    )


def row(epoch: int, val_top1: float, val_loss: float = 1.0) -> Epoch:
    return Epoch(epoch, "stages", 1e-3, 1.0, val_loss, val_top1, 1.0, 1.0)


def test_a_run_folder_holds_what_the_contract_says(finished_run: Path) -> None:
    names = {p.name for p in finished_run.iterdir()}
    assert {"recipe.toml", "spec.json", "split.csv", "check", "history.csv", "model.safetensors", "state"} <= names
    assert not [name for name in names if name.startswith(".") or name.endswith(".part")]
    run = RunFolder(finished_run)
    assert run.read_recipe().model.input_size == run.read_spec().input_size == (64, 64)
    assert run.read_spec().class_names == tuple("0123456789")
    assert len(run.check_images()) == 8
    validation = {sample.sha256 for sample in read_split(run.split).val}
    assert {runner.file_sha256(image) for image in run.check_images()} <= validation
    with run.history.open() as stream:
        rows = list(csv.DictReader(stream))
    assert [(r["epoch"], r["phase"]) for r in rows] == [("1", "head"), ("2", "stages")]


def test_it_learns(finished_run: Path) -> None:
    """240 images and two epochs are enough to be right far more often than one time in ten."""
    run = RunFolder(finished_run)
    model, spec = tasks.load(run), run.read_spec()
    right = total = 0
    for batch in batches(read_split(run.split).val, spec, 32):
        logits = tasks.forward(model, runner.normalize(batch.images, spec))["logits"]
        right += int((logits.argmax(axis=1) == batch.labels).sum())
        total += len(batch.labels)
    assert right / total > 0.5
    with run.history.open() as stream:
        assert right / total == pytest.approx(max(float(r["val_top1"]) for r in csv.DictReader(stream)), abs=1e-9)


def test_frozen_stages_do_not_move_and_the_last_ones_do(digits: Path, tmp_path: Path) -> None:
    recipe = small(digits, "frozen")
    dataset = read_dataset(digits)
    steps: list[Step] = []
    done = finetune(recipe, dataset, tmp_path, on_step=steps.append)
    torch.manual_seed(recipe.train.seed)
    start = tasks.TASKS["classify"].build(recipe, dataset.class_names, pretrained=False).state_dict()
    end = load_file(done.run / "state" / "last.safetensors")
    moved = {key for key, value in start.items() if not torch.equal(value, end[f"model.{key}"])}
    assert not [key for key in moved if key.startswith(("conv_stem", "bn1", "blocks.0", "blocks.1"))]
    assert {"conv_head.weight", "classifier.weight"} <= moved
    per_epoch = -(-len(dataset.train) // recipe.train.batch_size)
    assert [(s.epoch, s.step) for s in steps] == [(e, s + 1) for e in (1, 2, 3) for s in range(per_epoch)]


@pytest.mark.parametrize("unfrozen", [0.3, 1.0])  # all: the stem too, whose 3x3 weights are channels_last
def test_an_interrupted_run_ends_with_the_weights_of_one_that_was_not(
    digits: Path, tmp_path: Path, unfrozen: float
) -> None:
    dataset = read_dataset(digits)
    whole = finetune(small(digits, "whole", unfrozen_fraction=unfrozen), dataset, tmp_path)

    def stop(step: Step) -> None:
        if (step.epoch, step.step) == (3, 2):
            raise KeyboardInterrupt

    with pytest.raises(
        Interrupted, match=r"2 of 3 epochs are kept; continue with `edgekit finetune --resume .*broken`"
    ):
        finetune(small(digits, "broken", unfrozen_fraction=unfrozen), dataset, tmp_path, on_step=stop)
    epochs: list[Epoch] = []
    resumed = resume(tmp_path / "broken", on_epoch=epochs.append)
    assert [epoch.epoch for epoch in epochs] == [3]
    assert [(r.epoch, r.val_top1, r.train_loss) for r in resumed.history] == [
        (r.epoch, r.val_top1, r.train_loss) for r in whole.history
    ]
    for name in ("model.safetensors", "state/last.safetensors"):
        one, other = load_file(whole.run / name), load_file(resumed.run / name)
        assert one.keys() == other.keys()
        assert all(torch.equal(one[key], other[key]) for key in one), name
    again = resume(tmp_path / "broken", on_epoch=epochs.append)
    assert again.best.epoch == resumed.best.epoch and len(epochs) == 1


@pytest.mark.slow
def test_kill_9_leaves_a_run_that_resumes(digits: Path, tmp_path: Path) -> None:
    """In a process of its own, killed in its second epoch."""
    script = (
        "from pathlib import Path\n"
        "from edgekit.datasets import read_dataset\nfrom edgekit.finetune import finetune\n"
        "from test_finetune import small\n"
        f"finetune(small(Path({str(digits)!r}), 'killed', epochs=50), read_dataset(Path({str(digits)!r})), "
        f"Path({str(tmp_path)!r}))\n"
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(Path(__file__).parent), *sys.path])}
    child = subprocess.Popen([sys.executable, "-c", script], env=environment)
    state = tmp_path / "killed" / "state" / "last.safetensors"
    try:
        deadline = time.monotonic() + 120
        while not state.is_file() and time.monotonic() < deadline:
            time.sleep(0.02)
        assert state.is_file(), "the child made no state within two minutes"
    finally:
        child.send_signal(signal.SIGKILL)
        child.wait()
    recipe_file = tmp_path / "killed" / "recipe.toml"
    recipe_file.write_text(recipe_file.read_text().replace("epochs = 50", "epochs = 1"))
    done = resume(tmp_path / "killed")
    assert done.history[-1].epoch >= 2 and load_file(tmp_path / "killed" / "model.safetensors")


def test_resuming_what_cannot_be_resumed(digits: Path, tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match="no run folder at"):
        resume(tmp_path / "none")
    done = finetune(small(digits, "r", head_epochs=1, epochs=0), read_dataset(digits), tmp_path)
    save_file({"x": torch.zeros(1)}, done.run / "state" / "last.safetensors")
    with pytest.raises(ArtifactError, match="is damaged"):
        resume(done.run)


def test_resuming_without_the_images(tmp_path: Path, digits: Path) -> None:
    import shutil

    copy = tmp_path / "copy"
    shutil.copytree(digits, copy)
    done = finetune(small(copy, "moved", head_epochs=1, epochs=0), read_dataset(copy), tmp_path / "runs")
    shutil.rmtree(copy)
    with pytest.raises(DataError, match=r"300 images of this run are no longer there, such as .*put them back"):
        resume(done.run)


def test_a_run_is_never_overwritten(digits: Path, tmp_path: Path) -> None:
    dataset = read_dataset(digits)
    recipe = small(digits, "", head_epochs=1, epochs=0)
    assert finetune(recipe, dataset, tmp_path).run.name == "digits-mobilenetv3_small_050"
    assert finetune(recipe, dataset, tmp_path).run.name == "digits-mobilenetv3_small_050-2"
    with pytest.raises(ArtifactError, match=r"exists already: continue it with .*--resume"):
        finetune(recipe.model_copy(update={"name": "digits-mobilenetv3_small_050"}), dataset, tmp_path)


def test_a_loss_that_explodes_is_an_error(digits: Path, tmp_path: Path) -> None:
    recipe = small(digits, "nan", head_learning_rate=1e30, head_epochs=3, warmup_fraction=0.0)
    with pytest.raises(ConfigError, match=r"no longer finite in epoch \d: lower train.learning_rate"):
        finetune(recipe, read_dataset(digits), tmp_path)


def test_nothing_to_train(digits: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="nothing to train"):
        finetune(small(digits, "none", head_epochs=0, epochs=0), read_dataset(digits), tmp_path)


def test_stops_early_when_nothing_better_comes(digits: Path, tmp_path: Path) -> None:
    recipe = small(digits, "early", head_epochs=20, epochs=0, head_learning_rate=1e-12, patience=2)
    done = finetune(recipe, read_dataset(digits), tmp_path)
    assert done.stopped_early
    assert done.history[-1].epoch - done.best.epoch == 2


def test_the_best_epoch_is_the_first_of_the_best() -> None:
    assert best_epoch([row(1, 0.5), row(2, 0.9), row(3, 0.9), row(4, 0.8)]).epoch == 2
    assert best_epoch([row(1, 0.9, 0.4), row(2, 0.9, 0.3)]).epoch == 2


@given(steps=st.integers(1, 500), peak=st.floats(1e-5, 1.0))
def test_the_learning_rate_rises_once_and_falls_once(steps: int, peak: float) -> None:
    recipe = Recipe(data={"path": "x"})  # type: ignore[arg-type]
    rates = [learning_rate(peak, step, steps, recipe) for step in range(1, steps + 1)]
    top = rates.index(max(rates))
    assert max(rates) == pytest.approx(peak)
    assert rates[: top + 1] == sorted(rates[: top + 1])
    assert rates[top:] == sorted(rates[top:], reverse=True)
    assert min(rates) > 0


def test_learning_rate_by_hand() -> None:
    recipe = Recipe(data={"path": "x"}, train={"warmup_fraction": 0.25})  # type: ignore[arg-type]
    assert [learning_rate(1.0, step, 8, recipe) for step in (1, 2, 5)] == pytest.approx([0.5, 1.0, 0.6112604669781572])
