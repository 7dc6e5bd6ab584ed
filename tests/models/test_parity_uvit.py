"""The U-ViT is that of its transcription, which was held against the original repository's code."""

import functools

import pytest

torch = pytest.importorskip("torch")

from peers import compare  # noqa: E402
from peers.uvit import UViT  # noqa: E402

from jax_diffusion import models  # noqa: E402
from jax_diffusion.interop import Architecture  # noqa: E402
from jax_diffusion.interop import uvit as original  # noqa: E402

CLASSES = 4
T = [0.0, 17.0, 999.0]

# name: sample shape; what differs in the transcription; in ours (remat and unroll must change nothing)
CASES = {
    "unconditional": ((8, 8, 3), {}, {"unroll": 2}),
    "oblong_one_head_classes": (
        (4, 8, 4),
        {"heads": 1, "rows": CLASSES + 1, "conv": False, "qkv_bias": True, "hidden": 48},
        {"conv": False, "qkv_bias": True, "mlp_ratio": 1.5, "time_offset": 1.0, "remat": "dots"},
    ),
    "time_mlp_no_skip_patches_of_4": (
        (8, 8, 1),
        {"rows": CLASSES, "time_mlp": True, "skip": False, "patch": 4, "depth": 2},
        {"time_mlp": True, "skip": False, "null_label": False, "time_scale": 0.999, "remat": "full"},
    ),
}


@functools.cache
def both(name):
    shape, theirs, ours = CASES[name]
    torch.manual_seed(0)
    net = UViT(shape[:2], shape[2], **({"width": 32, "depth": 4, "heads": 2, "patch": 2, "hidden": 128} | theirs))
    compare.randomize(net)
    classes = CLASSES if "rows" in theirs else 0
    options = {"size": "", "width": 32, "depth": 2 * len(net.in_blocks), "heads": net.mid_block.attn.heads,
               "patch": net.patch, **ours}  # fmt: skip
    scale, offset = ours.get("time_scale", 1.0), ours.get("time_offset", 0.0)
    return compare.differences(
        net,
        lambda net, x, t, y: net(x, scale * t + offset, y),
        models.make("uvit", shape, num_classes=classes, **options),
        original.entries(Architecture(options, shape, classes)),
        shape=shape,
        t=T,
        labels=[0, 3, min(classes, theirs.get("rows", 0) - 1)] if classes else None,
    )


@pytest.mark.parametrize("name", CASES)
def test_same_output_and_gradients(name):
    found = dict(both(name))
    assert found.pop("output") < 2e-5
    assert len(found) > 12  # of the input and of every parameter
    assert {k: v for k, v in found.items() if not v < 1e-4} == {}


# Bao et al. 2023, table 1, in millions, and exactly: the original's own on those samples.
COUNTS = {
    "S/2": (44, 44_255_328, (32, 32, 3), {}),
    "M/4": (131, 130_940_292, (64, 64, 3), {"num_classes": 1000, "null_label": False}),
    "L/2": (287, 286_763_172, (32, 32, 4), {"num_classes": 1000}),
    "H/2": (501, 500_832_016, (32, 32, 4), {"num_classes": 1000, "conv": False}),
}


@pytest.mark.parametrize("size", COUNTS)
def test_published_number_of_parameters(size):
    millions, exactly, shape, options = COUNTS[size]
    network = models.make("uvit", shape, size=size, **options)
    assert network.parameter_count() == exactly and round(exactly / 1e6) == millions


@pytest.mark.parametrize(
    "options, said",
    [({"depth": 3}, "model.depth=3 is odd"), ({"size": "S/8"}, "did you mean"), ({"patch": 3}, "patches of 3")],
)
def test_mistakes_are_said(options, said):
    with pytest.raises(ValueError, match=said):
        models.make("uvit", (8, 8, 4), **options)
