"""The order of the data, the prefetching thread, and the layout of batches on devices."""

import os
import socket
import subprocess
import sys
import textwrap
import threading
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jax_diffusion.data import ArraySource, Batches, batch_indices, random_flip, to_float, to_uint8


def counting(n=10, labels=True):
    """Image i is full of i, and so is its label."""
    images = np.broadcast_to(np.arange(n, dtype=np.uint8)[:, None, None, None], (n, 2, 2, 1))
    return ArraySource(images.copy(), np.arange(n) if labels else None)


@pytest.mark.parametrize(("n", "batch"), [(12, 4), (10, 4), (7, 7), (3, 8), (1, 5), (100, 1)])
def test_epochs_are_permutations(n, batch):
    """Also where batches straddle epochs, and where a batch is longer than an epoch."""
    epochs = 4
    steps = -(-n * epochs // batch)
    drawn = np.concatenate([batch_indices(3, s, batch, n) for s in range(steps)])
    assert drawn.dtype == np.int64
    for epoch in drawn[: n * epochs].reshape(epochs, n):
        assert sorted(epoch) == list(range(n))


def test_the_order_depends_on_seed_and_epoch():
    orders = {tuple(batch_indices(seed, epoch, 50, 50)) for seed in range(3) for epoch in range(3)}
    assert len(orders) == 9
    assert all(o != tuple(range(50)) for o in orders)
    np.testing.assert_array_equal(batch_indices(1, 5, 8, 50), batch_indices(1, 5, 8, 50))


def test_the_order_does_not_depend_on_the_batch_size():
    small = np.concatenate([batch_indices(0, s, 3, 11) for s in range(20)])
    large = np.concatenate([batch_indices(0, s, 10, 11) for s in range(6)])
    np.testing.assert_array_equal(small, large)


def test_a_caller_cannot_spoil_the_cached_order():
    first = batch_indices(0, 0, 10, 10).copy()
    batch_indices(0, 0, 10, 10)[:] = 0
    np.testing.assert_array_equal(batch_indices(0, 0, 10, 10), first)


@pytest.mark.parametrize("k", [1, 3])
def test_resuming_continues(k):
    def run(start):
        with Batches(counting(), 4, 7, start, steps_per_dispatch=k, stop_step=12) as batches:
            return [(step, jax.device_get(batch)) for step, batch in batches]

    whole, rest = run(0), run(6)
    assert [s for s, _ in rest] == [s for s, _ in whole if s >= 6]
    for (_, a), (_, b) in zip(whole[-len(rest) :], rest, strict=True):
        jax.tree.map(np.testing.assert_array_equal, a, b)


def test_steps_per_dispatch_stacks_the_same_batches():
    with Batches(counting(), 4, 7, 2, stop_step=9) as batches:
        single = {step: jax.device_get(batch) for step, batch in batches}
    with Batches(counting(), 4, 7, 2, steps_per_dispatch=3, stop_step=9) as batches:
        stacked = [(step, jax.device_get(batch)) for step, batch in batches]
    assert [(s, b["image"].shape) for s, b in stacked] == [
        (2, (3, 4, 2, 2, 1)),
        (5, (3, 4, 2, 2, 1)),
        (8, (1, 4, 2, 2, 1)),
    ]
    for start, batch in stacked:
        for i in range(len(batch["label"])):
            for key in ("image", "label"):
                np.testing.assert_array_equal(batch[key][i], single[start + i][key])
                assert batch[key].dtype == single[start + i][key].dtype


def test_images_keep_their_labels():
    with Batches(counting(), 16, 0, 0, stop_step=3) as batches:
        for step, batch in batches:
            np.testing.assert_array_equal(batch["image"][:, 0, 0, 0], batch["label"])
            np.testing.assert_array_equal(batch["label"], batch_indices(0, step, 16, 10))
    with Batches(counting(labels=False), 2, 0, 0) as batches:
        assert set(next(batches)[1]) == {"image"}


def alive():
    return [t for t in threading.enumerate() if t.name == "batches"]


def test_the_thread_ends():
    with Batches(counting(), 2, 0, 0) as batches:
        next(batches)
        assert alive()
        start = time.monotonic()
    assert time.monotonic() - start < 1 and not alive()
    with pytest.raises(StopIteration):
        next(batches)
    batches.close()
    dropped = Batches(counting(), 2, 0, 0)
    next(dropped)
    del dropped
    assert not alive(), "an iterator that is dropped unclosed ends its thread too"
    assert len(list(Batches(counting(), 2, 0, 0, stop_step=5))) == 5
    assert not alive()
    assert list(Batches(counting(), 2, 0, 5, stop_step=5)) == []


class Failing(ArraySource):
    def batch(self, indices):
        if 9 in indices:
            raise OSError("the disk is gone")
        return super().batch(indices)


def test_errors_reach_the_consumer():
    whole = counting()
    seen = 0
    batches = Batches(Failing(whole.images, whole.labels), 2, 0, 0)
    with pytest.raises(OSError, match="the disk is gone"):
        for step, _ in batches:
            assert 9 not in batch_indices(0, step, 2, 10)
            seen += 1
    assert seen == next(s for s in range(5) if 9 in batch_indices(0, s, 2, 10)), "good batches come first"
    assert not alive()
    assert list(batches) == []


class Slow(ArraySource):
    made = 0

    def batch(self, indices):
        time.sleep(0.05)
        Slow.made += 1
        return super().batch(indices)


def test_wait_share_and_bounded_prefetch():
    slow = Slow(counting().images)
    with Batches(slow, 2, 0, 0, prefetch=2) as batches:
        for _ in range(6):
            next(batches)
        assert batches.wait_share > 0.7, "the consumer did nothing but wait"
        time.sleep(0.4)
        assert Slow.made <= 6 + 2 + 1, "two queued and one in hand"
        next(batches)
        assert batches.wait_share < 0.3, "the batch was ready"


def test_nonsense_is_refused():
    with pytest.raises(ValueError, match="at least one example"):
        Batches(ArraySource(np.zeros((0, 2, 2, 1), np.uint8)), 2, 0, 0)
    for n, batch, step in ((0, 1, 0), (1, 0, 0), (1, 1, -1)):
        with pytest.raises(ValueError, match="batch_indices needs"):
            batch_indices(0, step, batch, n)


def run_python(code, *args, **env):
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", **env}
    command = [sys.executable, "-c", textwrap.dedent(code), *args]
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


SOURCE = """
    import sys
    import jax, numpy as np
    from jax.sharding import AxisType, NamedSharding, PartitionSpec as P
    from jax_diffusion.data import ArraySource, Batches, batch_indices
    n = 40
    images = np.broadcast_to(np.arange(n, dtype=np.uint8)[:, None, None, None], (n, 2, 2, 1)).copy()
    source = ArraySource(images, np.arange(n))
"""


def test_each_device_holds_its_slice_only():
    code = (
        SOURCE
        + """
    mesh = jax.make_mesh((4, 2), ("data", "tensor"), axis_types=(AxisType.Auto,) * 2)
    for k, spec in ((1, P("data")), (3, P(None, "data"))):
        sharding = NamedSharding(mesh, spec)
        with Batches(source, 8, 0, 0, steps_per_dispatch=k, sharding=sharding, stop_step=6) as batches:
            for step, batch in batches:
                want = np.stack([batch_indices(0, step + i, 8, n) for i in range(k)])
                for leaf in batch.values():
                    assert leaf.sharding.is_equivalent_to(sharding, leaf.ndim)
                    assert len(leaf.addressable_shards) == 8
                    for shard in leaf.addressable_shards:
                        row = int(np.argwhere(mesh.devices == shard.device)[0, 0])
                        got = np.asarray(shard.data).reshape(k, 2, -1)
                        assert (got == want[:, 2 * row : 2 * row + 2, None]).all()
    try:
        next(Batches(source, 8, 0, 0, steps_per_dispatch=4, sharding=NamedSharding(mesh, P("data"))))
    except ValueError as error:
        assert "steps axis" in str(error)
    else:
        raise AssertionError("sharding the steps axis must be refused")
    """
    )
    child = run_python(code, XLA_FLAGS="--xla_force_host_platform_device_count=8")
    _, errors = child.communicate(timeout=300)
    assert child.returncode == 0, errors


def test_two_processes_read_their_rows_only():
    code = (
        SOURCE
        + """
    import os
    jax.distributed.initialize(sys.argv[1], 2, int(sys.argv[2]))
    read = []
    gather = source.batch
    source.batch = lambda indices: (read.append(indices), gather(indices))[1]
    mesh = jax.make_mesh((2,), ("data",), axis_types=(AxisType.Auto,))
    me = jax.process_index()
    for k, spec in ((1, P("data")), (2, P(None, "data"))):
        sharding = NamedSharding(mesh, spec)
        with Batches(source, 6, 0, 0, steps_per_dispatch=k, sharding=sharding, stop_step=4) as batches:
            for step, batch in batches:
                want = np.stack([batch_indices(0, step + i, 6, n) for i in range(k)])[:, 3 * me : 3 * me + 3]
                shard, = batch["label"].addressable_shards
                assert batch["label"].shape == ((6,) if k == 1 else (k, 6))
                assert (np.asarray(shard.data).reshape(k, 3) == want).all()
    assert {len(indices) for indices in read} == {3, 6}, "3 rows a step, not 6"
    print("good", flush=True)
    jax.distributed.shutdown()  # waits for the other, which would not survive the end of the first
    os._exit(0)
    """
    )
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        address = f"localhost:{probe.getsockname()[1]}"
    children = [run_python(code, address, str(i), XLA_FLAGS="") for i in range(2)]
    try:
        outputs = [child.communicate(timeout=300) for child in children]
    finally:
        for child in children:
            child.kill()  # jax.distributed swallows SIGTERM
    assert all("good" in out for out, _ in outputs), outputs


def test_uint8_survives_the_round_trip():
    every = jnp.arange(256, dtype=jnp.uint8)
    x = jax.jit(to_float)(every)
    assert x.dtype == jnp.float32 and x[0] == -1 and x[-1] == 1
    np.testing.assert_array_equal(jax.jit(to_uint8)(x), every)
    assert to_uint8(jnp.array([-3.0, 3.0])).tolist() == [0, 255]
    points = jnp.array([0.3, 7.0])
    np.testing.assert_array_equal(to_float(points), points)


def test_random_flip():
    images = jax.random.randint(jax.random.key(0), (1000, 3, 5, 2), 0, 256).astype(jnp.uint8)
    flipped = jax.jit(random_flip)(jax.random.key(1), images)
    same = (flipped == images).all((1, 2, 3))
    mirrored = (flipped == images[:, :, ::-1]).all((1, 2, 3))
    assert (same ^ mirrored).all() and flipped.dtype == jnp.uint8
    assert abs(int(mirrored.sum()) - 500) < 5 * 15.8  # five standard deviations of Binomial(1000, 1/2)
    other = random_flip(jax.random.key(2), images)
    assert (other != flipped).any()
