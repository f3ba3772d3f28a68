"""The commands, in the order in which they are used: the help is the pipeline.

A command parses, calls one function, prints and sets the exit code. What it needs is imported when it runs, so that
`edgekit --help` is instant.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import typer

from edgekit import __version__, cli_latency, cli_training
from edgekit.cli_training import LOADING, task_of, versions_of
from edgekit.errors import ArtifactError, DataError, EdgekitError, UsageError
from edgekit.terminal import AsJson, print_json, print_table

if TYPE_CHECKING:
    from collections.abc import Iterable

    from edgekit.backbones import Backbone
    from edgekit.compiling import Plan
    from edgekit.doctor import Finding
    from edgekit.pipeline import Outcome
    from edgekit.progress import Display
    from edgekit.targets import Target
    from edgekit.timing import Timing

app = typer.Typer(
    name="edgekit",
    help="From a folder of labelled images to a bundle that runs, and proves itself, on an edge device.\n\n"
    "Start with `edgekit demo`; then `edgekit finetune DATA`, `edgekit bundle RUN`, copy dist/… to the device, "
    "`python3 run.py check`.",
    epilog="Exit codes: 0 ok, 1 a proof failed, 2 bad usage or bad input, 130 interrupted.",
    no_args_is_help=True,
    rich_markup_mode=None,  # rich alone takes 0.5 s to import: three quarters of `edgekit --help`
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

_DEBUG = "EDGEKIT_DEBUG"
NONE = "-"  # a setting that has no value

Dist = Annotated[Path, typer.Option("--dist", help="Where bundles go.")]
Run = Annotated[Path, typer.Argument(metavar="RUN", help="A run folder, as finetune makes it (runs/NAME).")]


def _version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"edgekit {__version__}")
        raise typer.Exit


@app.callback()
def _global(
    _: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Show the version and exit.")
    ] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")] = False,
) -> None:
    if debug:
        os.environ[_DEBUG] = "1"  # main() sees it, and so do processes that edgekit starts


@app.command()
def demo(
    folder: Annotated[Path, typer.Option("--dir", help="Where the demo's data, run and bundle go.")] = Path(
        "edgekit-demo"
    ),
    task: Annotated[str, typer.Option(help="classify, detect or segment.")] = "classify",
    as_json: AsJson = False,
) -> None:
    """See the whole flow, on real handwritten digits.

    Fine-tunes, proves, bundles and runs in a minute or two; detect and segment, on canvases composed of the digits, in
    several. Needs no network and no data of yours.
    """
    from edgekit.progress import display
    from edgekit.targets import read_target

    chosen = task_of(task)
    with display() as show:
        show.busy(LOADING)
        from edgekit.demo import write_demo
        from edgekit.jobs import Watch
        from edgekit.pipeline import pipeline

        recipe = write_demo(folder / "data", chosen)
        runs = folder / "runs"
        watch = Watch(show.step, show.epoch, show.images, show.note)
        outcome = pipeline(recipe, read_target("cpu"), runs, folder / "dist", on_stage=show.stage, watch=watch)
        show.stage("bench")
        latency = _bundle_json(outcome.bundled.path, "bench", "--seconds", "3", "--json")
    _print_demo(outcome, latency, as_json)


def _bundle_json(bundle: Path, *args: str) -> dict[str, Any]:
    """Runs a bundle's own run.py in its own process; its JSON answer."""
    from edgekit.launch import run_py

    answer = subprocess.run(run_py(bundle, *args), capture_output=True, text=True, check=False)
    if answer.returncode != 0:
        raise ArtifactError(f"run.py {args[0]} failed: {answer.stderr.strip()}")
    result: dict[str, Any] = json.loads(answer.stdout)
    return result


def _print_demo(outcome: Outcome, latency: dict[str, Any], as_json: bool) -> None:
    from edgekit import report

    metrics, bundled = outcome.evaluation.metrics, outcome.bundled
    sizes = {
        "torch": (outcome.trained.run / "model.safetensors").stat().st_size,
        "onnx": outcome.exported.size_bytes,
        "bundle": bundled.size_bytes,
    }
    if as_json:
        print_json(
            {"run": outcome.trained.run, "bundle": bundled.path, **metrics, "size_bytes": sizes, "latency": latency}
        )
        return
    print_table(report.demo_table(metrics, sizes, latency))
    rows = bundled.checked["images"]
    typer.echo(f"check: {sum(row['ok'] for row in rows)} of {len(rows)} images as trained, by the bundle's own run.py")
    typer.echo(f"report: {outcome.trained.run / 'report.html'}")
    if metrics["task"] != "classify":
        typer.echo("The images are composed of real digits: they show the flow, not how hard yours are.")
    typer.echo("\nNext, with your own labelled images:")
    typer.echo("  edgekit finetune DATA           train; makes runs/NAME")
    typer.echo("  edgekit bundle runs/NAME        prove and pack; makes dist/NAME-cpu and .tar.gz")
    typer.echo(f"  edgekit run {bundled.path} infer {outcome.trained.run / 'check'}")


app.command()(cli_training.init)
app.command()(cli_training.finetune)


@app.command()
def evaluate(
    run: Run,
    bundle: Annotated[Path | None, typer.Option(help="Also measure this bundle, by its own run.py.")] = None,
    subset: Annotated[str, typer.Option(help="val, or test where the data has a test subset of its own.")] = "val",
    as_json: AsJson = False,
) -> None:
    """Measure a run on its validation images.

    Torch, ONNX and bundle side by side. Writes metrics.json, confusion.png (detect: precision-recall.png), mistakes.jpg
    and report.html into the run folder.
    """
    from edgekit.artifacts import open_run

    if subset not in ("val", "test"):
        raise UsageError(f"no subset is called {subset!r} (there are: val, test)")

    open_run(run)
    from edgekit.progress import display

    with display() as show:
        show.busy(LOADING)
        from edgekit import report
        from edgekit.evaluate import evaluate as stage

        done = stage(run, bundle, subset=subset, on_image=show.images)
    if as_json:
        print_json(done.metrics)
        return
    print_table(report.metrics_table(done.metrics))
    print_table(report.per_class_table(done.metrics))
    typer.echo(f"report: {run / 'report.html'}")


@app.command()
def export(
    run: Run,
    form: Annotated[
        str, typer.Option(help="Make it fast for OpenCV: opencv5, opencv4 or opencv4.6; or for another backend: plain.")
    ] = "opencv5",
    as_json: AsJson = False,
) -> None:
    """Write model.onnx, proved against torch.

    The proof goes through ONNX Runtime and every engine of the OpenCV here, on real images. Exit code 1, and no
    model.onnx, where an engine computes something else than torch did.
    """
    from edgekit.artifacts import open_run
    from edgekit.forms import FORMS

    if form not in FORMS:
        raise UsageError(f"no form named {form!r}: give {', '.join(FORMS)}")
    open_run(run)
    from edgekit.progress import display

    with display() as show:
        show.busy(LOADING)
        from edgekit.export import export as stage

        done = stage(run, form, progress=show.busy)
    if as_json:
        print_json({"model": done.model, "sha256": done.sha256, "size_bytes": done.size_bytes, "proofs": done.verdicts})
        return
    for row in done.verdicts:
        typer.echo(f"{row.engine:<16} {row.version:<10} {row.status:<8} relative error {row.relative_error:.1e}")
    typer.echo(f"wrote {done.model} ({done.size_bytes / 1e6:.1f} MB). Next: edgekit bundle {run}")


@app.command()
def verify(
    run: Annotated[
        Path, typer.Argument(metavar="RUN|BUNDLE", help="A run folder (runs/NAME); with --arch a bundle folder.")
    ],
    opencv: Annotated[
        str | None,
        typer.Option(
            help="Versions, with commas between: 4.10 (the newest of them), 4.14.0.94 or openvino; with --arch also "
            "debian-12 and debian-13. Default: 4.6,4.10,4.14,5.0; with --arch those that the bundle names as proved."
        ),
    ] = None,
    arch: Annotated[str, typer.Option(help="Emulate this one and run a BUNDLE's own check there: arm64.")] = "",
    cpu: Annotated[
        str, typer.Option(help="With --arch: what is emulated, such as cortex-a53,cortex-a72. Default: cortex-a53.")
    ] = "",
    as_json: AsJson = False,
) -> None:
    """Prove a run on the OpenCVs that devices have, or a bundle on arm64.

    Each version comes from PyPI into an environment of its own, and each of its engines computes the check images in
    a process of its own: on torch's own input, and from the bytes of the files. parity.json keeps the rows; bundles
    name what was proved, and refuse to run where the network was found wrong.

    With --arch arm64 a bundle's own run.py checks itself on an arm64 Debian, with the OpenCV of PyPI or of that Debian,
    emulated by qemu: no board is needed, and nothing is said of speed. The bundle stays as it is.

    Exit code 1 where no engine of a version is right (or the bundle refuses it), 3 where a version cannot be had here.
    """
    versions = versions_of(opencv) if opencv is not None else ()
    if opencv is not None and not versions:
        raise UsageError("no OpenCV version: give some, such as --opencv 4.10,5.0")
    if arch or cpu or (run / "manifest.json").is_file():
        _verify_bundle(run, arch, versions_of(cpu) or ("cortex-a53",), versions, as_json)
    from edgekit.artifacts import open_run

    open_run(run)
    from edgekit.progress import display

    with display() as show:
        show.busy(LOADING)
        from edgekit import report
        from edgekit.verify import VERSIONS
        from edgekit.verify import verify as stage

        done = stage(run, versions or VERSIONS, progress=show.busy)
    if as_json:
        print_json({"run": run, "failed": done.failed, "not_proved": done.not_proved, "verdicts": done.verdicts})
    else:
        print_table(report.verdicts_table([row for rows in done.verdicts.values() for row in rows]))
    raise typer.Exit(1 if done.failed else 3 if done.not_proved else 0)


def _verify_bundle(bundle: Path, arch: str, cpus: tuple[str, ...], opencvs: tuple[str, ...], as_json: bool) -> NoReturn:
    """verify with a bundle: its own check on an emulated CPU."""
    if arch != "arm64":
        raise UsageError(
            f"a bundle is verified with --arch arm64{f', not {arch}' if arch else ''}; "
            f"on this machine it checks itself: edgekit run {bundle} check"
        )
    from edgekit.arm64 import check_on_arm64
    from edgekit.progress import display

    with display() as show:
        rows = check_on_arm64(bundle, opencvs, cpus, progress=show.busy)
    statuses = {row.status for row in rows}
    if as_json:
        print_json({"bundle": bundle, "arch": arch, "ok": statuses == {"ok"}, "rows": rows})
    else:
        from edgekit import report

        print_table(report.emulated_table(rows))
        for reason in report.emulated_reasons(rows):
            typer.echo(reason)
    raise typer.Exit(1 if statuses & {"failed", "refused"} else 3 if "not proved" in statuses else 0)


@app.command()
def quantize(
    run: Run,
    target: Annotated[
        str, typer.Option(help="What it is for: a name from `edgekit targets`, or a .toml file.")
    ] = "cpu",
    max_drop: Annotated[
        float, typer.Option(min=0, max=100, help="The guard: points of accuracy that int8 may lose against fp32.")
    ] = 1.0,
    images: Annotated[int, typer.Option(min=32, help="Training images to calibrate with.")] = 200,
    calibration: Annotated[
        str, typer.Option(help="How ranges are found: mse (smallest error), percentile (99.99) or minmax.")
    ] = "mse",
    as_json: AsJson = False,
) -> None:
    """Make int8, and say whether it is good enough and faster.

    Both are measured through the target's own engines: accuracy on all validation images, and time with fp32 and int8
    taking turns. Where int8 loses more than --max-drop, the layers that it hurts most stay in float, until it holds.
    Writes model.int8.onnx, model.int8-weights.onnx (a quarter of the size, float arithmetic), quantize.json and
    report.html; `edgekit bundle` ships what is better.

    Exit code 1 where no int8 kept its accuracy: `edgekit finetune --qat RUN` may help.
    """
    from edgekit.artifacts import open_run
    from edgekit.int8.calibration import METHODS, as_method
    from edgekit.targets import read_target

    method, chosen = as_method(calibration), read_target(target)
    if method is None:
        raise UsageError(f"no calibration named {calibration!r}: give {', '.join(METHODS)}")
    open_run(run)
    from edgekit.progress import display

    with display() as show:
        show.busy(LOADING)
        from edgekit import report

        _prove(run, chosen, show)
        show.stage("quantize")
        from edgekit.quantize import quantize as stage

        done = stage(run, chosen, max_drop=max_drop, images=images, method=method, progress=show.work)
    if as_json:
        print_json({"run": run, "passed": done.passed, **done.record})
    else:
        print_table(report.quantize_table(done.record))
        for reason in done.record["not_judged"]:
            typer.echo(f"not judged on OpenCV {reason}", err=True)
        layers = report.float_layers_table(done.record)
        if layers:
            print_table(layers)
        typer.echo(f"{done.why[0].upper()}{done.why[1:]}.")
        typer.echo(f"report: {run / 'report.html'}")
        typer.echo(f"next: edgekit bundle {run} --target {target}" + ("" if done.passed else " --precision fp32"))
    raise typer.Exit(0 if done.passed else 1)


def _prove(run: Path, target: Target, show: Display) -> None:
    """Exports a run in a target's form, and proves it on the target's OpenCVs, where that was not done."""
    from edgekit.artifacts import RunFolder, is_exported
    from edgekit.export import export as export_stage
    from edgekit.verify import unproved
    from edgekit.verify import verify as verify_stage

    if not is_exported(RunFolder(run), target.form):
        show.stage("export")
        export_stage(run, target.form, progress=show.busy)
    missing = unproved(run, target.prove_on)
    if missing:
        show.stage("verify")
        verified = verify_stage(run, missing, progress=show.busy)
        for version in verified.not_proved:
            typer.echo(f"not proved on OpenCV {version}: {verified.verdicts[version][0].message}", err=True)


@app.command()
def bundle(
    run: Run,
    target: Annotated[str, typer.Option(help="A name from `edgekit targets`, or a .toml file.")] = "cpu",
    precision: Annotated[
        str,
        typer.Option(
            help="fp32; int8 or int8-weights, where they keep their accuracy; auto: int8 where it is faster too. "
            "Default: the target's."
        ),
    ] = "",
    dist: Dist = Path("dist"),
    as_json: AsJson = False,
) -> None:
    """Pack a run for a target, checked here by its own run.py.

    Makes dist/NAME-TARGET/ and .tar.gz. Exports and quantizes first where that is needed and was not done.
    """
    from edgekit.artifacts import is_quantized, open_run
    from edgekit.targets import PRECISIONS, read_target

    chosen = read_target(target)
    if precision and precision not in PRECISIONS:
        raise UsageError(f"no precision named {precision!r}: give {', '.join(PRECISIONS)}")
    folder = open_run(run)
    precision = precision or chosen.precision
    from edgekit.progress import display

    with display() as show:
        show.busy(LOADING)
        from edgekit.bundle import bundle as stage

        _prove(run, chosen, show)
        if precision != "fp32" and not is_quantized(folder, chosen.name):
            show.stage("quantize")
            from edgekit.quantize import quantize as quantize_stage

            try:
                quantize_stage(run, chosen, progress=show.work)
            except DataError as error:  # the images are elsewhere, or too few: no reason to ship nothing
                if precision != "auto":
                    raise
                typer.echo(f"shipping fp32, as int8 cannot be judged here: {error}", err=True)
                precision = "fp32"
        show.stage("bundle")
        done = stage(run, chosen, dist, precision)
    if as_json:
        print_json(
            {
                "bundle": done.path,
                "archive": done.archive,
                "size_bytes": done.size_bytes,
                "precision": done.precision,
                "why": done.why,
                "check": done.checked,
                "proved": done.proved,
                "refused": done.refused,
                "cpu_operators": done.cpu_operators,
            }
        )
        return
    rows = done.checked["images"]
    typer.echo(f"{done.path} and {done.archive.name} ({done.size_bytes / 1e6:.1f} MB)")
    if done.why:
        typer.echo(f"{done.why[0].upper()}{done.why[1:]}")
    here = done.checked["conditions"]
    typer.echo(
        f"check passed here: {len(rows)} of {len(rows)} images as trained, OpenCV {here['opencv']}, "
        f"{here['backend']} ({here['engine']} engine, {here['precision']})"
    )
    if here["fallback"]:
        typer.echo(f"not checked on {chosen.backend}: {here['fallback']}. `run.py check` on the device will")
    typer.echo(f"proved on OpenCV {_listed(done.proved)}")
    if done.cpu_operators:
        counts = ", ".join(f"{name} ({count})" for name, count in done.cpu_operators.items())
        typer.echo(f"OpenCV's CUDA has no form of these operators, which run on the CPU there: {counts}")
    if done.refused:
        typer.echo(f"refuses OpenCV {_listed(done.refused)}: the network does not compute there what was trained")
    typer.echo(f"next: copy {done.archive.name} to the device, unpack it there, python3 run.py check")


def _listed(rows: tuple[dict[str, str], ...]) -> str:
    """Rows of a manifest's "proved" or "refused" → "4.14.0 (classic), 5.0.0 (new, classic)"."""
    engines: dict[str, list[str]] = {}
    for row in rows:
        engines.setdefault(row["opencv"], []).append(row["engine"])
    return ", ".join(f"{version} ({', '.join(names)})" for version, names in engines.items())


@app.command(context_settings={"ignore_unknown_options": True, "allow_interspersed_args": False})
def run(
    bundle: Annotated[Path, typer.Argument(metavar="BUNDLE", help="A bundle folder (dist/NAME-TARGET).")],
    args: Annotated[
        list[str] | None, typer.Argument(metavar="COMMAND", help="infer, check, bench, info and their options.")
    ] = None,
) -> None:
    """Run a bundle with its own run.py, in its own process.

    For example: edgekit run dist/NAME-cpu infer photo.jpg
    """
    if not (bundle / "run.py").is_file():
        raise ArtifactError(f"no bundle at {bundle} (it has no run.py): make one with `edgekit bundle RUN`")
    from edgekit.launch import run_py

    try:
        code = subprocess.run(run_py(bundle, *(args or [])), check=False).returncode
    except KeyboardInterrupt:  # the child had it too, and has ended
        code = 130
    raise typer.Exit(code)


app.command()(cli_latency.bench)
app.command()(cli_latency.compare)
app.command()(cli_latency.history)


@app.command()
def backbones(
    names: Annotated[
        list[str] | None, typer.Argument(metavar="NAME", help="Show these: any of timm or torchvision.")
    ] = None,
    everything: Annotated[bool, typer.Option("--all", help="Also those that are judged but not recommended.")] = False,
    measure: Annotated[bool, typer.Option("--measure", help="Measure the latency of each here.")] = False,
    seconds: Annotated[
        float, typer.Option(min=0, max=600, help="How long each is measured. Its export takes some more.")
    ] = 1.0,
    as_json: AsJson = False,
) -> None:
    """Show what helps to choose a backbone; measure it here.

    Size, work for one image, ImageNet accuracy, the OpenCVs on which cv2.dnn was proved to compute what torch does,
    and the weights' licence, which your product must respect. Without NAME: the recommended ones, from light to heavy.

    --measure adds the median time for one image through the fastest engine of the OpenCV here, without reading and
    resizing the image. Choose the most accurate one that is fast enough on the device; where none is, make the
    images smaller (finetune --image-size).
    """
    if names and everything:
        raise UsageError("--all shows every backbone that edgekit judges: give it or names, not both")
    from edgekit.backbones import BACKBONES, LISTED, find

    rows = list((LISTED if everything else BACKBONES).values())
    timings: dict[str, Timing] = {}
    if names or measure:
        from edgekit.progress import display

        with display() as show:
            show.busy(LOADING)
            if names:
                rows = list({row.name: row for row in map(find, names)}.values())
            if measure:
                from edgekit.timing import time_backbones

                timings = time_backbones(rows, seconds, lambda done, total: show.images("measuring", done, total))
    if as_json:
        print_json([_backbone_json(row, timings.get(row.name)) for row in rows])
    else:
        _print_backbones(rows, timings)


def _backbone_json(row: Backbone, timing: Timing | None) -> dict[str, Any]:
    """A row for programs; `top1` in percent, `latency` null where it was not measured."""
    fields = vars(row).copy()
    top1 = {"top1": fields.pop("imagenet_top1"), "top1_source": fields.pop("imagenet_top1_source")}
    return {**fields, **top1, "latency": timing}


def _print_backbones(rows: list[Backbone], timings: dict[str, Timing]) -> None:
    from rich.console import Console

    from edgekit import report

    print_table(report.backbones_table(rows, timings, Console().width))
    ran = next((timing for timing in timings.values() if timing.median_ms is not None), None)
    if ran:
        typer.echo(f"latency: median, OpenCV {ran.opencv}, its fastest engine, {ran.threads} threads, {ran.cpu}")
    for name, timing in timings.items():
        if timing.failure:
            typer.echo(f"{name} failed: {timing.failure}")
    typer.echo("Any other works too, by name: timm:NAME or torchvision:NAME.")


@app.command()
def doctor(as_json: AsJson = False) -> None:
    """Say what this machine can do and what is missing.

    Python, OpenCV and its engines and backends, CUDA, CPU features, disk; and how to get what is not there.
    """
    from edgekit.doctor import examine

    findings = examine()
    if as_json:
        print_json(findings)
        return
    _print_findings(findings)


def _print_findings(findings: Iterable[Finding]) -> None:
    marks = {True: "ok", False: "missing", None: "-"}
    for finding in findings:
        advice = f"  → {finding.advice}" if finding.advice else ""
        typer.echo(f"{marks[finding.ok]:<8} {finding.topic:<22} {finding.value}{advice}")


targets = typer.Typer(help="Show the devices that bundles are built for.", rich_markup_mode=None)
app.add_typer(targets, name="targets")


@targets.callback(invoke_without_command=True)
def _list_targets(context: typer.Context, as_json: AsJson = False) -> None:
    """Show the devices that bundles are built for.

    `edgekit targets show NAME` explains one. `edgekit bundle RUN --target my-board.toml` takes a file of your own
    (docs/targets.md).
    """
    if context.invoked_subcommand:
        return
    from edgekit.targets import read_target, target_names

    chosen = [read_target(name) for name in target_names()]
    if as_json:
        print_json([target.model_dump(mode="json") for target in chosen])
        return
    for target in chosen:
        typer.echo(f"{target.name:<13} {target.backend:<13} {target.description}")


@targets.command("show")
def _show_target(
    name: Annotated[str, typer.Argument(metavar="NAME", help="A name from `edgekit targets`, or a .toml file.")],
    as_json: AsJson = False,
) -> None:
    """Explain one: what each setting is, and what it means."""
    from edgekit.targets import Target, read_target

    target = read_target(name)
    if as_json:
        print_json(target.model_dump(mode="json"))
        return
    for key, value in target.model_dump(mode="json").items():
        shown = [NONE] if value is None else [str(line) for line in value] if isinstance(value, list) else [str(value)]
        separator = "\n" + " " * 19 if key in ("install", "requirements") else ", "
        typer.echo(f"{key:<18} {separator.join(shown)}")
        typer.echo(f"{'':<18} {Target.model_fields[key].description}\n")


opencv_app = typer.Typer(
    help="Give OpenCV a faster backend: OpenVINO, or CUDA.\n\n"
    "OpenVINO is for the CPUs of PCs and arm64 boards, CUDA for NVIDIA's GPUs and boards. The OpenCV that pip "
    "installs has neither. `edgekit opencv check` says what the one here can do.",
    no_args_is_help=True,
    rich_markup_mode=None,
)
opencv_add = typer.Typer(
    help="Build a backend for OpenCV, or take over one that was built.", no_args_is_help=True, rich_markup_mode=None
)
app.add_typer(opencv_app, name="opencv")
opencv_app.add_typer(opencv_add, name="add")

DryRun = Annotated[bool, typer.Option("--dry-run", help="Only say what would be fetched and run.")]
Jobs = Annotated[int | None, typer.Option("--jobs", "-j", min=1, help="Files compiled at once. Default: the cores.")]


@opencv_add.command("openvino")
def opencv_add_openvino(
    arch: Annotated[
        str, typer.Option(help="What the plugin is for: x86_64, or aarch64 (Raspberry Pi, Jetson's CPU).")
    ] = "x86_64",
    source: Annotated[Path | None, typer.Option("--from", metavar="FILE", help="Take this one, built already.")] = None,
    jobs: Jobs = None,
    dry_run: DryRun = False,
    as_json: AsJson = False,
) -> None:
    """Build the OpenVINO plugin: the fastest on a CPU.

    One file of 7 to 9 MB that the stock opencv-python-headless of one version loads, where openvino from PyPI is
    installed too. It is compiled here once (a quarter of an hour; after Ctrl-C the same command goes on), checked
    against OpenCV's own results where it can run here, and kept in the cache; for aarch64 by a cross-compiler. It
    computes in f32 unless OPENCV_DNN_OPENVINO_PRECISION says f16, bf16 or auto.
    """
    from edgekit import plugin
    from edgekit.progress import display

    if dry_run:
        _print_plan(plugin.plan_openvino(arch, jobs), as_json)
        return
    with display() as show:
        path = plugin.add_openvino(arch, source=source, jobs=jobs, progress=show.work)
    found = plugin.read_plugin(path, arch)
    for warning in found.warnings:
        typer.echo(f"warning: {warning}", err=True)
    if as_json:
        print_json({**vars(found), "size_bytes": path.stat().st_size, "warnings": found.warnings})
        return
    typer.echo(f"{path} ({path.stat().st_size / 1e6:.1f} MB)")
    typer.echo(f"for {arch}, opencv-python-headless=={plugin.OPENCV} with openvino=={plugin.OPENVINO}")


@opencv_add.command("cuda")
def opencv_add_cuda(
    arch: Annotated[
        str,
        typer.Option(help="Compute capability of the GPU (8.6, 9.0), or a board: nano, tx2, xavier, orin."),
    ],
    jobs: Jobs = None,
    dry_run: DryRun = False,
    as_json: AsJson = False,
) -> None:
    """Build an OpenCV wheel with the CUDA backend, where CUDA is.

    It needs CUDA and cuDNN. On a Jetson that is the board itself (JetPack brings both; hours), elsewhere a machine with
    NVIDIA's toolkit. The wheel is for one compute capability and this CUDA; install it in place of any other OpenCV,
    then ask `edgekit opencv check`.
    """
    from edgekit import cuda_wheel
    from edgekit.progress import display

    compute = cuda_wheel.compute_capability(arch)
    if dry_run:
        toolkit, problem = cuda_wheel.toolkit_here(compute)
        _print_plan(cuda_wheel.plan_cuda(compute, toolkit, jobs), as_json)
        if problem:
            typer.echo(f"missing here: {problem}", err=True)
        return
    with display() as show:
        wheel = cuda_wheel.add_cuda(compute, jobs=jobs, progress=show.work)
    if as_json:
        print_json({"wheel": wheel, "size_bytes": wheel.stat().st_size, "compute_capability": compute})
        return
    typer.echo(f"{wheel} ({wheel.stat().st_size / 1e6:.1f} MB)")
    typer.echo(f"next: pip uninstall every other OpenCV, pip install --no-deps {wheel.name}, edgekit opencv check")


@opencv_app.command("check")
def opencv_check(as_json: AsJson = False) -> None:
    """Say what cv2.dnn can really do here, backend by backend.

    What getAvailableTargets answers, not what the build claims; whether the OpenVINO plugin is loaded, in a process of
    its own as a bundle's run.py does it; the GPUs; and the command that gets what is missing.
    """
    from edgekit.opencv import check

    abilities = check()
    if as_json:
        print_json(abilities)
        return
    _print_findings(abilities.findings)


def _print_plan(plan: Plan, as_json: bool) -> None:
    import shlex

    if as_json:
        print_json({**vars(plan), "variables": dict(plan.variables)})
        return
    typer.echo(f"{plan.what}, {plan.minutes}, {plan.disk_bytes / 1e9:.1f} GB while it is built")
    for fetched in plan.fetches:
        typer.echo(f"fetch    {fetched}")
    for name, value in plan.variables.items():
        typer.echo(f"set      {name}={shlex.quote(value)}")
    for verb, command in (("run", plan.configure), ("run", plan.compile)):
        if command:
            typer.echo(f"{verb:<8} {shlex.join(command)}")
    typer.echo(f"makes    {plan.result}")


def main() -> None:
    """Runs the command line; every error that a user can mend is one line on stderr and an exit code."""
    try:
        app()
    except Exception as error:
        from edgekit.runner import RunnerError

        if os.environ.get(_DEBUG) or not isinstance(error, EdgekitError | RunnerError):
            raise
        typer.echo(f"edgekit: {error}", err=True)
        sys.exit(getattr(error, "exit_code", 2))


if __name__ == "__main__":
    main()
