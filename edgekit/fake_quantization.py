"""Training with the rounding of int8: every convolution and linear layer computes on fake-quantized values.

What is simulated is the ONNX QDQ form that devices get: weights int8, symmetric, a scale per output channel; each
layer's input uint8, one scale and zero point a tensor; biases and all between the layers float32. Rounding has a
gradient of one where nothing is clipped, else of zero (straight-through), so the float weights beneath learn what
rounds well (Jacob et al., arXiv:1712.05877, section 3).

BatchNorm is left beside its convolution, not folded as in that paper: folding multiplies an output channel's weights
by one factor, a symmetric scale per output channel is multiplied by the same (its magnitude), and the same integers
come out.

Train in float32: a bfloat16 has 8 significant bits, so its own rounding is as coarse as the one to be learnt.
"""

from __future__ import annotations

import torch
from timm.layers.std_conv import ScaledStdConv2d, ScaledStdConv2dSame, StdConv2d, StdConv2dSame
from timm.utils.model import reparameterize_model
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.utils import parametrize

from edgekit.errors import ConfigError

MOMENTUM = 0.1  # a new batch's share of a range: ten steps' memory, as few images make few steps an epoch
TINY = 1e-12  # the least scale: a channel or an input that is all zeros stays zeros

_LATENT = "parametrizations.weight.original"  # what torch calls a parametrized layer's own weight
_QUANTIZER = "input_quantizer"


def fake_quantize(model: nn.Module) -> None:
    """Puts fake quantization into every Conv2d and Linear (and their subclasses) of a plain network, in place.

    Afterwards `layer.weight` is the rounded weight, a fresh one each time, and the float one beneath it is what
    learns. The input's range is an average over training batches, from the first one on (`training_mode` says
    when); before that, inputs pass unchanged. A layer that is never called itself, because the network takes its
    weight (some attention layers), has its weight rounded and not its input.

    Raises ConfigError, with the model unchanged, for a network that is exported with other weights than it trains:
    parallel branches that become one convolution (RepVGG, MobileOne), standardized weights (NFNet, BiT).
    """
    _refuse_other_forms(model)
    for layer in _layers(model):
        parametrize.register_parametrization(layer, "weight", _RoundedWeight())
        layer.add_module(_QUANTIZER, _InputQuantizer().to(layer.weight.device).train(layer.training))
        layer.register_forward_pre_hook(_quantize_input)


def training_mode(model: nn.Module) -> None:
    """Once parts of a fake-quantized model are in training mode: input ranges follow the batches in all of it, and
    BatchNorms are set to keep their statistics.

    Those are folded into the weights on the device, and statistics that jump with every batch would move the
    rounding that the weights adapt to.
    """
    for module in model.modules():
        if isinstance(module, _InputQuantizer):
            module.train()
        elif isinstance(module, _BatchNorm):
            module.eval()


def plain_state(model: nn.Module) -> dict[str, torch.Tensor]:
    """The state dict of the network without fake quantization: the float weights under their plain names.

    Of a plain network it is the state dict itself. The tensors are the model's own, not copies.
    """
    return {
        key.replace(_LATENT, "weight"): value
        for key, value in model.state_dict().items()
        if _QUANTIZER not in key.split(".")
    }


# The two roundings ----------------------------------------------------------------------------------------------


class _RoundedWeight(nn.Module):
    """float32 (out, ...) → the same shape, each output channel on its own grid of 255 values: -127..127 times
    max|w| / 127."""

    def forward(self, weight: torch.Tensor) -> torch.Tensor:
        scale = weight.detach().abs().amax(dim=tuple(range(1, weight.dim()))).div(127).clamp(min=TINY)
        zeros = torch.zeros_like(scale, dtype=torch.int32)
        return torch.fake_quantize_per_channel_affine(weight, scale, zeros, 0, -127, 127)


class _InputQuantizer(nn.Module):
    """float32, any shape → the same shape, on a grid of 256 values that holds 0 and spans `range`.

    0 is held exactly so that a convolution's padding adds no error; for that the range includes it.
    """

    range: torch.Tensor  # (2,): least and greatest value, averaged over training batches; NaN before the first

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("range", torch.full((2,), torch.nan))

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        if self.training:
            self._follow(inputs.detach())
        elif bool(self.range.isnan().any()):
            return inputs
        low, high = self.range[0], self.range[1]
        scale = ((high - low) / 255).clamp(min=TINY)
        zero_point = (-low / scale).round().clamp(0, 255).to(torch.int32)
        return torch.fake_quantize_per_tensor_affine(inputs, scale, zero_point, 0, 255)

    @torch.no_grad()
    def _follow(self, inputs: torch.Tensor) -> None:
        low, high = inputs.aminmax()
        batch = torch.stack((low.clamp(max=0), high.clamp(min=0)))
        # `where`, not `if`: asking a GPU for a value would make it wait in every layer
        self.range.copy_(torch.where(self.range.isnan(), batch, self.range.lerp(batch, MOMENTUM)))


def _quantize_input(layer: nn.Module, inputs: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
    quantizer = layer.get_submodule(_QUANTIZER)
    return (quantizer(inputs[0]), *inputs[1:])


# What can be simulated ------------------------------------------------------------------------------------------


def _layers(model: nn.Module) -> list[nn.Conv2d | nn.Linear]:
    return [module for module in model.modules() if isinstance(module, nn.Conv2d | nn.Linear)]


def _refuse_other_forms(model: nn.Module) -> None:
    standardized = (StdConv2d, StdConv2dSame, ScaledStdConv2d, ScaledStdConv2dSame)
    if any(isinstance(layer, standardized) for layer in _layers(model)):
        reason = "its convolutions compute their weights from others"
    elif len(_layers(reparameterize_model(model))) != len(_layers(model)):
        reason = "its parallel branches become one convolution"
    else:
        return
    raise ConfigError(
        f"quantization-aware training cannot simulate this network: {reason} when it is exported. Choose another "
        "backbone, or keep the run as it is"
    )
