"""Layers that use the same weight of the file are cut at the same indices, and the file keeps one weight."""

from __future__ import annotations

import graphs
import numpy as np
import onnx
import pytest

from onnxsnp.analysis import analyse_model
from onnxsnp.evaluation.verify import difference, masked
from onnxsnp.planning.plan import Plan
from onnxsnp.surgery.apply import apply, to_model


def recurrent(packed: bool = False, times: int = 3) -> onnx.ModelProto:
    """Blocks of one attention and one FFN whose matrices are the same in all of them; every norm is its own."""
    net = graphs.Net()
    x = net.linear(net.input("x", ["N", 5, 7]), "embed", 7, 12)
    wide = net.weight("qkv", 12, 3 * 2 * 4)
    parts = [net.weight(name, 12, 2 * 4) for name in "qkv"]
    out, up, down = net.weight("out", 8, 12), net.weight("up", 12, 20), net.weight("down", 20, 12)
    for index in range(times):
        h = net.norm(x, f"norm{index}", 12)
        if packed:
            three = net.split(net.op("MatMul", h, wide), [8, 8, 8], -1)
        else:
            three = [net.op("MatMul", h, part) for part in parts]
        q, k, v = (net.op("Transpose", net.reshape(one, 0, 5, 2, 4), perm=[0, 2, 1, 3]) for one in three)
        scores = net.op("Softmax", net.op("MatMul", q, net.op("Transpose", k, perm=[0, 1, 3, 2])), axis=-1)
        mixed = net.op("Transpose", net.op("MatMul", scores, v), perm=[0, 2, 1, 3])
        x = net.op("Add", x, net.op("MatMul", net.reshape(mixed, 0, 5, 8), out))
        x = net.op("Add", x, net.op("MatMul", net.op("Relu", net.op("MatMul", x, up)), down))
    net.output(net.linear(x, "head", 12, 3), ["N", 5, 3])
    return net.proto()


@pytest.mark.parametrize("packed", [False, True])
def test_groups_of_shared_layers_are_one_and_belong_to_every_site(packed: bool) -> None:
    structure = analyse_model(recurrent(packed)).structure
    assert len(structure.sites) == 3 and structure.skipped == []
    kinds = {group.kind: (group.id, group.sites) for group in structure.groups}
    assert len(kinds) == len(structure.groups) == 5
    assert all(kinds[kind] == (f"{kind}.0", (0, 1, 2)) for kind in ("qk", "v", "head"))
    assert structure.group("v", 2) is structure.group("v", 0) is not None


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("kinds", [("qk",), ("v",), ("head",), ("ffn",), ("qk", "v", "ffn", "residual")])
def test_a_cut_of_shared_layers_is_exact_and_keeps_them_shared(packed: bool, kinds: tuple[str, ...]) -> None:
    model = recurrent(packed)
    analysis = analyse_model(model)
    plan = graphs.random_plan(
        [group for group in analysis.structure.groups if group.kind in kinds], np.random.default_rng(3), least=2
    )
    if kinds == ("head",):
        plan = Plan("", [graphs.keeping(analysis.groups["head.0"], [[1]])])
    applied = apply(analysis, plan)
    assert applied.cuts
    original = masked(analysis.normalized.base, analysis.graph, analysis.dependencies, applied.cuts, {})
    assert difference(original, applied.graph, [graphs.inputs_for(model)], threads=1) < 1e-5
    matrices = [tensor.name for tensor in to_model(applied.graph).graph.initializer if len(tensor.dims) == 2]
    apart = packed and kinds[0] in ("qk", "v", "head")
    assert len(matrices) == (8 if apart or not packed else 6)  # embed, query, key, value, out, up, down, head


def test_vectors_that_exporters_made_one_tie_nothing() -> None:
    structure = analyse_model(graphs.transformer(shared_norm=True)).structure
    assert len([group for group in structure.groups if group.kind == "ffn"]) == 2
    assert all(not group.further for group in structure.groups)
