"""Denoisers, and functions from denoisers to denoisers.

A denoiser is `denoise(x_t, t) -> x0_hat`: x_t [B, ...], t [] or [B]. What it is conditioned on is already
inside. One that has more to say (a learned variance, the prediction before clipping) returns `Denoised`.

    classifier_free  cond against null (or a negative condition), of one network
    autoguide        a network against a weaker one
    classifier       a gradient of log p(y | x_t): of a classifier of noisy images
    reconstruction   a gradient of log p(y | x0_hat): of anything that judges clean images
    clip, dynamic_threshold

All of them are `Denoiser -> Denoiser`, so they compose, and all scales may be traced. They mix x0_hats; since x0_hat
is linear in the prediction, that equals mixing predictions of any type.
"""

from jax_diffusion.guidance.denoisers import (
    Conditional,
    Denoised,
    Denoiser,
    Remembering,
    clip,
    condition,
    dynamic_threshold,
    model_denoiser,
    unpack,
    wrap,
)
from jax_diffusion.guidance.gradients import classifier, reconstruction
from jax_diffusion.guidance.pairs import Settings, autoguide, classifier_free

__all__ = [
    "Conditional",
    "Denoised",
    "Denoiser",
    "Remembering",
    "Settings",
    "autoguide",
    "classifier",
    "classifier_free",
    "clip",
    "condition",
    "dynamic_threshold",
    "model_denoiser",
    "reconstruction",
    "unpack",
    "wrap",
]
