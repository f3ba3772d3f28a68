"""The frozen beginning of a network, cut off, so that it is computed once per image instead of once per step.

The cut is made in the network's graph, as torch.fx traces it: all that no learning part comes before is frozen, be it
one tensor that leaves it or several (the maps of a feature pyramid). Both halves share the network's own modules, so
what is trained in the second half is trained in the network.

On a CPU the frozen half is computed by ONNX Runtime, an image at a time in as many threads as there are cores: about
five times as many images a second as torch does, and proved equal to torch on real images before it is used. On a GPU
torch computes it, of many images at once.
"""

from __future__ import annotations

import hashlib
import inspect
import io
import warnings
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
import onnx
import onnx.utils
import onnxruntime as ort
import torch
from torch import fx, nn

from edgekit.errors import ConfigError
from edgekit.lowering.from_torch import INPUT_NAME, OPSET, from_torch

TOLERANCE = 1e-3  # of the largest value; float32 in another order differs by 1e-5
_GPU_BATCH = 32

Parts = tuple[tuple[np.ndarray, ...], ...]
Run = Callable[[np.ndarray, int], Parts]
"""Images, float32 (N, 3, h, w), and a count → the tensors of so many of a trunk's parts, float32 (N, ...) each."""


@dataclass(frozen=True)
class Cut:
    """A network in two halves: learning(*frozen(images)) is what the network gives."""

    frozen: nn.Module  # images → a tuple of tensors
    learning: nn.Module  # those tensors → the network's outputs


# ---------------------------------------------------------------------------------------------------------------
# Cutting


def cut(model: nn.Module, learning: Sequence[nn.Module], *inputs: torch.Tensor) -> Cut | None:
    """Cuts before the first of the learning modules; None where that cannot be done, or nothing comes before them.

    model: any module, of inputs like `inputs`, one batch or more. Its modes and gradients are left as they are. The
    halves are tried on the inputs, and None is returned unless they give exactly what the model gives; also where the
    model's own code, outside the learning modules, does other things in training than in evaluation.
    """
    graph = _trace(model, learning)
    if graph is None:
        return None
    found = _halves(model, graph, set(learning), inputs)
    return found if found is not None and _is_same(model, found, inputs) else None


class _Tracer(fx.Tracer):
    """Looks into a module only where a learning one is in it."""

    def __init__(self, learning: Sequence[nn.Module]) -> None:
        super().__init__()
        self._learning = set(learning)

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:  # noqa: ARG002 (torch's signature)
        return not any(part in self._learning for part in m.modules() if part is not m)


def _trace(model: nn.Module, learning: Sequence[nn.Module]) -> fx.Graph | None:
    parameters = inspect.signature(model.forward).parameters.values()
    defaults = {each.name: each.default for each in parameters if each.default is not inspect.Parameter.empty}
    modes = {module: module.training for module in model.modules()}
    try:
        graphs = [_Tracer(learning).trace(model.train(mode), concrete_args=defaults) for mode in (True, False)]
    except Exception:  # noqa: BLE001 (a network's own code may fail in any way when it meets symbols for tensors)
        return None
    finally:
        for module, mode in modes.items():
            module.training = mode
    return graphs[1] if str(graphs[0]) == str(graphs[1]) else None


class _Kinds(fx.Interpreter):
    """Runs a graph and notes which of its nodes are tensors."""

    def __init__(self, module: fx.GraphModule) -> None:
        super().__init__(module)
        self.tensors: set[str] = set()

    def run_node(self, n: fx.Node) -> Any:
        value = super().run_node(n)
        if isinstance(value, torch.Tensor):
            self.tensors.add(n.name)
        return value


def _halves(
    model: nn.Module, graph: fx.Graph, learning: set[nn.Module], inputs: tuple[torch.Tensor, ...]
) -> Cut | None:
    whole = fx.GraphModule(model, graph)
    kinds = _Kinds(whole)
    with torch.no_grad():
        kinds.run(*inputs)
    frozen: set[fx.Node] = set()
    for node in graph.nodes:
        if not _learns(node, whole, learning) and frozen.issuperset(node.all_input_nodes):
            frozen.add(node)
    ends = {node for node in frozen if node.name in kinds.tensors}
    (output,) = (node for node in graph.nodes if node.op == "output")
    second = _needed([output], stop=ends)
    crossing = [node for node in graph.nodes if node in second and node in ends]
    if not crossing or any(node.op == "placeholder" for node in crossing):
        return None
    first = _needed(crossing, stop=set())
    before, after = fx.Graph(), fx.Graph()
    copies = {node: before.node_copy(node) for node in graph.nodes if node.op == "placeholder"}
    for node in graph.nodes:
        if node in first and node not in copies:
            copies[node] = before.node_copy(node, copies.__getitem__)
    before.output(tuple(copies[node] for node in crossing))
    copies = {node: after.placeholder(node.name) for node in crossing}
    for node in graph.nodes:
        if node in second and node not in copies:
            copies[node] = after.node_copy(node, copies.__getitem__)
    return Cut(fx.GraphModule(whole, before), fx.GraphModule(whole, after))


def _learns(node: fx.Node, whole: fx.GraphModule, learning: set[nn.Module]) -> bool:
    if node.op == "call_module":
        return whole.get_submodule(str(node.target)) in learning
    if node.op == "get_attr":
        owner, _, name = str(node.target).rpartition(".")
        return bool(getattr(getattr(whole.get_submodule(owner), name), "requires_grad", False))
    return node.op == "output"


def _needed(ends: Sequence[fx.Node], stop: set[fx.Node]) -> set[fx.Node]:
    """The nodes that the ends are computed from, themselves included; those in `stop`, but not what comes before."""
    found: set[fx.Node] = set()
    waiting = list(ends)
    while waiting:
        node = waiting.pop()
        if node not in found:
            found.add(node)
            waiting += [] if node in stop else node.all_input_nodes
    return found


def _is_same(model: nn.Module, halves: Cut, inputs: tuple[torch.Tensor, ...]) -> bool:
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        with torch.no_grad():
            expected, found = model(*inputs), halves.learning(*halves.frozen(*inputs))
    finally:
        for module, mode in modes.items():
            module.training = mode
    pairs = zip(_tuple(expected), _tuple(found), strict=True)
    return all(torch.equal(one, other) for one, other in pairs)


def _tuple(value: torch.Tensor | tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
    return (value,) if isinstance(value, torch.Tensor) else value


# ---------------------------------------------------------------------------------------------------------------
# Cutting where each phase of a training begins to learn


@dataclass(frozen=True)
class Trunk:
    """The frozen halves of several cuts of one network as one: each is computed from what the next one gives."""

    parts: tuple[nn.Module, ...]  # from the images on; each takes what the one before it gives
    counts: tuple[int, ...]  # how many tensors each part gives


def cuts(
    model: nn.Module, phases: Sequence[Sequence[nn.Module]], images: torch.Tensor
) -> tuple[Trunk, tuple[Cut | None, ...]]:
    """The network cut for each phase, whose learning modules are given; a later phase learns all that an earlier does.

    → the frozen halves as one chain, and each phase's cut (None: nothing is frozen, or it cannot be cut), in the order
    of the phases. The chain's first part ends where the last phase begins to learn.
    """
    parts: list[nn.Module] = []
    counts: list[int] = []
    found: list[Cut | None] = []
    rest, inputs = model, (images,)
    for learning in reversed(phases):
        halves = cut(rest, learning, *inputs)
        found.append(halves)
        if halves is None:
            continue
        with torch.no_grad():
            inputs = halves.frozen.eval()(*inputs)
        parts.append(halves.frozen)
        counts.append(len(inputs))
        rest = halves.learning
    return Trunk(tuple(parts), tuple(counts)), tuple(reversed(found))


class _Chain(nn.Module):
    """images → the tensors of the first part, then those of the second, ..."""

    def __init__(self, parts: Sequence[nn.Module]) -> None:
        super().__init__()
        self.parts = nn.ModuleList(parts)

    def forward(self, images: torch.Tensor) -> tuple[torch.Tensor, ...]:
        values: tuple[torch.Tensor, ...] = (images,)
        given: tuple[torch.Tensor, ...] = ()
        for part in self.parts:
            values = part(*values)
            given += values
        return given


# ---------------------------------------------------------------------------------------------------------------
# Computing


@dataclass(frozen=True)
class Frozen:
    """The trunk, ready to be computed; `run` may be called from several threads."""

    run: Run
    keys: tuple[str, ...]  # of each part: its and its predecessors' weights, and how they are computed. Same key, same
    # numbers: also those of a part that other parts follow
    engine: str  # "ONNX Runtime" or "torch"
    batch_size: int  # images that `run` takes at once, at most

    @property
    def part_count(self) -> int:
        """How many parts the trunk has."""
        return len(self.keys)


def engine(trunk: Trunk, images: np.ndarray, device: torch.device) -> Frozen:
    """Prepares the trunk: on a CPU ONNX Runtime, if it gives what torch gives for these real images, else torch.

    images: float32 (N, 3, h, w), preprocessed.
    """
    chain = _Chain(trunk.parts).eval()
    keys = _weights_keys(trunk.parts)
    torch_keys = tuple(f"{key}-torch-{device.type}" for key in keys)
    if device.type != "cpu":
        return Frozen(_gpu_run(chain, device), torch_keys, "torch", _GPU_BATCH)
    by_torch = Frozen(_torch_run(chain, device), torch_keys, "torch", 1)
    found = _onnx_run(chain, trunk.counts, images.shape[2:])
    if found is None or not _agree(found, by_torch.run, images, len(trunk.parts)):
        return by_torch
    return Frozen(found, tuple(f"{key}-ort-{ort.__version__}" for key in keys), "ONNX Runtime", 1)


def _weights_keys(parts: Sequence[nn.Module]) -> list[str]:
    digest, keys = hashlib.sha256(), []
    for part in parts:
        digest.update(str(part).encode())
        for name, value in part.state_dict().items():
            digest.update(name.encode())
            digest.update(value.detach().cpu().contiguous().numpy().tobytes())
        keys.append(digest.hexdigest())
    return keys


def _torch_run(chain: _Chain, device: torch.device) -> Run:
    def run(blob: np.ndarray, count: int) -> Parts:
        with torch.inference_mode():
            images = torch.from_numpy(blob).to(device).contiguous(memory_format=torch.channels_last)
            values: tuple[torch.Tensor, ...] = (images,)
            given = []
            for part in chain.parts[:count]:
                values = part(*values)
                given.append(tuple(value.float().cpu().numpy() for value in values))
        return tuple(given)

    return run


def _gpu_run(chain: _Chain, device: torch.device) -> Run:
    """In one thread, and always of as many images: cuDNN makes its plans anew for each thread and each shape."""
    run, thread = _torch_run(chain, device), ThreadPoolExecutor(1, thread_name_prefix="edgekit-gpu")

    def run_whole(blob: np.ndarray, count: int) -> Parts:
        whole = np.zeros((_GPU_BATCH, *blob.shape[1:]), blob.dtype)
        whole[: len(blob)] = blob
        parts = thread.submit(run, whole, count).result()
        return tuple(tuple(value[: len(blob)] for value in part) for part in parts)

    return run_whole


def _onnx_run(chain: _Chain, counts: Sequence[int], size: tuple[int, ...]) -> Run | None:
    """None where torch cannot export the chain, or ONNX Runtime cannot read what it wrote."""
    names = [[f"part{part}_{index}" for index in range(count)] for part, count in enumerate(counts)]
    try:
        model = _to_onnx(chain, size, [name for part in names for name in part])
        model.graph.value_info.extend(model.graph.output)  # where the parts are cut from each other
        taken = [[INPUT_NAME], *names]
        sessions = [_session(model, *ends) for ends in zip(taken, names, strict=False)]
    except (ConfigError, RuntimeError, ValueError, KeyError):  # ONNX Runtime's own errors derive from RuntimeError
        return None

    def run(blob: np.ndarray, count: int) -> Parts:
        # Part by part, so that a part's numbers do not depend on which other parts are asked for.
        values, given = [blob], []
        for session, inputs in zip(sessions[:count], taken, strict=False):
            values = session.run(None, dict(zip(inputs, values, strict=True)))
            given.append(tuple(values))
        return tuple(given)

    return run


def _to_onnx(chain: _Chain, size: tuple[int, ...], names: list[str]) -> onnx.ModelProto:
    """By torch's older exporter, which takes a tenth of the newer one's seconds, where it is still there and works."""
    stream = io.BytesIO()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            torch.onnx.export(
                chain,
                (torch.zeros(1, 3, *size),),
                cast(Any, stream),  # its types name files only
                dynamo=False,
                opset_version=OPSET,
                input_names=[INPUT_NAME],
                output_names=names,
            )
        return onnx.load_from_string(stream.getvalue())
    except Exception:  # noqa: BLE001 (it is going away, and what it gives is proved before it is used)
        return from_torch(chain, size, names)


def _session(model: onnx.ModelProto, inputs: list[str], outputs: list[str]) -> ort.InferenceSession:
    """Computes these outputs from these inputs. (ONNX Runtime itself computes whole graphs.)"""
    needed = onnx.utils.Extractor(model).extract_model(inputs, outputs)
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1  # images are computed beside each other
    options.log_severity_level = 4
    return ort.InferenceSession(needed.SerializeToString(), options, providers=["CPUExecutionProvider"])


def _agree(one: Run, other: Run, images: np.ndarray, count: int) -> bool:
    for index in range(len(images)):
        blob = images[index : index + 1]
        for part, expected in zip(one(blob, count), other(blob, count), strict=True):
            for found, wanted in zip(part, expected, strict=True):
                if not np.abs(found - wanted).max() <= TOLERANCE * max(np.abs(wanted).max(), 1e-6):
                    return False
    return True
