"""An epoch's figures as TensorBoard reads them, beside history.csv."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import TYPE_CHECKING

from edgekit.errors import SetupError

if TYPE_CHECKING:
    from edgekit.jobs import Epoch


def require_tensorboard() -> None:
    """Raises SetupError where the package is not installed."""
    if importlib.util.find_spec("tensorboard") is None:
        raise SetupError("train.tensorboard needs the package tensorboard: pip install 'edgekit[tensorboard]'")


def log_epoch(folder: Path, row: Epoch) -> None:
    """Writes a file of its own into the folder; TensorBoard reads all of them as one run. Raises SetupError."""
    require_tensorboard()
    from torch.utils.tensorboard import SummaryWriter

    with SummaryWriter(str(folder), purge_step=row.epoch) as writer:
        writer.add_scalar("loss/train", row.train_loss, row.epoch)
        writer.add_scalar("loss/val", row.val_loss, row.epoch)
        writer.add_scalar(f"val/{row.metric}", row.val_metric, row.epoch)
        writer.add_scalar("learning_rate", row.learning_rate, row.epoch)
        writer.add_scalar("images_per_second", row.images_per_second, row.epoch)
