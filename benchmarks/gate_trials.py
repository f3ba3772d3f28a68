"""Is the latency gate's word to be believed? Many whole gates on bundles whose difference is known.

    uv run python benchmarks/gate_trials.py run BUNDLE --out benchmarks/gate_trials/0.jsonl [--minutes 60] [--core 0]
    uv run python benchmarks/gate_trials.py report benchmarks/gate_trials/*.jsonl

What is known is made of real work: where the baseline runs its network 10 times for an answer, the candidate does it
11 times (+10 %), or 21 for 20 (+5 %), or as often (A/A). In "second-place" both are the same bundle, but whichever
process of a pair starts second does 11 for 10, which a gate with a fixed order would call a regression: "fixed-order"
is that gate.

The trials take turns, so that each has its share of the machine's good and bad hours. A line a gate is written when it
ends: `run` can be stopped and started again, in several processes on a core each, until the counts are full. In the
first PAIRS runs of A/A and +10 % the same pair also goes through pytest-benchmark: the suite of this folder, stored for
the baseline, then `--benchmark-compare-fail=median:5%` for the candidate.
"""

from __future__ import annotations

import argparse
import collections
import json
import os
import platform
import random
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from edgekit import runner
from edgekit.artifacts import write_json
from edgekit.blocks import Arm
from edgekit.compare import Evidence, Question, conclude, gather
from edgekit.latency import subject_of
from edgekit.launch import run_py
from edgekit.worker import Worker

VARIABLE = "EDGEKIT_TRIAL_FORWARDS"
PAIRS = 40  # that pytest-benchmark judges too
HERE = Path(__file__).parent


@dataclass(frozen=True)
class Trial:
    """forwards: of the baseline and the candidate, for one answer. runs: that the claim needs."""

    name: str
    forwards: tuple[int, int]
    runs: int
    claim: str
    by_place: bool = False  # the second process of a pair does the second number
    fixed_order: bool = False
    beside: bool = False  # pytest-benchmark judges PAIRS of them too


TRIALS = {
    trial.name: trial
    for trial in (
        Trial("A/A", (10, 10), 299, "0 FAIL in 299 (or 1 in 473): under 1 % false alarms, 95 % sure", beside=True),
        Trial("+10 %", (10, 11), 59, "59 FAIL in 59 (or 92 in 93): power over 95 %, 95 % sure", beside=True),
        Trial("+5 %", (20, 21), 149, "0 FAIL in 149: under 2 % alarms at the limit, 95 % sure"),
        Trial("second-place", (10, 11), 20, "0 FAIL: the order is drawn, so the place is no bias", by_place=True),
        Trial("fixed-order", (10, 11), 5, "what the same bundle gets where the order is fixed", True, True),
    )
}
PATCH = f'''
_forward_once = Session.__call__


def _forwards(self, blob):
    for _ in range(int(os.environ.get("{VARIABLE}", "1"))):
        outputs = _forward_once(self, blob)
    return outputs


Session.__call__ = _forwards

if __name__ == "__main__":'''


def patched(bundle: Path, folder: Path) -> Path:
    """A copy of the bundle whose networks run as often as the variable says."""
    copy = folder / "bundle"
    shutil.copytree(bundle, copy)
    source = (copy / "run.py").read_text(encoding="utf-8")
    assert source.count('\nif __name__ == "__main__":') == 1
    (copy / "run.py").write_text(source.replace('\nif __name__ == "__main__":', PATCH), encoding="utf-8")
    manifest = json.loads((copy / "manifest.json").read_text(encoding="utf-8"))
    manifest["files"]["run.py"] = {
        "sha256": runner.file_sha256(copy / "run.py"),
        "size_bytes": (copy / "run.py").stat().st_size,
    }
    write_json(copy / "manifest.json", {**manifest, "sha256": runner.manifest_sha256(manifest)})
    return copy


def gate(trial: Trial, bundle: Path, seed: int) -> Evidence:
    """One whole gate, as `edgekit compare --profile ci --fail-if 5%` runs it."""
    question = Question(limit=0.05, seed=seed)
    command = run_py(bundle, "worker", "--images", str(bundle), "--threads", "1", "--pin", "--decoded")
    started = 0

    def start(arm: Arm) -> Worker:
        nonlocal started
        place = started % 2
        started += 1
        forwards = trial.forwards[place if trial.by_place else arm == "B"]
        return Worker(["env", f"{VARIABLE}={forwards}", *command])

    return gather(start, question, dice=FixedOrder() if trial.fixed_order else None)


class FixedOrder(random.Random):
    """No dice: the baseline is always first."""

    def sample(self, population: Sequence[Any], k: int, **_: Any) -> list[Any]:
        """The first k, in their order."""
        return list(population)[:k]


def pytest_benchmark_fails(trial: Trial, bundle: Path, folder: Path) -> bool:
    """Does `--benchmark-compare-fail=median:5%` call the candidate a regression?"""
    command = [sys.executable, "-m", "pytest", str(HERE / "test_latency.py"), "-q", "-k", "end_to_end"]
    command += ["--bundle", str(bundle), f"--benchmark-storage={folder}", "-p", "no:cacheprovider"]
    for forwards, options in zip(
        trial.forwards,
        (["--benchmark-save=base"], ["--benchmark-compare=0001", "--benchmark-compare-fail=median:5%"]),
        strict=True,
    ):
        environment = {**os.environ, VARIABLE: str(forwards)}
        done = subprocess.run([*command, *options], env=environment, capture_output=True, text=True, check=False)
        failed = "Performance has regressed" in done.stdout + done.stderr
        assert failed or done.returncode == 0, done.stdout + done.stderr
    return failed


def run(bundle: Path, out: Path, minutes: float, core: int | None) -> None:
    """Gates in turn, each trial's least complete first, until the counts are full or the time is over."""
    if core is not None:
        os.sched_setaffinity(0, {core})
    end = time.monotonic() + 60 * minutes
    with tempfile.TemporaryDirectory(prefix="edgekit-trials-") as name:
        copy = patched(bundle, Path(name))
        while time.monotonic() < end:
            lines = read(sorted(out.parent.glob("*.jsonl")))
            counts = collections.Counter(line["trial"] for line in lines)
            trial = min(TRIALS.values(), key=lambda trial: counts[trial.name] / trial.runs)
            if counts[trial.name] >= trial.runs:
                break
            seed = random.SystemRandom().randrange(2**32)
            judged = sum(line["trial"] == trial.name and line["pytest_benchmark_fails"] is not None for line in lines)
            line = one(trial, copy, seed, trial.beside and judged < PAIRS)
            with out.open("a", encoding="utf-8") as stream:
                stream.write(json.dumps(line) + "\n")
            print(f"{trial.name:<13} {line['verdict']:<13} {line['blocks']} blocks {line['seconds']:.1f} s", flush=True)


def one(trial: Trial, bundle: Path, seed: int, beside: bool) -> dict[str, Any]:
    """One gate's line."""
    load = os.getloadavg()[0]
    question, evidence = Question(limit=0.05, seed=seed), gate(trial, bundle, seed)
    subject = subject_of(runner.read_manifest(bundle), platform.node())
    comparison = conclude(evidence, question, subject, subject)
    with tempfile.TemporaryDirectory(prefix="edgekit-trials-") as folder:
        peer = pytest_benchmark_fails(trial, bundle, Path(folder)) if beside else None
    return {
        "trial": trial.name,
        "verdict": comparison.verdict,
        "blocks": comparison.blocks,
        "seconds": round(evidence.seconds, 2),
        "change": round(comparison.cases[0].change or 0.0, 5),
        "log_ratios": [round(ratio, 5) for ratio in comparison.cases[0].log_ratios],
        "load": round(load, 2),
        "seed": seed,
        "pytest_benchmark_fails": peer,
    }


def read(files: Sequence[Path]) -> list[dict[str, Any]]:
    """The lines of all files."""
    return [json.loads(line) for file in files for line in file.read_text(encoding="utf-8").splitlines()]


def report(files: Sequence[Path]) -> str:
    """Markdown: a row a trial, then the two gates on the same pairs."""
    lines = read(files)
    rows = [
        "| trial | runs | FAIL | PASS | INCONCLUSIVE | seconds, median (most) | blocks, median | noise of a block |"
    ]
    rows.append("| --- | --- | --- | --- | --- | --- | --- | --- |")
    for trial in TRIALS.values():
        own = [line for line in lines if line["trial"] == trial.name]
        if not own:
            continue
        verdicts = collections.Counter(line["verdict"] for line in own)
        seconds = [line["seconds"] for line in own]
        noise = statistics.median(statistics.stdev(line["log_ratios"]) for line in own)
        rows.append(
            f"| {trial.name} | {len(own)} of {trial.runs} | {verdicts['FAIL']} | {verdicts['PASS']} "
            f"| {verdicts['INCONCLUSIVE']} | {statistics.median(seconds):.0f} ({max(seconds):.0f}) "
            f"| {statistics.median(line['blocks'] for line in own):g} | {100 * noise:.1f} % |"
        )
    rows += ["", "| the same pairs | runs | ours: FAIL | pytest-benchmark: FAIL |", "| --- | --- | --- | --- |"]
    for trial in TRIALS.values():
        own = [line for line in lines if line["trial"] == trial.name and line["pytest_benchmark_fails"] is not None]
        if own:
            ours, theirs = (
                sum(line["verdict"] == "FAIL" for line in own),
                sum(line["pytest_benchmark_fails"] for line in own),
            )
            rows.append(f"| {trial.name} | {len(own)} | {ours} | {theirs} |")
    loads = [line["load"] for line in lines]
    rows += [
        "",
        f"Load (runnable processes) when a gate began: median {statistics.median(loads):.1f}, most {max(loads):.1f}",
    ]
    return "\n".join(rows)


def main() -> None:
    """Parses the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    run_ = commands.add_parser("run", help="run gates, a line each")
    run_.add_argument("bundle", type=Path)
    run_.add_argument("--out", type=Path, required=True, help="every .jsonl in its folder counts")
    run_.add_argument("--minutes", type=float, default=60.0)
    run_.add_argument("--core", type=int, help="the core that everything stays on")
    report_ = commands.add_parser("report", help="count")
    report_.add_argument("files", type=Path, nargs="+")
    args = parser.parse_args()
    if args.command == "run":
        run(args.bundle, args.out, args.minutes, args.core)
    else:
        print(report(args.files))


if __name__ == "__main__":
    main()
