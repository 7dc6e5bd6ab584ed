"""From an encoded image, or an array, to uint8 [H, W, C] of the wanted size and channels."""

import io
from typing import Any, NamedTuple

import numpy as np

from jax_diffusion.errors import UserError, choose

GREY_MODES = {"1", "L", "LA", "La", "I", "I;16", "I;16L", "I;16B", "I;16N"}
ALPHA_MODES = {"LA", "La", "PA", "RGBA", "RGBa"}
WIDE_MODES = {"I", "I;16", "I;16L", "I;16B", "I;16N"}
ORIENTATION = 0x0112  # the EXIF tag


class Format(NamedTuple):
    """What the user asked every image to be."""

    size: tuple[int, ...] = ()  # (H, W), or () for the image's own
    channels: int = 0  # 1, 3, or 0 for as found

    @classmethod
    def from_config(cls, cfg: Any) -> "Format":
        """Reads size, channels and crop of a data config; UserError where one is not valid."""
        size = cfg.size or ()
        size = (size, size) if isinstance(size, int) else tuple(size)
        if size and (len(size) != 2 or any(not isinstance(s, (int, np.integer)) or s < 1 for s in size)):
            raise UserError(f"config.data.size={size} is not (height, width): give --config.data.size=64,64")
        if cfg.channels not in (0, 1, 3):
            raise UserError(f"config.data.channels={cfg.channels} is not 1 (grey), 3 (colour) or 0 (as found)")
        choose("config.data.crop", getattr(cfg, "crop", "center"), ("center",))
        return cls(size, cfg.channels)


def decode(data: bytes, fmt: Format) -> np.ndarray:
    """Decodes one image file: uint8 [H, W, C], upright, alpha over white, 16 bits rounded to 8.

    Animations give their first frame. Any exception means the file is corrupt, truncated or of no known kind.
    """
    from PIL import Image, ImageOps

    with Image.open(io.BytesIO(data)) as img:
        if fmt.size:
            # JPEG can decode at 1/2, 1/4, 1/8 in the DCT. Twice the target leaves the final filter its work.
            scale = 2 * max(fmt.size) / min(img.size)
            img.draft(None, (int(np.ceil(img.width * scale)), int(np.ceil(img.height * scale))))
        img.load()  # before the EXIF: in PNG it may follow the pixels
        if img.getexif().get(ORIENTATION, 1) != 1:
            img = ImageOps.exif_transpose(img)
        grey = img.mode in GREY_MODES
        img = _flatten(img)
        wanted = fmt.channels or (1 if grey else 3)
        img = img.convert("L" if wanted == 1 else "RGB")
        img = _resize_crop(img, fmt.size)
        return np.asarray(img).reshape(img.height, img.width, wanted)


def _flatten(img: Any) -> Any:
    """A Pillow image of any mode -> one of 8 bits without alpha (L, RGB or another that converts to RGB)."""
    from PIL import Image

    if img.mode == "F":
        raise ValueError("floating-point image: its range is unknown")
    if img.mode in WIDE_MODES:
        wide = np.asarray(img).astype(np.int64)
        if wide.min() < 0 or wide.max() > 65535:
            raise ValueError("more than 16 bits a channel")
        # Pillow's own convert("L") clips at 255 instead of scaling.
        return Image.fromarray(((wide + 128) // 257).astype(np.uint8))
    if img.mode in ALPHA_MODES or "transparency" in img.info:
        rgba = img.convert("RGBA")
        white = Image.new("RGBA", rgba.size, (255, 255, 255, 255))
        # Composited before it is resized, else the colour of invisible pixels bleeds into the edges.
        return Image.alpha_composite(white, rgba).convert("RGB")
    return img


def _resize_crop(img: Any, size: tuple[int, ...]) -> Any:
    """Scales until `size` (H, W) is just covered, antialiased, and cuts the centre out."""
    from PIL.Image import Resampling

    if not size or (img.height, img.width) == size:
        return img
    height, width = size
    scale = max(height / img.height, width / img.width)
    full = (max(width, round(img.width * scale)), max(height, round(img.height * scale)))
    # Lanczos is the sharper one down; up, bicubic rings less. Pillow widens both filters when reducing.
    filter_ = Resampling.LANCZOS if scale < 1 else Resampling.BICUBIC
    img = img.resize(full, filter_, reducing_gap=3.0 if scale < 1 else None)
    left, top = (full[0] - width) // 2, (full[1] - height) // 2
    return img.crop((left, top, left + width, top + height))


def fit(images: np.ndarray, fmt: Format, name: str) -> np.ndarray:
    """Brings decoded images uint8 [N, H, W, C] to the wanted size and channels; a no-op where they are.

    Raises:
      UserError: channels are wanted that C cannot become.
    """
    from PIL import Image

    _, h, w, c = images.shape
    wanted, size = fmt.channels or c, fmt.size or (h, w)
    if (h, w) == size and c == wanted:
        return images
    if c not in (1, 3) or wanted not in (1, 3):
        raise UserError(
            f"config.data: {name} has {c} channels, which cannot be resized or made {wanted}; "
            "leave --config.data.channels=0 and --config.data.size=()"
        )
    mode = "L" if wanted == 1 else "RGB"
    out = np.empty((len(images), *size, wanted), np.uint8)
    for i, image in enumerate(images):
        img = Image.fromarray(image[..., 0] if c == 1 else image).convert(mode)
        out[i] = np.asarray(_resize_crop(img, size)).reshape(*size, wanted)
    return out
