"""The U-Net is that of diffusers: weights of a random UNet2DModel, copied over, give its outputs and gradients."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jax_diffusion import models

torch = pytest.importorskip("torch")
diffusers = pytest.importorskip("diffusers")

CLASSES = 4


def leaf(tensor):
    """OIHW -> HWIO, [out, in] -> [in, out]."""
    a = tensor.detach().numpy()
    return a.transpose(2, 3, 1, 0) if a.ndim == 4 else a.T


def affine(module):
    return {"kernel": leaf(module.weight), "bias": leaf(module.bias)}


def norm(module):
    return {"scale": leaf(module.weight), "bias": leaf(module.bias)}


def resblock(r):
    out = {"norm1": norm(r.norm1), "conv1": affine(r.conv1), "embed": affine(r.time_emb_proj),
           "norm2": norm(r.norm2), "conv2": affine(r.conv2)}  # fmt: skip
    return out if r.conv_shortcut is None else {**out, "shortcut": affine(r.conv_shortcut)}


def attention(a):
    parts = [affine(m) for m in (a.to_q, a.to_k, a.to_v)]
    qkv = {k: np.concatenate([p[k] for p in parts], -1) for k in ("kernel", "bias")}
    return {"norm": norm(a.group_norm), "qkv": qkv, "out": affine(a.to_out[0])}


def stages(block):
    """A down or up block of diffusers as our stages: residual blocks, each with its attention."""
    attentions = getattr(block, "attentions", [None] * len(block.resnets))
    for r, a in zip(block.resnets, attentions, strict=True):
        yield {"block": resblock(r)} if a is None else {"block": resblock(r), "attention": attention(a)}


def resampler(module):
    return {"conv": affine(module.conv)} if hasattr(module, "conv") else {"block": resblock(module)}


def numbered(items):
    return {str(i): item for i, item in enumerate(items)}


def parameters(net):
    """The weights of a UNet2DModel as our nested dict."""
    down, up, grow = [], [], []
    for block in net.down_blocks:
        down += [*stages(block), *map(resampler, block.downsamplers or [])]
    for block in net.up_blocks:
        up += stages(block)
        grow += map(resampler, block.upsamplers or [])
    middle = net.mid_block
    out = {
        "stem": affine(net.conv_in),
        "time1": affine(net.time_embedding.linear_1),
        "time2": affine(net.time_embedding.linear_2),
        "down": numbered(down),
        "middle": {
            "0": {"block": resblock(middle.resnets[0]), "attention": attention(middle.attentions[0])},
            "1": {"block": resblock(middle.resnets[1])},
        },
        "up": numbered(up),
        "grow": numbered(grow),
        "norm": norm(net.conv_norm_out),
        "head": affine(net.conv_out),
    }
    if net.class_embedding is not None:
        out["label"] = {"embedding": net.class_embedding.weight.detach().numpy()}
    return out


# name: sample shape, our options, the same in diffusers' words
COMMON = {"channels": 32, "multipliers": (1, 2), "blocks": 1, "attention_levels": (1,), "norm_groups": 32}
SEVERAL = {"scale_shift": True, "head_channels": 16, "num_classes": CLASSES, "norm_eps": 1e-5}
SEVERAL_THEIRS = {"resnet_time_scale_shift": "scale_shift", "attention_head_dim": 16, "norm_eps": 1e-5,
                  "attn_norm_num_groups": 32, "num_class_embeds": CLASSES + 1}  # fmt: skip
CASES = {
    "ddpm": (
        (8, 8, 3),
        {"blocks": 2, "norm_eps": 1e-6, "downsample_padding": (0, 1)},
        {"layers_per_block": 2, "norm_eps": 1e-6, "downsample_padding": 0, "attention_head_dim": None},
    ),
    "grey_oblong_torch_padding": (
        (8, 12, 1),
        {"norm_eps": 1e-5, "downsample_padding": (1, 1)},
        {"norm_eps": 1e-5, "downsample_padding": 1, "attention_head_dim": None},
    ),
    "heads_scale_shift_classes": (
        (8, 8, 3),
        {**SEVERAL, "downsample_padding": (0, 1)},
        {**SEVERAL_THEIRS, "downsample_padding": 0},
    ),
    "adm_resampling_in_blocks": (  # diffusers' DownBlock2D would ignore downsample_type
        (8, 8, 3),
        {**SEVERAL, "resblock_updown": True},
        {
            **SEVERAL_THEIRS,
            "downsample_type": "resnet",
            "upsample_type": "resnet",
            "down_block_types": ("ResnetDownsampleBlock2D", "AttnDownBlock2D"),
        },
    ),
}


@functools.cache
def both(name):
    """(their output and input gradient, ours, our abstract parameters, the copied ones)."""
    shape, ours, theirs = CASES[name]
    torch.manual_seed(0)
    net = diffusers.UNet2DModel(
        sample_size=shape[:2], in_channels=shape[2], out_channels=shape[2], block_out_channels=(32, 64),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"), flip_sin_to_cos=True, freq_shift=0,
        **{"down_block_types": ("DownBlock2D", "AttnDownBlock2D"), "layers_per_block": 1, **theirs},
    )  # fmt: skip
    with torch.no_grad():
        for p in net.parameters():  # norms and biases off their trivial initial values
            p += 0.1 * torch.randn_like(p)
    network = models.make("unet", shape, **{**COMMON, **ours})
    abstract = jax.eval_shape(network.init, jax.random.key(0))
    params = parameters(net)

    rng = np.random.default_rng(0)
    x, direction = rng.standard_normal((2, 3, *shape)).astype(np.float32)
    t, label = np.array([0.0, 17.0, 999.0], np.float32), np.array([0, 3, CLASSES], np.int32)
    cond = {"label": label} if network.num_classes else {}

    x_torch = torch.tensor(x.transpose(0, 3, 1, 2), requires_grad=True)
    classes = torch.tensor(label.astype(np.int64)) if cond else None
    y = net(x_torch, torch.tensor(t), class_labels=classes).sample
    (y * torch.tensor(direction.transpose(0, 3, 1, 2))).sum().backward()
    theirs = [a.detach().numpy().transpose(0, 2, 3, 1) for a in (y, x_torch.grad)]

    @jax.jit
    def run(params, x, t, cond):
        def scalar(x):
            out = network.apply(params, x, t, cond)
            return jnp.sum(out * direction), out

        gradient, out = jax.grad(scalar, has_aux=True)(x)
        return out, gradient

    return theirs, run(params, x, t, cond), abstract, params


def relative(a, b):
    return np.abs(np.asarray(a) - b).max() / np.abs(b).max()


@pytest.mark.parametrize("name", CASES)
def test_same_parameters(name):
    *_, abstract, params = both(name)
    assert jax.tree.map(np.shape, params) == jax.tree.map(lambda a: a.shape, abstract)


@pytest.mark.parametrize("name", CASES)
def test_same_output(name):
    (theirs, _), (ours, _), *_ = both(name)
    assert np.abs(theirs).max() > 0.1
    assert relative(ours, theirs) < 2e-5


@pytest.mark.parametrize("name", CASES)
def test_same_gradient(name):
    (_, theirs), (_, ours), *_ = both(name)
    assert relative(ours, theirs) < 1e-4
