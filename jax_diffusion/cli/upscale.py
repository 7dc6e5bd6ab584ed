"""Enlarge small images with a model trained for it (recipe flowers64_sr).

examples:
  jax-diffusion upscale --workdir=runs/sr --from_data=8
  jax-diffusion upscale --workdir=runs/sr --images=small.png --variants=4 --steps=50
  jax-diffusion upscale --workdir=runs/sr --from_data=8 --variants=8 --out=upscaled.png --npz=upscaled.npz

Images of the model's full size are made small first, and the results are then measured against them. The rows of
the picture: the input enlarged by bicubic interpolation (what the network sees), results, originals.
"""

import argparse

import numpy as np

from jax_diffusion.cli import images, sample

CONDITION = "low_resolution"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    images.add_arguments(parser)


def run(options: argparse.Namespace) -> None:
    restore(options, CONDITION, "bicubic enlargement")


def restore(options: argparse.Namespace, condition: str, baseline: str = "") -> None:
    """Samples from a model conditioned on an image, beside the condition and, where there is one, the original.

    baseline: what the condition is called where samples are measured against it; "" measures nothing.
    """
    from jax_diffusion import solvers

    job = images.load(options, condition)
    table = sample.make_table(job.model, options)
    results = images.draw(options, job, options.command, table, images=job.repeated(job.images))
    shown = job.model.condition_images(job.images)
    parts, said = [shown, *images.rows(job, results)], ""
    if job.images.shape[1:] == job.model.shape:
        parts.append(job.images)
    if baseline and job.images.shape[1:] == job.model.shape:
        draws = images.rows(job, results)
        levels = {baseline: np.broadcast_to(shown, job.images.shape), "sample": draws[0]}
        if job.variants > 1:
            levels[f"mean of {job.variants} samples"] = np.mean(draws, axis=0)
        said = images.psnr_line("originals", job.images, levels)
    images.finish(
        options,
        job,
        parts,
        results,
        f"{len(results)} samples for {len(job.images)} images with {table.name}, {solvers.cost(table)}",
        said,
    )
