"""Deep features kept from one evaluation to the next: most evaluations run the outer layers of the network alone.

Along the reverse process the deep layers' features change slowly. With the network as outer layers around inner ones f,

    prediction_n = outer(x_n, t_n, k_n),    k_n = f(x_n, t_n) at a refresh, else k_{n-1},                          (1)

    U-Net  k is what enters the last `depth` modules of the way up; outside are these, and the modules on the way down
           that they have their skips from (DeepCache: Ma et al. 2024, section 3.2, eq. 5-7).
    DiT    k is what the inner blocks add to the stream, all but the first and the last `depth` (Delta-DiT: Chen et al.
           2024, section 3.2, with both ends kept exact; FORA: Selvaraju et al. 2024, keeps each layer's share).

Time and label reach the outer layers at every evaluation. When to refresh is data: it passes through the one loop over
the solver's rows as the features do, and a real branch leaves the inner layers out.
"""

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jax_diffusion.errors import UserError
from jax_diffusion.guidance import Denoiser, Remembering, unpack
from jax_diffusion.models import Network
from jax_diffusion.solvers import Table


@dataclasses.dataclass(frozen=True)
class Cache:
    """When the inner layers are run, and which they are. Evaluation 0 always refreshes; every=1 caches nothing."""

    every: int = 3  # evaluations to one refresh
    depth: int = 1  # layers at either end that always run
    power: float = 1.0  # above 1: refreshes lie closer around `center`, farther apart elsewhere
    center: float = 0.0  # of the refreshes, as a share of the evaluations: 0 the first, 1 the last
    refresh: tuple[int, ...] | None = None  # these evaluations in place of all that

    def __post_init__(self):
        if self.every < 1 or self.depth < 1:
            raise UserError(f"cache={self.every}, depth={self.depth}: both must be at least 1, for instance 3 and 1")
        if self.power < 1 or not 0 <= self.center <= 1:
            raise UserError(f"cache: power={self.power:g} must be at least 1, and center={self.center:g} in [0, 1]")
        if self.refresh is not None and self.power > 1:
            raise UserError(f"cache: power={self.power:g} chooses the refreshes, and they are given: leave one out")

    def refreshes(self, evaluations: int) -> np.ndarray:
        """Whether each of N evaluations refreshes, bool [N].

        With a power p, the refreshes are c + sign(l) |l|^p for l at even distances (DeepCache, section 3.3, eq. 8-9;
        l runs from -c^(1/p) to (N - c)^(1/p)). Those that fall together are one.
        """
        if self.refresh is not None:
            if outside := [i for i in self.refresh if not 0 <= i < evaluations]:
                raise UserError(f"cache: evaluation {outside[0]} is none of 0 to {evaluations - 1}")
            at = np.array([0, *self.refresh])
        elif self.power == 1:
            at = np.arange(0, evaluations, self.every)
        else:
            c = self.center * evaluations
            ends = (-(c ** (1 / self.power)), (evaluations - c) ** (1 / self.power))
            l = np.linspace(*ends, math.ceil(evaluations / self.every) + 1)[:-1]
            at = np.floor(c + np.sign(l) * np.abs(l) ** self.power + 1e-9).astype(int)
        refreshes = np.zeros(evaluations, bool)
        refreshes[at] = True
        return refreshes


def check(network: Network, depth: int) -> None:
    """Raises UserError unless the network has inner layers between `depth` outer ones at either end."""
    if network.cached is None:
        raise UserError("cache: this network keeps no features between evaluations; `unet` and `dit` do, with two or "
                        "more levels and three or more blocks")  # fmt: skip
    if depth > network.depths:
        raise UserError(f"cache: depth={depth} leaves nothing to keep in this network: use 1 to {network.depths}")


def request(cache: Cache | int | None, network: Network, table: Any, shared: dict) -> tuple[np.ndarray | None, int]:
    """(refreshes [N], depth) for what Model.sample is asked for. shared: of the guidance, see guidance/model.py."""
    if cache is None:
        return None, 0
    cache = Cache(every=cache) if isinstance(cache, int) else cache
    check(network, cache.depth)
    if "weak" in shared or ("settings" in shared and shared["settings"].interval is not None):
        raise UserError(
            "cache: features are kept of one network at every evaluation; leave out the guidance interval and "
            "autoguide, or the cache"
        )
    if not isinstance(table, Table):
        raise UserError(f"cache: solver {table.name!r} has no fixed rows; use one that is a table, like ddim")
    return cache.refreshes(len(table)), cache.depth


def remembering(
    network: Network, denoiser: Callable[[Callable], Denoiser], refreshes: jax.Array, depth: int
) -> Remembering:
    """The denoiser that `denoiser` makes of the network's `apply`, with the features kept as its state.

    denoiser: must call what it is given once in an evaluation, as classifier-free guidance does.
    refreshes: bool [N], traced or not.
    """

    def given(state):
        def apply(params, x, c_noise, cond):
            kept, n, refresh = (None, jnp.int32(-1), True) if state is None else (*state, refreshes[state[1]])
            assert network.cached is not None  # `check` has refused others
            prediction, kept = network.cached(params, x, c_noise, cond, kept, refresh, depth=depth)
            return prediction, (kept, n + 1)

        return denoiser(apply)

    def start(x):
        state = jax.eval_shape(lambda x: unpack(given(None)(x, jnp.ones((), x.dtype))).state, x)
        return jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), state)

    return Remembering(start, given)


def cost(network: Network, params: Any, inputs: tuple, depth: int) -> tuple[float, float]:
    """FLOPs of an evaluation that refreshes and of one that does not.

    params, inputs: arrays or their shapes; inputs are the network's (x, c_noise, cond).
    """
    from jax_diffusion.train import flops

    check(network, depth)

    def evaluate(params, inputs, kept, refresh):
        assert network.cached is not None
        return network.cached(params, *inputs, kept, refresh, depth=depth)

    kept = jax.eval_shape(lambda p, i: evaluate(p, i, None, True)[1], params, inputs)
    full, outer = (
        flops.count(jax.make_jaxpr(lambda p, i, k, r=r: evaluate(p, i, k, r)[0])(params, inputs, kept))
        for r in (True, False)
    )
    return full, outer


def predicted_speedup(network: Network, params: Any, inputs: tuple, cache: Cache, evaluations: int) -> float:
    """FLOPs of so many evaluations without a cache to those with it; arguments as for `cost`.

    An upper bound of what the clock says: solver, norms and the moving of features are not in it.
    """
    full, outer = cost(network, params, inputs, cache.depth)
    refreshed = int(cache.refreshes(evaluations).sum())
    return evaluations * full / (refreshed * full + (evaluations - refreshed) * outer)
