"""Morph pairs of images into each other through a trained model's latents.

examples:
  jax-diffusion interpolate --workdir=runs/mnist --from_data=8 --frames=9
  jax-diffusion interpolate --workdir=runs/flowers --images=a.png,b.png --frames=24 --gif=morph.gif --steps=100

Images are taken in pairs, in order. Each is encoded by running the sampler's differential equation backwards, the
latents are interpolated on the sphere and decoded. A row of the picture: an image, the frames, the other image; the
first and last frame are the images encoded and decoded again. --solver is ddim (default), euler or heun. With
--labels the images are encoded with them, and each frame is decoded with that of the nearer end; without, with none.
"""

import argparse

import numpy as np

from jax_diffusion.cli import guiding, images, sample
from jax_diffusion.errors import UserError

STEPS = 50


def add_arguments(parser: argparse.ArgumentParser) -> None:
    images.add_arguments(parser, variants=False)
    add = parser.add_argument
    add("--frames", type=int, default=8, metavar="N", help="from one image to the other (default: %(default)s)")
    add("--gif", metavar="FILE", help="film of all pairs, there and back")


def run(options: argparse.Namespace) -> None:
    from jax_diffusion import editing, io
    from jax_diffusion.errors import choose

    if options.frames < 2:
        raise UserError(f"--frames={options.frames} must be at least 2")
    if options.gif:
        sample.check_picture("--gif", options.gif)
    if options.set:
        raise UserError(f"--set {options.set[0]}: the solvers of `interpolate` have no options; leave it out")
    images.no_table(options)
    solver = choose("--solver", options.solver or "ddim", editing.ODE_SOLVERS)
    steps = STEPS if options.steps is None else options.steps
    job = images.load(options)
    if len(job.images) % 2:
        raise UserError(f"{len(job.images)} image(s): `interpolate` takes pairs, give an even number")
    a, b = job.images[0::2], job.images[1::2]
    # A label that changes halfway makes a jump there: none unless they are asked for.
    labels = None if options.labels is None or job.labels is None else (job.labels[0::2], job.labels[1::2])
    # Guidance bends the path that encoding and decoding must share: none unless it is asked for.
    scale = 1.0 if options.guidance is None else options.guidance
    guidance = guiding.sampling(options, job.model, labels, scale)
    frames = editing.interpolate(
        job.model,
        a,
        b,
        options.frames,
        steps=steps,
        solver=solver,
        spacing=options.grid,
        labels=labels,
        **images.call(options, job, "interpolating", len(a) * options.frames, guidance),
    )
    columns = [a, *np.moveaxis(frames, 1, 0), b]
    if options.gif:
        film = np.moveaxis(frames, 1, 0)
        io.save_film(options.gif, [*film, *film[-2:0:-1]], columns=len(a) if len(a) <= 4 else None)
    error = np.sqrt(np.mean(np.square(np.stack([frames[:, 0] - a, frames[:, -1] - b]))))
    picture = np.stack(columns, axis=1).reshape(-1, *job.model.shape)
    images.finish(
        options,
        job._replace(labels=None),
        [picture],
        frames.reshape(-1, *job.model.shape),
        f"{len(a)} pair(s), {options.frames} frames each, with {solver} in {steps} steps each way "
        f"(encoded and decoded again: RMS error {error:.3f} of 2)" + (f", film {options.gif}" if options.gif else ""),
        columns=len(columns),
    )
