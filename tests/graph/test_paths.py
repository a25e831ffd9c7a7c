"""What may lie between a projection and the product that contracts it, if the neurons of a head are to be mixed."""

from __future__ import annotations

from typing import Any

import graphs
import numpy as np
import onnx
import pytest

from onnxsnp.analysis import Analysis, analyse_model
from onnxsnp.calibration.statistics import Moments
from onnxsnp.evaluation.verify import difference
from onnxsnp.graph.normalize import as_graph
from onnxsnp.graph.paths import straight_from, way_to
from onnxsnp.pruning import prune
from onnxsnp.reconstruction.attention import PairBasis, ValueBasis
from onnxsnp.reconstruction.full import rotate_pairs, rotate_values

HEADS, SIZE, TOKENS, WIDTH = graphs.HEADS, graphs.SIZE, graphs.TOKENS, graphs.WIDTH
Hook = graphs.Hook
attention = graphs.attention


def vector(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).uniform(0.5, 1.5, shape)


def rms(net: graphs.Net, x: Any) -> Any:
    spread = net.op("Sqrt", net.op("Add", net.mean(net.op("Mul", x, x), -1), 1e-5))
    return net.op("Mul", net.op("Div", x, spread), vector(SIZE))


def gated(net: graphs.Net, x: Any) -> Any:
    return net.op("Mul", x, net.op("Sigmoid", net.linear(net.graph.inputs[0], "gate", WIDTH, HEADS * SIZE)))


def rope(net: graphs.Net, x: Any) -> Any:
    half = SIZE // 2
    first = net.op("Slice", x, [0], [half], [3])
    second = net.op("Slice", x, [half], [SIZE], [3])
    turned = net.op("Concat", net.op("Neg", second), first, axis=3)
    angles = np.arange(TOKENS)[:, None] * np.tile(0.5 ** np.arange(half), 2)
    return net.op("Add", net.op("Mul", x, np.cos(angles)), net.op("Mul", turned, np.sin(angles)))


def gelu(net: graphs.Net, x: Any) -> Any:
    return net.op("Mul", x, net.op("Sigmoid", net.op("Mul", x, 1.702)))


def unary(kind: str, **attrs: Any) -> Hook:
    return lambda net, x: net.op(kind, x, **attrs)


def by(value: Any, kind: str = "Mul") -> Hook:
    return lambda net, x: net.op(kind, x, value)


def run_time_scalar(net: graphs.Net, x: Any) -> Any:
    """A factor that only the run knows, and that takes nothing but the type from the data."""
    number = net.op("CastLike", net.tensor(np.asarray([0.7])), x)
    return net.op("Mul", x, net.op("Sqrt", number))


def read_twice(net: graphs.Net, x: Any) -> Any:
    """A second reader, whose result goes to an output of its own."""
    net.output(net.op("Relu", net.op("MatMul", x, net.weight("second.w", SIZE, 3))), ["N", HEADS, TOKENS, 3], "second")
    return x


def flat_read_twice(net: graphs.Net, x: Any) -> Any:
    other = net.op("MatMul", x, net.weight("second.w", HEADS * SIZE, 3))
    net.output(net.op("Relu", other), ["N", TOKENS, 3], "second")
    return x


def compared(net: graphs.Net, x: Any) -> Any:
    """The outputs of the tokens of a head against each other: a second reader without a weight."""
    other = net.op("MatMul", net.op("Abs", x), net.op("Transpose", x, perm=[0, 1, 3, 2]))
    net.output(net.op("Tanh", other), ["N", HEADS, TOKENS, TOKENS], "second")
    return x


def relative_position(net: graphs.Net, q: Any) -> Any:
    """Queries also meet a table of positions, as in SAM and MViT; the scores take the result up."""
    net.op("MatMul", q, net.weight("table", SIZE, TOKENS), name="table")
    return q


def add_relative(net: graphs.Net, scores: Any) -> Any:
    return net.op("Add", scores, next(node.outputs[0] for node in net.graph.nodes if node.name == "table"))


def measured_behind_a_transpose(net: graphs.Net, x: Any) -> Any:
    """Unchanged, but the number of samples, found behind a transpose, is an output of the model."""
    sizes = net.op("Shape", net.op("Transpose", x, perm=[1, 0, 2, 3]))
    net.output(net.op("Gather", sizes, [1], axis=0), [1], "samples", np.int64)
    return x


LINEAR: dict[str, dict[str, Hook]] = {
    "plain": {},
    "scale on query": {"q": by(0.4)},
    "scale as a divisor": {"q": by(2.4, "Div")},
    "scale on both": {"q": by(0.6), "k": by([0.6])},
    "scale and mask on scores": {
        "scores": lambda net, x: net.op("Add", net.op("Mul", x, 0.4), -9.0 * np.triu(np.ones((TOKENS, TOKENS)), 1))
    },
    "scale only known at run time": {"q": run_time_scalar},
    "temperature per head on query": {"q": by(vector(HEADS, 1, 1))},
    "temperature per head on key": {"k": by(vector(HEADS, 1, 1))},
    "temperature per head on scores": {"scores": by(vector(HEADS, 1, 1))},
    "bias per head and token pair": {"scores": by(vector(1, HEADS, TOKENS, TOKENS), "Add")},
    "casts": {name: unary("Cast", to=1) for name in ("flat_q", "k", "v", "joined")},
    "identity": {name: unary("Identity") for name in ("q", "flat_k", "v", "mixed")},
    "dropout": {name: unary("Dropout") for name in ("scores", "joined", "flat_v")},
    "measured behind a transpose": {"k": measured_behind_a_transpose},
    "scaled values": {"v": by(0.3), "mixed": by(vector(HEADS, 1, 1))},
}
PAIRS_BLOCKED: dict[str, dict[str, Hook]] = {
    "norm on query": {"q": lambda net, x: net.norm(x, "q_norm", SIZE)},
    "norm on key": {"k": lambda net, x: net.norm(x, "k_norm", SIZE)},
    "root mean square on both": {"q": rms, "k": rms},
    "rotary embedding": {"q": rope, "k": rope},
    "scale per channel of query": {"q": by(vector(SIZE))},
    "scale per channel of key": {"flat_k": by(vector(HEADS * SIZE))},
    "divided by channel": {"q": by(vector(SIZE), "Div")},
    "activation on query": {"q": unary("Relu")},
    "activation on key": {"flat_k": gelu},
    "hard swish on key": {"k": unary("HardSwish")},
    "squared query": {"q": lambda net, x: net.op("Mul", x, x)},
    "number added to query": {"q": by(0.5, "Add")},
    "position added to key": {"k": by(vector(TOKENS, SIZE), "Add")},
    "key scaled by token": {"k": by(vector(TOKENS, 1))},
    "key read twice": {"k": read_twice},
    "query read twice": {"flat_q": flat_read_twice},
    "relative positions": {"q": relative_position, "scores": add_relative},
    "clipped scores": {"scores": lambda net, x: net.op("Clip", x, -0.5, 0.5)},
    "scores not below a bound": {"scores": by(0.0, "Max")},
    "scores scaled by key token": {"scores": by(vector(1, TOKENS))},
}
VALUES_BLOCKED: dict[str, dict[str, Hook]] = {
    "hard swish": {"mixed": unary("HardSwish")},
    "gelu": {"joined": gelu},
    "relu on values": {"v": unary("Relu")},
    "scale per channel": {"joined": by(vector(HEADS * SIZE))},
    "scale per channel of values": {"v": by(vector(SIZE))},
    "bias behind the product": {"mixed": by(vector(SIZE), "Add")},
    "number added to the output": {"mixed": by(0.5, "Add")},
    "output compared with itself": {"mixed": compared},
    "values read twice": {"flat_v": flat_read_twice},
    "output read twice": {"joined": flat_read_twice},
    "gate": {"joined": gated},
}


def rotations(analysis: Analysis) -> tuple[bool, bool]:
    found = analysis.rotations
    for group in analysis.structure.groups:
        if group.kind in ("qk", "v") and group.prunable:  # each is accounted for once
            assert (group.id in found.pairs) + (group.id in found.values) + (group.id in found.blocked) == 1
            assert found.blocked.get(group.id, "a node") != ""
    return "qk.0" in found.pairs, "v.0" in found.values


def rotated_by_hand(analysis: Analysis) -> Any:
    """The model with a random change of basis in every head that may be rotated, undone on the other side."""
    rng = np.random.default_rng(3)
    graph = analysis.graph.copy()
    keep = np.tile(np.arange(SIZE), (HEADS, 1))
    for pair in analysis.rotations.pairs.values():
        turns = [rng.standard_normal((SIZE, SIZE)) + 2 * np.eye(SIZE) for _ in range(HEADS)]
        bases = [PairBasis(turn, np.linalg.inv(turn).T, np.zeros(0)) for turn in turns]
        graph.weights.update(rotate_pairs(analysis, pair, bases, keep))
    for value in analysis.rotations.values.values():
        bases = [ValueBasis(rng.standard_normal((SIZE, SIZE)) + 2 * np.eye(SIZE), np.zeros(0)) for _ in range(HEADS)]
        width = HEADS * SIZE
        x = rng.standard_normal((50, width)) + 1
        moments = Moments(x.T @ x, x.sum(axis=0), 50)
        graph.weights.update(rotate_values(analysis, value, bases, keep, moments))
    return graph


def proved(model: onnx.ModelProto, scope: str = "qk,v,ffn") -> dict[str, tuple[int, int]]:
    """Prune with full compensation; sizes before and after by group."""
    data = graphs.calibration(model, 12)
    found = prune(model, 0.34, allocation="uniform", scope=scope, calibration=data, samples=8, threads=1)
    verification = found.record["verification"]
    assert verification["passed"] and verification["masked_equality"] < 1e-4
    onnx.checker.check_model(found.model, full_check=True)
    return {group["id"]: (group["before"], group["after"]) for group in found.record["groups"]}


@pytest.mark.parametrize("name", LINEAR)
def test_what_mixes_nothing_may_lie_between(name: str) -> None:
    model = attention(**LINEAR[name])
    analysis = analyse_model(model)
    assert rotations(analysis) == (True, True), analysis.rotations.blocked
    feeds = [graphs.inputs_for(model, 3)]
    assert difference(as_graph(analysis.model), rotated_by_hand(analysis), feeds, 1) < 1e-4


@pytest.mark.parametrize("name", PAIRS_BLOCKED)
def test_what_tells_query_and_key_neurons_apart_forbids_new_ones(name: str) -> None:
    model = attention(**PAIRS_BLOCKED[name])
    analysis = analyse_model(model)
    assert rotations(analysis) == (False, True), analysis.rotations
    sizes = proved(model)
    assert sizes["v.0"] == (SIZE, 4) and sizes["ffn.0"] == (20, 13)
    group = analysis.groups["qk.0"]
    assert group.size * group.together == SIZE and group.together == (2 if name == "rotary embedding" else 1)
    if group.prunable:
        assert sizes["qk.0"] == (group.size, 4 // group.together)


def test_most_of_them_still_allow_a_selection() -> None:
    frozen = {
        name: analysis.groups["qk.0"].reasons
        for name, hooks in PAIRS_BLOCKED.items()
        if not (analysis := analyse_model(attention(**hooks))).groups["qk.0"].prunable
    }
    assert frozen.keys() == {"norm on query", "norm on key", "root mean square on both"}
    assert all("normalisation" in reasons[0] for reasons in frozen.values())


@pytest.mark.parametrize("name", VALUES_BLOCKED)
def test_what_lies_behind_the_values_forbids_new_ones_but_not_a_selection(name: str) -> None:
    model = attention(**VALUES_BLOCKED[name])
    analysis = analyse_model(model)
    assert rotations(analysis) == (True, False), analysis.rotations
    sizes = proved(model)
    assert sizes["v.0"] == sizes["qk.0"] == (SIZE, 4) and sizes["ffn.0"] == (20, 13)


def test_a_way_names_its_projection_or_the_node_that_blocks_it() -> None:
    analysis = analyse_model(attention(q=unary("HardSwish", name="swish"), mixed=unary("Tanh", name="tanh")))
    graph, deps, linears = analysis.graph, analysis.dependencies, analysis.linears
    site, qk, v = analysis.structure.sites[0], analysis.groups["qk.0"], analysis.groups["v.0"]
    query = way_to(site.query[0], qk.atom, graph, deps, linears)
    key = way_to(site.key[0], qk.atom, graph, deps, linears)
    assert (query.linear, query.blocked_by, query.rotatable) == (None, "swish", False)
    assert key.linear == linears["k.w"] and key.rotatable
    assert way_to(site.value[0], v.atom, graph, deps, linears).linear == linears["v.w"]
    assert not way_to("x", qk.atom, graph, deps, linears).rotatable
    inverse = analyse_model(attention(q=lambda net, x: net.op("Div", 1.0, x, name="inverse")))
    assert inverse.groups["qk.0"].reasons == ("what is cut would be divided by zero (at inverse)",)
    site = inverse.structure.sites[0]
    query = way_to(site.query[0], inverse.groups["qk.0"].atom, inverse.graph, inverse.dependencies, inverse.linears)
    assert (query.linear, query.blocked_by) == (None, "inverse")
    site = analysis.structure.sites[0]
    data = linears["proj.w"].data
    assert not straight_from(data, site.mix, v.atom, graph, deps, linears)
    plain = analyse_model(attention())
    ways = plain.graph, plain.dependencies, plain.linears
    assert straight_from(plain.linears["proj.w"].data, "mix", plain.groups["v.0"].atom, *ways)
    assert not straight_from(plain.linears["proj.w"].data, "score", plain.groups["v.0"].atom, *ways)


def test_attention_operator_with_a_soft_cap_keeps_its_keys() -> None:
    """tanh on the scores sees the mean of the keys, so it must not be dropped."""

    def model(**attributes: Any) -> onnx.ModelProto:
        net = graphs.Net(23)
        x = net.input("x", ["N", TOKENS, WIDTH])
        parts = [net.linear(x, name, WIDTH, HEADS * SIZE) for name in "qkv"]
        heads = {"q_num_heads": HEADS, "kv_num_heads": HEADS}
        joined = net.op("Attention", *parts, **heads, **attributes)
        net.output(net.linear(joined, "proj", HEADS * SIZE, WIDTH), ["N", TOKENS, WIDTH])
        return net.proto()

    assert rotations(analyse_model(model())) == (True, True)
    assert rotations(analyse_model(model(softcap=2.0))) == (False, True)


def test_tied_query_and_key_are_not_rotated_apart() -> None:
    """One projection for both: its columns are query and key at once."""
    net = graphs.Net()
    x = net.input("x", ["N", TOKENS, WIDTH])

    def apart(value: Any) -> Any:
        return net.op("Transpose", net.reshape(value, 0, TOKENS, HEADS, SIZE), perm=[0, 2, 1, 3])

    both, v = apart(net.linear(x, "qk", WIDTH, HEADS * SIZE)), apart(net.linear(x, "v", WIDTH, HEADS * SIZE))
    scores = net.op("MatMul", both, net.op("Transpose", both, perm=[0, 1, 3, 2]), name="score")
    mixed = net.op("MatMul", net.op("Softmax", scores, axis=-1), v)
    joined = net.reshape(net.op("Transpose", mixed, perm=[0, 2, 1, 3]), 0, TOKENS, HEADS * SIZE)
    net.output(net.linear(joined, "proj", HEADS * SIZE, WIDTH), ["N", TOKENS, WIDTH])
    model = net.proto()
    assert rotations(analyse_model(model)) == (False, True)
    assert proved(model, "v")["v.0"] == (SIZE, 4)
