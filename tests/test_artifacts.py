import hashlib
import tarfile
from pathlib import Path

import pytest

from edgekit import runner
from edgekit.artifacts import (
    Manifest,
    Tolerances,
    file_table,
    open_run,
    read_json,
    replacing,
    replacing_folder,
    unused_name,
    write_archive,
    write_json,
    write_text,
)
from edgekit.errors import ArtifactError


def test_a_file_is_written_whole_or_not_at_all(tmp_path: Path) -> None:
    file = tmp_path / "new" / "a.json"
    write_json(file, {"ü": 1})
    assert file.read_text(encoding="utf-8") == '{\n  "ü": 1\n}\n'
    with pytest.raises(ZeroDivisionError), replacing(file) as temporary:
        temporary.write_text("half")
        raise ZeroDivisionError
    assert read_json(file) == {"ü": 1}
    assert [p.name for p in file.parent.iterdir()] == ["a.json"]


def test_a_file_written_is_readable_by_others(tmp_path: Path) -> None:
    write_text(tmp_path / "a", "x")
    plain = tmp_path / "b"
    plain.write_text("x")
    assert (tmp_path / "a").stat().st_mode == plain.stat().st_mode


def test_a_place_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(ArtifactError, match="cannot write"):
        write_text(tmp_path / "file" / "a", "x")
    with (
        pytest.raises(ArtifactError, match="is a file where a folder was to be made"),
        replacing_folder(tmp_path / "file"),
    ):
        pass


def test_a_folder_is_replaced_whole(tmp_path: Path) -> None:
    folder = tmp_path / "bundle"
    for content in ("one", "two"):
        with replacing_folder(folder) as temporary:
            (temporary / content).write_text(content)
    assert [p.name for p in folder.iterdir()] == ["two"]
    with pytest.raises(ZeroDivisionError), replacing_folder(folder) as temporary:
        (temporary / "three").write_text("x")
        raise ZeroDivisionError
    assert [p.name for p in folder.iterdir()] == ["two"]
    assert [p.name for p in tmp_path.iterdir()] == ["bundle"]


@pytest.mark.parametrize("content", [b"{", b"[1]", b"\xff"])
def test_damaged_json(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "a.json").write_bytes(content)
    with pytest.raises(ArtifactError, match="damaged"):
        read_json(tmp_path / "a.json")


def test_a_run_that_is_none_or_not_finished(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match=r"no run folder at .*edgekit finetune DATA"):
        open_run(tmp_path / "none")
    with pytest.raises(ArtifactError, match=r"has no recipe.toml .*is it a run\?"):
        open_run(tmp_path)
    for name in ("recipe.toml", "spec.json"):
        (tmp_path / name).write_text("")
    with pytest.raises(ArtifactError, match=r"has no model.safetensors .*--resume"):
        open_run(tmp_path)


def test_names_are_never_taken_twice(tmp_path: Path) -> None:
    for expected in ("a", "a-2", "a-3"):
        path = unused_name(tmp_path, "a")
        assert path.name == expected
        path.mkdir()


def test_an_archive_depends_on_the_content_alone(tmp_path: Path) -> None:
    digests = []
    for place, names in (("x", "ab"), ("y", "ba")):
        folder = tmp_path / place / "bundle"
        (folder / "check").mkdir(parents=True)
        for name in names:
            (folder / "check" / name).write_text(name)
        (folder / "run.py").write_text("print()")
        write_archive(folder, tmp_path / place / "bundle.tar.gz")
        digests.append(hashlib.sha256((tmp_path / place / "bundle.tar.gz").read_bytes()).hexdigest())
    assert digests[0] == digests[1]
    with tarfile.open(tmp_path / "x" / "bundle.tar.gz") as tar:
        assert [(m.name, m.mode, m.mtime, m.uid) for m in tar] == [
            ("bundle/check/a", 0o644, 0, 0),
            ("bundle/check/b", 0o644, 0, 0),
            ("bundle/run.py", 0o755, 0, 0),
        ]


def test_file_table(tmp_path: Path) -> None:
    (tmp_path / "d").mkdir()
    (tmp_path / "d" / "b").write_bytes(b"abc")
    digest = "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"  # FIPS 180-2, B.1
    assert file_table(tmp_path) == {"d/b": {"sha256": digest, "size_bytes": 3}}


def test_a_manifest_signs_itself() -> None:
    manifest = Manifest(
        edgekit_version="0",
        name="n",
        target="cpu",
        arch=("x86_64",),
        spec={},
        backend="opencv/cpu",
        form="opencv5",
        precision="fp32",
        threads=0,
        proved=(),
        refused=(),
        files={},
        tolerances=Tolerances(outputs=1e-3, outputs_other_pixels=0.05, outputs_16bit=0.05),
        latency_budget_ms=None,
        provenance={},
    ).to_json()
    assert manifest["schema"] == "edgekit.bundle/1"
    assert manifest["sha256"] == runner.manifest_sha256(manifest)
    assert manifest["sha256"] != runner.manifest_sha256({**manifest, "threads": 1})
