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
import math
import os
import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from copy import deepcopy
from dataclasses import asdict, dataclass, fields, replace
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lightning_fabric import Fabric
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save

from edgekit import backbones, fake_quantization, frozen, runner
from edgekit.artifacts import (
    RunFolder,
    open_run,
    replacing_folder,
    unused_name,
    write_bytes,
    write_json,
    write_text,
)
from edgekit.batches import batch_order, batches, load_image
from edgekit.datasets import Dataset, missing, read_split, write_split
from edgekit.doctor import cpu_computes_bfloat16
from edgekit.errors import ArtifactError, ConfigError, DataError, Interrupted, SetupError
from edgekit.features import PLAIN, Features, open_features
from edgekit.gradients import FastGradients
from edgekit.preflight import preflight
from edgekit.recipe import Recipe, to_toml
from edgekit.samples import Mask, Sample
from edgekit.tasks import TASKS, answers, classify, named
from edgekit.tensorboard import log_epoch, require_tensorboard
from edgekit.training import Average, class_weights, learning_rate, mixed, parameter_groups

CHECK_IMAGES = 8
CACHE_BYTES = 8 << 30  # of the features that are kept for all runs
AVERAGE = "average."  # before a tensor's name in the saved state


@dataclass(frozen=True)
class Step:
    """One step done, for a progress display."""

    phase: str
    epoch: int  # from 1
    epochs: int
    step: int  # from 1, within the epoch
    steps: int
    loss: float
    images_per_second: float


@dataclass(frozen=True)
class Epoch:
    """A row of history.csv."""

    epoch: int  # from 1
    phase: str  # "head": the backbone is frozen; "stages": its last stages learn too
    learning_rate: float  # the epoch's last
    train_loss: float
    val_loss: float
    metric: str  # the task's: "top-1", "mAP@0.5" or "mean IoU"
    val_metric: float  # 0..1
    seconds: float
    images_per_second: float  # of training alone


@dataclass(frozen=True)
class Finetuned:
    """What a run came to."""

    run: Path
    best: Epoch
    history: tuple[Epoch, ...]
    stopped_early: bool


@dataclass(frozen=True)
class _Phase:
    name: str
    epochs: int
    learning_rate: float
    stages: int  # how many of the backbone's stages learn, from the last


@dataclass(frozen=True)
class _Job:
    """What stays the same through a run. Of several processes only the first one's callbacks are told."""

    recipe: Recipe
    spec: runner.Spec
    dataset: Dataset
    fabric: Fabric
    on_step: Callable[[Step], None]
    on_epoch: Callable[[Epoch], None]
    on_image: Callable[[str, int, int], None]
    on_note: Callable[[str], None]


def finetune(
    recipe: Recipe,
    dataset: Dataset,
    runs: Path = Path("runs"),
    *,
    opencv: Sequence[str] = (),
    budget_s: float | None = None,
    on_step: Callable[[Step], None] = lambda step: None,
    on_epoch: Callable[[Epoch], None] = lambda epoch: None,
    on_image: Callable[[str, int, int], None] = lambda name, done, total: None,
    on_note: Callable[[str], None] = lambda text: None,
) -> Finetuned:
    """Trains what the recipe says on the data set and leaves a new run folder under `runs`.

    The folder is `recipe.name`, or made from the data's and the backbone's names; an existing one is never
    overwritten. opencv: versions on which the network is to run, beside the one here; a backbone that does not is
    refused. budget_s: seconds that training may take; the recipe's epochs become as many as fit, by how long a few
    steps take here, and at least one. on_image: the name of some work on images, how many are done, and of how many.
    on_note: what the user should know and is no error.

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
        job = _job(fabric, recipe, spec, dataset, on_step, on_epoch, on_image, on_note)
        recipe = _within(job, model, budget_s, start)
    name = f"{dataset.root.name}-{recipe.model.backbone.replace(':', '-')}"
    check_images = [sample.path for sample in _check_samples(dataset)]
    run = _new_run(fabric, recipe, runs, name, dataset, spec, check_images)
    job = _job(fabric, run.read_recipe(), spec, dataset, on_step, on_epoch, on_image, on_note)
    return _train(run, job, model, [], {})


def finetune_qat(
    source: Path,
    recipe: Recipe,
    runs: Path = Path("runs"),
    *,
    on_step: Callable[[Step], None] = lambda step: None,
    on_epoch: Callable[[Epoch], None] = lambda epoch: None,
    on_image: Callable[[str, int, int], None] = lambda name, done, total: None,
    on_note: Callable[[str], None] = lambda text: None,
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
    job = _job(fabric, run.read_recipe(), spec, dataset, on_step, on_epoch, on_image, on_note)
    return _train(run, job, model, [], {})


def resume(
    path: Path,
    *,
    on_step: Callable[[Step], None] = lambda step: None,
    on_epoch: Callable[[Epoch], None] = lambda epoch: None,
    on_image: Callable[[str, int, int], None] = lambda name, done, total: None,
    on_note: Callable[[str], None] = lambda text: None,
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
    job = _job(fabric, recipe, spec, dataset, on_step, on_epoch, on_image, on_note)
    return _train(run, job, model, history, tensors)


def _job(
    fabric: Fabric,
    recipe: Recipe,
    spec: runner.Spec,
    dataset: Dataset,
    on_step: Callable[[Step], None],
    on_epoch: Callable[[Epoch], None],
    on_image: Callable[[str, int, int], None],
    on_note: Callable[[str], None],
) -> _Job:
    if fabric.is_global_zero:
        return _Job(recipe, spec, dataset, fabric, on_step, on_epoch, on_image, on_note)
    silent = (lambda *_: None,) * 4
    return _Job(recipe, spec, dataset, fabric, *silent)


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


def _save_epoch(run: RunFolder, job: _Job, history: list[Epoch], learner: _Learner) -> None:
    """Written by the first process alone; the others wait until it is there."""
    if job.fabric.is_global_zero:
        # The weights first: if the power goes before the state is there, the epoch is repeated and gives them again.
        if best_epoch(history) is history[-1]:
            with _averaged(learner):
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


# What is learnt, and from what -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Inputs:
    """What the learning part of the network sees of a batch, and what is true of it."""

    arrays: tuple[np.ndarray, ...]  # float32 (N, ...) each
    labels: Any  # as batches.Batch has them
    sizes: tuple[tuple[int, int], ...]  # (height, width) of the photos; of features, which need none, the input's


@dataclass(frozen=True)
class _Source:
    """Of several processes each has its share of every batch, and of the validation images."""

    module: torch.nn.Module  # what learns: the network, or its half behind the frozen one
    prepare: Callable[[int], None]  # computes what an epoch (its number) needs and is not kept yet
    train: Callable[[int], Iterator[_Inputs]]  # an epoch's number → its batches
    val: Callable[[], Iterator[_Inputs]]


def _sources(job: _Job, model: torch.nn.Module, epochs_done: int) -> list[_Source]:
    """What each phase learns from: features where layers are frozen and there is room to keep them, else the images.

    epochs_done: of the run. What a phase that is over learnt from is not prepared again.
    """
    model.to(job.fabric.device).to(memory_format=torch.channels_last).requires_grad_(False)
    phases = _phases(job.recipe, model)
    sources = [_image_source(job, model) for _ in phases]
    ends = np.cumsum([phase.epochs for phase in phases])
    ahead = [
        index
        for index, phase in enumerate(phases)
        if phase.epochs and ends[index] > epochs_done and phase.stages < len(_stages(job.recipe, model))
    ]
    if job.recipe.task != "classify" or not job.recipe.train.views or not ahead:
        return sources
    samples = [sample for part in (job.dataset.train, job.dataset.val) for sample in part[:1]]
    images = runner.normalize(np.stack([load_image(sample, job.spec) for sample in samples]), job.spec)
    trunk, halves = frozen.cuts(
        model.eval(),
        [_learning(job.recipe, phases[index], model) for index in ahead],
        torch.from_numpy(images).to(job.fabric.device),
    )
    if not trunk.parts:
        return sources
    counts = len(job.dataset.train), len(job.dataset.val), job.recipe.train.views
    computed = frozen.engine(trunk, images, job.fabric.device)
    opened = open_features(computed, job.spec, job.recipe.augment, job.recipe.train.seed, counts, CACHE_BYTES)
    if opened is None:
        job.on_note("no room for the frozen layers' features: they are computed again in each epoch")
        return sources
    part = len(trunk.parts)
    for index, half in zip(ahead, halves, strict=True):
        if half is not None:
            part -= 1  # the first phase's is the trunk's last: least learns there
            sources[index] = _feature_source(job, *opened, half.learning, part)
    return sources


def _image_source(job: _Job, model: torch.nn.Module) -> _Source:
    train, val, size, augment = job.dataset.train, job.dataset.val, job.recipe.train.batch_size, job.recipe.augment

    def stream(samples: Sequence[Sample], order: list[list[int]], **options: Any) -> Iterator[_Inputs]:
        for batch in batches(samples, job.spec, size, order=order, **options):
            yield _Inputs((runner.normalize(batch.images, job.spec),), batch.labels, batch.sizes)

    def train_stream(epoch: int) -> Iterator[_Inputs]:
        seed = _epoch_seed(job.recipe, epoch)
        return stream(train, _train_order(job, epoch), augment=augment, seed=seed)

    return _Source(model, lambda _: None, train_stream, lambda: stream(val, _val_order(job)))


def _feature_source(job: _Job, features: Features, views: int, learning: torch.nn.Module, part: int) -> _Source:
    """part: which of the trunk's parts gives what `learning` takes."""
    rank, processes = job.fabric.global_rank, job.fabric.world_size

    def fill(samples: Sequence[Sample], view: int) -> None:
        name = "features" if view == PLAIN else f"features, view {view + 1}"
        features.fill(samples[rank::processes], view, part, lambda done, total: job.on_image(name, done, total))

    def prepare(epoch: int) -> None:
        was_full = features.is_full
        fill(job.dataset.val, PLAIN)
        fill(job.dataset.train, epoch % views)
        job.fabric.barrier()
        features.refresh()
        if features.is_full and not was_full:
            job.on_note("the disk is full: the frozen layers' features are computed again where they were not kept")

    def stream(samples: Sequence[Sample], view: int, order: list[list[int]]) -> Iterator[_Inputs]:
        for batch in features.batches(samples, view, part, order):
            yield _Inputs(batch.arrays, batch.labels, (job.spec.input_size,) * len(batch.labels))

    def train_stream(epoch: int) -> Iterator[_Inputs]:
        return stream(job.dataset.train, epoch % views, _train_order(job, epoch))

    return _Source(learning, prepare, train_stream, lambda: stream(job.dataset.val, PLAIN, _val_order(job)))


PROBE_STEPS = 4  # the first of them is slower, and is not timed
VALIDATION_SHARE = 0.4  # of a step's time that a validation batch takes: it goes forward only
MOST_EPOCHS = 100


def _within(job: _Job, model: torch.nn.Module, budget_s: float, start: float) -> Recipe:
    """The recipe with as many epochs as fit into the budget, which began at `start` (time.perf_counter).

    What a trial of a few steps computes of features is kept; the network is left as it is.
    """
    model = deepcopy(model)
    phases, sources = _phases(job.recipe, model), _sources(job, model, 0)
    began = time.perf_counter()
    sources[-1].prepare(0)
    fill_s = (time.perf_counter() - began) / (1 + len(job.dataset.val) / len(job.dataset.train))
    learner = _learner(job, phases[-1], sources[-1], model, {}, 0)
    rng = np.random.default_rng(0)
    times_s = []
    for batch in islice(sources[-1].train(0), PROBE_STEPS):
        began = time.perf_counter()
        _learn(job, learner, batch, rng)
        times_s.append(time.perf_counter() - began)
    val_batches = len(job.dataset.val) / job.recipe.train.batch_size
    step_s = float(np.median(times_s[1:] or times_s))
    epoch_s = step_s * (_steps(job) + VALIDATION_SHARE * val_batches)
    left_s = budget_s - (time.perf_counter() - start) - job.recipe.train.head_epochs * epoch_s
    epochs, views = 0, job.recipe.train.views if sources[-1].module is not model else 0
    while epochs < MOST_EPOCHS and left_s >= epoch_s:
        epochs += 1
        left_s -= epoch_s + (fill_s if 1 < epochs <= views else 0)  # the first view is there already
    epochs = max(_gathered(job.fabric, max(1, epochs))[0], 1)
    seconds = f"{epoch_s:.0f} s" if epoch_s >= 10 else f"{epoch_s:.1f} s"
    job.on_note(f"an epoch takes about {seconds}: {epochs} of them are planned")
    if budget_s < epoch_s:
        job.on_note("that is longer than the time given: fewer stages (--preset fast) or smaller images would fit")
    train = job.recipe.train.model_copy(
        update={"epochs": epochs, "patience": max(job.recipe.train.patience, epochs // 3)}
    )
    return job.recipe.model_copy(update={"train": train})


def _epoch_seed(recipe: Recipe, epoch: int) -> int:
    """Of all the epoch's randomness, so that resuming repeats it."""
    return recipe.train.seed * 100_003 + epoch


def _train_order(job: _Job, epoch: int) -> list[list[int]]:
    # BatchNorm cannot learn from a single image
    return batch_order(
        len(job.dataset.train),
        job.recipe.train.batch_size,
        _epoch_seed(job.recipe, epoch),
        rank=job.fabric.global_rank,
        processes=job.fabric.world_size,
        least=2,
    )


def _val_order(job: _Job) -> list[list[int]]:
    rank, processes = job.fabric.global_rank, job.fabric.world_size
    order = batch_order(
        len(job.dataset.val), job.recipe.train.batch_size, None, rank=rank, processes=processes, least=0
    )
    return [batch for batch in order if batch]


# Training -------------------------------------------------------------------------------------------------------


@dataclass
class _Learner:
    """A phase under way."""

    phase: _Phase
    source: _Source
    model: torch.nn.Module  # the whole network
    learning: Sequence[torch.nn.Module]
    module: Any  # the source's, as Fabric wraps it
    optimizer: Any
    average: Average | None
    loss: Callable[[Any, Any], torch.Tensor]
    parts: int = 1  # that a batch is computed in; more than one where memory was short


def _train(
    run: RunFolder, job: _Job, model: torch.nn.Module, history: list[Epoch], tensors: dict[str, torch.Tensor]
) -> Finetuned:
    """Runs the epochs that `history` does not have yet. tensors: the saved state that history ended with."""
    phases = _phases(job.recipe, model)
    total = sum(phase.epochs for phase in phases)
    if not total:
        raise DataError("nothing to train: head_epochs and epochs are both 0 in the recipe")
    try:
        sources = _sources(job, model, len(history))
        _run_phases(run, job, model, list(zip(phases, sources, strict=True)), history, tensors)
        if job.recipe.task == "classify" and not job.recipe.train.qat:  # that one has its source's
            _calibrate(run, job, model, sources[[phase.name for phase in phases].index(history[-1].phase)])
    except KeyboardInterrupt:
        done = f"{len(history)} of {total} epochs are kept"
        raise Interrupted(f"interrupted: {done}; continue with `edgekit finetune --resume {run.path}`") from None
    return Finetuned(run.path, best_epoch(history), tuple(history), stopped_early=len(history) < total)


def _calibrate(run: RunFolder, job: _Job, model: torch.nn.Module, source: _Source) -> None:
    """Writes into the Spec the temperature at which the scores of the kept weights are as often right as they say."""
    model.load_state_dict(load_file(run.weights))
    model.eval()
    logits = []
    for batch in source.val():
        with torch.inference_mode():
            logits.append(source.module(*_tensors(job, batch)).float().cpu().numpy())
    order = [index for batch in _val_order(job) for index in batch]
    gathered = _gathered(job.fabric, (order, np.concatenate(logits)))
    labels = np.array([job.dataset.val[index].label for indices, _ in gathered for index in indices])
    temperature = classify.best_temperature(np.concatenate([part for _, part in gathered]), labels)
    if job.fabric.is_global_zero:
        write_json(run.spec, replace(job.spec, temperature=temperature).to_dict())
    job.fabric.barrier()


def _run_phases(
    run: RunFolder,
    job: _Job,
    model: torch.nn.Module,
    phases: Sequence[tuple[_Phase, _Source]],
    history: list[Epoch],
    tensors: dict[str, torch.Tensor],
) -> None:
    """Appends a row an epoch to `history`, each once its state is on disk."""
    recipe = job.recipe
    resumed, total, first = history[-1].epoch if history else 0, sum(phase.epochs for phase, _ in phases), 1
    for phase, source in phases:
        ahead = range(max(first, resumed + 1), first + phase.epochs)
        done = resumed + 1 - first  # of the phase's epochs, where it was left in its middle
        learner = _learner(job, phase, source, model, tensors if done > 0 else {}, max(0, done)) if ahead else None
        for number in ahead:
            if learner is None or _exhausted(history, phase, recipe):
                break
            history.append(_epoch(job, learner, Step(phase.name, number, total, 0, _steps(job), 0, 0), number - first))
            _save_epoch(run, job, history, learner)
            if recipe.train.tensorboard and job.fabric.is_global_zero:
                log_epoch(run.path / "tensorboard", history[-1])
            job.on_epoch(history[-1])
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


def _phases(recipe: Recipe, model: torch.nn.Module) -> tuple[_Phase, _Phase]:
    train = recipe.train
    count = round(train.unfrozen_fraction * len(_stages(recipe, model)))
    return (
        _Phase("head", train.head_epochs, train.head_learning_rate, 0),
        _Phase("stages", train.epochs, train.learning_rate, count),
    )


def _exhausted(history: Sequence[Epoch], phase: _Phase, recipe: Recipe) -> bool:
    """True once `patience` epochs of the phase brought nothing better than the epochs before them."""
    if sum(row.phase == phase.name for row in history) < recipe.train.patience:
        return False
    return history[-1].epoch - best_epoch(history).epoch >= recipe.train.patience


def _learner(
    job: _Job,
    phase: _Phase,
    source: _Source,
    model: torch.nn.Module,
    tensors: Mapping[str, torch.Tensor],
    epochs_done: int,
) -> _Learner:
    """Freezes what the phase leaves alone. tensors: the state to go on from, after so many of the phase's epochs."""
    recipe = job.recipe
    learning = _learning(recipe, phase, model)
    model.requires_grad_(False)
    for part in learning:
        part.requires_grad_(True)
    if phase.stages == len(_stages(recipe, model)):
        model.requires_grad_(True)  # also what belongs to no stage, such as position embeddings
    groups = parameter_groups(model, learning, recipe.train.weight_decay, recipe.train.layer_decay)
    module = job.fabric.setup_module(source.module)
    adamw = torch.optim.AdamW(groups, lr=phase.learning_rate, fused=True)
    optimizer: Any = job.fabric.setup_optimizers(adamw)
    average = None
    if recipe.train.ema_decay:
        live = model.state_dict() if phase.stages == len(_stages(recipe, model)) else _states(model, learning)
        average = Average(live, recipe.train.ema_decay, epochs_done * _steps(job))
    if epochs_done:
        _load_optimizer(optimizer, tensors)
        if average is not None:
            average.load({k[len(AVERAGE) :]: v for k, v in tensors.items() if k.startswith(AVERAGE)})
    loss = partial(TASKS[recipe.task].loss, recipe=recipe)
    if recipe.task == "classify" and recipe.train.class_balance:
        labels = np.array([sample.label for sample in job.dataset.train])
        weights = class_weights(labels, len(job.spec.class_names), recipe.train.class_balance)
        loss = partial(loss, class_weights=weights.to(job.fabric.device))
    return _Learner(phase, source, model, learning, module, optimizer, average, loss)


def _states(model: torch.nn.Module, parts: Sequence[torch.nn.Module]) -> dict[str, torch.Tensor]:
    """The parts' tensors under their names in the whole network."""
    return {
        f"{name}.{key}": value
        for name, module in model.named_modules()
        if module in parts
        for key, value in module.state_dict().items()
    }


def _learning(recipe: Recipe, phase: _Phase, model: torch.nn.Module) -> list[torch.nn.Module]:
    stages = _stages(recipe, model)
    return [*stages[len(stages) - phase.stages :], TASKS[recipe.task].head(model)]


def _stages(recipe: Recipe, model: torch.nn.Module) -> list[torch.nn.Module]:
    return [module for _, module in backbones.stages(TASKS[recipe.task].trunk(model))]


def _load_optimizer(optimizer: torch.optim.Optimizer, tensors: Mapping[str, torch.Tensor]) -> None:
    state: dict[int, dict[str, torch.Tensor]] = {}
    for name, value in tensors.items():
        kind, _, rest = name.partition(".")
        if kind == "optimizer":
            index, _, key = rest.partition(".")
            state.setdefault(int(index), {})[key] = value
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})
    for parameter, values in optimizer.state.items():
        for key, value in values.items():
            if value.shape == parameter.shape:  # the fused step goes through memory: both must lie there alike
                values[key] = torch.empty_like(parameter).copy_(value)


def _steps(job: _Job) -> int:
    """Of an epoch."""
    return max(1, len(_train_order(job, 0)))


def _epoch(job: _Job, learner: _Learner, place: Step, done: int) -> Epoch:
    """One pass over the training images, then one over the validation images. done: the phase's epochs before it."""
    recipe, phase, start = job.recipe, learner.phase, time.perf_counter()
    learner.source.prepare(place.epoch)
    torch.manual_seed(_epoch_seed(recipe, place.epoch))
    rng = np.random.default_rng((_epoch_seed(recipe, place.epoch), job.fabric.global_rank))
    learner.model.eval()  # frozen BatchNorms keep the statistics that their weights were trained with
    for part in learner.learning:
        part.train()
    if recipe.train.qat:
        fake_quantization.training_mode(learner.model)
    began, seen, loss_sum, rate = time.perf_counter(), 0, 0.0, 0.0
    for step, batch in enumerate(learner.source.train(place.epoch), start=1):
        fraction = recipe.train.warmup_fraction
        rate = learning_rate(phase.learning_rate, done * place.steps + step, phase.epochs * place.steps, fraction)
        for group in learner.optimizer.param_groups:
            group["lr"] = rate * group["share"]
        loss_sum += _learn(job, learner, batch, rng) * len(batch.sizes)
        seen += len(batch.sizes)
        if not math.isfinite(loss_sum):
            kept = f"; epoch {place.epoch - 1} and those before it are kept" if place.epoch > 1 else ""
            raise ConfigError(f"the loss is no longer finite in epoch {place.epoch}: lower train.learning_rate{kept}")
        speed = seen * job.fabric.world_size / (time.perf_counter() - began)
        job.on_step(replace(place, step=step, loss=loss_sum / seen, images_per_second=speed))
    trained = time.perf_counter()
    train_loss, seen = _mean(_gathered(job.fabric, (loss_sum, seen)))
    with _averaged(learner):
        val_loss, val_metric = _validate(job, learner)
    return Epoch(
        epoch=place.epoch,
        phase=phase.name,
        learning_rate=rate,
        train_loss=train_loss,
        val_loss=val_loss,
        metric=TASKS[recipe.task].METRIC,
        val_metric=val_metric,
        seconds=time.perf_counter() - start,
        images_per_second=seen / (trained - began),
    )


def _averaged(learner: _Learner) -> AbstractContextManager[None]:
    """Within it the network has the averages of its weights, where they are kept."""
    return learner.average.in_place() if learner.average is not None else nullcontext()


def _learn(job: _Job, learner: _Learner, batch: _Inputs, rng: np.random.Generator) -> float:
    """One step → the loss. Where memory is short, the batch is computed in smaller and smaller parts."""
    tensors = _tensors(job, batch)
    others, share = np.arange(len(batch.sizes)), 1.0
    if job.recipe.task == "classify" and job.recipe.train.mixup:
        tensors, others, share = mixed(tensors, job.recipe.train.mixup, rng)
    while True:
        learner.optimizer.zero_grad()
        try:
            loss = _backward(job, learner, tensors, batch.labels, others, share)
        except (torch.OutOfMemoryError, RuntimeError) as error:
            if not _is_out_of_memory(error):
                raise
            if len(batch.sizes) < 4 * learner.parts:
                raise SetupError(
                    "not enough memory even for two images at a time: make the images (model.input_size) smaller, or "
                    "let less of the network learn (train.unfrozen_fraction)"
                ) from None
            learner.parts *= 2
            job.on_note(f"not enough memory: batches are computed in {learner.parts} parts from here on")
            continue
        learner.optimizer.step()
        if learner.average is not None:
            learner.average.update()
        return loss


def _backward(
    job: _Job, learner: _Learner, tensors: Sequence[torch.Tensor], labels: Any, others: np.ndarray, share: float
) -> float:
    """The gradients of a batch → its loss. share: of each row its own label's; the rest is its partner's in others."""
    total, count = 0.0, len(others)
    size = -(-count // learner.parts)
    for start in range(0, count, size):
        rows = slice(start, start + size)
        with FastGradients():
            outputs = learner.module(*(each[rows] for each in tensors))
        loss = learner.loss(outputs, labels[rows])
        if share < 1:
            loss = share * loss + (1 - share) * learner.loss(outputs, labels[others][rows])
        loss = loss * (len(others[rows]) / count)
        job.fabric.backward(loss)
        total += float(loss.detach())
    return total


def _is_out_of_memory(error: BaseException) -> bool:
    """torch raises its own error for a GPU and a plain RuntimeError for the host."""
    return isinstance(error, torch.OutOfMemoryError) or "not enough memory" in str(error)


def _tensors(job: _Job, batch: _Inputs) -> tuple[torch.Tensor, ...]:
    found = (torch.from_numpy(array).to(job.fabric.device) for array in batch.arrays)
    return tuple(each.contiguous(memory_format=torch.channels_last) if each.dim() == 4 else each for each in found)


def _validate(job: _Job, learner: _Learner) -> tuple[float, float]:
    """→ the mean loss and the task's metric, 0..1, on whole, unaugmented images.

    The network is without Fabric around it, so in float32, as it will be exported, whatever it is trained in; where it
    is fake-quantized, the figures are the quantized network's, and so is the choice of the best epoch.
    """
    task = TASKS[job.recipe.task]
    learner.model.eval()
    loss_sum = 0.0
    found: list[runner.Results] = []
    for batch in learner.source.val():
        with torch.inference_mode():
            outputs = learner.source.module(*_tensors(job, batch))
            loss_sum += float(learner.loss(outputs, batch.labels)) * len(batch.sizes)
        found += answers(named(outputs, job.recipe.task), job.spec, batch.sizes)
    order = [index for batch in _val_order(job) for index in batch]
    gathered = _gathered(job.fabric, (loss_sum, list(zip(order, found, strict=True))))
    pairs = sorted((pair for _, part in gathered for pair in part), key=lambda pair: pair[0])
    samples = job.dataset.val
    return sum(loss for loss, _ in gathered) / len(samples), task.metric([answer for _, answer in pairs], samples)


def _gathered(fabric: Fabric, value: Any) -> list[Any]:
    """What each process has, in their order."""
    if fabric.world_size == 1:
        return [value]
    values = [None] * fabric.world_size
    torch.distributed.all_gather_object(values, value)
    return values


def _mean(parts: Sequence[tuple[float, int]]) -> tuple[float, int]:
    """Sums and counts → the mean and the count."""
    count = sum(count for _, count in parts)
    return sum(total for total, _ in parts) / count, count
