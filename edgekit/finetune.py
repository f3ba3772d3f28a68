"""finetune: labelled images → a run folder with a trained network.

The head and the backbone's last stages learn, on what the frozen stages before them give; that is computed once for
each image and a few augmented views of it, and kept (edgekit/features.py). Every epoch's randomness comes from (seed,
epoch) alone, and the state that an epoch ends with is saved whole, so a run that is interrupted (Ctrl-C, kill -9,
power) and resumed ends with the weights of one that was not.

Started by torchrun, several processes share each batch; the first of them alone writes.

A quantization-aware run (`finetune_qat`) is a run like any other, but that it starts from a whole trained network and
trains, and validates, with the rounding of int8 in it.
"""

from __future__ import annotations

import csv
import io
import json
import logging
import os
import shutil
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lightning_fabric import Fabric
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save

from edgekit import backbones, fake_quantization, runner
from edgekit.artifacts import (
    RunFolder,
    open_run,
    replacing_folder,
    unused_name,
    write_bytes,
    write_json,
    write_text,
)
from edgekit.datasets import Dataset, missing, read_split, write_split
from edgekit.doctor import cpu_computes_bfloat16
from edgekit.errors import ArtifactError, ConfigError, DataError, Interrupted, SetupError
from edgekit.jobs import Epoch, Job, Phase, Step, Watch, gathered, phases_of, steps_of, val_order
from edgekit.learner import AVERAGE, Learner, averaged, learn_epoch, learner_of
from edgekit.preflight import preflight
from edgekit.recipe import Recipe, to_toml
from edgekit.samples import Mask, Sample
from edgekit.sources import Source, on_device, sources_of
from edgekit.tasks import TASKS, classify
from edgekit.tensorboard import log_epoch, require_tensorboard
from edgekit.time_budget import within

CHECK_IMAGES = 8
_NOBODY = Watch()


@dataclass(frozen=True)
class Finetuned:
    """What a run came to."""

    run: Path
    best: Epoch
    history: tuple[Epoch, ...]
    stopped_early: bool


def finetune(
    recipe: Recipe,
    dataset: Dataset,
    runs: Path = Path("runs"),
    *,
    opencv: Sequence[str] = (),
    budget_s: float | None = None,
    watch: Watch = _NOBODY,
) -> Finetuned:
    """Trains what the recipe says on the data set and leaves a new run folder under `runs`.

    The folder is `recipe.name`, or made from the data's and the backbone's names; an existing one is never
    overwritten. opencv: versions on which the network is to run, beside the one here; a backbone that does not is
    refused. budget_s: seconds that training may take; the recipe's epochs become as many as fit, by how long a few
    steps take here, and at least one. Of several processes only the first one's `watch` is told.

    Raises ConfigError, DataError, SetupError (no weights to be had) or ArtifactError before training; EdgekitError when
    the loss stops being a number.
    """
    start = time.perf_counter()
    fabric = _fabric(recipe)  # a device that is not there is said before anything is made
    if recipe.train.tensorboard:
        require_tensorboard()
    torch.manual_seed(recipe.train.seed)
    spec = backbones.default_spec(
        recipe.model.backbone,
        dataset.class_names,
        task=recipe.task,
        input_size=recipe.model.input_size,
        resize=recipe.preprocess.resize,
        interpolation=recipe.preprocess.interpolation,
        score_threshold=recipe.detect.score_threshold,
        iou_threshold=recipe.detect.iou_threshold,
    )
    model = _start(recipe, dataset.class_names)
    names = TASKS[recipe.task].OUTPUTS
    preflight(recipe.model.backbone, model, spec, names, [dataset.train[0].path, dataset.val[0].path], opencv)
    if recipe.train.qat:
        fake_quantization.fake_quantize(model)
    if budget_s is not None:
        job = _job(fabric, recipe, spec, dataset, watch)
        recipe = within(job, model, budget_s, start)
    name = f"{dataset.root.name}-{recipe.model.backbone.replace(':', '-')}"
    check_images = [sample.path for sample in _check_samples(dataset)]
    run = _new_run(fabric, recipe, runs, name, dataset, spec, check_images)
    job = _job(fabric, run.read_recipe(), spec, dataset, watch)
    return _train(run, job, model, [], {})


def finetune_qat(
    source: Path,
    recipe: Recipe,
    runs: Path = Path("runs"),
    *,
    watch: Watch = _NOBODY,
) -> Finetuned:
    """Continues from a finished run, quantization-aware, and leaves a new run folder under `runs`.

    recipe: as `recipe.qat_recipe` makes it from the source's. The folder is `recipe.name`, or the source's name and
    "-qat"; an existing one is never overwritten. The source is only read: its split, its spec and its check images
    are the new run's, and its network, head included, is where training starts. Raises ArtifactError, ConfigError,
    DataError or SetupError before training; EdgekitError when the loss stops being a number.
    """
    folder = open_run(source)
    fabric = _fabric(recipe)
    spec, dataset, check_images = folder.read_spec(), _present_split(folder), folder.check_images()
    torch.manual_seed(recipe.train.seed)
    model = _start(recipe, spec.class_names)
    fake_quantization.fake_quantize(model)
    run = _new_run(fabric, recipe, runs, f"{folder.name}-qat", dataset, spec, check_images)
    job = _job(fabric, run.read_recipe(), spec, dataset, watch)
    return _train(run, job, model, [], {})


def resume(
    path: Path,
    *,
    watch: Watch = _NOBODY,
) -> Finetuned:
    """Continues an interrupted run from its last whole epoch; a finished one is returned as it is.

    It may be continued by another number of processes. Raises ArtifactError when the folder is no run or its state is
    damaged, DataError when its images have moved.
    """
    run = RunFolder(path)
    if not run.recipe.is_file():
        raise ArtifactError(f"no run folder at {path}: start one with `edgekit finetune DATA`")
    recipe, spec, dataset = run.read_recipe(), run.read_spec(), _present_split(run)
    fabric = _fabric(recipe)
    torch.manual_seed(recipe.train.seed)
    if run.state.is_file():
        model = TASKS[recipe.task].build(recipe, spec.class_names, pretrained=False)
        history, tensors = _read_state(run.state)
    else:  # interrupted in its first epoch
        model = _start(recipe, spec.class_names)
        history, tensors = [], {}
    if recipe.train.qat:
        fake_quantization.fake_quantize(model)
    if history:
        model.load_state_dict({k[len("model.") :]: v for k, v in tensors.items() if k.startswith("model.")})
    job = _job(fabric, recipe, spec, dataset, watch)
    return _train(run, job, model, history, tensors)


def _job(fabric: Fabric, recipe: Recipe, spec: runner.Spec, dataset: Dataset, watch: Watch) -> Job:
    return Job(recipe, spec, dataset, fabric, watch if fabric.is_global_zero else _NOBODY)


def _start(recipe: Recipe, class_names: Sequence[str]) -> torch.nn.Module:
    """The network that training starts from: with a new head, but for a quantization-aware run a whole trained one."""
    if not recipe.train.qat:
        model: torch.nn.Module = TASKS[recipe.task].build(recipe, class_names, pretrained=True)
        return model
    if not recipe.model.weights:
        raise ConfigError("train.qat continues from a trained network: use `edgekit finetune --qat RUN`")
    model = TASKS[recipe.task].build(recipe, class_names, pretrained=False)
    try:
        model.load_state_dict(backbones.read_weights(Path(recipe.model.weights)))
    except RuntimeError as error:
        reason = " ".join(str(error).split())[:200]
        raise ConfigError(
            f"{recipe.model.weights} is not a trained {recipe.model.backbone} for these {len(class_names)} classes "
            f"({reason}): use `edgekit finetune --qat RUN`, which takes all from the run"
        ) from None
    return model


# The run folder -------------------------------------------------------------------------------------------------


def _present_split(run: RunFolder) -> Dataset:
    """The run's images. Raises DataError where some are no longer there."""
    dataset = read_split(run.split)
    gone = missing((*dataset.train, *dataset.val))
    if gone:
        raise DataError(f"{len(gone)} images of this run are no longer there, such as {gone[0]}: put them back")
    return dataset


def _new_run(
    fabric: Fabric,
    recipe: Recipe,
    runs: Path,
    default_name: str,
    dataset: Dataset,
    spec: runner.Spec,
    check_images: Sequence[Path],
) -> RunFolder:
    """The first process makes the folder; all get it."""
    path = Path()
    if fabric.is_global_zero:
        path = _write_new_run(recipe, runs, default_name, dataset, spec, check_images)
    return RunFolder(Path(fabric.broadcast(str(path))))


def _write_new_run(
    recipe: Recipe, runs: Path, default_name: str, dataset: Dataset, spec: runner.Spec, check_images: Sequence[Path]
) -> Path:
    name = recipe.name or default_name
    if recipe.name and (runs / name).exists():
        hint = f"continue it with `edgekit finetune --resume {runs / name}` or choose another --name"
        raise ArtifactError(f"{runs / name} exists already: {hint}")
    path = unused_name(runs, name)
    resolved = recipe.model_copy(
        update={"name": path.name, "model": recipe.model.model_copy(update={"input_size": spec.input_size})}
    )
    with replacing_folder(path) as temporary:
        run = RunFolder(temporary)
        write_text(run.recipe, to_toml(resolved))
        write_json(run.spec, spec.to_dict())
        write_split(dataset, run.split)
        run.check.mkdir()
        for number, image in enumerate(check_images):
            shutil.copyfile(image, run.check / f"{number:02d}{image.suffix.lower()}")
    return path


def _check_samples(dataset: Dataset) -> Iterator[Sample]:
    """Validation images, the kinds in turn, so that few images show many classes."""
    by_kind: dict[str, list[Sample]] = {}
    for sample in sorted(dataset.val, key=lambda s: s.sha256):
        by_kind.setdefault(_kind(sample), []).append(sample)
    queues = [by_kind[kind] for kind in sorted(by_kind)]
    count = 0
    while count < CHECK_IMAGES and any(queues):
        for queue in queues:
            if queue and count < CHECK_IMAGES:
                count += 1
                yield queue.pop(0)


def _kind(sample: Sample) -> str:
    """What an image shows, as far as that is known without looking: its class, its boxes' classes, or its folder."""
    if isinstance(sample.label, Mask):
        return str(sample.path.parent)
    ids = [sample.label] if isinstance(sample.label, int) else sorted({box.class_id for box in sample.label})
    return " ".join(f"{class_id:06d}" for class_id in ids)


def _history_csv(history: Sequence[Epoch]) -> str:
    stream = io.StringIO()
    writer = csv.DictWriter(stream, [field.name for field in fields(Epoch)], lineterminator="\n")
    writer.writeheader()
    writer.writerows(asdict(row) for row in history)
    return stream.getvalue()


def _save_epoch(run: RunFolder, job: Job, history: list[Epoch], learner: Learner) -> None:
    """Written by the first process alone; the others wait until it is there."""
    if job.fabric.is_global_zero:
        # The weights first: if the power goes before the state is there, the epoch is repeated and gives them again.
        if best_epoch(history) is history[-1]:
            with averaged(learner):
                write_bytes(run.weights, save(_on_cpu(fake_quantization.plain_state(learner.model))))
        tensors = {f"model.{key}": value for key, value in _on_cpu(learner.model.state_dict()).items()}
        for index, values in learner.optimizer.state_dict()["state"].items():
            tensors |= {f"optimizer.{index}.{key}": value for key, value in _on_cpu(values).items()}
        if learner.average is not None:
            tensors |= {AVERAGE + key: value for key, value in _on_cpu(learner.average.values).items()}
        write_bytes(run.state, save(tensors, {"history": json.dumps([asdict(row) for row in history])}))
        write_text(run.history, _history_csv(history))
    job.fabric.barrier()


def _on_cpu(values: Mapping[str, Any]) -> dict[str, torch.Tensor]:
    # channels_last tensors are not contiguous, and safetensors keeps values, not strides
    return {key: torch.as_tensor(value).detach().cpu().contiguous() for key, value in values.items()}


def _read_state(path: Path) -> tuple[list[Epoch], dict[str, torch.Tensor]]:
    try:
        with safe_open(path, framework="pt") as state:
            history = [Epoch(**row) for row in json.loads(state.metadata()["history"])]
            return history, {key: state.get_tensor(key) for key in state.keys()}  # noqa: SIM118 (not a dict)
    except (OSError, SafetensorError, KeyError, TypeError, ValueError) as error:
        raise ArtifactError(f"{path} is damaged ({error}): start again with `edgekit finetune DATA`") from None


# Training -------------------------------------------------------------------------------------------------------


def _train(
    run: RunFolder, job: Job, model: torch.nn.Module, history: list[Epoch], tensors: dict[str, torch.Tensor]
) -> Finetuned:
    """Runs the epochs that `history` does not have yet. tensors: the saved state that history ended with."""
    phases = phases_of(job.recipe, model)
    total = sum(phase.epochs for phase in phases)
    if not total:
        raise DataError("nothing to train: head_epochs and epochs are both 0 in the recipe")
    has_temperature = job.recipe.task == "classify" and not job.recipe.train.qat  # that one has its source's
    try:
        if not _is_over(history, phases, job.recipe) or (has_temperature and job.spec.temperature == 1):
            sources = sources_of(job, model, history[-1].epoch if history else 0)
            _run_phases(run, job, model, list(zip(phases, sources, strict=True)), history, tensors)
            if has_temperature:
                _calibrate(run, job, model, sources[[phase.name for phase in phases].index(history[-1].phase)])
    except KeyboardInterrupt:
        done = f"{len(history)} of {total} epochs are kept"
        raise Interrupted(f"interrupted: {done}; continue with `edgekit finetune --resume {run.path}`") from None
    return Finetuned(run.path, best_epoch(history), tuple(history), stopped_early=len(history) < total)


def _calibrate(run: RunFolder, job: Job, model: torch.nn.Module, source: Source) -> None:
    """Writes into the Spec the temperature at which the scores of the kept weights are as often right as they say."""
    model.load_state_dict(load_file(run.weights))
    model.eval()
    logits = []
    for batch in source.val():
        with torch.inference_mode():
            logits.append(source.module(*on_device(job, batch)).float().cpu().numpy())
    order = [index for batch in val_order(job) for index in batch]
    shares = gathered(job.fabric, (order, np.concatenate(logits)))
    labels = np.array([job.dataset.val[index].label for indices, _ in shares for index in indices])
    temperature = classify.best_temperature(np.concatenate([part for _, part in shares]), labels)
    if job.fabric.is_global_zero:
        write_json(run.spec, replace(job.spec, temperature=temperature).to_dict())
    job.fabric.barrier()


def _run_phases(
    run: RunFolder,
    job: Job,
    model: torch.nn.Module,
    phases: Sequence[tuple[Phase, Source]],
    history: list[Epoch],
    tensors: dict[str, torch.Tensor],
) -> None:
    """Appends a row an epoch to `history`, each once its state is on disk."""
    recipe = job.recipe
    resumed, total, first = history[-1].epoch if history else 0, sum(phase.epochs for phase, _ in phases), 1
    for phase, source in phases:
        ahead = range(max(first, resumed + 1), first + phase.epochs)
        done = resumed + 1 - first  # of the phase's epochs, where it was left in its middle
        learner = learner_of(job, phase, source, model, tensors if done > 0 else {}, max(0, done)) if ahead else None
        for number in ahead:
            if learner is None or _exhausted(history, phase, recipe):
                break
            place = Step(phase.name, number, total, 0, steps_of(job), 0, 0)
            history.append(learn_epoch(job, learner, place, number - first, history[-1].epoch if history else 0))
            _save_epoch(run, job, history, learner)
            if recipe.train.tensorboard and job.fabric.is_global_zero:
                log_epoch(run.path / "tensorboard", history[-1])
            job.watch.on_epoch(history[-1])
        first += phase.epochs


def best_epoch(history: Sequence[Epoch]) -> Epoch:
    """The epoch whose weights are kept: the highest validation metric, then the lowest loss, then the first."""
    return max(history, key=lambda row: (row.val_metric, -row.val_loss))


def _fabric(recipe: Recipe) -> Fabric:
    """Of one process, or where torchrun started several, of all of them."""
    accelerator = {"auto": "cuda" if torch.cuda.is_available() else "cpu"}.get(recipe.train.device, recipe.train.device)
    if accelerator == "cuda" and not torch.cuda.is_available():
        raise SetupError(
            "the recipe's device is cuda, and torch finds none here: see `edgekit doctor`, or use auto or cpu"
        )
    precision = recipe.train.precision
    if precision == "auto":
        precision = "bfloat16" if _computes_bfloat16(accelerator) else "float32"
    if recipe.train.qat:
        precision = "float32"  # bfloat16's own rounding is as coarse as the one to be learnt
    with _quiet():
        is_mixed = precision == "bfloat16"
        fabric = Fabric(
            accelerator=accelerator,
            precision="bf16-mixed" if is_mixed else "32-true",
            **_processes(),
        )
        fabric.launch()
        return fabric


@contextmanager
def _quiet() -> Iterator[None]:
    """Keeps Fabric's remark about its precision, which the recipe says, off the user's terminal."""
    logger = logging.getLogger("lightning_fabric")
    level = logger.level
    try:
        logger.setLevel(logging.WARNING)
        yield
    finally:
        logger.setLevel(level)


def _computes_bfloat16(accelerator: str) -> bool:
    if accelerator == "cuda":
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    return cpu_computes_bfloat16()


def _processes() -> dict[str, Any]:
    """What torchrun says in the environment (https://docs.pytorch.org/docs/stable/elastic/run.html)."""
    everywhere, here = int(os.environ.get("WORLD_SIZE", 1)), int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    if everywhere == 1:
        return {"devices": 1}
    return {"devices": here, "num_nodes": everywhere // here, "strategy": "ddp"}


def _exhausted(history: Sequence[Epoch], phase: Phase, recipe: Recipe) -> bool:
    """True once `patience` epochs of the phase brought nothing better than the epochs before them."""
    if sum(row.phase == phase.name for row in history) < recipe.train.patience:
        return False
    return history[-1].epoch - best_epoch(history).epoch >= recipe.train.patience


def _is_over(history: Sequence[Epoch], phases: Sequence[Phase], recipe: Recipe) -> bool:
    last = [phase for phase in phases if phase.epochs][-1]
    if not history or history[-1].phase != last.name:
        return False
    return history[-1].epoch == sum(phase.epochs for phase in phases) or _exhausted(history, last, recipe)
