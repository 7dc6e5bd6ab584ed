"""AdamW and its learning-rate schedules, from optax."""

import jax
import jax.numpy as jnp
import optax

from jax_diffusion.errors import UserError, choose

LEARNING_RATES = ("constant", "cosine", "one_cycle", "inverse_sqrt")


def learning_rate(name: str, peak: float, warmup: int, steps: int) -> optax.Schedule:
    """step -> learning rate.

    constant      linear warm-up to `peak`, then `peak`
    cosine        linear warm-up, then a half cosine to 0 at `steps`
    one_cycle     optax's cosine one-cycle over `steps`, its rising part `warmup` long
    inverse_sqrt  linear warm-up, then peak sqrt(warmup / step) (Vaswani et al. 2017; EDM2)
    """
    choose("optim.schedule", name, LEARNING_RATES)
    if warmup < 0 or (name in ("cosine", "one_cycle") and warmup >= steps):
        raise UserError(f"optim.warmup={warmup} does not fit train.steps={steps}: use 0 <= warmup < steps")
    if name == "one_cycle":
        # Half a step more, since optax truncates: 30 / 110 of 110 would be 29.
        return optax.cosine_onecycle_schedule(steps, peak, pct_start=(max(warmup, 1) + 0.5) / steps)
    if name == "cosine":
        after = optax.cosine_decay_schedule(peak, max(steps - warmup, 1))
    elif name == "inverse_sqrt":
        start = max(warmup, 1)
        # optax evaluates every part at every step: before the warm-up ends, n is negative.
        after = lambda n: peak * jnp.sqrt(start / (jnp.maximum(n, 0) + start))  # noqa: E731
    else:
        after = optax.constant_schedule(peak)
    if not warmup:
        return after
    # From step 1 of the ramp: a first step of rate 0 would learn nothing.
    ramp = lambda n: peak * (n + 1) / warmup  # noqa: E731
    return optax.join_schedules([ramp, after], [warmup])


def _decayed(params):
    """Matrices and kernels decay; biases, norms and fixed frequencies do not."""
    return jax.tree.map(lambda p: p.ndim >= 2, params)


def make(config, steps: int) -> tuple[optax.GradientTransformation, optax.Schedule]:
    """The optimizer of a config.optim and its learning-rate schedule."""
    rate = learning_rate(config.schedule, config.learning_rate, config.warmup, steps)
    clip = optax.clip_by_global_norm(config.clip) if config.clip else optax.identity()
    adamw = optax.adamw(
        rate,
        b1=config.b1,
        b2=config.b2,
        eps=config.eps,
        weight_decay=config.weight_decay,
        mask=_decayed,
    )
    return optax.chain(clip, adamw), rate
