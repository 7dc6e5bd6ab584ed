"""The options that make sampling cheaper, and what they do to a model."""

import argparse
from typing import Any

from jax_diffusion.errors import UserError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--cache", type=refreshes, metavar="N|I,I,...", help="run the inner layers of a U-Net or DiT at every Nth "
        "evaluation, or at these (the first is 0), and keep what they say in between")  # fmt: skip
    add("--cache_depth", type=int, metavar="D", help="layers at either end that run at every evaluation (default: 1)")
    add("--cache_power", type=float, metavar="P", help="above 1: refreshes lie closer around --cache_center "
        "(default: 1)")  # fmt: skip
    add("--cache_center", type=float, metavar="C", help="0 is the first evaluation, 1 the last (default: 0)")
    add("--dtype", choices=("float32", "bfloat16"), help="of matmuls, convolutions and their weights (default: the "
        "recipe's)")  # fmt: skip


def refreshes(text: str) -> int | tuple[int, ...]:
    """ "3" -> 3, "0,1,4" -> (0, 1, 4)."""
    parts = tuple(int(word) for word in text.split(","))
    return parts[0] if len(parts) == 1 else parts


refreshes.__name__ = "number of evaluations"  # what argparse calls it where it fails


def cast(options: argparse.Namespace, model: Any) -> Any:
    """The model in --dtype."""
    return model if options.dtype in (None, model.config.model.get("dtype", "float32")) else model.cast(options.dtype)


def cache(options: argparse.Namespace) -> Any:
    """The caching.Cache that is asked for, or None."""
    from jax_diffusion.caching import Cache

    fields = {"depth": options.cache_depth, "power": options.cache_power, "center": options.cache_center}
    fields = {name: value for name, value in fields.items() if value is not None}
    if options.cache is None:
        if fields:
            name, value = next(iter(fields.items()))
            raise UserError(f"--cache_{name}={value:g} belongs to --cache: say how often, for instance --cache=3")
        return None
    when = "refresh" if isinstance(options.cache, tuple) else "every"
    return Cache(**{when: options.cache}, **fields)


def said(chosen: Any, model: Any, table: Any) -> str:
    """What to say of a cache after the number of evaluations; "" without one."""
    if chosen is None:
        return ""
    refreshed = int(chosen.refreshes(len(table)).sum())
    return (
        f" (the inner layers in {refreshed} of them: {model.predicted_speedup(chosen, len(table)):.2f} times "
        "fewer FLOPs)"
    )
