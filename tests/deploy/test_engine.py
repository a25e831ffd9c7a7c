"""From a model to a bundle or an engine: every backend, what is written, and what is claimed."""

from __future__ import annotations

import hashlib
import json
import shutil
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import graphs
import numpy as np
import onnx
import pytest
import standins
from devices import Device
from loopback import Loopback
from onnx import TensorProto, helper

import onnxsnp
from onnxsnp.deploy import engine, prepare
from onnxsnp.deploy.bundle import Timing, read_manifest
from onnxsnp.deploy.originals import find_original
from onnxsnp.deploy.parity import OutputParity, Parity
from onnxsnp.deploy.targets import BUILT_IN, get_target
from onnxsnp.errors import DeviceError, ModelError, OnnxSnpError, PlanError, VerificationError
from onnxsnp.pruning import prune

SHORT = Timing(rounds=1, seconds=1, iterations=20, warm_up=100)


@pytest.fixture(scope="module")
def pruned(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a model, the one pruned from it, and the run record."""
    folder = tmp_path_factory.mktemp("pruned")
    model = graphs.transformer(blocks=1, heads=2, qk=16, v=16, width=24, ffn=32, classes=4)
    onnx.save(model, folder / "net.onnx")
    options = {"compensation": "none", "criterion": "l2", "samples": 4, "latency": False, "threads": 1}
    prune(folder / "net.onnx", 0.4, output=folder / "small.onnx", **options)
    return folder


@pytest.fixture
def here(pruned: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The same files in a folder of the test's own, with the record pointing there."""
    folder = tmp_path / "here"
    shutil.copytree(pruned, folder)
    record = json.loads((folder / "small.json").read_text())
    (folder / "small.json").write_text(json.dumps({**record, "input": "net.onnx"}))
    monkeypatch.chdir(folder)
    return folder


def written(folder: Path) -> set[str]:
    return {one.name for one in folder.iterdir()}


def check_record(result: onnxsnp.EngineResult) -> dict[str, Any]:
    """The record is on the disk, and its files are what is in the folder (but for results)."""
    record = json.loads(Path(f"{result.output}.engine.json").read_text())
    assert record == result.record and record["built"] == result.built
    for entry in record["files"]:
        data = (result.output / entry["name"]).read_bytes()
        assert (len(data), hashlib.sha256(data).hexdigest()) == (entry["bytes"], entry["sha256"])
    return record


def test_without_a_gpu_a_bundle_is_written_and_nothing_is_called_built(here: Path) -> None:
    before = written(here)
    result = onnxsnp.build_engine("small.onnx", target="jetson-nano", output="nano")
    record = check_record(result)
    assert (record["backend"], record["built"], record["engine"], record["latency"]) == ("bundle", False, None, None)
    assert record["outputs"] is None and record["precision"] == "fp32" and record["target"]["tensorrt"] == "8.2.1"
    assert record["next"] == ["scp -r nano USER@DEVICE:", "ssh USER@DEVICE sh nano/build.sh"]
    assert written(here) == before | {"nano", "nano.engine.json"}
    assert [one["label"] for one in read_manifest("nano")["models"]] == ["pruned", "original"]
    assert not list(Path("nano").rglob("*.engine"))
    for one in (record, record["original"]):
        assert one["parity"]["passed"] and one["parity"]["difference"] < 1e-5 and one["lint"] == []
        assert {change["op"] for change in one["changes"]} >= {"LayerNormalization"}
    assert Path(record["source"]).name == "small.onnx" and Path(record["original"]["source"]).name == "net.onnx"


def test_the_reference_of_a_bundle_is_what_the_given_model_computes(here: Path) -> None:
    onnxsnp.build_engine("small.onnx", target="jetson-nano", output="nano", seed=3)
    for entry, path in zip(read_manifest("nano")["models"], ("small.onnx", "net.onnx"), strict=True):
        model = onnx.load(path)
        feeds = {
            one["name"]: np.frombuffer((Path("nano") / one["file"]).read_bytes(), one["dtype"]).reshape(one["shape"])
            for one in entry["inputs"]
        }
        (output,) = entry["outputs"]
        held = np.frombuffer((Path("nano") / output["file"]).read_bytes(), output["dtype"]).reshape(output["shape"])
        np.testing.assert_allclose(held, graphs.run(model, feeds)[0], rtol=1e-5, atol=1e-6)


def test_a_model_that_was_not_pruned_has_nothing_to_compare_with(here: Path) -> None:
    record = onnxsnp.build_engine("net.onnx", target="jetson-nano", output="nano").record
    assert (record["label"], record["original"]) == ("model", None)
    assert [one["label"] for one in read_manifest("nano")["models"]] == ["model"]


def test_the_original_is_found_only_while_it_is_what_it_was(here: Path) -> None:
    assert find_original(Path("small.onnx")) == (Path("net.onnx"), "")
    assert find_original(Path("net.onnx")) == (None, "")  # it has no record
    changed = onnx.load("net.onnx")
    values = graphs.initializers(changed)
    name = next(name for name, array in values.items() if array.ndim == 2)
    onnx.save(graphs.set_weights(changed, {name: values[name] * 2}), "net.onnx")
    assert find_original(Path("small.onnx")) == (None, "net.onnx is no longer the model that was pruned")
    result = onnxsnp.build_engine("small.onnx", target="jetson-nano", output="nano")
    assert result.record["original"] is None
    assert "net.onnx is no longer the model that was pruned" in result.record["notes"]
    Path("net.onnx").unlink()
    assert "is gone; name it with --original" in find_original(Path("small.onnx"))[1]


@pytest.mark.parametrize("text", ["{", "[]", "{}", '{"output": "small.onnx", "after": {"bytes": 1}, "plan": {}}'])
def test_a_file_that_is_no_record_of_the_model_says_nothing(here: Path, text: str) -> None:
    Path("small.json").write_text(text)
    assert find_original(Path("small.onnx")) == (None, "")


def test_a_record_of_an_older_run_without_the_input_asks_for_it(here: Path) -> None:
    record = json.loads(Path("small.json").read_text())
    del record["input"]
    Path("small.json").write_text(json.dumps(record))
    path, why = find_original(Path("small.onnx"))
    assert path is None and "name it with --original" in why
    given = onnxsnp.build_engine("small.onnx", target="jetson-nano", output="nano", original="net.onnx").record
    assert Path(given["original"]["source"]).name == "net.onnx" and why not in given["notes"]


def not_taken() -> onnx.ModelProto:
    ends = [
        helper.make_tensor_value_info("x", TensorProto.FLOAT, [2, 3, 3]),
        helper.make_tensor_value_info("y", TensorProto.FLOAT, [2]),
        helper.make_tensor_value_info("z", TensorProto.FLOAT, [2]),
    ]
    nodes = [helper.make_node("Det", ["x"], [name], name=f"volume/{name}") for name in "yz"]
    graph = helper.make_graph(nodes, "volumes", ends[:1], ends[1:])
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)


@pytest.mark.parametrize("backend", ["bundle", "rtx"])
def test_what_the_target_does_not_take_is_listed_and_nothing_is_written(
    tmp_path: Path, backend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("onnxsnp.deploy.rtx.load", lambda: None)
    with pytest.raises(prepare.NotTaken, match="jetson-nano does not take 2 nodes of the model as they are") as caught:
        onnxsnp.build_engine(not_taken(), target="jetson-nano", output=tmp_path / "nano", backend=backend)
    assert [(one.node, one.op) for one in caught.value.findings] == [("volume/y", "Det"), ("volume/z", "Det")]
    assert all(one.remedy for one in caught.value.findings) and written(tmp_path) == set()


def test_fp16_is_compared_in_half_precision_where_the_device_makes_it(here: Path) -> None:
    nano = onnxsnp.build_engine("small.onnx", target="jetson-nano", output="nano", precision="fp16").record
    assert nano["parity"]["tolerance"] < 1e-4 and nano["parity"]["difference"] < 1e-5  # the file is in single precision
    assert 1e-6 < nano["parity_fp16"]["difference"] <= nano["parity_fp16"]["tolerance"] < 0.1
    plain = onnxsnp.build_engine("small.onnx", target="jetson-nano", output="nano").record
    assert plain["parity_fp16"] is None


def test_a_model_that_overflows_in_half_precision_is_not_made_an_engine_of(here: Path) -> None:
    model = onnx.load("net.onnx")
    values = graphs.initializers(model)
    large = {name: array * 1e6 for name, array in values.items() if name in ("embed.w", "embed.b")}
    assert len(large) == 2
    onnx.save(graphs.set_weights(model, large), "large.onnx")
    before = written(here)
    onnxsnp.build_engine("large.onnx", target="jetson-nano", output="out")
    shutil.rmtree("out")
    Path("out.engine.json").unlink()
    with pytest.raises(VerificationError, match=r"in half precision, the model's output 'y' .*--precision fp32"):
        onnxsnp.build_engine("large.onnx", target="jetson-nano", output="out", precision="fp16")
    assert written(here) == before


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_a_lowered_model_that_computes_something_else_is_not_written(
    here: Path, monkeypatch: pytest.MonkeyPatch, precision: str
) -> None:
    before = written(here)
    wrong = Parity([OutputParity("a", 1e-9), OutputParity("y", 0.25)], 2e-5, "single precision")
    monkeypatch.setattr(prepare, "parity", lambda *rest: wrong)
    with pytest.raises(VerificationError, match=r"output 'y' differs from what it was by 2\.5e-01 .*2e-05 is allowed"):
        onnxsnp.build_engine("small.onnx", target="jetson-nano", output="nano", precision=precision)
    assert written(here) == before


def test_the_worst_of_several_inputs_counts(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = iter([1e-7, 3e-6, 1e-8])
    monkeypatch.setattr(prepare, "parity", lambda *rest: Parity([OutputParity("y", next(found))]))
    ready, feeds = prepare.prepare("net.onnx", "model", get_target("jetson-nano"), "fp32")
    assert len(feeds) == 3 and ready.parity.difference == 3e-6
    assert not np.array_equal(feeds[0]["x"], feeds[1]["x"])


def test_an_rtx_engine_is_built_and_called_that(here: Path) -> None:
    pytest.importorskip("tensorrt_rtx", reason="TensorRT for RTX is not installed: pip install tensorrt-rtx")
    steps: list[tuple[str, int, int]] = []
    result = onnxsnp.build_engine("small.onnx", target="rtx", output="rtx", progress=lambda *step: steps.append(step))
    record = check_record(result)
    assert record["built"] and record["backend"] == "rtx" and record["latency"] is None and record["next"] == []
    assert record["engine"]["bytes"] == Path("rtx/pruned.engine").stat().st_size > 10_000
    assert record["engine"]["built_with"].startswith("TensorRT for RTX ")
    assert any("an RTX engine, not a Jetson engine" in note for note in record["notes"])
    assert written(here / "rtx") == {f"{label}.{end}" for label in ("pruned", "original") for end in ("engine", "onnx")}
    assert ("build", 1, steps[-1][2]) in steps
    again = onnxsnp.build_engine("net.onnx", target="rtx", output="rtx")  # takes the place of the first
    assert written(here / "rtx") == {"model.engine", "model.onnx"} and again.built


def test_an_rtx_engine_that_cannot_be_built_leaves_what_was_there(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("tensorrt_rtx", reason="TensorRT for RTX is not installed: pip install tensorrt-rtx")
    onnxsnp.build_engine("small.onnx", target="rtx", output="rtx")
    before = {one.name: one.read_bytes() for one in Path("rtx").iterdir()}
    record = Path("rtx.engine.json").read_bytes()
    with pytest.raises(ModelError, match="need --precision fp16"):
        onnxsnp.build_engine("small.onnx", target="rtx", output="rtx", compute_capabilities=["7.5"])
    assert {one.name: one.read_bytes() for one in Path("rtx").iterdir()} == before
    assert Path("rtx.engine.json").read_bytes() == record


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Callable[..., standins.Cuda]:
    """Stand-ins of TensorRT and a GPU in place of what is here."""

    def make(version: str, capability: tuple[int, int] = (8, 9)) -> standins.Cuda:
        one = standins.Cuda(capability)
        standins.install(monkeypatch, standins.tensorrt(version, one), one)
        monkeypatch.setattr("onnxsnp.deploy.backends.measure", lambda engines, progress: _times(engines))
        return one

    return make


def _times(engines: Any) -> np.ndarray:
    """Runs every engine, and gives times whose quantiles are known: 1 to 100 ms, the second twice as long."""
    for one in engines:
        one.run()
    return np.stack([np.arange(1.0, 101.0) * (1 + place) for place in range(len(engines))], axis=1)


@pytest.mark.parametrize(
    ("target", "version", "capability"),
    [("jetson-nano", "8.2.1.8", (5, 3)), ("tensorrt-8.6", "8.6.1.6", (8, 9)), ("jetson-orin", "10.3.0.30", (8, 7))],
)
def test_on_the_target_itself_engines_are_built_run_and_compared(
    here: Path, gpu: Callable[..., standins.Cuda], target: str, version: str, capability: tuple[int, int]
) -> None:
    cuda = gpu(version, capability)
    result = onnxsnp.build_engine("small.onnx", target=target, output="out")
    record = check_record(result)
    assert record["backend"] == "local" and record["built"] and not cuda.memory
    assert record["engine"]["built_with"] == f"TensorRT {version}"
    assert record["latency"]["after"] == pytest.approx({"median": 50.5, "p90": 90.1, "p99": 99.01})
    assert record["latency"]["before"] == pytest.approx({"median": 101.0, "p90": 180.2, "p99": 198.02})
    assert record["latency"]["speedup"] == pytest.approx(2.0)
    assert all(output["passed"] and output["relative_difference"] < 1e-5 for output in record["outputs"])


def test_an_engine_that_computes_something_else_is_told(
    here: Path, gpu: Callable[..., standins.Cuda], monkeypatch: pytest.MonkeyPatch
) -> None:
    gpu("10.3.0.30", (8, 7))
    real = standins.Cuda.download

    def off(self: standins.Cuda, array: np.ndarray, address: int) -> None:
        real(self, array, address)
        if array.shape == (1, 4):
            array += np.abs(array).max()

    monkeypatch.setattr(standins.Cuda, "download", off)
    record = onnxsnp.build_engine("small.onnx", target="jetson-orin", output="out").record
    assert [output["passed"] for output in record["outputs"]] == [False]
    assert any("of the engine differs from onnxruntime's by 1.0e+00" in note for note in record["notes"])


def test_what_is_missing_is_known_before_the_work(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "tensorrt", None)
    monkeypatch.setitem(sys.modules, "tensorrt_rtx", None)
    monkeypatch.setattr(engine, "prepare", lambda *rest, **more: pytest.fail("it was lowered"))
    for backend, says in (("local", "TensorRT is not installed"), ("rtx", "TensorRT for RTX is not installed")):
        with pytest.raises(ModelError, match=says):
            onnxsnp.build_engine("small.onnx", target="tensorrt-10", output="out", backend=backend)


def test_over_ssh_the_device_builds_times_and_is_compared(here: Path, loopback: Loopback) -> None:
    heard: list[str] = []
    options = {"host": loopback.host, "ssh": loopback.ssh, "timing": SHORT, "say": heard.append}
    record = check_record(onnxsnp.build_engine("small.onnx", target="jetson-nano", output="nano", **options))
    assert record["backend"] == "ssh" and record["built"] and heard
    path = Path("nano") / record["engine"]["file"]
    assert record["engine"]["bytes"] == path.stat().st_size and "on loopback" in record["engine"]["built_with"]
    assert record["latency"]["before"]["median"] > 0 and record["latency"]["after"]["p99"] > 0
    assert all(output["passed"] for output in record["outputs"]) and record["next"] == []
    assert loopback.left == []


def test_over_ssh_a_failed_build_is_no_engine(here: Path, device: Device, loopback: Loopback) -> None:
    device.play(build="error")
    with pytest.raises(DeviceError, match=r"loopback.*results"):
        onnxsnp.build_engine(
            "small.onnx", target="jetson-nano", output="nano", host=loopback.host, ssh=loopback.ssh, timing=SHORT
        )
    assert not Path("nano.engine.json").exists() and loopback.left == []


def test_the_backend_gets_as_far_as_it_can_from_here(
    gpu: Callable[..., standins.Cuda], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "tensorrt", None)
    choose = engine.choose_backend
    assert choose(BUILT_IN["jetson-nano"], None, None) == "bundle" == choose(BUILT_IN["tensorrt-10"], None, None)
    assert choose(BUILT_IN["rtx"], None, None) == "rtx" and choose(BUILT_IN["rtx"], "bundle", None) == "bundle"
    assert choose(BUILT_IN["jetson-nano"], None, "me@nano") == "ssh" == choose(BUILT_IN["rtx"], "ssh", "me@nano")
    gpu("10.3.0.30", (8, 7))
    assert choose(BUILT_IN["jetson-orin"], None, None) == "local" == choose(BUILT_IN["tensorrt-10"], None, None)
    assert choose(BUILT_IN["jetson-nano"], None, None) == "bundle"


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"backend": "trt"}, "unknown backend 'trt'; .*bundle, local, rtx, ssh"),
        ({"backend": "bundle", "host": "nano"}, "--host does nothing with --backend bundle"),
        ({"backend": "ssh"}, "--backend ssh needs a device; add --host"),
        ({"precision": "int8"}, "unknown precision 'int8'"),
        ({"target": "jetson-nanoo"}, "unknown target 'jetson-nanoo'; did you mean jetson-nano"),
        ({"target": replace(BUILT_IN["jetson-nano"], precisions=("fp32",)), "precision": "fp16"}, "does not run fp16"),
        ({"compute_capabilities": ["8.9"]}, "for RTX engines only"),
        ({"backend": "rtx", "compute_capabilities": ["sm_89"]}, "no compute capability: 'sm_89'; write it as 8.9"),
        ({"output": "net.onnx"}, "net.onnx exists and is not a folder"),
        ({"output": "absent/nano"}, "output folder does not exist: absent"),
        ({"original": "absent.onnx"}, "no such model file: absent.onnx"),
    ],
)
def test_bad_options_are_one_clear_line(here: Path, options: dict[str, Any], says: str) -> None:
    before = written(here)
    with pytest.raises(OnnxSnpError, match=says):
        onnxsnp.build_engine("small.onnx", **{"target": "jetson-nano", "output": "out", **options})
    assert written(here) == before


@pytest.mark.parametrize("backend", ["bundle", "rtx"])
def test_what_someone_else_put_into_the_folder_stays(here: Path, backend: str) -> None:
    if backend == "rtx":
        pytest.importorskip("tensorrt_rtx", reason="TensorRT for RTX is not installed: pip install tensorrt-rtx")
    Path("out").mkdir()
    Path("out/thesis.txt").write_text("years of work")
    with pytest.raises(PlanError, match="choose another folder with -o, or remove it first"):
        onnxsnp.build_engine("small.onnx", target="rtx", output="out", backend=backend)
    assert written(here / "out") == {"thesis.txt"} and not Path("out.engine.json").exists()
