"""digits, idx, numpy, toy2d, and what all sources share."""

import gzip
import importlib.util
import struct
import subprocess
import sys

import numpy as np
import pytest
from sklearn.datasets import load_digits

from jax_diffusion.data import ArraySource, load
from jax_diffusion.data.idx import DTYPES, read_idx
from jax_diffusion.errors import UserError


def everything(source):
    return source.batch(np.arange(len(source)))


def test_import_is_light():
    """Beyond numpy and jax; what the package's own __init__ imports is not asked here."""
    heavy = ["PIL", "sklearn", "scipy", "tensorflow_datasets", "array_record", "tensorflow", "flax"]
    package = importlib.util.find_spec("jax_diffusion").submodule_search_locations
    code = "import sys, types, jax; before = set(sys.modules)\n"
    code += "top = sys.modules['jax_diffusion'] = types.ModuleType('jax_diffusion')\n"
    code += f"top.__path__ = {list(package)!r}; import jax_diffusion.data\n"
    code += f"print([m for m in {heavy} if m in set(sys.modules) - before])"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "[]"


def test_digits(cfg):
    source = load(cfg(source="digits"), "train")
    assert (len(source), source.shape, source.num_classes) == (1797, (8, 8, 1), 10)
    batch = everything(source)
    np.testing.assert_allclose(batch["image"][..., 0] / 255, load_digits().images / 16, atol=0.5 / 255)
    np.testing.assert_array_equal(batch["label"], load_digits().target)
    assert load(cfg(source="digits", size=(16, 16), channels=3, labels=False), "train").shape == (16, 16, 3)
    parts = [len(load(cfg(source="digits", holdout=0.1), split)) for split in ("train", "eval")]
    assert parts == [1617, 180]


def test_mnist_against_an_independent_reading(shared, cfg):
    for split, part, count in (("train", "train", 60_000), ("eval", "t10k", 10_000)):
        source = load(cfg(source="idx", path=shared), split)
        batch = everything(source)
        with gzip.open(shared / f"mnist-{part}-images-idx3-ubyte.gz") as file:
            assert struct.unpack(">iiii", file.read(16)) == (0x803, count, 28, 28)
            assert batch["image"].tobytes() == file.read()
        with gzip.open(shared / f"mnist-{part}-labels-idx1-ubyte.gz") as file:
            assert batch["label"].tolist() == list(file.read()[8:])
        assert (source.shape, source.num_classes) == ((28, 28, 1), 10)


def idx_bytes(array, code=None):
    code = code or next(c for c, d in DTYPES.items() if np.dtype(d) == array.dtype.newbyteorder(">"))
    return (
        struct.pack(f">BBBB{array.ndim}I", 0, 0, code, array.ndim, *array.shape) + array.astype(DTYPES[code]).tobytes()
    )


@pytest.mark.parametrize("dtype", ["u1", "i1", "i2", "i4", "f4", "f8"])
def test_idx_round_trip_of_every_type(dtype, tmp_path):
    array = np.random.default_rng(0).normal(0, 50, (3, 4, 5)).astype("i1").astype(dtype)
    (tmp_path / "x").write_bytes(idx_bytes(array))
    (tmp_path / "x.gz").write_bytes(gzip.compress(idx_bytes(array)))
    for name in ("x", "x.gz"):
        got = read_idx(tmp_path / name)
        assert got.dtype == array.dtype
        np.testing.assert_array_equal(got, array)


def test_idx_files_and_folders(cfg, tmp_path, noise):
    images = np.stack([noise(i, 4, 5, 1)[..., 0] for i in range(10)])
    path = tmp_path / "train-images-idx3-ubyte"
    path.write_bytes(idx_bytes(images))
    unlabelled = load(cfg(source="idx", path=tmp_path), "train")
    assert unlabelled.num_classes is None
    (tmp_path / "train-labels-idx1-ubyte").write_bytes(idx_bytes(np.arange(10, dtype="u1") % 4))
    parts = [load(cfg(source="idx", path=p, holdout=0.3), s) for p, s in ((path, "train"), (tmp_path, "eval"))]
    assert [len(p) for p in parts] == [7, 3] and all(p.num_classes == 4 for p in parts)
    joined = np.concatenate([everything(p)["image"] for p in parts])[..., 0]
    assert {x.tobytes() for x in joined} == {x.tobytes() for x in images}
    (tmp_path / "fashion-train-images-idx3-ubyte").write_bytes(idx_bytes(images))
    with pytest.raises(UserError, match="several sets"):
        load(cfg(source="idx", path=tmp_path), "train")


@pytest.mark.parametrize("damage", [lambda b: b[:-1], lambda b: b + b"x", lambda b: b"\1" + b[1:], lambda b: b[:9]])
@pytest.mark.parametrize("pack", [bytes, gzip.compress])
def test_damaged_idx_is_named(damage, pack, cfg, tmp_path):
    path = tmp_path / "train-images-idx3-ubyte.gz"
    path.write_bytes(pack(damage(idx_bytes(np.zeros((2, 3, 3), "u1")))))
    with pytest.raises(UserError, match=path.name):
        load(cfg(source="idx", path=tmp_path), "train")


def test_truncated_gzip_is_named(shared, cfg, tmp_path):
    path = tmp_path / "train-images-idx3-ubyte.gz"
    path.write_bytes((shared / "mnist-t10k-images-idx3-ubyte.gz").read_bytes()[:50_000])
    with pytest.raises(UserError, match=path.name):
        load(cfg(source="idx", path=path), "train")


def test_numpy_images(cfg, tmp_path, noise):
    images = np.stack([noise(i) for i in range(10)])
    np.savez(tmp_path / "a.npz", images=images, y=np.arange(10) % 3)
    np.save(tmp_path / "a.npy", images)
    source = load(cfg(source="numpy", path=tmp_path / "a.npz"), "train")
    assert source.num_classes == 3
    np.testing.assert_array_equal(everything(source)["image"], images)
    np.testing.assert_array_equal(everything(source)["label"], np.arange(10) % 3)
    for max_bytes in (0, 1 << 20):  # memory-mapped, in memory
        options = {"source": "numpy", "path": tmp_path / "a.npy", "max_bytes": max_bytes, "holdout": 0.2}
        parts = [load(cfg(**options), split) for split in ("train", "eval")]
        assert [len(p) for p in parts] == [8, 2]
        joined = np.concatenate([everything(p)["image"] for p in parts])
        assert type(joined) is np.ndarray
        assert {x.tobytes() for x in joined} == {x.tobytes() for x in images}
    assert isinstance(load(cfg(**{**options, "max_bytes": 0}), "train").images, np.memmap)


def test_numpy_floats_pass_through(cfg, tmp_path):
    latents = np.random.default_rng(0).normal(size=(6, 4, 4, 8))
    np.save(tmp_path / "z.npy", latents)
    got = everything(load(cfg(source="numpy", path=tmp_path / "z.npy"), "train"))["image"]
    assert got.dtype == np.float32
    np.testing.assert_array_equal(got, latents.astype(np.float32))


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"x": np.zeros((4, 3, 8, 8), "u1")}, "transpose"),
        ({"x": np.full((4, 8, 8, 3), 200.0)}, "save images as uint8"),
        ({"x": np.zeros((4, 8), "i8")}, "int64"),
        ({"x": np.zeros((4, 8, 8), "u1"), "y": np.zeros(3, "i4")}, "4 images but labels"),
        ({"x": np.zeros((4, 8, 8), "u1"), "y": -np.ones(4, "i4")}, "labels must lie"),
        ({"a": np.zeros(3), "b": np.zeros(3)}, "name the images"),
        ({"x": np.zeros((0, 8, 8), "u1")}, "no examples"),
        ({"x": np.array([{}])}, "no readable"),
    ],
)
def test_unusable_arrays(arrays, message, cfg, tmp_path):
    np.savez(tmp_path / "a.npz", **arrays)
    with pytest.raises(UserError, match=message):
        load(cfg(source="numpy", path=tmp_path / "a.npz"), "train")


@pytest.mark.parametrize(("name", "classes"), [("moons", 2), ("swissroll", None), ("checkerboard", None), ("rings", 4)])
def test_toy2d(name, classes, cfg):
    source, other = (load(cfg(source="toy2d", name=name), split) for split in ("train", "eval"))
    points = everything(source)["image"]
    assert points.dtype == np.float32 and points.shape == (100_000, 2) and source.shape == (2,)
    assert 0.7 < np.abs(points).max() < 1.15
    assert source.num_classes == classes
    assert not {p.tobytes() for p in points} & {p.tobytes() for p in everything(other)["image"]}


def test_toy2d_geometry(cfg):
    rings = everything(load(cfg(source="toy2d", name="rings"), "train"))
    radius = np.linalg.norm(rings["image"], axis=-1)
    for k in range(4):  # the mean over 25,000 of sd .015 is known to 1e-4
        assert abs(radius[rings["label"] == k].mean() - 0.95 * (k + 1) / 4) < 1e-3
    board = everything(load(cfg(source="toy2d", name="checkerboard"), "train"))["image"]
    column, row = np.minimum(np.floor((board + 1) * 2), 3).astype(int).T
    assert ((row + column) % 2 == 0).mean() > 0.9999  # but for rounding at the edges
    share = np.bincount(4 * row + column, minlength=16) / len(board)
    np.testing.assert_allclose(np.sort(share)[8:], 1 / 8, atol=0.006)


def test_array_source_gathers(noise):
    images = np.stack([noise(i) for i in range(5)])
    source = ArraySource(images, [0, 1, 2, 0, 1], rows=np.array([4, 2, 0]))
    batch = source.batch(np.array([0, 2, 0]))
    np.testing.assert_array_equal(batch["image"], images[[4, 0, 4]])
    assert batch["label"].tolist() == [1, 0, 1] and len(source) == 3


def test_choices_are_named(cfg):
    with pytest.raises(UserError, match="did you mean 'digits'"):
        load(cfg(source="digit"), "train")
    with pytest.raises(UserError, match="did you mean 'moons'"):
        load(cfg(source="toy2d", name="moon"), "train")
    with pytest.raises(UserError, match="choose one of eval, train"):
        load(cfg(source="digits"), "test")
    with pytest.raises(UserError, match=r"--config.data.holdout=0.1"):
        load(cfg(source="digits"), "eval")
    for share in (-0.1, 1.0):
        with pytest.raises(UserError, match="not a share"):
            load(cfg(source="digits", holdout=share), "train")
