"""Where a gain per query-key pair can go: the constants found scale the pairs of the score, and nothing else."""

from __future__ import annotations

from typing import Any

import graphs
import numpy as np
import onnx
import pytest

from onnxsnp.analysis import Analysis, analyse_model
from onnxsnp.graph.gains import GainSite, find_gain
from onnxsnp.pruning import prune
from onnxsnp.reconstruction.gains import scaled, spread

HEADS, SIZE, TOKENS, WIDTH = graphs.HEADS, graphs.SIZE, graphs.TOKENS, graphs.WIDTH
Hooks = dict[str, graphs.Hook]


def vector(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).uniform(0.5, 1.5, shape)


def named(net: graphs.Net, name: str, *shape: int) -> Any:
    return net.weight(name, *shape, scale=0.2, shift=1.0)


def relu(net: graphs.Net, x: Any) -> Any:
    return net.op("Relu", x)


def by(name: str, *shape: int, kind: str = "Mul") -> graphs.Hook:
    return lambda net, x: net.op(kind, x, named(net, name, *shape))


def chain(*hooks: graphs.Hook) -> graphs.Hook:
    def apply(net: graphs.Net, x: Any) -> Any:
        for hook in hooks:
            x = hook(net, x)
        return x

    return apply


def gated(net: graphs.Net, x: Any) -> Any:
    """A gate that differs between channels and tokens, and depends on the input."""
    other = net.reshape(net.linear(net.graph.inputs[0], "gate", WIDTH, HEADS * SIZE), 0, TOKENS, HEADS, SIZE)
    return net.op("Mul", x, net.op("Sigmoid", net.op("Transpose", other, perm=[0, 2, 1, 3])))


def norm(name: str) -> graphs.Hook:
    return lambda net, x: net.norm(x, name, SIZE)


def rms(*shape: int) -> graphs.Hook:
    """A root mean square norm, spelled out, whose scale has a given shape."""

    def apply(net: graphs.Net, x: Any) -> Any:
        spread = net.op("Sqrt", net.op("Add", net.mean(net.op("Mul", x, x), -1), 1e-5))
        return net.op("Mul", net.op("Div", x, spread), named(net, "gamma", *shape))

    return apply


def batch_norm(net: graphs.Net, x: Any) -> Any:
    """Over a flat [N, T, H·d]: scale and bias per channel."""
    width = HEADS * SIZE
    columns = [named(net, f"bn.{part}", width) for part in ("scale", "bias", "mean", "variance")]
    turned = net.op("BatchNormalization", net.op("Transpose", x, perm=[0, 2, 1]), *columns)
    return net.op("Transpose", turned, perm=[0, 2, 1])


def depthwise(net: graphs.Net, x: Any) -> Any:
    width = HEADS * SIZE
    kernel = net.weight("depth.w", width, 1, 3, scale=0.5)
    turned = net.op("Transpose", x, perm=[0, 2, 1])
    turned = net.op("Conv", turned, kernel, named(net, "depth.b", width), group=width, pads=[1, 1])
    return net.op("Transpose", turned, perm=[0, 2, 1])


def adapter(net: graphs.Net, x: Any) -> Any:
    """A second, narrow projection that is added, as in LoRA."""
    low = net.linear(net.graph.inputs[0], "down", WIDTH, 2, bias=False)
    return net.op("Add", x, net.op("Mul", net.linear(low, "up", 2, HEADS * SIZE, bias=False), 0.5))


def read_twice(net: graphs.Net, x: Any) -> Any:
    other = net.op("MatMul", x, net.weight("second.w", SIZE, 3))
    net.output(net.op("Tanh", other), ["N", HEADS, TOKENS, 3], "second")
    return x


def computed_scale(net: graphs.Net, x: Any) -> Any:
    """A norm whose scale is no constant."""
    return net.op("LayerNormalization", x, net.op("Sigmoid", net.input("s", [SIZE])), axis=-1)


Q, K = {"q.w", "q.b"}, {"k.w", "k.b"}
FOUND: dict[str, tuple[Hooks, set[str], int]] = {  # hooks, constants, gains per index
    "query bends": ({"q": relu}, K, HEADS),
    "key bends": ({"k": relu}, Q, HEADS),
    "query read twice": ({"q": read_twice}, K, HEADS),
    "key read twice": ({"k": read_twice}, Q, HEADS),
    "scores capped": ({"scores": lambda net, x: net.op("Clip", x, -0.5, 0.5)}, Q, HEADS),
    "scale per channel": ({"q": by("gamma", SIZE)}, Q, HEADS),
    "divided by channel": ({"q": by("gamma", SIZE, kind="Div"), "k": relu}, Q, HEADS),
    "scale per channel and token": ({"q": by("table", TOKENS, SIZE), "k": relu}, Q, HEADS),
    "scale per channel and token behind a bend": (
        {"q": chain(relu, by("table", TOKENS, SIZE)), "k": relu},
        {"table"},
        1,
    ),
    "scale per channel behind a bend": ({"q": chain(relu, by("gamma", SIZE)), "k": relu}, {"gamma"}, 1),
    "scale per head and channel": ({"q": chain(relu, by("gamma", HEADS, 1, SIZE)), "k": relu}, {"gamma"}, HEADS),
    "scale per channel and then a bend": ({"q": chain(by("gamma", SIZE), relu), "k": by("kappa", SIZE)}, K, HEADS),
    "gate": ({"q": gated, "k": relu}, Q, HEADS),
    "positions added": ({"q": by("table", TOKENS, SIZE, kind="Add"), "k": relu}, {*Q, "table"}, 1),
    "positions taken away": ({"q": by("table", HEADS, TOKENS, SIZE, kind="Sub"), "k": relu}, {*Q, "table"}, HEADS),
    "negated": ({"q": lambda net, x: net.op("Neg", x), "k": relu}, Q, HEADS),
    "two projections added": ({"flat_q": adapter, "k": relu}, {*Q, "up.w"}, HEADS),
    "depthwise convolution": ({"flat_q": depthwise, "k": relu}, {"depth.w", "depth.b"}, HEADS),
    "batch norm": ({"flat_q": batch_norm, "flat_k": relu}, {"bn.scale", "bn.bias"}, HEADS),
    "norm on key": ({"k": norm("norm")}, Q, HEADS),
    "norms on both, scales shared by the heads": (
        {"q": norm("q_norm"), "k": norm("k_norm")},
        {"q_norm.scale", "q_norm.bias"},
        1,
    ),
    "spelled-out norm, scale shared by the heads": ({"q": rms(SIZE), "k": norm("k_norm")}, {"gamma"}, 1),
    "spelled-out norm, scale per head": ({"q": rms(HEADS, 1, SIZE), "k": norm("k_norm")}, {"gamma"}, HEADS),
    "norm and then a position": (
        {"q": chain(norm("q_norm"), by("table", TOKENS, SIZE, kind="Add")), "k": relu},
        {"q_norm.scale", "q_norm.bias", "table"},
        1,
    ),
}
NOWHERE: dict[str, Hooks] = {
    "both bend": {"q": relu, "k": relu},
    "number added": {"q": lambda net, x: net.op("Add", x, 0.5), "k": relu},
    "squared": {"q": lambda net, x: net.op("Mul", x, x), "k": relu},
    "both read twice": {"q": read_twice, "k": relu},
    "read behind the scale": {"q": chain(relu, by("gamma", SIZE), read_twice), "k": relu},
    "divisor": {"q": lambda net, x: net.op("Div", 1.0, x), "k": relu},
    "bend behind the norm": {"q": chain(norm("q_norm"), relu), "k": relu},
    "added to what bends": {"q": lambda net, x: net.op("Add", named(net, "b", SIZE), net.op("Tanh", x)), "k": relu},
    "norm with a computed scale": {"q": computed_scale, "k": relu},
}


def found(model: onnx.ModelProto) -> tuple[Analysis, GainSite | None]:
    analysis = analyse_model(model)
    group, site = analysis.groups["qk.0"], analysis.structure.sites[0]
    return analysis, find_gain(group, site, analysis.graph, analysis.dependencies, analysis.linears)


def names(analysis: Analysis, gain: GainSite) -> set[str]:
    """Constants as the test named them."""
    return {analysis.graph.origin.get(name, name) for name in gain.constants}


@pytest.mark.parametrize("name", FOUND)
def test_gains_in_the_constants_found_are_gains_of_the_pairs(name: str) -> None:
    hooks, constants, heads = FOUND[name]
    model = graphs.attention(**hooks)
    analysis, gain = found(model)
    assert gain is not None and (names(analysis, gain), gain.heads) == (constants, heads)
    rng = np.random.default_rng(7)
    gains = rng.standard_normal((HEADS if heads > 1 else 1, SIZE))
    check(model, analysis, gain, gains)


def check(model: onnx.ModelProto, analysis: Analysis, gain: GainSite, gains: np.ndarray) -> None:
    """One side of the score product is scaled by the gains, the other and all other outputs are not."""
    deps, site = analysis.dependencies, analysis.structure.sites[0]
    labels = [*gain.head_atoms, gain.group.atom]
    by_factor = gains.reshape([deps.size(atom) for atom in labels])
    factors = {name: spread(by_factor, labels, name, analysis.graph, deps) for name in gain.constants}
    graph = analysis.graph.copy()
    graph.weights.update(scaled(graph.weights, factors))
    others = [name for name in analysis.graph.outputs if name != "y"]
    wanted = [site.query[0], site.key[0], *others]
    feed = graphs.inputs_for(model, 3)
    before, after = (one.session(wanted, threads=1, optimize=False).run(None, feed) for one in (analysis.graph, graph))
    q, new_q = (run[0] for run in (before, after))
    k, new_k = (np.swapaxes(run[1], 2, 3) for run in (before, after))
    assert (site.query[1], site.key[1]) == (3, 2)
    want = np.einsum("nhti,nhui->nhtui", q * gains[:, None], k)
    np.testing.assert_allclose(np.einsum("nhti,nhui->nhtui", new_q, new_k), want, rtol=1e-4, atol=1e-5)
    assert np.array_equal(q, new_q) or np.array_equal(k, new_k)
    for one, other in zip(before[2:], after[2:], strict=True):
        assert np.array_equal(one, other)


@pytest.mark.parametrize("name", NOWHERE)
def test_nothing_is_scaled_where_more_than_the_pairs_would_change(name: str) -> None:
    assert found(graphs.attention(**NOWHERE[name]))[1] is None


def test_what_shares_a_projection_gets_no_gains() -> None:
    net = graphs.Net()
    x = net.input("x", ["N", TOKENS, WIDTH])

    def apart(value: Any) -> Any:
        return net.op("Transpose", net.reshape(value, 0, TOKENS, HEADS, SIZE), perm=[0, 2, 1, 3])

    both, v = apart(net.linear(x, "qk", WIDTH, HEADS * SIZE)), apart(net.linear(x, "v", WIDTH, HEADS * SIZE))
    scores = net.op("MatMul", both, net.op("Transpose", both, perm=[0, 1, 3, 2]), name="score")
    mixed = net.op("MatMul", net.op("Softmax", scores, axis=-1), v)
    joined = net.reshape(net.op("Transpose", mixed, perm=[0, 2, 1, 3]), 0, TOKENS, HEADS * SIZE)
    net.output(net.linear(joined, "proj", HEADS * SIZE, WIDTH), ["N", TOKENS, WIDTH])
    assert found(net.proto())[1] is None


def test_only_what_cannot_be_rotated_is_weighted() -> None:
    assert analyse_model(graphs.attention()).gains == {}
    bent = analyse_model(graphs.attention(k=relu))
    assert bent.gains.keys() == bent.rotations.blocked.keys() == {"qk.0"}
    frozen = analyse_model(graphs.attention(q=norm("q_norm")))  # its statistics run over the pairs
    assert not frozen.groups["qk.0"].prunable and frozen.gains == {}


@pytest.mark.parametrize("name", ["scores capped", "key bends"])
def test_the_mean_of_the_keys_counts_where_the_softmax_does_not_get_the_scores_as_they_are(name: str) -> None:
    gain = found(graphs.attention(**FOUND[name][0]))[1]
    assert gain is not None and gain.centred == (name == "key bends")


GROUPED = 3  # query heads per key head


def grouped(kind: str) -> onnx.ModelProto:
    """Keys and values shared by query heads: by an Attention operator, copies of the keys, or broadcasting."""
    net = graphs.Net(23 if kind == "operator" else 17)
    x = net.input("x", ["N", TOKENS, WIDTH])
    wide = GROUPED * HEADS * SIZE
    q, k, v = (net.linear(x, part, WIDTH, wide if part == "q" else HEADS * SIZE) for part in "qkv")

    def apart(value: Any, heads: int) -> Any:
        return net.op("Transpose", net.reshape(value, 0, TOKENS, heads, SIZE), perm=[0, 2, 1, 3])

    if kind == "operator":
        y = net.op("Attention", q, k, v, q_num_heads=GROUPED * HEADS, kv_num_heads=HEADS)
    else:
        k, v = (net.unsqueeze(apart(value, HEADS), 2) for value in (k, v))
        if kind == "copies":
            q = apart(q, GROUPED * HEADS)
            repeated = [net.op("Expand", value, np.asarray([1, 1, GROUPED, 1, 1])) for value in (k, v)]
            k, v = (net.reshape(value, 0, GROUPED * HEADS, TOKENS, SIZE) for value in repeated)
        else:
            q = net.op("Transpose", net.reshape(q, 0, TOKENS, HEADS, GROUPED, SIZE), perm=[0, 2, 3, 1, 4])
        rank = 4 if kind == "copies" else 5
        turned = net.op("Transpose", k, perm=[*range(rank - 2), rank - 1, rank - 2])
        scores = net.op("MatMul", q, turned, name="score")
        y = net.op("MatMul", net.op("Softmax", scores, axis=-1), v)
        y = net.op("Transpose", y, perm=[0, 2, 1, 3] if rank == 4 else [0, 3, 1, 2, 4])
        y = net.reshape(y, 0, TOKENS, wide)
    net.output(net.linear(y, "proj", wide, WIDTH), ["N", TOKENS, WIDTH])
    return net.proto()


@pytest.mark.parametrize(("kind", "heads"), [("copies", GROUPED * HEADS), ("broadcast", HEADS), ("operator", 1)])
def test_queries_that_share_a_key_are_weighted_on_their_side(kind: str, heads: int) -> None:
    analysis, gain = found(grouped(kind))
    assert gain is not None and (names(analysis, gain), gain.heads) == (Q, heads)
    assert gain.head_atoms[: len(gain.group.head_atoms)] == gain.group.head_atoms


@pytest.mark.parametrize("compensation", ["none", "full"])
def test_pairs_of_shared_keys_are_scored_alike_however_the_keys_are_shared(compensation: str) -> None:
    plans, agreements = {}, {}
    for kind in ("copies", "broadcast", "operator"):
        model = grouped(kind)
        options: dict[str, Any] = {"calibration": graphs.calibration(model, 64), "samples": 32, "threads": 1}
        result = prune(model, 0.34, allocation="uniform", scope="qk", compensation=compensation, **options)
        assert result.record["verification"]["passed"]
        plans[kind] = [entry.keep for entry in result.plan.groups]
        agreements[kind] = result.record["agreement"]["cosine"]
    assert [len(head) for head in plans["operator"][0]] == [4]  # one choice for all heads
    if compensation == "none":
        assert plans["copies"] == plans["broadcast"] and len(plans["copies"][0]) == HEADS
        assert agreements["copies"] == pytest.approx(agreements["broadcast"], rel=1e-4)
