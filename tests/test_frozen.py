"""Cutting networks in two, and computing the first half."""

import numpy as np
import pytest
import torch
from torch import nn

from edgekit import backbones, frozen
from edgekit.recipe import suggest
from edgekit.tasks import TASKS

IMAGES = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))


def network(backbone: str, task: str = "classify") -> nn.Module:
    recipe = suggest("x", (), task)  # type: ignore[arg-type]
    model = recipe.model.model_copy(update={"backbone": backbone, "pretrained": False})
    torch.manual_seed(0)
    built: nn.Module = TASKS[task].build(recipe.model_copy(update={"model": model}), ("a", "b", "c"), pretrained=False)
    return built.eval().requires_grad_(False)


def learning(model: nn.Module, stages: int, task: str = "classify") -> list[nn.Module]:
    trunk = [module for _, module in backbones.stages(TASKS[task].trunk(model))]
    return [*trunk[len(trunk) - stages :], TASKS[task].head(model)]


def values(found: torch.Tensor | tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
    return (found,) if isinstance(found, torch.Tensor) else found


@pytest.mark.parametrize("stages", [0, 2, 4])
@pytest.mark.parametrize("backbone", ["lcnet_050", "mobilenetv3_small_050", "resnet18", "torchvision:mobilenet_v2"])
def test_the_halves_are_the_network(backbone: str, stages: int) -> None:
    model = network(backbone)
    parts = learning(model, stages)
    halves = frozen.cut(model, parts, IMAGES)
    assert halves is not None
    with torch.no_grad():
        assert torch.equal(halves.learning(*halves.frozen(IMAGES)), model(IMAGES))
    own = {id(parameter) for parameter in model.parameters()}
    first = {id(parameter) for parameter in halves.frozen.parameters()}
    second = {id(parameter) for parameter in halves.learning.parameters()}
    assert first | second <= own, "a half has weights of its own"
    assert not first & second
    assert {id(parameter) for part in parts for parameter in part.parameters()} <= second


@pytest.mark.parametrize("task", ["detect", "segment"])
def test_several_maps_may_cross(task: str) -> None:
    model = network("mobilenetv3_small_050", task)
    halves = frozen.cut(model, learning(model, 3, task), IMAGES)
    assert halves is not None
    with torch.no_grad():
        crossing = halves.frozen(IMAGES)
        assert len(crossing) > 1
        pairs = zip(values(halves.learning(*crossing)), values(model(IMAGES)), strict=True)
        assert all(torch.equal(one, other) for one, other in pairs)


def test_where_nothing_is_frozen_there_is_no_cut() -> None:
    model = network("lcnet_050")
    assert frozen.cut(model, learning(model, len(backbones.stages(model))), IMAGES) is None


class Counting(nn.Module):
    """Its own code does another thing in training, outside the parts that learn."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.first(x)
        x = x * 2 if self.training else x
        result: torch.Tensor = self.second(x)
        return result


class Choosing(nn.Module):
    """What it does depends on the numbers, which no trace can follow."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.first(x)
        result: torch.Tensor = self.second(x if x.sum() > 0 else -x)
        return result


@pytest.mark.parametrize("kind", [Counting, Choosing])
def test_a_network_that_cannot_be_cut_is_left_as_it_is(kind: type[Counting] | type[Choosing]) -> None:
    model = kind()
    model.first.eval()
    assert frozen.cut(model, [model.second], torch.randn(2, 4)) is None
    assert [module.training for module in (model, model.first, model.second)] == [True, False, True]


def test_training_behind_the_cut_trains_the_network() -> None:
    model = network("lcnet_050")
    parts = learning(model, 2)
    halves = frozen.cut(model, parts, IMAGES)
    assert halves is not None
    for part in parts:
        part.requires_grad_(True).train()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    with torch.no_grad():
        crossing = halves.frozen(IMAGES)
    optimizer = torch.optim.SGD([p for p in halves.learning.parameters() if p.requires_grad], lr=0.1)
    halves.learning(*crossing).square().sum().backward()
    optimizer.step()
    moved = {key.split(".")[0] for key, value in model.state_dict().items() if not torch.equal(value, before[key])}
    assert "classifier" in moved and "conv_stem" not in moved


def phased(model: nn.Module) -> tuple[frozen.Trunk, tuple[frozen.Cut | None, ...]]:
    return frozen.cuts(model, [learning(model, 0), learning(model, 3)], IMAGES)


def test_the_cuts_of_two_phases_are_one_chain() -> None:
    model = network("lcnet_050")
    trunk, (head, stages) = phased(model)
    assert head is not None and stages is not None and trunk.counts == (1, 1)
    with torch.no_grad():
        first = trunk.parts[0](IMAGES)
        second = trunk.parts[1](*first)
        assert torch.equal(stages.learning(*first), model(IMAGES))
        assert torch.equal(head.learning(*second), model(IMAGES))
    assert second[0].shape == (2, 1280)


@pytest.mark.parametrize("count", [1, 2])
def test_onnx_runtime_gives_what_torch_gives(count: int) -> None:
    model = network("lcnet_050")
    trunk, _ = phased(model)
    ready = frozen.engine(trunk, IMAGES.numpy(), torch.device("cpu"))
    assert (ready.engine, ready.part_count) == ("ONNX Runtime", 2)
    parts = ready.run(IMAGES[1:].numpy(), count)
    assert len(parts) == count
    with torch.no_grad():
        expected: tuple[torch.Tensor, ...] = (IMAGES[1:],)
        for part, found in zip(trunk.parts, parts, strict=False):
            expected = part(*expected)
            np.testing.assert_allclose(found[0], expected[0].numpy(), rtol=1e-4, atol=1e-4)


def test_for_a_gpu_batches_are_filled_up_and_cut_again() -> None:
    """Here on a CPU: the same numbers, and always as many images for the network."""
    trunk, _ = phased(network("lcnet_050"))
    seen: list[int] = []
    trunk.parts[0].register_forward_pre_hook(lambda module, inputs: seen.append(len(inputs[0])))
    run = frozen._gpu_run(frozen._Chain(trunk.parts), torch.device("cpu"))
    parts = run(IMAGES.numpy(), 2)
    with torch.no_grad():
        expected: tuple[torch.Tensor, ...] = (IMAGES,)
        for part, found in zip(trunk.parts, parts, strict=True):
            expected = part(*expected)
            assert found[0].shape == expected[0].shape
            np.testing.assert_allclose(found[0], expected[0].numpy(), rtol=1e-4, atol=1e-4)
    assert seen == [32, 2]  # the second time is the line above


def test_an_engine_that_is_wrong_is_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    """Here by asking more than float32 can hold."""
    trunk, _ = phased(network("lcnet_050"))
    monkeypatch.setattr(frozen, "TOLERANCE", -1.0)
    ready = frozen.engine(trunk, IMAGES.numpy(), torch.device("cpu"))
    assert ready.engine == "torch"
    parts = ready.run(IMAGES[:1].numpy(), 2)
    with torch.no_grad():
        expected = trunk.parts[0](IMAGES[:1])[0]
    np.testing.assert_allclose(parts[0][0], expected.numpy(), rtol=1e-5, atol=1e-5)


def test_other_weights_have_another_key() -> None:
    keys = set()
    for seed in (0, 1):
        model = network("lcnet_050")
        with torch.no_grad():
            model.get_parameter("conv_stem.weight").add_(float(seed))
        keys |= set(frozen.engine(phased(model)[0], IMAGES.numpy(), torch.device("cpu")).keys)
    assert len(keys) == 4
    head = network("lcnet_050")
    with torch.no_grad():
        head.get_parameter("classifier.weight").add_(1.0)  # it learns: what is frozen does not know of it
    assert set(frozen.engine(phased(head)[0], IMAGES.numpy(), torch.device("cpu")).keys) <= keys


def test_a_part_is_the_same_whatever_parts_follow_it() -> None:
    """So that a run that is resumed in its second phase goes on with what the first one computed."""
    model = network("mobilenetv3_small_050")
    alone, _ = frozen.cuts(model, [learning(model, 3)], IMAGES)
    both, _ = frozen.cuts(model, [learning(model, 0), learning(model, 3)], IMAGES)
    one, two = (frozen.engine(trunk, IMAGES.numpy(), torch.device("cpu")) for trunk in (alone, both))
    assert (one.engine, one.part_count, two.part_count) == ("ONNX Runtime", 1, 2)
    assert one.keys == two.keys[:1]
    blob = IMAGES[:1].numpy()
    for found in (two.run(blob, 1), two.run(blob, 2)):
        np.testing.assert_array_equal(found[0][0], one.run(blob, 1)[0][0])
