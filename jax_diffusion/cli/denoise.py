"""Take noise of a known level off images with a trained model.

examples:
  jax-diffusion denoise --workdir=runs/mnist --sigma=0.5
  jax-diffusion denoise --workdir=runs/flowers --images=noisy.png --sigma=0.2 --variants=3

--sigma is the noise's standard deviation where pixels go from -1 to 1 (s grey levels of 255 are s / 127.5).
Held-out images are given such noise first; --images are taken to have it, unless --add_noise. The rows of the
picture: clean images (where known), noisy ones, their mean estimate E[x | noisy] (one evaluation, least squared
error), draws from p(x | noisy).
"""

import argparse
from typing import Any

import numpy as np

from jax_diffusion.cli import images, sample


def add_arguments(parser: argparse.ArgumentParser) -> None:
    images.add_arguments(parser)
    add = parser.add_argument
    add("--sigma", type=float, required=True, metavar="S", help="noise level, in units where pixels are in [-1, 1]")
    add("--add_noise", action="store_true", help="give --images the noise first")


def run(options: argparse.Namespace) -> None:
    import jax

    from jax_diffusion import editing, solvers

    images.no_table(options)
    job = images.load(options)
    schedule = job.model.process.schedule
    t = editing.noise_time(schedule, options.sigma)
    table = sample.make_table(job.model, options, lambda grid: editing.below(grid, t))
    once: Any = solvers.make("ddim", schedule, 1, solvers.grids.from_times(schedule, np.asarray([t])))
    clean, noisy = None, job.images
    if job.held_out or options.add_noise:
        clean, noise = job.images, np.random.default_rng(options.seed).standard_normal(job.images.shape)
        noisy = (clean + options.sigma * noise).astype(np.float32)
    total = job.variants * len(noisy)
    key = jax.random.key(options.seed)
    mean = editing.denoise(
        job.model, key, noisy, once, labels=job.labels, **images.call(options, job, "estimating", len(noisy))
    )
    draws = editing.denoise(
        job.model,
        key,
        job.repeated(noisy),
        table,
        labels=job.repeated(job.labels),
        **images.call(options, job, "denoising", total),
    )
    said = ""
    if clean is not None:
        levels = {"noisy": noisy, "mean estimate": mean, "draw": images.rows(job, draws)[0]}
        said = images.psnr_line("clean images", clean, levels)
    images.finish(
        options,
        job,
        [*([] if clean is None else [clean]), noisy, mean, *images.rows(job, draws)],
        draws,
        f"{total} images denoised from sigma {options.sigma:g} (t = {t:.4g}) with {table.name}, {solvers.cost(table)}",
        said,
    )
