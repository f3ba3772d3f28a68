"""report.html in a browser: what a person sees of real runs, on a wide screen and a narrow one, light and dark."""

import csv
import shutil
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from browser import Browser, browsing
from shown import bgr

from edgekit import pictures, runner
from edgekit.artifacts import RunFolder, read_json
from edgekit.bench import bench
from edgekit.bundle import bundle
from edgekit.device import here, place
from edgekit.evaluate import evaluate
from edgekit.latency import ms_text
from edgekit.latency_files import keep, kept
from edgekit.quantize import quantize
from edgekit.recipe import Task
from edgekit.report import latency_lines, percent
from edgekit.targets import read_target

WIDE, NARROW = 1280, 400  # pixels
READABLE = 4.5  # contrast, by WCAG 2.2, criterion 1.4.3
SECTIONS = ["summary", "curves", "metrics", "classes", "confusion", "mistakes", "parity", "quantization", "latency"]
SECTIONS += ["recipe", "conditions"]

FACTS = """(() => {
    const text = element => element.innerText.trim();  // as it is shown: without what is hidden
    const cells = table => [...table.rows].map(row => [...row.cells].map(text));
    const place = element => {
        const box = element.getBoundingClientRect();
        return [box.left, box.top, box.right, box.bottom];
    };
    return {
        title: document.title,
        heading: place(document.querySelector("h1")),
        text: Object.fromEntries([...document.querySelectorAll("header, section")].map(
            s => [s.id || "header", text(s)])),
        tables: Object.fromEntries([...document.querySelectorAll("section")].map(
            s => [s.id, [...s.querySelectorAll("table")].map(cells)])),
        tiles: Object.fromEntries([...document.querySelectorAll(".tiles li")].map(
            li => [text(li.querySelector("span")), text(li.querySelector("b"))])),
        links: [...document.querySelectorAll("a")].map(a => [a.getAttribute("href"), !!document.querySelector(a.hash)]),
        images: [...document.images].map(image => ({
            section: image.closest("section").id, alt: image.alt, source: image.currentSrc, loaded: image.complete,
            pixels: [image.naturalWidth, image.naturalHeight], place: place(image),
            drawn: !!image.closest("picture")})),
        width: document.documentElement.clientWidth,
        needed: document.documentElement.scrollWidth,
    };
})()"""

# Of each text on the page its contrast with what lies behind it; https://www.w3.org/TR/WCAG22/#dfn-contrast-ratio
CONTRASTS = """(() => {
    const color = value => value.match(/[\\d.]+/g).map(Number);
    const linear = v => v <= 0.04045 * 255 ? v / 255 / 12.92 : ((v / 255 + 0.055) / 1.055) ** 2.4;
    const luminance = ([red, green, blue]) => 0.2126 * linear(red) + 0.7152 * linear(green) + 0.0722 * linear(blue);
    const behind = element => {
        for (let each = element; each; each = each.parentElement) {
            const found = color(getComputedStyle(each).backgroundColor);
            if (found.length === 3 || found[3] > 0) return found;
        }
    };
    const words = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT), found = [];
    for (let node = words.nextNode(); node; node = words.nextNode()) {
        if (!node.data.trim()) continue;
        const element = node.parentElement;
        const colors = [color(getComputedStyle(element).color), behind(element)].map(luminance);
        found.push([(Math.max(...colors) + 0.05) / (Math.min(...colors) + 0.05), node.data.trim()]);
    }
    return found;
})()"""


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    with browsing(tmp_path_factory.mktemp("browser")) as tab:
        yield tab


@pytest.fixture(scope="module", params=["classify", "detect", "segment"])
def run(
    request: pytest.FixtureRequest,
    browser: Browser,  # noqa: ARG001  (where there is none, nothing needs to be trained)
    tmp_path_factory: pytest.TempPathFactory,
) -> RunFolder:
    """A run that went through the whole flow: trained, exported, quantized, bundled, measured, evaluated."""
    if request.param == "classify":
        trained: Path = request.getfixturevalue("finished_run")
    else:
        make: Callable[[Task], Path] = request.getfixturevalue("canvases_run")
        trained = make(request.param)
    folder = RunFolder(shutil.copytree(trained, tmp_path_factory.mktemp("run") / request.param))
    target = read_target("cpu")
    quantize(folder.path, target, images=32)
    built = bundle(folder.path, target, tmp_path_factory.mktemp("dist")).path
    keep(bench(place(here(), built), seconds=0.1, starts=1), folder)
    evaluate(folder.path, built)
    return folder


@pytest.fixture(scope="module")
def facts(run: RunFolder, browser: Browser) -> dict[str, Any]:
    """What the page shows on a wide, light screen."""
    browser.open(run.report, width=WIDE, theme="light")
    found: dict[str, Any] = browser.value(FACTS)
    return found


def test_the_figures_shown_are_those_of_metrics_json(run: RunFolder, facts: Mapping[str, Any]) -> None:
    metrics = read_json(run.metrics)
    task, columns = metrics["task"], metrics["columns"]
    figures = {
        "classify": {"top-1": "top1", "top-5": "top5", "macro F1": "macro_f1"},
        "detect": {"mAP@0.5": "map50", "mAP (COCO)": "map", "mAP@0.75": "map75"},
        "segment": {"mean IoU": "mean_iou", "pixel accuracy": "pixel_accuracy"},
    }[task]
    (table,) = facts["tables"]["metrics"]
    rows = {title: values for title, *values in table}
    assert rows[""] == list(columns) == ["torch", "onnx", "bundle"]
    for title, key in {**figures, "agreement with torch": "agreement"}.items():
        assert rows[title] == [percent(column[key]) for column in columns.values()]
    first, key = next(iter(figures.items()))
    for name, column in columns.items():
        assert facts["tiles"][f"{first}, {name}"] == percent(column[key])
    assert facts["tiles"]["val images"] == str(metrics["images"])
    assert facts["tiles"]["classes"] == str(len(metrics["class_names"]))
    assert f"Each column answers for the same {metrics['images']} validation images." in facts["text"]["metrics"]


def test_a_row_a_class(run: RunFolder, facts: Mapping[str, Any]) -> None:
    metrics = read_json(run.metrics)
    rows = metrics["columns"]["torch"]["per_class"]
    size, keys = {
        "classify": ("support", ["precision", "recall", "f1"]),
        "detect": ("support", ["ap50", "ap", "precision", "recall", "f1"]),
        "segment": ("pixels", ["iou", "precision", "recall", "f1"]),
    }[metrics["task"]]
    (table,) = facts["tables"]["classes"]
    whole = sum(row[size] for row in rows)
    sizes = [percent(row[size] / whole) if size == "pixels" else str(row[size]) for row in rows]
    expected = [
        [row["label"], shown, *(percent(row[key]) for key in keys)] for row, shown in zip(rows, sizes, strict=True)
    ]
    assert [row[: 2 + len(keys)] for row in table[1:]] == expected
    assert [row["label"] for row in rows] == metrics["class_names"]


def test_epochs_proof_precision_and_latency(run: RunFolder, facts: Mapping[str, Any]) -> None:
    with run.history.open(encoding="utf-8", newline="") as file:
        epochs = list(csv.DictReader(file))
    assert f"{len(epochs)} epochs in " in facts["text"]["conditions"]
    (curves,) = [image for image in facts["images"] if image["section"] == "curves"]
    assert curves["alt"].endswith(f"validation {epochs[0]['metric']}, by epoch")

    proof = read_json(run.parity)
    (table,) = facts["tables"]["parity"]
    assert [row[:3] for row in table[1:]] == [
        [row[k] for k in ("engine", "version", "status")] for row in proof["verdicts"]
    ]

    record = read_json(run.quantization)
    assert record["why"] in facts["text"]["quantization"]
    names = [row[0].removesuffix(" *") for row in facts["tables"]["quantization"][0][1:]]
    assert list(dict.fromkeys(filter(None, names))) == [variant["name"] for variant in record["variants"]]

    (measured,) = kept(run)
    (table,) = facts["tables"]["latency"]
    assert table[0] == ["ms", "p50", "p90", "p99"]
    median = ms_text(float(np.median(measured.samples_ms["end_to_end"])))
    assert table[-1][:2] == ["end to end", median]
    for line in latency_lines(measured):
        assert line in facts["text"]["latency"]


def test_every_section_is_there_and_every_image_is_seen(run: RunFolder, facts: Mapping[str, Any]) -> None:
    metrics = read_json(run.metrics)
    sections = ["precision" if name == "confusion" and metrics["task"] == "detect" else name for name in SECTIONS]
    if metrics["task"] == "classify":
        sections.insert(sections.index("mistakes"), "scores")
    assert list(facts["text"]) == ["header", *sections]
    assert facts["links"] == [[f"#{name}", True] for name in sections[1:]]
    assert "Make it with" not in "".join(facts["text"].values())
    assert facts["title"] == run.name

    images = facts["images"]
    for image in images:
        assert image["loaded"] and min(image["pixels"]) > 50, image
        left, top, right, bottom = image["place"]
        assert right - left > 50 and bottom - top > 50, image
        if image["section"] == "mistakes":
            shape = 1 if metrics["task"] == "classify" else 4 / 3
            assert (right - left) / (bottom - top) == pytest.approx(shape, abs=0.02)
    in_section = [image["section"] for image in images]
    searched = 1 if read_json(run.quantization)["curve"] else 0
    counts = {"curves": 1, sections[4]: 1, "mistakes": len(metrics["mistakes"]), "quantization": 1 + searched}
    counts |= {"scores": 1} if "scores" in sections else {}
    assert {name: in_section.count(name) for name in counts} == counts and len(images) == sum(counts.values())
    drawn = sum(image["drawn"] for image in images)
    html = run.report.read_text(encoding="utf-8")
    assert html.count("data:image/") == 2 * drawn + counts["mistakes"], "of what is drawn, a dark one and a light one"


@pytest.mark.parametrize("theme", ["light", "dark"])
@pytest.mark.parametrize("width", [WIDE, NARROW])
def test_it_can_be_read(
    run: RunFolder, browser: Browser, width: int, theme: pictures.ThemeName, tmp_path: Path
) -> None:
    browser.open(run.report, width=width, theme=theme)
    facts = browser.value(FACTS)
    shot = runner.read_image(browser.screenshot(tmp_path / f"{width}-{theme}.png"))
    assert facts["width"] == shot.shape[1] == width
    assert facts["needed"] <= width, "nothing is wider than the window"

    colors = pictures.THEMES[theme]
    assert (shot[:, 1] == bgr(colors.page)).all(), "the page's left edge, from top to bottom"
    left, top, right, bottom = map(round, facts["heading"])
    heading = shot[top:bottom, left:right].reshape(-1, 3)
    assert (heading == bgr(colors.ink)).all(axis=1).any() and (heading == bgr(colors.page)).all(axis=1).any()
    assert (np.mean(bgr(colors.page)) > 128) == (theme == "light") == (np.mean(bgr(colors.ink)) < 128)
    for image in facts["images"]:
        if image["drawn"]:  # its own edge has the colour of what it lies on
            left, top, right, _ = map(round, image["place"])
            assert 450 < right - left < 1000, "its words can be read, on a narrow screen too"
            assert tuple(shot[top + 4, left + 4]) == bgr(colors.surface), image["alt"]
    faint = [(round(contrast, 2), words) for contrast, words in browser.value(CONTRASTS) if contrast < READABLE]
    assert faint == []

    assert browser.complaints == []
    asked = {address.split(",", 1)[0] for address in browser.requests}
    assert asked <= {run.report.as_uri(), "data:image/png;base64", "data:image/jpeg;base64"}, (
        "no request leaves the file"
    )


def test_a_page_that_is_wrong_is_noticed(browser: Browser, tmp_path: Path) -> None:
    """Else the tests above would prove nothing."""
    page = tmp_path / "page.html"
    page.write_text(
        '<!doctype html><body style="background: #fff"><h1 style="color: #ccc">a</h1><section id="one">'
        '<img src="data:image/png;base64,AAAA"><img src="https://edgekit.invalid/a.png"><p style="width: 900px">b</p>'
        '</section><script>console.error("told"); nothing.at.all</script>',
        encoding="utf-8",
    )
    browser.open(page, width=NARROW, theme="dark")
    facts = browser.value(FACTS)
    assert facts["needed"] > facts["width"] == NARROW
    assert [image["pixels"] for image in facts["images"]] == [[0, 0], [0, 0]]
    asked = [address for address in browser.requests if not address.startswith("data:")]
    assert asked == [page.as_uri(), "https://edgekit.invalid/a.png"]
    assert any("told" in text for text in browser.complaints)
    assert any("ReferenceError" in text for text in browser.complaints)
    assert any("not loaded" in text for text in browser.complaints)
    assert [words for contrast, words in browser.value(CONTRASTS) if contrast < READABLE] == ["a"]
    assert browser.value("matchMedia('(prefers-color-scheme: dark)').matches") is True
