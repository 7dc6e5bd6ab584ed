"""Pictures of samples: PNG grids, GIF films, scatter plots of points, npz."""

import math
import pathlib
from collections.abc import Sequence

import numpy as np

from jax_diffusion.data.augment import to_uint8
from jax_diffusion.io.whole import whole

MARGIN = 2  # pixels between tiles


def grid(samples: np.ndarray, columns: int | None = None, scale: int | None = None) -> np.ndarray:
    """Tiles [N, H, W, C] samples in [-1, 1] into one uint8 picture [H', W', 3].

    Of more than three channels the first three are shown: latents look like their picture, vaguely.
    columns: None is about square.  scale: whole-number enlargement; None makes small tiles readable.
    Points [N, 2] are drawn as a scatter plot instead.
    """
    samples = np.asarray(samples)
    if samples.ndim == 2:
        return scatter(samples)
    n, h, w, c = samples.shape
    columns = columns or math.ceil(math.sqrt(n))
    scale = scale or max(1, 48 // max(h, w))
    tiles = np.asarray(to_uint8(samples))
    tiles = np.repeat(tiles, 3, axis=-1) if c == 1 else np.pad(tiles[..., :3], [(0, 0)] * 3 + [(0, max(3 - c, 0))])
    tiles = tiles.repeat(scale, axis=1).repeat(scale, axis=2)
    rows, (h, w) = math.ceil(n / columns), tiles.shape[1:3]
    out = np.full((rows * (h + MARGIN) + MARGIN, columns * (w + MARGIN) + MARGIN, 3), 255, np.uint8)
    for i, tile in enumerate(tiles):
        y, x = (i // columns) * (h + MARGIN) + MARGIN, (i % columns) * (w + MARGIN) + MARGIN
        out[y : y + h, x : x + w] = tile
    return out


def side_by_side(*parts: np.ndarray, across: int = 0) -> np.ndarray:
    """A picture of parts [N, H, W, 1 or 3], sample by sample next to each other: condition, sample, original.

    across: samples in a row; 0 is what makes the picture about square.
    """
    channels = max(p.shape[-1] for p in parts)
    parts = tuple(np.broadcast_to(p, (*p.shape[:3], channels)) if p.shape[-1] == 1 else np.asarray(p) for p in parts)
    across = across or max(1, round(math.sqrt(len(parts[0]) / len(parts))))
    return grid(np.stack(parts, axis=1).reshape(-1, *parts[0].shape[1:]), columns=across * len(parts))


def scatter(points: np.ndarray, size: int = 480, extent: float = 1.6) -> np.ndarray:
    """Points [N, 2] in [-extent, extent]^2 as a picture [size, size, 3]; overlapping dots darken."""
    cell = ((np.asarray(points) / extent + 1) / 2 * size).astype(int)
    counts = np.zeros((size, size))
    for dy, dx in ((0, 0), (0, 1), (1, 0), (1, 1)):  # a dot is 2x2 pixels
        x, y = cell[:, 0] + dx, size - 1 - cell[:, 1] + dy
        inside = (x >= 0) & (x < size) & (y >= 0) & (y < size)
        np.add.at(counts, (y[inside], x[inside]), 1)
    ink = 1 - np.exp(-counts[..., None] / 1.5)
    return np.round(255 * (1 - ink) + np.array([20, 70, 160]) * ink).astype(np.uint8)


def _image(picture: np.ndarray):
    from PIL import Image

    return Image.fromarray(picture)


def _parent(path) -> pathlib.Path:
    path = pathlib.Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    return path


def class_columns(classes: int) -> int | None:
    """Columns of a grid whose labels go round: one a class, where that makes a readable row; else None."""
    return classes if 1 < classes <= 20 else None


def save_picture(path: str | pathlib.Path, picture: np.ndarray) -> None:
    """Writes uint8 [H, W, 3] as a PNG (or whatever the suffix says), whole or not at all."""
    from PIL import Image

    path = _parent(path)
    kind = Image.registered_extensions().get(path.suffix.lower())
    if kind is None:
        raise ValueError(f"unknown file extension: {path.suffix}")  # as Pillow says it
    with whole(path) as draft:
        _image(picture).save(draft, format=kind)


def save_grid(path: str | pathlib.Path, samples: np.ndarray, **options) -> None:
    """Writes grid(samples, **options) as save_picture does."""
    save_picture(path, grid(samples, **options))


def save_film(path: str | pathlib.Path, frames: Sequence[np.ndarray], fps: int = 12, **options) -> None:
    """Writes a GIF, one grid a frame ([T, N, H, W, C] or [T, N, 2]); the last frame stays for two seconds."""
    pictures = [_image(grid(frame, **options)) for frame in frames]
    durations = [1000 // fps] * (len(pictures) - 1) + [2000]
    pictures[0].save(_parent(path), save_all=True, append_images=pictures[1:], duration=durations, loop=0)


def save_npz(path: str | pathlib.Path, samples: np.ndarray, labels: np.ndarray | None = None) -> None:
    """Writes arr_0 (and arr_1, the labels), as guided-diffusion's evaluator reads them: images of 1 or 3 channels as
    uint8 [N, H, W, C], latents and points as float32."""
    picture = samples.ndim == 4 and samples.shape[-1] in (1, 3)
    arrays = [np.asarray(to_uint8(samples) if picture else samples)]
    np.savez(_parent(path), *arrays, *([] if labels is None else [labels]))
