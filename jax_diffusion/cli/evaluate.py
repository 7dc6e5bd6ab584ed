"""Measure a trained model's samples against the real data.

examples:
  jax-diffusion evaluate --workdir=runs/demo
  jax-diffusion evaluate --workdir=runs/mnist --metrics=accuracy --num=1000 --solver=ddim --steps=50

metrics:
  accuracy  share of conditional samples that an SVC trained on real images puts in the class asked for,
            beside the SVC's own accuracy on held-out real images
  frechet   Fréchet distance in pixel space of the samples to the real images, beside that of one half of
            the real images to the other

Prints a line a metric and writes WORKDIR/evaluation.json.
"""

import argparse
import json
import pathlib
import sys

import numpy as np

from jax_diffusion.cli import sample
from jax_diffusion.errors import UserError, choose

METRICS = ("accuracy", "frechet")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    sample.add_sampling_arguments(parser)
    add = parser.add_argument
    add("--metrics", default="accuracy,frechet", metavar="M[,M...]", help="default: %(default)s")
    add("--num", type=int, default=1000, metavar="N", help="samples drawn (default: %(default)s)")
    add("--batch_size", type=int, default=250, metavar="N", help="samples per call (default: %(default)s)")


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


def run(options: argparse.Namespace) -> None:
    import jax

    from jax_diffusion import data
    from jax_diffusion import model as models

    metrics = [choose("--metrics", m, METRICS) for m in options.metrics.split(",")]
    if options.num < 2 or options.batch_size < 1:
        raise UserError(f"--num={options.num} --batch_size={options.batch_size}: use at least 2 and 1")
    model = models.load(options.workdir, step=options.checkpoint, ema=options.ema)
    if "accuracy" in metrics and not model.class_names:
        raise UserError("--metrics=accuracy needs a class-conditional model; this one has no labels")
    sources = {split: data.load(model.config.data, split) for split in ("train", "eval")}
    real, held_out = (s.batch(np.arange(len(s))) for s in sources.values())
    for batch in (real, held_out):
        batch["image"] = np.asarray(data.to_float(batch["image"]))

    labels = sample.parse_labels(None, model.class_names)
    table = sample.make_table(model, options)
    guidance = model.config.sampling.guidance if options.guidance is None else options.guidance
    samples = model.sample(
        jax.random.key(options.seed),
        table,
        options.num,
        labels=labels,
        guidance=guidance,
        batch_size=options.batch_size,
        progress=sample.progress_line("sampling", options.num),
    )
    # Judged as they would be saved: rounded to 8 bits.
    if samples.ndim == 4:
        samples = np.asarray(data.to_float(data.to_uint8(samples)))
    results = {"step": model.step, "solver": table.name, "evaluations": len(table), "guidance": guidance}
    for metric in metrics:
        if metric == "accuracy":
            line, results[metric] = _accuracy(real, held_out, samples, np.resize(labels, options.num))
        else:
            line, results[metric] = _frechet(real, held_out, samples)
        print(line, flush=True)
    path = pathlib.Path(options.workdir) / "evaluation.json"
    path.write_text(json.dumps(results, indent=2) + "\n")
