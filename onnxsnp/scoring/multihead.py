"""Channels that change the attention and say what no other channel of their head says.

After "Automatic Channel Pruning for Multi-Head Attention" (arXiv 2405.20867), which trains indicators: they start from
the attention difference that each channel makes, are weighted by the similarity between channels, and equal shares go
from all heads. The training-free form (METHODS 4, derived for this project) scores channel i, within its head, by

    score_i = Δ_i · (1 − mean_{j≠i} |cos(z_i, z_j)|),

with z_i what the channel adds: for a query-key pair q_i k_iᵀ, about the mean of each row, which softmax ignores; for a
value or FFN neuron x_i W_i, at the output of the projection that reads it. Δ_i is what happens without it: for a pair
the KL divergence of the rows of the softmax, averaged over rows and images; for a neuron the squared change of that
output, E‖z_i‖². The cosines are those of the contributions over all tokens and images, from O_ij = E⟨z_i, z_j⟩.
"""

from __future__ import annotations

import numpy as np


def channel_scores(change: np.ndarray, overlap: np.ndarray) -> np.ndarray:
    """``Δ_i · (1 − mean_{j≠i} |cos(z_i, z_j)|)``: float64 [heads, size], the lowest go first.

    A channel that adds nothing has no direction: its cosine with every other is taken as 0. So it is with the only
    channel of a head.

    Args:
        change: Δ, [heads, size], not negative.
        overlap: O, [heads, size, size], symmetric.

    Raises:
        ValueError: shapes that do not fit.
    """
    if change.ndim != 2 or overlap.shape != (*change.shape, change.shape[-1]):
        raise ValueError(
            f"expected change [heads, size] and overlap [heads, size, size], got {change.shape}, {overlap.shape}"
        )
    norm = np.sqrt(np.maximum(np.einsum("hii->hi", overlap), 0.0).astype(np.float64))
    scale = norm[:, :, None] * norm[:, None, :]
    cosines = np.minimum(np.abs(np.divide(overlap, scale, out=np.zeros(overlap.shape), where=scale > 0)), 1.0)
    others = change.shape[1] - 1
    np.einsum("hii->hi", cosines)[...] = 0.0
    scores: np.ndarray = change * (1.0 - cosines.sum(axis=2) / max(others, 1))
    return scores


def neuron_overlap(weight: np.ndarray, second: np.ndarray, places: np.ndarray) -> np.ndarray:
    """O_ij = E⟨x_i W_i, x_j W_j⟩ of the neurons of each head, [heads, size, size], float64.

    Args:
        weight: W of the projection that reads them, [K, out].
        second: second moments of its input, [K, K].
        places: [heads, size, rows] of each neuron in the projection; several where heads share it.
    """
    full = weight.astype(np.float64)
    found = []
    for rows in places:
        flat = rows.reshape(-1)
        inner = second[np.ix_(flat, flat)] * (full[flat] @ full[flat].T)
        size, count = rows.shape
        found.append(inner.reshape(size, count, size, count).sum(axis=(1, 3)))
    return np.stack(found)
