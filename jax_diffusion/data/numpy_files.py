"""Arrays saved by NumPy: .npy or .npz, images in uint8 or latents and points in float, in one file or a folder of them.

    a.npy, or a.npz with arrays "images" and "labels"
    folder/train-x_000.npy train-x_001.npy train-labels_000.npy ... test-x.npy   (the words say what each one is)

What does not fit into max_bytes is mapped into memory where it lies: members of an uncompressed .npz too.
"""

import pathlib
import re
import zipfile
from typing import Any

import numpy as np

from jax_diffusion.data import shards
from jax_diffusion.data.images import Format, fit
from jax_diffusion.data.source import ArraySource, Once, Pieces, Source, split_indices
from jax_diffusion.errors import UserError

IMAGE_KEYS = ("images", "image", "x", "data", "latents", "samples", "arr_0")
LABEL_KEYS = ("labels", "label", "y")
LOCAL_HEADER = 30  # bytes of a zip member's header before its name, whose length stands in the last four


def load(cfg: Any, split: str, once: Once) -> Source:
    """Examples of cfg.path: uint8 [N, H, W] or [N, H, W, C], or float [N, ...] in about [-1, 1].

    Floats become float32. The eval set is cfg.eval_path, what the files' names say, or the held-out share.
    """
    train, test = once(_files, cfg.path, "config.data.path")
    if eval_path := getattr(cfg, "eval_path", ""):
        test, _ = once(_files, eval_path, "config.data.eval_path")
    images, labels = once(_read, train, cfg.max_bytes)
    labels = labels if cfg.labels else None
    num_classes = None if labels is None else int(labels.max(initial=0)) + 1
    path, rows = cfg.path, None
    if test and split == "eval":
        path = eval_path or f"{cfg.path} (eval)"
        images, eval_labels = once(_read, test, cfg.max_bytes)
        labels = eval_labels if num_classes else None
        if num_classes and labels is None:
            raise UserError(f"config.data.eval_path={path!r} has no labels, the training set has")
    elif not test and (cfg.holdout or split == "eval"):
        rows = split_indices(sum(map(len, images)), cfg.holdout, split, path)
    images = tuple(_conform(piece, cfg, path) for piece in images)
    _check_alike(images, path)
    options = {"name": path, "num_classes": num_classes, "rows": rows}
    if len(images) == 1 and images[0].dtype in (np.uint8, np.float32):
        return ArraySource(images[0], labels, **options)
    return ArraySource(Pieces(images), labels, **options)


def _files(path: str, option: str) -> tuple[shards.Files, shards.Files]:
    """(train, eval) files."""
    root = pathlib.Path(path).expanduser()
    if not path or not root.exists():
        raise UserError(f"{option}={path!r} is no file: give an .npy or .npz, or a folder of them")
    if root.is_file():
        return (root,), ()
    return shards.splits(shards.find(path, r".*\.np[yz]", ".npy or .npz files", option))


def _read(files: shards.Files, max_bytes: int) -> tuple[tuple[np.ndarray, ...], np.ndarray | None]:
    """The images [N_i, ...] of each file and all labels [N]; mapped where the files are larger than that."""
    # Beyond max_bytes the system's page cache is the better memory.
    mapped = sum(f.stat().st_size for f in files) > max_bytes
    images, labels = [], []
    loose: list[np.ndarray] = []
    for file in files:
        found = _opened(file, mapped)
        if isinstance(found, dict):
            image, label = _named(file, found)
            images.append(image)
            labels += [] if label is None else [label]
        elif len(files) > 1 and _words(file) & set(LABEL_KEYS):
            labels.append(found)
        else:
            (images if len(files) == 1 or _words(file) & set(IMAGE_KEYS) else loose).append(found)
    images = images or loose
    if not images:
        raise UserError(f"config.data.path: {files[0].parent} holds labels and no images")
    for label in labels:
        if label.ndim != 1 or label.dtype.kind not in "iu":
            raise UserError(f"config.data.path: labels of {files[0]} are {label.dtype} {label.shape}, not integers [N]")
    if labels and len(images) > 1 and [len(x) for x in labels] != [len(x) for x in images]:
        raise UserError(f"config.data.path: {files[0].parent} has files of labels not as long as those of images")
    return tuple(images), np.concatenate(labels) if labels else None


def _words(file: pathlib.Path) -> set[str]:
    return set(re.split(r"[^a-z]+", file.stem.lower()))


def _opened(file: pathlib.Path, mapped: bool) -> np.ndarray | dict[str, np.ndarray]:
    try:
        found = np.load(file, mmap_mode="r" if mapped and file.suffix == ".npy" else None, allow_pickle=False)
        if isinstance(found, np.ndarray):
            return found
        with found:
            # Asked by key, an .npz reads that member alone.
            members = {key: _member(file, key) if mapped else None for key in found.files}
            return {key: found[key] if array is None else array for key, array in members.items()}
    except UserError:
        raise
    except Exception as error:  # zipfile's, zlib's, and what a damaged header, which is Python, fails with
        raise UserError(f"config.data.path={str(file)!r} is no readable .npy or .npz ({error})") from error


def _member(file: pathlib.Path, key: str) -> np.memmap | None:
    """An array of an .npz mapped where it lies; None where it is compressed."""
    with zipfile.ZipFile(file) as archive:
        member = archive.getinfo(f"{key}.npy")
    if member.compress_type != zipfile.ZIP_STORED:
        return None
    with file.open("rb") as f:
        f.seek(member.header_offset)
        header = f.read(LOCAL_HEADER)
        f.seek(int.from_bytes(header[26:28], "little") + int.from_bytes(header[28:30], "little"), 1)
        version = np.lib.format.read_magic(f)
        read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
        shape, fortran, dtype = read(f)
        if dtype.hasobject:
            raise ValueError("it holds Python objects")
        return np.memmap(file, dtype, "r", f.tell(), shape, "F" if fortran else "C")


def _named(file: pathlib.Path, arrays: dict[str, np.ndarray]) -> tuple[np.ndarray, np.ndarray | None]:
    """(images, labels) of an .npz."""
    label_key = next((key for key in LABEL_KEYS if key in arrays), None)
    labels = None if label_key is None else arrays.pop(label_key)
    key = next((key for key in IMAGE_KEYS if key in arrays), next(iter(arrays)) if len(arrays) == 1 else None)
    if key is None:
        raise UserError(f"config.data.path={str(file)!r} holds {', '.join(arrays)}: name the images {IMAGE_KEYS[0]!r}")
    return arrays[key], labels


def _check_alike(images: tuple[np.ndarray, ...], path: str) -> None:
    kinds = sorted({f"{x.dtype} {x.shape[1:]}" for x in images})
    if len(kinds) > 1:
        raise UserError(f"config.data.path={path!r} holds files of {' and of '.join(kinds)}: one set has one shape")


def _conform(images: np.ndarray, cfg: Any, path: str) -> np.ndarray:
    """uint8 [N, H, W, C] of the wanted format, or float [N, ...] as it is."""
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
    # In memory at once, on disk a batch at a time (source.Pieces).
    return images if isinstance(images, np.memmap) else images.astype(np.float32, copy=False)
