"""targets/*.toml: the shipped ones, where they are found, and what a faulty one says."""

import re
from pathlib import Path

import pytest

from edgekit import plugin, targets
from edgekit.errors import ConfigError
from edgekit.targets import Target, read_target, target_names

ROOT = Path(__file__).parents[1]

CPU = Target(
    name="cpu",
    description="x86-64 or arm64 CPU with the stock OpenCV wheels",
    arch=("x86_64", "aarch64", "arm64", "AMD64"),
    backend="opencv/cpu",
    form="opencv5",
    precision="fp32",
    opencv=">=4.6,<5.1",
    prove_on=("4.14.0.94", "5.0.0.93"),
    python=">=3.8",
    threads=0,
    latency_budget_ms=None,
    install=("python3 -m venv .venv", ".venv/bin/python -m pip install -r requirements.txt"),
    requirements=("numpy", "opencv-python-headless>=4.6,<5.1"),
)

MINIMAL = """
name = "board"
description = "a board"
arch = ["aarch64"]
opencv = ">=4.6"
prove_on = ["4.6.0.66"]
install = []
requirements = ["numpy"]
"""


def written(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "board.toml"
    path.write_text(text, encoding="utf-8")
    return path


def fault(tmp_path: Path, text: str) -> str:
    path = written(tmp_path, text)
    with pytest.raises(ConfigError) as raised:
        read_target(path)
    assert "\n" not in str(raised.value)
    return str(raised.value).removeprefix(str(path))


def test_cpu() -> None:
    assert read_target("cpu") == CPU


def test_every_shipped_target_is_valid_and_named_after_its_file() -> None:
    assert target_names() == sorted(path.stem for path in (ROOT / "targets").glob("*.toml"))
    assert [read_target(name).name for name in target_names()] == target_names()


def test_every_shipped_target_is_commented_and_consistent() -> None:
    for name in target_names():
        text = (ROOT / "targets" / f"{name}.toml").read_text(encoding="utf-8")
        named = set(re.findall(r"^(?:# )?(\w+) = ", text, flags=re.MULTILINE))
        assert named == set(Target.model_fields), "every key is shown, the unset ones as comments"
        target = read_target(name)
        assert target.arch and (target.backend.startswith("cuda") or name == "rpi-debian") != any(
            line.endswith(target.opencv) and line.startswith("opencv") for line in target.requirements
        ), "requirements.txt asks for the OpenCVs of the range, where PyPI has them"
        if target.backend == "openvino/cpu":
            assert (
                target.prove_on == ("openvino", plugin.OPENCV) and f"openvino=={plugin.OPENVINO}" in target.requirements
            )


def test_a_wheel_finds_its_own_copy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """pyproject.toml puts targets/ into the wheel as edgekit/targets.d."""
    assert '"targets" = "edgekit/targets.d"' in (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    installed = tmp_path / "edgekit" / "targets.d"
    installed.mkdir(parents=True)
    written(installed, MINIMAL)
    monkeypatch.setattr(targets, "__file__", str(tmp_path / "edgekit" / "targets.py"))
    assert target_names() == ["board"]
    assert read_target("board").name == "board"


def test_a_file_of_ones_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = written(tmp_path, MINIMAL)
    expected = Target(
        name="board",
        description="a board",
        arch=("aarch64",),
        opencv=">=4.6",
        prove_on=("4.6.0.66",),
        install=(),
        requirements=("numpy",),
    )
    assert read_target(path) == expected
    assert read_target(str(path)) == expected
    monkeypatch.chdir(tmp_path)
    assert read_target("board.toml") == expected
    assert (expected.backend, expected.form, expected.precision) == ("opencv/cpu", "opencv5", "fp32")
    assert (expected.python, expected.threads, expected.latency_budget_ms) == (">=3.8", 0, None)


def test_a_target_cannot_be_changed() -> None:
    with pytest.raises(ValueError, match="frozen"):
        CPU.threads = 4  # type: ignore[misc]


@pytest.mark.parametrize("name", ["gpu", "CPU", "", "cpu "])
def test_an_unknown_name(name: str) -> None:
    with pytest.raises(ConfigError) as raised:
        read_target(name)
    known = ", ".join(target_names())
    assert str(raised.value) == f"no target named {name!r}: give one of {known}, or the path of a .toml file"


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    path = tmp_path / "board.toml"
    with pytest.raises(ConfigError) as raised:
        read_target(path)
    known = ", ".join(target_names())
    assert str(raised.value) == f"no target file at {path}: give the path of a .toml file, or one of {known}"


def test_not_toml(tmp_path: Path) -> None:
    assert fault(tmp_path, "name = cpu").startswith(" is not valid TOML: Invalid value (at line 1")


def test_not_text(tmp_path: Path) -> None:
    path = tmp_path / "board.toml"
    path.write_bytes(b"\xff\xfe")
    with pytest.raises(ConfigError, match=rf"^cannot read the target {re.escape(str(path))}: 'utf-8' codec"):
        read_target(path)


def test_an_unknown_key(tmp_path: Path) -> None:
    known = (
        "arch, backend, description, form, install, latency_budget_ms, name, opencv, precision, prove_on, python, "
        "requirements, threads"
    )
    assert fault(tmp_path, MINIMAL + "thread = 2\n") == f": unknown key thread (known: {known})"


def test_every_missing_key_is_named(tmp_path: Path) -> None:
    keys = ("name", "description", "arch", "opencv", "prove_on", "install", "requirements")
    assert fault(tmp_path, "threads = 1\n") == ": " + "; ".join(f"the key {key} is missing" for key in keys)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("threads = -1", "threads: Input should be greater than or equal to 0, got -1"),
        ("latency_budget_ms = 0", "latency_budget_ms: Input should be greater than 0, got 0"),
        (
            'backend = "cuda"',
            "backend: Input should be 'opencv/cpu', 'openvino/cpu', 'cuda/fp32' or 'cuda/fp16', got 'cuda'",
        ),
        ('backend = "openvino/cpu"', 'OpenVINO takes a model in the plain form: form = "plain"'),
        ('form = "ort"', "form: Input should be 'opencv5', 'opencv4', 'opencv4.6' or 'plain', got 'ort'"),
        ('precision = "int4"', "precision: Input should be 'fp32' or 'auto', got 'int4'"),
        ('python = "3.8"', "python: String should match pattern"),
        ('python = ">=3.8, <4"', "python: String should match pattern"),
    ],
)
def test_a_value_out_of_range(line: str, message: str, tmp_path: Path) -> None:
    assert fault(tmp_path, MINIMAL + line).startswith(f": {message}")


@pytest.mark.parametrize(
    ("old", "new", "where"),
    [
        ('name = "board"', 'name = "../board"', "name"),
        ('prove_on = ["4.6.0.66"]', "prove_on = []", "prove_on"),
        ('prove_on = ["4.6.0.66"]', 'prove_on = ["4.6.0"]', "prove_on.0"),
        ('arch = ["aarch64"]', "arch = []", "arch"),
        ("install = []", 'install = ["one\\ntwo"]', "install.0"),
        ('requirements = ["numpy"]', "requirements = []", "requirements"),
        ('description = "a board"', 'description = ""', "description"),
    ],
)
def test_a_value_that_would_spoil_a_bundle(old: str, new: str, where: str, tmp_path: Path) -> None:
    assert old in MINIMAL
    assert fault(tmp_path, MINIMAL.replace(old, new)).startswith(f": {where}: ")
