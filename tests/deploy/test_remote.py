"""Bundles that run on a device reached by ssh: a server on the loopback interface, and a stand-in trtexec behind it."""

from __future__ import annotations

import signal
import subprocess
import sys
import textwrap
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from devices import Device
from loopback import Loopback

from onnxsnp.deploy.bundle import BundleModel, Timing, write_bundle
from onnxsnp.deploy.manifest import digest
from onnxsnp.deploy.remote import ConnectionLost, remote_folder, run_remote
from onnxsnp.deploy.results import read_results
from onnxsnp.deploy.ssh import Ssh
from onnxsnp.deploy.targets import get_target
from onnxsnp.errors import DeviceError, PlanError


@pytest.fixture
def bundle(pair: list[BundleModel], tmp_path: Path) -> Path:
    timing = Timing(rounds=1, seconds=1, iterations=20, warm_up=100)
    write_bundle(tmp_path / "bundle", pair, get_target("jetson-nano"), timing=timing)
    return tmp_path / "bundle"


def test_a_run_brings_everything_back_and_leaves_nothing(bundle: Path, loopback: Loopback) -> None:
    heard: list[str] = []
    results = run_remote(bundle, loopback.host, ssh=loopback.ssh, progress=heard.append)
    assert results == bundle / "results"
    names = {str(one.relative_to(results)) for one in results.rglob("*") if one.is_file()}
    each = {"model.engine", "times.1.json", "output.json", "layers.json", "build.log", "run.1.log", "stamp.txt"}
    assert names == {"results.json", "device.txt"} | {
        f"{label}/{one}" for label in ("pruned", "original") for one in each
    }
    assert any(line.startswith("pruned: building the engine") for line in heard) and any(
        "speed-up" in line for line in heard
    )
    found = read_results(bundle)
    assert found["passed"] and found["speedup"]["latency"] > 1
    assert loopback.left == []
    first = digest(results / "pruned/model.engine")
    run_remote(bundle, loopback.host, ssh=loopback.ssh, arguments=["--rounds", "2"])  # takes the place of the first
    assert (results / "pruned/times.2.json").exists() and digest(results / "pruned/model.engine") == first
    assert sorted(one.name for one in bundle.parent.iterdir() if one.name.startswith(".")) == []


def test_outputs_that_differ_come_back_to_be_judged(bundle: Path, device: Device, loopback: Loopback) -> None:
    device.play(run="wrong_output")
    run_remote(bundle, loopback.host, ssh=loopback.ssh)
    found = read_results(bundle)
    assert not found["passed"] and found["models"]["pruned"]["outputs_passed"] is False
    assert loopback.left == []


def test_a_build_that_fails_is_one_line_with_its_logs_here(bundle: Path, device: Device, loopback: Loopback) -> None:
    device.play(build="error")
    with pytest.raises(DeviceError, match="could not build pruned") as caught:
        run_remote(bundle, loopback.host, ssh=loopback.ssh)
    assert "\n" not in str(caught.value) and f"its logs are in {bundle / 'results'}" in str(caught.value)
    assert "While parsing node number 3" in (bundle / "results/pruned/build.log").read_text()
    assert loopback.left == []


def test_an_older_tensorrt_is_told_with_the_remedy(pair: list[BundleModel], tmp_path: Path, loopback: Loopback) -> None:
    write_bundle(tmp_path / "orin", pair, get_target("jetson-orin"))
    with pytest.raises(DeviceError, match=r'TensorRT 8.2.1 is here.*tensorrt = "8.2.1"'):
        run_remote(tmp_path / "orin", loopback.host, ssh=loopback.ssh)
    assert loopback.left == []


def test_a_connection_that_breaks_says_how_far_it_came_and_nothing_runs_on(
    bundle: Path, device: Device, loopback: Loopback
) -> None:
    device.play(run="slow")

    def listen(line: str) -> None:
        if line.startswith("timing"):
            loopback.drop()

    with pytest.raises(ConnectionLost, match="broke after 'timing, round 1 of 1'") as caught:
        run_remote(bundle, loopback.host, ssh=loopback.ssh, progress=listen)
    assert "nothing is left on loopback" in str(caught.value) and "\n" not in str(caught.value)
    assert device.running() == [] and loopback.left == []
    assert not (bundle / "results").exists()


def test_a_device_that_is_gone_leaves_a_folder_that_is_named(
    bundle: Path, device: Device, loopback: Loopback, monkeypatch: pytest.MonkeyPatch
) -> None:
    device.play(build="slow")
    monkeypatch.setattr("onnxsnp.deploy.remote.PAUSES", (0.0,))

    def listen(line: str) -> None:
        if "building" in line:
            loopback.drop()
            loopback.process.terminate()

    with pytest.raises(ConnectionLost, match="broke after 'pruned: building") as caught:
        run_remote(bundle, loopback.host, ssh=loopback.ssh, progress=listen)
    (left,) = loopback.left
    assert f"{loopback.folder / 'work' / left} is left on loopback" in str(caught.value)
    assert device.running() == []


def test_an_error_of_ours_ends_the_build_and_removes_the_folder(
    bundle: Path, device: Device, loopback: Loopback
) -> None:
    device.play(build="slow")

    def listen(line: str) -> None:
        if "building" in line:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_remote(bundle, loopback.host, ssh=loopback.ssh, progress=listen)
    assert device.running() == [] and loopback.left == []


def test_ctrl_c_leaves_nothing_on_the_device(bundle: Path, device: Device, loopback: Loopback) -> None:
    device.play(build="slow")
    script = f"""
        from onnxsnp.deploy.remote import run_remote
        from onnxsnp.deploy.ssh import Ssh
        run_remote({str(bundle)!r}, "loopback", ssh={loopback.ssh!r}, progress=lambda line: print(line, flush=True))
        """
    code = "import signal; signal.signal(signal.SIGINT, signal.default_int_handler)\n" + textwrap.dedent(script)
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    for line in process.stdout:
        if "building" in line:
            break
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=30)
    assert process.returncode != 0
    assert device.running() == [] and loopback.left == []


@pytest.mark.parametrize(
    "host",
    [
        "",
        "-oProxyCommand=id",
        "user@-nano",
        "nano; id",
        "a b",
        "nano\n",
        "user@nano:/tmp",
        "$(id)",
        "ssh://nano",
        "-",
        "@nano",
    ],
)
def test_a_host_that_could_be_taken_for_something_else_is_refused(bundle: Path, host: str) -> None:
    nowhere = Ssh(ssh=("false",), scp=("false",))
    with pytest.raises(PlanError, match="is no host for ssh"):
        run_remote(bundle, host, ssh=nowhere)


@pytest.mark.parametrize(
    "host", ["nano", "user@nano", "me@192.168.55.1", "u.s_r@nano-2.local", "root@fe80::1%eth0", "[::1]"]
)
def test_hosts_as_people_write_them_are_taken(bundle: Path, host: str) -> None:
    with pytest.raises(DeviceError, match="cannot make a folder"):  # what stands for ssh here does nothing
        run_remote(bundle, host, ssh=Ssh(ssh=("true",), scp=("true",)))


def test_wrong_options_are_refused_before_anything_is_reached(bundle: Path, tmp_path: Path) -> None:
    for options, said in (
        (Ssh(port=0), "no port 0"),
        (Ssh(identity=tmp_path / "none"), "is not a file"),
        (Ssh(folder="tmp; id"), "not an absolute path"),
    ):
        with pytest.raises(PlanError, match=said):
            run_remote(bundle, "nano", ssh=options)
    with pytest.raises(DeviceError, match="there is no no-ssh-here"):
        run_remote(bundle, "nano", ssh=Ssh(ssh=("no-ssh-here",)))
    (bundle / "pruned/model.onnx").unlink()
    with pytest.raises(DeviceError, match="is not what it was"):
        run_remote(bundle, "nano", ssh=Ssh(ssh=("false",)))


def test_a_device_that_is_not_reached_is_told_with_what_to_do(bundle: Path, loopback: Loopback) -> None:
    (loopback.folder / "keys/known").write_text("")
    with pytest.raises(ConnectionLost, match="connect once by hand"):
        run_remote(bundle, loopback.host, ssh=loopback.ssh)
    (loopback.folder / "keys/known").write_text("* " + (loopback.folder / "keys/host.pub").read_text())
    (loopback.folder / "keys/user.pub").write_text("")
    with pytest.raises(ConnectionLost, match="ssh-copy-id loopback"):
        run_remote(bundle, loopback.host, ssh=loopback.ssh)
    loopback.process.terminate()
    loopback.process.wait()
    with pytest.raises(ConnectionLost, match=r"cannot reach loopback.*refused.*ssh loopback true"):
        run_remote(bundle, loopback.host, ssh=loopback.ssh)


def test_a_place_that_cannot_be_written_to_is_named(bundle: Path, loopback: Loopback) -> None:
    with pytest.raises(DeviceError, match="cannot make a folder in /proc/none on loopback"):
        run_remote(bundle, loopback.host, ssh=replace(loopback.ssh, folder="/proc/none"))


def test_trtexec_elsewhere_is_taken_by_its_path(bundle: Path, device: Device, loopback: Loopback) -> None:
    odd = device.folder / "my tools"
    odd.mkdir()
    (device.folder / "bin/trtexec").rename(odd / "trtexec")
    with pytest.raises(DeviceError, match="no trtexec"):
        run_remote(bundle, loopback.host, ssh=loopback.ssh)
    run_remote(bundle, loopback.host, ssh=replace(loopback.ssh, trtexec=str(odd / "trtexec")))
    assert read_results(bundle)["passed"]


def test_a_file_that_changes_on_its_way_back_is_found(bundle: Path, loopback: Loopback, tmp_path: Path) -> None:
    breaking = tmp_path / "scp"
    breaking.write_text(
        '#!/bin/sh\nscp "$@" || exit\nfor last; do :; done\n[ ! -d "$last" ] || echo >>"$last/results/device.txt"\n'
    )
    breaking.chmod(0o755)
    other = replace(loopback.ssh, scp=(str(breaking), *loopback.ssh.scp[1:]))
    with pytest.raises(DeviceError, match=r"device.txt came back from loopback other than it was there"):
        run_remote(bundle, loopback.host, ssh=other)
    assert not (bundle / "results").exists() and loopback.left == []


def test_a_key_and_a_port_of_ones_own_are_taken(bundle: Path, loopback: Loopback) -> None:
    config = loopback.folder / "config"
    config.write_text("".join(line for line in config.read_text().splitlines(True) if "IdentityFile" not in line))
    with remote_folder(loopback.host, replace(loopback.ssh, identity=loopback.folder / "keys/user")) as remote:
        assert remote.command("echo here", "asked") == "here\n"
        assert len(loopback.left) == 1
    assert loopback.left == []
    with pytest.raises(ConnectionLost):
        run_remote(bundle, loopback.host, ssh=replace(loopback.ssh, port=1))


def test_a_folder_that_cannot_be_removed_is_named(
    loopback: Loopback, monkeypatch: pytest.MonkeyPatch, make_device: Callable[..., Device]
) -> None:
    monkeypatch.setattr("onnxsnp.deploy.remote.Remote.remove", lambda self: False)
    with (
        pytest.raises(DeviceError, match=r"done, but .*/onnxsnp\.\w+ is left on loopback"),
        remote_folder(loopback.host, loopback.ssh),
    ):
        pass
