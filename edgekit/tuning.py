"""Searches a recipe's training settings with Optuna: many runs of one recipe, of which the best is kept.

runs/NAME-tune holds the study, as Optuna's own tools open it, and a table, a picture and the best recipe for people;
the best run itself becomes runs/NAME. The first trial is the recipe as it is, so that the search ends no worse. What a
trial tries depends on the seed and on the trials that finished before it alone, so that a study that is interrupted and
continued tries what an uninterrupted one does.
"""

from __future__ import annotations

import csv
import io
import math
import shutil
import sqlite3
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from edgekit.artifacts import RunFolder, unused_name, write_bytes, write_text
from edgekit.datasets import Dataset
from edgekit.errors import ArtifactError, ConfigError, Interrupted, SetupError
from edgekit.recipe import Recipe, to_toml
from edgekit.tuning_pictures import tuning_picture

if TYPE_CHECKING:
    import optuna

RANDOM_TRIALS = 6  # before the sampler has enough to go by; the recipe's own is one of them
UNPRUNED_TRIALS = 4  # whose median says what is too bad to go on with
LOCK, TRIALS = ".lock", "trials"
STATES = {"COMPLETE": "complete", "PRUNED": "pruned", "FAIL": "failed"}


class Epoch(Protocol):
    """What a search needs to know of an epoch; finetune.Epoch has it."""

    @property
    def epoch(self) -> int:
        """From 1."""

    @property
    def metric(self) -> str:
        """What val_metric is: "top-1", "mAP@0.5" or "mean IoU"."""

    @property
    def val_metric(self) -> float:
        """0..1."""

    @property
    def val_loss(self) -> float:
        """Lower is better; it decides between equal metrics."""


class Trained(Protocol):
    """A finished run; finetune.Finetuned has this."""

    @property
    def best(self) -> Epoch:
        """The epoch whose weights are kept."""


LEAST_DECAY = 1e-9  # of the weights, that is searched around: less is as good as none

# (recipe, folder, on_epoch) → the run folder/recipe.name, trained. What on_epoch raises, it lets through.
Train = Callable[[Recipe, Path, Callable[[Epoch], None]], Trained]


@dataclass(frozen=True)
class Trial:
    """A row of trials.csv."""

    number: int  # from 0, in the order of their start
    state: str  # "complete", "pruned" (given up: worse than most, or it could not be trained) or "failed" (broken off)
    metric: str  # "" where no epoch ended
    val_metric: float | None  # 0..1, the best epoch's; of a pruned trial the best until then
    val_loss: float | None  # the best epoch's
    seconds: float | None  # of a failed trial None: a process that is killed does not say when
    settings: Mapping[str, float]  # of [train], by name: all that are searched
    changed: tuple[str, ...]  # those of them that differ from the recipe's
    reason: str  # why it could not be trained, or ""


@dataclass(frozen=True)
class Standing:
    """A trial is done, for a progress display."""

    trial: Trial
    best: Trial  # so far
    finished: int  # trials, this one too
    trials: int


@dataclass(frozen=True)
class Tuned:
    """What a search came to."""

    folder: Path  # runs/NAME-tune
    run: Path  # the best trial's, runs/NAME
    recipe: Recipe  # the best one, without a name
    best: Trial
    trials: tuple[Trial, ...]  # failed ones too


def tune(
    recipe: Recipe,
    dataset: Dataset,
    trials: int,
    runs: Path,
    train: Train,
    *,
    on_trial: Callable[[Standing], None] = lambda standing: None,
) -> Tuned:
    """Trains the recipe with `trials` choices of settings, the recipe's own first, and keeps the best run.

    NAME is recipe.name, or made from the data's and the backbone's names. A study that is there already is continued:
    its finished trials count. Best is the highest validation metric, then the lowest validation loss, then the first.
    Raises SetupError without Optuna; ConfigError where there is nothing to search; ArtifactError where the study is of
    another recipe or other images, is damaged, or is in use; Interrupted after Ctrl-C; what `train` raises.
    """
    _need_optuna()
    if recipe.train.qat:
        raise ConfigError("a search is for float training: tune that, then use `edgekit finetune --qat RUN`")
    name = recipe.name or f"{dataset.root.name}-{recipe.model.backbone.replace(':', '-')}"
    folder = runs / f"{name}-tune"
    if recipe.name and (runs / name).exists() and not _file(folder).exists():
        raise ArtifactError(f"{runs / name} exists already, and is of no study: choose another --name")
    with _alone(folder), _opened(folder, recipe) as study:
        _claim(folder, study, recipe, dataset)
        _fail_unfinished(study)
        _remove_runs(folder, study)
        try:
            while len(_finished(study)) < trials:
                number = _try(folder, study, recipe, train)
                rows = _write(folder, study, recipe)
                on_trial(Standing(rows[number], rows[_best(study).number], len(_finished(study)), trials))
        except (KeyboardInterrupt, Interrupted):
            _remove_runs(folder, study)
            raise Interrupted(_farewell(folder, len(_finished(study)), trials)) from None
        run, rows = _keep_best(folder, study, runs, name), _write(folder, study, recipe)
        best = rows[_best(study).number]
        return Tuned(folder, run, _with_settings(recipe, best.settings), best, rows)


def _need_optuna() -> None:
    try:
        import optuna  # noqa: F401 - others import it where they need it
    except ImportError:
        raise SetupError("--tune searches with Optuna: install it with `pip install edgekit[tune]`") from None


def _farewell(folder: Path, finished: int, trials: int) -> str:
    words = f"interrupted: {finished} of {trials} trials are kept in {folder}; the same command goes on with them"
    return f"{words} (with --tune {finished}: ends with the best of them)" if finished else words


# The study ------------------------------------------------------------------------------------------------------


def _file(folder: Path) -> Path:
    return folder / "study.db"


@contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """Keeps other processes out, as two would take each other's trial for a dead one's.

    SQLite's lock works everywhere, and ends with the process however that ends.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = sqlite3.connect(folder / LOCK, timeout=0, isolation_level=None)
    except (OSError, sqlite3.Error) as error:
        raise ArtifactError(f"cannot write {folder}: {error}") from None
    try:
        try:
            lock.execute("BEGIN EXCLUSIVE")
        except sqlite3.Error as error:
            raise ArtifactError(f"another process is tuning {folder} ({error}): wait for it, or stop it") from None
        yield
    finally:
        lock.close()


@contextmanager
def _opened(folder: Path, recipe: Recipe) -> Iterator[optuna.Study]:
    """The folder's study, a new one where there is none; Optuna's remarks are kept off the terminal."""
    import optuna
    from sqlalchemy.exc import SQLAlchemyError

    verbosity = optuna.logging.get_verbosity()
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    storage = None
    try:
        try:
            storage = optuna.storages.RDBStorage(f"sqlite:///{_file(folder)}")
            study = optuna.create_study(
                study_name=folder.name,
                storage=storage,
                direction="maximize",
                load_if_exists=True,
                pruner=optuna.pruners.MedianPruner(UNPRUNED_TRIALS, _unpruned_epochs(recipe)),
            )
        except (optuna.exceptions.OptunaError, SQLAlchemyError, RuntimeError) as error:
            reason = str(error).splitlines()[0]
            raise ArtifactError(f"{_file(folder)} is damaged ({reason}): move {folder} away to search anew") from None
        yield study
    finally:
        optuna.logging.set_verbosity(verbosity)
        if storage is not None:
            storage.remove_session()
            storage.engine.dispose()


def _unpruned_epochs(recipe: Recipe) -> int:
    """The head's epochs and a third of the others: before, a high learning rate looks worse than it will be."""
    train = recipe.train
    return train.head_epochs + math.ceil(train.epochs / 3) if train.epochs else math.ceil(train.head_epochs / 3)


def _claim(folder: Path, study: optuna.Study, recipe: Recipe, dataset: Dataset) -> None:
    """Writes down what the study is about; of another one its figures could not be compared. Raises ArtifactError."""
    from optuna.distributions import distribution_to_json

    values = recipe.model_copy(update={"name": ""}).model_dump(mode="json")
    space = {name: distribution_to_json(values) for name, values in _space(recipe).items()}
    about = {"recipe": values, "images": dataset.sha256, "space": space}
    known = study.user_attrs.get("about")
    if known is None:
        study.set_user_attr("about", about)
    elif known != about:
        differs = {
            "recipe": f"another recipe ({_changes(known['recipe'], values)})",
            "images": "other images",
            "space": "another version of edgekit, with other choices",
        }
        reason = next(differs[what] for what in about if known[what] != about[what])
        raise ArtifactError(f"{folder} is a study of {reason}: choose another --name")


def _changes(old: Mapping[str, Any], new: Mapping[str, Any]) -> str:
    """Two recipes' values → "train.epochs 6, now 3"."""
    flat_old, flat_new = _flat(old), _flat(new)
    names = [name for name in flat_new if flat_old.get(name) != flat_new[name]]
    return ", ".join(f"{name} {flat_old.get(name)}, now {flat_new[name]}" for name in names)


def _flat(values: Mapping[str, Any]) -> dict[str, Any]:
    return {
        f"{section}.{name}" if name else section: value
        for section, part in values.items()
        for name, value in (part.items() if isinstance(part, Mapping) else [("", part)])
    }


def _fail_unfinished(study: optuna.Study) -> None:
    """A trial that runs while this process holds the study was left by one that was killed."""
    from optuna.trial import TrialState

    for trial in study.get_trials(deepcopy=False, states=(TrialState.RUNNING,)):
        study.tell(trial.number, state=TrialState.FAIL)


def _finished(study: optuna.Study) -> list[optuna.trial.FrozenTrial]:
    from optuna.trial import TrialState

    return study.get_trials(deepcopy=False, states=(TrialState.COMPLETE, TrialState.PRUNED))


def _best(study: optuna.Study) -> optuna.trial.FrozenTrial:
    """The first trial is never pruned, so that there is one as soon as a trial has finished."""
    from optuna.trial import TrialState

    complete = study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,))
    return max(complete, key=lambda trial: (trial.value, -trial.user_attrs["val_loss"], -trial.number))


# What is tried --------------------------------------------------------------------------------------------------


def _space(recipe: Recipe) -> dict[str, optuna.distributions.BaseDistribution]:
    """What is searched of [train]: settings that the task and the recipe obey, around the recipe's own."""
    from optuna.distributions import CategoricalDistribution, FloatDistribution

    train = recipe.train
    space: dict[str, Any] = {}
    if train.epochs:
        space["learning_rate"] = FloatDistribution(0.3 * train.learning_rate, 3 * train.learning_rate, log=True)
        share = train.unfrozen_fraction
        space["unfrozen_fraction"] = CategoricalDistribution(_choices(share, *(share * x for x in (0.5, 1.5, 2.0))))
        space["layer_decay"] = FloatDistribution(min(0.6, train.layer_decay), 1.0)
    else:  # the head alone learns
        rate = train.head_learning_rate
        space["head_learning_rate"] = FloatDistribution(0.3 * rate, 3 * rate, log=True)
    if train.weight_decay > LEAST_DECAY:  # there is no way from 0 on a logarithmic scale
        space["weight_decay"] = FloatDistribution(0.1 * train.weight_decay, 3 * train.weight_decay, log=True)
    space["ema_decay"] = CategoricalDistribution(_choices(train.ema_decay, 0.0, 0.9, 0.97, 0.99, 0.995))
    if recipe.task == "classify":
        space["label_smoothing"] = FloatDistribution(0.0, max(0.2, train.label_smoothing))
        space["mixup"] = CategoricalDistribution(_choices(train.mixup, 0.0, 0.1, 0.2, 0.4, largest=math.inf))
    return space


def _choices(own: float, *others: float, largest: float = 1.0) -> tuple[float, ...]:
    """The recipe's own value, as it is, and the others, at most `largest`, in order."""
    return tuple(sorted({own, *(min(_rounded(value), largest) for value in others)}))


def _rounded(value: float) -> float:
    """To three digits, so that people can read and repeat it."""
    return float(f"{value:.3g}")


def _settings(recipe: Recipe, params: Mapping[str, float]) -> dict[str, float]:
    """What the sampler chose → what is trained with: the recipe's own values as they are, others rounded."""
    own = recipe.train.model_dump()
    return {name: value if value == own[name] else _rounded(value) for name, value in params.items()}


def _with_settings(recipe: Recipe, settings: Mapping[str, float], name: str = "") -> Recipe:
    return recipe.model_copy(update={"name": name, "train": recipe.train.model_copy(update=dict(settings))})


def _try(folder: Path, study: optuna.Study, recipe: Recipe, train: Train) -> int:
    """Trains one more trial and → its number. Its run stays where it is the best so far."""
    import optuna
    from optuna.trial import TrialState

    trial = _ask(study, recipe)
    candidate = _with_settings(recipe, _settings(recipe, trial.params), _run_name(trial.number))
    last = recipe.train.head_epochs + recipe.train.epochs

    def on_epoch(epoch: Epoch) -> None:
        trial.report(epoch.val_metric, epoch.epoch)
        trial.set_user_attr("metric", epoch.metric)
        if epoch.epoch < last and trial.should_prune():
            raise optuna.TrialPruned

    try:
        best = train(candidate, folder / TRIALS, on_epoch).best
        trial.set_user_attr("val_loss", best.val_loss)
        study.tell(trial, best.val_metric)
    except optuna.TrialPruned:
        study.tell(trial, state=TrialState.PRUNED)
    except (ConfigError, RuntimeError) as error:  # a loss that explodes, memory that is too small
        if not _finished(study):
            study.tell(trial, state=TrialState.FAIL)
            raise  # the recipe's own settings
        trial.set_user_attr("reason", " ".join(str(error).split()))
        study.tell(trial, state=TrialState.PRUNED)
    except BaseException:
        study.tell(trial, state=TrialState.FAIL, skip_if_finished=True)
        raise
    _remove_runs(folder, study)
    return trial.number


def _ask(study: optuna.Study, recipe: Recipe) -> optuna.Trial:
    import optuna
    from optuna.trial import TrialState

    space, finished = _space(recipe), len(_finished(study))
    # A sampler of its own for each trial: one that went on would start over in a continued study
    seed = (recipe.train.seed * 100_003 + finished) % 2**32
    study.sampler = optuna.samplers.TPESampler(seed=seed, n_startup_trials=RANDOM_TRIALS)
    if not finished and not study.get_trials(deepcopy=False, states=(TrialState.WAITING,)):
        study.enqueue_trial({name: getattr(recipe.train, name) for name in space})
    return study.ask(space)


# The folder -----------------------------------------------------------------------------------------------------


def _run_name(number: int) -> str:
    return f"trial-{number}"


def _remove_runs(folder: Path, study: optuna.Study) -> None:
    """Removes the trials' runs, and what is left of half-made ones, but for the best trial's."""
    kept = _run_name(_best(study).number) if _finished(study) else ""
    for path in (folder / TRIALS).glob("*"):
        if path.name != kept:
            shutil.rmtree(path, ignore_errors=True)


def _keep_best(folder: Path, study: optuna.Study, runs: Path, name: str) -> Path:
    """Makes the best trial's run a run like any other, once; → where it is. Raises ArtifactError where it is gone."""
    number = _best(study).number
    source = RunFolder(folder / TRIALS / _run_name(number))
    if source.path.is_dir():
        run = unused_name(runs, name)
        write_text(source.recipe, to_toml(source.read_recipe().model_copy(update={"name": run.name})))
        study.set_user_attr("kept", {"trial": number, "run": run.name})
        source.path.rename(run)
        source.path.parent.rmdir()
        return run
    kept = study.user_attrs.get("kept", {"trial": None, "run": ""})
    run = runs / str(kept["run"])
    if kept["trial"] == number and run.is_dir():
        return run
    raise ArtifactError(
        f"the run of the best trial ({number}) is gone: make it again with "
        f"`edgekit finetune --recipe {folder / 'recipe.toml'}`"
    )


def _write(folder: Path, study: optuna.Study, recipe: Recipe) -> tuple[Trial, ...]:
    """Writes trials.csv, recipe.toml and trials.png; → the trials, by number."""
    rows = tuple(_row(trial, recipe) for trial in study.get_trials(deepcopy=False))
    best = rows[_best(study).number]
    write_text(folder / "trials.csv", _trials_csv(rows, list(_space(recipe))))
    write_text(folder / "recipe.toml", to_toml(_with_settings(recipe, best.settings)))
    write_bytes(folder / "trials.png", tuning_picture([vars(row) for row in rows], best.number))
    return rows


def _row(trial: optuna.trial.FrozenTrial, recipe: Recipe) -> Trial:
    settings, reached = _settings(recipe, trial.params), trial.intermediate_values.values()
    return Trial(
        number=trial.number,
        state=STATES[trial.state.name],
        metric=trial.user_attrs.get("metric", ""),
        val_metric=max(reached, default=None),
        val_loss=trial.user_attrs.get("val_loss"),
        seconds=trial.duration.total_seconds() if trial.duration and trial.state.name != "FAIL" else None,
        settings=settings,
        changed=tuple(name for name, value in settings.items() if value != getattr(recipe.train, name)),
        reason=trial.user_attrs.get("reason", ""),
    )


def _trials_csv(rows: Sequence[Trial], settings: Sequence[str]) -> str:
    stream = io.StringIO()
    writer = csv.writer(stream, lineterminator="\n")
    writer.writerow(["number", "state", "metric", "val_metric", "val_loss", "seconds", *settings, "reason"])
    for row in rows:
        values = [row.settings.get(name) for name in settings]
        writer.writerow(
            [row.number, row.state, row.metric, row.val_metric, row.val_loss, row.seconds, *values, row.reason]
        )
    return stream.getvalue()
