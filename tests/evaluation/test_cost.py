"""Multiply-accumulates and parameters: counted by hand, and for every plan those of the model that was really cut."""

from __future__ import annotations

import functools
from typing import Any

import graphs
import numpy as np
import onnx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import helper

from onnxsnp.analysis import Analysis, analyse_model
from onnxsnp.planning.plan import as_cuts
from onnxsnp.surgery.apply import apply, to_model


def by_hand(
    blocks: int = 2,
    heads: int = 3,
    qk: int = 4,
    v: int = 6,
    width: int = 12,
    ffn: int = 20,
    tokens: int = 5,
    features: int = 7,
    classes: int = 5,
) -> tuple[int, int]:
    """(macs, params) of `graphs.transformer` with separate projections."""
    block = tokens * (2 * width * heads * qk + width * heads * v + heads * v * width + 2 * width * ffn)
    block += heads * tokens * tokens * (qk + v)
    held = 2 * (width * heads * qk + heads * qk) + width * heads * v + heads * v + heads * v * width + width
    held += 2 * width * ffn + ffn + width + 4 * width
    macs = tokens * features * width + blocks * block + width * classes
    return macs, features * width + width + tokens * width + blocks * held + 2 * width + width * classes + classes


def total(model: onnx.ModelProto, what: str) -> int:
    return round(analyse_model(model).cost.total(what))


@pytest.mark.parametrize(
    "options",
    [{}, {"qkv": "flat"}, {"reverse": True}, {"tokens": 9, "v": 4, "qkv": "packed"}, {"opset": 11}, {"batch": 1}],
)
def test_a_transformer_costs_what_counting_by_hand_gives(options: dict[str, Any]) -> None:
    macs, params = by_hand(**{key: value for key, value in options.items() if key in ("tokens", "v")})
    model = graphs.transformer(**options)
    assert (total(model, "macs"), total(model, "params")) == (macs, params)


def test_a_fixed_batch_costs_no_more_per_sample() -> None:
    assert total(graphs.transformer(batch=4), "macs") == by_hand()[0]


def test_params_are_the_files_float_entries_each_once() -> None:
    model = graphs.transformer(shared_norm=True)
    entries = sum(
        array.size for array in graphs.initializers(model).values() if array.dtype.kind == "f" and array.size > 1
    )
    assert total(model, "params") == entries


def test_gemm_and_convolutions_are_counted() -> None:
    net = graphs.Net()
    x = net.input("x", ["N", 6])
    net.output(net.op("Gemm", x, net.weight("w", 4, 6), net.weight("b", 4), transB=1), ["N", 4])
    assert total(net.proto(), "macs") == 24
    assert total(graphs.depthwise(6), "macs") == 64 * (3 * 6 + 6 * 9 + 6 * 5)


def test_einsum_is_counted_as_the_product_of_its_letters() -> None:
    net = graphs.Net()
    x = net.input("x", ["N", 5, 6])
    net.output(net.op("Einsum", x, net.weight("w", 6, 7), equation="btc,co->bto"), ["N", 5, 7])
    assert total(net.proto(), "macs") == 5 * 6 * 7


@pytest.mark.parametrize("rank", [3, 4])
def test_attention_is_two_products(rank: int) -> None:
    net = graphs.Net(23)
    if rank == 4:
        q, k, v = (net.input(name, ["N", 3, tokens, 4]) for name, tokens in (("q", 5), ("k", 7), ("v", 7)))
        net.output(net.op("Attention", q, k, v), ["N", 3, 5, 4])
    else:
        q, k, v = (net.input(name, ["N", tokens, 12]) for name, tokens in (("q", 5), ("k", 7), ("v", 7)))
        net.output(net.op("Attention", q, k, v, q_num_heads=3, kv_num_heads=3), ["N", 5, 12])
    assert total(net.proto(), "macs") == 2 * 3 * 5 * 7 * 4


LAYOUTS: list[dict[str, Any]] = [
    {},
    {"qkv": "flat"},
    {"qkv": "packed", "v": 4},
    {"gate": "packed"},
    {"gate": "pair"},
    {"pool": "first"},
    {"reverse": True},
    {"opset": 11},
    {"scale": "shape"},
]


@pytest.mark.parametrize("options", LAYOUTS, ids=str)
def test_the_predicted_cost_is_that_of_the_cut_model(options: dict[str, Any]) -> None:
    analysis = analyse_model(graphs.transformer(**options))
    for seed in range(3):
        plan = graphs.random_plan(analysis.structure.groups, np.random.default_rng(seed), least=2)
        sizes = {cut.atom: cut.keep.shape[1] for cut in as_cuts(plan, analysis.groups)}
        made = to_model(apply(analysis, plan).graph)
        for what in ("macs", "params"):
            assert round(analysis.cost.total(what, sizes)) == total(made, what)


def test_the_share_of_a_group_is_everything_that_shrinks_with_it() -> None:
    analysis = analyse_model(graphs.transformer(blocks=1))
    ffn = analysis.groups["ffn.0"].atom
    assert analysis.cost.share("macs", ffn) == 2 * 5 * 12 * 20
    assert analysis.cost.share("params", ffn) == 2 * 12 * 20 + 20
    assert analysis.cost.total("macs") - analysis.cost.total("macs", {ffn: 10}) == analysis.cost.share("macs", ffn) / 2


def test_integer_weights_and_scalars_are_no_parameters() -> None:
    net = graphs.Net()
    ids = net.input("ids", ["N", 3], np.int64)
    h = net.op("Mul", net.op("Gather", net.weight("table", 9, 4), ids, axis=0), 2.0)
    net.output(net.op("MatMul", h, net.weight("w", 4, 2)), ["N", 3, 2])
    model = net.proto()
    model.graph.initializer.append(helper.make_tensor("unread", 1, [5], [0.0] * 5))
    assert total(model, "params") == 9 * 4 + 4 * 2


@functools.cache
def analysed(index: int) -> Analysis:
    return analyse_model(graphs.transformer(**LAYOUTS[index]) if index < len(LAYOUTS) else graphs.mlp(6, 9, 8, 4))


@settings(max_examples=60, deadline=None)
@given(data=st.data(), index=st.integers(0, len(LAYOUTS)), what=st.sampled_from(["macs", "params"]))
def test_what_is_cut_already_and_what_is_cut_then_cost_what_both_cost(
    data: st.DataObject, index: int, what: str
) -> None:
    analysis = analysed(index)
    sizes = {
        group.atom: data.draw(st.integers(1, group.size), label=group.id)
        for group in analysis.structure.groups
        if data.draw(st.booleans(), label=f"{group.id} is cut")
    }
    first = {atom: size for atom, size in sizes.items() if data.draw(st.booleans(), label=f"{atom} is cut already")}
    then = {atom: size for atom, size in sizes.items() if atom not in first}
    model = analysis.cost.given(first)
    assert model.total(what) == pytest.approx(analysis.cost.total(what, first), rel=1e-12)
    assert model.total(what, then) == pytest.approx(analysis.cost.total(what, sizes), rel=1e-12)
    assert model.given(then).total(what) == pytest.approx(model.total(what, then), rel=1e-12)
    for group in analysis.structure.groups:
        if group.atom in first:
            assert model.share(what, group.atom) == 0  # it cannot be cut again
            continue
        gone = analysis.cost.total(what, {**first, group.atom: 0})
        share = analysis.cost.total(what, first) - gone
        assert model.share(what, group.atom) == pytest.approx(share, rel=1e-9, abs=1e-6)
        slope = np.diff(model.at_widths(what, group.atom, np.arange(group.size + 1)))
        np.testing.assert_allclose(slope, model.share(what, group.atom) / group.size, rtol=1e-9, atol=1e-9)


def test_a_cost_with_nothing_cut_is_the_cost() -> None:
    cost = analysed(0).cost
    assert cost.given({}).macs == cost.macs and cost.given({}).params == cost.params
