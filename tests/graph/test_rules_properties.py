"""Every operator with a rule, in random chains: what the axis algebra claims is what the operator does.

Two things are asked. Of each operator by itself: a neuron of one operand, shaken at all its places, must change
nothing in the results but the places which the algebra gives that same neuron (unless the axis is said to be frozen,
contracted or averaged over). Of whole models: random cuts of the groups that are found equal the masked original.

`ONNXSNP_EXAMPLES=50` tries fifty times as many examples, and others in every run.
"""

from __future__ import annotations

import os
from collections import Counter

import graphs
import numpy as np
import pytest
from chains import OPSETS, Chain, session_of
from hypothesis import HealthCheck, Phase, assume, given, settings
from hypothesis import strategies as st
from onnx import NodeProto
from steps import STEPS, Covered

from onnxsnp.analysis import analyse_model, inspect
from onnxsnp.evaluation.verify import prove
from onnxsnp.graph.dependency import Dependencies, analyse
from onnxsnp.graph.rules import RULES
from onnxsnp.surgery.apply import apply, to_model

DEEP = int(os.environ.get("ONNXSNP_EXAMPLES", "1"))

# ways in which an operator shows no neuron of its own: it reads sizes, counts, or runs over every axis
_NOTHING_TO_CLAIM = {"ConstantOfShape", "Range", "Shape", "Size"}


def budget(examples: int) -> settings:
    return settings(
        max_examples=examples * DEEP,
        deadline=None,
        derandomize=DEEP == 1,
        database=None,
        suppress_health_check=list(HealthCheck),
        phases=(Phase.generate, Phase.shrink),
    )


def opsets(*covered: Covered) -> list[int]:
    return [opset for opset in OPSETS if all(one.since <= opset <= one.until for one in covered)]


def test_every_rule_has_a_step_that_shows_its_operator() -> None:
    assert STEPS.keys() == RULES.keys()
    assert all(opsets(covered) for covered in STEPS.values())


# ---------------------------------------------------------------------------------------------- operators by themselves


class Neurons:
    """Where the neurons of each factor are in each tensor, by the axis algebra."""

    def __init__(self, dependencies: Dependencies, values: dict[str, np.ndarray]) -> None:
        self.deps, self.values = dependencies, values
        self.frozen = {
            atom
            for atom, held in dependencies.frozen.items()
            if any(not freeze.node.startswith(("input ", "output ")) for freeze in held)
        }

    def places(self, tensor: str, atom: int, index: int) -> np.ndarray:
        """True where an entry belongs to the neuron; an axis that has the factor twice, or stacked, counts too."""
        found = np.zeros(self.values[tensor].shape, bool)
        for axis in range(found.ndim):
            along = self._along(self.deps.atoms(tensor, axis), atom, index, found.shape[axis])
            found |= along.reshape([-1 if other == axis else 1 for other in range(found.ndim)])
        return found

    def _along(self, atoms: tuple[int, ...], atom: int, index: int, size: int) -> np.ndarray:
        grid = np.indices([self.deps.size(one) for one in atoms]).reshape(len(atoms), size)
        found = np.zeros(size, bool)
        for one, at in zip(atoms, grid, strict=True):
            if one == atom:
                found |= at == index
            elif one in self.deps.stacks:
                inside = [
                    self._along(run, atom, index, int(np.prod([self.deps.size(part) for part in run])))
                    for run in self.deps.stacks[one].parts
                ]
                found |= np.concatenate(inside)[at]
        return found

    def consumed(self, node: NodeProto) -> set[int]:
        """Factors that the node is said to contract or to average over."""
        facts = self.deps.facts
        axes = [role.axis for role in facts.roles if role.node == node.name and role.kind == "consumer"]
        axes += [side for one in facts.products if one.node == node.name for side in (one.left, one.right)]
        axes += [role.axis for role in facts.statistics if role.node == node.name]
        return {atom for axis in axes for atom in self.deps.factors.atoms(axis)}


def shaken(values: np.ndarray, places: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Other values of the same kind at some places."""
    result = values.copy()
    if values.dtype == bool:
        result[places] = ~result[places]
    elif values.dtype.kind == "f":
        result[places] = 2 * rng.standard_normal(int(places.sum()))
    else:
        result[places] = rng.permutation(values.reshape(-1))[: int(places.sum())] if values.size else values
    return result


def changed(before: np.ndarray, after: np.ndarray) -> np.ndarray:
    if before.dtype.kind != "f":
        return np.asarray(before != after)
    finite = np.abs(before[np.isfinite(before)])
    with np.errstate(over="ignore"):  # of numbers at both ends of the range
        close = np.isclose(before, after, rtol=1e-5, atol=1e-6 * float(finite.max(initial=1.0)), equal_nan=True)
    return np.asarray(~close)


def check_neurons(chain: Chain, data: st.DataObject) -> Counter[str]:
    """Shake single neurons of the operands of every node; how many claims were tested, by operator."""
    graph = chain.graph()
    shapes = {name: value.shape for name, value in chain.values.items()}
    neurons = Neurons(analyse(graph, shapes), chain.values)
    rng = np.random.default_rng(data.draw(st.integers(0, 2**16)))
    claims: Counter[str] = Counter()
    for node in chain.nodes:
        asked = [
            (name, atom)
            for name in _operands(chain, node)
            for atom in dict.fromkeys(neurons.deps.atoms(name))
            if atom not in neurons.frozen | neurons.consumed(node)
        ]
        if not asked:
            continue
        feeds = {name: chain.values[name] for name in node.input if name}
        session = session_of([node], feeds, chain.opset)
        for name, atom in asked:
            index = int(rng.integers(neurons.deps.size(atom)))
            places = neurons.places(name, atom, index)
            after = session.run(None, feeds | {name: shaken(feeds[name], places, rng)})
            for output, value in zip(node.output, after, strict=True):
                moved = changed(chain.values[output], value)
                allowed = neurons.places(output, atom, index)
                assert not (moved & ~allowed).any(), (
                    f"neuron {index} of factor {atom} in {name} {feeds[name].shape} is elsewhere in {output} "
                    f"{value.shape} of {node.op_type}: {node}"
                )
                claims[node.op_type] += bool(moved.any())
    return claims


_TOLD = {"ConstantOfShape": 0, "Expand": 1, "Range": 0, "Reshape": 1, "Resize": 1, "Tile": 1, "Upsample": 1}


def _operands(chain: Chain, node: NodeProto) -> list[str]:
    """What a node reads, without sizes, bounds and scales that tell it what to do."""
    read = node.input[: _TOLD.get(node.op_type)]
    told = {name for name, array in chain.weights.items() if array.dtype.kind == "i"}
    return [name for name in dict.fromkeys(read) if name and name not in told]


def start(data: st.DataObject, opset: int) -> tuple[Chain, str]:
    chain = Chain(opset, data.draw(st.booleans()), data.draw(st.integers(0, 99)))
    rank = data.draw(st.sampled_from([3, 2, 3, 1]))
    sizes = [data.draw(st.sampled_from([1, 2, 3, 4, 6])) for _ in range(rank - 1)]
    return chain, chain.source(2, *sizes, data.draw(st.sampled_from([4, 6, 12])))


def taken(data: st.DataObject, chain: Chain, x: str, op: str) -> str | None:
    """A step, or nothing where the operator does not go with what is there."""
    if chain.size(x) > 3000:
        return None
    y = STEPS[op].step(data.draw, chain, x)
    return None if y is None else chain.calm(y)


@pytest.mark.parametrize("op", RULES)
def test_a_neuron_changes_nothing_but_its_own_places(op: str) -> None:
    claims: Counter[str] = Counter()

    @budget(6)
    @given(st.data())
    def shake(data: st.DataObject) -> None:
        chain, x = start(data, data.draw(st.sampled_from(opsets(STEPS[op]))))
        if data.draw(st.booleans()):
            x = taken(data, chain, x, "Transpose") or x
        assume(taken(data, chain, x, op) is not None)
        claims.update(check_neurons(chain, data))

    shake()
    assert claims[op] or op in _NOTHING_TO_CLAIM


@budget(100)
@given(st.data())
def test_neurons_keep_their_places_through_chains(data: st.DataObject) -> None:
    opset = data.draw(st.sampled_from(OPSETS))
    chain, x = start(data, opset)
    for op in data.draw(st.lists(st.sampled_from(known(opset)), min_size=1, max_size=6)):
        x = taken(data, chain, x, op) or x
    assume(chain.nodes)
    check_neurons(chain, data)


def known(opset: int) -> list[str]:
    return [op for op, covered in STEPS.items() if covered.since <= opset <= covered.until]


# --------------------------------------------------------------------------------------------------------- whole models


def projected(data: st.DataObject, chain: Chain, x: str) -> str:
    """x times a weight along its last axis, or along the channels of an image."""
    columns = data.draw(st.sampled_from([4, 6, 12]))
    if chain.rank(x) in (3, 4) and data.draw(st.booleans()):
        channels, places = chain.shape(x)[1], [1] * (chain.rank(x) - 2)
        weight = chain.weight(columns, channels, *places, scale=channels**-0.5)
        return chain.add("Conv", x, weight, *[chain.weight(columns)][: data.draw(st.integers(0, 1))])
    product = chain.add("MatMul", x, chain.weight(chain.shape(x)[-1], columns))
    return chain.add("Add", product, chain.weight(columns)) if data.draw(st.booleans()) else product


def check_cuts(chain: Chain, x: str, data: st.DataObject) -> int:
    """Cut random neurons of all groups that may be cut, and prove it; how many groups there were."""
    bias = chain.weight(*chain.shape(x)[-1:], shift=1.0)  # so that an output is never zero
    y = chain.add("Add", x, bias)
    assume(np.isfinite(chain.values[y]).all())
    analysis = analyse_model(chain.model(y))
    inspect(analysis)
    groups = [group for group in analysis.structure.groups if group.prunable and group.size > 1]
    if not groups:
        return 0
    plan = graphs.random_plan(groups, np.random.default_rng(data.draw(st.integers(0, 2**16))))
    applied = apply(analysis, plan)
    feeds = [chain.feed(), chain.feed(5 if chain.free else None, 2)]
    assert prove(analysis, applied, feeds, 1).passed
    to_model(applied.graph)
    return len(groups)


@pytest.mark.parametrize("op", RULES)
def test_cuts_around_each_operator_obey_masked_equality(op: str) -> None:
    @budget(10)
    @given(st.data())
    def cut(data: st.DataObject) -> None:
        opset = data.draw(st.sampled_from(opsets(STEPS[op])))
        chain, x = start(data, opset)
        x = projected(data, chain, x)
        y = taken(data, chain, x, op)
        assume(y is not None and chain.rank(y) > chain.first and chain.size(y) < 3000)
        check_cuts(chain, projected(data, chain, y), data)

    cut()


@budget(100)
@given(st.data())
def test_random_cuts_of_random_chains_obey_masked_equality(data: st.DataObject) -> None:
    opset = data.draw(st.sampled_from(OPSETS))
    chain, x = start(data, opset)
    x = projected(data, chain, x)
    for op in data.draw(st.lists(st.sampled_from(known(opset)), min_size=1, max_size=6)):
        x = taken(data, chain, x, op) or x
    assume(chain.rank(x) > chain.first and chain.size(x) < 3000)
    check_cuts(chain, projected(data, chain, x), data)
