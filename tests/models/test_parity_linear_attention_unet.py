"""The linear-attention U-Net is denoising_diffusion_pytorch's: its random weights give its outputs and gradients."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from peers import stand_ins

from jax_diffusion import models
from jax_diffusion.errors import UserError
from jax_diffusion.interop import linear_attention_unet as names
from jax_diffusion.interop import weights
from jax_diffusion.interop.imported import Architecture
from jax_diffusion.interop.tensors import Tensors

torch = pytest.importorskip("torch")
peer = stand_ins.import_peer("denoising_diffusion_pytorch")
guided = stand_ins.import_peer("denoising_diffusion_pytorch.classifier_free_guidance")

CLASSES = 4
TIMES = np.array([0.0, 17.0, 499.0], np.float32)
PROBES = ("stem/kernel", "down/0/attention/qkv/kernel", "middle/attention/out/kernel", "head/bias")

# name: sample shape, our options, the package's
CASES = {
    "standard": ((8, 8, 3), {}, {}),
    "oblong_grey_learned_variance": (
        (2, 6, 1),
        {"stem_channels": 12, "max_period": 100.0, "full_attention_levels": (0,), "heads": (2, 1),
         "head_channels": (8, 16), "learn_variance": True},
        {"init_dim": 12, "sinusoidal_pos_emb_theta": 100, "full_attn": (True, False), "attn_heads": (2, 1),
         "attn_dim_head": (8, 16), "learned_variance": True},
    ),
    "one_level_one_head_linear_attention_alone": (
        (5, 3, 2),
        {"multipliers": (2,), "full_attention_levels": (), "heads": (1,), "head_channels": (16,), "cond_channels": 2,
         "time_embedding": "learned_fourier", "frequencies": 3},
        {"dim_mults": (2,), "full_attn": (False,), "attn_heads": 1, "attn_dim_head": 16, "self_condition": True,
         "learned_sinusoidal_cond": True, "learned_sinusoidal_dim": 6},
    ),
    "classes": (
        (8, 8, 3),
        {"full_attention_levels": (), "memory": 0, "downsampling": "stride", "num_classes": CLASSES,
         "heads": (4, 4, 2), "head_channels": (32, 32, 16)},
        {"num_classes": CLASSES, "attn_heads": 2, "attn_dim_head": 16},
    ),
}  # fmt: skip
OURS, THEIRS = {"channels": 16, "multipliers": (1, 2)}, {"dim": 16, "dim_mults": (1, 2)}


def random_peer(shape, options, seed=0):
    """A Unet of the package with all parameters off their initial values."""
    torch.manual_seed(seed)
    kind = guided.Unet if "num_classes" in options else peer.Unet
    net = kind(**{**THEIRS, **options}, channels=shape[-1])
    with torch.no_grad():
        for p in net.parameters():
            p += 0.1 * torch.randn_like(p)
    return net


def tensors_of(state):
    return Tensors("a state dict", {k: tuple(v.shape) for k, v in state.items()}, lambda k: state[k].numpy())


def nchw(a):
    return torch.tensor(a.transpose(0, 3, 1, 2))


@functools.cache
def both(name):
    """(theirs, ours, our abstract parameters, the converted ones): output, input gradient, parameter gradients."""
    shape, ours, theirs = CASES[name]
    ours = {**OURS, **ours}
    net = random_peer(shape, theirs)
    network = models.make(names.NAME, shape, **ours)
    abstract = jax.eval_shape(network.init, jax.random.key(0))
    classes, learned = ours.pop("num_classes", 0), ours.pop("learn_variance", False)
    entries = names.entries(Architecture({"name": names.NAME, **ours}, shape, classes, learned))
    params = weights.load(entries, tensors_of(net.state_dict()), abstract)

    rng = np.random.default_rng(0)
    x, image = rng.standard_normal((2, 3, *shape)).astype(np.float32)
    out = shape[-1] * (1 + learned)
    direction = rng.standard_normal((3, *shape[:2], out)).astype(np.float32)
    label = np.array([0, 3, CLASSES], np.int32)
    cond = {"label": label} if classes else {"image": image} if "cond_channels" in ours else {}

    x_torch = nchw(x).requires_grad_()
    if classes:
        keep = torch.tensor(label < CLASSES)
        classes = torch.tensor(np.minimum(label, CLASSES - 1).astype(np.int64))
        y = net(x_torch, torch.tensor(TIMES), classes, cond_drop_prob=0.5, cond_keep_mask=keep)
    else:
        y = net(x_torch, torch.tensor(TIMES), nchw(image) if cond else None)
    (y * nchw(direction)).sum().backward()
    gradients = tensors_of({k: torch.zeros_like(p) if p.grad is None else p.grad for k, p in net.named_parameters()})
    theirs = [a.detach().numpy().transpose(0, 2, 3, 1) for a in (y, x_torch.grad)]
    theirs.append(weights.flat(weights.load(entries, gradients, abstract)))

    @jax.jit
    def run(params, x, cond):
        def scalar(params, x):
            out = network.apply(params, x, TIMES, cond)
            return jnp.sum(out * direction), out

        gradients, out = jax.grad(scalar, argnums=(0, 1), has_aux=True)(params, x)
        return out, gradients[1], weights.flat(gradients[0])

    return theirs, run(params, x, cond), abstract, params


def relative(a, b):
    return np.abs(np.asarray(a) - b).max() / np.abs(b).max()


@pytest.mark.parametrize("name", CASES)
def test_same_output(name):
    theirs, ours, abstract, params = both(name)
    assert jax.tree.map(np.shape, params) == jax.tree.map(lambda a: a.shape, abstract)
    assert np.abs(theirs[0]).max() > 0.1
    assert relative(ours[0], theirs[0]) < 2e-5


@pytest.mark.parametrize("name", CASES)
def test_same_gradients(name):
    theirs, ours, *_ = both(name)
    assert relative(ours[1], theirs[1]) < 1e-4
    for probe in PROBES:
        assert relative(ours[2][probe], theirs[2][probe]) < 1e-4, probe


@pytest.mark.parametrize(
    ("ours", "theirs"),
    [
        ({}, {"dim": 64}),
        ({"num_classes": 10, "memory": 0, "downsampling": "stride", "full_attention_levels": ()}, {"num_classes": 10}),
    ],
)
def test_as_many_parameters_at_full_size(ours, theirs):
    with torch.device("meta"):
        net = (guided if "num_classes" in theirs else peer).Unet(**{"dim": 64, **theirs})
    network = models.make(names.NAME, (32, 32, 3), **ours)
    assert network.parameter_count() == sum(p.numel() for p in net.parameters())


@functools.cache
def small(**options):
    network = models.make(names.NAME, (4, 4, 1), channels=8, multipliers=(1,), **options)
    rng, t = np.random.default_rng(0), np.array([3.0, 500.0], np.float32)
    x = rng.standard_normal((2, 4, 4, 1)).astype(np.float32)
    shapes = jax.eval_shape(network.init, jax.random.key(0))
    params = jax.tree.map(lambda a: 0.2 * rng.standard_normal(a.shape).astype(np.float32), shapes)
    return params, jax.jit(lambda params, key, cond: network.apply(params, x, t, cond, key))


def test_dropout_follows_its_key():
    params, apply = small(dropout=0.5)
    one, same, other = (apply(params, jax.random.key(k), {}) for k in (1, 1, 2))
    assert np.array_equal(one, same)
    assert not np.allclose(one, other, atol=1e-3)


def test_bfloat16_with_recomputation_is_near():
    params, exact = small()
    rough = small(dtype="bfloat16", remat=True)[1](params, None, {})
    assert rough.dtype == jnp.float32 and 0 < relative(rough, exact(params, None, {})) < 0.05


def test_without_a_condition_image_zeros_are_shown():
    params, apply = small(cond_channels=2)
    assert np.array_equal(apply(params, None, {}), apply(params, None, {"image": jnp.zeros((2, 4, 4, 2))}))


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"multipliers": (1, 2, 4, 8)}, "4x4 does not divide by 8"),
        ({"heads": (4, 4, 4)}, r"model.heads=\(4, 4, 4\)"),
        ({"full_attention_levels": (1,)}, "full_attention_levels"),
        ({"channels": 3}, "model.channels=3"),
        ({"downsampling": "mean"}, "model.downsampling='mean'"),
    ],
)
def test_mistakes_are_named(options, said):
    with pytest.raises(UserError, match=said):
        models.make(names.NAME, (4, 4, 1), **{"multipliers": (1,), **options})
