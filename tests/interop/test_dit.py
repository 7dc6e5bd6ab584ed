"""DiTs of diffusers', of the original repository and of SiT: read, run and written back bit for bit."""

import argparse
import functools

import jax
import numpy as np
import pytest

torch = pytest.importorskip("torch")
diffusers = pytest.importorskip("diffusers")

from peers import compare  # noqa: E402
from peers.dit import DiT  # noqa: E402

from jax_diffusion import experiment, interop  # noqa: E402
from jax_diffusion.errors import UserError  # noqa: E402
from jax_diffusion.interop import Architecture, tensors  # noqa: E402
from jax_diffusion.interop import dit as original  # noqa: E402
from jax_diffusion.interop.diffusers import dit as huggingface  # noqa: E402
from jax_diffusion.interop.diffusers import pipeline  # noqa: E402

CLASSES = 4


def architecture_of(imported):
    c = imported.config
    return Architecture(c.model.to_dict(), imported.shape, len(imported.class_names), c.process.learn_variance)


@functools.cache
def network_of(config_json, shape, classes):
    from jax_diffusion import config as configs

    return jax.jit(experiment.build(configs.from_json(config_json), shape, classes).network.apply)


def run(imported, params, x, t, label):
    """Our prediction, as [B, C, H, W]."""
    from jax_diffusion import config as configs

    apply = network_of(configs.to_json(imported.config), imported.shape, len(imported.class_names))
    out = apply(params, x.transpose(0, 2, 3, 1), np.asarray(t, np.float32), {"label": np.asarray(label, np.int32)})
    return np.asarray(out).transpose(0, 3, 1, 2)


@pytest.fixture(scope="module")
def diffusers_net():
    torch.manual_seed(0)
    net = diffusers.DiTTransformer2DModel(
        num_attention_heads=2, attention_head_dim=8, num_layers=2, num_embeds_ada_norm=CLASSES, in_channels=4,
        out_channels=8, sample_size=8,
    )  # fmt: skip
    compare.randomize(net)
    for block in net.transformer_blocks:
        block.norm1.emb.load_state_dict(net.transformer_blocks[0].norm1.emb.state_dict())
    return net.eval()


def test_diffusers_and_back(diffusers_net, tmp_path):
    diffusers_net.save_pretrained(tmp_path / "theirs")
    found = interop.open_model(tmp_path / "theirs")
    assert found.shape == (8, 8, 4) and len(found.class_names) == CLASSES and found.config.process.learn_variance
    x, t, label = np.random.default_rng(0).standard_normal((2, 4, 8, 8)).astype(np.float32), [3, 900], [1, CLASSES]
    with torch.no_grad():
        theirs = diffusers_net(torch.tensor(x), torch.tensor(t), torch.tensor(label)).sample.numpy()
    assert compare.relative(run(found, found.params, x, t, label), theirs) < 2e-5

    pipeline.write(tmp_path / "ours", architecture_of(found), found.config, found.params)
    again = diffusers.DiTTransformer2DModel.from_pretrained(tmp_path / "ours" / "transformer").eval()
    before, after = diffusers_net.state_dict(), again.state_dict()
    assert before.keys() == after.keys() and all(torch.equal(before[k], after[k]) for k in before)
    with torch.no_grad():
        assert np.array_equal(again(torch.tensor(x), torch.tensor(t), torch.tensor(label)).sample.numpy(), theirs)


def test_blocks_that_embed_differently_are_refused(diffusers_net):
    arrays = dict(compare.state_of(diffusers_net))
    name = "transformer_blocks.1.norm1.emb.timestep_embedder.linear_1.bias"
    arrays[name] = arrays[name] + 1
    a = huggingface.architecture(diffusers_net.config)
    with pytest.raises(UserError, match=r"linear_1.bias.* whose copies differ"):
        interop.imported.build(a, huggingface.entries(a), compare.tensors_of(arrays))


def test_the_older_name_is_known():
    """Fields as the published facebook/DiT-XL-2-256 has them."""
    config = {"_class_name": "Transformer2DModel", "attention_head_dim": 72, "num_attention_heads": 16,
              "num_layers": 28, "in_channels": 4, "out_channels": 8, "sample_size": 32, "patch_size": 2,
              "num_embeds_ada_norm": 1000, "norm_type": "ada_norm_zero", "norm_elementwise_affine": False,
              "activation_fn": "gelu-approximate",
              "attention_bias": True, "dropout": 0.0, "cross_attention_dim": None, "num_vector_embeds": None,
              "only_cross_attention": False, "upcast_attention": False, "use_linear_projection": False,
              "norm_num_groups": 32}  # fmt: skip
    a = huggingface.architecture(config)
    assert pipeline.component("Transformer2DModel", "").architecture is huggingface.architecture
    assert (a.shape, a.num_classes, a.learn_variance) == ((32, 32, 4), 1000, True)
    built = experiment.build(interop.imported.make_config(a), a.shape, a.num_classes)
    assert built.network.parameter_count() == 674_834_720  # less than the file's: its embeddings are there 28 times
    written = huggingface.config_of(a)
    assert written == {k: config.get(k, 1e-5) for k in written} and "norm_eps" in written


def test_every_misfit_of_a_config_is_named():
    with pytest.raises(UserError, match="norm_type='layer_norm'"):  # another transformer of that name
        huggingface.architecture({"_class_name": "Transformer2DModel"})
    odd = {"norm_type": "layer_norm", "cross_attention_dim": 768, "dropout": 0.1, "patch_size": 0, "out_channels": 5,
           "sliding_window": 3}  # fmt: skip
    with pytest.raises(UserError) as error:
        huggingface.architecture(odd)
    assert all(name in str(error.value) for name in odd)


def test_diffusers_has_not_every_dit():
    """The original's time embedding has other frequencies than diffusers': written there it would run, and be wrong."""
    a = huggingface.architecture({})
    for options, said in (({"frequency_shift": 0.0}, "frequency_shift"), ({"flow_to_data": True}, "flow_to_data")):
        with pytest.raises(UserError, match=said):
            huggingface.config_of(a._replace(model=a.model | options))
    with pytest.raises(UserError, match=r"only square.*, no labels"):
        huggingface.config_of(a._replace(num_classes=0, shape=(8, 16, 4)))


# The original


def transcription(seed=0, **options):
    torch.manual_seed(seed)
    sizes = {"width": 128, "depth": 2, "heads": 2, "patch": 2, "rows": CLASSES + 1, "hidden": 64, "out": 8}
    return compare.randomize(DiT((4, 4), 4, **(sizes | options)), seed)


def test_a_training_checkpoint_of_the_original(tmp_path):
    """Weights, averages, optimizer and options in one pickle, of which two are wanted."""
    nets = [transcription(seed) for seed in (0, 1)]
    optimizer = torch.optim.AdamW(nets[0].parameters())
    nets[0](torch.zeros(1, 4, 4, 4), torch.zeros(1), torch.zeros(1, dtype=int)).sum().backward()
    optimizer.step()
    saved = {"model": nets[0].state_dict(), "ema": nets[1].state_dict(), "opt": optimizer.state_dict(),
             "args": argparse.Namespace(model="DiT-XL/2")}  # fmt: skip
    torch.save(saved, tmp_path / "0000001.pt")
    found = interop.open_model(tmp_path / "0000001.pt")
    assert found.config.process.schedule.name == "linear" and found.config.process.learn_variance
    s = found.config.sampling
    assert (s.solver, s.steps, s.guidance, s.clip) == ("ddpm", 250, 4.0, False)
    assert any("taken for a DiT" in note for note in found.notes) and any("2 attention heads" in n for n in found.notes)

    x, t, label = np.random.default_rng(0).standard_normal((2, 4, 4, 4)).astype(np.float32), [3, 900], [1, CLASSES]
    for net, params in zip(nets, (found.params, found.ema), strict=True):
        with torch.no_grad():
            theirs = net(torch.tensor(x), torch.tensor(t, dtype=torch.float32), torch.tensor(label)).numpy()
        assert compare.relative(run(found, params, x, t, label), theirs) < 2e-5
        back, state = original.write(architecture_of(found), params), compare.state_of(net)
        assert back.keys() == state.keys() and all(np.array_equal(back[k], state[k]) for k in state)


def test_sit_by_its_name(tmp_path):
    net = transcription(sit=True)
    tensors.save(tmp_path / "SiT-tiny.safetensors", compare.state_of(net))
    found = interop.open_model(tmp_path / "SiT-tiny.safetensors")
    assert found.ema is None and found.config.process.prediction == found.config.process.schedule.name == "flow"
    assert found.config.model.spare_channels == 4 and not found.config.process.learn_variance
    x, t, label = np.random.default_rng(0).standard_normal((2, 4, 4, 4)).astype(np.float32), [30, 900], [1, CLASSES]
    with torch.no_grad():
        theirs = -net(torch.tensor(x), 1 - torch.tensor(t) / 1000, torch.tensor(label)).numpy()
    assert compare.relative(run(found, found.params, x, t, label), theirs) < 2e-5
    back, state = original.write(architecture_of(found), found.params), compare.state_of(net)
    assert all(np.array_equal(back[k], state[k]) for k in state)  # the half that is thrown away, too


def test_a_dit_is_no_sit_by_a_word_that_contains_it():
    arrays = compare.state_of(transcription())
    assert not original.read(compare.tensors_of(arrays, "position.pt")).config.model.flow_to_data
    assert original.read(compare.tensors_of(arrays, "position.pt"), sit=True).config.model.flow_to_data
    assert original.read(compare.tensors_of(arrays, "my_sit_2.pt")).config.model.flow_to_data


MISTAKES = {
    "another position embedding": (lambda a: {**a, "pos_embed": a["pos_embed"] + 1e-3}, {}, "pos_embed is not DiT's"),
    "an unknown and a missing tensor": (
        lambda a: {("blocks.0.attn.q_norm" if k == "blocks.1.attn.proj.bias" else k): v for k, v in a.items()},
        {},
        "1 missing: blocks.1.attn.proj.bias; 1 unknown: blocks.0.attn.q_norm",
    ),
    "no label left": (
        lambda a: {**a, "y_embedder.embedding_table.weight": a["y_embedder.embedding_table.weight"][:1]},
        {},
        "null_label=False",
    ),
    "a grid that is not square": (lambda a: {**a, "pos_embed": a["pos_embed"][:, :3]}, {}, "no square grid"),
    "a number of heads that does not divide": (lambda a: a, {"heads": 3}, "model.heads=3"),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_mistakes_are_said(name):
    change, options, said = MISTAKES[name]
    with pytest.raises(UserError, match=said):
        original.read(compare.tensors_of(change(compare.state_of(transcription()))), **options)


def test_the_original_has_not_every_dit():
    options = {"size": "", "width": 128, "depth": 2, "heads": 2, "patch": 2, "frequency_shift": 1.0}
    with pytest.raises(UserError, match=r"frequency_shift=1.0, samples of 4x8"):
        original.write(Architecture({"name": "dit", **options}, (4, 8, 4), CLASSES), {})
