"""What is written is whole and runs, or it is not there."""

from __future__ import annotations

import os
from pathlib import Path

import graphs
import numpy as np
import onnx
import pytest

from onnxsnp.analysis import analyse_model
from onnxsnp.errors import VerificationError
from onnxsnp.graph.ir import Graph
from onnxsnp.planning.plan import Plan
from onnxsnp.surgery.apply import apply
from onnxsnp.writing import builder, original_proto, write_model, write_record


def cut_model(model: onnx.ModelProto) -> tuple[onnx.ModelProto, Graph]:
    analysis = analyse_model(model)
    plan = Plan("", [graphs.keeping(analysis.groups["ffn.0"], [[0, 3, 7]])])
    return model, apply(analysis, plan).graph


def test_the_written_file_is_the_cut_model(tmp_path: Path) -> None:
    model, graph = cut_model(graphs.transformer())
    feed, path = graphs.inputs_for(model, 3), tmp_path / "small.onnx"
    want = graph.session(threads=1).run(None, feed)[0]
    in_memory = builder(analyse_model(model), graph)()
    size = write_model(analyse_model(model), graph, [feed], path, threads=1, provider="cpu")
    assert size == path.stat().st_size and os.listdir(tmp_path) == ["small.onnx"]
    np.testing.assert_allclose(graphs.run(onnx.load(path), feed)[0], want, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(graphs.run(in_memory, feed)[0], want, rtol=1e-5, atol=1e-6)
    assert graphs.initializers(onnx.load(path))["/blocks.0/mlp/fc1.w"].shape == (12, 3)


def test_without_a_cut_the_original_is_written(tmp_path: Path) -> None:
    model = graphs.transformer()
    feed, path = graphs.inputs_for(model, 3), tmp_path / "same.onnx"
    write_model(analyse_model(model), None, [feed], path, threads=1, provider="cpu")
    for written in (onnx.load(path), builder(analyse_model(model), None)()):
        np.testing.assert_array_equal(graphs.run(written, feed)[0], graphs.run(model, feed)[0])
        assert [node.name for node in written.graph.node] == [node.name for node in model.graph.node]


def test_a_file_that_does_not_give_what_the_graph_gives_is_not_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, graph = cut_model(graphs.transformer())

    def wrong(graph: Graph) -> Graph:
        other = graph.copy()
        other.weights["head.b"] = other.weights["head.b"] + 1
        return other

    monkeypatch.setattr("onnxsnp.writing.finished", wrong)
    with pytest.raises(VerificationError):
        write_model(analyse_model(model), graph, [graphs.inputs_for(model)], tmp_path / "bad.onnx", threads=1)
    assert os.listdir(tmp_path) == []


def test_the_original_has_its_weights_inside_and_is_a_copy() -> None:
    model = graphs.mlp(4, 6, 3)
    read = analyse_model(model).model
    proto = original_proto(read)
    held = graphs.initializers(proto)
    assert held.keys() == read.weights.keys()
    assert all(np.array_equal(array, read.weights[name]) for name, array in held.items())
    count = len(read.proto.graph.initializer)
    proto.graph.initializer.pop()
    assert len(read.proto.graph.initializer) == count


def test_a_record_replaces_the_one_before_it(tmp_path: Path) -> None:
    path = tmp_path / "record.json"
    for text in ("first and longer", "second"):
        write_record(text, path)
        assert path.read_text() == text and os.listdir(tmp_path) == ["record.json"]
