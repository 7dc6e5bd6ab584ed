"""Configs and small files for the tests of jax_diffusion.data."""

import io
import pathlib
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

SHARED = pathlib.Path(__file__).parents[3] / "shared" / "data"


@pytest.fixture
def cfg():
    """cfg(source=..., ...) makes a data config; what is not given has the default of the recipes."""

    def make(**options):
        defaults = {
            "source": "folder",
            "path": "",
            "eval_path": "",
            "name": "",
            "size": (),
            "channels": 0,
            "crop": "center",
            "labels": True,
            "holdout": 0.0,
            "max_bytes": 1 << 30,
        }
        return SimpleNamespace(**{**defaults, **{k: str(v) if "path" in k else v for k, v in options.items()}})

    return make


@pytest.fixture
def shared():
    """The folder of real data; skips where it is absent."""
    if not SHARED.is_dir():
        pytest.skip(f"real data is not at {SHARED}")
    return SHARED


@pytest.fixture
def noise():
    """noise(seed, height, width, channels): a uint8 image no two seeds share."""

    def make(seed, height=8, width=8, channels=3):
        return np.random.default_rng(seed).integers(0, 256, (height, width, channels), dtype=np.uint8)

    return make


@pytest.fixture
def encode():
    """encode(array or Pillow image, format="PNG", **options) -> the file's bytes."""

    def make(image, kind="PNG", **options):
        if isinstance(image, np.ndarray):
            image = Image.fromarray(image[..., 0] if image.ndim == 3 and image.shape[-1] == 1 else image)
        file = io.BytesIO()
        image.save(file, kind, **options)
        return file.getvalue()

    return make


@pytest.fixture
def tree(tmp_path, noise, encode):
    """tree({"cat/a.png": seed or bytes, ...}) writes a folder of 8x8 images and returns its path."""

    def make(files, root="tree"):
        for name, content in files.items():
            path = tmp_path / root / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content if isinstance(content, bytes) else encode(noise(content)))
        return tmp_path / root

    return make
