"""Applying a plan cuts what it says, takes apart only what it must, and shares weights again."""

from __future__ import annotations

import graphs
import numpy as np
import onnx
import pytest

from onnxsnp.analysis import Analysis, analyse_model
from onnxsnp.evaluation.verify import difference, prove
from onnxsnp.planning.plan import Plan
from onnxsnp.surgery.apply import apply, to_model


def cut(model: onnx.ModelProto, *names: str) -> tuple[Analysis, object, float]:
    analysis = analyse_model(model)
    plan = graphs.random_plan([analysis.groups[name] for name in names], np.random.default_rng(1))
    applied = apply(analysis, plan)
    return analysis, applied, prove(analysis, applied, [graphs.inputs_for(model, 3)]).masked_equality


@pytest.mark.parametrize("name", ["ffn.0", "ffn.1", "residual", "v.0", "qk.1"])
@pytest.mark.parametrize("qkv", ["packed", "flat"])
def test_packed_projections_come_apart_only_where_a_cut_needs_it(name: str, qkv: str) -> None:
    model = graphs.transformer(qkv=qkv, v=4)
    _, applied, gap = cut(model, name)
    assert gap < 1e-5
    selections = sum(node.op_type in ("Split", "Gather") for node in applied.graph.nodes)
    per_block = 3 if qkv == "packed" else 1
    assert selections == per_block * (1 if name[:2] in ("v.", "qk") else 2)


@pytest.mark.parametrize("names", [["ffn.0"], ["qk.0"], ["qk.0", "ffn.0"], ["ffn.0", "ffn.1"]])
def test_packed_gates_are_cut(names: list[str]) -> None:
    assert cut(graphs.transformer(gate="packed", qkv="flat"), *names)[2] < 1e-5


@pytest.mark.parametrize("names", [["ffn.1"], ["qk.0", "ffn.1"]])
def test_a_later_packed_gate_is_cut_while_an_earlier_one_stays_packed(names: list[str]) -> None:
    assert cut(graphs.transformer(gate="packed", qkv="flat"), *names)[2] < 1e-5


def test_refitted_weights_go_in_before_the_cut() -> None:
    model = graphs.mlp(4, 6, 3)
    analysis = analyse_model(model)
    other = np.random.default_rng(3).standard_normal((6, 3)).astype(np.float32)
    plan = Plan("", [graphs.keeping(analysis.groups["ffn.0"], [[1, 4]])])
    applied = apply(analysis, plan, {"fc1.w": other})
    np.testing.assert_array_equal(applied.graph.weights["fc1.w"], other[[1, 4]])
    assert prove(analysis, applied, [graphs.inputs_for(model)]).passed


def test_an_empty_plan_cuts_nothing() -> None:
    model = graphs.transformer(qkv="packed", v=4)
    analysis = analyse_model(model)
    applied = apply(analysis, Plan("", []))
    assert applied.cuts == []
    assert difference(analysis.packed.graph, applied.graph, [graphs.inputs_for(model)]) == 0


def test_a_plan_that_keeps_everything_is_no_cut() -> None:
    analysis = analyse_model(graphs.transformer())
    groups = analysis.structure.groups
    applied = apply(analysis, Plan("", [graphs.keeping(g, [list(range(g.size))] * g.heads) for g in groups]))
    assert applied.cuts == []


def test_shapes_are_recorded_in_the_file() -> None:
    model = graphs.transformer()
    analysis = analyse_model(model)
    plan = Plan("", [graphs.keeping(analysis.groups["ffn.0"], [[0, 1, 2]])])
    made = to_model(apply(analysis, plan).graph)
    sizes = {value.name: [dim.dim_value for dim in value.type.tensor_type.shape.dim] for value in made.graph.value_info}
    assert sizes["/blocks.0/mlp/fc1/Add.out"][-1] == 3 and sizes["/blocks.1/mlp/fc1/Add.out"][-1] == 20


def test_applying_twice_gives_the_same_file() -> None:
    model = graphs.transformer(qkv="flat", gate="packed")
    files = []
    for _ in range(2):
        analysis = analyse_model(model)
        plan = graphs.random_plan(analysis.structure.groups, np.random.default_rng(4))
        files.append(to_model(apply(analysis, plan).graph).SerializeToString())
    assert files[0] == files[1]
