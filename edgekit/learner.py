"""A phase of a training under way: its steps and its epochs."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
import torch
from lightning_fabric import Fabric

from edgekit import fake_quantization, runner
from edgekit.errors import ConfigError, SetupError
from edgekit.gradients import FastGradients
from edgekit.graphs import Graphed
from edgekit.jobs import (
    Epoch,
    Job,
    Phase,
    Step,
    epoch_seed,
    gathered,
    learning_parts,
    stages_of,
    steps_of,
    val_order,
)
from edgekit.sources import Inputs, Source, on_device
from edgekit.tasks import TASKS, answers, named
from edgekit.training import Average, class_weights, learning_rate, mixed, parameter_groups

AVERAGE = "average."  # before a tensor's name in the saved state
STEPS_BETWEEN_LOOKS = 10  # at a GPU's loss


@dataclass
class Learner:
    """A phase under way."""

    phase: Phase
    source: Source
    model: torch.nn.Module  # the whole network
    learning: Sequence[torch.nn.Module]
    forward: Callable[..., Any]  # the source's module as it learns: in Fabric's precision, on a GPU as a graph
    optimizer: Any
    average: Average | None
    loss: Callable[[Any, Any], torch.Tensor]
    parts: int = 1  # that a batch is computed in; more than one where memory was short


def learner_of(
    job: Job,
    phase: Phase,
    source: Source,
    model: torch.nn.Module,
    tensors: Mapping[str, torch.Tensor],
    epochs_done: int,
) -> Learner:
    """Freezes what the phase leaves alone. tensors: the state to go on from, after so many of the phase's epochs."""
    recipe = job.recipe
    learning = learning_parts(recipe, phase, model)
    model.requires_grad_(False)
    for part in learning:
        part.requires_grad_(True)
    if phase.stages == len(stages_of(recipe, model)):
        model.requires_grad_(True)  # also what belongs to no stage, such as position embeddings
    groups = parameter_groups(model, learning, recipe.train.weight_decay, recipe.train.layer_decay)
    forward: Callable[..., Any] = job.fabric.setup_module(source.module)
    if job.fabric.device.type == "cuda" and job.fabric.world_size == 1 and not recipe.train.qat:
        forward = Graphed(source.module, partial(_uncached, job.fabric))
    adamw = torch.optim.AdamW(groups, lr=phase.learning_rate, fused=True)
    optimizer: Any = job.fabric.setup_optimizers(adamw)
    average = None
    if recipe.train.ema_decay:
        live = model.state_dict() if phase.stages == len(stages_of(recipe, model)) else _states(model, learning)
        average = Average(live, recipe.train.ema_decay, epochs_done * steps_of(job))
    if epochs_done:
        _load_optimizer(optimizer, tensors)
        if average is not None:
            average.load({k[len(AVERAGE) :]: v for k, v in tensors.items() if k.startswith(AVERAGE)})
    loss = partial(TASKS[recipe.task].loss, recipe=recipe)
    if recipe.task == "classify" and recipe.train.class_balance:
        labels = np.array([sample.label for sample in job.dataset.train])
        weights = class_weights(labels, len(job.spec.class_names), recipe.train.class_balance)
        loss = partial(loss, class_weights=weights.to(job.fabric.device))
    return Learner(phase, source, model, learning, forward, optimizer, average, loss)


@contextmanager
def _uncached(fabric: Fabric) -> Iterator[None]:
    """Fabric's autocast without the cache of cast weights, which would end up in a graph."""
    with fabric.autocast():
        enabled, dtype = torch.is_autocast_enabled("cuda"), torch.get_autocast_dtype("cuda")
        with torch.autocast("cuda", dtype, enabled, cache_enabled=False):
            yield


def _states(model: torch.nn.Module, parts: Sequence[torch.nn.Module]) -> dict[str, torch.Tensor]:
    """The parts' tensors under their names in the whole network."""
    return {
        f"{name}.{key}": value
        for name, module in model.named_modules()
        if module in parts
        for key, value in module.state_dict().items()
    }


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


def learn_epoch(job: Job, learner: Learner, place: Step, done: int, kept: int) -> Epoch:
    """One pass over the training images, then one over the validation images.

    done: how many of the phase's epochs are before it; kept: the number of the last epoch, 0 where there is none.
    """
    recipe, phase, start = job.recipe, learner.phase, time.perf_counter()
    learner.source.prepare(place.epoch)
    torch.manual_seed(epoch_seed(recipe, place.epoch))
    rng = np.random.default_rng((epoch_seed(recipe, place.epoch), job.fabric.global_rank))
    learner.model.eval()  # frozen BatchNorms keep the statistics that their weights were trained with
    for part in learner.learning:
        part.train()
    if recipe.train.qat:
        fake_quantization.training_mode(learner.model)
    loss_sum = torch.zeros((), dtype=torch.float64, device=job.fabric.device)
    began, seen, rate, loss = time.perf_counter(), 0, 0.0, 0.0
    for step, batch in enumerate(learner.source.train(place.epoch), start=1):
        fraction = recipe.train.warmup_fraction
        rate = learning_rate(phase.learning_rate, done * place.steps + step, phase.epochs * place.steps, fraction)
        for group in learner.optimizer.param_groups:
            group["lr"] = rate * group["share"]
        loss_sum = loss_sum + learn_step(job, learner, batch, rng) * len(batch.sizes)
        seen += len(batch.sizes)
        if step % STEPS_BETWEEN_LOOKS == 1 or not loss_sum.is_cuda:  # a GPU is idle while one waits for it to look
            loss = _finite(float(loss_sum) / seen, place, kept)
        speed = seen * job.fabric.world_size / (time.perf_counter() - began)
        job.watch.on_step(replace(place, step=step, loss=loss, images_per_second=speed))
    train_loss, seen = _mean(gathered(job.fabric, (_finite(float(loss_sum), place, kept), seen)))
    trained = time.perf_counter()
    with averaged(learner):
        _share_state(job, learner.model)
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


def _finite(loss: float, place: Step, kept: int) -> float:
    if math.isfinite(loss):
        return loss
    rest = f"; the epochs up to {kept} are kept" if kept else ""
    raise ConfigError(f"the loss is no longer finite in epoch {place.epoch}: lower train.learning_rate{rest}")


def averaged(learner: Learner) -> AbstractContextManager[None]:
    """Within it the network has the averages of its weights, where they are kept."""
    return learner.average.in_place() if learner.average is not None else nullcontext()


def learn_step(job: Job, learner: Learner, batch: Inputs, rng: np.random.Generator) -> torch.Tensor:
    """One step → the loss, float64 (), which a GPU may not have computed yet.

    Where memory is short, the batch is computed in smaller and smaller parts.
    """
    tensors = on_device(job, batch)
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
            if job.fabric.world_size > 1:  # the others are in the middle of adding up gradients
                raise SetupError(f"not enough memory for {len(batch.sizes)} images: lower train.batch_size") from None
            if len(batch.sizes) < 4 * learner.parts:
                raise SetupError(
                    "not enough memory even for two images at a time: make the images (model.input_size) smaller, or "
                    "let less of the network learn (train.unfrozen_fraction)"
                ) from None
            learner.parts *= 2
            job.watch.on_note(f"not enough memory: batches are computed in {learner.parts} parts from here on")
            continue
        learner.optimizer.step()
        if learner.average is not None:
            learner.average.update()
        return loss


def _backward(
    job: Job, learner: Learner, tensors: Sequence[torch.Tensor], labels: Any, others: np.ndarray, share: float
) -> torch.Tensor:
    """The gradients of a batch → its loss. share: of each row its own label's; the rest is its partner's in others."""
    total, count = torch.zeros((), dtype=torch.float64, device=job.fabric.device), len(others)
    parts = min(learner.parts, max(1, count // 2))  # BatchNorm cannot learn from a single image
    ends = [count * part // parts for part in range(parts + 1)]
    for rows in map(slice, ends, ends[1:]):
        with FastGradients() if total.device.type == "cpu" else nullcontext():
            outputs = learner.forward(*(each[rows] for each in tensors))
        loss = learner.loss(outputs, labels[rows])
        if share < 1:
            loss = share * loss + (1 - share) * learner.loss(outputs, labels[others][rows])
        loss = loss * (len(others[rows]) / count)
        job.fabric.backward(loss)
        total += loss.detach()
    return total


def _is_out_of_memory(error: BaseException) -> bool:
    """torch raises its own error for a GPU and a plain RuntimeError for the host, with other words on Windows."""
    words = ("can't allocate memory", "not enough memory")
    return isinstance(error, torch.OutOfMemoryError) or any(each in str(error) for each in words)


def _validate(job: Job, learner: Learner) -> tuple[float, float]:
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
            outputs = learner.source.module(*on_device(job, batch))
            loss_sum += float(learner.loss(outputs, batch.labels)) * len(batch.sizes)
        found += answers(named(outputs, job.recipe.task), job.spec, batch.sizes)
    order = [index for batch in val_order(job) for index in batch]
    shares = gathered(job.fabric, (loss_sum, list(zip(order, found, strict=True))))
    pairs = sorted((pair for _, part in shares for pair in part), key=lambda pair: pair[0])
    samples = job.dataset.val
    return sum(loss for loss, _ in shares) / len(samples), task.metric([answer for _, answer in pairs], samples)


def _share_state(job: Job, model: torch.nn.Module) -> None:
    """Gives all processes the first one's tensors: BatchNorm has counted in each what that one saw."""
    if job.fabric.world_size > 1:
        for tensor in model.state_dict().values():
            torch.distributed.broadcast(tensor, 0)


def _mean(parts: Sequence[tuple[float, int]]) -> tuple[float, int]:
    """Sums and counts → the mean and the count."""
    count = sum(count for _, count in parts)
    return sum(total for total, _ in parts) / count, count
