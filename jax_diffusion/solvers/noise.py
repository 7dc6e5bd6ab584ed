"""Randomness that belongs to a sample and not to its batch: sample i's noise depends on the key and i alone."""

import jax
import jax.numpy as jnp

from jax_diffusion.schedules.base import Schedule
from jax_diffusion.shapes import per_sample

# Draw 0 is the initial noise and draw n that of row n - 1; noise added to a state that is handed in is this one.
ON_A_GIVEN_STATE = 2**31 - 1


def sample_keys(key: jax.Array, indices: jax.Array) -> jax.Array:
    """One key per sample, from its index alone: sample i is the same image in any batch, on any devices."""
    return jax.vmap(lambda i: jax.random.fold_in(key, i))(indices)


def normal(keys: jax.Array, n: jax.Array | int, shape: tuple[int, ...]) -> jax.Array:
    """Draw number n of every sample, [B, *shape] float32."""
    return jax.vmap(lambda k: jax.random.normal(jax.random.fold_in(k, n), shape, jnp.float32))(keys)


def add_noise_to(schedule: Schedule, key: jax.Array, x0: jax.Array, t: float, indices: jax.Array) -> jax.Array:
    """x_t of images x0 [B, ...] at time t, for starting a solver midway; sample i's noise depends on i alone."""
    alpha, sigma = schedule.alpha_sigma(jnp.float32(t))
    noise = normal(sample_keys(key, indices), 0, x0.shape[1:])
    return per_sample(alpha, x0) * x0 + per_sample(sigma, x0) * noise
