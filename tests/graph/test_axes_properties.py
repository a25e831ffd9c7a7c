"""Random chains of operators on arrays of index labels: what the axis algebra calls one factor is one index.

Every tensor carries, for each source it was made from, the flat index of the source entry that stands at each of its
places. Two places of one factor are claimed to have the same coordinate; numpy says whether that is so.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import graphs
import numpy as np
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from onnx import NodeProto, helper

from onnxsnp.analysis import analyse_model
from onnxsnp.evaluation.verify import prove
from onnxsnp.graph.axes import Clash, Factors, solve
from onnxsnp.graph.rules import gather_facts
from onnxsnp.surgery.apply import apply

QUICK = settings(
    max_examples=120,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)
FEW = settings(max_examples=18, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])


@dataclass
class Chain:
    """Nodes, constants, and the labels of every tensor by source."""

    nodes: list[NodeProto] = field(default_factory=list)
    weights: dict[str, np.ndarray] = field(default_factory=dict)
    labels: dict[str, dict[str, np.ndarray]] = field(default_factory=dict)
    clashes: list[Clash] = field(default_factory=list)

    def source(self, name: str, shape: tuple[int, ...]) -> str:
        self.labels[name] = {name: np.arange(int(np.prod(shape))).reshape(shape)}
        return name

    def shape(self, name: str) -> tuple[int, ...]:
        return next(iter(self.labels[name].values())).shape

    def constant(self, values: list[int] | int) -> str:
        name = f"c{len(self.weights)}"
        self.weights[name] = np.asarray(values, np.int64)
        return name

    def add(self, op: str, inputs: list[str], made: list[dict[str, np.ndarray]], **attrs: object) -> list[str]:
        outputs = [f"t{len(self.labels) + index}" for index in range(len(made))]
        self.nodes.append(helper.make_node(op, inputs, outputs, name=f"n{len(self.nodes)}", **attrs))
        for output, labels in zip(outputs, made, strict=True):
            self.labels[output] = labels
        return outputs

    def moved(self, op: str, name: str, function, extra: list[str] = (), **attrs: object) -> str:  # type: ignore[no-untyped-def, assignment]
        made = {source: function(array) for source, array in self.labels[name].items()}
        return self.add(op, [name, *extra], [made], **attrs)[0]

    def solve(self) -> Factors:
        shapes = {name: self.shape(name) for name in self.labels}
        shapes.update({name: array.shape for name, array in self.weights.items()})
        facts = gather_facts(self.nodes, shapes, self.weights, 17, [], [])
        sizes = {(name, axis): size for name, shape in shapes.items() for axis, size in enumerate(shape)}
        factors, self.clashes = solve(facts.ties, sizes)
        return factors


def coordinates(factors: Factors, name: str, shape: tuple[int, ...]) -> dict[int, np.ndarray]:
    """For each factor that occurs once in a tensor, the coordinate of every flat place along it."""
    atoms = [atom for axis in range(len(shape)) for atom in factors.atoms((name, axis))]
    if not atoms:
        return {}
    grid = np.indices([factors.size(atom) for atom in atoms]).reshape(len(atoms), -1)
    return {atom: grid[index] for index, atom in enumerate(atoms) if atoms.count(atom) == 1}


def check(chain: Chain) -> int:
    """Compare every claim with the labels, except where sizes clash (those are frozen); the number of claims."""
    factors = chain.solve()
    clashed = {atom for clash in chain.clashes for atom in factors.current(clash.factors)}
    claims = 0
    for name, by_source in chain.labels.items():
        here = coordinates(factors, name, chain.shape(name))
        for source, labels in by_source.items():
            there = coordinates(factors, source, chain.shape(source))
            for atom in (here.keys() & there.keys()) - clashed:
                np.testing.assert_array_equal(
                    here[atom], there[atom][labels.reshape(-1)], err_msg=f"{source} in {name}"
                )
                claims += 1
    return claims


def divisions(size: int) -> list[tuple[int, ...]]:
    found = [(size,)]
    found += [(size // part, part) for part in range(2, size) if size % part == 0]
    found += [(2, 3, size // 6)] if size % 6 == 0 else []
    return found


def step(draw, chain: Chain, name: str) -> str:  # type: ignore[no-untyped-def]
    shape = chain.shape(name)
    rank = len(shape)
    ops = ["transpose", "unsqueeze", "reshape", "join", "unary", "broadcast", "matmul", "slice", "split", "gather"]
    op = draw(st.sampled_from(ops + (["squeeze"] if 1 in shape else [])))
    axis = draw(st.integers(0, rank - 1))
    if op == "transpose" and rank > 1:
        perm = draw(st.permutations(range(rank)))
        return chain.moved("Transpose", name, lambda a: a.transpose(perm), perm=list(perm))
    if op == "unsqueeze" and rank < 6:
        return chain.moved("Unsqueeze", name, lambda a: np.expand_dims(a, axis), [chain.constant([axis])])
    if op == "squeeze":
        axis = shape.index(1)
        if rank > 1:
            return chain.moved("Squeeze", name, lambda a: a.squeeze(axis), [chain.constant([axis])])
    if op == "reshape" and rank < 6:
        parts = draw(st.sampled_from(divisions(shape[axis])))
        target = [*shape[:axis], *parts, *shape[axis + 1 :]]
        return chain.moved("Reshape", name, lambda a: a.reshape(target), [chain.constant(target)])
    if op == "join" and rank > 1 and axis + 1 < rank:
        target = [*shape[:axis], shape[axis] * shape[axis + 1], *shape[axis + 2 :]]
        return chain.moved("Reshape", name, lambda a: a.reshape(target), [chain.constant(target)])
    if op == "broadcast":
        other = tuple(1 if draw(st.booleans()) else size for size in shape[draw(st.integers(0, rank - 1)) :])
        extra = chain.source(f"s{len(chain.labels)}", other)
        left = {source: np.broadcast_to(array, shape) for source, array in chain.labels[name].items()}
        right = {extra: np.broadcast_to(chain.labels[extra][extra], shape)}
        return chain.add("Add", [name, extra], [{**left, **right}])[0]
    if op == "matmul" and rank > 1:
        columns = draw(st.integers(2, 5))
        extra = chain.source(f"s{len(chain.labels)}", (shape[-1], columns))
        out = (*shape[:-1], columns)  # the contracted index is gone; any of its values stands for all
        left = {source: np.broadcast_to(array[..., :1], out) for source, array in chain.labels[name].items()}
        right = {extra: np.broadcast_to(chain.labels[extra][extra][:1], out)}
        return chain.add("MatMul", [name, extra], [{**left, **right}])[0]
    if shape[axis] > 1 and op in ("slice", "split", "gather"):
        cut = draw(st.integers(1, shape[axis] - 1))
        if op == "slice":
            bounds = [chain.constant([value]) for value in (cut, shape[axis], axis, 1)]
            return chain.moved("Slice", name, lambda a: np.take(a, range(cut, shape[axis]), axis), bounds)
        if op == "gather":
            return (
                chain.moved("Gather", name, lambda a: np.take(a, cut, axis), [chain.constant(cut)], axis=axis)
                if rank > 1
                else name
            )
        made = [
            dict(zip(chain.labels[name], parts, strict=True))
            for parts in zip(*(np.split(array, [cut], axis) for array in chain.labels[name].values()), strict=True)
        ]
        outputs = chain.add("Split", [name, chain.constant([cut, shape[axis] - cut])], made, axis=axis)
        return outputs[draw(st.integers(0, 1))]
    return chain.moved("Relu", name, lambda a: a)


@QUICK
@given(st.data())
def test_places_of_one_factor_carry_one_index(data: st.DataObject) -> None:
    chain = Chain()
    shape = tuple(data.draw(st.lists(st.sampled_from([1, 2, 3, 4, 6, 12]), min_size=1, max_size=4)))
    name = chain.source("x", shape)
    for _ in range(data.draw(st.integers(1, 7))):
        if np.prod(chain.shape(name)) < 5000:
            name = step(data.draw, chain, name)
    check(chain)


@QUICK
@given(st.permutations(range(4)), st.lists(st.sampled_from([2, 3, 4]), min_size=4, max_size=4))
def test_a_chain_without_selection_keeps_every_factor(perm: list[int], sizes: list[int]) -> None:
    chain = Chain()
    flat = chain.source("x", (int(np.prod(sizes)),))
    apart = chain.moved("Reshape", flat, lambda a: a.reshape(sizes), [chain.constant(sizes)])
    turned = chain.moved("Transpose", apart, lambda a: a.transpose(perm), perm=list(perm))
    joined = chain.moved("Reshape", turned, lambda a: a.reshape(-1), [chain.constant([-1])])
    factors = chain.solve()
    assert check(chain) >= 16 and not chain.clashes
    before, after = factors.atoms(("x", 0)), factors.atoms((joined, 0))
    assert sorted(before) == sorted(after) and after == tuple(before[index] for index in perm)


@FEW
@given(
    st.lists(st.integers(2, 12), min_size=3, max_size=5),
    st.sampled_from(["Relu", "Sigmoid", "Tanh"]),
    st.integers(0, 2**31),
)
def test_random_cuts_of_random_perceptrons_obey_masked_equality(sizes: list[int], activation: str, seed: int) -> None:
    model = graphs.mlp(*sizes, activation=activation, seed=seed % 97)
    analysis = analyse_model(model)
    assert [group.size for group in analysis.structure.groups] == sizes[1:-1]
    applied = apply(analysis, graphs.random_plan(analysis.structure.groups, np.random.default_rng(seed)))
    proof = prove(analysis, applied, [graphs.inputs_for(model, batch) for batch in (1, 4)], 1)
    assert proof.masked_equality < 1e-5


@FEW
@given(
    st.fixed_dictionaries(
        {
            "blocks": st.integers(1, 2),
            "heads": st.integers(1, 3),
            "qk": st.sampled_from([2, 4]),
            "width": st.sampled_from([6, 8, 12]),
            "ffn": st.integers(2, 9),
            "tokens": st.sampled_from([3, 5, "S"]),
            "batch": st.sampled_from(["N", 2]),
            "qkv": st.sampled_from(["separate", "packed", "flat"]),
            "reverse": st.booleans(),
            "scale": st.sampled_from(["constant", "shape"]),
            "gate": st.sampled_from([None, "pair", "packed"]),
            "activation": st.sampled_from(["relu", "gelu_tanh"]),
            "opset": st.sampled_from([14, 17, 18, 20]),
        }
    ),
    st.sampled_from([2, 3, 4, 6]),
    st.integers(0, 2**31),
)
def test_random_cuts_of_random_transformers_obey_masked_equality(options: dict, v: int, seed: int) -> None:
    options["v"] = options["qk"] if options["qkv"] == "packed" else v
    if options["tokens"] == "S":
        options["batch"] = "N"
    model = graphs.transformer(**options)
    analysis = analyse_model(model)
    assert analysis.structure.skipped == [] and len(analysis.structure.sites) == options["blocks"]
    groups = [group for group in analysis.structure.groups if group.prunable]
    assert {"qk", "v", "ffn", "residual"} <= {group.kind for group in groups}
    applied = apply(analysis, graphs.random_plan(groups, np.random.default_rng(seed)))
    proof = prove(analysis, applied, [graphs.inputs_for(model, 2, S=4), graphs.inputs_for(model, 2, 1, S=6)], 1)
    assert proof.masked_equality < 1e-4 and proof.normalised_equality < 1e-5
