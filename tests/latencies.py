"""Latency records for the tests: of plain figures that can be checked by hand."""

from typing import Any

from edgekit.latency import Case, Comparison, LatencyRun, Subject

HOSTILE = "a|b <b>*x*</b> `c` \x1b[31m & \x00\nnew ]]> 猫"
CONDITIONS = {
    "opencv": "5.0.0",
    "engine": "new",
    "backend": "opencv/cpu",
    "fallback": "",
    "precision": "fp32",
    "threads": 1,
    "machine": "x86_64",
    "cpu": "A CPU",
    "python": "3.11.7",
    "proved_on_this_opencv": True,
}
STAGES = ("decode", "preprocess", "forward", "postprocess", "end_to_end")


def subject(revision: str | None = "1" * 40, **changes: Any) -> Subject:
    facts = {
        "name": "digits",
        "target": "cpu",
        "precision": "fp32",
        "bundle_sha256": "ab" * 32,
        "git_revision": revision,
        "measured_at": "2026-01-02T03:04:05+00:00",
        "device": "bench-host",
    }
    return Subject(**{**facts, **changes})


def run(samples: int = 4, scale: float = 1.0, **changes: Any) -> LatencyRun:
    """Stage k takes k ms times `scale`, and 0.5 ms more from image to image."""
    facts: dict[str, Any] = {
        "subject": subject(),
        "samples_ms": {
            stage: tuple(round(scale * place + 0.5 * index, 6) for index in range(samples))
            for place, stage in enumerate(STAGES, start=1)
        },
        "import_ms": (200.0, 100.0, 150.0),
        "load_ms": (80.0,),
        "first_ms": (40.0, 44.0),
        "images_per_second": 61.25,
        "floor_rss_bytes": 50_000_000,
        "peak_rss_bytes": 112_000_000,
        "energy_mj": None,
        "conditions": CONDITIONS,
        "environment": ({"load": 0.5, "governor": "performance"}, {"load": 1.25, "governor": "performance"}),
        "warnings": (),
    }
    return LatencyRun(**{**facts, **changes})


def case(verdict: str = "FAIL", **changes: Any) -> Case:
    facts: dict[str, Any] = {
        "name": "answer",
        "verdict": verdict,
        "reason": "99 % sure that it is slower by more than 5 %",
        "change": 0.1,
        "low": 0.08,
        "high": 0.125,
        "p_slower": 0.002,
        "p_faster": 1.0,
        "log_ratios": (0.09, 0.1, 0.095),
        "other_change": 0.11,
        "base_ms": (10.0, 10.25, 10.5),
        "candidate_ms": (11.0, 11.5, 12.0),
    }
    return Case(**{**facts, **changes})


def comparison(*cases: Case, **changes: Any) -> Comparison:
    facts: dict[str, Any] = {
        "verdict": cases[0].verdict if cases else "INCOMPARABLE",
        "reason": "answer is 10.0 % slower, and 5 % are allowed",
        "base": subject("2" * 40),
        "candidate": subject("3" * 40),
        "fail_if": 0.05,
        "profile": "ci",
        "clock": "cpu",
        "cases": cases,
        "blocks": 3,
        "rejected": (),
        "looks": (3,),
        "seed": 7,
        "seconds": 30.0,
        "conditions": (CONDITIONS, CONDITIONS),
        "workload": (),
        "warnings": (),
        "confirms": None,
    }
    return Comparison(**{**facts, **changes})
