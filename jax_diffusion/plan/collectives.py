"""What one device sends to others in one call of a compiled program, from its text.

On TPU a gather that runs beside computation is written into each fusion of its chain (one channel: counted once), and a
reduce-scatter is a fusion around an all-reduce.
"""

import re
from typing import NamedTuple

from jax_diffusion.plan import hlo

KINDS = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute", "collective-broadcast")


class Collective(NamedTuple):
    """All of one kind."""

    count: int  # type: ignore[assignment]  # hides tuple.count, which nobody wants of it
    bytes: float  # of the whole arrays: a gather's result, a reduce-scatter's operand
    sent: float  # by one device, by rings: (n-1)/n of the bytes, twice that for an all-reduce


def group_size(attributes: str, devices: int) -> int:
    """How many devices take part: `{{0,1},{2,3}}`, `[2,4]<=[8]` or `mesh['a'=2,'b'=2] {'a'}`; all if none is said."""
    mesh = re.search(r"replica_groups=mesh\[([^\]]*)\][^{]*\{([^}]*)\}", attributes)
    if mesh:
        sizes = dict(re.findall(r"'([^']+)'=(\d+)", mesh[1]))
        n = 1
        for axis in re.findall(r"'([^']+)'", mesh[2]):
            n *= int(sizes[axis])
        return n
    iota = re.search(r"replica_groups=\[\d+,(\d+)\]", attributes)
    if iota:
        return int(iota[1])
    listed = re.search(r"replica_groups=\{\{([\d,]*)\}", attributes)
    return len(listed[1].split(",")) if listed and listed[1] else devices


def _sent(kind: str, size: float, n: int) -> float:
    if kind == "collective-permute":
        return size
    return size * (n - 1) / n * (2 if kind == "all-reduce" else 1)


def collectives(text: str) -> dict[str, Collective]:
    """{"all-gather": Collective(count, bytes, sent), ...} of one device and one call, loops counted."""
    module = hlo.parse(text)
    seen: dict[tuple, tuple[str, int, float, float]] = {}
    for name, i, times in hlo.walk(text):
        kind = i.opcode.removesuffix("-start")
        if kind not in KINDS:
            continue
        body = module.computations[name]
        operands = [a for o in i.operands if o in body for a in body[o].result]
        given, made = sum(a.bytes for a in operands), sum(a.bytes for a in i.result)
        if i.opcode.endswith("-start") and kind in ("all-gather", "collective-permute"):
            made -= given  # their results hold the operands too
        if kind == "all-reduce" and "all-reduce-scatter" in name:
            kind = "reduce-scatter"
        size = made if kind in ("all-gather", "collective-permute") else given
        n = group_size(i.attributes, module.partitions)
        channel = re.search(r"channel_id=(\d+)", i.attributes)
        key = (kind, channel[1]) if channel else (kind, name, i.name)
        if n > 1 or kind == "collective-permute":
            before = seen.get(key, (kind, 0, 0.0, 0.0))
            seen[key] = max(before, (kind, times, times * size, times * _sent(kind, size, n)), key=lambda v: v[2])
    out: dict[str, Collective] = {}
    for kind, times, moved, sent in seen.values():
        old = out.get(kind, Collective(0, 0.0, 0.0))
        out[kind] = Collective(old.count + times, old.bytes + moved, old.sent + sent)
    return dict(sorted(out.items()))
