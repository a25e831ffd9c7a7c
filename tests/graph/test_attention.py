"""Attention sites are found by what multiplies what, whatever the order of operands."""

from __future__ import annotations

import graphs
import onnx
import pytest

from onnxsnp.analysis import analyse_model


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
        ("gate", "0 products of two activations before the softmax, expected 1")
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
    assert structure.sites == [] and [item.node for item in structure.skipped] == ["soft"]


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
    assert any("not produced by a projection" in item.reason for item in analysis.structure.skipped)
