"""Which examples a step has: epochs, mixtures, processes and resuming, over random parameters."""

import itertools

import numpy as np
import pytest

from jax_diffusion.data import batch_indices
from jax_diffusion.data.order import FINEST, Mixed, Shuffled, Tasks, whole_weights


def cases(count, seed):
    for i in range(count):
        yield np.random.default_rng((seed, i))


def runs(order, seed, batch, start, stop, k=1, processes=1):
    """What all processes read from step start to stop, put together: [steps * batch] in the order of the positions."""
    parts = np.array_split(np.arange(batch), processes)
    read = []
    for rows in parts:
        tasks = Tasks(order, seed, batch, start, k, stop, rows)
        per_step = [tasks[d].reshape(tasks.steps(d)[1], len(rows)) for d in range(len(tasks))]
        read.append(np.concatenate(per_step) if per_step else np.empty((0, len(rows)), int))
    return np.concatenate(read, axis=1).reshape(-1)


def random_order(rng):
    sizes = tuple(int(n) for n in rng.integers(1, 40, rng.integers(1, 5)))
    if len(sizes) == 1:
        return Shuffled(sizes[0])
    return Mixed(sizes, whole_weights([round(float(w), 2) for w in rng.uniform(0.05, 1, len(sizes))]))


def test_no_number_of_processes_hosts_or_steps_a_dispatch_changes_what_is_seen():
    for rng in cases(60, 1):
        order, seed, batch = random_order(rng), int(rng.integers(100)), int(rng.integers(8, 33))
        steps = int(rng.integers(1, 20))
        whole = order.indices(seed, 0, steps * batch)
        for processes in range(1, 9):
            k = int(rng.integers(1, 6))
            np.testing.assert_array_equal(runs(order, seed, batch, 0, steps, k, processes), whole)


def test_resuming_with_other_processes_loses_and_repeats_nothing():
    for rng in cases(60, 2):
        order, seed, batch = random_order(rng), int(rng.integers(100)), int(rng.integers(8, 33))
        stops = [0, *sorted(int(s) for s in rng.integers(0, 30, 4)), 30]
        legs = [
            runs(order, seed, batch, a, b, int(rng.integers(1, 6)), int(rng.integers(1, 9)))
            for a, b in itertools.pairwise(stops)
        ]
        np.testing.assert_array_equal(np.concatenate(legs), order.indices(seed, 0, 30 * batch))


def test_no_example_is_seen_twice_in_an_epoch():
    for rng in cases(60, 3):
        n, batch, seed = int(rng.integers(1, 60)), int(rng.integers(1, 80)), int(rng.integers(100))
        seen = np.concatenate([batch_indices(seed, s, batch, n) for s in range(-(-3 * n // batch))])[: 3 * n]
        for epoch in seen.reshape(3, n):
            assert sorted(epoch) == list(range(n))


def test_a_mixtures_sets_go_through_their_own_epochs():
    for rng in cases(60, 4):
        order = random_order(rng)
        if not isinstance(order, Mixed):
            continue
        seen, offset = order.indices(int(rng.integers(100)), 0, 2000), 0
        for n in order.sizes:
            mine = seen[(offset <= seen) & (seen < offset + n)] - offset
            epochs = mine[: len(mine) // n * n].reshape(-1, n)
            assert (np.sort(epochs, axis=1) == np.arange(n)).all()
            if n > 5 and len(epochs) > 2:
                assert (epochs[0] != epochs[1]).any(), "another order each epoch"
            offset += n


def test_shares_are_exact_to_one_example():
    """After any number of examples; of two sets also in any stretch of them, of more to within two."""
    for rng in cases(60, 5):
        k = int(rng.integers(2, 7))
        weights = whole_weights([int(w) for w in rng.integers(1, 60, k)])
        order = Mixed((10,) * k, weights)
        part, _ = order.places(0, 2 * sum(weights) + 7)
        counts = np.concatenate([np.zeros((1, k)), np.cumsum(np.eye(k)[part], axis=0)])
        off = counts - np.arange(len(counts))[:, None] * np.array(weights) / sum(weights)
        assert np.abs(off).max() < 1
        assert np.ptp(off, axis=0).max() < (1 + 1e-9 if k == 2 else 2)


def test_equal_sets_have_orders_of_their_own():
    order = Mixed((50, 50), (1, 1))
    seen = order.indices(0, 0, 100)
    assert (seen[seen < 50] != seen[seen >= 50] - 50).any()


def test_any_stretch_can_be_had_directly():
    order = Mixed((7, 30, 1), whole_weights((0.5, 0.3, 0.2)))
    whole = order.indices(3, 0, 500)
    for rng in cases(50, 6):
        a, b = sorted(int(x) for x in rng.integers(0, 501, 2))
        np.testing.assert_array_equal(order.indices(3, a, b), whole[a:b])
    far = 10**12
    np.testing.assert_array_equal(order.indices(3, far, far + 40)[5:], order.indices(3, far + 5, far + 40))


def test_held_out_once():
    for rng in cases(60, 7):
        order = random_order(rng)
        if not isinstance(order, Mixed):
            continue
        once = order.once()
        assert len(set(once.tolist())) == len(once) and (once >= 0).all() and (once < sum(order.sizes)).all()
        part, _ = order.places(0, len(once) + 1)
        ends = np.cumsum(order.sizes)
        np.testing.assert_array_equal(np.searchsorted(ends, once, side="right"), part[:-1])
        assert (part == part[-1]).sum() == order.sizes[part[-1]] + 1, "the next one would be of a set that has run out"


@pytest.mark.parametrize(
    ("given", "whole"),
    [
        ((0.7, 0.3), (7, 3)),
        ((1, 1, 2), (1, 1, 2)),
        ((0.1, 0.2), (1, 2)),
        ((5,), (1,)),
        ((1281167, 60000), (9553, 447)),
        ((1e6, 1e-6), (10000, 1)),
    ],
)
def test_whole_weights(given, whole):
    assert whole_weights(given) == whole and sum(whole) <= FINEST + len(whole)


def test_endless_tasks():
    tasks = Tasks(Shuffled(10), 0, 4, 7)
    assert tasks.steps(3) == (10, 1)
    np.testing.assert_array_equal(tasks[3], batch_indices(0, 10, 4, 10))
    np.testing.assert_array_equal(tasks[10**9], batch_indices(0, 7 + 10**9, 4, 10))
    assert len(Tasks(Shuffled(10), 0, 4, 7, 3, 7)) == 0
