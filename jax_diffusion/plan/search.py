"""What to try: batches until the largest that fits, and the meshes of so many devices."""

from collections.abc import Callable
from typing import NamedTuple


class Largest(NamedTuple):
    """What `largest` found."""

    batch: int  # that fits; 0: not even one unit
    above: int | None  # the smallest that was seen not to fit; None where the search stopped before one
    tried: int


def largest(needed: Callable[[int], float], capacity: float, unit: int, start: int, resolution: float = 1 / 16,
            most: int = 2**24) -> Largest:  # fmt: skip
    """The largest multiple of `unit` whose `needed(batch)` bytes are at most `capacity`, to within `resolution` of it.

    Doubles (or halves) from `start` until it is enclosed, then cuts the interval where a line through its ends meets
    the capacity, and every third time in its middle, so that no shape of curve makes it slow. `needed` grows with the
    batch.
    """
    seen: dict[int, float] = {}

    def fits(batch: int) -> bool:
        if batch not in seen:
            seen[batch] = needed(batch)
        return seen[batch] <= capacity

    low = max(start // unit, 1) * unit
    high = None
    while not fits(low):
        high, low = low, low // 2 // unit * unit
        if low < unit:
            return Largest(0, high, len(seen))
    while high is None:
        if 2 * low > most:
            return Largest(low, None, len(seen))
        if fits(2 * low):
            low *= 2
        else:
            high = 2 * low
    # Round batches: whole power-of-two multiples of the unit above `low`.
    grid = unit
    while 2 * grid <= resolution * low:
        grid *= 2
    turn = 0
    while (cells := -(-(high - low) // grid)) > 1:
        a, b = seen[low], seen[high]
        share = 0.5 if turn % 3 == 2 or b <= a else (capacity - a) / (b - a)
        middle = low + grid * min(max(int(share * cells), 1), cells - 1)
        low, high = (middle, high) if fits(middle) else (low, middle)
        turn += 1
    return Largest(low, high, len(seen))


def meshes(devices: int, tensor: bool = False) -> list[dict[str, int]]:
    """All ways to write `devices` as data x fsdp (x tensor), the most replicas first."""
    out = []
    for t in range(1, devices + 1 if tensor else 2):
        for fsdp in range(1, devices // t + 1):
            if devices % (t * fsdp) == 0:
                out.append({"data": devices // (t * fsdp), "fsdp": fsdp, "tensor": t})
    return out
