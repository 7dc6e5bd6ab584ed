"""`jax-diffusion data` and `data pack`, as typed."""

import json

import numpy as np
import pytest
from PIL import Image

from jax_diffusion.cli.main import main


@pytest.fixture
def photos(tmp_path):
    """30 images of two classes, 12x10, and two files that are none; names that no terminal should be sent."""
    rng = np.random.default_rng(0)
    for i in range(30):
        path = tmp_path / "photos" / ("cat" if i < 20 else "dog") / f"{i:02d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (12, 10, 3), np.uint8)).save(path)
    (tmp_path / "photos" / "cat" / "x\x1b[31m.png").write_bytes(b"no image")
    (tmp_path / "photos" / "dog" / "\udcff.png").write_bytes(b"")
    return tmp_path / "photos"


def run(capsys, *arguments):
    status = main(["data", *map(str, arguments)])
    said = capsys.readouterr()
    return status, said.out, said.err


def test_a_look(photos, tmp_path, capsys):
    out = tmp_path / "grid.png"
    status, said, _ = run(capsys, "--config=flowers64", f"--config.data.path={photos}", "--config.data.size=8,8",
                          "--config.data.holdout=0", f"--out={out}", "--num=8")  # fmt: skip
    assert status == 0
    assert f"train of {photos}: 30 examples of 8x8x3 uint8, 2 classes" in said
    assert "in the host's memory" in said and "cat 20, dog 10; least 10, most 20" in said
    assert "corrupt, left out: 2: cat/x\\x1b[31m.png, dog/\\udcff.png" in said and "\x1b" not in said
    assert f"{out}: what the network will see, a row for each class" in said
    with Image.open(out) as picture:
        # Two rows of four tiles of 8 pixels, six times as large, and 2 between them.
        assert picture.size == (4 * 50 + 2, 2 * 50 + 2)


def test_eval_and_what_is_decoded_by_batches(photos, tmp_path, capsys):
    recipe = "--config=flowers64"
    options = (recipe, f"--config.data.path={photos}", "--config.data.size=8,8", f"--out={tmp_path}/a.png")
    status, said, _ = run(capsys, *options, "--split=eval", "--config.data.max_bytes=10", "--config.data.holdout=0.25")
    assert status == 0 and "eval of " in said and ": 8 examples of 8x8x3" in said
    assert "decoded batch by batch from disk" in said
    status, said, _ = run(capsys, *options, "--sample=5", "--config.data.max_bytes=10")
    assert status == 0 and "(a sample of 5" in said


@pytest.mark.parametrize("recipe", ["flowers64_sr", "flowers64_color"])
def test_conditions_stand_beside_the_picture(recipe, photos, tmp_path, capsys):
    out = tmp_path / "grid.png"
    status, said, _ = run(capsys, f"--config={recipe}", f"--config.data.path={photos}", "--config.data.size=8,8",
                          f"--out={out}", "--num=6", "--config.data.flip=False", "--config.data.holdout=0")  # fmt: skip
    assert status == 0, said
    with Image.open(out) as picture:
        assert picture.size[0] > picture.size[1], "pairs"
        tiles = np.asarray(picture)
    shown, original = tiles[2:50, 2:50].astype(int), tiles[2:50, 52:100].astype(int)
    assert (shown != original).any()
    if recipe == "flowers64_color":
        assert (shown[..., 0] == shown[..., 1]).all()
        assert np.abs(original @ [0.299, 0.587, 0.114] - shown[..., 0]).max() < 2


def test_points_and_the_measure(tmp_path, capsys):
    status, said, _ = run(capsys, "--config=toy2d", f"--out={tmp_path}/points.png", "--measure")
    assert status == 0 and "examples of 2 float32" in said
    assert "pipeline, batches in host memory: " in said and "batches on the devices: " in said
    assert Image.open(tmp_path / "points.png").size == (480, 480)


@pytest.mark.parametrize("file", ["speed.jsonl", "metrics.jsonl"])
def test_beside_what_a_run_consumes(file, tmp_path, capsys):
    """In either of the files a run's rates may be in."""
    from jax_diffusion import config as configs

    run_ = tmp_path / "run"
    run_.mkdir()
    (run_ / "config.json").write_text(configs.to_json(configs.resolve("digits")))
    (run_ / "dataset.json").write_text(json.dumps({"shape": [8, 8, 1], "class_names": list("0123456789")}))
    options = (f"--workdir={run_}", f"--out={tmp_path}/x.png", "--measure")
    status, said, _ = run(capsys, *options)
    assert status == 0 and "has logged no images/s yet" in said
    records = [{"step": s, "images_per_s": 100.0 + s, "input_wait": 0.01} for s in range(3)]
    (run_ / file).write_text("".join(json.dumps(r) + "\n" for r in records) + '{"step": 3, "ima')
    status, said, _ = run(capsys, *options)
    assert status == 0
    assert f"training in {run_}: 101 img/s, waiting for input 1.00% of the time; the pipeline makes " in said


def test_pack_and_look_again(photos, tmp_path, capsys):
    out = tmp_path / "packed"
    status, said, _ = run(capsys, "pack", "--config=flowers64", f"--config.data.path={photos}",
                          "--config.data.size=8,8", "--config.data.holdout=0.2", f"--out={out}")  # fmt: skip
    assert status == 0 and ("train: 24 examples" in said or "train: 25 examples" in said)
    assert f"use: --config.data.source=packed --config.data.path={out}" in said
    options = ("--config=flowers64", "--config.data.source=packed", f"--config.data.path={out}",
               "--config.data.size=8,8", f"--out={tmp_path}/x.png")  # fmt: skip
    status, said, _ = run(capsys, *options)
    assert status == 0 and "memory-mapped from disk" in said and "are the manifest's" in said
    with (out / "train.npy").open("r+b") as file:
        file.seek(-5, 2)
        file.write(b"other")
    status, _, err = run(capsys, *options)
    assert status == 2 and err.count("\n") == 1 and "train.npy: its SHA-256 is not the manifest's" in err


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ((), "give --config=RECIPE, or the --workdir"),
        (("--config=digit",), "did you mean 'digits'"),
        (("--config=digits", "--num=0"), "--num=0 must be at least 1"),
        (("--config=digits", "--sample=-1"), "--sample=-1 must be at least 0"),
        (("--config=digits", "--out=grid.txt"), "--out=grid.txt has no ending of a picture"),
        (("--config=digits", "--config.data.nmae=x"), "no field 'nmae'"),
        (("--config=digits", "--config.data.on_device=gpu", "--measure"), "config.data.on_device='gpu' is unknown"),
        (("pack", "--config=digits"), "data pack needs --out=FOLDER"),
        (("pack", "--config=digits", "--out=x", "--shards=3"), "--shards=3 belongs to --format=array_record"),
        (("pack", "--config=digits", "--out=."), "is there already"),
        (("pak", "--config=digits"), "invalid choice: 'pak'"),
    ],
)
def test_mistakes_are_one_line(arguments, words, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    status, _, err = run(capsys, *arguments)
    assert status == 2 and err.startswith("jax-diffusion: error: ") and err.count("\n") == 1 and words in err, err
