"""State dicts of EDM2's: read by their shapes, written back bit for bit, and misfits said in one line."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jax_diffusion import config as configs
from jax_diffusion import experiment, interop
from jax_diffusion.errors import UserError
from jax_diffusion.interop import Tensors, edm2, weights

torch = pytest.importorskip("torch")

from peers import edm2 as peer  # noqa: E402

OPTIONS = {
    "model_channels": 8,
    "channel_mult": (1, 2),
    "num_blocks": 1,
    "attn_resolutions": (8,),
    "channels_per_head": 8,
}


def state(channels=3, label_dim=4, size=8, **options):
    torch.manual_seed(0)
    net = peer.Precond(size, channels, label_dim, **{**OPTIONS, **options})
    return {k: v.detach().numpy() for k, v in net.state_dict().items()}


def tensors(arrays):
    return Tensors("edm2.pt", {k: a.shape for k, a in arrays.items()}, arrays.__getitem__)


@pytest.fixture(scope="module")
def arrays():
    return state()


def test_it_is_recognised_by_names(arrays):
    assert edm2.matches(tensors(arrays)) and edm2.matches(dict.fromkeys(arrays))
    assert not edm2.matches({"model.map_noise.freqs": 0, "unet.conv_in.weight": 0})


@pytest.mark.parametrize(
    "options, said, shape",
    [
        ({}, {"channels": 8, "multipliers": (1, 2), "noise_multiplier": 1, "embedding_multiplier": 2, "blocks": 1,
              "attention_levels": (0,), "uncertainty": 128}, (8, 8, 3)),
        ({"channels": 4, "label_dim": 0, "size": 16, "channel_mult": (2, 3, 4), "num_blocks": 2, "attn_resolutions": (),
          "channel_mult_noise": 3, "channel_mult_emb": 5, "logvar_channels": 16},
         {"channels": 8, "multipliers": (2, 3, 4), "noise_multiplier": 3, "embedding_multiplier": 5, "blocks": 2,
          "attention_levels": (), "uncertainty": 16}, (16, 16, 4)),
    ],
)  # fmt: skip
def test_shapes_tell_the_network(options, said, shape):
    """Widths, if not the unit they were written in: 16, 24, 32 are 2, 3, 4 times 8."""
    a = edm2.architecture(tensors(state(**options)), head_channels=8)
    assert {k: a.model[k] for k in said} == said
    assert (a.shape, a.num_classes, a.model["null_label"]) == (shape, options.get("label_dim", 4), False)


def test_both_ways_move_the_same_bits(arrays):
    imported = edm2.read(tensors(arrays), head_channels=8)
    a = edm2.architecture(tensors(arrays), head_channels=8)
    back = weights.save(edm2.entries(a), imported.params)
    assert set(back) == set(arrays)
    for name, array in arrays.items():
        assert back[name].shape == array.shape, name
        np.testing.assert_array_equal(back[name], array, err_msg=name)


def test_the_config_is_complete(arrays):
    """It samples, and trained on it is EDM2's training of pixels."""
    imported = edm2.read(tensors(arrays), head_channels=8)
    c = imported.config
    assert configs.from_json(configs.to_json(c)).to_dict() == c.to_dict()
    assert c.process.timesteps.to_dict() == {"name": "log_normal", "mean": -0.8, "std": 1.6}
    assert (c.process.prediction, c.process.sigma_data, c.sampling.clip) == ("edm", 0.5, True)
    assert (len(imported.class_names), imported.ema, c.data.labels) == (4, None, True)
    parts = experiment.build(c, imported.shape, 4)
    assert experiment.default_table(c, parts.process).name.startswith("heun")
    assert jax.tree.map(jnp.shape, imported.params) == jax.tree.map(
        lambda a: a.shape, jax.eval_shape(parts.network.init, jax.random.key(0))
    )


def test_latents_are_not_clipped():
    imported = edm2.read(tensors(state(channels=4)), head_channels=8, sigma_data=0.7)
    assert not imported.config.sampling.clip and imported.config.process.sigma_data == 0.7
    assert imported.config.process.timesteps.to_dict() == {"name": "log_normal", "mean": -0.4, "std": 1.0}
    assert any("latents" in note for note in imported.notes)


@pytest.mark.parametrize("half", [False, True])
def test_from_a_file(arrays, tmp_path, half):
    """As torch.save leaves it; the published weights are of 16 bits."""
    to = (lambda a: torch.tensor(a).half()) if half else torch.tensor
    torch.save({k: to(a) for k, a in arrays.items()}, tmp_path / "edm2.pt")
    imported = interop.open_model(tmp_path / "edm2.pt", head_channels=8)  # the format is told by the names
    direct = edm2.read(tensors(arrays), head_channels=8)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-7), imported.params, direct.params)
    assert all(leaf.dtype == np.float32 for leaf in jax.tree.leaves(imported.params))


def without(*names):
    return lambda d: {k: v for k, v in d.items() if k not in names}


@pytest.mark.parametrize(
    "change, words",
    [
        (without("unet.dec.8x8_up.conv_res0.weight", "unet.out_gain"),
         ["2 missing", "unet.dec.8x8_up.conv_res0.weight", "unet.out_gain"]),
        (lambda d: {**d, "unet.enc.8x8_block0.norm.weight": np.ones(3)},
         ["1 unknown", "unet.enc.8x8_block0.norm.weight"]),
        (lambda d: {**d, "unet.dec.4x4_in1.conv_res0.weight": np.ones((16, 8, 3, 3))},
         ["1 of another shape", "unet.dec.4x4_in1.conv_res0.weight [16, 8, 3, 3]", "[3, 3, 16, 16]"]),
        (lambda d: {**d, "unet.out_gain": np.array(np.nan)}, ["1 not finite", "unet.out_gain"]),
        (without("unet.emb_noise.weight"), ["no whole EDM2 network", "unet.emb_noise.weight"]),
        (without("unet.enc.8x8_block0.conv_res0.weight"), ["no whole EDM2 network", "unet.enc.4x4_conv.weight"]),
        (lambda d: {k.replace("4x4", "5x5"): v for k, v in d.items()}, ["sizes [8, 5]", "halve"]),
        (lambda d: {**d, **{k.replace("8x8_block0", "8x8_block1"): v for k, v in d.items() if "enc.8x8_block0" in k}},
         ["[2, 1] blocks per level"]),
    ],
)  # fmt: skip
def test_misfits_are_said_in_one_line(arrays, change, words):
    with pytest.raises(UserError) as error:
        edm2.read(tensors(change(arrays)), head_channels=8)
    message = str(error.value)
    assert "\n" not in message and "edm2.pt" in message and all(w in message for w in words), message


@pytest.mark.parametrize("heads, words", [(64, "more than"), (5, "head_channels=5")])
def test_heads_that_cannot_be(arrays, heads, words):
    """The one thing that shapes do not tell is checked as far as they go."""
    with pytest.raises(UserError, match=words) as error:
        edm2.read(tensors(arrays), head_channels=heads)
    assert "\n" not in str(error.value) and f"head_channels={heads}" in str(error.value)
