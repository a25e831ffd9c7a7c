"""Kinds, heads, and reasons of groups follow from structure."""

from __future__ import annotations

import graphs
import numpy as np
import onnx
import pytest

from onnxsnp.analysis import analyse_model, inspect
from onnxsnp.evaluation.verify import prove
from onnxsnp.graph.groups import Group
from onnxsnp.pruning import prune
from onnxsnp.surgery.apply import apply


def groups_of(**options) -> dict[str, Group]:  # type: ignore[no-untyped-def]
    return analyse_model(graphs.transformer(**options)).groups


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"qkv": "flat"},
        {"gate": "pair"},
        {"gate": "packed"},
        {"reverse": True},
        {"activation": "gelu_tanh"},
        {"pool": "first"},
        {"opset": 11},
    ],
)
def test_a_transformer_has_exactly_its_groups(options: dict) -> None:
    found = groups_of(**options)
    assert {name: (group.kind, group.size, group.heads, group.reasons) for name, group in found.items()} == {
        **{f"qk.{i}": ("qk", 4, 3, ()) for i in range(2)},
        **{f"v.{i}": ("v", 6, 3, ()) for i in range(2)},
        **{f"head.{i}": ("head", 3, 1, ()) for i in range(2)},
        **{f"ffn.{i}": ("ffn", 20, 1, ()) for i in range(2)},
        "residual": ("residual", 12, 1, ()),
    }


def test_producers_and_consumers_are_the_projections_on_either_side() -> None:
    found = groups_of(blocks=1)
    assert {weight for weight, _ in found["qk.0"].producers} == {"/blocks.0/attn/q.w", "/blocks.0/attn/k.w"}
    assert found["qk.0"].consumers == ()
    assert found["v.0"].producers == (("/blocks.0/attn/v.w", 1),)
    assert found["v.0"].consumers == (("/blocks.0/attn/proj.w", 0),)
    assert found["ffn.0"].producers == (("/blocks.0/mlp/fc1.w", 1),)
    assert found["ffn.0"].consumers == (("/blocks.0/mlp/fc2.w", 0),)


def test_query_heads_that_share_keys_and_values_are_cut_with_these() -> None:
    found = analyse_model(graphs.grouped(keys=2, queries=3, qk=4, v=5)).groups
    assert {name: (group.kind, group.size, group.heads) for name, group in found.items() if group.site == 0} == {
        "qk.0": ("qk", 4, 2),
        "v.0": ("v", 5, 2),
        "head.0": ("head", 2, 1),
        "head.0-2": ("head", 3, 1),
    }
    shared, served = found["head.0"], found["head.0-2"]
    assert {weight for weight, _ in shared.producers} == {"q.w", "k.w", "v.w"} and shared.prunable
    assert {weight for weight, _ in served.producers} == {"q.w"}
    assert "share keys and values" in served.reasons[0] and not served.prunable


def test_query_heads_of_the_only_key_and_value_can_go_on_their_own() -> None:
    found = analyse_model(graphs.grouped(keys=1, queries=3)).groups
    heads = [group for group in found.values() if group.kind == "head"]
    assert [(group.id, group.size, group.prunable) for group in heads] == [("head.0", 3, True)]


def test_both_projections_of_a_gated_ffn_are_one_group() -> None:
    found = groups_of(blocks=1, gate="pair")
    assert {weight for weight, _ in found["ffn.0"].producers} == {"/blocks.0/mlp/fc1.w", "/blocks.0/mlp/up.w"}


def test_the_cube_inside_a_gelu_is_no_residual() -> None:
    kinds = [group.kind for group in groups_of(activation="gelu_tanh").values()]
    assert kinds.count("ffn") == 2 and kinds.count("residual") == 1


def test_normalised_queries_are_reported_with_the_operator_and_not_cut() -> None:
    found = groups_of(qk_norm=True)
    assert not found["qk.0"].prunable
    assert any(
        reason.startswith("a normalisation runs over it (at LayerNormalization") for reason in found["qk.0"].reasons
    )
    assert found["v.0"].prunable and found["ffn.0"].prunable
    report = inspect(graphs.transformer(qk_norm=True))
    assert report.sites[0]["prunable"]["qk"] is False and report.sites[0]["reasons"]
    assert any("qk.0" in item["reason"] for item in report.skipped)


def test_the_head_count_is_never_an_ffn_group() -> None:
    assert all(group.size != 3 for group in groups_of(qk_norm=True).values() if group.kind == "ffn")


def two_streams(hidden: tuple[int, int] | None) -> onnx.ModelProto:
    net = graphs.Net()
    h = net.input("x", ["N", 4])
    for index, width in enumerate((6, 5)):
        h = net.linear(h, f"in{index}", (4, 6)[index], width)
        inner = hidden[index] if hidden else width
        branch = net.op("Relu", net.linear(h, f"a{index}", width, inner))
        h = net.op("Add", h, net.linear(branch, f"b{index}", inner, width) if hidden else branch)
    net.output(net.linear(h, "out", 5, 3), ["N", 3])
    return net.proto()


def test_two_residual_streams_are_numbered() -> None:
    found = analyse_model(two_streams((7, 8))).groups
    assert {name: group.size for name, group in found.items()} == {
        "residual.0": 6,
        "ffn.0": 7,
        "residual.1": 5,
        "ffn.1": 8,
    }


def test_a_stream_whose_branch_is_one_projection_is_a_residual() -> None:
    assert {group.kind for group in analyse_model(two_streams(None)).groups.values()} == {"residual"}


@pytest.mark.parametrize(("kernel", "kind"), [(3, "channel"), (1, "ffn")])
def test_convolutions_make_channels_unless_they_are_projections(kernel: int, kind: str) -> None:
    found = analyse_model(graphs.depthwise(6, kernel=kernel)).groups
    assert {name: (group.kind, group.size, group.reasons) for name, group in found.items()} == {
        f"{kind}.0": (kind, 6, ())
    }


def test_what_reaches_an_output_is_frozen_with_its_name() -> None:
    net = graphs.Net()
    hidden = net.op("Relu", net.linear(net.input("x", ["N", 4]), "a", 4, 6))
    net.output(net.linear(hidden, "b", 6, 3), ["N", 3])
    net.output(net.op("Tanh", hidden), ["N", 6], name="hidden")
    found = analyse_model(net.proto()).groups
    assert found["ffn.0"].reasons == ("size of the model's output 'hidden' (at output hidden)",)


def odd_operator(bypass: bool) -> onnx.ModelProto:
    """An operator without a rule between two projections; with a bypass its axes still are one group."""
    net = graphs.Net()
    h = net.linear(net.input("x", ["N", 4]), "a", 4, 6)
    odd = net.op("CumSum", h, np.asarray(1), name="odd")
    h = net.op("Relu", net.linear(net.op("Mul", h, odd) if bypass else odd, "b", 6, 7))
    net.output(net.linear(h, "c", 7, 3), ["N", 3])
    return net.proto()


def test_an_unknown_operator_on_the_way_freezes_its_group_and_no_other() -> None:
    found = {group.size: group for group in analyse_model(odd_operator(True)).structure.groups}
    assert found[6].reasons == ("no rule for operator CumSum (at odd)",) and found[7].prunable


def test_a_width_that_ends_at_an_unknown_operator_is_on_record() -> None:
    assert any("CumSum" in item["reason"] for item in inspect(odd_operator(False)).skipped)


def test_a_factor_twice_in_one_activation_is_not_cut() -> None:
    net = graphs.Net()
    h = net.op("Relu", net.linear(net.input("x", ["N", 4]), "a", 4, 6))
    square = net.op("MatMul", net.op("Unsqueeze", h, [2]), net.op("Unsqueeze", h, [1]))
    y = net.op("ReduceSum", net.op("MatMul", square, net.weight("b", 6, 3)), [1], keepdims=0)
    net.output(y, ["N", 3])
    found = analyse_model(net.proto()).groups
    assert all(not group.prunable for group in found.values() if group.size == 6)


def test_attention_without_softmax_can_be_cut_exactly_where_it_is_cut_at_all() -> None:
    model = graphs.transformer(probabilities="Relu", blocks=1)
    analysis = analyse_model(model)
    for group in analysis.structure.groups:
        if group.prunable:
            applied = apply(analysis, graphs.random_plan([group], np.random.default_rng(0)))
            assert prove(analysis, applied, [graphs.inputs_for(model, 2)]).masked_equality < 1e-5


def test_attention_without_softmax_can_be_pruned() -> None:
    model = graphs.transformer(probabilities="Relu", blocks=1)
    result = prune(model, 0.3, allocation="uniform", calibration=graphs.calibration(model), samples=8)
    assert result.record["verification"]["passed"]


def test_no_two_groups_are_each_others_heads() -> None:
    found = groups_of(probabilities="Relu", blocks=1)
    pairs = {(group.atom, head) for group in found.values() for head in group.head_atoms}
    assert not any((right, left) in pairs for left, right in pairs)
