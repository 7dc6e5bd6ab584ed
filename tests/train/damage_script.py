"""Truncates, deletes and flips bytes of every file of a run's newest checkpoint, and reads it as trainer and sampler.

    python tests/train/damage_script.py                      # 20 flips a file, some minutes
    python tests/train/damage_script.py --flips=200 --seed=3

Whatever is done, either the damage is found, the file named and the checkpoint before used (where one was asked for:
one error that names the file), or what comes back is bit for bit what was saved. The last line counts both.
"""

import argparse
import collections
import logging
import os
import pathlib
import random
import shutil
import tempfile

os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax
import numpy as np

from jax_diffusion.errors import UserError
from jax_diffusion.train import checkpoint, stored

# Orbax writes these when the manifest is done. Nothing of theirs but what the manifest repeats is ever used.
HARMLESS = ("_CHECKPOINT_METADATA", "commit_success.txt")


def files_of(folder):
    return sorted(str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file())


def damages(data, flips, rng):
    """(what, new bytes or None to delete) for a file of these bytes."""
    yield "deleted", None
    if data:
        yield "emptied", b""
        yield "truncated", data[: rng.randrange(len(data))]
        yield "cut by one byte", data[:-1]
    yield "lengthened", data + b"\0"
    for _ in range(flips if data else 0):
        flipped = bytearray(data)
        for _ in range(rng.choice((1, 1, 2, 16))):
            flipped[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
        if flipped != data:
            yield "flipped", bytes(flipped)


def same(a, b):
    """Bit for bit."""
    return all(
        np.asarray(x).tobytes() == np.asarray(y).tobytes() for x, y in zip(*map(jax.tree.leaves, (a, b)), strict=True)
    )


def abstract(tree):
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), tree)


def resume(workdir, wanted):
    """(step, state, log) as a trainer starts."""
    log = []
    with checkpoint.Checkpointer(workdir, log=log.append) as checkpoints:
        step, state = checkpoints.newest(lambda step: (step, checkpoints.restore(wanted, step)))
    return step, state, "\n".join(log)


def survives(workdir, name, what, data, states):
    """Damages a file of the newest checkpoint, reads, and puts all back. "found" or "harmless"; AssertionError else.

    states: step -> what was saved, of the two newest checkpoints.
    """
    before, newest = sorted(states)
    folder = workdir / "checkpoints"
    file = folder / str(newest) / name
    saved, case = file.read_bytes(), f"{name} {what}"
    wanted = abstract(states[newest])
    if data is None:
        file.unlink()
    else:
        file.write_bytes(data)
    try:
        found = stored.problem(folder, newest)
        for ema in (True, False):  # a sampler
            weights, step = stored.restore_weights(workdir, wanted.params, ema=ema)
            assert same(weights, states[step].ema if ema else states[step].params), case
            try:
                weights, _ = stored.restore_weights(workdir, wanted.params, step=newest, ema=ema)
                assert same(weights, states[newest].ema if ema else states[newest].params), case
            except UserError as e:
                assert str(file) in str(e) and "\n" not in str(e), f"{case}: {e}"
        step, state, log = resume(workdir, wanted)
        assert same(state, states[step]), case
        if found is None:
            assert step == newest and name in HARMLESS and not log, f"{case}: {log}"
            return "harmless"
        assert str(file) in found and str(file) in log and step == before, f"{case}: {found}, {log}"
        (aside,) = (folder / "broken").iterdir()
        assert aside.name.startswith(f"{newest}-"), case
        aside.rename(folder / str(newest))
        return "found"
    finally:
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(saved)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--flips", type=int, default=20, help="of each file")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    logging.disable(logging.WARNING)  # one for each
    from kill_script import FIELDS

    from jax_diffusion import config as configs
    from jax_diffusion.train import loop, setup

    rng, count = random.Random(options.seed), collections.Counter()
    workdir = pathlib.Path(tempfile.mkdtemp(prefix="damage_script_"))
    try:
        config = configs.override(configs.resolve("toy2d"), [f"--config.{f}" for f in (*FIELDS, "train.steps=40")])
        loop.train(config, workdir, log=lambda line: None)
        wanted, _ = setup.prepare(config, workdir).program.abstract_state()
        with checkpoint.Checkpointer(workdir) as checkpoints:
            states = {step: checkpoints.restore(wanted, step) for step in checkpoints.steps()[-2:]}
        names = files_of(workdir / "checkpoints" / str(max(states)))
        for i, name in enumerate(names):
            data = (workdir / "checkpoints" / str(max(states)) / name).read_bytes()
            here = collections.Counter(
                survives(workdir, name, what, new, states) for what, new in damages(data, options.flips, rng)
            )
            count += here
            print(f"{i + 1}/{len(names)} {name}, {len(data):,} bytes: {dict(here)}", flush=True)
        print(
            f"{sum(count.values())} damages of {len(names)} files: {count['found']} found, the file named and the "
            f"checkpoint before used; {count['harmless']} of {', '.join(HARMLESS)} without effect; no wrong value"
        )
    finally:
        shutil.rmtree(workdir, ignore_errors=True)


if __name__ == "__main__":
    main()
