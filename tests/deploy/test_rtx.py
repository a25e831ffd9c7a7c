"""Real engines with TensorRT for RTX, which parses and builds without a GPU: a real importer for what is lowered."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper
from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_static

from onnxsnp.analysis import Analysis, analyse_model
from onnxsnp.deploy import rtx
from onnxsnp.deploy.bundle import has_half
from onnxsnp.deploy.lint import lint
from onnxsnp.deploy.lower import lower
from onnxsnp.deploy.targets import BUILT_IN, get_target
from onnxsnp.errors import ModelError, PlanError
from onnxsnp.planning.plan import GroupPlan, Plan
from onnxsnp.surgery.apply import apply, to_model

MODEL = Path(__file__).resolve().parents[2] / "models" / "deit_cifar10.onnx"
TINY = Path(__file__).resolve().parents[1] / "exports" / "timm_deit_eager_dynamo18.onnx"
RTX = get_target("rtx")

library: Any = pytest.importorskip("tensorrt_rtx", reason="TensorRT for RTX is not installed: pip install tensorrt-rtx")


@pytest.fixture(scope="module")
def analysis() -> Analysis:
    return analyse_model(MODEL)


def cut(analysis: Analysis, **widths: int) -> onnx.ModelProto:
    """The model with the first neurons of each kind of group."""
    entries = [
        GroupPlan(one.id, one.kind, one.size, one.heads, [list(range(widths[one.kind]))] * one.heads)
        for one in analysis.structure.groups
        if one.kind in widths and one.prunable
    ]
    return to_model(apply(analysis, Plan("any", entries)).graph)


def one_node(op: str, shape: tuple[int | str, ...] = (2, 3), inputs: int = 1, **attributes: Any) -> onnx.ModelProto:
    ends = [helper.make_tensor_value_info("x", TensorProto.FLOAT, shape), helper.make_empty_tensor_value_info("y")]
    ends[1].type.tensor_type.elem_type = TensorProto.FLOAT
    node = helper.make_node(op, ["x"] * inputs, ["y"], name="the/node", **attributes)
    graph = helper.make_graph([node], "one", ends[:1], ends[1:])
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)


def built(proto: onnx.ModelProto, **options: Any) -> rtx.Built:
    engine = rtx.build(proto, **options)
    assert len(engine.data) > 10_000 and engine.library == f"TensorRT for RTX {library.__version__}"
    return engine


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
@pytest.mark.parametrize(
    "widths", [{}, {"qk": 19, "v": 27, "ffn": 403}, {"qk": 24, "v": 24, "ffn": 37, "residual": 51}]
)
def test_pruned_models_build_at_any_width(analysis: Analysis, widths: dict[str, int], precision: str) -> None:
    lowered = lower(cut(analysis, **widths), RTX, precision=precision).proto
    assert has_half(lowered) == (precision == "fp16")
    engine = built(lowered)
    assert len(engine.data) > sum(len(one.raw_data) for one in lowered.graph.initializer) / 2  # the weights are in it
    assert engine.compute_capabilities == ()


def test_steps_of_the_build_are_reported() -> None:
    seen: list[tuple[str, int, int]] = []
    built(lower(TINY, RTX).proto, progress=lambda *step: seen.append(step))
    total = seen[-1][2]
    assert seen == [("build", done, total) for done in range(1, total + 1)]


def test_compute_capabilities_are_those_asked_for() -> None:
    proto = lower(TINY, RTX).proto
    engine = built(proto, compute_capabilities=[(8, 9), (12, 0)])
    assert engine.compute_capabilities == ("8.9", "12.0")
    assert built(proto, compute_capabilities=[(8, 6)]).data != engine.data
    with pytest.raises(PlanError, match=r"builds for no GPU of compute capability 8\.7; it knows 7\.5, 8\.0, .*Jetson"):
        rtx.build(proto, compute_capabilities=[(8, 7)])


def test_turing_has_fp16_only_and_says_so() -> None:
    with pytest.raises(ModelError, match=r"FP32 GEMM is not supported .*need --precision fp16"):
        rtx.build(lower(TINY, RTX).proto, compute_capabilities=[(7, 5)])
    built(lower(TINY, RTX, precision="fp16").proto, compute_capabilities=[(7, 5)])


@pytest.mark.parametrize("target", BUILT_IN)
@pytest.mark.parametrize("name", ["timm_deit_eager_dynamo18.onnx", "hf_vit_sdpa_dynamo23_dyn.onnx"])
def test_what_is_lowered_for_any_target_is_taken(exports: Path, name: str, target: str) -> None:
    lowered = lower(exports / name, BUILT_IN[target])
    assert [one for one in lint(lowered.proto, BUILT_IN[target]) if one.severity == "error"] == []
    built(lowered.proto)


def test_the_real_model_lowered_for_the_oldest_target_is_taken(real_data: Path) -> None:
    built(lower(real_data / "models" / "deit_tiny.onnx", get_target("jetson-nano")).proto)


class Reader(CalibrationDataReader):
    def __init__(self, name: str, shape: tuple[int, ...]) -> None:
        rng = np.random.default_rng(0)
        self._feeds = iter([{name: rng.standard_normal(shape).astype(np.float32)} for _ in range(2)])

    def get_next(self) -> Any:
        return next(self._feeds, None)


def test_a_quantised_model_is_taken(tmp_path: Path) -> None:
    source = lower(TINY, RTX).proto
    onnx.save(source, tmp_path / "plain.onnx")
    value = source.graph.input[0]
    shape = tuple(dim.dim_value for dim in value.type.tensor_type.shape.dim)
    quantize_static(
        tmp_path / "plain.onnx",
        tmp_path / "int8.onnx",
        Reader(value.name, shape),
        quant_format=QuantFormat.QDQ,
        activation_type=QuantType.QInt8,
        weight_type=QuantType.QInt8,
        op_types_to_quantize=["MatMul", "Gemm"],
        extra_options={"ActivationSymmetric": True, "WeightSymmetric": True},
    )
    lowered = lower(tmp_path / "int8.onnx", RTX).proto
    assert any(node.op_type == "QuantizeLinear" for node in lowered.graph.node)
    built(lowered)


def test_what_the_importer_refuses_is_one_line_with_the_node() -> None:
    release = f"TensorRT for RTX {library.__version__}"
    for proto, message in (
        (one_node("Bernoulli"), f"{release} does not support Bernoulli (at the/node); write it in other operators"),
        (one_node("Foo", domain="my"), f"{release} does not support Foo (at the/node); write it"),
        (one_node("MatMul", inputs=2), f"{release} does not take MatMul: the/node: last dimension of input0 = 3 and"),
        (one_node("Relu", ("N", 3)), f"{release} could not build an engine: Network has dynamic or shape inputs"),
    ):
        with pytest.raises(ModelError) as caught:
            rtx.build(proto)
        assert str(caught.value).startswith(message) and "\n" not in str(caught.value)
        assert "_src" not in str(caught.value)


def test_without_the_library_one_line_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, rtx.MODULE, None)
    with pytest.raises(ModelError, match=r"TensorRT for RTX is not installed; pip install tensorrt-rtx"):
        rtx.build(one_node("Relu"))
