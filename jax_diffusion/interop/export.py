"""Our models as folders of diffusers'."""

import pathlib
from typing import Any

import numpy as np

from jax_diffusion import config as configs
from jax_diffusion.errors import UserError
from jax_diffusion.interop.diffusers import pipeline
from jax_diffusion.interop.imported import Architecture
from jax_diffusion.model import Model


def architecture_of(model: Model) -> Architecture:
    """What of a Model describes its network."""
    c = model.config
    options = {"name": c.model.name, **configs.options(c.model)}
    cond = model.condition.channels if model.condition is not None else options.get("cond_channels", 0)
    classes = model.network.num_classes
    return Architecture(options, tuple(model.shape), classes, bool(c.process.learn_variance), cond)


def save_diffusers(model: Model, folder: str | pathlib.Path, *, label: int | None = None) -> pathlib.Path:
    """Writes a pipeline folder that diffusers opens, without torch. Returns the folder.

    label: makes an unconditional network of a class-conditional U-Net that always draws this class (num_classes: as
        without a label), since DDPMPipeline and DDIMPipeline hand no labels on. The class's embedding goes into the
        bias of the time embedding's last layer, to which it is added anyway.

    Raises UserError where diffusers has no such network or process.
    """
    folder = pathlib.Path(folder)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UserError(f"{folder} exists and is not empty: name a new folder")
    architecture, params = architecture_of(model), model.params
    if label is not None:
        architecture, params = _unconditional(architecture, params, label)
    params = {name: part for name, part in params.items() if name != "uncertainty"}  # of the training loss alone
    return pipeline.write(folder, architecture, model.config, params, model.class_names)


def _unconditional(architecture: Architecture, params: Any, label: int) -> tuple[Architecture, Any]:
    if architecture.model["name"] != "unet" or not architecture.num_classes:
        raise UserError(f"label={label}: only a class-conditional U-Net can be made unconditional; leave it out")
    if not 0 <= label <= architecture.num_classes:
        raise UserError(f"label={label}: the classes are 0 to {architecture.num_classes - 1}, and 'none'")
    params = dict(params)
    table = np.asarray(params.pop("label")["embedding"], np.float32)
    embedding = table[label] if label < len(table) else np.zeros_like(table[0])
    last = params["time2"]
    params["time2"] = {**last, "bias": np.asarray(last["bias"], np.float32) + embedding}
    return architecture._replace(num_classes=0), params
