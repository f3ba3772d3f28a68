"""The demo's data: scikit-learn's handwritten digits, as an image folder, or composed on canvases to be found there.

1,797 real digits, 8×8 pixels each: E. Alpaydin, C. Kaynak, Optical Recognition of Handwritten Digits, UCI, 1998.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np

from edgekit.artifacts import replacing_folder, write_bytes, write_text
from edgekit.errors import SetupError
from edgekit.recipe import Augment, Model, Recipe, Task, suggest

CANVAS = (128, 160)  # (height, width) in pixels
CANVASES = {"train": 320, "val": 80}
TRAIN_SHARE = 0.8  # of the digits: none is on canvases of both subsets
MIN_DIGIT, MAX_DIGIT = 24, 48  # side in pixels
MIN_INK = 0.25  # of full ink: what belongs to a digit
NOTE = (
    "These images are composed: real handwritten digits (scikit-learn's, 8x8 pixels each) were enlarged and put on "
    "canvases by edgekit's demo. They show that everything works, and nothing about how hard your own images are.\n"
)


def write_demo(data: Path, task: Task) -> Recipe:
    """Writes the task's images below `data` and → the recipe that trains on them. Raises SetupError."""
    if task == "classify":
        write_digits(data / "digits")
        return digits_recipe(data / "digits", "")
    folder = data / f"digits-{task}"
    write = write_boxes if task == "detect" else write_masks
    write(folder)
    return canvases_recipe(folder, task)


def write_digits(folder: Path) -> None:
    """Writes folder/CLASS/NUMBER.png, grey 8×8 PNG files; an existing folder is replaced.

    Raises SetupError when scikit-learn is not installed.
    """
    digits, labels = _digits()
    with replacing_folder(folder) as temporary:
        for number, (image, label) in enumerate(zip(digits, labels, strict=True)):
            ink = np.round(255 - image * (255 / 16)).astype(np.uint8)  # 0..16, dark on light as on paper
            (temporary / str(label)).mkdir(exist_ok=True)
            _write_png(temporary / str(label) / f"{number:04d}.png", ink)


def digits_recipe(folder: Path, name: str) -> Recipe:
    """Small and quick: 64-pixel input, no mirroring (a mirrored digit is another sign)."""
    recipe = suggest(str(folder), ())
    return recipe.model_copy(
        update={
            "name": name,
            "model": Model(input_size=(64, 64)),
            "augment": Augment(horizontal_flip=0.0),
            "train": recipe.train.model_copy(update={"head_epochs": 1, "epochs": 4}),
        }
    )


@dataclass(frozen=True)
class Canvas:
    """image: uint8 (H, W, 3) BGR; classes: uint8 (H, W), 0 where there is no digit, else 1 + the digit; boxes:
    (digit, left, top, right, bottom) in pixels, right and bottom excluded."""

    image: np.ndarray
    classes: np.ndarray
    boxes: tuple[tuple[int, int, int, int, int], ...]


def write_boxes(folder: Path, canvases: dict[str, int] = CANVASES) -> None:
    """Writes canvases with digits to be found, in YOLO's layout; an existing folder is replaced. Raises SetupError."""
    with replacing_folder(folder) as temporary:
        names = "".join(f"  {digit}: '{digit}'\n" for digit in range(10))
        write_text(temporary / "data.yaml", f"path: .\ntrain: images/train\nval: images/val\nnames:\n{names}")
        write_text(temporary / "NOTE.txt", NOTE)
        for subset, number, canvas in _canvases(canvases):
            _write_png(temporary / "images" / subset / f"{number:04d}.png", canvas.image)
            lines = [_yolo_line(box) for box in canvas.boxes]
            write_text(temporary / "labels" / subset / f"{number:04d}.txt", "".join(lines))


def write_masks(folder: Path, canvases: dict[str, int] = CANVASES) -> None:
    """Writes canvases with a mask of the digits' ink beside each; an existing folder is replaced. Raises SetupError."""
    with replacing_folder(folder) as temporary:
        write_text(temporary / "classes.txt", "".join(f"{name}\n" for name in ("background", *range(10))))
        write_text(temporary / "NOTE.txt", NOTE)
        for subset, number, canvas in _canvases(canvases):
            _write_png(temporary / subset / "images" / f"{number:04d}.png", canvas.image)
            _write_png(temporary / subset / "masks" / f"{number:04d}.png", canvas.classes)


def canvases_recipe(folder: Path, task: Task) -> Recipe:
    """Small and quick: the canvases at their own size, no mirroring."""
    recipe = suggest(str(folder), (), task)
    augment = recipe.augment.model_copy(update={"horizontal_flip": 0.0, "rotate_degrees": 0.0, "scale": (0.8, 1.1)})
    train = recipe.train.model_copy(update={"epochs": 12, "batch_size": 16})
    return recipe.model_copy(update={"model": Model(input_size=CANVAS), "augment": augment, "train": train})


def _digits() -> tuple[np.ndarray, np.ndarray]:
    """→ (1797, 8, 8) ink, 0..16, and (1797,) which digit."""
    try:
        from sklearn.datasets import load_digits
    except ImportError:
        raise SetupError("the demo's digits are in scikit-learn: install it with `pip install edgekit[demo]`") from None
    digits = load_digits()
    return digits.images, digits.target


def _canvases(counts: dict[str, int]) -> Sequence[tuple[str, int, Canvas]]:
    digits, labels = _digits()
    cut = round(TRAIN_SHARE * len(digits))
    pools = {"train": range(cut), "val": range(cut, len(digits))}
    rows = []
    for place, (subset, count) in enumerate(counts.items()):
        for number in range(count):
            rng = np.random.default_rng((place, number))
            rows.append((subset, number, _compose(digits, labels, pools[subset], rng)))
    return rows


def _compose(digits: np.ndarray, labels: np.ndarray, pool: range, rng: np.random.Generator) -> Canvas:
    """Up to six digits of the pool, side by side or apart, never one on the other, in dark ink on shaded paper."""
    height, width = CANVAS
    paper = rng.uniform(170, 245, 3) + rng.normal(0, 25) * np.linspace(-1, 1, width)[None, :, None]
    image = paper + rng.normal(0, 6, (height, width, 1))
    classes = np.zeros((height, width), np.uint8)
    boxes: list[tuple[int, int, int, int, int]] = []
    for index in rng.choice(pool, rng.integers(1, 7), replace=False):
        side = int(rng.integers(MIN_DIGIT, MAX_DIGIT + 1))
        top, left = int(rng.integers(0, height - side + 1)), int(rng.integers(0, width - side + 1))
        ink = np.clip(cv2.resize(digits[index] / 16, (side, side), interpolation=cv2.INTER_CUBIC), 0, 1)
        rows, columns = np.nonzero(ink >= MIN_INK)
        place = (slice(top, top + side), slice(left, left + side))
        if classes[place].any():
            continue
        color = rng.uniform(0, 110, 3)
        image[place] += ink[..., None] * (color - image[place])
        digit = int(labels[index])
        classes[place][rows, columns] = 1 + digit
        first, last = (int(left + columns.min()), int(top + rows.min())), (int(columns.max()), int(rows.max()))
        boxes.append((digit, *first, left + last[0] + 1, top + last[1] + 1))
    return Canvas(np.clip(image, 0, 255).astype(np.uint8), classes, tuple(boxes))


def _yolo_line(box: tuple[int, int, int, int, int]) -> str:
    digit, left, top, right, bottom = box
    height, width = CANVAS
    shares = ((left + right) / 2 / width, (top + bottom) / 2 / height, (right - left) / width, (bottom - top) / height)
    return f"{digit} " + " ".join(f"{share:.6f}" for share in shares) + "\n"


def _write_png(path: Path, image: np.ndarray) -> None:
    ok, png = cv2.imencode(".png", image)
    assert ok
    write_bytes(path, png.tobytes())
