"""What one of 1, 2, 4, 8 devices computes and sends in a training step, from the compiled program, against theory."""

import pathlib

import pytest

SCRIPT = pathlib.Path(__file__).with_name("scaling_script.py")


@pytest.fixture(scope="module")
def seen(on_virtual_devices):
    return on_virtual_devices(SCRIPT, timeout=480)


def sent(measured, *kinds):
    """Bytes of the whole arrays."""
    return sum(measured["collectives"].get(kind, [0, 0.0, 0.0])[1] for kind in kinds)


@pytest.mark.parametrize("mesh", ["2x1", "4x1", "8x1", "1x2", "1x8", "2x4"])
def test_a_device_does_its_share_of_the_work(seen, mesh):
    data, fsdp = map(int, mesh.split("x"))
    one, part = seen["dit"]["1x1"]["flops"], seen["dit"][mesh]["flops"]
    assert one > 1e8 and part * data * fsdp == pytest.approx(one, rel=1e-3)


def test_one_device_sends_nothing(seen):
    assert seen["dit"]["1x1"]["collectives"] == {}


@pytest.mark.parametrize("network, mesh", [("dit", "2x1"), ("dit", "4x1"), ("dit", "8x1"), ("unet", "8x1")])
def test_data_parallel_sums_the_gradients_once_and_sends_nothing_else(seen, network, mesh):
    measured = seen[network][mesh]
    assert set(measured["collectives"]) == {"all-reduce"}
    # float32 gradients, the loss, and that of four parts of the time with how many fell into each.
    assert sent(measured, "all-reduce") == 4 * measured["parameters"]["whole"] + 4 + 2 * 4 * 4
    # In rings each device sends 2 (n-1)/n of that.
    n = int(mesh[0])
    assert measured["collectives"]["all-reduce"][2] == pytest.approx(
        2 * (n - 1) / n * sent(measured, "all-reduce"), rel=1e-6
    )


@pytest.mark.parametrize("mesh", ["1x2", "1x8"])
def test_fsdp_gathers_parameters_and_sums_gradients(seen, mesh):
    """Gathered for the forward pass, and kernels again for the backward pass; activations stay where they are."""
    measured = seen["dit"][mesh]
    size = 4 * measured["parameters"]["cut"]
    # The labels' table, and of three blocks the bias of q, k and v.
    assert measured["parameters"]["whole"] < 8 + 11 * 64 + 3 * (3 * 64) + 8
    assert size <= sent(measured, "all-gather") <= 2 * size
    # XLA for CPUs writes a reduce-scatter as an all-reduce of which each device keeps its slice.
    assert sent(measured, "all-reduce", "reduce-scatter") == pytest.approx(size, rel=0.01)
    assert sent(measured, "all-to-all", "collective-permute") < 0.2 * size


def test_what_fsdp_sends_does_not_grow_with_the_devices(seen):
    two, eight = (sent(seen["dit"][mesh], "all-gather", "all-reduce", "reduce-scatter") for mesh in ("1x2", "1x8"))
    assert eight == pytest.approx(two, rel=0.01)


def test_data_times_fsdp_sums_shards_of_gradients_between_replicas(seen):
    measured = seen["dit"]["2x4"]
    size = 4 * measured["parameters"]["cut"]
    assert sent(measured, "all-reduce", "reduce-scatter") == pytest.approx(size * (1 + 1 / 4), rel=0.01)
    assert size <= sent(measured, "all-gather") <= 2 * size


def test_tensor_parallel_halves_the_work_and_sums_activations_twice_a_block(seen):
    """Forward, and twice backward; from parts of features nothing else is put together that is of a batch's size."""
    one, two = seen["dit"]["1x1"], seen["dit"]["1x1x2"]
    # What lies outside the blocks is done by both.
    assert 0.5 * one["flops"] <= two["flops"] < 0.53 * one["flops"]
    depth, tokens, width = 3, 16, 64
    activations = 4 * 64 * tokens * width
    rest = 4 * two["parameters"]["whole"] + 4 * 64 * 7 * width * depth  # gradients; shifts, scales and gates
    assert 4 * depth * activations <= sent(two, "all-reduce") < 4 * depth * activations + rest
    assert sent(two, "all-gather", "all-to-all", "collective-permute") < activations * depth
    assert seen["dit"]["2x2x2"]["flops"] * 8 < 1.06 * one["flops"]


def test_a_guided_sampler_sends_nothing(seen):
    """Both halves of a sample lie on its device."""
    assert seen["guided sampler"] == {}
