"""Samples held against the very pictures they were made from: for models conditioned on an image."""

from collections.abc import Callable

import numpy as np


def psnr(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Peak signal-to-noise ratio in dB of each of N pairs of 8-bit images [N, ...], float64 [N]; equal ones are inf."""
    squares = np.square(a.astype(np.float64) - b).reshape(len(a), -1).mean(1)
    with np.errstate(divide="ignore"):
        return 10 * np.log10(255.0**2 / squares)


def compare(
    samples: np.ndarray,  # uint8 [N, H, W, C]
    originals: np.ndarray,  # uint8 [N, H, W, C]
    shown: np.ndarray,  # uint8 [N, H, W, 1 or C], what the network saw
    observe: Callable[[np.ndarray], np.ndarray],  # uint8 pictures -> uint8 [N, ...], what was known of them
) -> dict[str, float | None]:
    """Means over the pairs, in dB.

    psnr:        of a sample to its original. A sharp sample need not have a high one: blur has.
    condition:   of what the network was shown to the original, the number to beat; None where the channels differ.
    consistency: of what is known of a sample to what was known of the original (SR3, appendix D).
    """

    def mean(values):
        return float(np.mean(np.minimum(values, 100.0)))  # equal pictures would make it infinite

    same = shown.shape == originals.shape
    return {
        "psnr": mean(psnr(samples, originals)),
        "condition": mean(psnr(shown, originals)) if same else None,
        "consistency": mean(psnr(observe(samples), observe(originals))),
    }
