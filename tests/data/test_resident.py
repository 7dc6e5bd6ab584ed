"""Sets on the devices: the batches gathered there are the host's, bit for bit. Most of it in one process with eight
CPU devices, and once in two processes."""

import os
import pathlib
import socket
import subprocess
import sys

import jax
import numpy as np
import pytest

from jax_diffusion import sharding
from jax_diffusion.data import ArraySource, resident
from jax_diffusion.errors import UserError

SCRIPT = pathlib.Path(__file__).with_name("resident_script.py")
TWO = """
import os, sys
import jax, numpy as np
sys.path.insert(0, os.path.dirname(sys.argv[3]))
import resident_script
from jax_diffusion import sharding
jax.distributed.initialize(sys.argv[1], 2, int(sys.argv[2]))
mesh = sharding.make_mesh(2)
for k in (1, 3):
    place = sharding.batch_sharding(mesh, leading=int(k > 1))
    for source in resident_script.sources():
        want, _ = resident_script.batches(source, place, k, "never")
        for mode in ("replicate", "shard"):
            got, _ = resident_script.batches(source, place, k, mode)
            for (_, x), (_, y) in zip(want, got, strict=True):
                for key in x:
                    a, b = (leaf.addressable_shards[0].data for leaf in (x[key], y[key]))
                    assert a.shape[k > 1] == 8 and np.asarray(a).tobytes() == np.asarray(b).tobytes(), (k, mode, key)
print("good", flush=True)
jax.distributed.shutdown()  # waits for the other, which would not survive the end of the first
os._exit(0)
"""


@pytest.fixture(scope="module")
def seen(on_virtual_devices, arguments, tmp_path_factory):
    fields = arguments("digits_dit", "train.steps=6", "train.sample_every=0", "train.eval_every=0", "optim.warmup=2")
    fields = (field.removeprefix("--config.") for field in fields)
    out = on_virtual_devices(SCRIPT, tmp_path_factory.mktemp("eight"), *fields, timeout=300)
    assert out["devices"] == 8
    return out


def test_batches_gathered_on_any_mesh_are_the_hosts(seen):
    assert len(seen["same"]) == 4 * 2 * 2 * 2 and seen["spread"] > 1
    assert [case for case, equal in seen["same"].items() if not equal] == []


def test_only_a_sharded_set_communicates(seen):
    for case, found in seen["collectives"].items():
        assert found == (["reduce-scatter"] if "shard" in case and not case.startswith("one") else []), case


def test_a_sharded_set_takes_its_share_of_memory(seen):
    for case, (held, whole) in seen["share"].items():
        parts = {"one": 1, "data": 8, "hybrid": 8, "tensor": 4}[case.split()[0]] if "shard" in case else 1
        assert held == whole // parts and 35 <= whole < 37 + parts, case


def test_a_run_does_not_notice(seen):
    assert seen["run"] == [True, True, True] and seen["resumed"]
    said = [("on every device" in line, "in 8 parts" in line) for line in seen["lines"]]
    assert said == [(True, False), (False, True)]


def test_two_processes():
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        address = f"localhost:{probe.getsockname()[1]}"
    environment = {**os.environ, "JAX_CPU_COLLECTIVES_IMPLEMENTATION": "gloo"}
    children = [
        subprocess.Popen([sys.executable, "-c", TWO, address, str(i), str(SCRIPT)], env=environment,
                         stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        for i in range(2)
    ]  # fmt: skip
    try:
        outputs = [child.communicate(timeout=300) for child in children]
    finally:
        for child in children:
            child.kill()  # jax.distributed swallows SIGTERM
    assert all("good" in out for out, _ in outputs), [err[-2000:] for _, err in outputs]


def test_auto_is_for_small_sets_of_bytes_on_accelerators():
    small = ArraySource(np.zeros((4, 2, 2, 1), np.uint8))
    large = ArraySource(np.broadcast_to(np.uint8(0), (1 << 19, 64, 64, 1)))  # 2 GiB, were it not one byte
    assert [resident.choose_mode("auto", s, p) for s in (small, large) for p in ("cpu", "gpu", "tpu")] == [
        "never", "replicate", "replicate", "never", "never", "never"
    ]  # fmt: skip
    assert resident.choose_mode("auto", ArraySource(np.zeros((4, 2), np.float32)), "tpu") == "never"
    assert resident.choose_mode("shard", large, "cpu") == "shard"


def test_a_misspelt_mode_is_said():
    place = sharding.batch_sharding(sharding.make_mesh(1, devices=jax.devices()[:1]))
    with pytest.raises(UserError, match=r"config.data.on_device='replicated' is unknown: did you mean 'replicate'"):
        resident.load(ArraySource(np.zeros((4, 2), np.float32)), "replicated", place, print)
