"""verify on real OpenCVs: what is right, what does not run, and what cannot be had; and what a bundle makes of it."""

import json
import shutil
import subprocess
from pathlib import Path

import pytest

from edgekit import runner
from edgekit.artifacts import read_json
from edgekit.bundle import bundle
from edgekit.environments import opencv_python
from edgekit.errors import ArtifactError, ParityError, SetupError
from edgekit.export import export
from edgekit.targets import read_target
from edgekit.verify import Verified, unproved, verify

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def verified(finished_run: Path, tmp_path_factory: pytest.TempPathFactory) -> Verified:
    """EfficientNet-Lite0, made for the classic engine: 4.6 cannot read its Clip, 4.14 is right, there is no 4.99."""
    try:
        for version in ("4.6", "4.14.0.94"):
            opencv_python(version)
    except SetupError as error:
        pytest.skip(str(error))
    run = tmp_path_factory.mktemp("verify") / "digits"
    shutil.copytree(finished_run, run)
    export(run, "plain")
    return verify(run, ["4.6", "4.14.0.94", "4.99"])


def test_each_version_has_its_verdicts(verified: Verified) -> None:
    assert (verified.failed, verified.not_proved) == (("4.6",), ("4.99",))
    (old,), (right,), (missing,) = verified.verdicts.values()
    assert (old.engine, old.version, old.status) == ("opencv-classic", "4.6.0", "raised")
    assert "Clip" in old.first_difference
    assert (right.engine, right.version, right.status, right.message) == ("opencv-classic", "4.14.0", "ok", "")
    assert right.relative_error is not None and right.relative_error < 1e-4
    assert right.end_to_end_error is not None and right.end_to_end_error < 1e-4
    assert right.best_ms is not None and right.best_ms > 0
    assert (missing.engine, missing.version, missing.status) == ("opencv", "4.99", "not proved")
    assert missing.message.startswith("cannot make an environment with opencv-python-headless==4.99.*")


def test_the_rows_are_kept_beside_those_of_the_export(verified: Verified, finished_run: Path) -> None:
    rows = [(row["engine"], row["version"]) for row in read_json(verified.run / "parity.json")["verdicts"]]
    exported = [(row["engine"], row["version"]) for row in read_json(finished_run / "parity.json")["verdicts"]]
    added = [("opencv-classic", "4.6.0"), ("opencv-classic", "4.14.0"), ("opencv", "4.99")]
    assert rows == exported + added
    assert unproved(verified.run, ["4.6.0.66", "4.10.0.84", "4.14.0.94", "5.0.0.93"]) == ("4.6.0.66", "4.10.0.84")


def test_the_bundle_names_what_was_proved_and_what_is_refused(verified: Verified, tmp_path: Path) -> None:
    target = read_target("cpu").model_copy(update={"form": "plain", "prove_on": ("4.6.0.66", "4.14.0.94")})
    built = bundle(verified.run, target, tmp_path)
    manifest = runner.read_manifest(built.path)
    assert (list(built.proved), list(built.refused)) == (manifest["proved"], manifest["refused"])
    here = "{}.{}.{}".format(*runner.opencv_version())
    assert manifest["proved"] == [
        {"opencv": "4.14.0", "engine": "classic"},
        *({"opencv": here, "engine": engine} for engine in runner.engines()),
    ]
    assert manifest["refused"] == [{"opencv": "4.6.0", "engine": "classic", "reason": "raised"}]
    requirements = (built.path / "requirements.txt").read_text(encoding="utf-8").split()
    assert requirements == ["numpy", "opencv-python-headless>=4.6,<5.1,!=4.6.*"]


def test_a_model_in_another_form_is_not_packed(verified: Verified, tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match=r"not in the form opencv5, .* run `edgekit export .* --form opencv5`"):
        bundle(verified.run, read_target("cpu"), tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_a_target_on_which_nothing_is_right_gets_no_bundle(verified: Verified, tmp_path: Path) -> None:
    target = read_target("cpu").model_copy(update={"form": "plain", "prove_on": ("4.6.0.66",)})
    with pytest.raises(ParityError, match=r"every OpenCV of the target cpu \(4\.6\.0\.66\): choose another backbone"):
        bundle(verified.run, target, tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_the_device_refuses_an_opencv_that_was_found_wrong(verified: Verified, tmp_path: Path) -> None:
    built = bundle(verified.run, read_target("cpu").model_copy(update={"form": "plain"}), tmp_path)
    command = [str(opencv_python("4.6")), "-I", str(built.path / "run.py"), "check"]
    answer = subprocess.run(command, capture_output=True, text=True, check=False)
    assert answer.returncode == 2 and answer.stdout == ""
    assert "OpenCV 4.6.0 does not compute this network as it was trained (engine: classic)." in answer.stderr
    assert "Install one that does: 4.14.0 (classic)" in answer.stderr


def test_a_run_that_was_not_exported(finished_run: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(finished_run, run)
    (run / "model.onnx").unlink()
    with pytest.raises(ArtifactError, match=r"has no proved model.onnx: run `edgekit export"):
        verify(run, ["4.99"])


def test_what_is_no_version_is_not_proved(finished_run: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(finished_run, run)
    done = verify(run, ["newest"])
    assert done.not_proved == ("newest",)
    assert json.loads((run / "parity.json").read_text(encoding="utf-8"))["ok"]
