"""A training as its parts see it: what stays the same, its phases, and who of several processes does what."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from lightning_fabric import Fabric

from edgekit import backbones, runner
from edgekit.batches import batch_order
from edgekit.datasets import Dataset
from edgekit.errors import DataError
from edgekit.recipe import Recipe
from edgekit.tasks import TASKS


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
class Phase:
    name: str
    epochs: int
    learning_rate: float
    stages: int  # how many of the backbone's stages learn, from the last


@dataclass(frozen=True)
class Watch:
    """Who is told how a training goes on."""

    on_step: Callable[[Step], None] = lambda step: None
    on_epoch: Callable[[Epoch], None] = lambda epoch: None
    on_image: Callable[[str, int, int], None] = lambda name, done, total: None  # of some work on images, by its name
    on_note: Callable[[str], None] = lambda text: None  # what the user should know and is no error


@dataclass(frozen=True)
class Job:
    """What stays the same through a run."""

    recipe: Recipe
    spec: runner.Spec
    dataset: Dataset
    fabric: Fabric
    watch: Watch


def phases_of(recipe: Recipe, model: torch.nn.Module) -> tuple[Phase, Phase]:
    """The head alone, then the head with the backbone's last stages; either may have no epochs."""
    train = recipe.train
    count = round(train.unfrozen_fraction * len(stages_of(recipe, model)))
    return (
        Phase("head", train.head_epochs, train.head_learning_rate, 0),
        Phase("stages", train.epochs, train.learning_rate, count),
    )


def learning_parts(recipe: Recipe, phase: Phase, model: torch.nn.Module) -> list[torch.nn.Module]:
    """What a phase trains, in the network's order, the head last."""
    stages = stages_of(recipe, model)
    return [*stages[len(stages) - phase.stages :], TASKS[recipe.task].head(model)]


def stages_of(recipe: Recipe, model: torch.nn.Module) -> list[torch.nn.Module]:
    """The backbone's stages, in its order."""
    return [module for _, module in backbones.stages(TASKS[recipe.task].trunk(model))]


def epoch_seed(recipe: Recipe, epoch: int) -> int:
    """Of all the epoch's randomness, so that resuming repeats it."""
    return recipe.train.seed * 100_003 + epoch


def train_order(job: Job, epoch: int) -> list[list[int]]:
    """This process's share of each of an epoch's batches: indices of training images.

    A batch that would leave a process a single image is left out: BatchNorm cannot learn from it. So is, on a GPU, a
    smaller one at the end of whole ones: cuDNN's plans for another shape take longer than an epoch of a small data set.
    """
    order = batch_order(
        len(job.dataset.train),
        job.recipe.train.batch_size,
        epoch_seed(job.recipe, epoch),
        rank=job.fabric.global_rank,
        processes=job.fabric.world_size,
        least=2,
    )
    if job.fabric.device.type == "cpu":
        return order
    return [batch for batch in order if len(batch) == len(order[0])]


def val_order(job: Job) -> list[list[int]]:
    """This process's share of the validation images, in batches of indices."""
    rank, processes = job.fabric.global_rank, job.fabric.world_size
    order = batch_order(
        len(job.dataset.val), job.recipe.train.batch_size, None, rank=rank, processes=processes, least=0
    )
    return [batch for batch in order if batch]


def steps_of(job: Job) -> int:
    """Steps of an epoch. Raises DataError where there are too few images for one."""
    steps = len(train_order(job, 0))
    if not steps:
        raise DataError("too few training images: each process needs two at least")
    return steps


def gathered(fabric: Fabric, value: Any) -> list[Any]:
    """What each process has of something, in their order; it must be picklable."""
    if fabric.world_size == 1:
        return [value]
    values = [None] * fabric.world_size
    torch.distributed.all_gather_object(values, value)
    return values
