"""From a config and a workdir to everything a run is made of; every check a user may fail is made here."""

import json
import pathlib
from typing import Any, NamedTuple

import jax
import numpy as np

from jax_diffusion import config as configs
from jax_diffusion import data, experiment, lowering, sharding
from jax_diffusion.errors import UserError, choose
from jax_diffusion.train import checkpoint, posthoc, program, step

# What a resumed run may not change: the same step would mean something else.
FIXED = ("seed", "condition.", "process.", "model.", "data.", "optim.", "ema.decay", "ema.warmup",
         "ema.profiles", "train.batch_size", "train.label_dropout", "train.rng")  # fmt: skip


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
    saved = workdir / "config.json"
    if not saved.exists():
        if config is None:
            raise UserError(
                f"--workdir={workdir} holds no run to resume: start one with --config, for instance --config=digits"
            )
        return config
    old = configs.from_json(saved.read_text())
    if config is None or checkpoint.only_weights(workdir):  # nothing was trained here yet: all may still be chosen
        return config or old
    bad = [line for line in configs.differences(old, config) if line.startswith(FIXED)]
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
    choose("--config.train.rng", t.rng, step.GENERATORS)
    mesh = sharding.make_mesh(config.mesh.data, config.mesh.fsdp, config.mesh.tensor)
    lowering.keep_memory(mesh.devices.flat[0].platform)
    sharding.check_batch(mesh, t.batch_size, t.accumulate)  # before the data is opened

    source = data.load(config.data, "train")
    held_out = data.load(config.data, "eval") if t.eval_every else None
    names = source.class_names if config.data.labels and source.num_classes else ()
    _check_imported(workdir, source.shape, names)
    built = program.build(config, source.shape, len(names), mesh)
    experiment.default_table(config, built.parts.process)  # a wrong solver is said now, not at the first samples

    posthoc.check(config.ema)
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


def read_facts(workdir: pathlib.Path) -> dict[str, Any]:
    """dataset.json, {} where there is none yet."""
    try:
        return json.loads((workdir / "dataset.json").read_text())
    except FileNotFoundError:
        return {}


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


def save_facts(workdir: pathlib.Path, config: configs.ConfigDict, facts: dict[str, Any]) -> None:
    """config.json, and dataset.json with at least "shape" and "class_names"."""
    _write_whole(workdir / "dataset.json", json.dumps(facts, indent=2) + "\n")
    _write_whole(workdir / "config.json", configs.to_json(config))


def _write_whole(path: pathlib.Path, text: str) -> None:
    """Never half a file: another process, or a later run, may be reading it."""
    draft = path.with_suffix(".draft")
    draft.write_text(text)
    draft.replace(path)


def eval_indices(n: int, batch_size: int, batch: int) -> np.ndarray:
    """The examples of validation batch number `batch`: always the same, wrapping where the set is small."""
    return np.arange(batch * batch_size, (batch + 1) * batch_size) % n
