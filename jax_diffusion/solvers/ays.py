"""Align Your Steps: noise levels optimised for particular models (Sabour, Fidler & Kreis 2024).

The levels are those that the authors published for ten steps, sigma / alpha of Stable Diffusion 1.5, Stable Diffusion
XL and Stable Video Diffusion. The eleventh says where the tenth step would end, for interpolation; solvers go on to 0.
"""

import numpy as np

NOISE = {
    "ays_sd": (14.615, 6.475, 3.861, 2.697, 1.886, 1.396, 0.963, 0.652, 0.399, 0.152, 0.029),
    "ays_sdxl": (14.615, 6.315, 3.771, 2.181, 1.342, 0.862, 0.555, 0.380, 0.234, 0.113, 0.029),
    "ays_svd": (700.00, 54.5, 15.886, 7.977, 4.248, 1.789, 0.981, 0.403, 0.173, 0.034, 0.002),
}


def noise(name: str, steps: int) -> np.ndarray:
    """The `steps` levels to evaluate at, log-linear between the published ones, as the authors recommend."""
    published = np.array(NOISE[name])
    where = np.linspace(0, 1, steps + 1)[:-1]
    return np.exp(np.interp(where, np.linspace(0, 1, len(published)), np.log(published)))
