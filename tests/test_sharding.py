"""Eight devices compute what one computes, each holding its part. All of it in one process with eight CPU devices."""

import math
import pathlib
import re

import jax
import numpy as np
import pytest
from jax.sharding import PartitionSpec

from jax_diffusion import sharding
from jax_diffusion.errors import UserError

SCRIPT = pathlib.Path(__file__).with_name("sharding_script.py")


@pytest.fixture(scope="module")
def seen(on_virtual_devices, tmp_path_factory):
    out = on_virtual_devices(SCRIPT, tmp_path_factory.mktemp("eight"), timeout=900)
    assert out["devices"] == 8
    return out


@pytest.mark.parametrize("network", ["unet", "dit"])
def test_a_mesh_trains_what_one_device_trains(seen, network):
    """Sums in another order, hence float rounding; against weights moved by a hundred times as much. The U-Net
    data parallel and in shards; the transformer in shards, in replicas of shards, its matmuls in parts too, and its
    batch in two."""
    assert seen["moved"][network] > 5e-4
    found = seen["apart"][network]
    assert found.pop("one") == [0, 0] and len(found) == {"unet": 2, "dit": 5}[network]
    assert max(max(pair) for pair in found.values()) < 5e-6, found


def test_a_transformers_matmuls_are_cut_by_tensor_and_its_weights_by_both(seen):
    shard = seen["tensor_layout"]
    assert shard["stack/mlp/up/kernel"] == [[2, 32, 128], [2, 16, 64]]  # outputs over tensor, inputs over fsdp
    assert shard["stack/mlp/down/kernel"] == [[2, 128, 32], [2, 64, 16]]
    assert shard["stack/attention/out/kernel"] == [[2, 32, 32], [2, 16, 16]]
    assert shard["stack/attention/qkv/kernel"] == [[2, 32, 96], [2, 8, 96]]
    assert shard["stack/mlp/up/bias"] == [[2, 128], [2, 64]]


@pytest.mark.parametrize("what, words", [
    ("unet", "mesh.tensor=2: mesh.rules split hardly a parameter of model=unet over tensor"),
    ("heads", "mesh.tensor=8 does not divide model.heads=4: use a divisor of it"),
])  # fmt: skip
def test_a_tensor_axis_without_use_is_an_error(seen, what, words):
    assert words in seen["tensor_errors"][what]


@pytest.mark.parametrize("item", ["params", "ema", "opt_state"])
def test_fsdp_cuts_every_leaf_that_divides(seen, item):
    cut = 0
    for name, shape, shard in seen["layout"][item]:
        divides = any(n % 8 == 0 and n > 0 for n in shape) and not re.search("label/embedding|qkv/bias", name)
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
    # The labels' table lies whole on each device, by its rule: 1 % of this small network, eight times.
    assert seen["all_bytes"] / 8 <= seen["bytes"][0] < 1.1 * seen["all_bytes"] / 8
    assert seen["replicated_bytes"] == seen["all_bytes"]


@pytest.mark.parametrize("saved", ["fsdp", "all"])
def test_a_checkpoint_fits_any_mesh(seen, saved):
    """Saved by eight devices; restored by eight in another order, by four and by one, bit for bit, moments and averages
    too; and a further step is the same on all but for rounding."""
    found = seen["restored"][saved]
    assert len(found) == {"fsdp": 2, "all": 3}[saved]
    for name, (exact, lies, after) in found.items():
        assert exact == 0 and lies and after < 5e-6, (name, found)


def test_the_splash_kernel_runs_on_each_devices_samples_and_heads(seen):
    for apart, devices in seen["splash"].values():
        assert apart < 2e-6 and devices == 8  # the order of sums of 128 numbers


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


@pytest.mark.parametrize(
    "name, shape, spec",
    [
        ("stack/mlp/up/kernel", (2, 32, 128), PartitionSpec(None, "fsdp", "tensor")),
        ("middle/mlp/down/kernel", (128, 32), PartitionSpec("tensor", "fsdp")),
        ("out_stack/attention/qkv/kernel", (2, 32, 96), PartitionSpec(None, ("tensor", "fsdp"), None)),
        ("stack/modulation/bias", (2, 192), PartitionSpec(None, "tensor")),
        ("stack/mlp/up/kernel", (2, 30, 128), PartitionSpec(None, None, "tensor")),  # fsdp does not divide: left out
        ("patch_embed/kernel", (4, 32), PartitionSpec(None, "fsdp")),
        ("label/embedding", (12, 32), PartitionSpec()),
        ("mlp/up/kernel", (32, 128), PartitionSpec(None, "fsdp")),  # of no transformer block
    ],
)
def test_the_rules_of_transformers(name, shape, spec):
    mesh = jax.sharding.AbstractMesh((1, 4, 2), sharding.AXES)
    assert sharding.spec_of(name, shape, mesh, ("auto",)) == spec
    without = jax.sharding.AbstractMesh((2, 4, 1), sharding.AXES)
    assert "tensor" not in str(sharding.spec_of(name, shape, without, ("auto",)))


def test_a_rule_set_has_a_name_and_comes_after_ones_own():
    mesh = jax.sharding.AbstractMesh((1, 4, 2), sharding.AXES)
    rules = (("up/kernel", "replicated"), "tensor")
    assert sharding.spec_of("stack/mlp/up/kernel", (2, 32, 128), mesh, rules) == PartitionSpec()
    assert sharding.spec_of("stack/mlp/down/kernel", (2, 128, 32), mesh, rules) == PartitionSpec(None, "tensor", "fsdp")
    with pytest.raises(UserError, match=r"mesh\.rules='tenser' is unknown: did you mean 'tensor'"):
        sharding.spec_of("a", (2,), mesh, ("tenser",))
    with pytest.raises(UserError, match=r"mesh\.tensor=2 does not divide the 33 features"):
        sharding.spec_of("stack/mlp/up/kernel", (2, 32, 33), mesh, rules[1:])
    with pytest.raises(UserError, match=r"axis='model' is unknown"):
        sharding.spec_of("a", (4,), mesh, (("a", ("model",)),))


class Device:
    """Of a slice, as mesh_utils asks it."""

    platform, device_kind = "gpu", "any"

    def __init__(self, index, slice_index):
        self.id, self.slice_index, self.process_index = index, slice_index, index // 4

    def __repr__(self):
        return f"{self.id}@{self.slice_index}"


@pytest.mark.parametrize("sizes", [(2, 8, 1), (4, 4, 1), (2, 4, 2), (16, 1, 1), (1, 16, 1), (1, 8, 2)])
def test_fsdp_and_tensor_stay_in_a_slice_where_data_can_cross(sizes):
    devices = [Device(i, i // 8) for i in range(16)]
    grid = sharding.across_slices(sizes, devices)
    assert grid.shape == sizes and sorted(d.id for d in grid.flat) == list(range(16))
    crossing = {axis: len({d.slice_index for d in np.moveaxis(grid, i, 0).reshape(sizes[i], -1)[:, 0]}) > 1
                for i, axis in enumerate(sharding.AXES)}  # fmt: skip
    assert crossing == {"data": sizes[0] > 1, "fsdp": sizes[0] == 1, "tensor": False}


def test_tensor_never_crosses_slices():
    with pytest.raises(UserError, match=r"over 2 slices would cut matmuls .* make mesh\.data a multiple of 2"):
        sharding.across_slices((1, 1, 16), [Device(i, i // 8) for i in range(16)])


def test_what_stays_whole_is_said():
    """DiT-XL's 1152 is 128 x 9: over 256 nothing of it divides."""
    leaf = lambda *shape: jax.ShapeDtypeStruct(shape, np.float32)  # noqa: E731
    tree = {"stack": {"kernel": leaf(28, 1152, 1152), "wide": leaf(28, 1152, 4608)}, "head": leaf(1152, 32)}
    note = lambda *sizes: sharding.replication_note(jax.sharding.AbstractMesh(sizes, sharding.AXES), tree)  # noqa: E731
    assert note(256, 1, 1) == note(2, 128, 1) == ""
    tiny = {"bias": leaf(3)}  # nobody minds
    assert sharding.replication_note(jax.sharding.AbstractMesh((1, 256, 1), sharding.AXES), tiny) == ""
    said = note(1, 256, 1)
    assert said.startswith("warning: 148.8 MB of the state's 743.3 stay whole on every device: no axis of 2 leaves ")
    assert "(stack/kernel 28x1152x1152 the largest) divides by mesh.fsdp=256" in said
    assert said.endswith("mesh.fsdp=128 with mesh.data=2 cuts it")
