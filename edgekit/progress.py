"""Progress on the terminal (stderr): what is being done, how far it is, when it will end.

Where stderr is no terminal (CI, a file), only whole lines are written: a heading a stage and a line an epoch.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from edgekit.terminal import is_first_process

if TYPE_CHECKING:
    from edgekit.jobs import Epoch, Step
    from edgekit.tuning import Standing

console = Console(stderr=True, highlight=False, quiet=not is_first_process())


class Display:
    """One bar at a time; its methods are the callbacks that the stages take."""

    def __init__(self, progress: Progress) -> None:
        """progress: a started rich Progress."""
        self._progress = progress
        self._task: TaskID | None = None
        self._name = ""

    def stage(self, name: str) -> None:
        """A heading; the bars that follow belong to it."""
        self._drop()
        self._progress.console.print(f"[bold]{name}[/bold]")

    def busy(self, name: str) -> None:
        """Work of unknown length, such as importing torch, which takes seconds."""
        self._show(name, 0, None, "")

    def images(self, name: str, done: int, total: int) -> None:
        """`done` of `total` images of some named work."""
        self._show(name, done, total, "")

    def work(self, name: str, done: int, total: int) -> None:
        """`done` of `total` steps of some named work; a total of 0 is not known."""
        self._show(name, done, total or None, "")

    def files(self, done: int, total: int) -> None:
        """`done` of `total` files read and checked."""
        self._show("checking images", done, total, "")

    def step(self, step: Step) -> None:
        """A training step: the bar runs over all the epochs, so that its ETA is the run's."""
        done, total = (step.epoch - 1) * step.steps + step.step, step.epochs * step.steps
        note = f"loss {step.loss:.3f}  {step.images_per_second:.0f} images/s"
        self._show(f"epoch {step.epoch}/{step.epochs} ({step.phase})", done, total, note)

    def epoch(self, epoch: Epoch) -> None:
        """A line that stays."""
        figure = f"{epoch.metric} {100 * epoch.val_metric:.2f} %"
        self._progress.console.print(
            f"  epoch {epoch.epoch:>2} {epoch.phase:<6}  loss {epoch.train_loss:.3f}  val {epoch.val_loss:.3f}  "
            f"{figure}  {epoch.images_per_second:.0f} images/s  {epoch.seconds:.0f} s"
        )

    def trial(self, standing: Standing) -> None:
        """Two lines that stay: how a trial of a search went, and what it changed of the recipe."""
        self._drop()
        trial, best = standing.trial, standing.best
        end = f" ({trial.reason or 'given up early'})" if trial.state == "pruned" else ""
        so_far = f"best {100 * (best.val_metric or 0):.2f} % (trial {best.number})"
        figure = "no epoch ended" if trial.val_metric is None else f"{trial.metric} {100 * trial.val_metric:.2f} %"
        changes = ", ".join(f"{name} {trial.settings[name]:g}" for name in trial.changed) or "the recipe as it is"
        self._progress.console.print(
            f"trial {trial.number:>2}  {figure}{end}  {so_far}  {standing.finished} of {standing.trials}\n  {changes}",
            markup=False,
            soft_wrap=True,
        )

    def note(self, text: str) -> None:
        """What the user should know; it stays."""
        self._progress.console.print(f"  {text}")

    def _show(self, name: str, done: int, total: int | None, note: str) -> None:
        same_work = self._task is not None and (name == self._name or name.startswith("epoch"))
        if not same_work:
            self._drop()
            self._task = self._progress.add_task(name, total=total, note=note)
        assert self._task is not None
        self._name = name
        self._progress.update(self._task, description=name, completed=done, total=total, note=note)

    def _drop(self) -> None:
        if self._task is not None:
            self._progress.remove_task(self._task)
            self._task = None


@contextmanager
def display() -> Iterator[Display]:
    """A live display on stderr until the block ends."""
    columns = (
        TextColumn("{task.description}"),
        BarColumn(bar_width=24),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("ETA"),
        TimeRemainingColumn(),
        TextColumn("{task.fields[note]}"),
    )
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:
        yield Display(progress)
