"""Small pictures and files for the tests."""

import hashlib
from pathlib import Path

import cv2
import numpy as np

from edgekit import runner

SPEC = runner.Spec(
    task="classify",
    input_size=(48, 64),
    resize="stretch",
    interpolation="linear",
    color_order="rgb",
    mean_255=(127.5, 127.5, 127.5),
    std_255=(127.5, 127.5, 127.5),
    class_names=("a", "b"),
)


def photo(seed: int, height: int = 40, width: int = 56) -> np.ndarray:
    """uint8 (height, width, 3): smooth, colourful, other content for each seed."""
    coarse = np.random.default_rng(seed).integers(0, 256, (6, 8, 3), dtype=np.uint8)
    return cv2.resize(coarse, (width, height), interpolation=cv2.INTER_CUBIC)


def put(path: Path, data: bytes) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)
    return path


def sha(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()
