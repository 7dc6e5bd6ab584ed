"""Folders and archives: layouts, splits, corrupt files, laziness."""

import logging
import pathlib
import shutil
import tarfile

import numpy as np
import pytest

from jax_diffusion import progress
from jax_diffusion.data import ArraySource, load
from jax_diffusion.data.encoded import LazySource
from jax_diffusion.errors import UserError

CLASSES = {"cat/a.png": 0, "cat/b.PNG": 1, "dog/x.png": 2, "dog/deep/y.png": 3, "emu/z.png": 4}


def everything(source):
    batch = source.batch(np.arange(len(source)))
    assert batch["image"].dtype == np.uint8 and batch["image"].shape == (len(source), *source.shape)
    return batch


def test_class_folders(tree, cfg, noise):
    source = load(cfg(path=tree(CLASSES)), "train")
    assert source.class_names == ("cat", "dog", "emu") and source.num_classes == 3
    batch = everything(source)
    np.testing.assert_array_equal(batch["label"], [0, 0, 1, 1, 2])
    assert batch["label"].dtype == np.int32
    # Sorted by path: dog/deep/y.png comes before dog/x.png.
    np.testing.assert_array_equal(batch["image"], np.stack([noise(s) for s in (0, 1, 3, 2, 4)]))


def test_no_labels(tree, cfg):
    loose = load(cfg(path=tree({"a.png": 0, "b.png": 1, "notes.txt": b"x", ".c.png": 2})), "train")
    assert len(loose) == 2 and loose.num_classes is None and set(everything(loose)) == {"image"}
    dropped = load(cfg(path=tree(CLASSES, "other"), labels=False), "train")
    assert dropped.num_classes is None and set(everything(dropped)) == {"image"}


@pytest.mark.parametrize("kind", ["zip", "tar", "gztar"])
def test_archives_equal_the_folder(kind, tree, cfg, tmp_path):
    root = tree(CLASSES, "outer/inner")
    archive = shutil.make_archive(str(tmp_path / "a"), kind, tmp_path / "outer", "inner")
    want, got = load(cfg(path=root), "train"), load(cfg(path=archive), "train")
    assert got.class_names == want.class_names
    for key, leaf in everything(want).items():
        np.testing.assert_array_equal(everything(got)[key], leaf)


def test_real_archive_equals_the_same_folder_extracted(shared, cfg, tmp_path):
    with tarfile.open(shared / "flowers64.tar.gz") as archive:
        members = [m for m in archive if m.offset // 512 % 7 == 0][:200]
        archive.extractall(tmp_path / "flowers", members, filter="data")
    whole = load(cfg(path=shared / "flowers64.tar.gz"), "train")
    some = load(cfg(path=tmp_path / "flowers"), "train")
    assert (len(whole), whole.shape, whole.num_classes) == (4317, (64, 64, 3), 5)
    assert len(some) == len(members) > 50
    rows = {image.tobytes() for image in everything(whole)["image"]}
    assert all(image.tobytes() in rows for image in everything(some)["image"])


def test_splits_of_the_layout(tree, cfg, noise):
    files = {"train/a/1.png": 1, "train/b/2.png": 2, "val/b/3.png": 3}
    path = tree(files)
    train, test = load(cfg(path=path, holdout=0.5), "train"), load(cfg(path=path), "eval")
    assert len(train) == 2 and len(test) == 1 and test.class_names == ("a", "b")
    np.testing.assert_array_equal(everything(test)["image"][0], noise(3))
    assert everything(test)["label"].tolist() == [1], "a lone class folder is still a class"


def test_eval_path(tree, cfg):
    train, test = tree(CLASSES), tree({"dog/1.png": 9}, "eval")
    source = load(cfg(path=train, eval_path=test, holdout=0.5), "eval")
    assert everything(source)["label"].tolist() == [1] and source.num_classes == 3
    assert len(load(cfg(path=train, eval_path=test, holdout=0.5), "train")) == 5
    with pytest.raises(UserError, match=r"gnu/1.png.*no class"):
        load(cfg(path=train, eval_path=tree({"gnu/1.png": 9, "cat/2.png": 8}, "wrong")), "eval")


def test_holdout_parts_the_set(tree, cfg):
    path = tree({f"{i:02d}.png": i for i in range(20)})
    parts = [everything(load(cfg(path=path, holdout=0.25), s))["image"] for s in ("train", "eval", "eval")]
    np.testing.assert_array_equal(parts[1], parts[2])
    train, test = ({x.tobytes() for x in part} for part in parts[:2])
    assert len(test) == 5 and not train & test and len(train | test) == 20


@pytest.mark.parametrize("max_bytes", [1 << 20, 0])
def test_corrupt_files_are_named(max_bytes, tree, cfg, caplog, noise, encode):
    whole = encode(noise(7, 64, 64))
    cut, other = whole[: len(whole) // 2], encode(noise(8, 64, 64))
    files = {"x/a.png": b"", "x/b.png": whole, "y/c.png": cut, "y/d.png": other, "z/e.png": cut}
    with caplog.at_level(logging.WARNING, "jax_diffusion.data"):
        source = load(cfg(path=tree(files), max_bytes=max_bytes), "train")
        batch = everything(source)
    assert source.skipped == ("x/a.png", "y/c.png", "z/e.png")
    assert all(name in caplog.text for name in source.skipped[1:])
    # In memory they are left out; else the next readable one stands in, with its own label.
    seeds = [7, 8] if max_bytes else [7, 7, 8, 8, 7]
    np.testing.assert_array_equal(batch["image"], [noise(s, 64, 64) for s in seeds])
    assert batch["label"].tolist() == [s - 7 for s in seeds]


def test_lazy_equals_in_memory(tree, cfg):
    path = tree(CLASSES)
    memory, lazy = load(cfg(path=path), "train"), load(cfg(path=path, max_bytes=10), "train")
    assert isinstance(memory, ArraySource) and isinstance(lazy, LazySource)
    assert (lazy.shape, lazy.num_classes, lazy.class_names) == (memory.shape, 3, memory.class_names)
    indices = np.array([4, 0, 0, 3, 2, 1] * 5)
    for key, leaf in memory.batch(indices).items():
        np.testing.assert_array_equal(lazy.batch(indices)[key], leaf)


def test_grey_images_among_colour(tree, cfg, noise, encode):
    grey = encode(noise(0, channels=1))
    mixed = load(cfg(path=tree({"a.png": 1, "b.png": grey})), "train")
    np.testing.assert_array_equal(everything(mixed)["image"][1], np.repeat(noise(0, channels=1), 3, -1))
    with pytest.raises(UserError, match=r"b.png is 8x8 colour.*channels=3"):
        load(cfg(path=tree({"a.png": grey, "b.png": 1}, "other")), "train")


@pytest.mark.parametrize("max_bytes", [1 << 20, 0])
def test_differing_sizes_need_a_size(max_bytes, tree, cfg, noise, encode):
    path = tree({"a.png": 0, "b.png": encode(noise(0, 9, 8))})
    with pytest.raises(UserError, match=r"a.png is 8x8.*b.png is 9x8.*--config.data.size=64,64"):
        everything(load(cfg(path=path, max_bytes=max_bytes), "train"))
    assert load(cfg(path=path, size=(4, 4)), "train").shape == (4, 4, 3)


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({"readme.txt": b"x"}, "holds no images"),
        ({"a.png": b"x", "b.jpg": b"y"}, "none of the 2 images"),
        ({"cat/a.png": 0, "b.png": 1}, "beside the class folders"),
    ],
)
def test_unusable_folders(files, message, tree, cfg):
    with pytest.raises(UserError, match=message):
        load(cfg(path=tree(files)), "train")


def test_unusable_paths(tree, cfg, tmp_path):
    for path in ("", tmp_path / "absent"):
        with pytest.raises(UserError, match="does not exist"):
            load(cfg(path=path), "train")
    junk, cut = tmp_path / "junk.tar.gz", tmp_path / "cut.tar.gz"
    junk.write_bytes(b"no archive at all" * 100)
    whole = shutil.make_archive(str(tmp_path / "w"), "gztar", tree({f"{i}.png": i for i in range(50)}))
    cut.write_bytes(pathlib.Path(whole).read_bytes()[:4000])
    for path in (junk, cut):
        with pytest.raises(UserError, match=path.name):
            load(cfg(path=path), "train")
    with pytest.raises(UserError, match="unpack it"):
        load(cfg(path=whole, max_bytes=100), "train")


def test_progress_tells_rate_and_time_left_but_only_of_slow_work(tree, cfg, capsys, monkeypatch):
    path = tree({f"{i:03d}.png": i for i in range(100)})
    load(cfg(path=path), "train")
    assert capsys.readouterr().err == ""
    monkeypatch.setattr(progress, "QUIET_S", 0.0)
    load(cfg(path=path), "train")
    assert "100/100" in (err := capsys.readouterr().err) and "/s, 0 s left" in err
