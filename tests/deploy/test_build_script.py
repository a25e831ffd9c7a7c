"""build.sh and check.py on devices that a stand-in trtexec plays: dialects, failures, retries, what is kept."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from devices import Device

from onnxsnp.deploy.bundle import BundleModel, Timing, write_bundle
from onnxsnp.deploy.results import latency_by_label, read_results, read_times
from onnxsnp.deploy.targets import BUILT_IN, Target, get_target
from onnxsnp.errors import DeviceError

NANO = get_target("jetson-nano")
QUICK = Timing(rounds=2, seconds=1, iterations=20, warm_up=100)
# What a version is told of workspace, of not running after the build, and of fp16.
DIALECTS = {
    "8.2.1": ("--workspace=512", "--buildOnly", "--fp16"),
    "8.5.2": ("--memPoolSize=workspace:512", "--buildOnly", "--fp16"),
    "8.6.2": ("--memPoolSize=workspace:512", "--skipInference", "--fp16"),
    "10.3.0": ("--memPoolSize=workspace:512", "--skipInference", "--fp16"),
    "11.0.0": ("--memPoolSize=workspace:512", "--skipInference", ""),
}


def profile(version: str) -> Target:
    """A small device with that TensorRT."""
    return replace(NANO, name=f"with-{version}", tensorrt=tuple(map(int, version.split("."))), opset=13)


@pytest.fixture
def bundle(pair: list[BundleModel], tmp_path: Path) -> Path:
    write_bundle(tmp_path / "bundle", pair, NANO, timing=QUICK)
    return tmp_path / "bundle"


@pytest.fixture
def single(pair: list[BundleModel], tmp_path: Path) -> Path:
    write_bundle(tmp_path / "single", pair[:1], NANO, timing=replace(QUICK, rounds=1))
    return tmp_path / "single"


def results(bundle: Path) -> Any:
    return json.loads((bundle / "results/results.json").read_text())


@pytest.mark.parametrize("version", DIALECTS)
@pytest.mark.parametrize("shell", ["dash", "bash"])
def test_each_dialect_builds_times_and_agrees(
    pair: list[BundleModel], tmp_path: Path, make_device: Callable[..., Device], version: str, shell: str
) -> None:
    write_bundle(tmp_path / "b", pair[:1], profile(version), timing=replace(QUICK, rounds=1))
    device = make_device(version=version)
    device.shell = shell
    done = device.build(tmp_path / "b")
    assert (done.returncode, done.stderr) == (0, "")
    workspace, alone, _ = DIALECTS[version]
    build, run = device.calls()
    assert {workspace, alone, "--noTF32"} <= set(build.split()) and "--fp16" not in build
    narrow = int(version.split(".")[0]) < 10
    assert ("0.int32.bin" in run) == narrow
    assert ("--includeDataTransfers" in run) == version.startswith("11")
    found = results(tmp_path / "b")
    assert found["passed"] and found["tensorrt"] == version and found["speedup"] == {"latency": None, "gpu": None}
    assert found == read_results(tmp_path / "b")


def test_fp16_is_asked_for_with_an_option_until_11(
    pair: list[BundleModel], tmp_path: Path, make_device: Callable[..., Device]
) -> None:
    for version in ("8.2.1", "10.3.0"):
        write_bundle(tmp_path / version, pair[:1], profile(version), "fp16", timing=replace(QUICK, rounds=1))
        device = make_device(version=version)
        assert device.build(tmp_path / version).returncode == 0
        build = device.calls()[0].split()
        assert "--fp16" in build and "--noTF32" not in build
        assert results(tmp_path / version)["models"]["pruned"]["outputs"][0]["tolerance"] == 3e-2
    newer = make_device(version="11.0.0").build(tmp_path / "10.3.0")
    assert newer.returncode == 1 and "takes the precision from the model" in newer.stderr


@pytest.mark.parametrize(("version", "knows"), [("8.2.1", False), ("8.5.2", True), ("8.6.2", True), ("10.3.0", True)])
def test_layers_that_fp16_would_overflow_are_kept_where_trtexec_can(
    pair: list[BundleModel], tmp_path: Path, make_device: Callable[..., Device], version: str, knows: bool
) -> None:
    model = replace(pair[0], keep_fp32=["/layer/norm/Pow", "/layer/norm/Mean"])
    for precision in ("fp16", "fp32"):
        write_bundle(tmp_path / precision, [model], profile(version), precision, timing=replace(QUICK, rounds=1))
    device = make_device(version=version)
    for precision in ("fp16", "fp32"):
        assert device.build(tmp_path / precision).returncode == 0
    half, _, single, _ = (set(call.split()) for call in device.calls())
    wanted = {"--precisionConstraints=obey", "--layerPrecisions=/layer/norm/Pow:fp32,/layer/norm/Mean:fp32"}
    assert (wanted <= half) == knows and not wanted & single and (knows or not wanted & half)


def test_before_and_after_are_timed_in_turn_and_summed_up(bundle: Path, device: Device) -> None:
    done = device.build(bundle)
    assert done.returncode == 0 and "speed-up" in done.stdout
    order = [call.split("/")[1] for call in device.calls() if call.startswith("--loadEngine")]
    assert order == ["pruned", "original", "original", "pruned"]
    found = results(bundle)
    for label in ("pruned", "original"):
        runs = [json.loads((bundle / f"results/{label}/times.{turn}.json").read_text()) for turn in (1, 2)]
        counted = [run for turn in runs for run in turn if run["startComputeMs"] >= QUICK.warm_up]
        assert 0 < len(counted) < sum(map(len, runs))  # this version lists its warm-up, too
        whole = np.percentile([run["latencyMs"] for run in counted], [50, 90, 99])
        alone = np.percentile([run["computeMs"] for run in counted], [50, 90, 99])
        model = found["models"][label]
        assert [model["latency_ms"][key] for key in ("median", "p90", "p99")] == pytest.approx(whole)
        assert [model["gpu_ms"][key] for key in ("median", "p90", "p99")] == pytest.approx(alone)
        assert (model["runs"], model["rounds"]) == (len(counted), 2)
        assert model["engine_bytes"] == (bundle / f"results/{label}/model.engine").stat().st_size
        assert read_times(bundle, label, QUICK.warm_up).shape == (len(counted), 2)
    medians = latency_by_label(found)
    assert medians is not None
    assert found["speedup"]["latency"] == pytest.approx(medians["original"]["median"] / medians["pruned"]["median"])


def test_an_older_tensorrt_than_the_targets_is_refused_and_a_newer_one_is_mentioned(
    single: Path, pair: list[BundleModel], tmp_path: Path, make_device: Callable[..., Device]
) -> None:
    newer = make_device(version="8.5.2").build(single)
    assert newer.returncode == 0
    assert "warning: TensorRT 8.5.2 is here, and this bundle was made for 8.2.1" in newer.stdout
    write_bundle(tmp_path / "orin", pair[:1], BUILT_IN["jetson-orin"], timing=QUICK)
    device = make_device(version="8.6.2")
    older = device.build(tmp_path / "orin")
    assert older.returncode == 1 and 'make one for a target with tensorrt = "8.6.2"' in older.stderr
    assert device.calls() == []
    oldest = make_device(version="8.0.1").build(single)
    assert oldest.returncode == 1 and "8.2 is the oldest" in oldest.stderr


def test_a_trtexec_that_names_no_version_and_one_that_is_not_there(single: Path, device: Device) -> None:
    device.play(banner=False)
    (device.folder / "bin/dpkg-query").write_text("#!/bin/sh\necho 8.2.1-1+cuda10.2\n")
    (device.folder / "bin/dpkg-query").chmod(0o755)
    assert device.build(single).returncode == 0 and results(single)["tensorrt"] == "8.2.1"
    missing = device.build(single, TRTEXEC="/nowhere/trtexec")
    assert missing.returncode == 1 and "TRTEXEC=/nowhere/trtexec is not a program" in missing.stderr
    (device.folder / "bin/trtexec").unlink()
    missing = device.build(single)
    assert missing.returncode == 1 and "no trtexec" in missing.stderr and "set TRTEXEC" in missing.stderr
    assert not (single / "results/results.json.part").exists()


@pytest.mark.parametrize("how", ["killed", "error"])
def test_out_of_memory_is_tried_again_with_a_smaller_workspace(single: Path, device: Device, how: str) -> None:
    device.play(oom_above=300, oom=how)
    done = device.build(single)
    assert done.returncode == 0 and "out of memory with this workspace" in done.stdout
    tried = [part for call in device.calls() for part in call.split() if part.startswith("--workspace")]
    assert tried == ["--workspace=512", "--workspace=256"]
    device.play(oom_above=100, oom=how)
    done = device.build(single, "--force")
    assert done.returncode == 1 and "with every workspace" in done.stderr and "swap" in done.stderr
    assert not (single / "results/pruned/model.engine").exists()
    assert not (single / "results/results.json").exists()


def test_a_device_with_much_memory_lets_trtexec_choose_first(
    pair: list[BundleModel], tmp_path: Path, make_device: Callable[..., Device]
) -> None:
    write_bundle(tmp_path / "orin", pair[:1], BUILT_IN["jetson-orin"], timing=replace(QUICK, rounds=1))
    device = make_device(version="10.3.0", oom_above=2000)
    assert device.build(tmp_path / "orin").returncode == 0
    first, second = device.calls()[:2]
    assert "--memPoolSize" not in first and "--memPoolSize=workspace:1024" in second


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"build": "error"}, "While parsing node number 3"),
        ({"build": "no_disk"}, "No space left on device"),
        ({"run": "killed"}, "could not run pruned (status 137)"),
        ({"run": "error"}, "illegal memory access"),
    ],
)
def test_a_failure_stops_with_what_trtexec_said_and_leaves_no_half_engine(
    single: Path, device: Device, settings: dict[str, Any], said: str
) -> None:
    device.play(**settings)
    done = device.build(single)
    assert done.returncode == 1 and said in done.stdout + done.stderr
    assert "its output is in results/pruned/" in done.stderr
    assert len([call for call in device.calls() if call.startswith("--onnx")]) == 1  # not a matter of memory
    assert not list(single.rglob("*.part")) and not (single / "results/results.json").exists()
    assert (single / "results/pruned/model.engine").exists() == ("run" in settings)


@pytest.mark.parametrize(
    ("how", "said"),
    [
        ("wrong_output", "differs from onnxruntime's by"),
        ("nan_output", "is not finite"),
        ("broken_times", "the times of pruned cannot be read"),
        ("empty_times", "the times of pruned hold no run"),
    ],
)
def test_what_is_wrong_or_broken_is_said_and_not_counted(single: Path, device: Device, how: str, said: str) -> None:
    device.play(run=how)
    done = device.build(single)
    assert done.returncode == 1 and said in done.stderr
    found = results(single)
    assert not found["passed"] and len(found["problems"]) == 1
    model = found["models"]["pruned"]
    assert (model["latency_ms"] is None) == how.endswith("times")
    assert model["outputs_passed"] is how.endswith("times")
    assert read_results(single) == found


def test_a_second_run_keeps_engines_of_the_same_model_version_and_options(single: Path, device: Device) -> None:
    def built(*options: str) -> bool:
        before = len(device.calls())
        assert device.build(single, *options).returncode == 0
        return any(call.startswith("--onnx") for call in device.calls()[before:])

    assert built()
    assert not built()
    assert built("--force")
    assert built("--tf32")
    assert "--noTF32" not in [call for call in device.calls() if call.startswith("--onnx")][-1]
    assert results(single)["tf32"] is True
    device.play(version="8.2.3")
    assert built("--tf32")


def test_a_folder_that_was_not_copied_whole_is_refused(single: Path, device: Device) -> None:
    (single / "pruned/model.onnx").write_bytes(b"half")
    done = device.build(single)
    assert done.returncode == 1 and "pruned/model.onnx is not what it was: copy the folder again" in done.stderr
    assert device.calls() == []
    (single / "settings.sh").unlink()
    done = device.build(single)
    assert done.returncode == 1 and "copy the whole folder" in done.stderr


def test_without_python_it_builds_and_times_and_says_what_is_left(single: Path, device: Device) -> None:
    tools = device.folder / "tools"
    tools.mkdir()
    names = "sh dash awk sed cat tr rm mv mkdir head cut wc df du uname dirname sha256sum grep env"
    for name in names.split(" "):
        (tools / name).symlink_to(str(shutil.which(name)))
    done = device.build(single, PATH=f"{device.folder / 'bin'}:{tools}")
    assert done.returncode == 0 and "nothing is compared" in done.stdout
    assert (single / "results/pruned/times.1.json").exists() and not (single / "results/results.json").exists()
    assert read_results(single)["passed"]


def test_short_memory_is_mentioned_and_a_full_disk_stops(single: Path, device: Device) -> None:
    device.memory(700, 100)
    done = device.build(single)
    assert "free memory: 700 MB, free swap: 100 MB" in done.stdout and "warning: builds may be killed" in done.stdout
    device.memory(3000)
    assert "warning" not in device.build(single).stdout
    (device.folder / "bin/df").write_text("#!/bin/sh\necho head\necho disk 1000000 990000 10000 99% /\n")
    (device.folder / "bin/df").chmod(0o755)
    done = device.build(single, "--force")
    assert done.returncode == 1 and "9 MB are free on this disk" in done.stderr


def test_the_power_mode_is_in_the_results_where_the_device_tells(single: Path, device: Device) -> None:
    (device.folder / "bin/nvpmodel").write_text("#!/bin/sh\necho 'NV Power Mode: MAXN'\necho 0\n")
    (device.folder / "bin/nvpmodel").chmod(0o755)
    done = device.build(single)
    assert results(single)["device"]["power mode"] == "MAXN" and "power mode MAXN" in done.stdout


@pytest.mark.parametrize(
    ("layers", "said"),
    [
        ([{"Name": "a", "LayerType": "kgen", "TacticName": "_gemm_mha_v2_0x1f"}], "yes (1 layers)"),
        ([{"Name": "b", "LayerType": "SoftMax", "TacticName": ""}], "no (1 softmax layers of their own)"),
        ([{"Name": "/layer/fmha_like/Relu", "LayerType": "PointWise"}], "not said"),
        (["{ForeignNode[Softmax]}"], "not said"),
        (["_gemm_mha_v2"], "yes (1 layers)"),
    ],
)
def test_fused_attention_is_told_by_kernels_and_not_by_the_models_own_names(
    single: Path, device: Device, layers: list[Any], said: str
) -> None:
    device.play(layers={"Layers": layers, "Bindings": []})
    assert device.build(single).returncode == 0
    assert results(single)["models"]["pruned"]["fused_attention"] == said


@pytest.mark.parametrize("shell", ["dash", "bash"])
def test_an_interrupt_leaves_no_half_written_engine_and_ends_trtexec(single: Path, device: Device, shell: str) -> None:
    device.play(build="slow")
    running = subprocess.Popen(
        [shell, str(single / "build.sh")], env=device.environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    part = single / "results/pruned/model.engine.part"
    deadline = time.monotonic() + 20
    while not (part.exists() and part.stat().st_size) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert part.exists()
    again = device.build(single)
    assert again.returncode == 1 and "another build.sh runs in this folder" in again.stderr
    running.send_signal(signal.SIGTERM)
    _, errors = running.communicate(timeout=20)
    assert running.returncode == 130 and b"interrupted" in errors
    assert not list(single.rglob("*.part")) and not (single / "results/.running").exists()
    assert device.running() == []
    device.play()
    assert device.build(single).returncode == 0


def test_a_lock_of_a_killed_run_does_not_stop_the_next(single: Path, device: Device) -> None:
    gone = subprocess.Popen(["true"])
    gone.wait()
    (single / "results/.running").mkdir(parents=True)
    (single / "results/.running/pid").write_text(str(gone.pid))
    assert device.build(single).returncode == 0


@pytest.mark.parametrize("options", [["--rounds", "0"], ["--rounds"], ["--fast"], ["--seconds", "1; ls"]])
def test_wrong_options_are_one_line(single: Path, device: Device, options: list[str]) -> None:
    done = device.build(single, *options)
    assert done.returncode == 1 and done.stderr.count("\n") == 1 and done.stderr.startswith("build.sh:")


def test_rounds_and_seconds_are_taken(single: Path, device: Device) -> None:
    assert device.build(single, "--rounds", "3", "--seconds", "7").returncode == 0
    runs = [call for call in device.calls() if call.startswith("--loadEngine")]
    assert len(runs) == 3 and all("--duration=7" in call for call in runs)
    assert device.build(single).returncode == 0
    assert results(single)["models"]["pruned"]["rounds"] == 1  # the times of the run before do not count


def test_names_beyond_ascii_do_not_stop_a_plain_terminal(
    pair: list[BundleModel], tmp_path: Path, device: Device
) -> None:
    proto = onnx.ModelProto()
    proto.CopyFrom(pair[0].proto)
    proto.graph.output[0].name = proto.graph.node[-1].output[0] = "größe"
    model = replace(pair[0], proto=proto, reference={"größe": pair[0].reference["y"]})
    write_bundle(tmp_path / "b", [model], NANO, timing=replace(QUICK, rounds=1))
    device.play(run="wrong_output")
    done = device.build(tmp_path / "b", PYTHONIOENCODING="ascii", LC_ALL="C", PYTHONUTF8="0")
    assert done.returncode == 1 and "the output gr\\xf6\\xdfe of pruned differs" in done.stderr


def test_results_are_asked_for_before_there_are_any(single: Path) -> None:
    with pytest.raises(DeviceError, match="nothing was built here yet"):
        read_results(single)


def test_a_run_killed_outright_leaves_a_folder_that_builds(single: Path, device: Device) -> None:
    device.play(build="slow")
    running = subprocess.Popen(
        ["sh", str(single / "build.sh")], env=device.environment(), stdout=subprocess.PIPE, start_new_session=True
    )
    part = single / "results/pruned/model.engine.part"
    while not (part.exists() and part.stat().st_size):
        time.sleep(0.05)
    os.killpg(running.pid, signal.SIGKILL)
    running.communicate()
    device.play()
    assert device.build(single).returncode == 0
    assert not list(single.rglob("*.part"))
