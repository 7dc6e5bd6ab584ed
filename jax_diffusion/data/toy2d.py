"""Distributions on the plane, for models that train in seconds: points float32 [N, 2] in about [-1, 1]^2."""

from collections.abc import Callable
from typing import Any

import numpy as np

from jax_diffusion.data.source import ArraySource, Once, Source
from jax_diffusion.errors import choose

TRAIN_POINTS, EVAL_POINTS = 100_000, 10_000
TRAIN_SEED, EVAL_SEED = 0, 1  # fixed: two runs see the same points
Points = tuple[np.ndarray, np.ndarray | None]
RINGS = 4
SQUARES = 4  # a side of the checkerboard


def moons(rng: np.random.Generator, n: int) -> Points:
    """Two interleaved half circles of noise 0.05; the label says which."""
    label = rng.integers(0, 2, n)
    angle = rng.uniform(0, np.pi, n)
    x = np.where(label == 0, np.cos(angle), 1 - np.cos(angle)) - 0.5
    y = np.where(label == 0, np.sin(angle), 0.5 - np.sin(angle)) - 0.25
    return np.stack([x, y], -1) / 1.6 + rng.normal(0, 0.05 / 1.6, (n, 2)), label


def swissroll(rng: np.random.Generator, n: int) -> Points:
    """A spiral whose radius grows in proportion to its angle, from 1.5 pi to 4.5 pi."""
    angle = 1.5 * np.pi * (1 + 2 * rng.uniform(size=n))
    roll = np.stack([angle * np.cos(angle), angle * np.sin(angle)], -1) / (4.5 * np.pi)
    return 0.95 * roll + rng.normal(0, 0.015, (n, 2)), None


def checkerboard(rng: np.random.Generator, n: int) -> Points:
    """Uniform on the black squares of a 4x4 board on [-1, 1]^2: a density with edges."""
    row = rng.integers(0, SQUARES, n)
    column = 2 * rng.integers(0, SQUARES // 2, n) + row % 2
    corner = np.stack([column, row], -1)
    return (corner + rng.uniform(size=(n, 2))) * (2 / SQUARES) - 1, None


def rings(rng: np.random.Generator, n: int) -> Points:
    """Concentric circles of radius 1/4, 2/4, 3/4, 1 less a margin; the label counts from the inside."""
    label = rng.integers(0, RINGS, n)
    radius = 0.95 * (label + 1) / RINGS + rng.normal(0, 0.015, n)
    angle = rng.uniform(0, 2 * np.pi, n)
    return radius[:, None] * np.stack([np.cos(angle), np.sin(angle)], -1), label


DISTRIBUTIONS: dict[str, Callable[[np.random.Generator, int], Points]] = {
    "moons": moons,
    "swissroll": swissroll,
    "checkerboard": checkerboard,
    "rings": rings,
}


def load(cfg: Any, split: str, once: Once) -> Source:
    """100,000 points to train on, 10,000 others for eval, of the distribution cfg.name."""
    draw = DISTRIBUTIONS[choose("config.data.name", cfg.name, DISTRIBUTIONS)]
    n, seed = (TRAIN_POINTS, TRAIN_SEED) if split == "train" else (EVAL_POINTS, EVAL_SEED)
    points, labels = draw(np.random.default_rng(seed), n)
    return ArraySource(points.astype(np.float32), labels if cfg.labels else None, name=f"toy2d/{cfg.name}")
