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
  bpd       exact likelihood by the probability-flow ODE, bits per dimension of training and of held-out images
            (nats per dimension of the density, for points); about a hundred evaluations with derivative an image
  vlb       the variational bound, likewise; all T terms of a discrete schedule, else 64 times an image

Prints a line a metric and writes WORKDIR/evaluation.json.
"""

import argparse
import dataclasses
import json
import pathlib
import sys
from collections.abc import Sized

import numpy as np

from jax_diffusion.cli import guiding, sample, speed
from jax_diffusion.errors import UserError, choose

LIKELIHOODS = ("bpd", "vlb")
METRICS = ("accuracy", "frechet", *LIKELIHOODS)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    sample.add_sampling_arguments(parser)
    speed.add_arguments(parser)
    add = parser.add_argument
    add("--metrics", default="accuracy,frechet", metavar="M[,M...]", help="default: %(default)s")
    add("--num", type=int, default=1000, metavar="N", help="samples drawn (default: %(default)s)")
    add("--batch_size", type=int, default=250, metavar="N", help="samples per call (default: %(default)s)")
    add("--likelihood_images", type=int, default=100, metavar="N",
        help="of bpd and vlb: images of each split (default: %(default)s)")  # fmt: skip
    add("--likelihood_draws", type=int, default=1, metavar="N",
        help="of bpd and vlb: independent noise draws an image (default: %(default)s)")  # fmt: skip
    add("--vlb_steps", type=int, metavar="N", help="of vlb: a chain of so many steps (discrete), or times an image")


def _accuracy(real, held_out, samples, asked) -> tuple[str, dict]:
    from jax_diffusion.evals.judge import MAX_TRAIN, judge

    print(f"fitting the judge on up to {MAX_TRAIN:,} of {len(real['label']):,} real images", file=sys.stderr)
    v = judge(real["image"], real["label"], held_out["image"], held_out["label"], samples, asked)
    worst = min(v.per_class, key=v.per_class.get)
    line = (
        f"accuracy: {v.agreement:.1%} of {len(samples):,} samples are in the class asked for (worst: class {worst}, "
        f"{v.per_class[worst]:.1%}); the judge, trained on {v.train_images:,} real images, is right on "
        f"{v.real_accuracy:.1%} of {len(held_out['label']):,} held-out real ones"
    )
    return line, {"agreement": v.agreement, "judge_accuracy": v.real_accuracy, "per_class": v.per_class}


def _frechet(real, held_out, samples) -> tuple[str, dict]:
    from jax_diffusion.evals import frechet

    everything = np.concatenate([real["image"], held_out["image"]])
    order = np.random.default_rng(0).permutation(len(everything))
    # As many real images as samples where there are enough: the distance falls with the numbers compared.
    half = min(len(everything) // 2, len(samples))
    one, other = everything[order[:half]], everything[order[half : 2 * half]]
    to_real, between = frechet.distance(samples[:half], one), frechet.distance(one, other)
    line = (
        f"frechet (pixel space, {half:,} against {half:,}): samples to real images {to_real:.3f}; "
        f"one half of the real images to the other {between:.3f}"
    )
    return line, {"samples_to_real": to_real, "real_to_real": between, "images": half}


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
    """The metrics asked for; UserError where a number cannot be."""
    if options.num < 2 or options.batch_size < 1:
        raise UserError(f"--num={options.num} --batch_size={options.batch_size}: use at least 2 and 1")
    images, draws = options.likelihood_images, options.likelihood_draws
    if images < 2 or draws < 1:
        raise UserError(f"--likelihood_images={images} --likelihood_draws={draws}: use at least 2 and 1")
    if options.vlb_steps is not None and options.vlb_steps < 2:
        raise UserError(f"--vlb_steps={options.vlb_steps}: use at least 2")
    return [choose("--metrics", m, METRICS) for m in options.metrics.split(",")]


def run(options: argparse.Namespace) -> None:
    from jax_diffusion import data
    from jax_diffusion import model as models

    metrics = _check(options)
    cache = speed.cache(options)
    model = models.load(options.workdir, step=options.checkpoint, ema=options.ema, ema_std=options.ema_std)
    model = speed.cast(options, model)
    if "accuracy" in metrics and not model.class_names:
        raise UserError("--metrics=accuracy needs a class-conditional model; this one has no labels")
    sources = {split: data.load(model.config.data, split) for split in ("train", "eval")}
    results = {"step": model.step}
    if of_samples := [m for m in metrics if m not in LIKELIHOODS]:
        results |= _of_samples(of_samples, model, sources, options, cache)
    for metric in metrics:
        if metric in LIKELIHOODS:
            line, results[metric] = _likelihood(metric, model, sources, options)
            print(line, flush=True)
    path = pathlib.Path(options.workdir) / "evaluation.json"
    path.write_text(json.dumps(results, indent=2) + "\n")


def _of_samples(metrics, model, sources, options, cache) -> dict:
    """Draws samples and prints a line a metric."""
    import jax

    from jax_diffusion import data

    real, held_out = (s.batch(np.arange(len(s))) for s in sources.values())
    for batch in (real, held_out):
        batch["image"] = np.asarray(data.to_float(batch["image"]))

    labels = sample.parse_labels(None, model.class_names)
    table = sample.make_table(model, options)
    guidance = guiding.sampling(options, model, labels)
    samples = model.sample(
        jax.random.key(options.seed),
        table,
        options.num,
        labels=labels,
        **guidance,
        cache=cache,
        batch_size=options.batch_size,
        progress=sample.progress_line("sampling", options.num),
    )
    # Judged as they would be saved: rounded to 8 bits.
    if samples.ndim == 4:
        samples = np.asarray(data.to_float(data.to_uint8(samples)))
    evaluations = len(table) if isinstance(table, Sized) else None  # adaptive steps are each sample's own
    results = {"solver": table.name, "evaluations": evaluations, "guidance": guiding.record(guidance["guidance"])}
    if cache is not None:
        results["cache"] = dataclasses.asdict(cache)
    for metric in metrics:
        if metric == "accuracy":
            line, results[metric] = _accuracy(real, held_out, samples, np.resize(labels, options.num))
        else:
            line, results[metric] = _frechet(real, held_out, samples)
        print(line, flush=True)
    return results
