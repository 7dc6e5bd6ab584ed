"""Classifiers of guided-diffusion: their logits and gradients are the original's, and they guide."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

torch = pytest.importorskip("torch")

from peers import adm as peer  # noqa: E402
from peers import compare  # noqa: E402

from jax_diffusion import guidance, schedules  # noqa: E402
from jax_diffusion.errors import UserError  # noqa: E402
from jax_diffusion.interop import adm_parts  # noqa: E402
from jax_diffusion.interop import guided_diffusion as adm  # noqa: E402
from jax_diffusion.models.encoder import encoder, log_likelihood  # noqa: E402

torch.set_num_threads(1)

POOLS = {
    "attention": {"num_head_channels": 16, "use_scale_shift_norm": True, "channel_mult": (1,)},
    "adaptive": {"num_heads": 2, "channel_mult": (1,), "use_new_attention_order": True},
    "spatial": {"num_heads": 1, "attention_resolutions": (), "resblock_updown": True},
    "spatial_v2": {"num_heads": 4, "channel_mult": (1,)},
}


@functools.cache
def classifier(pool):
    net = peer.make("EncoderUNetModel", out_channels=5, pool=pool, **POOLS[pool])
    heads = {k.removeprefix("num_"): v for k, v in POOLS[pool].items() if "num_head" in k}
    order = {"new_attention_order": POOLS[pool].get("use_new_attention_order", False)}
    state = compare.tensors_of(compare.state_of(net))
    return net, adm.read_classifier(state, image_size=8, **heads, **order), order


@pytest.mark.parametrize("pool", POOLS)
def test_same_logits_and_gradients(pool):
    net, c, order = classifier(pool)
    assert c.options["pool"] == pool and c.network.num_classes == 5

    def apply(params, x, t, cond):
        return c.network.apply(params, x, t, cond)[:, None, None]

    found = compare.differences(
        net, lambda net, x, t, _: net(x, t)[:, :, None, None], c.network._replace(apply=apply),
        adm_parts.classifier_entries(c.options, **order), shape=c.shape, t=[0.0, 17.0, 999.0],
    )  # fmt: skip
    assert found["output"] < 2e-5
    assert {k: d for k, d in found.items() if d > 1e-4} == {}
    assert len(found) == len(jax.tree.leaves(c.params)) + 2


def test_classifier_guidance_runs_with_it():
    """The guided x0_hat is the formula's, with the log-likelihood of the logits."""
    _, c, _ = classifier("adaptive")
    schedule, label = schedules.make("linear"), jnp.array([1, 4])
    log_prob = log_likelihood(c.network, c.params, label)
    x = jax.random.normal(jax.random.key(0), (2, 8, 8, 3))
    t = jnp.float32(300.0)

    @jax.jit
    def run(x, scale):
        guided = guidance.classifier(lambda x, t: 0.5 * x, log_prob, schedule, scale)
        value, gradient = jax.value_and_grad(lambda x: log_prob(x, t).sum())(x)
        logits = c.network.apply(c.params, x, jnp.full((2,), t), {})
        return guidance.unpack(guided(x, t)).x0, gradient, value, logits

    out, gradient, value, logits = run(x, 2.0)
    alpha, sigma = schedule.alpha_sigma(t)
    np.testing.assert_allclose(out, 0.5 * x + 2.0 * sigma**2 / alpha * gradient, atol=1e-5)
    by_hand = logits[np.arange(2), label] - np.log(np.exp(logits).sum(-1))
    np.testing.assert_allclose(value, by_hand.sum(), rtol=1e-5)
    assert np.abs(gradient).max() > 1e-3


# Dhariwal & Nichol 2021, appendix I: sizes in millions, rounded.
PUBLISHED_CLASSIFIERS = {
    "64x64_classifier": (65, {"multipliers": (1, 2, 3, 4), "attention_levels": (1, 2, 3)}),
    "128x128_classifier": (43, {"multipliers": (1, 1, 2, 3, 4), "attention_levels": (2, 3, 4)}),
    "256x256_classifier": (54, {"multipliers": (1, 1, 2, 2, 4, 4), "attention_levels": (3, 4, 5)}),
    "512x512_classifier": (54, {"multipliers": (0.5, 1, 1, 2, 2, 4, 4), "attention_levels": (4, 5, 6),
                                "stem_channels": 64}),
}  # fmt: skip


@pytest.mark.parametrize("name", PUBLISHED_CLASSIFIERS)
def test_published_classifiers(name):
    millions, options = PUBLISHED_CLASSIFIERS[name]
    size, blocks = (adm.CLASSIFIERS[name][k] for k in ("image_size", "blocks"))
    network = encoder((size, size, 3), num_classes=1000, blocks=blocks, norm_groups=32, **options)
    assert abs(network.parameter_count() / 1e6 - millions) < 1


def test_classifiers_and_u_nets_are_told_apart():
    net, *_ = classifier("attention")
    state = compare.tensors_of(compare.state_of(net))
    assert adm.matches(state) and adm.matches(peer.tensors())
    others = {name: state[name] for name in state if not name.startswith("time_embed")}
    assert not adm.matches(compare.tensors_of(others))
    with pytest.raises(UserError, match="is a classifier"):
        adm.read(state, image_size=8, heads=1)
    with pytest.raises(UserError, match="is no classifier"):
        adm.read_classifier(peer.tensors(), image_size=8)


def test_a_depth_that_names_leave_open_is_asked_for():
    """Two levels of one block, the change of size a block: or one level of three."""
    net = peer.make("EncoderUNetModel", out_channels=5, pool="adaptive", resblock_updown=True, channel_mult=(1, 1),
                     attention_resolutions=(), num_heads=1)  # fmt: skip
    state = compare.tensors_of(compare.state_of(net))
    with pytest.raises(UserError, match=r"leave \[1, 3\] blocks a level possible: give blocks="):
        adm.read_classifier(state, image_size=8)
    assert adm.read_classifier(state, image_size=8, blocks=1).options["resblock_updown"]
