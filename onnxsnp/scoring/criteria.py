"""The criteria by name, and the one entry point of the planner.

A new criterion is one function of (target, rng) and one entry in CRITERIA.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from onnxsnp.errors import PlanError
from onnxsnp.scoring.magnitude import geometric_median_scores, l2_scores, random_scores
from onnxsnp.scoring.multihead import channel_scores
from onnxsnp.scoring.redundancy import redundancy_scores

KINDS = ("qk", "v", "ffn", "head", "residual")


@dataclass(frozen=True)
class ScoringTarget:
    """What one group of neurons offers for scoring.

    Attributes:
        kind: "qk", "v", "ffn", "head" or "residual".
        heads: number of heads; 1 for ffn, head and residual.
        size: neurons per head; for head: heads.
        filters: for each coupled producing layer an array [heads * size, fan_in], heads outermost, the bias as a last
            column where there is one; the fan_in may differ. For qk: of the query and of the key layer. For head:
            [size * neurons, fan_in], where the number of neurons of a head may differ between layers.
        dead: bool [heads, size], neurons whose weights are all zero.
        qk: float [heads, size], eq. 4-6 summed over the images (snp.qk_scores); needed by snp and reverse for qk.
        contribution: float [1, size], what each head adds to the output (heads.contributions); for head.
        change, overlap: float [heads, size] and [heads, size, size], of qk, v and ffn for multihead: what happens
            without each neuron, and the scalar products of what they add (multihead.channel_scores).
    """

    kind: str
    heads: int
    size: int
    filters: tuple[np.ndarray, ...]
    dead: np.ndarray
    qk: np.ndarray | None = None
    contribution: np.ndarray | None = None
    change: np.ndarray | None = None
    overlap: np.ndarray | None = None


@dataclass(frozen=True)
class Criterion:
    """One way to say who goes.

    Attributes:
        scores: (target, rng) -> float [heads, size], the lowest go first; dead neurons are handled by `score`.
        summary: one line for people.
        needs_qk: whether it reads target.qk and target.contribution, so that calibration has to measure them.
        by_change: whether it reads target.change and target.overlap where these can be measured.
    """

    scores: Callable[[ScoringTarget, np.random.Generator], np.ndarray]
    summary: str
    needs_qk: bool = False
    by_change: bool = False


def score(criterion: str, target: ScoringTarget, *, rng: np.random.Generator) -> np.ndarray:
    """Scores of every neuron of a group by a named criterion; the lowest go first, dead neurons (-inf) before all.

    Args:
        criterion: a key of CRITERIA.
        target: the group.
        rng: source of chance; only "random" draws from it.

    Returns:
        float64 [heads, size].

    Raises:
        PlanError: unknown criterion (the message names the nearest), or scores of eq. 4-6 needed and not there.
        ValueError: if the arrays of the target do not have the shapes it states.
    """
    chosen = CRITERIA.get(criterion)
    if chosen is None:
        raise _unknown(criterion)
    _check(target)
    scores = chosen.scores(target, rng).astype(np.float64).reshape(target.heads, target.size)
    return np.where(target.dead, -np.inf, scores)


def _snp(target: ScoringTarget, rng: np.random.Generator) -> np.ndarray:
    """The paper: eq. 4-6 for query-key pairs; eq. 7 else, over all filters of a layer whatever head they belong to.

    Whole heads, for which it has no formula: what they add to the output; by length where that is not known.
    """
    if target.kind == "head":
        return target.contribution if target.contribution is not None else _per_head(l2_scores, target)
    if target.kind != "qk":
        return _summed(redundancy_scores, target.filters)
    if target.qk is None:
        raise PlanError(
            "criteria 'snp' and 'reverse' score query-key pairs from calibration data, and there are no such scores",
            hint="calibrate the model first, or choose 'l2' or 'gm'",
        )
    return target.qk


def _reverse(target: ScoringTarget, rng: np.random.Generator) -> np.ndarray:
    """SNP backwards: the most important go first (the paper's control)."""
    return -_snp(target, rng)


def _l2(target: ScoringTarget, rng: np.random.Generator) -> np.ndarray:
    """Lengths; for query-key pairs the length of the query filter plus that of the key filter, for heads of all."""
    if target.kind == "head":
        return _per_head(l2_scores, target)
    return _summed(l2_scores, target.filters)


def _gm(target: ScoringTarget, rng: np.random.Generator) -> np.ndarray:
    """Distances to the other filters of the layer; for query-key pairs only to those of the same head.

    A pair competes with the pairs of its own head alone. The score of a pair is that of its query filter plus that of
    its key filter; that of a head is the sum over all its filters.
    """
    if target.kind == "head":
        return _per_head(geometric_median_scores, target)
    if target.kind != "qk":
        return _summed(geometric_median_scores, target.filters)
    heads = [layer.reshape(target.heads, target.size, -1) for layer in target.filters]
    return np.stack([_summed(geometric_median_scores, [layer[h] for layer in heads]) for h in range(target.heads)])


def _random(target: ScoringTarget, rng: np.random.Generator) -> np.ndarray:
    return random_scores(target.heads * target.size, rng)


def _multihead(target: ScoringTarget, rng: np.random.Generator) -> np.ndarray:
    """Change of attention or output without the neuron, times its dissimilarity to the others of its head.

    Where that is not defined (whole heads, the residual stream) or cannot be measured: snp.
    """
    if target.change is None or target.overlap is None:
        return _snp(target, rng)
    return channel_scores(target.change, target.overlap)


CRITERIA: dict[str, Criterion] = {
    "snp": Criterion(_snp, "what carries the attention scores (query-key); what is least redundant (else)", True),
    "l2": Criterion(_l2, "length of the filters"),
    "gm": Criterion(_gm, "distance to the other filters (geometric median)"),
    "random": Criterion(_random, "chance"),
    "reverse": Criterion(_reverse, "snp backwards, as a control", True),
    "multihead": Criterion(_multihead, "what changes the attention or output most and is like no other", True, True),
}


def _summed(
    scores: Callable[[np.ndarray], np.ndarray], layers: tuple[np.ndarray, ...] | list[np.ndarray]
) -> np.ndarray:
    """Per-layer scores summed per index: coupled layers are cut at identical indices (the paper's rule)."""
    return np.sum([scores(layer) for layer in layers], axis=0)


def _per_head(scores: Callable[[np.ndarray], np.ndarray], target: ScoringTarget) -> np.ndarray:
    """Per-layer scores summed over the filters of each head."""
    return np.sum([scores(layer).reshape(target.size, -1).sum(axis=1) for layer in target.filters], axis=0)


def _check(target: ScoringTarget) -> None:
    if target.kind not in KINDS:
        raise ValueError(f"kind must be one of {', '.join(KINDS)}, got {target.kind!r}")
    if target.kind in ("ffn", "head", "residual") and target.heads != 1:
        raise ValueError(f"a {target.kind} group has no heads, got heads={target.heads}")
    if not target.filters or (target.kind == "qk" and len(target.filters) < 2):
        raise ValueError(f"a {target.kind} group came with the filters of {len(target.filters)} layers")
    shape = (target.heads, target.size)
    for name, array in (
        ("dead", target.dead),
        ("qk", target.qk),
        ("contribution", target.contribution),
        ("change", target.change),
    ):
        if array is not None and array.shape != shape:
            raise ValueError(f"expected {name} {list(shape)}, got {list(array.shape)}")
    for layer in target.filters:
        if target.kind == "head" and layer.ndim == 2 and layer.size and len(layer) % target.size == 0:
            continue
        if layer.ndim != 2 or len(layer) != target.heads * target.size:
            raise ValueError(f"expected filters [{target.heads * target.size}, fan_in], got {list(layer.shape)}")


def _unknown(criterion: str) -> PlanError:
    near = difflib.get_close_matches(criterion, CRITERIA, n=1, cutoff=0.4)
    names = ", ".join(CRITERIA)
    hint = f"did you mean '{near[0]}'? There are {names}" if near else f"choose one of {names}"
    return PlanError(f"unknown criterion '{criterion}'", hint=hint)
