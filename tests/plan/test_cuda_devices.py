"""NVIDIA GPUs that are not at hand: what XLA is told of them, and what a user is told where it cannot be."""

import re

import jax
import jax.numpy as jnp
import pytest
from jax._src.cudnn import fused_attention_stablehlo

from jax_diffusion import attention, hardware
from jax_diffusion.errors import UserError
from jax_diffusion.plan import cuda, targets


@pytest.mark.parametrize("name", cuda.ARCHITECTURES)
def test_xla_is_told_the_rates_and_the_memory_of_the_data_sheet(name):
    text, chip = cuda.target(name), hardware.CHIPS[name]
    told = {k: float(v) for k, v in re.findall(r"(\w+): ([\d.]+)", text)}
    assert told["memory_bandwidth"] == chip.bandwidth
    assert told["device_memory_size"] == int(chip.memory)
    # Tensor cores: 1,024 multiply-adds a clock and processor on Ampere, twice that on Hopper, again on Blackwell.
    per_clock = {8: 1024, 9: 2048, 10: 4096}[cuda.ARCHITECTURES[name].capability[0]]
    boost = told["core_count"] * told["clock_rate_ghz"] * 1e9 * per_clock * 2
    assert 0.85 < chip.bfloat16 / boost <= 1.01


def test_a_missing_plugin_is_said_in_one_line(monkeypatch):
    monkeypatch.setattr(cuda.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"h100:8.*pip install 'jax\[cuda13\]'"):
        cuda.devices("h100", 8)


def test_an_unknown_gpu_is_named():
    with pytest.raises(UserError, match="did you mean 'h100'"):
        cuda.devices("h10", 1)


def test_jax_must_not_start_the_plugin_itself(monkeypatch):
    monkeypatch.setattr(cuda.importlib.util, "find_spec", lambda name: object())
    monkeypatch.delenv("JAX_PLATFORMS", raising=False)
    with pytest.raises(UserError, match="JAX_PLATFORMS=cpu"):
        cuda.devices("a100", 1)


@pytest.mark.parametrize(("name", "width", "cudnn"), [("h100:1", 256, True), ("a100:1", 256, False),
                                                      ("a100:1", 128, True), ("h100:1", 12, False)])  # fmt: skip
def test_attention_is_traced_as_on_the_gpu(name, width, cudnn):
    """By the limits of cuDNN's manual: heads of up to 256 on Hopper, 128 before, multiples of 8."""
    # JAX keeps what it has traced: no two GPUs have the same shape here, as no process plans for both.
    q = jax.ShapeDtypeStruct((2 + list(cuda.ARCHITECTURES).index(name[:4]), 64, 1, width), jnp.bfloat16)
    before = dict(vars(fused_attention_stablehlo))
    with targets.tracing_for(name):
        traced = str(jax.make_jaxpr(attention.attention)(q, q, q))
    assert ("dot_product_attention_fwd" in traced) == cudnn
    assert dict(vars(fused_attention_stablehlo)) == before
