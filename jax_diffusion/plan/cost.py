"""From a compiled program to time: what the chip's data sheet allows, and what the compiler expects.

    compute      FLOPs of one device / peak of its matrix units for the type that they run in
    memory       bytes that its instructions move / bandwidth
    collectives  bytes that it sends / speed of its links, all of them busy
    serial       one instruction after another, each at the slower of its compute and memory: the program's roofline
    cycles       TPU: the compiler's estimated cycles / clock

The time of a step is the longest of these: collectives are taken to run beside the rest, as XLA arranges where it can.
All of them are bounds or estimates, none was measured. The cycles are blind to collectives and to Pallas kernels, and
rank variants of one program better than they foretell a speed.
"""

import dataclasses
from typing import Any

from jax_diffusion import hardware
from jax_diffusion.plan import collectives, hlo, work
from jax_diffusion.plan.programs import Compiled

LIMITS = {"compute": "compute", "memory": "memory bandwidth", "collectives": "collectives"}


@dataclasses.dataclass(frozen=True)
class Estimate:
    """Of one program on one device, but for `batch` and `images_per_s`, which are of all devices.

    seconds is {} where nothing is known of the chip; what follows from it is None then.
    """

    program: str  # train, sample
    batch: int
    devices: int
    fits: bool
    bytes: int  # of memory at the peak
    capacity: float | None  # bytes of the device's memory
    parts: dict[str, int]  # bytes: parameters, moments, ema, batch, activations, ...
    model_flops: float  # that the mathematics asks for, a sample
    flops: float  # that the device does
    xla_flops: float | None  # XLA's own count, in which loops count once
    traffic: float  # bytes of memory moved
    collectives: dict[str, dict[str, float]]
    seconds: dict[str, float]
    step_seconds: float | None
    limit: str | None
    images_per_s: float | None
    mfu: float | None
    compile_seconds: float

    @property
    def images_per_s_chip(self) -> float | None:
        return None if self.images_per_s is None else self.images_per_s / self.devices

    def to_json(self) -> dict[str, Any]:
        return dataclasses.asdict(self) | {"images_per_s_chip": self.images_per_s_chip}


def _limit(text: str, peak: float, bandwidth: float, links: float) -> str:
    """What most of the time goes to: instructions bound by arithmetic, by memory, or the links where they take longer
    than both."""
    bound = {"compute": 0.0, "memory": 0.0}
    for w in work.instructions(text):
        compute, memory = w.flops / peak, w.bytes / bandwidth
        bound["compute" if compute >= memory else "memory"] += max(compute, memory)
    return "collectives" if links > sum(bound.values()) else max(bound, key=lambda name: bound[name])


def estimate(
    program: str,
    compiled: Compiled,
    *,
    batch: int,
    devices: int,
    chip: hardware.Chip | None,
    peak: float | None,
    parts: dict[str, int],
    model_flops: float,
) -> Estimate:
    """parts: bytes of what goes in, one device's share; the rest of the memory is told apart here.
    peak: FLOP/s of the chip in the type of the matmuls.  model_flops: of the whole batch."""
    capacity = chip.memory if chip else None
    fits = compiled.fits and (capacity is None or compiled.bytes <= capacity)
    text, found, seconds, limit = compiled.hlo, {}, {}, None
    if text:
        m = compiled.memory
        parts = {
            **parts,
            "padding": max(m["argument"] - sum(parts.values()), 0),
            "activations": m["temp"],
            "outputs": m["output"] - m["alias"],
            "code": m["generated_code"],
        }
        found = collectives.collectives(text)
    flops = work.flops(text) if text else 0.0
    traffic = work.traffic(text) if text else 0.0
    if text and chip and peak:
        links = sum(c.sent for c in found.values()) / chip.link
        seconds = {
            "compute": flops / peak,
            "memory": traffic / chip.bandwidth,
            "collectives": links,
            "serial": work.serial_seconds(text, peak, chip.bandwidth),
        }
        if chip.clock:
            seconds["cycles"] = hlo.cycles(text) / chip.clock
        limit = LIMITS[_limit(text, peak, chip.bandwidth, links)]
    step = max((v for k, v in seconds.items() if k != "serial" or "cycles" not in seconds), default=None)
    rate = batch / step if step else None
    return Estimate(
        program=program,
        batch=batch,
        devices=devices,
        fits=fits,
        bytes=compiled.bytes,
        capacity=capacity,
        parts=parts,
        model_flops=model_flops / batch,
        flops=flops,
        xla_flops=compiled.cost.get("flops"),
        traffic=traffic,
        collectives={k: v._asdict() for k, v in found.items()},
        seconds=seconds,
        step_seconds=step,
        limit=limit,
        images_per_s=rate,
        mfu=rate * model_flops / batch / devices / peak if rate and peak else None,
        compile_seconds=compiled.seconds,
    )
