"""bench: a bundle on a device → a LatencyRun: what its latency is there, stage by stage, and what makes that doubtful.

The figures are run.py's own, from processes of its own on the device; here they are put together.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from edgekit import runner
from edgekit.device import Placed, ask
from edgekit.errors import ArtifactError
from edgekit.latency import LatencyRun, subject_of
from edgekit.threads import ThreadSweep

STARTS = 5
START_SECONDS = 0.01  # of measuring, where only the start is of interest
# From where on a figure is doubtful.
LOAD = 0.5  # processes that wanted to run before
RISEN_C = 3.0
STOLEN = 0.01  # share of all the machine's time
UNSTABLE = 1.5  # p90 / p50
APART = 0.05  # of the stages together and the whole

Environment = Mapping[str, Any]  # runner.environment()


def bench(
    placed: Placed,
    *,
    threads: int | ThreadSweep | None = None,
    seconds: float = 5.0,
    starts: int = STARTS,
    allow_fallback: bool = False,
    progress: Callable[[str, int, int], None] = lambda name, done, total: None,
) -> LatencyRun:
    """Measures a bundle where it was placed: once for `seconds`, then `starts` times more for what a start takes.

    threads: None is the manifest's; a ThreadSweep is its choice. Energy comes from the board's own meter, else it is
    None. Raises SetupError where the bundle cannot run there, ArtifactError where its run.py is an older one.
    """
    manifest = runner.read_manifest(placed.bundle)
    sweep, count = (threads, threads.chosen) if isinstance(threads, ThreadSweep) else (None, threads)
    options = ["--json", *(["--allow-fallback"] if allow_fallback else [])]
    options += [] if count is None else ["--threads", str(count)]
    reports = []
    for done in range(starts + 1):  # the long one first: it finds the machine as it was before
        progress("measuring" if done == 0 else "starting anew", done, starts + 1)
        reports.append(ask(placed, "bench", "--seconds", f"{START_SECONDS if done else seconds:g}", *options))
    report = reports[0]
    if "energy_mj" not in report:
        version = manifest["edgekit_version"]
        raise ArtifactError(
            f"{placed.bundle} was built by edgekit {version}, which measured less: bundle its run again"
        )
    run = LatencyRun(
        subject=subject_of(manifest, placed.device.name),
        samples_ms=report["samples_ms"],
        **{key: tuple(each[key] for each in reports) for key in ("import_ms", "load_ms", "first_ms")},
        images_per_second=report["images_per_second"],
        floor_rss_bytes=report["floor_rss_bytes"],
        peak_rss_bytes=report["peak_rss_bytes"],
        energy_mj=report["energy_mj"],
        conditions=report["conditions"],
        environment=(*([sweep.environment] if sweep else []), *report["environment"]),
        warnings=(),
    )
    return run.model_copy(update={"warnings": doubts(run)})


# ---------------------------------------------------------------------------------------------------------------
# Doubts


def doubts(run: LatencyRun) -> tuple[str, ...]:
    """What makes a run's figures doubtful, a sentence each, with how to mend it. What a system hides is no doubt."""
    found = [
        *_of_the_machine(run.environment),
        *_of_the_setup(run.conditions),
        *_of_the_samples(run.samples_ms),
    ]
    return tuple(sentence for sentence in found if sentence)


def _of_the_machine(environment: Sequence[Environment]) -> list[str]:
    before, after = environment[-2:]
    return [
        _load(environment[0]),
        _governor(after),
        _held_back(before, after),
        _temperature(before, after),
        _stolen(before, after),
    ]


def _load(first: Environment) -> str:
    if first["load"] is None or first["load"] <= LOAD:
        return ""
    return (
        f"other work ran on the machine (load {first['load']:.1f} over the minute before): let it end, wait a minute, "
        "measure again"
    )


def _governor(after: Environment) -> str:
    governor = after["governor"]
    if governor in (None, "performance"):
        return ""
    return (
        f"the governor is {governor}, so the clock follows the load: `sudo cpupower frequency-set -g performance`, "
        "then measure again"
    )


def _held_back(before: Environment, after: Environment) -> str:
    names = {name for each in (before, after) for name in each["throttled"] or ()}
    events = _growth(before, after, "throttle_events")
    if names:
        return (
            f"the board was held back ({', '.join(sorted(names))}): cool it, give it a stronger supply, measure again"
        )
    if events:
        return f"the processor was held back {events} times while it was measured: cool it, then measure again"
    return ""


def _temperature(before: Environment, after: Environment) -> str:
    risen = _growth(before, after, "temperature_c")
    if risen is None or risen <= RISEN_C:
        return ""
    return (
        f"it got {risen:.0f} °C warmer while it was measured ({after['temperature_c']:.0f} °C at the end): measure "
        "again now that it is warm, or for longer (--seconds)"
    )


def _stolen(before: Environment, after: Environment) -> str:
    stolen, ticks = _growth(before, after, "steal"), _growth(before, after, "ticks")
    if not ticks or stolen is None or stolen / ticks <= STOLEN:
        return ""
    return (
        f"the hypervisor gave {stolen / ticks:.0%} of the machine's time to others: measure on a machine of its own, "
        "or compare two bundles side by side (`edgekit compare`)"
    )


def _growth(before: Environment, after: Environment, key: str) -> Any:
    """After - before; None where the system does not tell."""
    return None if before.get(key) is None or after.get(key) is None else after[key] - before[key]


def _of_the_setup(conditions: Mapping[str, Any]) -> list[str]:
    threads, cores = conditions["threads"], conditions["cores"]
    crowded = f"{threads} threads share {cores} cores: give --threads {cores} or fewer, or --threads auto"
    unproved = (
        f"the bundle was not proved on OpenCV {conditions['opencv']} with the {conditions['engine']} engine: run its "
        "check there (`run.py check`)"
    )
    return [
        crowded if threads > cores else "",
        f"it ran on a fallback: {conditions['fallback']}" if conditions["fallback"] else "",
        "" if conditions["proved_on_this_opencv"] else unproved,
    ]


def _of_the_samples(samples_ms: Mapping[str, Sequence[float]]) -> list[str]:
    return [_unstable(samples_ms["end_to_end"]), _apart(samples_ms), _too_few(samples_ms)]


def _unstable(end_to_end_ms: Sequence[float]) -> str:
    row = runner.percentiles(end_to_end_ms)
    p50, p90 = row["p50"], row["p90"]
    if not p50 or not p90 or p90 <= UNSTABLE * p50:
        return ""
    return f"unstable: p90 is {p90 / p50:.1f} × the median: let other work end, and measure for longer (--seconds)"


def _apart(samples_ms: Mapping[str, Sequence[float]]) -> str:
    """Of each iteration the stages' sum to the whole that followed: the same image, and the machine in the same mood.

    (Medians of stages need not add up: images of several sizes have several.)
    """
    stages = zip(*(samples_ms[stage] for stage in runner.STAGES), strict=True)
    ratio = statistics.median(sum(row) / whole for row, whole in zip(stages, samples_ms["end_to_end"], strict=True))
    if abs(ratio - 1) <= APART:
        return ""
    return (
        f"the stages together take {ratio:.2f} × what the whole takes, which should be alike: let other work end, and "
        "measure for longer (--seconds)"
    )


def _too_few(samples_ms: Mapping[str, Sequence[float]]) -> str:
    count = len(samples_ms["end_to_end"])
    missing = [name for name, needed in runner.PERCENTILES.items() if count < needed]
    if not missing:
        return ""
    needed = runner.PERCENTILES[missing[-1]]
    so_far_s = sum(map(sum, samples_ms.values())) / 1e3
    seconds = math.ceil(1.1 * so_far_s / count * needed)
    return f"no {' and no '.join(missing)} from {count} samples: --seconds {seconds} would do ({needed} samples)"
