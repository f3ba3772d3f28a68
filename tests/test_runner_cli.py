"""A bundle's run.py as a process of its own, as a device runs it."""

import ast
import json
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import bundles
import cv2
import numpy as np
import pytest

from edgekit import runner

LABELS = set(bundles.SPEC.class_names)
HERE = {"opencv": cv2.__version__, "backend": "opencv/cpu", "precision": "fp32", "threads": 1}


@pytest.fixture(scope="session")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bundle to use, not to change. Its path has blanks and letters of other alphabets."""
    return bundles.write_bundle(tmp_path_factory.mktemp("built") / "zwölf сигналы 信号 1")


DETECT = replace(
    bundles.SPEC,
    task="detect",
    input_size=(64, 96),
    resize="letterbox",
    strides=(8, 16, 32),
    score_threshold=0.3,
    iou_threshold=0.5,
)


@pytest.fixture(scope="session")
def detector(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return bundles.write_bundle(tmp_path_factory.mktemp("built") / "detector", DETECT)


@pytest.fixture(scope="session")
def segmenter(tmp_path_factory: pytest.TempPathFactory) -> Path:
    spec = replace(bundles.SPEC, task="segment", input_size=(64, 96))
    return bundles.write_bundle(tmp_path_factory.mktemp("built") / "segmenter", spec)


@pytest.fixture
def bundle(built: Path, tmp_path: Path) -> Path:
    """A bundle to spoil."""
    return Path(shutil.copytree(built, tmp_path / "bundle"))


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """a.jpg, deep/b.jpg, clip.avi (5 frames, 10 a second), and in bad/ what is no image."""
    folder = tmp_path / "my photos"
    (folder / "deep").mkdir(parents=True)
    (tmp_path / "bad").mkdir()
    for name, photo in {"a.jpg": "china", "deep/b.jpg": "flower"}.items():
        (folder / name).write_bytes(cv2.imencode(".jpg", bundles.photo(photo))[1].tobytes())
    writer = cv2.VideoWriter(str(folder / "clip.avi"), cv2.VideoWriter.fourcc(*"MJPG"), 10, (160, 120))
    for number in range(5):
        writer.write(np.full((120, 160, 3), 50 * number, np.uint8))
    writer.release()
    (tmp_path / "bad" / "cut.jpg").write_bytes((folder / "a.jpg").read_bytes()[:5000])
    (tmp_path / "bad" / "empty.png").write_bytes(b"")
    return folder


def run(bundle: Path, *arguments: str | Path, **options: Any) -> subprocess.CompletedProcess[str]:
    """python run.py ARGUMENTS; warnings are errors there too."""
    command = [sys.executable, "-W", "error", str(bundle / "run.py"), *map(str, arguments)]
    return subprocess.run(
        command, **{"capture_output": True, "text": True, "encoding": "utf-8", "check": False, "timeout": 60, **options}
    )


def lines(answer: subprocess.CompletedProcess[str]) -> list[dict[str, Any]]:
    return [json.loads(line) for line in answer.stdout.splitlines()]


def one_line(answer: subprocess.CompletedProcess[str]) -> str:
    """The only line of stderr, of a command that was refused."""
    assert (answer.returncode, answer.stdout) == (2, "")
    (line,) = answer.stderr.splitlines()
    assert line.startswith("run.py: ")
    return line.removeprefix("run.py: ")


# ---------------------------------------------------------------------------------------------------------------
# infer


def test_infer_answers_a_line_for_each_image_of_a_folder(built: Path, photos: Path) -> None:
    answer = run(built, "infer", photos, "--top-k", "2")
    assert (answer.returncode, answer.stderr) == (0, "")
    told = lines(answer)
    assert [line["source"] for line in told] == [
        str(photos / "a.jpg"),
        *[str(photos / "clip.avi")] * 5,
        str(photos / "deep" / "b.jpg"),
    ]
    model = runner.Model(built, threads=1)
    expected = model(runner.read_image(photos / "a.jpg"), 2)
    assert told[0] == {
        "source": str(photos / "a.jpg"),
        "results": [{**result, "score": round(result["score"], 6)} for result in expected],
    }
    assert [(line["frame"], line["seconds"]) for line in told[1:6]] == [(0, 0), (1, 0.1), (2, 0.2), (3, 0.3), (4, 0.4)]
    assert all(len(line["results"]) == 2 for line in told)


def test_infer_takes_files_and_patterns_from_any_folder(built: Path, photos: Path) -> None:
    answer = run(built, "infer", "my photos/a.jpg", "**/b.*", cwd=photos.parent)
    assert (answer.returncode, answer.stderr) == (0, "")
    assert [line["source"] for line in lines(answer)] == ["my photos/a.jpg", "my photos/deep/b.jpg"]
    assert all({result["label"] for result in line["results"]} <= LABELS for line in lines(answer))


def test_infer_stops_after_the_frames_that_are_wanted(built: Path, photos: Path) -> None:
    for wanted, given in {"3": 3, "0": 5, "99": 5}.items():
        answer = run(built, "infer", photos / "clip.avi", "--frames", wanted)
        assert answer.returncode == 0
        assert [line["frame"] for line in lines(answer)] == list(range(given))


def test_infer_top_k(built: Path, photos: Path) -> None:
    for wanted, given in {"0": 7, "1": 1, "5": 5, "99": 7}.items():
        (line,) = lines(run(built, "infer", photos / "a.jpg", "--top-k", wanted))
        scores = [result["score"] for result in line["results"]]
        assert len(scores) == given and scores == sorted(scores, reverse=True)
        if given == 7:
            assert sum(scores) == pytest.approx(1, abs=1e-5)
            assert {result["label"] for result in line["results"]} == LABELS


def test_infer_reads_lists(built: Path, photos: Path, tmp_path: Path) -> None:
    (tmp_path / "list.txt").write_text("my photos/deep/b.jpg\n\nmy photos/*.jpg\n", "utf-8")
    answer = run(built, "infer", "my photos/a.jpg", "--list", "list.txt", cwd=tmp_path)
    assert answer.returncode == 0
    assert [line["source"] for line in lines(answer)] == ["my photos/a.jpg", "my photos/deep/b.jpg", "my photos/a.jpg"]
    # Names are UTF-8 whatever the terminal's language.
    (photos / "Äpfel.jpg").write_bytes((photos / "a.jpg").read_bytes())
    latin = {**os.environ, "LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0", "PYTHONIOENCODING": "latin-1"}
    answer = run(built, "infer", "--list", "-", input="my photos/Äpfel.jpg\n", cwd=tmp_path, env=latin)
    assert (answer.returncode, answer.stderr) == (0, "")
    (line,) = lines(answer)
    assert os.fsencode(line["source"]) == "my photos/Äpfel.jpg".encode() and line["results"]


def test_a_bad_image_is_told_and_the_run_goes_on(built: Path, photos: Path, tmp_path: Path) -> None:
    sources = ("bad", "bad/none.jpg", "bad/none.mp4", "none/*.jpg", "my photos/a.jpg")
    answer = run(built, "infer", *sources, cwd=tmp_path)
    assert answer.returncode == 2
    assert lines(answer)[:-1] == [
        {"source": "bad/cut.jpg", "error": "the JPEG file is cut off: copy it again"},
        {"source": "bad/empty.png", "error": "the file is empty"},
        {"source": "bad/none.jpg", "error": "No such file or directory"},
        {"source": "bad/none.mp4", "error": "No such file or directory"},
        {"source": "none/*.jpg", "error": "nothing matches"},
    ]
    assert lines(answer)[-1]["results"]
    assert answer.stderr == ""
    assert photos.exists()


@pytest.mark.skipif(sys.platform != "linux", reason="other systems' file names are text")
def test_a_file_name_that_is_not_utf8_is_told_as_json(built: Path, photos: Path) -> None:
    odd = os.fsencode(photos) + b"/caf\xe9.jpg"
    (photos / "a.jpg").rename(os.fsdecode(odd))
    (line,) = lines(run(built, "infer", os.fsdecode(os.fsencode(photos) + b"/*.jpg")))
    assert os.fsencode(line["source"]) == odd and line["results"]


def test_infer_draws(built: Path, photos: Path, tmp_path: Path) -> None:
    shutil.copyfile(photos / "a.jpg", photos / "deep" / "a.jpg")
    sources = ("my photos", "bad")
    answer = run(built, "infer", *sources, "--draw", "drawn/here", "--top-k", "3", cwd=tmp_path)
    assert answer.returncode == 2  # bad/ has no images, the rest is drawn all the same
    drawn = tmp_path / "drawn" / "here"
    assert sorted(path.name for path in drawn.iterdir()) == ["a-2.jpg", "a.jpg", "b.jpg", "clip.avi"]
    image = runner.read_image(photos / "a.jpg")
    wanted = runner.draw(image, lines(answer)[0]["results"], bundles.SPEC)
    assert wanted.shape[0] > image.shape[0]
    assert np.abs(runner.read_image(drawn / "a.jpg").astype(int) - wanted).mean() < 4
    capture = cv2.VideoCapture(str(drawn / "clip.avi"))
    assert capture.get(cv2.CAP_PROP_FPS) == 10
    assert [capture.read()[0] for _ in range(6)] == [True] * 5 + [False]
    capture.release()


def test_drawing_into_the_images_own_folder_leaves_them_alone(built: Path, photos: Path) -> None:
    before = {path: path.read_bytes() for path in photos.rglob("*.*")}
    assert run(built, "infer", photos, "--draw", photos).returncode == 0
    assert {path: path.read_bytes() for path in before} == before
    assert sorted(path.name for path in photos.iterdir()) == [
        "a-2.jpg",
        "a.jpg",
        "b.jpg",
        "clip-2.avi",
        "clip.avi",
        "deep",
    ]


def test_infer_min_score(built: Path, photos: Path) -> None:
    (everything,) = lines(run(built, "infer", photos / "a.jpg", "--top-k", "0"))
    least = everything["results"][2]["score"] - 1e-5
    (line,) = lines(run(built, "infer", photos / "a.jpg", "--min-score", str(least)))
    assert line["results"] == everything["results"][:3]


def test_infer_finds_boxes(detector: Path, photos: Path, tmp_path: Path) -> None:
    options = ("--draw", "drawn", "--coco", "answers.json", "--yolo", "labels")
    answer = run(detector, "infer", "my photos", "bad/empty.png", *options, cwd=tmp_path)
    assert (answer.returncode, answer.stderr) == (2, "")
    *told, bad = lines(answer)
    assert bad == {"source": "bad/empty.png", "error": "the file is empty"}
    model = runner.Model(detector, threads=1)
    expected = model(runner.read_image(photos / "a.jpg"))
    assert len(expected) > 3 and all(result["score"] >= DETECT.score_threshold for result in expected)
    assert told[0] == {
        "source": "my photos/a.jpg",
        "results": [
            {**result, "score": round(result["score"], 6), "box": [round(edge, 2) for edge in result["box"]]}
            for result in expected
        ],
    }
    # COCO: the images that were answered, and every box of theirs
    coco = json.loads((tmp_path / "answers.json").read_text("utf-8"))
    assert [category["name"] for category in coco["categories"]] == list(DETECT.class_names)
    assert [(image["file_name"], image.get("frame")) for image in coco["images"]] == [
        (line["source"], line.get("frame")) for line in told
    ]
    assert (coco["images"][0]["width"], coco["images"][0]["height"]) == (640, 427)
    for image, line in zip(coco["images"], told, strict=True):
        found = [item for item in coco["annotations"] if item["image_id"] == image["id"]]
        assert [(item["category_id"], item["score"]) for item in found] == [
            (result["class_id"], result["score"]) for result in line["results"]
        ]
        for item, result in zip(found, line["results"], strict=True):
            left, top, width, height = item["bbox"]
            assert [left, top, left + width, top + height] == pytest.approx(result["box"], abs=0.011)
    # YOLO: a file an image and frame
    names = ["a.txt", "b.txt", "clip-2.txt", "clip-3.txt", "clip-4.txt", "clip-5.txt", "clip.txt"]
    assert sorted(path.name for path in (tmp_path / "labels").iterdir()) == names
    rows = [line.split() for line in (tmp_path / "labels" / "a.txt").read_text().splitlines()]
    for row, result in zip(rows, told[0]["results"], strict=True):
        x, y, width, height, score = map(float, row[1:])
        edges = [(x - width / 2) * 640, (y - height / 2) * 427, (x + width / 2) * 640, (y + height / 2) * 427]
        assert (int(row[0]), score) == (result["class_id"], result["score"])
        assert edges == pytest.approx(result["box"], abs=0.01)
    # Drawings
    assert sorted(path.name for path in (tmp_path / "drawn").iterdir()) == ["a.jpg", "b.jpg", "clip.avi"]
    wanted = runner.draw(runner.read_image(photos / "a.jpg"), expected, DETECT)
    assert (tmp_path / "drawn" / "a.jpg").read_bytes() == cv2.imencode(".jpg", wanted)[1].tobytes()


def test_infer_of_boxes_takes_another_threshold_and_number(detector: Path, photos: Path) -> None:
    (some,) = lines(run(detector, "infer", photos / "a.jpg"))
    (more,) = lines(run(detector, "infer", photos / "a.jpg", "--min-score", "0.01", "--top-k", "0"))
    (few,) = lines(run(detector, "infer", photos / "a.jpg", "--min-score", "0.01", "--top-k", "2"))
    assert len(more["results"]) > len(some["results"]) > 2
    assert few["results"] == more["results"][:2]
    assert [result for result in more["results"] if result["score"] >= DETECT.score_threshold] == some["results"]


def test_infer_finds_classes_of_pixels(segmenter: Path, photos: Path, tmp_path: Path) -> None:
    answer = run(segmenter, "infer", "my photos", "--draw", "drawn", "--coco", "answers.json", cwd=tmp_path)
    assert (answer.returncode, answer.stderr) == (0, "")
    told = lines(answer)
    expected = runner.Model(segmenter, threads=1)(runner.read_image(photos / "a.jpg"))
    assert len(expected) > 2
    assert told[0]["results"] == [{**result, "share": round(result["share"], 6)} for result in runner.plain(expected)]
    assert sum(result["share"] for result in told[0]["results"]) == pytest.approx(1, abs=1e-5)
    coco = json.loads((tmp_path / "answers.json").read_text("utf-8"))
    found = [item for item in coco["annotations"] if item["image_id"] == 1]
    assert [(item["category_id"], item["segmentation"]) for item in found] == [
        (result["class_id"], result["mask"]) for result in told[0]["results"]
    ]
    assert sum(item["area"] for item in found) == 640 * 427
    assert sorted(path.name for path in (tmp_path / "drawn").iterdir()) == ["a.jpg", "b.jpg", "clip.avi"]


def test_infer_writes_masks_instead_of_telling_them(segmenter: Path, photos: Path, tmp_path: Path) -> None:
    plain = lines(run(segmenter, "infer", "my photos", cwd=tmp_path))
    answer = run(segmenter, "infer", "my photos", "--masks", "new/masks", cwd=tmp_path)
    assert (answer.returncode, answer.stderr) == (0, "")
    for line, want in zip(lines(answer), plain, strict=True):
        mask = cv2.imread(str(tmp_path / line.pop("mask")), cv2.IMREAD_UNCHANGED)
        assert mask.dtype == np.uint8 and np.array_equal(mask, runner.class_map(want["results"], mask.shape))
        assert line == {**want, "results": [{k: v for k, v in r.items() if k != "mask"} for r in want["results"]]}
    names = ["a.png", "b.png", "clip-2.png", "clip-3.png", "clip-4.png", "clip-5.png", "clip.png"]
    assert sorted(path.name for path in (tmp_path / "new" / "masks").iterdir()) == names
    assert photos.exists()


@pytest.mark.parametrize(
    ("task", "option", "message"),
    [
        ("classify", "--masks", "--masks is for the task segment, and this bundle's is classify"),
        ("classify", "--coco", "--coco is for the task detect or segment, and this bundle's is classify"),
        ("classify", "--yolo", "--yolo is for the task detect, and this bundle's is classify"),
        ("detect", "--masks", "--masks is for the task segment, and this bundle's is detect"),
        ("segment", "--yolo", "--yolo is for the task detect, and this bundle's is segment"),
        ("detect", "--coco", "cannot write none/x: there is no folder none"),
    ],
)
def test_options_of_other_tasks_are_refused(
    built: Path, detector: Path, segmenter: Path, tmp_path: Path, task: str, option: str, message: str
) -> None:
    chosen = {"classify": built, "detect": detector, "segment": segmenter}[task]
    assert one_line(run(chosen, "infer", "photo.jpg", option, "none/x", cwd=tmp_path)) == message
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("wanted", [1, 3, 0])
def test_every_frame_that_is_told_is_in_the_drawn_video(detector: Path, tmp_path: Path, wanted: int) -> None:
    film(tmp_path / "film.avi", 40)
    answer = run(detector, "infer", "film.avi", "--frames", str(wanted), "--draw", "drawn", cwd=tmp_path)
    assert (answer.returncode, answer.stderr) == (0, "")
    count = wanted or 40
    assert [line["frame"] for line in lines(answer)] == list(range(count))
    drawn = read_film(tmp_path / "drawn" / "film.avi")
    assert len(drawn) == count
    model = runner.Model(detector, threads=1)
    wanted_frames = [runner.draw(image, model(image), DETECT) for image in read_film(tmp_path / "film.avi")]
    for number, image in enumerate(drawn):  # each in its place
        away = [np.abs(image.astype(int) - other).mean() for other in wanted_frames]
        assert away[number] == min(away) < 8


@pytest.mark.skipif(os.name == "nt", reason="it has no such signal")
def test_an_interrupted_run_has_written_what_it_told(detector: Path, tmp_path: Path) -> None:
    film(tmp_path / "film.avi", 3000)
    options = ["--draw", "drawn", "--coco", "answers.json"]
    command = [sys.executable, "-W", "error", str(detector / "run.py"), "infer", "film.avi", *options]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    with subprocess.Popen(command, text=True, cwd=tmp_path, **pipes) as child:  # type: ignore[call-overload]
        assert child.stdout and child.stderr
        told = [child.stdout.readline() for _ in range(20)]
        child.send_signal(signal.SIGINT)
        told += [line for line in child.stdout if line.endswith("\n")]
        assert (child.wait(60), child.stderr.read()) == (130, "")
    assert 20 <= len(told) < 3000
    assert 0 <= len(read_film(tmp_path / "drawn" / "film.avi")) - len(told) <= 1
    images = json.loads((tmp_path / "answers.json").read_text("utf-8"))["images"]
    assert 0 <= len(images) - len(told) <= 1


def test_a_drawing_that_cannot_be_written_ends_the_run(detector: Path, tmp_path: Path) -> None:
    for number in range(6):
        long = np.full((70_000 if number == 2 else 8, 1, 3), 20 * number, np.uint8)  # too long for JPEG
        (tmp_path / f"{number}.png").write_bytes(cv2.imencode(".png", long)[1].tobytes())
    answer = run(detector, "infer", "*.png", "--draw", "drawn", cwd=tmp_path)
    assert answer.returncode == 2 and "Traceback" not in answer.stderr
    last = answer.stderr.splitlines()[-1]  # OpenCV has its say before
    assert re.fullmatch(r"run\.py: OpenCV .* cannot write drawn/2\.jpg: 1 x 70000 pixels are too many", last)
    assert 2 <= len(lines(answer)) <= 5
    drawn = sorted(path.stem for path in (tmp_path / "drawn").iterdir())
    assert set(drawn) >= {Path(line["source"]).stem for line in lines(answer)} - {"2"}


def film(path: Path, count: int) -> None:
    """120 x 90 pixels; a light square that goes from left to right."""
    writer = cv2.VideoWriter(str(path), cv2.VideoWriter.fourcc(*"MJPG"), 25, (120, 90))
    for number in range(count):
        image = np.full((90, 120, 3), (104, 116, 124), np.uint8)
        left = number % 80
        image[20:60, left : left + 40] = 255
        writer.write(image)
    writer.release()


def read_film(path: Path) -> list[np.ndarray]:
    capture, images = cv2.VideoCapture(str(path)), []
    while (read := capture.read())[0]:
        images.append(read[1])
    capture.release()
    return images


def test_a_reader_that_goes_away_ends_the_run_quietly(built: Path, photos: Path) -> None:
    command = [sys.executable, str(built / "run.py"), "infer", *[str(photos)] * 20]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as child:
        assert child.stdout is not None and child.stderr is not None
        assert json.loads(child.stdout.readline())["results"]
        child.stdout.close()
        assert (child.wait(60), child.stderr.read()) == (0, "")


@pytest.mark.parametrize("command", ["info", "check"])
def test_a_reader_that_was_never_there_is_no_failure(built: Path, command: str) -> None:
    child = [sys.executable, str(built / "run.py"), command]
    buffered = {key: value for key, value in os.environ.items() if key != "PYTHONUNBUFFERED"}  # as most have it
    reading, writing = os.pipe()
    os.close(reading)
    with os.fdopen(writing) as closed:
        answer = subprocess.run(child, stdout=closed, stderr=subprocess.PIPE, check=False, timeout=60, env=buffered)
    assert (answer.returncode, answer.stderr) == (0, b"")


def test_infer_warns_where_the_bundle_was_not_proved(bundle: Path, photos: Path) -> None:
    bundles.sign(bundle, proved=[{"opencv": "4.6.1", "engine": "classic"}, {"opencv": "4.7.1", "engine": "classic"}])
    answer = run(bundle, "infer", photos / "a.jpg")
    engine = runner.engines()[0]
    assert answer.returncode == 0 and lines(answer)[0]["results"]
    assert answer.stderr == (
        f"run.py: warning: this bundle was not proved on OpenCV {cv2.__version__} with the {engine} engine "
        "(proved on: 4.6.1 (classic), 4.7.1 (classic)). Run `python3 run.py check` before you trust its answers\n"
    )


# ---------------------------------------------------------------------------------------------------------------
# check


def test_check_passes_from_anywhere(built: Path, tmp_path: Path) -> None:
    answer = run(built, "check", cwd=tmp_path)
    assert (answer.returncode, answer.stderr) == (0, "")
    *rows, last = answer.stdout.splitlines()
    assert [row.split()[:4] for row in rows] == [
        ["ok", name, "same", "pixels"] for name in ("china.jpg", "flower.jpg", "petals.png", "roof.png")
    ]
    where = f"OpenCV {cv2.__version__}, opencv/cpu ({runner.engines()[0]} engine, fp32), "
    assert last.startswith(f"check passed: 4 of 4 images as trained. {where}")


def test_check_says_in_a_few_words_what_was_answered(built: Path, detector: Path, segmenter: Path) -> None:
    for folder, pattern in (
        (built, r"difference \S+ +\w+"),
        (detector, r"difference \S+ +(\d+ boxes|1 box): \d+ \w+(, \d+ \w+)*"),
        (segmenter, r"difference \S+ +\d+\.\d % \w+(, \d+\.\d % \w+){1,2}"),
    ):
        answer = run(folder, "check")
        assert answer.returncode == 0
        rows = answer.stdout.splitlines()[:4]
        assert all(re.search(pattern + "$", row) for row in rows), rows
        said = json.loads(run(folder, "check", "--json").stdout)
        assert all(row["actual"] and row["expected"] for row in said["images"])


def test_check_gives_its_figures_as_json(built: Path) -> None:
    answer = run(built, "check", "--json", "--threads", "2")
    said = json.loads(answer.stdout)
    assert (answer.returncode, said["ok"], len(said["images"])) == (0, True, 4)
    assert all(row["ok"] and row["pixels_identical"] and row["relative_error"] < 1e-5 for row in said["images"])
    found = said["conditions"]
    assert {key: found[key] for key in HERE} == {**HERE, "threads": 2}


def test_check_takes_another_bundle(built: Path, tmp_path: Path) -> None:
    lonely = tmp_path / "run.py"
    shutil.copyfile(built / "run.py", lonely)
    assert one_line(run(tmp_path, "check")).startswith(f"no bundle at {tmp_path}: cannot read manifest.json")
    assert run(tmp_path, "check", "--bundle", built).returncode == 0


def test_check_fails_on_another_network_that_was_signed(bundle: Path) -> None:
    bundles.write_model(bundle / "model.onnx", seed=1)
    bundles.sign(bundle)
    answer = run(bundle, "check")
    assert (answer.returncode, answer.stderr) == (1, "")
    *rows, last = answer.stdout.splitlines()
    assert all(row.startswith("FAILED") and "outputs differ by" in row for row in rows) and len(rows) == 4
    assert last.startswith("CHECK FAILED: 0 of 4 images as trained")
    answer = run(bundle, "check", "--json")
    said = json.loads(answer.stdout)
    assert answer.returncode == 1 and said["ok"] is False and not any(row["ok"] for row in said["images"])


def test_check_fails_on_another_preprocessing_that_was_signed(bundle: Path) -> None:
    bundles.sign(bundle, spec={**bundles.SPEC.to_dict(), "color_order": "bgr"})
    assert run(bundle, "check").returncode == 1


@pytest.mark.parametrize("command", ["infer", "check", "bench", "info"])
def test_every_command_refuses_a_bundle_that_was_changed(bundle: Path, command: str) -> None:
    bundles.write_model(bundle / "model.onnx", seed=1)
    arguments = [bundle / "check"] if command == "infer" else []
    assert one_line(run(bundle, command, *arguments)) == (
        "the bundle's model.onnx is not the file that was built: copy the bundle again"
    )


def test_a_changed_run_py_refuses_itself(bundle: Path) -> None:
    with (bundle / "run.py").open("a") as file:
        file.write("\n# mine\n")
    assert "run.py is not the file that was built" in one_line(run(bundle, "check"))


def test_a_signed_file_that_is_no_network_is_told(bundle: Path) -> None:
    (bundle / "model.onnx").write_bytes(b"no network")
    bundles.sign(bundle)
    answer = run(bundle, "check")
    assert (answer.returncode, answer.stdout) == (2, "")
    assert f"run.py: OpenCV {cv2.__version__} cannot load " in answer.stderr
    assert "Traceback" not in answer.stderr and "proved on" not in answer.stderr
    bundles.sign(bundle, proved=[{"opencv": "4.6.1", "engine": "classic"}])
    hint = "Use an OpenCV that it was proved on: 4.6.1 (classic)"
    assert run(bundle, "check").stderr.rstrip().endswith(hint)


# ---------------------------------------------------------------------------------------------------------------
# bench


def test_bench_measures_every_stage(bundle: Path) -> None:
    expected = bundle / "check" / "expected.json"
    rows = json.loads(expected.read_text("utf-8"))["images"]
    expected.write_text(json.dumps({"images": rows[:1]}), "utf-8")  # of one image: medians of several do not add up
    bundles.sign(bundle)
    answer = run(bundle, "bench", "--seconds", "0.5", "--json")
    assert (answer.returncode, answer.stderr) == (0, "")
    report = json.loads(answer.stdout)
    assert {key: report["conditions"][key] for key in HERE} == HERE
    stages = [report[f"{stage}_ms"]["p50"] for stage in ("decode", "preprocess", "forward", "postprocess")]
    assert all(stage > 0 for stage in stages)
    assert sum(stages) == pytest.approx(report["end_to_end_ms"]["p50"], rel=0.25)
    assert report["iterations"] >= 20 and report["load_ms"] > 0 and report["first_ms"] > 0
    assert (report["end_to_end_ms"]["p90"] is not None) == (report["iterations"] >= 64)
    assert report["import_ms"] > 1 and report["images_per_second"] > 0
    if sys.platform == "linux":
        assert 10e6 < report["floor_rss_bytes"] <= report["peak_rss_bytes"] < 300e6


def test_bench_prints_a_table_with_its_conditions(built: Path) -> None:
    answer = run(built, "bench", "--seconds", "0.05")
    assert answer.returncode == 0
    head, *rows, conditions = answer.stdout.splitlines()
    rows, (start, *memory) = rows[:5], rows[5:]
    assert head.split() == ["ms", "p50", "p90", "p99"]
    assert [row.split()[0] for row in rows] == ["decode", "preprocess", "forward", "postprocess", "end_to_end"]
    assert all(float(row.split()[1]) >= 0 for row in rows) and len({len(row) for row in [head, *rows]}) == 1
    assert re.fullmatch(
        r"import \d+ ms, load \d+ ms, first inference \d+ ms; \d+ iterations; \d+ images/s with decoding beside", start
    )
    if sys.platform == "linux":
        assert re.fullmatch(r"memory: \d+ MB at most, \d+ MB over Python and OpenCV", memory[0])
    engine = runner.engines()[0]
    assert conditions.startswith(f"OpenCV {cv2.__version__}, {engine} engine, opencv/cpu, fp32, 1 threads, ")


# ---------------------------------------------------------------------------------------------------------------
# worker


@contextmanager
def worker(bundle: Path, *arguments: str | Path) -> Iterator[subprocess.Popen[str]]:
    command = [sys.executable, "-W", "error", str(bundle / "run.py"), "worker", *map(str, arguments)]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    with subprocess.Popen(command, text=True, encoding="utf-8", **pipes) as child:  # type: ignore[call-overload]
        yield child
        if not child.stdin.closed:
            child.stdin.close()
        child.stdout.read()


def asked(child: subprocess.Popen[str], iterations: int) -> dict[str, Any]:
    assert child.stdin and child.stdout
    child.stdin.write(json.dumps({"iterations": iterations}) + "\n")
    child.stdin.flush()
    return dict(json.loads(child.stdout.readline()))


def test_a_worker_says_when_it_is_ready_answers_and_ends_with_its_input(built: Path) -> None:
    with worker(built, "--threads", "1") as child:
        assert child.stdin and child.stdout and child.stderr
        ready = json.loads(child.stdout.readline())
        assert set(ready) == {"import_ms", "load_ms", "first_ms", "floor_rss_bytes", "conditions", "environment"}
        assert all(ready[key] > 0 for key in ("import_ms", "load_ms", "first_ms"))
        assert {key: ready["conditions"][key] for key in HERE} == HERE
        assert set(ready["environment"]) == set(runner.environment())
        for count in (0, 1, 9):  # of four images
            answer = asked(child, count)
            assert set(answer) == {"wall_ns", "cpu_ns", "peak_rss_bytes", "environment"}
            for clock in ("wall_ns", "cpu_ns"):
                assert list(answer[clock]) == list(runner.STAGES)
                assert all(len(times) == count and min(times, default=0) >= 0 for times in answer[clock].values())
            assert all(ns > 0 for ns in answer["wall_ns"]["forward"])
        child.stdin.close()
        assert (child.stdout.read(), child.stderr.read(), child.wait(60)) == ("", "", 0)


@pytest.mark.skipif(not hasattr(os, "sched_getaffinity"), reason="this system does not tell which cores a process uses")
def test_a_pinned_worker_stays_on_the_last_core(built: Path) -> None:
    with worker(built, "--pin") as child:
        assert child.stdout
        assert json.loads(child.stdout.readline())["conditions"]["cores"] == 1
        assert os.sched_getaffinity(child.pid) == {max(os.sched_getaffinity(0))}
    with worker(built) as child:
        assert child.stdout
        child.stdout.readline()
        assert os.sched_getaffinity(child.pid) == os.sched_getaffinity(0)


def test_a_worker_may_take_another_bundles_images(built: Path, bundle: Path) -> None:
    for row in json.loads((bundle / "check" / "expected.json").read_text("utf-8"))["images"]:
        (bundle / "check" / row["file"]).write_bytes(b"no image")
    bundles.sign(bundle)
    with worker(bundle, "--images", built) as child:
        assert child.stdout
        child.stdout.readline()
        assert len(asked(child, 5)["wall_ns"]["decode"]) == 5
    with worker(built, "--images", bundle) as child:
        assert child.stderr
        assert child.stderr.read() == "run.py: not an image that OpenCV can decode\n"
    assert child.returncode == 2


def test_a_worker_may_decode_its_images_once(built: Path) -> None:
    decode_ns = []
    for options in ((), ("--decoded",)):
        with worker(built, *options) as child:
            assert child.stdout
            child.stdout.readline()
            decode_ns.append(asked(child, 8)["wall_ns"]["decode"])
    assert min(decode_ns[0]) > 10 * max(sorted(decode_ns[1])[:6])  # photos of 640 x 427, against nothing


def test_a_worker_on_a_fallback_says_so_to_the_end(bundle: Path) -> None:
    bundles.sign(bundle, arch=["other"])
    with worker(bundle) as child:
        assert child.stdout and child.stdout.read() == ""
    assert child.returncode == 2
    with worker(bundle, "--allow-fallback") as child:
        assert child.stdout
        assert "other" in json.loads(child.stdout.readline())["conditions"]["fallback"]
    assert child.returncode == 3


# ---------------------------------------------------------------------------------------------------------------
# info


def test_info_tells_what_the_bundle_is(built: Path) -> None:
    said = json.loads(run(built, "info", "--json").stdout)
    assert {key: said["here"][key] for key in HERE} == HERE
    assert said["classes"] == list(bundles.SPEC.class_names)
    assert (said["name"], said["target"], said["task"], said["input_size"]) == ("tiny", "cpu", "classify", [32, 48])
    answer = run(built, "info")
    assert (answer.returncode, answer.stderr) == (0, "")
    assert [line.split()[0] for line in answer.stdout.splitlines()] == list(said)
    assert 'classes      ["pagoda", "flower", "roof", "Blüte", "sky", "leaf", "lake"]' in answer.stdout


# ---------------------------------------------------------------------------------------------------------------
# Usage


def test_no_command_shows_the_help(built: Path) -> None:
    answer = run(built)
    assert (answer.returncode, answer.stdout) == (2, "")
    assert all(command in answer.stderr for command in ("infer", "check", "bench", "info", "Exit codes"))


def test_help_is_no_failure(built: Path) -> None:
    answer = run(built, "infer", "--help")
    assert (answer.returncode, answer.stderr) == (0, "")
    options = ("--camera", "--coco", "--draw", "--frames", "--list", "--masks", "--min-score", "--top-k", "--yolo")
    assert all(option in answer.stdout for option in options)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["infer"], "infer needs a SOURCE"),
        (["infer", "--list", "/dev/null"], "infer needs a SOURCE"),
        (["infer", "photo.jpg", "--camera", "0"], "infer needs a SOURCE (image, folder, glob, video, URL) or --list"),
        (["infer", "--list", "missing.txt"], "cannot read the list missing.txt: No such file or directory"),
        (["infer", "--list", "run.py.zip"], "is not a text of one source a line"),
        (["infer", "photo.jpg", "--bundle", "nowhere"], "no bundle at nowhere: cannot read manifest.json"),
        (["infer", "photo.jpg", "--draw", "run.py.zip"], "cannot make the folder run.py.zip"),
    ],
)
def test_what_cannot_be_done_is_said_in_a_line(built: Path, tmp_path: Path, arguments: list[str], message: str) -> None:
    (tmp_path / "run.py.zip").write_bytes(b"PK\0\0")
    assert message in one_line(run(built, *arguments, cwd=tmp_path))


@pytest.mark.parametrize(
    "arguments", [["fly"], ["infer", "--top-k", "-1"], ["bench", "--seconds", "0"], ["check", "--fast"]]
)
def test_bad_usage_is_exit_code_2(built: Path, arguments: list[str]) -> None:
    answer = run(built, *arguments)
    assert (answer.returncode, answer.stdout) == (2, "")
    assert "usage: run.py" in answer.stderr and "Traceback" not in answer.stderr


def test_a_missing_camera_is_told(built: Path) -> None:
    answer = run(built, "infer", "--camera", "93")
    assert answer.returncode == 2
    (line,) = lines(answer)
    assert line["source"] == "camera:93" and "cannot be opened" in line["error"]


# ---------------------------------------------------------------------------------------------------------------
# One file for every device


def test_missing_packages_are_told_with_what_to_do(built: Path) -> None:
    """-I -S: as in a Python that has the standard library only."""
    command = [sys.executable, "-I", "-S", str(built / "run.py"), "check"]
    answer = subprocess.run(command, capture_output=True, text=True, encoding="utf-8", check=False, timeout=60)
    line = one_line(answer)
    assert "No module named 'cv2'" in line
    assert line.endswith(f"It needs numpy and OpenCV: python3 -m pip install -r {built / 'requirements.txt'}")


ONLY = """
import runpy, sys

class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] not in {*sys.stdlib_module_names, "numpy", "cv2"}:
            raise ImportError(f"{name} is refused")

sys.meta_path.insert(0, Refuse())
sys.path.insert(0, sys.argv.pop(1))
for name in ("edgekit", "onnx", "pydantic"):
    try:
        __import__(name)
    except ImportError as error:
        assert str(error) == f"{name} is refused"
    else:
        raise AssertionError(f"{name} was let in")
del sys.argv[0]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


@pytest.mark.parametrize("command", ["bench", "infer"])
@pytest.mark.parametrize("task", ["detect", "segment"])
def test_the_other_tasks_need_no_more(detector: Path, segmenter: Path, task: str, command: str) -> None:
    test_the_standard_library_numpy_and_opencv_are_enough(detector if task == "detect" else segmenter, command)


@pytest.mark.parametrize("command", ["check", "infer", "bench", "info"])
def test_the_standard_library_numpy_and_opencv_are_enough(built: Path, command: str) -> None:
    arguments = {"infer": [str(built / "check")], "bench": ["--seconds", "0.01"]}.get(command, [])
    package = Path(runner.__file__).parents[1]  # so that edgekit could be imported if it were not refused
    child = [sys.executable, "-c", ONLY, str(package), str(built / "run.py"), command, *arguments]
    answer = subprocess.run(child, capture_output=True, text=True, encoding="utf-8", check=False, timeout=60)
    assert (answer.returncode, answer.stderr) == (0, "")
    assert answer.stdout


SOURCE = Path(runner.__file__).read_text(encoding="utf-8")


def test_the_runner_is_small_and_imports_what_it_may() -> None:
    assert len(SOURCE.encode()) < 100_000
    imported = set()
    for node in ast.walk(ast.parse(SOURCE)):
        if isinstance(node, ast.Import):
            imported |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0
            imported.add((node.module or "").partition(".")[0])
    assert imported <= {*sys.stdlib_module_names, "numpy", "cv2"}


NEW_IN_3_9 = {
    "removeprefix",
    "removesuffix",
    "is_relative_to",
    "with_stem",
    "readlink",
    "hardlink_to",
    "bit_count",
    "randbytes",
    "lcm",
    "nextafter",
    "ulp",
    "to_thread",
    "cache",
    "pairwise",
    "file_digest",
    "walk_packages",
}


def test_the_runner_is_python_3_8() -> None:
    """Its syntax, its generics outside annotations, and the methods and arguments that came later."""
    tree = ast.parse(SOURCE, feature_version=(3, 8))
    annotations = {id(part) for node in ast.walk(tree) for part in annotation_parts(node)}
    used = [node for node in ast.walk(tree) if id(node) not in annotations]
    for node in used:
        if isinstance(node, ast.Subscript) and isinstance(node.value, ast.Name):
            assert node.value.id not in {"dict", "list", "tuple", "set", "type"}, f"line {node.lineno}"
        if isinstance(node, ast.Attribute):
            assert node.attr not in NEW_IN_3_9, f"line {node.lineno}: {node.attr}"
        if isinstance(node, ast.Call):
            keywords = {keyword.arg for keyword in node.keywords}
            assert not keywords & {"strict", "slots", "kw_only", "root_dir", "missing_ok", "newline"}, (
                f"line {node.lineno}"
            )
    assert any(isinstance(n, ast.ImportFrom) and n.module == "__future__" for n in tree.body)


def annotation_parts(node: ast.AST) -> list[ast.AST]:
    """What is never evaluated, thanks to `from __future__ import annotations`."""
    found = [getattr(node, "annotation", None), getattr(node, "returns", None)]
    return [part for annotation in found if annotation is not None for part in ast.walk(annotation)]
