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
from edgekit.jobs import Watch
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


def pipeline(
    recipe: Recipe,
    target: Target,
    runs: Path,
    dist: Path,
    *,
    on_stage: Callable[[str], None] = lambda name: None,
    watch: Watch = Watch(),  # noqa: B008 (it is frozen)
) -> Outcome:
    """Images → trained network → proved ONNX → bundle that checks itself → figures of all three side by side."""
    on_stage("data")
    data = recipe.data
    dataset = read_dataset(Path(data.path), recipe.task, val_fraction=data.val_fraction, split_seed=data.split_seed)
    on_stage("finetune")
    trained = finetune(recipe, dataset, runs, watch=watch)
    on_stage("export")
    exported = export(trained.run, target.form)
    on_stage("verify")
    verify(trained.run, unproved(trained.run, target.prove_on))
    if target.precision != "fp32":
        on_stage("quantize")
        quantize(trained.run, target, progress=watch.on_image)
    on_stage("bundle")
    bundled = bundle(trained.run, target, dist)
    on_stage("evaluate")
    evaluation = evaluate(trained.run, bundled.path, on_image=watch.on_image)
    return Outcome(trained, exported, bundled, evaluation)
