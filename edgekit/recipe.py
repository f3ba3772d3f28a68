"""recipe.toml → frozen `Recipe`: every choice that a run depends on, each with a line of documentation.

A recipe with every field left out is valid but for `data.path`, and trains well on a small photo data set: what is left
out is what suits its task.
Unknown keys are errors: a mistyped setting must not be ignored.
"""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError

from edgekit.errors import ConfigError

if sys.version_info >= (3, 11):
    import tomllib
else:  # Python 3.10
    import tomli as tomllib

QAT_EPOCHS = 3

Task = Literal["classify", "detect", "segment"]

Share = Annotated[float, Field(ge=0.0, le=1.0)]
Fraction = Annotated[float, Field(ge=0.0, lt=1.0)]


def _ordered(value: tuple[float, float]) -> tuple[float, float]:
    if not 0 < value[0] <= value[1]:
        raise ValueError(f"expected 0 < low <= high, got {list(value)}")
    return value


class _Section(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Data(_Section):
    """[data]"""

    path: str = Field(
        description="classify: image folder (a folder a class, or train/ and val/ with those) or CSV (path,label). "
        "detect: Pascal VOC, COCO or YOLO. segment: images/ and masks/, or photo and mask side by side."
    )
    val_fraction: Annotated[float, Field(gt=0.0, lt=1.0)] = Field(
        0.2, description="Share of each class kept for validation where the data has no val/ of its own."
    )
    split_seed: int = Field(0, description="Another seed gives another split; adding files never moves old ones.")


class Model(_Section):
    """[model]"""

    backbone: str = Field("tf_efficientnet_lite0", description="A name from `edgekit backbones`, timm or torchvision.")
    pretrained: bool = Field(True, description="Start from published ImageNet weights; false starts from random ones.")
    weights: str = Field("", description="A .safetensors or .pth file to start from, instead of the published weights.")
    input_size: tuple[Annotated[int, Field(ge=32, le=2048)], Annotated[int, Field(ge=32, le=2048)]] | None = Field(
        None, description="[height, width] in pixels; left out: the backbone's own."
    )


class Preprocess(_Section):
    """[preprocess]: what the device does to an image; training does the same."""

    resize: Literal["stretch", "crop", "letterbox"] = Field(
        "stretch",
        description="stretch: the whole image, aspect ratio lost; crop: the centre, aspect ratio kept; "
        "letterbox: the whole image, aspect ratio kept, bars where it ends.",
    )
    interpolation: Literal["linear", "area"] = Field(
        "linear", description="linear is fast; area is better (and dearer) for large photos with fine detail."
    )


class Augment(_Section):
    """[augment]: random changes of the training images."""

    horizontal_flip: Annotated[float, Field(ge=0.0, le=1.0)] = Field(
        0.5, description="Probability of mirroring; 0 where left and right matter (text, digits, arrows)."
    )
    scale: Annotated[tuple[float, float], AfterValidator(_ordered)] = Field(
        (0.75, 1.05), description="Side of the region shown, as a share of the image's side: [low, high]."
    )
    rotate_degrees: Annotated[float, Field(ge=0, le=180)] = Field(12.0, description="Largest rotation either way.")
    translate: Annotated[float, Field(ge=0, le=0.5)] = Field(0.08, description="Largest shift, as a share of a side.")
    brightness: Annotated[float, Field(ge=0, le=1)] = Field(0.1, description="Largest offset, as a share of white.")
    contrast: Annotated[float, Field(ge=0, lt=1)] = Field(0.3, description="Largest change of contrast, as a share.")
    saturation: Annotated[float, Field(ge=0, le=1)] = Field(0.3, description="Largest change of saturation.")


class Train(_Section):
    """[train]"""

    head_epochs: Annotated[int, Field(ge=0)] = Field(
        0, description="Epochs for the new head alone, before the rest; 0: it learns with the last stages at once."
    )
    epochs: Annotated[int, Field(ge=0)] = Field(6, description="Epochs for the head and the backbone's last stages.")
    unfrozen_fraction: Annotated[float, Field(ge=0.0, le=1.0)] = Field(
        0.35, description="Share of the backbone's stages, from the last, that `epochs` trains; 1 trains all."
    )
    batch_size: Annotated[int, Field(ge=2)] = Field(32, description="Images a step.")
    head_learning_rate: Annotated[float, Field(gt=0)] = Field(5e-3, description="Peak rate while only the head learns.")
    learning_rate: Annotated[float, Field(gt=0)] = Field(1e-3, description="Peak rate of AdamW; cosine decay to 0.")
    weight_decay: Annotated[float, Field(ge=0)] = Field(0.05, description="AdamW's decoupled weight decay.")
    warmup_fraction: Fraction = Field(0.05, description="Share of the steps in which the rate rises from 0.")
    layer_decay: Annotated[float, Field(gt=0, le=1)] = Field(
        1.0, description="Each stage's rate as a share of that of the stage after it: early stages change less."
    )
    label_smoothing: Fraction = Field(0.1, description="classify: share of each label spread over all the classes.")
    mixup: Annotated[float, Field(ge=0)] = Field(
        0.0, description="classify: alpha of the share in which two images (their frozen features) are mixed; 0: none."
    )
    class_balance: Share = Field(
        0.0, description="classify: rare classes weigh more: by (how rare) to this power; 0 leaves all images equal."
    )
    ema_decay: Fraction = Field(
        0.95, description="Keep a running average of the weights, this much of it a step; 0 keeps the last ones."
    )
    views: Annotated[int, Field(ge=0)] = Field(
        4,
        description="classify: how many augmented views of each image are computed through the frozen stages, and then "
        "kept and used in turn; 0: a new view each epoch, nothing kept.",
    )
    patience: Annotated[int, Field(ge=1)] = Field(5, description="Epochs without a better result before stopping.")
    seed: Annotated[int, Field(ge=0)] = Field(
        0, description="Order, augmentation and the head's start; same seed, same CPU: same weights."
    )
    device: Literal["auto", "cpu", "cuda"] = Field("auto", description="auto: CUDA where there is one.")
    precision: Literal["auto", "float32", "bfloat16"] = Field(
        "auto", description="auto: bfloat16 where the device computes in it, else float32."
    )
    tensorboard: bool = Field(False, description="Log each epoch for TensorBoard too, in the run's tensorboard/.")
    qat: bool = Field(
        False,
        description="Train a finished run's network (model.weights) with int8's rounding, in float32: "
        "`edgekit finetune --qat RUN`.",
    )


class Detect(_Section):
    """[detect]: what counts as an answer on the device."""

    score_threshold: Share = Field(0.3, description="A box with a lower score is no answer.")
    iou_threshold: Share = Field(
        0.6, description="Of two boxes of a class that overlap more than this, the one with the lower score goes."
    )


class Export(_Section):
    """[export]"""

    tolerance: Annotated[float, Field(gt=0, le=0.05)] = Field(
        1e-3, description="Largest difference from torch, as a share of the largest output. It cannot be switched off."
    )


class Recipe(_Section):
    """Everything a run depends on but the data's content and the code."""

    name: str = Field("", description="Name of the run folder under runs/; left out: made from data and backbone.")
    task: Task = Field(
        "classify",
        description="classify: a label an image; detect: a box an object; segment: a class a pixel.",
    )
    data: Data
    model: Model = Model()
    preprocess: Preprocess = Preprocess()
    augment: Augment = Augment()
    train: Train = Train()
    detect: Detect = Detect()
    export: Export = Export()


# What suits boxes and masks better than the defaults, which are for whole images: more of the network learns, and for
# longer, as much of it is new; and boxes are not turned, since a turned box is a looser one.
_DENSE_TRAIN = {
    "head_epochs": 1,
    "unfrozen_fraction": 0.65,
    "head_learning_rate": 2e-3,
    "learning_rate": 2e-3,
    "warmup_fraction": 0.15,
    "patience": 15,
    "ema_decay": 0.0,
    "views": 0,
}
_SUITED: dict[Task, dict[str, dict[str, Any]]] = {
    "classify": {},
    "detect": {
        "preprocess": {"resize": "letterbox"},
        "augment": {"rotate_degrees": 0.0, "scale": (0.6, 1.2), "translate": 0.1},
        "train": {**_DENSE_TRAIN, "epochs": 30, "batch_size": 8},
    },
    "segment": {"augment": {"scale": (0.6, 1.1)}, "train": {**_DENSE_TRAIN, "epochs": 20, "batch_size": 16}},
}


# For who would rather say how long than how: what differs from what suits the task.
PRESETS: dict[Task, dict[str, dict[str, Any]]] = {
    "classify": {
        "fast": {"unfrozen_fraction": 0.25, "epochs": 4, "views": 2},
        "balanced": {},
        "best": {
            "unfrozen_fraction": 0.5,
            "epochs": 15,
            "views": 8,
            "mixup": 0.2,
            "ema_decay": 0.98,
            "layer_decay": 0.9,
            "patience": 15,
        },
    },
    "detect": {"fast": {"epochs": 10}, "balanced": {}, "best": {"epochs": 60, "ema_decay": 0.98, "patience": 30}},
    "segment": {"fast": {"epochs": 5}, "balanced": {}, "best": {"epochs": 40, "ema_decay": 0.98, "patience": 20}},
}


def with_preset(recipe: Recipe, preset: str) -> Recipe:
    """The recipe with what the preset changes. Raises ConfigError for an unknown one."""
    known = PRESETS[recipe.task]
    if preset not in known:
        raise ConfigError(f"no preset is called {preset!r} (there are: {', '.join(known)})")
    return recipe.model_copy(update={"train": recipe.train.model_copy(update=known[preset])})


def suggest(data_path: str, class_names: Sequence[str], task: Task = "classify") -> Recipe:
    """What suits the task; no mirroring where the class names say that left and right matter."""
    sided = any("left" in name.lower() or "right" in name.lower() or len(name) == 1 for name in class_names)
    flip = {"horizontal_flip": 0.0} if sided else {}
    return make_recipe({"task": task, "data": {"path": data_path}, "augment": flip})


def qat_recipe(source: Recipe, weights: Path) -> Recipe:
    """A finished run's recipe → that of a run which continues from it quantization-aware; without a name.

    weights: the finished run's. A few epochs of the whole network at a tenth of the rate: the weights are good, and
    only have to find values near by that round well.
    """
    train = {
        "qat": True,
        "head_epochs": 0,
        "epochs": QAT_EPOCHS,
        "unfrozen_fraction": 1.0,
        "learning_rate": source.train.learning_rate / 10,
        "ema_decay": 0.0,
        "precision": "float32",
    }
    return source.model_copy(
        update={
            "name": "",
            "model": source.model.model_copy(update={"weights": str(weights.absolute())}),
            "train": source.train.model_copy(update=train),
        }
    )


def read_recipe(path: Path) -> Recipe:
    """Reads and checks a recipe.toml.

    Raises ConfigError when the file is missing, is not TOML, or has an unknown key or a value out of range.
    """
    try:
        raw = tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ConfigError(f"no recipe at {path}: write one with `edgekit init DATA`") from None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"cannot read the recipe {path}: {error}") from None
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(f"{path} is not valid TOML: {error}") from None
    return make_recipe(raw, origin=str(path))


def make_recipe(raw: dict[str, object], *, origin: str = "the recipe") -> Recipe:
    """Checks a nested dictionary and freezes it; what it leaves out is what suits its task.

    Raises ConfigError with every fault, one a line.
    """
    try:
        return Recipe.model_validate(_suited(raw))
    except ValidationError as error:
        raise ConfigError(f"{origin}: " + "; ".join(_fault(e) for e in error.errors())) from None


def _suited(raw: dict[str, object]) -> dict[str, object]:
    suited = next((sections for task, sections in _SUITED.items() if task == raw.get("task")), {})
    given = {section: raw.get(section, {}) for section in suited}
    return raw | {key: {**suited[key], **value} for key, value in given.items() if isinstance(value, dict)}


def _fault(error: object) -> str:
    detail = dict(error)  # type: ignore[call-overload]
    where = ".".join(str(part) for part in detail["loc"])
    if detail["type"] == "extra_forbidden":
        known = ", ".join(sorted(_fields_at(detail["loc"][:-1])))
        return f"unknown key {where} (known here: {known})"
    return f"{where}: {detail['msg']}, got {detail['input']!r}"


def _fields_at(location: tuple[str | int, ...]) -> list[str]:
    record: type[BaseModel] = Recipe
    for part in location:
        annotation = record.model_fields[str(part)].annotation
        if not (isinstance(annotation, type) and issubclass(annotation, BaseModel)):
            return []
        record = annotation
    return list(record.model_fields)


def to_toml(recipe: Recipe) -> str:
    """The recipe as commented TOML; `read_recipe` of it gives the same recipe."""
    lines: list[str] = []
    sections: list[str] = []
    for key, field in Recipe.model_fields.items():
        value = getattr(recipe, key)
        if key == "detect" and recipe.task != "detect":
            continue
        if isinstance(value, _Section):
            sections += ["", f"[{key}]", *_toml_lines(value)]
        else:
            lines += _toml_line(key, value, field.description)
    return "\n".join(lines + sections) + "\n"


def _toml_lines(section: _Section) -> list[str]:
    rows: list[str] = []
    for key, field in type(section).model_fields.items():
        rows += _toml_line(key, getattr(section, key), field.description)
    return rows


def _toml_line(key: str, value: object, description: str | None) -> list[str]:
    # A scalar or a flat list has the same spelling in JSON and in TOML; a key without a value is left as a comment.
    shown = f"# {key} =" if value is None else f"{key} = {json.dumps(value, ensure_ascii=False)}"
    return [f"# {description}", shown]


def recipe_sha256(recipe: Recipe) -> str:
    """SHA-256 (hex) of the recipe's values: the same for the same choices, however the file was written."""
    return hashlib.sha256(recipe.model_dump_json().encode()).hexdigest()
