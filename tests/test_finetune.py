import csv
import json
import logging
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from lightning_fabric import Fabric
from safetensors.torch import load_file, save_file

from edgekit import learner, runner, tasks
from edgekit.artifacts import RunFolder, write_json
from edgekit.batches import batches
from edgekit.datasets import read_dataset, read_split
from edgekit.demo import digits_recipe
from edgekit.errors import ArtifactError, ConfigError, DataError, Interrupted, SetupError
from edgekit.export import export
from edgekit.fake_quantization import fake_quantize, plain_state
from edgekit.finetune import best_epoch, finetune, finetune_qat, resume
from edgekit.jobs import Epoch, Step, Watch
from edgekit.recipe import Recipe, qat_recipe
from edgekit.tasks.classify import best_temperature


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
    done = finetune(recipe, dataset, tmp_path, watch=Watch(on_step=steps.append))
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
        finetune(small(digits, "broken", unfrozen_fraction=unfrozen), dataset, tmp_path, watch=Watch(on_step=stop))
    epochs: list[Epoch] = []
    resumed = resume(tmp_path / "broken", watch=Watch(on_epoch=epochs.append))
    assert [epoch.epoch for epoch in epochs] == [3]
    assert [(r.epoch, r.val_metric, r.train_loss) for r in resumed.history] == [
        (r.epoch, r.val_metric, r.train_loss) for r in whole.history
    ]
    for name in ("model.safetensors", "state/last.safetensors"):
        one, other = load_file(whole.run / name), load_file(resumed.run / name)
        assert one.keys() == other.keys()
        assert all(torch.equal(one[key], other[key]) for key in one), name
    again = resume(tmp_path / "broken", watch=Watch(on_epoch=epochs.append))
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
        finetune_qat(source, qat(source, "broken", epochs=2), tmp_path, watch=Watch(on_step=stop))
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
    done = finetune(recipe, dataset, tmp_path, budget_s=8.0, watch=Watch(on_note=notes.append))
    taken_s = time.perf_counter() - start
    planned = RunFolder(done.run).read_recipe().train
    assert 1 <= planned.epochs <= 100 and planned.patience == max(recipe.train.patience, planned.epochs // 3)
    assert f"{planned.epochs} of them are planned" in notes[0]
    assert done.stopped_early or len(done.history) == planned.epochs
    assert taken_s < 60, "a budget of 8 seconds"
    tiny = finetune(
        small(digits, "tiny", views=views), dataset, tmp_path, budget_s=0.001, watch=Watch(on_note=notes.append)
    )
    assert RunFolder(tiny.run).read_recipe().train.epochs == 1
    assert "longer than the time given" in notes[-1]


def test_a_plan_leaves_no_trace_in_the_weights(digits: Path, tmp_path: Path) -> None:
    dataset = read_dataset(digits)
    timed = finetune(small(digits, "timed", epochs=1), dataset, tmp_path, budget_s=0.001)
    assert_same_run(timed.run, finetune(small(digits, "plain", epochs=1), dataset, tmp_path).run)


# What resuming must repeat -----------------------------------------------------------------------------------------

EVERYTHING = {
    "head_epochs": 2,
    "epochs": 3,
    "views": 2,
    "mixup": 0.3,
    "class_balance": 0.5,
    "layer_decay": 0.7,
    "ema_decay": 0.9,
}


@pytest.fixture
def cold_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    """Of features; → what empties it again."""
    monkeypatch.setenv("EDGEKIT_CACHE", str(tmp_path / "cache"))
    return lambda: shutil.rmtree(tmp_path / "cache", ignore_errors=True)


def figures(history: Sequence[Epoch]) -> list[tuple[object, ...]]:
    """All but how long it took."""
    return [(r.epoch, r.phase, r.learning_rate, r.train_loss, r.val_loss, r.val_metric) for r in history]


@pytest.mark.parametrize(
    ("change", "stop_at"),
    [
        ({}, (4, 3)),  # in the second phase's second epoch
        ({}, (2, 5)),  # while only the head learns
        ({"views": 0}, (4, 1)),
        ({"unfrozen_fraction": 1.0, "head_epochs": 1, "epochs": 2}, (3, 2)),
        ({"ema_decay": 0.0, "head_epochs": 0}, (3, 1)),
    ],
    ids=["stages", "head", "streamed", "all learns", "no average"],
)
@pytest.mark.parametrize("cache", ["warm", "cold"])
def test_all_that_is_random_and_all_that_is_kept_survives_an_interruption(
    digits: Path,
    tmp_path: Path,
    cold_cache: Callable[[], None],
    change: dict[str, object],
    stop_at: tuple[int, int],
    cache: str,
) -> None:
    dataset, settings = read_dataset(digits), {**EVERYTHING, **change}
    whole = finetune(small(digits, "whole", **settings), dataset, tmp_path)

    def stop(step: Step) -> None:
        if (step.epoch, step.step) == stop_at:
            raise KeyboardInterrupt

    with pytest.raises(Interrupted):
        finetune(small(digits, "broken", **settings), dataset, tmp_path, watch=Watch(on_step=stop))
    if cache == "cold":
        cold_cache()
    resumed = resume(tmp_path / "broken")
    assert figures(resumed.history) == figures(whole.history)
    assert_same_run(whole.run, resumed.run)
    assert (whole.run / "spec.json").read_bytes() == (resumed.run / "spec.json").read_bytes()


def test_a_run_that_was_killed_before_its_temperature_was_known_gets_it(
    digits: Path, tmp_path: Path, cold_cache: Callable[[], None]
) -> None:
    """And a finished one is left as it is, whatever became of its images' features."""
    done = finetune(small(digits, "a", **EVERYTHING), read_dataset(digits), tmp_path)
    run, spec = RunFolder(done.run), (done.run / "spec.json").read_bytes()
    write_json(run.spec, replace(run.read_spec(), temperature=1.0).to_dict())
    before = contents(done.run)
    cold_cache()
    notes: list[str] = []
    again = resume(done.run, watch=Watch(on_image=lambda name, count, total: notes.append(name)))
    assert figures(again.history) == figures(done.history)
    assert contents(done.run) == {**before, "spec.json": spec}
    notes.clear()
    cold_cache()
    resume(done.run, watch=Watch(on_image=lambda name, count, total: notes.append(name)))
    assert notes == [] and contents(done.run) == {**before, "spec.json": spec}


def test_a_warm_cache_gives_the_same_run_as_a_cold_one(
    digits: Path, tmp_path: Path, cold_cache: Callable[[], None]
) -> None:
    """Also where the warm one's rows come from a run with other phases."""
    dataset = read_dataset(digits)
    computed: list[str] = []
    runs = {}
    for name in ("cold", "warm"):
        computed.clear()
        recipe = small(digits, name, **EVERYTHING)
        runs[name] = finetune(
            recipe, dataset, tmp_path, watch=Watch(on_image=lambda name, count, total: computed.append(name))
        )
        assert bool(computed) == (name == "cold")
    stages_only = {**EVERYTHING, "head_epochs": 0}
    runs["warm from another"] = finetune(
        small(digits, "other", **stages_only),
        dataset,
        tmp_path,
        watch=Watch(on_image=lambda *told: computed.append(str(told))),
    )
    assert computed == [], "the later phase's features do not depend on what the earlier one computes behind them"
    cold_cache()
    runs["cold stages"] = finetune(small(digits, "again", **stages_only), dataset, tmp_path)
    for one, other in (("cold", "warm"), ("warm from another", "cold stages")):
        assert figures(runs[one].history) == figures(runs[other].history)
        assert_same_run(runs[one].run, runs[other].run)


@pytest.mark.usefixtures("cold_cache")
def test_images_that_are_streamed_are_learnt_too(digits: Path, tmp_path: Path) -> None:
    streamed, kept = (
        finetune(small(digits, f"v{views}", views=views, epochs=5), read_dataset(digits), tmp_path) for views in (0, 2)
    )
    for done in (streamed, kept):
        assert done.best.val_metric > 0.25 and done.history[-1].train_loss < done.history[0].train_loss


@pytest.mark.parametrize("ema_decay", [0.0, 0.95])
@pytest.mark.usefixtures("cold_cache")
def test_the_spec_has_the_temperature_of_the_kept_weights(digits: Path, tmp_path: Path, ema_decay: float) -> None:
    done = finetune(small(digits, "t", ema_decay=ema_decay), read_dataset(digits), tmp_path)
    run = RunFolder(done.run)
    spec = run.read_spec()
    assert spec.temperature != 1.0
    (batch,) = batches(read_split(run.split).val, spec, 1000)
    logits = tasks.forward(tasks.load(run), runner.normalize(batch.images, spec), "classify")["logits"]
    assert spec.temperature == pytest.approx(best_temperature(logits, batch.labels), rel=1e-3)
    top1 = float((logits.argmax(axis=1) == batch.labels).mean())
    assert done.best.val_metric == pytest.approx(top1, abs=1e-9), "the kept weights are those of the best figure"


# What goes wrong --------------------------------------------------------------------------------------------------


def file_limit(size_bytes: int) -> None:
    """No file may grow beyond this, as on a full disk; -1: as large as it likes."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (size_bytes, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))


@pytest.mark.parametrize("size_bytes", [100, 200_000], ids=["at once", "in the middle of a file"])
@pytest.mark.usefixtures("cold_cache")
def test_a_full_disk_at_an_epochs_end_leaves_a_run_that_resumes(digits: Path, tmp_path: Path, size_bytes: int) -> None:
    dataset = read_dataset(digits)
    whole = finetune(small(digits, "whole", **EVERYTHING), dataset, tmp_path)
    last = -(-len(dataset.train) // 32)

    def fill_disk(step: Step) -> None:
        if (step.epoch, step.step) == (4, last):
            file_limit(size_bytes)

    try:
        with pytest.raises(ArtifactError, match=r"cannot write .*(model|last)\.safetensors: File too large"):
            finetune(small(digits, "full", **EVERYTHING), dataset, tmp_path, watch=Watch(on_step=fill_disk))
    finally:
        file_limit(-1)
    assert not [path for path in (tmp_path / "full").rglob("*") if ".part" in path.name]
    epochs: list[Epoch] = []
    resumed = resume(tmp_path / "full", watch=Watch(on_epoch=epochs.append))
    assert [epoch.epoch for epoch in epochs] == [4, 5]
    assert figures(resumed.history) == figures(whole.history)
    assert_same_run(whole.run, resumed.run)


@pytest.mark.usefixtures("cold_cache")
def test_runs_that_cannot_be_written_are_said_before_training(digits: Path, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    steps: list[Step] = []
    with pytest.raises(ArtifactError, match=r"cannot write .*file/runs/x: Not a directory"):
        finetune(
            small(digits, "x"), read_dataset(digits), tmp_path / "file" / "runs", watch=Watch(on_step=steps.append)
        )
    assert steps == []


@pytest.mark.usefixtures("cold_cache")
def test_a_loss_that_explodes_says_what_is_kept(digits: Path, tmp_path: Path) -> None:
    """The head's phase ends early here, so the epoch before the fourth is not the third."""
    settings = {"head_epochs": 3, "epochs": 3, "head_learning_rate": 1e-12, "learning_rate": 1e30, "patience": 1}
    recipe = small(digits, "nan", warmup_fraction=0.0, **settings)
    with pytest.raises(ConfigError, match=r"in epoch 4: lower train.learning_rate; the epochs up to 2 are kept"):
        finetune(recipe, read_dataset(digits), tmp_path)
    lines = (tmp_path / "nan" / "history.csv").read_text().splitlines()
    assert [line.split(",")[0] for line in lines] == ["epoch", "1", "2"]


class Greedy:
    """Asks for more memory than there is when it is to learn from more than `limit` rows: torch's own error."""

    def __init__(self, limit: int) -> None:
        self.limit = limit

    def __call__(self, module: torch.nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
        if module.training and len(inputs[0]) > self.limit:
            torch.empty(1 << 46)


def greedy(monkeypatch: pytest.MonkeyPatch, limit: int) -> None:
    """Makes the heads of networks greedy."""
    stage = sys.modules["edgekit.finetune"]
    start = stage._start  # type: ignore[attr-defined]

    def hungry(recipe: Recipe, class_names: tuple[str, ...]) -> torch.nn.Module:
        model: torch.nn.Module = start(recipe, class_names)
        tasks.TASKS[recipe.task].head(model).register_forward_pre_hook(Greedy(limit))
        return model

    monkeypatch.setattr(stage, "_start", hungry)


@pytest.mark.usefixtures("cold_cache")
def test_where_memory_is_short_batches_are_computed_in_parts(
    digits: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The head has no BatchNorm, so the weights are those of the whole."""
    dataset = read_dataset(digits)
    settings = {"epochs": 0, "head_epochs": 2, "mixup": 0.3, "class_balance": 0.5, "precision": "float32"}
    whole = finetune(small(digits, "whole", **settings), dataset, tmp_path)
    greedy(monkeypatch, 10)
    notes: list[str] = []
    parts = finetune(small(digits, "parts", **settings), dataset, tmp_path, watch=Watch(on_note=notes.append))
    told = [f"not enough memory: batches are computed in {count} parts from here on" for count in (2, 4)]
    assert notes == told
    one, other = load_file(whole.run / "model.safetensors"), load_file(parts.run / "model.safetensors")
    for key, value in one.items():
        torch.testing.assert_close(other[key], value, rtol=1e-3, atol=1e-4)
    assert parts.history[-1].train_loss == pytest.approx(whole.history[-1].train_loss, rel=1e-4)


@pytest.mark.usefixtures("cold_cache")
def test_where_memory_is_too_short_it_is_said(digits: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    greedy(monkeypatch, 1)
    with pytest.raises(SetupError, match="not enough memory even for two images at a time: make the images"):
        finetune(small(digits, "none"), read_dataset(digits), tmp_path)


@pytest.mark.parametrize(("count", "parts"), [(8, 2), (7, 2), (9, 4), (5, 4), (2, 8)])
def test_the_gradients_of_parts_are_those_of_the_whole(count: int, parts: int) -> None:
    """Parts never have a single image."""
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.BatchNorm2d(4), torch.nn.Flatten())
    model.append(torch.nn.Linear(4 * 16, 5)).eval()
    sizes: list[int] = []
    model.register_forward_pre_hook(lambda module, inputs: sizes.append(len(inputs[0])))
    fabric = Fabric(accelerator="cpu", devices=1)
    job = SimpleNamespace(fabric=fabric)
    images, labels = torch.randn(count, 3, 6, 6), np.arange(count) % 5
    loss = partial(tasks.TASKS["classify"].loss, recipe=digits_recipe(Path("x"), "x"))
    found = []
    for number in (1, parts):
        model.zero_grad()
        under_way = SimpleNamespace(forward=model, loss=loss, parts=number)
        others = np.roll(np.arange(count), 1)
        total = learner._backward(job, under_way, (images,), labels, others, 0.7)  # type: ignore[arg-type]
        found.append((float(total), [parameter.grad.clone() for parameter in model.parameters()]))  # type: ignore[union-attr]
    assert found[0][0] == pytest.approx(found[1][0], rel=1e-5)
    torch.testing.assert_close(found[0][1], found[1][1], rtol=1e-4, atol=1e-6)
    assert sizes[0] == count and sum(sizes[1:]) == count and min(sizes) >= 2


@pytest.mark.slow
def test_kill_9_at_random_moments(digits: Path, tmp_path: Path) -> None:
    """benchmarks/kill_resume.py: the weights of a run that was killed again and again are those of one that was not."""
    script = Path(__file__).parents[1] / "benchmarks" / "kill_resume.py"
    words = [digits, "--backbone", "mobilenetv3_small_050", "--no-pretrained", "--image-size", "64"]
    options = ["--runs", "1", "--kills", "3", "--work", tmp_path, "--json"]
    answer = subprocess.run(
        [sys.executable, str(script), *map(str, words + options)], capture_output=True, text=True, check=False
    )
    assert answer.returncode == 0, answer.stdout + answer.stderr
    rows = json.loads(answer.stdout)
    assert len(rows) == 3 and rows[-1]["identical"] is True, rows
