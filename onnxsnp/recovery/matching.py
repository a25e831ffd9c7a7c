"""Which tensors of a pruned model are to be like which of the original.

At the end of every block: of the sums on the residual stream those after which the next attention begins, and the last
one. Where a cut of the stream has made the widths differ the pair is left out. And the model's own outputs.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from onnxsnp.analysis import Analysis
from onnxsnp.graph.branches import find_branches


@dataclass(frozen=True)
class Pair:
    """One tensor in both models.

    Attributes:
        pruned, original: its names.
        output: whether it is an output of the models, not a hidden state.
    """

    pruned: str
    original: str
    output: bool


@dataclass
class Matching:
    """What can be compared, and by tensor name of the pruned model why something cannot."""

    pairs: list[Pair]
    left_out: dict[str, str] = field(default_factory=dict)


def match(pruned: Analysis, original: Analysis) -> Matching:
    """Pair the block outputs and outputs of two models of the same structure.

    Block outputs are paired by their names, which a cut keeps; if those differ, by their order.
    """
    mine, theirs = block_outputs(pruned), block_outputs(original)
    found = Matching([])
    known = {name: original.normalized.single[name] for name in theirs}
    if not set(mine) <= set(theirs) and len(mine) != len(theirs):
        reason = f"the models have {len(mine)} and {len(theirs)} block outputs, of different names"
        found.left_out.update(dict.fromkeys(mine, reason))
        mine = []
    partners = mine if set(mine) <= set(theirs) else theirs
    for name, partner in zip(mine, partners, strict=False):
        shape, other = pruned.normalized.single[name], known[partner]
        if shape == other:
            found.pairs.append(Pair(name, partner, False))
        else:
            found.left_out[name] = f"it is {_brief(shape)}, the original's {_brief(other)}"
    for name, partner in zip(pruned.graph.outputs, original.graph.outputs, strict=False):
        found.pairs.append(Pair(name, partner, True))
    return found


def block_outputs(analysis: Analysis) -> list[str]:
    """Sums on the residual stream behind which an attention begins, or nothing more is added, in graph order.

    A model without attention gives every sum.
    """
    graph = analysis.graph
    order = {node.name: index for index, node in enumerate(graph.nodes)}
    made = {name: index for index, node in enumerate(graph.nodes) for name in node.output}
    branches = find_branches(graph, analysis.dependencies, analysis.linears)
    streams = sorted({branch.stream for branch in branches}, key=made.__getitem__)
    marks = sorted(order[site.score] for site in analysis.structure.sites)
    if not marks or not streams:
        return streams
    kept: list[str] = []
    for name, following in zip(streams, [*streams[1:], ""], strict=True):
        end = made[following] if following else len(graph.nodes)
        begins = any(made[name] < mark < end for mark in marks)
        if begins or not following:
            kept.append(name)
    return kept


def kind_of_output(values: np.ndarray) -> str:
    """`logits` for [samples, classes] whose rows are not of one length, as embeddings are; else `squares`."""
    if values.ndim != 2 or values.shape[1] < 2:
        return "squares"
    lengths = np.linalg.norm(values.astype(np.float64), axis=1)
    return "squares" if len(values) > 1 and np.allclose(lengths, lengths[0], rtol=1e-3) else "logits"


def _brief(shape: Sequence[int]) -> str:
    return "×".join(map(str, shape))
