"""A real ssh server on this machine's loopback, with keys, configuration and a home folder of its own."""

import getpass
import os
import shutil
import socket
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from threading import Thread

import pytest

SSHD = Path("/usr/sbin/sshd")


@dataclass(frozen=True)
class Sshd:
    """What a client needs to know; `home` is where the sessions' $HOME is."""

    host: str  # a Host of the configuration
    ssh_config: Path
    user: str
    port: int
    home: Path


@contextmanager
def serving(folder: Path) -> Iterator[Sshd]:
    """Skips where there is no OpenSSH server, or the system does not let it serve this user."""
    if not (SSHD.is_file() and shutil.which("ssh") and shutil.which("ssh-keygen")):
        pytest.skip("no OpenSSH server here (Debian's openssh-server)")
    (home := folder / "home").mkdir()
    for name in ("host_key", "key"):
        command = ["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(folder / name)]
        subprocess.run(command, check=True, stdin=subprocess.DEVNULL)
    shutil.copyfile(folder / "key.pub", folder / "authorized_keys")
    if os.geteuid() == 0:
        Path("/run/sshd").mkdir(mode=0o755, exist_ok=True)  # where it confines itself, as the system's service makes it
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    server = _write(
        folder / "sshd_config",
        f"""
        ListenAddress 127.0.0.1
        Port {port}
        HostKey {folder}/host_key
        AuthorizedKeysFile {folder}/authorized_keys
        PidFile none
        StrictModes no
        UsePAM no
        PasswordAuthentication no
        KbdInteractiveAuthentication no
        SetEnv HOME={home}
        """,
    )
    user, host_key = getpass.getuser(), (folder / "host_key.pub").read_text().rsplit(" ", 1)[0]
    _write(folder / "known_hosts", f"[127.0.0.1]:{port} {host_key}")
    config = _write(
        folder / "ssh_config",
        f"""
        Host board
            HostName 127.0.0.1
            Port {port}
        Host *
            User {user}
            IdentityFile {folder}/key
            IdentitiesOnly yes
            IdentityAgent none
            UserKnownHostsFile {folder}/known_hosts
            GlobalKnownHostsFile /dev/null
        """,
    )
    child = subprocess.Popen([SSHD, "-D", "-e", "-f", server], stdin=subprocess.DEVNULL, stderr=subprocess.PIPE)
    assert child.stderr is not None
    first = child.stderr.readline()  # it says where it listens, or why it cannot
    # A full pipe would stop it. A daemon: sessions that outlive the server write there too.
    reader = Thread(target=child.stderr.read, daemon=True)
    reader.start()
    try:
        if b"listening" not in first:
            pytest.skip(f"the OpenSSH server does not start here: {first.decode(errors='replace').strip()}")
        command = ["ssh", "-F", str(config), "-oBatchMode=yes", "board", "true"]
        answer = subprocess.run(command, capture_output=True, text=True, stdin=subprocess.DEVNULL, check=False)
        if answer.returncode:
            pytest.skip(f"the OpenSSH server does not take this user here: {answer.stderr.strip()}")
        yield Sshd("board", config, user, port, home)
    finally:
        child.terminate()
        child.wait()
        reader.join(timeout=10)
        if not reader.is_alive():
            child.stderr.close()


def _write(path: Path, text: str) -> Path:
    path.write_text("\n".join(line.strip() for line in text.strip().splitlines()) + "\n")
    return path
