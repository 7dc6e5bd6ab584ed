"""Guidance by two predictions: away from the weak one W, along the difference to the good one G.

    x0_hat = W + scale (G - W)                                                                (1)

G is the prediction with the condition. W is the one without it (classifier-free guidance, Ho & Salimans 2022,
eq. 6 with scale = 1 + w), with a negative condition, or a weaker network's (autoguidance, Karras et al. 2024).
`Settings` says how far, at which noise levels, and what is done against oversaturation.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jax_diffusion.guidance.denoisers import Conditional, Denoised, Denoiser, unpack
from jax_diffusion.parameterization import Parameterization
from jax_diffusion.shapes import per_sample

Number = jax.Array | float


class Settings(NamedTuple):
    """How to mix two predictions. A pytree: other numbers are the same compiled program, None leaves a step out.

    scale:    1 is no guidance, 0 the weak prediction alone; a number or one per sample [B].
    interval: (lo, hi): guidance only where lo <= sigma / alpha <= hi, none elsewhere (Kynkäänniemi et al. 2024,
              whose sigma is sigma / alpha). Outside it the weak prediction is not computed, unless t is [B].
    rescale:  phi in [0, 1]: the guided prediction's standard deviation over a sample is moved towards the good one's
              (Lin et al. 2023, section 3.4). Theirs, and diffusers' `guidance_rescale`, is that of what the network
              predicts, and so is this one where the functions below are given the parameterization; without it
              x0_hat is rescaled, which is the same for x0-predictors alone.
    apg:      (eta, r), adaptive projected guidance (Sadat et al. 2025): of G - W, cut to norm r (inf: uncut), the
              part parallel to G is weighted by eta. (1, inf) is eq. 1; the paper's own is eta = 0. Its momentum is
              not offered: it is a state that passes from step to step, and a denoiser has none.
    """

    scale: Number = 1.0
    interval: tuple[Number, Number] | None = None
    rescale: Number | None = None
    apg: tuple[Number, Number] | None = None


def classifier_free(
    denoise: Conditional,
    cond: Any,
    null: Any,
    settings: Settings | Number,
    parameterization: Parameterization | None = None,
) -> Denoiser:
    """Guidance by a condition, from one forward pass of 2B.

    cond, null:       pytrees of [B, ...] arrays of equal shapes. A negative condition in null's place leads away
                      from it instead of from the average image.
    settings:         Settings, or the scale alone.
    parameterization: of the network; settings.interval needs it, settings.rescale uses it.
    """

    def pair(x, t):
        both = jax.tree.map(_in_turn, cond, null)
        out = unpack(denoise(_in_turn(x, x), _in_turn(t, t) if jnp.ndim(t) else t, both))
        good, weak = _parted(out.x0)
        return Denoised(good, None if out.v is None else _parted(out.v)[0], state=out.state), weak

    return _guided(pair, lambda x, t: unpack(denoise(x, t, cond)), settings, parameterization)


def _in_turn(a: jax.Array, b: jax.Array) -> jax.Array:
    """Rows of a and b in turn, [B, ...] -> [2B, ...]. One after the other, half of the samples would change device."""
    return jnp.stack([a, b], axis=1).reshape(-1, *a.shape[1:])


def _parted(both: jax.Array) -> tuple[jax.Array, jax.Array]:
    """What _in_turn was given."""
    both = both.reshape(-1, 2, *both.shape[1:])
    return both[:, 0], both[:, 1]


def autoguide(
    good: Denoiser, weak: Denoiser, settings: Settings | Number, parameterization: Parameterization | None = None
) -> Denoiser:
    """Guidance by a weaker network: fewer parameters, less training, or both (Karras et al. 2024).

    Both are shown the same condition, or none; both must be trained on the same noise levels. Arguments as above.
    """

    def pair(x, t):
        return unpack(good(x, t)), unpack(weak(x, t)).x0

    return _guided(pair, lambda x, t: unpack(good(x, t)), settings, parameterization)


def _guided(pair, alone, settings: Settings | Number, parameterization: Parameterization | None) -> Denoiser:
    """pair(x, t) -> (the good Denoised, the weak x0_hat); alone(x, t) -> the good one."""
    settings = settings if isinstance(settings, Settings) else Settings(settings)
    if settings.interval is not None and parameterization is None:
        raise ValueError("an interval of sigma / alpha needs the parameterization: it knows the schedule")

    def everywhere(x, t):
        good, weak = pair(x, t)
        return Denoised(_mix(good.x0, weak, x, t, settings, parameterization), good.v, state=good.state)

    interval = settings.interval
    if interval is None or parameterization is None:
        return everywhere
    schedule = parameterization.schedule

    def limited(x, t):
        lo, hi = (jnp.log(jnp.asarray(bound, jnp.float32)) for bound in interval)
        level = -schedule.log_snr(jnp.asarray(t, jnp.float32)) / 2  # log(sigma / alpha)
        inside = (lo <= level) & (level <= hi)
        if jnp.ndim(t) == 0:
            # One number for the whole batch: a real branch, with half the cost outside.
            return jax.lax.cond(inside, everywhere, lambda x, t: Denoised(*alone(x, t)[:2]), x, t)
        good, weak = pair(x, t)
        mixed = _mix(good.x0, weak, x, t, settings, parameterization)
        return Denoised(jnp.where(per_sample(inside, x) > 0, mixed, good.x0), good.v)

    return limited


def _mix(good, weak, x, t, settings: Settings, parameterization: Parameterization | None) -> jax.Array:
    scale = per_sample(settings.scale, x)
    if settings.apg is None:
        mixed = weak + scale * (good - weak)
    else:
        mixed = good + (scale - 1) * _projected(good - weak, good, *settings.apg)
    if settings.rescale is None:
        return mixed
    # x0_hat = c_skip x + c_out F, so the part that the network said is x0_hat - c_skip x, up to a factor.
    skip = 0.0 if parameterization is None else per_sample(parameterization.c_skip(jnp.asarray(t, jnp.float32)), x) * x
    said, good = mixed - skip, good - skip
    spread = _std(said)
    ratio = jnp.where(spread > 0, _std(good) / jnp.where(spread > 0, spread, 1.0), 1.0)
    phi = jnp.asarray(settings.rescale, x.dtype)
    # Written so that phi = 0 gives mixed itself.
    return mixed + phi * (ratio - 1) * said


def _projected(update: jax.Array, good: jax.Array, eta: Number, radius: Number) -> jax.Array:
    """The update cut to norm `radius`, its part along `good` weighted by eta (Sadat et al. 2025, algorithm 1)."""
    norm = jnp.sqrt(_dot(update, update))
    update = update * jnp.minimum(1.0, radius / jnp.maximum(norm, 1e-12))
    square = _dot(good, good)
    parallel = _dot(update, good) / jnp.maximum(square, 1e-24) * good
    return (update - parallel) + eta * parallel


def _dot(a: jax.Array, b: jax.Array) -> jax.Array:
    """One inner product per sample, [B, 1, ..., 1]."""
    return jnp.sum(a * b, axis=tuple(range(1, a.ndim)), keepdims=True)


def _std(x: jax.Array) -> jax.Array:
    return jnp.std(x, axis=tuple(range(1, x.ndim)), keepdims=True)
