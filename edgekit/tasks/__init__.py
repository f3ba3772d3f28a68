"""What can be learnt: one module a task, each with the same few functions.

build(recipe, class_names) -> nn.Module      the network, its head new
head(model) -> nn.Module                     the part that is trained first
loss(outputs, labels, recipe) -> Tensor      what training makes small
metrics(scores, labels, class_names) -> Metrics
METRIC, metric(outputs, labels) -> float     the one figure that int8 must keep, and its name
agreement(outputs, others) -> float          how often two networks give the same answer
"""

from __future__ import annotations

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from edgekit import runner
from edgekit.artifacts import RunFolder
from edgekit.errors import ArtifactError
from edgekit.tasks import classify

TASKS = {"classify": classify}


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


def forward(model: torch.nn.Module, blobs: np.ndarray) -> runner.Outputs:
    """float32 (N, 3, h, w) → the network's outputs by name, float32, N rows each; computed where the model is."""
    device = next(model.parameters()).device
    with torch.inference_mode():
        images = torch.from_numpy(blobs).to(device).contiguous(memory_format=torch.channels_last)
        return {"logits": model(images).float().cpu().numpy()}
