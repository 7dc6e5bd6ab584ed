"""Decoding by worker processes."""

import logging
import multiprocessing
import os
import pathlib
import shutil
import signal
import subprocess
import sys
import textwrap
import time

import jax
import numpy as np
import pytest

from jax_diffusion.data import Batches, load, workers
from jax_diffusion.data.encoded import LazySource
from jax_diffusion.data.order import Tasks
from jax_diffusion.data.reader import Reader
from jax_diffusion.errors import UserError

pytest.importorskip("grain")


@pytest.fixture
def files(tree, encode, noise):
    """A folder of 30 images of which one, d/bad.png, is cut."""
    cut = encode(noise(99, 64, 64))[:500]
    return tree({f"{'abc'[i % 3]}/{i:02d}.png": i for i in range(29)} | {"b/zbad.png": cut})


def seen(source, start, stop, k=1):
    with Batches(source, 7, 3, start, steps_per_dispatch=k, stop_step=stop) as batches:
        return [(step, jax.device_get(batch)) for step, batch in batches]


def test_batches_are_the_same_for_every_number_of_workers(files, cfg, caplog):
    """Also in a mixture, from a step in the middle, and of several steps a dispatch."""
    c = cfg(path=files, max_bytes=10)
    parts = (2, {"source": "folder", "path": str(files)}), (1, {"source": "digits"})
    mixture = cfg(source="mixture", mixture=parts, max_bytes=10, channels=3, labels=False)
    for fields, start, k, processes in ((c, 3, 2, 3), (mixture, 5, 1, 1)):
        fields.workers = 0
        want = seen(load(fields, "train"), start, 12, k)
        fields.workers = processes
        source = load(fields, "train")
        with caplog.at_level(logging.WARNING, "jax_diffusion.data"):
            caplog.clear()
            got = seen(source, start, 12, k)
        assert [s for s, _ in got] == [s for s, _ in want]
        for (_, a), (_, b) in zip(want, got, strict=True):
            assert a.keys() == b.keys()
            for key in a:
                assert a[key].dtype == b[key].dtype
                np.testing.assert_array_equal(a[key], b[key])
        assert source.skipped == ("b/zbad.png",), "what a worker met is known here"
        assert caplog.text.count("skipped corrupt image b/zbad.png") == 1
        assert not multiprocessing.active_children(), "they end with the iterator"


class Spy:
    """Twenty images; in a worker the eleventh tells what its process has done to JAX."""

    def __init__(self, image):
        self.image = image

    def __len__(self):
        return 20

    def name(self, i):
        return str(i)

    def read(self, i):
        if i == 10 and multiprocessing.parent_process() is not None:
            from jax._src import xla_bridge

            ignored = [signal.getsignal(s) == signal.SIG_IGN for s in (signal.SIGINT, signal.SIGTERM)]
            raise UserError(f"platforms={jax.config.jax_platforms} backends={list(xla_bridge._backends)} {ignored}")
        return self.image, None


def test_what_a_worker_raises_arrives_and_no_device_is_touched(cfg, encode, noise):
    from jax_diffusion.data.images import Format

    source = LazySource(Reader(Spy(encode(noise(0))), Format(), "spy"), name="spy", processes=1)
    batches = source.batches([np.array([0, 1]), np.array([9, 10]), np.array([2, 3])])
    assert next(batches)["image"].shape == (2, 8, 8, 3)
    with pytest.raises(UserError, match=r"^platforms=cpu backends=\[\] \[True, True\]$"):
        next(batches)
    assert not multiprocessing.active_children()


def test_a_worker_that_dies_is_one_error(files, cfg):
    source = load(cfg(path=files, max_bytes=10, workers=1), "train")
    batches = source.batches(Tasks(source.order, 0, 4, 0))
    next(batches)
    [child] = multiprocessing.active_children()
    os.kill(child.pid, signal.SIGKILL)
    with pytest.raises(UserError, match=r"config.data.workers=1: a worker process ended.*-9"):
        for _ in batches:
            pass


def running(pid):
    try:
        return pathlib.Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


@pytest.mark.skipif(not pathlib.Path("/proc/self/stat").exists(), reason="looks at /proc")
def test_workers_end_when_their_parent_is_killed(files, tmp_path):
    script = tmp_path / "train.py"
    script.write_text(
        textwrap.dedent(f"""
        import multiprocessing
        from types import SimpleNamespace
        from jax_diffusion.data import load
        from jax_diffusion.data.order import Tasks

        if __name__ == "__main__":
            common = dict(size=(), channels=0, labels=True, holdout=0.0, max_bytes=10, workers=1)
            source = load(SimpleNamespace(source="folder", path={str(files)!r}, **common), "train")
            batches = source.batches(Tasks(source.order, 0, 4, 0))
            next(batches)
            print(*(p.pid for p in multiprocessing.active_children()), flush=True)
            input()
        """)
    )
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    with subprocess.Popen([sys.executable, str(script)], **pipes, text=True) as child:
        pids = [int(p) for p in child.stdout.readline().split()]
        assert pids and all(map(running, pids))
        child.kill()
    deadline = time.monotonic() + 300
    while any(map(running, pids)) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not any(map(running, pids))


def test_refusals(files, cfg, tmp_path, monkeypatch):
    with pytest.raises(UserError, match=r"config.data.workers=-1 "):
        load(cfg(path=files, workers=-1), "train")
    monkeypatch.setattr(workers.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"workers=2 needs grain: pip install grain"):
        load(cfg(path=files, workers=2), "train")
    assert len(load(cfg(path=files, workers=0), "train")) == 29


def test_what_lies_in_memory_needs_no_workers(files, cfg):
    source = load(cfg(path=files, workers=2), "train")
    next(source.batches(Tasks(source.order, 0, 4, 0)))
    assert not multiprocessing.active_children()


def test_a_compressed_tar_stays_in_its_process(tree, encode, cfg, tmp_path):
    flat = tree({f"{i}.png": encode(np.full((64, 64, 3), i, np.uint8)) for i in range(9)})
    path = shutil.make_archive(str(tmp_path / "a"), "gztar", flat)
    source = load(cfg(path=path, workers=1, max_bytes=100_000), "train")
    assert isinstance(source, LazySource)
    with pytest.raises(UserError, match=r"compressed tar.*unpack it"):
        next(source.batches(Tasks(source.order, 0, 4, 0)))
