"""A NaN in one device's part of a batch skips the step on all of them."""

import pathlib

import pytest

SCRIPT = pathlib.Path(__file__).with_name("guard_devices_script.py")


@pytest.fixture(scope="module")
def seen(on_virtual_devices):
    return on_virtual_devices(SCRIPT, devices=4, timeout=600)


@pytest.mark.parametrize("mesh", ["one", "fsdp", "hybrid"])
def test_all_devices_skip_together(seen, mesh):
    found = seen[mesh]
    assert found["the same bits"] and found["in_a_row"] == [0, 1, 2, 0, 0]
    assert found["finite"] == [True, False, False, True, True]
    assert found["cut"] == (mesh != "one")
    assert found["apart"] < 5e-6


@pytest.mark.parametrize("mesh", ["fsdp", "hybrid"])
def test_norms_over_shards_are_those_of_the_whole(seen, mesh):
    for name, value in seen["one"]["vitals"].items():
        assert seen[mesh]["vitals"][name] == pytest.approx(value, rel=1e-3, abs=1e-6), name
