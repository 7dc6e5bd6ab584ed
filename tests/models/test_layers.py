"""Layers against PyTorch, and the identities they should satisfy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jax_diffusion.models import layers

torch = pytest.importorskip("torch")
F = torch.nn.functional


def images(*shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def nchw(x):
    return torch.tensor(np.asarray(x).transpose(0, 3, 1, 2))


def nhwc(x):
    return x.detach().numpy().transpose(0, 2, 3, 1)


@pytest.mark.parametrize("features", [32, 33])
def test_sinusoidal_embedding(features):
    embeddings = pytest.importorskip("diffusers.models.embeddings")
    t = np.array([0, 1, 500.5, 999], np.float32)
    theirs = embeddings.get_timestep_embedding(torch.tensor(t), features, flip_sin_to_cos=True, downscale_freq_shift=0)
    # float32 angles up to 999 rad are good to 6e-5.
    np.testing.assert_allclose(layers.sinusoidal_embedding(jnp.array(t), features), theirs, atol=2e-4)


@pytest.mark.parametrize("eps", [1e-5, 1e-6])
@pytest.mark.parametrize("channels, groups", [(64, 32), (48, 16)])
def test_group_norm(channels, groups, eps):
    # A small scale, at which eps decides the result.
    x = 2e-3 * images(2, 4, 6, channels) + 1e-3
    module = layers.group_norm(channels, groups=32, eps=eps)
    theirs = nhwc(F.group_norm(nchw(x), groups, eps=eps))
    other = nhwc(F.group_norm(nchw(x), groups, eps=1.1e-5 - eps))
    np.testing.assert_allclose(module(jnp.array(x)), theirs, atol=2e-4)
    assert np.abs(theirs - other).max() > 1e-2


@pytest.mark.parametrize("channels, groups", [(128, 32), (256, 32), (32, 8), (48, 12), (16, 4), (3, 1), (30, 1)])
def test_groups_have_four_channels(channels, groups):
    """In a group of one channel a norm would take away what is added to the channel, time embedding and all."""
    assert layers.group_norm(channels).groups == groups


def test_group_norm_is_float32_in_bfloat16():
    x = jnp.asarray(100 + images(2, 8, 8, 32), jnp.bfloat16)
    y = layers.group_norm(32)(x)
    theirs = nhwc(F.group_norm(nchw(np.asarray(x, np.float32)), 8))
    assert y.dtype == jnp.float32
    np.testing.assert_allclose(y, theirs, atol=5e-3)


@pytest.mark.parametrize("heads", [1, 4])
def test_attention(heads):
    c, x = 32, images(2, 3, 5, 32)
    module = layers.Attention(c, heads, rngs=nnx.Rngs(0))
    module.out.kernel[...] = jnp.eye(c)
    h = F.group_norm(nchw(x), 8).flatten(2).mT
    qkv = h @ torch.tensor(np.asarray(module.qkv.kernel[...]))
    q, k, v = (p.unflatten(-1, (heads, -1)).transpose(1, 2) for p in qkv.chunk(3, dim=-1))
    theirs = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2).numpy()
    np.testing.assert_allclose(module(jnp.array(x)), x + theirs.reshape(x.shape), atol=1e-5)


def test_attention_starts_as_the_identity():
    x = jnp.array(images(2, 3, 5, 32))
    np.testing.assert_array_equal(layers.Attention(32, 2, rngs=nnx.Rngs(0))(x), x)


def test_upsample():
    x = images(2, 3, 5, 4)
    np.testing.assert_array_equal(
        layers.upsample(jnp.array(x)), nhwc(F.interpolate(nchw(x), scale_factor=2, mode="nearest"))
    )


def test_downsample():
    x = images(2, 4, 6, 3)
    np.testing.assert_allclose(layers.downsample(jnp.array(x)), nhwc(F.avg_pool2d(nchw(x), 2)), atol=1e-6)


@pytest.mark.parametrize("patch", [1, 2, 4])
def test_space_to_depth(patch):
    x = images(2, 8, 12, 3)
    y = layers.space_to_depth(jnp.array(x), patch)
    assert y.shape == (2, 8 // patch, 12 // patch, 3 * patch**2)
    np.testing.assert_array_equal(layers.depth_to_space(y, patch), x)
    # PyTorch orders the channels (c, dy, dx), we (dy, dx, c).
    theirs = nhwc(F.pixel_unshuffle(nchw(x), patch)).reshape(*y.shape[:3], 3, patch, patch)
    np.testing.assert_array_equal(y, np.moveaxis(theirs, 3, -1).reshape(y.shape))


def test_fourier_embedding():
    module = layers.FourierEmbedding(16, scale=2.0, rngs=nnx.Rngs(3))
    w = np.asarray(module.frequencies[...], np.float64)
    t = np.array([0.0, 0.3, -1.2])
    angle = 2 * np.pi * t[:, None] * w[None]
    expected = np.concatenate([np.cos(angle), np.sin(angle)], -1)
    np.testing.assert_allclose(module(jnp.array(t, jnp.float32)), expected, atol=1e-5)
    many = layers.FourierEmbedding(20_000, scale=2.0, rngs=nnx.Rngs(0)).frequencies[...]
    assert abs(float(jnp.std(many)) - 2.0) < 0.06  # four standard errors of a sample of 10,000


@pytest.mark.parametrize("padding", [(0, 1), (1, 1)])
def test_strided_convolution(padding):
    x = images(2, 6, 8, 4)
    module = layers.conv(4, 5, stride=2, padding=padding, rngs=nnx.Rngs(0))
    weight = torch.tensor(np.asarray(module.kernel[...]).transpose(3, 2, 0, 1))
    theirs = F.conv2d(F.pad(nchw(x), (*padding, *padding)), weight, stride=2)
    np.testing.assert_allclose(module(jnp.array(x)), nhwc(theirs), atol=1e-5)


def test_zero_initialised_layers_are_zero():
    x = jnp.array(images(1, 4, 4, 3))
    assert not np.any(layers.conv(3, 2, zero=True, rngs=nnx.Rngs(0))(x))
    assert not np.any(layers.dense(3, 2, zero=True, rngs=nnx.Rngs(0))(x))
    assert np.any(layers.conv(3, 2, rngs=nnx.Rngs(0))(x))


def test_no_ranks_are_promoted_silently():
    """What tests/conftest.py asks of JAX holds here."""
    with pytest.raises(ValueError, match="rank"):
        jax.jit(jnp.add)(jnp.ones((2, 3)), jnp.ones(3))


@pytest.mark.parametrize("shape", [(5,), (3, 5), (2, 3, 5), (2, 3, 4, 5), (0, 3, 5)])
def test_a_matrix_is_flaxs(shape):
    """Values and gradients, to the last bit but for the sum over rows, which is another product's."""
    ours, theirs = (make(5, 7, rngs=nnx.Rngs(0)) for make in (layers.dense, nnx.Linear))
    x = jax.random.normal(jax.random.key(1), shape)

    def both(layer):
        graph, state = nnx.split(layer)
        return jax.vjp(lambda state, x: nnx.merge(graph, state)(x), state, x)

    (y, back), (expected, their_back) = both(ours), both(theirs)
    np.testing.assert_array_equal(y, expected)
    for a, b in zip(jax.tree.leaves(back(y)), jax.tree.leaves(their_back(y)), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5)


def test_a_matrix_has_its_gradient_without_transposing_in_memory():
    """On CPUs, for which XLA would do so for any sum over two axes."""

    def moved(layer):
        graph, state = nnx.split(layer)
        x, g = jnp.zeros((4, 64, 32)), jnp.zeros((4, 64, 48))
        gradient = jax.jit(lambda state, x, g: jax.vjp(lambda s: nnx.merge(graph, s)(x), state)[1](g))
        return " copy(" in gradient.lower(state, x, g).compile().as_text()

    assert not moved(layers.dense(32, 48, rngs=nnx.Rngs(0)))
    assert moved(nnx.Linear(32, 48, rngs=nnx.Rngs(0)))  # else XLA does it by itself, and dot_rows can go
