"""Peak memory in a process of its own: weights and activations are in it, and failures are one line."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from onnxsnp.errors import ModelError
from onnxsnp.evaluation import memory

pytestmark = pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="measured on Linux only")


def widening(path: Path, wide: int) -> Path:
    """A model that makes (1, 1) into (1, wide), and sums it up: weights and activations of 4 · wide bytes each."""
    graph = helper.make_graph(
        [helper.make_node("MatMul", ["x", "w"], ["h"]), helper.make_node("ReduceSum", ["h"], ["y"], keepdims=1)],
        "wide",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [1, 1])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [1, 1])],
        [numpy_helper.from_array(np.ones((1, wide), np.float32), "w")],
    )
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8), str(path))
    return path


def test_the_peak_grows_by_what_the_model_holds(tmp_path: Path) -> None:
    feed = {"x": np.ones((1, 1), np.float32)}
    small, large = (
        memory.peak_memory(widening(tmp_path / f"{wide}.onnx", wide), feed, threads=1) for wide in (10, 10_000_000)
    )
    assert small is not None and large is not None
    assert 0 < small < 30e6 and large - small > 75e6  # 40 MB of weights and 40 MB of activations


def test_a_model_that_fails_there_is_one_line(tmp_path: Path) -> None:
    path = widening(tmp_path / "m.onnx", 4)
    with pytest.raises(ModelError, match=r"failed in a process of its own: .*the model failed on inputs"):
        memory.peak_memory(path, {"x": np.ones((1, 2), np.float32)}, threads=1)


def test_where_it_cannot_be_measured_it_is_not_made_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory.sys, "executable", "")
    assert memory.peak_memory(tmp_path / "m.onnx", {}) is None
