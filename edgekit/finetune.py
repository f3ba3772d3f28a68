"""finetune: labelled images → a run folder with a trained network.

First the new head learns while the backbone is frozen, then the head and the backbone's last stages learn together.
Every epoch's randomness comes from (seed, epoch) alone, and the state that an epoch ends with is saved whole, so a
run that is interrupted (Ctrl-C, kill -9, power) and resumed ends with the weights of one that was not.

A quantization-aware run (`finetune_qat`) is a run like any other, but that it starts from a whole trained network and
trains, and validates, with the rounding of int8 in it.
"""

from __future__ import annotations

import csv
import io
import json
import logging
import math
import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any, cast

import torch
from lightning_fabric import Fabric
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from timm import optim

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
from edgekit.batches import batches
from edgekit.datasets import Dataset, missing, read_split, write_split
from edgekit.doctor import cpu_computes_bfloat16
from edgekit.errors import ArtifactError, ConfigError, DataError, Interrupted, SetupError
from edgekit.preflight import preflight
from edgekit.recipe import Recipe, to_toml
from edgekit.samples import Mask, Sample
from edgekit.tasks import TASKS, answers, forward

CHECK_IMAGES = 8


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
    """What stays the same through a run."""

    run: RunFolder
    recipe: Recipe
    spec: runner.Spec
    dataset: Dataset
    on_step: Callable[[Step], None]
    on_epoch: Callable[[Epoch], None]


def finetune(
    recipe: Recipe,
    dataset: Dataset,
    runs: Path = Path("runs"),
    *,
    opencv: Sequence[str] = (),
    on_step: Callable[[Step], None] = lambda step: None,
    on_epoch: Callable[[Epoch], None] = lambda epoch: None,
) -> Finetuned:
    """Trains what the recipe says on the data set and leaves a new run folder under `runs`.

    The folder is `recipe.name`, or made from the data's and the backbone's names; an existing one is never
    overwritten. opencv: versions on which the network is to run, beside the one here; a backbone that does not is
    refused. Raises ConfigError, DataError, SetupError (no weights to be had) or ArtifactError before training;
    EdgekitError when the loss stops being a number.
    """
    _fabric(recipe)  # a device that is not there is said before anything is made
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
    name = f"{dataset.root.name}-{recipe.model.backbone.replace(':', '-')}"
    check_images = [sample.path for sample in _check_samples(dataset)]
    run = _new_run(recipe, runs, name, dataset, spec, check_images)
    return _train(_Job(run, run.read_recipe(), spec, dataset, on_step, on_epoch), model, [], {})


def finetune_qat(
    source: Path,
    recipe: Recipe,
    runs: Path = Path("runs"),
    *,
    on_step: Callable[[Step], None] = lambda step: None,
    on_epoch: Callable[[Epoch], None] = lambda epoch: None,
) -> Finetuned:
    """Continues from a finished run, quantization-aware, and leaves a new run folder under `runs`.

    recipe: as `recipe.qat_recipe` makes it from the source's. The folder is `recipe.name`, or the source's name and
    "-qat"; an existing one is never overwritten. The source is only read: its split, its spec and its check images
    are the new run's, and its network, head included, is where training starts. Raises ArtifactError, ConfigError,
    DataError or SetupError before training; EdgekitError when the loss stops being a number.
    """
    folder = open_run(source)
    _fabric(recipe)
    spec, dataset, check_images = folder.read_spec(), _present_split(folder), folder.check_images()
    torch.manual_seed(recipe.train.seed)
    model = _start(recipe, spec.class_names)
    fake_quantization.fake_quantize(model)
    run = _new_run(recipe, runs, f"{folder.name}-qat", dataset, spec, check_images)
    return _train(_Job(run, run.read_recipe(), spec, dataset, on_step, on_epoch), model, [], {})


def resume(
    path: Path,
    *,
    on_step: Callable[[Step], None] = lambda step: None,
    on_epoch: Callable[[Epoch], None] = lambda epoch: None,
) -> Finetuned:
    """Continues an interrupted run from its last whole epoch; a finished one is returned as it is.

    Raises ArtifactError when the folder is no run or its state is damaged, DataError when its images have moved.
    """
    run = RunFolder(path)
    if not run.recipe.is_file():
        raise ArtifactError(f"no run folder at {path}: start one with `edgekit finetune DATA`")
    recipe, spec, dataset = run.read_recipe(), run.read_spec(), _present_split(run)
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
    return _train(_Job(run, recipe, spec, dataset, on_step, on_epoch), model, history, tensors)


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
    recipe: Recipe, runs: Path, default_name: str, dataset: Dataset, spec: runner.Spec, check_images: Sequence[Path]
) -> RunFolder:
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
    return RunFolder(path)


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


def _save_epoch(run: RunFolder, history: list[Epoch], model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> None:
    # The weights first: if the power goes before the state is there, the epoch is repeated and gives them again.
    if best_epoch(history) is history[-1]:
        write_bytes(run.weights, save(_on_cpu(fake_quantization.plain_state(model))))
    tensors = {f"model.{key}": value for key, value in _on_cpu(model.state_dict()).items()}
    for index, values in optimizer.state_dict()["state"].items():
        tensors |= {f"optimizer.{index}.{key}": value for key, value in _on_cpu(values).items()}
    write_bytes(run.state, save(tensors, {"history": json.dumps([asdict(row) for row in history])}))
    write_text(run.history, _history_csv(history))


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


def _train(job: _Job, model: torch.nn.Module, history: list[Epoch], tensors: dict[str, torch.Tensor]) -> Finetuned:
    """Runs the epochs that `history` does not have yet. tensors: the saved state that history ended with."""
    fabric = _fabric(job.recipe)
    module = fabric.setup_module(model.to(memory_format=torch.channels_last))
    phases = _phases(job.recipe, model)
    total = sum(phase.epochs for phase in phases)
    try:
        _run_phases(job, phases, history, tensors, fabric, module)
    except KeyboardInterrupt:
        done = f"{len(history)} of {total} epochs are kept"
        raise Interrupted(f"interrupted: {done}; continue with `edgekit finetune --resume {job.run.path}`") from None
    if not history:
        raise DataError("nothing to train: head_epochs and epochs are both 0 in the recipe")
    return Finetuned(job.run.path, best_epoch(history), tuple(history), stopped_early=len(history) < total)


def _run_phases(
    job: _Job,
    phases: Sequence[_Phase],
    history: list[Epoch],
    tensors: dict[str, torch.Tensor],
    fabric: Fabric,
    module: Any,
) -> None:
    """Appends a row an epoch to `history`, each once its state is on disk."""
    resumed, total, first = history[-1].epoch if history else 0, sum(phase.epochs for phase in phases), 1
    for phase in phases:
        optimizer = cast(torch.optim.Optimizer, fabric.setup_optimizers(_optimizer(job.recipe, phase, module.module)))
        for number in range(max(first, resumed + 1), first + phase.epochs):
            if _exhausted(history, phase, job.recipe):
                break
            if number == resumed + 1 and number > first:
                _load_optimizer(optimizer, tensors)
            place = Step(phase.name, number, total, 0, -(-len(job.dataset.train) // job.recipe.train.batch_size), 0, 0)
            history.append(_epoch(job, phase, place, number - first, fabric, module, optimizer))
            _save_epoch(job.run, history, module.module, optimizer)
            job.on_epoch(history[-1])
        first += phase.epochs


def best_epoch(history: Sequence[Epoch]) -> Epoch:
    """The epoch whose weights are kept: the highest validation metric, then the lowest loss, then the first."""
    return max(history, key=lambda row: (row.val_metric, -row.val_loss))


def _fabric(recipe: Recipe) -> Fabric:
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
        return Fabric(accelerator=accelerator, devices=1, precision="bf16-mixed" if is_mixed else "32-true")


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


def _optimizer(recipe: Recipe, phase: _Phase, model: torch.nn.Module) -> torch.optim.Optimizer:
    """Freezes what the phase leaves alone; AdamW for the rest, no decay on biases and norms."""
    model.requires_grad_(False)
    for module in _learning(recipe, phase, model):
        module.requires_grad_(True)
    if phase.stages == len(_stages(recipe, model)):
        model.requires_grad_(True)  # also what belongs to no stage, such as position embeddings
    # timm re-exports it without saying so
    groups = optim.param_groups_weight_decay(model, recipe.train.weight_decay)  # type: ignore[attr-defined]
    return torch.optim.AdamW(groups, lr=phase.learning_rate)


def _learning(recipe: Recipe, phase: _Phase, model: torch.nn.Module) -> list[torch.nn.Module]:
    stages = _stages(recipe, model)
    return [*stages[len(stages) - phase.stages :], TASKS[recipe.task].head(model)]


def _stages(recipe: Recipe, model: torch.nn.Module) -> list[torch.nn.Module]:
    return [module for _, module in backbones.stages(TASKS[recipe.task].trunk(model))]


def _load_optimizer(optimizer: torch.optim.Optimizer, tensors: dict[str, torch.Tensor]) -> None:
    state: dict[int, dict[str, torch.Tensor]] = {}
    for name, value in tensors.items():
        kind, _, rest = name.partition(".")
        if kind == "optimizer":
            index, _, key = rest.partition(".")
            state.setdefault(int(index), {})[key] = value
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})


def _epoch(job: _Job, phase: _Phase, place: Step, done: int, fabric: Fabric, module: Any, optimizer: Any) -> Epoch:
    """One pass over the training images, then one over the validation images. done: the phase's epochs before it."""
    recipe, spec = job.recipe, job.spec
    seed = recipe.train.seed * 100_003 + place.epoch  # all of the epoch's randomness, so that resuming repeats it
    torch.manual_seed(seed)
    module.eval()  # frozen BatchNorms keep the statistics that their weights were trained with
    for part in _learning(recipe, phase, module.module):
        part.train()
    if recipe.train.qat:
        fake_quantization.training_mode(module.module)
    start, seen, loss_sum, rate = time.perf_counter(), 0, 0.0, 0.0
    stream = batches(job.dataset.train, spec, recipe.train.batch_size, augment=recipe.augment, seed=seed)
    for step, batch in enumerate(stream, start=1):
        if len(batch.samples) < 2:
            continue  # BatchNorm cannot learn from a single image
        rate = learning_rate(phase.learning_rate, done * place.steps + step, phase.epochs * place.steps, recipe)
        for group in optimizer.param_groups:
            group["lr"] = rate
        images = torch.from_numpy(runner.normalize(batch.images, spec)).to(fabric.device)
        outputs = module(images.contiguous(memory_format=torch.channels_last))
        loss = TASKS[recipe.task].loss(outputs, batch.labels, recipe)
        optimizer.zero_grad()
        fabric.backward(loss)
        optimizer.step()
        seen += len(batch.samples)
        loss_sum += float(loss.detach()) * len(batch.samples)
        if not math.isfinite(loss_sum):
            raise ConfigError(f"the loss is no longer finite in epoch {place.epoch}: lower train.learning_rate")
        job.on_step(
            replace(place, step=step, loss=loss_sum / seen, images_per_second=seen / (time.perf_counter() - start))
        )
    trained = time.perf_counter()
    val_loss, val_metric = _validate(recipe, spec, job.dataset.val, module.module)
    return Epoch(
        epoch=place.epoch,
        phase=phase.name,
        learning_rate=rate,
        train_loss=loss_sum / seen,
        val_loss=val_loss,
        metric=TASKS[recipe.task].METRIC,
        val_metric=val_metric,
        seconds=time.perf_counter() - start,
        images_per_second=seen / (trained - start),
    )


def learning_rate(peak: float, step: int, steps: int, recipe: Recipe) -> float:
    """The rate at a step (1..steps): a linear rise to `peak`, then half a cosine down towards 0
    (Loshchilov & Hutter, arXiv:1608.03983, without restarts)."""
    warmup = max(1, round(recipe.train.warmup_fraction * steps))
    if step <= warmup:
        return peak * step / warmup
    return peak * 0.5 * (1 + math.cos(math.pi * (step - warmup) / (steps - warmup + 1)))


def _validate(
    recipe: Recipe, spec: runner.Spec, samples: Sequence[Sample], model: torch.nn.Module
) -> tuple[float, float]:
    """→ the mean loss and the task's metric, 0..1, on whole, unaugmented images.

    model: without Fabric around it, so in float32, as it will be exported, whatever it is trained in; where it is
    fake-quantized, the figures are the quantized network's, and so is the choice of the best epoch.
    """
    task = TASKS[recipe.task]
    model.eval()
    loss_sum = 0.0
    found: list[runner.Results] = []
    for batch in batches(samples, spec, recipe.train.batch_size):
        outputs = forward(model, runner.normalize(batch.images, spec), recipe.task)
        arrays = [torch.from_numpy(outputs[name]) for name in task.OUTPUTS]
        loss = task.loss(arrays[0] if len(arrays) == 1 else tuple(arrays), batch.labels, recipe)
        loss_sum += float(loss) * len(batch.samples)
        found += answers(outputs, spec, batch.sizes)
    return loss_sum / len(samples), task.metric(found, samples)
