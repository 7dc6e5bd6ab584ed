"""How a trained model is guided: from what Model.sample is asked for to arrays, and from these to a denoiser.

The arrays come in two trees, one of a row per sample, the other shared by all. Numbers in them are data for the same
compiled program; that something is absent is another program.
"""

from collections.abc import Callable
from typing import Any

import numpy as np

from jax_diffusion.errors import UserError
from jax_diffusion.guidance.denoisers import Denoiser, clip, condition, dynamic_threshold, model_denoiser
from jax_diffusion.guidance.pairs import Settings, autoguide, classifier_free
from jax_diffusion.process import Gaussian

Weak = tuple[Callable, Gaussian] | None  # apply and process of a weak network of another kind


def denoiser(
    apply: Callable, process: Gaussian, params: Any, samples: dict, shared: dict, *, clipped: bool, weak: Weak = None
) -> Denoiser:
    """The denoiser of a network, guided and limited.

    samples: {"cond": what the network is shown, "null": what of it differs in the weak half, "scale": [B]}.
    shared:  {"settings": Settings, "weak": parameters of the weak network, "threshold": percentile}.
    """
    network, cond = model_denoiser(process, apply, params), samples["cond"]
    denoise = condition(network, cond)
    if "settings" in shared:
        settings = shared["settings"]._replace(scale=samples["scale"])
        if "weak" in shared:
            weak_apply, weak_process = weak or (apply, process)
            other = condition(model_denoiser(weak_process, weak_apply, shared["weak"]), cond)
            denoise = autoguide(denoise, other, settings, process.parameterization)
        else:
            null = {**cond, **samples["null"]}
            denoise = classifier_free(network, cond, null, settings, process.parameterization)
    if "threshold" in shared:
        return dynamic_threshold(denoise, shared["threshold"])
    return clip(denoise) if clipped else denoise


def request(
    num: int, cond: dict, null_label: int, guidance: Any, negative: np.ndarray | None, weak: Any, threshold: Any
) -> tuple[dict, dict]:
    """(samples, shared) for `num` samples, NumPy arrays; see `denoiser`.

    cond:       arrays [num, ...]; its "label" is the null label where no condition was asked for.
    guidance:   a scale, `num` or fewer of them (repeated in turn), or Settings.
    negative:   labels [num] to lead away from, or None.
    weak:       parameters of the weak network, or None.
    """
    settings = guidance if isinstance(guidance, Settings) else Settings(guidance)
    scale = np.atleast_1d(np.asarray(settings.scale, np.float32))
    if scale.ndim != 1 or not 1 <= len(scale) <= num:
        raise UserError(f"guidance: {scale.shape} scales for {num} samples; give one, or at most one per sample")
    samples: dict[str, Any] = {"cond": cond}
    shared: dict[str, Any] = {}
    if threshold is not None:
        if not 0 < threshold <= 100:
            raise UserError(f"threshold={threshold:g} is a percentile: above 0 and at most 100, for instance 99.5")
        shared["threshold"] = np.float32(threshold)
    asked = "label" in cond and not np.all(cond["label"] == null_label)
    if negative is not None and (not asked or weak is not None):
        raise UserError("negative: it takes the null condition's place, so it needs labels and no autoguide")
    # Without a condition and without a weaker network there is nothing to guide by.
    if np.all(scale == 1) or (weak is None and not asked):
        return samples, shared
    samples["scale"] = np.resize(scale, num)
    shared["settings"] = _float32(settings)
    if weak is not None:
        shared["weak"] = weak
    else:
        label = np.full_like(cond["label"], null_label) if negative is None else negative
        samples["null"] = {"label": label}
    return samples, shared


def _float32(settings: Settings) -> Settings:
    """The settings but for the scale, checked, as numbers that a compiled program takes."""
    if settings.interval is not None:
        lo, hi = settings.interval
        if not 0 <= lo < hi:
            raise UserError(f"guidance interval {lo:g},{hi:g}: give 0 <= LO < HI, noise levels sigma / alpha")
    if settings.rescale is not None and not 0 <= settings.rescale <= 1:
        raise UserError(f"guidance rescale {settings.rescale:g} is outside [0, 1]: 0 is none, 0.7 the paper's")
    if settings.apg is not None and settings.apg[1] <= 0:
        raise UserError(f"apg radius {settings.apg[1]:g} must be above 0, inf for none")
    return Settings(
        None,  # type: ignore[arg-type]  # the scale, which each sample has its own of
        *(None if v is None else tuple(map(np.float32, v)) if isinstance(v, tuple | list) else np.float32(v)  # type: ignore[arg-type]
          for v in settings[1:]),
    )  # fmt: skip


def weak_network(strong: Any, other: Any) -> tuple[Any, Weak]:
    """(parameters, apply and process) of the weaker network of autoguidance; strong, other: Models.

    other: also parameters alone, of the strong model's own kind. The second result is None where the two models are
    of one kind, which makes them one compiled program.
    """
    if other is None or not hasattr(other, "params"):
        return other, None
    for what in ("shape", "class_names"):
        if getattr(strong, what) != getattr(other, what):
            raise UserError(f"autoguide: {what} {getattr(other, what)} is not this model's {getattr(strong, what)}")
    ours, theirs = strong.config.to_dict(), other.config.to_dict()
    for group, name in (("process", "schedule"), ("condition", "name")):
        if ours[group][name] != theirs[group][name]:
            raise UserError(
                f"autoguide: that model's {group}.{name} is {theirs[group][name]}, and this one's {ours[group][name]}; "
                "train both alike"
            )
    same = all(ours[group] == theirs[group] for group in ("model", "process", "condition"))
    return other.params, None if same else (other.network.apply, other.process)
