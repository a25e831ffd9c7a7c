"""An ssh server on the loopback interface, of the test's own: keys, port and settings in its folder."""

from __future__ import annotations

import contextlib
import getpass
import os
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import pytest
from devices import processes

from onnxsnp.deploy.ssh import Ssh

_SERVER = shutil.which("sshd", path=f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin")


@dataclass
class Loopback:
    """A running server; its only user is the one who runs the tests."""

    folder: Path
    process: subprocess.Popen[bytes]
    ssh: Ssh
    host: str = "loopback"

    @property
    def left(self) -> list[str]:
        """What runs have left in the place for their folders."""
        return sorted(one.name for one in (self.folder / "work").iterdir())

    def children(self) -> list[int]:
        """Processes of the server's connections."""
        return [one.pid for one in processes() if one.parent == self.process.pid]

    def drop(self) -> None:
        """Cut all connections, as a pulled cable does; the server stays."""
        for child in self.children():
            with contextlib.suppress(ProcessLookupError):
                os.kill(child, signal.SIGKILL)


@contextlib.contextmanager
def serve(folder: Path, environment: Mapping[str, str]) -> Iterator[Loopback]:
    """Run a server whose sessions have some variables set."""
    if _SERVER is None:
        pytest.skip("no sshd here: apt-get install openssh-server")
    for name in ("work", "keys"):
        (folder / name).mkdir(parents=True)
    keys = folder / "keys"
    for name in ("host", "user"):
        subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(keys / name)], check=True)
    with contextlib.closing(socket.socket()) as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    (keys / "known").write_text(f"[127.0.0.1]:{port} {(keys / 'host.pub').read_text()}")
    settings = [
        f"Port {port}",
        "ListenAddress 127.0.0.1",
        f"HostKey {keys / 'host'}",
        f"AuthorizedKeysFile {keys / 'user.pub'}",
        f"PidFile {folder / 'pid'}",
        "StrictModes no",
        "UsePAM no",
        "PasswordAuthentication no",
        "PermitRootLogin prohibit-password",
        "Subsystem sftp internal-sftp",
        "SetEnv " + " ".join(f'"{key}={value}"' for key, value in environment.items()),
    ]
    (folder / "sshd_config").write_text("\n".join(settings) + "\n")
    client = [
        "Host loopback",
        "HostName 127.0.0.1",
        f"User {getpass.getuser()}",
        f"IdentityFile {keys / 'user'}",
        "IdentitiesOnly yes",
        f"UserKnownHostsFile {keys / 'known'}",
        "HostKeyAlgorithms ssh-ed25519",
    ]
    (folder / "config").write_text("\n".join(client) + "\n")
    if os.getuid() == 0:  # where a server run by root drops its rights
        Path("/run/sshd").mkdir(exist_ok=True)
    log = folder / "sshd.log"
    process = subprocess.Popen([_SERVER, "-D", "-f", str(folder / "sshd_config"), "-E", str(log)])
    try:
        _wait_for(port, process, log)
        given = ("-F", str(folder / "config"))
        ssh = Ssh(port=port, folder=str(folder / "work"), ssh=("ssh", *given), scp=("scp", *given))
        yield Loopback(folder, process, ssh)
    finally:
        process.terminate()
        process.wait()


def _wait_for(port: int, process: subprocess.Popen[bytes], log: Path) -> None:
    for _ in range(100):
        with contextlib.closing(socket.socket()) as probe:
            if probe.connect_ex(("127.0.0.1", port)) == 0:
                return
        if process.poll() is not None:
            pytest.skip(f"sshd does not run here: {log.read_text().strip()}")
        time.sleep(0.05)
    raise RuntimeError(f"sshd does not answer: {log.read_text()}")
