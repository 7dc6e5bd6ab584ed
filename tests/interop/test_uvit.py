"""U-ViTs of the original repository: read, run and written back bit for bit."""

import jax
import numpy as np
import pytest

torch = pytest.importorskip("torch")

from peers import compare  # noqa: E402
from peers.uvit import UViT  # noqa: E402

from jax_diffusion import experiment, interop  # noqa: E402
from jax_diffusion.errors import UserError  # noqa: E402
from jax_diffusion.interop import Architecture  # noqa: E402
from jax_diffusion.interop import uvit as original  # noqa: E402

# name: what differs in the transcription; times shown to it for our c_noise of 10 and 900; schedule, guidance, clip
CASES = {
    "latents_discrete": ({"rows": 5, "conv": False}, (11.0, 901.0), ("scaled_linear", 1.4, False)),
    "pixels_continuous": ({"channels": 3}, (9.99, 899.1), ("vp", 1.0, True)),
}


def transcription(**options):
    torch.manual_seed(0)
    sizes = {"channels": 4, "width": 128, "depth": 2, "heads": 2, "patch": 2, "hidden": 64}
    return compare.randomize(UViT((4, 4), **(sizes | options)))


@pytest.mark.parametrize("name", CASES)
def test_read_run_and_written_back(name, tmp_path):
    options, times, settings = CASES[name]
    net = transcription(**options)
    torch.save(net.state_dict(), tmp_path / "nnet_ema.pth")
    found = interop.open_model(tmp_path / "nnet_ema.pth")
    c, classes = found.config, len(found.class_names)
    assert (c.process.schedule.name, c.sampling.guidance, c.sampling.clip) == settings
    assert classes == (4 if "rows" in options else 0)
    labels = np.array([1, 4], np.int32) if classes else None
    x = np.random.default_rng(0).standard_normal((2, *found.shape)).astype(np.float32)
    with torch.no_grad():
        given = [] if labels is None else [torch.tensor(labels)]
        theirs = net(torch.tensor(x.transpose(0, 3, 1, 2)), torch.tensor(times), *given).numpy()
    apply = jax.jit(experiment.build(c, found.shape, classes).network.apply)
    ours = apply(found.params, x, np.array([10.0, 900.0], np.float32), {"label": labels} if classes else {})
    assert compare.relative(ours, theirs.transpose(0, 2, 3, 1)) < 2e-5
    back = original.write(Architecture(c.model.to_dict(), found.shape, classes), found.params)
    state = compare.state_of(net)
    assert back.keys() == state.keys() and all(np.array_equal(back[k], state[k]) for k in state)


def test_imagenets_thousand_labels_leave_none_for_no_label():
    for rows, classes in ((1000, 1000), (1001, 1000)):
        arrays = compare.state_of(transcription(rows=rows))
        assert len(original.read(compare.tensors_of(arrays)).class_names) == classes


MISTAKES = {
    "text": (lambda a: {**a, "context_embed.weight": np.ones((2, 2), np.float32)}, {}, "conditioned on text"),
    "missing and unknown": (
        lambda a: {("norm3.bias" if k == "norm.bias" else k): v for k, v in a.items()},
        {},
        "1 missing: norm.bias; 1 unknown: norm3.bias",
    ),
    "not square": (lambda a: {**a, "pos_embed": a["pos_embed"][:, :4]}, {}, "3 positions of patches are no square"),
    "heads": (lambda a: a, {"heads": 3}, "model.heads=3"),
    "not finite": (lambda a: {**a, "norm.bias": a["norm.bias"] * np.nan}, {}, "1 not finite: norm.bias"),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_mistakes_are_said(name):
    change, options, said = MISTAKES[name]
    with pytest.raises(UserError, match=said):
        original.read(compare.tensors_of(change(compare.state_of(transcription()))), **options)
