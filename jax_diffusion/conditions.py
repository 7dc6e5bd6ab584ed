"""Conditioning on an image: what is taken from a clean picture, and shown to the network beside x_t.

An image-to-image model is p(x_0 | y) with y a degraded x_0. Its network sees y, brought to the size of x_t, as
further channels ("concatenation": Saharia et al. 2021, SR3; 2022, Palette). Since y is a function of x_0, no data
source knows of it: the training step computes it from the (flipped) batch, on the device.

    none             no image
    low_resolution   x_0 averaged over factor x factor pixels, and interpolated back (SR3, section 4)
    gray             its luma, one channel (Palette's colourisation)
"""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp

from jax_diffusion.errors import UserError, check_options, choose

LUMA = (0.299, 0.587, 0.114)  # ITU-R BT.601, what PIL's "L" and JPEG mean by grey


@dataclasses.dataclass(frozen=True, eq=False)
class Condition:
    """How a clean image becomes what the network is shown. Images are float32 in [-1, 1]."""

    name: str
    channels: int  # of the condition image
    observed: tuple[int, int, int]  # (h, w, c) of what is known of a picture: a small one, a grey one
    observe: Callable[[jax.Array], jax.Array]  # x_0 [B, H, W, C] -> [B, *observed]
    present: Callable[[jax.Array], jax.Array]  # [B, *observed] -> cond["image"] [B, H, W, channels]

    def apply(self, x0: jax.Array) -> jax.Array:
        """cond["image"] of clean images: [B, H, W, C] -> [B, H, W, channels]."""
        return self.present(self.observe(x0))


def low_resolution(shape: tuple[int, int, int], factor: int = 4, interpolation: str = "cubic") -> Condition:
    """Super-resolution by `factor`. The average of a block is the box filter of a camera's pixel; back up goes
    a cubic interpolation, so that the network starts from the customary answer and adds what that lacks.

    interpolation: cubic, or bilinear as ADM's upsamplers were trained with (Dhariwal & Nichol 2021).
    """
    h, w, c = shape
    choose("condition.interpolation", interpolation, ("cubic", "bilinear"))
    if not isinstance(factor, int) or factor < 2 or h % factor or w % factor:
        raise UserError(
            f"condition.factor={factor} does not divide the {h}x{w} images into a smaller one: use 2 or more, "
            "a divisor of both sides"
        )

    def observe(x0):
        return x0.reshape(-1, h // factor, factor, w // factor, factor, c).mean((2, 4))

    def present(y):
        return jnp.clip(jax.image.resize(y, (y.shape[0], h, w, c), interpolation), -1.0, 1.0)

    return Condition("low_resolution", c, (h // factor, w // factor, c), observe, present)


def gray(shape: tuple[int, int, int]) -> Condition:
    """Colourisation from the luma 0.299 R + 0.587 G + 0.114 B (BT.601)."""
    h, w, c = shape
    if c != 3:
        raise UserError(f"condition=gray needs colour images, and these have {c} channel(s): set data.channels=3")

    def observe(x0):
        return jnp.einsum("bhwc,c->bhw", x0, jnp.asarray(LUMA, x0.dtype), precision="highest")[..., None]

    return Condition("gray", 1, (h, w, 1), observe, lambda y: y)


CONDITIONS = {"low_resolution": low_resolution, "gray": gray}


def make(name: str, shape: tuple[int, ...], **options) -> Condition | None:
    """The condition `name` for samples of `shape` (H, W, C); None for "none".

    >>> make("low_resolution", (64, 64, 3), factor=4).observed
    (16, 16, 3)
    """
    choose("condition", name, ("none", *CONDITIONS))
    if name == "none":
        check_options("condition 'none'", lambda: None, options)
        return None
    check_options(f"condition {name!r}", CONDITIONS[name], options, positional=1)
    if len(shape) != 3:
        raise UserError(f"condition={name} needs images, and these samples are points of {len(shape)} axis")
    height, width, channels = shape
    return CONDITIONS[name]((height, width, channels), **options)
