"""Fill in the missing part of images with a trained model.

examples:
  jax-diffusion inpaint --workdir=runs/mnist --mask=right --variants=4
  jax-diffusion inpaint --workdir=runs/flowers --images=photo.png --mask=mask.png --labels=roses
  jax-diffusion inpaint --workdir=runs/mnist --from_data=10 --mask=random --solver=ddpm --steps=250

The known pixels come out unchanged. The default solver is RePaint's, which goes back and forth so that the
filling fits its surroundings: --steps=50 --set jump_length=10 --set resamples=4. Any other solver fills in by
replacement alone: cheaper, and worse. The rows of the picture: images, what is known (grey: to fill), results.
"""

import argparse
import pathlib
from typing import Any

import numpy as np

from jax_diffusion.cli import images, sample
from jax_diffusion.errors import UserError

SHAPES = ("center", "left", "right", "top", "bottom", "random")
RANDOM_SHARE = 0.75  # of the pixels that --mask=random hides


def add_arguments(parser: argparse.ArgumentParser) -> None:
    images.add_arguments(parser)
    parser.add_argument(
        "--mask",
        required=True,
        metavar="MASK",
        help=f"a black and white picture of the images' size, white where to fill; or {', '.join(SHAPES)} "
        "(three of four pixels)",
    )


def to_fill(mask: str, height: int, width: int, seed: int) -> np.ndarray:
    """Where to fill: bool [H, W]."""
    fill = np.zeros((height, width), bool)
    if mask == "random":
        return np.random.default_rng(seed).random((height, width)) < RANDOM_SHARE
    halves: dict[str, Any] = {
        "left": np.s_[:, : width // 2],
        "right": np.s_[:, width // 2 :],
        "top": np.s_[: height // 2],
        "bottom": np.s_[height // 2 :],
        "center": np.s_[height // 4 : height - height // 4, width // 4 : width - width // 4],
    }
    if mask in halves:
        fill[halves[mask]] = True
        return fill
    path = pathlib.Path(mask)
    if not path.is_file():
        raise UserError(f"--mask={mask}: there is no such file; give a picture or one of {', '.join(SHAPES)}")
    picture = images.read_picture("--mask", path, 1)[..., 0]
    if picture.shape != (height, width):
        h, w = picture.shape
        raise UserError(f"--mask={mask} is {w}x{h} (width x height): the images are {width}x{height}")
    fill = picture > 127
    if not fill.any():
        raise UserError(f"--mask={mask} is black all over: make it white where the image is to be filled in")
    return fill


def run(options: argparse.Namespace) -> None:
    from jax_diffusion import solvers

    if options.solver is None and options.table is None:
        options.solver, options.steps = "repaint", 50 if options.steps is None else options.steps
        options.set = ["jump_length=10", "resamples=4", *options.set]
    job = images.load(options)
    height, width, _ = job.model.shape
    known = ~to_fill(options.mask, height, width, options.seed)
    table = sample.make_table(job.model, options)
    results = images.draw(options, job, "inpainting", table, known=job.repeated(job.images), mask=known)
    shown = np.where(known[None, :, :, None], job.images, np.float32(0))
    images.finish(
        options,
        job,
        [job.images, shown, *images.rows(job, results)],
        results,
        f"{len(results)} fillings of {len(job.images)} images, {1 - known.mean():.0%} of the pixels, with "
        f"{table.name}, {solvers.cost(table)}",
    )
