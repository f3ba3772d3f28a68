"""bench: what run.py measures arrives whole in the record, and a figure that is doubtful says so."""

import json
import platform
import shutil
import sys
from pathlib import Path
from typing import Any

import bundles
import cv2
import latencies
import pytest
from sshd import Sshd

from edgekit import runner
from edgekit.bench import bench, doubts
from edgekit.device import here, over_ssh, place
from edgekit.errors import ArtifactError, SetupError
from edgekit.latency import LatencyRun, Subject
from edgekit.threads import ThreadSweep, ThreadTime


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return bundles.write_bundle(tmp_path_factory.mktemp("built") / "bundle", provenance={"git_revision": "abc"})


@pytest.fixture
def bundle(built: Path, tmp_path: Path) -> Path:
    """A bundle to spoil."""
    return Path(shutil.copytree(built, tmp_path / "bundle"))


# ---------------------------------------------------------------------------------------------------------------
# Measuring


def test_a_run_has_every_figure_and_its_conditions(built: Path) -> None:
    told: list[tuple[str, int, int]] = []
    run = bench(place(here(), built), seconds=0.3, starts=2, progress=lambda *step: told.append(step))
    manifest = runner.read_manifest(built)
    assert run.subject == Subject(
        name="tiny",
        target="cpu",
        precision="fp32",
        bundle_sha256=manifest["sha256"],
        git_revision="abc",
        measured_at=run.subject.measured_at,
        device=platform.node(),
    )
    assert list(run.samples_ms) == [*runner.STAGES, "end_to_end"]
    counts = {len(samples) for samples in run.samples_ms.values()}
    assert len(counts) == 1 and counts.pop() >= 20
    assert [len(figures) for figures in (run.import_ms, run.load_ms, run.first_ms)] == [3, 3, 3]
    assert min(*run.import_ms, *run.load_ms, *run.first_ms, run.images_per_second) > 0
    if sys.platform == "linux":
        assert 0 < (run.floor_rss_bytes or 0) <= (run.peak_rss_bytes or 0)
    if run.environment[0]["power_w"] is None:
        assert run.energy_mj is None
    assert (run.conditions["opencv"], run.conditions["threads"]) == (cv2.__version__, manifest["threads"])
    assert [set(each) for each in run.environment] == [set(runner.environment())] * 2
    assert run.warnings == doubts(run.model_copy(update={"warnings": ("old",)}))
    assert LatencyRun.model_validate_json(run.model_dump_json()) == run
    assert told == [("measuring", 0, 3), ("starting anew", 1, 3), ("starting anew", 2, 3)]


def test_the_long_measurement_is_the_first_process(bundle: Path) -> None:
    """Each process writes what it was asked for into a file; the seconds tell which is which."""
    run_py = bundle / "run.py"
    asked = bundle.parent / "asked"
    note = f"\nwith open({str(asked)!r}, 'a') as file:\n    print(*sys.argv[1:], file=file)\n"
    run_py.write_text(run_py.read_text("utf-8").replace("\nif __name__ ==", f"{note}\nif __name__ =="), "utf-8")
    bundles.sign(bundle)
    bench(place(here(), bundle), seconds=0.2, starts=2, threads=2)
    short = "bench --seconds 0.01 --json --threads 2"
    assert asked.read_text().splitlines() == ["bench --seconds 0.2 --json --threads 2", short, short]


def test_threads_are_the_manifests_or_those_asked_for_or_a_sweeps(bundle: Path) -> None:
    bundles.sign(bundle, threads=2)
    placed = place(here(), bundle)
    found = {"threads": "before the sweep", **dict.fromkeys(runner.environment())}
    sweep = ThreadSweep(1, (ThreadTime(1, 5.0, 1.0),), 12, found)
    runs = [bench(placed, threads=threads, seconds=0.05, starts=0) for threads in (None, 3, sweep)]
    assert [run.conditions["threads"] for run in runs] == [2, 3, 1]
    assert [len(run.environment) for run in runs] == [2, 2, 3]
    assert runs[2].environment[0] == found


def test_a_device_over_ssh(built: Path, sshd: Sshd) -> None:
    device = over_ssh(f"{sshd.user}@{sshd.host}", sys.executable, sshd.ssh_config)
    run = bench(place(device, built), seconds=0.05, starts=1)
    assert run.subject.device == f"{sshd.user}@{sshd.host}"
    assert len(run.first_ms) == 2 and run.conditions["opencv"] == cv2.__version__


def test_a_fallback_has_to_be_allowed_and_is_a_doubt(bundle: Path) -> None:
    bundles.sign(bundle, arch=["other"])
    placed = place(here(), bundle)
    with pytest.raises(SetupError, match=r"failed on .*: this bundle is for cpu \(other\).*--allow-fallback"):
        bench(placed, seconds=0.05, starts=0)
    run = bench(placed, seconds=0.05, starts=0, allow_fallback=True)
    assert any(doubt.startswith("it ran on a fallback: this bundle is for cpu (other)") for doubt in run.warnings)


def test_a_bundle_of_an_older_edgekit_is_told(bundle: Path) -> None:
    run_py = bundle / "run.py"
    run_py.write_text(run_py.read_text("utf-8").replace('        "energy_mj": energy_mj,\n', ""), "utf-8")
    bundles.sign(bundle, edgekit_version="0.1.0")
    with pytest.raises(ArtifactError, match=r"was built by edgekit 0\.1\.0, which measured less: bundle its run again"):
        bench(place(here(), bundle), seconds=0.05, starts=0)


# ---------------------------------------------------------------------------------------------------------------
# Doubts

QUIET = {
    "governor": "performance",
    "mhz": 1500.0,
    "temperature_c": 50.0,
    "throttled": [],
    "throttle_events": 4,
    "load": 0.2,
    "steal": 100,
    "ticks": 100_000,
    "power_w": None,
}
SILENT = dict.fromkeys(QUIET)  # a system that tells nothing
CONDITIONS = {
    "opencv": "5.0.0",
    "engine": "new",
    "threads": 4,
    "cores": 4,
    "fallback": "",
    "proved_on_this_opencv": True,
}
STAGES_MS = {"decode": 1.0, "preprocess": 2.0, "forward": 6.0, "postprocess": 1.0}


def measured(
    before: dict[str, Any] = QUIET,
    after: dict[str, Any] = QUIET,
    conditions: dict[str, Any] = CONDITIONS,
    samples_ms: dict[str, tuple[float, ...]] | None = None,
    first: tuple[dict[str, Any], ...] = (),
) -> LatencyRun:
    return latencies.run(samples_ms=samples_ms or samples(), conditions=conditions, environment=(*first, before, after))


def samples(count: int = 662, **changes: tuple[float, ...]) -> dict[str, tuple[float, ...]]:
    alike = {name: (ms,) * count for name, ms in {**STAGES_MS, "end_to_end": 10.0}.items()}
    return {**alike, **changes}


def test_a_quiet_run_and_one_of_a_silent_system_leave_no_doubt() -> None:
    assert doubts(measured()) == ()
    assert doubts(measured(SILENT, SILENT)) == ()
    assert doubts(measured(SILENT, QUIET)) == doubts(measured(QUIET, SILENT)) == ()


AGAIN = "let other work end, and measure for longer (--seconds)"


@pytest.mark.parametrize(
    ("run", "doubt"),
    [
        (
            measured(before={**QUIET, "load": 1.26}),
            "other work ran on the machine (load 1.3 over the minute before): let it end, wait a minute, measure again",
        ),
        (
            measured(after={**QUIET, "governor": "ondemand"}),
            "the governor is ondemand, so the clock follows the load: `sudo cpupower frequency-set -g performance`, "
            "then measure again",
        ),
        (
            measured(before={**QUIET, "throttled": ["throttled"]}, after={**QUIET, "throttled": ["under-voltage"]}),
            "the board was held back (throttled, under-voltage): cool it, give it a stronger supply, measure again",
        ),
        (
            measured(after={**QUIET, "throttle_events": 6}),
            "the processor was held back 2 times while it was measured: cool it, then measure again",
        ),
        (
            measured(after={**QUIET, "temperature_c": 53.6}),
            "it got 4 °C warmer while it was measured (54 °C at the end): measure again now that it is warm, or for "
            "longer (--seconds)",
        ),
        (
            measured(after={**QUIET, "steal": 121, "ticks": 102_000}),
            "the hypervisor gave 1% of the machine's time to others: measure on a machine of its own, or compare two "
            "bundles side by side (`edgekit compare`)",
        ),
        (
            measured(conditions={**CONDITIONS, "threads": 5}),
            "5 threads share 4 cores: give --threads 4 or fewer, or --threads auto",
        ),
        (
            measured(conditions={**CONDITIONS, "fallback": "no GPU: buy one"}),
            "it ran on a fallback: no GPU: buy one",
        ),
        (
            measured(conditions={**CONDITIONS, "proved_on_this_opencv": False}),
            "the bundle was not proved on OpenCV 5.0.0 with the new engine: run its check there (`run.py check`)",
        ),
        (
            measured(samples_ms=samples(end_to_end=(10.0,) * 590 + (15.5,) * 72)),
            f"unstable: p90 is 1.6 × the median: {AGAIN}",
        ),
        (
            measured(samples_ms=samples(end_to_end=(10.6,) * 662)),
            f"the stages together take 0.94 × what the whole takes, which should be alike: {AGAIN}",
        ),
        (
            measured(samples_ms=samples(661)),  # 20 ms an iteration: the stages and the whole
            "no p99 from 661 samples: --seconds 15 would do (662 samples)",
        ),
        (
            measured(samples_ms=samples(63)),
            "no p90 and no p99 from 63 samples: --seconds 15 would do (662 samples)",
        ),
    ],
    ids=lambda value: " ".join(value.split()[:4]) if isinstance(value, str) else "",
)
def test_a_doubt_says_what_was_found_and_what_to_do(run: LatencyRun, doubt: str) -> None:
    assert doubts(run) == (doubt,)


@pytest.mark.parametrize(
    "run",
    [
        measured(before={**QUIET, "load": 0.5}),
        measured(after={**QUIET, "load": 3.0}),  # the run's own
        measured(after={**QUIET, "temperature_c": 53.0}),
        measured(after={**QUIET, "temperature_c": 20.0}),
        measured(after={**QUIET, "steal": 120, "ticks": 102_000}),
        measured(conditions={**CONDITIONS, "threads": 1}),
        measured(samples_ms=samples(end_to_end=(10.0,) * 590 + (15.0,) * 72)),
        measured(samples_ms=samples(end_to_end=(10.5,) * 662)),
        measured(samples_ms=samples(end_to_end=(9.55,) * 662)),
    ],
)
def test_what_is_within_the_limits_is_no_doubt(run: LatencyRun) -> None:
    assert doubts(run) == ()


def test_images_of_several_sizes_and_a_machine_of_two_speeds_are_no_doubt() -> None:
    """Some images are slow to decode, some slow to answer: medians of stages do not add up, each image's stages do."""
    mixed = {
        "decode": (1.0, 9.0, 1.0) * 221,
        "preprocess": (1.0,) * 663,
        "forward": (9.0, 1.0, 1.0) * 221,
        "postprocess": (1.0,) * 663,
        "end_to_end": (12.0, 12.0, 4.0) * 221,
    }
    assert doubts(measured(samples_ms=mixed)) == ()


def test_a_sweep_before_is_not_taken_for_other_work() -> None:
    """It makes load itself: what counts is the load before it; and the rest from after it."""
    own = {**QUIET, "load": 2.0, "temperature_c": 60.0}
    assert doubts(measured(before=own, after=own, first=(QUIET,))) == ()
    (doubt,) = doubts(measured(first=({**QUIET, "load": 2.0},)))
    assert doubt.startswith("other work ran on the machine (load 2.0")


def test_every_doubt_at_once_comes_in_one_order() -> None:
    run = measured(
        before={**QUIET, "load": 9.0},
        after={**SILENT, "governor": "powersave"},
        conditions={**CONDITIONS, "threads": 9, "fallback": "none", "proved_on_this_opencv": False},
        samples_ms=samples(20, end_to_end=(1.0,) * 20),
    )
    starts = [
        "other work",
        "the governor is powersave",
        "9 threads share",
        "it ran on a fallback",
        "the bundle was not",
    ]
    starts += ["the stages together take 10.00 ×", "no p90 and no p99 from 20"]
    assert [doubt[: len(start)] for doubt, start in zip(doubts(run), starts, strict=True)] == starts
    json.dumps(doubts(run))
