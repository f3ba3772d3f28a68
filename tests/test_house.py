"""The house's own rules, read from the sources: who may import whom, and what must not be there."""

import ast
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "edgekit"

LAYER_0 = {"errors", "forms", "runner"}
RECORDS = LAYER_0 | {"recipe", "samples"}  # the run's choices and images; records that nouns may read
NOUNS = {
    "arm64",
    "artifacts",
    "backbones",
    "baseline",
    "batches",
    "blocks",
    "box_files",
    "change_points",
    "coco_files",
    "compiling",
    "cuda_layers",
    "cuda_wheel",
    "datasets",
    "demo",
    "device",
    "doctor",
    "environments",
    "fake_quantization",
    "feature_cache",
    "features",
    "frozen",
    "gradients",
    "graphs",
    "history",
    "jobs",
    "image_files",
    "image_folders",
    "latency",
    "latency_files",
    "latency_pictures",
    "launch",
    "learner",
    "listings",
    "loader",
    "markdown",
    "mask_files",
    "opencv",
    "overlays",
    "parity",
    "pictures",
    "plugin",
    "preflight",
    "progress",
    "quantization_pictures",
    "receiver",
    "recipe",
    "report",
    "samples",
    "sources",
    "targets",
    "tensorboard",
    "terminal",
    "threads",
    "time_budget",
    "training",
    "timing",
    "tuning",
    "tuning_pictures",
    "turns",
    "verdict",
    "voc_files",
    "worker",
    "workload",
    "yolo_files",
}
STAGES = {"finetune", "evaluate", "export", "verify", "quantize", "bundle", "bench", "compare"}
TASKS = {"tasks", "tasks.classify", "tasks.detect", "tasks.pyramid", "tasks.segment"}

# What each module may import from edgekit, beside itself. "" is edgekit/__init__.py (the version).
ALLOWED = {
    "errors": set(),
    "forms": set(),
    "runner": set(),
    "recipe": LAYER_0,
    "samples": LAYER_0,
    "targets": LAYER_0,
    "listings": LAYER_0,
    "image_files": LAYER_0 | {"listings"},
    "image_folders": LAYER_0 | {"listings"},
    "voc_files": LAYER_0 | {"listings"},
    "coco_files": LAYER_0 | {"listings"},
    "yolo_files": LAYER_0 | {"listings"},
    "box_files": RECORDS | {"listings", "voc_files", "coco_files", "yolo_files"},
    "mask_files": RECORDS | {"listings"},
    "datasets": RECORDS | {"box_files", "image_files", "image_folders", "listings", "mask_files"},
    "batches": RECORDS | {"datasets"},
    "backbones": RECORDS,
    "artifacts": RECORDS,
    "cuda_layers": LAYER_0,
    "environments": LAYER_0,
    "fake_quantization": LAYER_0,
    "feature_cache": LAYER_0 | {"environments"},
    "features": RECORDS | {"batches", "datasets", "feature_cache", "frozen"},
    "frozen": LAYER_0 | {"lowering"},
    "gradients": set(),
    "graphs": set(),
    "loader": RECORDS | {"batches"},
    "jobs": RECORDS | TASKS | {"backbones", "batches", "datasets"},
    "sources": RECORDS | {"batches", "features", "frozen", "jobs", "loader"},
    "learner": RECORDS | TASKS | {"fake_quantization", "gradients", "graphs", "jobs", "sources", "training"},
    "time_budget": RECORDS | {"jobs", "learner", "sources"},
    "tensorboard": LAYER_0 | {"jobs"},  # its record's type only
    "training": set(),
    "arm64": LAYER_0 | {"artifacts", "environments"},
    "device": LAYER_0 | {"launch", "receiver"},
    "receiver": set(),
    "latency": LAYER_0,
    "baseline": LAYER_0,
    "verdict": LAYER_0,
    "worker": LAYER_0,
    "blocks": LAYER_0 | {"latency", "verdict"},
    "markdown": set(),
    "change_points": set(),
    "latency_files": LAYER_0 | {"artifacts", "latency", "latency_pictures", "markdown"},
    "latency_pictures": LAYER_0 | {"history", "latency", "pictures"},
    "history": LAYER_0
    | {"artifacts", "blocks", "change_points", "latency", "latency_files", "latency_pictures", "markdown"},
    "threads": LAYER_0 | {"device", "worker"},
    "launch": LAYER_0 | {"artifacts", "plugin"},
    "parity": RECORDS,
    "progress": LAYER_0 | {"jobs", "terminal", "tuning"},  # of jobs and tuning their records' types only
    "overlays": RECORDS,
    "pictures": RECORDS | {"overlays"},
    "quantization_pictures": RECORDS | {"pictures"},
    "compiling": LAYER_0 | {"environments"},
    "plugin": LAYER_0 | {"artifacts", "compiling", "environments"},
    "cuda_wheel": LAYER_0 | {"compiling", "environments", "plugin"},
    "opencv": LAYER_0 | {"doctor", "plugin"},
    "preflight": LAYER_0 | {"backbones", "environments", "lowering", "parity"},
    "terminal": set(),
    "cli_latency": STAGES | NOUNS | LAYER_0,
    "cli_training": STAGES | NOUNS | LAYER_0,
    "report": RECORDS
    | {"arm64", "artifacts", "backbones", "datasets", "history", "latency", "latency_files", "overlays", "parity"}
    | {"pictures", "quantization_pictures", "threads", "timing", "workload"},
    "demo": RECORDS | {"artifacts"},
    "timing": RECORDS | {"backbones", "lowering"},
    "doctor": RECORDS | {""},
    "tuning": RECORDS | {"artifacts", "datasets", "tuning_pictures"},
    "tuning_pictures": RECORDS | {"pictures"},
    "turns": LAYER_0 | {"parity"},  # its record's type only
    "workload": LAYER_0 | {"artifacts", "launch"},
    "tasks": RECORDS | NOUNS | TASKS,
    "tasks.classify": RECORDS | NOUNS,
    "tasks.detect": RECORDS | NOUNS | {"tasks.pyramid"},
    "tasks.segment": RECORDS | NOUNS | {"tasks.pyramid"},
    "tasks.pyramid": RECORDS | NOUNS,
    "pipeline": STAGES | NOUNS | LAYER_0,
    "__main__": {"cli"},
    "cli": STAGES | NOUNS | LAYER_0 | {"", "pipeline", "cli_latency", "cli_training", "lowering", "int8"},
    "lowering": LAYER_0 | {"lowering"},
    "int8": LAYER_0 | {"int8"},
    **dict.fromkeys(STAGES, RECORDS | NOUNS | TASKS | {"", "lowering", "int8"}),
}


def module_name(path: Path) -> str:
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    return ".".join(part for part in parts if part != "__init__")


def edgekit_imports(path: Path) -> set[str]:
    """Every import of edgekit in a file, inside functions too, as module names without the package."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name.removeprefix("edgekit").lstrip(".") for alias in node.names if _ours(alias.name)}
        elif isinstance(node, ast.ImportFrom) and _ours(node.module or ""):
            base = (node.module or "").removeprefix("edgekit").lstrip(".")
            for alias in node.names:
                inner = f"{base}.{alias.name}".lstrip(".")
                found.add(inner if is_module(inner) else base)
        assert not (isinstance(node, ast.ImportFrom) and node.level), f"{path}: relative import"
    return found


def _ours(name: str) -> bool:
    return name == "edgekit" or name.startswith("edgekit.")


def is_module(name: str) -> bool:
    path = PACKAGE / name.replace(".", "/")
    return path.with_suffix(".py").is_file() or (path / "__init__.py").is_file()


def _package(name: str) -> str:
    """Rewrites, and the parts of int8 and of the report, share their package's rule."""
    package = name.split(".")[0]
    return package if package in ("lowering", "int8", "report") else name


SOURCES = sorted(PACKAGE.rglob("*.py"))


@pytest.mark.parametrize("path", SOURCES, ids=[str(p.relative_to(PACKAGE)) for p in SOURCES])
def test_imports_follow_the_layers(path: Path) -> None:
    name = module_name(path)
    rule = ALLOWED.get(_package(name))
    if name == "":
        rule = set()
    assert rule is not None, f"{name} is new: say in ALLOWED what it may import"
    imports = set(map(_package, edgekit_imports(path)))
    name = _package(name)
    assert imports <= rule | {name}, f"{name} may not import {sorted(imports - rule)}"


def test_no_stage_imports_another_stage() -> None:
    for stage in STAGES:
        others = edgekit_imports(PACKAGE / f"{stage}.py") & (STAGES - {stage})
        assert others == set(), f"{stage} imports {others}"


def test_every_stage_has_one_public_function_of_its_name() -> None:
    for stage in STAGES:
        tree = ast.parse((PACKAGE / f"{stage}.py").read_text(encoding="utf-8"))
        assert stage in {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}


def test_pixels_are_prepared_in_the_runner_only() -> None:
    """cv2.dnn's blob functions and image decoding exist once; anywhere else they would be a second definition."""
    for path in SOURCES:
        if path.name in ("runner.py",):
            continue
        text = path.read_text(encoding="utf-8")
        for call in ("blobFromImage", "cv2.imread(", "cv2.imdecode(", "cv2.dnn.read"):
            assert call not in text, f"{path.name} uses {call}: it belongs to runner.py"


def test_there_is_no_utils_and_no_machine_in_the_sources() -> None:
    assert not [p for p in SOURCES if "util" in p.name]
    for path in SOURCES:
        text = path.read_text(encoding="utf-8")
        assert "/work/" not in text and "/root/" not in text, path
