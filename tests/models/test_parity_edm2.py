"""EDM2's network is the original's: weights of a random one, read from its state dict, give its denoised images, its
log-variance and their gradients."""

import functools
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jax_diffusion import experiment, models
from jax_diffusion.errors import UserError
from jax_diffusion.interop import Tensors, edm2, weights
from jax_diffusion.models import magnitude
from jax_diffusion.models.edm2 import WIDTHS

torch = pytest.importorskip("torch")

from peers import edm2 as peer  # noqa: E402

# name: (H, W, C), the original's options
# oblong: one head of 24 channels below and, since 8 are fewer than 20, none above.
CASES = {
    "labels": (
        (8, 8, 3),
        {"label_dim": 5, "model_channels": 16, "channel_mult": (1, 2), "num_blocks": 1, "attn_resolutions": (4,),
         "channels_per_head": 16},
    ),
    "no_attention": (
        (8, 8, 1),
        {"label_dim": 0, "model_channels": 8, "channel_mult": (1, 2), "num_blocks": 2, "attn_resolutions": (),
         "label_balance": 0.5, "logvar_channels": 16},
    ),
    "oblong_one_head": (
        (8, 12, 4),
        {"label_dim": 3, "model_channels": 8, "channel_mult": (1, 3), "num_blocks": 1, "attn_resolutions": (8, 4),
         "channels_per_head": 20, "channel_mult_noise": 2, "channel_mult_emb": 4, "sigma_data": 0.7},
    ),
}  # fmt: skip
SIGMA = np.array([0.01, 0.5, 60.0], np.float32)


def tensors(net):
    state = {name: t.detach().numpy() for name, t in net.state_dict().items()}
    return Tensors("random.safetensors", {name: a.shape for name, a in state.items()}, state.__getitem__)


def randomized(net):
    """Everything off its initial value: gains from 0, weights from unit magnitude."""
    with torch.no_grad():
        for p in net.parameters():
            p.copy_(0.5 * torch.randn_like(p) if p.ndim == 0 else p * torch.rand(len(p), *[1] * (p.ndim - 1)).add(0.5))
    return net.eval()


@functools.cache
def both(name):
    shape, options = CASES[name]
    torch.manual_seed(0)
    net = randomized(peer.Precond(shape[0], shape[2], **options))
    options = {"head_channels": options.get("channels_per_head", 64), "sigma_data": options.get("sigma_data", 0.5)}
    imported = edm2.read(tensors(net), **options)
    parts = experiment.build(imported.config, shape, len(imported.class_names))

    rng = np.random.default_rng(0)
    x, direction = rng.standard_normal((2, 3, *shape)).astype(np.float32)
    x *= SIGMA[:, None, None, None]
    # Images as large as the noise, and errors that count alike at every level.
    direction /= np.minimum(SIGMA, 0.5)[:, None, None, None]
    label = np.array([0, 2, net.label_dim], np.int32)
    cond = {"label": label} if net.label_dim else {}

    xt = torch.tensor(x.transpose(0, 3, 1, 2), requires_grad=True)
    hot = torch.tensor(np.eye(net.label_dim + 1, dtype=np.float32)[label][:, :-1]) if cond else None
    y, u = net(xt, torch.tensor(SIGMA), hot, return_logvar=True)
    ((y * torch.tensor(direction.transpose(0, 3, 1, 2))).sum() + (u.flatten() ** 2).sum()).backward()

    @jax.jit
    def run(params, x, t, cond):
        def scalar(params, x):
            inputs, c_noise = parts.process.network_inputs(x, t)
            y = parts.process.denoised(parts.network.apply(params, inputs, c_noise, cond), x, t)
            u = parts.network.log_variance(params, c_noise)
            return jnp.sum(y * direction) + jnp.sum(u**2), (y, u)

        gradients, out = jax.grad(scalar, (0, 1), has_aux=True)(params, x)
        return out, gradients

    (ours, ours_u), (by_params, by_x) = run(imported.params, x, SIGMA, cond)
    nhwc = lambda t: t.detach().numpy().transpose(0, 2, 3, 1)  # noqa: E731
    entries = edm2.entries(edm2.architecture(tensors(net), head_channels=options["head_channels"]))
    return SimpleNamespace(
        net=net, imported=imported, entries=entries, x=x,
        theirs=nhwc(y), ours=np.asarray(ours), theirs_u=u.detach().numpy().ravel(), ours_u=np.asarray(ours_u),
        theirs_by_x=nhwc(xt.grad), ours_by_x=np.asarray(by_x), by_params=by_params,
    )  # fmt: skip


def relative(a, b):
    return np.abs(a - b).max() / np.abs(b).max()


@pytest.mark.parametrize("name", CASES)
def test_same_denoised_images(name):
    b = both(name)
    for ours, theirs, x in zip(b.ours, b.theirs, b.x, strict=True):
        assert relative(ours, theirs) < 2e-5
        assert relative(theirs, x) > 0.05  # the network has a part in it


@pytest.mark.parametrize("name", CASES)
def test_same_log_variance(name):
    b = both(name)
    assert relative(b.ours_u, b.theirs_u) < 2e-5 and np.ptp(b.theirs_u) > 0.1


@pytest.mark.parametrize("name", CASES)
def test_same_gradients(name):
    b = both(name)
    assert relative(b.ours_by_x, b.theirs_by_x) < 1e-4
    ours = weights.save(b.entries, b.by_params)
    theirs = {k: p.grad.numpy() for k, p in b.net.named_parameters()}
    for k, gradient in theirs.items():
        assert np.abs(gradient).max() > 1e-6, k
        assert relative(ours[k], gradient) < 1e-4, k
    frozen = set(ours) - set(theirs)
    assert frozen == {f"{a}.{b}" for a in ("unet.emb_fourier", "logvar_fourier") for b in ("freqs", "phases")}
    assert not any(np.any(ours[k]) for k in frozen)


@pytest.mark.parametrize("size, count", [("S", 280), ("XXL", 1523)])
def test_the_published_sizes(size, count):
    """Parameters of table 2, in millions."""
    net = models.make("edm2", (64, 64, 4), channels=WIDTHS[size], num_classes=1000, null_label=False, uncertainty=128)
    assert round(net.parameter_count() / 1e6) == count


@pytest.mark.parametrize("balance", [0.3, 0.5])
def test_magnitudes_are_preserved(balance):
    """Unit variance in, unit variance out: the defining property, of each layer on its own."""
    a, b = jax.random.normal(jax.random.key(0), (2, 4, 64, 64, 32))
    wide = jnp.concatenate([b, b[:2].reshape(4, 64, 64, 16)], -1)
    layer = models.make("mlp", (2,), width=8, depth=1, uncertainty=512)
    u = layer.log_variance(layer.init(jax.random.key(1)), jnp.linspace(-1, 1, 64))
    for y in (magnitude.mp_sum(a, b, balance), magnitude.mp_silu(a), magnitude.mp_concat(a, wide, 0.5)):
        assert float(jnp.sqrt(jnp.mean(y**2))) == pytest.approx(1, rel=0.01)
    left, right = jnp.split(magnitude.mp_concat(a, wide, balance), [32], -1)
    assert float(jnp.sum(right**2) / jnp.sum(left**2)) == pytest.approx((balance / (1 - balance)) ** 2, rel=0.02)
    assert 0.2 < float(jnp.std(u)) < 5


def test_a_zero_vector_has_a_gradient():
    g = jax.grad(lambda x: jnp.sum(magnitude.normalize(x, (-1,)) * jnp.arange(3.0)))(jnp.zeros(3))
    np.testing.assert_allclose(g, np.arange(3) / magnitude.EPS, rtol=1e-5)


def test_half_precision_is_near():
    options = {"channels": 8, "multipliers": (1,), "blocks": 0, "attention_levels": (0,), "head_channels": 8}
    nets = [models.make("edm2", (4, 4, 1), **options, dtype=dtype) for dtype in ("float32", "bfloat16")]
    x = jax.random.normal(jax.random.key(0), (2, 4, 4, 1))

    @jax.jit
    def run(key):
        params = jax.tree.map(lambda p: p if p.ndim else p + 1, nets[0].init(key))  # the gains
        return [net.apply(params, x, jnp.zeros(2)) for net in nets]

    full, half = run(jax.random.key(1))
    assert half.dtype == jnp.float32
    assert 1e-4 < relative(np.asarray(half), np.asarray(full)) < 0.05


def test_dropout_remat_and_the_null_label():
    """What the original's inference does not show."""
    options = {"channels": 8, "multipliers": (1,), "blocks": 0, "attention_levels": (), "num_classes": 3,
               "cond_channels": 2, "learn_variance": True, "dropout": 0.3}  # fmt: skip
    seen = []
    nets = [
        models.make("edm2", (4, 4, 1), **options, remat=remat, constrain=lambda x: seen.append(x.shape) or x)
        for remat in (False, True)
    ]
    x = jax.random.normal(jax.random.key(2), (2, 4, 4, 1))
    image, label = jnp.concatenate([x, -x], -1), jnp.array([0, 3])

    @jax.jit
    def run(key):
        params = jax.tree.map(lambda p: p if p.ndim else p + 1, nets[0].init(key))  # the gains

        def out(net, cond, key=None, params=params):
            return net.apply(params, x, jnp.zeros(2), {"image": image, **cond}, key=key)

        loss = [lambda p, net=net: jnp.sum(out(net, {"label": label}, key, p) ** 2) for net in nets]
        (dropped, gradients) = zip(*(jax.value_and_grad(f)(params) for f in loss), strict=True)
        plain, missing = out(nets[0], {"label": label}), out(nets[0], {})
        return {"plain": plain, "missing": missing, "dropped": dropped, "gradients": gradients}

    y = run(jax.random.key(1))
    assert y["plain"].shape == (2, 4, 4, 2) and len(seen) > 4
    np.testing.assert_allclose(*y["dropped"], rtol=1e-5)
    assert abs(y["dropped"][0] / jnp.sum(y["plain"] ** 2) - 1) > 0.01
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-3 * float(jnp.abs(a).max())), *y["gradients"])
    # The missing label is label number 3, and no label is not class 0.
    np.testing.assert_allclose(y["missing"][1], y["plain"][1], atol=1e-5)
    assert not np.allclose(y["missing"][0], y["plain"][0], atol=1e-2)


@pytest.mark.parametrize(
    "shape, options, words",
    [
        ((12, 12, 3), {}, ["12x12 does not divide by 8", "model.multipliers=(1, 2, 3, 4)", "data.size"]),
        ((8, 8, 3), {"channels": 10, "head_channels": 4}, ["head_channels=4", "divides"]),
        ((8, 8, 3), {"dtype": "float16"}, ["model.dtype='float16'"]),
    ],
)
def test_mistakes_are_named(shape, options, words):
    with pytest.raises(UserError) as error:
        models.make("edm2", shape, **options)
    assert "\n" not in str(error.value) and all(w in str(error.value) for w in words), str(error.value)
