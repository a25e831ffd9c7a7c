"""Attention sites are found by what multiplies what, whatever the order of operands."""

from __future__ import annotations

from typing import Any

import graphs
import numpy as np
import onnx
import pytest

from onnxsnp.analysis import analyse_model
from onnxsnp.evaluation.verify import difference, masked
from onnxsnp.surgery.apply import apply


@pytest.mark.parametrize(
    "options",
    [{}, {"reverse": True}, {"qkv": "flat"}, {"scale": "shape"}, {"opset": 11}],
    ids=["plain", "K first", "flat", "scale from shape", "opset 11"],
)
def test_query_key_and_value_are_told_apart(options: dict) -> None:
    analysis = analyse_model(graphs.transformer(**options))
    assert analysis.structure.skipped == [] and len(analysis.structure.sites) == 2
    for index, site in enumerate(analysis.structure.sites):
        dependencies = analysis.dependencies
        assert dependencies.size(dependencies.atoms(*site.query)[-1]) == 4
        assert dependencies.atoms(*site.query) == dependencies.atoms(*site.key)
        assert dependencies.size(dependencies.atoms(*site.value)[-1]) == 6
        if "flat" not in options.values() and "reverse" not in options:
            assert upstream(analysis, site.query[0]) == {f"/blocks.{index}/attn/q.w"}
            assert upstream(analysis, site.key[0]) == {f"/blocks.{index}/attn/k.w"}
        assert upstream(analysis, site.value[0]) <= {f"/blocks.{index}/attn/v.w", f"/blocks.{index}/attn/qkv/part"} | {
            name for name in analysis.graph.weights if ".part" in name
        }


def test_the_key_is_the_operand_whose_tokens_the_softmax_runs_over() -> None:
    analysis = analyse_model(graphs.transformer(reverse=True))
    assert upstream(analysis, analysis.structure.sites[0].key[0]) == {"/blocks.0/attn/k.w"}


def test_the_key_may_be_the_left_operand_in_cross_attention() -> None:
    analysis = analyse_model(cross_attention(reverse=True))
    (site,) = analysis.structure.sites
    assert upstream(analysis, site.query[0]) == {"q.w"} and upstream(analysis, site.key[0]) == {"k.w"}


def upstream(analysis, tensor: str) -> set[str]:  # type: ignore[no-untyped-def]
    """The nearest projection weights that a tensor is computed from."""
    producers, found, stack = analysis.graph.producers(), set(), [tensor]
    while stack:
        node = producers.get(stack.pop())
        if node is None:
            continue
        if node.op_type == "MatMul" and node.input[1] in analysis.graph.weights:
            found.add(analysis.graph.origin.get(node.input[1], node.input[1]))
        else:
            stack.extend(node.input)
    return found


def cross_attention(reverse: bool = False) -> onnx.ModelProto:
    net = graphs.Net()
    x, memory = net.input("x", ["N", 5, 6]), net.input("memory", ["N", 8, 6])
    q, k, v = (
        net.op("Transpose", net.reshape(net.linear(source, name, 6, 6), 0, count, 2, 3), perm=[0, 2, 1, 3])
        for source, name, count in ((x, "q", 5), (memory, "k", 8), (memory, "v", 8))
    )
    if reverse:
        p = net.op("Softmax", net.op("MatMul", k, net.op("Transpose", q, perm=[0, 1, 3, 2])), axis=-2)
        mixed = net.op("MatMul", net.op("Transpose", v, perm=[0, 1, 3, 2]), p)
        y = net.op("Transpose", mixed, perm=[0, 3, 1, 2])
    else:
        p = net.op("Softmax", net.op("MatMul", q, net.op("Transpose", k, perm=[0, 1, 3, 2])), axis=-1)
        y = net.op("Transpose", net.op("MatMul", p, v), perm=[0, 2, 1, 3])
    net.output(net.linear(net.reshape(y, 0, 5, 6), "o", 6, 4), ["N", 5, 4])
    return net.proto()


@pytest.mark.parametrize("reverse", [False, True])
def test_tokens_of_query_and_key_differ_in_cross_attention(reverse: bool) -> None:
    analysis = analyse_model(cross_attention(reverse))
    (site,) = analysis.structure.sites
    shapes = analysis.dependencies.facts.shapes
    assert shapes[site.query_tokens[0]][site.query_tokens[1]] == 5
    assert shapes[site.key_tokens[0]][site.key_tokens[1]] == 8


def test_sites_are_named_by_their_scope() -> None:
    sites = analyse_model(graphs.transformer()).structure.sites
    assert [site.name for site in sites] == ["blocks.0.attn", "blocks.1.attn"]


def test_a_softmax_without_attention_is_reported() -> None:
    net = graphs.Net()
    h = net.op("Softmax", net.linear(net.input("x", ["N", 4]), "a", 4, 6), name="gate", axis=-1)
    net.output(net.linear(h, "b", 6, 3), ["N", 3])
    structure = analyse_model(net.proto()).structure
    assert structure.sites == []
    assert [(item.node, item.reason) for item in structure.skipped] == [
        ("gate", "not attention: 0 products of two activations before the softmax, expected 1")
    ]


def test_a_final_softmax_over_classes_is_nothing_to_report() -> None:
    net = graphs.Net()
    h = net.linear(net.op("Relu", net.linear(net.input("x", ["N", 4]), "a", 4, 6)), "b", 6, 3)
    net.output(net.op("Softmax", h, axis=-1), ["N", 3])
    assert analyse_model(net.proto()).structure.skipped == []


def test_scores_behind_an_unknown_operator_are_reported_and_left() -> None:
    net = graphs.Net()
    x = net.input("x", ["N", 5, 6])
    q, k, v = (net.linear(x, name, 6, 6) for name in "qkv")
    scores = net.op("Tanh", net.op("MatMul", q, net.op("Transpose", k, perm=[0, 2, 1])))
    y = net.op("MatMul", net.op("Softmax", scores, name="soft", axis=-1), v)
    net.output(net.linear(y, "o", 6, 4), ["N", 5, 4])
    structure = analyse_model(net.proto()).structure
    assert structure.sites == [] and not [group for group in structure.groups if group.kind == "qk"]
    products = structure.dependencies.facts.products  # the scores are reported as well, with their size
    assert [item.node for item in structure.skipped] == ["soft", products[0].node]


def test_channel_attention_has_no_query_key_size() -> None:
    """Scores of channels with channels (d×d): what they contract are tokens."""
    net = graphs.Net()
    x = net.input("x", ["N", 5, 6])
    q, k, v = (net.op("Transpose", net.linear(x, name, 6, 6), perm=[0, 2, 1]) for name in "qkv")
    p = net.op("Softmax", net.op("MatMul", q, net.op("Transpose", k, perm=[0, 2, 1]), name="score"), axis=-1)
    y = net.op("Transpose", net.op("MatMul", p, v), perm=[0, 2, 1])
    net.output(net.linear(y, "o", 6, 4), ["N", 5, 4])
    analysis = analyse_model(net.proto())
    assert not [group for group in analysis.structure.groups if group.kind == "qk"]
    assert any("attention over channels, 6 x 6" in item.reason for item in analysis.structure.skipped)


def talking(before: bool = True, tokens: bool = False) -> onnx.ModelProto:
    """Attention whose heads are mixed by 1x1 convolutions on scores and probabilities; or its tokens, by MatMul."""

    def mixed(net: graphs.Net, value: Any, name: str) -> Any:
        if tokens:
            return net.op("MatMul", value, net.weight(f"{name}.w", graphs.TOKENS, graphs.TOKENS))
        emitted, read = (3, 2) if name == "before" else (2, 3 if before else 2)
        return net.op("Conv", value, net.weight(f"{name}.w", emitted, read, 1, 1))

    net = graphs.Net()
    x = net.input("x", ["N", graphs.TOKENS, 8])
    q, k, v = (
        net.op("Transpose", net.reshape(net.linear(x, name, 8, 12), 0, graphs.TOKENS, 2, 6), perm=[0, 2, 1, 3])
        for name in "qkv"
    )
    scores = net.op("MatMul", q, net.op("Transpose", k, perm=[0, 1, 3, 2]), name="score")
    p = net.op("Softmax", mixed(net, scores, "before") if before else scores, name="soft", axis=-1)
    y = net.op("MatMul", mixed(net, p, "after"), v, name="mix")
    y = net.reshape(net.op("Transpose", y, perm=[0, 2, 1, 3]), 0, graphs.TOKENS, 12)
    net.output(net.linear(y, "o", 12, 4), ["N", graphs.TOKENS, 4])
    return net.proto()


def test_heads_that_are_mixed_on_either_side_of_the_softmax_are_counted_three_times() -> None:
    model = talking()
    analysis = analyse_model(model)
    (site,) = analysis.structure.sites
    assert (site.score, site.mix) == ("score", "mix") and analysis.structure.skipped == []
    kinds = {group.id: (group.kind, group.size, group.heads, group.reasons) for group in analysis.structure.groups}
    heads = {"head.0": ("head", 2, 1, ()), "head.0-2": ("head", 2, 1, ()), "head.0-3": ("head", 3, 1, ())}
    assert {name: kind for name, kind in kinds.items() if kind[0] != "head"} == {
        "qk.0": ("qk", 6, 2, ()),
        "v.0": ("v", 6, 2, ()),
    }
    assert sorted(kind for kind in kinds.values() if kind[0] == "head") == sorted(heads.values())
    assert heads.keys() == {name for name in kinds if name.startswith("head")}
    applied = apply(analysis, graphs.random_plan(analysis.structure.groups, np.random.default_rng(0)))
    original = masked(analysis.normalized.base, analysis.graph, analysis.dependencies, applied.cuts, {})
    assert difference(original, applied.graph, [graphs.inputs_for(model, 2)]) < 1e-6


def test_query_and_key_are_rotated_unless_their_heads_are_mixed_before_the_softmax() -> None:
    assert analyse_model(talking()).rotations.blocked["qk.0"].startswith("Conv")
    assert "qk.0" in analyse_model(talking(before=False)).rotations.pairs


def test_a_projection_of_the_tokens_is_no_mix_of_heads() -> None:
    structure = analyse_model(talking(tokens=True)).structure
    assert structure.sites == [] and [item.node for item in structure.skipped] == ["soft", "score", "mix"]


def test_a_softmax_over_tokens_of_projected_values_is_no_second_attention() -> None:
    """Attention pooling behind attention: its weights come from what the first one mixed, and nothing is a score."""
    net = graphs.Net()
    x = net.input("x", ["N", 5, 6])
    q, k, v = (net.linear(x, name, 6, 6) for name in "qkv")
    scores = net.op("MatMul", q, net.op("Transpose", k, perm=[0, 2, 1]), name="score")
    y = net.linear(net.op("MatMul", net.op("Softmax", scores, axis=-1), v, name="mix"), "o", 6, 6)
    pooled = net.op("Softmax", net.op("Transpose", net.linear(y, "weigh", 6, 1), perm=[0, 2, 1]), name="pool", axis=-1)
    net.output(net.linear(net.op("MatMul", pooled, y), "head", 6, 3), ["N", 1, 3])
    structure = analyse_model(net.proto()).structure
    assert [(site.score, site.mix) for site in structure.sites] == [("score", "mix")]
    assert [item.node for item in structure.skipped] == ["pool"]
