"""targets/*.toml → frozen `Target`: what a bundle is built for, proved on, and installed with.

Unknown keys are errors: a mistyped setting must not be ignored.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from edgekit.errors import ConfigError
from edgekit.forms import Form

if sys.version_info >= (3, 11):
    import tomllib
else:  # Python 3.10
    import tomli as tomllib

PRECISIONS = ("auto", "fp32", "int8", "int8-weights")  # what a bundle may be asked for
Name = Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9_-]*$")]
Range = Annotated[str, Field(pattern=r"^(>=|<=|==|!=|~=|>|<)\d+(\.\d+)*(,(>=|<=|==|!=|~=|>|<)\d+(\.\d+)*)*$")]
Line = Annotated[str, Field(min_length=1, pattern=r"^[^\n\r]+$")]


class Target(BaseModel):
    """A kind of device. The fields are the file's keys."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: Name = Field(description="Part of the bundle's name; small letters, digits, - and _.")
    description: Line = Field(description="One line for `edgekit targets`.")
    arch: Annotated[tuple[Line, ...], Field(min_length=1)] = Field(
        description="Machine names as `uname -m` or Windows gives them."
    )
    backend: Literal["opencv/cpu", "openvino/cpu", "cuda/fp32", "cuda/fp16"] = Field(
        "opencv/cpu", description="cv2.dnn's backend and what it computes in: one named pair, never mixed."
    )
    form: Form = Field(
        "opencv5",
        description="What the model is made fast for: OpenCV 5.0's own engine, 4.x's, or another backend (plain). "
        "opencv4.6 is right and fast in 4.6 too.",
    )
    precision: Literal["fp32", "auto"] = Field(
        "fp32", description="What a bundle gets; auto: int8 where that kept its accuracy and is faster, else fp32."
    )
    opencv: Range = Field(description='OpenCV versions that may be installed there, such as ">=4.5.4,<5.1".')
    prove_on: Annotated[
        tuple[Annotated[str, Field(pattern=r"^(\d+(\.\d+){3}|openvino)$")], ...], Field(min_length=1)
    ] = Field(
        description='Exact opencv-python versions that a bundle is proved on; "openvino": OpenVINO by its plugin.'
    )
    python: Range = Field(">=3.8", description="Python versions that may be installed there.")
    threads: Annotated[int, Field(ge=0)] = Field(0, description="OpenCV's threads; 0: its own choice.")
    latency_budget_ms: Annotated[float, Field(gt=0)] | None = Field(
        None, description="Longest acceptable time from file to answer, in milliseconds; left out: none."
    )
    install: tuple[Line, ...] = Field(description="Shell lines that make a device of this kind ready for a bundle.")
    requirements: Annotated[tuple[Line, ...], Field(min_length=1)] = Field(
        description="Lines of the bundle's requirements.txt."
    )

    @model_validator(mode="after")
    def _pieces_fit(self) -> Target:
        if self.backend == "openvino/cpu" and self.form != "plain":
            raise ValueError('OpenVINO takes a model in the plain form: form = "plain"')
        if self.backend.startswith("cuda") and self.precision != "fp32":
            raise ValueError('OpenCV\'s CUDA backend computes int8 on the CPU: precision = "fp32"')
        if self.backend == "openvino/cpu" and len(self.arch) != 1:
            raise ValueError("the backend openvino/cpu carries a plugin for one arch: name one, x86_64 or aarch64")
        return self


def target_names() -> list[str]:
    """The shipped targets' names, sorted."""
    return sorted(path.stem for path in _folder().glob("*.toml"))


def read_target(name_or_path: str | Path) -> Target:
    """Reads and checks a target: a shipped one by name, or any .toml file by path.

    Raises ConfigError when there is none, or the file is not TOML, has an unknown key or a value out of range.
    """
    path = _find(name_or_path)
    try:
        raw = tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"cannot read the target {path}: {error}") from None
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(f"{path} is not valid TOML: {error}") from None
    try:
        return Target.model_validate(raw)
    except ValidationError as error:
        raise ConfigError(f"{path}: " + "; ".join(_fault(dict(e)) for e in error.errors())) from None


def _find(name_or_path: str | Path) -> Path:
    path = Path(name_or_path)
    if path.suffix == ".toml" or len(path.parts) > 1:
        if not path.is_file():
            raise ConfigError(f"no target file at {path}: give the path of a .toml file, or one of {_known()}")
        return path
    if str(name_or_path) not in target_names():
        raise ConfigError(f"no target named {str(name_or_path)!r}: give one of {_known()}, or the path of a .toml file")
    return _folder() / f"{name_or_path}.toml"


def _known() -> str:
    return ", ".join(target_names())


def _folder() -> Path:
    """targets/ in a checkout; targets.d inside an installed wheel (see pyproject.toml)."""
    package = Path(__file__).resolve().parent
    installed = package / "targets.d"
    return installed if installed.is_dir() else package.parent / "targets"


def _fault(detail: dict[str, object]) -> str:
    location = detail["loc"]
    where = ".".join(str(part) for part in location) if isinstance(location, tuple) else str(location)
    if detail["type"] == "extra_forbidden":
        return f"unknown key {where} (known: {', '.join(sorted(Target.model_fields))})"
    if detail["type"] == "missing":
        return f"the key {where} is missing"
    if detail["type"] == "value_error":  # of the keys together
        return str(detail["msg"]).removeprefix("Value error, ")
    return f"{where}: {detail['msg']}, got {detail['input']!r}"
