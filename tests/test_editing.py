"""Editing, on Gaussian data whose conditional laws are known in closed form, and on a trained network."""

import functools
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jax_diffusion import editing, schedules, solvers
from jax_diffusion import model as models
from jax_diffusion.errors import UserError
from jax_diffusion.solvers import grids, noise, sample

COSINE, FLOW = schedules.make("cosine"), schedules.make("flow")
KEY = jax.random.key(5)
RHO = 0.9
COVARIANCE = np.array([[1.0, RHO], [RHO, 1.0]]) * 0.25


def gaussian(schedule, covariance=COVARIANCE):
    """E[x_0 | x_t] for data N(0, covariance), x_t [B, D]."""

    def denoise(x, t):
        alpha, sigma = schedule.alpha_sigma(t)
        gain = alpha * covariance @ jnp.linalg.inv(alpha**2 * covariance + sigma**2 * jnp.eye(len(covariance)))
        return jnp.einsum("ij,bj->bi", gain, x, precision="highest")

    return denoise


def analytic_model(schedule, covariance=COVARIANCE):
    """What editing needs of a Model, with the exact denoiser in place of a network."""
    denoise = gaussian(schedule, covariance)

    @jax.jit
    def run(key, table, start):
        return sample(key, denoise, table, start.shape[1:], x=start)

    def draw(key, table, num, start, clip=None, labels=None):
        return np.asarray(run(key, table, jnp.asarray(start, jnp.float32)))

    return SimpleNamespace(process=SimpleNamespace(schedule=schedule), shape=(len(covariance),), sample=draw)


# Inpainting


def fill(table, known, schedule=COSINE, mask=(True, False), n=20_000):
    known = jnp.broadcast_to(jnp.asarray(known, jnp.float32), (n, 2))
    mask = jnp.broadcast_to(jnp.asarray(mask), (n, 2))
    inpaint = functools.partial(editing.inpaint, denoise=gaussian(schedule), schedule=schedule)
    return np.asarray(jax.jit(inpaint)(KEY, table=table, known=known, mask=mask))


@pytest.mark.parametrize("name", ["ddpm", "ddim", "dpmpp_2m", "heun", "repaint"])
@pytest.mark.parametrize("schedule", [COSINE, FLOW], ids=["cosine", "flow"])
def test_known_values_come_out_bit_for_bit(name, schedule):
    known = np.random.default_rng(0).normal(size=(5, 2)).astype(np.float32)
    mask = np.array([[1, 0], [0, 1], [1, 1], [0, 0], [1, 0]], bool)
    table = solvers.make(name, schedule, 12)
    out = editing.inpaint(KEY, gaussian(schedule), table, schedule, jnp.asarray(known), jnp.asarray(mask))
    assert np.array_equal(np.asarray(out)[mask], known[mask])
    assert not np.any(np.asarray(out)[~mask] == known[~mask])


def test_a_known_value_has_the_forward_process_law_at_every_time():
    """q(x_t | x_0) = N(alpha x_0, sigma^2) wherever an ancestral table is cut off, though the other is generated."""
    n, x0 = 20_000, 0.7
    grid = grids.make(COSINE, 8)
    table = solvers.make("ddpm", COSINE, 8, grid)
    known, mask = jnp.full((n, 2), x0), jnp.broadcast_to(jnp.array([True, False]), (n, 2))
    eps = noise.normal(noise.sample_keys(KEY, jnp.arange(n)), 0, (2,))
    start = grid.alpha[0] * x0 + grid.sigma[0] * eps
    for rows in (2, 5, 7):
        part = jax.tree.map(lambda c, rows=rows: c[:rows] if np.ndim(c) else c, table)
        x = sample(KEY, editing.replace_known(gaussian(COSINE), known, mask), part, (2,), x=start)[:, 0]
        assert abs(x.mean() - grid.alpha[rows] * x0) < 5 * grid.sigma[rows] / np.sqrt(n)
        assert abs(x.std() / grid.sigma[rows] - 1) < 5 / np.sqrt(2 * n)


def test_repaint_comes_nearer_to_the_true_conditional_than_replacement():
    """x_2 | x_1 = a is N(rho a, s^2 (1 - rho^2)). Replacement alone does not reach it, even in many steps."""
    known, true_mean, true_std = 0.8, RHO * 0.8, 0.5 * np.sqrt(1 - RHO**2)

    def errors(table):
        x = fill(table, (known, 0.0))[:, 1]
        return abs(x.mean() - true_mean), abs(x.std() - true_std)

    # As many evaluations for each.
    repaint = solvers.make("repaint", COSINE, 40, jump_length=4, resamples=10)
    alone = errors(solvers.make("ddpm", COSINE, len(repaint)))
    again = errors(repaint)
    assert alone[0] > 0.15  # the bias is there: 0.22 of a mean of 0.72
    assert again[0] < alone[0] / 2 and again[0] < 0.08
    assert again[1] < 0.05


# Starting midway


def test_strength_cuts_the_grid():
    grid = grids.make(COSINE, 20)
    for strength, rows in ((1.0, 20), (0.5, 10), (0.05, 1)):
        part = editing.from_strength(grid, strength)
        assert len(part.t) == rows
        np.testing.assert_allclose(part.t, grid.t[-rows:])
        np.testing.assert_allclose(part.sigma, grid.sigma[-rows - 1 :])
    between = editing.from_strength(grid, 0.52)
    assert grid.t[9] > between.t[0] > grid.t[10] and between.sigma[-1] == 0
    for strength in (0, 1.5, -1):
        with pytest.raises(UserError, match="strength"):
            editing.from_strength(grid, strength)


def test_img2img_goes_from_the_image_to_a_new_sample():
    model, image = analytic_model(COSINE), np.tile([[0.6, -0.4]], (4000, 1))

    def edit(strength):
        table = solvers.make("ddpm", COSINE, 250, editing.from_strength(grids.make(COSINE, 250), strength))
        return editing.img2img(model, KEY, image, table)

    np.testing.assert_allclose(edit(0.001), image, atol=0.05)
    fresh = edit(1.0)
    np.testing.assert_allclose(fresh.mean(0), 0, atol=0.04)
    np.testing.assert_allclose(np.cov(fresh.T), COVARIANCE, atol=0.03)
    distances = [np.abs(edit(s).mean(0) - image[0]).max() for s in (0.1, 0.4, 0.7)]
    assert distances == sorted(distances)


@pytest.mark.parametrize("name", ["cosine", "flow", "edm", "vp"])
def test_noise_time_is_where_the_noise_is(name):
    schedule = schedules.make(name)
    for sigma in (0.1, 0.5, 2.0):
        alpha_t, sigma_t = schedule.alpha_sigma(np.float64(editing.noise_time(schedule, sigma)))
        np.testing.assert_allclose(sigma_t / alpha_t, sigma, rtol=1e-6)


@pytest.mark.parametrize("sigma", [0.0, -1.0, 1e9])
def test_noise_beyond_the_schedule(sigma):
    with pytest.raises(UserError, match="grey levels"):
        editing.noise_time(schedules.make("linear"), sigma)


@pytest.mark.parametrize("schedule", [COSINE, FLOW], ids=["cosine", "flow"])
def test_denoising_draws_from_the_posterior(schedule):
    """p(x | y = x + sigma n) of Gaussian data: its mean and covariance; one row gives the mean itself."""
    sigma, y = 0.4, np.array([0.5, -0.2])
    gain = COVARIANCE @ np.linalg.inv(COVARIANCE + sigma**2 * np.eye(2))
    mean, covariance = gain @ y, COVARIANCE - gain @ COVARIANCE
    model, noisy = analytic_model(schedule), np.tile(y, (10_000, 1))
    t = editing.noise_time(schedule, sigma)
    once = solvers.make("ddim", schedule, 1, grids.from_times(schedule, [t]))
    np.testing.assert_allclose(editing.denoise(model, KEY, noisy[:1], once)[0], mean, atol=1e-5)
    table = solvers.make("ddpm", schedule, 200, editing.below(grids.make(schedule, 200), t))
    draws = editing.denoise(model, KEY, noisy, table)
    np.testing.assert_allclose(draws.mean(0), mean, atol=0.02)
    np.testing.assert_allclose(np.cov(draws.T), covariance, atol=0.01)


# Encoding


def round_trip(schedule, steps, solver, spacing=None):
    model = analytic_model(schedule)
    images = np.random.default_rng(0).normal(size=(32, 2)) * 0.5
    latents = editing.encode(model, images, steps, solver, spacing)
    back = editing.decode(model, latents, steps, solver, spacing)
    return np.sqrt(np.mean((back - images) ** 2)), images, latents


def test_decoding_undoes_encoding_better_with_more_steps():
    """First order for DDIM; far better with Heun's method, on a grid whose steps suit it."""
    errors = [round_trip(COSINE, n, "ddim")[0] for n in (25, 50, 100)]
    assert 1.6 < errors[0] / errors[1] < 2.4 and 1.6 < errors[1] / errors[2] < 2.4 and errors[2] < 0.05
    heun = [round_trip(FLOW, n, "heun")[0] for n in (10, 20, 40)]
    assert heun[0] / heun[1] > 3 and heun[1] / heun[2] > 3 and heun[2] < 0.01


@pytest.mark.parametrize("schedule", [COSINE, FLOW], ids=["cosine", "flow"])
def test_latents_of_the_data_are_standard_normal(schedule):
    """The flow of a Gaussian is linear: x_0 = Sigma^(1/2) z in the eigenbasis."""
    _, images, latents = round_trip(schedule, 400, "ddim")
    values, vectors = np.linalg.eigh(COVARIANCE)
    np.testing.assert_allclose(latents @ vectors, (images @ vectors) / np.sqrt(values), rtol=0.03, atol=0.03)


def test_slerp():
    a, b = np.random.default_rng(0).normal(size=(2, 3, 4, 5, 2)).astype(np.float32)
    length = [np.linalg.norm(x.reshape(3, -1), axis=1).reshape(3, 1, 1, 1) for x in (a, b)]
    b *= length[0] / length[1]
    w = np.linspace(0, 1, 7)
    path = np.asarray(editing.slerp(jnp.asarray(a), jnp.asarray(b), w))
    assert path.shape == (3, 7, 4, 5, 2)
    np.testing.assert_allclose(path[:, 0], a, atol=1e-5)
    np.testing.assert_allclose(path[:, -1], b, atol=1e-5)
    flat = path.reshape(3, 7, -1)
    norms = np.linalg.norm(flat, axis=-1)
    np.testing.assert_allclose(norms, norms[:, :1].repeat(7, 1), rtol=1e-5)
    along = np.linalg.norm(np.diff(flat, axis=1), axis=-1)  # equal steps
    np.testing.assert_allclose(along, along[:, :1].repeat(6, 1), rtol=1e-3)
    same = editing.slerp(jnp.asarray(a), jnp.asarray(2 * a), w)  # parallel: the straight line
    np.testing.assert_allclose(same[:, 3], 1.5 * a, rtol=1e-5)


# With a trained network


@pytest.fixture(scope="module")
def model(run):
    return models.load(run.workdir)


IMAGES = np.random.default_rng(2).uniform(-1, 1, (5, 8, 8, 1)).astype(np.float32)


def test_inpainting_with_a_model(model):
    """Known pixels bit for bit, with guidance, whatever the batch size; a mask for all, or one for each."""
    mask = np.zeros((8, 8), bool)
    mask[:, :3] = True
    table = solvers.make("repaint", model.process.schedule, 4, jump_length=1, resamples=2)
    options = {"known": IMAGES, "labels": [3, 4], "guidance": 2.0}
    out = model.sample(KEY, table, 5, mask=mask, **options)
    assert np.array_equal(out[:, mask], IMAGES[:, mask]) and np.all(np.isfinite(out))
    assert not np.any(out[:, ~mask] == IMAGES[:, ~mask])
    each = np.broadcast_to(mask, (5, 8, 8))
    np.testing.assert_allclose(model.sample(KEY, table, 5, mask=each, batch_size=2, **options), out, atol=1e-5)
    for bad in (
        {"mask": mask[:3], "known": IMAGES},
        {"known": IMAGES},
        {"mask": mask},
        {"mask": mask, "known": out[1:]},
    ):
        with pytest.raises(UserError, match=r"mask|known"):
            model.sample(KEY, table, 5, **bad)


def test_the_other_edits_with_a_model(model):
    schedule = model.process.schedule
    table = solvers.make("ddim", schedule, 4, editing.from_strength(grids.make(schedule, 8), 0.5), eta=1.0)
    out = editing.img2img(model, KEY, IMAGES, table, labels=[1], guidance=2.0)
    assert out.shape == IMAGES.shape
    np.testing.assert_allclose(
        editing.img2img(model, KEY, IMAGES, table, labels=[1], guidance=2.0, batch_size=2), out, atol=1e-5
    )
    frames = editing.interpolate(model, IMAGES[:2], IMAGES[2:4], 3, steps=4, labels=([0, 1], [2, 3]))
    assert frames.shape == (2, 3, 8, 8, 1) and np.all(np.isfinite(frames))
    with pytest.raises(UserError, match="pairs"):
        editing.interpolate(model, IMAGES[:2], IMAGES[2:], 3, steps=4)
    with pytest.raises(UserError, match=r"\(5, 4, 8, 1\)"):
        editing.img2img(model, KEY, IMAGES[:, ::2], table)
