import csv
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import cv2
import numpy as np
import optuna
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from test_finetune import small

from edgekit import tuning
from edgekit.datasets import Dataset, read_dataset
from edgekit.errors import ArtifactError, ConfigError, DataError, Interrupted, SetupError
from edgekit.finetune import Finetuned, best_epoch, finetune, resume
from edgekit.jobs import Epoch, Step, Watch
from edgekit.recipe import Recipe, read_recipe, suggest, to_toml
from edgekit.tuning import Standing, Train, Tuned, tune
from edgekit.tuning_pictures import tuning_picture

OnEpoch = Callable[[tuning.Epoch], None]
TRIALS = 3


def real(dataset: Dataset, on_step: Callable[[Recipe, Step], None] = lambda recipe, step: None) -> Train:
    """Training as `edgekit finetune --tune` does it."""

    def train(recipe: Recipe, folder: Path, on_epoch: OnEpoch) -> Finetuned:
        return finetune(
            recipe, dataset, folder, watch=Watch(on_step=lambda step: on_step(recipe, step), on_epoch=on_epoch)
        )

    return train


def scripted(figures: Callable[[int, int], float], tried: list[Recipe]) -> Train:
    """Three epochs of a run with nothing in it. figures(how many ran before, epoch) → the validation metric, 0..1."""

    def train(recipe: Recipe, folder: Path, on_epoch: OnEpoch) -> Finetuned:
        number = len(tried)
        tried.append(recipe)
        run, history = folder / recipe.name, []
        run.mkdir(parents=True)
        (run / "recipe.toml").write_text(to_toml(recipe), encoding="utf-8")
        for epoch in (1, 2, 3):
            history.append(Epoch(epoch, "stages", 1e-3, 1.0, 1.0, "top-1", figures(number, epoch), 1.0, 1.0))
            on_epoch(history[-1])
        return Finetuned(run, best_epoch(history), tuple(history), stopped_early=False)

    return train


def files(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*")}


def figures(tuned: Tuned) -> list[object]:
    """All of the finished trials but their numbers and times."""
    return [(t.state, t.val_metric, t.val_loss, t.settings, t.changed) for t in tuned.trials if t.state != "failed"]


@pytest.fixture(scope="module")
def recipe(digits: Path) -> Recipe:
    return small(digits, "t", head_epochs=1, epochs=1)


@pytest.fixture(scope="module")
def dataset(digits: Path) -> Dataset:
    return read_dataset(digits)


@pytest.fixture(scope="module")
def tuned(recipe: Recipe, dataset: Dataset, tmp_path_factory: pytest.TempPathFactory) -> Tuned:
    """A whole study of real runs."""
    return tune(recipe, dataset, TRIALS, tmp_path_factory.mktemp("tuned"), real(dataset))


def test_a_study_leaves_a_folder_and_one_run(tuned: Tuned, recipe: Recipe) -> None:
    runs = tuned.folder.parent
    assert {path.name for path in runs.iterdir()} == {"t", "t-tune"} and tuned.run == runs / "t"
    assert files(tuned.folder) == {".lock", "study.db", "trials.csv", "trials.png", "recipe.toml"}
    first = tuned.trials[0]
    assert [(t.number, t.state, t.metric) for t in tuned.trials] == [(n, "complete", "top-1") for n in range(TRIALS)]
    assert first.changed == () and first.settings == {name: getattr(recipe.train, name) for name in first.settings}
    assert set(first.settings) == {
        *("learning_rate", "unfrozen_fraction", "layer_decay", "weight_decay"),
        *("ema_decay", "label_smoothing", "mixup"),
    }
    assert all(trial.changed for trial in tuned.trials[1:])
    assert len({tuple(trial.settings.values()) for trial in tuned.trials}) == TRIALS
    assert tuned.best == max(tuned.trials, key=lambda t: (t.val_metric, -(t.val_loss or 0), -t.number))
    with (tuned.folder / "trials.csv").open(encoding="utf-8") as stream:
        rows = list(csv.DictReader(stream))
    for row, trial in zip(rows, tuned.trials, strict=True):
        numbers = {name: float(row[name]) for name in (*trial.settings, "val_metric", "val_loss", "seconds")}
        assert numbers == {
            **trial.settings,
            "val_metric": trial.val_metric,
            "val_loss": trial.val_loss,
            "seconds": trial.seconds,
        }
        assert (row["number"], row["state"], row["metric"], row["reason"]) == (
            str(trial.number),
            "complete",
            "top-1",
            "",
        )
    picture = cv2.imdecode(np.frombuffer((tuned.folder / "trials.png").read_bytes(), np.uint8), cv2.IMREAD_COLOR)
    assert picture.shape[0] > 800 and picture.shape[1] > 1200


def test_optunas_own_tools_open_the_study(tuned: Tuned) -> None:
    storage = optuna.storages.RDBStorage(f"sqlite:///{tuned.folder / 'study.db'}")
    study = optuna.load_study(study_name="t-tune", storage=storage)
    assert [trial.value for trial in study.trials] == [trial.val_metric for trial in tuned.trials]
    assert [sorted(trial.intermediate_values) for trial in study.trials] == [[1, 2]] * TRIALS
    storage.remove_session()
    storage.engine.dispose()


def test_the_best_run_is_a_run_like_any_other_and_can_be_repeated(
    tuned: Tuned, recipe: Recipe, dataset: Dataset, tmp_path: Path
) -> None:
    assert {"recipe.toml", "spec.json", "split.csv", "check", "history.csv", "model.safetensors", "state"} == {
        path.name for path in tuned.run.iterdir()
    }
    kept = read_recipe(tuned.run / "recipe.toml")
    assert kept == tuned.recipe.model_copy(update={"name": "t"})
    assert read_recipe(tuned.folder / "recipe.toml") == tuned.recipe
    assert {name for name in tuned.best.settings if getattr(kept.train, name) != getattr(recipe.train, name)} == set(
        tuned.best.changed
    )
    done = resume(tuned.run)
    assert (done.best.val_metric, done.best.val_loss) == (tuned.best.val_metric, tuned.best.val_loss)
    again = finetune(tuned.recipe, dataset, tmp_path)
    assert (again.best.val_metric, again.best.val_loss) == (tuned.best.val_metric, tuned.best.val_loss)
    one, other = load_file(tuned.run / "model.safetensors"), load_file(again.run / "model.safetensors")
    assert all((one[key] == other[key]).all() for key in one)


def test_an_interrupted_study_goes_on_as_one_that_was_not(
    tuned: Tuned, recipe: Recipe, dataset: Dataset, tmp_path: Path
) -> None:
    def stop(candidate: Recipe, step: Step) -> None:
        if (candidate.name, step.epoch, step.step) == ("trial-1", 2, 1):
            raise KeyboardInterrupt

    said: list[Standing] = []
    with pytest.raises(Interrupted, match=r"1 of 3 trials are kept in .*t-tune; the same command goes on.*--tune 1"):
        tune(recipe, dataset, TRIALS, tmp_path, real(dataset, stop), on_trial=said.append)
    assert files(tmp_path / "t-tune" / "trials") >= {"trial-0", "trial-0/model.safetensors"}
    assert {path.name for path in (tmp_path / "t-tune" / "trials").iterdir()} == {"trial-0"}
    done = tune(recipe, dataset, TRIALS, tmp_path, real(dataset), on_trial=said.append)
    assert [trial.state for trial in done.trials] == ["complete", "failed", "complete", "complete"]
    assert figures(done) == figures(tuned)
    assert [(s.trial.number, s.finished, s.trials) for s in said] == [(0, 1, 3), (2, 2, 3), (3, 3, 3)]
    assert said[-1].best == done.best


@pytest.mark.slow
def test_kill_9_in_a_trial_leaves_a_study_that_goes_on(
    tuned: Tuned, recipe: Recipe, dataset: Dataset, digits: Path, tmp_path: Path
) -> None:
    script = (
        "import sys, time\nfrom pathlib import Path\nfrom edgekit.datasets import read_dataset\n"
        "from edgekit.tuning import tune\nfrom test_finetune import small\nfrom test_tuning import real\n"
        f"digits = Path({str(digits)!r})\n"
        "dataset = read_dataset(digits)\n"
        "def hang(recipe, step):\n"
        "    if (recipe.name, step.epoch) == ('trial-1', 2):\n"
        "        print('there', flush=True)\n"
        "        time.sleep(600)\n"
        f"tune(small(digits, 't', head_epochs=1, epochs=1), dataset, {TRIALS}, Path({str(tmp_path)!r}), "
        "real(dataset, hang))\n"
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(Path(__file__).parent), *sys.path])}
    child = subprocess.Popen([sys.executable, "-c", script], env=environment, stdout=subprocess.PIPE, text=True)
    assert child.stdout is not None
    try:
        assert child.stdout.readline() == "there\n"
        with pytest.raises(ArtifactError, match=r"another process is tuning .*t-tune"):
            tune(recipe, dataset, TRIALS, tmp_path, real(dataset))
    finally:
        child.send_signal(signal.SIGKILL)
        child.wait()
        child.stdout.close()
    assert (tmp_path / "t-tune" / "trials" / "trial-1").is_dir()
    assert (tmp_path / "t-tune" / "trials.png").is_file()
    done = tune(recipe, dataset, TRIALS, tmp_path, real(dataset))
    assert [trial.state for trial in done.trials] == ["complete", "failed", "complete", "complete"]
    assert done.trials[1].seconds is None and done.trials[1].settings == done.trials[2].settings
    assert figures(done) == figures(tuned)
    assert files(done.folder) == {".lock", "study.db", "trials.csv", "trials.png", "recipe.toml"}


def test_a_finished_study_trains_nothing_and_a_larger_one_goes_on(
    recipe: Recipe, dataset: Dataset, tmp_path: Path
) -> None:
    tried: list[Recipe] = []
    train = scripted(lambda number, epoch: [0.5, 0.8, 0.6, 0.7, 0.9][number], tried)
    one = tune(recipe, dataset, 3, tmp_path, train)
    assert (one.best.number, one.run) == (1, tmp_path / "t")
    same = tune(recipe, dataset, 3, tmp_path, train)
    fewer = tune(recipe, dataset, 1, tmp_path, train)
    assert one == same == fewer and len(tried) == 3
    more = tune(recipe, dataset, 4, tmp_path, train)
    assert (more.best.number, more.run, len(tried)) == (1, tmp_path / "t", 4)
    better = tune(recipe, dataset, 5, tmp_path, train)
    assert (better.best.number, better.run) == (4, tmp_path / "t-2")
    assert read_recipe(tmp_path / "t-2" / "recipe.toml").name == "t-2"
    assert read_recipe(tmp_path / "t" / "recipe.toml").name == "t", "the first study's run is the user's now"
    (tmp_path / "t-2").rename(tmp_path / "elsewhere")
    with pytest.raises(ArtifactError, match=r"the best trial \(4\) is gone: .*--recipe .*t-tune/recipe.toml"):
        tune(recipe, dataset, 5, tmp_path, train)


def test_equal_metrics_are_told_apart_by_the_loss_then_by_the_order(
    recipe: Recipe, dataset: Dataset, tmp_path: Path
) -> None:
    tried: list[Recipe] = []
    plain = scripted(lambda number, epoch: 0.5, tried)
    losses = [1.0, 0.8, 0.8, 0.9]

    def train(candidate: Recipe, folder: Path, on_epoch: OnEpoch) -> Finetuned:
        done = plain(candidate, folder, on_epoch)
        assert isinstance(done, Finetuned)
        return replace(done, best=replace(done.best, val_loss=losses[len(tried) - 1]))

    assert tune(recipe, dataset, 4, tmp_path, train).best.number == 1


def test_a_hopeless_trial_is_given_up_and_counts(recipe: Recipe, dataset: Dataset, tmp_path: Path) -> None:
    """After four whole ones, from the third epoch but one on: below the median of what they had then."""
    longer = recipe.model_copy(update={"train": recipe.train.model_copy(update={"epochs": 3})})
    tried: list[Recipe] = []
    reached: list[tuple[int, int]] = []

    def figure(number: int, epoch: int) -> float:
        reached.append((number, epoch))
        return 0.1 if number in (2, 4) else 0.5 + 0.01 * epoch

    done = tune(longer, dataset, 6, tmp_path, scripted(figure, tried))
    assert [trial.state for trial in done.trials] == ["complete"] * 4 + ["pruned", "complete"]
    assert [epoch for number, epoch in reached if number == 4] == [1, 2]
    assert (done.trials[4].val_metric, done.trials[4].val_loss, done.trials[4].reason) == (0.1, None, "")
    assert {path.name for path in tmp_path.iterdir()} == {"t", "t-tune"} and done.best.number == 0


def test_a_real_run_that_is_given_up_leaves_nothing(recipe: Recipe, dataset: Dataset, tmp_path: Path) -> None:
    def train(candidate: Recipe, folder: Path, on_epoch: OnEpoch) -> Finetuned:
        def give_up(epoch: tuning.Epoch) -> None:
            on_epoch(epoch)
            if candidate.name == "trial-1":
                raise optuna.TrialPruned

        return finetune(candidate, dataset, folder, watch=Watch(on_epoch=give_up))

    done = tune(recipe, dataset, 2, tmp_path, train)
    assert [trial.state for trial in done.trials] == ["complete", "pruned"] and done.best.number == 0
    assert {path.name for path in tmp_path.iterdir()} == {"t", "t-tune"}
    assert files(done.folder) == {".lock", "study.db", "trials.csv", "trials.png", "recipe.toml"}


def test_settings_that_cannot_be_trained_with_end_a_trial_not_the_search(
    recipe: Recipe, dataset: Dataset, tmp_path: Path
) -> None:
    tried: list[Recipe] = []

    def figure(number: int, epoch: int) -> float:
        if number == 1:
            raise ConfigError("the loss is no longer finite in epoch 1")
        if number == 2 and epoch == 2:
            raise RuntimeError("out of memory:\ntried 3 GB")
        return 0.5

    done = tune(recipe, dataset, 4, tmp_path, scripted(figure, tried))
    assert [(t.state, t.val_metric, t.reason) for t in done.trials] == [
        ("complete", 0.5, ""),
        ("pruned", None, "the loss is no longer finite in epoch 1"),
        ("pruned", 0.5, "out of memory: tried 3 GB"),
        ("complete", 0.5, ""),
    ]
    assert {path.name for path in tmp_path.iterdir()} == {"t", "t-tune"}


@pytest.mark.parametrize("kind", [ConfigError, DataError, RuntimeError])
def test_where_the_recipe_itself_cannot_be_trained_the_search_ends(
    kind: type[Exception], recipe: Recipe, dataset: Dataset, tmp_path: Path
) -> None:
    def fail(*_: object) -> Finetuned:
        raise kind("as it is")

    with pytest.raises(kind, match="as it is"):
        tune(recipe, dataset, 2, tmp_path, fail)
    done = tune(recipe, dataset, 2, tmp_path, scripted(lambda number, epoch: 0.5, []))
    assert [(t.state, t.changed == ()) for t in done.trials] == [
        ("failed", True),
        ("complete", True),
        ("complete", False),
    ]


def test_what_cannot_be_searched_or_continued(
    recipe: Recipe, dataset: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    train = scripted(lambda number, epoch: 0.5, [])
    (tmp_path / "t").mkdir()
    with pytest.raises(ArtifactError, match=r"t exists already, and is of no study: choose another --name"):
        tune(recipe, dataset, 1, tmp_path, train)
    (tmp_path / "t").rmdir()
    tune(recipe, dataset, 1, tmp_path, train)
    other = recipe.model_copy(update={"train": recipe.train.model_copy(update={"epochs": 3, "views": 2})})
    with pytest.raises(ArtifactError, match=r"another recipe \(train.epochs 1, now 3, train.views 4, now 2\): choose"):
        tune(other, dataset, 2, tmp_path, train)
    with pytest.raises(ArtifactError, match=r"t-tune is a study of other images: choose another --name"):
        tune(recipe, replace(dataset, val=dataset.val[1:]), 2, tmp_path, train)
    with monkeypatch.context() as changed:
        changed.setattr(tuning, "_choices", lambda own, *others, largest=1.0: (own,))
        with pytest.raises(ArtifactError, match="another version of edgekit"):
            tune(recipe, dataset, 2, tmp_path, train)
    with pytest.raises(ConfigError, match=r"for float training: .*--qat RUN"):
        qat = recipe.model_copy(update={"train": recipe.train.model_copy(update={"qat": True})})
        tune(qat, dataset, 2, tmp_path, train)
    (tmp_path / "t-tune" / "study.db").write_bytes(b"no database" * 100)
    with pytest.raises(ArtifactError, match=r"study.db is damaged \(.*\): move .*t-tune away"):
        tune(recipe, dataset, 2, tmp_path, train)
    (tmp_path / "file").write_text("")
    with pytest.raises(ArtifactError, match="cannot write"):
        tune(recipe, dataset, 2, tmp_path / "file", train)


def test_without_optuna(recipe: Recipe, dataset: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "optuna", None)
    with pytest.raises(SetupError, match=r"pip install edgekit\[tune\]"):
        tune(recipe, dataset, 1, tmp_path, scripted(lambda number, epoch: 0.5, []))
    assert not list(tmp_path.iterdir())


def test_optuna_is_as_loud_as_it_was(recipe: Recipe, dataset: Dataset, tmp_path: Path) -> None:
    before = optuna.logging.get_verbosity()
    tune(recipe, dataset, 1, tmp_path, scripted(lambda number, epoch: 0.5, []))
    assert optuna.logging.get_verbosity() == before


shares = st.floats(0.0, 1.0)


@settings(deadline=None)
@given(
    task=st.sampled_from(["classify", "detect", "segment"]),
    train=st.fixed_dictionaries(
        {
            "epochs": st.integers(0, 3),
            "unfrozen_fraction": shares,
            "learning_rate": st.floats(1e-6, 1.0),
            "weight_decay": st.floats(0.0, 1.0),
            "layer_decay": st.floats(0.01, 1.0),
            "label_smoothing": st.floats(0.0, 0.99),
            "mixup": st.floats(0.0, 5.0),
            "ema_decay": st.floats(0.0, 0.9999),
        }
    ),
    seed=st.integers(0, 2**40),
)
@example(  # a tenth of which is 0
    task="classify",
    train={
        "epochs": 0,
        "unfrozen_fraction": 0.0,
        "learning_rate": 1.0,
        "weight_decay": 5e-324,
        "layer_decay": 1.0,
        "label_smoothing": 0.0,
        "mixup": 0.0,
        "ema_decay": 0.0,
    },
    seed=0,
)
def test_every_choice_is_a_valid_recipe_and_the_recipes_own_is_one(
    task: str, train: dict[str, float], seed: int
) -> None:
    base = suggest("x", (), task)  # type: ignore[arg-type]
    recipe = base.model_copy(update={"train": base.train.model_copy(update={**train, "seed": seed})})
    space = tuning._space(recipe)
    for name, values in space.items():
        own = getattr(recipe.train, name)
        assert values.to_external_repr(values.to_internal_repr(own)) == own and values._contains(
            values.to_internal_repr(own)
        )
    assert ("mixup" in space, "label_smoothing" in space) == (task == "classify", task == "classify")
    assert ("learning_rate" in space, "head_learning_rate" in space) == (train["epochs"] > 0, train["epochs"] == 0)
    study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=seed % 2**32))
    study.enqueue_trial({name: getattr(recipe.train, name) for name in space})
    found = [tuning._with_settings(recipe, tuning._settings(recipe, study.ask(space).params)) for _ in range(3)]
    assert found[0] == recipe.model_copy(update={"name": ""})
    for candidate in found:
        assert Recipe.model_validate(candidate.model_dump(mode="json")) == candidate


def test_the_picture_shows_any_mixture_of_trials() -> None:
    """One trial, a trial without a figure, a setting that never changes, a rate over decades."""
    one = {
        "number": 0,
        "state": "complete",
        "metric": "mean IoU",
        "val_metric": 0.5,
        "settings": {"learning_rate": 1e-3, "ema_decay": 0.0},
    }
    failed = {**one, "number": 1, "state": "failed", "metric": "", "val_metric": None}
    pruned = {
        **one,
        "number": 2,
        "state": "pruned",
        "val_metric": 0.1,
        "settings": {"learning_rate": 1e-1, "ema_decay": 0.9},
    }
    pictures = [tuning_picture(trials, 0) for trials in ([one], [one, failed], [one, failed, pruned])]
    assert all(picture.startswith(b"\x89PNG") for picture in pictures) and pictures[0] == pictures[1] != pictures[2]


@pytest.mark.slow
def test_from_the_command_line(digits: Path, tmp_path: Path) -> None:
    command = [
        *(sys.executable, "-m", "edgekit.cli", "finetune", str(digits), "--tune", "2", "--json", "--epochs", "1"),
        *("--backbone", "mobilenetv3_small_050", "--no-pretrained", "--image-size", "64"),
    ]
    outputs = [subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True) for _ in range(2)]
    name = "digits-mobilenetv3_small_050"
    answers = [json.loads(output.stdout) for output in outputs]
    assert answers[0] == answers[1] and set(answers[0]) == {"run", "best", "epochs"}
    assert answers[0]["run"] == f"runs/{name}" and answers[0]["epochs"] == 1
    lines = outputs[0].stderr.splitlines()
    assert [line.split()[:2] for line in lines if line.startswith("trial")] == [["trial", "0"], ["trial", "1"]]
    assert "the recipe as it is" in outputs[0].stderr and "learning_rate" in outputs[0].stderr
    assert "optimistic" in outputs[0].stderr and "trial" not in outputs[1].stderr.split(":")[0]
    for word in ("optuna", "Warning", "alembic", "[I "):
        assert word not in outputs[0].stderr + outputs[1].stderr
