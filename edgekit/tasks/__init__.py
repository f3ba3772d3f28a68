"""What can be learnt: one module a task, each with the same few functions.

OUTPUTS, METRIC                              the outputs' names, and that of the one figure that int8 must keep
ANSWERS                                      which answers its figures need: options of the runner's postprocessing
build(recipe, class_names) -> nn.Module      the network, its head new
trunk(model), head(model) -> nn.Module       the backbone inside; the part that is trained first
loss(outputs, labels, recipe) -> Tensor      what training makes small
metric(answers, samples) -> float            METRIC, 0..1
metrics(answers, samples, class_names) -> Metrics
agreement(answers, others, spec) -> float    how alike two networks' answers are, 0..1
mistakes(answers, samples, class_names) -> tuple[Mistake, ...]

outputs are as the network's forward gives them, labels as batches.Batch has them. answers: of each image what the
runner gives, as runner.plain makes it; of classification every class (top_k=0), of detection also what is unlikely
(min_score=0.01). samples: the truth, in the same order.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from edgekit import runner
from edgekit.artifacts import RunFolder
from edgekit.errors import ArtifactError
from edgekit.tasks import classify, detect, segment

TASKS = {"classify": classify, "detect": detect, "segment": segment}


def load(run: RunFolder) -> torch.nn.Module:
    """The trained network of a run folder, on the CPU, in eval mode. Raises ArtifactError when the file is damaged."""
    recipe, spec = run.read_recipe(), run.read_spec()
    model: torch.nn.Module = TASKS[recipe.task].build(recipe, spec.class_names, pretrained=False)
    try:
        model.load_state_dict(load_file(run.weights))
    except (OSError, SafetensorError, RuntimeError) as error:
        reason = str(error).splitlines()[0]
        raise ArtifactError(f"{run.weights} does not hold this run's network ({reason}): train it again") from None
    return model.eval()


def forward(model: torch.nn.Module, blobs: np.ndarray, task: str) -> runner.Outputs:
    """float32 (N, 3, h, w) → the task's OUTPUTS by name, float32, N rows each; computed where the model is."""
    device = next(model.parameters()).device
    with torch.inference_mode():
        images = torch.from_numpy(blobs).to(device).contiguous(memory_format=torch.channels_last)
        return named(model(images), task)


def named(found: torch.Tensor | Sequence[torch.Tensor], task: str) -> runner.Outputs:
    """What a network gives → the task's OUTPUTS by name, float32."""
    outputs = (found,) if isinstance(found, torch.Tensor) else found
    return {
        name: output.float().cpu().contiguous().numpy()
        for name, output in zip(TASKS[task].OUTPUTS, outputs, strict=True)
    }


def answers(outputs: runner.Outputs, spec: runner.Spec, sizes: Sequence[tuple[int, int]]) -> list[runner.Results]:
    """Outputs, N rows each, of photos of these sizes, (height, width) → their plain answers, as figures take them."""
    task = TASKS[spec.task]
    rows = ({name: array[i : i + 1] for name, array in outputs.items()} for i in range(len(sizes)))
    return [
        runner.plain(runner.POSTPROCESS[spec.task](row, spec, size, **task.ANSWERS))
        for row, size in zip(rows, sizes, strict=True)
    ]
