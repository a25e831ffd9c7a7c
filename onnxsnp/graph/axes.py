"""The axis algebra: every tensor axis is an ordered product of factors, and factors are tied by unification.

An axis of size 576 that a Reshape turns into (3, 3, 64) *is* the product of three factors, in every tensor it flows
through. Saying "this run of axes equals that run of axes, as row-major products" is enough to find those factors: the
statement is unified like a term, a factor that meets a shorter one splits, and the split holds wherever the factor
occurs. Two factors that were unified can never be cut apart.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

Axis = tuple[str, int]  # (tensor name, axis index)


@dataclass(frozen=True)
class Tie:
    """`left` and `right`, read as row-major products of axes, are the same index space; `node` says so."""

    left: tuple[Axis, ...]
    right: tuple[Axis, ...]
    node: str


@dataclass(frozen=True)
class Clash:
    """Two products that do not factor alike; the factors they are made of must stay as they are."""

    tie: Tie
    factors: tuple[int, ...]
    reason: str


class Factors:
    """Union-find over factors in which a factor may have been split into an ordered product of others."""

    def __init__(self) -> None:
        self._parent: list[int] = []
        self._size: list[int] = []
        self._parts: list[tuple[int, ...] | None] = []
        self._of_axis: dict[Axis, int] = {}

    def axis(self, axis: Axis, size: int) -> None:
        """Introduce a tensor axis as one factor (axes already known are left as they are)."""
        if axis not in self._of_axis:
            self._of_axis[axis] = self._new(size)

    def atoms(self, axes: Axis | Iterable[Axis]) -> tuple[int, ...]:
        """The unsplit factors of an axis, or of a run of axes, major first; factors of size 1 are left out."""
        run = [axes] if isinstance(axes, tuple) and len(axes) == 2 and isinstance(axes[0], str) else list(axes)
        found: list[int] = []
        for axis in run:
            self._expand(self._of_axis[axis], found)
        return tuple(found)

    def current(self, factors: Iterable[int]) -> tuple[int, ...]:
        """What some factors have become by now: the unsplit ones they are made of."""
        found: list[int] = []
        for factor in factors:
            self._expand(factor, found)
        return tuple(found)

    def size(self, atom: int) -> int:
        """Number of indices of a factor."""
        return self._size[self._find(atom)]

    def unify(self, left: Sequence[int], right: Sequence[int]) -> bool:
        """Make two products of factors the same; False (and no more is done) if their sizes do not factor alike."""
        a, b = list(left)[::-1], list(right)[::-1]
        while a and b:
            x, y = self._find(a.pop()), self._find(b.pop())
            if x == y:
                continue
            if self._parts[x] is not None:
                a.extend(reversed(self._parts[x] or ()))
                b.append(y)
            elif self._parts[y] is not None:
                b.extend(reversed(self._parts[y] or ()))
                a.append(x)
            elif self._size[x] == self._size[y]:
                self._parent[y] = x
            elif self._size[x] == 1:
                b.append(y)
            elif self._size[y] == 1:
                a.append(x)
            elif self._size[x] > self._size[y]:
                if not self._split(x, self._size[y]):
                    return False
                a.append(x)
                b.append(y)
            else:
                if not self._split(y, self._size[x]):
                    return False
                a.append(x)
                b.append(y)
        return all(self.size(rest) == 1 for rest in [*a, *b])

    def stretches(self, left: Sequence[int], right: Sequence[int]) -> Iterator[tuple[Sequence[int], Sequence[int]]]:
        """Two equal products in the shortest runs that equal each other whatever the rest is.

        (2, 8, 7, 96) = (2, 28, 2, 96) is 2 = 2, (8, 7) = (28, 2) and 96 = 96, of which the second cannot be unified.
        """
        i = j = start = other = 0
        a = b = 1
        while i < len(left) and j < len(right) and a and b:
            if a <= b:
                a *= self.size(left[i])
                i += 1
            else:
                b *= self.size(right[j])
                j += 1
            if a == b and a:
                yield left[start:i], right[other:j]
                start, other = i, j
        if start < len(left) or other < len(right):
            yield left[start:], right[other:]

    def _split(self, factor: int, major: int) -> bool:
        """Turn a factor into the product (major, rest)."""
        size = self._size[factor]
        if major == 0 or size % major:
            return False
        self._parts[factor] = (self._new(major), self._new(size // major))
        return True

    def _new(self, size: int) -> int:
        self._parent.append(len(self._parent))
        self._size.append(size)
        self._parts.append(None)
        return len(self._parent) - 1

    def _find(self, factor: int) -> int:
        while self._parent[factor] != factor:
            self._parent[factor] = self._parent[self._parent[factor]]
            factor = self._parent[factor]
        return factor

    def _expand(self, factor: int, found: list[int]) -> None:
        stack = [factor]
        while stack:
            root = self._find(stack.pop())
            parts = self._parts[root]
            if parts is not None:
                stack.extend(reversed(parts))
            elif self._size[root] != 1:
                found.append(root)


def solve(ties: Sequence[Tie], sizes: dict[Axis, int]) -> tuple[Factors, list[Clash]]:
    """Unify every tie.

    Args:
        ties: what the operators say.
        sizes: size of every axis that occurs.

    Returns:
        The factors, and the ties that could not be unified.
    """
    factors = Factors()
    for axis, size in sizes.items():
        factors.axis(axis, size)
    clashes = []
    for tie in ties:
        for left, right in list(factors.stretches(factors.atoms(tie.left), factors.atoms(tie.right))):
            shown = ["×".join(str(factors.size(atom)) for atom in atoms) or "1" for atoms in (left, right)]
            if not factors.unify(left, right):
                reason = f"sizes {shown[0]} and {shown[1]} do not factor alike"
                clashes.append(Clash(tie, (*left, *right), reason))
    return factors, clashes
