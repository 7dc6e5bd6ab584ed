"""`data pack`: training from what it wrote is training from what it read; and it is written whole or not at all."""

import errno
import json
import os
import pathlib
import signal
import subprocess
import sys
import time

import jax
import numpy as np
import pytest

from jax_diffusion import progress
from jax_diffusion.data import Batches, load, packed, packing
from jax_diffusion.errors import UserError

FILES = {f"{('cat', 'dog', 'emu')[i % 3]}/{i:02d}.png": i for i in range(24)}


@pytest.fixture
def folder(tree, encode, noise):
    """A folder of 24 images, two of them corrupt."""
    return tree(FILES | {"dog/bad.png": b"no image", "emu/00.png": encode(noise(1, 64, 64))[:300]})


def packs(kind, c, out, shards=1):
    packing.pack(c, out, kind, shards)
    return {"source": "packed", "path": out}


def same_batches(a, b):
    """Twelve batches of two epochs and more, by the loop's own pipeline."""
    with Batches(a, 8, 5, 0, stop_step=12) as x, Batches(b, 8, 5, 0, stop_step=12) as y:
        for (_, u), (_, v) in zip(x, y, strict=True):
            assert u.keys() == v.keys()
            for key in u:
                assert u[key].dtype == v[key].dtype
                np.testing.assert_array_equal(u[key], v[key])


@pytest.mark.parametrize("kind", packed.READERS)
@pytest.mark.parametrize("split", ["train", "eval"])
@pytest.mark.parametrize("options", [{}, {"labels": False, "size": (6, 5)}, {"channels": 1}, {"max_bytes": 10}])
def test_batches_are_the_originals(kind, split, options, folder, cfg, tmp_path):
    c = cfg(path=folder, holdout=0.25, **options)
    made = load(cfg(**packs(kind, c, tmp_path / "out"), **{"labels": True} | options), split)
    original = load(c, split)
    assert (len(made), made.shape, made.class_names) == (len(original), original.shape, original.class_names)
    same_batches(original, made)


@pytest.mark.parametrize("kind", packed.READERS)
def test_the_sets_own_test_part_stays_it(kind, tree, cfg, tmp_path):
    c = cfg(path=tree({"train/a/1.png": 1, "train/b/2.png": 2, "test/b/3.png": 3, "test/a/4.png": 4}))
    options = packs(kind, c, tmp_path / "out")
    for split in ("train", "eval"):
        same_batches(load(c, split), load(cfg(**options, holdout=0.5), split))


def test_without_an_eval_part_the_holdout_is_chosen_later(tree, cfg, tmp_path):
    options = packs("array", cfg(path=tree(FILES)), tmp_path / "out")
    assert len(load(cfg(**options), "train")) == 24
    parts = [load(cfg(**options, holdout=0.25), s).batch(np.arange(6))["image"] for s in ("train", "eval")]
    want = [load(cfg(path=tree(FILES), holdout=0.25), s).batch(np.arange(6))["image"] for s in ("train", "eval")]
    np.testing.assert_array_equal(parts, want)
    with pytest.raises(UserError, match="holdout=0 leaves nothing"):
        load(cfg(**options), "eval")


def test_floats_and_points(cfg, tmp_path):
    latents = np.random.default_rng(0).standard_normal((20, 4, 4, 8)).astype(np.float32)
    np.save(tmp_path / "x.npy", latents)
    for c in (cfg(source="numpy", path=tmp_path / "x.npy"), cfg(source="toy2d", name="rings")):
        made = load(cfg(**packs("array", c, tmp_path / f"out{c.source}")), "train")
        original = load(c, "train")
        same_batches(original, made)
        assert made.images.dtype == np.float32 and isinstance(made.images, np.memmap)
    with pytest.raises(UserError, match=r"array_record.*images.*--format=array"):
        packing.pack(cfg(source="toy2d", name="rings"), tmp_path / "no", "array_record", 1)
    assert not (tmp_path / "no").exists()


def test_the_manifest_says_what_is_there(folder, cfg, tmp_path):
    lines = packing.pack(cfg(path=folder, holdout=0.25), tmp_path / "out", "array")
    manifest = json.loads((tmp_path / "out" / "manifest.json").read_text())
    assert manifest["class_names"] == ["cat", "dog", "emu"] and manifest["shape"] == [8, 8, 3]
    splits = manifest["splits"]
    assert sum(s["count"] + len(s["skipped"]) for s in splits.values()) == 26 and splits["eval"]["count"] >= 5
    names = {name for s in splits.values() for name in s["files"]}
    assert {p.name for p in (tmp_path / "out").iterdir()} == names | {"manifest.json"}
    assert manifest["source"]["path"] == str(folder) and "examples" in lines[0]
    assert packed.damaged(tmp_path / "out") == []
    with (tmp_path / "out" / "train.npy").open("r+b") as file:
        file.seek(-1, 2)
        last = file.read(1)
        file.seek(-1, 2)
        file.write(bytes([last[0] ^ 1]))
    assert packed.damaged(tmp_path / "out") == ["train.npy: its SHA-256 is not the manifest's"]


def test_shards(tree, cfg, tmp_path):
    packing.pack(cfg(path=tree(FILES)), tmp_path / "out", "array_record", 5)
    shards = sorted(p.name for p in (tmp_path / "out").glob("*.array_record*"))
    assert len(shards) == 5 and "00000-of-00005" in shards[0]
    same_batches(load(cfg(path=tree(FILES)), "train"), load(cfg(source="packed", path=tmp_path / "out"), "train"))
    with pytest.raises(UserError, match=r"--shards=99.*24"):
        packing.pack(cfg(path=tree(FILES)), tmp_path / "many", "array_record", 99)


def test_kept_files_are_kept_byte_for_byte(tree, cfg, tmp_path, encode, noise):
    """Not decoded and encoded again: a JPEG would lose."""
    files = {f"a/{i}.jpg": encode(noise(i, 16, 16), "JPEG", quality=50) for i in range(5)}
    packing.pack(cfg(path=tree(files)), tmp_path / "out", "array_record")
    content = b"".join(p.read_bytes() for p in (tmp_path / "out").glob("*.array_record*"))
    source = load(cfg(source="packed", path=tmp_path / "out", max_bytes=10), "train")
    assert {source.reader.items.read(i)[0] for i in range(5)} == set(files.values()) and content


def test_nothing_is_overwritten(tree, cfg, tmp_path):
    c, out = cfg(path=tree(FILES)), tmp_path / "out"
    out.mkdir()
    (out / "dear.txt").write_text("mine")
    with pytest.raises(UserError, match="is there already"):
        packing.pack(c, out, "array")
    assert [p.name for p in out.iterdir()] == ["dear.txt"]
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    with pytest.raises(UserError, match="is there already"):
        packing.pack(c, tmp_path / "link", "array")


def leftovers(folder):
    return [p.name for p in folder.iterdir() if "out" in p.name]


@pytest.mark.parametrize(("code", "words"), [(errno.ENOSPC, "make room"), (errno.EACCES, "choose another --out")])
def test_a_full_disk_is_one_error(code, words, tree, cfg, tmp_path, monkeypatch):
    write = packed.Hashed.write

    def full(self, content):
        if self.size > 100:
            raise OSError(code, os.strerror(code))
        return write(self, content)

    monkeypatch.setattr(packed.Hashed, "write", full)
    with pytest.raises(UserError, match=rf"--out=.*out cannot be written: {os.strerror(code)}; {words}"):
        packing.pack(cfg(path=tree(FILES)), tmp_path / "out", "array")
    assert leftovers(tmp_path) == []


def test_too_little_room_is_said_before_the_work(tree, cfg, tmp_path, monkeypatch):
    monkeypatch.setattr(packing.shutil, "disk_usage", lambda path: (0, 0, 100))
    with pytest.raises(UserError, match="needs 4,704 bytes, and 100 are free; make room"):
        packing.pack(cfg(path=tree(FILES)), tmp_path / "out", "array")
    assert leftovers(tmp_path) == []


def test_a_broken_source_leaves_nothing(cfg, tmp_path):
    with pytest.raises(UserError, match="does not exist"):
        packing.pack(cfg(path=tmp_path / "absent"), tmp_path / "out", "array")
    assert leftovers(tmp_path) == []


SLOW = """
import pathlib, signal, sys, time
signal.signal(signal.SIGINT, signal.default_int_handler)  # whatever the shell had it ignore
from jax_diffusion.cli import main
from jax_diffusion.data import packed
write = packed.Hashed.write
def slow(self, content):
    pathlib.Path(sys.argv[1]).touch()
    time.sleep(60)
    return write(self, content)
packed.Hashed.write = slow
sys.exit(main.main(["data", "pack", "--config=digits", f"--out={sys.argv[2]}", "--format=array"]))
"""


@pytest.mark.parametrize("kill", [signal.SIGINT, signal.SIGKILL])
def test_what_was_interrupted_does_not_look_complete(kill, tmp_path):
    begun, out = tmp_path / "begun", tmp_path / "out"
    child = subprocess.Popen([sys.executable, "-c", SLOW, begun, out], stderr=subprocess.PIPE, text=True)
    while not begun.exists() and child.poll() is None:
        time.sleep(0.05)
    child.send_signal(kill)
    _, errors = child.communicate(timeout=300)
    assert begun.exists() and not out.exists(), errors
    if kill == signal.SIGINT:
        assert child.returncode == 130 and "Traceback" not in errors and leftovers(tmp_path) == []
    else:
        (left,) = leftovers(tmp_path)
        assert left.startswith(".out.unfinished") and not (tmp_path / left / "manifest.json").exists()


def test_progress(tree, cfg, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(progress, "QUIET_S", 0.0)
    monkeypatch.setattr(packed, "CHUNK", 4)
    packing.pack(cfg(path=tree(FILES)), tmp_path / "out", "array")
    assert "packing train: 24/24" in (err := capsys.readouterr().err) and "/s, 0 s left" in err


def test_what_is_no_packed_set_is_said(cfg, tmp_path, tree):
    with pytest.raises(UserError, match=r"is no packed set.*data pack"):
        load(cfg(source="packed", path=tmp_path), "train")
    options = packs("array", cfg(path=tree(FILES)), tmp_path / "out")
    with pytest.raises(UserError, match="was packed as 8x8x3"):
        load(cfg(**options, size=(4, 4)), "train")
    manifest = pathlib.Path(options["path"]) / "manifest.json"
    whole = manifest.read_text()
    for new, words in (("{", "is damaged"), (whole.replace('"version": 1', '"version": 9'), "update jax_diffusion")):
        manifest.write_text(new)
        with pytest.raises(UserError, match=words):
            load(cfg(**options), "train")
    manifest.write_text(whole)
    for change, words in ((lambda p: os.truncate(p, 200), "has 200 bytes, not"), (os.unlink, "is missing")):
        change(manifest.with_name("train.npy"))
        with pytest.raises(UserError, match=rf"train.npy {words}"):
            load(cfg(**options), "train")


def test_a_run_from_the_packed_set_is_the_run(tiny, tmp_path):
    """Six steps on the digits, from scikit-learn and from what was packed of them: the same weights, bit for bit."""
    from jax_diffusion.train import loop

    fields = ("train.steps=6", "train.sample_every=0", "train.eval_every=3", "optim.warmup=2")
    config = tiny("digits_dit", *fields)
    packing.pack(config.data, tmp_path / "packed", "array")
    other = tiny("digits_dit", *fields, "data.source=packed", f"data.path={tmp_path / 'packed'}")
    states = [loop.train(c, tmp_path / str(i), log=lambda line: None).state for i, c in enumerate((config, other))]
    a, b = (jax.tree_util.tree_leaves_with_path(s) for s in states)
    for (path, x), (_, y) in zip(a, b, strict=True):
        np.testing.assert_array_equal(x, y, err_msg=jax.tree_util.keystr(path))
