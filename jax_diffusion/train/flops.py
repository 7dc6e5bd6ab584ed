"""The floating-point operations of a traced function: its matrix products and convolutions, two for each multiply-add.

XLA's own cost analysis counts the body of a loop once: of a scan over 28 blocks it sees one.
"""

import math
from collections.abc import Iterator
from typing import Any

from jax.extend.core import ClosedJaxpr, Jaxpr


def count(jaxpr: Jaxpr | ClosedJaxpr) -> float:
    """FLOPs of matmuls and convolutions, on all devices together.

    What is computed again in the backward pass counts again; the body of a `while` counts once.
    """
    if isinstance(jaxpr, ClosedJaxpr):
        jaxpr = jaxpr.jaxpr
    return float(sum(_of_equation(eqn) for eqn in jaxpr.eqns))


def _of_equation(eqn: Any) -> float:
    name, params = eqn.primitive.name, eqn.params
    if name == "dot_general":
        (contracted, _), _ = params["dimension_numbers"]
        lhs = eqn.invars[0].aval.shape
        return 2 * eqn.outvars[0].aval.size * math.prod(lhs[i] for i in contracted)
    if name == "conv_general_dilated":
        kernel = eqn.invars[1].aval
        features = kernel.shape[params["dimension_numbers"].rhs_spec[0]]
        # Of an input spread out with zeros (the gradient of a strided convolution) most products are nothing.
        return 2 * eqn.outvars[0].aval.size * kernel.size / features / math.prod(params["lhs_dilation"])
    inner = [count(j) for j in _bodies(params)]
    if name == "cond":
        return max(inner, default=0.0)
    return params.get("length", 1) * sum(inner) if name == "scan" else sum(inner)


def _bodies(params: dict[str, Any]) -> Iterator[Jaxpr | ClosedJaxpr]:
    for value in params.values():
        for item in value if isinstance(value, tuple | list) else (value,):
            if isinstance(item, Jaxpr | ClosedJaxpr):
                yield item
