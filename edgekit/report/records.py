"""What the stages wrote, read back: a file of another version, or a damaged one, must end in a message.

metrics.json has other figures for each task; the rest is the same for all.
"""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Annotated, Any, Generic, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from edgekit.artifacts import read_json
from edgekit.errors import ArtifactError

Share = Annotated[float, Field(ge=0, le=1)]


class _Record(BaseModel):
    model_config = ConfigDict(frozen=True)


class _Finite(_Record):
    """A record whose figures are drawn: not a number and infinity are no figures."""

    model_config = ConfigDict(allow_inf_nan=False)


# ---------------------------------------------------------------------------------------------------------------
# metrics.json


class _Column(_Record):
    """One network's figures: torch's, or those of a conversion."""

    agreement: float
    images_per_second: float

    def class_counts(self) -> set[int]:
        """How many classes each of its lists is about: one number, where all is well."""
        raise NotImplementedError


class _ClassOfImages(_Record):
    label: str
    support: int
    precision: float
    recall: float
    f1: float


class _ScoreBin(_Finite):
    images: Annotated[int, Field(ge=0)]
    score: Share | None
    accuracy: Share | None


class _Classification(_Column):
    top1: float
    top5: float | None
    macro_f1: float
    per_class: tuple[_ClassOfImages, ...]
    confusion: tuple[tuple[int, ...], ...]
    calibration_error: Share | None = None  # files of before have neither
    score_bins: tuple[_ScoreBin, ...] = ()

    def class_counts(self) -> set[int]:
        return {len(self.per_class), len(self.confusion), *map(len, self.confusion)}


class _ClassifyMistake(_Record):
    path: str
    label: str
    predicted: str
    score: float
    true_score: float


class _ClassOfBoxes(_Finite):
    label: str
    support: int
    ap50: Share | None
    ap: Share | None
    precision: Share | None
    recall: Share | None
    f1: Share | None


class _Detection(_Column):
    map: Share
    map50: Share
    map75: Share
    best_f1_score: Share
    per_class: tuple[_ClassOfBoxes, ...]
    pr_curves: dict[str, Annotated[tuple[Share, ...], Field(min_length=101, max_length=101)]]

    def class_counts(self) -> set[int]:
        return {len(self.per_class)}


class _TrueBox(_Finite):
    label: str
    class_id: int
    box: tuple[float, float, float, float]


class _FoundBox(_TrueBox):
    score: Share


class _DetectMistake(_Record):
    path: str
    missed: int
    false: int
    truth: tuple[_TrueBox, ...]
    answers: tuple[_FoundBox, ...]


class _ClassOfPixels(_Finite):
    label: str
    pixels: int
    iou: Share | None
    precision: Share | None
    recall: Share | None
    f1: Share | None


class _Segmentation(_Column):
    mean_iou: Share
    pixel_accuracy: Share
    per_class: tuple[_ClassOfPixels, ...]
    confusion: tuple[tuple[int, ...], ...]

    def class_counts(self) -> set[int]:
        return {len(self.per_class), len(self.confusion), *map(len, self.confusion)}


class _Runs(_Record):
    """A mask as COCO's uncompressed RLE."""

    size: tuple[Annotated[int, Field(gt=0)], Annotated[int, Field(gt=0)]]
    counts: tuple[Annotated[int, Field(ge=0)], ...]

    @model_validator(mode="after")
    def _fill_the_mask(self) -> _Runs:
        if sum(self.counts) != self.size[0] * self.size[1]:
            raise ValueError(f"the mask's runs are not those of {self.size[1]}x{self.size[0]} pixels")
        return self


class _FoundRegion(_Record):
    label: str
    class_id: Annotated[int, Field(ge=0)]
    share: Share
    mask: _Runs


class _SegmentMistake(_Finite):
    path: str
    iou: Share
    mask: str
    levels: tuple[Annotated[int, Field(ge=0, le=255)], ...]
    answers: tuple[_FoundRegion, ...]


ColumnType = TypeVar("ColumnType", bound=_Column)
MistakeType = TypeVar("MistakeType", bound=_Record)


class _Metrics(_Record, Generic[ColumnType, MistakeType]):
    task: str
    subset: Literal["val", "test"]
    images: int
    class_names: tuple[str, ...]
    columns: dict[str, ColumnType]
    mistakes: tuple[MistakeType, ...]
    conditions: dict[str, str]

    @model_validator(mode="after")
    def _fits(self) -> _Metrics[ColumnType, MistakeType]:
        classes = len(self.class_names)
        if "torch" not in self.columns:
            raise ValueError("no column for torch")
        for name, column in self.columns.items():
            if column.class_counts() != {classes}:
                raise ValueError(f"the figures of {name} are not those of {classes} classes")
        return self


class _AnyMetrics(_Record):
    task: Literal["classify", "detect", "segment"]


_METRICS: dict[str, type[_Record]] = {
    "classify": _Metrics[_Classification, _ClassifyMistake],
    "detect": _Metrics[_Detection, _DetectMistake],
    "segment": _Metrics[_Segmentation, _SegmentMistake],
}


# ---------------------------------------------------------------------------------------------------------------
# parity.json, quantize.json, history.csv


class _Verdict(_Record):
    engine: str
    version: str
    status: str
    relative_error: float | None
    message: str
    first_difference: str


class _Parity(_Record):
    tolerance: float
    versions: dict[str, str] = {}
    verdicts: tuple[_Verdict, ...]


class _Figure(_Finite):
    opencv: str
    engine: str
    status: Literal["ok", "wrong", "raised", "died", "timed out", "not proved"]
    message: str
    metric: Share | None
    drop: float | None
    agreement: Share | None
    median_ms: Annotated[float, Field(gt=0)] | None
    time_ratio: Annotated[float, Field(gt=0)] | None

    @model_validator(mode="after")
    def _has_figures(self) -> _Figure:
        if self.status == "ok" and None in (self.metric, self.drop, self.agreement):
            raise ValueError(f"no figures for {self.engine} of OpenCV {self.opencv}, which is ok")
        return self


class _Variant(_Record):
    name: Literal["fp32", "int8-weights", "int8", "int8-mixed"]
    size_bytes: Annotated[int, Field(gt=0)]
    float_layers: tuple[str, ...]
    figures: Annotated[tuple[_Figure, ...], Field(min_length=1)]


class _Step(_Finite):
    float_layers: int
    drop: float
    time_ratio: Annotated[float, Field(gt=0)] | None
    last: str


class _Layer(_Finite):
    layer: str
    sqnr_db: float


class _Calibration(_Record):
    images: int
    method: str


class _Quantization(_Finite):
    target: str
    precision: Literal["fp32", "int8", "int8-weights"]
    why: str
    onnx_sha256: str
    metric: str
    images: int
    max_drop: float
    calibration: _Calibration
    variants: tuple[_Variant, ...]
    curve: tuple[_Step, ...]
    sensitivity: tuple[_Layer, ...]
    conditions: dict[str, str]

    @model_validator(mode="after")
    def _fits(self) -> _Quantization:
        names = [variant.name for variant in self.variants]
        if names[:1] != ["fp32"]:
            raise ValueError("fp32 is not the first variant")
        if self.precision not in {name.removesuffix("-mixed") for name in names}:
            raise ValueError(f"no variant for the precision {self.precision}")
        return self


class _Epoch(_Record):
    epoch: int
    phase: str
    train_loss: float
    val_loss: float
    metric: str
    val_metric: float
    seconds: float
    images_per_second: float


# ---------------------------------------------------------------------------------------------------------------
# Files → records


RecordType = TypeVar("RecordType", bound=_Record)


def _checked(record: type[RecordType], raw: object, path: Path) -> dict[str, Any]:
    try:
        return record.model_validate(raw).model_dump()
    except ValidationError as error:
        first = error.errors()[0]
        what = ".".join(str(part) for part in first["loc"]) + ": " + first["msg"].removeprefix("Value error, ")
        what = what.removeprefix(": ")
        raise ArtifactError(f"{path} is not as this edgekit writes it ({what}): make it again") from None


def read_history(path: Path) -> list[dict[str, Any]]:
    """history.csv → a row an epoch. Raises ArtifactError when it cannot be read or is not such a file."""
    try:
        with path.open(encoding="utf-8", newline="") as stream:
            rows = list(csv.DictReader(stream))
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise ArtifactError(f"cannot read {path} ({error}): fine-tune again") from None
    return [_checked(_Epoch, row, path) for row in rows]


def read_quantization(path: Path) -> dict[str, Any]:
    """quantize.json, for the tables and pictures here. Raises ArtifactError when it is not as `quantize` writes it."""
    return _checked(_Quantization, read_json(path), path)


def read_parity(path: Path) -> dict[str, Any]:
    """parity.json. Raises ArtifactError when it is not as `export` and `verify` write it."""
    return _checked(_Parity, read_json(path), path)


def read_metrics(path: Path) -> dict[str, Any]:
    """metrics.json of any task. Raises ArtifactError when it is not as `evaluate` writes it."""
    raw = read_json(path)
    return _checked(_METRICS[_checked(_AnyMetrics, raw, path)["task"]], raw, path)
