"""`jd.load`: a model from wherever it lies."""

import pathlib

from jax_diffusion import model as models
from jax_diffusion.errors import UserError
from jax_diffusion.model import Model


def load(path: str | pathlib.Path, *, step: int | None = None, ema: bool = True, **options) -> Model:
    """The model of one of our runs, of a folder of diffusers', or of a file of PyTorch weights.

    step:    of a run: which checkpoint, None for the newest.
    ema:     the averaged weights where there are some, else the raw ones.
    options: of a run ema_std, see model.load; else format and the format's own, see interop.open_model.

    The Model holds network, parameters and process, and default_table() is the solver that came with it.
    Raises UserError where nothing is there, or something does not fit.
    """
    path = pathlib.Path(path)
    if (path / "dataset.json").is_file():  # a run of ours
        return models.load(path, step=step, ema=ema, **options)
    from jax_diffusion import interop
    from jax_diffusion.interop.diffusers import pipeline

    if path.is_file() or (path.is_dir() and pipeline.is_folder(path)):
        if step is not None:
            raise UserError(f"step={step}: {path} is no run of ours and holds one set of weights; leave it out")
        return interop.to_model(interop.open_model(path, **options), ema=ema)
    return models.load(path, step=step, ema=ema, **options)
