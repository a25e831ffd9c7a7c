"""The local backend against stand-ins of TensorRT 8.2 to 11: each has the names of that release and no others."""

from __future__ import annotations

import sys
from types import SimpleNamespace
from typing import Any

import graphs
import numpy as np
import onnx
import pytest
import standins
from onnx import TensorProto, helper

from onnxsnp.deploy import cuda as cuda_module
from onnxsnp.deploy import local
from onnxsnp.deploy.cuda import Gpu, open_cuda
from onnxsnp.deploy.importer import open_log
from onnxsnp.deploy.running import measure, running
from onnxsnp.deploy.targets import get_target
from onnxsnp.errors import ModelError, PlanError

RELEASES = ("8.2.1.8", "8.4.1.5", "8.5.2.2", "8.6.1.6", "10.3.0.26", "11.0.0.1")


def tiny() -> onnx.ModelProto:
    """Two inputs, one of them int64, which releases below 10 make int32."""
    nodes = [
        helper.make_node("Gather", ["x", "i"], ["g"], name="pick", axis=1),
        helper.make_node("Relu", ["g"], ["y"], name="act"),
    ]
    ends = [
        helper.make_tensor_value_info("x", TensorProto.FLOAT, [2, 5]),
        helper.make_tensor_value_info("i", TensorProto.INT64, [3]),
        helper.make_tensor_value_info("y", TensorProto.FLOAT, [2, 3]),
    ]
    graph = helper.make_graph(nodes, "tiny", ends[:2], ends[2:])
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 13)], ir_version=7)


def refused(op: str, name: str) -> onnx.ModelProto:
    model = tiny()
    model.graph.node[1].op_type, model.graph.node[1].name = op, name
    return model


@pytest.mark.parametrize("version", RELEASES)
def test_every_release_builds_runs_and_gives_what_onnxruntime_gives(version: str) -> None:
    gpu = standins.Cuda()
    library = standins.tensorrt(version, gpu)
    built = local.build(library, tiny(), "fp32")
    assert built.library == f"TensorRT {version}" and built.seconds >= 0
    rng = np.random.default_rng(0)
    feeds = {"x": rng.standard_normal((2, 5)).astype(np.float32), "i": np.asarray([4, 0, 2])}
    with running(library, open_log(library), gpu, [(built.data, feeds), (built.data, feeds)]) as engines:
        times = measure(engines, rounds=3, warmup=1)
        assert times.shape == (3, 2) and (times > 0).all() and gpu.waits == 8
        for engine in engines:
            np.testing.assert_array_equal(engine.outputs()["y"], graphs.run(tiny(), feeds)[0])
    assert not gpu.memory  # all of it was given back


@pytest.mark.parametrize("version", RELEASES)
def test_fp16_is_a_flag_below_11_and_fp32_is_no_tf32(version: str) -> None:
    library = standins.tensorrt(version, standins.Cuda())
    local.build(library, tiny(), "fp16")
    local.build(library, tiny(), "fp32")
    major = int(version.split(".")[0])
    assert [one["flags"] for one in library.built] == [["TF32", "FP16"] if major < 11 else ["TF32"], []]
    network = {8: 1, 10: 0, 11: 2}[major]  # explicit batch, nothing, strongly typed
    assert {one["network"] for one in library.built} == {network}


def test_layers_that_fp16_would_overflow_stay_in_single_precision() -> None:
    library = standins.tensorrt("8.6.1.6", standins.Cuda())
    local.build(library, tiny(), "fp16", keep_fp32=["act"])
    local.build(library, tiny(), "fp32", keep_fp32=["act"])
    assert [one["kept"] for one in library.built] == [["act", "act_7"], []]
    assert [one["flags"] for one in library.built] == [["TF32", "FP16", "OBEY_PRECISION_CONSTRAINTS"], []]


@pytest.mark.parametrize("version", RELEASES)
def test_what_the_importer_refuses_is_named(version: str) -> None:
    library = standins.tensorrt(version, standins.Cuda())
    with pytest.raises(ModelError) as caught:
        local.build(library, refused("Det", "volume"), "fp32")
    assert f"TensorRT {version} does not support Det (at volume)" in str(caught.value) and caught.value.hint


def test_of_several_refusals_the_first_is_shown_and_the_others_are_counted() -> None:
    model = refused("Det", "first")
    model.graph.node.append(helper.make_node("Det", ["g"], ["z"], name="second"))
    with pytest.raises(ModelError, match=r"does not support Det \(and 1 more\) \(at first\)"):
        local.build(standins.tensorrt("10.3.0.26", standins.Cuda()), model, "fp32")


def test_steps_of_the_build_are_reported_where_the_release_can() -> None:
    seen: list[Any] = []
    for version, expected in (("8.5.2.2", []), ("8.6.1.6", [("build", 1, 2), ("build", 2, 2)])):
        local.build(standins.tensorrt(version, standins.Cuda()), tiny(), "fp32", lambda *step: seen.append(step))
        assert seen == expected


def test_a_build_without_memory_says_what_to_do() -> None:
    with pytest.raises(ModelError, match="could not build an engine: out of memory; close other programs"):
        local.build(standins.tensorrt("8.2.1.8", standins.Cuda(), memory_ok=False), tiny(), "fp32")


def test_an_engine_of_another_release_is_refused() -> None:
    gpu = standins.Cuda()
    built = local.build(standins.tensorrt("8.6.1.6", gpu), tiny(), "fp32")
    other = standins.tensorrt("10.3.0.26", gpu)
    with (
        pytest.raises(ModelError, match="cannot be loaded on this GPU: The engine plan file is not compatible"),
        running(other, open_log(other), gpu, [(built.data, {})]),
    ):
        pass


def test_inputs_that_do_not_fit_are_refused_and_leave_no_memory_behind() -> None:
    gpu = standins.Cuda()
    library = standins.tensorrt("10.3.0.26", gpu)
    data = local.build(library, tiny(), "fp32").data
    for feeds in ({}, {"x": np.zeros((2, 4), np.float32)}):
        with (
            pytest.raises(ModelError, match=r"the engine takes 'x' as \(2, 5\)"),
            running(library, open_log(library), gpu, [(data, feeds)]),
        ):
            pass
        assert not gpu.memory


@pytest.mark.parametrize(
    ("target", "version", "capability", "why"),
    [
        ("jetson-nano", (8, 2, 1, 8), (5, 3), ""),
        ("jetson-nano", (8, 2, 1, 8), (8, 9), "jetson-nano has 5.3"),
        ("jetson-nano", (10, 3, 0), (5, 3), "jetson-nano needs TensorRT 8.2.1"),
        ("jetson-orin", (10, 3, 0, 30), (8, 7), ""),
        ("jetson-orin", (10, 4, 0), (8, 7), "needs TensorRT 10.3.0"),
        ("tensorrt-8.6", (8, 6, 3), (7, 5), ""),
        ("tensorrt-8.6", (8, 5, 2), (7, 5), "needs TensorRT 8.6.1"),
        ("tensorrt-10", (10, 9, 0), (8, 9), ""),
        ("tensorrt-10", (11, 0, 0), (8, 9), "needs TensorRT 10.0.0"),
        ("rtx", (10, 12, 0), (8, 9), "takes engines of tensorrt-rtx"),
    ],
)
def test_an_engine_is_for_the_release_and_the_gpu_it_is_built_with(
    target: str, version: tuple[int, ...], capability: tuple[int, int], why: str
) -> None:
    found = local.misfit(get_target(target), version, Gpu("some GPU", capability))
    assert (why in found) and bool(found) == bool(why)


def test_a_machine_that_is_not_the_target_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    gpu = standins.Cuda()
    standins.install(monkeypatch, standins.tensorrt("10.3.0.26", gpu), gpu)
    assert local.fits(get_target("tensorrt-10")) and not local.fits(get_target("jetson-nano"))
    assert local.require(get_target("tensorrt-10"))[1] is gpu
    with pytest.raises(PlanError, match=r"valid only for .*needs TensorRT 8.2.1; use --backend bundle"):
        local.require(get_target("jetson-nano"))


def test_without_tensorrt_one_line_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "tensorrt", None)
    with pytest.raises(ModelError) as caught:
        local.require(get_target("tensorrt-10"))
    assert "pip install onnxsnp[tensorrt]" in str(caught.value) and "\n" not in str(caught.value)
    assert not local.fits(get_target("tensorrt-10"))


def runtime(devices: int = 1, error: int = 0) -> Any:
    """A stand-in for `cuda.bindings.runtime`: functions return an error and results."""
    memory: dict[int, Any] = {}

    def malloc(size: int) -> tuple[int, int]:
        memory[len(memory) + 64] = size
        return (0, max(memory))

    return SimpleNamespace(
        cudaGetDeviceCount=lambda: (error, devices),
        cudaGetDeviceProperties=lambda index: (0, SimpleNamespace(name=b"GPU", major=8, minor=9)),
        cudaMalloc=malloc,
        cudaFree=lambda address: (0 if memory.pop(address, None) else 17,),
        cudaMemcpyKind=SimpleNamespace(cudaMemcpyHostToDevice=1, cudaMemcpyDeviceToHost=2),
        cudaMemcpy=lambda to, source, size, kind: (0,),
        cudaStreamCreate=lambda: (0, 5),
        cudaStreamSynchronize=lambda stream: (0 if stream == 5 else 1,),
    )


def test_cuda_python_is_found_under_its_new_and_its_old_name(monkeypatch: pytest.MonkeyPatch) -> None:
    names = ("cuda.bindings.runtime", "cuda.cudart")
    for here in names:
        monkeypatch.setattr(cuda_module, "import_module", lambda name, here=here: runtime() if name == here else _no())
        found = open_cuda()
        assert found.gpu() == Gpu("GPU", (8, 9)) and found.stream() == found.stream() == 5
        address = found.allocate(16)
        found.upload(address, np.zeros(4, np.float32))
        found.wait()
        found.free(address)
        with pytest.raises(ModelError, match="CUDA failed in cudaFree: 17"):
            found.free(address)


def _no() -> Any:
    raise ImportError("not here")


def test_no_package_no_driver_and_no_gpu_are_told_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    for made, message in (
        (_no, "no package for CUDA is installed; pip install cuda-python"),
        (lambda: runtime(error=35), "there is no GPU here: 35"),
        (lambda: runtime(devices=0), "there is no GPU here"),
    ):
        monkeypatch.setattr(cuda_module, "import_module", lambda name, made=made: made())
        with pytest.raises(ModelError, match=message):
            open_cuda()
