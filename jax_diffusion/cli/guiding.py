"""The options that say how samples are guided, and what Model.sample is given for them."""

import argparse
from typing import Any

from jax_diffusion.errors import UserError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--guidance", type=scales, metavar="S[,S...]", help="scale of guidance by the labels, 1 is none; several are "
        "taken in turn (default: the recipe's)")  # fmt: skip
    add("--guidance_interval", type=numbers(2), metavar="LO,HI", help="guide only at noise levels sigma / alpha in it")
    add("--guidance_rescale", type=float, metavar="PHI", help="0 to 1: keep the unguided contrast (0.7 is usual)")
    add("--apg", type=numbers(2), metavar="ETA,R", help="adaptive projected guidance: weight of the parallel part, "
        "largest norm of the update (0,inf)")  # fmt: skip
    add("--negative", metavar="L[,L...]", help="classes to lead away from, in the null condition's place")
    add("--autoguide", metavar="DIR[:STEP]", help="lead away from a weaker model: an earlier checkpoint or a smaller "
        "run; needs no labels")  # fmt: skip
    add("--threshold", type=float, metavar="P", help="dynamic thresholding at this percentile, in place of clipping")


def scales(text: str) -> float | tuple[float, ...]:
    """ "2" -> 2.0, "1,2,4" -> (1.0, 2.0, 4.0)."""
    parts = tuple(float(word) for word in text.split(","))
    return parts[0] if len(parts) == 1 else parts


scales.__name__ = "number"  # what argparse calls it where it fails


def numbers(count: int):
    def parse(text: str) -> tuple[float, ...]:
        values = tuple(float(word) for word in text.split(","))
        if len(values) != count:
            raise ValueError
        return values

    parse.__name__ = f"{count} numbers"
    return parse


def said(guidance: Any) -> str:
    """A scale or several, as typed."""
    return f"{guidance:g}" if isinstance(guidance, int | float) else ",".join(f"{g:g}" for g in guidance)


def record(guidance: Any) -> Any:
    """For a JSON file: the scale, or all settings by name."""
    return {k: v for k, v in guidance._asdict().items() if v is not None} if hasattr(guidance, "_asdict") else guidance


def sampling(options: argparse.Namespace, model: Any, labels: Any, scale: Any = None) -> dict[str, Any]:
    """Keyword arguments of Model.sample. labels: as they will be given to it.  scale: of guidance, where it is not
    --guidance or the recipe's."""
    from jax_diffusion.cli.sample import parse_labels
    from jax_diffusion.guidance import Settings

    if scale is None:
        scale = model.config.sampling.guidance if options.guidance is None else options.guidance
    if options.guidance not in (None, 1.0) and labels is None and not options.autoguide:
        raise UserError(
            f"--guidance={said(options.guidance)} needs --labels or --autoguide: this sampling is unconditional, and "
            "there is nothing to guide by"
        )
    for option in ("guidance_interval", "guidance_rescale", "apg", "negative", "autoguide"):
        if getattr(options, option) is not None and scale == 1.0:
            raise UserError(f"--{option} does nothing at guidance 1: say how strong, for instance --guidance=2")
    given = {"guidance": scale, "threshold": options.threshold}
    extra = (options.guidance_interval, options.guidance_rescale, options.apg)
    if any(value is not None for value in extra):
        given["guidance"] = Settings(scale, *extra)
    if options.negative is not None:
        if labels is None:
            raise UserError(f"--negative={options.negative} needs labels: this sampling is unconditional")
        given["negative"] = parse_labels(options.negative, model.class_names)
    if options.autoguide is not None:
        if options.negative is not None:
            raise UserError(f"--negative={options.negative} --autoguide={options.autoguide}: give one of the two")
        given["autoguide"] = _weak_model(options.autoguide, options.ema)
    return given


def _weak_model(place: str, ema: bool):
    from jax_diffusion import model as models

    workdir, colon, said = place.rpartition(":")
    step = int(said) if colon and said.isdigit() else None
    if step is None:
        workdir = place
    try:
        return models.load(workdir, step=step, ema=ema)
    except UserError as e:
        raise UserError(f"--autoguide={place}: {e}") from None
