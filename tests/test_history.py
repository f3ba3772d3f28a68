"""History: which records are held against each other, in which order, and what is said of the others."""

import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from latencies import CONDITIONS, HOSTILE, case, comparison, run, subject
from rich.console import Console
from shown import bgr, decoded, share_of

from edgekit.errors import ArtifactError, UsageError
from edgekit.history import (
    History,
    Point,
    Step,
    conditions_texts,
    history_markdown,
    read_history,
    save_history,
)
from edgekit.latency_files import save, write_latency_json
from edgekit.latency_pictures import history_picture
from edgekit.pictures import THEMES
from edgekit.report import history_table


def put(folder: Path, day: int, ms: float, revision: str | None = None, **changes: Any) -> Path:
    """A run measured on a day of January, whose end_to_end takes `ms`."""
    facts = changes.pop("subject", {})
    when = {"measured_at": f"2026-01-{day:02d}T00:00:00+00:00", **facts}
    path = folder / f"run-{len(list(folder.glob('*')))}.json"
    record = run(
        subject=subject(f"{day:040x}" if revision is None else revision, **when),
        samples_ms={"forward": (ms / 2,), "end_to_end": (ms - 0.5, ms, ms + 0.5)},
        **changes,
    )
    write_latency_json(path, record)
    return path


def test_points_are_in_the_order_of_measurement(tmp_path: Path) -> None:
    for day, ms in ((3, 12.0), (1, 10.0), (2, 11.0)):
        put(tmp_path, day, ms)
    # the same moment as day 2's in another time zone, and before it by half an hour without one
    put(tmp_path, 9, 10.9, subject={"measured_at": "2026-01-02T00:30:00+01:00"})
    (series,) = read_history(tmp_path).series
    assert [point.p50_ms for point in series.points] == [10.0, 10.9, 11.0, 12.0]
    assert series.points[0] == Point(
        revision="0000000", measured_at="2026-01-01T00:00:00+00:00", p50_ms=10.0, samples=3, file="run-1.json"
    )
    assert (series.device, series.bundle, series.precision) == ("bench-host", "digits-cpu", "fp32")
    assert (series.measured, series.clock, series.steps) == ("alone", "wall", ())
    assert series.conditions == {
        "machine": "x86_64",
        "cpu": "A CPU",
        "opencv": "5.0.0",
        "backend": "opencv/cpu",
        "engine": "new",
        "threads": "1",
        "python": "3.11.7",
        "precision": "fp32",
    }


@pytest.mark.parametrize(
    "other",
    [
        {"subject": {"device": "pi@board"}},
        {"subject": {"name": "signs"}},
        {"subject": {"target": "openvino"}},
        {"subject": {"precision": "int8"}},
        *({"conditions": {**CONDITIONS, key: "other"}} for key in ("cpu", "opencv", "engine", "threads", "precision")),
        {"conditions": {**CONDITIONS, "opencv_build": "0123456789ab"}},
    ],
)
def test_what_cannot_be_held_against_each_other_is_apart(other: dict[str, Any], tmp_path: Path) -> None:
    put(tmp_path, 1, 10.0)
    put(tmp_path, 2, 10.0, **other)
    assert [len(series.points) for series in read_history(tmp_path).series] == [1, 1]


def test_what_does_not_matter_is_no_other_series(tmp_path: Path) -> None:
    put(tmp_path, 1, 10.0)
    put(tmp_path, 2, 10.0, subject={"bundle_sha256": "cd" * 32}, conditions={**CONDITIONS, "cores": 8})
    assert [len(series.points) for series in read_history(tmp_path).series] == [2]


def test_steps_are_marked_with_their_commit(tmp_path: Path) -> None:
    for day in range(1, 9):
        put(tmp_path, day, 10.0)
    for day in range(9, 15):
        put(tmp_path, day, 11.0, revision=f"{day:07x}" + "f" * 33)
    history = read_history(tmp_path)
    (step,) = history.series[0].steps
    assert step == Step(place=8, revision="0000009", change=step.change) and step.change == pytest.approx(0.1)
    assert "| 10.0 → 11.0 (+10.0 %) | 0000009 +10.0 % |" in history_markdown(history)


def test_another_stage(tmp_path: Path) -> None:
    put(tmp_path, 1, 10.0)
    assert read_history(tmp_path, "forward").series[0].points[0].p50_ms == 5.0


def test_comparisons_are_series_of_their_own(tmp_path: Path) -> None:
    put(tmp_path, 1, 10.0)
    for name, clock in (("a", "cpu"), ("b", "wall")):
        write_latency_json(tmp_path / f"{name}.json", comparison(case(), case(name="forward"), clock=clock))
    history = read_history(tmp_path, "forward")
    assert [(s.measured, s.clock, s.points[0].p50_ms) for s in history.series] == [
        ("alone", "wall", 5.0),
        ("side by side", "cpu", 11.5),
        ("side by side", "wall", 11.5),
    ]
    assert {s.points[0].revision for s in history.series[1:]} == {"3333333"}, "the candidate's"
    assert [s.clock for s in read_history(tmp_path, "answer").series] == ["cpu", "wall"]
    assert read_history(tmp_path).warnings == (
        "a.json: it is a comparison without end_to_end (it has: answer, forward)",
        "b.json: it is a comparison without end_to_end (it has: answer, forward)",
    )


def test_what_is_no_point_is_named(tmp_path: Path) -> None:
    put(tmp_path, 1, 10.0)
    twin = (tmp_path / "run-0.json").read_bytes()
    (tmp_path / "copy").mkdir()
    (tmp_path / "copy" / "z.json").write_bytes(twin)
    (tmp_path / "damaged.json").write_text("{")
    (tmp_path / "other.json").write_text('{"benchmarks": []}')
    put(tmp_path, 2, 10.0, subject={"measured_at": "yesterday"})
    write_latency_json(tmp_path / "zero.json", run(samples_ms={"end_to_end": (0.0,)}))
    write_latency_json(tmp_path / "none.json", run(samples_ms={"end_to_end": ()}))
    history = read_history(tmp_path)
    assert [len(series.points) for series in history.series] == [1]
    assert [line.split(" (")[0] for line in history.warnings] == [
        "damaged.json: it is damaged",
        "none.json: it is a run without end_to_end",
        "other.json: it was written by pytest-benchmark, and has no record of edgekit's: `edgekit bench --save DIR` "
        "and `edgekit compare --save DIR` write one",
        "run-0.json: the same measurement as copy/z.json",
        "run-4.json: its measured_at, 'yesterday', is not a time in ISO 8601",
        "zero.json: its end_to_end takes no time on its clock",
    ]


def test_saved_folders_are_read_without_their_other_files(tmp_path: Path) -> None:
    save(run(), tmp_path / "2026-01-02" / "pi")
    save(run(subject=subject(None, measured_at="2026-01-03T00:00:00Z")), tmp_path / "2026-01-03")
    (tmp_path / ".latency.json.x1.part.json").write_text("{")
    save_history(read_history(tmp_path), tmp_path)
    history = read_history(tmp_path)
    assert history.warnings == ()
    assert [point.revision for point in history.series[0].points] == ["1111111", "bundle abababa"]


def test_usage(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"no stage is called 'inference' \(there are: decode, preprocess, forward"):
        read_history(tmp_path, "inference")
    with pytest.raises(ArtifactError, match=r"no latency files below .*: `edgekit bench BUNDLE --save"):
        read_history(tmp_path)
    with pytest.raises(ArtifactError, match="no folder at"):
        read_history(tmp_path / "none")


@pytest.fixture
def mixed(tmp_path: Path) -> History:
    """Three series, one of them with a step, and a file that is none."""
    for day in range(1, 13):
        put(tmp_path, day, 10.0 if day < 7 else 9.0)
    board = {**CONDITIONS, "threads": 4, "cpu": "A board"}
    put(tmp_path, 1, 40.0, subject={"device": "pi@board"}, conditions={**board, "opencv_build": "aaa"})
    put(tmp_path, 2, 44.0, subject={"device": "pi@board"}, conditions=board)
    (tmp_path / "x.json").write_text("[]")
    return read_history(tmp_path)


def test_markdown(mixed: History) -> None:
    assert history_markdown(mixed) == (
        "## Latency over commits: end to end\n"
        "\n"
        "| bundle | device | under | points | first → last p50, ms | change points |\n"
        "| --- | --- | --- | ---: | ---: | --- |\n"
        "| digits-cpu | bench-host | fp32, OpenCV 5.0.0 new, threads: 1, A CPU | 12 | 10.0 → 9.00 (-10.0 %) "
        "| 0000000 -10.0 % |\n"
        "| digits-cpu | pi@board | fp32, OpenCV 5.0.0 new, threads: 4, A board, opencv build unknown | 1 "
        "| 44.0 → 44.0 (+0.0 %) | none |\n"
        "| digits-cpu | pi@board | fp32, OpenCV 5.0.0 new, threads: 4, A board, opencv build aaa | 1 "
        "| 40.0 → 40.0 (+0.0 %) | none |\n"
        "\n"
        "p50: median of a measurement; a change point: from that commit on, against the ones before.\n"
        "\n"
        "<details><summary>Left out: 1</summary>\n"
        "\n"
        "**Files without a point**\n"
        "\n"
        "- x.json: it is damaged (not an object): make it again\n"
        "\n"
        "</details>\n"
    )


def test_the_conditions_say_how_it_was_measured(tmp_path: Path) -> None:
    conditions = {**CONDITIONS, "precision": "bf16"}
    write_latency_json(tmp_path / "a.json", comparison(case(), conditions=(CONDITIONS, conditions)))
    assert conditions_texts(read_history(tmp_path, "answer").series) == [
        "fp32 computed in bf16, OpenCV 5.0.0 new, threads: 1, A CPU, CPU time side by side"
    ]


def test_the_table_fits_into_80_characters(mixed: History) -> None:
    console = Console(width=80, record=True, file=io.StringIO())
    console.print(history_table(mixed))
    text = console.export_text()
    assert max(map(len, text.splitlines())) <= 80
    for word in ("bench-host", "pi@board", "-10.0 %", "none"):
        assert word in text


def test_saved_files(mixed: History, tmp_path: Path) -> None:
    written = save_history(mixed, tmp_path / "out")
    assert [path.name for path in written] == ["history.json", "history.md", "history.png"]
    assert History.model_validate(json.loads(written[0].read_text("utf-8"))) == mixed
    assert written[1].read_text("utf-8") == history_markdown(mixed)
    assert decoded(written[2].read_bytes()).shape[0] > 1000


def test_the_picture_has_a_panel_a_series(mixed: History) -> None:
    one = decoded(history_picture(mixed.model_copy(update={"series": mixed.series[:1]})))
    three = decoded(history_picture(mixed))
    assert three.shape[0] > 2.1 * one.shape[0]
    colors = THEMES["light"]
    assert share_of(one, colors.right) > 0, "the points"
    assert share_of(one, colors.weights) > 0 and share_of(one, colors.wrong) == 0, "it became faster"
    columns = uprights(one, colors.weights)
    assert len(columns) and 0.4 < columns[0] / one.shape[1] < 0.6, "after 6 of 12 points"
    dark = decoded(history_picture(mixed, "dark"))
    assert tuple(dark[0, 0]) == bgr(THEMES["dark"].surface)


def uprights(image: np.ndarray, color: str) -> list[int]:
    """Columns with an upright line of a colour, dashed ones too."""
    shares = (image == bgr(color)).all(axis=2).mean(axis=0)
    return [index for index, share in enumerate(shares) if share > 0.15]


def test_odd_histories_can_be_drawn(tmp_path: Path) -> None:
    for day in range(1, 29):
        put(tmp_path, day, 1e5 if day == 14 else 10.0, revision=HOSTILE, subject={"device": HOSTILE, "name": HOSTILE})
    history = read_history(tmp_path)
    height, width, _ = decoded(history_picture(history)).shape
    assert 400 < height < 800 and 1000 < width < 1800
    many = history.model_copy(update={"series": history.series * 30})
    assert 5000 < decoded(history_picture(many)).shape[0] < 10_000, "of 30 series the first 24"
    empty = history.model_copy(update={"series": ()})
    assert decoded(history_picture(empty)).shape[0] < 200
    assert "No file has a figure of it." in history_markdown(empty)
