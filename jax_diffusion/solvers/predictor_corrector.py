"""Predictor-corrector samplers (Song et al. 2021, algorithms 2-5) and annealed Langevin dynamics.

After each step of the predictor come Langevin steps that leave the marginal at that noise level alone, with

    score = (alpha D - x) / sigma^2,    x <- x + e score + sqrt(2 e) z,    e = 2 (r |z| / |score|)^2    (algorithm 4)

r being the signal-to-noise ratio `snr`. The norms are those of each sample: the authors' code averages them over the
batch, which makes a sample depend on its companions. In few dimensions, below some hundred, the norms of one sample
are too random for this; and steps of finite size inflate a variance by 1 / (1 - r^2) wherever it is. The authors'
factor alpha_i of e on VP (algorithm 5), one of a thousand steps' squared decay, is within 2 % of 1 and left out.

A corrector step is one more row and one more network evaluation, so all of it is one scan, the network traced once.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jax_diffusion.errors import UserError, choose
from jax_diffusion.guidance import Denoiser, unpack
from jax_diffusion.schedules.base import Array
from jax_diffusion.solvers import noise
from jax_diffusion.solvers.ddim import ddim
from jax_diffusion.solvers.ddpm import ddpm
from jax_diffusion.solvers.euler import euler
from jax_diffusion.solvers.table import Grid, rows

PREDICTORS: dict[str, Any] = {"ddpm": ddpm, "ddim": ddim, "euler": euler, "none": None}


@dataclasses.dataclass(frozen=True, eq=False)
class PredictorCorrector:
    """N rows, each x <- A x + B D + C xi, or a Langevin step where snr > 0. Float64 NumPy as made; a pytree."""

    t: Array  # [N]
    A: Array  # [N]
    B: Array  # [N]
    C: Array  # [N]
    snr: Array  # [N] 0 in the predictor's rows
    alpha: Array  # [N] at t
    sigma: Array  # [N]
    scale: Array  # []
    C_start: Array  # []
    name: str = ""

    def __len__(self) -> int:
        return self.t.shape[0]

    def run(self, keys: jax.Array, denoise: Denoiser, x: jax.Array, trajectory: bool = False):
        """See Solver.run."""
        names = ("t", "A", "B", "C", "snr", "alpha", "sigma")
        columns = {name: jnp.asarray(getattr(self, name), x.dtype) for name in names}
        axes = tuple(range(1, x.ndim))

        def row(carry, r):
            x, n = carry
            D = unpack(denoise(x, r["t"])).x0

            def predict():
                new = r["A"] * x + r["B"] * D
                # Deterministic rows draw no noise.
                return jax.lax.cond(
                    r["C"] > 0, lambda: new + r["C"] * noise.normal(keys, n, x.shape[1:]), lambda: new
                )  # fmt: skip

            def correct():
                score = (r["alpha"] * D - x) / r["sigma"] ** 2
                z = noise.normal(keys, n, x.shape[1:]).astype(x.dtype)
                squares = (jnp.sum(jnp.square(c), axis=axes, keepdims=True) for c in (z, score))
                of_z, of_score = squares
                e = 2 * r["snr"] ** 2 * of_z / jnp.maximum(of_score, jnp.finfo(x.dtype).tiny)
                return x + e * score + jnp.sqrt(2 * e) * z

            return (jax.lax.cond(r["snr"] > 0, correct, predict), n + 1), (D if trajectory else None)

        (x, _), x0_hats = jax.lax.scan(row, (x, jnp.int32(1)), columns)
        return x, x0_hats


jax.tree_util.register_dataclass(
    PredictorCorrector,
    ["t", "A", "B", "C", "snr", "alpha", "sigma", "scale", "C_start"],
    meta_fields=[],
    drop_fields=["name"],
)


def predictor_corrector(
    grid: Grid, predictor: str = "ddpm", snr: float = 0.16, n_corrector: int = 1
) -> PredictorCorrector:
    """N predictor steps with n_corrector Langevin steps between two of them: N + (N - 1) n_corrector evaluations.

    predictor: ddpm   ancestral sampling, of which reverse diffusion is a discretisation (app. F)
               ddim, euler   the probability-flow ODE
               none   annealed Langevin dynamics (Song & Ermon 2019, algorithm 1): corrector steps at every level of the
                      grid, N n_corrector + 1 evaluations
    snr:       r above: 0.16 is the paper's for VE on CIFAR-10, 0.01 to 0.17 its range (app. G).
    The last step denoises, as there: no noise is left in the sample.
    """
    choose("predictor", predictor, PREDICTORS)
    if not snr > 0:
        raise UserError(f"snr={snr:g} of solver 'predictor_corrector' must be above 0")
    if not isinstance(n_corrector, int) or n_corrector < 1:
        raise UserError(f"n_corrector={n_corrector} of solver 'predictor_corrector' must be a whole number, at least 1")
    n = len(grid.t)
    if predictor == "none":
        # A state is handed from level to level as it is; at the last, the prediction.
        A, B, C = np.ones(n), np.zeros(n), np.zeros(n)
        table = rows(grid.t, np.append(A[1:], 0.0), np.append(B[1:], 1.0), C, scale=grid.prior_scale, name="none")
    else:
        table = PREDICTORS[predictor](grid)
    where, kind = _order(n, n_corrector, predictor == "none")
    return PredictorCorrector(
        t=table.t[where],
        A=table.A[where],
        B=table.B[where, 0],
        C=table.C[where],
        snr=np.where(kind, float(snr), 0.0),
        alpha=grid.alpha[where],
        sigma=grid.sigma[where],
        scale=table.scale,
        C_start=table.C_start,
        name=f"predictor_corrector({predictor}, snr={snr:g}, n_corrector={n_corrector})",
    )


def _order(n: int, n_corrector: int, langevin_only: bool) -> tuple[np.ndarray, np.ndarray]:
    """(the grid's point, whether it is a corrector's) of each row. Nothing needs correcting at the start: it is drawn
    from the prior, as in algorithm 1; Langevin dynamics alone begins there."""
    where, kind = [], []
    for i in range(n):
        if i > 0 or langevin_only:
            where += [i] * n_corrector
            kind += [True] * n_corrector
        if not langevin_only or i == n - 1:
            where.append(i)
            kind.append(False)
    return np.array(where), np.array(kind)
