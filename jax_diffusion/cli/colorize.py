"""Colour grey images with a model trained for it (recipe flowers64_color).

examples:
  jax-diffusion colorize --workdir=runs/color --from_data=8 --variants=3
  jax-diffusion colorize --workdir=runs/color --images=old_photo.jpg --fit --out=coloured.png

Colour images are made grey first. The rows of the picture: the grey image, results, originals. Colours are drawn, not
recovered: --variants shows how far they are open.
"""

import argparse

from jax_diffusion.cli import images, upscale

CONDITION = "gray"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    images.add_arguments(parser)


def run(options: argparse.Namespace) -> None:
    upscale.restore(options, CONDITION)
