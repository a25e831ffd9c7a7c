"""The system's own ssh and scp, in batch mode, so that keys, jump hosts and ports of ~/.ssh/config hold."""

from __future__ import annotations

import contextlib
import re
import shlex
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from onnxsnp.errors import DeviceError, PlanError, one_line

LOST = 255  # exit status of ssh itself


@dataclass(frozen=True)
class Ssh:
    """How to reach a device; what is not given here is as in ~/.ssh/config.

    Attributes:
        port: of its ssh server.
        identity: file of a private key.
        folder: on the device, where a folder for the run is made; on a disk and not in memory.
        trtexec: path of trtexec on the device, where it is not in the usual places.
        ssh, scp: the programs, and options that every call has.
        timeout: seconds to wait for a connection.
    """

    port: int | None = None
    identity: str | Path | None = None
    folder: str = "/var/tmp"
    trtexec: str | None = None
    ssh: tuple[str, ...] = ("ssh",)
    scp: tuple[str, ...] = ("scp",)
    timeout: int = 10

    def options(self) -> list[str]:
        """For ssh and scp alike, but the port."""
        wanted = {
            "BatchMode": "yes",  # never ask: there may be nobody to answer
            "ConnectTimeout": self.timeout,
            "ServerAliveInterval": 10,
            "ServerAliveCountMax": 3,
            "ClearAllForwardings": "yes",
        }
        identity = [] if self.identity is None else ["-i", str(self.identity)]
        return [part for key, value in wanted.items() for part in ("-o", f"{key}={value}")] + identity


def check_host(host: str, ssh: Ssh) -> None:
    """Nothing that the user gives may be taken for an option or a second command."""
    if not re.fullmatch(r"(?:[A-Za-z0-9_][\w.$-]*@)?(?:[A-Za-z0-9_][\w.-]*|\[?[0-9A-Fa-f:]+(?:%\w+)?\]?)", host):
        raise PlanError(
            f"'{one_line(host)}' is no host for ssh", hint="give it as user@name or a name of ~/.ssh/config"
        )
    if ssh.port is not None and not 1 <= ssh.port <= 65535:
        raise PlanError(f"there is no port {ssh.port}", hint="ports are 1 to 65535")
    if ssh.identity is not None and not Path(ssh.identity).is_file():
        raise PlanError(f"the key {ssh.identity} is not a file")
    if not re.fullmatch(r"/[\w./-]*", ssh.folder):
        raise PlanError(f"the folder '{one_line(ssh.folder)}' is not an absolute path of plain characters")
    for program in (ssh.ssh[0], ssh.scp[0]):
        if shutil.which(program) is None:
            raise DeviceError(f"there is no {program} here", hint="install the OpenSSH client")


def ssh_command(host: str, ssh: Ssh, script: str) -> list[str]:
    """A script for whatever shell the user has there."""
    port = [] if ssh.port is None else ["-p", str(ssh.port)]
    plain = host.replace("[", "").replace("]", "")
    return [*ssh.ssh, *ssh.options(), *port, "-T", "--", plain, f"exec sh -c {shlex.quote(script)}"]


def scp_command(ssh: Ssh, paths: Sequence[str]) -> list[str]:
    """Copy files and folders; the last path is where to."""
    port = [] if ssh.port is None else ["-P", str(ssh.port)]
    return [*ssh.scp, *ssh.options(), *port, "-q", "-r", "--", *paths]


def scp_host(host: str) -> str:
    """With brackets round an address that has colons itself."""
    user, at, name = host.rpartition("@")
    return f"{user}{at}[{name}]" if ":" in name and not name.startswith("[") else host


def run(command: Sequence[str]) -> subprocess.CompletedProcess[str]:
    """Out of reach of Ctrl-C, which is ours to handle."""
    return subprocess.run(
        command,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        errors="replace",
        start_new_session=True,
        check=False,
    )


@contextlib.contextmanager
def started(
    command: Sequence[str],
) -> Iterator[tuple[Iterable[str], Callable[[], subprocess.CompletedProcess[str]]]]:
    """A running ssh: the lines that it prints, and what waits for its end and says how it ended.

    Left early, its input is closed first, so that what it runs on the device can end in order.
    """
    with tempfile.TemporaryFile("w+", errors="replace") as errors:
        process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=errors,
            text=True,
            errors="replace",
            start_new_session=True,
        )
        assert process.stdin is not None and process.stdout is not None

        def end() -> subprocess.CompletedProcess[str]:
            status = process.wait()
            errors.seek(0)
            return subprocess.CompletedProcess(command, status, "", errors.read())

        try:
            yield process.stdout, end
        finally:
            process.stdin.close()
            try:
                process.wait(10)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
            process.stdout.close()


def said(done: subprocess.CompletedProcess[Any]) -> str:
    """The last line of an error, which says the most."""
    lines = [line for line in done.stderr.splitlines() if line.strip()]
    return one_line(lines[-1]) if lines else f"status {done.returncode}"


def remedy(host: str, text: str) -> str:
    """What to do where a connection cannot be made."""
    if "Host key verification failed" in text:
        return f"connect once by hand to accept its key: ssh {host}"
    if "Permission denied" in text:
        return f"it must let you in without a password: ssh-copy-id {host}"
    return f"check that this works: ssh {host} true"
