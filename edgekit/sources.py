"""What a network learns from: images, or what its frozen part gives for them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch

from edgekit import frozen, runner
from edgekit.batches import batches, items_of, load_image
from edgekit.features import PLAIN, Features, open_features
from edgekit.jobs import Job, epoch_seed, gathered, learning_parts, phases_of, stages_of, train_order, val_order
from edgekit.loader import SHARED_MEMORY, Loader, worker_count
from edgekit.samples import Sample

CACHE_BYTES = 8 << 30  # of the features that are kept for all runs


@dataclass(frozen=True)
class Inputs:
    """What the learning part of the network sees of a batch, and what is true of it."""

    arrays: tuple[np.ndarray | torch.Tensor, ...]  # float32 (N, ...) each
    labels: Any  # as batches.Batch has them
    sizes: tuple[tuple[int, int], ...]  # (height, width) of the photos; of features, which need none, the input's


@dataclass(frozen=True)
class Source:
    """Of several processes each has its share of every batch, and of the validation images."""

    module: torch.nn.Module  # what learns: the network, or its half behind the frozen one
    prepare: Callable[[int], None]  # computes what an epoch (its number) needs and is not kept yet
    train: Callable[[int], Iterator[Inputs]]  # an epoch's number → its batches
    val: Callable[[], Iterator[Inputs]]


def sources_of(job: Job, model: torch.nn.Module, epochs_done: int) -> list[Source]:
    """What each phase learns from: features where layers are frozen and there is room to keep them, else the images.

    epochs_done: the last epoch's number. What a phase that is over learnt from is not prepared again, but for the last
    one's: the kept weights are calibrated on that.
    """
    model.to(job.fabric.device).to(memory_format=torch.channels_last).requires_grad_(False)
    phases = phases_of(job.recipe, model)
    sources = [_image_source(job, model)] * len(phases)
    ends = np.cumsum([phase.epochs for phase in phases])
    ahead = [
        index
        for index, phase in enumerate(phases)
        if phase.epochs
        and (ends[index] > epochs_done or ends[index] == ends[-1])
        and phase.stages < len(stages_of(job.recipe, model))
    ]
    if job.recipe.task != "classify" or not job.recipe.train.views or not ahead:
        return sources
    samples = [sample for part in (job.dataset.train, job.dataset.val) for sample in part[:1]]
    images = runner.normalize(np.stack([load_image(sample, job.spec) for sample in samples]), job.spec)
    trunk, halves = frozen.cuts(
        model.eval(),
        [learning_parts(job.recipe, phases[index], model) for index in ahead],
        torch.from_numpy(images).to(job.fabric.device),
    )
    if not trunk.parts:
        return sources
    features, views = _open_features(job, frozen.engine(trunk, images, job.fabric.device))
    part = len(trunk.parts)
    for index, half in zip(ahead, halves, strict=True):
        if half is not None and features is not None:
            part -= 1  # the first phase's is the trunk's last: least learns there
            sources[index] = _feature_source(job, features, views, half.learning, part)
    return sources


def _open_features(job: Job, computed: frozen.Frozen) -> tuple[Features | None, int]:
    """→ where features are kept and how many views of an image, the same number in all processes."""
    train, dataset = job.recipe.train, job.dataset
    opened = None
    for rank in range(job.fabric.world_size):  # in turn, as each may make room
        if rank == job.fabric.global_rank:
            opened = open_features(
                computed, job.spec, job.recipe.augment, train.seed, dataset.train, dataset.val, train.views, CACHE_BYTES
            )
        job.fabric.barrier()
    views = min(gathered(job.fabric, 0 if opened is None else opened[1]))
    if opened is None or not views:
        job.watch.on_note("no room for the frozen layers' features: they are computed again in each epoch")
        return None, 0
    if views < train.views:
        job.watch.on_note(f"there is room for the features of {views} views of each image, not {train.views}")
    return opened[0], views


def _image_source(job: Job, model: torch.nn.Module) -> Source:
    train, val, stream = job.dataset.train, job.dataset.val, _image_stream(job)
    return Source(
        model,
        prepare=lambda _: None,
        train=lambda epoch: stream(train, train_order(job, epoch), epoch_seed(job.recipe, epoch)),
        val=lambda: stream(val, val_order(job), None),
    )


def _image_stream(job: Job) -> Callable[[Sequence[Sample], list[list[int]], int | None], Iterator[Inputs]]:
    """→ what gives the batches of samples, by their indices, changed as an epoch's seed says, or as they are (None)."""
    if job.fabric.device.type == "cpu":
        return partial(_by_threads, job)
    workers = worker_count(job.spec, job.recipe.train.batch_size)
    if not workers:
        job.watch.on_note(
            f"too little room in {SHARED_MEMORY} (docker run --shm-size): images are prepared much slower"
        )
        return partial(_by_threads, job)
    return partial(_by_processes, Loader(job.spec, job.recipe.augment, job.fabric.device, workers))


def _by_threads(job: Job, samples: Sequence[Sample], order: list[list[int]], seed: int | None) -> Iterator[Inputs]:
    augment = None if seed is None else job.recipe.augment
    for batch in batches(samples, job.spec, job.recipe.train.batch_size, order=order, augment=augment, seed=seed):
        yield Inputs((runner.normalize(batch.images, job.spec),), batch.labels, batch.sizes)


def _by_processes(
    loader: Loader, samples: Sequence[Sample], order: list[list[int]], seed: int | None
) -> Iterator[Inputs]:
    for loaded in loader.batches([items_of(samples, batch, seed) for batch in order]):
        yield Inputs((loaded.images,), loaded.labels, loaded.sizes)


def _feature_source(job: Job, features: Features, views: int, learning: torch.nn.Module, part: int) -> Source:
    """part: which of the trunk's parts gives what `learning` takes."""
    rank, processes = job.fabric.global_rank, job.fabric.world_size
    told = False

    def fill(samples: Sequence[Sample], view: int) -> None:
        name = "features" if view == PLAIN else f"features, view {view + 1}"
        features.fill(samples[rank::processes], view, part, lambda done, total: job.watch.on_image(name, done, total))

    def prepare(epoch: int) -> None:
        nonlocal told
        fill(job.dataset.val, PLAIN)
        fill(job.dataset.train, epoch % views)
        if processes > 1:
            job.fabric.barrier()
            features.refresh()
        if features.is_full and not told:
            told = True
            job.watch.on_note("the disk is full: what the frozen layers give is computed again where it was not kept")

    def stream(samples: Sequence[Sample], view: int, order: list[list[int]]) -> Iterator[Inputs]:
        for batch in features.batches(samples, view, part, order):
            yield Inputs(batch.arrays, batch.labels, (job.spec.input_size,) * len(batch.labels))

    def train_stream(epoch: int) -> Iterator[Inputs]:
        return stream(job.dataset.train, epoch % views, train_order(job, epoch))

    return Source(learning, prepare, train_stream, lambda: stream(job.dataset.val, PLAIN, val_order(job)))


def on_device(job: Job, batch: Inputs) -> tuple[torch.Tensor, ...]:
    """A batch's arrays as tensors where the training runs, images and maps channels_last."""
    found = (torch.as_tensor(array).to(job.fabric.device) for array in batch.arrays)
    return tuple(each.contiguous(memory_format=torch.channels_last) if each.dim() == 4 else each for each in found)
