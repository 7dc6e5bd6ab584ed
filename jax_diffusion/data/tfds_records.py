"""tensorflow-datasets' sets, read through its random-access files: no tensorflow, no tf.data.

Nothing is downloaded here: preparing a set needs tensorflow for most of them, reading it does not.
"""

import os
import pathlib
import re
from typing import Any

import numpy as np

from jax_diffusion.data.encoded import open_encoded
from jax_diffusion.data.reader import Subset
from jax_diffusion.data.shards import EVAL
from jax_diffusion.data.source import Once, Source, split_indices
from jax_diffusion.errors import UserError


class Records:
    """The encoded images of one tfds split."""

    def __init__(self, records: Any, image: str, label: str | None, name: str):
        self.records, self.image, self.label, self.prefix = records, image, label, name

    def __len__(self) -> int:
        return len(self.records)

    def name(self, i: int) -> str:
        return f"{self.prefix}[{i}]"

    def read(self, i: int) -> tuple[bytes, int | None]:
        record = self.records[i]
        return record[self.image], None if self.label is None else int(record[self.label])


def load(cfg: Any, split: str, once: Once) -> Source:
    """The set cfg.name ("mnist", "name/config", "name:1.0.0") prepared in cfg.path ("": tfds's own folder).

    Eval is its test split, else its validation split, else the held-out share of train.

    Raises:
      UserError: not prepared there, without random access, without images, or without a train split.
    """
    try:
        import tensorflow_datasets as tfds
    except ImportError as error:
        raise UserError("config.data.source='tfds' needs pip install tensorflow-datasets array_record") from error
    # From the files alone: tfds.builder and tfds.data_source would import the set's code, and download it.
    builder = once(tfds.builder_from_directory, _prepared(cfg))
    splits = builder.info.splits
    if "train" not in splits:
        raise UserError(f"config.data.name={cfg.name!r} has no train split, only {', '.join(splits)}")
    part = next((s for s in EVAL if s in splits), None) if split == "eval" else "train"
    image, label, classes = _features(tfds, builder.info, cfg)
    try:
        records = builder.as_data_source(split=part or "train", decoders={image: tfds.decode.SkipDecoding()})
    except NotImplementedError as error:  # .tfrecord can only be read in its order
        folder = pathlib.Path(builder.data_dir)
        root = folder.parents[cfg.name.count("/") + 1]
        new = f"{root}-array_record"
        raise UserError(
            f"config.data.name={cfg.name!r} is stored as {builder.info.file_format.value}, without random "
            f"access; where tensorflow is installed, run: tfds convert_format --dataset_version_dir={folder} "
            f"--out_file_format=array_record --out_dir={new}/{folder.relative_to(root)}; then give "
            f"--config.data.path={new}"
        ) from error
    name = f"{cfg.name}/{part or 'train'}"
    items: Any = Records(records, image, label, name)
    if not any(s in splits for s in EVAL):
        items = Subset(items, split_indices(len(items), cfg.holdout, split, f"tfds {cfg.name}"))
    return open_encoded(items, cfg, name=name, class_names=classes)


def _prepared(cfg: Any) -> pathlib.Path:
    """The folder with the set's dataset_info.json: <path>/<name>[/<config>]/<version>, the newest version."""
    home = cfg.path or os.environ.get("TFDS_DATA_DIR") or "~/tensorflow_datasets"
    root = pathlib.Path(home).expanduser()
    name, _, version = cfg.name.partition(":")
    below = root / name
    if name and below.is_dir():
        found = [p.parent for p in below.glob(f"{version or '*'}/dataset_info.json")]
        if found:
            return max(found, key=lambda p: [int(d) for d in re.findall(r"\d+", p.name)])
        configs = sorted({p.parent.parent.name for p in below.glob("*/*/dataset_info.json")})
        if configs:
            raise UserError(f"config.data.name={cfg.name!r} has configs: choose {name}/{f', {name}/'.join(configs)}")
    raise UserError(
        f"config.data.name={cfg.name!r} is not prepared in {root}; where tensorflow is installed, run: "
        f"python -c \"import tensorflow_datasets as tfds; tfds.builder('{cfg.name}', data_dir='{root}', "
        "file_format='array_record').download_and_prepare()\""
    )


def _features(tfds: Any, info: Any, cfg: Any) -> tuple[str, str | None, tuple[str, ...]]:
    """(image key, label key or None, class names) of a tfds set."""
    features = dict(info.features.items())
    images = [key for key, f in features.items() if type(f) is tfds.features.Image]
    image = "image" if "image" in images else next(iter(images), None)
    if image is None or np.dtype(features[image].np_dtype).name not in ("uint8", "uint16"):
        raise UserError(f"config.data.name={cfg.name!r} has no 8- or 16-bit image among {', '.join(features)}")
    labels = [key for key, f in features.items() if isinstance(f, tfds.features.ClassLabel)]
    label = "label" if "label" in labels else next(iter(labels), None)
    if label is None or not cfg.labels:
        return image, None, ()
    feature = features[label]
    names = feature.names if feature.num_classes else []
    return image, label, tuple(names)
