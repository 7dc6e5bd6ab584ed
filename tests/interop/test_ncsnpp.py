"""diffusers' UNet2DModel with NCSN++'s blocks is our song_unet: outputs, gradients, configs and weights, both ways."""

import functools
import math

import jax
import numpy as np
import pytest

from jax_diffusion import config as configs
from jax_diffusion import experiment, models
from jax_diffusion.errors import UserError
from jax_diffusion.interop import imported, weights
from jax_diffusion.interop.diffusers import ncsnpp

torch = pytest.importorskip("torch")
diffusers = pytest.importorskip("diffusers")

from peers import compare  # noqa: E402

DOWN, ATTENDING = "SkipDownBlock2D", "AttnSkipDownBlock2D"
UP, ATTENDING_UP = "SkipUpBlock2D", "AttnSkipUpBlock2D"
COMMON = {"time_embedding_type": "fourier", "norm_eps": 1e-6, "mid_block_scale_factor": math.sqrt(2),
          "norm_num_groups": None, "layers_per_block": 1}  # fmt: skip
CONFIGS = {
    "one_head": {  # google/ncsnpp-*, smaller
        "sample_size": 8, "block_out_channels": (32, 64), "down_block_types": (DOWN, ATTENDING),
        "up_block_types": (ATTENDING_UP, UP), "attention_head_dim": None,
    },
    "oblong_centered": {
        "sample_size": (4, 8), "block_out_channels": (32, 48), "down_block_types": (DOWN, DOWN),
        "up_block_types": (UP, UP), "attention_head_dim": 16, "center_input_sample": True, "norm_num_groups": None,
        "dropout": 0.1,
    },
    "heads_at_full_resolution": {
        "sample_size": 4, "block_out_channels": (32, 32), "down_block_types": (ATTENDING, DOWN),
        "up_block_types": (UP, ATTENDING_UP), "attention_head_dim": 8, "time_embedding_dim": 64, "norm_num_groups": 8,
        "attn_norm_num_groups": 8,
    },
}  # fmt: skip
SIGMA = (0.4, 1.5, 5.0)  # the output is divided by it: of one size, or the largest alone would be compared
WATCHED = ("stem/kernel", "time1/kernel", "inputs/0/kernel", "heads/0/kernel", "down/0/norm2/scale",
           "middle/0/attention/(norm/scale|qkv/kernel)", "(shrink|grow)/0/shortcut/kernel",
           "up/3/norm1/bias")  # fmt: skip


@functools.cache
def original(name):
    torch.manual_seed(0)
    return compare.randomize(diffusers.UNet2DModel(**{**COMMON, **CONFIGS[name]})).eval()


def config(name, **changed):
    return {**original(name).config, **changed}


def network(a):
    return models.make(a.model["name"], a.shape, **{k: v for k, v in a.model.items() if k != "name"})


@functools.cache
def differences(name):
    a = ncsnpp.architecture(config(name))
    return compare.differences(
        original(name),
        lambda net, x, t, labels: net(x, t).sample,
        network(a),
        ncsnpp.entries(a),
        shape=a.shape,
        t=SIGMA,
        watch=WATCHED,
    )


@pytest.mark.parametrize("name", CONFIGS)
def test_same_output(name):
    assert differences(name)["output"] < 2e-5


@pytest.mark.parametrize("name", CONFIGS)
def test_same_gradients(name):
    found = differences(name)
    assert len(found) >= 10 and max(found.values()) < 1e-4, max(found, key=found.get)


@pytest.mark.parametrize("name", CONFIGS)
def test_config_and_weights_written_back(name):
    """diffusers makes the same network of the config that is written, and its weights are there bit for bit."""
    a = ncsnpp.architecture(config(name))
    written = ncsnpp.config_of(a)
    theirs = diffusers.UNet2DModel.from_config(written).state_dict()
    params = jax.eval_shape(network(a).init, jax.random.key(0))
    state = compare.state_of(original(name))
    back = weights.save(ncsnpp.entries(a), weights.load(ncsnpp.entries(a), compare.tensors_of(state), params))
    assert {k: v.shape for k, v in back.items()} == {k: tuple(v.shape) for k, v in theirs.items()}
    for key, value in back.items():
        np.testing.assert_array_equal(value, state[key])
    assert ncsnpp.architecture(written) == a


def test_older_names():
    state = compare.state_of(original("one_head"))
    old = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn", "time_proj.weight": "time_proj.W"}

    def renamed(name):
        return next((name.replace(new, before) for new, before in old.items() if new in name), name)

    assert {ncsnpp.rename(renamed(name)) for name in state} == set(state)
    assert sum(renamed(name) != name for name in state) > 8


def test_denoiser_of_images_in_0_to_1():
    """In a process of images x in [-1, 1] the network is shown y = (x + 1) / 2 at half the noise: x0_hat is
    2 y0_hat - 1."""
    process = {"schedule": configs.named("ve", sigma_min=0.01, sigma_max=50.0), "prediction": "score"}
    process["raw_inputs"] = True
    a, process = ncsnpp.in_our_range(ncsnpp.architecture(config("heads_at_full_resolution")), process)
    assert process["schedule"].to_dict() == {"name": "ve", "sigma_min": 0.02, "sigma_max": 100.0}
    parts = experiment.build(imported.make_config(a, process), a.shape, 0)
    params = weights.load(ncsnpp.entries(a), compare.tensors_of(compare.state_of(original("heads_at_full_resolution"))),
                          jax.eval_shape(parts.network.init, jax.random.key(0)))  # fmt: skip
    rng = np.random.default_rng(0)
    sigma = np.array([0.02, 1.0, 100.0], np.float32)
    x = rng.standard_normal((3, *a.shape)).astype(np.float32) * np.sqrt(0.25 + sigma**2)[:, None, None, None]
    t = parts.process.schedule.inverse(-2 * np.log(sigma.astype(np.float64))).astype(np.float32)

    @jax.jit
    def run(params, x, t):
        inputs, c_noise = parts.process.network_inputs(x, t)
        return parts.process.denoised(parts.network.apply(params, inputs, c_noise), x, t)

    y, s = torch.tensor((x.transpose(0, 3, 1, 2) + 1) / 2), torch.tensor(sigma / 2)
    with torch.no_grad():
        y0 = y + s[:, None, None, None] ** 2 * original("heads_at_full_resolution")(y, s).sample  # Tweedie
    for ours, theirs in zip(run(params, x, t), 2 * y0.numpy().transpose(0, 2, 3, 1) - 1, strict=True):
        assert compare.relative(ours, theirs) < 2e-5


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"down_block_types": (DOWN, "AttnDownBlock2D")}, "AttnDownBlock2D beside NCSN"),
        ({"up_block_types": (UP, UP)}, r"attention at levels \[1\] on the way down and \[\] on the way up"),
        ({"in_channels": 1}, "in_channels=1, where 3 can be read"),
        ({"norm_eps": 1e-5, "class_embed_type": "timestep"}, "norm_eps=1e-05.*class_embed_type='timestep'"),
        ({"norm_num_groups": 32}, "norm_num_groups=32, where 8 and 16"),
        ({"mid_block_scale_factor": 1}, "mid_block_scale_factor=1"),
        ({"attention_head_dim": 24}, "attention_head_dim=24 does not divide the 64"),
        ({"sample_size": None}, "write the images' size"),
        ({"time_embedding_type": "positional"}, "time_embedding_type='positional', where 'fourier'"),
        ({"weight_norm": True}, "weight_norm=True is a field that is not known"),
    ],
)
def test_misfits(changed, said):
    with pytest.raises(UserError, match=said):
        ncsnpp.architecture(config("one_head", **changed))


def test_unwritable():
    a = ncsnpp.architecture(config("one_head"))
    with pytest.raises(UserError, match=r"encoder='residual' \(there 'skip'\), group_rule='edm' at 64 channels"):
        ncsnpp.config_of(a._replace(model={**a.model, "encoder": "residual", "group_rule": "edm"}))
