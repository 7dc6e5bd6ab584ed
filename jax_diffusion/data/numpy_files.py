"""Arrays saved by NumPy: .npy or .npz, images in uint8 or latents and points in float."""

import pathlib
import zipfile
import zlib
from typing import Any

import numpy as np

from jax_diffusion.data.images import Format, fit
from jax_diffusion.data.source import ArraySource, Source, split_indices
from jax_diffusion.errors import UserError

IMAGE_KEYS = ("images", "image", "x", "data", "latents", "samples", "arr_0")
LABEL_KEYS = ("labels", "label", "y")


def load(cfg: Any, split: str) -> Source:
    """Examples of cfg.path: uint8 [N, H, W] or [N, H, W, C], or float [N, ...] in about [-1, 1].

    Floats are kept as float32. An .npy above cfg.max_bytes stays on disk, memory-mapped, if it needs no
    change. The eval
    set is cfg.eval_path, else the held-out share.
    """
    eval_path = getattr(cfg, "eval_path", "")
    images, labels = _read(cfg.path, cfg.max_bytes)
    labels = labels if cfg.labels else None
    num_classes = None if labels is None else int(labels.max(initial=0)) + 1
    path = cfg.path
    if eval_path and split == "eval":
        path = eval_path
        images, eval_labels = _read(path, cfg.max_bytes)
        labels = eval_labels if num_classes else None
        if num_classes and labels is None:
            raise UserError(f"config.data.eval_path={path!r} has no labels, the training set has")
    rows = None
    if not eval_path and (cfg.holdout or split == "eval"):
        rows = split_indices(len(images), cfg.holdout, split, path)
    return ArraySource(_conform(images, cfg, path), labels, name=path, num_classes=num_classes, rows=rows)


def _read(path: str, max_bytes: int) -> tuple[np.ndarray, np.ndarray | None]:
    file = pathlib.Path(path).expanduser()
    if not path or not file.is_file():
        raise UserError(f"config.data.path={path!r} is no file: give an .npy or .npz")
    try:
        # Beyond max_bytes the system's page cache is the better memory.
        big = file.stat().st_size > max_bytes
        found = np.load(file, mmap_mode="r" if big and file.suffix == ".npy" else None, allow_pickle=False)
        if isinstance(found, np.ndarray):
            return found, None
        with found:
            arrays = {key: found[key] for key in found.files}
    except (OSError, ValueError, EOFError, zipfile.BadZipFile, zlib.error) as error:
        raise UserError(f"config.data.path={path!r} is no readable .npy or .npz ({error})") from error
    label_key = next((key for key in LABEL_KEYS if key in arrays), None)
    labels = None if label_key is None else arrays.pop(label_key)
    key = next((key for key in IMAGE_KEYS if key in arrays), next(iter(arrays)) if len(arrays) == 1 else None)
    if key is None:
        raise UserError(f"config.data.path={path!r} holds {', '.join(arrays)}: name the images {IMAGE_KEYS[0]!r}")
    if labels is not None and (labels.ndim != 1 or labels.dtype.kind not in "iu"):
        raise UserError(f"config.data.path={path!r}: labels are {labels.dtype} {labels.shape}, not integers [N]")
    return arrays[key], labels


def _conform(images: np.ndarray, cfg: Any, path: str) -> np.ndarray:
    """uint8 [N, H, W, C] of the wanted format, or float32 [N, ...] as it is."""
    fmt = Format.from_config(cfg)
    if images.ndim == 0 or len(images) == 0:
        raise UserError(f"config.data.path={path!r} holds no examples: its shape is {images.shape}")
    if images.dtype == np.uint8 and images.ndim in (3, 4):
        images = images[..., None] if images.ndim == 3 else images
        if images.shape[1] in (1, 3) and images.shape[3] > 4:
            raise UserError(f"config.data.path={path!r} is [N, C, H, W] {images.shape}: save x.transpose(0, 2, 3, 1)")
        return fit(images, fmt, path)
    if images.dtype.kind != "f" or images.ndim < 2:
        raise UserError(
            f"config.data.path={path!r} holds {images.dtype} {images.shape}: save uint8 images [N, H, W, C] "
            "or float latents in about [-1, 1]"
        )
    head = images[:1024]
    if head.min() >= 0 and head.max() > 32:
        raise UserError(f"config.data.path={path!r} holds floats in 0..{head.max():.0f}: save images as uint8")
    own = tuple(images.shape[1:3]), images.shape[-1]
    if (fmt.size and fmt.size != own[0]) or (fmt.channels and fmt.channels != own[1]):
        raise UserError(
            f"config.data.path={path!r} holds floats of shape {images.shape[1:]}, which are never resized: "
            "leave --config.data.size=() and --config.data.channels=0"
        )
    return images.astype(np.float32, copy=False)
