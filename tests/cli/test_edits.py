"""The commands that edit images: each runs, writes what it promises, and says a mistake in one line."""

import re
import shutil

import numpy as np
import pytest
from PIL import Image

from jax_diffusion import data
from jax_diffusion.cli import images
from jax_diffusion.cli.inpaint import to_fill
from jax_diffusion.cli.main import main
from jax_diffusion.errors import UserError

TILE = 64 + 2  # an 8x8 image in a picture, enlarged, with its margin


@pytest.fixture(scope="module")
def places(run, conditioned_run, tmp_path_factory):
    """Copies of an unconditional and a conditioned run, for commands write into them; pictures, good and bad."""
    root = tmp_path_factory.mktemp("editing")
    runs = {"run": run.workdir, "sr": conditioned_run.workdir}
    paths = {name: shutil.copytree(path, root / name) for name, path in runs.items()}
    rng = np.random.default_rng(0)

    def save(name, *shape):
        paths[name] = root / f"{name}.png"
        Image.fromarray(rng.integers(0, 256, shape, np.uint8)).save(paths[name])

    save("eight", 8, 8), save("colour", 8, 8, 3), save("four", 4, 4), save("wide", 8, 12)
    Image.fromarray(np.zeros((8, 8), np.uint8)).save(root / "black.png")
    paths["black"] = root / "black.png"
    paths["folder"] = root / "folder"
    paths["folder"].mkdir()
    for i in range(2):
        shutil.copy(paths["eight"], paths["folder"] / f"{i}.png")
    paths["empty"] = root / "empty"
    paths["empty"].mkdir()
    paths["text"] = root / "text.png"
    paths["text"].write_text("no picture")
    paths["new"] = root / "new"
    return paths


@pytest.fixture
def edit(places, tmp_path, capsys):
    """edit("inpaint --workdir={run} ...") -> (what was printed, the picture, the results uint8)."""

    def call(line):
        npz = tmp_path / "out.npz"
        typed = [*line.format(**places).split(), f"--out={tmp_path}/out.png", f"--npz={npz}"]
        status = main(typed)
        out, err = capsys.readouterr()
        assert status == 0, err
        with np.load(npz) as arrays:
            return out, np.asarray(Image.open(tmp_path / "out.png")), arrays["arr_0"]

    return call


def tiles(picture):
    """(rows, columns) of a picture of 8x8 images."""
    return (picture.shape[0] - 2) // TILE, (picture.shape[1] - 2) // TILE


def held_out(run, n):
    source = data.load(run.config.data, "eval")
    batch = source.batch(np.linspace(0, len(source) - 1, n).astype(int))["image"]
    return np.asarray(data.to_uint8(np.asarray(data.to_float(batch))))


def test_inpaint(edit, run):
    out, picture, results = edit(
        "inpaint --workdir={run} --from_data=3 --mask=left --variants=2 --steps=4 --set jump_length=1 --set resamples=2"
    )
    assert "6 fillings of 3 images, 50% of the pixels, with repaint(jump_length=1, resamples=2)" in out
    assert tiles(picture) == (4, 3) and results.shape == (6, 8, 8, 1)
    known = held_out(run, 3)[:, :, 4:]
    assert np.array_equal(results[:3, :, 4:], known) and np.array_equal(results[3:, :, 4:], known)
    assert np.any(results[:3] != results[3:])


def test_inpaint_files_with_a_mask_of_one_s_own(edit, places):
    mask = np.zeros((8, 8), np.uint8)
    mask[2, 3:6] = 255
    Image.fromarray(mask).save(places["new"].with_name("mask.png"))
    line = "inpaint --workdir={run} --images={eight},{folder} --mask=" + str(places["new"].with_name("mask.png"))
    _, _, results = edit(line + " --solver=ddpm --steps=4")
    assert len(results) == 3
    original = np.asarray(Image.open(places["eight"]))
    assert all(np.array_equal(r[mask == 0, 0], original[mask == 0]) for r in results)


@pytest.mark.parametrize("mask, share", [("center", 0.25), ("right", 0.5), ("top", 0.5), ("bottom", 0.5)])
def test_masks_by_name(mask, share):
    fill = to_fill(mask, 8, 16, 0)
    assert fill.shape == (8, 16) and fill.mean() == share
    assert 0.7 < to_fill("random", 64, 64, 0).mean() < 0.8


def test_img2img(edit, run):
    out, picture, results = edit("img2img --workdir={run} --from_data=4 --strength=0.25 --steps=8 --labels=3")
    assert "at strength 0.25" in out and "2 evaluations" in out
    assert tiles(picture) == (3, 4) and results.shape == (4, 8, 8, 1)
    near, original = results.astype(int), held_out(run, 4).astype(int)
    _, _, far = edit("img2img --workdir={run} --from_data=4 --strength=1 --steps=8 --labels=3")
    assert np.abs(near - original).mean() < 0.7 * np.abs(far.astype(int) - original).mean()


def test_denoise(edit):
    out, picture, results = edit("denoise --workdir={run} --from_data=4 --sigma=0.7 --steps=8")
    assert tiles(picture) == (4, 4) and results.shape == (4, 8, 8, 1)
    noisy, mean, draw = (float(x) for x in re.findall(r"([\d.]+) dB", out))
    assert mean > noisy and mean > draw  # E[x | noisy] has the least squared error
    out, picture, _ = edit("denoise --workdir={run} --images={eight} --sigma=0.3 --steps=8")
    assert "PSNR" not in out and tiles(picture) == (3, 1)


def test_interpolate(edit, places):
    gif = places["new"].with_name("film.gif")
    out, picture, results = edit("interpolate --workdir={run} --from_data=4 --frames=3 --steps=4 --gif=" + str(gif))
    assert "2 pair(s), 3 frames each" in out and tiles(picture) == (2, 5) and results.shape == (6, 8, 8, 1)
    assert Image.open(gif).n_frames == 4  # there and back


def test_upscale(edit):
    out, picture, results = edit("upscale --workdir={sr} --from_data=4 --variants=2")
    assert tiles(picture) == (4, 4) and results.shape == (8, 8, 8, 1)
    assert [w for w in ("bicubic", "sample", "mean of 2 samples") if w in out] and out.count(" dB") == 3
    out, picture, results = edit("upscale --workdir={sr} --images={four}")
    assert "PSNR" not in out and tiles(picture) == (2, 1) and results.shape == (1, 8, 8, 1)


def test_fit(edit):
    _, _, results = edit("img2img --workdir={run} --images={wide},{colour} --fit --steps=2")
    assert results.shape == (2, 8, 8, 1)


def test_psnr():
    """10 log10(peak^2 / MSE) with a peak of 2."""
    a = np.zeros((1, 4, 4, 1))
    assert abs(images.psnr(a, a + 0.2) - 20) < 1e-6


def test_missing_files():
    with pytest.raises(UserError, match="no such file or folder"):
        images.read_images("/nowhere.png", ((8, 8, 1),), False)


MISTAKES = [
    ("inpaint --workdir={run}", ["--mask"]),
    ("inpaint --workdir={run} --mask=middle", ["--mask=middle", "no such file", "center"]),
    ("inpaint --workdir={run} --mask={wide}", ["--mask=", "12x8", "8x8"]),
    ("inpaint --workdir={run} --mask={text}", ["--mask=", "no picture"]),
    ("inpaint --workdir={run} --mask={black}", ["--mask=", "black all over"]),
    ("inpaint --workdir={run} --mask=left --set resamples=0", ["resamples=0", "at least 1"]),
    ("inpaint --workdir={run} --mask=left --variants=0", ["--variants=0", "at least 1"]),
    ("inpaint --workdir={new} --mask=left", ["--workdir={new}", "jax-diffusion train"]),
    ("inpaint --workdir={sr} --mask=left", ["low_resolution", "jax-diffusion upscale"]),
    ("img2img --workdir={run} --strength=0", ["--strength=0", "(0, 1]"]),
    ("img2img --workdir={run} --strength=1.2", ["--strength=1.2"]),
    ("img2img --workdir={run} --images={wide}", ["--images={wide}", "12x8", "8x8", "--fit"]),
    ("img2img --workdir={run} --images={eight},{new}.png", ["{new}.png", "no such file"]),
    ("img2img --workdir={run} --images={text}", ["--images={text}", "no picture"]),
    ("img2img --workdir={run} --images={empty}", ["--images={empty}", "no picture in this folder"]),
    ("img2img --workdir={run} --images={eight} --from_data=3", ["--images", "--from_data=3", "one of the two"]),
    ("img2img --workdir={run} --from_data=0", ["--from_data=0", "at least 1"]),
    ("img2img --workdir={run} --from_data=2 --fit", ["--fit", "--images"]),
    ("img2img --workdir={run} --images={eight} --guidance=2", ["--guidance=2", "needs --labels"]),
    ("img2img --workdir={run} --labels=cat", ["--labels=cat", "0 to 9"]),
    ("img2img --workdir={run} --solver=dimm", ["'dimm'", "did you mean 'ddim'?"]),
    ("img2img --workdir={run} --solver=rk45", ["rk45", "ddim"]),
    ("inpaint --workdir={run} --mask=left --solver=rk45", ["rk45", "ddim"]),
    ("denoise --workdir={run} --sigma=1 --table={new}", ["--table={new}", "--solver"]),
    ("interpolate --workdir={run} --guidance=2", ["--guidance=2", "needs --labels"]),
    ("img2img --workdir={run} --set offest=1", ["'offest'"]),
    ("img2img --workdir={run} --out={folder}", ["--out={folder} is a folder"]),
    ("denoise --workdir={run}", ["--sigma"]),
    ("denoise --workdir={run} --sigma=0", ["sigma=0", "127.5"]),
    ("interpolate --workdir={run} --from_data=3", ["3 image(s)", "even number"]),
    ("interpolate --workdir={run} --frames=1", ["--frames=1", "at least 2"]),
    ("interpolate --workdir={run} --gif={new}", ["--gif={new}", ".gif"]),
    ("interpolate --workdir={run} --solver=ddpm", ["'ddpm'", "ddim"]),
    ("upscale --workdir={run}", ["without an image condition", "--config=flowers64_sr"]),
    ("upscale --workdir={sr} --images={wide}", ["12x8", "8x8 or 4x4"]),
    ("upscale --workdir={sr} --images={eight},{four}", ["{four}", "4x4"]),
    ("colorize --workdir={run}", ["without an image condition", "--config=flowers64_color"]),
    ("colorize --workdir={sr}", ["low_resolution", "jax-diffusion upscale"]),
    ("sample --workdir={sr}", ["low_resolution", "upscale"]),
]


@pytest.mark.parametrize("line, words", MISTAKES, ids=[m[0] for m in MISTAKES])
def test_a_mistake_is_one_line(line, words, places, capsys):
    assert main(line.format(**places).split()) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("jax-diffusion: error: ") and err.count("\n") == 1, err
    assert all(w.format(**places) in err for w in words), err


@pytest.mark.parametrize("command", ["inpaint", "img2img", "upscale", "colorize", "interpolate", "denoise"])
def test_help_has_examples(command, capsys):
    with pytest.raises(SystemExit):
        main([command, "--help"])
    out = capsys.readouterr().out
    assert "examples:" in out and f"jax-diffusion {command} --workdir=" in out
