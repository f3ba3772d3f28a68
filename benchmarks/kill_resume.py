"""Does a run that is killed and resumed end with the weights of one that was not? kill -9 at random moments.

    uv run python benchmarks/kill_resume.py ../shared/data/signs/Dataset

One run goes through as it is. Then --runs others (ten) are each killed --kills times (once) at a moment drawn evenly
from the time that the first one took, its start included, and resumed until they end. Each has its own, empty cache of
features. A row of the table is a kill: after how many seconds, what was kept then, and in a run's last row whether all
tensors of model.safetensors and of the saved state, spec.json and the figures of history.csv are those of the first.
Everything that a run may keep takes part: both phases, views, mixup, class weights, layer decay, averaged weights.
Exit code 1 where one is not identical.
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from edgekit.artifacts import write_text
from edgekit.recipe import make_recipe, suggest, to_toml

TRAIN = {
    "head_epochs": 2,
    "epochs": 4,
    "views": 2,
    "mixup": 0.2,
    "class_balance": 0.5,
    "layer_decay": 0.7,
    "ema_decay": 0.95,
}
TIMED = ("seconds", "images_per_second")  # columns of history.csv that no two runs share


@dataclass(frozen=True)
class Kill:
    """One kill -9. identical: None but for the last kill of a run."""

    run: str
    second: float  # after its process started
    kept: str  # the last epoch's phase and number
    identical: bool | None = None


def main() -> int:
    """Prints the table, or one JSON list with --json; → the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path)
    parser.add_argument("--runs", type=int, default=10)
    parser.add_argument("--kills", type=int, default=1)
    parser.add_argument("--backbone", default="tf_efficientnet_lite0")
    parser.add_argument("--no-pretrained", action="store_true")
    parser.add_argument("--image-size", type=int, default=128)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--work", type=Path, help="a folder for the runs; a temporary one where it is left out")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        rows = measure(options, options.work or Path(temporary))
    if options.json:
        print(json.dumps([asdict(row) for row in rows]))
    return 0 if all(row.identical is not False for row in rows) else 1


def measure(options: argparse.Namespace, work: Path) -> list[Kill]:
    """All the runs; prints a line a kill, unless --json is given."""
    recipe = work / "recipe.toml"
    raw = suggest(str(options.data.absolute()), ()).model_dump()
    raw["model"] = {
        "backbone": options.backbone,
        "pretrained": not options.no_pretrained,
        "input_size": (options.image_size, options.image_size),
    }
    raw["train"] |= TRAIN
    write_text(recipe, to_toml(make_recipe(raw)))
    began = time.monotonic()
    assert start(work, "whole", recipe).wait() == 0
    whole_s = time.monotonic() - began
    rng, rows = random.Random(options.seed), []
    if not options.json:
        print(f"uninterrupted: {whole_s:.0f} s\n{'run':<10} {'killed after':>12}  {'kept':<10} identical")
    for number in range(options.runs):
        name = f"killed-{number}"
        for kill in range(options.kills):
            moment = rng.uniform(0, whole_s)
            row = Kill(name, round(moment, 2), killed(work, name, recipe, moment))
            if kill == options.kills - 1:
                assert start(work, name, recipe).wait() == 0
                row = Kill(row.run, row.second, row.kept, is_same(work / "runs" / "whole", work / "runs" / name))
            rows.append(row)
            if not options.json:
                verdict = {None: "", True: "identical", False: "DIFFERENT"}[row.identical]
                print(f"{row.run:<10} {row.second:>10.2f} s  {row.kept:<10} {verdict}", flush=True)
    return rows


def start(work: Path, name: str, recipe: Path) -> subprocess.Popen[bytes]:
    """A process that begins the run, or goes on with what there is of it."""
    run = work / "runs" / name
    begin = ["--recipe", str(recipe), "--name", name, "--runs", str(work / "runs")]
    words = ["--resume", str(run)] if run.exists() else begin
    command = [sys.executable, "-m", "edgekit", "finetune", *words]
    environment = {**os.environ, "EDGEKIT_CACHE": str(work / "caches" / name)}
    with (work / f"{name}.log").open("ab") as log:
        return subprocess.Popen(command, env=environment, stdout=log, stderr=log)


def killed(work: Path, name: str, recipe: Path, moment: float) -> str:
    """Kills the run's process after so many seconds; → what it has kept by then."""
    child = start(work, name, recipe)
    try:
        assert child.wait(moment) == 0  # it had ended before
    except subprocess.TimeoutExpired:
        child.kill()
        child.wait()
    history = history_of(work / "runs" / name)
    return f"{history[-1]['phase']} {history[-1]['epoch']}" if history else "nothing"


def history_of(run: Path) -> list[dict[str, str]]:
    """history.csv, without what is timed."""
    if not (run / "history.csv").is_file():
        return []
    with (run / "history.csv").open(encoding="utf-8", newline="") as stream:
        return [{key: value for key, value in row.items() if key not in TIMED} for row in csv.DictReader(stream)]


def is_same(one: Path, other: Path) -> bool:
    """Bit for bit, but for the times in the history."""
    tensors = ("model.safetensors", "state/last.safetensors")
    return (
        all(_same_tensors(load_file(one / name), load_file(other / name)) for name in tensors)
        and (one / "spec.json").read_bytes() == (other / "spec.json").read_bytes()
        and history_of(one) == history_of(other)
    )


def _same_tensors(one: dict[str, Any], other: dict[str, Any]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


if __name__ == "__main__":
    sys.exit(main())
