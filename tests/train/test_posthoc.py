"""Power-function averages and what is made of their snapshots, against the definition, sums and brute force."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jax_diffusion import config as configs
from jax_diffusion.errors import UserError
from jax_diffusion.io import tensors
from jax_diffusion.train import ema, posthoc
from jax_diffusion.train.posthoc import Profile

STDS = (0.02, 0.05, 0.10, 0.2, 0.28)


def weights_of(std, t):
    """What each of the weights 1..t counts in the average, from its recursion."""
    rates = np.asarray(jax.vmap(lambda n: ema.power_rate(n, ema.gamma_of(std)))(jnp.arange(t)), np.float64)
    after = np.cumprod((1 - rates)[::-1])[::-1]  # beta_n ... beta_t
    return rates * np.append(after[1:], 1.0)


@pytest.mark.parametrize("std", STDS)
def test_width_and_exponent_are_inverse(std):
    gamma = ema.gamma_of(std)
    assert gamma > 0 and ema.std_of(gamma) == pytest.approx(std, rel=1e-12)


def test_known_exponents():
    """gamma = 6.94 and 16.97 are the paper's (section 3.1); gamma = 0 is the mean of all weights."""
    assert ema.gamma_of(0.10) == pytest.approx(6.94, abs=5e-3)
    assert ema.gamma_of(0.05) == pytest.approx(16.97, abs=5e-3)
    assert ema.std_of(0) == ema.WIDEST


@pytest.mark.parametrize("std", STDS)
def test_the_width_is_the_profiles_standard_deviation(std):
    t = 4000
    p, s = weights_of(std, t), np.arange(1, t + 1) / t
    assert p.sum() == pytest.approx(1, abs=1e-5)
    mean = p @ s
    assert np.sqrt(p @ (s - mean) ** 2) == pytest.approx(std, rel=2e-3)


def integrals(std, t, n):
    """The profile's integrals from each step to the next, [n]."""
    return np.diff(np.minimum(np.arange(n + 1) / t, 1) ** (ema.gamma_of(std) + 1))


@pytest.mark.parametrize("std", STDS)
def test_the_recursion_makes_the_profile(std):
    """beta telescopes: weights n count the profile's integral from n - 1 to n."""
    np.testing.assert_allclose(weights_of(std, 500), integrals(std, 500, 500), atol=2e-6)


def test_late_updates_are_exact():
    """At half a million steps beta is 1 - 3e-5: 1 minus its float32 would be off by 0.1 %."""
    t, g = 524_288, ema.gamma_of(0.05)
    assert float(ema.power_rate(jnp.int32(t - 1), g)) == pytest.approx(-np.expm1((g + 1) * np.log1p(-1 / t)), rel=1e-6)


def test_constant_weights_stay():
    w = {"a": jnp.array([0.1, -3.0, 7e-5])}
    averages = (w, w)
    for n in range(5):
        averages = ema.update_powers(averages, w, jnp.int32(n), (2.0, 7.0))
    jax.tree.map(np.testing.assert_array_equal, averages, (w, w))


def test_the_first_update_forgets_the_start():
    (a,) = ema.update_powers(({"w": jnp.float32(5)},), {"w": jnp.float32(-1)}, jnp.int32(0), (7.0,))
    assert float(a["w"]) == -1


def test_inner_products_are_integrals():
    profiles = [Profile(400, 0.05), Profile(1000, 0.05), Profile(1000, 0.2), Profile(700, 0.1)]
    s = (np.arange(200_000) + 0.5) / 200
    p = np.stack([posthoc.density(q, s) for q in profiles])
    np.testing.assert_allclose(posthoc.inner(profiles, profiles), p @ p.T / 200, rtol=1e-4)


@pytest.mark.parametrize("std", [0.03, 0.08, 0.15, 0.25])
def test_coefficients_are_the_least_squares_fit(std):
    """Of densities on a fine grid, fitted by another algorithm; and the error is what is left."""
    snapshots = [Profile(n, w) for n in range(250, 1001, 250) for w in (0.05, 0.10)]
    x, error = posthoc.coefficients(snapshots, Profile(1000, std))
    s = (np.arange(20_000) + 0.5) / 20
    basis, wanted = np.stack([posthoc.density(p, s) for p in snapshots], -1), posthoc.density(Profile(1000, std), s)
    fit = np.linalg.lstsq(basis, wanted, rcond=None)[0]
    np.testing.assert_allclose(x, fit / fit.sum(), atol=5e-3 * np.abs(x).max())
    assert x.sum() == pytest.approx(1)
    assert error == pytest.approx(np.linalg.norm(basis @ x - wanted) / np.linalg.norm(wanted), rel=0.02)


def test_a_tracked_profile_is_its_own_snapshot():
    snapshots = [Profile(n, w) for n in (100, 200, 300) for w in (0.05, 0.10)]
    x, error = posthoc.coefficients(snapshots, Profile(200, 0.10))
    np.testing.assert_allclose(x, [0, 0, 0, 1, 0, 0], atol=1e-9)
    assert error < 1e-6


EMA = configs.ConfigDict({"profiles": (0.05, 0.10), "snapshot_every": 100, "snapshot_dtype": "float32"})


@pytest.fixture(scope="module")
def walk(tmp_path_factory):
    """A random walk of 512 weights over 2000 steps, its snapshots every 100, and other averages tracked directly."""
    workdir, steps, others = tmp_path_factory.mktemp("walk"), 2000, (0.03, 0.08, 0.15)
    path = np.cumsum(np.random.default_rng(0).standard_normal((steps, 512)), 0).astype(np.float32)
    gammas = tuple(map(ema.gamma_of, (*EMA.profiles, *others)))

    @jax.jit
    def run(path):
        def body(averages, nw):
            averages = ema.update_powers(averages, {"w": nw[1]}, nw[0], gammas)
            return averages, averages

        start = tuple({"w": jnp.zeros(512)} for _ in gammas)
        return jax.lax.scan(body, start, (jnp.arange(steps), path))[1]

    history = run(path)
    for step in range(EMA.snapshot_every, steps + 1, EMA.snapshot_every):
        posthoc.save_snapshots(workdir, step, tuple({"w": a["w"][step - 1]} for a in history[:2]), EMA)
    return workdir, {std: np.asarray(a["w"]) for std, a in zip(others, history[2:], strict=True)}


@pytest.mark.parametrize("step", [2000, 1000, 1850])
def test_a_reconstruction_is_the_average_tracked_directly(walk, step):
    """The average's error is the walk integrated against the profile's, whose size is known: sum of the squared
    cumulated profile error times the steps' variance."""
    workdir, tracked = walk
    made = posthoc.reconstruct(workdir, list(tracked), step)
    for average in made:
        std = average.profile.std
        got, at = posthoc.load(workdir, std, {"w": jax.ShapeDtypeStruct((512,), jnp.float32)}, step)
        assert at == step
        truth = tracked[std][step - 1]
        left = sum(x * integrals(p.std, p.step, 2000) for p, x in average.weights.items()) - integrals(std, step, 2000)
        expected = np.sqrt(np.sum(np.cumsum(left[::-1]) ** 2))  # of a walk of unit steps
        rms = np.sqrt(np.mean((got["w"] - truth) ** 2))
        assert 0.8 * expected - 1e-4 < rms < 1.2 * expected + 1e-4
        # What it is worth: far nearer than the nearest average that was tracked.
        if step % 100 == 0:
            near = posthoc.reconstruct(workdir, [0.10 if std > 0.09 else 0.05], step)[0].path
            other = tensors.open_safetensors(near)["w"]
            assert rms < 0.15 * np.sqrt(np.mean((other - truth) ** 2))


def test_half_precision_costs_its_rounding(walk, tmp_path):
    workdir, _ = walk
    half = EMA.copy_and_resolve_references()
    half.snapshot_dtype = "float16"
    for profile, path in posthoc.snapshots(workdir).items():
        w = tensors.open_safetensors(path)["w"]
        half.profiles = (profile.std,)
        posthoc.save_snapshots(tmp_path, profile.step, ({"w": jnp.asarray(w)},), half)
    (a,), (b,) = (posthoc.reconstruct(where, [0.08]) for where in (workdir, tmp_path))
    a, x, b = (
        tensors.open_safetensors(a.path)["w"],
        np.array([*a.weights.values()]),
        tensors.open_safetensors(b.path)["w"],
    )
    bound = np.abs(x).sum() * 2**-11 * 130  # the walk stays below 130
    assert 0 < np.abs(a - b).max() < bound
    assert a.dtype == b.dtype == np.float32


def test_damage_is_noticed(walk, tmp_path):
    source = next(iter(posthoc.snapshots(walk[0]).values()))
    data = bytearray(source.read_bytes())
    data[-5] ^= 0xFF
    (tmp_path / "ema").mkdir()
    (tmp_path / "ema" / source.name).write_bytes(data)
    with pytest.raises(UserError, match="is damaged: w does not have the bytes that were saved"):
        posthoc.reconstruct(tmp_path, [0.05])
