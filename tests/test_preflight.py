"""What an OpenCV cannot run is refused before training, with the reason and a backbone that can."""

from pathlib import Path

import cv2
import numpy as np
import pytest
import torch

from edgekit import backbones, runner
from edgekit.backbones import BACKBONES
from edgekit.environments import opencv_python
from edgekit.errors import ConfigError, SetupError
from edgekit.preflight import preflight

HERE = "{}.{}".format(*runner.opencv_version())


class Odd(torch.nn.Module):
    """A network with an operator that cv2.dnn lacks."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = torch.nn.Conv2d(3, 4, 3, padding=1)

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        patches = torch.nn.functional.unfold(self.conv(image), 3)
        return torch.nn.functional.fold(patches, (64, 64), 3).mean((2, 3))


@pytest.fixture
def photo(tmp_path: Path) -> Path:
    blocks = np.random.default_rng(0).integers(0, 256, (6, 8, 3), dtype=np.uint8)
    cv2.imwrite(str(tmp_path / "photo.png"), cv2.resize(blocks, (90, 70)))
    return tmp_path / "photo.png"


def spec_of(name: str, size: int) -> runner.Spec:
    names = ("a", "b", "c", "d")
    return backbones.default_spec(name, names, input_size=(size, size), resize="stretch", interpolation="linear")


def test_recommended_backbones_that_were_proved_here_are_not_tried() -> None:
    for name in BACKBONES:
        # An untrained network and no image: trying it would raise.
        model = torch.nn.Identity()
        preflight(name, model, spec_of(name, 96), ("logits",), [], opencv=("5.0.0.93", "4.14", "4.10.0.84"))


def test_a_network_that_this_opencv_cannot_run(photo: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        preflight("odd", Odd(), spec_of("resnet18", 64), ("logits",), [photo])
    message = str(caught.value)
    assert message.startswith(f"odd does not run on OpenCV {cv2.__version__} as torch computes it: OpenCV")
    assert "Col2Im" in message
    lightest = min(BACKBONES.values(), key=lambda row: row.params)
    assert message.endswith(f"Train {lightest.name}, which does, or see `edgekit backbones`")


@pytest.mark.slow
def test_another_network_is_tried_and_passes(photo: Path) -> None:
    name = "mnasnet_small"
    assert name not in BACKBONES
    model = backbones.build(name, 4, pretrained=False, weights=None)
    preflight(name, model, spec_of(name, 64), ("logits",), [photo])
    assert not model.training


@pytest.mark.slow
def test_an_opencv_that_cannot_run_it_though_this_one_can(photo: Path) -> None:
    name = "fasternet_t0"
    assert "4.6" not in BACKBONES[name].opencv
    try:
        opencv_python("4.6")
    except SetupError as error:
        pytest.skip(str(error))
    model = backbones.build(name, 4, pretrained=False, weights=None)
    with pytest.raises(
        ConfigError, match=r"fasternet_t0 does not run on OpenCV 4\.6\.0 .*classic engine: raised"
    ) as caught:
        preflight(name, model, spec_of(name, 64), ("logits",), [photo], opencv=("4.6",))
    instead = str(caught.value).partition("Train ")[2].partition(",")[0]
    assert "4.6" in BACKBONES[instead].opencv
