"""Bounds of ids come from the tables they are looked up in."""

from __future__ import annotations

from typing import Any

import graphs
import numpy as np
import onnx
import pytest

from onnxsnp.graph.inputs import graph_inputs, id_bounds
from onnxsnp.graph.normalize import as_graph
from onnxsnp.graph.probe import probe
from onnxsnp.model import load


def looked_up(change: Any = None, rows: int = 9, slot: int = 0) -> onnx.ModelProto:
    """Ids, changed on the way, that are looked up in a table of 9 rows."""
    net = graphs.Net()
    ids = net.input("ids", ["N", "T"], np.int64)
    table = net.weight("table", rows, 4)
    net.output(net.op("Gather", table, change(net, ids) if change else ids, axis=slot), ["N", "T", 4])
    return net.proto()


CHANGES = {
    "nothing": (None, 9),
    "another type": (lambda net, x: net.op("Cast", x, to=onnx.TensorProto.INT32), 9),
    "reshaped": (lambda net, x: net.op("Reshape", x, [0, 0]), 9),
    "an offset": (lambda net, x: net.op("Add", x, np.asarray(2)), 7),
    "an offset from the left": (lambda net, x: net.op("Add", np.asarray(2), x), 7),
    "a negative offset": (lambda net, x: net.op("Sub", x, np.asarray(1)), 10),
    "put in where": (lambda net, x: net.op("Where", net.op("Equal", x, np.asarray(1)), np.asarray(0), x), 9),
}


@pytest.mark.parametrize("name", CHANGES)
def test_ids_are_bounded_by_the_rows_of_their_table(name: str) -> None:
    change, bound = CHANGES[name]
    graph = as_graph(load(looked_up(change)))
    assert id_bounds(graph) == {"ids": bound}
    (spec,) = graph_inputs(graph, {"ids": (1, 5)})
    assert spec.below == bound and spec.shape == ("N", 5) and spec.dtype == np.int64


@pytest.mark.parametrize(
    "change",
    [lambda net, x: net.op("Sub", np.asarray(8), x), lambda net, x: net.op("CumSum", x, np.asarray(1))],
    ids=["turned round", "counted"],
)
def test_ids_that_become_something_else_have_no_bound(change: Any) -> None:
    assert id_bounds(as_graph(load(looked_up(change)))) == {}


def test_the_smallest_of_several_tables_counts() -> None:
    net = graphs.Net()
    ids = net.input("ids", ["N"], np.int64)
    both = [net.op("Gather", net.weight(f"table{rows}", rows, 4), ids, axis=0) for rows in (9, 5)]
    net.output(net.op("Add", *both), ["N", 4])
    assert id_bounds(as_graph(load(net.proto()))) == {"ids": 5}


def test_a_table_of_one_row_is_measured_with_the_one_id_it_has() -> None:
    assert probe(as_graph(load(looked_up(rows=1)))).shapes["ids"] == (2, 16)


@pytest.mark.parametrize("axis", [2, -3, -(2**63)])
def test_a_table_without_the_axis_that_is_asked_for_gives_no_bound(axis: int) -> None:
    graph = as_graph(load(looked_up()))
    next(node for node in graph.nodes if node.op_type == "Gather").attribute[0].i = axis
    assert id_bounds(graph) == {}
