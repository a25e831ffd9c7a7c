"""How far query-key pairs do the same for the scores, from the Gram matrices of queries and keys.

Let s_i = q_i k_i be what pair i adds to a score. Over the scores of one image and head,
Σ s_i s_j = Σ_t Σ_u q_ti k_ui q_tj k_uj = (QᵀQ)_ij (KᵀK)_ij, so no score is ever formed.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from onnxsnp.errors import DataError


@dataclass
class Overlap:
    """Second moments of what the pairs of one attention module add to its scores, per head.

    Attributes:
        total: Σ s sᵀ over all score entries, [heads, size, size].
        scores: number of entries summed over, per head.
    """

    total: np.ndarray
    scores: int = 0

    @classmethod
    def empty(cls, heads: int, size: int) -> Overlap:
        """Nothing measured yet."""
        return cls(np.zeros((heads, size, size)))

    @property
    def mean(self) -> np.ndarray:
        """E[s sᵀ], [heads, size, size]."""
        return self.total / max(self.scores, 1)

    def add(
        self, gram_q: np.ndarray, gram_k: np.ndarray, tokens: tuple[int, int], mean_k: np.ndarray | None = None
    ) -> None:
        """Add some images.

        Args:
            gram_q, gram_k: QᵀQ and KᵀK of each image and head, [images, heads, size, size]; of the keys possibly fewer,
                if several queries share them.
            tokens: number of rows of Q and of K.
            mean_k: mean over the rows of K, [images, heads, size], where the softmax ignores what it adds to a row.

        Raises:
            DataError: queries or keys are not finite.
        """
        queries, keys = gram_q.astype(np.float64), gram_k.astype(np.float64)
        if mean_k is not None:
            mean = mean_k.astype(np.float64)
            keys = keys - tokens[1] * mean[..., :, None] * mean[..., None, :]
        total = np.sum(queries * per_query(keys, queries), axis=0)
        if not np.isfinite(total).all():
            raise DataError(
                "the queries or keys of a calibration batch are not finite",
                hint="check the input preprocessing, or calibrate a float32 copy of the model",
            )
        self.total += total
        self.scores += tokens[0] * tokens[1] * len(queries)


def per_query(keys: np.ndarray, queries: np.ndarray) -> np.ndarray:
    """Key matrices repeated for each of the queries that share them, where several heads do; both [images, ...]."""
    return np.repeat(keys, len(queries) // len(keys), axis=0)
