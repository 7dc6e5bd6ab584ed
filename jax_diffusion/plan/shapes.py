"""What a recipe's samples look like, without its data: said by the user, by the config, or known of the data set."""

import pathlib
import re

from jax_diffusion import config as configs
from jax_diffusion.errors import UserError

# (shape, classes) of data sets, by the beginning of a recipe's name, a tfds name or a source.
KNOWN = {
    "digits": ((8, 8, 1), 10),
    "mnist": ((28, 28, 1), 10),
    "fashion_mnist": ((28, 28, 1), 10),
    "cifar10": ((32, 32, 3), 10),
    "cifar100": ((32, 32, 3), 100),
    "flowers64": ((64, 64, 3), 5),
    "imagenet64": ((64, 64, 3), 1000),
    "imagenet256": ((32, 32, 4), 1000),  # Stable Diffusion's latents
    "toy2d": ((2,), 0),
}


def _known(recipe: str, data: configs.ConfigDict) -> tuple[tuple[int, ...], int] | tuple[None, None]:
    names = (data.source, data.name, pathlib.PurePath(recipe).stem)
    for name in names:
        fits = [k for k in KNOWN if name == k or re.match(rf"{k}[_/]", name)]
        if fits:
            return KNOWN[max(fits, key=len)]
    return None, None


def parse(text: str) -> tuple[int, ...]:
    """ "32x32x3" -> (32, 32, 3)."""
    if not re.fullmatch(r"[1-9]\d*(x[1-9]\d*){0,2}", text):
        raise UserError(f"--shape={text}: give one sample's sizes, height x width x channels, for instance 32x32x3")
    return tuple(map(int, text.split("x")))


def find(
    recipe: str, config: configs.ConfigDict, shape: tuple[int, ...] | None = None, classes: int | None = None
) -> tuple[tuple[int, ...], int]:
    """(shape of one sample, number of classes or 0). What is given counts first, then config.data, then KNOWN.

    Raises UserError where nobody says.
    """
    data = config.data
    known, known_classes = _known(recipe, data)
    if shape is None and len(data.size) == 2:
        shape = (*data.size, data.channels or (known[2] if known and len(known) == 3 else 3))
    elif shape is None and known and data.channels and len(known) == 3:
        shape = (*known[:2], data.channels)
    shape = shape or known
    if classes is None:
        classes = known_classes if data.labels else 0
    if shape is None or classes is None:
        missing = [f"{option}={like}" for option, like, value in
                   (("--shape", "32x32x3", shape), ("--classes", "10", classes)) if value is None]  # fmt: skip
        raise UserError(
            f"--config={recipe}: its samples are known only with its data: add {' and '.join(missing)} "
            "(--shape of one sample, --classes=0 for none)"
        )
    return tuple(shape), classes
