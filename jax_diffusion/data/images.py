"""From an encoded image, or an array, to uint8 [H, W, C] of the wanted size and channels."""

import contextlib
import functools
import io
import math
import threading
import warnings
from typing import Any, NamedTuple

import numpy as np

from jax_diffusion.errors import UserError, choose

GREY_MODES = {"1", "L", "LA", "La", "I", "I;16", "I;16L", "I;16B", "I;16N"}
ALPHA_MODES = {"LA", "La", "PA", "RGBA", "RGBa"}
WIDE_MODES = {"I", "I;16", "I;16L", "I;16B", "I;16N"}
ORIENTATION = 0x0112  # the EXIF tag
TILE = (322, 323)  # TIFF's width and height of a tile
# Not all that Pillow knows: EPS would start Ghostscript, and others are containers of any size.
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "JPEG2000", "AVIF")
MAX_PIXELS = 1 << 26
LARGE = 1 << 24  # pixels to decode beyond which one image at a time is: 16 bytes a pixel in as many threads is much
_one_large = threading.Lock()


class Format(NamedTuple):
    """What the user asked every image to be."""

    size: tuple[int, ...] = ()  # (H, W), or () for the image's own
    channels: int = 0  # 1, 3, or 0 for as found
    max_pixels: int = MAX_PIXELS  # an image whose header says more is not decoded

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
        max_pixels = getattr(cfg, "max_pixels", MAX_PIXELS)
        if max_pixels < 1:
            raise UserError(f"config.data.max_pixels={max_pixels} leaves no image: the default is {MAX_PIXELS}")
        return cls(size, cfg.channels, max_pixels)


def decode(data: bytes, fmt: Format) -> np.ndarray:
    """Decodes one image file: uint8 [H, W, C], upright, alpha over white, 16 bits rounded to 8.

    Animations give their first frame. Any exception means the file is corrupt, truncated, of no known kind, or larger
    than fmt.max_pixels; memory is at most some 16 bytes a pixel of what its header declares.
    """
    Image, ImageOps, formats = _pillow()
    if Image.MAX_IMAGE_PIXELS is not None and fmt.max_pixels > Image.MAX_IMAGE_PIXELS:
        Image.MAX_IMAGE_PIXELS = fmt.max_pixels
    with Image.open(io.BytesIO(data), formats=formats) as img:
        _check_size(img, fmt.max_pixels)
        if fmt.size:
            # JPEG can decode at 1/2, 1/4, 1/8 in the DCT. Twice the target leaves the final filter its work.
            scale = 2 * max(fmt.size) / min(img.size)
            if scale <= 0.5:
                img.draft(None, (math.ceil(img.width * scale), math.ceil(img.height * scale)))
        with _one_large if img.width * img.height > LARGE else contextlib.nullcontext():
            img.load()  # before the EXIF: in PNG it may follow the pixels
            plain = img.format == "JPEG" and not ("exif" in img.info or "xmp" in img.info)
            if not plain and img.getexif().get(ORIENTATION, 1) != 1:
                img = ImageOps.exif_transpose(img)
            grey = img.mode in GREY_MODES
            img = _flatten(img)
            wanted = fmt.channels or (1 if grey else 3)
            mode = "L" if wanted == 1 else "RGB"
            img = img if img.mode == mode else img.convert(mode)  # which would copy, a tenth of a small image's time
            img = _resize_crop(img, fmt.size)
            return np.asarray(img).reshape(img.height, img.width, wanted)


@functools.cache
def _pillow() -> tuple[Any, Any, tuple[str, ...]]:
    """PIL.Image, PIL.ImageOps, and those of FORMATS that this Pillow was built with."""
    from PIL import Image, ImageOps

    Image.init()  # here rather than in many threads at once
    # What Pillow only warns of is refused; decode raises its limit where the user has raised ours.
    warnings.simplefilter("error", Image.DecompressionBombWarning)
    return Image, ImageOps, tuple(f for f in FORMATS if f in Image.OPEN)


def _check_size(img: Any, max_pixels: int) -> None:
    """ValueError where the header of an opened image declares more pixels than that, of itself or of a tile."""
    width, height = img.size
    if width * height > max_pixels:
        raise ValueError(f"{width}x{height} pixels, more than config.data.max_pixels={max_pixels}")
    if img.format == "TIFF":
        # A tile is decoded whole, whatever the size of the image.
        tile = [int(img.tag_v2.get(tag, 0)) for tag in TILE]
        if tile[0] * tile[1] > max_pixels:
            raise ValueError(f"a TIFF with tiles of {tile[0]}x{tile[1]} pixels")


def _flatten(img: Any) -> Any:
    """A Pillow image of any mode -> one of 8 bits without alpha (L, RGB or another that converts to RGB)."""
    from PIL import Image

    if img.mode == "F":
        raise ValueError("floating-point image: its range is unknown")
    if img.mode in WIDE_MODES:
        wide = np.asarray(img)
        if wide.min() < 0 or wide.max() > 65535:
            raise ValueError("more than 16 bits a channel")
        # Pillow's own convert("L") clips at 255 instead of scaling.
        wide = wide.astype(np.uint32)
        wide += 128
        wide //= 257
        return Image.fromarray(wide.astype(np.uint8))
    if img.mode == "LAB":
        return img.convert("RGB")  # which alone it converts to
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
    if full[0] * full[1] > LARGE:
        # A sliver, 60000x1 say, would become vast: of it only what is kept, and what the filter sees beside it.
        margin = 8 * math.ceil(max(1.0, 1 / scale))
        kept = [min(n, math.ceil(wanted / scale) + margin) for n, wanted in zip(img.size, (width, height), strict=True)]
        kept = [k + (n - k) % 2 for n, k in zip(img.size, kept, strict=True)]  # the centre stays where it is
        if kept[0] < img.width or kept[1] < img.height:
            left, top = (img.width - kept[0]) // 2, (img.height - kept[1]) // 2
            return _resize_crop(img.crop((left, top, left + kept[0], top + kept[1])), size)
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
