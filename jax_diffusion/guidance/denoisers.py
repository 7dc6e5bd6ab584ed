"""What a denoiser is, one made of a network, and limits on what it says."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jax_diffusion.process import Gaussian
from jax_diffusion.shapes import per_sample


class Denoised(NamedTuple):
    """What a denoiser says of x_t; all of x's shape."""

    x0: jax.Array
    v: jax.Array | None = None  # in [0, 1]: the learned variance between its bounds
    raw: jax.Array | None = None  # x0 before it was clipped
    state: Any = None  # what is handed to the next evaluation, see Remembering; of any shape


Denoiser = Callable[[jax.Array, jax.Array], jax.Array | Denoised]
Conditional = Callable[[jax.Array, jax.Array, Any], jax.Array | Denoised]  # (x_t, t, cond) -> x0_hat


class Remembering(NamedTuple):
    """A denoiser with a state that passes from each evaluation to the next, as the rows of a table make them.

    start(x) -> the state before the first evaluation of x [B, ...].
    given(state) -> Denoiser, whose Denoised.state is the next one.
    """

    start: Callable[[jax.Array], Any]
    given: Callable[[Any], Denoiser]


def wrap(denoise: Denoiser | Remembering, f: Callable[[Denoiser], Denoiser]) -> Denoiser | Remembering:
    """f(denoise), of a remembering denoiser too. f must hand on Denoised.state, as all of this package do."""
    if isinstance(denoise, Remembering):
        return denoise._replace(given=lambda state: f(denoise.given(state)))
    return f(denoise)


def unpack(out: jax.Array | Denoised) -> Denoised:
    """What a denoiser returned, bare or not."""
    return out if isinstance(out, Denoised) else Denoised(out)


def model_denoiser(process: Gaussian, apply: Callable, params: Any) -> Conditional:
    """`(x_t, t, cond) -> x0_hat` of a network.

    apply(params, x, c_noise, cond) -> prediction, or (prediction, state).
    """

    def denoise(x_t, t, cond):
        inputs, c_noise = process.network_inputs(x_t, t)
        out = apply(params, inputs, c_noise, cond)
        prediction, state = out if isinstance(out, tuple) else (out, None)
        prediction = prediction.astype(jnp.float32)
        return Denoised(process.denoised(prediction, x_t, t), process.split(prediction)[1], state=state)

    return denoise


def condition(denoise: Conditional, cond: Any) -> Denoiser:
    """The denoiser at a fixed condition: no guidance."""
    return lambda x, t: denoise(x, t, cond)


def _on_x0(denoise: Denoiser, f: Callable[[jax.Array], jax.Array]) -> Denoiser:
    """f applied to x0_hat; solvers that want the prediction as it was find it in `raw`."""

    def wrapped(x, t):
        out = unpack(denoise(x, t))
        return out._replace(x0=f(out.x0), raw=out.x0 if out.raw is None else out.raw)

    return wrapped


def clip(denoise: Denoiser, bound: float = 1.0) -> Denoiser:
    """x0_hat clipped to [-bound, bound]. Solvers re-derive the noise from the clipped x0_hat, as DDPM's and
    guided-diffusion's code does, unless told otherwise (ddim's use_clipped_model_output). Never for latents."""
    return _on_x0(denoise, lambda x0: jnp.clip(x0, -bound, bound))


def dynamic_threshold(denoise: Denoiser, percentile: jax.Array | float = 99.5, minimum: float = 1.0) -> Denoiser:
    """x0_hat clipped to its own percentile s >= minimum and divided by s (Saharia et al. 2022, section 2.3)."""

    def threshold(x0):
        s = jnp.percentile(jnp.abs(x0).reshape(x0.shape[0], -1), percentile, axis=1)
        s = per_sample(jnp.maximum(s, minimum), x0)
        return jnp.clip(x0, -s, s) / s

    return _on_x0(denoise, threshold)
