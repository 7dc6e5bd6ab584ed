"""From a config and a workdir to everything a run is made of; every check a user may fail is made here."""

import pathlib
from typing import NamedTuple

import jax
import numpy as np

from jax_diffusion import config as configs
from jax_diffusion import data, experiment, lowering, sharding
from jax_diffusion.errors import UserError, choose
from jax_diffusion.train import checkpoint, loggers, posthoc, program, step, stored
from jax_diffusion.train.workdir import read_config, read_facts, save_facts

# What a resumed run may not change: the same step would mean something else.
FIXED = ("seed", "condition.", "process.", "model.", "data.", "optim.", "ema.decay", "ema.warmup",
         "ema.profiles", "train.batch_size", "train.label_dropout", "train.rng")  # fmt: skip
# Of these, what says where the same data lies and how the same batches are made: `_check_same_data` looks at the rest.
FREE = ("data.path", "data.eval_path", "data.max_bytes", "data.prefetch_bytes", "data.on_device", "data.workers")


class Setup(NamedTuple):
    """The parts of a run."""

    config: configs.ConfigDict
    workdir: pathlib.Path
    source: data.Source
    held_out: data.Source | None
    class_names: tuple[str, ...]
    program: program.Program

    @property
    def mesh(self) -> jax.sharding.Mesh:
        return self.program.mesh

    @property
    def shape(self) -> tuple[int, ...]:
        """Of one sample."""
        return self.program.shape

    @property
    def parts(self) -> experiment.Parts:
        return self.program.parts


def settle_config(config: configs.ConfigDict | None, workdir: pathlib.Path) -> configs.ConfigDict:
    """The config of the run: the given one, held against the one the workdir was started with."""
    try:
        old = read_config(workdir)
    except FileNotFoundError:
        if config is None:
            raise UserError(
                f"--workdir={workdir} holds no run to resume: start one with --config, for instance --config=digits"
            ) from None
        return config
    if config is None or checkpoint.only_weights(workdir):  # nothing was trained here yet: all may still be chosen
        return config or old
    bad = [line for line in configs.differences(old, config) if line.startswith(FIXED) and not line.startswith(FREE)]
    if bad:
        raise UserError(
            f"--workdir={workdir} was started with another config ({'; '.join(bad)}): use another workdir, or "
            "resume without --config"
        )
    return config


def prepare(config: configs.ConfigDict, workdir: pathlib.Path) -> Setup:
    """Opens the data, builds the network and checks what can be checked before anything is compiled."""
    t = config.train
    for field in ("steps", "batch_size", "accumulate", "steps_per_dispatch", "log_every", "checkpoint_every"):
        if t[field] < 1:
            raise UserError(f"--config.train.{field}={t[field]} must be at least 1")
    for field in ("max_bad_steps", "max_rollbacks", "stall_seconds"):
        if t[field] < 0:
            raise UserError(f"--config.train.{field}={t[field]} must be at least 0")
    if t.spike and t.spike <= 1:
        raise UserError(f"--config.train.spike={t.spike} is how many times its mean a loss may be: 0 (off), or above 1")
    choose("--config.train.rng", t.rng, step.GENERATORS)
    mesh = sharding.make_mesh(config.mesh.data, config.mesh.fsdp, config.mesh.tensor)
    lowering.keep_memory(mesh.devices.flat[0].platform)
    sharding.check_batch(mesh, t.batch_size, t.accumulate)  # before the data is opened

    splits = ("train", "eval") if t.eval_every else ("train",)
    opened = data.load_splits(config.data, *splits)
    source, held_out = opened[0], opened[1] if t.eval_every else None
    names = source.class_names if config.data.labels and source.num_classes else ()
    _check_imported(workdir, source.shape, names)
    _check_same_data(workdir, source, names)
    built = program.build(config, source.shape, len(names), mesh)
    experiment.default_table(config, built.parts.process)  # a wrong solver is said now, not at the first samples

    posthoc.check(config.ema)
    loggers.parse(t.loggers)
    return Setup(config, workdir, source, held_out, names, built)


def _check_imported(workdir: pathlib.Path, shape: tuple[int, ...], names: tuple[str, ...]) -> None:
    """Raises UserError unless the data is of the kind that the weights to start from were made for."""
    facts = read_facts(workdir)
    if "imported" not in facts or not checkpoint.only_weights(workdir):
        return
    if tuple(shape) != tuple(facts["shape"]) or len(names) != len(facts["class_names"]):
        raise UserError(
            f"--workdir={workdir} holds a network for {'x'.join(map(str, facts['shape']))} and "
            f"{len(facts['class_names'])} classes, and the data is {'x'.join(map(str, shape))} with {len(names)}: set "
            "--config.data.size, --config.data.channels or --config.data.labels, or use other data"
        )


def _check_same_data(workdir: pathlib.Path, source: data.Source, names: tuple[str, ...]) -> None:
    """Raises UserError where the data has changed since the run was started: its steps would mean something else."""
    facts = read_facts(workdir)
    if "train_examples" not in facts or not stored.steps(stored.folder_of(workdir)):
        return
    old = (facts["train_examples"], tuple(facts["shape"]), tuple(facts["class_names"]))
    for what, was, now in zip(
        ("examples", "shape", "classes"), old, (len(source), tuple(source.shape), names), strict=True
    ):
        if was != now:
            raise UserError(
                f"--workdir={workdir} was started on other data (its {what}: {was}, now {now}): give that data with "
                "--config.data.path, or use another workdir"
            )


def describe(s: Setup) -> str:
    """The run in one line."""
    devices = jax.devices()
    skipped = f", {len(s.source.skipped)} corrupt files skipped" if s.source.skipped else ""
    what = "images" if len(s.shape) == 3 else "points"
    if len(s.shape) == 3 and s.shape[-1] not in (1, 3):
        what = "latents (pictures of them show three channels)"
    return (
        f"{s.source.name}: {len(s.source):,} {what} of {'x'.join(map(str, s.shape))}, "
        f"{len(s.class_names) or 'no'} classes{skipped} | {s.config.model.name}, "
        f"{s.parts.network.parameter_count():,} parameters | {len(devices)} {devices[0].device_kind} device(s)"
    )


def write_facts(s: Setup) -> None:
    """What `sample` needs to know without the data: config.json and dataset.json."""
    if jax.process_index() == 0:
        facts = {
            "name": s.source.name,
            "shape": [int(n) for n in s.shape],
            "class_names": list(s.class_names),
            "train_examples": len(s.source),
            "skipped": list(s.source.skipped),
        }
        imported = read_facts(s.workdir).get("imported")
        facts |= {} if imported is None else {"imported": imported}
        save_facts(s.workdir, s.config, facts)


def eval_indices(n: int, batch_size: int, batches: int) -> np.ndarray:
    """The examples of validation, [batches, B], always the same: evenly over the set, which may be sorted by class, and
    from its beginning again where it is small."""
    total = batch_size * batches
    return (np.arange(total) * max(n, total) // total % n).reshape(batches, batch_size)
