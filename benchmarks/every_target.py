"""One run, every target: is each bundle right wherever this machine can run it, and refused where it must be?

    uv run python benchmarks/every_target.py runs/NAME
    uv run python benchmarks/every_target.py runs/NAME --openvino-python .venv-openvino/bin/python --cpus cortex-a53

Bundles the run for all shipped targets (the OpenVINO plugins must be in the cache: `edgekit opencv add openvino`), then
runs each bundle's own `run.py check`: here with each OpenCV from PyPI, through OpenVINO by the plugin (and by
an OpenCV that has it built in, where `--openvino-python` names one), and for arm64 under qemu with the wheels and with
Debian's own OpenCV. Prints a Markdown table.
"""

from __future__ import annotations

import argparse
import json
import platform
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

from edgekit import plugin
from edgekit.arm64 import check_on_arm64
from edgekit.environments import opencv_python
from edgekit.targets import Target, read_target, target_names

Row = tuple[str, str, str]  # where, outcome, detail
WHEELS = ("4.10.0.84", "4.14.0.94", "5.0.0.93")
CORES = {"rpi4": ["cortex-a72"], "rpi5": ["cortex-a76"]}  # what is in them; other targets run on all of --cpus
ARM64_OPENCV = {
    "openvino/cpu": {"": [plugin.OPENCV]},
    "opencv/cpu": {
        "": ["4.14.0.94", "5.0.0.93"],
        "rpi-debian": ["debian-12", "debian-13"],
        "cpu-opencv4": ["4.14.0.94"],
    },
}


def check(bundle: Path, python: Path | str, *options: str) -> tuple[str, str]:
    """(outcome, detail) of `run.py check` by an interpreter."""
    command = [str(python), "-I", str(bundle / "run.py"), "check", "--json", *options]
    answer = subprocess.run(command, capture_output=True, text=True, check=False)
    if answer.returncode not in (0, 1, 3):
        return ("refused" if answer.returncode == 2 else f"died ({answer.returncode})"), answer.stderr.strip()
    said = json.loads(answer.stdout)
    here, worst = said["conditions"], max(row["relative_error"] for row in said["images"])
    verdict = "ok" if said["ok"] else "WRONG"
    return verdict, f"{here['engine']}, {here['precision']}, {len(said['images'])} images, off by {worst:.1e} at most"


def here(bundle: Path, target: Target, openvino_python: Path | None) -> Iterator[Row]:
    """On this machine, where it is one that the bundle is for; else the refusal."""
    if platform.machine() not in target.arch or target.backend.startswith("cuda"):
        yield "this machine", *check(bundle, sys.executable)
    elif target.backend == "openvino/cpu":
        yield f"OpenCV {plugin.OPENCV} + plugin", *check(bundle, plugin.openvino_python())
        if openvino_python:
            yield "OpenCV with OpenVINO built in", *check(bundle, openvino_python)
        yield "OpenCV 5.0.0.93", *check(bundle, opencv_python("5.0.0.93"))
    else:
        for version in WHEELS:
            yield f"OpenCV {version}", *check(bundle, opencv_python(version))


def on_arm64(bundle: Path, target: Target, cpus: list[str]) -> Iterator[Row]:
    """Under qemu, for bundles that are for arm64 and do not need CUDA."""
    if "aarch64" not in target.arch or target.backend.startswith("cuda"):
        return
    versions = ARM64_OPENCV[target.backend].get(target.name, ARM64_OPENCV[target.backend][""])
    for row in check_on_arm64(bundle, versions, CORES.get(target.name, cpus)):
        error = "" if row.relative_error is None else f"off by {row.relative_error:.1e} at most"
        detail = ", ".join(part for part in (row.engine, f"OpenCV {row.found}", error, row.reason) if part)
        yield f"{row.cpu}, OpenCV {row.opencv}", row.status, detail


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path)
    parser.add_argument("targets", nargs="*", default=target_names())
    parser.add_argument("--dist", type=Path, default=Path("dist"))
    parser.add_argument("--cpus", default="cortex-a53,cortex-a72,cortex-a76", help="for qemu, with commas between them")
    parser.add_argument("--openvino-python", type=Path, help="an interpreter whose OpenCV has OpenVINO built in")
    args = parser.parse_args()
    print("| target | where | check | |\n| --- | --- | --- | --- |", flush=True)
    # those that take the same form of the model after each other: it is exported anew where that changes
    for target in sorted(map(read_target, args.targets), key=lambda each: each.form):
        command = ["edgekit", "bundle", str(args.run), "--target", target.name, "--dist", str(args.dist), "--json"]
        built = subprocess.run(command, capture_output=True, text=True, check=False)
        if built.returncode:
            print(f"| {target.name} | - | not built | {built.stderr.strip().splitlines()[-1]} |", flush=True)
            continue
        bundle = Path(json.loads(built.stdout)["bundle"])
        for where, outcome, detail in (
            *here(bundle, target, args.openvino_python),
            *on_arm64(bundle, target, args.cpus.split(",")),
        ):
            print(f"| {target.name} | {where} | {outcome} | {detail} |", flush=True)


if __name__ == "__main__":
    main()
