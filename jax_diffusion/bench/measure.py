"""Who runs when, and what is made of it.

Round by round the two frameworks run one after the other, in an order that turns with every round (A B, B A, ...), so
that what else the machine does meets both. A ratio is of two neighbours; medians and quartiles are over the rounds.
"""

import math
import statistics
from collections.abc import Callable, Sequence
from typing import NamedTuple


class Quartiles(NamedTuple):
    """Of some numbers."""

    median: float
    q1: float
    q3: float


def quartiles(values: Sequence[float]) -> Quartiles:
    """By linear interpolation; of one number, it thrice."""
    if len(values) == 1:
        return Quartiles(values[0], values[0], values[0])
    q1, median, q3 = statistics.quantiles(values, n=4, method="inclusive")
    return Quartiles(median, q1, q3)


def interleave(
    contenders: Sequence[str],
    rounds: int,
    run: Callable[[str], float],
    done: Callable[[str, float], None] = lambda name, seconds: None,
) -> dict[str, list[float]]:
    """run(name) of each contender once a round, the order turned in every other one. -> name: its rounds, in order.

    done: told of each as it ends, so that nothing is lost where the next one fails.
    """
    times: dict[str, list[float]] = {name: [] for name in contenders}
    for i in range(rounds):
        for name in contenders if i % 2 == 0 else reversed(contenders):
            seconds = run(name)
            times[name].append(seconds)
            done(name, seconds)
    return times


def steps_a_round(step_s: Sequence[float], wanted: int, seconds: float, per_call: Sequence[int] = (1,)) -> int:
    """How many steps every contender does in a round: `wanted`, fewer where the slowest would take over `seconds`; a
    multiple of what each does in one call."""
    unit = math.lcm(*per_call)
    most = int(seconds / max(*step_s, 1e-9))
    return max(min(wanted, most) // unit, 1) * unit


def ratios(ours: Sequence[float], theirs: Sequence[float]) -> list[float]:
    """theirs / ours, round by round: above 1 ours is the faster one."""
    return [b / a for a, b in zip(ours, theirs, strict=False)]
