"""Deep features kept between evaluations: the network's parts make the whole, and are run as often as said."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jax_diffusion import caching, editing, models, process, schedules, solvers
from jax_diffusion.caching import Cache
from jax_diffusion.errors import UserError
from jax_diffusion.guidance import classifier_free, clip, condition, model_denoiser
from jax_diffusion.models.network import from_module, run_inner
from jax_diffusion.train import flops

SHAPE, CLASSES, KEY = (8, 8, 1), 3, jax.random.key(0)
PROCESS = process.make(schedules.make("cosine"), "v")
NETWORKS = {
    "unet": {"channels": 8, "multipliers": (1, 2), "blocks": 1, "heads": 2},
    "unet_resampling_in_blocks": {"channels": 8, "multipliers": (1, 1), "blocks": 2, "resblock_updown": True,
                                  "attention_levels": (), "middle": "none", "patch": 2},
    "dit": {"size": "", "width": 16, "depth": 5, "heads": 2, "patch": 2},
}  # fmt: skip


@functools.cache
def make(name):
    """(network, random parameters)."""
    network = models.make(name.split("_")[0], SHAPE, num_classes=CLASSES, **NETWORKS[name])
    leaves, tree = jax.tree.flatten(jax.eval_shape(network.init, KEY))
    rng = np.random.default_rng(0)
    return network, tree.unflatten([np.float32(0.2 * rng.standard_normal(x.shape)) for x in leaves])


def inputs(seed, batch=2):
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((batch, *SHAPE)).astype(np.float32)
    return x, np.float32(rng.uniform(0, 1000, batch)), {"label": rng.integers(0, CLASSES + 1, batch)}


CASES = [("unet", 1), ("unet", 2), ("unet", 3), ("unet_resampling_in_blocks", 1), ("unet_resampling_in_blocks", 4),
         ("dit", 1), ("dit", 2)]  # fmt: skip


@pytest.mark.parametrize("name, depth", CASES)
def test_the_parts_are_the_whole(name, depth):
    """A refresh is the network itself. So is what follows from features of the same inputs; of others it is not."""
    network, params = make(name)

    @functools.partial(jax.jit, static_argnums=3)
    def cached(inputs, kept, refresh, static=None):
        return network.cached(params, *inputs, kept, refresh if static is None else static, depth=depth)

    whole = jax.jit(lambda inputs: network.apply(params, *inputs))(inputs(0))
    first, kept = cached(inputs(0), None, None, True)
    close = functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-5)
    close(first, whole)
    _, old = cached(inputs(1), None, None, True)
    for refresh in (True, False):
        close(cached(inputs(0), kept, refresh)[0], whole)
        out, new = cached(inputs(0), old, refresh)
        close(new, kept if refresh else old)
        apart = np.abs(out - whole).max()
        assert apart < 1e-4 if refresh else apart > 1e-3
    again, same = cached(inputs(0), old, None, False)
    close(again, out)
    close(same, old)


def test_which_depths_there_are():
    """The outermost of a U-Net's six modules on the way up may all but one be outer; of five blocks two at an end."""
    assert [make(name)[0].depths for name in NETWORKS] == [3, 5, 2]
    narrow = models.make("dit", SHAPE, size="", width=16, depth=2, heads=2, patch=2)
    assert narrow.cached is None
    for network, depth, what in ((narrow, 1, "two or more levels"), (make("dit")[0], 3, "use 1 to 2")):
        with pytest.raises(UserError, match=what):
            caching.check(network, depth)
    assert models.make("dit", SHAPE, uncertainty=8, **NETWORKS["dit"]).cached is not None


class Counted(nnx.Module):
    """A network whose inner layers say that they ran."""

    def __init__(self, ran, rngs):
        self.ran, self.w = ran, nnx.Param(jnp.float32(0.5))

    def __call__(self, x, c_noise, cond, key, depth=1, inner=run_inner):
        def f(h):
            jax.debug.callback(self.ran, jnp.float32(len(h)))
            return jnp.tanh(h)

        return self.w[...] * inner(f, x) + 0.1 * x + 0.01 * cond["label"].reshape(-1, 1, 1, 1)


LABELS = np.array([0.0, 1.0, 2.0], np.float32)


def counted_sample(table, refreshes, scale=None, known=None):
    """(samples, every x0_hat, the batch of each run of the inner layers)."""
    runs = []
    network = from_module(lambda rngs: Counted(lambda b: runs.append(int(b)), rngs), depths=1)
    params = network.init(KEY)

    def denoiser(apply):
        denoise = model_denoiser(PROCESS, apply, params)
        cond = {"label": jnp.asarray(LABELS)}
        if scale is None:
            return clip(condition(denoise, cond))
        return clip(classifier_free(denoise, cond, {"label": jnp.full(3, 9.0)}, scale))

    @jax.jit
    def run(refreshes):
        remembering = denoiser(network.apply)
        if refreshes is not None:
            remembering = caching.remembering(network, denoiser, refreshes, 1)
        options = {"indices": np.arange(3), "trajectory": True}
        if known is not None:
            return editing.inpaint(KEY, remembering, table, PROCESS.schedule, *known, **options)
        return solvers.sample(KEY, remembering, table, SHAPE, **options)

    out = run(refreshes)
    jax.block_until_ready(out)
    jax.effects_barrier()
    return *out, runs


KNOWN = np.zeros((3, *SHAPE), np.float32), np.arange(64).reshape(1, *SHAPE) < 32
TABLES = {
    "noise": (("ddim", 6, {"eta": 1.0}), {}),
    "two_rows_a_step": (("heun", 4, {"sigma_max": 80.0}), {}),
    "memory_and_guidance": (("dpmpp_2m", 6, {}), {"scale": 2.0}),
    "inpainting": (("ddpm", 6, {}), {"known": KNOWN}),
}


@pytest.mark.parametrize("name", TABLES)
def test_inner_layers_run_as_often_as_said_and_always_is_no_cache(name):
    (solver, steps, options), how = TABLES[name]
    table = solvers.make(solver, PROCESS.schedule, steps, "karras" if solver == "heun" else None, **options)
    plain, film, runs = counted_sample(table, None, **how)
    batch = 6 if "scale" in how else 3  # guidance is one batch of both halves
    assert runs == [batch] * len(table)
    always = Cache(1).refreshes(len(table))
    same, same_film, runs = counted_sample(table, always, **how)
    assert runs == [batch] * len(table)
    np.testing.assert_allclose(same, plain, atol=1e-6)
    np.testing.assert_allclose(same_film, film, atol=1e-6)
    some = Cache(3).refreshes(len(table))
    other, other_film, runs = counted_sample(table, some, **how)
    assert runs == [batch] * some.sum() and some.sum() < len(table)
    # The first evaluation is the same, and later ones are not.
    np.testing.assert_allclose(other_film[0], film[0], atol=1e-6)
    assert np.abs(other - plain).max() > 1e-3
    if name == "inpainting":
        np.testing.assert_array_equal(other[:, :4], 0.0)


def test_a_cached_row_sees_the_features_of_the_last_refresh():
    """Beside a loop in Python that keeps tanh(x) itself."""
    table, refreshes = solvers.make("ddim", PROCESS.schedule, 6), Cache(refresh=(2, 3)).refreshes(6)
    _, film, _ = counted_sample(table, refreshes)
    keys = solvers.sample_keys(KEY, np.arange(3))
    x = table.scale * solvers.noise.normal(keys, 0, SHAPE)
    for n in range(6):
        seen, _ = PROCESS.network_inputs(x, table.t[n])
        kept = jnp.tanh(seen) if refreshes[n] else kept  # noqa: F821
        said = 0.5 * kept + 0.1 * seen + 0.01 * LABELS.reshape(-1, 1, 1, 1)
        x0 = jnp.clip(PROCESS.denoised(said, x, jnp.float32(table.t[n])), -1, 1)
        np.testing.assert_allclose(film[n], x0, atol=2e-5)
        x = table.A[n] * x + table.B[n, 0] * x0


def test_what_is_left_out_is_a_branch():
    """Not a select of both: the compiled loop has a conditional, and the schedule is data of one program."""
    network, params = make("dit")
    table = solvers.make("ddim", PROCESS.schedule, 4)

    @jax.jit
    def run(params, refreshes):
        def denoiser(apply):
            return condition(model_denoiser(PROCESS, apply, params), {})

        denoise = denoiser(network.apply)
        if refreshes is not None:
            denoise = caching.remembering(network, denoiser, refreshes, 1)
        return solvers.sample(KEY, denoise, table, SHAPE)

    def conditionals(refreshes):
        return run.lower(params, refreshes).compile().as_text().count(" conditional(")

    assert conditionals(np.ones(4, bool)) == conditionals(None) + 1
    outs = [run(params, Cache(every).refreshes(4)) for every in (1, 2, 4)]
    assert run._cache_size() == 1 and np.abs(outs[0] - outs[2]).max() > 1e-3


def test_flops_fall_as_predicted():
    network, params = make("dit")
    width, tokens, hidden = 16, 16, 64
    block = 2 * tokens * (4 * width**2 + 2 * width * hidden + 2 * tokens * width) + 2 * 6 * width**2
    whole = flops.count(jax.make_jaxpr(network.apply)(params, *inputs(0, 1)))
    for depth in (1, 2):
        full, outer = caching.cost(network, params, inputs(0, 1), depth)
        assert full == whole and full - outer == (5 - 2 * depth) * block
    # 3 of 7 evaluations are whole.
    predicted = caching.predicted_speedup(network, params, inputs(0, 1), Cache(3, depth=2), 7)
    assert predicted == pytest.approx(7 * full / (3 * full + 4 * outer))
    network, params = make("unet")
    costs = [caching.cost(network, params, inputs(0, 1), depth)[1] for depth in (1, 2, 3)]
    whole = flops.count(jax.make_jaxpr(network.apply)(params, *inputs(0, 1)))
    assert 0 < costs[0] < costs[1] < costs[2] < whole


def test_refreshes():
    def rows(n=12, **options):
        return list(np.flatnonzero(Cache(**options).refreshes(n)))

    assert rows(every=1) == list(range(12)) and rows(every=5) == [0, 5, 10] and rows(every=99) == [0]
    assert rows(refresh=(3, 7)) == [0, 3, 7]
    for center in (0.0, 0.3, 1.0):
        at = np.array(rows(100, every=5, power=1.8, center=center))
        assert at[0] == 0 and 15 <= len(at) <= 20
        gaps, middles = np.diff(at), (at[1:] + at[:-1]) / 2
        near = np.abs(middles - 100 * center) < 20
        assert gaps[near].mean() < gaps[~near].mean() / 2
    # DeepCache, eq. 8-9 of section 3.3, by hand: 100 evaluations, center 36, power 2, l from -6 to 8 in four.
    assert rows(100, every=25, power=2.0, center=0.36) == [0, 29, 37, 56]


@pytest.mark.parametrize(
    "options, what",
    [({"every": 0}, "at least 1"), ({"depth": 0}, "at least 1"), ({"power": 0.5}, "at least 1"),
     ({"center": 2.0}, "in \\[0, 1\\]"), ({"refresh": (0, 2), "power": 2.0}, "leave one out")],
)  # fmt: skip
def test_mistakes(options, what):
    with pytest.raises(UserError, match=what):
        Cache(**options)


def test_other_mistakes():
    with pytest.raises(UserError, match="none of 0 to 3"):
        Cache(refresh=(4,)).refreshes(4)
    network, params = make("dit")
    adaptive = solvers.make("rk45", PROCESS.schedule, 1)
    remembering = caching.remembering(network, lambda apply: condition(model_denoiser(PROCESS, apply, params), {}),
                                      np.ones(3, bool), 1)  # fmt: skip
    with pytest.raises(UserError, match="rk45"):
        solvers.sample(KEY, remembering, adaptive, SHAPE)
    with pytest.raises(UserError, match="rk45"):
        caching.request(3, network, adaptive, {})
