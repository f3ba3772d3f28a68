"""Images for a GPU: decoded and augmented by other processes, as bytes, and normalized where they are needed.

`batches.batches` works in threads, which ask for the interpreter's lock each time OpenCV is done with something; a loop
that keeps a GPU busy holds it nearly always, and the threads wait.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from edgekit import runner
from edgekit.batches import Item, Labels, load_batch
from edgekit.errors import DataError
from edgekit.recipe import Augment

WORKERS = 16  # at most
PREFETCH = 2  # batches that a worker is ahead
SHARED_MEMORY = Path("/dev/shm")  # of Linux; containers often have 64 MB of it


@dataclass(frozen=True)
class Loaded:
    """images: float32 (N, 3, h, w) on the device, channels_last; labels, sizes: as batches.Batch has them."""

    images: torch.Tensor
    labels: Labels
    sizes: tuple[tuple[int, int], ...]


class Loader:
    """Worker processes, which start with the first batch asked for and live as long as this."""

    def __init__(self, spec: runner.Spec, augment: Augment, device: torch.device, workers: int) -> None:
        """workers: 1 or more; `worker_count` says how many."""
        self._device = device
        self._normalized = normalizer(spec, device)
        self._asked: list[Sequence[Item]] = []
        self._loader: DataLoader[Any] = DataLoader(
            _Photos(spec, augment),
            batch_size=None,  # a worker makes whole batches
            sampler=_Asked(self._asked),
            num_workers=workers,
            collate_fn=_as_it_is,
            pin_memory=device.type == "cuda",
            worker_init_fn=_one_thread,
            prefetch_factor=PREFETCH,
            persistent_workers=True,
        )

    def batches(self, asked: Sequence[Sequence[Item]]) -> Iterator[Loaded]:
        """A batch for each list of items, in order; one iterator at a time.

        Raises DataError, naming the file, where one has vanished or broken since the check.
        """
        self._asked[:] = asked
        for found in self._start():
            if isinstance(found, DataError):
                raise found
            images, labels, sizes = found
            yield Loaded(self._normalized(images.to(self._device, non_blocking=True)), labels, sizes)

    def _start(self) -> Iterator[Any]:
        threads = cv2.getNumThreads()
        cv2.setNumThreads(1)  # a forked process has no threads of OpenCV's pool, and would wait for them
        try:
            return iter(self._loader)
        finally:
            cv2.setNumThreads(threads)


def worker_count(spec: runner.Spec, batch_size: int) -> int:
    """How many processes suit the CPUs, and the memory that is shared with them; 0: there is room for none."""
    cpus = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    beside = int(os.environ.get("LOCAL_WORLD_SIZE", 1))  # of torchrun's, each with workers of its own
    wanted = max(1, min(WORKERS, cpus // beside))
    if not SHARED_MEMORY.is_dir():
        return wanted
    height, width = spec.input_size
    room = shutil.disk_usage(SHARED_MEMORY).free // (3 * height * width * batch_size) // beside
    return max(0, min(wanted, room // PREFETCH - 1))


def normalizer(spec: runner.Spec, device: torch.device) -> Callable[[torch.Tensor], torch.Tensor]:
    """→ runner.normalize for images on the device: uint8 (N, h, w, 3) BGR → float32 (N, 3, h, w), channels_last.

    What runner.normalize gives for each value and channel is looked up, so the numbers are its own.
    """
    values = np.arange(256, dtype=np.uint8).reshape(1, 16, 16, 1).repeat(3, axis=3)
    table = torch.from_numpy(runner.normalize(values, spec)).reshape(3, 256).to(device)
    channels = (2, 1, 0) if spec.color_order == "rgb" else (0, 1, 2)

    def normalized(images: torch.Tensor) -> torch.Tensor:
        planes = [row[images[..., channel].long()] for row, channel in zip(table, channels, strict=True)]
        return torch.stack(planes, dim=-1).permute(0, 3, 1, 2)

    return normalized


class _Photos(Dataset[Any]):
    """In a worker: the items of a batch → (images, labels, sizes), or what is wrong with one."""

    def __init__(self, spec: runner.Spec, augment: Augment) -> None:
        self._spec = spec
        self._augment = augment

    def __getitem__(self, items: Sequence[Item]) -> Any:
        try:
            batch = load_batch(items, self._spec, self._augment)
        except DataError as error:
            return error  # raised here it would carry the worker's whole traceback in its text
        return torch.from_numpy(batch.images), batch.labels, batch.sizes


class _Asked:
    """Iterates over what the list holds when it is begun."""

    def __init__(self, asked: list[Sequence[Item]]) -> None:
        self._asked = asked

    def __iter__(self) -> Iterator[Sequence[Item]]:
        return iter(list(self._asked))

    def __len__(self) -> int:
        return len(self._asked)


def _as_it_is(batch: Any) -> Any:
    return batch


def _one_thread(_: int) -> None:
    cv2.setNumThreads(1)
