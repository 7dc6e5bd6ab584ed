"""The Fréchet distance between two sets of vectors, as Gaussians (Dowson & Landau 1982; FID: Heusel et al. 2017)."""

import numpy as np


def moments(x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Mean [D] and covariance [D, D], float64, of vectors [N, ...] (flattened)."""
    x = np.asarray(x, np.float64).reshape(len(x), -1)
    return x.mean(0), np.atleast_2d(np.cov(x, rowvar=False))


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
