"""Plan a training run on accelerators that are not at hand: memory, FLOPs, collectives, speed.

examples:
  jax-diffusion plan --config=cifar10_ddpm --config.model.dtype=bfloat16 --topology=v5e:2x2 --batch=2048
  jax-diffusion plan --config=imagenet256_dit_xl2 --config.model.dtype=bfloat16 --config.model.remat=full \\
      --topology=v5e:4x4 --mesh=data=2,fsdp=8 --batch=256 --out=plan.json
  jax-diffusion plan --config=imagenet256_dit_xl2 --topology=v6e:2x2 --batch=128 --sweep
  jax-diffusion plan --config=my_recipe.py --shape=64x64x3 --classes=10 --topology=h100:8
  jax-diffusion plan --config=digits --topology=cpu:8 --mesh=data=2,fsdp=4

The training step and the sampler are compiled as `train` and `sample` run them, for a slice of TPUs (v4:XxYxZ, v5e:XxY,
v5p:XxYxZ, v6e:XxY; needs pip install "jax[tpu]"), for NVIDIA GPUs (a100:N, h100:N, h200:N, b200:N; needs
"jax[cuda13]") or for N virtual CPU devices (cpu:N). No accelerator is needed, none is used, and no data is read. Large
U-Nets take 5 to 15 minutes for TPU, transformers one; what was compiled is kept, in jax_diffusion/plans of the user's
cache folder. docs/tpu.md says what the figures mean and how far they go.
"""

import argparse
import json
import pathlib

from jax_diffusion.errors import UserError

AXES = ("data", "fsdp", "tensor")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--config", metavar="RECIPE", required=True, help="a recipe's name or file")
    add("--topology", metavar="KIND:SIZES", required=True, help="what to compile for, see above")
    add("--batch", metavar="N", type=int, help="images a step, of all devices together (default: the recipe's)")
    add("--mesh", metavar="AXIS=N,...", help="sizes of data, fsdp and tensor; -1 is the rest (default: the recipe's)")
    add("--shape", metavar="HxWxC", help="of one sample, where neither the recipe nor its data set says it")
    add("--classes", metavar="N", type=int, help="how many labels there are, 0 for none, likewise")
    add("--sweep", action="store_true", help="try all meshes of data and fsdp with all remat policies at this batch")
    add("--no_sampler", action="store_true", help="leave the sampler out")
    add("--no_search", action="store_true", help="do not search the largest batch that fits")
    add("--no_cache", action="store_true", help="compile anew, and keep nothing")
    add("--out", metavar="FILE.json", help="everything as JSON")


def parse_mesh(text: str) -> dict[str, int]:
    """ "data=2,fsdp=8" -> sizes of all three axes; what is not named is 1, or the rest where nothing is -1."""
    sizes = {}
    for part in text.split(","):
        name, _, value = part.partition("=")
        if name not in AXES or name in sizes or not value.lstrip("-").isdigit():
            raise UserError(f"--mesh={text}: give each of {', '.join(AXES)} at most once, for instance data=2,fsdp=8")
        sizes[name] = int(value)
    return {"data": sizes.get("data", 1 if -1 in sizes.values() else -1), "fsdp": 1, "tensor": 1, **sizes}


def run(options: argparse.Namespace) -> None:
    from jax_diffusion import config as configs
    from jax_diffusion.plan import launch, shapes, targets

    topology = targets.parse(options.topology)
    config = configs.override(configs.resolve(options.config), options.overrides)
    for name, least in (("batch", 1), ("classes", 0)):
        value = getattr(options, name)
        if value is not None and value < least:
            raise UserError(f"--{name}={value} must be at least {least}")
    out = pathlib.Path(options.out) if options.out else None
    if out is not None and not out.absolute().parent.is_dir():
        raise UserError(f"--out={out}: there is no folder {out.parent}")
    given = shapes.parse(options.shape) if options.shape else None
    shape, classes = shapes.find(options.config, config, given, options.classes)
    if options.batch:
        config.train.batch_size = options.batch
    if options.mesh:
        config.mesh.update(parse_mesh(options.mesh))
    keep = not options.no_cache and getattr(options, "compile_cache", None) != "off"
    request = launch.Request(
        options.topology,
        configs.to_json(config),
        shape,
        classes,
        cache=str(launch.default_cache()) if keep else "",
        sampler=not options.no_sampler,
        search=not options.no_search,
        sweep=options.sweep,
    )
    classed = f"{classes} classes" if classes else "no classes"
    print(f"{options.config} for {options.topology}: {topology.count} device(s), samples of "
          f"{'x'.join(map(str, shape))}, {classed}", flush=True)  # fmt: skip
    result = _answer(request, topology)
    if out is not None:
        recipe = {"recipe": options.config, "topology": options.topology, "shape": shape, "classes": classes}
        result = {**recipe, **result, "config": json.loads(request.config)}
        out.write_text(json.dumps(result, indent=1) + "\n")
        print(f"written: {out}")


def _answer(request, topology) -> dict:
    """Prints what comes as it comes; returns all of it."""
    from jax_diffusion.plan import launch, report

    result: dict = {"rows": []} if request.sweep else {}
    for event in launch.events(request):
        if "row" in event:
            result["rows"].append(event["row"])
            cells = report.row(event["row"])
            print(", ".join(f"{k} {v}" for k, v in zip(report.HEADER, cells, strict=True)), flush=True)
            continue
        result |= event
        for program in ("train", "sample"):
            if program in event:
                print(report.estimate(event[program]), flush=True)
        if "largest" in event:
            print(report.largest(event["largest"], request.topology), flush=True)
    if request.sweep:
        if not result["rows"]:
            raise UserError("--sweep: the batch divides over no mesh of these devices: use another --batch")
        result["recommended"] = report.best(result["rows"])
        print(report.table([report.row(r) for r in result["rows"]]))
        print(report.recommendation(result["rows"]))
    print(f"note: {report.CAVEATS[topology.family]}{'' if topology.family == 'cpu' else ' ' + report.LINKS}")
    return result
