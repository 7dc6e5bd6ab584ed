"""Eight devices compute what one computes, each holding its part. All of it in one process with eight CPU devices."""

import json
import math
import os
import pathlib
import subprocess
import sys

import jax
import pytest
from jax.sharding import PartitionSpec

from jax_diffusion import sharding
from jax_diffusion.errors import UserError

SCRIPT = pathlib.Path(__file__).with_name("sharding_script.py")


@pytest.fixture(scope="module")
def seen(tmp_path_factory):
    environment = {**os.environ, "XLA_FLAGS": f"{os.environ['XLA_FLAGS']} --xla_force_host_platform_device_count=8"}
    done = subprocess.run(
        [sys.executable, SCRIPT, tmp_path_factory.mktemp("eight")],
        env=environment, capture_output=True, text=True, timeout=240,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    out = json.loads(done.stdout.splitlines()[-1])
    assert out["devices"] == 8
    return out


@pytest.mark.parametrize("mesh", ["data", "fsdp", "hybrid"])
def test_a_mesh_trains_what_one_device_trains(seen, mesh):
    """Sums in another order, hence float rounding; against weights moved by a hundred times as much."""
    assert seen["moved"] > 5e-4
    assert seen["apart"][mesh] < 5e-6 and seen["ema_apart"][mesh] < 5e-6


@pytest.mark.parametrize("item", ["params", "ema", "opt_state"])
def test_fsdp_cuts_every_leaf_that_divides(seen, item):
    cut = 0
    for name, shape, shard in seen["layout"][item]:
        divides = any(n % 8 == 0 and n > 0 for n in shape)
        assert math.prod(shard) * (8 if divides else 1) == math.prod(shape), (name, shape, shard)
        cut += divides
    assert cut > 40


def test_fsdp_moments_lie_as_their_parameters(seen):
    shards = {name: shard for name, _, shard in seen["layout"]["params"]}
    moments = [(n, s) for n, _, s in seen["layout"]["opt_state"] if "/mu/" in n or "/nu/" in n]
    assert len(moments) == 2 * len(shards)
    for name, shard in moments:
        assert shards[name.split("/mu/" if "/mu/" in name else "/nu/")[1]] == shard


def test_fsdp_holds_an_eighth_of_the_bytes(seen):
    assert seen["bytes"][0] == seen["bytes"][1]
    assert seen["all_bytes"] / 8 <= seen["bytes"][0] < 1.03 * seen["all_bytes"] / 8
    assert seen["replicated_bytes"] == seen["all_bytes"]


def test_a_checkpoint_fits_any_mesh(seen):
    """Saved by eight shards; restored whole, in four shards and on one device, bit for bit."""
    assert seen["restored_apart"] == {"data": 0, "hybrid": 0, "one": 0} and seen["restored_layout"]


def test_sample_i_is_the_same_on_any_mesh(seen):
    assert seen["samples_spread"] > 0.1
    assert max(seen["samples_apart"]) < 1e-4


@pytest.mark.parametrize(
    "what, words",
    [
        ("product", ["mesh.data=3", "8 devices", "-1"]),
        ("two rests", ["mesh.data=-1, mesh.fsdp=-1", "at most one"]),
        ("zero", ["mesh.fsdp=0", "positive"]),
        ("batch", ["train.batch_size=20", "8 devices", "multiple of 8, for instance 16"]),
        ("accumulate", ["train.batch_size=24", "8 devices x 2 accumulation steps", "multiple of 16"]),
    ],
)
def test_what_does_not_fit_is_said(seen, what, words):
    message = seen["errors"][what]
    assert message.startswith("UserError: ") and all(w in message for w in words), message


def test_what_fits_is_not_complained_of(seen):
    assert seen["errors"]["fine"] == "" and seen["rest"] == {"data": 2, "fsdp": 4, "tensor": 1}


def test_the_command_refuses_a_batch_that_does_not_divide(seen):
    status, err = seen["command"]
    assert status == 2 and err.count("\n") == 1 and "train.batch_size=12 does not divide over 8 devices" in err


def test_rules_are_tried_in_order(seen):
    assert seen["specs"] == {
        "head/kernel": repr(PartitionSpec(None, None, "tensor", None)),
        "norm/scale": repr(PartitionSpec()),
        "up/0/kernel": repr(PartitionSpec(None, None, "fsdp")),
        "odd": repr(PartitionSpec()),
    }


def test_a_rule_of_another_rank_is_an_error():
    mesh = sharding.make_mesh(1, 1, 1, devices=jax.devices()[:1])
    with pytest.raises(UserError, match=r"mesh.rules: \('fsdp',\) for a/kernel \(shape \(3, 4\)\) is no spec"):
        sharding.spec_of("a/kernel", (3, 4), mesh, [("kernel", ("fsdp",))])
