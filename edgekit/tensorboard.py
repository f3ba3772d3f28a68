"""An epoch's figures as TensorBoard reads them, beside history.csv."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Protocol

from edgekit.errors import SetupError


class Row(Protocol):
    """What is logged of an epoch: finetune's record."""

    @property
    def epoch(self) -> int:
        """From 1."""

    @property
    def learning_rate(self) -> float:
        """The epoch's last."""

    @property
    def train_loss(self) -> float:
        """Mean over the training images."""

    @property
    def val_loss(self) -> float:
        """Mean over the validation images."""

    @property
    def metric(self) -> str:
        """The name of the task's."""

    @property
    def val_metric(self) -> float:
        """0..1."""

    @property
    def images_per_second(self) -> float:
        """Of training alone."""


def require_tensorboard() -> None:
    """Raises SetupError where the package is not installed."""
    if importlib.util.find_spec("tensorboard") is None:
        raise SetupError("train.tensorboard needs the package tensorboard: pip install 'edgekit[tensorboard]'")


def log_epoch(folder: Path, row: Row) -> None:
    """Writes a file of its own into the folder; TensorBoard reads all of them as one run. Raises SetupError."""
    require_tensorboard()
    from torch.utils.tensorboard import SummaryWriter

    with SummaryWriter(str(folder), purge_step=row.epoch) as writer:
        writer.add_scalar("loss/train", row.train_loss, row.epoch)
        writer.add_scalar("loss/val", row.val_loss, row.epoch)
        writer.add_scalar(f"val/{row.metric}", row.val_metric, row.epoch)
        writer.add_scalar("learning_rate", row.learning_rate, row.epoch)
        writer.add_scalar("images_per_second", row.images_per_second, row.epoch)
