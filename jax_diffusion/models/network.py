"""A network, as the rest of the library sees it: two plain functions.

Flax stays behind this boundary. Parameters are nested dicts of arrays with string keys; a module is merged with
them at trace time, which compiles to the same program and costs nothing per call.
"""

import inspect
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
from flax import nnx


class Network(NamedTuple):
    """init(key) -> params;  apply(params, x, c_noise, cond, key=None) -> prediction.

    x [B, ...] float32, c_noise [B] float32, cond a dict of [B, ...] arrays ("label", "image") or {}.
    key: for training: switches dropout on and decides it; None runs the network as for sampling.

    project(params) -> params: what training does to the parameters after every update (EDM2's forced weight
        normalisation); what `init` gives is projected already. None is nothing.
    log_variance(params, c_noise) -> [B]: the learned log of the expected loss (uncertainty.py); None is none.
    cached(params, x, c_noise, cond, kept, refresh, *, depth) -> (prediction, kept): the network whose inner layers,
        all but `depth` at either end, run where `refresh` is true and are else replaced by what was kept of them
        (caching.py). refresh: bool, Python's or a traced []; kept: None where refresh is True.
    depths: the largest `depth`; 0 where the network has no `cached`.
    """

    init: Callable[[jax.Array], Any]
    apply: Callable[..., jax.Array]
    num_classes: int = 0
    project: Callable[[Any], Any] | None = None
    log_variance: Callable[[Any, jax.Array], jax.Array] | None = None
    cached: Callable[..., tuple[jax.Array, Any]] | None = None
    depths: int = 0

    def parameter_count(self) -> int:
        """How many numbers are learned; nothing is allocated."""
        shapes = jax.eval_shape(self.init, jax.random.key(0))
        return sum(leaf.size for leaf in jax.tree.leaves(shapes))


def _string_keys(tree: Any) -> Any:
    if isinstance(tree, dict):
        return {str(k): _string_keys(v) for k, v in tree.items()}
    return tree


def _module_keys(tree: Any) -> Any:
    """The inverse: nnx.List elements are keyed by integers."""
    if isinstance(tree, dict):
        return {int(k) if k.isdigit() else k: _module_keys(v) for k, v in tree.items()}
    return tree


def defaults(build: Callable[..., Any]) -> dict[str, Any]:
    """The options of a function that makes a network, and their defaults."""
    return {p.name: p.default for p in inspect.signature(build).parameters.values() if p.kind is p.KEYWORD_ONLY}


class _Keys:
    """The keys that nnx.Rngs(params=key) gives, counted in Python: nnx's counter is traced, and takes time quadratic
    in the number of parameters (half a minute for ADM's)."""

    def __init__(self, key: jax.Array):
        self.key, self.count = key, 0

    def params(self) -> jax.Array:
        self.count += 1
        return jax.random.fold_in(self.key, self.count - 1)


def from_module(
    make: Callable[[nnx.Rngs], nnx.Module],
    num_classes: int = 0,
    project: Callable[[Any], Any] | None = None,
    depths: int = 0,
) -> Network:
    """The Network of a Flax NNX module called as `module(x, c_noise, cond, key)`.

    depths: above 0, the module also takes `depth` and `inner`: it calls inner(f, h) once for its inner layers f, all
        but `depth` at either end, and goes on from what that returns: f(h), or an earlier f(h).
    """
    graph, _ = nnx.split(nnx.eval_shape(lambda: make(_Keys(jax.random.key(0)))))  # type: ignore[arg-type]  # all of Rngs that modules use

    def init(key):
        params = _string_keys(nnx.to_pure_dict(nnx.state(make(_Keys(key)), nnx.Param)))  # type: ignore[arg-type]
        return params if project is None else project(params)

    def apply(params, x, c_noise, cond=None, key=None):
        module = nnx.merge(graph, _module_keys(params))
        return module(x, c_noise, cond or {}, key)

    def cached(params, x, c_noise, cond, kept, refresh, *, depth):
        new = []

        def inner(f, h):
            if isinstance(refresh, bool):
                new.append(f(h) if refresh else kept)
            else:
                # A real branch: what is not run costs no time. The predicate is one number for the whole batch.
                new.append(jax.lax.cond(refresh, f, lambda h: kept, h))
            return new[0]

        module = nnx.merge(graph, _module_keys(params))
        return module(x, c_noise, cond or {}, None, depth, inner), new[0]

    return Network(init, apply, num_classes, project, cached=cached if depths > 0 else None, depths=max(depths, 0))


def run_inner(f: Callable[[jax.Array], jax.Array], h: jax.Array) -> jax.Array:
    """The `inner` of a network without a cache, see from_module."""
    return f(h)
