"""What training simulates is what int8 on a device computes; written down here a second time, in numpy."""

import numpy as np
import pytest
import timm
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torchvision import models

from edgekit.errors import ConfigError
from edgekit.fake_quantization import fake_quantize, plain_state, training_mode

MOMENTUM = np.float32(0.1)


def rounded_weight(weight: np.ndarray) -> np.ndarray:
    """Each output channel to the nearest of -127..127 times its scale."""
    columns = (-1, *[1] * (weight.ndim - 1))
    scale = (np.abs(weight).reshape(len(weight), -1).max(axis=1) / np.float32(127)).reshape(columns)
    scale = np.maximum(scale, np.float32(1e-12))
    return np.clip(np.rint(weight * (np.float32(1) / scale)), -127, 127) * scale


def rounded_input(values: np.ndarray, low: float, high: float) -> np.ndarray:
    """To the nearest of 0..255, less the zero point, times the scale."""
    scale = (np.float32(high) - np.float32(low)) / np.float32(255)
    zero = np.clip(np.rint(-np.float32(low) / scale), 0, 255)
    return (np.clip(np.rint(values * (np.float32(1) / scale) + zero), 0, 255) - zero) * scale


def range_of(layer: nn.Module) -> list[float]:
    values: list[float] = layer.get_buffer("input_quantizer.range").tolist()
    return values


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize(
    ("layer", "shape"),
    [
        (nn.Conv2d(3, 8, 3, stride=2, padding=1), (2, 3, 9, 9)),
        (nn.Conv2d(8, 8, 3, padding=1, groups=8, bias=False), (2, 8, 7, 7)),
        (timm.layers.Conv2dSame(4, 6, 3, stride=2), (2, 4, 8, 8)),
        (nn.Linear(10, 5), (3, 10)),
    ],
    ids=["conv", "depthwise", "TF's same padding", "linear"],
)
def test_a_layer_computes_on_rounded_weights_and_rounded_inputs(layer: nn.Module, shape: tuple[int, ...]) -> None:
    inputs = normal(*shape) + 0.3
    weight = layer.weight.detach().numpy().copy()
    model = nn.Sequential(layer)
    plain = nn.Sequential(type(layer)(**_arguments(layer)))
    fake_quantize(model)
    out = model.train()(inputs)
    low, high = min(0.0, float(inputs.min())), max(0.0, float(inputs.max()))
    assert range_of(layer) == [low, high]
    expected_weight, expected_inputs = rounded_weight(weight), rounded_input(inputs.numpy(), low, high)
    np.testing.assert_array_equal(layer.weight.detach().numpy(), expected_weight)
    assert len(np.unique(expected_inputs)) > 20
    plain.load_state_dict(
        {**plain_state(model), "0.weight": torch.from_numpy(expected_weight)}  # rounded ahead, in numpy
    )
    torch.testing.assert_close(out, plain(torch.from_numpy(expected_inputs)), rtol=0, atol=0)
    assert float((out - plain(inputs)).detach().abs().max()) > 1e-4  # the rounding is not nothing


def _arguments(layer: nn.Module) -> dict[str, object]:
    names = ["in_features", "out_features"] if isinstance(layer, nn.Linear) else ["in_channels", "out_channels"]
    if isinstance(layer, nn.Conv2d):
        names += ["kernel_size", "stride", "padding", "groups"]
    return {**{name: getattr(layer, name) for name in names}, "bias": layer.bias is not None}


@given(
    factors=st.lists(st.sampled_from([-3.0, -1.0, -0.125, 0.0, 1e-6, 0.3, 0.7, 1.0, 40.0]), min_size=4, max_size=4),
    seed=st.integers(0, 1000),
)
def test_rounding_commutes_with_folding_batchnorm(factors: list[float], seed: int) -> None:
    """Folding multiplies each output channel by one factor: the same integers, before as after."""
    weight, factor = normal(4, 2, 3, 3, seed=seed), torch.tensor(factors).reshape(4, 1, 1, 1)
    before, after = nn.Conv2d(2, 4, 3), nn.Conv2d(2, 4, 3)
    before.load_state_dict({"weight": weight, "bias": torch.zeros(4)})
    after.load_state_dict({"weight": weight * factor, "bias": torch.zeros(4)})
    for layer in (before, after):
        fake_quantize(layer)
    torch.testing.assert_close(before.weight * factor, after.weight, rtol=1e-5, atol=0)


def test_a_channel_of_zeros_stays_zeros() -> None:
    layer = nn.Conv2d(1, 2, 1)
    layer.load_state_dict({"weight": torch.tensor([0.0, 5.0]).reshape(2, 1, 1, 1), "bias": torch.zeros(2)})
    fake_quantize(layer)
    assert layer.weight.flatten().tolist() == [0.0, 5.0]
    assert layer.train()(torch.zeros(1, 1, 2, 2)).abs().max() == 0  # nor does an input without a range divide by 0


def test_zero_is_exact_whatever_the_range() -> None:
    """A convolution's padding is zeros: were they rounded to something else, every border would be wrong."""
    for offset in (5.0, -5.0, 0.37):
        layer = nn.Linear(64, 1)
        fake_quantize(layer)
        inputs = normal(8, 64) + offset
        layer.train()(inputs)
        assert range_of(layer) == [min(0.0, float(inputs.min())), max(0.0, float(inputs.max()))]
        assert torch.equal(layer.eval()(torch.zeros(1, 64))[0], layer.bias)


def test_the_range_is_an_average_over_training_batches() -> None:
    layer = nn.Linear(4, 1)
    fake_quantize(layer)
    seen = torch.tensor([[-1.0, 0.0, 1.0, 3.0]])
    assert torch.equal(layer.eval()(seen), nn.functional.linear(seen, layer.weight, layer.bias))  # no range yet
    assert np.isnan(range_of(layer)).all()
    layer.train()(seen)
    assert range_of(layer) == [-1.0, 3.0]
    layer(10 * seen)
    assert range_of(layer) == pytest.approx([-1 - 9 * MOMENTUM, 3 + 27 * MOMENTUM])
    kept = range_of(layer)
    layer.eval()(100 * seen)
    assert range_of(layer) == kept


def test_gradients_pass_but_where_inputs_are_clipped() -> None:
    layer = nn.Linear(3, 1)
    fake_quantize(layer)
    layer.train()(torch.tensor([[-1.0, 0.5, 1.0]]))
    inputs = torch.tensor([[-0.7, 0.2, 9.0]], requires_grad=True)
    out = layer.eval()(inputs)
    out.sum().backward()
    latent = dict(layer.named_parameters())["parametrizations.weight.original"]
    assert inputs.grad is not None and latent.grad is not None and layer.bias.grad is not None
    torch.testing.assert_close(inputs.grad, layer.weight.detach() * torch.tensor([[1.0, 1.0, 0.0]]))
    torch.testing.assert_close(latent.grad[0], torch.tensor(rounded_input(np.float32([-0.7, 0.2, 9.0]), -1, 1)))


@pytest.mark.parametrize(
    "make",
    [
        lambda: timm.create_model("tf_efficientnet_lite0", num_classes=5),  # TF's same padding
        lambda: timm.create_model("mobilenetv3_small_050", num_classes=5),  # squeeze-and-excitation
        lambda: models.resnet18(num_classes=5),
    ],
    ids=["lite0", "mobilenetv3", "torchvision's resnet18"],
)
def test_every_convolution_and_linear_layer_of_a_network_takes_part(make: object) -> None:
    model, fresh = make(), make()  # type: ignore[operator]
    names = [name for name, layer in model.named_modules() if isinstance(layer, nn.Conv2d | nn.Linear)]
    assert len(names) > 20
    before = {key: value.clone() for key, value in model.state_dict().items()}
    fake_quantize(model)
    training_mode(model.train())
    model(normal(2, 3, 64, 64)).sum().backward()
    for name in names:
        layer = model.get_submodule(name)
        assert np.isfinite(range_of(layer)).all(), f"{name}: its input is not rounded"
        assert all(len(channel.unique()) <= 255 for channel in layer.weight.detach()), f"{name}: not rounded"
        latent = model.get_parameter(f"{name}.parametrizations.weight.original")
        assert latent.grad is not None and latent.grad.abs().max() > 0, f"{name} does not learn"
    state = plain_state(model)
    assert state.keys() == before.keys()
    assert all(torch.equal(state[key], before[key]) for key in before)  # BatchNorm's statistics too
    fresh.load_state_dict(state)


def test_training_mode_moves_ranges_and_not_batchnorm() -> None:
    """Also where a part is frozen, so in eval mode; and dropout is left as it is."""
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.Dropout(), nn.Conv2d(4, 2, 1))
    fake_quantize(model)
    model.eval()
    model[1:3].train()
    training_mode(model)
    model(normal(2, 3, 4, 4))
    assert np.isfinite([range_of(model[0]), range_of(model[3])]).all()
    assert model[1].num_batches_tracked == 0 and not model[1].training
    assert model[2].training


def test_the_plain_state_of_a_plain_network_is_its_state() -> None:
    model = models.resnet18()
    state, plain = model.state_dict(), plain_state(model)
    assert list(plain) == list(state) and all(torch.equal(plain[key], state[key]) for key in state)


@pytest.mark.parametrize(
    ("name", "reason"),
    [("repvgg_a0", "parallel branches become one"), ("nf_resnet26", "compute their weights from others")],
)
def test_a_network_that_is_exported_with_other_weights_is_refused(name: str, reason: str) -> None:
    model = timm.create_model(name)
    keys = list(model.state_dict())
    with pytest.raises(ConfigError, match=reason):
        fake_quantize(model)
    assert list(model.state_dict()) == keys
