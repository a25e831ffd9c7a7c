"""Attention after a cut: a better basis for query-key and value neurons before the last of them go.

Where the way from projection to contraction is linear, the neurons of a head can be replaced by any combinations of
themselves. METHODS 2.1 (derived for this project; kin: KQ-SVD arXiv 2512.05916, A3 arXiv 2505.12942): with
Gq = E[qᵀq] and Gk the covariance of k within an image, the pairs

    U Σ Vᵀ = svd(Gq^½ Gk^½),   A = Gq^-½ U_r Σ_r^½,   B = Gk^-½ V_r Σ_r^½

give the best r-dimensional scores, with error Σ_{j>r} σ_j². Softmax ignores what is constant along its row, so the mean
of the keys of an image, and with it the key bias, can go. METHODS 2.2 (kin: MoDeGPT arXiv 2408.09632): values are kept
in the leading directions of C_hh^½ Wo_h, where C is the covariance of the output projection's input. What one head says
others say in part as well, and the projection is refitted over all of them, so once the width is known each head in
turn gets the directions that add most to what the others keep.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from onnxsnp.reconstruction.refit import solve_positive

RIDGE = 1e-6  # of the mean eigenvalue: only keeps roots of singular matrices finite, it does not regularise


@dataclass(frozen=True)
class PairBasis:
    """New query-key pairs of one head.

    Attributes:
        query, key: [d, d]; q' = q @ query[:, :r], k' = k @ key[:, :r], best r first.
        errors: [d + 1]; errors[r] is the expected squared error of the scores with r pairs, per query and key token.
    """

    query: np.ndarray
    key: np.ndarray
    errors: np.ndarray


def roots(matrix: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Symmetric square root of a positive semidefinite matrix, and its inverse; both [d, d]."""
    symmetric = (matrix + matrix.T) / 2
    values, vectors = np.linalg.eigh(symmetric)
    if values.mean() < np.finfo(np.float64).tiny:  # nothing varies, so every basis is as good
        return np.zeros_like(symmetric), np.eye(len(symmetric))
    floor = RIDGE * float(values.mean())
    spread = np.sqrt(np.maximum(values, floor))
    return (vectors * spread) @ vectors.T, (vectors / spread) @ vectors.T


def pair_basis(second_q: np.ndarray, second_k: np.ndarray) -> PairBasis:
    """The basis in which the leading r pairs are the best r pairs, for every r at once (METHODS 2.1).

    Args:
        second_q: E[qᵀq], [d, d].
        second_k: E[(k − k̄)ᵀ(k − k̄)] with the mean over the tokens of each image, [d, d].
    """
    root_q, inverse_q = roots(second_q)
    root_k, inverse_k = roots(second_k)
    left, sigma, right = np.linalg.svd(root_q @ root_k)
    share = np.sqrt(sigma)
    tail = np.concatenate([np.cumsum((sigma**2)[::-1])[::-1], [0.0]])
    return PairBasis(inverse_q @ left * share, inverse_k @ right.T * share, tail)


@dataclass(frozen=True)
class ValueBasis:
    """New value neurons of one head.

    Attributes:
        basis: [d, d]; v' = v @ basis[:, :r], best r first.
        errors: [d + 1]; errors[r] is the expected squared error of the head's contribution to the output, per token.
    """

    basis: np.ndarray
    errors: np.ndarray


def value_basis(covariance: np.ndarray, projection: np.ndarray) -> ValueBasis:
    """Leading directions of what a head contributes to the output projection (METHODS 2.2).

    Args:
        covariance: of the head's part of the projection's input, [d, d].
        projection: the head's rows of the output projection, [d, out].
    """
    root, inverse = roots(covariance)
    left, sigma, _ = np.linalg.svd(root @ projection, full_matrices=True)
    energy = np.zeros(len(root))
    energy[: len(sigma)] = sigma**2
    tail = np.concatenate([np.cumsum(energy[::-1])[::-1], [0.0]])
    return ValueBasis(inverse @ left, tail)


def complementary_bases(
    bases: Sequence[ValueBasis],
    covariance: np.ndarray,
    projection: np.ndarray,
    places: np.ndarray,
    kept: int,
) -> list[ValueBasis]:
    """Bases of all heads for one width, each fitted to what the kept directions of the others leave (METHODS 2.2).

    With T the kept directions of the other heads, block-diagonal, and p a head's rows, what no combination of theirs
    explains has the covariance C' = C − CT (TᵀCT)⁻¹ TᵀC. The best rank r for the head, given that the projection is
    solved for again over all heads, are the leading left singular vectors of C'_pp^-½ (C' W)_p: reduced-rank regression
    on the residual. Each head in turn can only lower the error of the joint refit, so one sweep is taken.

    Args:
        bases: of each head for itself.
        covariance: C of the projection's input, all heads, [K, K].
        projection: W, [K, out].
        places: rows of each head, [heads, d].
        kept: r.

    Returns:
        Bases whose leading r directions are to be kept; `errors` are those given.
    """
    found = list(bases)
    if len(found) < 2 or kept >= places.shape[1]:
        return found
    crossed = covariance @ projection
    for head, rows in enumerate(places):
        others = [index for index in range(len(found)) if index != head]
        blocks = [(places[index], found[index].basis[:, :kept]) for index in others]
        seen = np.concatenate([covariance[:, mine] @ basis for mine, basis in blocks], axis=1)  # CT
        goal = np.concatenate([basis.T @ crossed[mine] for mine, basis in blocks])  # TᵀCW
        inner = np.concatenate([basis.T @ seen[mine] for mine, basis in blocks])  # TᵀCT
        inner[np.diag_indices_from(inner)] += RIDGE * float(np.trace(inner)) / len(inner) + np.finfo(np.float64).tiny
        solved = solve_positive(inner, np.concatenate([seen[rows].T, goal], axis=1))
        _, inverse = roots(covariance[np.ix_(rows, rows)] - seen[rows] @ solved[:, : len(rows)])
        turn, _, _ = np.linalg.svd(inverse @ (crossed[rows] - seen[rows] @ solved[:, len(rows) :]), full_matrices=True)
        found[head] = replace(found[head], basis=inverse @ turn)
    return found
