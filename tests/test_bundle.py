"""bundle and evaluate on a real run: what the folder holds, and that its proof would notice a fault."""

import hashlib
import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import pytest
from bundles import read_expected
from onnx import numpy_helper

from edgekit import runner, tasks
from edgekit.artifacts import RunFolder, read_json, write_json
from edgekit.bundle import bundle
from edgekit.datasets import read_split
from edgekit.errors import ArtifactError, DataError, ParityError
from edgekit.evaluate import evaluate
from edgekit.targets import read_target


@pytest.fixture(scope="module")
def built(finished_run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return bundle(finished_run, read_target("cpu"), tmp_path_factory.mktemp("dist")).path


@pytest.fixture
def own_run(finished_run: Path, tmp_path: Path) -> Path:
    """A copy of the run that a test may spoil."""
    copy = tmp_path / "runs" / "digits"
    shutil.copytree(finished_run, copy)
    return copy


def test_a_bundle_holds_what_the_contract_says(built: Path, finished_run: Path) -> None:
    assert built.name == "digits-cpu"
    names = sorted(p.relative_to(built).as_posix() for p in built.rglob("*") if p.is_file())
    assert names == [
        "README.md",
        *(f"check/0{i}.png" for i in range(8)),
        "check/expected.json",
        "check/outputs.npz",
        "manifest.json",
        "model.onnx",
        "requirements.txt",
        "run.py",
    ]
    assert (built / "run.py").read_bytes() == Path(runner.__file__).read_bytes()
    assert (built / "model.onnx").read_bytes() == (finished_run / "model.onnx").read_bytes()
    manifest = runner.read_manifest(built)
    assert manifest["spec"] == read_json(finished_run / "spec.json")
    assert sorted(manifest["files"]) == [name for name in names if name != "manifest.json"]
    here = "{}.{}.{}".format(*runner.opencv_version())
    assert manifest["proved"] == [{"opencv": here, "engine": engine} for engine in runner.engines()]
    assert manifest["provenance"]["weights_sha256"] == runner.file_sha256(finished_run / "model.safetensors")
    assert manifest["provenance"]["dataset_sha256"] == read_split(finished_run / "split.csv").sha256
    readme = (built / "README.md").read_text(encoding="utf-8")
    assert "Network input 64x64 px (height x width); classes: 10 (0, 1, 2" in readme
    assert "python3 run.py check" in readme and "{" not in readme


def test_the_check_has_the_networks_outputs_and_what_they_mean(built: Path, finished_run: Path) -> None:
    rows, outputs = read_expected(built)
    assert [set(row) for row in rows] == [{"file", "pixels_sha256", "results"}] * 8
    run = RunFolder(finished_run)
    spec, files = run.read_spec(), run.check_images()
    assert [row["file"] for row in rows] == [file.name for file in files]
    images = [runner.read_image(file) for file in files]
    blobs = np.concatenate([runner.preprocess(image, spec) for image in images])
    expected = tasks.forward(tasks.load(run), blobs, "classify")
    assert outputs["logits"].dtype == np.float32
    assert set(outputs) == set(expected) and np.array_equal(outputs["logits"], expected["logits"])
    for row, image, logits in zip(rows, images, outputs["logits"], strict=True):
        assert row["results"] == runner.classify({"logits": logits[None]}, spec, image.shape[:2])


def test_the_same_run_gives_the_same_bytes(finished_run: Path, built: Path, tmp_path: Path) -> None:
    again = bundle(finished_run, read_target("cpu"), tmp_path)
    first = built.with_name(built.name + ".tar.gz").read_bytes()
    assert hashlib.sha256(again.archive.read_bytes()).digest() == hashlib.sha256(first).digest()
    assert again.size_bytes == len(first)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["digits-cpu", "digits-cpu.tar.gz"]


def test_the_python_api(built: Path) -> None:
    expected = json.loads((built / "check" / "expected.json").read_text(encoding="utf-8"))["images"][0]
    model = runner.Model(built)
    results = model(runner.read_image(built / "check" / expected["file"]))
    assert [r["label"] for r in results] == [r["label"] for r in expected["results"]]
    assert [r["score"] for r in results] == pytest.approx([r["score"] for r in expected["results"]], abs=1e-4)


def test_a_model_that_is_not_the_proved_one_is_not_packed(own_run: Path, finished_run: Path, tmp_path: Path) -> None:
    with (own_run / "model.onnx").open("ab") as stream:
        stream.write(b"\0")
    with pytest.raises(ArtifactError, match="is not the one that was proved: run `edgekit export"):
        bundle(own_run, read_target("cpu"), tmp_path / "dist")
    shutil.copyfile(finished_run / "model.onnx", own_run / "model.onnx")
    write_json(own_run / "parity.json", {**read_json(own_run / "parity.json"), "ok": False})
    with pytest.raises(ArtifactError, match=r"the last export found .* wrong"):
        bundle(own_run, read_target("cpu"), tmp_path / "dist")
    (own_run / "model.onnx").unlink()
    with pytest.raises(ArtifactError, match=r"has no proved model.onnx: run `edgekit export"):
        bundle(own_run, read_target("cpu"), tmp_path / "dist")
    assert not (tmp_path / "dist").exists()


def test_a_model_that_computes_something_else_is_stopped(own_run: Path, tmp_path: Path) -> None:
    """One bias is moved and the proof's hash forged: the bundle's own check must notice, and leave nothing."""
    model = onnx.load(own_run / "model.onnx")
    bias = next(t for t in model.graph.initializer if list(t.dims) == [10])
    bias.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(bias) + np.float32(0.05), bias.name))
    onnx.save(model, own_run / "model.onnx")
    parity = read_json(own_run / "parity.json")
    write_json(own_run / "parity.json", {**parity, "onnx_sha256": runner.file_sha256(own_run / "model.onnx")})
    with pytest.raises(ParityError, match=r"8 of 8 check images differ, such as 00.png \(outputs differ by"):
        bundle(own_run, read_target("cpu"), tmp_path / "dist")
    assert list((tmp_path / "dist").iterdir()) == []


def test_torch_onnx_and_bundle_side_by_side(own_run: Path, built: Path) -> None:
    seen: set[tuple[str, int]] = set()
    metrics = evaluate(own_run, built, on_image=lambda name, done, total: seen.add((name, total))).metrics
    count = len(read_split(own_run / "split.csv").val)
    assert metrics["images"] == count
    assert seen == {(name, count) for name in ("torch", "onnx", "bundle")}
    columns = metrics["columns"]
    assert list(columns) == ["torch", "onnx", "bundle"]
    for name in ("onnx", "bundle"):
        assert columns[name]["agreement"] == 1.0
        assert columns[name]["confusion"] == columns["torch"]["confusion"]
        assert columns[name]["top5"] == columns["torch"]["top5"]
    assert np.array(columns["torch"]["confusion"]).sum() == count
    wrong = count - round(columns["torch"]["top1"] * count)
    assert len(metrics["mistakes"]) == min(wrong, 24)
    run = RunFolder(own_run)
    assert read_json(run.metrics) == json.loads(json.dumps(metrics))
    for name in ("confusion.png", "mistakes.jpg"):
        assert min(runner.read_image(own_run / name).shape[:2]) > 50
    assert f"{100 * columns['torch']['top1']:.2f}" in run.report.read_text(encoding="utf-8")


def test_the_specs_temperature_is_in_the_scores_of_every_column(own_run: Path, built: Path, tmp_path: Path) -> None:
    """And nowhere else: a bundle at another temperature has the same outputs and the same best answers."""
    spec = read_json(own_run / "spec.json")
    write_json(own_run / "spec.json", {**spec, "temperature": 8.0})
    warm = bundle(own_run, read_target("cpu"), tmp_path / "dist").path
    assert runner.read_manifest(warm)["spec"] == {**spec, "temperature": 8.0}
    assert np.array_equal(read_expected(warm)[1]["logits"], read_expected(built)[1]["logits"])
    at_8, mixed = evaluate(own_run, warm).metrics["columns"], evaluate(own_run, built).metrics["columns"]
    for name in ("torch", "onnx", "bundle"):
        assert at_8[name]["calibration_error"] == pytest.approx(at_8["torch"]["calibration_error"], abs=0.02)
        assert at_8[name]["confusion"] == mixed[name]["confusion"]
    assert mixed["torch"]["calibration_error"] == at_8["torch"]["calibration_error"]
    assert abs(mixed["bundle"]["calibration_error"] - at_8["bundle"]["calibration_error"]) > 0.1


def test_evaluating_without_the_images(own_run: Path) -> None:
    split = own_run / "split.csv"
    split.write_text(split.read_text(encoding="utf-8").replace("digits/", "elsewhere/"), encoding="utf-8")
    with pytest.raises(DataError, match="validation images are gone"):
        evaluate(own_run)


def test_a_bundle_that_fails_in_evaluation_is_an_error(own_run: Path, built: Path, tmp_path: Path) -> None:
    broken = tmp_path / "broken"
    shutil.copytree(built, broken)
    (broken / "model.onnx").write_bytes(b"")
    with pytest.raises(ArtifactError, match=r"failed on the images \(exit 2\)"):
        evaluate(own_run, broken)


def test_the_archive_unpacks_to_a_bundle_that_checks_itself(built: Path, tmp_path: Path) -> None:
    shutil.unpack_archive(built.with_name(built.name + ".tar.gz"), tmp_path)
    answer = subprocess.run(
        [sys.executable, str(tmp_path / "digits-cpu" / "run.py"), "check", "--json"], capture_output=True, check=False
    )
    checked = json.loads(answer.stdout)
    assert answer.returncode == 0 and checked["ok"]
    assert all(row["pixels_identical"] and row["relative_error"] < 1e-4 for row in checked["images"])
