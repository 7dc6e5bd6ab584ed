"""EDM's checkpoints: what a state dict tells of its network, the denoisers of table 1, and the way back."""

import functools

import jax
import numpy as np
import pytest

from jax_diffusion import experiment
from jax_diffusion.errors import UserError
from jax_diffusion.interop import edm, open_file
from jax_diffusion.interop import tensors as files

torch = pytest.importorskip("torch")

from peers import compare  # noqa: E402
from peers import edm as peer  # noqa: E402

SONG = {"model_channels": 16, "channel_mult": (1, 2), "num_blocks": 1, "attn_resolutions": (4,), "channel_mult_emb": 2}
NCSNPP = {"embedding_type": "fourier", "channel_mult_noise": 2, "encoder_type": "residual",
          "resample_filter": (1, 3, 3, 1)}  # fmt: skip
ADM = {"model_channels": 64, "channel_mult": (1,), "num_blocks": 1, "attn_resolutions": (8,)}
LABELS = 3
# preconditioning: their network's class and options, labels, noise levels
KINDS = {
    "edm": ("SongUNet", {**SONG, "augment_dim": 9}, LABELS, (0.002, 0.05, 0.9, 80.0)),
    "ve": ("SongUNet", {**SONG, **NCSNPP}, 0, (0.02, 0.5, 100.0)),
    "vp": ("SongUNet", {**SONG, "channel_mult": (1,)}, 0, (0.002, 0.1, 2.0, 80.0)),
    "iddpm": ("DhariwalUNet", ADM, LABELS, (0, 10, 500, 950)),  # indices of its levels, from none
}


@functools.cache
def original(kind):
    """Their preconditioned network with random weights."""
    cls, options, labels, _ = KINDS[kind]
    torch.manual_seed(0)
    net = getattr(peer, cls)(8, 3, 6 if kind == "iddpm" else 3, label_dim=labels, **options)
    return compare.randomize(peer.Precond(net, kind)).eval()


def tensors(kind):
    return compare.tensors_of(compare.state_of(original(kind)), "network.pt")


@functools.cache
def imported(kind):
    return edm.read(tensors(kind), precond=kind)


def levels(kind):
    """(their sigma, our times)."""
    process = experiment.build(imported(kind).config, (8, 8, 3), KINDS[kind][2]).process
    if kind == "iddpm":
        steps = np.array(KINDS[kind][3])
        return original(kind).u.numpy()[999 - steps], steps.astype(np.float32)
    sigma = np.array(KINDS[kind][3], np.float32)
    return sigma, process.schedule.inverse(-2 * np.log(sigma.astype(np.float64))).astype(np.float32)


@functools.cache
def denoised(kind):
    """x, theirs and ours, [levels, H, W, C]."""
    found, labels = imported(kind), KINDS[kind][2]
    parts = experiment.build(found.config, found.shape, labels)
    sigma, t = levels(kind)
    rng = np.random.default_rng(0)
    x = rng.standard_normal((len(t), 8, 8, 3)).astype(np.float32) * np.sqrt(0.25 + sigma**2)[:, None, None, None]
    label = np.arange(len(t)) % (labels + 1)  # the last is "no label"
    hot = torch.tensor(np.eye(labels + 1, dtype=np.float32)[label][:, :labels]) if labels else None
    with torch.no_grad():
        theirs = original(kind)(torch.tensor(x.transpose(0, 3, 1, 2)), torch.tensor(sigma), hot)

    @jax.jit
    def run(params, x, t):
        alpha, _ = parts.process.schedule.alpha_sigma(t)
        x_t = alpha[:, None, None, None] * x  # theirs are in the frame where alpha is 1
        inputs, c_noise = parts.process.network_inputs(x_t, t)
        cond = {"label": label.astype(np.int32)} if labels else {}
        return parts.process.denoised(parts.network.apply(params, inputs, c_noise, cond), x_t, t)

    return x, theirs.numpy().transpose(0, 2, 3, 1), np.asarray(run(found.params, x, t))


@pytest.mark.parametrize("kind", KINDS)
def test_same_denoiser(kind):
    x, theirs, ours = denoised(kind)
    for one, other in zip(ours, theirs, strict=True):
        assert compare.relative(one, other) < 2e-5
    assert compare.relative(theirs[-1], x[-1]) > 0.2  # the network has a part in it


def test_recipe():
    """What EDM samples with: 18 steps of Heun, 35 evaluations, from 80 to 0.002 by eq. 5."""
    config, found = imported("edm").config, imported("edm")
    parts = experiment.build(config, found.shape, LABELS)
    table = experiment.default_table(config, parts.process)
    i = np.arange(18)
    sigma = (80 ** (1 / 7) + i / 17 * (0.002 ** (1 / 7) - 80 ** (1 / 7))) ** 7
    assert len(table.t) == 35
    np.testing.assert_allclose(np.unique(table.t)[::-1], sigma, rtol=1e-5)
    assert (config.process.prediction, config.process.sigma_data, config.sampling.clip) == ("edm", 0.5, False)
    assert found.class_names == ("0", "1", "2") and found.shape == (8, 8, 3)


@pytest.mark.parametrize("kind", KINDS)
def test_written_back_bit_for_bit(kind, tmp_path):
    found = imported(kind)
    model = found.config.model.to_dict()
    a = edm.Architecture(model, found.shape, KINDS[kind][2], kind == "iddpm")
    files.save(tmp_path / "net.safetensors", edm.write(a, found.params))
    back = open_file(tmp_path / "net.safetensors")
    theirs = {k: v.numpy() for k, v in original(kind).state_dict().items() if k != "u"}
    assert set(back) == set(theirs) - {n for n in theirs if "map_augment" in n and model["name"] == "unet"}
    for name in back:
        np.testing.assert_array_equal(back[name], theirs[name])


PUBLISHED = {  # as EDM's train.py makes them
    "cifar10-cond-vp": ("SongUNet", 32, {"label_dim": 10, "augment_dim": 9, "channel_mult": (2, 2, 2)}),
    "ffhq-ve": ("SongUNet", 64, {"augment_dim": 9, "channel_mult": (1, 2, 2, 2), **NCSNPP}),
    "imagenet-adm": ("DhariwalUNet", 64, {"label_dim": 1000}),
}
TOLD = {
    "cifar10-cond-vp": {"name": "song_unet", "multipliers": (2, 2, 2), "blocks": 4, "attention_levels": (1,),
                        "time_embedding": "sinusoidal", "encoder": "standard", "resample_filter": (1, 1),
                        "augment_dim": 9, "noise_width": 1, "decoder": "standard"},
    "ffhq-ve": {"name": "song_unet", "multipliers": (1, 2, 2, 2), "blocks": 4, "attention_levels": (2,),
                "time_embedding": "fourier", "encoder": "residual", "resample_filter": (1, 3, 3, 1),
                "augment_dim": 9, "noise_width": 2, "decoder": "standard"},
    "imagenet-adm": {"name": "unet", "multipliers": (1, 2, 3, 4), "blocks": 3, "attention_levels": (1, 2, 3),
                     "channels": 192, "head_channels": 64, "scale_shift": True, "resblock_updown": True},
}  # fmt: skip


@pytest.mark.parametrize("name", PUBLISHED)
def test_names_and_shapes_tell_the_network(name):
    cls, size, options = PUBLISHED[name]
    with torch.device("meta"):
        net = peer.Precond(getattr(peer, cls)(size, 3, 3, **options))
    shapes = {k: tuple(v.shape) for k, v in net.state_dict().items()}
    taps = np.array(options.get("resample_filter", (1, 1)), np.float32)
    read = {k: (np.outer(taps, taps) / taps.sum() ** 2)[None, None] for k in shapes if k.endswith("resample_filter")}
    found = files.Tensors("network.pt", shapes, read.__getitem__)  # nothing else may be read
    assert edm.matches(found)
    a = edm.describe(found)
    assert {k: a.model[k] for k in TOLD[name]} == TOLD[name]
    assert (a.shape, a.num_classes, a.learn_variance) == ((size, size, 3), options.get("label_dim", 0), False)
    theirs = [t for entry in edm.entries(a) for t in entry.theirs]
    assert sorted(theirs) == sorted(k for k in shapes if not k.endswith("resample_filter"))


def without(kind, *gone, **more):
    state = {k: v for k, v in compare.state_of(original(kind)).items() if k not in gone}
    return compare.tensors_of({**state, **more}, "network.pt")


BLOCK = "model.enc.8x8_block0.conv1.weight"


@pytest.mark.parametrize(
    ("state", "options", "said"),
    [
        (lambda: without("edm", BLOCK), {}, rf"1 missing: {BLOCK}"),
        (lambda: without("edm", spare=np.zeros(3)), {}, "1 unknown: spare"),
        (lambda: without("edm", **{BLOCK: np.zeros((16, 8, 3, 3), np.float32)}), {}, "1 of another shape"),
        (lambda: without("edm", **{BLOCK: np.full((16, 16, 3, 3), np.nan)}), {}, "1 not finite"),
        (lambda: without("edm", "model.enc.8x8_conv.weight"), {}, "lacks model.enc.8x8_conv.weight"),
        (lambda: without("edm"), {"precond": "vpp"}, "did you mean 'vp'"),
        (lambda: without("edm"), {"precond": "iddpm"}, "'u', which this file lacks"),
        (lambda: without("edm"), {"precond": "ve"}, "without a Fourier embedding"),
        (lambda: without("iddpm"), {"precond": "edm"}, "twice as many channels"),
        (lambda: without("ve", **{"model.enc.4x4_down.conv0.resample_filter": np.ones((1, 1, 4, 4), np.float32)}), {},
         "none of the filters"),
    ],
)  # fmt: skip
def test_misfits(state, options, said):
    with pytest.raises(UserError, match=said):
        edm.read(state(), **options)


def test_unwritable():
    model = {**edm.describe(tensors("edm")).model, "heads": 2}
    with pytest.raises(UserError, match=r"heads=2 \(there 1\), 8x12 pixels"):
        edm.write(edm.Architecture(model, (8, 12, 3)), {})
    with pytest.raises(UserError, match="'dit' has no equivalent"):
        edm.write(edm.Architecture({"name": "dit"}, (8, 8, 3)), {})


def test_told_apart():
    """Preconditioning is in no name but iddpm's, and the notes say what was taken."""
    assert edm.read(tensors("iddpm")).config.process.schedule.name == "cosine"
    assert "iddpm" in edm.read(tensors("iddpm")).notes[0]
    assert not edm.matches({"unet.enc.8x8_conv.weight": 0, "unet.emb_noise.weight": 0})  # EDM2's
