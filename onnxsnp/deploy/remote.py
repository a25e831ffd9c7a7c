"""A bundle on a device that is reached by ssh: pushed, run, fetched, and nothing left there.

What runs on the device ends with the connection: a watcher there reads the standard input of the session, which ends
when the connection does.
"""

from __future__ import annotations

import contextlib
import re
import shlex
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from onnxsnp.atomic import whole_folder
from onnxsnp.deploy.manifest import RESULTS, damaged_files, digest
from onnxsnp.deploy.results import read_results
from onnxsnp.deploy.ssh import LOST, Ssh, check_host, remedy, run, said, scp_command, scp_host, ssh_command, started
from onnxsnp.errors import DeviceError, one_line

Progress = Callable[[str], None]
PAUSES = (0.0, 1.0, 3.0)  # seconds before each try to remove a folder
_MARK = "onnxsnp-folder:"
# Runs build.sh; if the session's input ends first (the connection broke, or we want it to stop), it is told to stop.
_RUN = """exec 2>&1
cd {folder} || exit 1
exec 3<&0
{environment} sh build.sh {arguments} </dev/null 3<&- &
build=$!
{{ cat <&3 >/dev/null 2>&1; kill -TERM $build; }} >/dev/null 2>&1 &
watcher=$!
exec 3<&-
wait $build
status=$?
kill $watcher 2>/dev/null
exit $status"""
# What a connection that broke may have left running; the device notices that only after a while.
_STOP = """build=$(cat {folder}/results/.running/pid 2>/dev/null)
tries=0
while [ -n "$build" ] && grep -q build.sh "/proc/$build/cmdline" 2>/dev/null && [ $tries -lt 20 ]; do
    kill -TERM "$build" 2>/dev/null
    sleep 0.5
    tries=$((tries + 1))
done
"""
_REMOVE = _STOP + "rm -rf {folder} 2>/dev/null || {{ sleep 1; rm -rf {folder}; }}"


class ConnectionLost(DeviceError):
    """The connection to the device broke, or could not be made."""


def run_remote(
    bundle: str | Path,
    host: str,
    *,
    ssh: Ssh | None = None,
    arguments: Sequence[str] = (),
    progress: Progress | None = None,
) -> Path:
    """Build and time a bundle on a device; its results folder (engines, times, outputs, logs) comes back.

    Args:
        bundle: as `write_bundle` made it; the results go below it, where `read_results` finds them.
        host: as ssh takes it: "nano", "user@192.168.55.1".
        arguments: for build.sh.
        progress: called with each line that build.sh prints.

    Returns:
        The results folder.

    Raises:
        PlanError: a host or an option that ssh cannot be given.
        DeviceError: the device was not reached, the connection broke, or a build failed; logs that came back are in the
            results folder then. On the device nothing is left; where that could not be done, the message says what.
    """
    folder = Path(bundle)
    wrong = damaged_files(folder)
    if wrong:
        raise DeviceError(f"{wrong[0]} in {folder} is not what it was", hint="write the bundle again")
    with remote_folder(host, ssh) as remote:
        remote.push(folder)
        status = remote.build(arguments, progress)
        results = remote.fetch(folder / RESULTS)
    if status != 0 and not (results / "results.json").is_file():
        raise DeviceError(f"the build on {host} failed: {remote.complaint}", hint=f"its logs are in {results}")
    read_results(folder)  # what came back can be read and compared here, too
    return results


class Remote:
    """A folder on a device, while it is there.

    Attributes:
        host: as the user gave it.
        path: of the folder on the device.
        reached: the last line that build.sh printed.
        complaint: the last line in which it said what is wrong, else the last line.
    """

    def __init__(self, host: str, ssh: Ssh, path: str) -> None:
        self.host, self.path, self._ssh = host, path, ssh
        self.reached = self.complaint = ""

    def push(self, bundle: Path) -> None:
        """Copy a bundle (not its results) into the folder."""
        self.reached = "copying the bundle"
        parts = [str(one.absolute()) for one in sorted(bundle.iterdir()) if one.name not in (RESULTS, "__pycache__")]
        self._copy([*parts, f"{scp_host(self.host)}:{self.path}/"], "copied to")

    def build(self, arguments: Sequence[str] = (), progress: Progress | None = None) -> int:
        """Run build.sh; its exit status.

        Raises:
            ConnectionLost: the connection broke; build.sh has ended then, or ends when the device notices.
        """
        environment = f"TRTEXEC={shlex.quote(self._ssh.trtexec)}" if self._ssh.trtexec else ""
        script = _RUN.format(
            folder=shlex.quote(self.path), environment=environment, arguments=" ".join(map(shlex.quote, arguments))
        )
        with started(ssh_command(self.host, self._ssh, script)) as (lines, end):
            for line in lines:
                self._heard(line.rstrip("\n"), progress)
            done = end()
        if done.returncode == LOST:
            raise self._lost(said(done))
        return int(done.returncode)

    def fetch(self, results: Path) -> Path:
        """Copy the results folder from the device to a place here, whole or not at all, and compare the hashes."""
        listing = f"cd {shlex.quote(self.path)}/{RESULTS} && find . -type f -exec sha256sum {{}} +"
        lines = [line.split(maxsplit=1) for line in self.command(listing, "looked at").splitlines() if line]
        expected = {name: value for value, name in lines}
        if not expected:
            raise DeviceError(f"the build on {self.host} left no results: {self.complaint}")
        with whole_folder(results) as part:
            self._copy([f"{scp_host(self.host)}:{self.path}/{RESULTS}", str(part)], "copied from")
            inner = part / RESULTS
            wrong = [name for name, value in expected.items() if _digest_or_none(inner / name) != value]
            if wrong:
                raise DeviceError(f"{wrong[0]} came back from {self.host} other than it was there")
            for one in inner.iterdir():
                one.rename(part / one.name)
            inner.rmdir()
        return results

    def command(self, script: str, what: str) -> str:
        """What a short script prints on the device."""
        done = run(ssh_command(self.host, self._ssh, script))
        if done.returncode == LOST:
            raise self._lost(said(done))
        if done.returncode != 0:
            raise DeviceError(f"{self.path} on {self.host} could not be {what}: {said(done)}")
        return str(done.stdout)

    def settle(self) -> None:
        """After a connection broke: wait for the device to answer, and until nothing runs there any more.

        Raises:
            ConnectionLost: it does not answer.
        """
        script = _STOP.format(folder=shlex.quote(self.path))
        for pause in PAUSES[1:]:
            with contextlib.suppress(ConnectionLost):
                self.command(script, "settled")
                return
            time.sleep(pause)
        self.command(script, "settled")

    def remove(self) -> bool:
        """Remove the folder from the device; whether it worked."""
        script = _REMOVE.format(folder=shlex.quote(self.path))
        for pause in PAUSES:
            time.sleep(pause)
            if run(ssh_command(self.host, self._ssh, script)).returncode == 0:
                return True
        return False

    def _copy(self, paths: list[str], what: str) -> None:
        done = run(scp_command(self._ssh, paths))
        if done.returncode == 0:
            return
        if done.returncode == LOST or re.search(
            r"connection (closed|reset)|lost connection", done.stderr, re.IGNORECASE
        ):
            raise self._lost(said(done))
        raise DeviceError(f"files could not be {what} {self.host}: {said(done)}", hint="check its disk")

    def _heard(self, line: str, progress: Progress | None) -> None:
        if not line.strip():
            return
        if not line.startswith("times "):
            self.reached = line
        if line.startswith(("build.sh:", "check.py:")) or not self.complaint.startswith(("build.sh:", "check.py:")):
            self.complaint = one_line(line)
        if progress is not None:
            progress(line)

    def _lost(self, text: str) -> ConnectionLost:
        return ConnectionLost(f"the connection to {self.host} broke after '{one_line(self.reached)}' ({text})")


@contextlib.contextmanager
def remote_folder(host: str, ssh: Ssh | None = None) -> Iterator[Remote]:
    """A fresh folder on a device, removed at the end, whatever that is.

    Raises:
        PlanError: a host or an option that ssh cannot be given.
        DeviceError: the device was not reached; if the folder cannot be removed, the message says where it is left.
    """
    ssh = ssh or Ssh()
    check_host(host, ssh)
    template = f"{ssh.folder.rstrip('/')}/onnxsnp.XXXXXXXX"
    done = run(ssh_command(host, ssh, f"umask 077; made=$(mktemp -d {shlex.quote(template)}) && echo {_MARK}$made"))
    found = re.search(rf"^{_MARK}(/[\w./-]*/onnxsnp\.\w+)$", done.stdout, re.MULTILINE)
    if done.returncode == LOST:
        raise ConnectionLost(f"cannot reach {host}: {said(done)}", hint=remedy(host, done.stderr))
    if done.returncode != 0 or found is None:
        raise DeviceError(f"cannot make a folder in {ssh.folder} on {host}: {said(done)}")
    remote = Remote(host, ssh, found.group(1))
    try:
        yield remote
    except BaseException as error:
        left = not remote.remove()
        where = f"{remote.path} is left on {host}" if left else f"nothing is left on {host}"
        if isinstance(error, DeviceError):
            error.hint = f"{error.hint}; {where}" if error.hint else where
        elif left:
            raise DeviceError(f"stopped, but {where}", hint=f"remove it: ssh {host} rm -r {remote.path}") from error
        raise
    if not remote.remove():
        raise DeviceError(
            f"done, but {remote.path} is left on {host}", hint=f"remove it: ssh {host} rm -r {remote.path}"
        )


def _digest_or_none(path: Path) -> str | None:
    return digest(path) if path.is_file() else None
