"""The DiT is that of diffusers, and that of the original, whose transcription also takes oblong samples; SiT's too."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

torch = pytest.importorskip("torch")
diffusers = pytest.importorskip("diffusers")

from peers import compare  # noqa: E402
from peers.dit import DiT  # noqa: E402

from jax_diffusion import models, process, schedules  # noqa: E402
from jax_diffusion.interop import dit as original  # noqa: E402
from jax_diffusion.interop.diffusers import dit as huggingface  # noqa: E402

CLASSES = 4
T = [0.0, 17.0, 999.0]
LABELS = [0, 3, CLASSES]

# name: what differs from diffusers' DiTTransformer2DModel
DIFFUSERS = {
    "learned_variance": {"in_channels": 4, "out_channels": 8, "sample_size": 8, "patch_size": 2},
    "patches_of_4": {"in_channels": 4, "sample_size": 8, "patch_size": 4, "norm_eps": 1e-3, "num_layers": 3},
    "one_head_grey_no_attention_bias": {
        "in_channels": 1,
        "sample_size": 6,
        "num_attention_heads": 1,
        "attention_head_dim": 24,
        "attention_bias": False,
    },
}
# name: sample shape; what differs in the transcription; in ours (remat and unroll must change nothing)
ORIGINAL = {
    "oblong": ((8, 12, 4), {"out": 8}, {"learn_variance": True, "remat": "full"}),
    "one_head_patches_of_4_no_null_label": (
        (8, 8, 3),
        {"out": 3, "heads": 1, "patch": 4, "hidden": 40, "rows": CLASSES},
        {"mlp_ratio": 40 / 32, "null_label": False, "unroll": 2},
    ),
    "sit": ((8, 4, 4), {"out": 8, "sit": True}, {"flow_to_data": True, "spare_channels": 4, "remat": "dots"}),
}


def random_diffusers(options, seed=0):
    """A DiT of diffusers' with random weights, one time and label embedding for all blocks as in published ones."""
    torch.manual_seed(seed)
    net = diffusers.DiTTransformer2DModel(
        **{
            "num_attention_heads": 2,
            "attention_head_dim": 16,
            "num_layers": 2,
            "num_embeds_ada_norm": CLASSES,
            **options,
        }
    )
    compare.randomize(net, seed)
    for block in net.transformer_blocks:
        block.norm1.emb.load_state_dict(net.transformer_blocks[0].norm1.emb.state_dict())
    return net.eval()


@functools.cache
def against_diffusers(name):
    net = random_diffusers(DIFFUSERS[name])
    a = huggingface.architecture(net.config)
    options = {k: v for k, v in a.model.items() if k != "name"}
    network = models.make("dit", a.shape, num_classes=a.num_classes, learn_variance=a.learn_variance, **options)
    return compare.differences(
        net,
        lambda net, x, t, y: net(x, timestep=t, class_labels=y).sample,
        network,
        huggingface.entries(a),
        shape=a.shape,
        t=T,
        labels=LABELS,
    )


def transcription(name):
    """(theirs, ours, our architecture)."""
    shape, theirs, ours = ORIGINAL[name]
    torch.manual_seed(0)
    common = {"width": 32, "depth": 2, "heads": 2, "patch": 2, "rows": CLASSES + 1, "hidden": 128}
    net = DiT(shape[:2], shape[2], **(common | theirs))
    compare.randomize(net)
    options = {"size": "", "width": 32, "depth": 2, "heads": net.blocks[0].attn.heads, "patch": net.patch, **ours}
    network = models.make("dit", shape, num_classes=CLASSES, **options)
    return net, network, original.Architecture({"name": "dit", **options}, shape, CLASSES)


def sit_in_our_time(net, x, t, y):
    """Our c_noise = 1000 t counts from data to noise, SiT's time from noise to data; the velocities are opposite."""
    return -net(x, 1 - t / 1000, y)


@functools.cache
def against_transcription(name):
    net, network, architecture = transcription(name)
    labels = LABELS if network.num_classes and net.y_embedder.embedding_table.num_embeddings > CLASSES else [0, 3, 1]
    return compare.differences(
        net,
        sit_in_our_time if net.sit else lambda net, x, t, y: net(x, t, y),
        network,
        original.entries(architecture),
        shape=architecture.shape,
        t=T,
        labels=labels,
        ignore=lambda name: name == "pos_embed",
    )


CASES = [*((against_diffusers, name) for name in DIFFUSERS), *((against_transcription, name) for name in ORIGINAL)]


@pytest.mark.parametrize("against, name", CASES, ids=lambda v: v if isinstance(v, str) else v.__name__)
def test_same_output_and_gradients(against, name):
    found = against(name)
    assert found.pop("output") < 2e-5
    assert len(found) > 12  # of the input and of every parameter
    assert {k: v for k, v in found.items() if not v < 1e-4} == {}


def test_sit_is_a_velocity_on_our_flow_schedule():
    """A SiT that is exact for one data point x0, v = x0 - eps, denoises to that x0 through our process."""
    flow = process.make(schedules.make("flow"), "flow")
    x0, eps = np.random.default_rng(0).standard_normal((2, 3, 4, 4, 1)).astype(np.float32)
    t = jnp.array([0.1, 0.5, 0.9])
    x_t, c_noise = flow.network_inputs(x0 + (eps - x0) * t[:, None, None, None], t)
    tau = 1 - c_noise / 1000  # SiT's own time, and its path t x0 + (1 - t) eps
    assert np.allclose(x_t, tau[:, None, None, None] * x0 + (1 - tau[:, None, None, None]) * eps, atol=1e-6)
    ours = -(x0 - eps)  # what flow_to_data makes of SiT's prediction
    assert np.allclose(flow.denoised(ours, x_t, t), x0, atol=1e-5)


# Peebles & Xie 2023, table 4, in millions, and exactly: facebookresearch/DiT's own parameters less its position
# embedding, which is a constant here.
COUNTS = {"S/2": (33, 32_865_056), "B/2": (130, 130_315_808), "L/2": (458, 457_840_672), "XL/2": (675, 674_834_720),
          "XL/4": (675, 675_000_704), "XL/8": (676, 675_664_640)}  # fmt: skip


@pytest.mark.parametrize("size", COUNTS)
def test_published_number_of_parameters(size):
    network = models.make("dit", (32, 32, 4), size=size, num_classes=1000, learn_variance=True)
    millions, exactly = COUNTS[size]
    assert network.parameter_count() == exactly and round(exactly / 1e6) == millions


def random_params(network, scale=0.1):
    """NumPy's: nothing is compiled."""
    rng = np.random.default_rng(0)
    shapes = jax.eval_shape(network.init, jax.random.key(0))
    return jax.tree.map(lambda s: (scale * rng.standard_normal(s.shape)).astype(np.float32), shapes)


def test_what_is_kept_for_the_backward_pass():
    """Without remat the attention weights [T, T] of every block; with "dots" matmuls alone, with "full" none."""
    shape, small = (8, 8, 1), {"size": "", "width": 24, "depth": 3, "heads": 2, "patch": 1}
    network = models.make("dit", shape, **small)
    params = jax.eval_shape(network.init, jax.random.key(0))
    x, t = jnp.ones((1, *shape)), jnp.ones(1)

    def stored(remat):
        apply = models.make("dit", shape, remat=remat, **small).apply
        saved = jax.eval_shape(lambda p: jax.vjp(lambda p: apply(p, x, t), p)[1], params)
        shapes = [s.shape for s in jax.tree.leaves(saved)]
        hidden = {(3, 1, 64, 96), (3, 64, 96)}  # of all blocks, one sample's, as it is used or as a product's rows
        return any(s[-2:] == (64, 64) for s in shapes), not hidden.isdisjoint(shapes)

    assert stored("none") == (True, True)
    assert stored("dots") == (False, True)
    assert stored("full") == (False, False)


def test_starts_as_the_paper_says():
    """adaLN-Zero: each block is the identity and the output is zero; linear layers are Xavier-uniform."""
    network = models.make("dit", (8, 8, 4), size="", width=64, depth=3, heads=2, patch=2, num_classes=10)

    @jax.jit
    def run(key):
        params = network.init(key)
        return params, network.apply(params, jnp.ones((2, 8, 8, 4)), jnp.array([1.0, 2.0]), {})

    params, out = jax.tree.map(np.asarray, run(jax.random.key(0)))
    assert out.shape == (2, 8, 8, 4) and not out.any()
    qkv = params["stack"]["attention"]["qkv"]["kernel"]
    assert qkv.shape == (3, 64, 192) and not np.allclose(qkv[0], qkv[1])  # a key for each block
    bound = np.sqrt(6 / (64 + 192))
    assert 0.95 * bound < np.abs(qkv).max() <= bound and abs(qkv.std() - bound / np.sqrt(3)) < 0.02 * bound
    assert not params["stack"]["modulation"]["kernel"].any() and not params["head"]["kernel"].any()
    assert (
        abs(params["label"]["embedding"].std() - 0.02) < 0.002 and abs(params["time1"]["kernel"].std() - 0.02) < 0.002
    )


@pytest.mark.parametrize(
    "options, said",
    [
        ({"size": "XXL/2"}, "did you mean 'XL/2'"),
        ({"size": ""}, "model.width=0"),
        ({"patch": 3}, "patches of 3"),
        ({"heads": 5}, "model.heads=5"),
        ({"width": 6, "heads": 1}, "divide by 4"),
        ({"remat": "some"}, "model.remat='some'"),
    ],
)
def test_mistakes_are_said(options, said):
    with pytest.raises(ValueError, match=said):
        models.make("dit", (8, 8, 4), **options)


def test_bfloat16_stays_near_float32():
    shape, small = (8, 8, 4), {"size": "", "width": 64, "depth": 2, "heads": 2, "patch": 2}
    x, t = np.random.default_rng(1).standard_normal((2, *shape)).astype(np.float32), jnp.array([3.0, 700.0])

    @jax.jit
    def run(params):
        return [models.make("dit", shape, dtype=d, **small).apply(params, x, t) for d in ("float32", "bfloat16")]

    full, half = run(random_params(models.make("dit", shape, **small)))
    assert half.dtype == jnp.float32 and 0 < compare.relative(half, np.asarray(full)) < 0.03


def test_condition_image_and_labels_count():
    shape, small = (4, 4, 1), {"size": "", "width": 16, "depth": 1, "heads": 1, "patch": 2, "num_classes": 2}
    network = models.make("dit", shape, cond_channels=2, **small)
    params, x, t = random_params(network), jnp.ones((1, *shape)), jnp.ones(1)
    image, label = jnp.ones((1, 4, 4, 2)), jnp.array([1])

    @jax.jit
    def run(params):
        conds = [
            {"image": image},
            {"image": -image},
            {"image": image, "label": label},
            {"image": image, "label": label * 2},
        ]
        return [network.apply(params, x, t, cond) for cond in conds]

    plain, other, labelled, null = map(np.asarray, run(params))
    assert not np.allclose(plain, other) and not np.allclose(plain, labelled)
    assert np.array_equal(plain, null)  # the null label is index num_classes
