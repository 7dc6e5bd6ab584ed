"""The U-Net is that of diffusers: a random UNet2DModel, read by interop, gives its outputs and gradients."""

import functools

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("diffusers")

from peers import compare, unet2d  # noqa: E402

from jax_diffusion import models  # noqa: E402
from jax_diffusion.interop.diffusers import unet  # noqa: E402

torch.set_num_threads(1)
NOISE_LEVELS = {"noise_levels_no_middle_conditioned": [0.02, 1.3, 50.0]}


def beside(network, channels):
    """A network conditioned on an image, as one that takes it in further channels of x."""

    def apply(params, x, c_noise, cond):
        return network.apply(params, x[..., :channels], c_noise, cond | {"image": x[..., channels:]})

    return network._replace(apply=apply)


@functools.cache
def differences(name):
    net = unet2d.make(name)
    a = unet.architecture(dict(net.config))
    network = models.make(**a.model, shape=a.shape, num_classes=a.num_classes, learn_variance=a.learn_variance)
    return compare.differences(
        net,
        lambda net, x, t, labels: net(x, t, labels).sample,
        beside(network, a.shape[-1]) if a.cond_channels else network,
        unet.entries(a),
        shape=(*a.shape[:2], a.shape[-1] + a.cond_channels),
        t=NOISE_LEVELS.get(name, [0.0, 17.0, 999.0]),
        labels=[0, a.num_classes - 1, 1] if a.num_classes else None,
    )


@pytest.mark.parametrize("name", unet2d.CONFIGS)
def test_same_output(name):
    assert differences(name)["output"] < 2e-5


@pytest.mark.parametrize("name", unet2d.CONFIGS)
def test_same_gradients(name):
    """Of the input and of every parameter."""
    found = differences(name)
    assert len(found) > 50
    assert {k: d for k, d in found.items() if d > 1e-4} == {}


@pytest.mark.parametrize("name", unet2d.CONFIGS)
def test_no_parameter_is_left_out(name):
    """Not one is silent there: each has an entry, and a gradient that is compared."""
    net, found = unet2d.make(name), differences(name)
    a = unet.architecture(dict(net.config))
    network = models.make(**a.model, shape=a.shape, num_classes=a.num_classes, learn_variance=a.learn_variance)
    fixed = {"fourier/frequencies"}
    assert {e.ours for e in unet.entries(a)} - found.keys() <= fixed
    assert network.parameter_count() == sum(p.numel() for p in net.parameters())
