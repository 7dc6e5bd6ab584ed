"""A solver is a table of numbers, and sampling is one scan over its rows.

Every solver in common use is linear in the state, the recent denoised predictions and the noise. One row is
one network evaluation:

    D_n     = denoise(x_n, t_n)
    h_n     = D_n + P_n x_n
    x_{n+1} = A_n x_n + sum_k B_{n,k} h_{n-k} + R_n (raw_n - D_n) + C_n xi_n

h_n is what is remembered: D_n, or with P_n = -1 / alpha_n a multiple of the noise prediction, for methods that combine
several of those. raw_n is the prediction before it was clipped, where the two differ. Old *states* need no memory: each
is linear in the state after it and in predictions that are remembered (solvers/steps.py solves for them), which is
how Runge-Kutta methods and predictor-correctors fit. Tables are made in NumPy float64. The network is traced
once whatever the order, and another solver, eta or grid with as many rows is new data for the same program.
"""

import dataclasses
import pathlib
import zipfile
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jax_diffusion.errors import UserError
from jax_diffusion.guidance import Denoiser, Remembering, unpack
from jax_diffusion.schedules.base import Array, Schedule
from jax_diffusion.solvers import noise


class Grid(NamedTuple):
    """The N+1 points a solver visits, float64. Point N is where it lands; steps are explicit (n, n+1) pairs."""

    t: np.ndarray  # [N] what the network is conditioned on; the landing point needs none
    alpha: np.ndarray  # [N+1]
    sigma: np.ndarray  # [N+1]
    schedule: Schedule
    prior_scale: float  # standard deviation of x at point 0

    @property
    def log_snr(self) -> np.ndarray:
        """lambda = log(alpha^2 / sigma^2) at every point, [N+1]; infinite where it lands on sigma = 0."""
        with np.errstate(divide="ignore"):
            return 2 * (np.log(self.alpha) - np.log(self.sigma))

    @property
    def half_log_snr(self) -> np.ndarray:
        """log(alpha / sigma), [N+1]: what the DPM-Solver papers call lambda."""
        return self.log_snr / 2

    def between(self, half_log_snr: float) -> tuple[float, float, float]:
        """(t, alpha, sigma) of the point with that log(alpha / sigma), for stages inside a step."""
        t = self.schedule.inverse(np.float64(2 * half_log_snr))
        alpha, sigma = self.schedule.alpha_sigma(t)
        return float(t), float(alpha), float(sigma)

    @property
    def has_pure_noise(self) -> bool:
        """Whether alpha reaches zero, where sigma / alpha is infinite: on flows, and with zero terminal SNR."""
        return self.schedule.scaling == "flow" or bool(np.any(self.alpha == 0))

    def frame(self, alpha, sigma):
        """(u, s): a frame y = x / s in which a sample with fixed x_0 and eps moves on a straight line in u.

        There dy/du = (y - D) / u whatever the schedule. u = sigma / alpha, s = alpha is EDM's frame (Karras et
        al. 2022, eq. 4); where alpha reaches zero it is a flow's, u = sigma / (alpha + sigma), s = alpha + sigma.
        """
        if self.has_pure_noise:
            return sigma / (alpha + sigma), alpha + sigma
        return sigma / alpha, alpha

    @property
    def straight(self) -> tuple[np.ndarray, np.ndarray]:
        """The frame at every point, each [N+1]."""
        return self.frame(self.alpha, self.sigma)


@dataclasses.dataclass(frozen=True, eq=False)
class Table:
    """N rows of a solver with a memory of K predictions. Float64 NumPy as made; a pytree, so jit takes it."""

    t: Array  # [N] the time of each evaluation
    A: Array  # [N]
    B: Array  # [N, K]
    P: Array  # [N] share of the state in what is remembered; 0 where that is the denoised prediction
    R: Array  # [N] weight of raw - D; 0 where the noise is derived from the clipped prediction
    C: Array  # [N] standard deviation of the added noise; 0 in the last row
    C_max: Array  # [N] the same at the upper end of a learned variance; = C where nothing is learned
    C_start: Array  # [] standard deviation of the noise that a state handed in is given (churn, else 0)
    scale: Array  # [] standard deviation of the initial noise, C_start included
    name: str = ""

    def __len__(self) -> int:
        return self.t.shape[0]

    @property
    def memory(self) -> int:
        """K, how many predictions a row may use."""
        return self.B.shape[1]

    @property
    def used_memory(self) -> int:
        """How many predictions the rows do use."""
        return max((k + 1 for k in range(self.memory) if np.any(self.B[:, k])), default=1)

    def __str__(self) -> str:
        used = self.used_memory
        columns = {"t": self.t, "A": self.A, **{f"B{k}": self.B[:, k] for k in range(used)}}
        columns |= {c: getattr(self, c) for c in ("P", "R", "C") if np.any(getattr(self, c))}
        lines = [f"{self.name}: {len(self)} evaluations, memory {used}, start N(0, {float(self.scale):.5g}^2)"]
        lines.append(" ".join(f"{h:>11}" for h in ["row", *columns]))
        for n in range(len(self)):
            lines.append(f"{n:>11} " + " ".join(f"{float(c[n]):>11.6g}" for c in columns.values()))
        return "\n".join(lines)

    def plot(self):
        """A matplotlib Figure of the times visited and of the coefficients (solvers/plot.py)."""
        from jax_diffusion.solvers.plot import plot

        return plot(self)

    def with_memory(self, memory: int) -> "Table":
        """The same solver with room for so many predictions, at least those it uses. Tables of equal shapes share a
        program."""
        B = self.B[:, : max(memory, self.used_memory)]
        return dataclasses.replace(self, B=np.pad(B, ((0, 0), (0, max(0, memory - B.shape[1])))))

    def filled(self, rows: int) -> "Table":
        """These rows and copies of the last, so many in all, for `some`: tables of equal shapes share a program."""
        more = rows - len(self)
        columns = {c: np.asarray(getattr(self, c)) for c in ("t", "A", "B", "P", "R", "C", "C_max")}
        return dataclasses.replace(self, **{k: np.concatenate([c, *[c[-1:]] * more]) for k, c in columns.items()})  # type: ignore[arg-type]

    def save(self, path: str | pathlib.Path) -> None:
        """Writes all columns to an .npz file, which solvers.load reads."""
        path = pathlib.Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        fields = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        with path.open("wb") as file:  # np.savez would add an ending to a path
            np.savez(file, **fields)

    def run(
        self,
        keys: jax.Array | None,
        denoise: Denoiser | Remembering,
        x: jax.Array,
        trajectory: bool = False,
        *,
        remat: bool = False,
        unroll: int = 1,
    ):
        """From the state x [B, ...] down all rows: (x_0, every D [N, B, ...] or None).

        keys: None where no row adds noise.  remat: a gradient keeps the activations of one row at a time.
        unroll: rows in one turn of the loop, as in lax.scan.
        """

        def step(carry, r):
            carry, x0_hat = _row(carry, r, denoise, keys)
            return carry, (x0_hat if trajectory else None)

        start, by_row = self.begin(denoise, x), self._by_row(x.dtype)
        (x, *_), x0_hats = jax.lax.scan(jax.checkpoint(step) if remat else step, start, by_row, unroll=unroll)
        return x, x0_hats

    def begin(self, denoise: Denoiser | Remembering | None, x: jax.Array) -> tuple:
        """What goes from row to row: the state x [B, ...], what is remembered, the number of the next draw (0 was the
        initial noise) and the state of a denoiser that has one."""
        state = denoise.start(x) if isinstance(denoise, Remembering) else None
        return x, [jnp.zeros_like(x)] * self.memory, jnp.int32(1), state

    def some(self, keys: jax.Array | None, denoise: Denoiser | Remembering, carry: tuple, count: jax.Array):
        """The next `count` rows (traced): (carry, the last one's D [B, ...]). The first carry is `begin`'s; in how many
        calls the rows are run changes nothing."""
        x = carry[0]
        by_row = self._by_row(x.dtype)

        def step(_, so_far):
            carry, _ = so_far
            n = carry[2] - 1  # rows that are done
            r = jax.tree.map(lambda c: jax.lax.dynamic_index_in_dim(c, n, keepdims=False), by_row)
            return _row(carry, r, denoise, keys)

        return jax.lax.fori_loop(0, count, step, (carry, jnp.zeros_like(x)))

    def _by_row(self, dtype) -> "Table":
        """The columns as arrays; what the table has one of, once a row."""
        n = len(self)
        return jax.tree.map(lambda c: jnp.broadcast_to(jnp.asarray(c, dtype), (n, *jnp.shape(c)[1:])), self)


def _row(carry: tuple, r: Table, denoise: Denoiser | Remembering, keys: Any):
    """One row: ((x_n, D_{n-1}.., n) -> (x_{n+1}, D_n.., n+1), D_n). r: its numbers; keys: None adds no noise.

    The carry's last is the state of a denoiser that has one, else None.
    """
    x, history, n, state = carry
    d = unpack((denoise.given(state) if isinstance(denoise, Remembering) else denoise)(x, r.t))
    history = [d.x0 + r.P * x, *history][: len(history)]
    new = r.A * x
    for k, h in enumerate(history):
        new = new + r.B[k] * h
    if d.raw is not None:
        new = new + r.R * (d.raw - d.x0)

    def add_noise(new):
        std = r.C
        if d.v is not None:
            std = jnp.exp((1 - d.v) * jnp.log(r.C) + d.v * jnp.log(r.C_max))
        return new + std * noise.normal(keys, n, x.shape[1:])

    if keys is not None:
        # Deterministic rows draw no noise: a real branch, since the predicate is one number per row.
        new = jax.lax.cond(r.C > 0, add_noise, lambda new: new, new)
    return (new, history, n + 1, d.state), d.x0


# The name is not part of the pytree: two solvers of as many rows are one compiled program.
jax.tree_util.register_dataclass(
    Table, ["t", "A", "B", "P", "R", "C", "C_max", "C_start", "scale"], meta_fields=[], drop_fields=["name"]
)


def rows(t, A, B, C=None, R=None, P=None, *, scale: float, name: str, C_max=None, C_start: float = 0.0) -> Table:
    """A Table from columns of N numbers (B: N, or N times K); no noise and no raw prediction by default."""
    n = len(t)

    def column(c):
        return np.zeros(n) if c is None else np.asarray(c, np.float64)

    B, C = np.asarray(B, np.float64), column(C)
    table = Table(
        t=np.asarray(t, np.float64),
        A=column(A),
        B=B if B.ndim == 2 else B[:, None],
        P=column(P),
        R=column(R),
        C=C,
        C_max=C if C_max is None else column(C_max),
        C_start=np.float64(C_start),
        scale=np.float64(scale),
        name=name,
    )
    for field in ("t", "A", "B", "P", "R", "C", "C_max"):
        values = getattr(table, field)
        assert len(values) == n and np.all(np.isfinite(values)), f"{name}: column {field} is not finite"
    return table


def load(path: str | pathlib.Path) -> Table:
    """The table that Table.save wrote. Raises UserError where the file holds none."""
    names = [f.name for f in dataclasses.fields(Table)]
    try:
        with np.load(path) as arrays:
            if missing := set(names) - set(arrays):
                raise ValueError(f"no {', '.join(sorted(missing))}")
            columns = {name: arrays[name] for name in names}
    except FileNotFoundError:
        raise UserError(f"table {path}: there is no such file; `jax-diffusion optimize` makes one") from None
    except (ValueError, OSError, EOFError, TypeError, AttributeError, zipfile.BadZipFile) as e:
        raise UserError(f"table {path} is no table of a solver ({e}); `jax-diffusion optimize` makes one") from None
    columns["name"] = str(columns["name"])
    return Table(**columns)
