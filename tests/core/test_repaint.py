"""RePaint's table against the paper's schedule, DDIM and diffusers' scheduler."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from diffusers.schedulers import RePaintScheduler, scheduling_repaint

from jax_diffusion import schedules, solvers
from jax_diffusion.solvers import noise, sample
from jax_diffusion.solvers.repaint import levels

COSINE, FLOW = schedules.make("cosine"), schedules.make("flow")
KEY = jax.random.key(5)


def published_schedule(t_T, jump_length, jump_n_sample):
    """Lugmayr et al. 2022, appendix: get_schedule_jump, with the paper's defaults for what it also offers."""
    jumps = dict.fromkeys(range(0, t_T - jump_length, jump_length), jump_n_sample - 1)
    t, ts = t_T, []
    while t >= 1:
        t = t - 1
        ts.append(t)
        if jumps.get(t, 0) > 0:
            jumps[t] = jumps[t] - 1
            for _ in range(jump_length):
                t = t + 1
                ts.append(t)
    ts.append(-1)
    return ts


@pytest.mark.parametrize("n, jump_length, resamples", [(250, 10, 10), (20, 3, 2), (7, 1, 4), (5, 10, 3), (6, 2, 1)])
def test_repaint_visits_the_published_times(n, jump_length, resamples):
    visited = published_schedule(n, jump_length, resamples)
    assert levels(n, jump_length, resamples) == visited
    table = solvers.make("repaint", COSINE, n, "leading", jump_length=jump_length, resamples=resamples)
    evaluated = [a for a, b in itertools.pairwise(visited) if b < a]
    np.testing.assert_array_equal(table.t, np.array(evaluated) * (1000 // n))


def test_repaint_without_resampling_is_ddim():
    repaint, ddim = solvers.make("repaint", FLOW, 9, resamples=1), solvers.make("ddim", FLOW, 9, eta=1.0)
    for column in "tABC":
        np.testing.assert_allclose(getattr(repaint, column), getattr(ddim, column), atol=1e-12)


@pytest.mark.parametrize("eta", [0.0, 1.0])
def test_repaint_s_trajectory_is_that_of_diffusers(eta, monkeypatch):
    """diffusers' step and undo_step along the published times, nothing known, with the same noise.

    Along its own list diffusers jumps after evaluating at t, so from one level further down than the paper's code,
    and its undo_step takes betas of a shifted range where steps are left out: hence all T steps, and the list here.
    """
    steps, jump, resamples = 12, 2, 3
    beta = np.linspace(0.01, 0.3, steps)
    schedule = schedules.Discrete(beta)
    table = solvers.make("repaint", schedule, steps, jump_length=jump, resamples=resamples, eta=eta)

    def network(x, t, xp):
        return xp.tanh(0.7 * x) + 0.05 * t

    def denoise(x, t):
        alpha, sigma = schedule.alpha_sigma(t)
        return (x - sigma * network(x, t, jnp)) / alpha

    x = np.random.default_rng(1).normal(size=(3, 4)).astype(np.float32)
    ours = sample(KEY, denoise, table, (4,), x=jnp.asarray(x))
    keys = noise.sample_keys(KEY, jnp.arange(3))

    theirs = RePaintScheduler(steps, trained_betas=beta, eta=eta, clip_sample=False)
    theirs.set_timesteps(steps, jump, resamples)
    visited, row, queue = levels(steps, jump, resamples), 0, []
    monkeypatch.setattr(scheduling_repaint, "randn_tensor", lambda shape, **kw: torch.from_numpy(queue.pop(0)))
    state = torch.from_numpy(x)
    pairs = list(itertools.pairwise(visited))
    for i, (a, b) in enumerate(pairs):
        if b < a:
            # One noise a row of ours, cut into as many parts as diffusers adds on the way.
            ups = []
            for c, d in pairs[i + 1 :]:
                if d < c:
                    break
                ups.append(d)
            weights = [eta * float(theirs._get_variance(a)) ** 0.5 if a else 0.0]
            for up in ups:
                weights = [w * np.sqrt(1 - beta[up]) for w in weights] + [np.sqrt(beta[up])]
            total = np.sqrt(np.sum(np.square(weights)))
            row += 1
            xi = np.asarray(noise.normal(keys, row, (4,)))
            queue[:] = [np.float32(w / total if total else 0.0) * xi for w in weights]
            nothing = torch.zeros(())
            state = theirs.step(network(state, a, torch), a, state, nothing, nothing).prev_sample
        else:
            state = theirs.undo_step(state, b)
    assert row == len(table) and not queue
    np.testing.assert_allclose(np.asarray(ours), state.numpy(), atol=2e-4)
