"""Change images with a trained model: noise them part of the way, and denoise (SDEdit).

examples:
  jax-diffusion img2img --workdir=runs/mnist --strength=0.6
  jax-diffusion img2img --workdir=runs/mnist --labels=8 --strength=0.7 --guidance=3
  jax-diffusion img2img --workdir=runs/flowers --images=sketch.png --fit --strength=0.8 --variants=4

strength: how much of the noising is undone again. Near 0 the image comes back as it was, 1 draws a new one;
that share of --steps is run. The rows of the picture: images, noised images, results.
"""

import argparse

import numpy as np

from jax_diffusion.cli import images, sample
from jax_diffusion.errors import UserError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    images.add_arguments(parser)
    parser.add_argument("--strength", type=float, default=0.6, metavar="S", help="in (0, 1] (default: %(default)s)")


def run(options: argparse.Namespace) -> None:
    import jax

    from jax_diffusion import editing, solvers

    if not 0 < options.strength <= 1:
        raise UserError(f"--strength={options.strength:g} is outside (0, 1]: near 0 keeps the image, 1 draws a new one")
    images.no_table(options)
    job = images.load(options)
    table = sample.make_table(job.model, options, lambda grid: editing.from_strength(grid, options.strength))
    total = job.variants * len(job.images)
    results = editing.img2img(
        job.model,
        jax.random.key(options.seed),
        job.repeated(job.images),
        table,
        labels=job.repeated(job.labels),
        **images.call(options, job, "img2img", total),
    )
    alpha, sigma = job.model.process.schedule.alpha_sigma(np.float64(table.t[0]))
    noise = np.random.default_rng(options.seed).standard_normal(job.images.shape)
    images.finish(
        options,
        job,
        [job.images, alpha * job.images + sigma * noise, *images.rows(job, results)],
        results,
        f"{total} images from {len(job.images)} at strength {options.strength:g}, with {table.name}, "
        f"{solvers.cost(table)}",
    )
