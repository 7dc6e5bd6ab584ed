"""State dicts of guided-diffusion: what they are read as, and that outputs and gradients are the original's."""

import functools
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

torch = pytest.importorskip("torch")

from peers import adm as peer  # noqa: E402
from peers import compare  # noqa: E402

from jax_diffusion import conditions, experiment, models  # noqa: E402
from jax_diffusion import config as configs  # noqa: E402
from jax_diffusion.errors import UserError  # noqa: E402
from jax_diffusion.interop import adm_parts  # noqa: E402
from jax_diffusion.interop import guided_diffusion as adm  # noqa: E402
from jax_diffusion.interop.imported import Architecture  # noqa: E402
from jax_diffusion.interop.tensors import Tensors  # noqa: E402

torch.set_num_threads(1)

# name: the original's class and arguments; what is told to `read`; what it should find
UNETS = {
    "adm": (
        "UNetModel",
        peer.ADM,
        {"head_channels": 16},
        {"channels": 64, "multipliers": (1, 2), "blocks": 1, "attention_levels": (1,), "scale_shift": True,
         "resblock_updown": True, "null_label": False, "stem_channels": 0, "cond_channels": 0},
    ),
    "new_order_convolutions_grey": (
        "UNetModel",
        {"in_channels": 1, "out_channels": 1, "num_heads": 2, "use_new_attention_order": True, "channel_mult": (1, 1),
         "attention_resolutions": (1,), "num_res_blocks": 2},
        {"heads": 2, "new_attention_order": True, "predict": "x0", "noise_schedule": "cosine"},
        {"multipliers": (1, 1), "blocks": 2, "attention_levels": (0,), "scale_shift": False, "resblock_updown": False,
         "resample_conv": True, "downsample_padding": (1, 1), "null_label": True},
    ),
    "upsampler_half_width_no_attention": (
        "SuperResModel",
        {"out_channels": 6, "model_channels": 128, "channel_mult": (0.5, 1), "num_heads": 4,
         "attention_resolutions": (), "conv_resample": False},
        {"heads": 4, "factor": 2},
        {"channels": 128, "multipliers": (0.5, 1), "stem_channels": 64, "attention_levels": (),
         "resblock_updown": False, "resample_conv": False, "cond_channels": 3},
    ),
}  # fmt: skip


@functools.cache
def unet(name):
    cls, theirs, *_ = UNETS[name]
    return peer.make(cls, **theirs)


@functools.cache
def imported(name):
    return adm.read(compare.tensors_of(compare.state_of(unet(name)), f"{name}.pt"), image_size=8, **UNETS[name][2])


def architecture(i):
    return Architecture(
        {"name": "unet", **i.config.model.to_dict()}, i.shape, len(i.class_names), i.config.process.learn_variance,
        i.config.model.cond_channels,
    )  # fmt: skip


@functools.cache
def differences(name):
    i, net = imported(name), unet(name)
    shape = (8, 12, i.shape[-1]) if "grey" in name else i.shape
    network, condition, low = experiment.build(i.config, shape, len(i.class_names)).network, None, None
    if i.config.condition.name != "none":
        condition = conditions.make("low_resolution", shape, factor=2, interpolation="bilinear")
        low = np.random.default_rng(3).standard_normal((3, 4, 4, 3)).clip(-1, 1).astype(np.float32)

    def forward(net, x, t, labels):
        extra = {} if low is None else {"low_res": torch.tensor(low.transpose(0, 3, 1, 2))}
        return net(x, t, **extra, **({} if labels is None else {"y": labels}))

    def apply(params, x, t, cond):
        return network.apply(params, x, t, cond if low is None else {"image": condition.present(jnp.asarray(low))})

    return compare.differences(
        net, forward, network._replace(apply=apply), adm_parts.entries(architecture(i), **order(name)),
        shape=shape, t=[0.0, 17.0, 999.0], labels=[0, 3, 1] if i.class_names else None,
    )  # fmt: skip


def order(name):
    return {"new_attention_order": "new" in name}


@pytest.mark.parametrize("name", UNETS)
def test_same_output_and_gradients(name):
    found = differences(name)
    assert found["output"] < 2e-5
    assert {k: d for k, d in found.items() if d > 1e-4} == {}
    assert len(found) == len(jax.tree.leaves(imported(name).params)) + 2


@pytest.mark.parametrize("name", UNETS)
def test_what_names_and_shapes_tell(name):
    *_, wanted = UNETS[name]
    model = imported(name).config.model.to_dict()
    assert {k: model[k] for k in wanted} == wanted


def test_what_options_tell():
    plain, grey, large = (imported(name).config for name in UNETS)
    assert plain.process.learn_variance and plain.process.schedule.name == "linear"
    assert plain.process.prediction == "epsilon" and plain.sampling.solver == "ddpm"
    assert imported("adm").class_names == ("0", "1", "2", "3")
    assert (grey.process.schedule.name, grey.process.prediction) == ("cosine", "x0")
    assert (large.condition.name, large.condition.factor) == ("low_resolution", 2)
    for name in UNETS:  # complete: the parts of the experiment can be made
        i = imported(name)
        parts = experiment.build(i.config, i.shape, len(i.class_names))
        assert len(experiment.default_table(i.config, parts.process)) == 250


@pytest.mark.parametrize("name", UNETS)
def test_written_back_bit_for_bit(name):
    """And the original's strict loading takes it."""
    i = imported(name)
    back = adm.write(architecture(i), i.params, **order(name))
    state = compare.state_of(unet(name))
    assert back.keys() == state.keys()
    assert all(np.array_equal(back[k], state[k]) for k in state)
    unet(name).load_state_dict({k: torch.tensor(v) for k, v in back.items()}, strict=True)


def test_the_order_of_q_k_and_v_counts():
    """Read in the other order the numbers are the same, and not the network: no shape tells."""
    state = compare.tensors_of(compare.state_of(unet("adm")))
    other = adm.read(state, image_size=8, head_channels=16, new_attention_order=True)
    ours, theirs = (i.params["down"]["2"]["attention"]["qkv"]["bias"] for i in (imported("adm"), other))
    assert not np.array_equal(ours, theirs) and np.array_equal(np.sort(ours), np.sort(theirs))


# Dhariwal & Nichol 2021, appendix I: sizes in millions (cut off or rounded), options from the original's flags.
ADM = {"scale_shift": True, "resblock_updown": True, "learn_variance": True, "norm_groups": 32, "head_channels": 64,
       "channels": 256, "blocks": 2, "null_label": False}  # fmt: skip
UP = {"channels": 192, "multipliers": (1, 1, 2, 2, 4, 4), "cond_channels": 3}
PUBLISHED = {
    "64x64_diffusion": (296, 1000, {"channels": 192, "multipliers": (1, 2, 3, 4), "blocks": 3,
                                    "attention_levels": (1, 2, 3)}),
    "128x128_diffusion": (422, 1000, {"multipliers": (1, 1, 2, 3, 4), "attention_levels": (2, 3, 4)}),
    "256x256_diffusion": (554, 1000, {"multipliers": (1, 1, 2, 2, 4, 4), "attention_levels": (3, 4, 5)}),
    "512x512_diffusion": (559, 1000, {"multipliers": (0.5, 1, 1, 2, 2, 4, 4), "attention_levels": (4, 5, 6),
                                      "stem_channels": 128}),
    "lsun_bedroom": (552, 0, {"multipliers": (1, 1, 2, 2, 4, 4), "attention_levels": (3, 4, 5)}),
    "64_256_upsampler": (312, 1000, {**UP, "attention_levels": (3, 4, 5)}),
    "128_512_upsampler": (309, 1000, {**UP, "attention_levels": (4, 5)}),
}  # fmt: skip


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_parameter_counts(name):
    """And every preset is one of them."""
    millions, classes, options = PUBLISHED[name]
    flags = {k: v for k, v in adm.PRESETS[name].items() if k in ("heads", "head_channels", "dropout")}
    size = adm.PRESETS[name]["image_size"]
    options = {**ADM, **options, **({"head_channels": 0} if "heads" in flags else {}), **flags}
    network = models.make("unet", (size, size, 3), num_classes=classes, **options)
    assert abs(network.parameter_count() / 1e6 - millions) < 1


def test_a_published_checkpoint_is_known_by_its_name():
    """The recipe's network, from nothing but the names and shapes of the original with its README's flags."""
    with torch.device("meta"):
        net = peer.original.UNetModel(
            image_size=64, in_channels=3, model_channels=192, out_channels=6, num_res_blocks=3, num_classes=1000,
            attention_resolutions=(2, 4, 8), channel_mult=(1, 2, 3, 4), num_head_channels=64, resblock_updown=True,
            use_scale_shift_norm=True, use_new_attention_order=True,
        )  # fmt: skip
    shapes = {k: tuple(v.shape) for k, v in net.state_dict().items()}
    recipe = configs.resolve("imagenet64_adm").model.to_dict()
    found = adm_parts.unet_options(Tensors(pathlib.Path("64x64_diffusion.pt"), shapes, lambda name: None))
    assert {k: recipe[k] for k in found if k != "downsample_padding"} == {
        k: v for k, v in found.items() if k != "downsample_padding"
    }
    network = models.make(**recipe, shape=(64, 64, 3), num_classes=1000, learn_variance=True)
    assert network.parameter_count() == sum(p.numel() for p in net.parameters()) == 295_904_454


def tensors(arrays, path="some.pt"):
    return compare.tensors_of(arrays, path)


def test_the_name_of_a_published_file_says_its_flags():
    """Only where nothing else was said."""
    state = compare.state_of(unet("adm"))
    seen = adm._with_preset(tensors(state, "64x64_diffusion.pt"), "", {"image_size": 0}, adm.PRESETS, {})
    assert seen[0]["image_size"] == 64 and seen[0]["new_attention_order"] and "64x64_diffusion" in seen[1][0]
    named = adm.read(tensors(state), preset="64x64_diffusion", image_size=8, head_channels=16)
    assert named.shape == (8, 8, 3) and named.config.process.schedule.name == "cosine"
    assert named.config.model.dropout == 0.1


def without(state, name):
    return {k: v for k, v in state.items() if k != name}


QKV = "input_blocks.3.1.qkv.weight"


@pytest.mark.parametrize(
    "change, options, words",
    [
        (lambda s: s, {}, ["image_size=...", "64x64_diffusion"]),
        (lambda s: s, {"image_size": 8}, ["heads=...", "head_channels=..."]),
        (lambda s: s, {"image_size": 9, "heads": 1}, ["9x9", "multiples of 2"]),
        (lambda s: s, {"image_size": 8, "heads": 5}, ["model.heads=5", "128 channels"]),
        (lambda s: s, {"image_size": 8, "heads": 1, "noise_schedule": "cosin"}, ["did you mean 'cosine'?"]),
        (lambda s: s, {"preset": "64x64_difusion"}, ["did you mean '64x64_diffusion'?"]),
        (lambda s: without(s, "out.0.bias"), {"image_size": 8, "heads": 1}, ["1 missing: out.0.bias"]),
        (lambda s: s | {"extra": s["out.0.bias"]}, {"image_size": 8, "heads": 1}, ["1 unknown: extra"]),
        (lambda s: s | {QKV: s[QKV][:, :9]}, {"image_size": 8, "heads": 1}, ["1 of another shape", QKV]),
        (lambda s: s | {"out.2.weight": s["out.2.weight"][:5]}, {"image_size": 8, "heads": 1}, ["3 channels", "5 go"]),
        (lambda s: without(s, "time_embed.0.weight"), {"image_size": 8, "heads": 1}, ["no state dict of guided"]),
    ],
)
def test_what_does_not_fit_is_said(change, options, words):
    with pytest.raises(UserError) as error:
        adm.read(tensors(change(compare.state_of(unet("adm")))), **options)
    message = str(error.value)
    assert "\n" not in message and all(word in message for word in words), message


def test_networks_that_guided_diffusion_has_not():
    a = architecture(imported("adm"))
    changed = {"activation": "gelu", "null_label": True, "norm_groups": 16, "middle": "blocks"}
    with pytest.raises(UserError) as error:
        adm.write(a._replace(model=a.model | changed), {})
    assert all(word in str(error.value) for word in ("'gelu'", "null_label", "norm_groups=16", "'blocks'"))


def test_timesteps_that_were_rescaled():
    """Of 500 steps the network was shown 2 t, and is here: the reader must be told which."""
    name = "new_order_convolutions_grey"
    state, told = compare.tensors_of(compare.state_of(unet(name)), f"{name}.pt"), {**UNETS[name][2], "image_size": 8}
    with pytest.raises(UserError, match="rescale_timesteps=true"):
        adm.read(state, steps=500, **told)
    read = [adm.read(state, steps=500, rescale_timesteps=scaled, **told) for scaled in (True, False)]
    x = np.random.default_rng(0).standard_normal((2, 8, 8, 1)).astype(np.float32)

    def run(i, t):
        network = experiment.build(i.config, i.shape, 0).network
        return jax.jit(network.apply)(i.params, x, np.float32(t))

    assert [i.config.model.time_scale for i in read] == [2.0, 1.0]
    np.testing.assert_allclose(run(read[0], [7, 300]), run(read[1], [14, 600]), atol=1e-6)
