"""A bundle's figure on several OpenCVs, from image bytes, beside torch's.

    uv run python benchmarks/bundle_metric.py RUN BUNDLE --subset test

Each OpenCV is in an environment of its own; the bundle's own run.py answers there for the images, file by file.
"""

from __future__ import annotations

import argparse
import json
import subprocess
from pathlib import Path

from edgekit import runner, tasks
from edgekit.artifacts import open_run
from edgekit.batches import batches
from edgekit.datasets import read_split
from edgekit.environments import opencv_python
from edgekit.samples import Sample


def torch_answers(run: Path, samples: tuple[Sample, ...]) -> list[runner.Results]:
    """The trained network's answers."""
    folder = open_run(run)
    spec, model = folder.read_spec(), tasks.load(folder)
    found: list[runner.Results] = []
    for batch in batches(samples, spec, 8):
        outputs = tasks.forward(model, runner.normalize(batch.images, spec), spec.task)
        found += tasks.answers(outputs, spec, batch.sizes)
    return found


def bundle_answers(bundle: Path, python: Path, task: str, samples: tuple[Sample, ...]) -> list[runner.Results]:
    """The bundle's answers, by an interpreter with the OpenCV that is meant."""
    options = [f"--{name.replace('_', '-')}={value}" for name, value in tasks.TASKS[task].ANSWERS.items()]
    command = [str(python), str(bundle / "run.py"), "infer", "--list", "-", *options]
    names = "".join(f"{sample.path}\n" for sample in samples)
    answer = subprocess.run(command, input=names, capture_output=True, text=True, check=True)
    return [json.loads(line)["results"] for line in answer.stdout.splitlines()]


def main() -> None:
    """Prints a row for torch and for each OpenCV."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("run", type=Path)
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--opencv", default="4.10,4.14,5.0")
    parser.add_argument("--subset", choices=("val", "test"), default="val")
    args = parser.parse_args()
    folder = open_run(args.run)
    spec, split = folder.read_spec(), read_split(folder.split)
    samples = {"val": split.val, "test": split.test}[args.subset]
    task = tasks.TASKS[spec.task]
    expected = torch_answers(args.run, samples)
    best = task.metric(expected, samples)
    print(f"| | {task.METRIC} | from torch | agreement |\n| --- | --- | --- | --- |")
    print(f"| torch | {best:.5f} | | |")
    for version in args.opencv.split(","):
        found = bundle_answers(args.bundle, opencv_python(version), spec.task, samples)
        metric = task.metric(found, samples)
        agreement = task.agreement(found, expected, spec)
        print(f"| OpenCV {version} | {metric:.5f} | {metric - best:+.5f} | {agreement:.5f} |", flush=True)


if __name__ == "__main__":
    main()
