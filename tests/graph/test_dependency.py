"""The dependency graph: one component per thing that is cut together, and the operators that say so."""

from __future__ import annotations

import graphs
import networkx as nx
import pytest

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
