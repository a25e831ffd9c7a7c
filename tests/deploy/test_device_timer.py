"""Layers timed on a device reached by ssh, also where the connection breaks: nothing is measured twice."""

from __future__ import annotations

import json
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from devices import Device, small_model
from graphs import mlp
from loopback import Loopback
from onnx import TensorProto, helper, numpy_helper

from onnxsnp.analysis import analyse_model
from onnxsnp.deploy.bundle import Timing
from onnxsnp.deploy.device_timer import SshTimer, side_by_side, ssh_timer
from onnxsnp.deploy.targets import get_target
from onnxsnp.errors import DeviceError, PlanError
from onnxsnp.evaluation.layers import TimedModel
from onnxsnp.graph.normalize import as_graph
from onnxsnp.model import load
from onnxsnp.planning.latency import measure_table
from onnxsnp.planning.latency_table import read_table
from onnxsnp.pruning import prune

NANO = get_target("jetson-nano")
QUICK = Timing(rounds=2, seconds=1, iterations=5, warm_up=20, times_only=True)


def timed(width: int) -> TimedModel:
    model = small_model("any", width)
    return TimedModel(as_graph(load(model.proto)), dict(model.feeds))


def counted(device: Device, option: str) -> int:
    return sum(call.startswith(option) for call in device.calls())


@pytest.fixture
def timer(loopback: Loopback, tmp_path: Path) -> SshTimer:
    return SshTimer(NANO, loopback.host, ssh=loopback.ssh, keep=tmp_path / "kept", timing=QUICK)


def test_each_model_is_built_once_and_timed_in_every_round(timer: SshTimer, device: Device, loopback: Loopback) -> None:
    seen: list[tuple[int, int]] = []
    times = timer([timed(16), timed(512), timed(16)], lambda *at: seen.append(at))
    assert times.ndim == 2 and times.shape[1] == 3 and len(times) >= 2 * QUICK.iterations
    small, large, again = np.median(times, axis=0)
    assert large > 5 * small and small == again
    assert np.percentile(times[:, 0], 90) < 1.1 * small  # the slow runs of the warm-up are not among them
    assert counted(device, "--onnx") == 2 and counted(device, "--loadEngine") == 2 * QUICK.rounds
    assert seen[-1] == (2 + 2 * QUICK.rounds, 2 + 2 * QUICK.rounds) and seen == sorted(seen)
    assert loopback.left == []
    assert timer.machine.endswith("fp32, TensorRT 8.2.1")


def test_a_connection_that_breaks_once_goes_on_in_the_same_folder(
    timer: SshTimer, device: Device, loopback: Loopback
) -> None:
    broken: list[int] = []

    def cut(done: int, total: int) -> None:
        if done == 3 and not broken:  # both are built, and one is timed
            broken.append(done)
            loopback.drop()

    times = timer([timed(16), timed(64)], cut)
    assert broken and times.shape[1] == 2
    assert counted(device, "--onnx") == 2
    assert counted(device, "--loadEngine") <= 2 * QUICK.rounds + 1  # at most the one that was cut off
    assert loopback.left == [] and device.running() == []


def test_a_device_that_is_gone_for_good_leaves_what_was_measured_for_the_next_run(
    timer: SshTimer, device: Device, loopback: Loopback, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    models = [timed(16), timed(64)]

    def cut(done: int, total: int) -> None:
        if done == 4:  # built, and one round timed
            loopback.drop()

    with monkeypatch.context() as patch:
        patch.setattr("onnxsnp.deploy.device_timer.ATTEMPTS", 1)
        with pytest.raises(DeviceError, match="what was measured is in") as caught:
            timer(models, cut)
    assert "\n" not in str(caught.value) and loopback.left == []
    before = counted(device, "--loadEngine")
    later = SshTimer(NANO, loopback.host, ssh=loopback.ssh, keep=tmp_path / "kept", timing=QUICK)
    times = later(models)
    assert times.shape[1] == 2 and counted(device, "--loadEngine") - before == 2  # the round that was missing
    calls = len(device.calls())
    np.testing.assert_array_equal(later(models), times)  # all is known
    assert len(device.calls()) == calls
    later.forget()
    assert not (tmp_path / "kept").exists()


def test_a_build_that_fails_is_one_line(timer: SshTimer, device: Device, loopback: Loopback) -> None:
    device.play(build="error")
    with pytest.raises(DeviceError, match=r"measuring on loopback failed: build\.sh: .* could not build m0") as caught:
        timer([timed(16)])
    assert "\n" not in str(caught.value) and loopback.left == []
    assert "While parsing node number 3" in str(caught.value) and "was measured" not in str(caught.value)


def test_a_table_of_a_model_is_measured_on_the_device(loopback: Loopback, tmp_path: Path) -> None:
    analysis = analyse_model(mlp(6, 256, 4))
    groups = [group for group in analysis.structure.groups if group.kind == "ffn"]
    timer = ssh_timer(NANO, loopback.host, ssh=loopback.ssh, keep=tmp_path / "kept")
    table = measure_table(analysis, groups, timer, timer.machine)
    assert len(table.layers) == 1 and len(table.whole) == 4
    (layer,) = table.layers.values()
    assert list(layer.ms) == sorted(layer.ms) and layer.ms[-1] > layer.ms[0] > 0


def test_shapes_that_enter_a_layer_are_part_of_it(loopback: Loopback, device: Device) -> None:
    graph = helper.make_graph(
        [helper.make_node("Reshape", ["x", "shape"], ["wide"]), helper.make_node("MatMul", ["wide", "w"], ["y"])],
        "layer",
        [
            helper.make_tensor_value_info("x", TensorProto.FLOAT, [1, 2, 6]),
            helper.make_tensor_value_info("shape", TensorProto.INT64, [3]),
        ],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [1, 4, 3])],
        [numpy_helper.from_array(np.ones((3, 3), np.float32), "w")],
    )
    proto = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    onnx.checker.check_model(proto)
    feeds = {"x": np.ones((1, 2, 6), np.float32), "shape": np.array([1, 4, 3])}
    timer = SshTimer(NANO, loopback.host, ssh=loopback.ssh, timing=QUICK)
    assert timer([TimedModel(as_graph(load(proto)), feeds)]).shape[1] == 1
    runs = [call for call in device.calls() if call.startswith("--loadEngine")]
    assert runs and all("--loadInputs=x:m0/inputs/0.bin " in call + " " for call in runs)


def test_runs_stand_side_by_side_in_their_rounds() -> None:
    one, other = [[1.0, 2.0, 3.0], [4.0]], [[10.0, 20.0], [40.0, 50.0]]
    assert side_by_side([one, other]).tolist() == [[1, 10], [2, 20], [4, 40]]
    assert side_by_side([one]).tolist() == [[1], [2], [3], [4]]


@pytest.mark.parametrize("content", ["", "{}", json.dumps({"kind": "other"}), json.dumps([1]), "[" * 5000])
def test_a_file_that_holds_no_times_is_refused(tmp_path: Path, content: str) -> None:
    (tmp_path / "kept").write_text(content)
    with pytest.raises(DeviceError, match="holds no times of an earlier run"):
        SshTimer(NANO, "nano", keep=tmp_path / "kept")


@pytest.fixture
def at_home(loopback: Loopback, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Loopback:
    """`ssh loopback` works for the user who calls it, as a name of ~/.ssh/config does."""
    for name in ("ssh", "scp"):
        program = tmp_path / "home" / name
        program.parent.mkdir(exist_ok=True)
        program.write_text(f'#!/bin/sh\nexec /usr/bin/{name} -F {loopback.folder / "config"} "$@"\n')
        program.chmod(0o755)
    config = loopback.folder / "config"
    config.write_text(f"{config.read_text()}Port {loopback.ssh.port}\n")
    monkeypatch.setenv("PATH", f"{tmp_path / 'home'}:{os.environ['PATH']}")
    monkeypatch.setattr("onnxsnp.deploy.device_timer.TIMING", replace(QUICK, rounds=1))
    return loopback


def test_the_device_decides_the_widths(
    at_home: Loopback, device: Device, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (device.folder / "bin/nvpmodel").write_text("#!/bin/sh\necho 'NV Power Mode: MAXN'\n")
    (device.folder / "bin/nvpmodel").chmod(0o755)
    options: dict[str, Any] = {"of": "latency", "target": "jetson-nano", "compensation": "none", "criterion": "l2"}
    options |= {"host": at_home.host, "latency_table": tmp_path / "nano.json", "scope": "ffn", "dry_run": True}
    model = mlp(6, 256, 4, batch=1)
    found = prune(model, 0.5, **options)
    where = "loopback, power mode MAXN, fp32, TensorRT 8.2.1"
    assert read_table(tmp_path / "nano.json").machine == found.record["planned_for"] == where
    (group,) = found.record["groups"]
    assert 0.4 < group["after"] / group["before"] < 0.6  # a stand-in takes its time by the size of the file
    assert not (tmp_path / "nano.json.part").exists()
    calls = len(device.calls())
    assert prune(model, 0.5, **options).plan == found.plan  # with the table that is there now
    assert len(device.calls()) == calls


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"target": "jetson-nano"}, "add --of latency"),
        ({"of": "latency"}, "add --target"),
        ({"of": "latency", "target": "rtx"}, "has no trtexec"),
    ],
)
def test_a_host_alone_says_too_little(options: dict[str, Any], said: str) -> None:
    with pytest.raises(PlanError, match=said):
        prune(mlp(6, 16, 4), 0.5, host="nano", **options)
