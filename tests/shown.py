"""What the tests of the report and of its pictures share: a history, images of one colour, and ways to look."""

from pathlib import Path
from typing import Any

import cv2
import numpy as np

from edgekit import runner
from edgekit.artifacts import write_bytes

HOSTILE = ("<script>alert(1)</script>", '"><img src=x onerror=alert(1)>', "{{ 7 * 7 }} & $x$ [red]猫")
HISTORY = """epoch,phase,learning_rate,train_loss,val_loss,val_top1,seconds,images_per_second
1,head,0.005,1.6,1.2,0.5,61.0,40.0
2,stages,0.001,0.9,0.8,0.7,70.5,30.0
3,stages,0.0,0.7,0.75,0.7,70.5,32.0
"""


def rows_of(history: str) -> list[dict[str, str]]:
    header, *lines = [line.split(",") for line in history.splitlines()]
    return [dict(zip(header, line, strict=True)) for line in lines]


def decoded(data: bytes) -> np.ndarray:
    return runner.decode(data)


def bgr(color: str) -> tuple[int, ...]:
    return tuple(int(color[i : i + 2], 16) for i in (5, 3, 1))


def share_of(image: np.ndarray, color: str) -> float:
    return float((image == bgr(color)).all(axis=2).mean())


def solid(path: Path, color: tuple[int, int, int], height: int = 40, width: int = 40) -> Path:
    write_bytes(path, cv2.imencode(".png", np.full((height, width, 3), color, np.uint8))[1].tobytes())
    return path


def mistake(path: Path, label: str = "newt", predicted: str = "dog") -> dict[str, Any]:
    return {"path": str(path), "label": label, "predicted": predicted, "score": 0.875, "true_score": 0.0625}
