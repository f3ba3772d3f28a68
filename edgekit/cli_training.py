"""The commands that train: init, finetune. (cli.py has the rest, and says how commands are written.)"""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, cast

import typer

from edgekit.errors import UsageError
from edgekit.terminal import AsJson, is_first_process, print_json

if TYPE_CHECKING:
    from collections.abc import Callable

    from edgekit.datasets import Dataset
    from edgekit.finetune import Finetuned
    from edgekit.jobs import Watch
    from edgekit.progress import Display
    from edgekit.recipe import Recipe, Task

LOADING = "loading torch"
DATA_HELP = (
    "Labelled images. classify: a folder a class, or a CSV (path,label); detect: Pascal VOC, COCO or YOLO; segment: "
    "images/ and masks/, or each mask beside its photo."
)
TUNE_HELP = (
    "Train N times with other settings, keep the best run; makes runs/NAME-tune too. Goes on with an earlier search."
)
Runs = Annotated[Path, typer.Option("--runs", help="Where run folders are.")]
DataPath = Annotated[str, typer.Argument(metavar="DATA", help=DATA_HELP)]
TaskName = Annotated[str, typer.Option("--task", help="classify, detect or segment. Default: as the data looks.")]
SkipBad = Annotated[bool, typer.Option("--skip-bad", help="Leave unreadable images out instead of stopping.")]


def init(
    data: DataPath,
    output: Annotated[Path, typer.Option("--output", "-o", help="The recipe to write.")] = Path("recipe.toml"),
    force: Annotated[bool, typer.Option("--force", help="Overwrite an existing recipe.")] = False,
    task: TaskName = "",
    skip_bad: SkipBad = False,
) -> None:
    """Look at a data folder and write a commented recipe.toml.

    Change it as you like and give it to finetune. Where the defaults suit, no recipe is needed.
    """
    from edgekit.artifacts import write_text
    from edgekit.datasets import guess_task
    from edgekit.recipe import suggest, to_toml

    if output.exists() and not force:
        raise UsageError(f"{output} exists already: choose another --output, or --force to overwrite it")
    chosen = task_of(task or guess_task(Path(data)))
    dataset = _read_data(suggest(data, (), chosen), skip_bad)
    write_text(output, to_toml(suggest(data, dataset.class_names, chosen)))
    typer.echo(f"wrote {output}. Next: edgekit finetune --recipe {output}")


def finetune(
    data: Annotated[str, typer.Argument(metavar="DATA", help=DATA_HELP)] = "",
    recipe: Annotated[Path | None, typer.Option(help="A recipe.toml, as init writes it.")] = None,
    resume: Annotated[Path | None, typer.Option(help="Continue this interrupted run.")] = None,
    qat: Annotated[
        Path | None,
        typer.Option(metavar="RUN", help="Train this finished run on with int8's rounding; makes runs/NAME-qat."),
    ] = None,
    task: TaskName = "",
    name: Annotated[str, typer.Option(help="Name of the run folder.")] = "",
    backbone: Annotated[str, typer.Option(help="See `edgekit backbones`.")] = "",
    weights: Annotated[Path | None, typer.Option(help="Start from this .safetensors or .pth file.")] = None,
    no_pretrained: Annotated[bool, typer.Option("--no-pretrained", help="Start from random weights.")] = False,
    preset: Annotated[str, typer.Option(help="fast, balanced (the default) or best.")] = "",
    time: Annotated[str, typer.Option(help="Train for about this long, such as 90s, 10m or 1h30m.")] = "",
    epochs: Annotated[int | None, typer.Option(min=0, help="Epochs for the last stages of the backbone.")] = None,
    batch_size: Annotated[int | None, typer.Option(min=2, help="Images a step.")] = None,
    learning_rate: Annotated[float | None, typer.Option(help="Peak learning rate.")] = None,
    image_size: Annotated[str, typer.Option(help="Network input in pixels: a side, or HEIGHTxWIDTH.")] = "",
    seed: Annotated[int | None, typer.Option(help="Of everything random.")] = None,
    device: Annotated[str, typer.Option(help="auto, cpu or cuda.")] = "",
    tensorboard: Annotated[
        bool, typer.Option("--tensorboard", help="Log for TensorBoard too, in runs/NAME/tensorboard.")
    ] = False,
    tune: Annotated[int | None, typer.Option(min=1, metavar="N", help=TUNE_HELP)] = None,
    opencv: Annotated[str, typer.Option(help="Refuse a backbone that these cannot run, such as 4.6,4.10.")] = "",
    runs: Runs = Path("runs"),
    skip_bad: SkipBad = False,
    as_json: AsJson = False,
) -> None:
    """Train on a folder of labelled images; makes runs/NAME.

    Defaults are good: just give DATA. The new head and the last stages of the pretrained backbone learn (to detect and
    to segment: two thirds of it, and for longer). What the frozen stages before them give is computed once for each
    image and a few augmented views of it, and kept in the cache. Ctrl-C keeps what was reached.

    Several processes, GPUs or machines: torchrun --nproc-per-node 2 -m edgekit finetune DATA

    Where int8 costs a run too much accuracy, --qat RUN trains it on for a few epochs while every layer computes with
    int8's rounding, so that the weights learn to bear it (quantization-aware training). The accuracy shown is then the
    rounded network's; only --epochs, --learning-rate, --batch-size, --seed, --device, --name and --runs go with it.
    """
    changes = {
        ("name",): name,
        ("data", "path"): data,
        ("model", "backbone"): backbone,
        ("model", "weights"): str(weights) if weights else "",
        ("model", "pretrained"): False if no_pretrained else None,
        ("model", "input_size"): _image_size(image_size),
        ("train", "epochs"): epochs,
        ("train", "batch_size"): batch_size,
        ("train", "learning_rate"): learning_rate,
        ("train", "seed"): seed,
        ("train", "device"): device,
        ("train", "tensorboard"): tensorboard or None,
    }
    given = {key: value for key, value in changes.items() if value not in ("", None)}
    versions, budget_s = versions_of(opencv), _seconds(time)
    plan = [option for option, value in (("--preset", preset), ("--time", time), ("--tune", tune)) if value]
    _refuse_mixed(data, recipe, resume, qat, task, given, [*plan, *(["--opencv"] if versions else [])], skip_bad)
    from edgekit.progress import display

    # The stage imports torch, which takes seconds: bad data and bad recipes are said before.
    if resume:
        with display() as show:
            show.busy(LOADING)
            from edgekit.finetune import resume as continue_run

            done = continue_run(resume, watch=_watch(show))
    elif qat:
        done = _finetune_qat(qat, given, runs)
    elif tune:
        done = _tune(*_plan(recipe, given, task, skip_bad, preset), tune, runs, versions)
    else:
        chosen, dataset = _plan(recipe, given, task, skip_bad, preset)
        with display() as show:
            show.busy(LOADING)
            from edgekit.finetune import finetune as stage

            show.busy(f"preparing {chosen.model.backbone}")
            done = stage(chosen, dataset, runs, opencv=versions, budget_s=budget_s, watch=_watch(show))
    if not is_first_process():
        return
    if as_json:
        print_json({"run": done.run, "best": vars(done.best), "epochs": len(done.history)})
        return
    early = " (stopped early: nothing better came)" if done.stopped_early else ""
    figure = f"{done.best.metric} {100 * done.best.val_metric:.2f} %"
    typer.echo(f"best: {figure} in epoch {done.best.epoch} of {len(done.history)}{early}")
    typer.echo(f"next: edgekit {'quantize' if qat else 'bundle'} {done.run}")


def _refuse_mixed(
    data: str,
    recipe: Path | None,
    resume: Path | None,
    qat: Path | None,
    task: str,
    given: dict[tuple[str, ...], Any],
    plan: list[str],
    skip_bad: bool,
) -> None:
    """Raises UsageError where options of finetune were given that do not go together."""
    if task and (recipe or resume or qat):
        raise UsageError("--task goes with DATA: a recipe and a run say themselves what is learnt")
    if qat and (given.keys() - _QAT_SETTINGS or recipe or resume or plan or skip_bad):
        raise UsageError(
            "--qat takes data, backbone and settings from its run: only --epochs, --learning-rate, --batch-size, "
            "--seed, --device, --name and --runs go with it"
        )
    if resume and (given or recipe or plan):
        raise UsageError("--resume continues a run as it was begun: give it alone, without DATA or other settings")
    if not (resume or recipe or data or qat):
        raise UsageError("nothing to train on: give DATA (an image folder or CSV), --recipe FILE or --resume RUN")
    if "--time" in plan and ("--tune" in plan or ("train", "epochs") in given):
        raise UsageError("--time finds out how many epochs fit: give it without --epochs and --tune")


def _watch(show: Display) -> Watch:
    """A training's progress goes to the display."""
    from edgekit.jobs import Watch

    return Watch(show.step, show.epoch, show.images, show.note)


def _seconds(text: str) -> float | None:
    """ "90s" → 90, "10m" → 600, "1h30m" → 5400, "" → None."""
    found = re.fullmatch(r"(?:(\d+)h)?(?:(\d+)m)?(?:(\d+)s)?", text)
    if not text:
        return None
    if not found:
        raise UsageError(f"--time takes a time such as 90s, 10m or 1h30m, not {text!r}")
    hours, minutes, seconds = (int(group or 0) for group in found.groups())
    return float(3600 * hours + 60 * minutes + seconds)


_QAT_SETTINGS = {("name",), *(("train", key) for key in ("epochs", "learning_rate", "batch_size", "seed", "device"))}


def _finetune_qat(source: Path, given: dict[tuple[str, ...], Any], runs: Path) -> Finetuned:
    """Continues from a finished run quantization-aware, with the command line's changes."""
    from edgekit.artifacts import open_run
    from edgekit.progress import display
    from edgekit.recipe import qat_recipe

    run = open_run(source)
    recipe = _changed(qat_recipe(run.read_recipe(), run.weights), given, "the options")
    with display() as show:
        show.busy(LOADING)
        from edgekit.finetune import finetune_qat as stage

        return stage(source, recipe, runs, watch=_watch(show))


def _tune(recipe: Recipe, dataset: Dataset, trials: int, runs: Path, opencv: tuple[str, ...]) -> Finetuned:
    """Searches the recipe's settings; → the best trial's run."""
    from edgekit.progress import console, display

    with display() as show:
        show.busy(LOADING)
        from edgekit.finetune import finetune as stage
        from edgekit.finetune import resume
        from edgekit.tuning import Epoch, tune

        def train(candidate: Recipe, folder: Path, on_epoch: Callable[[Epoch], None]) -> Finetuned:
            return stage(candidate, dataset, folder, opencv=opencv, watch=replace(_watch(show), on_epoch=on_epoch))

        tuned = tune(recipe, dataset, trials, runs, train, on_trial=show.trial)
        done = resume(tuned.run)  # it is finished: this reads its history
    finished = sum(trial.state != "failed" for trial in tuned.trials)
    advice = f": `edgekit evaluate {tuned.run} --subset test` says how good it is" if dataset.test else ""
    words = (
        f"{tuned.folder}: trial {tuned.best.number} is the best of {finished} (recipe.toml, trials.png)\n"
        f"the best of many trials on the same validation images is an optimistic figure{advice}"
    )
    console.print(words, markup=False, soft_wrap=True)
    return done


def task_of(name: str) -> Task:
    if name not in ("classify", "detect", "segment"):
        raise UsageError(f"no task is called {name!r} (there are: classify, detect, segment)")
    return cast("Task", name)


def _image_size(text: str) -> list[int] | None:
    """ "320" → [320, 320], "384x512" → [384, 512] (height, width), "" → None."""
    sides = text.lower().split("x")
    if text and not (len(sides) <= 2 and all(side.isdecimal() for side in sides)):
        raise UsageError(f"--image-size takes a side in pixels (320) or HEIGHTxWIDTH (384x512), not {text!r}")
    return [int(sides[0]), int(sides[-1])] if text else None


def versions_of(text: str) -> tuple[str, ...]:
    """ "4.10, 5.0" → ("4.10", "5.0")."""
    return tuple(version.strip() for version in text.split(",") if version.strip())


def _plan(
    file: Path | None, changes: dict[tuple[str, ...], Any], task: str, skip_bad: bool, preset: str
) -> tuple[Recipe, Dataset]:
    """The recipe file (or what suits the data), on it the preset and the command line's changes; and the data."""
    from edgekit.datasets import guess_task
    from edgekit.recipe import read_recipe, suggest, with_preset

    path = changes.get(("data", "path"), "")
    base = read_recipe(file) if file else suggest(path, (), task_of(task or guess_task(Path(path))))
    base = with_preset(base, preset) if preset else base
    recipe = _changed(base, changes, str(file) if file else "the options")
    dataset = _read_data(recipe, skip_bad)
    if file is None:
        augment = suggest(recipe.data.path, dataset.class_names, recipe.task).augment
        recipe = recipe.model_copy(update={"augment": augment})
    return recipe, dataset


def _changed(base: Recipe, changes: dict[tuple[str, ...], Any], origin: str) -> Recipe:
    """The recipe with the command line's changes on top. Raises ConfigError, naming `origin`, where one is wrong."""
    from edgekit.recipe import make_recipe

    raw = base.model_dump(mode="json")
    for key, value in changes.items():
        section = raw if len(key) == 1 else raw[key[0]]
        section[key[-1]] = value
    return make_recipe(raw, origin=origin)


def _read_data(recipe: Recipe, skip_bad: bool) -> Dataset:
    """Reads and checks the data, says what was found (on stderr), and stops where that is fatal."""
    from edgekit import report
    from edgekit.datasets import check_dataset, refuse_fatal
    from edgekit.progress import console, display

    data = recipe.data
    with display() as show:
        dataset = check_dataset(
            Path(data.path),
            recipe.task,
            val_fraction=data.val_fraction,
            split_seed=data.split_seed,
            progress=show.files,
        )
    tested = f" (and {len(dataset.test)} to test with)" if dataset.test else ""
    counts = f"{recipe.task}: {len(dataset.train)} training and {len(dataset.val)} validation images{tested}"
    console.print(f"{counts} in {len(dataset.class_names)} classes")
    if dataset.problems:
        console.print(report.problems_table(dataset.problems))
    refuse_fatal(dataset.problems, skip_bad=skip_bad)
    return dataset
