"""Scores of query-key pairs: which pairs carry the leading components of the attention scores.

Source: SNP (arXiv 2404.11630), eq. 4-6. For one image and one head ``As = Q Kᵀ = Σ_i q_i k_iᵀ = Σ_j σ_j u_j v_jᵀ``, and
pair i scores ``ω_i = Σ_{j≤r} |cos(q_i k_iᵀ, σ_j u_j v_jᵀ)| = Σ_{j≤r} |q̂_i·u_j| |k̂_i·v_j|``, summed over the images.

Only the Gram matrices of Q and K are needed [derived for this project]. Let ``QᵀQ = L Lᵀ``. Then Q = Q₁ Lᵀ with
orthonormal Q₁, and As Asᵀ = Q₁ (Lᵀ KᵀK L) Q₁ᵀ. So the d×d matrix ``S = Lᵀ (KᵀK) L = W Λ Wᵀ`` has Λ = σ² and
u_j = Q₁ w_j, and with v_j = K Qᵀ u_j / σ_j:

    Qᵀu_j = (L W)_j =: a_j,      Kᵀv_j = (KᵀK) a_j / σ_j.

One Cholesky factor and one symmetric eigenproblem of size d replace the SVD of an N×N matrix. The alternative, the SVD
of ``R₁R₂ᵀ``, needs two factors and took 0.45 ms against 0.28 ms per matrix (d = 64, float64, one core); eigh in float32
gained little and would lose every component below 3e-4 σ_1, because S holds squares. In float64 components down to
1e-7 σ_1 are resolved, far below any rank that EVBMF keeps.
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import numpy as np

from onnxsnp.blas import available_cores, single_threaded
from onnxsnp.errors import DataError
from onnxsnp.scoring.vbmf import evbmf_rank

_CHUNK_BYTES = 1 << 20  # of one float64 Gram chunk: a handful of such arrays stays in a core's cache
_RESOLUTION = 2.0**-24  # σ_j / σ_1 below which a component is the round-off of squares in float64 (√eps ≈ 2**-26)


def qk_scores(
    gram_q: np.ndarray,
    gram_k: np.ndarray,
    tokens_q: int,
    tokens_k: int,
    *,
    rank: int | None = None,
    threads: int | None = None,
) -> np.ndarray:
    """Scores of every query-key pair, summed over the images (SNP eq. 4-6; the lowest go first).

    Scores are sums, so those of several batches add up with ``+=``. Constant factors on Q or K change
    nothing. A dead pair (zero query or key column) scores 0 and leaves the others as they are. The result does not
    depend on `threads`.

    Args:
        gram_q, gram_k: [images, heads, d, d], QᵀQ and KᵀK of each image and head, float32 or float64, positive
            semidefinite up to round-off (also singular: dead neurons, fewer tokens than d).
        tokens_q, tokens_k: number of rows of Q and of K.
        rank: r of eq. 6 for every image and head; None takes it from evbmf_rank for each.
        threads: worker threads; None takes one per available core.

    Returns:
        float64 [heads, d], each in [0, images * r].

    Raises:
        ValueError: if the shapes do not fit or a count is below 1.
        DataError: if a Gram matrix is not finite.
    """
    _check(gram_q, gram_k, tokens_q, tokens_k, rank)
    images, heads, size, _ = gram_q.shape
    step = max(1, _CHUNK_BYTES // (8 * heads * size * size))
    starts = range(0, images, step)

    def part(start: int) -> np.ndarray:
        q, k = (g[start : start + step].astype(np.float64) for g in (gram_q, gram_k))
        return _chunk_scores(q, k, tokens_q, tokens_k, rank)

    with single_threaded():  # inside one LAPACK call of this size BLAS threads only spin (twice the CPU time)
        workers = min(threads or available_cores(), len(starts))
        if workers <= 1:
            parts = [part(start) for start in starts]
        else:
            with ThreadPoolExecutor(workers) as pool:  # LAPACK and large ufuncs run without the interpreter lock
                parts = list(pool.map(part, starts))
    return np.sum(parts, axis=0) if parts else np.zeros((heads, size))


def _check(gram_q: np.ndarray, gram_k: np.ndarray, tokens_q: int, tokens_k: int, rank: int | None) -> None:
    if gram_q.ndim != 4 or gram_q.shape[2] != gram_q.shape[3] or gram_q.shape != gram_k.shape:
        raise ValueError(f"expected two [images, heads, d, d] arrays, got {gram_q.shape} and {gram_k.shape}")
    if min(tokens_q, tokens_k) < 1 or (rank is not None and rank < 1):
        raise ValueError(f"token counts and rank must be at least 1, got {tokens_q}, {tokens_k}, {rank}")


def _chunk_scores(gq: np.ndarray, gk: np.ndarray, tokens_q: int, tokens_k: int, rank: int | None) -> np.ndarray:
    """Scores [heads, d] summed over the images of float64 Grams [images, heads, d, d]."""
    if not (np.isfinite(gq).all() and np.isfinite(gk).all()):
        raise DataError(
            "the queries or keys of a calibration batch are not finite",
            hint="check the input preprocessing, or calibrate a float32 copy of the model",
        )
    factor = _factor(gq)
    squares, w = np.linalg.eigh(factor.swapaxes(-1, -2) @ (gk @ factor))
    squares, w = squares[..., ::-1], w[..., ::-1]
    sigma = np.sqrt(np.maximum(squares, 0.0))
    sigma[sigma <= _RESOLUTION * sigma[..., :1]] = 0.0
    top = evbmf_rank(sigma, tokens_q, tokens_k) if rank is None else np.full(sigma.shape[:-1], rank)
    most = int(top.max(initial=1))  # later components count for no matrix of the chunk
    sigma = sigma[..., :most]
    keep = (np.arange(sigma.shape[-1]) < top[..., None]) & (sigma > 0)
    weight = np.divide(1.0, sigma, out=np.zeros_like(sigma), where=keep)
    a = factor @ w[..., :most]
    b = gk @ a
    b *= a
    np.abs(b, out=b)
    norm = np.sqrt(np.maximum(_diagonal(gq) * _diagonal(gk), 0.0))
    total = (b @ weight[..., None])[..., 0]
    scores: np.ndarray = np.divide(total, norm, out=np.zeros_like(total), where=norm > 0).sum(axis=0)
    return scores


def _factor(gram: np.ndarray) -> np.ndarray:
    """L with L Lᵀ = gram, for a stack [..., d, d] of positive semidefinite matrices."""
    diagonal = _diagonal(gram)
    dead = diagonal <= 0
    if not dead.any():
        return _cholesky_or_root(gram)
    # A dead neuron has a zero row and column: a 1 on its diagonal lets Cholesky pass and is taken out again.
    alive = ~dead
    patched = gram * (alive[..., :, None] & alive[..., None, :])
    index = np.arange(gram.shape[-1])
    patched[..., index, index] = np.where(dead, 1.0, diagonal)
    return _cholesky_or_root(patched) * alive[..., :, None]


def _cholesky_or_root(gram: np.ndarray) -> np.ndarray:
    """Cholesky, 15 times faster than eigh; where a matrix is singular, L = V √Λ with negative round-off clipped."""
    try:
        return np.linalg.cholesky(gram)
    except np.linalg.LinAlgError:
        values, vectors = np.linalg.eigh(gram)
        return vectors * np.sqrt(np.maximum(values, 0.0))[..., None, :]


def _diagonal(gram: np.ndarray) -> np.ndarray:
    return np.diagonal(gram, axis1=-2, axis2=-1)
