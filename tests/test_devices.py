"""The bundle where only numpy and one OpenCV are: environments like a device's, for each OpenCV that devices have."""

import json
import subprocess
from pathlib import Path

import pytest

from edgekit import runner, tasks
from edgekit.artifacts import RunFolder
from edgekit.batches import batches
from edgekit.bundle import bundle
from edgekit.datasets import read_split
from edgekit.environments import opencv_python
from edgekit.errors import SetupError
from edgekit.targets import read_target

OPENCV = ("4.10.0.84", "4.14.0.94", "5.0.0.93")


@pytest.fixture(scope="module", params=OPENCV)
def device_python(request: pytest.FixtureRequest) -> Path:
    """The interpreter of an environment with opencv-python-headless of one version and what that needs: numpy."""
    try:
        return opencv_python(request.param)
    except SetupError as error:
        pytest.skip(str(error))


def run_py(python: Path, folder: Path, *args: str, stdin: str = "") -> subprocess.CompletedProcess[str]:
    command = [str(python), "-I", str(folder / "run.py"), *args]
    return subprocess.run(command, capture_output=True, text=True, input=stdin, check=False)


@pytest.mark.slow
def test_the_device_answers_as_torch_from_file_bytes_to_label(
    device_python: Path, finished_run: Path, tmp_path: Path
) -> None:
    built = bundle(finished_run, read_target("cpu"), tmp_path).path
    packages = subprocess.run(
        [
            str(device_python),
            "-I",
            "-c",
            "import os, numpy; print(sorted(os.listdir(os.path.dirname(numpy.__path__[0]))))",
        ],
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    assert "torch" not in packages and "onnx" not in packages
    checked = json.loads(run_py(device_python, built, "check", "--json").stdout)
    assert checked["ok"] and len(checked["images"]) == 8
    assert all(row["pixels_identical"] for row in checked["images"])
    run = RunFolder(finished_run)
    spec, samples = run.read_spec(), read_split(run.split).val
    model = tasks.load(run)
    expected = [
        spec.class_names[int(logits.argmax())]
        for batch in batches(samples, spec, 32)
        for logits in tasks.forward(model, runner.normalize(batch.images, spec), "classify")["logits"]
    ]
    names = "".join(f"{sample.path}\n" for sample in samples)
    answer = run_py(device_python, built, "infer", "--list", "-", "--top-k", "1", stdin=names)
    assert answer.returncode == 0, answer.stderr
    assert [json.loads(line)["results"][0]["label"] for line in answer.stdout.splitlines()] == expected
    here = checked["conditions"]["opencv"]
    assert ("not proved on OpenCV" in answer.stderr) == (here != runner.cv2.__version__)
