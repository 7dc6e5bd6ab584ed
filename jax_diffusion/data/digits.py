"""scikit-learn's 1,797 real handwritten digits, 8x8: the set that needs no download."""

import importlib.util
import pathlib
from typing import Any

import numpy as np

from jax_diffusion.data.images import Format, fit
from jax_diffusion.data.source import ArraySource, Once, Source, split_indices
from jax_diffusion.errors import UserError


def load(cfg: Any, split: str, once: Once) -> Source:
    """The digits [M, 8, 8, 1] with their 10 classes; eval is the held-out share."""
    pixels, classes = once(_read)
    # The pixels count 0..16 inked dots of a 4x4 block.
    images = np.round(pixels * 255 / 16).astype(np.uint8)[..., None]
    chosen = split_indices(len(images), cfg.holdout, split, "digits")
    images = fit(images[chosen], Format.from_config(cfg), "digits")
    return ArraySource(images, classes[chosen] if cfg.labels else None, name="digits", num_classes=10)


def _read() -> tuple[np.ndarray, np.ndarray]:
    """Pixels [1797, 8, 8] and classes int [1797], as sklearn.datasets.load_digits has them: from the file it reads, for
    importing scikit-learn takes two seconds of every start."""
    package = importlib.util.find_spec("sklearn")
    if package is None or package.origin is None:
        raise UserError("config.data.source='digits' needs scikit-learn: pip install scikit-learn")
    path = pathlib.Path(package.origin).parent / "datasets" / "data" / "digits.csv.gz"
    if not path.exists():  # a scikit-learn that keeps it elsewhere
        from sklearn.datasets import load_digits

        digits = load_digits()
        return digits.images, digits.target
    table = np.loadtxt(path, delimiter=",")
    return table[:, :-1].reshape(-1, 8, 8), table[:, -1].astype(int)
