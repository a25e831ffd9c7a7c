"""Stacked factors: an axis that a Concat makes holds the indices of its operands' axes, one run after the other.

A stacked factor is never cut for itself. Its indices stay exactly if those of its parts do, in every tensor that has
it: so what forbids cutting it forbids cutting its parts, and what contracts it contracts them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import prod

from onnxsnp.graph.axes import Factors
from onnxsnp.graph.facts import Concatenation, Freeze

Run = tuple[int, ...]  # factors of one operand's axis, major first


@dataclass(frozen=True)
class Stack:
    """What a stacked factor consists of.

    Attributes:
        node: the operator that stacks.
        parts: the factors of each operand's axis, in order; the same ones may come several times.
    """

    node: str
    parts: tuple[Run, ...]

    @property
    def atoms(self) -> frozenset[int]:
        return frozenset(atom for run in self.parts for atom in run)


def find_stacks(
    concatenations: Sequence[Concatenation], factors: Factors
) -> tuple[dict[int, Stack], list[tuple[Run, Freeze]]]:
    """The stacked factors of a graph by factor, and what must be frozen because it is stacked in no simple way.

    Two stacks of one factor (their sum, say) have the same parts: these are unified here.
    """
    refused: set[Concatenation] = set()
    while True:
        stacks: dict[int, Stack] = {}
        changed = False
        for join in concatenations:
            whole = factors.atoms(join.whole)
            parts = tuple(factors.atoms(axis) for axis in join.parts)
            if join in refused:
                continue
            if len(whole) != 1 or whole[0] in {atom for run in parts for atom in run}:
                refused.add(join)
            elif whole[0] not in stacks:
                stacks[whole[0]] = Stack(join.node, parts)
            elif stacks[whole[0]].parts != parts:
                changed = True
                if not _unified(stacks[whole[0]].parts, parts, factors):
                    refused.add(join)
        if not changed:
            break
    frozen = [
        (factors.atoms([join.whole, *join.parts]), Freeze(join.whole, "Concat joins it to another axis", join.node))
        for join in concatenations
        if join in refused
    ]
    return stacks, frozen


def _unified(left: Sequence[Run], right: Sequence[Run], factors: Factors) -> bool:
    """Make the parts of two stacks the same; False if they are not of the same sizes."""
    if [prod(map(factors.size, run)) for run in left] != [prod(map(factors.size, run)) for run in right]:
        return False
    return all(factors.unify(one, other) for one, other in zip(left, right, strict=True))


def spread_freezes(stacks: Mapping[int, Stack], frozen: dict[int, list[Freeze]]) -> None:
    """Freeze, in place, the parts of every frozen stack; a part may be a stack itself."""
    pending = [whole for whole in stacks if whole in frozen]
    while pending:
        whole = pending.pop()
        for atom in stacks[whole].atoms:
            held = frozen.setdefault(atom, [])
            new = [freeze for freeze in frozen[whole] if freeze not in held]
            held.extend(new)
            if new and atom in stacks:
                pending.append(atom)


def above(atom: int, stacks: Mapping[int, Stack]) -> list[int]:
    """The stacked factors that a factor is part of, itself or within another one."""
    found: dict[int, None] = {}
    pending = [atom]
    while pending:
        below = pending.pop()
        for whole, stack in stacks.items():
            if below in stack.atoms and whole not in found:
                found[whole] = None
                pending.append(whole)
    return list(found)


def bottom_up(stacks: Mapping[int, Stack]) -> Iterator[int]:
    """Stacked factors, each after those it is made of."""
    done: set[int] = set()
    while len(done) < len(stacks):
        for whole, stack in stacks.items():
            if whole not in done and not (stack.atoms & stacks.keys()) - done:
                done.add(whole)
                yield whole


def expanded(atoms: Iterable[int], stacks: Mapping[int, Stack], size: Callable[[int], int]) -> list[tuple[int, Run]]:
    """A product of factors as a sum of products without stacked ones: (size of each product, its factors)."""
    terms: list[Run] = [()]
    for atom in atoms:
        runs = stacks[atom].parts if atom in stacks else ((atom,),)
        terms = [(*term, *run) for term in terms for run in runs]
    if any(atom in stacks for term in terms for atom in term):
        return [found for term in terms for found in expanded(term, stacks, size)]
    return [(prod(map(size, term)), term) for term in terms]
