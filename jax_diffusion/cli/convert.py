"""Bring a PyTorch model here, or take one of ours to diffusers.

examples:
  jax-diffusion convert ddpm-cifar10-32 --workdir=runs/ddpm                 a folder of diffusers'
  jax-diffusion convert 64x64_diffusion.pt --workdir=runs/adm               published files are known by their names
  jax-diffusion convert DiT-XL-2-256x256.pt --format=dit --workdir=runs/dit
  jax-diffusion convert model-100.pt --workdir=runs/flowers --set image_size=64 \\
      --config.data.path=flowers64.tar.gz                                   fields of the run, to train and evaluate it
  jax-diffusion sample --workdir=runs/ddpm
  jax-diffusion train --workdir=runs/ddpm --config.data.path=photos.zip     fine-tune it

  jax-diffusion convert --workdir=runs/demo --to=diffusers --out=exported   and back
  jax-diffusion convert --workdir=runs/demo --to=diffusers --out=threes --label=3

Nothing in a file is executed, and torch is needed for its own files alone (.bin, .pt). What does not fit is said in one
error that lists it. diffusers' pipelines hand no labels on: --label makes an unconditional network that always draws
this class ('none': the average over all).
"""

import argparse

from jax_diffusion.errors import UserError

FORMATS = "diffusers, guided_diffusion, dit, uvit, edm, edm2, denoising_diffusion_pytorch"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("source", nargs="?", metavar="SOURCE", help="a folder of diffusers', or a file of weights")
    add("--workdir", metavar="DIR", required=True, help="the run to make, or with --to the run to take")
    add("--format", metavar="NAME", help=f"{FORMATS} (default: by the files)")
    add("--set", action="append", default=[], metavar="OPTION=VALUE", help="what the files do not say: image_size, "
        "preset, ... (a wrong one lists those there are)")  # fmt: skip
    add("--to", choices=("diffusers",), help="write the run as a folder of diffusers'")
    add("--out", metavar="FOLDER", help="with --to: the folder to write")
    add("--label", metavar="L", help="with --to: the one class to draw, by number or name, or 'none'")
    add("--checkpoint", type=int, metavar="STEP", help="with --to: default the newest")
    add("--ema", action=argparse.BooleanOptionalAction, default=True, help="with --to: averaged weights, or raw ones")


def run(options: argparse.Namespace) -> None:
    if options.to:
        _export(options)
    else:
        _import(options)


def _import(options: argparse.Namespace) -> None:
    import dataclasses
    import time

    import jax

    from jax_diffusion import config as configs
    from jax_diffusion import interop
    from jax_diffusion.cli.sample import parse_options

    for name in ("out", "label", "checkpoint"):
        if getattr(options, name) is not None:
            raise UserError(f"--{name}={getattr(options, name)} goes with --to=diffusers; leave it out")
    if options.source is None:
        raise UserError("SOURCE is missing: name a folder of diffusers' or a file of weights, or use --to=diffusers")
    started = time.perf_counter()
    imported = interop.open_model(options.source, options.format, **parse_options(options.set))
    if options.overrides:
        imported = dataclasses.replace(imported, config=configs.override(imported.config, options.overrides))
    interop.to_workdir(imported, options.workdir, source=str(options.source))
    parameters = sum(leaf.size for leaf in jax.tree.leaves(imported.params))
    for note in imported.notes:
        print(f"note: {note}")
    shape = "x".join(map(str, imported.shape))
    classes = f"{len(imported.class_names)} classes" if imported.class_names else "unconditional"
    print(
        f"{imported.config.model.name}, {parameters:,} parameters, {shape}, {classes}, "
        f"{imported.config.process.schedule.name} schedule, {imported.config.process.prediction} prediction, "
        f"in {time.perf_counter() - started:.1f} s; now: jax-diffusion sample --workdir={options.workdir}"
    )


def _export(options: argparse.Namespace) -> None:
    import json

    from jax_diffusion import interop
    from jax_diffusion import model as models
    from jax_diffusion.cli.sample import parse_labels

    if options.source is not None or options.set or options.format:
        raise UserError("--to=diffusers takes --workdir and --out: leave SOURCE, --format and --set out")
    if options.out is None:
        raise UserError("--out is missing: name the folder to write")
    if options.overrides:
        raise UserError(f"{options.overrides[0]}: a run's fields stay as they are in --to=diffusers; leave it out")
    model = models.load(options.workdir, step=options.checkpoint, ema=options.ema)
    label = None
    if options.label == "none":
        label = model.network.num_classes
    elif options.label is not None:
        labels = parse_labels(options.label, model.class_names)
        if labels is None or len(labels) != 1:
            raise UserError(f"--label={options.label}: one class is drawn; name one")
        label = labels[0]
    folder = interop.save_diffusers(model, options.out, label=label)
    index = json.loads((folder / "model_index.json").read_text())
    opens = f"{index['_class_name']}.from_pretrained({str(folder)!r})"
    # A DiTPipeline has an autoencoder too, which no run of ours holds; the others hand no labels on.
    part = "transformer" if "transformer" in index else "unet"
    if part == "transformer" or (model.network.num_classes and label is None):
        opens = f"{index[part][1]}.from_pretrained({str(folder)!r}, subfolder={part!r})"
    print(f"step {model.step:,} of {options.workdir} in {folder}; now: {opens}")
