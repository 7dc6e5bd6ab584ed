"""Look at the data of a recipe, or pack it into files that are read faster.

examples:
  jax-diffusion data --config=digits --out=digits.png
  jax-diffusion data --config=flowers64 --config.data.path=photos.zip --split=eval --num=40
  jax-diffusion data --config=mnist --config.data.path=data --measure
  jax-diffusion data --workdir=runs/mnist --measure          # beside what that run's training step consumes
  jax-diffusion data pack --config=flowers64 --config.data.path=photos --out=packed --format=array
  jax-diffusion data pack --config=flowers64 --config.data.path=photos --out=shards --format=array_record --shards=16
  jax-diffusion train --config=flowers64 --workdir=runs/flowers --config.data.source=packed --config.data.path=packed

Without `pack`: counts by class, shapes, statistics of the channels, corrupt files, where the bytes lie, and a picture
of what the network will see (after cropping, flipping and scaling; of super-resolution and colourisation the condition
beside it). --measure times the pipeline alone.

`data pack` writes both splits as the recipe reads them: --format=array decodes into uint8 arrays that training maps
into memory, --format=array_record keeps the images' files as they are. Training from either sees the same batches.
"""

import argparse
import pathlib

from jax_diffusion.errors import UserError, printable

SHOWN = 10  # corrupt files named, channels listed
CLASSES = 40  # counts listed
RECORDS = 20  # of a run's log, the newest, that say what its training consumes
QUICK = 4 << 30  # bytes of a packed set whose checksums are looked at without being asked


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("what", nargs="?", choices=("look", "pack"), default="look", help="look (the default) or pack")
    add("--config", metavar="RECIPE", help="a recipe's name or file")
    add("--workdir", metavar="DIR", help="of a run, whose config it is unless --config says another")
    add("--split", choices=("train", "eval"), default="train", help="which part to look at (default: train)")
    add("--out", metavar="PATH", help="the picture (default: data.png), or the folder that pack writes")
    add("--num", type=int, metavar="N", default=64, help="examples in the picture (default: 64)")
    add("--sample", type=int, metavar="N", help="examples that statistics are taken of, evenly spread; 0 reads all "
        "(default: all that lie in memory, else 10000)")  # fmt: skip
    add("--measure", action="store_true", help="time the pipeline: images/s in host memory and on the devices")
    add("--format", choices=("array", "array_record"), default="array", help="of pack (default: array)")
    add("--shards", type=int, metavar="N", default=1, help="files of array_record for each split (default: 1)")


def run(options: argparse.Namespace) -> None:
    from jax_diffusion import config as configs
    from jax_diffusion.train.workdir import read_meta

    for name, least in (("num", 1), ("sample", 0), ("shards", 1)):
        value = getattr(options, name)
        if value is not None and value < least:
            raise UserError(f"--{name}={value} must be at least {least}")
    if options.config:
        config = configs.resolve(options.config)
    elif options.workdir:
        config, _ = read_meta(options.workdir)
    else:
        raise UserError("give --config=RECIPE, or the --workdir of a run")
    config = configs.override(config, options.overrides)
    (pack if options.what == "pack" else look)(options, config)


def pack(options: argparse.Namespace, config) -> None:
    from jax_diffusion.data import packing

    if not options.out:
        raise UserError("data pack needs --out=FOLDER, which it makes")
    if options.format != "array_record" and options.shards != 1:
        raise UserError(f"--shards={options.shards} belongs to --format=array_record: an array is one file")
    out = pathlib.Path(options.out)
    lines = packing.pack(config.data, out, options.format, options.shards)
    print("\n".join(lines))
    print(f"use: --config.data.source=packed --config.data.path={out}")


def look(options: argparse.Namespace, config) -> None:
    from jax_diffusion import data, io
    from jax_diffusion.cli import sample
    from jax_diffusion.data import inspecting

    out = options.out or "data.png"
    sample.check_picture("--out", out)
    if config.data.source == "packed":
        _check_packed(config.data.path, options.sample == 0)
    source = data.load(config.data, options.split)
    found = inspecting.survey(source, options.sample)
    for line in description(config, source, options.split, found):
        print(printable(line))  # names of files and classes hold anything
    io.save_picture(out, inspecting.grid(config, source, options.split, found, options.num))
    print(f"{out}: what the network will see" + (", a row for each class" if _rows(source) else ""), flush=True)
    if options.measure:
        for line in measured(options, config, source):
            print(line)
    elif options.workdir:
        print("note: --measure times the pipeline beside that run's training step")


def _check_packed(path: str, wanted: bool) -> None:
    """Raises UserError where a file is not as it was packed; of a large set only where that is `wanted`."""
    from jax_diffusion.data import packed
    from jax_diffusion.progress import Progress

    files = [f for part in packed.read_manifest(path)["splits"].values() for f in part["files"].values()]
    size = sum(f["bytes"] for f in files)
    if size > QUICK and not wanted:
        print(f"{path}: {size / 2**30:,.1f} GiB, whose SHA-256 --sample=0 checks")
        return
    progress = Progress(f"checking the bytes of {path}", size)
    if bad := packed.damaged(path, progress.add):
        raise UserError(f"config.data.path={path!r} is damaged: {'; '.join(bad)}: pack again")
    print(f"{path}: the SHA-256 of {len(files)} file(s) are the manifest's")


def _rows(source) -> bool:
    return bool(source.num_classes) and 1 < source.num_classes <= 20


def description(config, source, split: str, found):
    """The lines of a look."""
    import numpy as np

    from jax_diffusion.data import inspecting

    n, kind = len(source), "x".join(map(str, source.shape))
    labelled = f"{source.num_classes} classes" if source.num_classes else "no labels"
    yield f"{split} of {source.name}: {n:,} examples of {kind} {found.dtype}, {labelled}"
    yield f"source {config.data.source}: {inspecting.where(source)}"
    one = source.batch(np.zeros(1, int))
    size = config.train.batch_size * sum(leaf.nbytes for leaf in one.values())
    yield (
        f"a batch of {config.train.batch_size}: {size / 2**20:,.2f} MiB to the devices; made ahead: up to "
        f"{config.data.prefetch_bytes / 2**20:,.0f} MiB; on_device={config.data.on_device}"
    )
    part = len(found.indices)
    of = "all" if part == n else f"a sample of {part:,}"
    if source.skipped:
        names = ", ".join(source.skipped[:SHOWN]) + (", ..." if len(source.skipped) > SHOWN else "")
        yield f"corrupt, left out: {len(source.skipped):,}: {names}"
    else:
        met = "" if part == n or isinstance(source, inspecting.ArraySource) else f" in {of} (--sample=0 reads all)"
        yield f"corrupt: none{met}"
    if found.labels is not None:
        counts = np.bincount(found.labels, minlength=source.num_classes)
        classes = source.class_names or tuple(map(str, range(len(counts))))
        listed = [f"{name} {count:,}" for name, count in zip(classes, counts, strict=False)]
        more = f", ... ({len(counts):,} classes)" if len(listed) > CLASSES else ""
        yield f"classes ({of}): {', '.join(listed[:CLASSES])}{more}; least {counts.min():,}, most {counts.max():,}"
    yield f"channels ({of}; uint8 as the network sees it, 0..255 -> -1..1):"
    yield "  channel     mean      std      min      max"
    columns = zip(found.mean, found.std, found.least, found.most, strict=True)
    for c, values in enumerate(list(columns)[:SHOWN]):
        yield f"  {c:>7}" + "".join(f" {v:8.4f}" for v in values)


def measured(options: argparse.Namespace, config, source):
    """The lines of --measure."""
    from jax_diffusion.data import inspecting

    rates = inspecting.measure(config, source)
    for name, words in (("host", "in host memory"), ("devices", "on the devices")):
        rate = rates[name]
        yield f"pipeline, batches {words}: {rate.second:,.0f} img/s, {rate.cpu_second:,.0f} img per CPU-second"
    if not options.workdir:
        return
    used = consumed(pathlib.Path(options.workdir))
    if not used:
        yield f"note: --workdir={options.workdir} has logged no images/s yet"
        return
    wait = f", waiting for input {used['input_wait']:.2%} of the time" if "input_wait" in used else ""
    times = rates["devices"].second / used["images_per_s"]
    said = f"{used['images_per_s']:,.0f} img/s{wait}"
    yield f"training in {options.workdir}: {said}; the pipeline makes {times:.1f} times that"


def consumed(workdir: pathlib.Path) -> dict[str, float]:
    """What a run's training step took in, from its logs: medians of "images_per_s" and "input_wait" over the newest
    records; {} where it has none."""
    import numpy as np

    from jax_diffusion.train.writers import read_lines

    records = []
    for name in ("metrics.jsonl", "speed.jsonl"):  # runs of older versions have all in the first
        records += [r for r in read_lines(workdir / name) if "images_per_s" in r]
    newest = records[-RECORDS:]
    keys = [k for k in ("images_per_s", "input_wait") if newest and all(k in r for r in newest)]
    return {k: float(np.median([r[k] for r in newest])) for k in keys}
