"""What is made ahead: in order, bounded in number and in bytes, ended with its consumer."""

import threading

import jax.numpy as jnp
import numpy as np
import pytest

from jax_diffusion.data import ArraySource, Batches
from jax_diffusion.data.prefetch import Prefetch, nbytes

KB = 1 << 10


class Made:
    """A generator of `size` bytes an item that tells how far it has come; each item waits for a permit."""

    def __init__(self, size, n=50):
        self.started, self.size, self.n = 0, size, n
        self.permits, self.closed = threading.Semaphore(0), threading.Event()

    def items(self):
        try:
            for i in range(self.n):
                self.started += 1
                self.permits.acquire()
                yield i, np.zeros(self.size, np.uint8)
        finally:
            self.closed.set()


def reach(condition):
    """Waits until it holds."""
    ready = threading.Event()
    for _ in range(3000):
        if condition():
            return
        ready.wait(0.01)
    raise AssertionError("it never came to hold")


@pytest.mark.parametrize(
    ("most", "limit", "elsewhere", "items"),
    [
        (8, 1 << 30, 0, 8),  # the number bounds
        (100, 5 * KB, 0, 5),  # the bytes do, the one in the making included
        (100, 5 * KB + 1023, 0, 5),
        (100, 12 * KB, 8, 4),  # and those that worker processes may hold
        (100, 10, 0, 2),  # never less than two
        (100, 5 * KB, 8, 2),
        (2, 1 << 30, 0, 2),
        (1, 1 << 30, 0, 1),
    ],
)
def test_no_more_is_made_ahead_than_was_allowed(most, limit, elsewhere, items):
    made = Made(KB)
    with Prefetch(made.items(), most, limit, elsewhere) as ahead:
        for taken in range(4):
            for _ in range(60):  # more than can be made
                made.permits.release()
            # The last of them waits for room, or is in the making with nothing to hold it back.
            reach(lambda taken=taken: made.started == taken + items and len(ahead._buffer.items) == items)
            assert ahead.held_bytes <= max(limit, items * KB)
            assert next(ahead)[0] == taken
    assert made.closed.is_set()


def test_what_is_in_the_making_counts():
    made = Made(KB)
    with Prefetch(made.items(), 100, 3 * KB) as ahead:
        for _ in range(2):
            made.permits.release()
        reach(lambda: len(ahead._buffer.items) == 2 and made.started == 3)
        made.permits.release()
        reach(lambda: len(ahead._buffer.items) == 3)
        assert made.started == 3, "no fourth while three lie ready"
        for _ in range(60):
            made.permits.release()


def test_the_end_and_an_error_come_after_what_was_made():
    def three():
        yield from range(3)
        raise OSError("gone")

    ahead, seen = Prefetch(three(), 8, KB), []
    with pytest.raises(OSError, match="gone"):
        seen.extend(ahead)
    assert seen == [0, 1, 2] and list(ahead) == []
    assert list(Prefetch((i for i in range(5)), 2, 0)) == list(range(5))


def test_closing_ends_what_is_in_the_making():
    made = Made(KB)
    ahead = Prefetch(made.items(), 4, 1 << 30)
    reach(lambda: made.started == 1)

    def go_on():
        while not made.closed.wait(0.01):
            made.permits.release()

    threading.Thread(target=go_on, daemon=True).start()
    ahead.close()
    ahead.close()
    assert made.closed.wait(60) and list(ahead) == [] and ahead.held_bytes == 0


def test_bytes_are_those_of_all_leaves():
    tree = {"image": np.zeros((3, 4), np.uint8), "label": jnp.zeros(5, jnp.int32)}
    assert nbytes((7, tree)) == 12 + 20


def test_batches_hold_no_more_than_config_says():
    images = np.zeros((10, 16, 16, 4), np.uint8)  # 1 KiB each
    with Batches(ArraySource(images), 4, 0, 0, prefetch=100, prefetch_bytes=20 * KB) as batches:
        for _ in range(10):
            next(batches)
            assert batches.held_bytes <= 20 * KB
        reach(lambda: batches.held_bytes == 20 * KB)
