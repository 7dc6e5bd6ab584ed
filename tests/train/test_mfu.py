"""The model's FLOPs against formulas, and what of the chip's peak they are; nothing is allocated or compiled."""

import json
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jax_diffusion import config as configs
from jax_diffusion import hardware, models, sharding
from jax_diffusion.train import flops, loop, program
from jax_diffusion.train.report import Meter

LATENT = (32, 32, 4)


def traced(network, shape, gradient, batch=1):
    params = jax.eval_shape(network.init, jax.random.key(0))
    x, t = jax.ShapeDtypeStruct((batch, *shape), jnp.float32), jax.ShapeDtypeStruct((batch,), jnp.float32)
    function = network.apply
    if gradient:
        function = jax.grad(lambda params, x, t: jnp.sum(network.apply(params, x, t)))
    return flops.count(jax.make_jaxpr(function)(params, x, t)) / batch


def convolution(size, k, cin, cout):
    return 2 * size**2 * k**2 * cin * cout


def ddpm_unet(channels, multipliers, blocks, attention, size, image=3):
    """FLOPs of a forward pass of the U-Net of Ho et al. 2020 by its description (appendix B), one image."""
    embedding, c, skips = 4 * channels, channels, [channels]
    total = convolution(size, 3, image, channels) + 2 * (channels * embedding + embedding**2)

    def attend(width):
        tokens = size**2
        return 4 * 2 * tokens * width**2 + 2 * 2 * tokens**2 * width

    def block(cin, cout):
        shortcut = convolution(size, 1, cin, cout) if cin != cout else 0
        return convolution(size, 3, cin, cout) + convolution(size, 3, cout, cout) + 2 * embedding * cout + shortcut

    for level, multiplier in enumerate(multipliers):
        for _ in range(blocks):
            total += block(c, channels * multiplier)
            c = channels * multiplier
            total += attend(c) if level in attention else 0
            skips.append(c)
        if level + 1 < len(multipliers):
            size //= 2
            total += convolution(size, 3, c, c)
            skips.append(c)
    total += 2 * block(c, c) + attend(c)
    for level in reversed(range(len(multipliers))):
        for _ in range(blocks + 1):
            total += block(c + skips.pop(), channels * multipliers[level])
            c = channels * multipliers[level]
            total += attend(c) if level in attention else 0
        if level:
            size *= 2
            total += convolution(size, 3, c, c)
    return total + convolution(size, 3, c, image)


@pytest.mark.parametrize("channels", [128, 64])
def test_unet_does_what_its_description_asks(channels):
    options = {"channels": channels, "multipliers": (1, 2, 2, 2), "blocks": 2, "attention_levels": (1,), "heads": 1}
    network = models.make("unet", (32, 32, 3), **options)
    forward = traced(network, (32, 32, 3), gradient=False)
    said = ddpm_unet(channels, options["multipliers"], 2, (1,), 32)
    assert forward == pytest.approx(said, rel=1e-3)
    if channels == 128:
        assert forward == pytest.approx(12.44e9, rel=2e-3)
        assert traced(network, (32, 32, 3), gradient=True) == pytest.approx(37.32e9, rel=5e-3)


def dit(width, depth, heads, patch, shape=LATENT, spare=2):
    """FLOPs of a forward pass of DiT (Peebles & Xie 2023), one image: 12 T D^2 multiply-adds of matrices a block, two
    T^2 D of attention and six D^2 of conditioning."""
    height, width_, channels = shape
    tokens, pixels = height * width_ // patch**2, patch**2 * channels
    block = 12 * tokens * width**2 + 2 * tokens**2 * width + 6 * width**2
    ends = tokens * pixels * width * (1 + spare) + 2 * width**2 + (256 + width) * width
    return 2 * (depth * block + ends)


SIZES = {"S/2": (384, 12, 6, 2, 12.11), "B/2": (768, 12, 12, 2, 46.0), "L/2": (1024, 24, 16, 2, 161.4),
         "XL/2": (1152, 28, 16, 2, 237.2)}  # fmt: skip


@pytest.mark.parametrize("size", SIZES)
def test_dit_does_what_its_formula_asks(size):
    *shape, giga = SIZES[size]
    network = models.make("dit", LATENT, size=size, num_classes=1000, learn_variance=True)
    forward = traced(network, LATENT, gradient=False)
    assert forward == pytest.approx(dit(*shape), rel=2e-3)
    assert forward == pytest.approx(giga * 1e9, rel=6e-3)
    assert traced(network, LATENT, gradient=True) == pytest.approx(3 * forward, rel=2e-3)


@pytest.fixture
def build(tiny):
    def make(*fields, model=None):
        config = tiny("digits", "train.batch_size=8")
        config.model = configs.network("dit", size="", width=32, depth=4, heads=2, patch=2) if model is None else model
        config = configs.override(config, [f"--config.{f}" for f in fields])
        return program.build(config, (8, 8, 1), 10, sharding.make_mesh())

    return make


def test_remat_does_not_count_as_the_models_work(build):
    works = {}
    for remat in ("none", "dots", "full"):
        built = build(f"model.remat={remat}")
        works[remat] = flops.of_step(built, built.trace())
    assert works["none"].model == works["none"].hardware
    assert works["dots"].model == works["full"].model == works["none"].model
    assert works["none"].hardware < works["dots"].hardware < works["full"].hardware
    assert works["full"].hardware == pytest.approx(4 / 3 * works["none"].model, rel=0.1)


def test_nor_does_that_of_a_unet(build):
    unet = configs.network("unet", channels=16, multipliers=(1,), attention_levels=(), blocks=1)
    plain, again = (build(f"model.remat={remat}", model=unet) for remat in (False, True))
    assert flops.of_step(again, again.trace()).model == flops.of_step(plain, plain.trace()).model
    assert flops.of_step(again, again.trace()).hardware > 1.2 * flops.of_step(plain, plain.trace()).hardware


def test_steps_in_one_dispatch_and_microbatches_do_the_same_work(build):
    one = build()
    work = flops.of_step(one, one.trace())
    three = build("train.steps_per_dispatch=3")
    assert flops.of_step(three, three.trace(steps=3), steps=3) == work
    parts = build("train.accumulate=4")
    assert flops.of_step(parts, parts.trace()).model == pytest.approx(work.model, rel=1e-3)


@pytest.mark.parametrize("kind, dtype, precision, tera", [
    ("TPU v5 lite", "bfloat16", None, 197), ("TPU v5 lite", "float32", None, 197),
    ("TPU v4", "bfloat16", "highest", 275), ("TPU v4", "float32", "highest", None),
    ("NVIDIA H100 80GB HBM3", "bfloat16", None, 989),
    ("NVIDIA H100 80GB HBM3", "float32", "default", 494.5), ("NVIDIA A100-SXM4-80GB", "float32", None, 156),
    ("cpu", "float32", None, None)])  # fmt: skip
def test_the_peak_is_that_of_the_chip_and_the_type(kind, dtype, precision, tera):
    got = flops.peak(kind, dtype, precision)
    assert (got is None) if tera is None else got == pytest.approx(tera * hardware.TERA)


def test_the_share_is_of_all_chips(tiny, monkeypatch):
    chips = types.SimpleNamespace(device_kind="TPU v4")
    s = types.SimpleNamespace(
        config=tiny("digits", "model.dtype=bfloat16"),
        mesh=types.SimpleNamespace(devices=np.array([[chips] * 4] * 2)),
    )
    assert loop._peak(s, False, print) == 8 * 275e12
    meter = Meter(total_steps=4, batch_size=2, flops_per_step=1e12, peak=8 * 275e12)
    said = {"loss": np.float32(1), "by_time": np.ones((2, 4)), "skipped": 0, "spikes": 0, "in_a_row": 0}
    meter.add(1, {k: np.asarray(v) for k, v in said.items()})
    (record,) = meter.flush(1, {"learning_rate": jnp.float32(0.5)})
    assert record.scalars["mfu"] == pytest.approx(record.scalars["flops_per_s"] / (8 * 275e12), rel=1e-9)
    assert record.scalars["learning_rate"] == 0.5 and f"MFU {record.scalars['mfu']:.1%}" in record.line


def test_a_cpu_has_a_share_where_its_matmuls_are_timed(tiny, tmp_path, monkeypatch):
    monkeypatch.setattr(flops, "measured_peak", lambda dtype: {"float32": 3e12}[dtype])
    config, lines = tiny("toy2d", "train.steps=20", "train.eval_every=0", "train.log_every=10"), []
    loop.train(config, tmp_path / "timed", measure_peak=True, log=lines.append)
    loop.train(config, tmp_path / "not", log=lines.append)
    timed, untimed = (
        [json.loads(line) for line in (tmp_path / name / "speed.jsonl").read_text().splitlines()]
        for name in ("timed", "not")
    )
    assert [r["mfu"] / r["flops_per_s"] for r in timed] == pytest.approx([1 / 3e12] * 2)
    assert not any("mfu" in r for r in untimed)
    assert any("measured: matmuls of float32 at 3 TFLOP/s" in line for line in lines)


def test_a_matmul_can_be_timed():
    assert 1e8 < flops.measured_peak("float32", size=128) < 1e16
