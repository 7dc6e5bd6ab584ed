"""diffusers' UNet2DModel as a folder: there, here, and back again, bit for bit."""

import functools
import inspect
import json

import jax
import numpy as np
import pytest

torch = pytest.importorskip("torch")
diffusers = pytest.importorskip("diffusers")

from peers import compare, unet2d  # noqa: E402

from jax_diffusion import config as configs  # noqa: E402
from jax_diffusion import models  # noqa: E402
from jax_diffusion.errors import UserError  # noqa: E402
from jax_diffusion.interop import tensors, weights  # noqa: E402
from jax_diffusion.interop.diffusers import unet  # noqa: E402
from jax_diffusion.interop.imported import Architecture, build  # noqa: E402

torch.set_num_threads(1)
WEIGHTS = "diffusion_pytorch_model.safetensors"

# As published; what has no influence is left out.
DDPM_CIFAR10 = {  # google/ddpm-cifar10-32, written by diffusers 0.0.4
    "_class_name": "UNet2DModel", "_diffusers_version": "0.0.4", "act_fn": "silu", "attention_head_dim": None,
    "block_out_channels": [128, 256, 256, 256], "center_input_sample": False,
    "down_block_types": ["DownBlock2D", "AttnDownBlock2D", "DownBlock2D", "DownBlock2D"], "downsample_padding": 0,
    "flip_sin_to_cos": False, "freq_shift": 1, "in_channels": 3, "layers_per_block": 2, "mid_block_scale_factor": 1,
    "norm_eps": 1e-06, "norm_num_groups": 32, "out_channels": 3, "sample_size": 32,
    "time_embedding_type": "positional",
    "up_block_types": ["UpBlock2D", "UpBlock2D", "AttnUpBlock2D", "UpBlock2D"],
}  # fmt: skip
CONSISTENCY = {  # openai/diffusers-cd_imagenet64_l2
    "_class_name": "UNet2DModel", "act_fn": "silu", "add_attention": True, "attention_head_dim": 64,
    "attn_norm_num_groups": 32, "block_out_channels": [192, 384, 576, 768], "center_input_sample": False,
    "class_embed_type": None, "downsample_padding": 1, "downsample_type": "resnet", "dropout": 0.0,
    "down_block_types": ["ResnetDownsampleBlock2D", "AttnDownBlock2D", "AttnDownBlock2D", "AttnDownBlock2D"],
    "flip_sin_to_cos": True, "freq_shift": 0, "in_channels": 3, "layers_per_block": 3, "mid_block_scale_factor": 1,
    "norm_eps": 1e-05, "norm_num_groups": 32, "num_class_embeds": 1000, "out_channels": 3,
    "resnet_time_scale_shift": "scale_shift", "sample_size": 64, "time_embedding_type": "positional",
    "up_block_types": ["AttnUpBlock2D", "AttnUpBlock2D", "AttnUpBlock2D", "ResnetUpsampleBlock2D"],
    "upsample_type": "resnet",
}  # fmt: skip


def test_defaults_are_those_of_diffusers():
    parameters = inspect.signature(diffusers.UNet2DModel.__init__).parameters
    assert {n: p.default for n, p in parameters.items() if n != "self"} == unet.DEFAULTS


def network(a):
    return models.make(**a.model, shape=a.shape, num_classes=a.num_classes, learn_variance=a.learn_variance)


@functools.cache
def shapes(name):
    return jax.eval_shape(network(unet.architecture(dict(unet2d.make(name).config))).init, jax.random.key(0))


def outputs(net):
    rng = np.random.default_rng(0)
    size, classes = net.config.sample_size, net.config.num_class_embeds
    size = (size, size) if isinstance(size, int) else size
    x = torch.tensor(rng.standard_normal((2, net.config.in_channels, *size), np.float32))
    with torch.no_grad():
        return net(x, torch.tensor([1.0, 500.0]), torch.tensor([0, classes - 1]) if classes else None).sample.numpy()


@pytest.mark.parametrize("name", unet2d.CONFIGS)
def test_there_and_back(name, tmp_path):
    theirs = unet2d.make(name)
    theirs.save_pretrained(tmp_path / "theirs")
    a = unet.architecture(json.loads((tmp_path / "theirs/config.json").read_text()))
    found = tensors.open_file(tmp_path / "theirs" / WEIGHTS).renamed(unet.rename)
    params = weights.load(unet.entries(a), found, shapes(name), ignore=unet.ignore)

    (tmp_path / "ours").mkdir()
    tensors.save(tmp_path / "ours" / WEIGHTS, weights.save(unet.entries(a), params))
    (tmp_path / "ours/config.json").write_text(json.dumps(unet.config_of(a)))
    back = diffusers.UNet2DModel.from_pretrained(tmp_path / "ours")

    old, new = theirs.state_dict(), back.state_dict()
    assert old.keys() == new.keys() and all(torch.equal(old[k], new[k]) for k in old)
    np.testing.assert_array_equal(outputs(back), outputs(theirs))
    assert unet.architecture(dict(back.config)) == a  # equal in meaning


OURS = {"name": "unet", "channels": 16, "multipliers": (1, 2), "blocks": 1, "norm_groups": 4, "head_channels": 8}


def ours(shape=(8, 8, 3), num_classes=0, learn_variance=False, **options):
    return Architecture({**OURS, **options}, shape, num_classes, learn_variance, options.get("cond_channels", 0))


@pytest.mark.parametrize(
    "a",
    [
        ours(),
        ours(num_classes=5),
        ours((8, 12, 1), num_classes=5, null_label=False, resblock_updown=True, scale_shift=True, learn_variance=True),
        ours((8, 8, 3), cond_channels=3, learn_variance=True, embedding_channels=24, middle="none"),
        ours(heads=1, head_channels=0, attention_levels=(0, 1), middle="blocks", activation="relu"),
    ],
    ids=["plain", "null_label", "no_null_label_oblong", "conditioned", "one_head"],
)
def test_ours_there_and_back(a, tmp_path):
    """What diffusers has no field for survives its saving too."""
    net = network(a)
    rng, wanted = np.random.default_rng(0), jax.eval_shape(net.init, jax.random.key(0))
    params = jax.tree.map(lambda a: rng.standard_normal(a.shape, np.float32), wanted)
    tensors.save(tmp_path / WEIGHTS, weights.save(unet.entries(a), params))
    (tmp_path / "config.json").write_text(json.dumps(unet.config_of(a)))
    there, info = diffusers.UNet2DModel.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info.values())
    assert sum(p.numel() for p in there.parameters()) == net.parameter_count()
    if a.num_classes:
        assert there.config.num_class_embeds == a.num_classes + a.model.get("null_label", True)

    there.save_pretrained(tmp_path / "again")
    back = unet.architecture(json.loads((tmp_path / "again/config.json").read_text()))
    assert back[1:] == a[1:]
    assert not a.num_classes or back.model["null_label"] == a.model.get("null_label", True)
    assert network(back).parameter_count() == net.parameter_count()
    loaded = weights.load(
        unet.entries(back),
        tensors.open_file(tmp_path / "again" / WEIGHTS),
        jax.eval_shape(network(back).init, jax.random.key(0)),
    )
    assert jax.tree.all(jax.tree.map(np.array_equal, loaded, params))


def test_a_folder_is_one_complete_model():
    """Its config alone makes the network again, also from the JSON of a run."""
    net = unet2d.make("consistency")
    a = unet.architecture(dict(net.config))
    i = build(a, unet.entries(a), compare.tensors_of(compare.state_of(net)))
    config = configs.from_json(configs.to_json(i.config))
    assert config.model.to_dict() == i.config.model.to_dict()
    assert {k: config.model[k] for k in a.model} == a.model and i.class_names == ("0", "1", "2", "3")


def test_names_of_old_diffusers():
    """q, k, v and the output under their old names and as 1x1 convolutions."""
    net = unet2d.make("ddpm")
    state = compare.state_of(net)
    old = {}
    for name, array in state.items():
        for new, before in (("to_q", "query"), ("to_k", "key"), ("to_v", "value"), ("to_out.0", "proj_attn")):
            name = name.replace(f".{new}.", f".{before}.")
        matrix = "attentions" in name and array.ndim == 2
        old[name] = array[:, :, None, None] if matrix else array
    assert old.keys() != state.keys()
    a = unet.architecture(dict(net.config))
    entries = unet.entries(a)
    found = weights.load(entries, compare.tensors_of(old).renamed(unet.rename), shapes("ddpm"))
    expected = weights.load(entries, compare.tensors_of(state), shapes("ddpm"))
    assert jax.tree.all(jax.tree.map(np.array_equal, found, expected))


@pytest.mark.parametrize(
    "config, count",
    [(DDPM_CIFAR10, 35_746_307), (CONSISTENCY, 295_899_267)],
    ids=["google/ddpm-cifar10-32", "openai/diffusers-cd_imagenet64_l2"],
)
def test_published_configs(config, count):
    """DDPM's 35.7M (Ho et al. 2020, appendix B); consistency models have ADM's 295.9M without its variances."""
    a = unet.architecture(config)
    assert network(a).parameter_count() == count
    again = unet.architecture(unet.config_of(a))
    assert again == a
    with torch.device("meta"):
        theirs = diffusers.UNet2DModel(**{k: v for k, v in config.items() if not k.startswith("_")})
    assert count == sum(p.numel() for p in theirs.parameters())


@pytest.mark.parametrize(
    "change, words",
    [
        ({"down_block_types": ["SkipDownBlock2D", "AttnSkipDownBlock2D"]}, ["SkipDownBlock2D", "NCSN++"]),
        ({"down_block_types": ["KDownBlock2D", "DownBlock2D"]}, ["KDownBlock2D have no equivalent", "AttnDownBlock2D"]),
        ({"down_block_types": ["UpBlock2D", "AttnDownBlock2D"]}, ["UpBlock2D have no equivalent"]),
        ({"block_out_channels": [16]}, ["differ in length"]),
        ({"up_block_types": ["UpBlock2D", "UpBlock2D"]}, ["levels [1] on the way down and [] on the way up"]),
        ({"downsample_type": "resnet", "down_block_types": ["AttnDownBlock2D", "AttnDownBlock2D"],
          "up_block_types": ["AttnUpBlock2D", "AttnUpBlock2D"]}, ["downsample_type='resnet'", "upsample_type='conv'"]),
        ({"class_embed_type": "timestep", "act_fn": "elu"}, ["class_embed_type='timestep'", "act_fn='elu'", "'mish'"]),
        ({"time_embedding_type": "learned"}, ["time_embedding_type='learned'", "'positional'"]),
        ({"sample_size": None}, ["sample_size=None", "config.json"]),
        ({"out_channels": 4}, ["out_channels=4 of in_channels=3"]),
        ({"attention_head_dim": 5}, ["attention_head_dim=5", "32 channels"]),
        ({"downsample_padding": 2}, ["downsample_padding=2, where 0 or 1"]),
        ({"norm_num_groups": None}, ["norm_num_groups=None", "a number"]),
        ({"mid_block_type": "UNetMidBlock2DCrossAttn"}, ["mid_block_type='UNetMidBlock2DCrossAttn'"]),
        ({"window_size": 7}, ["window_size=7 is a field that is not known here"]),
    ],
)  # fmt: skip
def test_what_no_unet_of_ours_can_be(change, words):
    config = {**unet2d.SMALL, "sample_size": 8, **change}
    with pytest.raises(UserError) as error:
        unet.architecture(config)
    message = str(error.value)
    assert "\n" not in message and all(word in message for word in words), message


def test_fields_without_effect_are_passed_over():
    config = {**unet2d.SMALL, "sample_size": 8, "some_old_flag": False, "_name_or_path": "x"}
    assert unet.architecture(config).shape == (8, 8, 3)


@pytest.mark.parametrize(
    "options, words",
    [
        ({"patch": 2, "time_embedding": "fourier"}, ["patch=2", "time_embedding='fourier'"]),
        ({"norm_groups": 32}, ["norm_groups=32", "16", "divides"]),
        (
            {"heads": 2, "head_channels": 0, "attention_levels": (0, 1)},
            ["heads=2 of different widths", "head_channels"],
        ),
        ({"resample_conv": False}, ["resample_conv=False"]),
        ({"stem_channels": 8}, ["stem_channels=8"]),
        ({"multipliers": (2, 2)}, ["channels=16", "first level of 32"]),
        ({"middle_norm_groups": -1}, ["middle_norm_groups=-1"]),
        ({"downsample_padding": (1, 0)}, ["downsample_padding=(1, 0)"]),
    ],
)
def test_what_diffusers_has_not(options, words):
    with pytest.raises(UserError) as error:
        unet.config_of(ours(**options))
    message = str(error.value)
    assert "\n" not in message and all(word in message for word in words), message


@pytest.mark.parametrize(
    "change, words",
    [
        (lambda s: {k: v for k, v in s.items() if k != "conv_in.bias"}, ["1 missing: conv_in.bias"]),
        (lambda s: s | {"mid_block.attentions.0.rel": s["conv_in.bias"]}, ["1 unknown: mid_block.attentions.0.rel"]),
        (lambda s: s | {"conv_in.weight": s["conv_in.weight"][:, :2]}, ["1 of another shape: conv_in.weight"]),
    ],
)
def test_weights_that_do_not_fit(change, words):
    state = change(compare.state_of(unet2d.make("ddpm")))
    a = unet.architecture(dict(unet2d.make("ddpm").config))
    with pytest.raises(UserError) as error:
        weights.load(unet.entries(a), compare.tensors_of(state), shapes("ddpm"), ignore=unet.ignore)
    assert all(word in str(error.value) for word in words)
