"""AdamW and its learning-rate schedules, from optax."""

from typing import Any

import jax
import jax.numpy as jnp
import optax

from jax_diffusion.errors import UserError, choose
from jax_diffusion.sharding import STACKED, path_name

LEARNING_RATES = ("constant", "cosine", "one_cycle", "inverse_sqrt")


def learning_rate(name: str, peak: float, warmup: int, steps: int, hold: int = 0) -> optax.Schedule:
    """step -> learning rate.

    constant      linear warm-up to `peak`, then `peak`
    cosine        linear warm-up, then a half cosine to 0 at `steps`
    one_cycle     optax's cosine one-cycle over `steps`, its rising part `warmup` long
    inverse_sqrt  linear warm-up, `peak` until step `hold`, then peak sqrt(hold / step) (EDM2, eq. 67); without
                  `hold` it falls from the end of the warm-up (Vaswani et al. 2017)
    """
    choose("optim.schedule", name, LEARNING_RATES)
    if warmup < 0 or (name in ("cosine", "one_cycle") and warmup >= steps):
        raise UserError(f"optim.warmup={warmup} does not fit train.steps={steps}: use 0 <= warmup < steps")
    if hold and (name != "inverse_sqrt" or hold < warmup):
        raise UserError(f"optim.hold={hold} needs optim.schedule=inverse_sqrt and at least the optim.warmup={warmup}")
    if name == "one_cycle":
        # Half a step more, since optax truncates: 30 / 110 of 110 would be 29.
        return optax.cosine_onecycle_schedule(steps, peak, pct_start=(max(warmup, 1) + 0.5) / steps)
    if name == "cosine":
        after = optax.cosine_decay_schedule(peak, max(steps - warmup, 1))
    elif name == "inverse_sqrt":
        start = hold or max(warmup, 1)
        # n counts from the end of the warm-up.
        after = lambda n: peak * jnp.sqrt(start / jnp.maximum(n + warmup, start))  # noqa: E731
    else:
        after = optax.constant_schedule(peak)
    if not warmup:
        return after
    # From step 1 of the ramp: a first step of rate 0 would learn nothing.
    ramp = lambda n: peak * (n + 1) / warmup  # noqa: E731
    return optax.join_schedules([ramp, after], [warmup])


def _decayed(params):
    """Matrices and kernels decay; biases, norms and fixed frequencies do not. Of a scan's layers, each by itself."""

    def matrix(path, p):
        return p.ndim - bool(STACKED.search(path_name(path))) >= 2

    return jax.tree_util.tree_map_with_path(matrix, params)


def make(config, steps: int) -> tuple[optax.GradientTransformation, optax.Schedule]:
    """The optimizer of a config.optim and its learning-rate schedule."""
    rate = learning_rate(config.schedule, config.learning_rate, config.warmup, steps, config.hold)
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


def last_update(config, rate: optax.Schedule, opt_state, params) -> tuple[jax.Array, Any]:
    """What `make`'s optimizer did last, from its state alone: the learning rate [] and the step, a dict like params.

    Decay is that of the parameters after it, which differ by a share of the rate.
    """
    is_adam = lambda node: isinstance(node, optax.ScaleByAdamState)  # noqa: E731
    (adam,) = (node for node in jax.tree.leaves(opt_state, is_leaf=is_adam) if is_adam(node))
    count = jnp.maximum(adam.count, 1)
    now = rate(count - 1)
    made = jnp.where(adam.count > 0, now, 0.0)
    first, second = 1 - config.b1**count, 1 - config.b2**count

    def step(m, v, p, decays):
        update = (m / first) / (jnp.sqrt(v / second) + config.eps)
        return made * (update + config.weight_decay * p if decays else update)

    return now, jax.tree.map(step, adam.mu, adam.nu, params, _decayed(params))
