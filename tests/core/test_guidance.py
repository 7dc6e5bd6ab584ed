"""Guidance: denoiser to denoiser, from one forward pass."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jax_diffusion import guidance, process, schedules

B = 3
X = jax.random.normal(jax.random.key(0), (B, 4, 2))
LABELS, NULL = jnp.array([0, 1, 2]), jnp.full((B,), 5)
EMBED = jax.random.normal(jax.random.key(1), (6, 2))


def net(x, t, y):
    """Any nonlinear conditional denoiser; t is [] or [B]."""
    t = jnp.broadcast_to(t, x.shape[:1])[:, None, None]
    return jnp.tanh(x + EMBED[y][:, None, :]) * jnp.cos(t)


def x0(denoise, x, t):
    """What a denoiser says of x_0."""
    return guidance.unpack(denoise(x, t)).x0


def test_scale_one_is_conditional_and_zero_unconditional():
    t = jnp.float32(0.3)
    one = x0(guidance.classifier_free(net, LABELS, NULL, 1.0), X, t)
    zero = x0(guidance.classifier_free(net, LABELS, NULL, 0.0), X, t)
    np.testing.assert_allclose(one, guidance.condition(net, LABELS)(X, t), atol=1e-6)  # float32: u + (c - u)
    np.testing.assert_array_equal(zero, guidance.condition(net, NULL)(X, t))


@pytest.mark.parametrize("scale", [-1.0, 2.5, 7.5])
def test_linear_in_the_scale(scale):
    t = jnp.full((B,), 0.3)
    c, u = net(X, t, LABELS), net(X, t, NULL)
    got = x0(guidance.classifier_free(net, LABELS, NULL, scale), X, t)
    np.testing.assert_allclose(got, (1 - scale) * u + scale * c, atol=1e-5)  # float32 times the scale


def test_one_scale_per_sample_and_traced():
    scales = jnp.array([0.0, 1.0, 4.0])
    t = jnp.float32(0.3)
    got = jax.jit(lambda w: x0(guidance.classifier_free(net, LABELS, NULL, w), X, t))(scales)
    for i, w in enumerate(scales):
        want = x0(guidance.classifier_free(net, LABELS, NULL, float(w)), X, t)[i]
        np.testing.assert_allclose(got[i], want, atol=1e-5)  # float32: jit fuses


@pytest.mark.parametrize("t", [jnp.float32(0.3), jnp.array([0.1, 0.2, 0.3])])
def test_one_call_of_two_b(t):
    calls = []

    def counted(x, t, cond):
        calls.append((x.shape, jax.tree.map(jnp.shape, cond), t.shape))
        return net(x, t, cond["y"])

    cond, null = ({"y": y, "text": jnp.zeros((B, 7))} for y in (LABELS, NULL))
    got = x0(guidance.classifier_free(counted, cond, null, 3.0), X, t)
    assert calls == [((2 * B, 4, 2), {"y": (2 * B,), "text": (2 * B, 7)}, (2 * B,) if t.ndim else ())]
    assert got.shape == X.shape
    # And each sample met its own time and label.
    want = net(X, t, NULL) + 3.0 * (net(X, t, LABELS) - net(X, t, NULL))
    np.testing.assert_allclose(got, want, atol=1e-5)  # float32


def test_learned_variance_is_that_of_the_condition():
    def with_v(x, t, y):
        return guidance.Denoised(net(x, t, y), jax.nn.sigmoid(x + EMBED[y][:, None, :]))

    t = jnp.float32(0.3)
    guided = guidance.classifier_free(with_v, LABELS, NULL, 2.0)(X, t)
    np.testing.assert_array_equal(guided.v, with_v(X, t, LABELS).v)
    np.testing.assert_array_equal(guided.x0, x0(guidance.classifier_free(net, LABELS, NULL, 2.0), X, t))
    clipped = guidance.clip(guidance.condition(with_v, LABELS), 0.1)(X, t)
    np.testing.assert_array_equal(clipped.v, guided.v)
    np.testing.assert_array_equal(clipped.x0, jnp.clip(net(X, t, LABELS), -0.1, 0.1))
    np.testing.assert_array_equal(clipped.raw, net(X, t, LABELS))


def test_composes_with_clipping_in_either_order():
    t = jnp.float32(0.0)
    guided = guidance.classifier_free(net, LABELS, NULL, 6.0)
    after = x0(guidance.clip(guided, 1.0), X, t)
    np.testing.assert_array_equal(after, np.clip(x0(guided, X, t), -1, 1))
    assert float(jnp.max(jnp.abs(x0(guided, X, t)))) > 1  # or this shows nothing
    before = guidance.classifier_free(lambda x, t, y: jnp.clip(net(x, t, y), -0.2, 0.2), LABELS, NULL, 6.0)
    c, u = (np.clip(net(X, t, y), -0.2, 0.2) for y in (LABELS, NULL))
    np.testing.assert_allclose(x0(before, X, t), u + 6.0 * (c - u), atol=1e-5)  # float32


@pytest.mark.parametrize("percentile", [50.0, 90.0, 99.5])
@pytest.mark.parametrize("minimum", [1.0, 0.1])
def test_dynamic_threshold_is_numpys(percentile, minimum):
    x = jax.random.normal(jax.random.key(2), (5, 8, 8, 3)) * jnp.arange(1.0, 6.0)[:, None, None, None] / 2
    got = x0(guidance.dynamic_threshold(lambda x, t: x, percentile, minimum), x, jnp.float32(0))
    s = np.maximum(np.percentile(np.abs(x).reshape(5, -1), percentile, axis=1), minimum).reshape(5, 1, 1, 1)
    np.testing.assert_allclose(got, np.clip(x, -s, s) / s, rtol=1e-5, atol=1e-6)  # float32 interpolation
    assert float(jnp.max(jnp.abs(got))) <= 1 + 1e-6


@pytest.mark.parametrize("prediction", ["epsilon", "v", "x0"])
@pytest.mark.parametrize("name", ["linear", "vp"])
def test_guiding_x0_is_guiding_the_prediction(prediction, name):
    """x0_hat is linear in the prediction, with weights that sum over the mix: guidance commutes with it."""
    p = process.make(schedules.make(name), prediction)

    def apply(params, x, c_noise, y):
        return params * net(x, c_noise / 1000, y)

    t = jnp.float32(700 if name == "linear" else 0.6)
    cond = guidance.model_denoiser(p, apply, jnp.float32(1.3))
    got = x0(guidance.classifier_free(cond, LABELS, NULL, 4.0), X, t)
    inputs, c_noise = p.network_inputs(X, t)
    c, u = (apply(1.3, inputs, c_noise, y) for y in (LABELS, NULL))
    want = p.denoised(u + 4.0 * (c - u), X, t)
    np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-4)  # float32, divided by alpha = 0.08


@pytest.mark.parametrize(("learn", "channels"), [(False, 2), (True, 4)])
def test_model_denoiser_shows_the_network_its_scaled_input(learn, channels):
    name = "linear" if learn else "edm"
    p = process.make(schedules.make(name), "epsilon" if learn else "edm", learn_variance=learn)
    seen = []

    def apply(params, x, c_noise, cond):
        seen.append((x, c_noise, cond))
        return jnp.concatenate([x] * (channels // 2), -1).astype(jnp.bfloat16)

    out = guidance.model_denoiser(p, apply, None)(X, jnp.float32(3.0), None)
    x, c_noise, _ = seen[0]
    assert c_noise.shape == (B,)
    np.testing.assert_array_equal(x, p.network_inputs(X, jnp.full((B,), 3.0))[0])
    assert out.x0.shape == X.shape and out.x0.dtype == jnp.float32
    assert out.v.shape == X.shape if learn else out.v is None
