"""Which attentions a target fuses, and what keeps them fused when the model is cut."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import graphs
import numpy as np
import onnx
import pytest

from onnxsnp.analysis import Analysis, analyse_model
from onnxsnp.deploy.fusion import SiteFusion, _by_scale, fused_attention, ties
from onnxsnp.deploy.lower import lower
from onnxsnp.deploy.parity import parity
from onnxsnp.deploy.targets import BUILT_IN, get_target
from onnxsnp.planning.plan import GroupPlan, Plan
from onnxsnp.pruning import prune
from onnxsnp.report.terminal import fusion

ORIN, NANO = get_target("jetson-orin"), get_target("jetson-nano")


def model(qk: int = 32, v: int = 32, **options: object) -> onnx.ModelProto:
    return graphs.transformer(blocks=2, heads=2, qk=qk, v=v, width=24, ffn=64, **options)


def plan(analysis: Analysis, **kept: int) -> Plan:
    groups = {name.replace("_", "."): count for name, count in kept.items()}
    entries = [
        GroupPlan(one.id, one.kind, one.size, one.heads, [list(range(groups[one.id]))] * one.heads)
        for one in analysis.structure.groups
        if one.id in groups
    ]
    assert len(entries) == len(kept)
    return Plan("any", entries)


def test_an_attention_that_meets_everything_is_fused() -> None:
    found = fused_attention(analyse_model(model()), ORIN, "fp16")
    assert found == [SiteFusion(f"blocks.{index}.attn", 32, 32, True) for index in range(2)]
    assert found[0].to_dict() == {
        "site": "blocks.0.attn",
        "qk_size": 32,
        "v_size": 32,
        "kept": True,
        "why": "",
        "rule": "",
    }


@pytest.mark.parametrize(
    ("sizes", "why"),
    [
        ((32, 24), "query and key have head size 32, values 24; it has to be one"),
        ((12, 12), "head size 12 is not between 16 and 256"),
        ((260, 260), "head size 260 is not between 16 and 256"),
        ((20, 20), "head size 20 is no multiple of 8"),
        ((16, 16), ""),
        ((256, 256), ""),
    ],
)
def test_head_sizes_that_are_not_fused_say_why(sizes: tuple[int, int], why: str) -> None:
    for one in fused_attention(analyse_model(model(*sizes)), ORIN, "fp16"):
        assert (one.qk_size, one.v_size, one.why, one.kept) == (*sizes, why, not why)


def test_the_target_and_the_precision_come_first() -> None:
    analysis = analyse_model(model())
    nano = fused_attention(analysis, NANO, "fp16")
    assert {one.why for one in nano} == {"the GPU of jetson-nano has compute capability 5.3, and 7.5 is needed"}
    assert not any(one.kept for one in nano)
    assert {one.why for one in fused_attention(analysis, ORIN, "fp32")} == {
        "attention is fused in fp16 only, not in fp32"
    }
    assert not ties(analysis, NANO, "fp16", 1) and not ties(analysis, ORIN, "fp32", 1)


def by_scale(**hooks: Any) -> str:
    analysis = analyse_model(graphs.attention(**hooks))
    (site,) = analysis.structure.sites
    return _by_scale(analysis, site)  # asked for alone: the heads of this model are too small to be fused


def test_a_scale_right_behind_the_product_is_moved_and_one_further_on_is_not() -> None:
    def mask(net: Any, scores: Any) -> Any:
        return net.op("Add", scores, net.weight("mask", 5, 5), name="mask")

    assert by_scale() == by_scale(scores=mask) == ""
    assert by_scale(scores=lambda net, s: net.op("Div", s, 2.5)) == ""
    assert by_scale(scores=lambda net, s: mask(net, net.op("Mul", s, 2.5))) == ""
    assert "scores are scaled behind other operators" in by_scale(
        scores=lambda net, s: net.op("Mul", mask(net, s), 2.5)
    )


@pytest.mark.parametrize("op", ["Mul", "Div"])
@pytest.mark.parametrize("scalar", [2.5, [[2.5]]])
def test_a_scale_is_moved_to_an_operand_where_attention_is_fused(op: str, scalar: Any) -> None:
    model = graphs.attention(scores=lambda net, s: net.op(op, s, scalar, name="late"))
    feeds = {"x": graphs.inputs_for(model, 1)["x"]}
    for target, moved in (("jetson-orin", 1), ("jetson-nano", 0)):
        lowered = lower(model, get_target(target))
        assert sum(change.count for change in lowered.changes if change.op == "scales") == moved
        readers = {name: node.name for node in lowered.proto.graph.node for name in node.input}
        (late,) = [node for node in lowered.proto.graph.node if node.name == "late"]
        assert (readers[late.output[0]] == "score") == bool(moved)
        onnx.checker.check_model(lowered.proto, full_check=True)
        assert parity(model, lowered.proto, feeds).passed


def test_what_else_reads_a_product_keeps_its_scale_behind_it() -> None:
    def twice(net: Any, scores: Any) -> Any:
        return net.op("Add", net.op("Mul", scores, 0.5, name="late"), scores)

    lowered = lower(graphs.attention(scores=twice), ORIN)
    assert not [change for change in lowered.changes if change.op == "scales"]


def test_a_plan_that_cuts_query_and_key_alone_loses_the_fusion() -> None:
    analysis = analyse_model(model())
    found = fused_attention(analysis, ORIN, "fp16", plan(analysis, qk_0=24))
    assert [one.kept for one in found] == [False, True]
    assert (found[0].qk_size, found[0].v_size) == (24, 32)
    both = fused_attention(analysis, ORIN, "fp16", plan(analysis, qk_0=24, v_0=24, v_1=8, qk_1=8))
    assert [(one.kept, one.why) for one in both] == [(True, ""), (False, "head size 8 is not between 16 and 256")]
    assert both[1].rule == "size" and found[0].rule == "one size"


@pytest.mark.parametrize(("multiple", "widths"), [(1, [16, 24, 32]), (8, [16, 24, 32]), (16, [16, 32]), (12, [24, 32])])
def test_tied_sizes_are_those_that_stay_fused(multiple: int, widths: list[int]) -> None:
    analysis = analyse_model(model())
    for tie in ties(analysis, ORIN, "fp16", multiple):
        np.testing.assert_array_equal(tie.widths, [[one, one] for one in widths])
        assert [group.kind for group in tie.groups] == ["qk", "v"]
        for row, after in pairwise(range(len(widths))):
            assert set(tie.at(row).values()) == {widths[row]} != set(tie.at(after).values())


def test_sites_that_differ_in_numbers_only_are_told_in_one_line() -> None:
    sites = [
        {"site": f"blocks.{index}", "kept": index == 0, "why": f"size {index}", "rule": "size", "before": True}
        for index in range(4)
    ]
    assert fusion(sites) == [
        "attention that can be fused: 1 of 4 sites",
        "fused attention lost at blocks.1: size 1 (and at 2 more)",
    ]
    same = [{**site, "kept": False, "why": "no kernels", "before": False} for site in sites]
    assert fusion(same) == ["no fused attention: no kernels"]
    assert fusion([]) == []


OPTIONS = {"samples": 12, "latency": False, "threads": 1, "seed": 1}


@pytest.mark.parametrize("scope", ["qk,v,ffn", "head,qk,v,ffn"])
@pytest.mark.parametrize(
    ("allocation", "compensation"), [("auto", "full"), ("auto", "none"), ("uniform", "none"), ("uniform", "full")]
)
def test_pruned_for_a_target_every_attention_stays_fused(scope: str, allocation: str, compensation: str) -> None:
    data = {"x": graphs.calibration(model(), 24)["x"]}
    result = prune(
        model(),
        0.4,
        target="jetson-orin",
        scope=scope,
        allocation=allocation,
        compensation=compensation,
        calibration=data,
        **OPTIONS,
    )
    told = result.record["target"]
    assert (told["name"], told["precision"], told["multiple_of"]) == ("jetson-orin", "fp16", 8)
    assert all(one["kept"] and one["before"] for one in told["fused_attention"]) and len(told["fused_attention"]) == 2
    assert result.model is not None
    after = analyse_model(result.model)
    assert all(one.kept for one in fused_attention(after, ORIN, "fp16"))  # of the model itself, not of the record
    sizes = {one["id"]: (one["before"], one["after"]) for one in result.record["groups"]}
    assert any(new < old for old, new in sizes.values())
    assert all(sizes[f"qk.{block}"] == sizes[f"v.{block}"] for block in range(2))


def test_without_a_target_or_on_the_nano_nothing_is_tied() -> None:
    data = {"x": graphs.calibration(model(), 24)["x"]}
    options = {**OPTIONS, "calibration": data, "scope": "qk,v"}
    free = prune(model(), 0.25, **options)
    nano = prune(model(), 0.25, target="jetson-nano", **options)
    assert free.record["target"] is None and nano.record["target"]["multiple_of"] == 1
    assert free.plan.groups == nano.plan.groups
    assert any(one["after"] % 8 for one in free.record["groups"])


def test_a_step_that_was_given_is_taken_and_so_are_sizes_that_stay_fused() -> None:
    data = {"x": graphs.calibration(model(), 24)["x"]}
    record = prune(model(), 0.3, target="jetson-orin", multiple_of=4, calibration=data, **OPTIONS).record
    assert record["target"]["multiple_of"] == 4
    assert all(one["kept"] for one in record["target"]["fused_attention"])
    assert any(one["after"] % 8 == 4 for one in record["groups"] if one["kind"] == "ffn")


def test_attentions_that_were_never_fused_are_not_tied() -> None:
    proto = model(24, 32)
    data = {"x": graphs.calibration(proto, 24)["x"]}
    record = prune(proto, 0.3, target=replace(BUILT_IN["rtx"], name="mine"), calibration=data, **OPTIONS).record
    found = record["target"]["fused_attention"]
    assert record["target"]["name"] == "mine"
    assert [(one["before"], one["kept"]) for one in found] == [(False, False)] * 2


def test_query_groups_that_share_keys_are_tied_too() -> None:
    proto = graphs.grouped(qk=32, v=32, width=48)
    record = prune(proto, 0.3, target="jetson-orin", calibration={"x": graphs.calibration(proto, 24)["x"]}, **OPTIONS)
    sizes = {one["id"]: one["after"] for one in record.record["groups"]}
    assert sizes["qk.0"] == sizes["v.0"] == 24 and record.record["target"]["fused_attention"][0]["kept"]


def test_sizes_of_rotated_pairs_are_counted_in_neurons(exports: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    analysis = analyse_model(exports / "families" / "text_llama_ts17_dyn.onnx")
    assert [one.qk_size for one in fused_attention(analysis, ORIN, "fp16")] == [8, 8]
    monkeypatch.setattr("onnxsnp.deploy.fusion.LEAST", 2)  # its heads are too small to be fused
    monkeypatch.setattr("onnxsnp.deploy.fusion.STEP", 2)
    for tie in ties(analysis, ORIN, "fp16", 1):
        assert [group.together for group in tie.groups] == [2, 1]
        np.testing.assert_array_equal(tie.widths, [[1, 2], [2, 4], [3, 6], [4, 8]])
