"""What several files here need: exact Gaussian denoisers in float64, and the noise that `sample` draws."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from jax_diffusion.schedules import SCHEDULES
from jax_diffusion.solvers import grids, sample
from jax_diffusion.solvers.table import rows

NAMES = sorted(set(SCHEDULES) - {"betas"})  # which has no default


def inner_times(schedule, n=9):
    """Times strictly inside [t_min, t_max], between the integers too on discrete schedules; float64."""
    u = np.linspace(0.03, 0.97, n)
    return schedule.t_min + u * (schedule.t_max - schedule.t_min)


def discrete_log_snr(betas):
    log_bar = np.cumsum(np.log1p(-np.asarray(betas, np.float64)))
    return log_bar - np.log(-np.expm1(log_bar))


def alpha_sigma(name):
    """t -> (alpha, sigma) in t's own precision, written from the papers and not from the package."""
    if name == "edm":
        return lambda t: (jnp.ones_like(t), t)
    if name == "flow":
        return lambda t: (1 - t, t)
    if name == "vp":

        def vp(t):
            b = 0.1 * t + 0.5 * 19.9 * t * t
            return jnp.exp(-b / 2), jnp.sqrt(-jnp.expm1(-b))

        return vp
    assert name == "linear"
    table = discrete_log_snr(np.linspace(1e-4, 0.02, 1000))

    def linear(t):
        l = jnp.interp(t, jnp.arange(1000, dtype=t.dtype), jnp.asarray(table, t.dtype))
        return jnp.sqrt(jax.nn.sigmoid(l)), jnp.sqrt(jax.nn.sigmoid(-l))

    return linear


def gaussian_denoiser(name, mu, s2):
    """E[x_0 | x_t] for data N(mu, s2), elementwise."""
    of = alpha_sigma(name)

    def denoise(x, t):
        a, s = of(t)
        return mu + a * s2 * (x - a * mu) / (a * a * s2 + s * s)

    return denoise


def window(schedule, t):
    """The grid through times t [N+1] that lands on the last of them instead of on sigma = 0."""
    grid = grids.from_times(schedule, t)
    return grid._replace(t=grid.t[:-1], alpha=grid.alpha[:-1], sigma=grid.sigma[:-1])


@functools.partial(jax.jit, static_argnums=(2, 3))
def draws(key, indices, n, shape):
    """The noises xi_1 .. xi_n of `sample`: with A = B = 0 and C = 1 the state after a row is its noise."""
    zero = np.zeros(n + 1)
    table = rows(np.arange(n + 1.0), A=zero, B=zero, C=zero + 1, scale=1.0, name="noise")
    return sample(key, lambda x, t: x, table, shape, indices=indices, trajectory=True)[1][1:]


def moments(table, grid, mu, s2, exact_start=True):
    """Mean and variance of what a table makes of data N(mu, s2), exactly: it is linear, and so is E[x_0 | x_t].

    No samples are drawn: mean and covariance of (x, the remembered predictions) go through the rows in float64.
    exact_start: from the true marginal at the grid's first point, with C_start; else from N(0, scale^2) as `sample`.
    """
    K = table.memory
    m, V = np.zeros(K + 1), np.zeros((K + 1, K + 1))  # of x and K predictions, the newest first
    V[0, 0] = table.scale**2
    if exact_start:
        a, s = grid.alpha[0], grid.sigma[0]
        m[0], V[0, 0] = a * mu, a**2 * s2 + s**2 + table.C_start**2
    for n in range(len(table)):
        a, s = grid.schedule.alpha_sigma(np.float64(table.t[n]))
        slope = a * s2 / (a**2 * s2 + s**2)
        see = np.zeros((K + 1, K + 1))  # (x, D_1 .. D_K) -> (x, D, D_1 .. D_{K-1})
        see[0, 0], see[1, 0] = 1, slope + table.P[n]
        see[2:, 1:-1] = np.eye(K - 1)
        move = np.eye(K + 1)
        move[0] = table.A[n], *table.B[n]
        b = np.zeros(K + 1)
        b[1] = (1 - slope * a) * mu
        m = move @ (see @ m + b)
        V = (move @ see) @ V @ (move @ see).T
        V[0, 0] += table.C[n] ** 2
    return m[0], V[0, 0]
