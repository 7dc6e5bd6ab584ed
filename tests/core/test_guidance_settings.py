"""Guidance beyond the scale, against closed forms: Gaussians, mixtures, and diffusers' own rescaling."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jax_diffusion import guidance, schedules
from jax_diffusion.guidance import Settings
from jax_diffusion.parameterization import Parameterization
from jax_diffusion.solvers import make, sample

from .toys import alpha_sigma, gaussian_denoiser

B = 4
X = jax.random.normal(jax.random.key(0), (B, 5))
MU = jnp.array([[-1.0], [0.7]])  # two classes, N(MU[y], S2[y])
S2 = jnp.array([[0.3], [0.8]])
LABELS = jnp.array([0, 1, 1, 0])
TIMES = {"linear": [20.0, 500.0, 930.0], "vp": [0.05, 0.5, 0.9], "edm": [0.1, 1.0, 20.0], "flow": [0.05, 0.5, 0.9]}
POINTS = [(name, t) for name in TIMES for t in TIMES[name]]


def parameterization(name, prediction="x0"):
    return Parameterization(prediction, schedules.make(name))


def of_class(name):
    """(x, t, y) -> E[x_0 | x_t, y]; y = 2 is the wide class N(0, 1) that stands for no condition."""
    mu, s2 = jnp.concatenate([MU, jnp.zeros((1, 1))]), jnp.concatenate([S2, jnp.ones((1, 1))])

    def denoise(x, t, y):
        return gaussian_denoiser(name, mu[y], s2[y])(x, t)

    return denoise


def x0(denoise, x, t):
    return guidance.unpack(denoise(x, jnp.float32(t))).x0


def score(x0_hat, x, alpha, sigma):
    return (alpha * x0_hat - x) / sigma**2


NULL = jnp.full((B,), 2)


@pytest.mark.parametrize(("name", "t"), POINTS)
def test_classifier_free_is_the_combination_of_scores(name, t):
    """(1 - w) grad log p(x_t) + w grad log p(x_t | y), both of Gaussians N(alpha mu, alpha^2 s2 + sigma^2)."""
    alpha, sigma = alpha_sigma(name)(jnp.float32(t))
    w = 3.0
    guided = x0(guidance.classifier_free(of_class(name), LABELS, NULL, w), X, t)

    def gaussian_score(mu, s2):
        return -(X - alpha * mu) / (alpha**2 * s2 + sigma**2)

    want = (1 - w) * gaussian_score(0.0, 1.0) + w * gaussian_score(MU[LABELS], S2[LABELS])
    want = (X + sigma**2 * want) / alpha
    np.testing.assert_allclose(guided, want, rtol=2e-4, atol=2e-4)  # float32, divided by alpha


@pytest.mark.parametrize("prediction", ["epsilon", "v", "x0", "edm"])
@pytest.mark.parametrize("phi", [0.0, 0.7, 1.0])
def test_rescale_is_diffusers(prediction, phi):
    torch = pytest.importorskip("torch")
    peer = pytest.importorskip("diffusers.guiders.guider_utils")
    p, t = parameterization("vp", prediction), jnp.float32(0.6)
    x, said_cond, said_null = jax.random.normal(jax.random.key(1), (3, B, 6, 6, 3))

    def denoise(x, t, y):
        return p.x0(jnp.where(y[:, None, None, None] == 2, said_null[: len(y)], said_cond[: len(y)]), x, t)

    def both(x, t, y):
        said = jnp.stack([said_cond, said_null], 1).reshape(-1, 6, 6, 3)  # in turn, as classifier_free lays them
        return p.x0(said, x, t) if len(y) == 2 * B else denoise(x, t, y)

    settings = Settings(5.0, rescale=phi)
    got = x0(guidance.classifier_free(both, LABELS, NULL, settings, p), x, t)
    mixed = said_null + 5.0 * (said_cond - said_null)
    tensors = (torch.tensor(np.asarray(a)) for a in (mixed, said_cond))
    want = peer.rescale_noise_cfg(*tensors, guidance_rescale=phi).numpy()
    np.testing.assert_allclose(got, p.x0(jnp.asarray(want), x, t), rtol=1e-4, atol=1e-4)
    if phi == 0.0:  # bitwise nothing
        plain = x0(guidance.classifier_free(both, LABELS, NULL, 5.0), x, t)
        np.testing.assert_array_equal(got, plain)


def test_rescale_without_a_parameterization_rescales_x0_hat():
    x = jax.random.normal(jax.random.key(1), (B, 6, 6))
    net = lambda x, t, y: jnp.tanh(x + y[:, None, None])  # noqa: E731
    got = x0(guidance.classifier_free(net, LABELS, NULL, Settings(5.0, rescale=1.0)), x, 0.3)
    want = np.std(np.tanh(x + LABELS[:, None, None]), axis=(1, 2))
    np.testing.assert_allclose(np.std(got, axis=(1, 2)), want, rtol=1e-5)


@pytest.mark.parametrize("name", ["linear", "edm", "flow"])
@pytest.mark.parametrize("batched", [False, True])
def test_outside_the_interval_is_unguided_bitwise(name, batched):
    p = parameterization(name)
    inside = 0
    for t in TIMES[name]:
        alpha, sigma = schedules.make(name).alpha_sigma(np.float64(t))
        t = jnp.full((B,), t, jnp.float32) if batched else jnp.float32(t)
        net = of_class(name)
        if batched:
            net = lambda x, t, y: of_class(name)(x, t[:, None], y)  # noqa: E731
        limited = guidance.classifier_free(net, LABELS, NULL, Settings(3.0, (0.3, 5.0)), p)
        always = guidance.classifier_free(net, LABELS, NULL, 3.0)
        got = guidance.unpack(limited(X, t)).x0
        if 0.3 <= sigma / alpha <= 5.0:
            inside += 1
            np.testing.assert_allclose(got, guidance.unpack(always(X, t)).x0, atol=1e-6)
        else:
            np.testing.assert_array_equal(got, net(X, t, LABELS))
    assert 0 < inside < len(TIMES[name])


def test_an_interval_without_bounds_is_always():
    p = parameterization("flow")
    net = of_class("flow")
    for t in (0.0, 0.5, 1.0):  # sigma = 0 and alpha = 0 at the ends
        got = guidance.classifier_free(lambda x, t, y: net(x, 0.5, y), LABELS, NULL, Settings(3.0, (0.0, np.inf)), p)
        want = guidance.classifier_free(lambda x, t, y: net(x, 0.5, y), LABELS, NULL, 3.0)
        np.testing.assert_allclose(x0(got, X, t), x0(want, X, t), atol=1e-6)


def test_an_interval_needs_the_schedule():
    with pytest.raises(ValueError, match="parameterization"):
        guidance.classifier_free(of_class("vp"), LABELS, NULL, Settings(3.0, (0.1, 1.0)))


def test_outside_the_interval_the_second_half_is_not_computed():
    """Counted as it runs: 2B forwards inside, B outside."""
    sizes = []

    def net(x, t, y):
        jax.debug.callback(lambda n: sizes.append(int(n)), len(x))
        return jnp.tanh(x)

    run = jax.jit(guidance.classifier_free(net, LABELS, NULL, Settings(3.0, (0.3, 5.0)), parameterization("edm")))
    for t in TIMES["edm"]:
        jax.block_until_ready(run(X, jnp.float32(t)))
    jax.effects_barrier()
    assert sorted(sizes) == [B, B, 2 * B]


@pytest.mark.parametrize("scale", [0.0, 1.0, 4.0])
def test_projected_guidance_is_classifier_free_at_eta_one(scale):
    net = of_class("vp")
    got = x0(guidance.classifier_free(net, LABELS, NULL, Settings(scale, apg=(1.0, np.inf))), X, 0.5)
    want = x0(guidance.classifier_free(net, LABELS, NULL, scale), X, 0.5)
    np.testing.assert_allclose(got, want, atol=1e-5)  # float32


@pytest.mark.parametrize("radius", [np.inf, 0.2])
def test_projected_guidance_is_orthogonal_and_short(radius):
    net = of_class("vp")
    good, weak = net(X, 0.5, LABELS), net(X, 0.5, NULL)

    def update(eta):
        return x0(guidance.classifier_free(net, LABELS, NULL, Settings(2.0, apg=(eta, radius))), X, 0.5) - good

    orthogonal, whole = update(0.0), update(1.0)
    norms = jnp.linalg.norm(good, axis=1)
    np.testing.assert_allclose(jnp.sum(orthogonal * good, 1) / norms, 0, atol=1e-5)
    length = np.minimum(np.linalg.norm(good - weak, axis=1), radius)
    np.testing.assert_allclose(jnp.linalg.norm(whole, axis=1), length, rtol=1e-4)
    # What eta weighs is parallel to the good prediction, and the two parts are the whole.
    along = whole - orthogonal
    cosine = jnp.abs(jnp.sum(along * good, 1)) / norms / jnp.linalg.norm(along, axis=1)
    np.testing.assert_allclose(cosine, 1, atol=1e-4)
    np.testing.assert_allclose(update(0.3), orthogonal + 0.3 * along, atol=1e-5)


@pytest.mark.parametrize(("eta", "radius"), [(0.0, 1.5), (0.4, 0.5), (1.0, 30.0)])
def test_projected_guidance_is_diffusers(eta, radius):
    torch = pytest.importorskip("torch")
    peer = pytest.importorskip("diffusers.guiders.adaptive_projected_guidance")
    good, weak = jax.random.normal(jax.random.key(2), (2, B, 3, 6, 6))
    tensors = (torch.tensor(np.asarray(a)) for a in (good, weak))
    want = peer.normalized_guidance(*tensors, 6.5, None, eta, radius, use_original_formulation=True).numpy()
    settings = Settings(7.5, apg=(eta, radius))
    got = x0(guidance.autoguide(lambda x, t: good, lambda x, t: weak, settings), good, 0.5)
    np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-4)


def test_autoguidance_goes_away_from_the_weak_network():
    good = gaussian_denoiser("vp", 0.5, 0.3)
    weak = gaussian_denoiser("vp", 0.5, 1.1)  # blurred: a wider distribution
    for scale in (0.0, 1.0, 3.0):
        got = x0(guidance.autoguide(good, weak, scale), X, 0.5)
        np.testing.assert_allclose(got, weak(X, 0.5) + scale * (good(X, 0.5) - weak(X, 0.5)), atol=1e-5)
    # The same mix as two halves of one network.
    pair = lambda x, t, y: jnp.where(y[:, None] == 2, weak(x, t), good(x, t))  # noqa: E731
    for settings in (Settings(3.0, rescale=0.5), Settings(3.0, apg=(0.0, 0.1)), Settings(3.0, (0.1, 9.0))):
        one = guidance.autoguide(good, weak, settings, parameterization("vp", "v"))
        other = guidance.classifier_free(pair, LABELS, NULL, settings, parameterization("vp", "v"))
        np.testing.assert_allclose(x0(one, X, 0.5), x0(other, X, 0.5), atol=1e-5)


def mixture(name):
    """The unconditional denoiser of both classes at even odds, elementwise, and log p(y | x_t, t) of it."""
    of = alpha_sigma(name)

    def log_joint(x, t):
        """log p(x_t, y) of every element and class, [B, D, 2], up to a constant."""
        a, s = of(jnp.asarray(t))
        mu, s2 = MU[:, 0][None, None], S2[:, 0][None, None]
        var = a**2 * s2 + s**2
        return -((x[..., None] - a * mu) ** 2) / (2 * var) - jnp.log(var) / 2

    def denoise(x, t):
        each = jnp.stack([gaussian_denoiser(name, MU[y, 0], S2[y, 0])(x, t) for y in (0, 1)], -1)
        return jnp.sum(jax.nn.softmax(log_joint(x, t)) * each, -1)

    def log_prob(x, t):
        """Every element has a class of its own, all asked to be LABELS."""
        of_y = jax.nn.log_softmax(log_joint(x, t))
        return jnp.sum(jnp.take_along_axis(of_y, jnp.broadcast_to(LABELS[:, None, None], (*x.shape, 1)), -1), (1, 2))

    return denoise, log_prob


@pytest.mark.parametrize(("name", "t"), POINTS)
def test_an_exact_classifier_makes_the_exact_conditional_denoiser(name, t):
    """Bayes: grad log p(x_t) + grad log p(y | x_t) = grad log p(x_t | y). In float64."""
    with jax.enable_x64(True):
        x, t = jnp.asarray(np.asarray(X), jnp.float64), jnp.float64(t)
        denoise, log_prob = mixture(name)
        alpha, sigma = alpha_sigma(name)(t)
        guided = guidance.unpack(guidance.classifier(denoise, log_prob, schedules.make(name))(x, t)).x0
        want = gaussian_denoiser(name, MU[LABELS], S2[LABELS])(x, t)
        assert float(jnp.max(jnp.abs(want - denoise(x, t)))) > 1e-3  # or this shows nothing
        # The weight sigma^2 / alpha is float32, and the gradient times it at most this large.
        scale = max(1.0, float(jnp.max(jnp.abs(want - denoise(x, t)))))
        np.testing.assert_allclose(guided, want, atol=1e-5 * scale)
        twice = guidance.classifier(denoise, log_prob, schedules.make(name), jnp.array([0.0, 2.0, 1.0, 1.0]))(x, t).x0
        np.testing.assert_allclose(twice[0], denoise(x, t)[0], atol=1e-12)
        np.testing.assert_allclose(twice[1] - denoise(x, t)[1], 2 * (guided - denoise(x, t))[1], atol=1e-9)
        assert alpha > 0 and sigma > 0


# A linear-Gaussian inverse problem: x_0 ~ N(0, S) elementwise, seen as y = H x_0 + R noise.
SPREAD = jnp.array([1.5, 1.0, 0.5, 0.4, 0.2])
H = jax.random.normal(jax.random.key(5), (2, 5))
R = 0.3
Y = jnp.array([1.0, -0.5])


def posterior():
    """Mean and covariance of x_0 given y, float64."""
    s, h = np.diag(np.asarray(SPREAD, np.float64)), np.asarray(H, np.float64)
    gain = s @ h.T @ np.linalg.inv(h @ s @ h.T + R**2 * np.eye(2))
    return gain @ np.asarray(Y, np.float64), s - gain @ h @ s


def measured(name, exact):
    """log p(y | x0_hat, t): the clean likelihood, or the one widened by Var[x_0 | x_t] seen through H."""

    def log_prob(x0_hat, t):
        cov = R**2 * jnp.eye(2)
        if exact:
            a, s = alpha_sigma(name)(jnp.asarray(t))
            cov = cov + (H * (SPREAD * s**2 / (a**2 * SPREAD + s**2))[None]) @ H.T
        residual = Y[None] - x0_hat @ H.T
        return -0.5 * jnp.sum(residual * (residual @ jnp.linalg.inv(cov)), 1)

    return log_prob


@pytest.mark.parametrize("t", [0.1, 0.4, 0.8])
def test_reconstruction_guidance_is_exact_where_all_is_gaussian(t):
    alpha, sigma = (float(a) for a in alpha_sigma("vp")(np.float64(t)))
    mean, cov = posterior()
    x = np.asarray(X, np.float64)
    # E[x_0 | x_t, y] of the Gaussian posterior N(mean, cov).
    gain = alpha * cov @ np.linalg.inv(alpha**2 * cov + sigma**2 * np.eye(5))
    want = mean + (x - alpha * mean) @ gain.T
    denoise = gaussian_denoiser("vp", 0.0, SPREAD[None])
    guided = guidance.reconstruction(denoise, measured("vp", exact=True), schedules.make("vp"))
    np.testing.assert_allclose(x0(guided, X, t), want, atol=2e-5)  # float32


def test_reconstruction_guidance_samples_near_the_posterior():
    """With the clean likelihood at half strength the samples move towards the posterior; widened, they are of it."""
    denoise = gaussian_denoiser("vp", 0.0, SPREAD[None])
    schedule = schedules.make("vp")
    table = make("ddim", schedule, 100)
    mean, cov = posterior()
    x = jax.random.normal(jax.random.key(9), (2000, 5))

    def draw(denoise):
        return np.asarray(jax.jit(lambda x: sample(jax.random.key(0), denoise, table, (5,), x=x))(x))

    plain = draw(denoise)
    dps = draw(guidance.reconstruction(denoise, measured("vp", exact=False), schedule, 0.5))
    exact = draw(guidance.reconstruction(denoise, measured("vp", exact=True), schedule))
    off = [np.abs(s.mean(0) - mean).max() for s in (plain, dps, exact)]
    assert off[1] < 0.8 * off[0] and off[2] < 0.1  # five standard errors of the widest element, and 100 steps
    np.testing.assert_allclose(np.cov(exact.T), cov, atol=0.1)


def test_all_together_in_one_program():
    p, net = parameterization("linear", "v"), of_class("linear")
    denoise_mixture, log_prob = mixture("linear")
    traces = []

    @jax.jit
    def run(settings, strength, percentile, t):
        traces.append(t)
        mixed = guidance.classifier_free(net, LABELS, NULL, settings, p)
        mixed = guidance.autoguide(mixed, denoise_mixture, settings, p)
        mixed = guidance.classifier(mixed, log_prob, p.schedule, strength)
        return guidance.dynamic_threshold(mixed, percentile)(X, t).x0

    results = [
        run(Settings(w, (lo, 9.0), phi, apg), s, q, t)
        for w, lo, phi, apg, s, q, t in [
            (2.0, 0.1, 0.0, (1.0, np.inf), 0.0, 99.0, 500.0),
            (3.0, 0.1, 0.5, (0.0, 1.0), 1.0, 90.0, 500.0),
            (3.0, 8.9, 0.5, (0.0, 1.0), 2.0, 99.0, 300.0),
        ]
    ]
    assert len(traces) == 1
    assert all(bool(jnp.all(jnp.isfinite(r))) and float(jnp.max(jnp.abs(r))) <= 1 for r in results)
    assert not np.allclose(results[0], results[1], atol=1e-3)
