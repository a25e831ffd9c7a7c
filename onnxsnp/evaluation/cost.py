"""Multiply-accumulates and parameters as exact functions of the factor sizes.

Every counted operator is a product of axis sizes, and every axis is a product of factors; so what a plan costs is known
without building the model: scale each term by new / old for every cut factor it contains.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from onnx import NodeProto

from onnxsnp.graph.dependency import Dependencies
from onnxsnp.graph.ir import Graph, attribute
from onnxsnp.graph.products import einsum_terms
from onnxsnp.graph.stacks import expanded


@dataclass(frozen=True)
class Term:
    """One product: its value now, and the factors it is made of (a factor counts as often as it occurs)."""

    name: str
    value: float
    atoms: tuple[int, ...]


class Measured(Protocol):
    """A cost that is measured instead of counted, and where (see `onnxsnp.planning.latency`)."""

    machine: str

    def total(self, sizes: Mapping[int, int]) -> float: ...
    def at_widths(self, atom: int, widths: np.ndarray) -> np.ndarray: ...


@dataclass
class CostModel:
    """Cost of a graph and of every cut of it.

    Attributes:
        macs: multiply-accumulates of one sample, per operator (MatMul, Gemm, Conv, Einsum, Attention).
        params: entries of floating-point weights, each weight of the file once; scalars do not count.
        latency: milliseconds of one sample, where layers have been measured.
    """

    macs: list[Term]
    params: list[Term]
    dependencies: Dependencies
    latency: Measured | None = None

    def total(self, what: str, sizes: Mapping[int, int] | None = None) -> float:
        """Cost after a cut.

        Args:
            what: "macs", "params" or "latency".
            sizes: new size of each cut factor; the uncut cost if None.

        Raises:
            ValueError: latency was not measured.
        """
        if what == "latency":
            return self._measured().total(sizes or {})
        terms: list[Term] = getattr(self, what)
        if not sizes:
            return sum(term.value for term in terms)
        ratio = {atom: size / self.dependencies.size(atom) for atom, size in sizes.items()}
        return sum(term.value * float(np.prod([ratio[atom] for atom in term.atoms if atom in ratio])) for term in terms)

    def at_widths(self, what: str, atom: int, widths: np.ndarray) -> np.ndarray:
        """The part of the cost that changes with one factor, at each of its sizes; all else is uncut.

        Args:
            what: as in `total`.
            widths: [n] sizes of the factor.

        Returns:
            [n] costs, from which only differences matter: what the factor's operators cost besides may be in or not.
        """
        if what == "latency":
            return self._measured().at_widths(atom, widths)
        return self.share(what, atom) / self.dependencies.size(atom) * widths

    def given(self, sizes: Mapping[int, int]) -> CostModel:
        """The cost of the model with some factors already cut, as a function of the others (not of latency)."""
        ratio = {atom: size / self.dependencies.size(atom) for atom, size in sizes.items()}

        def scaled(term: Term) -> Term:
            value = term.value * float(np.prod([ratio.get(atom, 1.0) for atom in term.atoms]))
            return Term(term.name, value, tuple(atom for atom in term.atoms if atom not in ratio))

        return CostModel([*map(scaled, self.macs)], [*map(scaled, self.params)], self.dependencies)

    def _measured(self) -> Measured:
        if self.latency is None:
            raise ValueError("the latency of this model's layers has not been measured")
        return self.latency

    def share(self, what: str, atom: int) -> float:
        """Cost of everything that shrinks when a factor is cut (what is "macs" or "params")."""
        terms: list[Term] = getattr(self, what)
        return sum(term.value for term in terms if atom in term.atoms)


def cost_model(graph: Graph, dependencies: Dependencies, single: Mapping[str, tuple[int, ...]]) -> CostModel:
    """Count a graph.

    Args:
        single: tensor sizes at batch 1.
    """
    leading = {single[name][0] for name in graph.inputs if single[name]}
    samples = leading.pop() if len(leading) == 1 else 1  # more than 1 where the batch is fixed
    macs = [
        Term(term.name, term.value / samples, term.atoms)
        for node in graph.nodes
        for term in _node_terms(node, graph, dependencies, single)
    ]
    return CostModel(
        [one for term in macs for one in _unstacked(term, dependencies)],
        [one for term in _parameters(graph, dependencies) for one in _unstacked(term, dependencies)],
        dependencies,
    )


def _unstacked(term: Term, dependencies: Dependencies) -> list[Term]:
    """A term as a sum of terms without stacked factors, which shrink with each of their parts."""
    if not dependencies.stacks.keys() & set(term.atoms):
        return [term]
    sums = expanded(term.atoms, dependencies.stacks, dependencies.size)
    whole = sum(size for size, _ in sums)
    return [Term(term.name, term.value * size / whole, atoms) for size, atoms in sums]


def _node_terms(node: NodeProto, graph: Graph, deps: Dependencies, single: Mapping[str, tuple[int, ...]]) -> list[Term]:
    def term(output: str, extra: list[tuple[str, int]]) -> Term:
        value = float(np.prod(single[output])) * float(np.prod([single[name][axis] for name, axis in extra]))
        atoms = deps.atoms(output) + tuple(atom for name, axis in extra for atom in deps.atoms(name, axis))
        return Term(node.name, value, atoms)

    if any(name not in single for name in [*node.input, *node.output] if name):
        return []
    if node.op_type == "MatMul":
        return [term(node.output[0], [(node.input[0], len(single[node.input[0]]) - 1)])]
    if node.op_type == "Gemm":
        return [term(node.output[0], [(node.input[0], 0 if attribute(node, "transA", 0) else 1)])]
    if node.op_type == "Conv":
        weight = node.input[1]
        return [term(node.output[0], [(weight, axis) for axis in range(1, len(single[weight]))])]
    if node.op_type == "Einsum":
        terms = einsum_terms(node, [len(single[name]) for name in [*node.input, *node.output]])
        if terms is None or len(node.input) != 2:
            return []
        inner = {
            letter: (name, index)
            for name, letters in zip(node.input, terms, strict=False)
            for index, letter in enumerate(letters)
            if letter not in terms[-1]
        }
        return [term(node.output[0], list(inner.values()))]
    if node.op_type == "Attention":
        return _attention_terms(node, deps, single)
    return []


def _attention_terms(node: NodeProto, deps: Dependencies, single: Mapping[str, tuple[int, ...]]) -> list[Term]:
    """Query times key, and probabilities times value: batch × query tokens × key tokens × (heads · size) each."""
    query, key, output = node.input[0], node.input[1], node.output[0]
    tokens = 2 if len(single[key]) == 4 else 1
    spread = single[key][tokens]
    return [
        Term(node.name, float(np.prod(single[name])) * spread, deps.atoms(name) + deps.atoms(key, tokens))
        for name in (query, output)
    ]


def _parameters(graph: Graph, deps: Dependencies) -> list[Term]:
    terms, seen = [], set()
    for name, array in graph.weights.items():
        source = graph.origin.get(name, name)
        if array.dtype.kind in "iub" or array.size == 1 or source in seen or name not in deps.facts.shapes:
            continue
        if name not in graph.parts:
            seen.add(source)
        terms.append(Term(name, float(array.size), deps.atoms(name)))
    return terms
