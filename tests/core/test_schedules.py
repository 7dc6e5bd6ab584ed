"""Schedules: the tables of other libraries, the identities of the papers, and precision."""

import diffusers
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import integrate

from jax_diffusion import config as configs
from jax_diffusion import schedules
from jax_diffusion.errors import UserError
from jax_diffusion.schedules import EDM, VE, Discrete, Flow, Learned, Shifted, VPLinear, betas
from jax_diffusion.solvers import grids

from .toys import NAMES, inner_times

DIFFUSERS = {
    "linear": "linear",
    "scaled_linear": "scaled_linear",
    "cosine": "squaredcos_cap_v2",
    "sigmoid": "sigmoid",
}
DISCRETE = sorted(schedules.BETAS)


def published_betas(name, T, a, b):
    """The papers' formulas, one number at a time, in Python floats."""
    if name == "linear":
        return [a + (b - a) * i / (T - 1) for i in range(T)]
    if name == "scaled_linear":
        return [(a**0.5 + (b**0.5 - a**0.5) * i / (T - 1)) ** 2 for i in range(T)]
    if name == "sigmoid":
        return [a + (b - a) / (1 + np.exp(6 - 12 * i / (T - 1))) for i in range(T)]
    if name == "geometric":
        return [a * (b / a) ** (i / (T - 1)) for i in range(T)]

    def bar(t):
        return np.cos((t / T + 0.008) / 1.008 * np.pi / 2) ** 2

    return [min(1 - bar(i + 1) / bar(i), 0.999) for i in range(T)]


@pytest.mark.parametrize(("a", "b"), [(1e-4, 0.02), (0.00085, 0.012)])
@pytest.mark.parametrize("name", sorted(DIFFUSERS))
def test_betas_are_those_of_diffusers(name, a, b):
    peer = diffusers.DDPMScheduler(beta_schedule=DIFFUSERS[name], beta_start=a, beta_end=b)
    ours = Discrete(betas(name, 1000, a, b))
    # The peer computes in float32: a few roundings a beta, and a thousand of them in the product.
    np.testing.assert_allclose(ours.betas, peer.betas.numpy(), rtol=2e-6)
    np.testing.assert_allclose(ours.alpha_bar, peer.alphas_cumprod.numpy(), rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("T", [10, 1000])
def test_sigmoid_alpha_bar_is_the_published_one(T):
    """gamma(t) of Chen 2023 ("On the importance of noise scheduling", section 2.2), one number at a time."""

    def gamma(i):
        a, b, end = (1 / (1 + np.exp(-u)) for u in (-3.0, -3.0 + 6.0 * i / T, 3.0))
        return (end - b) / (end - a)

    ours = schedules.make("sigmoid_alpha_bar", steps=T).alpha_bar
    np.testing.assert_allclose(ours[:-1], [gamma(i) for i in range(1, T)], rtol=1e-9)
    assert ours[-1] == pytest.approx(ours[-2] * 0.001, rel=1e-9)  # the last beta is capped


def test_explicit_betas_are_a_schedule_of_a_config():
    values = tuple(betas("cosine", 5))
    config = configs.default()
    config.process.schedule = configs.named("betas", values=values)
    saved = configs.from_json(configs.to_json(config)).process.schedule
    assert saved["values"] == values and isinstance(saved["values"], tuple)
    made = schedules.make(saved.name, **configs.options(saved))
    assert isinstance(made, Discrete) and np.array_equal(made.betas, betas("cosine", 5))


@pytest.mark.parametrize("values", [(), (0.1,), (0.1, "x"), (0.1, (0.2, 0.3)), (0.1, 1.5), (0.1, np.nan), 7, {"a": 1}])
def test_explicit_betas_that_are_none_are_refused(values):
    with pytest.raises(UserError, match="schedule"):
        schedules.make("betas", values=values)


@pytest.mark.parametrize("T", [10, 1000, 4000])
@pytest.mark.parametrize("name", DISCRETE)
def test_betas_are_the_published_formula_in_float64(name, T):
    ours, theirs = Discrete(betas(name, T)), np.array(published_betas(name, T, 1e-4, 0.02))
    # 1e-12 is the requirement; the cosine's 1 - ratio loses three digits of sixteen where beta is small.
    np.testing.assert_allclose(ours.betas, theirs, rtol=1e-12, atol=1e-15)
    np.testing.assert_allclose(ours.alpha_bar, np.cumprod(1 - theirs), rtol=1e-12)


@pytest.mark.parametrize(
    ("name", "a", "b", "golden"),
    [
        ("linear", 1e-4, 0.02, 4.036e-5),
        ("cosine", 1e-4, 0.02, 2.43e-9),
        ("scaled_linear", 0.00085, 0.012, 4.66e-3),
    ],
)
def test_golden_signal_left_at_the_end(name, a, b, golden):
    schedule = Discrete(betas(name, 1000, a, b))
    # Half a unit of the last digit the constants are published with.
    assert schedule.alpha_bar[-1] == pytest.approx(golden, rel=2e-3)


def test_stable_diffusion_sigma_max():
    s = Discrete(betas("scaled_linear", 1000, 0.00085, 0.012))
    alpha, sigma = s.alpha_sigma(np.float64(999))
    assert sigma / alpha == pytest.approx(14.615, abs=5e-4)  # published to three decimals


@pytest.mark.parametrize("name", NAMES)
def test_log_snr_is_the_log_of_the_ratio_and_decreases(name):
    s = schedules.make(name)
    t = inner_times(s, 40)
    alpha, sigma = s.alpha_sigma(t)
    # float64 rounding of two squares; `learned` is a float32 network, but both sides share its output.
    np.testing.assert_allclose(np.log(alpha**2 / sigma**2), s.log_snr(t), atol=1e-8)
    assert np.all(np.diff(s.log_snr(t)) < 0)
    assert alpha.dtype == sigma.dtype == s.log_snr(t).dtype == np.float64


@pytest.mark.parametrize("name", NAMES)
def test_scaling_identity(name):
    s = schedules.make(name)
    alpha, sigma = s.alpha_sigma(inner_times(s, 40))
    identity = {
        "vp": alpha**2 + sigma**2,
        "subvp": alpha**2 + sigma,
        "ve": alpha,
        "flow": alpha + sigma,
    }[s.scaling]
    np.testing.assert_allclose(identity, 1, rtol=1e-12)  # float64 rounding


@pytest.mark.parametrize("xp", [np, jnp])
@pytest.mark.parametrize("name", NAMES)
def test_inverse_undoes_log_snr(name, xp):
    s = schedules.make(name)
    t = inner_times(s, 40)
    back = s.inverse(s.log_snr(xp.asarray(t)))
    # float64 rounding, but `learned` bisects a float32 network; float32 loses what lambda's last bit is in t.
    tol = 1e-9 if xp is np and name != "learned" else 1e-4
    np.testing.assert_allclose(back, t, rtol=tol, atol=tol * s.t_max)


@pytest.mark.parametrize("name", NAMES)
def test_jax_float32_agrees_with_numpy_float64(name):
    s = schedules.make(name)
    t = inner_times(s, 40)
    t = t.astype(np.float32).astype(np.float64)  # the same times exactly
    on_jax = jax.jit(lambda t: (s.log_snr(t), *s.alpha_sigma(t)))(jnp.asarray(t, jnp.float32))
    for ours, exact in zip(on_jax, (s.log_snr(t), *s.alpha_sigma(t)), strict=True):
        assert ours.dtype == jnp.float32
        np.testing.assert_allclose(ours, exact, rtol=2e-4, atol=1e-6)  # tan near pi/2 (cosine) is the worst


@pytest.mark.parametrize("name", NAMES)
def test_rates_are_derivatives(name):
    s = schedules.make(name)
    if name in DISCRETE:
        t, h = np.array([3.5, 100.5, 500.5, 900.5]), 0.25  # inside a segment
    else:
        # `learned` answers in float32: a wider stencil, so that its rounding is divided by more.
        t, h = inner_times(s, 5), (1e-2 if name == "learned" else 1e-5 * s.t_max)
    d_log_snr = (s.log_snr(t + h) - s.log_snr(t - h)) / (2 * h)
    d_pair = [(p - m) / (2 * h) for p, m in zip(s.alpha_sigma(t + h), s.alpha_sigma(t - h), strict=True)]
    x = jnp.asarray(t, jnp.float32)
    tol = 2e-2 if name == "learned" else 1e-3  # stencil error; float32 of the derivative
    np.testing.assert_allclose(s.log_snr_rate(x), d_log_snr, rtol=tol)
    for rate, d in zip(s.alpha_sigma_rate(x), d_pair, strict=True):
        np.testing.assert_allclose(rate, d, rtol=tol, atol=tol * np.abs(d).max() + 1e-8)
    np.testing.assert_allclose(jax.jit(jax.vmap(jax.grad(s.log_snr)))(x), s.log_snr_rate(x), rtol=1e-5)  # same program


@pytest.mark.parametrize("name", DISCRETE)
def test_discrete_integers_are_exact_and_between_them_monotone(name):
    s = Discrete(betas(name, 1000))
    t = np.arange(1000)
    np.testing.assert_array_equal(s.log_snr(t), s.log_snr_table)
    bar = np.cumprod(1 - s.betas)
    # 1 - alpha_bar is where lambda's digits go: float64 leaves 1e-16 / 1e-5 of it.
    np.testing.assert_allclose(np.exp(s.log_snr_table), bar / (1 - bar), rtol=1e-9)
    fine = np.linspace(0, 999, 5001)
    assert np.all(np.diff(s.log_snr(fine)) < 0)
    np.testing.assert_allclose(s.log_snr(t[:-1] + 0.5), (s.log_snr_table[:-1] + s.log_snr_table[1:]) / 2)


@pytest.mark.parametrize("name", DISCRETE)
def test_float32_keeps_one_minus_alpha_bar(name):
    """Trap 4: alpha_bar stored in float32 is wrong by 2e-4 here."""
    s = Discrete(betas(name, 1000))
    sigma = s.sigma(jnp.zeros((), jnp.float32))
    assert abs(float(sigma) ** 2 / s.betas[0] - 1) < 2e-6  # sigma is good to 1e-6: 9.2 * 2^-24 in lambda
    l = s.log_snr(jnp.arange(1000, dtype=jnp.float32))
    one_minus_bar = np.asarray(jax.nn.sigmoid(-l), np.float64)
    exact = -np.expm1(np.cumsum(np.log1p(-s.betas)))
    np.testing.assert_allclose(one_minus_bar, exact, rtol=1e-6)


@pytest.mark.parametrize("t", [1e-5, 0.1, 0.5, 1.0])
def test_vp_is_the_quadrature_of_beta(t):
    s = VPLinear()
    total, _ = integrate.quad(lambda u: 0.1 + 19.9 * u, 0, t, epsabs=1e-14)
    alpha, sigma = s.alpha_sigma(np.float64(t))
    np.testing.assert_allclose([alpha, sigma**2], [np.exp(-total / 2), -np.expm1(-total)], rtol=1e-10)
    sub = VPLinear(scaling="subvp").alpha_sigma(np.float64(t))
    # 1 - exp(-B) is the variance of VP and the standard deviation of sub-VP (Song et al. 2021, eq. 29).
    np.testing.assert_allclose(sub, [np.exp(-total / 2), -np.expm1(-total)], rtol=1e-10)


def test_ve_and_edm_end_where_they_say():
    np.testing.assert_allclose(VE().sigma(np.array([0.0, 0.5, 1.0])), [0.01, (0.01 * 50) ** 0.5, 50], rtol=1e-12)
    assert (EDM().prior_scale, VE().prior_scale) == (80.0, pytest.approx(50.0))
    assert {schedules.make(n).prior_scale for n in NAMES if schedules.make(n).scaling != "ve"} == {1.0}


@pytest.mark.parametrize("n", [1, 7, 18, 40])
def test_karras_sigmas_are_those_of_diffusers(n):
    peer = diffusers.EDMEulerScheduler()
    peer.set_timesteps(n)
    ours = grids.make(EDM(), n, "karras").sigma
    np.testing.assert_allclose(ours, peer.sigmas.numpy(), rtol=2e-6)  # float32 of the peer


@pytest.mark.parametrize("shift", [1.0, 3.0])
@pytest.mark.parametrize("n", [1, 5, 28])
def test_shifted_flow_is_that_of_diffusers(n, shift):
    peer = diffusers.FlowMatchEulerDiscreteScheduler(shift=shift)
    peer.set_timesteps(sigmas=np.linspace(1, 1 / n, n))
    ours = grids.make(schedules.make("flow", shift=shift), n, "uniform")
    np.testing.assert_allclose(ours.sigma, peer.sigmas.numpy(), rtol=1e-6)  # float32 of the peer


@pytest.mark.parametrize("shift", [0.5, 3.0])
def test_shift_is_sd3_on_a_flow_and_two_logs_everywhere(shift):
    t = np.linspace(0, 1, 11)
    moved = shift * t / (1 + (shift - 1) * t)  # Esser et al. 2024, eq. 23
    alpha, sigma = Shifted(Flow(), shift).alpha_sigma(t)
    np.testing.assert_allclose(alpha, 1 - moved, atol=1e-15)
    np.testing.assert_allclose(sigma, moved, atol=1e-15)
    for name in NAMES:
        s = schedules.make(name)
        shifted = Shifted(s, shift)
        t = inner_times(s)
        np.testing.assert_allclose(shifted.log_snr(t), s.log_snr(t) - 2 * np.log(shift), rtol=1e-12)
        alpha, sigma = shifted.alpha_sigma(t)
        np.testing.assert_allclose(np.log(alpha**2 / sigma**2), shifted.log_snr(t), atol=1e-8)
        np.testing.assert_allclose(
            shifted.inverse(shifted.log_snr(t)), t, rtol=1e-4, atol=1e-6 * s.t_max
        )  # `learned` is float32


def test_learned_is_monotone_with_the_given_ends_and_trains():
    s = Learned.init(jax.random.key(1), features=8, log_snr_max=9.0, log_snr_min=-7.0)
    l = s.log_snr(jnp.linspace(0, 1, 101))
    assert jnp.all(jnp.diff(l) < 0)
    np.testing.assert_allclose([l[0], l[-1]], [9, -7], rtol=1e-6)  # float32
    grads = jax.jit(jax.grad(lambda s: jnp.sum(s.log_snr(jnp.array([0.2, 0.7])) ** 2)))(s)
    for leaf in jax.tree.leaves(grads):
        assert jnp.all(jnp.isfinite(leaf)) and jnp.any(leaf != 0)
    # Monotone whatever the weights: they pass through softplus.
    wild = jax.tree.map(lambda w: w * 3 - 1, Learned.init(jax.random.key(2), features=8))
    wild = Learned(s.ends, wild.w1, wild.w2, wild.w3, wild.b)
    assert jnp.all(jnp.diff(wild.log_snr(jnp.linspace(0, 1, 101))) < 0)


@pytest.mark.parametrize("scaling", ["vp", "subvp", "ve", "flow"])
def test_infinite_log_snr_is_exact(scaling):
    alpha, sigma = schedules.alpha_sigma_from_log_snr(np.array([np.inf, 400.0]), scaling)
    assert alpha[0] == 1 and sigma[1] < 1e-15
    if scaling not in ("ve", "subvp"):
        assert sigma[0] == 0
        assert schedules.alpha_sigma_from_log_snr(np.float64(-np.inf), scaling) == (0, 1)


# ---- zero terminal SNR (Lin et al. 2023) ----


@pytest.mark.parametrize("T", [10, 1000])
@pytest.mark.parametrize("name", DISCRETE)
def test_zero_terminal_snr_is_algorithm_1(name, T):
    """One number at a time: sqrt(alpha_bar) less its last value, scaled to keep its first."""
    root = [float(np.prod(1 - np.array(published_betas(name, T, 1e-4, 0.02))[: t + 1])) ** 0.5 for t in range(T)]
    moved = [(r - root[-1]) * root[0] / (root[0] - root[-1]) for r in root]
    s = schedules.make(name, steps=T, zero_terminal_snr=True)
    np.testing.assert_allclose(np.sqrt(s.alpha_bar), moved, rtol=1e-9, atol=1e-15)  # a product of T factors
    assert s.betas[-1] == 1 and s.alpha_bar[-1] == 0
    assert s.betas[0] == pytest.approx(betas(name, T)[0], rel=1e-9)


@pytest.mark.parametrize("name", sorted(DIFFUSERS))
def test_zero_terminal_snr_is_that_of_diffusers(name):
    peer = (
        diffusers.DDIMScheduler(beta_schedule=DIFFUSERS[name], rescale_betas_zero_snr=True)
        if name != "sigmoid"
        else (diffusers.DDPMScheduler(beta_schedule="sigmoid", rescale_betas_zero_snr=True))
    )
    ours = schedules.make(name, zero_terminal_snr=True)
    # float32 of the peer: 1 - ratio leaves 6e-8 of betas, 1e-4 of the smallest; then a thousand factors.
    np.testing.assert_allclose(ours.betas, peer.betas.numpy(), atol=5e-6)
    np.testing.assert_allclose(ours.alpha_bar, peer.alphas_cumprod.numpy(), atol=2e-6)


@pytest.mark.parametrize("shift", [1.0, 2.0])
@pytest.mark.parametrize("name", DISCRETE)
def test_zero_terminal_snr_is_finite_where_it_should_be(name, shift):
    s = schedules.make(name, zero_terminal_snr=True, shift=shift)
    assert s.log_snr(999) == -np.inf and s.inverse(-np.inf) == 999
    assert s.alpha_sigma(999) == (0, 1) and s.prior_scale == 1
    t = np.append(np.linspace(0, 999, 2500), [997.999, 998, 998.001, 998.999])  # the last segment too
    t.sort()
    assert np.all(np.diff(s.log_snr(t)) < 0)
    np.testing.assert_allclose(s.inverse(s.log_snr(t)), t, atol=1e-8)
    alpha, sigma = s.alpha_sigma(t)
    np.testing.assert_allclose(alpha**2 + sigma**2, 1, rtol=1e-12)
    np.testing.assert_allclose(2 * np.log(alpha[:-1] / sigma[:-1]), s.log_snr(t[:-1]), rtol=1e-9, atol=1e-9)
    x = jnp.asarray(t, jnp.float32)
    for ours, exact in zip(jax.jit(s.alpha_sigma)(x), s.alpha_sigma(np.asarray(x, np.float64)), strict=True):
        np.testing.assert_allclose(ours, exact, rtol=2e-4, atol=1e-6)  # float32 of lambda
    rates = jax.jit(s.alpha_sigma_rate)(jnp.array([0.0, 500.5, 998.5, 999.0]))
    h = 1e-4
    for rate, ends in zip(
        rates, zip(*(s.alpha_sigma(np.array([500.5, 998.5]) + d) for d in (-h, h)), strict=True), strict=True
    ):
        assert np.all(np.isfinite(rate))
        np.testing.assert_allclose(rate[1:3], (ends[1] - ends[0]) / (2 * h), rtol=1e-3, atol=1e-9)  # float32


@pytest.mark.parametrize(
    ("call", "says"),
    [
        (lambda: Discrete(np.array([0.1, 1.0, 0.1])), "only the last"),
        (lambda: schedules.make("linaer"), "'linear'"),
        (lambda: schedules.make("vp", beta=3), "vp"),
        (lambda: Discrete(np.array([0.1, 1.5])), "betas"),
        (lambda: schedules.alpha_sigma_from_log_snr(0.0, "vq"), "vp"),
    ],
)
def test_mistakes_are_one_line(call, says):
    with pytest.raises(UserError) as e:
        call()
    assert says in str(e.value) and "\n" not in str(e.value)
