"""A network, as the rest of the library sees it: two plain functions.

Flax stays behind this boundary. Parameters are nested dicts of arrays with string keys; a module is merged with
them at trace time, which compiles to the same program and costs nothing per call.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
from flax import nnx


class Network(NamedTuple):
    """init(key) -> params;  apply(params, x, c_noise, cond, key=None) -> prediction.

    x [B, ...] float32, c_noise [B] float32, cond a dict of [B, ...] arrays ("label", "image") or {}.
    key: switches dropout on and decides it; None runs the network as for sampling.
    """

    init: Callable[[jax.Array], Any]
    apply: Callable[..., jax.Array]
    num_classes: int = 0

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


def from_module(make: Callable[[nnx.Rngs], nnx.Module], num_classes: int = 0) -> Network:
    """The Network of a Flax NNX module called as `module(x, c_noise, cond, key)`."""
    graph, _ = nnx.split(nnx.eval_shape(lambda: make(nnx.Rngs(0))))

    def init(key):
        return _string_keys(nnx.to_pure_dict(nnx.state(make(nnx.Rngs(params=key)), nnx.Param)))

    def apply(params, x, c_noise, cond=None, key=None):
        module = nnx.merge(graph, _module_keys(params))
        return module(x, c_noise, cond or {}, key)

    return Network(init, apply, num_classes)
