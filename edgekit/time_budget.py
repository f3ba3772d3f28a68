"""How many epochs fit into a time?"""

from __future__ import annotations

import time
from copy import deepcopy
from itertools import islice

import numpy as np
import torch

from edgekit.jobs import Job, gathered, phases_of, steps_of
from edgekit.learner import learn_step, learner_of
from edgekit.recipe import Recipe
from edgekit.sources import sources_of

PROBE_STEPS = 4  # the first of them is slower, and is not timed
VALIDATION_SHARE = 0.4  # of a step's time that a validation batch takes: it goes forward only
MOST_EPOCHS = 100


def within(job: Job, model: torch.nn.Module, budget_s: float, start: float) -> Recipe:
    """The recipe with as many epochs as fit into the budget, which began at `start` (time.perf_counter).

    What a trial of a few steps computes of features is kept; the network is left as it is.
    """
    model = deepcopy(model)
    phases, sources = phases_of(job.recipe, model), sources_of(job, model, 0)
    began = time.perf_counter()
    sources[-1].prepare(0)
    fill_s = (time.perf_counter() - began) / (1 + len(job.dataset.val) / len(job.dataset.train))
    learner = learner_of(job, phases[-1], sources[-1], model, {}, 0)
    rng = np.random.default_rng(0)
    times_s = []
    for batch in islice(sources[-1].train(0), PROBE_STEPS):
        began = time.perf_counter()
        float(learn_step(job, learner, batch, rng))  # of a GPU, this waits until it is done
        times_s.append(time.perf_counter() - began)
    val_batches = len(job.dataset.val) / job.recipe.train.batch_size
    step_s = float(np.median(times_s[1:] or times_s))
    epoch_s = step_s * (steps_of(job) + VALIDATION_SHARE * val_batches)
    left_s = budget_s - (time.perf_counter() - start) - job.recipe.train.head_epochs * epoch_s
    epochs, views = 0, job.recipe.train.views if sources[-1].module is not model else 0
    while epochs < MOST_EPOCHS and left_s >= epoch_s:
        epochs += 1
        left_s -= epoch_s + (fill_s if 1 < epochs <= views else 0)  # the first view is there already
    epochs = max(gathered(job.fabric, max(1, epochs))[0], 1)
    seconds = f"{epoch_s:.0f} s" if epoch_s >= 10 else f"{epoch_s:.1f} s"
    job.watch.on_note(f"an epoch takes about {seconds}: {epochs} of them are planned")
    if budget_s < epoch_s:
        job.watch.on_note(
            "that is longer than the time given: fewer stages (--preset fast) or smaller images would fit"
        )
    train = job.recipe.train.model_copy(
        update={"epochs": epochs, "patience": max(job.recipe.train.patience, epochs // 3)}
    )
    return job.recipe.model_copy(update={"train": train})
