"""export on a real run: what model.onnx holds, and that it is not there unless it is proved."""

import json
import shutil
import sys
from pathlib import Path

import cv2
import numpy as np
import onnx
import onnxruntime
import pytest
import timm
import torch
from graphs import computed, random

from edgekit import runner, tasks
from edgekit.artifacts import RunFolder, open_run, read_json
from edgekit.errors import ArtifactError, ParityError
from edgekit.export import export, to_onnx
from edgekit.recipe import read_recipe, to_toml

ENGINES = ["onnxruntime", *(f"opencv-{engine}" for engine in runner.engines())]


@pytest.fixture
def own_run(finished_run: Path, tmp_path: Path) -> Path:
    """A copy that a test may change."""
    return Path(shutil.copytree(finished_run, tmp_path / "run"))


def listed(folder: Path) -> list[str]:
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*"))


def set_tolerance(run: Path, tolerance: float) -> None:
    recipe = read_recipe(run / "recipe.toml")
    stricter = recipe.model_copy(update={"export": recipe.export.model_copy(update={"tolerance": tolerance})})
    (run / "recipe.toml").write_text(to_toml(stricter), encoding="utf-8")


# ---------------------------------------------------------------------------------------------------------------
# What is written


def test_the_same_weights_give_the_same_bytes(own_run: Path) -> None:
    model = own_run / "model.onnx"
    before, files = model.read_bytes(), listed(own_run)
    model.unlink()
    told: list[str] = []
    done = export(own_run, told.append)
    assert model.read_bytes() == before
    assert listed(own_run) == files  # no temporary file is left
    assert (done.model, done.sha256, done.size_bytes) == (model, runner.file_sha256(model), len(before))
    assert [(verdict.engine, verdict.status) for verdict in done.verdicts] == [(engine, "ok") for engine in ENGINES]
    assert told == ["writing ONNX", "comparing with torch"]


def test_model_onnx_has_one_image_in_and_logits_out(finished_run: Path) -> None:
    model = onnx.load(finished_run / "model.onnx")
    onnx.checker.check_model(model, full_check=True)
    types = {value.name: value.type.tensor_type for value in (*model.graph.input, *model.graph.output)}
    shapes = {name: [size.dim_value for size in kind.shape.dim] for name, kind in types.items()}
    assert shapes == {"image": [1, 3, 64, 64], "logits": [1, 10]}
    assert {kind.elem_type for kind in types.values()} == {onnx.TensorProto.FLOAT}
    assert {entry.domain: entry.version for entry in model.opset_import} == {"": 18}
    assert all(item.data_location == onnx.TensorProto.DEFAULT for item in model.graph.initializer)  # one file
    assert "ReduceMean" not in {node.op_type for node in model.graph.node}  # it is lowered


def test_model_onnx_names_nothing_of_the_machine_that_made_it(finished_run: Path) -> None:
    data = (finished_run / "model.onnx").read_bytes()
    for text in (
        "pkg.torch",
        "pkg.onnxscript",
        "namespace",
        ".py",
        "Traceback",
        "site-packages",
        torch.__version__,
        str(Path(timm.__file__).parent),
        str(Path(runner.__file__).parent),
        str(finished_run),
        sys.prefix,
    ):
        assert text.encode() not in data, text
    model = onnx.load_from_string(data)
    assert (model.producer_name, model.producer_version, model.graph.name) == ("edgekit", "", "edgekit")


def test_model_onnx_computes_what_torch_computes(finished_run: Path) -> None:
    run = open_run(finished_run)
    blobs = random(3, 3, 64, 64)
    want = tasks.forward(tasks.load(run), blobs)["logits"]
    got = computed(onnx.load(run.onnx), blobs)["logits"]
    np.testing.assert_allclose(got, want, atol=1e-4 * np.abs(want).max())


def test_parity_json_has_every_figure(finished_run: Path) -> None:
    run = RunFolder(finished_run)
    figures = read_json(run.parity)
    errors = [verdict["relative_error"] for verdict in figures["verdicts"]]
    assert all(0 < error < 1e-3 for error in errors)
    assert figures == {
        "onnx_sha256": runner.file_sha256(run.onnx),
        "tolerance": 1e-3,
        "images": len(run.check_images()),
        "torch": torch.__version__,
        "onnx": onnx.__version__,
        "verdicts": [
            {
                "engine": engine,
                "version": onnxruntime.__version__ if engine == "onnxruntime" else cv2.__version__,
                "status": "ok",
                "relative_error": error,
                "message": "",
                "first_difference": "",
            }
            for engine, error in zip(ENGINES, errors, strict=True)
        ],
    }


# ---------------------------------------------------------------------------------------------------------------
# What is refused


@pytest.mark.parametrize("earlier", [b"the model before", None])
def test_a_model_that_is_not_proved_is_not_there(earlier: bytes | None, own_run: Path) -> None:
    run = RunFolder(own_run)
    proved = read_json(run.parity)
    run.onnx.unlink()
    if earlier is not None:
        run.onnx.write_bytes(earlier)
    set_tolerance(own_run, 1e-12)  # not even rounding is allowed
    files = listed(own_run)
    with pytest.raises(ParityError) as raised:
        export(own_run)
    assert raised.value.exit_code == 1
    assert str(raised.value).startswith(
        f"the converted model does not compute what was trained: ONNX Runtime {onnxruntime.__version__}: wrong, "
    )
    assert (run.onnx.read_bytes() if run.onnx.exists() else None) == earlier
    assert listed(own_run) == files
    figures = read_json(run.parity)
    assert [verdict["status"] for verdict in figures["verdicts"]] == ["wrong"] * len(ENGINES)
    for before, after in zip(proved["verdicts"], figures["verdicts"], strict=True):
        assert after["relative_error"] == pytest.approx(before["relative_error"], abs=1e-6)
        assert after["message"].endswith("at most 1e-12 is allowed")
    assert {**figures, "verdicts": []} == {**proved, "tolerance": 1e-12, "verdicts": []}
    assert str(own_run) not in json.dumps(figures)


def test_a_folder_that_is_no_finished_run(own_run: Path, tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match="no run folder at "):
        export(tmp_path / "absent")
    for check in (own_run / "check").iterdir():
        check.unlink()
    files = listed(own_run)
    with pytest.raises(ArtifactError, match="no check images in "):
        export(own_run)
    (own_run / "model.safetensors").unlink()
    with pytest.raises(ArtifactError, match=r"has no model\.safetensors"):
        export(own_run)
    assert listed(own_run) == [name for name in files if name != "model.safetensors"]


# ---------------------------------------------------------------------------------------------------------------
# to_onnx


@pytest.mark.slow
def test_branches_that_are_for_training_only_are_folded() -> None:
    """RepVGG: the 3×3, the 1×1 and the identity branch become one 3×3 convolution."""
    torch.manual_seed(0)
    model = timm.create_model("repvgg_a0", num_classes=10).eval()
    for layer in model.modules():  # statistics as training leaves them: folding must take them into account
        if isinstance(layer, torch.nn.BatchNorm2d):
            assert layer.running_mean is not None and layer.running_var is not None
            torch.nn.init.uniform_(layer.running_mean, -0.1, 0.1)
            torch.nn.init.uniform_(layer.running_var, 0.5, 1.5)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    spec = runner.Spec("classify", (64, 64), "stretch", "linear", "rgb", (0.0,) * 3, (1.0,) * 3, tuple("0123456789"))
    exported = to_onnx(model, spec, 18)

    branches = sum(isinstance(layer, torch.nn.Conv2d) for layer in model.modules())
    assert (branches, sum(node.op_type == "Conv" for node in exported.graph.node)) == (44, 22)
    assert "BatchNormalization" not in {node.op_type for node in exported.graph.node}
    after = model.state_dict()
    assert list(after) == list(before)  # the argument keeps its branches
    assert all(torch.equal(after[name], before[name]) for name in before)
    blobs = random(2, 3, 64, 64)
    with torch.inference_mode():
        want = model(torch.from_numpy(blobs)).numpy()
    np.testing.assert_allclose(computed(exported, blobs)["logits"], want, atol=1e-4 * np.abs(want).max())
