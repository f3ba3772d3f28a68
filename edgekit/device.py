"""Where a bundle's run.py runs: on this machine, or on a device over ssh that has Python, numpy and OpenCV, no more.

The bundle is copied there once. All commands share one connection: a fresh one takes 0.3 s and more.
"""

from __future__ import annotations

import atexit
import functools
import hashlib
import io
import json
import os
import platform
import re
import shlex
import shutil
import signal
import subprocess
import tarfile
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from edgekit import receiver, runner
from edgekit.errors import ArtifactError, SetupError, UsageError
from edgekit.launch import run_py

ADDRESS = re.compile(r"(?:[\w.+][\w.+\\-]*@)?(?P<host>[\w.][\w.-]*|\[[\da-fA-F:.]+(?:%\w+)?\])(?::(?P<port>\d{1,5}))?")
IDLE_S = 60  # for how long the shared connection waits for the next command
SSH = (
    "ssh",
    "-T",
    "-oBatchMode=yes",  # nobody is there to type a password
    "-oConnectTimeout=10",
    "-oServerAliveInterval=15",  # a device that lost its network is given up after a minute
    "-oServerAliveCountMax=4",
    "-oLogLevel=ERROR",  # stderr is run.py's
    "-oClearAllForwardings=yes",  # what the user's own configuration adds to a session for people
    "-oRemoteCommand=none",
)
# What ssh says where it cannot connect → what to do.
REMEDIES = {
    "permission denied": "It refuses this user's key, and edgekit types no passwords: give it one with `ssh-copy-id`.",
    "host key verification failed": "Connect once by hand, look at its key and accept it.",
    "could not resolve hostname": "Is the name right, or does ~/.ssh/config have to say what it means?",
    "connection refused": "Is an ssh server running there, on this port?",
    "timed out": "Is it switched on, and on this network?",
    "no route to host": "Is it switched on, and on this network?",
}


@dataclass(frozen=True)
class Device:
    """A machine that a bundle can run on: `here()`, or one `over_ssh(...)`."""

    name: str  # for records: this machine's host name, or the address as it was given
    destination: str  # what ssh is told: "user@host", "host" or an alias of ssh_config; "" for this machine
    port: int | None  # None: ssh's own choice
    python: str  # the interpreter there; "": this machine's, as edgekit.launch chooses it
    ssh_config: Path | None  # instead of the user's own


@dataclass(frozen=True)
class Placed:
    """A bundle where it can run."""

    device: Device
    bundle: Path  # on this machine
    folder: str  # on the device, absolute; on this machine the bundle itself


def here(python: str = "") -> Device:
    """This machine. python: another interpreter than the one that edgekit would take."""
    return Device(platform.node() or "localhost", "", None, python, None)


def over_ssh(address: str, python: str = "python3", ssh_config: Path | None = None) -> Device:
    """A device that `ssh ADDRESS` reaches without a password.

    address: "host", "user@host", "user@host:port", or a Host of the ssh configuration; an IPv6 address in [].
    python: its interpreter; "~/" is the home folder there. ssh_config: as `ssh -F` takes it.
    Raises UsageError where that is no address, SetupError where there is no such configuration.
    """
    found = ADDRESS.fullmatch(address)
    port = int(found["port"]) if found and found["port"] else None
    if not found or port == 0 or (port or 0) > 65535:
        raise UsageError(f"{address!r} is no device: give user@host, user@host:port, or a Host of your ssh config")
    if ssh_config and not ssh_config.is_file():
        raise SetupError(f"no ssh configuration at {ssh_config}")
    destination = address[: found.end("host")].replace("[", "").replace("]", "")
    return Device(address, destination, port, python, ssh_config)


def place(device: Device, bundle: Path) -> Placed:
    """Brings a bundle to a device, whole or not at all, where it is not there yet.

    It lies in ~/.cache/edgekit/bundles/NAME-TARGET-HASH there, and goes when nothing asked for it in 30 days.
    Raises ArtifactError where it is no whole bundle; SetupError where the device cannot be reached, has no such Python,
    or cannot take it.
    """
    try:
        manifest = runner.read_manifest(bundle)
    except runner.RunnerError as error:
        raise ArtifactError(str(error)) from None
    if not device.destination:
        if device.python and not shutil.which(device.python):
            raise SetupError(f"no Python at {device.python!r} on this machine: say which with --python")
        return Placed(device, bundle, str(bundle.resolve()))
    _connect(device)
    name = f"{_plain(manifest['name'])}-{_plain(manifest['target'])}-{manifest['sha256'][:12]}"
    found = _receiver(device, name)
    if not found["there"]:
        data = _tar(bundle, [*manifest["files"], "manifest.json"])
        found = _receiver(device, name, str(len(data)), data=data)
    return Placed(device, bundle, found["folder"])


def command(placed: Placed, *arguments: str) -> list[str]:
    """The command line that runs `run.py ARGUMENTS` where the bundle was placed, its stdin, stdout and stderr here.

    Where this command is ended, what reads its stdin there meets the end of it. The exit code is run.py's, 128 + n
    where signal n killed it there, 255 where the connection failed. Raises ArtifactError where the manifest is gone.
    """
    device = placed.device
    if not device.destination:
        start = [device.python, f"{placed.folder}/run.py"] if device.python else run_py(placed.bundle)
        return [*start, *arguments]
    return _there(device, [_python(device), f"{placed.folder}/run.py", *arguments])


def ask(placed: Placed, *arguments: str) -> dict[str, Any]:
    """Runs `run.py ARGUMENTS` to its end there; the JSON object that it prints last.

    Exit code 3, which is a fallback, is an answer too. Raises what `failure` says.
    """
    done = _run(command(placed, *arguments))
    if done.returncode not in (0, 3):
        raise failure(placed, done.returncode, done.stderr.decode(errors="replace"))
    answer: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return answer


def failure(placed: Placed, returncode: int, stderr: str) -> SetupError:
    """What a `command` that did not succeed ends in, by its exit code and what it wrote to stderr."""
    device = placed.device
    if device.destination and returncode in (126, 127, 255):
        return _failure(device, returncode, stderr)
    number = -returncode if returncode < 0 else returncode - 128
    if number > 0:
        name = signal.Signals(number).name if number in set(signal.Signals) else f"signal {number}"
        return SetupError(f"the bundle's run.py was killed on {device.name} ({name})")
    said = [line.removeprefix("run.py: ") for line in stderr.splitlines() if line.startswith("run.py: ")]
    reason = (said or stderr.strip().splitlines() or [f"exit code {returncode}"])[-1]
    return SetupError(f"the bundle's run.py failed on {device.name}: {reason}")


# ---------------------------------------------------------------------------------------------------------------
# ssh


def _plain(name: str) -> str:
    """A part of a folder's name that every file system takes."""
    return re.sub(r"[^A-Za-z0-9._-]+", "_", name)[:80]


def _python(device: Device) -> str:
    """The home folder is where a session begins; a quoted ~ would not be one."""
    return re.sub(r"^~/", "./", device.python)


@functools.cache
def _sockets() -> tempfile.TemporaryDirectory[str]:
    """A folder of this process's own. The path is short: a socket's may have about 100 characters, 17 are ssh's."""
    return tempfile.TemporaryDirectory(prefix="edgekit-", dir="/tmp" if Path("/tmp").is_dir() else None)


def _ssh(device: Device, *options: str) -> list[str]:
    config = ["-F", str(device.ssh_config)] if device.ssh_config else []
    port = ["-p", str(device.port)] if device.port else []
    return [*SSH, *config, *port, *options, "--", device.destination]


def _shared(device: Device, master: str = "no") -> list[str]:
    """The options of a command that takes the shared connection, or one of its own where that is gone."""
    if os.name != "posix":  # the ssh of Windows cannot share
        return []
    which = hashlib.sha256(repr(device).encode()).hexdigest()[:8]
    return [f"-oControlMaster={master}", f"-oControlPath={_sockets().name}/{which}"]


def _there(device: Device, words: Sequence[str]) -> list[str]:
    """The command line that runs a program there. A shell of its own: the user's may be of any kind, and one that
    waits for the program tells by which signal it was killed."""
    return [*_ssh(device, *_shared(device)), shlex.join(["sh", "-c", f"{shlex.join(words)}; exit $?"])]


def _connect(device: Device) -> None:
    """Opens the shared connection, which lives on in a process of its own. Raises SetupError."""
    if os.name != "posix" or _run([*_ssh(device, *_shared(device), "-O", "check")]).returncode == 0:
        return
    # -f: in the background once it is connected. Its stderr is a file: as a pipe it might stay open with it.
    options = [*_shared(device, "yes"), f"-oControlPersist={IDLE_S}", "-f", "-N"]
    done = _run(_ssh(device, *options))
    if done.returncode:
        raise _failure(device, done.returncode, done.stderr.decode(errors="replace"))
    # -F none: at the end the device's own configuration file may be gone
    atexit.register(_run, ["ssh", "-F", "none", *_shared(device), "-O", "exit", "--", device.destination])


def _run(line: Sequence[str], data: bytes = b"") -> subprocess.CompletedProcess[bytes]:
    """Runs a command to its end; with ssh, raises SetupError where there is none."""
    with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err:
        try:
            done = subprocess.run(line, input=data, stdout=out, stderr=err, check=False)
        except FileNotFoundError:
            raise SetupError("no ssh on this machine: install OpenSSH's client (openssh-client)") from None
        out.seek(0)
        err.seek(0)
        return subprocess.CompletedProcess(done.args, done.returncode, out.read(), err.read())


def _failure(device: Device, returncode: int, stderr: str) -> SetupError:
    said = (stderr.strip().splitlines() or ["no message"])[-1]
    if returncode in (126, 127):
        return SetupError(f"no Python at {device.python!r} on {device.name} ({said}): say which with --python")
    remedies = [remedy for phrase, remedy in REMEDIES.items() if phrase in stderr.lower()]
    by_hand = shlex.join(["ssh", *_ssh(device)[len(SSH) :]]).replace(" -- ", " ")
    remedy = f" {remedies[0]}" if remedies else ""
    told = f"cannot reach {device.name} over ssh: {said.removesuffix('.')}.{remedy}"
    return SetupError(f"{told} It must answer: {by_hand} true")


def _receiver(device: Device, *arguments: str, data: bytes = b"") -> dict[str, Any]:
    """What edgekit.receiver says there. Raises SetupError."""
    source = Path(receiver.__file__).read_text(encoding="utf-8")
    done = _run(_there(device, [_python(device), "-c", source, *arguments]), data)
    stdout, stderr = done.stdout.decode(errors="replace"), done.stderr.decode(errors="replace")
    if done.returncode in (126, 127, 255):
        raise _failure(device, done.returncode, stderr)
    if done.returncode:
        reason = (stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]
        needs = f" ({len(data) / 1e6:.0f} MB are to be copied)" if data else ""
        raise SetupError(f"cannot copy a bundle to {device.name}: {reason}{needs}")
    if not stdout.startswith("{"):
        raise SetupError(
            f"the start files of {device.name}'s shell print {stdout.splitlines()[0][:60]!r} also where nobody reads: "
            "let them be silent where there is no terminal"
        )
    answer: dict[str, Any] = json.loads(stdout)
    return answer


def _tar(bundle: Path, names: Sequence[str]) -> bytes:
    """An uncompressed tar of these files: a model's weights would not shrink. Raises ArtifactError."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as tar:
        for name in names:
            path = PurePosixPath(name)
            if path.is_absolute() or ".." in path.parts:
                raise ArtifactError(f"{bundle} lists a file outside itself ({name}): do not use it")
            entry, data = tarfile.TarInfo(name), (bundle / name).read_bytes()
            entry.size = len(data)
            tar.addfile(entry, io.BytesIO(data))
    return buffer.getvalue()
