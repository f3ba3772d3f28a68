"""The whole flow, on one screen. The stages meet through the run folder and the records that they return."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from edgekit.bundle import Bundled, bundle
from edgekit.datasets import read_dataset
from edgekit.evaluate import Evaluation, evaluate
from edgekit.export import Exported, export
from edgekit.finetune import Finetuned, finetune
from edgekit.jobs import Epoch, Step
from edgekit.quantize import quantize
from edgekit.recipe import Recipe
from edgekit.targets import Target
from edgekit.verify import unproved, verify


@dataclass(frozen=True)
class Outcome:
    """What each stage came to."""

    trained: Finetuned
    exported: Exported
    bundled: Bundled
    evaluation: Evaluation


@dataclass(frozen=True)
class Watch:
    """Where the stages' progress goes."""

    on_stage: Callable[[str], None] = lambda name: None
    on_step: Callable[[Step], None] = lambda step: None
    on_epoch: Callable[[Epoch], None] = lambda epoch: None
    on_image: Callable[[str, int, int], None] = lambda *_: None


def pipeline(recipe: Recipe, target: Target, runs: Path, dist: Path, watch: Watch = Watch()) -> Outcome:  # noqa: B008
    """Images → trained network → proved ONNX → bundle that checks itself → figures of all three side by side."""
    watch.on_stage("data")
    data = recipe.data
    dataset = read_dataset(Path(data.path), recipe.task, val_fraction=data.val_fraction, split_seed=data.split_seed)
    watch.on_stage("finetune")
    trained = finetune(recipe, dataset, runs, on_step=watch.on_step, on_epoch=watch.on_epoch, on_image=watch.on_image)
    watch.on_stage("export")
    exported = export(trained.run, target.form)
    watch.on_stage("verify")
    verify(trained.run, unproved(trained.run, target.prove_on))
    if target.precision != "fp32":
        watch.on_stage("quantize")
        quantize(trained.run, target, progress=watch.on_image)
    watch.on_stage("bundle")
    bundled = bundle(trained.run, target, dist)
    watch.on_stage("evaluate")
    evaluation = evaluate(trained.run, bundled.path, on_image=watch.on_image)
    return Outcome(trained, exported, bundled, evaluation)
