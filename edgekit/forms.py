"""The forms of a model: what it is made fast for. It is right in every engine that can read it."""

from __future__ import annotations

from typing import Literal, get_args

# OpenCV 5.0's own engine; 4.x's own CPU code; the same where 4.6 is among them, which cannot read Clip; and all else,
# which are OpenVINO and CUDA.
Form = Literal["opencv5", "opencv4", "opencv4.6", "plain"]
FORMS: tuple[Form, ...] = get_args(Form)
