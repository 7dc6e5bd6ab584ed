"""Write one HTML page of a training run: curves, samples, config, environment, what went wrong.

examples:
  jax-diffusion report --workdir=runs/demo
  jax-diffusion report --workdir=runs/demo --out=demo.html --open
  jax-diffusion report --workdir=runs/a,runs/b          # two runs in the same axes, their configs side by side

The page is one file without any reference to the network; send it, or open it on a phone. It may be written while the
run goes on, and again. Move over a curve to read it, drag to look closer, double-click to see all again.
"""

import argparse
import pathlib
import sys
import webbrowser

from jax_diffusion.errors import UserError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--workdir", metavar="DIR[,DIR...]", required=True, help="of a training run, or of several to compare")
    add("--out", metavar="FILE", help="default: report.html in the workdir; of several runs, in this folder")
    add("--open", action="store_true", help="show the page in the browser")


def run(options: argparse.Namespace) -> None:
    from jax_diffusion import reporting

    workdirs = [pathlib.Path(w) for w in options.workdir.split(",") if w]
    if not workdirs:
        raise UserError(f"--workdir={options.workdir} names no folder")
    out = pathlib.Path(options.out or ("report.html" if len(workdirs) > 1 else workdirs[0] / "report.html"))
    if out.is_dir():
        raise UserError(f"--out={out} is a folder: name a file in it, for instance --out={out / 'report.html'}")
    size = reporting.write(workdirs, out)
    print(f"{out}: {size / 1e6:.2f} MB")
    if options.open and not webbrowser.open(out.absolute().as_uri()):
        print(f"no browser here: open {out} yourself", file=sys.stderr)
