"""Editing images with a trained diffusion model: no training, only another start or another denoiser.

    inpaint        the known pixels of x_0 put into every prediction
    img2img        noise an image part of the way, denoise it (SDEdit: Meng et al. 2022)
    denoise        start from an image whose noise level is known
    encode/decode  the probability-flow ODE in both directions (Song et al. 2021, section 4.3)
    interpolate    between two images, through their latents

The first half of this module is made of schedules, grids and denoisers, for use with any network and inside any
jit. The second takes a Model; each of its functions runs the compiled program of Model.sample with other data.
Images are float32 in [-1, 1]. Super-resolution and colourisation need models trained for them: see conditions.py
and `Model.sample(images=...)`.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jax_diffusion.errors import UserError, choose
from jax_diffusion.guidance import Denoiser, unpack, wrap
from jax_diffusion.schedules import Schedule
from jax_diffusion.solvers import Grid, Table, grids, noise, sample
from jax_diffusion.solvers.euler import euler
from jax_diffusion.solvers.heun import heun

ODE_SOLVERS = {"ddim": euler, "euler": euler, "heun": heun}  # in the straight frame DDIM (eta = 0) is Euler


def replace_known(denoise: Denoiser, known: jax.Array, mask: jax.Array) -> Denoiser:
    """The denoiser that answers with what is known: x0_hat = mask * known + (1 - mask) * x0_hat.

    known: x_0 where the mask is, [B, ...].  mask: bool, of known's rank, broadcast to it; True is known.

    With ancestral steps (ddpm, ddim with eta = 1) a known pixel follows q(x_s | x_t, x_0) exactly, so that, noised
    properly at the start, it has the forward process' law given x_0 at every time. What stays an approximation is
    the rest: E[x_0 | x_t] is asked for where E[x_0 | x_t, known x_0] is wanted, so a network hears of the known
    pixels only through x_t. Resampling (solver "repaint") makes up for it. RePaint itself draws x_s of the known
    pixels afresh, independent of x_t: the same law at each time, but not the same path.
    """

    def replaced(x, t):
        out = unpack(denoise(x, t))
        x0 = jnp.where(mask, known, out.x0)
        v = None if out.v is None else jnp.where(mask, 0.0, out.v)  # the posterior's own variance
        return out._replace(x0=x0, v=v, raw=None if out.raw is None else jnp.where(mask, known, out.raw))

    return replaced


def inpaint(
    key: jax.Array,
    denoise: Denoiser,
    table: Table,
    schedule: Schedule,
    known: jax.Array,
    mask: jax.Array,
    *,
    indices: jax.Array | None = None,
    trajectory: bool = False,
):
    """Samples of x_0 whose pixels under the mask are `known`, bit for bit. Arguments as in replace_known, sample.

    Known pixels start as alpha x_0 + sigma eps, the others as the prior's noise. With the table of
    solvers.make("repaint", ...) this is RePaint (Lugmayr et al. 2022, algorithm 1).
    Returns [B, ...], or with `trajectory` every x0_hat as well.
    """
    indices = jnp.arange(len(known)) if indices is None else indices
    start = inpainting_start(noise.sample_keys(key, indices), table, schedule, known, mask)
    table = dataclasses.replace(table, C_start=jnp.zeros_like(table.C_start))
    wrapped = wrap(denoise, lambda denoise: replace_known(denoise, known, mask))
    out = sample(key, wrapped, table, known.shape[1:], indices=indices, x=start, trajectory=trajectory)
    x, film = out if trajectory else (out, None)
    x = jnp.where(mask, known, x)
    return (x, film) if trajectory else x


def inpainting_start(keys: jax.Array, table: Table, schedule: Schedule, known: jax.Array, mask: jax.Array) -> jax.Array:
    """The state that `inpaint` starts from, [B, ...]; keys [B]. It holds all the noise a table wants, that of its first
    stage too."""
    eps = noise.normal(keys, 0, known.shape[1:])
    alpha, sigma = schedule.alpha_sigma(jnp.asarray(table.t, jnp.float32)[0])
    return jnp.where(mask, alpha * known + sigma * eps, jnp.asarray(table.scale, jnp.float32) * eps)


def below(grid: Grid, t: float) -> Grid:
    """The grid's points below time t, with t itself as the first: for starting a solver midway."""
    rest = grid.t[grid.t < t]
    # No step much shorter than its neighbour: multistep solvers divide by their ratio.
    gap = rest[0] - rest[1] if len(rest) > 1 else 0.0
    if len(rest) and t - rest[0] < gap / 2:
        rest = rest[1:]
    alpha, sigma = grid.schedule.alpha_sigma(np.float64(t))
    kept = len(rest) + 1  # the landing point included
    return grid._replace(
        t=np.concatenate([[t], rest]),
        alpha=np.concatenate([[alpha], grid.alpha[-kept:]]),
        sigma=np.concatenate([[sigma], grid.sigma[-kept:]]),
    )


def from_strength(grid: Grid, strength: float) -> Grid:
    """The last `strength` (0, 1] of a grid's N steps, the first cut short where that is no whole number.

    In steps, as in diffusers, and not in time: half of an EDM schedule's time is nearly all of its noise.
    """
    if not 0 < strength <= 1:
        raise UserError(f"strength={strength:g} is outside (0, 1]: near 0 keeps the image, 1 draws a new one")
    n = len(grid.t)
    points = np.append(grid.t, min(grid.schedule.t_min, grid.t[-1]))
    return below(grid, float(np.interp((1 - strength) * n, np.arange(n + 1), points)))


def noise_time(schedule: Schedule, sigma: float) -> float:
    """The time at which x_t / alpha_t = x_0 + sigma n, for images in [-1, 1]."""
    least, most = (np.exp(-schedule.log_snr(np.float64(t)) / 2) for t in (schedule.t_min, schedule.t_max))
    if not max(least, 0.0) < sigma < most:
        raise UserError(
            f"sigma={sigma:g} is outside the schedule's noise levels, {least:.3g} to {most:.3g}, in units where "
            "pixels go from -1 to 1 (a standard deviation of s grey levels of 255 is s / 127.5)"
        )
    return float(schedule.inverse(np.float64(-2 * np.log(sigma))))


def ode_points(schedule: Schedule, steps: int, spacing: str | None = None) -> np.ndarray:
    """The times of encoding, increasing from the least noisy one to the grid's first, [M + 1] with M <= steps."""
    t = grids.make(schedule, steps, spacing).t
    least = max(schedule.t_min, float(schedule.inverse(np.float64(20.0))))  # a flow has no noise at 0
    return np.concatenate([[least], t[t > least][::-1]])


def _ode_table(schedule: Schedule, points: np.ndarray, solver: str) -> Table:
    solve = ODE_SOLVERS[choose("solver", solver, ODE_SOLVERS)]
    alpha, sigma = schedule.alpha_sigma(points)
    return solve(Grid(points[:-1], alpha, sigma, schedule, schedule.prior_scale))


def encoder(schedule: Schedule, steps: int = 50, solver: str = "ddim", spacing: str | None = None) -> Table:
    """A table from images to latents: a deterministic solver on increasing times.

    "ddim" is DDIM's inversion (Song, Meng & Ermon 2021, section 4.3; Dhariwal & Nichol 2021, app. F), first order;
    "heun" is second order at two evaluations a step, on grids without very long steps (log_snr, karras: the last of a
    cosine schedule's uniform steps is too long for it). It starts from alpha x_0 at the first of ode_points.
    """
    return _ode_table(schedule, ode_points(schedule, steps, spacing), solver)


def decoder(schedule: Schedule, steps: int = 50, solver: str = "ddim", spacing: str | None = None) -> Table:
    """The way back over the same points, of as many rows. It ends at alpha x_0 of the first of ode_points."""
    return _ode_table(schedule, ode_points(schedule, steps, spacing)[::-1], solver)


def slerp(a: jax.Array, b: jax.Array, w: jax.Array) -> jax.Array:
    """Spherical interpolation of samples a, b [B, ...] at w [W] in [0, 1]: [B, W, ...] (Shoemake 1985).

    The norm of Gaussian latents is nearly constant; on a straight line between two it would shrink by sqrt(2).
    """
    u, v = a.reshape(len(a), 1, -1), b.reshape(len(b), 1, -1)
    w = jnp.asarray(w, jnp.float32).reshape(1, -1, 1)
    norms = jnp.linalg.norm(u, axis=-1, keepdims=True) * jnp.linalg.norm(v, axis=-1, keepdims=True)
    cosine = jnp.sum(u * v, axis=-1, keepdims=True) / jnp.maximum(norms, 1e-12)
    angle = jnp.arccos(jnp.clip(cosine, -1.0, 1.0))
    near = jnp.sin(angle) < 1e-4  # parallel: a straight line
    sine = jnp.where(near, 1.0, jnp.sin(angle))
    first = jnp.where(near, 1 - w, jnp.sin((1 - w) * angle) / sine)
    second = jnp.where(near, w, jnp.sin(w * angle) / sine)
    return (first * u + second * v).reshape(len(a), w.shape[1], *a.shape[1:])


# With a Model. `sampling` is what Model.sample takes: labels, images, guidance, batch_size, mesh, progress.


def check_table(table: Any) -> None:
    """Raises UserError for solvers that are no tables: their start and their noise are their own affair."""
    if not isinstance(table, Table):
        raise UserError(f"solver {table.name!r} cannot edit images: use one that is a table, such as ddim or ddpm")


def _checked(model: Any, images: Any) -> np.ndarray:
    images = np.asarray(images, np.float32)
    if images.shape[1:] != model.shape or not len(images):
        raise UserError(f"images of shape {images.shape}: this model edits [N, {', '.join(map(str, model.shape))}]")
    return images


def _alpha_sigma(model: Any, t: float) -> tuple[float, float]:
    alpha, sigma = model.process.schedule.alpha_sigma(np.float64(t))
    return float(alpha), float(sigma)


def img2img(model: Any, key: jax.Array, images: Any, table: Table, **sampling) -> np.ndarray:
    """Images noised to the table's first time and denoised (SDEdit: Meng et al. 2022, algorithm 1).

    images: [N, *shape].  table: on a grid of from_strength. Returns [N, *shape].
    """
    check_table(table)
    images = _checked(model, images)
    alpha, sigma = _alpha_sigma(model, table.t[0])
    # All the noise of the table's first time, churn's included.
    table = dataclasses.replace(table, C_start=np.float64(sigma))
    return model.sample(key, table, len(images), start=alpha * images, **sampling)


def denoise(model: Any, key: jax.Array, noisy: Any, table: Table, **sampling) -> np.ndarray:
    """Draws of x_0 given noisy = x_0 + sigma n, [N, *shape], sigma being that of the table's first time.

    table: on the grid below(grid, noise_time(schedule, sigma)); of one row it gives the mean E[x_0 | noisy], the
    estimate of least squared error, instead of a draw.
    """
    check_table(table)
    noisy = _checked(model, noisy)
    return model.sample(key, table, len(noisy), start=_alpha_sigma(model, table.t[0])[0] * noisy, **sampling)


def encode(model: Any, images: Any, steps: int = 50, solver: str = "ddim", spacing: str | None = None, **sampling):
    """The latents of images, both [N, *shape]: standard normal (times the prior's scale) if the model is exact."""
    images = _checked(model, images)
    schedule = model.process.schedule
    alpha, _ = _alpha_sigma(model, ode_points(schedule, steps, spacing)[0])
    table = encoder(schedule, steps, solver, spacing)
    # Clipped predictions have no inverse.
    return model.sample(jax.random.key(0), table, len(images), start=alpha * images, clip=False, **sampling)


def decode(model: Any, latents: Any, steps: int = 50, solver: str = "ddim", spacing: str | None = None, **sampling):
    """The images of latents; with encode's options its inverse, up to the solver's error."""
    latents = _checked(model, latents)
    schedule = model.process.schedule
    alpha, _ = _alpha_sigma(model, ode_points(schedule, steps, spacing)[0])
    table = decoder(schedule, steps, solver, spacing)
    return model.sample(jax.random.key(0), table, len(latents), start=latents, clip=False, **sampling) / alpha


def interpolate(model: Any, a: Any, b: Any, frames: int = 8, *, labels: Any = None, **options) -> np.ndarray:
    """From images a to images b, both [N, *shape]: [N, frames, *shape], the first and last being reconstructions.

    labels: None, or (of a [N], of b [N]); a frame is decoded with the label of the nearer end. Strong guidance
    makes an encoding hard to invert. options: encode's and Model.sample's.
    """
    a, b = _checked(model, a), _checked(model, b)
    if len(a) != len(b) or frames < 2:
        raise UserError(f"interpolate: {len(a)} and {len(b)} images, frames={frames}; give pairs and at least 2")
    ends: Any = None if labels is None else np.concatenate([np.broadcast_to(l, len(a)) for l in labels])
    first, second = np.split(encode(model, np.concatenate([a, b]), labels=ends, **options), 2)
    w = np.linspace(0.0, 1.0, frames)
    between = np.asarray(slerp(jnp.asarray(first), jnp.asarray(second), jnp.asarray(w)))
    if labels is not None:
        of_a, of_b = np.split(ends, 2)
        ends = np.where(w[None] < 0.5, of_a[:, None], of_b[:, None]).reshape(-1)
    out = decode(model, between.reshape(-1, *model.shape), labels=ends, **options)
    return out.reshape(len(a), frames, *model.shape)
