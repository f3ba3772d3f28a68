"""How long does fine-tuning take to reach an accuracy? edgekit, and what people would pick instead.

    D=../shared/data/signs/Dataset
    uv run python benchmarks/finetune_speed.py edgekit $D --seed 0 --out edgekit-0.json
    uv run python benchmarks/finetune_speed.py plain $D --seed 0 --out plain-0.json
    uv run --with fastai python benchmarks/finetune_speed.py fastai $D --seed 0 --out fastai-0.json
    uv run python benchmarks/finetune_speed.py report *.json --target 0.97
    uv run python benchmarks/finetune_speed.py edgekit ../shared/data/magnetic-tiles --jpg-only --out tiles.json
    uv run python benchmarks/finetune_speed.py timm $D --device cuda --batch-size 128 --repeat 8 --all --out timm.json

All train the same network (EfficientNet-Lite0, ImageNet's weights) on the same images, and measure all the
validation images after each epoch. fastai lives with edgekit's own torch and timm: 2.8.12 with torch 2.15, timm 1.0.31.

edgekit   `finetune` with its defaults.
fastai    `vision_learner(...).fine_tune(...)` with its defaults: its head, Resize(224), aug_transforms(), batches of
          64, float32, a loader process a CPU. Images are not mirrored where edgekit would not. fastai does not turn a
          photo as its EXIF data say, and its validation images are cut to a square where edgekit's are stretched.
plain     Every parameter learns, in train mode, float32 and channels_last, with edgekit's own images, augmentation and
          decay: AdamW, batches of 32, label smoothing, the rate up and down once.
timm      As plain, in float32 or bfloat16, but with timm's loader (a process a CPU, a stream of its own that copies to
          the GPU and normalizes there), augmentation, optimizer, schedule and loss, as its train.py puts them together.
torchvision  As plain, with the loader, the transforms and the loss of its references/classification/train.py.

--device cuda compares throughput: `images_per_second` is of training alone, from an epoch's first batch asked for to
its last step done. --all lets everything learn in edgekit too, from images, and --repeat makes an epoch of so many
passes: 1,650 small photos are gone in half a second.

--epochs is edgekit's number; fastai trains the new head alone for one epoch before, and the other loops get one epoch
more too, so by default they see the training images seven times and edgekit six (fastai leaves out what does not fill a
batch). All but edgekit decode the images in each epoch.

The clock starts when the libraries are imported and the data set is checked, and runs through all that follows: the
network and its weights, edgekit's preflight, training, validation, what is written. `before_s` is what came before.
Macro F1 is of the validation images' classes, each counting alike.
"""

from __future__ import annotations

import argparse
import csv
import importlib.metadata
import itertools
import json
import math
import os
import statistics
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import torch
from timm import optim
from timm.data import create_loader
from timm.loss import LabelSmoothingCrossEntropy
from timm.scheduler import CosineLRScheduler
from torchvision.transforms import v2 as transforms

from edgekit import backbones, runner
from edgekit.artifacts import RunFolder
from edgekit.batches import batches
from edgekit.datasets import Dataset, read_dataset
from edgekit.finetune import finetune
from edgekit.jobs import Epoch, Watch
from edgekit.recipe import Recipe, suggest
from edgekit.samples import Sample
from edgekit.tasks import TASKS, classify

PACKAGES = ("edgekit", "torch", "torchvision", "timm", "fastai", "opencv-python-headless", "pillow")


@dataclass
class Row:
    """The validation images after an epoch. top1, macro_f1: 0..1."""

    epoch: int  # from 1
    seconds: float  # since the clock's start
    top1: float
    macro_f1: float | None
    history_s: float | None = None  # edgekit: what history.csv says of the epoch
    images_per_second: float | None = None  # of training alone


@dataclass
class Log:
    """The clock, and a row an epoch."""

    dataset: Dataset
    before_s: float = 0.0  # from the process's start to the clock's
    start_s: float = 0.0
    rows: list[Row] = field(default_factory=list)

    def start(self) -> None:
        self.before_s, self.start_s = process_age_s(), time.perf_counter()

    def add(self, top1: float, macro_f1: float | None, images_per_second: float | None) -> None:
        seconds = time.perf_counter() - self.start_s
        row = Row(len(self.rows) + 1, seconds, top1, macro_f1, images_per_second=images_per_second)
        self.rows.append(row)
        f1 = "" if macro_f1 is None else f", macro F1 {macro_f1:.4f}"
        speed = "" if images_per_second is None else f", {images_per_second:.0f} images/s"
        print(f"epoch {row.epoch}: {row.seconds:.1f} s, top-1 {top1:.4f}{f1}{speed}", flush=True)

    def add_answers(self, class_ids: Sequence[int], images_per_second: float | None = None) -> None:
        """class_ids: the best answer for each validation image, in order."""
        answers: list[runner.Results] = [[{"class_id": int(each), "score": 1.0}] for each in class_ids]
        figures = classify.metrics(answers, self.dataset.val, self.dataset.class_names)
        self.add(figures.top1, figures.macro_f1, images_per_second)


def process_age_s() -> float:
    """Linux: seconds since this process began."""
    ticks = int(Path("/proc/self/stat").read_text().rpartition(")")[2].split()[19])
    return time.clock_gettime(time.CLOCK_BOOTTIME) - ticks / os.sysconf("SC_CLK_TCK")


# ---------------------------------------------------------------------------------------------------------------
# The ways


def train_edgekit(_: argparse.Namespace, recipe: Recipe, log: Log) -> dict[str, Any]:
    measure = classify.metric
    macro_f1s: list[float] = []

    def metric(answers: Sequence[runner.Results], samples: Sequence[Sample]) -> float:
        """Listens to what `finetune` measures, which gives top-1 alone."""
        macro_f1s.append(classify.metrics(answers, samples, log.dataset.class_names).macro_f1)
        return measure(answers, samples)

    def on_epoch(epoch: Epoch) -> None:
        log.add(epoch.val_metric, macro_f1s[-1] if macro_f1s else None, epoch.images_per_second)

    classify.metric = metric
    with tempfile.TemporaryDirectory() as folder:
        log.start()
        run = finetune(recipe, log.dataset, Path(folder), watch=Watch(on_epoch=on_epoch)).run
        with RunFolder(run).history.open(newline="") as stream:
            for row, written in zip(log.rows, csv.DictReader(stream), strict=True):
                row.history_s = float(written["seconds"])
    return {"batch_size": recipe.train.batch_size}


@dataclass
class Loop:
    """What the loops of plain, timm and torchvision have in common."""

    model: torch.nn.Module
    optimizer: torch.optim.Optimizer
    loss: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
    step_schedule: Callable[[], None]

    def learn(self, args: argparse.Namespace, images: torch.Tensor, labels: torch.Tensor) -> None:
        """images: normalized, where the network is."""
        with torch.autocast(args.device, torch.bfloat16, enabled=args.bfloat16):
            loss = self.loss(self.model(images.contiguous(memory_format=torch.channels_last)), labels)
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        self.step_schedule()


def start_loop(args: argparse.Namespace, recipe: Recipe, log: Log) -> Loop:
    """Everything learns, by AdamW, and the rate goes up and down once."""
    torch.manual_seed(args.seed)
    settings = recipe.train
    model = TASKS["classify"].build(recipe, log.dataset.class_names, pretrained=True)
    model = model.to(args.device, memory_format=torch.channels_last)
    groups = optim.param_groups_weight_decay(model, settings.weight_decay)
    optimizer = torch.optim.AdamW(groups, lr=args.learning_rate)
    steps = (settings.epochs + 1) * math.ceil(len(log.dataset.train) / settings.batch_size)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, args.learning_rate, total_steps=steps, pct_start=settings.warmup_fraction, cycle_momentum=False
    )
    loss = torch.nn.CrossEntropyLoss(label_smoothing=settings.label_smoothing)
    return Loop(model, optimizer, loss, schedule.step)


def run_loop(
    args: argparse.Namespace,
    recipe: Recipe,
    log: Log,
    loop: Loop,
    epoch_batches: Callable[[int], Iterable[tuple[torch.Tensor, torch.Tensor]]],
) -> dict[str, Any]:
    """epoch_batches: an epoch's number → its images, normalized, and labels."""
    spec = spec_of(recipe, log.dataset)
    for epoch in range(recipe.train.epochs + 1):
        start, seen = time.perf_counter(), 0
        loop.model.train()
        for images, labels in epoch_batches(epoch):
            if len(labels) > 1:  # BatchNorm needs two
                loop.learn(args, *(each.to(args.device, non_blocking=True) for each in (images, labels)))
            seen += len(labels)
        if args.device == "cuda":
            torch.cuda.synchronize()
        speed = seen / (time.perf_counter() - start)
        loop.model.eval()
        with torch.inference_mode():
            outputs = [
                loop.model(torch.from_numpy(runner.normalize(batch.images, spec)).to(args.device)).argmax(1).cpu()
                for batch in batches(log.dataset.val, spec, recipe.train.batch_size)
            ]
        log.add_answers(torch.cat(outputs).tolist(), speed)
    options = {"learning_rate": args.learning_rate, "bfloat16": args.bfloat16}
    return {"batch_size": recipe.train.batch_size, **options}


def train_plain(args: argparse.Namespace, recipe: Recipe, log: Log) -> dict[str, Any]:
    log.start()
    spec = spec_of(recipe, log.dataset)

    def epoch_batches(epoch: int) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        seed, size = args.seed * 100_003 + epoch, recipe.train.batch_size
        for batch in batches(log.dataset.train, spec, size, augment=recipe.augment, seed=seed):
            yield torch.from_numpy(runner.normalize(batch.images, spec)), torch.as_tensor(batch.labels)

    return run_loop(args, recipe, log, start_loop(args, recipe, log), epoch_batches)


class Photos(torch.utils.data.Dataset[tuple[Any, int]]):
    """PIL images, changed by `transform`, and labels: what both libraries' loaders take."""

    def __init__(self, samples: Sequence[Sample], transform: Any = None) -> None:
        self.samples, self.transform = samples, transform

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> tuple[Any, int]:
        sample = self.samples[index]
        with PIL.Image.open(sample.path) as image:
            return self.transform(image.convert("RGB")), sample.label


def train_timm(args: argparse.Namespace, recipe: Recipe, log: Log) -> dict[str, Any]:
    log.start()
    loop = start_loop(args, recipe, log)
    spec = spec_of(recipe, log.dataset)
    loop.optimizer = optim.create_optimizer_v2(
        loop.model, "adamw", lr=args.learning_rate, weight_decay=recipe.train.weight_decay
    )
    steps = (recipe.train.epochs + 1) * math.ceil(len(log.dataset.train) / recipe.train.batch_size)
    warmup = round(recipe.train.warmup_fraction * steps)
    schedule = CosineLRScheduler(loop.optimizer, steps, warmup_t=warmup, t_in_epochs=False)
    counter = itertools.count(1)
    loop.step_schedule = lambda: schedule.step_update(next(counter))
    loop.loss = LabelSmoothingCrossEntropy(recipe.train.label_smoothing)
    loader = create_loader(
        Photos(log.dataset.train),
        (3, *spec.input_size),
        recipe.train.batch_size,
        is_training=True,
        hflip=recipe.augment.horizontal_flip,
        scale=args.crop_scale,
        interpolation="random",
        mean=tuple(value / 255 for value in spec.mean_255),
        std=tuple(value / 255 for value in spec.std_255),
        num_workers=args.workers or os.cpu_count(),
        pin_memory=args.device == "cuda",
        device=torch.device(args.device),
        use_prefetcher=args.device == "cuda",
    )
    return run_loop(args, recipe, log, loop, lambda epoch: loader)


def train_torchvision(args: argparse.Namespace, recipe: Recipe, log: Log) -> dict[str, Any]:
    log.start()
    spec = spec_of(recipe, log.dataset)
    transform = transforms.Compose(
        [
            transforms.RandomResizedCrop(spec.input_size, scale=args.crop_scale),
            transforms.RandomHorizontalFlip(recipe.augment.horizontal_flip),
            transforms.PILToTensor(),
            transforms.ToDtype(torch.float32, scale=True),
            transforms.Normalize([value / 255 for value in spec.mean_255], [value / 255 for value in spec.std_255]),
        ]
    )
    loader = torch.utils.data.DataLoader(
        Photos(log.dataset.train, transform),
        recipe.train.batch_size,
        shuffle=True,
        num_workers=args.workers or os.cpu_count() or 1,
        pin_memory=args.device == "cuda",
        persistent_workers=True,
    )
    return run_loop(args, recipe, log, start_loop(args, recipe, log), lambda epoch: loader)


def train_fastai(args: argparse.Namespace, recipe: Recipe, log: Log) -> dict[str, Any]:
    from fastai.vision import all as fastai

    dataset = log.dataset

    class Rows(fastai.Callback):
        def before_validate(self) -> None:
            self.found: list[np.ndarray] = []

        def after_batch(self) -> None:
            if not self.training:
                self.found.append(self.pred.argmax(dim=1).numpy())

        def after_epoch(self) -> None:
            log.add_answers(np.concatenate(self.found).tolist())

    log.start()
    fastai.set_seed(args.seed)
    size = spec_of(recipe, dataset).input_size
    block = fastai.DataBlock(
        blocks=(fastai.ImageBlock, fastai.CategoryBlock(vocab=list(dataset.class_names), sort=False)),
        get_x=lambda sample: sample.path,
        get_y=lambda sample: dataset.class_names[sample.label],
        splitter=fastai.IndexSplitter(range(len(dataset.train), len(dataset.train) + len(dataset.val))),
        item_tfms=fastai.Resize(size),
        batch_tfms=fastai.aug_transforms(do_flip=recipe.augment.horizontal_flip > 0),
    )
    samples = [*dataset.train, *dataset.val]
    loaders = block.dataloaders(samples, bs=args.batch_size or 64, num_workers=args.workers, device=torch.device("cpu"))
    # timm would fetch these from its hub. Normalize with the network's mean and deviation is vision_learner's own.
    published = backbones.build(recipe.model.backbone, backbones.IMAGENET_CLASSES, pretrained=True, weights=None)
    weights = {"pretrained_cfg_overlay": {"state_dict": published.state_dict()}}
    learner = fastai.vision_learner(
        loaders, recipe.model.backbone, metrics=fastai.accuracy, cbs=Rows(), path=Path(tempfile.gettempdir()), **weights
    )
    with learner.no_bar(), learner.no_logging():
        learner.fine_tune(recipe.train.epochs)
    check_answers(learner, log)
    return {"batch_size": loaders.bs, "workers": loaders.fake_l.num_workers}


def check_answers(learner: Any, log: Log) -> None:
    """fastai's own figure and this file's must be the same: the images are in the order that is taken for granted."""
    own = learner.recorder.values[-1][-1]
    if abs(own - log.rows[-1].top1) > 1e-6:
        sys.exit(f"fastai says top-1 {own}, and it is {log.rows[-1].top1} here")


def spec_of(recipe: Recipe, dataset: Dataset) -> runner.Spec:
    return backbones.default_spec(
        recipe.model.backbone,
        dataset.class_names,
        input_size=recipe.model.input_size,
        resize=recipe.preprocess.resize,
        interpolation=recipe.preprocess.interpolation,
    )


WAYS = {
    "edgekit": train_edgekit,
    "plain": train_plain,
    "timm": train_timm,
    "torchvision": train_torchvision,
    "fastai": train_fastai,
}


# ---------------------------------------------------------------------------------------------------------------
# The data


def link_photos(data: Path, folder: Path) -> Path:
    """A folder with links to the .jpg files of each class; the masks beside them stay away."""
    for photo in sorted(data.resolve().glob("*/*.jpg")):
        link = folder / data.resolve().name / photo.parent.name / photo.name
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(photo)
    return folder / data.resolve().name


def thinned(samples: tuple[Sample, ...], limit: int) -> tuple[Sample, ...]:
    """At most `limit` of them, from all classes."""
    return samples[:: max(1, math.ceil(len(samples) / limit))] if limit else samples


# ---------------------------------------------------------------------------------------------------------------
# The commands


def train(args: argparse.Namespace) -> None:
    if args.way == "fastai":
        from fastai.vision import all as _  # noqa: F401 (before the clock starts, as the others' imports)
    torch.set_num_threads(args.threads)
    with tempfile.TemporaryDirectory() as folder:
        data = link_photos(args.data, Path(folder)) if args.jpg_only else args.data
        dataset = read_dataset(data)
        dataset = replace(
            dataset,
            train=thinned(dataset.train, args.limit) * args.repeat,
            val=thinned(dataset.val, args.limit),
            problems=(),
        )
        recipe = suggest(str(data), dataset.class_names)
        given = {"seed": args.seed, "epochs": args.epochs, "batch_size": args.batch_size, "device": args.device}
        if args.all:
            given |= {"unfrozen_fraction": 1.0}
        settings = {key: value for key, value in given.items() if value is not None}
        recipe = recipe.model_copy(update={"train": recipe.train.model_copy(update=settings)})
        log = Log(dataset)
        options = WAYS[args.way](args, recipe, log)
        total_s = process_age_s()
    result = {
        "way": args.way,
        "data": args.data.resolve().name,
        "seed": args.seed,
        "epochs": recipe.train.epochs,
        "options": options,
        "rows": [asdict(row) for row in log.rows],
        "target": args.target,
        "time_to_target_s": seconds_to(log.rows, args.target),
        "final_top1": log.rows[-1].top1,
        "best_top1": max(row.top1 for row in log.rows),
        "final_macro_f1": log.rows[-1].macro_f1,
        "before_s": log.before_s,
        "total_s": total_s,
        "images": {"train": len(dataset.train), "val": len(dataset.val), "split_sha256": dataset.sha256},
        "versions": versions(),
        "cpu": runner.cpu_name(),
        "gpu": torch.cuda.get_device_name() if args.device == "cuda" else None,
        "threads": torch.get_num_threads(),
    }
    reached = result["time_to_target_s"]
    print(
        f"{args.target:.2%}: {'not reached' if reached is None else f'{reached:.1f} s'}; {total_s:.1f} s with imports"
    )
    if args.out:
        args.out.write_text(json.dumps(result, indent=1) + "\n")


def seconds_to(rows: Sequence[Row], target: float, metric: str = "top1") -> float | None:
    """When the metric, "top1" or "macro_f1", was first there; None: never."""
    return next((row.seconds for row in rows if (getattr(row, metric) or 0.0) >= target), None)


def versions() -> dict[str, str]:
    installed = {each.metadata["Name"].lower(): each.version for each in importlib.metadata.distributions()}
    return {name: installed[name] for name in PACKAGES if name in installed}


def report(args: argparse.Namespace) -> None:
    """Prints a Markdown table: a row for each way, data and settings; the files' seeds are its sample."""
    groups: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for file in args.files:
        run = json.loads(file.read_text())
        key = {name: run[name] for name in ("data", "way", "epochs", "options", "images", "cpu", "threads", "versions")}
        groups[json.dumps(key, sort_keys=True)].append(run)
    seconds, shares = "median (min to max)", "mean (min to max)"
    titles = [
        *("data", "way", "settings", "epochs", "seeds"),
        f"seconds to {args.target:.1%} {args.metric}, {seconds}",
        f"seconds of all epochs, {seconds}",
        *(f"final top-1, {shares}", f"best top-1, {shares}", f"final macro F1, {shares}", "images, train + val"),
    ]
    print(f"| {' | '.join(titles)} |")
    print("| --- | --- | --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: |")
    for runs in groups.values():
        first = runs[0]
        rows = [[Row(**row) for row in run["rows"]] for run in runs]
        reached = [seconds_to(each, args.target, args.metric) for each in rows]
        cells = [
            first["data"],
            first["way"],
            ", ".join(f"{name} {value}" for name, value in first["options"].items()),
            _counts(rows),
            " ".join(str(run["seed"]) for run in runs),
            _seconds([math.inf if each is None else each for each in reached]),
            _seconds([each[-1].seconds for each in rows]),
            _shares([each[-1].top1 for each in rows]),
            _shares([max(row.top1 for row in each) for each in rows]),
            _shares([f1 for each in rows if (f1 := each[-1].macro_f1) is not None]),
            f"{first['images']['train']} + {first['images']['val']}",
        ]
        print(f"| {' | '.join(cells)} |")


def _counts(rows: Sequence[Sequence[Row]]) -> str:
    counts = sorted({len(each) for each in rows})
    return " to ".join(str(each) for each in dict.fromkeys((counts[0], counts[-1])))


def _seconds(values: Sequence[float]) -> str:
    """A run that did not get there took longer than any other."""
    shown = [f"{value:.1f}" if math.isfinite(value) else "never" for value in _spread(statistics.median, values)]
    return f"{shown[0]} ({shown[1]} to {shown[2]})"


def _shares(values: Sequence[float]) -> str:
    if not values:
        return ""
    middle, low, high = (f"{100 * value:.2f}" for value in _spread(statistics.fmean, values))
    return f"{middle} % ({low} to {high})"


def _spread(middle: Any, values: Sequence[float]) -> tuple[float, float, float]:
    return middle(values), min(values), max(values)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="way", required=True)
    for way in WAYS:
        command = commands.add_parser(way)
        command.set_defaults(command=train)
        command.add_argument("data", type=Path, help="a folder with one folder a class")
        command.add_argument("--epochs", type=int, help="after the head's; default: edgekit's")
        command.add_argument("--seed", type=int, default=0)
        command.add_argument("--target", type=float, default=0.97, help="top-1, 0..1")
        command.add_argument("--batch-size", type=int, help="default: 32, of fastai 64")
        command.add_argument("--threads", type=int, default=os.cpu_count(), help="torch's; default: a CPU each")
        command.add_argument("--jpg-only", action="store_true", help="only the .jpg files are photos")
        command.add_argument("--limit", type=int, default=0, help="images a subset, to try the script")
        command.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
        command.add_argument("--repeat", type=int, default=1, help="an epoch is so many passes")
        command.add_argument("--all", action="store_true", help="edgekit trains all of the network")
        command.add_argument("--out", type=Path, metavar="FILE.json")
        if way in {"plain", "timm", "torchvision"}:
            command.add_argument("--learning-rate", type=float, default=1e-3, help="the peak")
            command.add_argument("--bfloat16", action="store_true", help="train under autocast")
        if way in {"timm", "torchvision"}:
            command.add_argument("--crop-scale", type=float, nargs=2, default=(0.5, 1.0), help="shares of the area")
        if way in {"timm", "torchvision", "fastai"}:
            command.add_argument("--workers", type=int, help="loader processes; default: a CPU each")
    command = commands.add_parser("report", help=report.__doc__)
    command.set_defaults(command=report)
    command.add_argument("files", type=Path, nargs="+")
    command.add_argument("--target", type=float, default=0.97, help="0..1")
    command.add_argument("--metric", choices=("top1", "macro_f1"), default="top1")
    args = parser.parse_args()
    args.command(args)


if __name__ == "__main__":
    main()
