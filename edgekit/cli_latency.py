"""The commands that measure: bench, compare, history. (cli.py has the rest, and says how commands are written.)"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from edgekit.errors import ArtifactError, UsageError
from edgekit.terminal import AsJson, print_json, print_table

if TYPE_CHECKING:
    from edgekit.compare import Question
    from edgekit.device import Device
    from edgekit.latency import Comparison, LatencyRun
    from edgekit.progress import Display
    from edgekit.threads import ThreadSweep

Bundle = Annotated[Path, typer.Argument(metavar="BUNDLE", help="A bundle folder (dist/NAME-TARGET).")]
DeviceAddress = Annotated[
    str, typer.Option("--device", metavar="USER@HOST", help="Run it there over ssh; the bundle is copied first.")
]
DevicePython = Annotated[str, typer.Option("--python", metavar="FILE", help="The device's interpreter.")]
SshConfig = Annotated[Path | None, typer.Option("--ssh-config", help="Instead of your own, for --device.")]
AllowFallback = Annotated[
    bool, typer.Option("--allow-fallback", help="Also where the bundle's backend or kind of machine is missing.")
]
Save = Annotated[
    Path | None,
    typer.Option(metavar="DIR", help="Write latency.json, summary.md, histogram.png and what CI services read."),
]


def _device(address: str, python: str, ssh_config: Path | None) -> Device:
    from edgekit.device import here, over_ssh

    if address:
        return over_ssh(address, python or "python3", ssh_config)
    if ssh_config:
        raise UsageError("--ssh-config goes with --device")
    return here(python)


def bench(
    bundle: Bundle,
    threads: Annotated[
        str, typer.Option(metavar="N", help="OpenCV's threads; auto: the best count here. Default: the bundle's.")
    ] = "",
    seconds: Annotated[float, typer.Option(min=0.1, help="How long to measure; p99 needs 662 images.")] = 5.0,
    device: DeviceAddress = "",
    python: DevicePython = "",
    ssh_config: SshConfig = None,
    allow_fallback: AllowFallback = False,
    run_folder: Annotated[
        Path | None,
        typer.Option("--run", metavar="RUN", help="The bundle's run: keep the figures there, for its report.html."),
    ] = None,
    save: Save = None,
    as_json: AsJson = False,
) -> None:
    """Measure a bundle's latency, here or on a device.

    One image at a time, in processes of their own: import, load and first answer, then every stage and the whole, p50
    and, from 64 and 662 samples on, p90 and p99; throughput with decoding and answering side by side; memory. Says
    under what conditions, what makes the figures doubtful, and how to mend it.

    A device needs Python, numpy and OpenCV, nothing of edgekit: edgekit bench BUNDLE --device pi@raspberrypi.local
    """
    where = _device(device, python, ssh_config)
    count = _threads(threads)
    if run_folder:
        _require_own(bundle, run_folder)
    from edgekit.progress import display

    with display() as show:
        run, sweep = _measure(bundle, where, count, seconds, allow_fallback, show)
    files = _save(run, save)
    if run_folder:
        _keep(run, run_folder)
    if as_json:
        print_json({**run.model_dump(mode="json"), "threads": sweep})
        return
    from edgekit import report

    if sweep:
        print_table(report.threads_table(sweep))
    print_table(report.latency_table(run))
    for line in report.latency_lines(run):
        typer.echo(line)
    _print_notes("doubtful", run.warnings, files)


def _threads(text: str) -> int | str | None:
    if text in ("", "auto"):
        return text or None
    if text.isdecimal():
        return int(text)
    raise UsageError(f"--threads is a whole number or auto, found {text!r}")


def _measure(
    bundle: Path, where: Device, threads: int | str | None, seconds: float, allow_fallback: bool, show: Display
) -> tuple[LatencyRun, ThreadSweep | None]:
    from edgekit.bench import bench as stage
    from edgekit.device import place
    from edgekit.threads import sweep_threads

    show.busy("opening the bundle")
    placed = place(where, bundle)
    if threads != "auto":
        count = None if threads is None else int(threads)
        run = stage(placed, threads=count, seconds=seconds, allow_fallback=allow_fallback, progress=show.work)
        return run, None
    sweep = sweep_threads(placed, allow_fallback=allow_fallback, progress=show.work)
    return stage(placed, threads=sweep, seconds=seconds, allow_fallback=allow_fallback, progress=show.work), sweep


def _save(record: LatencyRun | Comparison, folder: Path | None) -> tuple[Path, ...]:
    from edgekit.latency_files import save

    return save(record, folder) if folder else ()


def _require_own(bundle: Path, run: Path) -> None:
    """Raises ArtifactError where the bundle has other weights than the run."""
    from edgekit.artifacts import open_run, read_json
    from edgekit.runner import file_sha256

    weights = file_sha256(open_run(run).weights)
    if read_json(bundle / "manifest.json").get("provenance", {}).get("weights_sha256") != weights:
        raise ArtifactError(
            f"{bundle} is not a bundle of {run}, or of earlier weights: make one with `edgekit bundle {run}`"
        )


def _keep(record: LatencyRun, folder: Path) -> None:
    from edgekit.artifacts import RunFolder
    from edgekit.latency_files import keep
    from edgekit.report import write_report

    keep(record, RunFolder(folder))
    write_report(RunFolder(folder))


def _print_notes(word: str, notes: tuple[str, ...], files: tuple[Path, ...]) -> None:
    for note in notes:
        typer.echo(f"{word}: {note}", err=True)
    if files:
        typer.echo(f"written: {files[0].parent}/ ({', '.join(path.name for path in files)})")


def compare(
    base: Annotated[
        str,
        typer.Argument(metavar="BASE", help="The baseline: a bundle's folder, .tar.gz or URL; or a latency.json."),
    ],
    candidate: Annotated[Path, typer.Argument(metavar="CANDIDATE", help="The bundle that may be slower.")],
    fail_if: Annotated[str, typer.Option(metavar="PERCENT", help="Slower by more than this is a regression.")] = "5%",
    profile: Annotated[
        str,
        typer.Option(
            help="ci: CPU time of one pinned thread, which other jobs on the machine hardly touch. device: wall time "
            "with the bundle's own threads, for a board that does nothing else."
        ),
    ] = "ci",
    gate: Annotated[
        list[str] | None,
        typer.Option(help="What is judged: answer (all but decoding), or a stage. May be given more than once."),
    ] = None,
    confirm: Annotated[bool, typer.Option("--confirm", help="Measure a regression once more before failing.")] = False,
    strict: Annotated[bool, typer.Option("--strict", help="Exit 3 where there is no verdict, instead of 0.")] = False,
    max_seconds: Annotated[float, typer.Option(min=1, help="Stop then, decided or not. Usual: 15 to 60.")] = 300.0,
    base_sha256: Annotated[str, typer.Option(metavar="HEX", help="Of the baseline's archive. A URL needs it.")] = "",
    instructions: Annotated[
        bool, typer.Option("--instructions", help="Also count instructions with valgrind, which takes a minute or two.")
    ] = False,
    device: DeviceAddress = "",
    python: DevicePython = "",
    ssh_config: SshConfig = None,
    allow_fallback: AllowFallback = False,
    save: Save = None,
    as_json: AsJson = False,
) -> None:
    """Say whether a bundle got slower than the one before: a check for CI.

    Both bundles run here, now, in pairs of fresh processes that take turns, in random order. After 8, 12, 16 and 24
    pairs an exact test asks whether it is 99 % sure that CANDIDATE is slower by more than --fail-if (FAIL), or 99 %
    sure that it is not (PASS). Where neither is so: INCONCLUSIVE, and why. What changed in the graph is named too.

    Keep the bundle of your main branch as the baseline (docs/latency-ci.md has ready workflows). With a latency.json
    as BASE there is advice only: a stored figure cannot tell 5 % from an hour of the day.

    Exit codes: 0 pass, 1 regression, 2 usage, 3 no verdict (with --strict), 4 the two cannot be compared.
    """
    from edgekit.baseline import opened
    from edgekit.blocks import PROFILES
    from edgekit.compare import Question

    if profile not in PROFILES:
        raise UsageError(f"no profile named {profile!r}: give {', '.join(PROFILES)}")
    question = Question(_percent(fail_if), tuple(gate or ("answer",)), PROFILES[profile], max_seconds)
    where = _device(device, python, ssh_config)
    from edgekit.progress import display

    with display() as show:
        if base.endswith(".json"):
            found = _advice(Path(base), candidate, question, where, allow_fallback, show)
        else:
            with opened(base, base_sha256) as folder:
                counted = _instruction_changes(folder, candidate, show) if instructions else ()
                found = _comparison(folder, candidate, question, confirm, where, allow_fallback, show)
                found = found.model_copy(update={"workload": (*found.workload, *counted)})
    files = _save(found, save)
    if as_json:
        print_json(found.model_dump(mode="json"))
    else:
        _print_comparison(found, files)
    undecided = 3 if strict else 0
    codes = {"PASS": 0, "FAIL": 1, "INCONCLUSIVE": undecided, "ADVISORY": undecided, "INCOMPARABLE": 4}
    raise typer.Exit(codes[found.verdict])


def _percent(text: str) -> float:
    """ "5%" → 0.05."""
    number = text.strip().removesuffix("%").strip()
    try:
        if text.strip().endswith("%"):
            return float(number) / 100
    except ValueError:
        pass
    raise UsageError(f"--fail-if is a percentage such as 5% or 2.5%, found {text!r}")


def _instruction_changes(base: Path, candidate: Path, show: Display) -> tuple[str, ...]:
    from edgekit.workload import instruction_changes, instructions_per_inference

    show.busy("counting instructions")
    return instruction_changes(*(instructions_per_inference(bundle, base) for bundle in (base, candidate)))


def _comparison(
    base: Path,
    candidate: Path,
    question: Question,
    confirmed: bool,
    where: Device,
    allow_fallback: bool,
    show: Display,
) -> Comparison:
    from edgekit.compare import compare as stage
    from edgekit.compare import confirm

    found = stage(base, candidate, question, device=where, allow_fallback=allow_fallback, progress=show.work)
    if not confirmed or found.verdict != "FAIL":
        return found
    show.stage(f"FAIL: {found.reason}. Once more")
    again = replace(question, seed=question.seed ^ 1)
    return confirm(
        found, stage(base, candidate, again, device=where, allow_fallback=allow_fallback, progress=show.work)
    )


def _advice(
    base: Path, candidate: Path, question: Question, where: Device, allow_fallback: bool, show: Display
) -> Comparison:
    """A stored measurement, against another one or against a bundle that is measured now."""
    from edgekit.compare import advise

    before = _read_run(base)
    if candidate.suffix == ".json":
        return advise(before, _read_run(candidate), question.limit)
    threads = before.conditions.get("threads")
    run, _ = _measure(candidate, where, threads, 5.0, allow_fallback, show)
    return advise(before, run, question.limit)


def _read_run(path: Path) -> LatencyRun:
    from edgekit.latency import LatencyRun
    from edgekit.latency_files import read_latency_json

    record = read_latency_json(path)
    if not isinstance(record, LatencyRun):
        raise ArtifactError(f"{path} is a comparison, not a measurement: give a latency.json of `edgekit bench --save`")
    return record


def _print_comparison(found: Comparison, files: tuple[Path, ...]) -> None:
    from edgekit import report

    typer.echo(f"{found.verdict}: {found.reason}")
    print_table(report.comparison_table(found))
    for line in report.comparison_lines(found):
        typer.echo(line)
    _print_notes("warning", found.warnings, files)


def history(
    folder: Annotated[Path, typer.Argument(metavar="FOLDER", help="Where latency.json files are, at any depth.")],
    stage: Annotated[str, typer.Option(help="end_to_end, a stage, or answer (what compare judges).")] = "end_to_end",
    save: Annotated[Path | None, typer.Option(metavar="DIR", help="Write history.png and history.md.")] = None,
    as_json: AsJson = False,
) -> None:
    """Show latency over commits, a series a device, and where it changed.

    Reads what `edgekit bench --save` and `compare --save` left. Figures are in one series only where device, bundle,
    OpenCV, engine, threads and precision are the same; a step that noise does not explain is marked with its size.
    """
    from edgekit.history import read_history, save_history

    found = read_history(folder, stage)
    files = save_history(found, save) if save else ()
    if as_json:
        print_json(found.model_dump(mode="json"))
        return
    from edgekit import report

    print_table(report.history_table(found))
    _print_notes("left out", found.warnings, files)
