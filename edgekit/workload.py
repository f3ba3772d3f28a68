"""What one inference costs, without a clock: counted in the graph, and as instructions under valgrind.

A busy machine changes neither. They are no latency (a graph with fewer multiply-adds can be the slower one): they say
what changed, where a comparison of latencies is in doubt.
"""

from __future__ import annotations

import math
import os
import re
import shutil
import subprocess
import tempfile
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import onnx_ir as ir
from onnx_ir.passes.common import InlinePass, RemoveInitializersFromInputsPass, ShapeInferencePass
from onnx_ir.traversal import RecursiveGraphIterator

from edgekit.artifacts import read_json, write_json
from edgekit.errors import ArtifactError, SetupError
from edgekit.launch import run_py

# ---------------------------------------------------------------------------------------------------------------
# The graph

# What multiplies and adds, and which of its inputs has the weights, or the second matrix; the first one has the rest.
SECOND_FACTOR = {
    **dict.fromkeys(("Conv", "ConvInteger", "ConvTranspose", "Gemm", "MatMul", "MatMulInteger"), 1),
    **dict.fromkeys(("QLinearConv", "QLinearMatMul"), 3),
}
NOT_COUNTED = {"Attention", "DeformConv", "Einsum", "GRU", "LSTM", "RNN"}  # what else multiplies and adds
# ONNX Runtime's own integer operators (the int8 for OpenCV 4 has them): the one of ONNX with the same shapes, and where
# its inputs stand among scales and zero points.
STANDS_FOR = {
    "QGemm": ("Gemm", slice(0, 4, 3)),
    "QLinearAdd": ("Add", slice(0, 4, 3)),
    "QLinearAveragePool": ("AveragePool", slice(0, 1)),
    "QLinearConcat": ("Concat", slice(2, None, 3)),
    "QLinearGlobalAveragePool": ("GlobalAveragePool", slice(0, 1)),
    "QLinearLeakyRelu": ("LeakyRelu", slice(0, 1)),
    "QLinearMul": ("Mul", slice(0, 4, 3)),
    "QLinearSigmoid": ("Sigmoid", slice(0, 1)),
    "QLinearSoftmax": ("Softmax", slice(0, 1)),
}


@dataclass(frozen=True)
class Workload:
    """The work of one forward pass. Where `unknown` has a line, the figures are without what it names."""

    operators: Mapping[str, int]  # nodes by operator; "com.microsoft.Gelu" where it is not ONNX's own; Constant is none
    multiply_adds: int  # of convolutions and matrix products; padding is multiplied too, a bias is not counted
    weight_bytes: int  # initializers and Constants; what several nodes read counts once
    activation_bytes: int  # what the nodes make from the inputs, each tensor once
    peak_activation_bytes: int  # the most of that alive at once, in the file's order, no tensor in another's place
    unknown: tuple[str, ...]  # "2 Einsum: multiply-adds are not counted"


def read_workload(model: Path) -> Workload:
    """What an ONNX file computes for one image: a batch of unknown size is taken for 1.

    Functions are counted where they are called. What is inside If, Loop and Scan counts as operators and weights only.
    Nodes that read constants alone run once, when the model is loaded: they are operators, and no work of an inference.
    Raises ArtifactError for a file that is no ONNX.
    """
    graph = _read(model).graph
    nodes, working = list(RecursiveGraphIterator(graph)), _working(graph)
    multiply_adds = [_multiply_adds(node) for node in working]
    sizes = {value: _size_bytes(value) for node in working for value in node.outputs if value.name}
    weights = _weights(graph, nodes)
    unsized = sum(size is None for size in sizes.values())
    unread = sum(tensor is None for tensor in weights)
    return Workload(
        operators=dict(sorted(Counter(_operator(node) for node in nodes if node.op_type != "Constant").items())),
        multiply_adds=sum(count or 0 for count in multiply_adds),
        weight_bytes=sum({id(tensor): tensor.nbytes for tensor in weights if tensor is not None}.values()),
        activation_bytes=sum(size or 0 for size in sizes.values()),
        peak_activation_bytes=_peak(working, {value: size or 0 for value, size in sizes.items()}),
        unknown=(
            *_unknown(zip(working, multiply_adds, strict=True)),
            *([f"weights whose values are not readable: {unread}"] if unread else []),
            *([f"activations whose shapes are not known: {unsized}"] if unsized else []),
        ),
    )


def _read(path: Path) -> ir.Model:
    """A file's graph with functions inlined and shapes inferred as far as they can be. Raises ArtifactError."""
    try:
        model = ir.load(path)
        InlinePass()(model)
        RemoveInitializersFromInputsPass()(model)  # where files of ONNX's first years name them
        for value in model.graph.inputs:
            if value.shape is not None and value.shape.rank() > 0 and not isinstance(value.shape[0], int):
                value.shape = ir.Shape([1, *value.shape[1:]])
        for node in model.graph.all_nodes():
            _replace(node)
        ShapeInferencePass(check_type=False, strict_mode=False)(model)  # one odd node does not stop it
    except Exception as error:  # noqa: BLE001 - of any file: protobuf, ONNX and onnx_ir raise what they like
        raise ArtifactError(f"{path} is not a readable ONNX model ({_reason(error)}): make it again") from None
    if not model.ir_version:  # an empty file is read without complaint
        raise ArtifactError(f"{path} is not an ONNX model (it names no version of the format): make it again")
    return model


def _reason(error: BaseException) -> str:
    """In one line, what began it: onnx_ir wraps an error once for each message around the faulty one."""
    while error.__cause__ is not None:
        error = error.__cause__
    return " ".join(str(error).split())[:300]


def _replace(node: ir.Node) -> None:
    """Makes an integer operator of ONNX Runtime the one that it stands for; `_operator` still gives its own name."""
    if node.domain != "com.microsoft" or node.op_type not in STANDS_FOR:
        return
    if node.attributes.get_int("channels_last", 0) != 0:  # ONNX has no such pooling
        return
    node.meta["operator"] = _operator(node)
    node.domain, (node.op_type, places) = "", STANDS_FOR[node.op_type]
    inputs = node.inputs[places]
    node.resize_inputs(len(inputs))
    for place, value in enumerate(inputs):
        node.replace_input_with(place, value)


def _working(graph: ir.Graph) -> list[ir.Node]:
    """The graph's own nodes that depend on its inputs; of those with a subgraph it is assumed."""
    reached = set(graph.inputs)
    nodes = []
    for node in graph:
        if reached.intersection(filter(None, node.inputs)) or _has_subgraph(node):
            nodes.append(node)
            reached.update(node.outputs)
    return nodes


def _has_subgraph(node: ir.Node) -> bool:
    kinds = (ir.AttributeType.GRAPH, ir.AttributeType.GRAPHS)
    return any(attribute.type in kinds for attribute in node.attributes.values())


def _operator(node: ir.Node) -> str:
    return str(node.meta.get("operator") or (f"{node.domain}.{node.op_type}" if node.domain else node.op_type))


def _multiply_adds(node: ir.Node) -> int | None:
    """0 for what is no product; None where a shape that it takes is not known."""
    place = SECOND_FACTOR.get(node.op_type)
    if place is None or node.domain:
        return 0
    inputs = [_sizes(value) for value in node.inputs]
    first, second, made = inputs[0], inputs[place] if len(inputs) > place else None, _sizes(node.outputs[0])
    if first is None or second is None or made is None:
        return None
    if node.op_type == "ConvTranspose":  # each element of the input is spread over a kernel of each output channel
        return math.prod(first) * math.prod(second[1:])
    if "Conv" in node.op_type:  # each element of the output gathers a kernel of each input channel of its group
        return math.prod(made) * math.prod(second[1:])
    is_transposed = node.op_type == "Gemm" and node.attributes.get_int("transA", 0) != 0
    return math.prod(made) * first[0 if is_transposed else -1]


def _sizes(value: ir.Value | None) -> tuple[int, ...] | None:
    """A shape; None where it is not wholly known."""
    if value is None or value.shape is None or not value.shape.is_static():
        return None
    return value.shape.numpy()


def _size_bytes(value: ir.Value) -> int | None:
    sizes = _sizes(value)
    if sizes is None or value.dtype is None or value.dtype == ir.DataType.STRING:
        return None
    return -(-math.prod(sizes) * value.dtype.bitwidth // 8)  # rounded up: int4 has two elements a byte


def _weights(graph: ir.Graph, nodes: Iterable[ir.Node]) -> list[ir.TensorProtocol | None]:
    """Every constant of the graph and its subgraphs; None for one that cannot be read (a sparse one)."""
    graphs = [graph, *graph.subgraphs()]
    initializers = [value.const_value for each in graphs for value in each.initializers.values()]
    return initializers + [_constant(node) for node in nodes if _operator(node) == "Constant"]


def _constant(node: ir.Node) -> ir.TensorProtocol | None:
    try:
        return ir.convenience.get_const_tensor(node.outputs[0])
    except ValueError:
        return None


def _peak(nodes: Sequence[ir.Node], sizes: Mapping[ir.Value, int]) -> int:
    """The most bytes of `sizes` alive at once: from the node that makes a value to the last one that reads it."""
    last = {value: place for place, node in enumerate(nodes) for value in (*node.outputs, *node.inputs)}
    freed: Counter[int] = Counter()
    for value, size in sizes.items():
        freed[len(nodes) if value.is_graph_output() else last[value]] += size
    alive = peak = 0
    for place, node in enumerate(nodes):
        alive += sum(sizes.get(value, 0) for value in node.outputs)
        peak = max(peak, alive)
        alive -= freed[place]
    return peak


def _unknown(counts: Iterable[tuple[ir.Node, int | None]]) -> list[str]:
    """A line for each operator whose work is not counted, or not whole: how many nodes, and why."""
    lines = Counter((_operator(node), why) for node, count in counts if (why := _why_unknown(node, count)))
    return [f"{number} {operator}: {why}" for (operator, why), number in sorted(lines.items())]


def _why_unknown(node: ir.Node, multiply_adds: int | None) -> str:
    """ "" where nothing is unknown."""
    if _has_subgraph(node):
        return "what is inside is not counted"
    if node.domain or node.op_type in NOT_COUNTED:
        return "multiply-adds are not counted"
    return "shapes are not known, so multiply-adds are not counted" if multiply_adds is None else ""


def changes(base: Workload, candidate: Workload) -> tuple[str, ...]:
    """A sentence for each difference; none where both do the same work."""
    amounts = [
        _change("multiply-adds", "", base.multiply_adds, candidate.multiply_adds),
        _change("weights", "B", base.weight_bytes, candidate.weight_bytes),
        _change("activations", "B", base.activation_bytes, candidate.activation_bytes),
        _change("peak activations", "B", base.peak_activation_bytes, candidate.peak_activation_bytes),
    ]
    names = sorted({*base.operators, *candidate.operators})
    counts = [_count_change(name, base.operators.get(name, 0), candidate.operators.get(name, 0)) for name in names]
    unknown = [f"not known of the baseline: {line}" for line in base.unknown if line not in candidate.unknown]
    unknown += [f"not known of the candidate: {line}" for line in candidate.unknown if line not in base.unknown]
    return tuple(filter(None, [*amounts, *counts, *unknown]))


def _change(what: str, unit: str, base: int, candidate: int) -> str:
    """ "multiply-adds 42.0 M → 46.2 M (+10.0 %)", in full where that shows no difference; "" for equal ones."""
    if base == candidate:
        return ""
    before, after = amount(base, unit), amount(candidate, unit)
    if before == after:
        before, after = f"{base:,} {unit}".rstrip(), f"{candidate:,} {unit}".rstrip()
    share = f"{100 * (candidate / base - 1):+.1f} %" if base else ""
    return f"{what} {before} → {after}" + ("" if share in ("", "+0.0 %", "-0.0 %") else f" ({share})")


def amount(number: int, unit: str) -> str:
    """42_000_000 → "42.0 M"; 812, "B" → "812 B"."""
    for factor, prefix in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if number >= 0.99995 * factor:
            return f"{number / factor:.1f} {prefix}{unit}"
    return f"{number} {unit}".rstrip()


def _count_change(operator: str, base: int, candidate: int) -> str:
    if base == candidate:
        return ""
    if candidate == 0:
        return f"{operator} no longer there ({base} → 0)"
    direction = "more" if candidate > base else "fewer"
    return f"{abs(candidate - base)} {direction} {operator} ({base} → {candidate})"


# ---------------------------------------------------------------------------------------------------------------
# Instructions

FEW, MANY = 2, 12  # iterations; the difference is free of Python's start, of loading, and of the first, longer ones
INSTRUCTION_NOISE = 5e-4  # the share by which counts of the same work may differ; five times what was seen
TIMEOUT_S = 3600.0
SETTINGS = {
    "PYTHONHASHSEED": "0",  # sets of strings have the same order each time
    "OMP_NUM_THREADS": "1",  # no pool of threads beside OpenCV's
    # What malloc searches depends on where all before lies, and that on as little as the length of a path: 0.13 % of
    # the count. So glibc gives each large block a mapping of its own, and keeps lists of all the small ones by size.
    "GLIBC_TUNABLES": "glibc.malloc.mmap_threshold=1024:glibc.malloc.tcache_count=65535",
}


def instructions_per_inference(bundle: Path, images: Path | None = None) -> int:
    """Instructions that a bundle's own run.py executes for one image, from its bytes to the answer, with one thread.

    It is (instructions of 12 iterations - of 2) / 10, as valgrind's cachegrind counts them. images: the bundle whose
    first check image is taken, so that two bundles can be given the same; None: its own.

    valgrind knows no AVX-512 and hides it, so on a CPU that has it other kernels are counted than those that run there.
    Counts of the same work differ by less than INSTRUCTION_NOISE: run.py writes down the clock, whose digits differ,
    and where things lie in memory is seen a little. It takes a minute for a network of 31 M multiply-adds, and more
    with more of them: valgrind computes each fused one in software.

    Raises SetupError where valgrind is missing or cannot run this OpenCV, ArtifactError where the bundle does not run.
    """
    valgrind = shutil.which("valgrind")
    if valgrind is None:
        raise SetupError("valgrind, which counts instructions, is not installed: apt-get install valgrind")
    if not (bundle / "run.py").is_file():
        raise ArtifactError(f"no bundle at {bundle} (it has no run.py): make one with `edgekit bundle RUN`")
    with tempfile.TemporaryDirectory(prefix="edgekit-instructions-") as name:
        # Copies, so that both have paths of one length: it moves what lies in memory.
        folder = Path(name)
        shutil.copytree(bundle, folder / "bundle")
        _copy_first_image(images or bundle, folder / "images")
        command = run_py(folder / "bundle", "worker", "--threads", "1", "--images", str(folder / "images"))
        # First without valgrind: what is wrong shows at once, and Python's compiled files are there for both counts.
        tried = _iterate(command, 1)
        if tried.returncode != 0:
            raise ArtifactError(f"{bundle} does not run here: {_last_line(tried.stderr)}")
        with ThreadPoolExecutor(2) as pool:
            few, many = pool.map(lambda count: _instructions(valgrind, command, count, folder), (FEW, MANY))
    return round((many - few) / (MANY - FEW))


def instruction_changes(base: int, candidate: int) -> tuple[str, ...]:
    """What `instructions_per_inference` found of two bundles, as a sentence; none where the noise may be all."""
    if abs(candidate - base) <= INSTRUCTION_NOISE * base:
        return ()
    return (_change("instructions", "", base, candidate),)


def _copy_first_image(bundle: Path, folder: Path) -> None:
    """One alone: several cost differently, and the iterations are no whole rounds of them."""
    (folder / "check").mkdir(parents=True)
    try:
        first = read_json(bundle / "check" / "expected.json")["images"][0]["file"]
        shutil.copyfile(bundle / "check" / first, folder / "check" / "image")
    except (LookupError, TypeError, OSError):
        raise ArtifactError(f"{bundle} has no check image: make the bundle again with `edgekit bundle RUN`") from None
    write_json(folder / "check" / "expected.json", {"images": [{"file": "image"}]})


def _iterate(command: Sequence[str], iterations: int) -> subprocess.CompletedProcess[str]:
    """Runs the worker for one request. Raises SetupError where it does not end."""
    try:
        return subprocess.run(
            command,
            input=f'{{"iterations": {iterations}}}\n',
            env={**os.environ, **SETTINGS},
            capture_output=True,
            text=True,
            errors="replace",
            timeout=TIMEOUT_S,
            check=False,
        )
    except subprocess.TimeoutExpired:
        what = f"{iterations} iterations of run.py"
        raise SetupError(f"{what} took more than {TIMEOUT_S:g} s: use a smaller input, or an idle machine") from None


def _instructions(valgrind: str, command: Sequence[str], iterations: int, folder: Path) -> int:
    """Of the whole process. Raises SetupError."""
    log = folder / f"{iterations:02}.log"
    # cachegrind without caches: the fastest of valgrind's tools that count.
    options = ("--tool=cachegrind", "--cache-sim=no", "--cachegrind-out-file=/dev/null", f"--log-file={log}")
    quiet = ("--vgdb=no", "--child-silent-after-fork=yes")
    child = _iterate([valgrind, *options, *quiet, *command], iterations)
    said = log.read_text("utf-8", errors="replace") if log.is_file() else ""
    found = re.search(r"I +refs: +([\d,]+)", said)
    if child.returncode != 0 or found is None:
        raise SetupError(f"valgrind cannot run this bundle's OpenCV: {_last_line(said or child.stderr)}")
    return int(found.group(1).replace(",", ""))


def _last_line(text: str) -> str:
    return (text.strip().splitlines() or ["no reason given"])[-1]
