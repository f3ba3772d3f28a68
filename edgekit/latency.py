"""Latency, as records: what was measured of one bundle on one device, and what came of comparing two bundles.

`edgekit bench` makes a LatencyRun, `edgekit compare` a Comparison. Both keep every sample and its conditions: a figure
without them cannot be held against another.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from datetime import datetime, timezone
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict

Clock = Literal["cpu", "wall"]
Verdict = Literal["PASS", "FAIL", "INCONCLUSIVE", "INCOMPARABLE", "ADVISORY"]
GATES = ("answer", "decode", "preprocess", "forward", "postprocess")
"""What a comparison can judge: a stage, or "answer": preprocess, forward and postprocess of a decoded image."""


class _Record(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Subject(_Record):
    """The bundle that a figure is about."""

    name: str  # of the bundle's run
    target: str
    precision: str  # "fp32", "int8", ...: of the file
    bundle_sha256: str  # of its manifest: the same bytes have the same
    git_revision: str | None  # of the working tree that it was built in
    measured_at: str  # ISO 8601, UTC
    device: str  # host name, or user@host


def subject_of(manifest: Mapping[str, Any], device: str) -> Subject:
    """A bundle's manifest, measured now, on this device."""
    return Subject(
        name=manifest["name"],
        target=manifest["target"],
        precision=manifest["precision"],
        bundle_sha256=manifest["sha256"],
        git_revision=manifest["provenance"].get("git_revision"),
        measured_at=datetime.now(timezone.utc).isoformat(timespec="seconds"),
        device=device,
    )


class LatencyRun(_Record):
    """One bundle, measured on one device; one image at a time."""

    subject: Subject
    samples_ms: dict[str, tuple[float, ...]]  # wall time; decode, preprocess, forward, postprocess, end_to_end
    import_ms: tuple[float, ...]  # numpy and OpenCV; a figure a fresh process
    load_ms: tuple[float, ...]  # verifying the bundle and reading the network
    first_ms: tuple[float, ...]  # the first image, end to end, which prepares the network
    images_per_second: float  # with decoding and answering in two threads
    floor_rss_bytes: int | None  # the most memory before the bundle is opened: Python, numpy, OpenCV
    peak_rss_bytes: int | None  # the most in all
    energy_mj: float | None  # an image, the whole board; null where it has no meter
    conditions: dict[str, Any]  # Model.conditions()
    environment: tuple[dict[str, Any], ...]  # runner.environment() before and after
    warnings: tuple[str, ...]  # what makes the figures doubtful, and how to mend it


class Case(_Record):
    """One gated figure. Changes are of the candidate against the baseline: 0.1 is 10 % slower."""

    name: str  # one of GATES
    verdict: Verdict
    reason: str
    change: float | None  # exp(mean of the blocks' figures) - 1
    low: float | None  # ends of the 99 % interval of the change
    high: float | None
    p_slower: float | None  # how often chance alone makes the blocks look this much above the limit, or more
    p_faster: float | None  # ... or this much below
    log_ratios: tuple[float, ...]  # a figure a block: ln(candidate / baseline), on the gated clock
    other_change: float | None  # the same change on the other clock, for the reader: it is not judged
    base_ms: tuple[float, ...]  # a median a slice, on the gated clock
    candidate_ms: tuple[float, ...]


class Comparison(_Record):
    """A candidate against a baseline, run side by side."""

    verdict: Verdict
    reason: str
    base: Subject
    candidate: Subject
    fail_if: float  # the limit: 0.05 is 5 % slower
    profile: Literal["ci", "device"]
    clock: Clock  # that is judged
    cases: tuple[Case, ...]
    blocks: int  # pairs of processes that count
    rejected: tuple[str, ...]  # why, a reason a rejected block
    looks: tuple[int, ...]  # after how many blocks the verdict was asked for
    seed: int  # of the random orders
    seconds: float
    conditions: tuple[dict[str, Any], dict[str, Any]]  # of the baseline, of the candidate
    workload: tuple[str, ...]  # what changed in the graph itself: operators, multiply-adds, bytes
    warnings: tuple[str, ...]
    confirms: Comparison | None  # the first FAIL, where this is its repetition


# ---------------------------------------------------------------------------------------------------------------
# Figures as people read them


def ms_text(milliseconds: float) -> str:
    """Three significant digits, never in powers of ten: "0.0215", "12.3", "1234"."""
    rounded = float(f"{milliseconds:.3g}")
    if rounded == 0 or not math.isfinite(rounded):
        return f"{milliseconds:.0f}"
    return f"{milliseconds:.{max(0, 2 - math.floor(math.log10(abs(rounded))))}f}"


def share_text(change: float | None) -> str:
    """0.0712 → "+7.1 %"; None → "-"; never "-0.0 %"."""
    if change is None:
        return "-"
    return f"{round(100 * change, 1) + 0.0:+.1f} %"
