"""Faster gradients are torch's own gradients."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from edgekit import gradients
from edgekit.gradients import FastGradients


def float64_gradients(
    image: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, options: dict[str, object]
) -> tuple[torch.Tensor, ...]:
    tensors = [each.double().requires_grad_() for each in (image, weight, bias)]
    output = F.conv2d(tensors[0], tensors[1], tensors[2], **options)  # type: ignore[arg-type]
    output.backward(torch.ones_like(output) * torch.linspace(-1, 1, output.shape[-1], dtype=torch.float64))
    return (output.detach(), *(each.grad for each in tensors if each.grad is not None))


@given(
    kernel=st.tuples(st.sampled_from([3, 5, 7, 4]), st.sampled_from([3, 5, 6])),
    stride=st.sampled_from([1, 2, (2, 1), 3]),
    padding=st.sampled_from([0, 2, (1, 3)]),
    size=st.tuples(st.integers(7, 14), st.integers(7, 14)),
    channels=st.sampled_from([2, 16, 17]),
    seed=st.integers(0, 3),
)
@settings(deadline=None, max_examples=60)
def test_depthwise_gradients_are_those_of_float64(
    kernel: tuple[int, int], stride: object, padding: object, size: tuple[int, int], channels: int, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    image = torch.randn(3, channels, *size, generator=generator).bfloat16().float()
    weight = torch.randn(channels, 1, *kernel, generator=generator).bfloat16().float()
    bias = torch.randn(channels, generator=generator).bfloat16().float()
    options = {"stride": stride, "padding": padding, "groups": channels}
    expected = float64_gradients(image, weight, bias, options)
    tensors = [each.clone().requires_grad_() for each in (image, weight, bias)]
    with torch.autocast("cpu", torch.bfloat16), FastGradients():
        output = F.conv2d(tensors[0], tensors[1], tensors[2], **options)  # type: ignore[arg-type]
    assert output.dtype == torch.bfloat16
    output.backward((torch.ones_like(output) * torch.linspace(-1, 1, output.shape[-1])).bfloat16())
    found = (output.detach(), *(each.grad for each in tensors if each.grad is not None))
    assert len(found) == len(expected) == 4
    for one, other in zip(found, expected, strict=True):
        assert one.shape == other.shape
        assert float((one.double() - other).abs().max()) <= 0.03 * float(other.abs().max().clamp(min=1))


def test_only_the_slow_ones_are_computed_otherwise(monkeypatch: pytest.MonkeyPatch) -> None:
    called = []
    original = gradients._depthwise
    monkeypatch.setattr(gradients, "_depthwise", lambda *a, **k: called.append(a[1].shape[2]) or original(*a, **k))
    image = torch.randn(2, 8, 9, 9)

    def run(layer: nn.Conv2d) -> int:
        called.clear()
        with torch.autocast("cpu", torch.bfloat16), FastGradients():
            layer(image)
        return len(called)

    assert run(nn.Conv2d(8, 8, 5, groups=8)) == run(nn.Conv2d(8, 8, 3, stride=2, groups=8)) == 1
    for fast in (
        nn.Conv2d(8, 8, 3, groups=8),
        nn.Conv2d(8, 8, 5),
        nn.Conv2d(8, 16, 5, groups=8),
        nn.Conv2d(8, 8, 5, groups=8, dilation=2),
        nn.Conv2d(8, 8, 5, groups=8, padding="same"),
        nn.Conv2d(8, 8, 1, stride=2, groups=8),
    ):
        assert run(fast) == 0, fast
    called.clear()
    with FastGradients():
        nn.Conv2d(8, 8, 5, groups=8)(image)
    assert not called, "in float32 torch is fast enough"


def test_pooling_hands_back_channels_last() -> None:
    image = torch.randn(2, 8, 7, 7).contiguous(memory_format=torch.channels_last).requires_grad_()
    found = []
    with torch.autocast("cpu", torch.bfloat16), FastGradients():
        seen = image * 1
        seen.register_hook(found.append)
        pooled = F.adaptive_avg_pool2d(seen, 1)
    torch.testing.assert_close(pooled, image.mean((2, 3), keepdim=True))
    pooled.sum().backward()
    assert found[0].is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(image.grad, torch.full_like(image, 1 / 49))
