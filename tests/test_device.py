"""Devices: this machine, and one over ssh, which is a real OpenSSH server on the loopback."""

import ast
import json
import os
import platform
import select
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import bundles
import pytest
from hypothesis import given
from hypothesis import strategies as st
from sshd import Sshd

from edgekit import device, receiver, runner
from edgekit.device import Device, Placed, ask, command, failure, here, over_ssh, place
from edgekit.errors import ArtifactError, SetupError, UsageError


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bundle to use, not to change. Its path has blanks, and letters of another alphabet."""
    return bundles.write_bundle(tmp_path_factory.mktemp("built") / "bundle ж")


@pytest.fixture
def own(tmp_path: Path) -> Path:
    """A bundle that no device has yet."""
    return bundles.write_bundle(tmp_path / "bundle", name=f"own {tmp_path.name}")


@pytest.fixture
def board(sshd: Sshd) -> Device:
    return over_ssh(sshd.host, sys.executable, sshd.ssh_config)


@pytest.fixture
def wrapper(tmp_path: Path) -> Callable[[str], str]:
    """A Python that does something before."""

    def write(line: str) -> str:
        path = tmp_path / "the board's python"
        path.write_text(f"#!/bin/sh\n{line}\n")
        path.chmod(0o755)
        return str(path)

    return write


def there(sshd: Sshd) -> Path:
    return sshd.home / ".cache" / "edgekit" / "bundles"


# ---------------------------------------------------------------------------------------------------------------
# This machine


def test_here_is_the_bundle_itself(built: Path) -> None:
    placed = place(here(), built)
    assert placed == Placed(Device(platform.node(), "", None, "", None), built, str(built))
    assert command(placed, "info", "--json") == [sys.executable, str(built / "run.py"), "info", "--json"]
    assert ask(placed, "info", "--json")["name"] == "tiny"


def test_here_takes_another_python(built: Path) -> None:
    placed = place(here("/bin/sh"), built)  # any program will do
    assert command(placed, "check") == ["/bin/sh", str(built / "run.py"), "check"]
    with pytest.raises(SetupError, match="no Python at '/opt/python9' on this machine: say which with --python"):
        place(here("/opt/python9"), built)


def test_a_bundle_that_was_changed_is_not_placed(own: Path) -> None:
    (own / "model.onnx").write_bytes(b"")
    with pytest.raises(ArtifactError, match=r"model\.onnx is not the file that was built: copy the bundle again"):
        place(here(), own)
    with pytest.raises(ArtifactError, match="no bundle at"):
        place(here(), own / "nowhere")


# ---------------------------------------------------------------------------------------------------------------
# Addresses


@pytest.mark.parametrize(
    ("address", "destination", "port"),
    [
        ("board", "board", None),
        ("pi@board.local", "pi@board.local", None),
        ("pi@10.0.0.7:2222", "pi@10.0.0.7", 2222),
        ("jetson_1:22", "jetson_1", 22),
        ("pi@[fe80::1%eth0]:22", "pi@fe80::1%eth0", 22),
        ("[::1]", "::1", None),
        ("first.last@host", "first.last@host", None),
        ("DOMAIN\\user@host", "DOMAIN\\user@host", None),
    ],
)
def test_an_address_is_taken_apart(address: str, destination: str, port: int | None) -> None:
    assert over_ssh(address) == Device(address, destination, port, "python3", None)


@pytest.mark.parametrize(
    "address",
    [
        *("", "@host", "user@", "host:", "host:0", "host:65536", "host:ssh", "a@b@c", "::1", "[::1", "host name"),
        *("-oProxyCommand=id", "-host", "user@-host", "-user@host", "host\n", "a;b", "$(id)", "`id`", "h|id", "[-x]"),
    ],
)
def test_what_is_no_address_is_refused(address: str) -> None:
    with pytest.raises(UsageError, match="is no device: give user@host, user@host:port, or a Host of your ssh config"):
        over_ssh(address)


@given(st.text(max_size=20))
def test_no_address_is_an_option(address: str) -> None:
    try:
        destination = over_ssh(address).destination
    except UsageError:
        return
    assert not destination.startswith("-") and "@-" not in destination
    assert not set(destination) & set(" \t\r\n;&|$`'\"<>(){}*?!#~=")


def test_a_missing_configuration_is_told(tmp_path: Path) -> None:
    with pytest.raises(SetupError, match="no ssh configuration at "):
        over_ssh("board", ssh_config=tmp_path / "none")


# ---------------------------------------------------------------------------------------------------------------
# Over ssh


def test_the_device_gets_the_bundles_files_and_no_others(board: Device, sshd: Sshd, own: Path) -> None:
    (own / "notes.txt").write_text("mine")
    placed = place(board, own)
    manifest = json.loads((own / "manifest.json").read_text("utf-8"))
    name = f"own_{own.parent.name}-cpu-{manifest['sha256'][:12]}"
    assert placed == Placed(board, own, str(there(sshd) / name))
    copied = {path.relative_to(placed.folder).as_posix() for path in Path(placed.folder).rglob("*") if path.is_file()}
    assert copied == {*manifest["files"], "manifest.json"}
    assert all((own / file).read_bytes() == Path(placed.folder, file).read_bytes() for file in copied)
    local = ask(place(here(), own), "info", "--json")
    assert ask(placed, "info", "--json") == local


def test_a_bundle_is_copied_once_and_another_one_beside_it(
    board: Device, own: Path, wrapper: Callable[[str], str]
) -> None:
    folder = Path(place(board, own).folder)
    os.utime(folder, (0, 0))
    asks_only = wrapper(f'[ $# = 3 ] || exit 9; exec {shlex.quote(sys.executable)} "$@"')  # -c SOURCE NAME
    assert place(replace(board, python=asks_only), own).folder == str(folder)
    assert time.time() - folder.stat().st_mtime < 86400  # it was asked for, so it stays
    bundles.sign(own, latency_budget_ms=5.0)
    assert place(board, own).folder != str(folder)
    assert folder.is_dir()


def test_what_nobody_asked_for_in_a_month_goes(board: Device, sshd: Sshd, own: Path) -> None:
    old, young = there(sshd) / "old", there(sshd) / "young"
    for folder, days in ((old, 31), (young, 29)):
        (folder / "check").mkdir(parents=True)
        os.utime(folder, (time.time() - days * 86400,) * 2)
    place(board, own)
    assert (old.exists(), young.exists()) == (False, True)


def test_a_worker_is_driven_through_its_pipes_and_ends_with_its_input(board: Device, built: Path) -> None:
    line = command(place(board, built), "worker", "--threads", "1")
    with subprocess.Popen(line, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as child:
        assert child.stdin and child.stdout
        assert json.loads(child.stdout.readline())["conditions"]["threads"] == 1
        for count in (1, 3):
            child.stdin.write(json.dumps({"iterations": count}) + "\n")
            child.stdin.flush()
            assert len(json.loads(child.stdout.readline())["wall_ns"]["forward"]) == count
        child.stdin.close()
        assert child.stdout.read() == ""
    assert child.returncode == 0


def processes(words: str) -> list[int]:
    """Those of this machine with the words in their command line, but for shells and ssh."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            line = path.read_bytes().decode(errors="replace").split("\0")
        except OSError:  # it has just ended
            continue
        if words in " ".join(line) and Path(line[0]).name not in ("sh", "bash", "dash", "ssh"):
            found.append(int(path.parent.name))
    return found


@pytest.mark.skipif(not hasattr(os, "pidfd_open"), reason="this system cannot wait for any process")
@pytest.mark.parametrize("shared", [True, False])
def test_ending_ssh_ends_the_worker_there(board: Device, own: Path, shared: bool) -> None:
    placed = place(board, own)
    if not shared:  # as where the shared connection has ended meanwhile
        subprocess.run([*device._ssh(board, *device._shared(board), "-O", "exit")], check=True, capture_output=True)
    with subprocess.Popen(command(placed, "worker"), stdin=subprocess.PIPE, stdout=subprocess.PIPE) as child:
        assert child.stdout
        child.stdout.readline()
        (worker,) = processes(f"{placed.folder}/run.py worker")
        descriptor = os.pidfd_open(worker)
        child.kill()
        ended, _, _ = select.select([descriptor], [], [], 30)
        os.close(descriptor)
    assert ended


def test_commands_share_a_connection(sshd: Sshd, own: Path, tmp_path: Path) -> None:
    config = tmp_path / "ssh_config"
    shutil.copyfile(sshd.ssh_config, config)
    placed = place(over_ssh(sshd.host, sys.executable, config), own)
    config.write_text("Host *\n  ProxyCommand false\n")  # a new connection would fail
    assert ask(placed, "info", "--json")["target"] == "cpu"


def test_a_configuration_for_people_does_not_get_in_the_way(sshd: Sshd, own: Path, tmp_path: Path) -> None:
    config = tmp_path / "ssh_config"
    extra = f"RemoteCommand echo no\nRequestTTY force\nLocalForward 127.0.0.1:{sshd.port} localhost:1\n"
    extra += f"ControlMaster auto\nControlPath {tmp_path}/nowhere/%C\nControlPersist yes\nExitOnForwardFailure yes\n"
    config.write_text(extra + sshd.ssh_config.read_text())
    placed = place(over_ssh(sshd.host, sys.executable, config), own)
    assert ask(placed, "info", "--json")["target"] == "cpu"


def test_a_host_of_the_configuration_may_be_given_with_user_and_port(sshd: Sshd, own: Path) -> None:
    for address in (f"{sshd.user}@127.0.0.1:{sshd.port}", f"127.0.0.1:{sshd.port}", f"{sshd.user}@{sshd.host}"):
        placed = place(over_ssh(address, sys.executable, sshd.ssh_config), own)
        assert ask(placed, "info", "--json")["target"] == "cpu"


def test_pythons_path_may_have_blanks_and_quotes_and_begin_at_home(
    sshd: Sshd, own: Path, wrapper: Callable[[str], str]
) -> None:
    python = wrapper(f'exec {shlex.quote(sys.executable)} "$@"')
    placed = place(over_ssh(sshd.host, python, sshd.ssh_config), own)
    assert ask(placed, "info", "--json")["target"] == "cpu"
    line = command(place(over_ssh(sshd.host, python, sshd.ssh_config), own), "check", "--bundle", "a b'c")
    there = shlex.split(shlex.split(line[-1])[2].removesuffix("; exit $?"))
    assert there == [python, f"{placed.folder}/run.py", "check", "--bundle", "a b'c"]
    python = f"~/{os.path.relpath(python, Path.home())}"
    assert ask(place(over_ssh(sshd.host, python, sshd.ssh_config), own), "info", "--json")["target"] == "cpu"


# ---------------------------------------------------------------------------------------------------------------
# What can go wrong


def test_where_nothing_listens(sshd: Sshd, built: Path) -> None:
    with pytest.raises(SetupError) as told:
        place(over_ssh("127.0.0.1:1", ssh_config=sshd.ssh_config), built)
    assert str(told.value) == (
        "cannot reach 127.0.0.1:1 over ssh: ssh: connect to host 127.0.0.1 port 1: Connection refused. "
        f"Is an ssh server running there, on this port? It must answer: ssh -F {sshd.ssh_config} -p 1 127.0.0.1 true"
    )


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"IdentityFile": "/dev/null"},
            r"Permission denied \(.*\)\. It refuses this user's key.*ssh-copy-id",
        ),
        ({"UserKnownHostsFile": "/dev/null"}, "Host key verification failed. Connect once by hand"),
        ({"HostName": "board.invalid"}, "Could not resolve hostname board.invalid: .*. Is the name right"),
        ({"ProxyCommand": "false"}, "cannot reach board over ssh: .* It must answer: ssh -F .* board true"),
        ({"Colour": "red"}, "terminating, 1 bad configuration options. It must answer"),
    ],
)
def test_why_a_device_is_not_reached(
    sshd: Sshd, built: Path, tmp_path: Path, changes: dict[str, str], message: str
) -> None:
    config = tmp_path / "ssh_config"
    lines = sshd.ssh_config.read_text().splitlines()
    kept = [line for line in lines if line.split()[0] not in changes]
    config.write_text("\n".join([*(f"{key} {value}" for key, value in changes.items()), *kept]))
    with pytest.raises(SetupError, match=message):
        place(over_ssh(sshd.host, sys.executable, config), built)


def test_no_ssh_here(built: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(SetupError, match=r"no ssh on this machine: install OpenSSH's client"):
        place(over_ssh("board"), built)


@pytest.mark.parametrize("python", ["python9", "/etc/passwd"])
def test_no_python_there(sshd: Sshd, built: Path, python: str) -> None:
    with pytest.raises(SetupError, match=rf"no Python at '{python}' on board \(.*\): say which with --python"):
        place(over_ssh(sshd.host, python, sshd.ssh_config), built)


def test_no_opencv_there(sshd: Sshd, own: Path, wrapper: Callable[[str], str]) -> None:
    bare = wrapper(f'exec {shlex.quote(sys.executable)} -I -S "$@"')
    placed = place(over_ssh(sshd.host, bare, sshd.ssh_config), own)
    needs = f"python3 -m pip install -r {placed.folder}/requirements.txt"
    with pytest.raises(SetupError, match=f"failed on board: No module named 'cv2'. It needs numpy and OpenCV: {needs}"):
        ask(placed, "check", "--json")


def test_nothing_is_left_of_a_copy_that_does_not_fit(sshd: Sshd, own: Path, wrapper: Callable[[str], str]) -> None:
    """A limit on the size of files stands for a full disk: writing fails in the middle of a file."""
    small = wrapper(f'ulimit -f 8; exec {shlex.quote(sys.executable)} "$@"')
    before = sorted(there(sshd).iterdir())
    with pytest.raises(SetupError, match=r"cannot copy a bundle to board: File too large: .*MB are to be copied\)"):
        place(over_ssh(sshd.host, small, sshd.ssh_config), own)
    assert sorted(there(sshd).iterdir()) == before


def test_a_home_that_cannot_be_written(sshd: Sshd, own: Path, wrapper: Callable[[str], str]) -> None:
    other = wrapper(f'HOME=/dev/null exec {shlex.quote(sys.executable)} "$@"')
    with pytest.raises(SetupError, match=r"cannot copy a bundle to board: Not a directory: /dev/null/\.cache"):
        place(over_ssh(sshd.host, other, sshd.ssh_config), own)


def test_a_shell_that_prints_would_spoil_every_answer(sshd: Sshd, built: Path, wrapper: Callable[[str], str]) -> None:
    chatty = wrapper(f'echo Welcome back; exec {shlex.quote(sys.executable)} "$@"')
    with pytest.raises(SetupError, match="the start files of board's shell print 'Welcome back' also where nobody"):
        place(over_ssh(sshd.host, chatty, sshd.ssh_config), built)


def test_a_bundle_with_files_outside_itself_is_not_sent(board: Device, own: Path) -> None:
    path = own / "manifest.json"
    manifest = json.loads(path.read_text("utf-8"))
    (own.parent / "secret").write_text("mine")
    manifest["files"]["../secret"] = {"sha256": runner.file_sha256(own.parent / "secret"), "size_bytes": 4}
    path.write_text(json.dumps({**manifest, "sha256": runner.manifest_sha256(manifest)}))
    with pytest.raises(ArtifactError, match=r"lists a file outside itself \(\.\./secret\): do not use it"):
        place(board, own)


def received(tmp_path: Path, *arguments: str, data: bytes) -> subprocess.CompletedProcess[bytes]:
    line = [sys.executable, "-W", "error", receiver.__file__, *arguments]
    return subprocess.run(line, input=data, capture_output=True, check=False, env={"HOME": str(tmp_path)})


def test_a_copy_that_broke_off_is_none(tmp_path: Path, own: Path) -> None:
    data = device._tar(own, ["run.py", "manifest.json"])
    answer = received(tmp_path, "name", str(len(data)), data=data[:-1024])
    assert (answer.returncode, answer.stdout) == (1, b"")
    assert answer.stderr.decode().strip() == f"only {len(data) - 1024} of {len(data)} bytes came through"
    assert not (tmp_path / ".cache").exists()


def test_who_comes_second_leaves_the_first_ones_copy(tmp_path: Path, own: Path) -> None:
    data = device._tar(own, ["run.py"])
    answers = [received(tmp_path, "name", str(len(data)), data=data) for _ in range(2)]
    folder = tmp_path / ".cache" / "edgekit" / "bundles"
    assert [json.loads(answer.stdout) for answer in answers] == [{"folder": str(folder / "name"), "there": True}] * 2
    assert [path.name for path in folder.iterdir()] == ["name"]
    assert (folder / "name" / "run.py").read_bytes() == (own / "run.py").read_bytes()


def test_an_old_python_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    ast.parse(Path(receiver.__file__).read_text("utf-8"), feature_version=(3, 6))  # which must be able to read it
    monkeypatch.setattr(sys, "version_info", (3, 6, 9))
    with pytest.raises(SystemExit, match=r"its Python is 3\.6, and run\.py needs 3\.8 or newer"):
        receiver.main(["name"])


@pytest.mark.parametrize(
    ("returncode", "stderr", "message"),
    [
        (2, "warning\nrun.py: the file is empty\nother\n", "the bundle's run.py failed on {}: the file is empty"),
        (1, "Traceback\nValueError: 7\n", "the bundle's run.py failed on {}: ValueError: 7"),
        (1, "", "the bundle's run.py failed on {}: exit code 1"),
        (-signal.SIGSEGV, "", "the bundle's run.py was killed on {} (SIGSEGV)"),
        (128 + signal.SIGKILL, "", "the bundle's run.py was killed on {} (SIGKILL)"),
    ],
)
def test_a_failure_says_what_run_py_said(built: Path, returncode: int, stderr: str, message: str) -> None:
    for where in (here(), over_ssh("pi@board")):
        placed = Placed(where, built, "/home/pi/bundle")
        assert str(failure(placed, returncode, stderr)) == message.format(where.name)


def test_a_lost_connection_is_no_fault_of_the_bundles(built: Path) -> None:
    placed = Placed(over_ssh("pi@board:22"), built, "/home/pi/bundle")
    told = str(failure(placed, 255, "client_loop: send disconnect: Broken pipe\n"))
    assert told == (
        "cannot reach pi@board:22 over ssh: client_loop: send disconnect: Broken pipe. "
        "It must answer: ssh -p 22 pi@board true"
    )


def test_a_process_that_is_killed_there_is_told(sshd: Sshd, own: Path, wrapper: Callable[[str], str]) -> None:
    """cv2.dnn can end a process; ssh by itself would say no more than 255."""
    line = f'case "$1" in *run.py) kill -SEGV $$;; esac; exec {shlex.quote(sys.executable)} "$@"'
    placed = place(over_ssh(sshd.host, wrapper(line), sshd.ssh_config), own)
    with pytest.raises(SetupError, match=r"the bundle's run\.py was killed on board \(SIGSEGV\)"):
        ask(placed, "check", "--json")
