"""Which reader a folder or file belongs to."""

import importlib
import pathlib
from types import ModuleType

from jax_diffusion.errors import UserError, check_options, choose
from jax_diffusion.interop import tensors
from jax_diffusion.interop.diffusers import pipeline
from jax_diffusion.interop.imported import Imported

# Modules of this package, imported when asked for, in the order in which they are tried.
FORMATS = ("guided_diffusion", "dit", "uvit", "edm", "edm2", "denoising_diffusion_pytorch")


def module(name: str) -> ModuleType:
    return importlib.import_module(f"jax_diffusion.interop.{name}")


def open_model(path: str | pathlib.Path, format: str | None = None, **options) -> Imported:
    """The model in a folder of diffusers' or in a file of weights.

    format: "diffusers" or one of FORMATS; None looks at the files.
    options: the format's own, for what names and shapes cannot tell (image_size, ...): see its `read`.
    Raises UserError, one that lists everything, for whatever does not fit.
    """
    path = pathlib.Path(path).expanduser()
    if format is not None:
        choose("format", format, ("diffusers", *FORMATS))
    if not path.exists():
        raise UserError(f"{path} does not exist: give a folder of diffusers' or a file of weights")
    if path.is_dir() or format == "diffusers":
        if format not in (None, "diffusers"):
            raise UserError(f"{path} is a folder: format={format!r} is read from a file of weights; name it")
        if not pipeline.is_folder(path):
            raise UserError(f"{path} holds neither model_index.json nor a component's config.json: name a file in it")
        check_options("diffusers", pipeline.read, options, positional=1)
        return pipeline.read(path, **options)
    found = tensors.open_file(path)
    if format is None:
        format = next((name for name in FORMATS if module(name).matches(found)), None)
    if format is None:
        some = ", ".join(list(found)[:4])
        raise UserError(
            f"{path}: its tensors ({some}, ...) belong to none of {', '.join(FORMATS)}: name one with --format"
        )
    reader = module(format)
    check_options(f"format {format!r}", reader.read, options, positional=1)
    return reader.read(found, **options)
