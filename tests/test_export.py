"""export: what comes out is proved, reproducible and says nothing of this machine; what is not proved stays away."""

from __future__ import annotations

import json
import os
from dataclasses import asdict
from pathlib import Path

import cv2
import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from safetensors.torch import load_file, save_file

from edgekit import backbones, parity, runner, tasks
from edgekit.artifacts import open_run
from edgekit.errors import ArtifactError, ParityError
from edgekit.export import CHECK_IMAGES, Exported, export
from edgekit.recipe import make_recipe, to_toml

ENGINES = ["onnxruntime", *(f"opencv-{engine}" for engine in runner.engines())]
SMALL = "test_resnet"  # timm's own, made for tests: 0.4 million weights


def make_run(path: Path, backbone: str, images: int = 4, **export_options: object) -> Path:
    """A run folder as finetune leaves it, with random weights for 64x64 images and seven classes."""
    data = {"path": "data"}
    recipe = make_recipe({"data": data, "model": {"backbone": backbone}, "export": export_options})
    spec = runner.Spec("classify", (64, 64), "stretch", "linear", "rgb", (123.0,) * 3, (58.0,) * 3, tuple("abcdefg"))
    (path / "check").mkdir(parents=True)
    (path / "recipe.toml").write_text(to_toml(recipe), encoding="utf-8")
    (path / "spec.json").write_text(json.dumps(spec.to_dict()), encoding="utf-8")
    torch.manual_seed(0)
    save_file(backbones.build(backbone, 7, pretrained=False, weights=None).state_dict(), path / "model.safetensors")
    random = np.random.default_rng(0)
    for i in range(images):
        blocks = random.integers(0, 256, (6, 8, 3), dtype=np.uint8)
        cv2.imwrite(str(path / "check" / f"{i:02}.png"), cv2.resize(blocks, (90, 70)))
    return path


def blobs(run: Path) -> np.ndarray:
    folder = open_run(run)
    images = [runner.read_image(path) for path in folder.check_images()]
    return np.concatenate([runner.preprocess(image, folder.read_spec()) for image in images])


@pytest.fixture(scope="module")
def proved(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Exported, list[str]]:
    """MobileNetV3, whose naive export is silently wrong; its run folder, its export, and what progress was told."""
    run, told = make_run(tmp_path_factory.mktemp("runs") / "mobile", "mobilenetv3_small_100"), []
    return run, export(run, progress=told.append), told


@pytest.mark.slow
def test_mobilenet_is_proved_in_every_engine(proved: tuple[Path, Exported, list[str]]) -> None:
    run, exported, told = proved
    path = run / "model.onnx"
    assert exported == Exported(path, runner.file_sha256(path), path.stat().st_size, exported.verdicts)
    assert [(verdict.engine, verdict.status) for verdict in exported.verdicts] == [(engine, "ok") for engine in ENGINES]
    assert all(verdict.relative_error is not None and verdict.relative_error < 1e-5 for verdict in exported.verdicts)
    assert told == [
        "exporting mobilenetv3_small_100 to ONNX",
        "comparing with torch on 4 images, engine by engine",
    ]
    assert json.loads((run / "parity.json").read_text(encoding="utf-8")) == {
        "ok": True,
        "form": "opencv5",
        "onnx_sha256": exported.sha256,
        "onnx_size_bytes": exported.size_bytes,
        "images": 4,
        "tolerance": 1e-3,
        "verdicts": [asdict(verdict) for verdict in exported.verdicts],
        "versions": {
            "torch": torch.__version__,
            "onnx": onnx.__version__,
            "onnxruntime": onnxruntime.__version__,
            "opencv": cv2.__version__,
        },
    }
    names = {"check", "model.onnx", "model.safetensors", "parity.json", "recipe.toml", "spec.json"}
    assert {entry.name for entry in run.iterdir()} == names


@pytest.mark.slow
def test_the_model_has_fixed_names_and_shapes_and_no_traces(proved: tuple[Path, Exported, list[str]]) -> None:
    _, exported, _ = proved
    model = onnx.load(exported.model)
    onnx.checker.check_model(model, full_check=True)
    shapes = [
        (value.name, value.type.tensor_type.elem_type, [size.dim_value for size in value.type.tensor_type.shape.dim])
        for value in (*model.graph.input, *model.graph.output)
    ]
    assert shapes == [("image", onnx.TensorProto.FLOAT, [1, 3, 64, 64]), ("logits", onnx.TensorProto.FLOAT, [1, 7])]
    assert (model.graph.name, model.opset_import[0].version, model.functions[:]) == ("model", 18, [])
    data = exported.model.read_bytes()
    for trace in (b"site-packages", b"timm", b".py", b"pkg.torch", os.fsencode(Path.cwd())):
        assert trace not in data


@pytest.mark.slow
def test_the_naive_export_is_silently_wrong(proved: tuple[Path, Exported, list[str]], tmp_path: Path) -> None:
    run, _, _ = proved
    network = tasks.load(open_run(run))
    naive = tmp_path / "naive.onnx"
    program = torch.onnx.export(
        network,
        (torch.zeros(1, 3, 64, 64),),
        dynamo=True,
        opset_version=18,
        input_names=["image"],
        output_names=["logits"],
        verbose=False,
    )
    onnx.save(program.model_proto, naive)
    images = blobs(run)[:2]
    first, *rest = parity.compare(naive, images, tasks.forward(network, images, "classify"), tolerance=1e-3)
    assert (first.engine, first.status) == ("onnxruntime", "ok")
    for verdict in rest:
        assert verdict.status == "wrong"
        assert verdict.relative_error is not None
        assert verdict.relative_error > 0.1
        # the first squeeze-and-excitation block
        assert verdict.first_difference.startswith("node 10 of 122 'node_mul' (Relu, HardSigmoid → Mul), output 'mul'")
    with pytest.raises(ParityError, match=r"HardSigmoid → Mul.*edgekit backbones"):
        parity.require([first, *rest])


@pytest.mark.slow
def test_the_same_weights_give_the_same_bytes(tmp_path: Path) -> None:
    one = export(make_run(tmp_path / "one", SMALL))
    other = export(make_run(tmp_path / "two" / "elsewhere", SMALL, images=CHECK_IMAGES + 1))
    assert one.model.read_bytes() == other.model.read_bytes()
    read = json.loads((tmp_path / "two" / "elsewhere" / "parity.json").read_text(encoding="utf-8"))["images"]
    assert read == CHECK_IMAGES


@pytest.mark.slow
def test_what_is_not_proved_leaves_the_earlier_model_alone(tmp_path: Path) -> None:
    # No engine adds in torch's order, so at this tolerance all of them are "wrong".
    run = make_run(tmp_path / "run", SMALL, images=1, tolerance=1e-12)
    (run / "model.onnx").write_bytes(b"the earlier one")
    before = {entry.name for entry in run.iterdir()}
    message = r"ONNX Runtime .*: wrong, output 'logits' differs by .* at most 1e-12 is allowed"
    with pytest.raises(ParityError, match=message):
        export(run)
    assert (run / "model.onnx").read_bytes() == b"the earlier one"
    assert {entry.name for entry in run.iterdir()} == before | {"parity.json"}
    record = json.loads((run / "parity.json").read_text(encoding="utf-8"))
    assert (record["ok"], [row["status"] for row in record["verdicts"]]) == (False, ["wrong"] * len(ENGINES))


def test_branches_are_merged_before_export(tmp_path: Path) -> None:
    exported = export(make_run(tmp_path / "run", "repvgg_a0", images=1))
    kinds = {node.op_type for node in onnx.load(exported.model).graph.node}
    assert "Conv" in kinds
    assert not kinds & {"Add", "BatchNormalization"}


def test_a_network_that_diverged_is_refused_before_any_work(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", SMALL)
    weights = load_file(run / "model.safetensors")
    weights["fc.bias"][0] = torch.nan
    save_file(weights, run / "model.safetensors")
    with pytest.raises(ParityError, match=r"gives NaN or infinite outputs: train it again, with a lower learning_rate"):
        export(run)
    assert not (run / "parity.json").exists()


def test_a_check_image_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", SMALL)
    (run / "check" / "01.png").write_bytes(b"no image")
    with pytest.raises(ArtifactError, match=r"cannot read the check image .*01\.png: not an image .*Put the original"):
        export(run)


def test_a_folder_that_is_no_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match="no run folder at"):
        export(tmp_path / "missing")
