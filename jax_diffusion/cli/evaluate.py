"""Measure a trained model against the real data: its samples, and its likelihood of real images.

examples:
  jax-diffusion evaluate --workdir=runs/demo
  jax-diffusion evaluate --workdir=runs/mnist --metrics=accuracy --num=1000 --solver=ddim --steps=50
  jax-diffusion evaluate --workdir=runs/mnist --steps=50 --cache=3
  jax-diffusion evaluate --workdir=runs/mnist --metrics=bpd --likelihood_images=200

metrics:
  accuracy  share of conditional samples that an SVC trained on real images puts in the class asked for,
            beside the SVC's own accuracy on held-out real images
  frechet   Fréchet distance in pixel space of the samples to the real images, beside that of one half of
            the real images to the other
  psnr      of models conditioned on an image: samples made from held-out pictures, against those pictures; beside
            that of the condition itself
  bpd       exact likelihood by the probability-flow ODE, bits per dimension of training and of held-out images
            (nats per dimension of the density, for points); about a hundred evaluations with derivative an image
  vlb       the variational bound, likewise; all T terms of a discrete schedule, else 64 times an image

Models conditioned on an image are given held-out pictures. Prints a line a metric, appends all of it to
WORKDIR/evaluations.jsonl, which `jax-diffusion report` shows, and writes the latest to WORKDIR/evaluation.json.
"""

import argparse
import dataclasses
import json
import pathlib
import sys
import time
from collections.abc import Sized

import numpy as np

from jax_diffusion.cli import distributed, guiding, sample, speed
from jax_diffusion.errors import UserError, choose

LIKELIHOODS = ("bpd", "vlb")
METRICS = ("accuracy", "frechet", "psnr", *LIKELIHOODS)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    sample.add_sampling_arguments(parser)
    speed.add_arguments(parser)
    add = parser.add_argument
    add("--metrics", metavar="M[,M...]", help="default: of accuracy, frechet and psnr those that the model allows")
    add("--num", type=int, default=1000, metavar="N", help="samples drawn (default: %(default)s)")
    add("--batch_size", type=int, default=250, metavar="N", help="samples per call (default: %(default)s)")
    add("--likelihood_images", type=int, default=100, metavar="N",
        help="of bpd and vlb: images of each split (default: %(default)s)")  # fmt: skip
    add("--likelihood_draws", type=int, default=1, metavar="N",
        help="of bpd and vlb: independent noise draws an image (default: %(default)s)")  # fmt: skip
    add("--vlb_steps", type=int, metavar="N", help="of vlb: a chain of so many steps (discrete), or times an image")


def _rows(n: int, most: int) -> np.ndarray:
    """At most `most` of 0..n-1, by chance but always the same."""
    return np.sort(np.random.default_rng(0).permutation(n)[:most])


def _floats(images) -> np.ndarray:
    from jax_diffusion import data

    return np.asarray(data.to_float(np.asarray(images)))


def _accuracy(sources, samples, asked) -> tuple[str, dict]:
    from jax_diffusion.evals.judge import MAX_HELD_OUT, MAX_TRAIN, judge

    real, held_out = sources["train"], sources["eval"]
    print(f"fitting the judge on {min(MAX_TRAIN, len(real)):,} of {len(real):,} real images", file=sys.stderr)
    real = real.batch(_rows(len(real), MAX_TRAIN))
    held_out = held_out.batch(_rows(len(held_out), MAX_HELD_OUT))
    v = judge(_floats(real["image"]), real["label"], _floats(held_out["image"]), held_out["label"], _floats(samples),
              asked)  # fmt: skip
    worst = min(v.per_class, key=lambda c: v.per_class[c])
    line = (
        f"accuracy: {v.agreement:.1%} of {len(samples):,} samples are in the class asked for (worst: class {worst}, "
        f"{v.per_class[worst]:.1%}); the judge, trained on {v.train_images:,} real images, is right on "
        f"{v.real_accuracy:.1%} of {len(held_out['label']):,} held-out real ones"
    )
    return line, {"agreement": v.agreement, "judge_accuracy": v.real_accuracy, "per_class": v.per_class}


def _frechet(sources, samples) -> tuple[str, dict]:
    from jax_diffusion.evals import frechet

    train, held_out = sources["train"], sources["eval"]
    order = np.random.default_rng(0).permutation(len(train) + len(held_out))
    # As many real images as samples where there are enough: the distance falls with the numbers compared.
    half = min(len(order) // 2, len(samples))

    def real(rows):
        """Moments of these of all real images, read by and by: the sets need not fit the memory."""
        seen, own = rows[rows < len(train)], rows[rows >= len(train)] - len(train)
        return frechet.moments_of_batches(
            _floats(source.batch(part[i : i + frechet.ROWS])["image"])
            for source, part in ((train, seen), (held_out, own))
            for i in range(0, len(part), frechet.ROWS)
        )

    drawn = frechet.moments_of_batches(
        _floats(samples[i : min(half, i + frechet.ROWS)]) for i in range(0, half, frechet.ROWS)
    )
    one, other = real(order[:half]), real(order[half : 2 * half])
    to_real, between = frechet.from_moments(*drawn, *one), frechet.from_moments(*one, *other)
    line = (
        f"frechet (pixel space, {half:,} against {half:,}): samples to real images {to_real:.3f}; "
        f"one half of the real images to the other {between:.3f}"
    )
    return line, {"samples_to_real": to_real, "real_to_real": between, "images": half}


def _psnr(model, originals, samples) -> tuple[str, dict]:
    from jax_diffusion import data
    from jax_diffusion.evals import pairs

    def bytes_of(floats):
        return np.asarray(data.to_uint8(floats))

    def observe(pictures):
        return bytes_of(model.condition.observe(data.to_float(pictures)))

    shown = bytes_of(model.condition_images(originals))
    samples, originals = (bytes_of(data.to_float(v)) for v in (samples, originals))
    found = pairs.compare(samples, originals, shown, observe)
    beside = "" if found["condition"] is None else f" (of what the network is shown: {found['condition']:.2f} dB)"
    line = (
        f"psnr: {found['psnr']:.2f} dB of {len(samples):,} samples to the held-out pictures they are of{beside}; "
        f"{found['consistency']:.2f} dB between what is known of the two"
    )
    return line, found


def _likelihood(metric, model, sources, options) -> tuple[str, dict]:
    from jax_diffusion.evals import likelihood

    num, draws = options.likelihood_images, options.likelihood_draws
    out = {}
    for split, source in sources.items():
        images = min(num, len(source))
        # Several calls, so that there is something to say about progress.
        batch_size = min(options.batch_size, max(16, -(-images // 8)))
        settings = {"seed": options.seed, "draws": draws, "batch_size": batch_size}
        settings["progress"] = sample.progress_line(f"{metric} of {split} images", images * draws)
        if metric == "vlb":
            settings["steps"] = options.vlb_steps
        out[split] = getattr(likelihood, metric)(model, source, num, **settings)
    train, held_out = out["train"], out["eval"]
    unit = f"{train.unit}/dim"
    line = (
        f"{metric}: {train.mean:.4f} +- {train.stderr:.4f} {unit} of {train.images:,} training images, "
        f"{held_out.mean:.4f} +- {held_out.stderr:.4f} of {held_out.images:,} held-out ones "
        f"({train.evaluations:.0f} evaluations an image)"
    )
    if failed := train.failed + held_out.failed:
        line += f"; {failed} images left out: the ODE solver gave up on them"
    includes = likelihood.includes(metric, model, train)
    record = {split: v._asdict() for split, v in out.items()} | {"includes": includes}
    return f"{line}\n  {includes}", record


def _check(options: argparse.Namespace) -> list[str]:
    """The metrics asked for, [] where none is named; UserError where a number cannot be."""
    if options.num < 2 or options.batch_size < 1:
        raise UserError(f"--num={options.num} --batch_size={options.batch_size}: use at least 2 and 1")
    images, draws = options.likelihood_images, options.likelihood_draws
    if images < 2 or draws < 1:
        raise UserError(f"--likelihood_images={images} --likelihood_draws={draws}: use at least 2 and 1")
    if options.vlb_steps is not None and options.vlb_steps < 2:
        raise UserError(f"--vlb_steps={options.vlb_steps}: use at least 2")
    return [choose("--metrics", m, METRICS) for m in options.metrics.split(",")] if options.metrics else []


def run(options: argparse.Namespace) -> None:
    metrics = _check(options)
    cache = speed.cache(options)
    with distributed.joined():
        _evaluate(options, metrics, cache)


def _evaluate(options: argparse.Namespace, metrics: list[str], cache) -> None:
    """All processes measure; the first says and writes it."""
    import jax

    from jax_diffusion import data
    from jax_diffusion import model as models

    model = models.load(options.workdir, step=options.checkpoint, ema=options.ema, ema_std=options.ema_std)
    model = speed.cast(options, model)
    possible = {"accuracy": bool(model.class_names), "frechet": True, "psnr": model.condition is not None}
    metrics = metrics or [name for name, can in possible.items() if can]
    if "accuracy" in metrics and not model.class_names:
        raise UserError("--metrics=accuracy needs a class-conditional model; this one has no labels")
    if "psnr" in metrics and model.condition is None:
        raise UserError("--metrics=psnr needs a model conditioned on an image; this one is not")
    splits = "train", "eval"
    sources = dict(zip(splits, data.load_splits(model.config.data, *splits), strict=True))
    results = {"step": model.step, "time": round(time.time(), 3), "seed": options.seed}
    results["ema"] = options.ema_std if options.ema_std is not None else options.ema
    if of_samples := [m for m in metrics if m not in LIKELIHOODS]:
        results |= _of_samples(of_samples, model, sources, options, cache)
    for metric in metrics:
        if metric in LIKELIHOODS:
            line, results[metric] = _likelihood(metric, model, sources, options)
            print(line, flush=True)
    if jax.process_index() == 0:
        workdir = pathlib.Path(options.workdir)
        (workdir / "evaluation.json").write_text(json.dumps(results, indent=2) + "\n")
        with (workdir / "evaluations.jsonl").open("a") as f:
            f.write(json.dumps(results) + "\n")


def _of_samples(metrics, model, sources, options, cache) -> dict:
    """Draws samples and prints a line a metric."""
    import jax

    from jax_diffusion import data

    labels, images = sample.parse_labels(None, model.class_names), None
    held_out = sources["eval"]
    if model.condition is not None:
        rows = _rows(len(held_out), options.num)
        given = held_out.batch(rows[np.arange(options.num) % len(rows)])
        images, labels = given["image"], given["label"] if model.class_names else None
    table = sample.make_table(model, options)
    guidance = guiding.sampling(options, model, labels)
    samples = model.sample(
        jax.random.key(options.seed),
        table,
        options.num,
        labels=labels,
        images=images,
        **guidance,
        cache=cache,
        batch_size=options.batch_size,
        progress=sample.progress_line("sampling", options.num),
    )
    # Judged as they would be saved: rounded to 8 bits where the data is.
    if held_out.batch(np.zeros(1, int))["image"].dtype == np.uint8:
        samples = np.asarray(data.to_uint8(samples))
    evaluations = len(table) if isinstance(table, Sized) else None  # adaptive steps are each sample's own
    results = {"solver": table.name, "evaluations": evaluations, "guidance": guiding.record(guidance["guidance"])}
    results["num"] = options.num
    if cache is not None:
        results["cache"] = dataclasses.asdict(cache)
    for metric in metrics:
        if metric == "accuracy":
            line, results[metric] = _accuracy(sources, samples, np.resize(labels, options.num))  # type: ignore[arg-type]  # a class model has labels
        elif metric == "psnr":
            line, results[metric] = _psnr(model, images, samples)
        else:
            line, results[metric] = _frechet(sources, samples)
        print(line, flush=True)
    return results
