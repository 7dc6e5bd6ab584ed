"""Folders of .npy and .npz, mapped into memory; and what several splits share."""

import itertools

import numpy as np
import pytest

from jax_diffusion.data import folder, load, load_splits, numpy_files
from jax_diffusion.data.source import Pieces
from jax_diffusion.errors import UserError


def everything(source):
    return source.batch(np.arange(len(source)))


@pytest.fixture
def latents():
    return np.random.default_rng(0).standard_normal((23, 4, 4, 8)).astype(np.float16)


@pytest.mark.parametrize("max_bytes", [1 << 30, 0])
@pytest.mark.parametrize("kind", ["npy", "npz", "compressed"])
def test_a_folder_of_shards(kind, max_bytes, latents, cfg, tmp_path):
    """Ten before eleven, labels beside or within, a test set by its name."""
    labels, cuts = np.arange(23) % 5, [0, 3, 9, 10, 20]
    for part, (a, b) in enumerate(itertools.pairwise(cuts)):
        stem = f"train-{{}}_{part + 8}"
        if kind == "npy":
            np.save(tmp_path / f"{stem.format('x')}.npy", latents[a:b])
            np.save(tmp_path / f"{stem.format('labels')}.npy", labels[a:b])
        else:
            save = np.savez if kind == "npz" else np.savez_compressed
            save(tmp_path / f"{stem.format('x')}.npz", latents=latents[a:b], labels=labels[a:b])
    np.savez(tmp_path / "test-x.npz", latents=latents[20:], labels=labels[20:])
    train, test = load_splits(cfg(source="numpy", path=tmp_path, max_bytes=max_bytes), "train", "eval")
    assert (len(train), len(test), train.shape, train.num_classes, test.num_classes) == (20, 3, (4, 4, 8), 5, 5)
    for source, rows in ((train, slice(0, 20)), (test, slice(20, 23))):
        batch = everything(source)
        assert batch["image"].dtype == np.float32
        np.testing.assert_array_equal(batch["image"], latents[rows].astype(np.float32))
        np.testing.assert_array_equal(batch["label"], labels[rows])
    order = np.random.default_rng(1).permutation(20)
    np.testing.assert_array_equal(train.batch(order)["image"], latents[order].astype(np.float32))
    parts = [load(cfg(source="numpy", path=tmp_path, max_bytes=max_bytes, holdout=0.5), "train")]
    assert len(parts[0]) == 20, "nothing of the training set is held out where there is a test set"


@pytest.mark.parametrize("dtype", ["u1", "f2", "f4", "f8", ">f4"])
@pytest.mark.parametrize("name", ["a.npy", "a.npz"])
def test_beyond_max_bytes_nothing_is_read_before_it_is_asked_for(name, dtype, cfg, tmp_path, monkeypatch):
    x = (np.random.default_rng(0).uniform(-1, 1, (50, 4, 4, 3)) * 100).astype(dtype)
    (np.save if name == "a.npy" else np.savez)(tmp_path / name, x)
    source = load(cfg(source="numpy", path=tmp_path / name, max_bytes=10, holdout=0.2), "train")
    arrays = source.images.pieces if isinstance(source.images, Pieces) else [source.images]
    assert not any(a.flags.owndata for a in arrays)
    batch = source.batch(np.array([3, 0, 3]))["image"]
    assert batch.dtype == (np.uint8 if dtype == "u1" else np.float32)
    np.testing.assert_array_equal(batch, x[source.rows[[3, 0, 3]]].astype(batch.dtype))


def test_a_cut_member_is_an_error(cfg, tmp_path):
    np.savez(tmp_path / "a.npz", x=np.zeros((50, 4, 4, 3), np.uint8))
    (tmp_path / "a.npz").write_bytes((tmp_path / "a.npz").read_bytes()[:1000])
    with pytest.raises(UserError, match=r"a\.npz"):
        load(cfg(source="numpy", path=tmp_path / "a.npz", max_bytes=10), "train")


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"x_0": np.zeros((4, 8, 8, 3), "u1"), "x_1": np.zeros((4, 9, 8, 3), "u1")}, "and of"),
        ({"x_0": np.zeros((4, 8, 8, 3), "u1"), "x_1": np.zeros((4, 8, 8, 3), "f4")}, "and of"),
        ({"x_0": np.zeros((4, 8), "f4"), "x_1": np.zeros((4, 8), "f4"), "labels_0": np.zeros(8, "i4")}, "as long"),
        ({"y_0": np.zeros(4, "i4"), "y_1": np.zeros(4, "i4")}, "labels and no images"),
        ({"x_0": np.zeros((4, 8, 8, 3), "u1"), "y_0": np.zeros((4, 1), "i4")}, "not integers"),
    ],
)  # fmt: skip
def test_folders_that_do_not_fit(arrays, message, cfg, tmp_path):
    for name, array in arrays.items():
        np.save(tmp_path / f"{name}.npy", array)
    with pytest.raises(UserError, match=message):
        load(cfg(source="numpy", path=tmp_path), "train")


def test_what_two_splits_share_is_opened_once(cfg, tmp_path, tree, monkeypatch):
    calls = []

    def counted(module, name):
        function = getattr(module, name)
        monkeypatch.setattr(module, name, lambda *a: (calls.append(name), function(*a))[1])

    counted(numpy_files, "_read")
    np.save(tmp_path / "a.npy", np.zeros((50, 4, 4, 3), np.uint8))
    c = cfg(source="numpy", path=tmp_path / "a.npy", holdout=0.2)
    assert [len(s) for s in load_splits(c, "train", "eval")] == [40, 10] and calls == ["_read"]
    calls.clear()
    counted(folder, "open_tree")
    c = cfg(path=tree({f"{s}/{i}.png": i for s in ("train/a", "test/a") for i in range(4)}))
    both = load_splits(c, "train", "eval")
    assert calls == ["open_tree"]
    for split, source in zip(("train", "eval"), both, strict=True):
        np.testing.assert_array_equal(everything(load(c, split))["image"], everything(source)["image"])
