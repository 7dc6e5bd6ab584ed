"""DDPM++, NCSN++ and ADM as EDM trains them are those of an independent implementation (peers/edm.py), which has been
compared with the original. The denoisers that preconditioning makes of them: tests/interop/test_edm.py."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jax_diffusion import models
from jax_diffusion.errors import UserError
from jax_diffusion.interop import edm, weights
from jax_diffusion.models.song_unet import PRESETS

torch = pytest.importorskip("torch")

from peers import compare  # noqa: E402
from peers import edm as peer  # noqa: E402

LABELS = 5
# name: sample shape, their class and options
CASES = {
    "ddpmpp_labels": (
        (8, 8, 3), "SongUNet",
        {"model_channels": 16, "channel_mult": (1, 2), "num_blocks": 1, "attn_resolutions": (4,), "label_dim": LABELS,
         "augment_dim": 9},
    ),
    "ncsnpp_oblong": (
        (8, 12, 1), "SongUNet",
        {"model_channels": 16, "channel_mult": (2, 1), "num_blocks": 1, "attn_resolutions": (4,),
         "embedding_type": "fourier", "channel_mult_noise": 2, "encoder_type": "residual",
         "resample_filter": (1, 3, 3, 1)},
    ),
    "skips_no_attention": (
        (8, 8, 3), "SongUNet",
        {"model_channels": 16, "channel_mult": (2, 1), "num_blocks": 1, "attn_resolutions": (), "encoder_type": "skip",
         "decoder_type": "skip", "resample_filter": (1, 3, 3, 1), "channel_mult_emb": 2},
    ),
    "adm_labels_two_heads": (
        (8, 8, 3), "DhariwalUNet",
        {"model_channels": 64, "channel_mult": (1, 2), "num_blocks": 1, "attn_resolutions": (4,), "label_dim": LABELS},
    ),
    "adm_oblong_wide_stem": (
        (8, 12, 1), "DhariwalUNet",
        {"model_channels": 32, "channel_mult": (2,), "num_blocks": 1, "attn_resolutions": (8,), "channel_mult_emb": 3},
    ),
    "adm_no_attention_on_the_way": (
        (4, 4, 2), "DhariwalUNet",
        {"model_channels": 64, "channel_mult": (1,), "num_blocks": 2, "attn_resolutions": (), "augment_dim": 9},
    ),
}  # fmt: skip
C_NOISE = (-1.5, 0.1, 1.1)  # log(sigma)/4 from 0.0025 to 80
NULL = np.array([0, LABELS - 1, LABELS], np.int32)  # the last is "no label"
WATCHED = ("stem/kernel", "time1/kernel", "(label|inputs/0|up/0/(block/)?conv2)/(kernel|embedding)",
           "down/0/(block/)?norm1/scale", "middle/0/attention/qkv/(kernel|bias)",
           "up/1/(block/)?embed/bias")  # fmt: skip


def hot(labels):
    return torch.eye(LABELS + 1)[labels][:, :LABELS]


@functools.cache
def nets(name):
    """Their network with random weights, ours, and the entries between them."""
    shape, cls, options = CASES[name]
    torch.manual_seed(0)
    net = compare.randomize(getattr(peer, cls)(shape[0], shape[2], shape[2], **options)).eval()
    a = edm.describe(compare.tensors_of(compare.state_of(net)), prefix="")
    model = {k: v for k, v in a.model.items() if k != "name"}
    return net, models.make(a.model["name"], shape, num_classes=a.num_classes, **model), edm.entries(a, prefix="")


def ignore(name):
    return name.endswith("resample_filter") or "map_augment" in name


@functools.cache
def differences(name):
    net, network, entries = nets(name)
    labelled = network.num_classes > 0
    return compare.differences(
        net,
        lambda net, x, t, labels: net(x, t, hot(labels) if labelled else None),
        network,
        entries,
        shape=CASES[name][0],
        t=C_NOISE,
        labels=NULL if labelled else None,
        ignore=ignore,
        watch=WATCHED,
    )


@pytest.mark.parametrize("name", CASES)
def test_same_output(name):
    assert differences(name)["output"] < 2e-5


@pytest.mark.parametrize("name", CASES)
def test_same_gradients(name):
    found = differences(name)
    assert len(found) >= 9 and max(found.values()) < 1e-4, max(found, key=found.get)


def test_augmentation_labels_and_dropout():
    """What augmentation did is added as theirs is; the key decides dropout's mask and nothing else."""
    torch.manual_seed(0)
    options = {"model_channels": 8, "channel_mult": (1,), "num_blocks": 1, "attn_resolutions": (), "label_dim": LABELS}
    net = compare.randomize(peer.SongUNet(8, 3, 3, augment_dim=9, **options)).eval()
    tensors = compare.tensors_of(compare.state_of(net))
    entries = edm.entries(edm.describe(tensors, prefix=""), prefix="")
    options = {"channels": 8, "multipliers": (1,), "blocks": 1, "attention_levels": (), "null_label": False}
    network = models.make("song_unet", (8, 8, 3), num_classes=LABELS, augment_dim=9, dropout=0.5, **options)
    abstract = jax.eval_shape(network.init, jax.random.key(0))
    params = weights.load(entries, tensors, abstract)
    rng = np.random.default_rng(1)
    x, augment = rng.standard_normal((3, 8, 8, 3)).astype(np.float32), rng.standard_normal((3, 9)).astype(np.float32)
    t = np.array(C_NOISE, np.float32)
    inputs = torch.tensor(x.transpose(0, 3, 1, 2)), torch.tensor(t), hot(NULL)
    theirs = net(*inputs, torch.tensor(augment)).detach().numpy().transpose(0, 2, 3, 1)
    without = net(*inputs).detach().numpy().transpose(0, 2, 3, 1)

    @jax.jit
    def run(params, keys):
        cond = {"label": NULL, "augment": augment}
        dropped = jax.vmap(lambda key: network.apply(params, x, t, cond, key))(keys)
        return network.apply(params, x, t, cond), dropped

    ours, (one, same, other) = run(params, jax.random.split(jax.random.key(0), 2)[jnp.array([0, 0, 1])])
    assert compare.relative(ours, theirs) < 2e-5
    assert compare.relative(without, theirs) > 1e-2
    assert compare.relative(one, ours) > 1e-2 and compare.relative(one, other) > 1e-2
    np.testing.assert_array_equal(one, same)


# Karras et al. 2022, table 7's CIFAR-10 and ImageNet-64 networks, with the labels of EDM's augmentation for the former;
# what sums over the original's parameters give, and 128 frequencies of NCSN++'s that are a buffer there.
PUBLISHED = {
    "ddpmpp": (55_735_299, lambda: models.make("song_unet", (32, 32, 3), augment_dim=9, num_classes=10,
                                               null_label=False, **PRESETS["ddpmpp"])),
    "ncsnpp": (56_397_827 + 128, lambda: models.make("song_unet", (32, 32, 3), augment_dim=9, **PRESETS["ncsnpp"])),
    "adm": (295_899_267, lambda: models.make("unet", (64, 64, 3), channels=192, multipliers=(1, 2, 3, 4), blocks=3,
                                             attention_levels=(1, 2, 3), head_channels=64, num_classes=1000,
                                             null_label=False, scale_shift=True, resblock_updown=True)),
}  # fmt: skip


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_size(name):
    count, make = PUBLISHED[name]
    assert make().parameter_count() == count


def test_images_in_0_to_1():
    """Weights for the score of images y in [0, 1] give that of ours, x = 2y - 1: half of it, at half the noise."""
    options = {"channels": 8, "multipliers": (1,), "blocks": 0, "attention_levels": (), "time_embedding": "log_fourier"}
    rng = np.random.default_rng(0)
    y, sigma = rng.uniform(0, 1, (2, 4, 4, 3)).astype(np.float32), np.array([0.02, 30.0], np.float32)
    theirs = models.make("song_unet", (4, 4, 3), **options)
    params = jax.tree.map(lambda p: p + 0.1, theirs.init(jax.random.key(0)))
    expected = np.asarray(jax.jit(theirs.apply)(params, y, sigma))
    ours = models.make("song_unet", (4, 4, 3), **options, unit_range=True)
    found = np.asarray(jax.jit(ours.apply)(params, 2 * y - 1, 2 * sigma))
    for one, other in zip(found, expected / 2, strict=True):
        assert compare.relative(one, other) < 2e-5
    # The network shown [-1, 1] and told sigma in units of [0, 1]: what VE-SDE models of score_sde do.
    both = models.make("song_unet", (4, 4, 3), **options, unit_range=True, center_input=True)
    assert compare.relative(jax.jit(both.apply)(params, y, 2 * sigma), expected / 2) < 2e-5


def test_bfloat16_remat_and_constraints():
    """Half precision and recomputation give float32 of the same shape; every block's output is constrained."""
    seen = []
    options = {"channels": 16, "multipliers": (1, 2), "blocks": 1, "learn_variance": True, "cond_channels": 1}
    network = models.make("song_unet", (8, 8, 3), **options, **PRESETS["ncsnpp"], dtype="bfloat16", remat=True,
                          constrain=lambda x: seen.append((x.shape, x.dtype)) or x)  # fmt: skip
    params = jax.eval_shape(network.init, jax.random.key(0))
    x, image = jax.ShapeDtypeStruct((2, 8, 8, 3), jnp.float32), jax.ShapeDtypeStruct((2, 8, 8, 1), jnp.float32)
    loss = lambda p, x, image: network.apply(p, x, jnp.ones(2), {"image": image}, jax.random.key(0)).sum()  # noqa: E731
    seen.clear()
    gradients = jax.eval_shape(jax.grad(loss), params, x, image)
    assert {leaf.dtype for leaf in jax.tree.leaves((params, gradients))} == {jnp.dtype("float32")}
    # stem, 2 levels of 1 block, 1 change of size and 1 sum on the way down; 2 in the middle; 4 and 1 up
    assert len(seen) == 1 + 2 + 2 + 2 + 4 + 1 and {dtype for _, dtype in seen} == {jnp.dtype("bfloat16")}
    out = jax.eval_shape(network.apply, params, x, jax.ShapeDtypeStruct((2,), jnp.float32), {"image": image})
    assert (out.shape, out.dtype) == ((2, 8, 8, 6), jnp.dtype("float32"))


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"resample_filter": (1, 2, 1)}, r"resample_filter=\(1, 2, 1\).*\(1, 3, 3, 1\)"),
        ({"encoder": "residuals"}, "did you mean 'residual'"),
        ({"heads": 3}, "heads=3 does not divide the 256"),
        ({"multipliers": (1,) * 5}, "8x8 does not divide by 16"),
        ({"time_embedding": "log"}, "log_fourier"),
    ],
)
def test_mistakes(wrong, said):
    with pytest.raises(UserError, match=said):
        models.make("song_unet", (8, 8, 3), **wrong)
