"""An imported model as a Model, and as a workdir."""

import pathlib

import jax
import jax.numpy as jnp

from jax_diffusion import experiment
from jax_diffusion import model as models
from jax_diffusion.errors import UserError
from jax_diffusion.interop.imported import Imported
from jax_diffusion.train import checkpoint
from jax_diffusion.train import workdir as workdirs


def to_model(imported: Imported, *, ema: bool = True) -> models.Model:
    """The Model: network, parameters, process and default solver. ema: the averaged weights where there are some."""
    parts = experiment.build(imported.config, imported.shape, len(imported.class_names))
    params = imported.ema if ema and imported.ema is not None else imported.params
    params = jax.tree.map(jnp.asarray, params)
    return models.make(imported.config, params, imported.shape, imported.class_names, 0, parts)


def to_workdir(imported: Imported, workdir: str | pathlib.Path, *, source: str = "") -> None:
    """Makes a workdir that `sample`, `evaluate` and `train` (which then fine-tunes) take.

    source: where it came from, kept in dataset.json. Raises UserError where the workdir holds a run.
    """
    workdir = pathlib.Path(workdir)
    if (workdir / "config.json").exists():
        raise UserError(f"--workdir={workdir} holds a run already: use another folder")
    workdir.mkdir(parents=True, exist_ok=True)
    with checkpoint.Checkpointer(workdir) as checkpoints:
        checkpoints.save_weights(imported.params, imported.ema)
    facts = {
        "name": source,
        "shape": [int(n) for n in imported.shape],
        "class_names": list(imported.class_names),
        "imported": {"source": source, "notes": list(imported.notes)},
    }
    workdirs.save_facts(workdir, imported.config, facts)
