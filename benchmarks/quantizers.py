"""What is left of a float network in int8? The same network and calibration images, quantized by several tools.

    uv run --with scikit-image python benchmarks/quantizers.py                  # EfficientNet-Lite0, ImageNet's head
    uv run --with scikit-image --with nncf python benchmarks/quantizers.py runs/NAME   # trained networks too, and NNCF
    uv run python benchmarks/quantizers.py runs/NAME --no-imagenet --nncf .venv-nncf/bin/python

ImageNet's Lite0 meets real photos, those in the wheels of scikit-image and scikit-learn, each whole and in nine random
crops, every second one for calibration and the others for the test; and hand signs and magnetic tiles (of --data,
where they are), which are far from what it knows. A run meets its own training images for calibration and its
validation images for the test.

Figures: share of the images with the float network's answer, signal to quantization noise of the outputs, accuracy
where there are labels; all through ONNX Runtime, which computes what the file says. What engines make of the files is
for int8_speed.py. Then edgekit's mixed form: the layers that int8 hurts most in float, and what that costs on OpenVINO.
"""

from __future__ import annotations

import argparse
import importlib.util
import math
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import redirect_stdout
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import timm
from onnxruntime.quantization import CalibrationDataReader, CalibrationMethod, QuantFormat, QuantType, quantize_static
from sklearn.datasets import load_sample_images

from edgekit import backbones, parity, plugin, runner, tasks
from edgekit.artifacts import open_run
from edgekit.batches import batches
from edgekit.datasets import read_split
from edgekit.errors import SetupError
from edgekit.int8 import calibration, rounding, scheme, sensitivity
from edgekit.int8.calibration import sqnr_db
from edgekit.int8.layers import constant, layers
from edgekit.lowering import lower
from edgekit.lowering.from_torch import from_torch
from edgekit.samples import Sample
from edgekit.turns import take_turns

LITE0 = "tf_efficientnet_lite0"
PHOTOS = (  # photos and the like in scikit-image's wheel; its drawings, masks and doubles are left out
    *("astronaut.png", "brick.png", "camera.png", "cell.png", "chelsea.png", "clock_motion.png", "coffee.png"),
    *("coins.png", "grass.png", "gravel.png", "hubble_deep_field.jpg", "ihc.png", "moon.png", "motorcycle_left.png"),
    *("motorcycle_right.png", "page.png", "retina.jpg", "rocket.jpg", "text.png"),
)
VIEWS = 10  # of a photo: it, and nine crops
FOLDERS = {"signs": ("signs/Dataset", ".jpg"), "tiles": ("magnetic-tiles", ".jpg")}
FLOAT_LAYERS = (0, 1, 2, 3, 4, 6, 8, 12, 16)
RANKED = 24
ENOUGH = 0.97  # agreement that the mixed form is to reach
SECONDS = 30.0  # of timing the mixed forms
STRIDE = 8  # images that onnxruntime's histograms hold in memory at once

# In an interpreter that has nncf; the last line is the seconds that it took.
NNCF = """
import sys, time
import nncf, numpy as np, onnx
source, result, blobs = sys.argv[1:]
images, model = list(np.load(blobs)), onnx.load(source)
start = time.perf_counter()
dataset = nncf.Dataset(images, lambda image: {"image": image[None]})
made = nncf.quantize(model, dataset, preset=nncf.QuantizationPreset.MIXED, subset_size=len(images))
print(f"\\n{time.perf_counter() - start}")
onnx.save(made, result)
"""


@dataclass(frozen=True)
class Test:
    """Images that no quantizer saw."""

    blobs: np.ndarray  # float32 (n, 3, h, w)
    labels: np.ndarray | None  # int64 (n,)


@dataclass(frozen=True, eq=False)  # each is itself, for `cache`
class Network:
    """A float network in the plain form, and its images."""

    name: str
    path: Path
    blobs: np.ndarray  # for calibration: float32 (n, 3, h, w)
    tests: Mapping[str, Test]

    def model(self) -> ir.Model:
        return ir.from_proto(onnx.load(self.path))


Quantizer = Callable[[Network, Path], float]  # writes the file, returns seconds


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


# ---------------------------------------------------------------------------------------------------------------
# Networks


def imagenet_lite0(folder: Path, data: Path, images: int, tested: int) -> Network:
    """EfficientNet-Lite0 as published, 224 px. images: for calibration, of all kinds; tested: of each kind."""
    random = np.random.default_rng(0)
    module = timm.create_model(LITE0, pretrained=False)
    module.load_state_dict(dict(backbones._published_weights("timm", LITE0, module)))
    classes = tuple(map(str, range(backbones.IMAGENET_CLASSES)))
    spec = backbones.default_spec(LITE0, classes, input_size=(224, 224), resize="stretch", interpolation="linear")
    kinds = {"photos": photos(spec, random)}
    for kind, (name, suffix) in FOLDERS.items():
        files = sorted(path for path in (data / name).rglob("*") if path.suffix.lower() == suffix)
        if not files:
            say(f"no images in {data / name}: left out")
            continue
        chosen = [files[index] for index in random.permutation(len(files))[: images + tested]]
        blobs = np.concatenate([runner.preprocess(runner.read_image(path), spec) for path in chosen])
        kinds[kind] = blobs[:images], blobs[images:]
    shares = np.array_split(np.arange(images), len(kinds))
    mixture = np.concatenate([blobs[: len(share)] for share, (blobs, _) in zip(shares, kinds.values(), strict=True)])
    tests = {kind: Test(blobs[:tested], None) for kind, (_, blobs) in kinds.items()}
    path = write_float(module.eval(), (224, 224), folder / "lite0.onnx")
    return Network("EfficientNet-Lite0, ImageNet, 224 px", path, random.permutation(mixture), tests)


def photos(spec: runner.Spec, random: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """For calibration and for the test, as the network takes them, each in random order; from different photos."""
    skimage = importlib.util.find_spec("skimage")
    if skimage is None or skimage.origin is None:
        sys.exit("the photos are scikit-image's: run this with `uv run --with scikit-image`, or give --no-imagenet")
    files = [Path(skimage.origin).parent / "data" / name for name in PHOTOS]
    pictures = [runner.read_image(path) for path in files if path.is_file()]
    pictures += [np.ascontiguousarray(image[..., ::-1]) for image in load_sample_images().images]  # RGB
    views = [[runner.preprocess(view, spec) for view in crops(picture, random)] for picture in pictures]
    first, second = (np.concatenate([view for each in views[start::2] for view in each]) for start in (0, 1))
    return random.permutation(first), random.permutation(second)


def crops(picture: np.ndarray, random: np.random.Generator) -> Iterator[np.ndarray]:
    """The whole, and regions of half its sides or more."""
    yield picture
    height, width = picture.shape[:2]
    for _ in range(VIEWS - 1):
        share = random.uniform(0.5, 1)
        h, w = int(height * share), int(width * share)
        y, x = random.integers(0, height - h + 1), random.integers(0, width - w + 1)
        yield picture[y : y + h, x : x + w]


def trained(run: Path, folder: Path, images: int, tested: int) -> Network:
    """A run's network; tested: validation images at most, 0 means all."""
    found = open_run(run)
    spec, split = found.read_spec(), read_split(found.split)
    blobs = load(sorted(split.train, key=lambda sample: sample.sha256)[:images], spec)
    validation = sorted(split.val, key=lambda sample: sample.sha256)[: tested or None]
    labels = np.array([sample.label for sample in validation])
    path = write_float(tasks.load(found), spec.input_size, folder / f"{found.name}.onnx")
    name = f"{found.name}, trained, {spec.input_size[0]} px"
    return Network(name, path, blobs, {"validation": Test(load(validation, spec), labels)})


def load(samples: Sequence[Sample], spec: runner.Spec) -> np.ndarray:
    return np.concatenate([runner.normalize(batch.images, spec) for batch in batches(samples, spec, 8)])


def write_float(module: Any, size: tuple[int, int], path: Path) -> Path:
    onnx.save(lower(from_torch(module, size, ("logits",)), "plain"), path)
    return path


# ---------------------------------------------------------------------------------------------------------------
# Quantizers


class Reader(CalibrationDataReader):  # type: ignore[misc]  # onnxruntime has no types
    """Calibration images as onnxruntime asks for them."""

    def __init__(self, blobs: np.ndarray) -> None:
        self._blobs = blobs
        self.set_range(0, len(blobs))

    def __len__(self) -> int:
        return len(self._blobs)

    def set_range(self, start_index: int, end_index: int) -> None:
        self._left = iter(self._blobs[start_index:end_index])

    def get_next(self) -> dict[str, np.ndarray] | None:
        blob = next(self._left, None)
        return None if blob is None else {"image": blob[None]}


def by_onnxruntime(method: CalibrationMethod) -> Quantizer:
    def quantize(network: Network, result: Path) -> float:
        start = time.perf_counter()
        quantize_static(
            network.path,
            result,
            Reader(network.blobs),
            quant_format=QuantFormat.QDQ,
            per_channel=True,
            activation_type=QuantType.QUInt8,
            weight_type=QuantType.QInt8,
            calibrate_method=method,
            extra_options={
                "QuantizeBias": False,
                "CalibPercentile": 99.99,
                "CalibStridedMinMax": math.gcd(STRIDE, len(network.blobs)),
            },
        )
        return time.perf_counter() - start

    return quantize


def by_nncf(python: Path) -> Quantizer:
    def quantize(network: Network, result: Path) -> float:
        with tempfile.TemporaryDirectory(prefix="quantizers-") as folder:
            blobs = Path(folder, "blobs.npy")
            np.save(blobs, network.blobs)
            command = [str(python), "-I", "-c", NNCF, str(network.path), str(result), str(blobs)]
            child = subprocess.run(command, capture_output=True, text=True, check=False)
        if child.returncode:
            raise RuntimeError(f"nncf failed: {child.stderr[-2000:]}")
        return float(child.stdout.split()[-1])

    return quantize


def by_edgekit(*, nearest: bool = False, only_weights: bool = False) -> Quantizer:
    """nearest: each weight by itself, instead of compensated rounding."""

    def quantize(network: Network, result: Path) -> float:
        weights, rounding_s = rounded_nearest(network) if nearest else rounded(network)
        found, calibration_s = calibrated(network)
        start = time.perf_counter()
        model = network.model()
        made = scheme.weight_only(model, weights) if only_weights else scheme.qdq(model, weights, found.ranges)
        onnx.save(ir.to_proto(made), result)
        needs_images = not (nearest and only_weights)
        return rounding_s + (calibration_s if needs_images else 0) + time.perf_counter() - start

    return quantize


@cache
def calibrated(network: Network) -> tuple[calibration.Calibration, float]:
    """(what was found, seconds), once for all that build on it."""
    start = time.perf_counter()
    found = calibration.calibrate(network.model(), lambda: (blob[None] for blob in network.blobs))
    return found, time.perf_counter() - start


@cache
def rounded(network: Network) -> tuple[dict[str, rounding.Rounded], float]:
    found, _ = calibrated(network)
    start = time.perf_counter()
    weights = rounding.round_weights(network.model(), found.moments)
    return weights, time.perf_counter() - start


def rounded_nearest(network: Network) -> tuple[dict[str, rounding.Rounded], float]:
    start, model, weights = time.perf_counter(), network.model(), {}
    for layer in layers(model):
        matrix = layer.to_matrix(constant(model, layer.weights))
        scales = np.maximum(np.abs(matrix).max(axis=2) / rounding.LIMIT, 1e-30).astype(np.float32)
        integers = np.round(matrix / scales[..., None]).astype(np.int8)
        weights[layer.name] = rounding.Rounded(layer.from_matrix(integers), scales.ravel(), layer.output_axis)
    return weights, time.perf_counter() - start


def quantizers(nncf: Path | None) -> dict[str, Quantizer]:
    methods = ("MinMax", "Percentile", "Entropy")
    found = {f"onnxruntime QDQ, {method}": by_onnxruntime(getattr(CalibrationMethod, method)) for method in methods}
    if nncf:
        found["NNCF, mixed"] = by_nncf(nncf)
    found["edgekit int8"] = by_edgekit()
    found["edgekit int8, but nearest rounding"] = by_edgekit(nearest=True)
    found["edgekit int8-weights"] = by_edgekit(only_weights=True)
    found["int8 weights, nearest rounding"] = by_edgekit(nearest=True, only_weights=True)
    return found


# ---------------------------------------------------------------------------------------------------------------
# Figures


@dataclass(frozen=True)
class Score:
    """What a file's outputs are worth beside the float network's, on one test."""

    agreement: float  # 0..1
    sqnr_db: float
    top1: float | None  # 0..1


def outputs(path: Path, tests: Mapping[str, Test]) -> dict[str, np.ndarray]:
    """Logits (n, classes) of each test, through ONNX Runtime, one image at a time."""
    session = calibration.session(onnx.load(path))
    return {
        kind: np.concatenate([session.run(None, {"image": blob[None]})[0] for blob in test.blobs])
        for kind, test in tests.items()
    }


def score(actual: np.ndarray, expected: np.ndarray, labels: np.ndarray | None) -> Score:
    answers = actual.argmax(axis=1)
    top1 = None if labels is None else float((answers == labels).mean())
    return Score(float((answers == expected.argmax(axis=1)).mean()), sqnr_db([actual], [expected]), top1)


def cells(found: Score) -> list[str]:
    top1 = [] if found.top1 is None else [f"{100 * found.top1:.2f}"]
    return [f"{100 * found.agreement:.1f}", f"{found.sqnr_db:.1f}", *top1]


def print_row(*values: object) -> None:
    print(f"| {' | '.join(map(str, values))} |", flush=True)


def compare(network: Network, folder: Path, nncf: Path | None) -> None:
    """Prints one network's table, a row a quantizer."""
    expected = outputs(network.path, network.tests)
    heads = []
    for kind, test in network.tests.items():
        heads += [f"{kind}: agreement, %", f"{kind}: SQNR, dB", *([] if test.labels is None else ["top-1, %"])]
    sizes = ", ".join(f"{len(test.blobs)} {kind}" for kind, test in network.tests.items())
    print(f"\n{network.name}: {len(network.blobs)} calibration images; test: {sizes}\n")
    print_row("quantizer", *heads, "seconds", "MB")
    print_row("---", *["---:"] * (len(heads) + 2))
    own = [score(expected[kind], expected[kind], test.labels) for kind, test in network.tests.items()]
    none = [cell for row in own for cell in ["100.0", "", *cells(row)[2:]]]
    print_row("float", *none, "", f"{network.path.stat().st_size / 1e6:.1f}")
    for name, quantize in quantizers(nncf).items():
        say(f"{network.name}: {name}")
        path = folder / "int8.onnx"
        with redirect_stdout(sys.stderr):  # onnxruntime tells its progress there
            seconds = quantize(network, path)
        actual = outputs(path, network.tests)
        rows = [score(actual[kind], expected[kind], test.labels) for kind, test in network.tests.items()]
        figures = [cell for row in rows for cell in cells(row)]
        print_row(name, *figures, f"{seconds:.0f}", f"{path.stat().st_size / 1e6:.1f}")


# ---------------------------------------------------------------------------------------------------------------
# The mixed form


def spare(network: Network, folder: Path, seconds: float) -> None:
    """Prints what it brings to leave the layers that int8 hurts most in float, and what it costs."""
    model = network.model()
    (found, _), (weights, _) = calibrated(network), rounded(network)
    say(f"{network.name}: ranking the layers")
    ranking = sensitivity.rank(model, weights, found.ranges, [blob[None] for blob in network.blobs[:RANKED]])
    counts = [count for count in FLOAT_LAYERS if count < len(ranking)]
    paths = [folder / f"mixed-{count}.onnx" for count in counts]
    for count, path in zip(counts, paths, strict=True):
        spared = [row.layer for row in ranking[:count]]
        onnx.save(ir.to_proto(scheme.qdq(model, weights, found.ranges, spared)), path)
    ratios = time_ratios([network.path, *paths], network.blobs[:1], seconds)
    expected = outputs(network.path, network.tests)
    print(f"\n{network.name}, edgekit int8 with the worst of {len(ranking)} layers in float\n")
    heads = [head for kind in network.tests for head in (f"{kind}: agreement, %", f"{kind}: SQNR, dB")]
    print_row("float layers", *heads, "all: agreement, %", "time / fp32, OpenVINO", "the last one spared, SQNR alone")
    print_row("---:", *["---:"] * (len(heads) + 2), "---")
    table = []
    for count, path, ratio in zip(counts, paths, ratios[1:], strict=True):
        actual = outputs(path, network.tests)
        rows = [score(actual[kind], expected[kind], None) for kind in network.tests]
        sizes = [len(test.blobs) for test in network.tests.values()]
        overall = float(np.average([row.agreement for row in rows], weights=sizes))
        table.append([*(row.agreement for row in rows), overall])
        last = f"{ranking[count - 1].layer} ({ranking[count - 1].sqnr_db:.1f} dB)" if count else ""
        figures = [cell for row in rows for cell in cells(row)]
        print_row(count, *figures, f"{100 * overall:.1f}", "-" if ratio is None else f"{ratio:.2f}", last)
    print()
    for place, kind in enumerate([*network.tests, "all"]):
        print(f"{kind}: {reached(dict(zip(counts, [row[place] for row in table], strict=True)))}")


def reached(agreements: Mapping[int, float]) -> str:
    """With how many float layers it is ENOUGH, and whether it stays so: of a hundred images, three are chance."""
    enough = [count for count, agreement in agreements.items() if agreement >= ENOUGH]
    if not enough:
        return f"{ENOUGH:.0%} agreement is not reached"
    below = [count for count in agreements if count > enough[0] and count not in enough]
    lost = f", but not with {', '.join(map(str, below))}" if below else ", and with all more"
    return f"{ENOUGH:.0%} agreement with {enough[0]} float layers{lost}"


def time_ratios(paths: Sequence[Path], blob: np.ndarray, seconds: float) -> list[float | None]:
    """Each one's time / the first one's on OpenCV with OpenVINO, one thread; None where that cannot be had here."""
    try:
        opencv = parity.find_opencv(*plugin.interpreter("openvino"))
    except SetupError as error:
        say(f"not timed: {error}")
        return [None] * len(paths)
    turns = take_turns(opencv, "openvino", paths, blob, seconds=seconds, threads=1)
    return list(turns.ratios) if turns else [None] * len(paths)


def nncf_python(given: Path | None) -> Path | None:
    """An interpreter that can import nncf; None where there is none."""
    if given or importlib.util.find_spec("nncf"):
        return given or Path(sys.executable)
    print("NNCF is left out: `uv run --with nncf`, or --nncf with an interpreter that has it, adds it")
    return None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="*", type=Path)
    parser.add_argument("--no-imagenet", dest="imagenet", action="store_false")
    parser.add_argument("--nncf", type=Path, metavar="PYTHON", help="an interpreter with nncf; default: this one")
    parser.add_argument("--data", type=Path, default=Path("../shared/data"), help="with signs/ and magnetic-tiles/")
    parser.add_argument("--images", type=int, default=200, help="for calibration")
    parser.add_argument("--tested", type=int, default=100, help="images of each kind, for ImageNet's Lite0")
    parser.add_argument("--validation", type=int, default=0, help="images that a run is tested on; 0: all")
    parser.add_argument("--seconds", type=float, default=SECONDS, help="of timing the mixed forms")
    args = parser.parse_args()
    print(f"{runner.cpu_name()} ({platform.machine()}), onnxruntime {onnxruntime.__version__}")
    nncf = nncf_python(args.nncf)
    with tempfile.TemporaryDirectory(prefix="quantizers-") as temporary:
        folder = Path(temporary)
        if args.imagenet:
            network = imagenet_lite0(folder, args.data, args.images, args.tested)
            compare(network, folder, nncf)
            spare(network, folder, args.seconds)
        for run in args.runs:
            compare(trained(run, folder, args.images, args.validation), folder, nncf)


if __name__ == "__main__":
    main()
