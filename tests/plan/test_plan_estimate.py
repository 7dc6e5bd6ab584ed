"""From a compiled program's text and memory to an estimate: the arithmetic, what limits, and what is recommended."""

import pytest

from jax_diffusion.hardware import Chip
from jax_diffusion.plan import cost, report, targets
from jax_diffusion.plan.programs import Compiled, needed

# ruff: noqa: E501
# One product of 2 * 64 * 256 * 128 FLOPs that moves (64 * 128 + 128 * 256 + 64 * 256) * 2 bytes, and one all-reduce of
# 64 * 256 * 2 bytes in a ring of four.
HLO = """HloModule jit_step, num_partitions=4

ENTRY %main (a: bf16[64,128], b: bf16[128,256]) -> bf16[64,256] {
  %a = bf16[64,128]{1,0} parameter(0)
  %b = bf16[128,256]{1,0} parameter(1)
  %d = bf16[64,256]{1,0} dot(%a, %b), lhs_contracting_dims={1}, rhs_contracting_dims={0}, backend_config={"estimated_cycles":"500"}
  ROOT %r = bf16[64,256]{1,0} all-reduce(%d), channel_id=1, replica_groups=[1,4]<=[4], to_apply=%add
}
"""
FLOPS, SENT = 2 * 64 * 256 * 128, 64 * 256 * 2 * 2 * 3 / 4
PRODUCT, REDUCE = (64 * 128 + 128 * 256 + 64 * 256) * 2, 2 * 64 * 256 * 2
MEMORY = {"argument": 1000, "output": 900, "alias": 850, "temp": 300, "generated_code": 20}


def estimate(chip: Chip | None, compiled: Compiled = Compiled(HLO, MEMORY, {"flops": 5.0}, 3.0)) -> cost.Estimate:  # noqa: B008
    return cost.estimate(
        "train", compiled, batch=8, devices=4, chip=chip, peak=chip and chip.bfloat16, parts={"parameters": 700},
        model_flops=4 * FLOPS,
    )  # fmt: skip


def chip(peak=1e12, bandwidth=1e12, memory=1370.0, link=1e12, clock=0.0) -> Chip:
    return Chip("test", ("test",), peak, bandwidth, memory, link, clock)


def test_memory_is_told_apart_and_adds_up():
    e = estimate(chip())
    assert e.bytes == 1000 + 900 - 850 + 300 + 20 == 1370 and e.fits
    assert e.parts == {"parameters": 700, "padding": 300, "activations": 300, "outputs": 50, "code": 20}
    assert sum(e.parts.values()) == e.bytes
    assert not estimate(chip(memory=1369.0)).fits


def test_times_are_work_by_rates():
    e = estimate(chip(2e9, 3e9, link=5e9, clock=7e9))
    assert e.seconds == pytest.approx({
        "compute": FLOPS / 2e9, "memory": (PRODUCT + REDUCE) / 3e9, "collectives": SENT / 5e9,
        "serial": FLOPS / 2e9 + REDUCE / 3e9, "cycles": 500 / 7e9,
    })  # fmt: skip
    # With cycles the serial roofline is no bound: the compiler knows better what runs beside what.
    assert e.step_seconds == e.seconds["compute"]
    assert e.images_per_s == 8 / e.step_seconds and e.images_per_s_chip == e.images_per_s / 4
    assert e.mfu == pytest.approx(1.0)  # all of the time is the model's own arithmetic


def test_without_cycles_one_instruction_follows_another():
    e = estimate(chip(2e9, 3e9))
    assert e.step_seconds == e.seconds["serial"] and e.mfu < 1


@pytest.mark.parametrize(
    "rates, limit",
    [((1e6, 1e12, 1e12), "compute"), ((1e12, 1e6, 1e12), "memory bandwidth"), ((1e12, 1e12, 1e6), "collectives")],
)
def test_what_limits_is_the_slowest(rates, limit):
    e = estimate(chip(rates[0], rates[1], link=rates[2]))
    assert e.limit == limit and limit in report.estimate(e.to_json())


def test_of_unknown_devices_no_time_is_said():
    e = estimate(None)
    assert (e.seconds, e.step_seconds, e.images_per_s, e.mfu, e.limit) == ({}, None, None, None, None)
    assert e.flops == FLOPS and e.fits
    text = report.estimate(e.to_json())
    assert "fit" not in text and "img/s" not in text and "all-reduce" in text


def test_what_does_not_fit_has_no_program():
    e = estimate(chip(memory=2.0**30), Compiled("", {"needed": 2**31}, {}, 60.0))
    assert not e.fits and e.bytes == 2**31 and e.images_per_s is None
    assert "DOES NOT FIT: 2.00 GiB of 1.00 GiB" in report.estimate(e.to_json())


def row(rate, size, fits=True, remat="none", fsdp=1):
    e = estimate(chip()).to_json() | {"images_per_s": rate, "bytes": size, "fits": fits}
    return {"mesh": {"data": 4 // fsdp, "fsdp": fsdp, "tensor": 1}, "remat": remat, "estimate": e}


def test_the_fastest_that_fits_is_recommended():
    rows = [
        row(100.0, 50),
        row(300.0, 90, fits=False),
        row(200.0, 60, remat="dots", fsdp=2),
        row(197.0, 40, remat="full"),
    ]
    assert report.recommendation(rows[:3]) == (
        "recommended (the fastest that fits): --config.mesh.data=2 --config.mesh.fsdp=2 --config.mesh.tensor=1 --config.model.remat=dots"
    )
    assert "remat=full" in report.recommendation(rows), "of two that are as fast the smaller"
    assert "nothing fits" in report.recommendation([rows[1]])
    lines = report.table([report.row(r) for r in rows]).splitlines()
    assert len(lines) == 5 and len({len(line) for line in lines}) == 1


@pytest.mark.parametrize(
    "name, family, count",
    [
        ("v5e:4x4", "tpu", 16),
        ("v4:2x2x1", "tpu", 4),
        ("v5p:4x4x4", "tpu", 64),
        ("h100:8", "cuda", 8),
        ("cpu:3", "cpu", 3),
    ],
)
def test_topologies(name, family, count):
    t = targets.parse(name)
    assert (t.family, t.count) == (family, count) and (t.chip is None) == (family == "cpu")
    environment = targets.environment(name, {"XLA_FLAGS": "--xla_a=1", "HOME": "/h", "JAX_PLATFORMS": "tpu"})
    assert environment["JAX_PLATFORMS"] == "cpu" and environment["HOME"] == "/h"
    flags = environment["XLA_FLAGS"].split()
    assert flags == ["--xla_a=1"] + ["--xla_force_host_platform_device_count=3"] * (family == "cpu")


@pytest.mark.parametrize(
    "message, size",
    [
        ("RESOURCE_EXHAUSTED: Ran out of memory in memory space hbm. Used 19.12G of 15.75G hbm. Exceeded", 19.12 * 2**30),
        ("RESOURCE_EXHAUSTED: Ran out of memory on HBM, the total memory required for HLO temporaries (60.09G) exceeds "
         "available HBM (15.75G).", 60.09 * 2**30),
        ("INTERNAL: Used 19.12G of 15.75G hbm", None),
        ("RESOURCE_EXHAUSTED: too many open files", None),
    ],
)  # fmt: skip
def test_how_much_was_wanted_is_read_in_the_refusal(message, size):
    assert needed(message) == (None if size is None else int(size))
