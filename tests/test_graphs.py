"""A step as a CUDA graph: what it computes where there is a GPU, and what happens where it cannot be captured."""

from contextlib import nullcontext
from copy import deepcopy
from typing import Any

import pytest
import torch
from torch import nn

from edgekit.graphs import Graphed


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 8, 3, stride=2), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(392, 5))


def images(count: int, device: str = "cpu") -> torch.Tensor:
    return torch.randn(count, 3, 16, 16, generator=torch.Generator().manual_seed(count)).to(device)


def step(module: Any, model: nn.Module, batch: torch.Tensor) -> dict[str, torch.Tensor]:
    """One step of plain descent → what it leaves."""
    outputs = module(batch)
    model.zero_grad()
    outputs.square().mean().backward()
    with torch.no_grad():
        for parameter in model.parameters():
            assert parameter.grad is not None
            parameter -= 0.1 * parameter.grad
    return {"outputs": outputs.detach().clone(), **{k: v.clone() for k, v in model.state_dict().items()}}


def test_where_it_cannot_be_captured_the_module_computes(monkeypatch: pytest.MonkeyPatch) -> None:
    tried = []

    def fails(module: nn.Module, inputs: tuple[torch.Tensor, ...], **_: Any) -> None:
        tried.append(module(*inputs))  # as the trials before a capture do: BatchNorm has counted it
        raise RuntimeError("operation not permitted when stream is capturing")

    monkeypatch.setattr(torch.cuda, "make_graphed_callables", fails)
    model = network()
    other = deepcopy(model)
    graphed = Graphed(model, nullcontext)
    for count in (4, 4, 3):
        found, expected = step(graphed, model, images(count)), step(other, other, images(count))
        assert found.keys() == expected.keys()
        for name, value in expected.items():
            assert torch.equal(found[name], value), name
    assert len(tried) == 1
    assert [type(module) for module in model.modules()] == [type(module) for module in other.modules()]


def test_several_outputs_are_float32(monkeypatch: pytest.MonkeyPatch) -> None:
    class Two(nn.Module):
        def forward(self, batch: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            return batch.bfloat16(), batch.double()

    def fails(*_: Any, **__: Any) -> None:
        raise RuntimeError("no GPU")

    monkeypatch.setattr(torch.cuda, "make_graphed_callables", fails)
    given = Graphed(Two(), nullcontext)(images(2))
    assert isinstance(given, tuple)
    assert [each.dtype for each in given] == [torch.float32, torch.float32]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU that torch can use")
def test_a_graph_computes_what_the_module_computes() -> None:
    model = network().cuda()
    other = deepcopy(model)
    graphed = Graphed(model, lambda: torch.autocast("cuda", enabled=False))
    for count in (4, 4, 3, 4):
        found, expected = step(graphed, model, images(count, "cuda")), step(other, other, images(count, "cuda"))
        for name, value in expected.items():
            torch.testing.assert_close(found[name], value, rtol=1e-4, atol=1e-5, msg=name)
    with torch.inference_mode():
        torch.testing.assert_close(model.eval()(images(4, "cuda")), other.eval()(images(4, "cuda")))
