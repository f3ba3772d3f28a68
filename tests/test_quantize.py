"""quantize on a real run: what is made, what stops it, what is chosen and why; and int8 bundles."""

import contextlib
import json
import shutil
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import onnx
import pytest
from bundles import read_expected, sign
from onnx import helper, numpy_helper

from edgekit import parity, quantize, report, runner
from edgekit.artifacts import RunFolder, is_quantized, read_json, read_quantization, write_json
from edgekit.bundle import bundle
from edgekit.cli import main
from edgekit.datasets import read_split
from edgekit.errors import ArtifactError, ConfigError, DataError, ParityError, SetupError
from edgekit.quantize import Figure, Variant
from edgekit.quantize import quantize as stage
from edgekit.targets import Target, read_target

GENEROUS = 10.0  # points: one of the few validation images is 1.6, and the network has learnt for two epochs only
HERE = ".".join(map(str, runner.opencv_version()))


def target(**changes: Any) -> Target:
    """The target cpu with the newest OpenCV alone."""
    return read_target("cpu").model_copy(update={"prove_on": ("5.0.0.93",), "precision": "auto", **changes})


@pytest.fixture(scope="module")
def run(finished_run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The digits run, quantized, in a copy of its own."""
    copy = tmp_path_factory.mktemp("quantized") / "digits"
    shutil.copytree(finished_run, copy)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(quantize, "SECONDS", 0.2)
        stage(copy, target(), max_drop=GENEROUS, images=64)
    return copy


@pytest.fixture
def own_run(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy that a test may spoil; timing is short."""
    monkeypatch.setattr(quantize, "SECONDS", 0.2)
    copy = tmp_path / "digits"
    shutil.copytree(run, copy)
    return copy


# ---------------------------------------------------------------------------------------------------------------
# What is made


def test_what_is_left_in_the_run_folder(run: Path) -> None:
    folder, record = RunFolder(run), read_json(run / "quantize.json")
    assert [row["name"] for row in record["variants"]] == ["fp32", "int8-weights", "int8"]
    assert [row["file"] for row in record["variants"]] == ["model.onnx", "model.int8-weights.onnx", "model.int8.onnx"]
    fp32, weights, int8 = record["variants"]
    for row in record["variants"]:
        assert runner.file_sha256(run / row["file"]) == row["sha256"]
        assert (run / row["file"]).stat().st_size == row["size_bytes"]
    assert fp32["size_bytes"] > 3.5 * int8["size_bytes"] > 3.5 * 0.9 * weights["size_bytes"]
    assert (record["metric"], record["images"]) == ("top-1", len(read_split(folder.split).val))
    assert record["calibration"] == {"images": 64, "method": "mse"}
    assert record["curve"] == record["sensitivity"] == []
    for row in record["variants"]:
        (figure,) = row["figures"]
        assert (figure["opencv"], figure["engine"], figure["status"]) == (HERE, "new", "ok")
        assert 0 <= figure["metric"] <= 1
        assert figure["median_ms"] > 0
    assert fp32["figures"][0]["drop"] == 0.0
    assert fp32["figures"][0]["agreement"] == fp32["figures"][0]["time_ratio"] == 1.0
    assert int8["figures"][0]["agreement"] > 0.8  # a network of two epochs is often undecided
    assert read_quantization(folder, "cpu") == record
    assert report.quantize_table(record).row_count == 3
    assert "Quantization" in (run / "report.html").read_text(encoding="utf-8")


def test_the_figures_are_those_of_the_files(run: Path) -> None:
    """Measured again, another way: ONNX Runtime on the validation images."""
    folder = RunFolder(run)
    spec, val = folder.read_spec(), read_split(folder.split).val
    blobs = np.concatenate([runner.preprocess(runner.read_image(sample.path), spec) for sample in val])
    labels = np.array([sample.label for sample in val])
    answers = {file: parity.reference(run / file, blobs)["logits"] for file in ("model.onnx", "model.int8.onnx")}
    fp32, int8 = answers.values()
    top1 = (fp32.argmax(axis=1) == labels).mean()
    record = read_json(run / "quantize.json")
    assert record["variants"][0]["figures"][0]["metric"] == pytest.approx(top1)
    # int8 rounds a little otherwise in every engine: an image in the balance may tip
    found = record["variants"][2]["figures"][0]
    assert found["agreement"] == pytest.approx((fp32.argmax(axis=1) == int8.argmax(axis=1)).mean(), abs=2.1 / len(val))
    assert found["drop"] == pytest.approx(100 * (top1 - (int8.argmax(axis=1) == labels).mean()), abs=210 / len(val))


def test_the_same_run_gives_the_same_files(run: Path, own_run: Path) -> None:
    stage(own_run, target(), max_drop=GENEROUS, images=64)
    for name in ("model.int8.onnx", "model.int8-weights.onnx"):
        assert (own_run / name).read_bytes() == (run / name).read_bytes()


def test_what_careless_int8_ruins_is_stopped_and_mended_by_sparing_layers(own_run: Path) -> None:
    """One scale a layer: the way that int8 is known to break depthwise networks."""
    told: list[str] = []
    done = stage(
        own_run, target(), max_drop=3.4, images=64, per_channel=False, progress=lambda what, *_: told.append(what)
    )
    names = [variant.name for variant in done.variants]
    first, last = done.record["curve"][0], done.record["curve"][-1]
    assert first["float_layers"] == 0
    assert first["drop"] > 3.4  # the guard held it back
    assert names == ["fp32", "int8-weights", "int8", "int8-mixed"]
    assert "ranking the layers" in told
    ranking = [row["layer"] for row in done.record["sensitivity"]]
    assert list(done.variants[3].float_layers) == ranking[: last["float_layers"]]
    assert [row["float_layers"] for row in done.record["curve"]] == [
        0,
        *quantize.SPARED[: len(done.record["curve"]) - 1],
    ]
    assert done.variants[2].file == ""  # what failed is not kept
    if done.passed:
        assert last["drop"] <= 3.4
        assert (own_run / "model.int8.onnx").is_file()
        assert runner.file_sha256(own_run / "model.int8.onnx") == done.variants[3].sha256
    else:  # it was no longer faster before it was good enough
        assert last["time_ratio"] > quantize.PAYS
        assert not (own_run / "model.int8.onnx").exists()
        assert done.precision == "fp32"
    assert report.float_layers_table(done.record) is not None


def test_an_opencv_that_cannot_be_had_is_named(own_run: Path) -> None:
    done = stage(own_run, target(prove_on=("5.0.0.93", "4.14.0.94")), max_drop=GENEROUS, images=64)
    assert done.record["not_judged"] == [
        f"4.14.0.94: fp32 is not proved there (`edgekit verify {own_run} --opencv 4.14.0.94`)"
    ]
    assert {row.opencv for variant in done.variants for row in variant.figures} == {HERE}


def test_a_target_of_another_machine_is_judged_but_not_timed(own_run: Path) -> None:
    done = stage(own_run, target(arch=("riscv64",)), max_drop=GENEROUS, images=64)
    assert done.passed
    assert done.precision == "fp32"
    assert "its speed on this target cannot be measured on" in done.why
    assert {row.median_ms for variant in done.variants for row in variant.figures} == {None}


# ---------------------------------------------------------------------------------------------------------------
# What stops it


@pytest.mark.parametrize(
    ("changes", "options", "error", "message"),
    [
        ({"backend": "cuda/fp32", "form": "plain"}, {}, ConfigError, "CUDA backend computes int8 layers on the CPU"),
        ({"form": "plain"}, {}, ArtifactError, "is not proved in the form plain"),
        ({}, {"images": 31}, DataError, "31 images to calibrate with are too few"),
        ({"prove_on": ("1.2.3.4",)}, {}, SetupError, "1.2.3.4: fp32 is not proved there"),
        ({"backend": "openvino/cpu"}, {}, SetupError, "cannot be judged for cpu here"),
    ],
)
def test_what_cannot_be_quantized(
    own_run: Path, changes: dict[str, Any], options: dict[str, Any], error: type[Exception], message: str
) -> None:
    before = read_json(own_run / "quantize.json")
    with pytest.raises(error, match=message):
        stage(own_run, target(**changes), **options)
    assert read_json(own_run / "quantize.json") == before


def test_images_that_have_gone(own_run: Path) -> None:
    split = (own_run / "split.csv").read_text(encoding="utf-8")
    folder = str(read_split(own_run / "split.csv").root)
    (own_run / "split.csv").write_text(split.replace(folder, "/nowhere"), encoding="utf-8")
    with pytest.raises(DataError, match="images are gone, such as"):
        stage(own_run, target())


# ---------------------------------------------------------------------------------------------------------------
# What is chosen


def figure(**changes: Any) -> Figure:
    return replace(Figure("5.0.0", "new", "ok", "", 0.9, 0.2, 0.99, 5.0, 0.5), **changes)


CLASSIC: dict[str, Any] = {"opencv": "4.14.0", "engine": "classic"}


@pytest.mark.parametrize(
    ("figures", "spared", "precision", "words"),
    [
        ([{}], 0, "int8", "int8 loses 0.20 points and takes 0.50 of fp32's time on OpenCV 5.0.0 (new): shipping int8"),
        ([{"drop": -0.3}], 0, "int8", "int8 loses nothing and takes 0.50"),
        ([{}], 2, "int8", "int8 with 2 layers in float loses 0.20 points and takes"),
        (
            [{"drop": 1.01}],
            0,
            "fp32",
            "int8 loses 1.01 points, and 1 are allowed: shipping fp32; int8 weights alone make",
        ),
        ([{"drop": 1.0}], 0, "int8", "int8 loses 1.00 points and"),
        ([{"time_ratio": 0.96}], 0, "fp32", "int8 loses 0.20 points, but takes 0.96 of fp32's time"),
        ([{"time_ratio": 1.7}], 0, "fp32", "the file 4.0 times smaller"),
        ([{}, {**CLASSIC, "time_ratio": 1.04}], 0, "int8", "0.50 of fp32's time on OpenCV 5.0.0 (new), 1.04 of"),
        (
            [{}, {**CLASSIC, "time_ratio": 1.06}],
            0,
            "fp32",
            "1.06 of fp32's time on OpenCV 4.14.0 (classic): shipping fp32",
        ),
        ([{}, {**CLASSIC, "drop": 1.5}], 0, "fp32", "int8 loses 1.50 points"),
        ([{"time_ratio": None}], 0, "fp32", "cannot be measured on"),
        (
            [{"status": "wrong", "message": "differs by 0.5", "drop": None, "time_ratio": None}],
            0,
            "fp32",
            "int8 is not right on OpenCV 5.0.0's new engine (wrong: differs by 0.5): shipping fp32",
        ),
    ],
)
def test_int8_is_kept_only_where_it_is_right_and_pays(
    figures: list[dict[str, Any]], spared: int, precision: str, words: str
) -> None:
    rows = tuple(figure(**changes) for changes in figures)
    variants = [
        Variant("fp32", "model.onnx", 4000, "", (), 0.1, rows),
        Variant("int8-weights", "", 1000, "", (), 0.1, rows),
        Variant("int8", "", 1000, "", tuple("ab"[:spared]), 0.1, rows),
    ]
    assert quantize._choice(variants, 1.0)[0] == precision
    assert words in quantize._choice(variants, 1.0)[1]


@pytest.mark.parametrize(
    ("changes", "within"),
    [({}, True), ({"drop": 1.0}, True), ({"drop": 1.01}, False), ({"drop": None, "status": "died"}, False)],
)
def test_within_the_guard_is_on_every_engine(changes: dict[str, Any], within: bool) -> None:
    assert Variant("int8", "", 1, "", (), 0.1, (figure(), figure(**changes))).is_within(1.0) is within


# ---------------------------------------------------------------------------------------------------------------
# Kernels that are wrong


def spoil_last_pixels(path: Path) -> None:
    """As OpenCV 5.0's int8 kernels do on CPUs with AVX-VNNI: the last (h · w mod 8) pixels after each 1x1 convolution.

    (No such CPU is needed: the file computes the fault, so that whatever runs it has the fault's outputs.)
    """
    model = onnx.shape_inference.infer_shapes(onnx.load(path))
    shapes = {value.name: [d.dim_value for d in value.type.tensor_type.shape.dim] for value in model.graph.value_info}
    nodes = []
    for node in model.graph.node:
        nodes.append(node)
        kernel = next((list(a.ints) for a in node.attribute if a.name == "kernel_shape"), None)
        if node.op_type == "Conv" and kernel == [1, 1]:
            _, _, height, width = shapes[node.output[0]]
            mask = np.ones(height * width, np.float32)
            mask[height * width - height * width % 8 :] = 0
            name, output = f"{node.name}_mask", node.output[0]
            model.graph.initializer.append(numpy_helper.from_array(mask.reshape(1, 1, height, width), name))
            node.output[0] = f"{output}_right"
            nodes.append(helper.make_node("Mul", [node.output[0], name], [output]))
    del model.graph.node[:]
    model.graph.node.extend(nodes)
    onnx.save(model, path)


def test_the_guard_sees_outputs_that_are_not_onnx_runtimes(own_run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Labels may survive a fault that outputs show."""
    true_files = parity.run_files

    def faulty(opencv: parity.OpenCV, engine: str, model: Path, *args: Any, **options: Any) -> parity.Run:
        if model.name != "int8.onnx":
            return true_files(opencv, engine, model, *args, **options)
        spoiled = model.with_name("spoiled.onnx")
        shutil.copyfile(model, spoiled)
        spoil_last_pixels(spoiled)
        return true_files(opencv, engine, spoiled, *args, **options)

    monkeypatch.setattr(parity, "run_files", faulty)
    done = stage(own_run, target(), max_drop=100.0, images=64)
    (row,) = done.variants[2].figures
    assert row.status == "wrong"
    assert "times int8's own error; at most 2 are allowed" in row.message
    assert not done.passed
    assert done.precision == "fp32"
    assert not (own_run / "model.int8.onnx").exists()


def test_integer_operators_are_what_opencv_4_gets_and_are_judged_alike(own_run: Path) -> None:
    folder = RunFolder(own_run)
    write_json(folder.parity, {**read_json(folder.parity), "form": "opencv4"})  # the same file serves
    done = stage(own_run, target(form="opencv4"), max_drop=GENEROUS, images=64)
    (row,) = done.variants[2].figures
    assert done.passed == (row.status == "ok" and row.drop is not None and row.drop <= GENEROUS)
    assert not done.passed or "QLinearConv" in {node.op_type for node in onnx.load(folder.int8).graph.node}


# ---------------------------------------------------------------------------------------------------------------
# The command line


def edgekit(*words: object, monkeypatch: pytest.MonkeyPatch) -> int:
    """Runs a command in this process; → its exit code."""
    monkeypatch.setattr(sys, "argv", ["edgekit", *map(str, words)])
    with pytest.raises(SystemExit) as ended:
        main()
    return int(ended.value.code or 0)


@pytest.fixture
def own_target(tmp_path: Path) -> Path:
    """The target of these tests as a file."""
    lines = (Path(__file__).parents[1] / "targets" / "cpu.toml").read_text(encoding="utf-8").splitlines()
    changes = {"prove_on": 'prove_on = ["5.0.0.93"]', "precision": 'precision = "auto"'}
    path = tmp_path / "cpu.toml"
    path.write_text("\n".join(changes.get(line.split(" =")[0], line) for line in lines), encoding="utf-8")
    return path


def test_quantize_by_hand_says_what_is_shipped_and_why(
    own_run: Path, own_target: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ("quantize", own_run, "--target", own_target, "--images", 64, "--max-drop")
    assert edgekit(*words, GENEROUS, monkeypatch=monkeypatch) == 0
    out = capsys.readouterr().out
    record = read_json(own_run / "quantize.json")
    assert record["why"][1:] in out.replace("\n", " ")
    assert "next: edgekit bundle" in out
    assert edgekit(*words, 0, "--json", monkeypatch=monkeypatch) in (0, 1)
    answer = json.loads(capsys.readouterr().out)
    last = answer["variants"][-1]["figures"][0]
    assert answer["passed"] == (last["status"] == "ok" and last["drop"] <= 0)


def test_a_guard_that_fails_ends_with_exit_1_and_the_figures(
    own_run: Path, own_target: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(parity, "INT8_SLACK", 0.0)  # no engine is ONNX Runtime to the last bit
    monkeypatch.setattr(parity, "INT8_FLOOR", 0.0)
    assert edgekit("quantize", own_run, "--target", own_target, "--images", 64, monkeypatch=monkeypatch) == 1
    out = " ".join(capsys.readouterr().out.split())
    assert "Int8 is not right on OpenCV" in out
    assert "--precision fp32" in out


def test_bundle_ships_fp32_where_the_images_are_gone(
    own_run: Path,
    own_target: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """A run may be bundled on another machine than the one with the data."""
    (own_run / "quantize.json").unlink()
    split = (own_run / "split.csv").read_text(encoding="utf-8")
    folder = str(read_split(own_run / "split.csv").root)
    (own_run / "split.csv").write_text(split.replace(folder, "/nowhere"), encoding="utf-8")
    words = ("bundle", own_run, "--target", own_target, "--dist", tmp_path / "dist")
    monkeypatch.setattr(sys, "argv", ["edgekit", *map(str, words), "--json"])
    with contextlib.suppress(SystemExit):
        main()
    captured = capsys.readouterr()
    assert json.loads(captured.out)["precision"] == "fp32"
    assert "shipping fp32, as int8 cannot be judged here" in captured.err
    assert edgekit(*words, "--precision", "int8", monkeypatch=monkeypatch) == 2


# ---------------------------------------------------------------------------------------------------------------
# Bundles


@pytest.fixture(scope="module")
def built(run: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    made: dict[str, Path] = {}

    def build(precision: str) -> Path:
        if precision not in made:
            made[precision] = bundle(run, target(), tmp_path_factory.mktemp(precision), precision).path
        return made[precision]

    return build


@pytest.mark.parametrize(
    ("precision", "file"),
    [
        ("fp32", "model.onnx"),
        ("int8-weights", "model.int8-weights.onnx"),
        ("int8", "model.int8.onnx"),
    ],
)
def test_a_bundle_of_each_precision(built: Callable[[str], Path], run: Path, precision: str, file: str) -> None:
    path = built(precision)
    assert (path / "model.onnx").read_bytes() == (run / file).read_bytes()
    manifest = runner.read_manifest(path)
    assert manifest["precision"] == precision
    measured = {row["name"]: row["tolerance"] for row in read_json(run / "quantize.json")["variants"]}
    tolerance = manifest["tolerances"]["outputs"]
    assert tolerance >= (1e-3 if precision == "fp32" else measured[precision])
    assert {"opencv": HERE, "engine": "new"} in manifest["proved"]
    model = runner.Model(path)
    assert model.conditions()["precision"] == ("int8" if precision == "int8" else "fp32")
    rows = runner.check(model)
    assert all(row["ok"] for row in rows)
    assert max(row["relative_error"] for row in rows) < tolerance


def test_an_int8_bundle_expects_what_its_own_network_answers(built: Callable[[str], Path], run: Path) -> None:
    rows, outputs = read_expected(built("int8"))
    spec = RunFolder(run).read_spec()
    files = [built("int8") / "check" / row["file"] for row in rows]
    blobs = np.concatenate([runner.preprocess(runner.read_image(file), spec) for file in files])
    expected = parity.reference(run / "model.int8.onnx", blobs)["logits"]
    assert np.array_equal(outputs["logits"], expected)


def test_auto_ships_what_was_chosen(run: Path, tmp_path: Path) -> None:
    record = read_json(run / "quantize.json")
    done = bundle(run, target(), tmp_path)
    assert (done.precision, done.why) == (record["precision"], record["why"])


@pytest.mark.parametrize("precision", ["auto", "int8", "int8-weights"])
def test_int8_without_quantize_json_says_what_to_run(finished_run: Path, tmp_path: Path, precision: str) -> None:
    with pytest.raises(ArtifactError, match=r"was not quantized: run `edgekit quantize .* --target cpu`"):
        bundle(finished_run, target(), tmp_path, precision)


def test_int8_that_failed_the_guard_is_not_shipped(own_run: Path, tmp_path: Path) -> None:
    record = read_json(own_run / "quantize.json")
    record["variants"][2]["file"] = ""
    write_json(own_run / "quantize.json", {**record, "precision": "fp32", "why": "int8 loses 9 points"})
    with pytest.raises(ParityError, match=r"no int8 network of .* passed the guard: int8 loses 9 points"):
        bundle(own_run, target(), tmp_path, "int8")
    assert bundle(own_run, target(), tmp_path, "auto").precision == "fp32"


def test_figures_about_something_else_do_not_count(own_run: Path) -> None:
    folder = RunFolder(own_run)
    assert is_quantized(folder, "cpu")
    with pytest.raises(ArtifactError, match="is about the target cpu, not openvino"):
        read_quantization(folder, "openvino")
    whole = folder.int8.read_bytes()
    folder.int8.write_bytes(whole + b" ")
    with pytest.raises(ArtifactError, match="is not the one that was measured"):
        read_quantization(folder, "cpu")
    folder.int8.write_bytes(whole)
    record = read_json(folder.quantization)
    write_json(folder.quantization, {**record, "onnx_sha256": "0" * 64})
    with pytest.raises(ArtifactError, match=r"is about another model\.onnx"):
        read_quantization(folder, "cpu")
    assert not is_quantized(folder, "cpu")


def test_the_device_notices_wrong_int8_before_it_answers(
    built: Callable[[str], Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A network that differs as AVX-VNNI's fault makes it differ, in a bundle whose files are all as signed."""
    path = tmp_path / "bundle"
    shutil.copytree(built("int8"), path)
    spoil_last_pixels(path / "model.onnx")
    sign(path)
    with pytest.raises(runner.RunnerError, match="this int8 network is computed wrongly here"):
        runner.Model(path)
    image = str(next((path / "check").glob("*.png")))
    assert runner.main(["infer", "--bundle", str(path), image]) == 2
    assert "computed wrongly here" in capsys.readouterr().err
    assert runner.main(["check", "--bundle", str(path), "--json"]) == 1
    rows = json.loads(capsys.readouterr().out)["images"]
    assert not rows[0]["ok"]


@pytest.mark.parametrize(("flags", "is_told"), [("fpu avx2 avx_vnni", True), ("fpu avx2 avx512_vnni", False)])
def test_the_known_fault_is_told_on_cpus_that_have_it(
    built: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, flags: str, is_told: bool
) -> None:
    path = tmp_path / "bundle"
    shutil.copytree(built("int8"), path)
    spoil_last_pixels(path / "model.onnx")
    sign(path)
    monkeypatch.setattr(runner, "_cpu_features", lambda: set(flags.split()))
    with pytest.raises(runner.RunnerError) as caught:
        runner.Model(path)
    assert ("OPENCV_CPU_DISABLE=AVX_VNNI" in str(caught.value)) is is_told


@pytest.mark.skipif(
    "avx_vnni" not in runner._cpu_features() or runner.opencv_version() != (5, 0, 0),
    reason="needs a CPU with AVX-VNNI and OpenCV 5.0.0",
)
def test_avx_vnni_is_noticed_where_it_is(own_run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OPENCV_CPU_DISABLE")  # which conftest.py sets; the guard's engines are processes of their own
    stage(own_run, target(), max_drop=GENEROUS, images=64)
    rows = read_json(own_run / "quantize.json")["variants"][2]["figures"]
    assert [row["status"] for row in rows] == ["wrong"], f"OpenCV {cv2.__version__} may have been mended"
