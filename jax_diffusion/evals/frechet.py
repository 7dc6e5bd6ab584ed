"""The Fréchet distance between two sets of vectors, as Gaussians (Dowson & Landau 1982; FID: Heusel et al. 2017)."""

from collections.abc import Iterable
from typing import Any

import numpy as np

ROWS = 1024  # at a time in float64


def moments(x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Mean [D] and covariance [D, D], float64, of vectors [N, ...] (flattened)."""
    return moments_of_batches(x[i : i + ROWS] for i in range(0, len(x), ROWS))


def moments_of_batches(batches: Iterable[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """The same of vectors that come in batches [B, ...], of which one at a time is held."""
    n = 0
    shift: Any = 0.0
    total: Any = 0.0
    outer: Any = 0.0
    for batch in batches:
        x = np.asarray(batch, np.float64).reshape(len(batch), -1)
        if n == 0:
            shift = x.mean(0)  # near the mean, so that nothing cancels below
        x = x - shift
        n, total, outer = n + len(x), total + x.sum(0), outer + x.T @ x
    mean = total / n
    return shift + mean, (outer - n * np.outer(mean, mean)) / (n - 1)


def _root(c: np.ndarray) -> np.ndarray:
    """The symmetric square root of a covariance; rounding may leave eigenvalues just below zero."""
    values, vectors = np.linalg.eigh(c)
    return (vectors * np.sqrt(np.maximum(values, 0))) @ vectors.T


def from_moments(mean1, cov1, mean2, cov2) -> float:
    """|m1 - m2|^2 + tr(C1 + C2 - 2 (C1^1/2 C2 C1^1/2)^1/2): symmetric matrices only, so never complex."""
    root = _root(cov1)
    cross = np.sqrt(np.maximum(np.linalg.eigvalsh(root @ cov2 @ root), 0)).sum()
    return float(np.sum((mean1 - mean2) ** 2) + np.trace(cov1) + np.trace(cov2) - 2 * cross)


def distance(a: np.ndarray, b: np.ndarray) -> float:
    """Between samples a [N, ...] and b [M, ...]. Biased upwards for few samples: compare equal numbers."""
    return from_moments(*moments(a), *moments(b))
