"""Whatever lies in a folder or an archive: no crash, no hang, bounded memory, every file counted as good or corrupt.

FUZZ_CASES=10000 loads more than the few hundred inputs of CI; a set is reproduced by its number, FUZZ_FIRST=12
FUZZ_CASES=40. One set is 40 inputs, of every mode and size from 1x1 to 5000x20, truncated, damaged, spliced, huge by
declaration, or no images at all, and what only its container can hold (pipes and links that loop, zip bombs).
"""

import gzip
import json
import os
import pathlib
import shutil
import subprocess
import sys

import malformed_inputs
import numpy as np
import pytest

from jax_diffusion.data import load, packing
from jax_diffusion.errors import UserError

FIRST, CASES = int(os.environ.get("FUZZ_FIRST", 0)), int(os.environ.get("FUZZ_CASES", 320))
PER_SET = 40
SCRIPT = pathlib.Path(__file__).with_name("malformed_script.py")
# Of address space. MAX_PIXELS at 16 bytes a pixel are 1 GiB, and what threads and decoders reserve.
MEMORY = 3 << 30
GROWTH = 3 << 29  # bytes of real memory


@pytest.fixture(scope="module")
def seen():
    sets = max(1, CASES // PER_SET)
    done = subprocess.run(
        [sys.executable, SCRIPT, str(FIRST), str(sets), str(MEMORY)], capture_output=True, text=True,
        timeout=300 + 2 * CASES,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


def test_every_input_is_counted_once(seen):
    assert seen["inputs"] >= CASES and seen["good"] + seen["skipped"] == seen["inputs"]
    assert seen["good"] > 0.3 * CASES and seen["skipped"] > 0.1 * CASES


def test_what_is_an_image_is_read_and_what_is_none_is_not(seen):
    assert seen["wrong"] == []


def test_all_kinds_came(seen):
    assert set(seen["kinds"]) == set(malformed_inputs.KINDS)


def test_memory_is_bounded(seen):
    assert seen["grown"] < GROWTH


def damaged(rng, data):
    """Some bytes changed, or the end cut off."""
    data = bytearray(data)
    if rng.random() < 0.3:
        return bytes(data[: rng.integers(len(data))])
    for _ in range(int(rng.integers(1, 8))):
        data[rng.integers(min(len(data), 300) if rng.random() < 0.6 else len(data))] = rng.integers(256)
    return bytes(data)


def arrays(root):
    """Files of arrays and labels that the other sources read: (options of the data config, the file to damage)."""
    images, labels = np.arange(20 * 64, dtype=np.uint8).reshape(20, 8, 8, 1), np.arange(20, dtype=np.uint8) % 5
    idx = root / "idx"
    idx.mkdir()
    head = b"\0\0\x08\x03" + b"".join(n.to_bytes(4, "big") for n in (20, 8, 8))
    (idx / "train-images-idx3-ubyte").write_bytes(head + images.tobytes())
    (idx / "train-labels-idx1-ubyte").write_bytes(b"\0\0\x08\x01" + (20).to_bytes(4, "big") + labels.tobytes())
    zipped = root / "zipped"
    zipped.mkdir()
    for file in idx.iterdir():
        (zipped / f"{file.name}.gz").write_bytes(gzip.compress(file.read_bytes()))
    np.savez_compressed(root / "set.npz", images=images, labels=labels.astype(np.int64))
    np.save(root / "set.npy", images)
    return [
        *({"source": "idx", "path": f.parent, "file": f} for folder in (idx, zipped) for f in sorted(folder.iterdir())),
        *({"source": "numpy", "path": root / name, "file": root / name} for name in ("set.npz", "set.npy")),
    ]


def test_damaged_arrays_and_labels_are_an_error_or_a_set(tmp_path, cfg):
    """An error of one line, or a set of the declared kind whose labels are among its classes."""
    count = {"error": 0, "set": 0}
    for case in arrays(tmp_path):
        file = case.pop("file")
        whole = file.read_bytes()
        for number in range(max(10, CASES // 20)):
            file.write_bytes(damaged(np.random.default_rng((FIRST, number)), whole))
            try:
                source = load(cfg(**case), "train")
                batch = source.batch(np.arange(len(source)))
                assert batch["image"].dtype in (np.uint8, np.float32) and len(batch["image"]) == len(source) > 0
                if source.num_classes:
                    assert set(batch["label"]) <= set(range(source.num_classes))
                count["set"] += 1
            except UserError as error:
                assert "\n" not in str(error) and ("config.data" in str(error) or "labels" in str(error)), error
                count["error"] += 1
        file.write_bytes(whole)
    assert min(count.values()) > 10


def test_damaged_packed_sets_are_an_error_or_found(tmp_path, tree, cfg):
    """Sizes are checked when it is opened; what only a checksum tells, `packed.damaged` does."""
    from jax_diffusion.data import packed

    path = tree({f"{'ab'[i % 2]}/{i}.png": i for i in range(10)})
    packing.pack(cfg(path=path, holdout=0.2), tmp_path / "whole", "array")
    unnoticed = 0
    for number in range(max(40, CASES // 10)):
        rng, copy = np.random.default_rng((FIRST, number)), tmp_path / "copy"
        shutil.copytree(tmp_path / "whole", copy)
        files = sorted(copy.iterdir())
        file = files[rng.integers(len(files))]
        content = file.read_bytes()
        file.write_bytes(new := damaged(rng, content))
        try:
            for split in ("train", "eval"):
                source = load(cfg(source="packed", path=copy), split)
                source.batch(np.arange(len(source)))
            unnoticed += 1
            assert new == content or file.name == "manifest.json" or packed.damaged(copy), (number, file.name)
        except UserError as error:
            assert "\n" not in str(error), error
        shutil.rmtree(copy)
    assert unnoticed > 0
