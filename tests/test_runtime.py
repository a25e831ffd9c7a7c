"""Opening sessions: input descriptions, options and errors in one line."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from onnx import TensorProto, helper, numpy_helper

from onnxsnp.errors import ModelError
from onnxsnp.runtime import InputSpec, input_specs, model_bytes, open_session, run_session, symbol_size


def model_proto(element: int = TensorProto.FLOAT, op: str = "Identity") -> onnx.ModelProto:
    graph = helper.make_graph(
        [helper.make_node(op, ["x"], ["y"])],
        "g",
        [helper.make_tensor_value_info("x", element, ["N", 3, None])],
        [helper.make_tensor_value_info("y", element, ["N", 3, None])],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)


def test_inputs_keep_fixed_symbolic_and_nameless_sizes_and_their_type() -> None:
    (spec,) = input_specs(open_session(model_proto(TensorProto.INT64).SerializeToString()))
    assert spec == InputSpec("x", ("N", 3, None), np.dtype(np.int64))
    assert str(spec) == "x: (N, 3, ?) int64"


def test_inputs_that_numpy_cannot_feed_are_refused() -> None:
    with pytest.raises(ModelError, match=r"'x' has type tensor\(string\)"):
        input_specs(open_session(model_proto(TensorProto.STRING).SerializeToString()))


def test_path_and_bytes_open_alike_and_run(tmp_path: Path) -> None:
    data = model_proto().SerializeToString()
    (tmp_path / "m.onnx").write_bytes(data)
    values = np.arange(6, dtype=np.float32).reshape(1, 3, 2)
    for model in (data, tmp_path / "m.onnx", str(tmp_path / "m.onnx")):
        assert np.array_equal(run_session(open_session(model, threads=1), {"x": values})[0], values)


def test_options_reach_the_session() -> None:
    options = open_session(model_proto().SerializeToString(), threads=2, optimize=False).get_session_options()
    assert (options.intra_op_num_threads, options.inter_op_num_threads) == (2, 1)
    assert options.execution_mode == ort.ExecutionMode.ORT_SEQUENTIAL
    assert options.graph_optimization_level == ort.GraphOptimizationLevel.ORT_DISABLE_ALL


@pytest.mark.parametrize(
    ("content", "message"),
    [(b"this is no model", "cannot open"), (b"", "cannot open"), (None, "no such model file")],
)
def test_broken_and_missing_files_are_one_line_that_names_the_file(tmp_path: Path, content, message: str) -> None:
    path = tmp_path / "m.onnx"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(ModelError, match=message) as caught:
        open_session(path)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value) and "[ONNXRuntimeError]" not in str(caught.value)


def test_an_operator_that_does_not_exist_is_a_model_error() -> None:
    with pytest.raises(ModelError, match="NoSuchOp"):
        open_session(model_proto(op="NoSuchOp").SerializeToString())


def test_wrong_inputs_are_a_model_error_that_names_the_shapes_fed() -> None:
    session = open_session(model_proto().SerializeToString())
    with pytest.raises(ModelError, match=r"failed on inputs x float32\[1, 4, 2\]"):
        run_session(session, {"x": np.zeros((1, 4, 2), np.float32)})
    with pytest.raises(ModelError, match="failed on inputs x float64"):
        run_session(session, {"x": np.zeros((1, 3, 2))})
    with pytest.raises(ModelError, match="failed on inputs z"):
        run_session(session, {"z": np.zeros((1, 3, 2), np.float32)})


def test_unknown_and_missing_providers_are_clear(monkeypatch: pytest.MonkeyPatch) -> None:
    data = model_proto().SerializeToString()
    with pytest.raises(ModelError, match="unknown provider 'tpu'"):
        open_session(data, provider="tpu")
    monkeypatch.setattr(ort, "get_available_providers", lambda: ["CPUExecutionProvider"])
    with pytest.raises(ModelError, match="has no CUDAExecutionProvider"):
        open_session(data, provider="cuda")


def test_a_silent_fallback_from_cuda_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    real = ort.InferenceSession

    def falls_back(model: bytes, options: ort.SessionOptions, providers: list[str]) -> ort.InferenceSession:
        assert providers[0] == "CUDAExecutionProvider"
        return real(model, options, providers=["CPUExecutionProvider"])

    monkeypatch.setattr(ort, "InferenceSession", falls_back)
    monkeypatch.setattr(ort, "get_available_providers", lambda: ["CUDAExecutionProvider", "CPUExecutionProvider"])
    with pytest.raises(ModelError, match="fell back to CPUExecutionProvider"):
        open_session(model_proto().SerializeToString(), provider="cuda")


def test_the_size_of_a_model_includes_its_external_data(tmp_path: Path) -> None:
    graph = helper.make_graph(
        [helper.make_node("Add", ["x", "w"], ["y"])],
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["N", 1000])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["N", 1000])],
        [numpy_helper.from_array(np.ones(1000, np.float32), "w")],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    onnx.save(model, tmp_path / "m.onnx", save_as_external_data=True, location="m.data", size_threshold=0)
    assert model_bytes(tmp_path / "m.onnx") == (tmp_path / "m.onnx").stat().st_size + 4000
    assert model_bytes(b"12345") == 5


def test_importing_the_readers_and_evaluation_does_not_import_the_heavy_libraries() -> None:
    code = (
        "import sys, onnxsnp.calibration.data, onnxsnp.evaluation.accuracy, onnxsnp.evaluation.latency\n"
        "print([m for m in ('PIL', 'onnxruntime', 'onnx', 'scipy') if m in sys.modules])"
    )
    root = Path(__file__).resolve().parent.parent
    out = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "[]"


@pytest.mark.parametrize(
    ("symbol", "size"),
    [("seq", 5), ("past + seq", 12), ("past+1", 8), ("2*seq + 3", 13), ("seq.1", 1), ("(seq - 1)//2", 1)],
)
def test_sums_and_products_of_symbols_are_computed_and_the_rest_is_one_symbol(symbol: str, size: int) -> None:
    assert symbol_size(symbol, lambda name: {"seq": 5, "past": 7}.get(name, 1)) == size
