"""What CUDA lacks is counted; the recommended backbones need nothing of it."""

from pathlib import Path

import onnx
import pytest
from onnx import TensorProto, helper

from edgekit import backbones
from edgekit.cuda_layers import cpu_operators
from edgekit.lowering import lower
from edgekit.lowering.from_torch import from_torch


def test_operators_without_a_cuda_form_are_counted(tmp_path: Path) -> None:
    value = helper.make_tensor_value_info
    nodes = [
        helper.make_node("ReduceMax", ["x"], ["a"], keepdims=1),
        helper.make_node("Relu", ["a"], ["b"]),
        helper.make_node("Pow", ["b", "b"], ["c"]),
        helper.make_node("Pow", ["c", "b"], ["y"]),
        helper.make_node("Gather", ["x", "x"], ["z"], domain="somebody.else"),
    ]
    graph = helper.make_graph(
        nodes,
        "g",
        [value("x", TensorProto.FLOAT, [1, 3, 4, 4])],
        [value(name, TensorProto.FLOAT, None) for name in ("y", "z")],
    )
    onnx.save(helper.make_model(graph), tmp_path / "m.onnx")
    assert cpu_operators(tmp_path / "m.onnx") == {"Pow": 2, "ReduceMax": 1}


@pytest.mark.slow
@pytest.mark.parametrize("name", ["mobilenetv3_small_050", "tf_efficientnet_lite0"])
def test_a_lowered_backbone_stays_on_the_gpu(name: str, tmp_path: Path) -> None:
    """Before lowering, each global pooling is a ReduceMean."""
    model = backbones.build(name, 4, pretrained=False, weights=None).eval()
    exported = from_torch(model, (64, 64), ("logits",))
    onnx.save(exported, tmp_path / "naive.onnx")
    onnx.save(lower(exported, "plain"), tmp_path / "lowered.onnx")
    assert cpu_operators(tmp_path / "naive.onnx")["ReduceMean"] >= 1
    assert cpu_operators(tmp_path / "lowered.onnx") == {}
