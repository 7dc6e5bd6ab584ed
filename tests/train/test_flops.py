"""The work of a network against what its paper counts and against XLA's own count where there is no loop."""

import jax
import jax.numpy as jnp
import pytest

from jax_diffusion import models, onednn
from jax_diffusion.models import layers
from jax_diffusion.train import flops


def abstract(network, shape, batch):
    params = jax.eval_shape(network.init, jax.random.key(0))
    return params, jax.ShapeDtypeStruct((batch, *shape), jnp.float32), jax.ShapeDtypeStruct((batch,), jnp.float32)


def forward(network, shape, batch=1):
    return flops.count(jax.make_jaxpr(network.apply)(*abstract(network, shape, batch))) / batch


# Peebles & Xie 2023, table 4: multiply-adds in units of 1e9, every one of which is two operations.
@pytest.mark.parametrize("size, published", [("S/2", 6.06), ("B/4", 5.56), ("L/2", 80.71), ("XL/2", 118.64)])
def test_dit_does_the_published_work(size, published):
    network = models.make("dit", (32, 32, 4), size=size, num_classes=1000, learn_variance=True)
    assert forward(network, (32, 32, 4)) / 2e9 == pytest.approx(published, rel=0.01)


def test_training_is_three_forward_passes_and_remat_a_fourth_in_part():
    shape, small = (8, 8, 4), {"size": "", "width": 64, "depth": 4, "heads": 2, "patch": 1}

    def training(**options):
        network = models.make("dit", shape, **small, **options)
        loss = lambda params, x, t: jnp.sum(network.apply(params, x, t))  # noqa: E731
        return flops.count(jax.make_jaxpr(jax.grad(loss))(*abstract(network, shape, 8))) / 8

    once = forward(models.make("dit", shape, **small), shape, 8)
    assert training() / once == pytest.approx(3, rel=0.02)
    assert training(unroll=4) == training()
    assert 3 < training(remat="dots") / once < training(remat="full") / once < 4.05


@pytest.mark.parametrize("gradient", [False, True])
def test_agrees_with_xla_where_nothing_loops(gradient, monkeypatch):
    """A U-Net with strided convolutions: all but its elementwise operations."""
    # By parity, as CPUs run it, it is less work than what the model asks for, which is counted.
    monkeypatch.setattr(layers, "conv_of_upsampled", lambda conv, x: conv(layers.upsample(x)))
    shape = (16, 16, 3)
    network = models.make("unet", shape, channels=32, multipliers=(1, 2), blocks=1, attention_levels=(1,))
    function = network.apply
    if gradient:
        function = jax.grad(lambda params, x, t: jnp.sum(network.apply(params, x, t)))
    with onednn.off():  # whose calls XLA does not count
        traced = jax.jit(function).trace(*abstract(network, shape, 2))
    assert flops.count(traced.jaxpr) == pytest.approx(traced.lower().cost_analysis()["flops"], rel=0.12)
