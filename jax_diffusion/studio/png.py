"""A picture with what it was made of inside: a PNG whose tEXt chunk holds JSON."""

import base64
import io
import json
from typing import Any

import numpy as np

from jax_diffusion.errors import UserError
from jax_diffusion.version import __version__

KEY = "jax-diffusion"  # of the tEXt chunk


def encode(picture: np.ndarray, record: dict[str, Any] | None = None) -> bytes:
    """A PNG of uint8 [H, W], [H, W, 1] or [H, W, 3]. record: what to write into it, JSON."""
    from PIL import Image, PngImagePlugin

    said = PngImagePlugin.PngInfo()
    if record is not None:
        said.add_text("Software", f"jax-diffusion {__version__}")
        said.add_text(KEY, json.dumps(record))  # ASCII, as tEXt wants it
    file = io.BytesIO()
    picture = picture[..., 0] if picture.ndim == 3 and picture.shape[-1] == 1 else picture
    Image.fromarray(picture).save(file, "PNG", pnginfo=said, compress_level=1 if record is None else 6)
    return file.getvalue()


def read_record(data: bytes) -> dict[str, Any]:
    """What `encode` wrote into a picture. Raises UserError where the file is no PNG, or one of another origin."""
    from PIL import Image

    try:
        with Image.open(io.BytesIO(data), formats=("PNG",)) as image:
            image.load()  # as far as its last chunk
            text = image.info.get(KEY)
    except Exception as e:
        raise UserError(f"this file is no PNG that can be read ({e})") from None
    if text is None:
        raise UserError("this PNG has no settings in it: only pictures saved by this page have")
    try:
        record = json.loads(text)
        if not isinstance(record, dict):
            raise ValueError(f"not an object but {type(record).__name__}")
    except (ValueError, RecursionError) as e:
        raise UserError(f"the settings in this PNG cannot be read ({e})") from None
    return record


def pack(array: np.ndarray) -> str:
    """uint8 [H, W, 1 or 3], or bool [H, W], as text for a record."""
    return base64.b64encode(encode(array.astype(np.uint8) * 255 if array.dtype == bool else array)).decode()


def unpack(text: Any, shape: tuple[int, ...]) -> np.ndarray:
    """uint8 of `shape`, (H, W) or (H, W, C), from `pack`'s text. Raises UserError where it is something else."""
    from PIL import Image

    try:
        with Image.open(io.BytesIO(base64.b64decode(text, validate=True)), formats=("PNG",)) as image:
            if image.size != (shape[1], shape[0]):
                raise ValueError(f"{image.width}x{image.height}, and this model's images are {shape[1]}x{shape[0]}")
            if len(image.getbands()) != (shape[2] if len(shape) == 3 else 1):
                raise ValueError(f"{len(image.getbands())} channels")
            return np.asarray(image).reshape(shape)
    except Exception as e:
        raise UserError(f"the image or mask in this PNG is not one for this model ({e})") from None
