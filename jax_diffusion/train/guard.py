"""Steps that must not count: a loss or gradient that is not finite, or (optional) one far above its running mean.

Such a step is skipped within the compiled program: parameters, moments, averages and the time sampler keep their
values, `step` counts on, so the next batch is another. The counts are part of the state, hence the same after a resume.
`rollback.py` takes over where skipping does not help.

Each leaf is chosen between new and old (jnp.where), which XLA fuses into the optimizer's update: nothing is read or
written that was not before. A lax.cond would end that fusion.
optax.apply_if_finite does the same for the optimizer alone: the EMA, the averages and the time sampler would take the
bad step, it looks at every element of every update instead of at one norm, and after its limit it lets NaN through.
"""

from typing import Any

import jax
import jax.numpy as jnp

SEEN = 100  # steps that the running means are of, and that they have to be of before a spike is one

# Of int32: skipped, not finite ever since the start; spikes, likewise; in_a_row, of both, up to this step; shift, how
# far data and keys are ahead of the step; rollbacks, made so far; seen, steps in the running means.
COUNTERS = ("skipped", "spikes", "in_a_row", "shift", "rollbacks", "seen")
MEANS = ("loss", "grad_norm")  # of float32, of the steps that were not skipped


def fresh() -> dict[str, jax.Array]:
    """The faults of a run that has had none: scalars by name."""
    return {k: jnp.zeros((), jnp.int32) for k in COUNTERS} | {k: jnp.zeros(()) for k in MEANS}


def judge(
    faults: dict[str, jax.Array],
    loss: jax.Array,  # []
    grad_norm: jax.Array,  # [], infinite or NaN wherever a gradient is
    spike: float = 0.0,  # how many times its running mean either may be; 0: as large as it likes
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """Whether the step counts, bool [], and the faults after it."""
    finite = jnp.isfinite(loss) & jnp.isfinite(grad_norm)
    seen, now = faults["seen"], {"loss": loss, "grad_norm": grad_norm}
    spiked = jnp.zeros((), bool)
    if spike:
        # A mean below zero, as some bounds have, says nothing about size.
        above = [(faults[k] > 0) & (now[k] > spike * faults[k]) for k in MEANS]
        spiked = finite & (seen >= SEEN) & (above[0] | above[1])
    good = finite & ~spiked
    rate = 1 / (jnp.minimum(seen, SEEN - 1) + 1).astype(jnp.float32)  # the plain mean at first
    means = {k: jnp.where(good, faults[k] + rate * (now[k] - faults[k]), faults[k]) for k in MEANS}
    return good, {
        **faults,
        **means,
        "skipped": faults["skipped"] + ~finite,
        "spikes": faults["spikes"] + spiked,
        "in_a_row": jnp.where(good, 0, faults["in_a_row"] + 1),
        "seen": jnp.minimum(seen + good, SEEN),
    }


def keep(good: jax.Array, new: Any, old: Any) -> Any:
    """`new` if the step counts, else `old`, bit for bit: two trees of one structure."""
    return jax.tree.map(lambda a, b: jnp.where(good, a, b), new, old)
