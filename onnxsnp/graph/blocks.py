"""Axes of equal blocks whose indices go together, as rotary position embeddings need it.

Such an embedding cuts a head in halves and joins them again the other way round: x cos + [−x₂, x₁] sin. Index i of the
first half and index i of the second are then a pair. In the axis algebra the head is a product (2, half): the 2 must
stay as it is, and the half is a factor like any other, which ties the pair together wherever it occurs.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import gcd

from onnxsnp.graph.axes import Axis
from onnxsnp.graph.facts import Facts


def tie_blocks(facts: Facts, whole: Axis, parts: Sequence[tuple[Axis, int]], reason: str) -> bool:
    """Tie the blocks of an axis and of parts of it; what counts the blocks is frozen.

    Args:
        parts: axes that hold a range of the whole one, and where that range starts.

    Returns:
        False, with nothing said, where no block is larger than one index.
    """
    block = gcd(facts.size(whole), *(number for axis, start in parts for number in (start, facts.size(axis))))
    if block == 1:
        return False
    axes = [axis for axis, _ in parts if facts.size(axis) == block]
    if axes:
        inner = axes[0]
    else:
        inner = (f"{facts.node}|block", 0)
        facts.virtual[inner] = block
    for number, axis in enumerate([whole, *(axis for axis, _ in parts)]):
        count: Axis = (f"{facts.node}|blocks {number}", 0)
        facts.virtual[count] = facts.size(axis) // block
        facts.regroup([axis], [count, inner])
        facts.freeze(count, reason)
        facts.counts.append(count)
    return True
