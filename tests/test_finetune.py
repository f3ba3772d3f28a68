import csv
import logging
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from lightning_fabric import Fabric
from safetensors.torch import load_file, save_file

from edgekit import runner, tasks
from edgekit.artifacts import RunFolder
from edgekit.batches import batches
from edgekit.datasets import read_dataset, read_split
from edgekit.demo import digits_recipe
from edgekit.errors import ArtifactError, ConfigError, DataError, Interrupted
from edgekit.export import export
from edgekit.fake_quantization import fake_quantize, plain_state
from edgekit.finetune import best_epoch, finetune, finetune_qat, resume
from edgekit.jobs import Epoch, Step
from edgekit.recipe import Recipe, qat_recipe


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


def row(epoch: int, val_metric: float, val_loss: float = 1.0) -> Epoch:
    return Epoch(epoch, "stages", 1e-3, 1.0, val_loss, "top-1", val_metric, 1.0, 1.0)


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
        logits = tasks.forward(model, runner.normalize(batch.images, spec), "classify")["logits"]
        right += int((logits.argmax(axis=1) == batch.labels).sum())
        total += len(batch.labels)
    assert right / total > 0.5
    with run.history.open() as stream:
        assert right / total == pytest.approx(max(float(r["val_metric"]) for r in csv.DictReader(stream)), abs=1e-9)


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
    assert [(r.epoch, r.val_metric, r.train_loss) for r in resumed.history] == [
        (r.epoch, r.val_metric, r.train_loss) for r in whole.history
    ]
    for name in ("model.safetensors", "state/last.safetensors"):
        one, other = load_file(whole.run / name), load_file(resumed.run / name)
        assert one.keys() == other.keys()
        assert all(torch.equal(one[key], other[key]) for key in one), name
    again = resume(tmp_path / "broken", on_epoch=epochs.append)
    assert again.best.epoch == resumed.best.epoch and len(epochs) == 1


# Quantization-aware runs ------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def source(digits: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A quick finished run, of a network with squeeze-and-excitation."""
    return finetune(small(digits, "source"), read_dataset(digits), tmp_path_factory.mktemp("source")).run


def qat(source: Path, name: str = "", **train: object) -> Recipe:
    run = RunFolder(source)
    recipe = qat_recipe(run.read_recipe(), run.weights)
    return recipe.model_copy(update={"name": name, "train": recipe.train.model_copy(update=train)})


def contents(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def assert_same_run(one: Path, other: Path) -> None:
    """The same weights and the same state, bit for bit; NaN (a range that no batch has set) equals NaN."""
    for name in ("model.safetensors", "state/last.safetensors"):
        left, right = load_file(one / name), load_file(other / name)
        assert left.keys() == right.keys()
        assert all(torch.allclose(left[key], right[key], rtol=0, atol=0, equal_nan=True) for key in left), name


def test_a_qat_run_is_a_run_like_any_other(finished_run: Path, tmp_path: Path) -> None:
    before = contents(finished_run)
    done = finetune_qat(finished_run, qat(finished_run, epochs=2), tmp_path)
    assert contents(finished_run) == before, "the source was changed"
    assert done.run == tmp_path / "digits-qat"
    made, source_run, run = contents(done.run), RunFolder(finished_run), RunFolder(done.run)
    same = ["spec.json", "split.csv", *(name for name in before if name.startswith("check"))]
    assert len(same) == 10 and {name: made[name] for name in same} == {name: before[name] for name in same}
    assert set(made) == {*same, "recipe.toml", "history.csv", "model.safetensors", "state/last.safetensors"}
    assert [(epoch.epoch, epoch.phase) for epoch in done.history] == [(1, "stages"), (2, "stages")]
    recipe = run.read_recipe()
    assert (recipe.name, recipe.model.weights) == ("digits-qat", str(source_run.weights))
    trained, kept = load_file(run.weights), load_file(source_run.weights)
    assert trained.keys() == kept.keys()
    moved = {key for key in kept if not torch.equal(trained[key], kept[key])}
    assert {key for key in kept if kept[key].dim() > 1} <= moved, "some weights did not learn"
    assert not [key for key in moved if key.endswith(("running_mean", "running_var", "num_batches_tracked"))]
    again = finetune_qat(finished_run, qat(finished_run, epochs=1), tmp_path)
    assert again.run == tmp_path / "digits-qat-2" and contents(done.run) == made
    assert export(done.run).model.is_file()


def test_a_qat_run_starts_from_the_whole_trained_network(finished_run: Path, tmp_path: Path) -> None:
    """At a rate that moves nothing: the weights are the source's, the classifier too; only the rounding is new."""
    done = finetune_qat(finished_run, qat(finished_run, epochs=1, learning_rate=1e-30, weight_decay=0.0), tmp_path)
    start, end = load_file(finished_run / "model.safetensors"), load_file(done.run / "model.safetensors")
    assert all(torch.equal(start[key], end[key]) for key in start)
    with (finished_run / "history.csv").open() as stream:
        float_top1 = max(float(row["val_metric"]) for row in csv.DictReader(stream))
    assert done.best.val_metric == pytest.approx(float_top1, abs=0.1)


def test_the_history_of_a_qat_run_is_the_quantized_network(finished_run: Path, tmp_path: Path) -> None:
    """Its loss is that of the saved state with the rounding, and not that of the same weights without it."""
    done = finetune_qat(finished_run, qat(finished_run, epochs=1), tmp_path)
    run = RunFolder(done.run)
    recipe, spec = run.read_recipe(), run.read_spec()
    state = load_file(run.state)
    plain = tasks.load(run)
    rounded = tasks.load(run)
    fake_quantize(rounded)
    rounded.load_state_dict({k.removeprefix("model."): v for k, v in state.items() if k.startswith("model.")})
    assert all(torch.equal(v, plain.state_dict()[k]) for k, v in plain_state(rounded).items())
    losses = []
    for model in (plain, rounded.eval()):
        (batch,) = batches(read_split(run.split).val, spec, 1000)
        logits = torch.from_numpy(tasks.forward(model, runner.normalize(batch.images, spec), "classify")["logits"])
        losses.append(float(tasks.TASKS["classify"].loss(logits, batch.labels, recipe)))
    assert done.best.val_loss == pytest.approx(losses[1], rel=1e-5)
    assert abs(losses[0] - losses[1]) > 1e-3 * losses[1]


@pytest.mark.parametrize("stop_at", [(1, 3), (2, 2)], ids=["in the first epoch", "later"])
def test_an_interrupted_qat_run_ends_with_the_weights_of_one_that_was_not(
    source: Path, tmp_path: Path, stop_at: tuple[int, int]
) -> None:
    whole = finetune_qat(source, qat(source, "whole", epochs=2), tmp_path)

    def stop(step: Step) -> None:
        if (step.epoch, step.step) == stop_at:
            raise KeyboardInterrupt

    with pytest.raises(Interrupted, match=r"[01] of 2 epochs are kept; continue with .*--resume .*broken"):
        finetune_qat(source, qat(source, "broken", epochs=2), tmp_path, on_step=stop)
    resumed = resume(tmp_path / "broken")
    assert [(r.epoch, r.val_loss, r.train_loss) for r in resumed.history] == [
        (r.epoch, r.val_loss, r.train_loss) for r in whole.history
    ]
    assert_same_run(whole.run, resumed.run)
    ranges = [v for k, v in load_file(resumed.run / "state/last.safetensors").items() if k.endswith(".range")]
    assert len(ranges) > 20 and all((low <= 0 <= high) and low < high for low, high in ranges)


def test_a_qat_run_can_be_repeated_from_its_recipe(source: Path, digits: Path, tmp_path: Path) -> None:
    """As `finetune --recipe` gets it."""
    done = finetune_qat(source, qat(source, "one", epochs=1), tmp_path)
    recipe = RunFolder(done.run).read_recipe().model_copy(update={"name": "two"})
    assert_same_run(done.run, finetune(recipe, read_dataset(digits), tmp_path).run)


def test_qat_of_what_cannot_be_continued(source: Path, digits: Path, tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match="no run folder at"):
        finetune_qat(tmp_path / "none", qat(source), tmp_path)
    with pytest.raises(ArtifactError, match=r"mine exists already: .*choose another --name"):
        (tmp_path / "mine").mkdir()
        finetune_qat(source, qat(source, "mine"), tmp_path)
    with pytest.raises(ConfigError, match=r"train.qat continues from a trained network: use .*--qat RUN"):
        finetune(small(digits, "no-weights", qat=True), read_dataset(digits), tmp_path)
    other = qat(source)
    other = other.model_copy(update={"model": other.model.model_copy(update={"backbone": "lcnet_050"})})
    with pytest.raises(ConfigError, match="is not a trained lcnet_050 for these 10 classes"):
        finetune_qat(source, other, tmp_path)
    assert {p.name for p in tmp_path.iterdir()} == {"mine"}


def test_training_in_bfloat16_says_nothing(digits: Path, tmp_path: Path) -> None:
    """Fabric remarks on it every time it is made; the recipe says it already."""
    records: list[logging.LogRecord] = []
    handler, logger = logging.Handler(), logging.getLogger("lightning_fabric")
    handler.emit = records.append  # type: ignore[method-assign]
    level = logger.level
    logger.addHandler(handler)
    try:
        Fabric(accelerator="cpu", devices=1, precision="bf16-mixed")
        assert len(records) == 1, "there is nothing to silence any more"
        finetune(small(digits, "b", head_epochs=1, epochs=0, precision="bfloat16"), read_dataset(digits), tmp_path)
    finally:
        logger.removeHandler(handler)
    assert len(records) == 1
    assert logger.level == level


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


def test_tensorboard_reads_what_was_logged(digits: Path, tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    done = finetune(small(digits, "logged", epochs=1, tensorboard=True), read_dataset(digits), tmp_path)
    events = EventAccumulator(str(done.run / "tensorboard"))
    events.Reload()
    assert set(events.Tags()["scalars"]) == {
        "loss/train",
        "loss/val",
        "val/top-1",
        "learning_rate",
        "images_per_second",
    }
    assert [(each.step, each.value) for each in events.Scalars("val/top-1")] == [
        (row.epoch, pytest.approx(row.val_metric)) for row in done.history
    ]


@pytest.mark.parametrize("views", [0, 2])
def test_a_time_is_planned_by_what_a_few_steps_take(digits: Path, tmp_path: Path, views: int) -> None:
    recipe, dataset = small(digits, "timed", head_epochs=0, epochs=2, views=views), read_dataset(digits)
    notes: list[str] = []
    start = time.perf_counter()
    done = finetune(recipe, dataset, tmp_path, budget_s=8.0, on_note=notes.append)
    taken_s = time.perf_counter() - start
    planned = RunFolder(done.run).read_recipe().train
    assert 1 <= planned.epochs <= 100 and planned.patience == max(recipe.train.patience, planned.epochs // 3)
    assert f"{planned.epochs} of them are planned" in notes[0]
    assert done.stopped_early or len(done.history) == planned.epochs
    assert taken_s < 60, "a budget of 8 seconds"
    tiny = finetune(small(digits, "tiny", views=views), dataset, tmp_path, budget_s=0.001, on_note=notes.append)
    assert RunFolder(tiny.run).read_recipe().train.epochs == 1
    assert "longer than the time given" in notes[-1]


def test_a_plan_leaves_no_trace_in_the_weights(digits: Path, tmp_path: Path) -> None:
    dataset = read_dataset(digits)
    timed = finetune(small(digits, "timed", epochs=1), dataset, tmp_path, budget_s=0.001)
    assert_same_run(timed.run, finetune(small(digits, "plain", epochs=1), dataset, tmp_path).run)
