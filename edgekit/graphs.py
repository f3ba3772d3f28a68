"""A network's training steps as CUDA graphs: launched at once, not kernel by kernel.

A light network's kernels take less time on a large GPU than Python takes to launch them: a step of EfficientNet-Lite0
with 32 images is 24 ms, and 7 as a graph (H200, https://docs.pytorch.org/docs/stable/notes/cuda.html#cuda-graphs).
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import nn


class Graphed:
    """Computes what the module computes, forwards and backwards, by a graph captured for the first batch's shape.

    Batches of other shapes go through the module itself, and so do all where it cannot be captured. Which of its
    modules are in training mode, and which parameters learn, must stay as they are. Gradients must not be summed up
    over several calls: they are the graph's own memory.
    """

    def __init__(self, module: nn.Module, autocast: Callable[[], AbstractContextManager[Any]]) -> None:
        """autocast: the context that the module computes in, without a cache."""
        self._module = module
        self._autocast = autocast
        self._shapes: tuple[torch.Size, ...] | None = None
        self._graph: Callable[..., Any] | None = None

    def __call__(self, *inputs: torch.Tensor) -> Any:
        shapes = tuple(each.shape for each in inputs)
        if self._shapes is None:
            self._shapes, self._graph = shapes, self._capture(inputs)
        if self._graph is not None and shapes == self._shapes:
            return _floats(self._graph(*inputs))
        with self._autocast():
            return _floats(self._module(*inputs))

    def _capture(self, inputs: tuple[torch.Tensor, ...]) -> Callable[..., Any] | None:
        # What captures is a module around this one, as its forward method is replaced.
        around = _Around(self._module)
        kept = [buffer.clone() for buffer in self._module.buffers()]  # trials before the capture count as steps
        try:
            with self._autocast():
                found: Callable[..., Any] = torch.cuda.make_graphed_callables(
                    around, tuple(each.detach().clone() for each in inputs), allow_unused_input=True
                )
        except RuntimeError:  # out of memory, or an operation that waits for the GPU
            return None
        finally:
            with torch.no_grad():
                for buffer, value in zip(self._module.buffers(), kept, strict=True):
                    buffer.copy_(value)
        return found


def _floats(outputs: Any) -> Any:
    """A tensor, or several, in float32, as Fabric gives them too."""
    return outputs.float() if isinstance(outputs, torch.Tensor) else type(outputs)(each.float() for each in outputs)


class _Around(nn.Module):
    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, *inputs: torch.Tensor) -> Any:
        """What the inner module gives."""
        return self.inner(*inputs)
