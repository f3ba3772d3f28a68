"""The gradients that torch computes slowly on CPUs in bfloat16, computed in a faster way.

- Depthwise convolutions. oneDNN has plain loops for the weights' gradient where the kernel is larger than 3x3 (ten
  times slower than it need be), and for the input's where the stride is not 1 (thirty times slower than in float32).
- Pooling to one pixel. Its gradient is one number expanded over all pixels, which is not channels_last, and all that
  comes before it falls back to slow loops.

They are a hundredth of a network's products, and were two thirds of a training step of EfficientNet-Lite0's last
stages. benchmarks/gradients.py measures them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch.overrides import TorchFunctionMode

FAST_KERNEL = 3  # pixels a side, of which oneDNN computes the weights' gradient fast


class FastGradients(TorchFunctionMode):
    """Within `with FastGradients():` and autocast to bfloat16 on a CPU, networks have these gradients.

    What is computed forwards is what torch computes; gradients differ from torch's as those of two roundings to
    bfloat16 do.
    """

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        """Every function of torch comes by here."""
        kwargs = kwargs or {}
        if func in (torch.conv2d, F.adaptive_avg_pool2d) and torch.is_autocast_enabled("cpu"):
            if func is torch.conv2d and _is_slow(*args, **kwargs):
                return _depthwise(*args, **kwargs)
            if func is F.adaptive_avg_pool2d and args[0].dim() == 4:
                return func(_ChannelsLastGradient.apply(args[0]), *args[1:], **kwargs)
        return func(*args, **kwargs)


def _is_slow(
    image: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,  # noqa: ARG001 (conv2d's parameters)
    stride: int | Sequence[int] = 1,
    padding: int | Sequence[int] | str = 0,
    dilation: int | Sequence[int] = 1,
    groups: int = 1,
) -> bool:
    height, width = weight.shape[2:]
    is_depthwise = 1 < groups == weight.shape[0] and weight.shape[1] == 1
    is_plain = _pair(dilation) == (1, 1) and not isinstance(padding, str) and min(height, width) >= FAST_KERNEL
    is_large = max(height, width) > FAST_KERNEL or _pair(stride) != (1, 1)
    return image.device.type == "cpu" and image.dim() == 4 and is_depthwise and is_plain and is_large


def _depthwise(
    image: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    stride: int | Sequence[int] = 1,
    padding: int | Sequence[int] = 0,
    dilation: int | Sequence[int] = 1,  # noqa: ARG001 (conv2d's parameters)
    groups: int = 1,  # noqa: ARG001
) -> torch.Tensor:
    given: torch.Tensor = _Depthwise.apply(
        image.to(torch.bfloat16), weight.to(torch.bfloat16), _pair(stride), _pair(padding)
    )
    return given if bias is None else given + bias.to(torch.bfloat16)[:, None, None]


class _Depthwise(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, image: torch.Tensor, weight: torch.Tensor, stride: tuple[int, int], padding: tuple[int, int]
    ) -> torch.Tensor:
        ctx.save_for_backward(image, weight)
        ctx.stride, ctx.padding = stride, padding
        return F.conv2d(image, weight, None, stride, padding, groups=len(weight))

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        image, weight = ctx.saved_tensors
        gradient = gradients[0].contiguous(memory_format=torch.channels_last)
        to_image, to_weight = ctx.needs_input_grad[:2]
        return (
            _image_gradient(gradient, image, weight, ctx.stride, ctx.padding) if to_image else None,
            _weight_gradient(gradient, image, weight, ctx.stride, ctx.padding) if to_weight else None,
            None,
            None,
        )


def _image_gradient(
    gradient: torch.Tensor,
    image: torch.Tensor,
    weight: torch.Tensor,
    stride: tuple[int, int],
    padding: tuple[int, int],
) -> torch.Tensor:
    if stride == (1, 1):
        return _backward(gradient, image, weight, stride, padding, (True, False, False))[0]
    wide = gradient.float(), image.float(), weight.float()
    return _backward(*wide, stride, padding, (True, False, False))[0].to(image.dtype)


def _weight_gradient(
    gradient: torch.Tensor,
    image: torch.Tensor,
    weight: torch.Tensor,
    stride: tuple[int, int],
    padding: tuple[int, int],
) -> torch.Tensor:
    """Of a large kernel: of parts of 3x3, as if each were a kernel that sees the image from where it lies."""
    height, width = weight.shape[2:]
    padded = F.pad(image, (padding[1], padding[1], padding[0], padding[0]))
    rows = (gradient.shape[2] - 1) * stride[0] + FAST_KERNEL
    columns = (gradient.shape[3] - 1) * stride[1] + FAST_KERNEL
    found = torch.empty_like(weight)
    for top in _starts(height):
        for left in _starts(width):
            seen = padded[:, :, top : top + rows, left : left + columns].contiguous(memory_format=torch.channels_last)
            part = weight[:, :, top : top + FAST_KERNEL, left : left + FAST_KERNEL]
            found[:, :, top : top + FAST_KERNEL, left : left + FAST_KERNEL] = _backward(
                gradient, seen, part.contiguous(), stride, (0, 0), (False, True, False)
            )[1]
    return found


def _starts(length: int) -> list[int]:
    """Where the parts begin, so that they cover 0 .. length - 1; the last may overlap the one before it."""
    return sorted({min(start, length - FAST_KERNEL) for start in range(0, length, FAST_KERNEL)})


def _backward(
    gradient: torch.Tensor,
    image: torch.Tensor,
    weight: torch.Tensor,
    stride: tuple[int, int],
    padding: tuple[int, int],
    wanted: tuple[bool, bool, bool],
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    found: tuple[torch.Tensor, torch.Tensor, torch.Tensor] = torch.ops.aten.convolution_backward(
        gradient, image, weight, None, stride, padding, (1, 1), False, (0, 0), len(weight), wanted
    )
    return found


class _ChannelsLastGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, image: torch.Tensor) -> torch.Tensor:  # noqa: ARG004 (torch's signature)
        return image.view_as(image)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> torch.Tensor:  # noqa: ARG004
        return gradients[0].contiguous(memory_format=torch.channels_last)


def _pair(value: int | Sequence[int]) -> tuple[int, int]:
    if isinstance(value, int):
        return value, value
    return (value[0], value[-1])
