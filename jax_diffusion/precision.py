"""Parameters stored in the type that a network computes in.

A mixed-precision network keeps float32 parameters and rounds those of its matmuls and convolutions to bfloat16 where it
uses them. For sampling they may be rounded once instead: half the memory and half the bytes read at each evaluation,
and the same numbers, since rounding twice is rounding once. Which parameters these are is read off the traced network:
those that are only ever converted. Norms, time embeddings and label tables are used in float32, and stay.
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.extend.core import ClosedJaxpr, Jaxpr, Var

# They move numbers without looking at them, so rounding may come before.
_MOVES = {
    "broadcast_in_dim", "copy", "dynamic_slice", "expand_dims", "gather", "reshape", "rev", "slice", "split", "squeeze",
    "transpose",
}  # fmt: skip


def rounded(apply: Callable, params: Any, inputs: Sequence[Any], dtype: Any) -> Any:
    """params with the leaves that `apply` rounds to `dtype` rounded: the same output, to the last bit.

    apply(params, *inputs) is traced, not run.
    """
    tree: Any
    leaves, tree = jax.tree.flatten(params)
    jaxpr = jax.make_jaxpr(lambda leaves, inputs: apply(tree.unflatten(leaves), *inputs))(leaves, tuple(inputs))
    which = only_converted(jaxpr, dtype)[: len(leaves)]

    @jax.jit
    def cast(leaves):
        return [leaf.astype(dtype) if yes else leaf for leaf, yes in zip(leaves, which, strict=True)]

    return tree.unflatten(cast(leaves))


def only_converted(jaxpr: Jaxpr | ClosedJaxpr, dtype: Any) -> list[bool]:
    """Of each input, whether all that is done to it is a conversion to `dtype`, and is done."""
    if isinstance(jaxpr, ClosedJaxpr):
        jaxpr = jaxpr.jaxpr
    root = {v: i for i, v in enumerate(jaxpr.invars)}  # of each variable that holds numbers of an input: which
    converted, used = [False] * len(root), [False] * len(root)
    for eqn in jaxpr.eqns:
        inner = _inner(eqn, dtype)
        for position, v in enumerate(eqn.invars):
            i = root.get(v) if isinstance(v, Var) else None
            if i is None:
                continue
            if eqn.primitive.name == "convert_element_type" and eqn.params["new_dtype"] == jnp.dtype(dtype):
                converted[i] = True
            elif eqn.primitive.name in _MOVES and position == 0:
                root |= dict.fromkeys(eqn.outvars, i)
            elif inner is not None and inner[position]:
                converted[i] = True
            else:
                used[i] = True
    for v in jaxpr.outvars:
        if isinstance(v, Var) and v in root:
            used[root[v]] = True
    return [c and not u for c, u in zip(converted, used, strict=True)]


def _inner(eqn: Any, dtype: Any) -> list[bool] | None:
    """only_converted of the function that an equation calls, by the equation's own inputs; None where it calls none."""
    name, params = eqn.primitive.name, eqn.params
    if name == "cond":
        branches = [only_converted(b, dtype) for b in params["branches"]]
        return [False, *(all(each) for each in zip(*branches, strict=True))]
    body = params.get("jaxpr", params.get("call_jaxpr"))
    if not isinstance(body, Jaxpr | ClosedJaxpr):
        return None
    found = only_converted(body, dtype)
    if len(found) != len(eqn.invars):
        return None
    if name == "scan":
        first, end = params["num_consts"], params["num_consts"] + params["num_carry"]
        found = [yes and not first <= i < end for i, yes in enumerate(found)]
    return found
