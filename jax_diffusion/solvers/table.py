"""A solver is a table of numbers, and sampling is one scan over its rows.

Every solver in common use is linear in the state, the recent denoised predictions and the noise. One row is
one network evaluation:

    D_n     = denoise(x_n, t_n)
    h_n     = P_n x_n + Q_n D_n                        what is remembered
    x_{n+1} = A_n x_n + sum_k B_{n,k} h_{n-k} + C_n xi_n

Solvers write their rows in NumPy float64, as their papers do. The network is traced once whatever the order,
and another solver, eta or grid with as many rows is new data for the same compiled program.
"""

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jax_diffusion.guidance import Denoiser
from jax_diffusion.schedules.base import Schedule
from jax_diffusion.shapes import per_sample


class Grid(NamedTuple):
    """The N+1 points a solver visits, float64. Point N is where it lands; steps are explicit (n, n+1) pairs."""

    t: np.ndarray  # [N] what the network is conditioned on; the landing point needs none
    alpha: np.ndarray  # [N+1]
    sigma: np.ndarray  # [N+1]
    scaling: str  # of the schedule: vp, subvp, ve or flow
    prior_scale: float  # standard deviation of x at point 0

    @property
    def log_snr(self) -> np.ndarray:
        with np.errstate(divide="ignore"):
            return 2 * (np.log(self.alpha) - np.log(self.sigma))

    @property
    def straight(self) -> tuple[np.ndarray, np.ndarray]:
        """(u, s): a frame y = x / s in which a sample with fixed x_0 and eps moves on a straight line in u.

        There dy/du = (y - D) / u whatever the schedule. u = sigma / alpha, s = alpha is EDM's frame (Karras et
        al. 2022, eq. 4); flows, whose alpha reaches zero, have u = sigma / (alpha + sigma), s = alpha + sigma.
        """
        if self.scaling == "flow":
            return self.sigma / (self.alpha + self.sigma), self.alpha + self.sigma
        return self.sigma / self.alpha, self.alpha


@dataclasses.dataclass(frozen=True, eq=False)
class Table:
    """N rows of a solver with a memory of K predictions. Float64 NumPy as made; a pytree, so jit takes it."""

    t: np.ndarray  # [N] the time of each evaluation
    P: np.ndarray  # [N]
    Q: np.ndarray  # [N]
    A: np.ndarray  # [N]
    B: np.ndarray  # [N, K]
    C: np.ndarray  # [N] standard deviation of the added noise; 0 in the last row
    C_max: np.ndarray  # [N] the same at the upper end of a learned variance; = C where nothing is learned
    scale: np.ndarray  # [] standard deviation of the initial noise
    name: str = ""

    def __len__(self) -> int:
        return self.t.shape[0]

    def __str__(self) -> str:
        memory = self.B.shape[1]
        head = ["row", "t", "P", "Q", "A", *(f"B{k}" for k in range(memory)), "C"]
        lines = [f"{self.name}: {len(self)} evaluations, memory {memory}, start N(0, {float(self.scale):.5g}^2)"]
        lines.append(" ".join(f"{h:>11}" for h in head))
        for n in range(len(self)):
            row = [self.t[n], self.P[n], self.Q[n], self.A[n], *self.B[n], self.C[n]]
            lines.append(f"{n:>11} " + " ".join(f"{float(v):>11.6g}" for v in row))
        return "\n".join(lines)


# The name is not part of the pytree: two solvers of as many rows are one compiled program.
jax.tree_util.register_dataclass(
    Table, ["t", "P", "Q", "A", "B", "C", "C_max", "scale"], meta_fields=[], drop_fields=["name"]
)


def rows(grid_t, A, B, C=None, P=None, Q=None, *, scale: float, name: str, C_max=None) -> Table:
    """A Table from columns, with the usual defaults: remember D itself (P = 0, Q = 1), add no noise."""
    n = len(grid_t)

    def column(c, default):
        return np.full(n, default, np.float64) if c is None else np.asarray(c, np.float64)

    B, C = np.asarray(B, np.float64), column(C, 0.0)
    table = Table(
        t=np.asarray(grid_t, np.float64),
        P=column(P, 0.0),
        Q=column(Q, 1.0),
        A=column(A, 0.0),
        B=B if B.ndim == 2 else B[:, None],
        C=C,
        C_max=C if C_max is None else np.asarray(C_max, np.float64),
        scale=np.float64(scale),
        name=name,
    )
    for field in ("t", "P", "Q", "A", "B", "C"):
        values = getattr(table, field)
        assert len(values) == n and np.all(np.isfinite(values)), f"{name}: column {field} is not finite"
    return table


def from_straight(table: Table, scale_before: np.ndarray, scale_after: np.ndarray) -> Table:
    """A table written for y = x / s, brought back to x. `scale_*` [N] are s at each row's two ends."""
    return dataclasses.replace(
        table,
        P=table.P / scale_before,
        A=table.A * scale_after / scale_before,
        B=table.B * scale_after[:, None],
        C=table.C * scale_after,
        C_max=table.C_max * scale_after,
    )


def sample_keys(key: jax.Array, indices: jax.Array) -> jax.Array:
    """One key per sample, from its index alone: sample i is the same image in any batch, on any devices."""
    return jax.vmap(lambda i: jax.random.fold_in(key, i))(indices)


def _normal(keys: jax.Array, n: jax.Array | int, shape: tuple[int, ...]) -> jax.Array:
    return jax.vmap(lambda k: jax.random.normal(jax.random.fold_in(k, n), shape, jnp.float32))(keys)


def sample(
    key: jax.Array,
    denoise: Denoiser,
    table: Table,
    shape: tuple[int, ...],
    *,
    indices: jax.Array | None = None,
    x: jax.Array | None = None,
    trajectory: bool = False,
):
    """Runs the table: one compiled loop, the network traced once.

    Args:
      key:        decides all randomness, together with a sample's index.
      denoise:    (x_t [B, ...], t []) -> x0_hat [B, ...], or (x0_hat, v) with a learned variance.
      table:      the solver; see solvers.make.
      shape:      of one sample, for instance (32, 32, 3).
      indices:    [B] int, which samples of the seed to draw; None is number 0, or 0..B-1 where x is given.
      x:          [B, *shape] state to start from instead of noise (partial noising, inversion).
      trajectory: also return every x0_hat, [N, B, *shape]; costs that memory.

    Returns x_0 [B, *shape] float32, or (x_0, trajectory).
    """
    indices = jnp.arange(1 if x is None else len(x)) if indices is None else jnp.asarray(indices)
    keys = sample_keys(key, indices)
    dtype = jnp.float32 if x is None else x.dtype
    table = jax.tree.map(lambda c: jnp.asarray(c, dtype), table)
    if x is None:
        x = table.scale * _normal(keys, 0, tuple(shape))
    memory = table.B.shape[1]

    def row(carry, r):
        x, history, n = carry
        out = denoise(x, r.t)
        x0_hat, v = out if isinstance(out, tuple) else (out, None)
        history = [r.P * x + r.Q * x0_hat, *history][:memory]
        new = r.A * x
        for k, h in enumerate(history):
            new = new + r.B[k] * h

        def add_noise(new):
            std = r.C
            if v is not None:
                std = jnp.exp((1 - v) * jnp.log(r.C) + v * jnp.log(r.C_max))
            return new + std * _normal(keys, n, x.shape[1:])

        # Deterministic rows draw no noise: a real branch, since the predicate is one number per row.
        new = jax.lax.cond(r.C > 0, add_noise, lambda new: new, new)
        return (new, history, n + 1), (x0_hat if trajectory else None)

    scanned = dataclasses.replace(table, scale=jnp.broadcast_to(table.scale, table.t.shape))
    # Draw 0 was the initial noise.
    start = (x, [jnp.zeros_like(x)] * memory, jnp.int32(1))
    (x, _, _), x0_hats = jax.lax.scan(row, start, scanned)
    return (x, x0_hats) if trajectory else x


def add_noise_to(schedule: Schedule, key: jax.Array, x0: jax.Array, t: float, indices: jax.Array) -> jax.Array:
    """x_t of images x0 [B, ...] at time t, for starting a table midway; sample i's noise depends on i alone."""
    alpha, sigma = schedule.alpha_sigma(jnp.float32(t))
    noise = _normal(sample_keys(key, indices), 0, x0.shape[1:])
    return per_sample(alpha, x0) * x0 + per_sample(sigma, x0) * noise
