"""scikit-learn's 1,797 real handwritten digits, 8x8: the set that needs no download."""

from typing import Any

import numpy as np

from jax_diffusion.data.images import Format, fit
from jax_diffusion.data.source import ArraySource, Once, Source, split_indices
from jax_diffusion.errors import UserError


def load(cfg: Any, split: str, once: Once) -> Source:
    """The digits [M, 8, 8, 1] with their 10 classes; eval is the held-out share."""
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise UserError("config.data.source='digits' needs scikit-learn: pip install scikit-learn") from error
    digits = once(load_digits)
    # The pixels count 0..16 inked dots of a 4x4 block.
    images = np.round(digits.images * 255 / 16).astype(np.uint8)[..., None]
    chosen = split_indices(len(images), cfg.holdout, split, "digits")
    images = fit(images[chosen], Format.from_config(cfg), "digits")
    return ArraySource(images, digits.target[chosen] if cfg.labels else None, name="digits", num_classes=10)
