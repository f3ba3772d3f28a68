"""A real bundle, small and made without torch, for the runner's tests: real photos, a real network, real answers."""

import hashlib
import json
import platform
import shutil
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import onnx
import onnxruntime
from onnx import TensorProto, helper, numpy_helper
from sklearn.datasets import load_sample_images

from edgekit import __version__, runner
from edgekit.artifacts import Manifest, Tolerances, file_table, write_json

# Height and width differ, and so do the channels' means: whoever swaps them gets other answers.
SPEC = runner.Spec(
    task="classify",
    input_size=(32, 48),
    resize="stretch",
    interpolation="linear",
    color_order="rgb",
    mean_255=(123.675, 116.28, 103.53),
    std_255=(58.395, 57.12, 57.375),
    class_names=("pagoda", "flower", "roof", "Blüte", "sky", "leaf", "lake"),
)


def photo(name: str) -> np.ndarray:
    """scikit-learn's photos "china" and "flower": uint8 (427, 640, 3) BGR."""
    images = load_sample_images()
    index = [Path(file).stem for file in images.filenames].index(name)
    return np.ascontiguousarray(images.images[index][..., ::-1])


def write_photos(folder: Path) -> list[Path]:
    """china.jpg, flower.jpg, and a cutting of each as PNG."""
    folder.mkdir(parents=True)
    china, flower = photo("china"), photo("flower")
    for name, image in {
        "china.jpg": china,
        "flower.jpg": flower,
        "petals.png": flower[150:300, 200:400],
        "roof.png": china[20:140, 80:340],
    }.items():
        (folder / name).write_bytes(cv2.imencode(Path(name).suffix, image)[1].tobytes())
    return sorted(folder.iterdir())


def write_model(path: Path, classes: int = len(SPEC.class_names), seed: int = 0, scale: float = 1.0) -> None:
    """float32 (1, 3, 32, 48) → "logits" (1, classes): two convolutions, a global mean, a Gemm; random weights."""
    random = np.random.default_rng(seed)
    weights = {
        "w1": random.normal(0, 0.3, (8, 3, 3, 3)),
        "b1": random.normal(0, 0.3, 8),
        "w2": random.normal(0, 0.3, (16, 8, 3, 3)),
        "b2": random.normal(0, 0.3, 16),
        "w3": random.normal(0, scale, (classes, 16)),
        "b3": random.normal(0, scale, classes),
    }
    convolution = {"kernel_shape": [3, 3], "strides": [2, 2], "pads": [1, 1, 1, 1]}
    nodes = [
        helper.make_node("Conv", ["image", "w1", "b1"], ["c1"], **convolution),
        helper.make_node("Relu", ["c1"], ["r1"]),
        helper.make_node("Conv", ["r1", "w2", "b2"], ["c2"], **convolution),
        helper.make_node("Relu", ["c2"], ["r2"]),
        helper.make_node("GlobalAveragePool", ["r2"], ["mean"]),
        helper.make_node("Flatten", ["mean"], ["flat"]),
        helper.make_node("Gemm", ["flat", "w3", "b3"], ["logits"], transB=1),
    ]
    _save(path, SPEC, nodes, [helper.make_tensor_value_info("logits", TensorProto.FLOAT, [1, classes])], weights)


def write_detector(path: Path, spec: runner.Spec) -> None:
    """The outputs that `runner.detect` reads: class 0 is what is light, class 1 what is dark, the others are colours.

    Each cell sees a box around its middle, 3 cells wide and 2 high.
    """
    nodes, outputs, weights = [], [], {}
    for stride in spec.strides:
        cells = [spec.input_size[0] // stride, spec.input_size[1] // stride]
        weights[f"w{stride}"] = _colours(len(spec.class_names), stride)
        weights[f"b{stride}"] = np.full(len(spec.class_names), -4)
        weights[f"v{stride}"] = np.zeros((4, 3, stride, stride))
        weights[f"c{stride}"] = np.log([1.5, 1, 1.5, 1])
        for kind, taps, bias, channels in (("classes", "w", "b", len(spec.class_names)), ("boxes", "v", "c", 4)):
            names = ["image", f"{taps}{stride}", f"{bias}{stride}"]
            nodes.append(_cells(names, f"{kind}_{stride}", stride))
            shape = [1, channels, *cells]
            outputs.append(helper.make_tensor_value_info(f"{kind}_{stride}", TensorProto.FLOAT, shape))
    _save(path, spec, nodes, outputs, weights)


def write_segmenter(path: Path, spec: runner.Spec) -> None:
    """ "logits" (1, C, h/4, w/4): class 0 is what is light, class 1 what is dark, the others are colours."""
    count = len(spec.class_names)
    shape = [1, count, spec.input_size[0] // 4, spec.input_size[1] // 4]
    _save(
        path,
        spec,
        [_cells(["image", "w", "b"], "logits", 4)],
        [helper.make_tensor_value_info("logits", TensorProto.FLOAT, shape)],
        {"w": _colours(count, 4), "b": np.zeros(count)},
    )


def _cells(inputs: list[str], output: str, stride: int) -> onnx.NodeProto:
    """A convolution whose windows lie side by side."""
    return helper.make_node("Conv", inputs, [output], kernel_shape=[stride] * 2, strides=[stride] * 2)


def _colours(count: int, stride: int) -> np.ndarray:
    """Of `count` convolutions the weights (count, 3, stride, stride): each is the mean of the channels, with signs."""
    signs = np.array([[1, 1, 1], [-1, -1, -1], *np.random.default_rng(0).normal(0, 1, (count, 3))])[:count]
    return np.broadcast_to(4 / 3 / stride**2 * signs[:, :, None, None], (count, 3, stride, stride))


def _save(path: Path, spec: runner.Spec, nodes: list[Any], outputs: list[Any], weights: dict[str, np.ndarray]) -> None:
    inputs = [helper.make_tensor_value_info("image", TensorProto.FLOAT, [1, 3, *spec.input_size])]
    tensors = [numpy_helper.from_array(array.astype(np.float32), name) for name, array in weights.items()]
    graph = helper.make_graph(nodes, "tiny", inputs, outputs, tensors)
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 13)], ir_version=8), path)


def write_bundle(folder: Path, spec: runner.Spec = SPEC, **manifest: Any) -> Path:
    """A bundle of any task that passes its own check; keywords replace entries of its manifest."""
    files = write_photos(folder / "check")
    shutil.copyfile(runner.__file__, folder / "run.py")
    if spec.task == "classify":
        write_model(folder / "model.onnx", len(spec.class_names))
    else:
        {"detect": write_detector, "segment": write_segmenter}[spec.task](folder / "model.onnx", spec)
    session = onnxruntime.InferenceSession(folder / "model.onnx", providers=["CPUExecutionProvider"])
    names = [output.name for output in session.get_outputs()]
    rows, outputs = [], []
    for file in files:
        image = runner.read_image(file)
        pixels = runner.resize(image, spec)
        arrays = session.run(names, {"image": runner.normalize(pixels[None], spec)})
        outputs.append(dict(zip(names, arrays, strict=True)))
        rows.append(
            {
                "file": file.name,
                "pixels_sha256": hashlib.sha256(pixels.tobytes()).hexdigest(),
                "results": runner.plain(runner.POSTPROCESS[spec.task](outputs[-1], spec, image.shape[:2])),
            }
        )
    write_expected(folder, rows, {name: np.concatenate([row[name] for row in outputs]) for name in names})
    proved = [{"opencv": cv2.__version__, "engine": engine} for engine in runner.engines()]
    sign(folder, **{"spec": spec.to_dict(), "proved": proved, **manifest})
    return folder


def read_expected(folder: Path) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """The rows of check/expected.json, and the outputs, float32 (images, ...) each."""
    with np.load(folder / "check" / "outputs.npz") as arrays:
        outputs = {name: arrays[name] for name in arrays.files}
    return json.loads((folder / "check" / "expected.json").read_text("utf-8"))["images"], outputs


def write_expected(folder: Path, rows: list[dict[str, Any]], outputs: dict[str, Any]) -> None:
    write_json(folder / "check" / "expected.json", {"images": rows})
    np.savez(folder / "check" / "outputs.npz", **outputs)


def sign(folder: Path, **changes: Any) -> None:
    """Writes manifest.json anew: the files as they are now, and what it said before, with changes."""
    path = folder / "manifest.json"
    (before := json.loads(path.read_text("utf-8")) if path.exists() else {}).pop("sha256", None)
    before.pop("schema", None)
    path.unlink(missing_ok=True)
    first = {
        "edgekit_version": __version__,
        "name": "tiny",
        "target": "cpu",
        "arch": (platform.machine(),),
        "backend": "opencv/cpu",
        "form": "opencv5",
        "precision": "fp32",
        "refused": (),
        "threads": 1,
        "tolerances": Tolerances(outputs=1e-4, outputs_other_pixels=0.05, outputs_16bit=0.05),
        "latency_budget_ms": None,
        "provenance": {},
    }
    files = file_table(folder)
    write_json(path, Manifest(**{**first, **before, "files": files, **changes}).to_json())
