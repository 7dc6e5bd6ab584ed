"""Kills a training run at random moments, resumes it every time, and holds it against one that was left alone.

    python tests/train/kill_script.py                        # 20 kills, ten minutes on two CPU cores
    python tests/train/kill_script.py --kills=200 --seed=7

Each life of the run is ended by SIGKILL: at any moment, or at one that is lain in wait for (MOMENTS), such as the
moment when a checkpoint is complete under its temporary name. In the end parameters, averages, optimizer,
metrics.jsonl, samples and snapshots have to be the same bit for bit. The last line says so, or what is not; the exit
status too.
"""

import argparse
import os
import pathlib
import random
import re
import shutil
import subprocess
import sys
import tempfile
import threading
import time

os.environ.setdefault("JAX_PLATFORMS", "cpu")

STEPS = 1000
FIELDS = ["model.width=32", "model.depth=2", "train.batch_size=64", "optim.warmup=5", "process.timesteps=importance",
          "train.steps_per_dispatch=1", "train.log_every=5", "train.eval_every=50", "train.eval_batches=1",
          "train.sample_every=100", "train.checkpoint_every=20", "ema.profiles=(0.1,)", "ema.snapshot_every=100",
          "sampling.steps=4", "sampling.num=50", "sampling.batch_size=50"]  # fmt: skip


def drafts(workdir):
    """The folders of checkpoints that have not got their names."""
    return list((workdir / "checkpoints").glob("*.orbax-checkpoint-tmp*"))


def named(workdir):
    return {p.name for p in (workdir / "checkpoints").glob("*") if p.name.isdigit()}


# The moments to lie in wait for: (workdir, named checkpoints before) -> whether it is now.
MOMENTS = {
    "any": None,  # after a random time
    "start": lambda workdir, before: (workdir / "train.lock").exists(),
    "draft": lambda workdir, before: drafts(workdir),
    "item": lambda workdir, before: any(d.glob("*.orbax-checkpoint-tmp*") for d in drafts(workdir)),
    "metadata": lambda workdir, before: any((d / "meta" / "metadata").exists() for d in drafts(workdir)),
    "manifest": lambda workdir, before: any((d / "MANIFEST").exists() for d in drafts(workdir)),
    "committed": lambda workdir, before: any((d / "commit_success.txt").exists() for d in drafts(workdir)),
    "named": lambda workdir, before: named(workdir) - before,
    "deleting": lambda workdir, before: before - named(workdir),
}


def command(workdir, steps, cache):
    overrides = [f"--config.{field}" for field in (*FIELDS, f"train.steps={steps}")]
    program = [sys.executable, "-m", "jax_diffusion.cli.main", "train", f"--compile_cache={cache}"]
    return [*program, "--config=toy2d", f"--workdir={workdir}", *overrides]


class Life:
    """One process of the run; `step` is the last it has said."""

    def __init__(self, arguments):
        self.process = subprocess.Popen(arguments, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        self.lines, self.step = [], 0
        self.thread = threading.Thread(target=self._listen, daemon=True)
        self.thread.start()

    def _listen(self):
        for line in self.process.stdout:
            self.lines.append(line.rstrip())
            if m := re.match(r" *step +([\d,]+)/", line):
                self.step = int(m[1].replace(",", ""))

    def until(self, condition, seconds=600):
        """Whether it came true before the process ended."""
        end = time.monotonic() + seconds
        while self.process.poll() is None:
            if condition():
                return True
            if time.monotonic() > end:
                raise TimeoutError("\n".join(self.lines[-20:]))
            time.sleep(2e-4)
        return False

    def kill(self):
        self.process.kill()
        self.process.wait()
        self.thread.join()


def kill_once(arguments, workdir, moment, target, rng):
    """Starts the run and kills it at the first such moment after step `target`. Returns the life."""
    life, wait = Life(arguments), rng.uniform(0, 0.3)
    condition = MOMENTS[moment]
    if moment != "start":
        life.until(lambda: life.step >= target)
    if condition is None:
        end = time.monotonic() + wait
        life.until(lambda: time.monotonic() >= end)
    else:
        before = named(workdir)
        life.until(lambda: condition(workdir, before))
        if rng.random() < 0.5:  # the moment itself, or a little later
            time.sleep(rng.uniform(0, 0.02))
    life.kill()
    return life


def endure(workdir, kills, steps, cache, rng, log=print, moments=None):
    """A run of `steps`, killed `kills` times."""
    arguments = command(workdir, steps, cache)
    moments = [list(MOMENTS)[i % len(MOMENTS)] for i in range(kills)] if moments is None else moments
    # Ever later in the run, so that every life has something to do.
    targets = [int(steps * (i + 0.8 * rng.random()) / (kills + 1)) for i in range(kills)]
    for i, (moment, target) in enumerate(zip(moments, targets, strict=True)):
        life = kill_once(arguments, workdir, moment, target, rng)
        if life.process.returncode != -9:
            raise SystemExit(
                f"kill {i + 1}: the run ended by itself ({life.process.returncode}):\n" + "\n".join(life.lines)
            )
        resumed = next((line for line in life.lines if line.startswith("resuming")), "started")
        left = [p.name for p in drafts(workdir)] or "nothing"
        log(f"kill {i + 1}/{kills} ({moment}): {resumed}; killed after step {life.step}; left behind: {left}")
        bad = [line for line in life.lines if "damaged" in line or "Traceback" in line or "error" in line]
        for line in bad:
            log(f"    {line}")
    done = subprocess.run(arguments, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"the last life failed with {done.returncode}: {done.stdout[-2000:]}{done.stderr[-2000:]}")


def state_of(workdir):
    from jax_diffusion import config as configs
    from jax_diffusion.train import checkpoint, setup

    config = configs.from_json((workdir / "config.json").read_text())
    wanted, _ = setup.prepare(config, workdir).program.abstract_state()
    with checkpoint.Checkpointer(workdir) as checkpoints:
        return checkpoints.restore(wanted)


def content(path):
    """A file's bytes; of safetensors, which writes its metadata in any order, the arrays'."""
    if path.suffix != ".safetensors":
        return path.read_bytes()
    from safetensors.numpy import load_file

    return {name: array.tobytes() for name, array in load_file(path).items()}


def differences(a, b):
    """What is not the same in two workdirs, a line each."""
    import jax
    import numpy as np

    out, (one, two) = [], (jax.tree_util.tree_leaves_with_path(state_of(w)) for w in (a, b))
    for (path, x), (_, y) in zip(one, two, strict=True):
        if np.asarray(x).tobytes() != np.asarray(y).tobytes():
            out.append(f"state{jax.tree_util.keystr(path)}")
    names = {p.relative_to(w) for w in (a, b) for kind in ("samples/*", "ema/*") for p in w.glob(kind)}
    for name in sorted(map(str, {*names, "metrics.jsonl", "config.json", "dataset.json"})):
        if not all((w / name).exists() for w in (a, b)) or content(a / name) != content(b / name):
            out.append(name)
    return out, len(one), len(names)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--keep", metavar="DIR", help="where the two workdirs stay; default: nowhere")
    options = parser.parse_args()
    folder = pathlib.Path(options.keep or tempfile.mkdtemp(prefix="kill_script_"))
    folder.mkdir(parents=True, exist_ok=True)
    calm, killed = folder / "calm", folder / "killed"
    try:
        subprocess.run(command(calm, options.steps, folder / "cache"), check=True, stdout=subprocess.DEVNULL)
        print(f"a run of {options.steps} steps left alone: done", flush=True)
        endure(killed, options.kills, options.steps, folder / "cache", random.Random(options.seed),
               log=lambda line: print(line, flush=True))  # fmt: skip
        bad, leaves, files = differences(calm, killed)
        lines = len((calm / "metrics.jsonl").read_text().splitlines())
        if bad:
            raise SystemExit(f"DIFFERENT after {options.kills} kills: {', '.join(bad)}")
        print(f"identical after {options.kills} kills: {leaves} leaves of parameters, averages and optimizer, {lines} "
              f"lines of metrics.jsonl, {files} samples and snapshots")  # fmt: skip
    finally:
        if not options.keep:
            shutil.rmtree(folder, ignore_errors=True)


if __name__ == "__main__":
    main()
