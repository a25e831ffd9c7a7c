"""Attention operators of onnxruntime spelled out: every mask, bias and scale, causal or not, self and cross."""

from __future__ import annotations

from typing import Any

import graphs
import numpy as np
import onnx_graphsurgeon as gs
import pytest
from fused import MICROSOFT, RNG, assert_same, expanded, model_of, noise
from onnx import helper

from onnxsnp.analysis import analyse_model
from onnxsnp.evaluation.verify import prove
from onnxsnp.graph.expand import expand
from onnxsnp.graph.normalize import as_graph
from onnxsnp.model import load
from onnxsnp.surgery.apply import apply

B, S, T, H = 2, 5, 7, 2

MASKS = {
    "none": None,
    "lengths": np.asarray([3, 5], "i4"),
    "keys": np.asarray([[1, 1, 0, 0, 1], [1, 1, 1, 1, 0]], "i4"),
    "pairs": np.tile(np.tril(np.ones((S, S), "i4")), (B, 1, 1)),
    "dummy": np.ones((B, 1), "i4"),
}


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("opset", [11, 17])
def test_one_weight_for_query_key_and_value(mask: str, opset: int) -> None:
    feeds = {"x": noise(B, S, 6)}
    weights = {"w": noise(6, 24), "b": noise(24)}
    held = MASKS[mask]
    names = ["x", "w", "b"] + ([] if held is None else ["m"])
    if held is not None:
        feeds["m"] = held
    assert_same(model_of("Attention", feeds, weights, names, opset=opset, num_heads=H), feeds, 1e-5)


@pytest.mark.parametrize(
    "settings",
    [
        {"scale": 0.7},
        {"unidirectional": 1},
        {"qkv_hidden_sizes": [8, 8, 12]},
        {"mask_filter_value": -3.0},
        {"unidirectional": 1, "mask_filter_value": -3.0},
        {"unidirectional": 1, "mask_filter_value": float(np.finfo("f4").min)},
    ],
    ids=str,
)
def test_settings_of_the_packed_operator(settings: dict[str, Any]) -> None:
    width = sum(settings.get("qkv_hidden_sizes", [8, 8, 8]))
    feeds = {"x": noise(B, S, 6), "m": MASKS["keys"][:, ::-1].copy()}  # its first token sees nothing but masked keys
    weights = {"w": noise(6, width), "b": noise(width)}
    assert_same(model_of("Attention", feeds, weights, ["x", "w", "b", "m"], num_heads=H, **settings), feeds, 1e-5)


def test_scores_with_a_table_added() -> None:
    feeds = {"x": noise(B, S, 6), "a": noise(1, H, S, S)}
    weights = {"w": noise(6, 24), "b": noise(24)}
    assert_same(model_of("Attention", feeds, weights, ["x", "w", "b", "", "", "a"], num_heads=H), feeds, 1e-5)


@pytest.mark.parametrize("bias", ["none", "held", "fed"])
@pytest.mark.parametrize("kind", ["self", "cross", "apart"])
def test_query_key_and_value_of_their_own(bias: str, kind: str) -> None:
    tokens = S if kind == "self" else T
    feeds = {"q": noise(B, S, 8), "k": noise(B, tokens, 8), "v": noise(B, tokens, 12)}
    if kind == "apart":
        feeds |= {"k": noise(B, H, T, 4), "v": noise(B, H, T, 4)}
        if bias != "none":
            pytest.skip("onnxruntime takes no bias for keys that come apart")
    held = {"b": noise(28)} if bias != "none" else {}
    weights = held if bias == "held" else {}
    if bias == "fed":
        feeds |= held
    assert_same(model_of("MultiHeadAttention", feeds, weights, ["q", "k", "v", *held], num_heads=H), feeds, 1e-5)


@pytest.mark.parametrize("mask", ["lengths", "keys", "pairs"])
@pytest.mark.parametrize("causal", [0, 1])
def test_masks_of_separate_operands(mask: str, causal: int) -> None:
    feeds = {"q": noise(B, S, 8), "k": noise(B, S, 8), "v": noise(B, S, 8), "m": MASKS[mask]}
    names = ["q", "k", "v", "", "m"]
    model = model_of("MultiHeadAttention", feeds, {}, names, num_heads=H, unidirectional=causal, scale=0.3)
    assert_same(model, feeds, 1e-5)


def test_keys_of_another_length_with_a_mask_and_a_table() -> None:
    feeds = {"q": noise(B, S, 8), "k": noise(B, T, 8), "v": noise(B, T, 8), "a": noise(B, 1, S, T)}
    feeds["m"] = (np.arange(T) < np.asarray([[4], [6]])).astype("i4")
    model = model_of("MultiHeadAttention", feeds, {}, ["q", "k", "v", "", "m", "a"], num_heads=H)
    assert_same(model, feeds, 1e-5)


def test_a_cache_stays_with_its_reason() -> None:
    feeds = {"x": noise(B, S, 6), "p": noise(2, B, H, 3, 4)}
    weights = {"w": noise(6, 24), "b": noise(24)}
    model = model_of("Attention", feeds, weights, ["x", "w", "b", "", "p"], 2, num_heads=H)
    assert "cache" in expanded(model).unexpanded["fused"]
    feeds = {"q": noise(B, 1, 16), "k": noise(B, 1, 8), "v": noise(B, 1, 8)}
    feeds |= {"p": noise(B, 1, 3, 8), "r": noise(B, 1, 3, 8)}
    weights = {"n": np.full(B, 3, "i4"), "t": np.asarray(4, "i4")}
    names = [*feeds, *weights]
    model = model_of("GroupQueryAttention", feeds, weights, names, 3, num_heads=2, kv_num_heads=1)
    assert "cache" in expanded(model).unexpanded["fused"]


def grouped(
    size: int = 8, shared: int = 2, lengths: tuple[int, int] = (S, S), packed: bool = False
) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray], list[str]]:
    """Four heads of queries on two of keys; feeds, weights and names of its inputs."""
    feeds = {"q": noise(B, S, 4 * size), "k": noise(B, S, shared * size), "v": noise(B, S, shared * size)}
    weights = {"n": np.asarray(lengths, "i4") - 1, "t": np.asarray(S, "i4")}
    names = ["q", "k", "v", "", "", "n", "t"]
    if packed:
        feeds = {"q": np.concatenate(list(feeds.values()), -1)}
        names[1:3] = ["", ""]
    return feeds, weights, names


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"scale": 0.2},
        {"softcap": 1.5},
        {"local_window_size": 2},
        {"local_window_size": 2, "softcap": 0.5, "scale": 0.9},
        {"causal": 0},
    ],
    ids=str,
)
@pytest.mark.parametrize("packed", [True, False])
def test_grouped_heads_without_a_cache(settings: dict[str, Any], packed: bool) -> None:
    feeds, weights, names = grouped(packed=packed)
    model = model_of("GroupQueryAttention", feeds, weights, names, num_heads=4, kv_num_heads=2, **settings)
    assert_same(model, feeds, 1e-5)


@pytest.mark.parametrize("interleaved", [0, 1])
@pytest.mark.parametrize("part", [16, 32])
@pytest.mark.parametrize("shared", [1, 4])
def test_grouped_heads_that_rotate_inside(interleaved: int, part: int, shared: int) -> None:
    feeds, weights, names = grouped(size=32, shared=shared)
    angles = noise(9, part // 2)
    weights |= {"c": np.cos(angles), "s": np.sin(angles)}
    settings = {"do_rotary": 1, "rotary_interleaved": interleaved, "num_heads": 4, "kv_num_heads": shared}
    assert_same(model_of("GroupQueryAttention", feeds, weights, [*names, "c", "s"], **settings), feeds, 1e-5)


@pytest.mark.parametrize("settings", [{}, {"causal": 0}, {"local_window_size": 2}], ids=str)
def test_grouped_heads_see_no_key_behind_the_end(settings: dict[str, int]) -> None:
    feeds, weights, names = grouped(lengths=(4, S))
    model = model_of("GroupQueryAttention", feeds, weights, names, num_heads=4, kv_num_heads=2, **settings)
    assert_same(model, feeds, 1e-5)


@pytest.mark.parametrize(
    ("slot", "reason"),
    [(9, "positions"), (10, "table"), (11, "no token"), (12, "quantises"), (14, "normalises queries and keys")],
)
def test_unusual_grouped_heads_stay_with_their_reason(slot: int, reason: str) -> None:
    feeds, weights, names = grouped()
    names += [""] * (16 - len(names))
    names[slot] = "more"
    weights["more"] = noise(4)
    graph = as_graph(load(model_of("GroupQueryAttention", feeds, weights, names, num_heads=4, kv_num_heads=2)))
    expand(graph, {name: array.shape for name, array in (feeds | weights).items()})
    assert reason in graph.unexpanded["fused"] and graph.nodes[0].op_type == "GroupQueryAttention"


@pytest.mark.parametrize("flat", [True, False])
@pytest.mark.parametrize("places", ["first", "all"])
@pytest.mark.parametrize("part", [False, True])
@pytest.mark.parametrize("interleaved", [0, 1])
def test_rotary_embeddings(flat: bool, places: str, part: bool, interleaved: int) -> None:
    size, turned = 8, 4 if part else 8
    feeds = {"x": noise(B, S, H * size) if flat else noise(B, H, S, size)}
    feeds["p"] = np.asarray([2], "i8") if places == "first" else np.random.default_rng(0).integers(0, 9, (B, S))
    weights = {"c": noise(9, turned // 2), "s": noise(9, turned // 2)}
    settings = {"interleaved": interleaved} | ({"rotary_embedding_dim": turned, "num_heads": H} if part else {})
    assert_same(model_of("RotaryEmbedding", feeds, weights, ["x", "p", "c", "s"], **settings), feeds, 1e-5)


@pytest.mark.parametrize("flat", [True, False])
@pytest.mark.parametrize("placed", [True, False])
@pytest.mark.parametrize("part", [0, 4])
@pytest.mark.parametrize("interleaved", [0, 1])
def test_rotary_embeddings_of_onnx_itself(flat: bool, placed: bool, part: int, interleaved: int) -> None:
    size, turned = 8, part or 8
    feeds = {"x": noise(B, S, H * size) if flat else noise(B, H, S, size)}
    leading = (9,) if placed else (B, S)
    weights = {"c": noise(*leading, turned // 2), "s": noise(*leading, turned // 2)}
    names = ["x", "c", "s"]
    if placed:
        feeds["p"] = np.random.default_rng(0).integers(0, 9, (B, S))
        names.append("p")
    settings = {"rotary_embedding_dim": part, "interleaved": interleaved} | ({"num_heads": H} if flat else {})
    assert_same(model_of("RotaryEmbedding", feeds, weights, names, opset=23, domain="", **settings), feeds, 1e-5)


def test_grouped_heads_are_a_site_that_can_be_cut() -> None:
    """Queries of four heads, keys and values of two; the file has no cache."""
    net = graphs.Net()
    x = net.input("x", [B, S, 12])
    parts = [net.linear(x, name, 12, heads * 8) for name, heads in (("q", 4), ("k", 2), ("v", 2))]
    told = [gs.Constant("n", np.full(B, S - 1, "i4")), gs.Constant("t", np.asarray(S, "i4"))]
    made = net.op("GroupQueryAttention", *parts, None, None, *told, name="fused", num_heads=4, kv_num_heads=2)
    net.graph.nodes[-1].domain = MICROSOFT
    net.output(net.linear(made, "o", 32, 3), [B, S, 3])
    net.graph.cleanup().toposort()
    model = gs.export_onnx(net.graph, ir_version=8)
    model.opset_import.append(helper.make_opsetid(MICROSOFT, 1))
    analysis = analyse_model(model)
    assert len(analysis.structure.sites) == 1 and analysis.structure.skipped == []
    assert {group.kind: group.size for group in analysis.structure.groups if group.prunable} == {
        "qk": 8,
        "v": 8,
        "head": 2,
    }
    applied = apply(analysis, graphs.random_plan([g for g in analysis.structure.groups if g.prunable], RNG))
    assert prove(analysis, applied, [graphs.inputs_for(model, B)], 1).passed
