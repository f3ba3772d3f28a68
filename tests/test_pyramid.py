"""What detection and segmentation share, and their networks as ONNX: the right operators, and right in OpenCV."""

from collections import Counter
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch

from edgekit import backbones, parity, tasks
from edgekit.forms import Form
from edgekit.lowering import lower
from edgekit.lowering.from_torch import from_torch
from edgekit.recipe import make_recipe
from edgekit.tasks import TASKS
from edgekit.tasks.pyramid import Pyramid, double, last, separable

SIZE = (128, 160)


def network(task: str, backbone: str) -> torch.nn.Module:
    """With BatchNorm statistics of a few images, and outputs that differ from cell to cell."""
    torch.manual_seed(0)
    model_choice = {"backbone": backbone, "pretrained": False}
    recipe = make_recipe({"task": task, "data": {"path": "x"}, "model": model_choice})
    model: torch.nn.Module = TASKS[task].build(recipe, ("a", "b", "c"), pretrained=True)
    with torch.no_grad():
        for layer in TASKS[task].head(model).modules():
            if isinstance(layer, torch.nn.Conv2d) and layer.bias is not None:
                torch.nn.init.normal_(layer.weight)
                torch.nn.init.zeros_(layer.bias)
        for _ in range(2):
            model.train()(torch.randn(2, 3, *SIZE))
    return model.eval()


def test_doubling_repeats_each_value() -> None:
    maps = torch.arange(12.0).reshape(1, 2, 2, 3)
    assert torch.equal(double(maps), maps.repeat_interleave(2, dim=2).repeat_interleave(2, dim=3))


def test_a_separable_convolution_sees_3x3_and_all_channels() -> None:
    layer = separable(4, 6)
    assert [tuple(each.weight.shape) for each in layer if isinstance(each, torch.nn.Conv2d)] == [
        (4, 1, 3, 3),
        (6, 4, 1, 1),
    ]
    assert layer(torch.randn(2, 4, 5, 7)).shape == (2, 6, 5, 7)


def test_the_last_layer_says_its_bias_at_first() -> None:
    torch.manual_seed(0)
    assert (last(64, 3, -4.0)(torch.randn(1, 64, 2, 2)) + 4).abs().max() < 1


def test_a_coarse_map_reaches_the_finer_ones_and_not_the_other_way() -> None:
    torch.manual_seed(0)
    pyramid = Pyramid((3, 5, 7), 8).eval()
    maps = [torch.randn(1, 3, 16, 24), torch.randn(1, 5, 8, 12), torch.randn(1, 7, 4, 6)]
    with torch.inference_mode():
        before = pyramid(maps)
        assert [tuple(each.shape) for each in before] == [(1, 8, 16, 24), (1, 8, 8, 12), (1, 8, 4, 6)]
        coarse = pyramid([*maps[:2], maps[2] + 1])
        fine = pyramid([maps[0] + 1, *maps[1:]])
    assert [not torch.equal(*pair) for pair in zip(before, coarse, strict=True)] == [True, True, True]
    assert [not torch.equal(*pair) for pair in zip(before, fine, strict=True)] == [True, False, False]


@pytest.mark.parametrize("task", ["classify", "detect", "segment"])
def test_outputs_by_name(task: str) -> None:
    model = (
        network(task, "test_resnet")
        if task != "classify"
        else backbones.build("test_resnet", 3, pretrained=False, weights=None).eval()
    )
    blobs = np.random.default_rng(0).standard_normal((2, 3, 64, 96)).astype(np.float32)
    found = tasks.forward(model, blobs, task)
    assert tuple(found) == TASKS[task].OUTPUTS
    assert all(array.dtype == np.float32 and len(array) == 2 for array in found.values())
    each = [tasks.forward(model, blob[None], task) for blob in blobs]
    for name, array in found.items():
        assert np.concatenate([row[name] for row in each]) == pytest.approx(array, abs=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("form", ["opencv5", "opencv4"])
@pytest.mark.parametrize("task", ["detect", "segment"])
@pytest.mark.parametrize("backbone", ["tf_efficientnet_lite0", "mobilenetv4_conv_small"])
def test_the_network_is_right_in_opencv(backbone: str, task: str, form: Form, tmp_path: Path) -> None:
    model = network(task, backbone)
    blobs = np.random.default_rng(0).standard_normal((2, 3, *SIZE)).astype(np.float32)
    expected = tasks.forward(model, blobs, task)
    exported = lower(from_torch(model, SIZE, TASKS[task].OUTPUTS), form)
    kinds = Counter(node.op_type for node in exported.graph.node)
    own = (
        {"Slice", "Concat", "Reshape"} if form == "opencv4" else set()
    )  # lowering's, of the backbones' 5x5 convolutions
    assert set(kinds) - own <= {"Conv", "Relu", "Clip", "HardSigmoid", "Add", "Resize"}
    assert kinds["Resize"] == {"detect": 2, "segment": 6}[task]
    path = tmp_path / "model.onnx"
    onnx.save(exported, path)
    verdicts = parity.compare(path, blobs, expected, tolerance=1e-4)
    assert {each.engine: each.status for each in verdicts} == dict.fromkeys((each.engine for each in verdicts), "ok"), [
        parity.describe(each) for each in verdicts
    ]
