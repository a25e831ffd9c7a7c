"""Other training-free rules for structured pruning, computed on the statistics of this project's calibration pass.

Each rule says which neurons stay, and how the rest makes up for them, for given widths; so its models can be compared
with ours at the same cost. Every rule is given its best training-free setting. Where a paper leaves a choice open, or
its choice can be bettered without training, that is said at the function.

    VBP     Variance-Based Pruning, arXiv 2507.12988: FFN only; least variance goes, its mean moves into the bias.
    Wanda   arXiv 2306.11695, its metric summed over structures as in FLAP (arXiv 2312.11983), and FLAP's bias.
    CORP    arXiv 2602.05243: least energy goes; activations and attention logits compensated in closed form.

VBP and FLAP also spread the neurons over the layers by a global ranking. Here the widths are given, so that only what
is chosen and how it is made up for is compared.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

import numpy as np

from onnxsnp.analysis import Analysis
from onnxsnp.calibration.statistics import PairMoments, Statistics
from onnxsnp.graph.groups import Group
from onnxsnp.graph.linear import Linear, neuron_matrix, neuron_places
from onnxsnp.planning.plan import GroupPlan, keep_highest
from onnxsnp.reconstruction.attention import PairBasis
from onnxsnp.reconstruction.full import rotate_pairs
from onnxsnp.reconstruction.refit import refit_consumers, refittable
from onnxsnp.surgery.rewrite import Cut

RIDGE = 1e-6  # of the mean eigenvalues: keeps the mixing of pairs finite, see `pair_mixing`

Scores = Callable[[Analysis, Statistics, Group], np.ndarray]
Weights = Callable[[Analysis, Statistics, Group, np.ndarray], dict[str, np.ndarray]]


@dataclass(frozen=True)
class Rival:
    """One rule.

    Attributes:
        kinds: of groups it can cut.
        scores: (analysis, statistics, group) -> [heads, size]; the lowest go first.
        weights: (analysis, statistics, group, keep [heads, kept]) -> new weights by name, in their original shapes.
            Weights of the neurons that go may be left as they are: the cut takes them away.
    """

    kinds: tuple[str, ...]
    scores: Scores
    weights: Weights

    def covers(self, kinds: Iterable[str]) -> bool:
        """Whether it can cut all these kinds of groups."""
        return set(kinds) <= set(self.kinds)

    def propose(
        self, analysis: Analysis, statistics: Statistics, counts: Mapping[str, int]
    ) -> tuple[list[GroupPlan], dict[str, np.ndarray]]:
        """What stays of every group that is cut, and the weights that make up for the rest, for `apply`.

        Args:
            counts: kept neurons per head, by group id; groups that keep everything are left alone.

        Raises:
            ValueError: a group of a kind that the rule does not cut, or whose neurons no projection reads.
        """
        entries, updates = [], {}
        for name, kept in counts.items():
            group = analysis.groups[name]
            if kept >= group.size:
                continue
            if group.kind not in self.kinds:
                raise ValueError(f"this rule cuts {', '.join(self.kinds)}, not '{name}'")
            keep = keep_highest(self.scores(analysis, statistics, group), kept)
            entries.append(GroupPlan(name, group.kind, group.size, group.heads, keep))
            updates.update(self.weights(analysis, statistics, group, np.asarray(keep)))
        return entries, updates


def variance(analysis: Analysis, statistics: Statistics, group: Group) -> np.ndarray:
    """VBP's score, [heads, size]: σ² of each neuron after the nonlinearity, over all tokens (2507.12988, section 3)."""
    reader = _readers(analysis, group)[0]
    covariance = statistics.moments[reader.data].covariance
    return covariance.diagonal()[_places(analysis, group, reader)]


def energy(analysis: Analysis, statistics: Statistics, group: Group) -> np.ndarray:
    """CORP's score; [heads, size].

    FFN: E[x²] after the nonlinearity (2602.05243; policy `energy` of the authors' github.com/BOX-LEO/CORP. Its
    `active_energy` multiplies by the share of tokens with |x| > 1 % of the layer's RMS, which is near one after a GELU
    and is not measured here). Values: CORP does not cut them; they get the same score, of what their reader sees.
    Query-key: √(E[q_i²] E[k_i²]), the form of CORP's logit energy that second moments give. Keys are about their mean
    over the image's tokens, not raw as published: softmax ignores the part of the scores that this mean makes, so it
    must not count, and the rule is the better for it.
    """
    if group.kind == "qk":
        return np.sqrt(_pair_energies(statistics.pairs[group.id]))
    reader = _readers(analysis, group)[0]
    moments = statistics.moments[reader.data]
    return (moments.second.diagonal() / max(moments.count, 1))[_places(analysis, group, reader)]


def weighted_energy(analysis: Analysis, statistics: Statistics, group: Group) -> np.ndarray:
    """E[x²] times the lengths of the weights into and out of a neuron; [heads, size].

    Policy `energy_weightmagnitude` of CORP's authors (github.com/BOX-LEO/CORP), offered for the FFN beside the plain
    energy that is their default. Values get the same; query-key pairs have no such policy and keep `energy`.
    """
    plain = energy(analysis, statistics, group)
    if group.kind == "qk":
        return plain
    reader, shape = _readers(analysis, group)[0], plain.shape
    graph, dependencies = analysis.graph, analysis.dependencies
    emitted = [neuron_matrix(graph, dependencies, group, weight) for weight, _ in group.producers]
    into = np.sum([np.linalg.norm(rows, axis=1) for rows in emitted], axis=0).reshape(shape)
    out = np.linalg.norm(_matrix(analysis, reader), axis=1)[_places(analysis, group, reader)]
    return plain * into * out


def weighted_norm(analysis: Analysis, statistics: Statistics, group: Group) -> np.ndarray:
    """Wanda's |W_pj| · ‖x_p‖₂ (2306.11695, eq. 1), summed over all that neuron p feeds; [heads, size].

    For FFN and values this is FLAP's WIFN (2312.11983, github.com/CASIA-IVA-Lab/FLAP), the structured form of Wanda.
    Query-key pairs have no weight behind them: what multiplies q_i is the activation k_i, so its norm stands in for
    the weights, ‖q_i‖₂ · ‖k_i‖₂, keys about their mean over the image's tokens (see `energy`). The lengths of the
    filters that emit the pair, instead or as further factors, did worse on `models/deit_cifar10.onnx`.
    """
    if group.kind == "qk":
        return np.sqrt(_pair_energies(statistics.pairs[group.id]))
    total = np.zeros((group.heads, group.size))
    for reader in _readers(analysis, group):
        norms = np.sqrt(statistics.moments[reader.data].second.diagonal())
        lengths = np.abs(_matrix(analysis, reader)).sum(axis=1)
        total += (norms * lengths)[_places(analysis, group, reader)]
    return total


def _pair_energies(moments: PairMoments) -> np.ndarray:
    """E[q_i²] E[(k_i − k̄_i)²]; [heads, size]."""
    query = np.einsum("hii->hi", moments.query) / max(moments.queries, 1)
    key = np.einsum("hii->hi", moments.key) / max(moments.keys, 1)
    return query * key


def mean_shift(analysis: Analysis, statistics: Statistics, group: Group, keep: np.ndarray) -> dict[str, np.ndarray]:
    """b' = b + μ_removed W_removed: the mean of what goes moves into the bias of what reads it.

    VBP's mean-shift compensation (2507.12988, section 3) and FLAP's baseline bias compensation (2312.11983) alike. A
    reader without a bias cannot take it up. For query-key pairs there is nothing to shift: softmax already ignores what
    the mean of the keys adds, and what the mean of a cut query adds depends on the cut key.

    Returns:
        The new biases by name.
    """
    if group.kind == "qk":
        return {}
    updates = {}
    for reader in _readers(analysis, group):
        if reader.bias is None:
            continue
        gone = np.ones((group.heads, group.size), bool)
        np.put_along_axis(gone, keep, False, axis=1)
        rows = _places(analysis, group, reader)[gone]
        shift = statistics.moments[reader.data].mean[rows] @ _matrix(analysis, reader)[rows]
        bias = analysis.graph.weights[reader.bias]
        updates[reader.bias] = (bias + shift.reshape(bias.shape)).astype(bias.dtype)
    return updates


def closed_form(analysis: Analysis, statistics: Statistics, group: Group, keep: np.ndarray) -> dict[str, np.ndarray]:
    """CORP's compensation, folded into the weights around the cut.

    FFN (2602.05243, MLP compensation): x_P ≈ B x_S + c with B = Σ_PS (Σ_SS + λI)⁻¹ and c = μ_P − B μ_S, so that
    W' = W_S + Bᵀ W_P and b' = b + c W_P. That is `refit.solve`, term by term, with λ as a share of the mean variance as
    in the other columns. Values, which CORP leaves whole, get the same refit of the projection that reads them.
    Query-key: see `pair_mixing`. Where a change of basis is not legal, the pairs are only selected.
    """
    if group.kind != "qk":
        cut = {group.id: Cut(group.atom, group.head_atoms, keep)}
        graph, dependencies = analysis.graph, analysis.dependencies
        return refit_consumers(graph, dependencies, [group], cut, analysis.linears, statistics.moments)
    if group.id not in analysis.rotations.pairs:
        return {}
    moments = statistics.pairs[group.id]
    bases = []
    for query, key, mine in zip(moments.query, moments.key, keep, strict=True):
        mixing = pair_mixing(query / max(moments.queries, 1), key / max(moments.keys, 1), mine)
        bases.append(_as_basis(mixing, mine, group.size))
    # The key bias is dropped, not mixed: it adds the same to all scores of a row, which softmax ignores.
    return rotate_pairs(analysis, analysis.rotations.pairs[group.id], bases, keep)


def pair_mixing(second_q: np.ndarray, second_k: np.ndarray, keep: np.ndarray, ridge: float = RIDGE) -> np.ndarray:
    """The mixing T of the kept pairs S that makes up best for the scores of those that go, P (2602.05243, attention).

    q kᵀ ≈ q_S T k_Sᵀ with T = I + M, where M minimises E‖q_P k_Pᵀ − q_S M k_Sᵀ‖² + λ‖M‖²:

        Gq[S,S] M Gk[S,S] + λ M = Gq[S,P] Gk[P,S],

    so without λ it is T = Gq[S,S]⁻¹ (Gq[S,:] Gk[:,S]) Gk[S,S]⁻¹. The published code solves this with a λ that is
    negligible beside Gram matrices summed over tokens, and makes T symmetric; the latter is no optimum and is left out.
    It takes raw second moments of the keys; those about the mean of the image's tokens fit what softmax sees.

    Args:
        second_q: E[qᵀq], [size, size].
        second_k: E[(k − k̄)ᵀ(k − k̄)], [size, size].
        keep: indices of S, [kept].
        ridge: λ as a share of the product of the mean eigenvalues of Gq[S,S] and Gk[S,S].

    Returns:
        T, [kept, kept].
    """
    gone = np.setdiff1d(np.arange(len(second_q)), keep)
    values_q, vectors_q = np.linalg.eigh(second_q[np.ix_(keep, keep)])
    values_k, vectors_k = np.linalg.eigh(second_k[np.ix_(keep, keep)])
    target = second_q[np.ix_(keep, gone)] @ second_k[np.ix_(gone, keep)]
    strength = ridge * values_q.mean() * values_k.mean() + np.finfo(np.float64).tiny
    weights = np.outer(np.maximum(values_q, 0), np.maximum(values_k, 0)) + strength
    missing: np.ndarray = vectors_q @ ((vectors_q.T @ target @ vectors_k) / weights) @ vectors_k.T
    return np.eye(len(keep)) + missing


def _as_basis(mixing: np.ndarray, keep: np.ndarray, size: int) -> PairBasis:
    """T = U Σ Vᵀ as q' = q_S U Σ^½ and k' = k_S V Σ^½."""
    left, sigma, right = np.linalg.svd(mixing)
    query, key = np.zeros((size, size)), np.zeros((size, size))
    query[keep, : len(keep)] = left * np.sqrt(sigma)
    key[keep, : len(keep)] = right.T * np.sqrt(sigma)
    return PairBasis(query, key, np.full(size + 1, np.nan))  # no error curve: the basis is for this width only


def _readers(analysis: Analysis, group: Group) -> list[Linear]:
    readers = refittable(group, analysis.linears)
    if not readers:
        raise ValueError(f"no projection reads the neurons of '{group.id}'")
    return readers


def _places(analysis: Analysis, group: Group, reader: Linear) -> np.ndarray:
    """Where the group's neurons lie in the reader's input; [heads, size]."""
    return neuron_places(analysis.graph, analysis.dependencies, group, reader.weight, reader.inner)


def _matrix(analysis: Analysis, reader: Linear) -> np.ndarray:
    """The reader's weight, [inputs, outputs], float64."""
    return np.moveaxis(analysis.graph.weights[reader.weight], reader.inner, 0).astype(np.float64)


RIVALS = {
    "VBP": Rival(("ffn",), variance, mean_shift),
    "Wanda": Rival(("qk", "v", "ffn"), weighted_norm, mean_shift),
    "CORP": Rival(("qk", "v", "ffn"), energy, closed_form),
    "CORP, weighted": Rival(("qk", "v", "ffn"), weighted_energy, closed_form),
}
