"""What the plan reads in programs compiled for eight devices, against theory."""

import pathlib

import pytest

SCRIPT = pathlib.Path(__file__).with_name("virtual_devices_script.py")
B, D, LAYERS = 64, 128, 5
WEIGHT = D * D * 4


@pytest.fixture(scope="module")
def seen(on_virtual_devices):
    return on_virtual_devices(SCRIPT, timeout=240)


def test_data_parallel_reduces_the_gradient(seen):
    assert seen["data"]["collectives"] == {"all-reduce": [1, WEIGHT, WEIGHT * 2 * 7 / 8]}


def test_fsdp_gathers_the_weight_and_reduces_its_gradient(seen):
    """The weight is gathered once: tanh's derivative needs no weight. XLA on the CPU has no reduce-scatter of its own
    here, or has; both move the whole gradient."""
    found = seen["fsdp"]["collectives"]
    assert found["all-gather"][:2] == [1, WEIGHT]
    assert sum(v[1] for k, v in found.items() if k in ("all-reduce", "reduce-scatter", "all-to-all")) == WEIGHT


def test_each_device_does_an_eighth(seen):
    whole = 2 * 2 * B * D * D  # forward, and the weight's gradient
    assert seen["data"]["flops"] == seen["fsdp"]["flops"] == whole / 8


def test_a_gather_in_a_loop_counts_for_each_turn(seen):
    count, size, sent = seen["looped"]["collectives"]["all-gather"]
    assert (count, size, sent) == (LAYERS, LAYERS * WEIGHT, LAYERS * WEIGHT * 7 / 8)
    assert seen["looped"]["flops"] == 2 * B * D * D * LAYERS / 8


@pytest.mark.parametrize("devices", ["1", "2", "8"])
def test_a_training_step_divides_over_the_data_axis(seen, devices):
    one, some = seen["training"]["1"], seen["training"][devices]
    assert one["flops"] == one["counted"]
    assert some["flops"] == one["flops"] / int(devices)
    assert some["parts"]["parameters"] == one["parts"]["parameters"]


@pytest.mark.parametrize("devices", ["2", "8"])
def test_a_training_step_reduces_every_gradient_once(seen, devices):
    """And a few numbers beside: the loss, the losses by time."""
    some = seen["training"][devices]
    assert set(some["collectives"]) <= {"all-reduce", "all-gather"}
    moved = some["collectives"]["all-reduce"][1]
    assert some["parts"]["parameters"] <= moved < 1.05 * some["parts"]["parameters"] + 4096


def test_the_state_is_what_goes_in(seen):
    """Parameters, both moments and the EMA, the batch; the rest are counters."""
    some = seen["training"]["1"]
    p = some["parts"]
    assert p["ema"] == p["parameters"] and 2 * p["parameters"] <= p["moments"] < 2 * p["parameters"] + 64
    assert p["batch"] == 16 * (8 * 8 + 4)
    assert 0 <= some["argument"] - sum(p.values()) < 64
