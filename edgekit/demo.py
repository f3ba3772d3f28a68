"""The demo's data: scikit-learn's handwritten digits, written as an image folder.

1,797 real digits, 8×8 pixels each: E. Alpaydin, C. Kaynak, Optical Recognition of Handwritten Digits, UCI, 1998.
"""

from __future__ import annotations

from pathlib import Path

import cv2
import numpy as np

from edgekit.artifacts import replacing_folder, write_bytes
from edgekit.errors import SetupError
from edgekit.recipe import Augment, Data, Model, Recipe, Train


def write_digits(folder: Path) -> None:
    """Writes folder/CLASS/NUMBER.png, grey 8×8 PNG files; an existing folder is replaced.

    Raises SetupError when scikit-learn is not installed.
    """
    try:
        from sklearn.datasets import load_digits
    except ImportError:
        raise SetupError("the demo's digits are in scikit-learn: install it with `pip install edgekit[demo]`") from None
    digits = load_digits()
    with replacing_folder(folder) as temporary:
        for number, (image, label) in enumerate(zip(digits.images, digits.target, strict=True)):
            ink = np.round(255 - image * (255 / 16)).astype(np.uint8)  # 0..16, dark on light as on paper
            ok, png = cv2.imencode(".png", ink)
            assert ok
            (temporary / str(label)).mkdir(exist_ok=True)
            write_bytes(temporary / str(label) / f"{number:04d}.png", png.tobytes())


def digits_recipe(folder: Path, name: str) -> Recipe:
    """Small and quick: 64-pixel input, no mirroring (a mirrored digit is another sign)."""
    return Recipe(
        name=name,
        data=Data(path=str(folder)),
        model=Model(input_size=(64, 64)),
        augment=Augment(horizontal_flip=0.0),
        train=Train(head_epochs=1, epochs=4),
    )
