"""The dependency graph: one component per thing that is cut together, and the operators that say so."""

from __future__ import annotations

import graphs
import networkx as nx
import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

from onnxsnp.analysis import analyse_model


def test_why_names_the_operators_between_two_places() -> None:
    analysis = analyse_model(graphs.mlp(4, 6, 3))
    dependencies = analysis.dependencies
    chain = dependencies.why(("fc0.w", 1, 0), ("fc1.w", 0, 0))
    assert chain == [
        "fc0/MatMul",
        "fc0/Add",
        next(n.name for n in analysis.graph.nodes if n.op_type == "Relu"),
        "fc1/MatMul",
    ]


def test_why_has_no_answer_for_things_that_are_not_tied() -> None:
    dependencies = analyse_model(graphs.mlp(4, 6, 3)).dependencies
    with pytest.raises(nx.NetworkXNoPath):
        dependencies.why(("fc0.w", 1, 0), ("fc1.w", 1, 0))


def test_components_of_the_graph_are_the_factors() -> None:
    dependencies = analyse_model(graphs.transformer(qkv="flat")).dependencies
    for component in nx.connected_components(dependencies.graph):
        atoms = {dependencies.atoms(tensor, axis)[position] for tensor, axis, position in component}
        assert len(atoms) == 1
    assert sum(len(places) for places in dependencies.places.values()) == dependencies.graph.number_of_nodes()


def test_sizes_that_clash_freeze_everything_they_touch() -> None:
    net = graphs.Net()
    h = net.linear(net.input("x", [6, 4]), "a", 4, 6)  # [6, 6] read as [4, 9] does not factor alike
    h = net.reshape(net.op("Relu", h), 4, 9)
    net.output(net.linear(h, "b", 9, 3), [4, 3])
    structure = analyse_model(net.proto()).structure
    assert structure.groups == []
    for weight, axis in (("a.w", 1), ("b.w", 0)):
        for atom in structure.dependencies.atoms(weight, axis):
            assert any("do not factor alike" in freeze.reason for freeze in structure.dependencies.frozen[atom])


def with_loop(count: int = 3) -> onnx.ModelProto:
    """Two hidden layers, then a Loop whose body multiplies the second one by a weight of the outer graph each time."""
    net = graphs.Net()
    h = net.op("Relu", net.linear(net.input("x", ["N", 6]), "a", 6, 16))
    h = net.op("Relu", net.linear(h, "b", 16, 12), name="second")
    net.output(net.linear(h, "c", 12, 5), ["N", 5])
    model = net.proto()
    held = [("i", TensorProto.INT64, []), ("go", TensorProto.BOOL, []), ("sum", TensorProto.FLOAT, None)]
    body = helper.make_graph(
        [
            helper.make_node("MatMul", ["second.out", "d.w"], ["product"]),
            helper.make_node("Add", ["sum", "product"], ["sum.next"]),
            helper.make_node("Identity", ["go"], ["go.next"]),
        ],
        "body",
        [helper.make_tensor_value_info(*entry) for entry in held],
        [helper.make_tensor_value_info(f"{name}.next", kind, shape) for name, kind, shape in held[1:]],
    )
    last = model.graph.node[-1]
    last.output[0] = "start"
    model.graph.node.append(helper.make_node("Loop", ["count", "true", "start"], ["y"], name="loop", body=body))
    for name, value in (("count", count), ("true", True), ("d.w", net.weight("d.w", 12, 5).values)):
        model.graph.initializer.append(onnx.numpy_helper.from_array(np.asarray(value), name))
    onnx.checker.check_model(model, full_check=True)
    return model


def test_what_a_body_reads_from_outside_is_left_alone() -> None:
    structure = analyse_model(with_loop()).structure
    found = {group.size: group for group in structure.groups}
    assert found[16].prunable
    assert "operator Loop: it runs a graph of its own (at loop)" in found[12].reasons[0]
    frozen = structure.dependencies.frozen
    assert all(atom in frozen for atom in structure.dependencies.atoms("d.w"))
