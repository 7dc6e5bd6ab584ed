"""Other people's models, read and written without PyTorch.

    imported = interop.open_model("ddpm-cifar10-32")          # a folder of diffusers', or a file of weights
    interop.to_workdir(imported, "runs/ddpm")                 # what sample, train and evaluate take
    model = jd.load("ddpm-cifar10-32")                        # the same, in memory
    interop.save_diffusers(model, "exported")                 # and back

A new format of bare state dicts is one module with

    DESCRIPTION: str                      # one line for --help
    matches(tensors) -> bool              # by names alone, nothing is read
    read(tensors, **options) -> Imported  # keyword options for what names and shapes cannot tell

and one line in FORMATS. A new component of diffusers is a module in interop/diffusers.
"""

from jax_diffusion.interop import diffusers
from jax_diffusion.interop.export import save_diffusers
from jax_diffusion.interop.formats import FORMATS, open_model
from jax_diffusion.interop.imported import Architecture, Imported
from jax_diffusion.interop.runs import to_model, to_workdir
from jax_diffusion.interop.tensors import Tensors, open_file

__all__ = [
    "FORMATS",
    "Architecture",
    "Imported",
    "Tensors",
    "diffusers",
    "open_file",
    "open_model",
    "save_diffusers",
    "to_model",
    "to_workdir",
]
