"""A NaN in one device's part of a batch skips the step on all of them."""

import json
import os
import pathlib
import subprocess
import sys

import pytest

SCRIPT = pathlib.Path(__file__).with_name("guard_devices_script.py")


@pytest.fixture(scope="module")
def seen():
    environment = {**os.environ, "XLA_FLAGS": f"{os.environ['XLA_FLAGS']} --xla_force_host_platform_device_count=4"}
    done = subprocess.run([sys.executable, SCRIPT], env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


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
