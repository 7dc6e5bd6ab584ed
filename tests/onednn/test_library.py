"""Where oneDNN is taken, that its programs are kept, and what is said where it is missing."""

import importlib.metadata
import os
import re
import subprocess
import sys
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jax_diffusion import convolution, lowering, onednn
from jax_diffusion.attention import attention
from jax_diffusion.cli import main
from jax_diffusion.models import layers, transformer
from jax_diffusion.onednn import library, operations
from jax_diffusion.plan import targets
from jax_diffusion.train import loop

needs_it = pytest.mark.skipif(bool(onednn.why_not()), reason=onednn.why_not())
CALL = re.compile(r'custom_call_target="jax_diffusion_onednn_(?!pack)')
NHWC = convolution.NHWC


@pytest.fixture
def small_ones_too(monkeypatch):
    monkeypatch.setattr(operations, "LEAST", dict.fromkeys(operations.LEAST, 0))
    monkeypatch.setattr(operations, "LEAST_PRODUCT", 0)


@pytest.fixture
def without(monkeypatch):
    """without(): the library is looked for anew, and again afterwards."""
    for cached in (library.load, library.why_not):
        cached.cache_clear()
    yield
    for cached in (library.load, library.why_not):
        cached.cache_clear()


def draw(*shape, dtype=jnp.float32):
    return jnp.asarray(np.random.default_rng(sum(shape)).standard_normal(shape), dtype)


def compiled(function, *arguments) -> str:
    return jax.jit(lambda *a: function(*a)).lower(*arguments).compile().as_text()


def calls(function, *arguments) -> int:
    """But those that bring kernels into oneDNN's layout."""
    return len(CALL.findall(compiled(function, *arguments)))


def convolve(x, kernel, strides=(1, 1), padding=((1, 1), (1, 1))):
    return convolution.convolve(x, kernel, strides, padding, dimension_numbers=NHWC)


@needs_it
def test_convolutions_are_taken_for_what_it_does_and_left_for_the_rest(small_ones_too):
    x, k = draw(2, 8, 8, 4), draw(3, 3, 4, 4)
    assert calls(convolve, x, k) == 1
    assert calls(jax.grad(lambda x, k: convolve(x, k).sum(), (0, 1)), x, k) == 2
    assert calls(lambda x, k: convolve(x, k, (2, 2)), x, k) == 0
    assert calls(lambda x, k: convolve(x, k, (1, 1), "SAME"), x, k) == 0
    assert calls(lambda x, k: convolve(x, k, (1, 1), ((3, 0), (1, 1))), x, k) == 0
    assert calls(convolve, x.astype(jnp.bfloat16), k.astype(jnp.bfloat16)) == 0
    with onednn.off():
        assert calls(convolve, x, k) == 0
        with onednn.off(False):
            assert calls(convolve, x, k) == 1
    with lowering.compiling_for("tpu"):
        assert calls(convolve, x, k) == 0
    with targets.tracing_for("cpu:1"):  # `plan` counts what XLA's own text says
        assert calls(convolve, x, k) == 0


@needs_it
def test_a_sampler_packs_a_kernel_once(small_ones_too):
    def sample(x, k):
        return jax.lax.fori_loop(0, 50, lambda _, x: jnp.tanh(convolve(x, k)), x)

    steps, _, once = compiled(sample, draw(2, 8, 8, 16), draw(3, 3, 16, 16)).partition("\nENTRY ")
    assert ("_onednn_pack" in steps, "_onednn_result" in steps) == (False, True)
    assert ("_onednn_pack" in once, "_onednn_result" in once) == (True, False)


@needs_it
def test_linear_layers_and_attention_are_taken(small_ones_too):
    x = draw(2, 5, 8)
    linear = layers.dense(8, 6, rngs=nnx.Rngs(0))
    assert calls(linear, x) == 1
    assert calls(jax.grad(lambda x: jnp.sum(linear(x) ** 2)), x) == 2
    half = layers.dense(8, 6, dtype=jnp.bfloat16, rngs=nnx.Rngs(0))
    assert calls(half, x) == 0
    q = draw(2, 5, 3, 8)
    assert calls(attention, q, q, q) == 2
    ours = jax.jit(lambda q: attention(q, q, q))(q)
    with onednn.off():
        assert calls(attention, q, q, q) == 0
    np.testing.assert_allclose(ours, jax.nn.dot_product_attention(q, q, q), atol=2e-6)


@needs_it
def test_small_ones_are_left_to_xla(monkeypatch):
    """Where a call costs more than it saves; of a convolution each of the three by itself."""
    x, k = draw(2, 8, 8, 4), draw(3, 3, 4, 4)
    flops = 2 * 2 * 8 * 8 * 3 * 3 * 4 * 4
    both = jax.grad(lambda x, k: jnp.sum(convolve(x, k) ** 2), (0, 1))
    for least, expected in (
        ((0, 0, 0), 3),
        ((flops + 1, 0, 0), 2),
        ((flops, flops + 1, flops), 2),
        ((flops + 1,) * 3, 0),
    ):
        monkeypatch.setattr(operations, "LEAST", dict(zip(operations.LEAST, least, strict=True)))
        assert calls(both, x, k) == expected
    for least, expected in ((2 * 128 * 4 * 36, 1), (2 * 128 * 4 * 36 + 1, 0)):
        monkeypatch.setattr(operations, "LEAST_PRODUCT", least)
        assert calls(layers.dot_rows, draw(128, 4), draw(4, 36)) == expected


@needs_it
def test_remat_of_dots_keeps_its_products_too(small_ones_too):
    """And computes what is between two of them again, not the products."""
    w = draw(8, 8)

    def block(x):
        return jnp.sum(layers.dot_rows(jnp.tanh(layers.dot_rows(jnp.tanh(x), w)), w))

    counted = lambda f: str(jax.make_jaxpr(jax.grad(f))(draw(4, 8))).count("onednn_product[")  # noqa: E731
    plain = counted(block)
    assert counted(jax.checkpoint(block, **transformer.REMAT["dots"])) == plain
    assert counted(jax.checkpoint(block, **transformer.REMAT["full"])) > plain


@needs_it
def test_its_programs_are_kept_and_read(tmp_path, small_ones_too):
    code = f"""
import jax, jax.numpy as jnp, numpy as np
from jax_diffusion import lowering, onednn, runtime
from jax_diffusion.onednn import operations
runtime.keep_compiled({str(tmp_path)!r})
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
before = runtime.compiled()
assert onednn.taken()
x, k = jnp.ones((2, 8, 8, 4)), jnp.ones((3, 3, 4, 4))
grads = lowering.jit(jax.grad(lambda x, k: operations.convolution(x, k, ((1, 1), (1, 1))).sum(), (0, 1)))(x, k)
print((runtime.compiled() - before).read, float(grads[0].sum()), float(grads[1].sum()))
"""
    said = [subprocess.run([sys.executable, "-c", code], capture_output=True, text=True) for _ in range(2)]
    assert [s.returncode for s in said] == [0, 0], said[0].stderr[-2000:] + said[1].stderr[-2000:]
    (read, *first), (again, *second) = (s.stdout.split() for s in said)
    assert int(read) == 0 < int(again) and first == second


def test_several_devices_have_xlas():
    """XLA cannot cut the operation over them."""
    code = "from jax_diffusion import onednn; print(onednn.taken())"
    env = {"XLA_FLAGS": "--xla_force_host_platform_device_count=2", "JAX_PLATFORMS": "cpu"}
    done = subprocess.run([sys.executable, "-c", code], env={**os.environ, **env}, capture_output=True, text=True)
    assert done.stdout.strip() == "False", done.stderr


@needs_it
def test_a_run_samples_what_it_does_without(run, tmp_path, capsys, monkeypatch, small_ones_too):
    """The command's option, on a trained network: the same digits but for rounding."""
    call, traced, outputs = library.call, [], []
    monkeypatch.setattr(library, "call", lambda *a, **k: traced.append(a) or call(*a, **k))
    for option in ("on", "off"):
        out, before = tmp_path / f"{option}.npz", len(traced)
        arguments = [f"--workdir={run.workdir}", "--num=4", "--steps=5", f"--npz={out}", f"--out={tmp_path}/x.png"]
        assert main.main(["sample", *arguments, f"--onednn={option}"]) == 0
        assert (len(traced) > before) == (option == "on")
        outputs.append(np.load(out)["arr_0"].astype(int))
    assert np.abs(outputs[0] - outputs[1]).max() <= 1  # of 256 grey levels
    capsys.readouterr()


def test_what_is_missing_is_said_in_a_line(without, monkeypatch, capsys):
    def files(name):
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "files", files)
    monkeypatch.setattr(sys, "platform", "linux")
    monkeypatch.setattr(library.platform, "machine", lambda: "x86_64")
    assert onednn.why_not() == 'onednn-cpu-gomp is not installed: pip install "jax_diffusion[cpu]"'
    assert not onednn.taken() and onednn.advice() == onednn.why_not()
    with onednn.off():
        assert onednn.advice() == ""
    assert main.main(["sample", "--workdir=w", "--onednn=on"]) == 2
    assert capsys.readouterr().err.strip() == f"jax-diffusion: error: --onednn=on: {onednn.why_not()}"


def test_training_says_what_is_missing(without, monkeypatch):
    monkeypatch.setattr(library, "exists", lambda: True)
    monkeypatch.setattr(library, "_file", _missing)
    monkeypatch.setattr(onednn, "exists", lambda: True)
    config = SimpleNamespace(train=SimpleNamespace(steps_per_dispatch=1, accumulate=1))
    lines: list[str] = []
    loop._compiler(SimpleNamespace(config=config, shape=(32, 32, 3)), lines.append)
    assert lines == ["note: without oneDNN, which trains faster on this processor: nothing is installed"]
    loop._compiler(SimpleNamespace(config=config, shape=(2,)), lines.append)
    assert len(lines) == 1


def _missing(*_):
    raise library.Missing("nothing is installed")


def test_on_other_machines_it_is_xlas(without, monkeypatch):
    monkeypatch.setattr(library.platform, "machine", lambda: "arm64")
    assert "arm64" in onednn.why_not() and not onednn.taken() and onednn.advice() == ""


@needs_it
def test_without_a_compiler_or_with_one_that_fails_it_is_xlas(without, monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))  # nothing was compiled before
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CXX", raising=False)
    assert onednn.why_not() == "there is no C++ compiler: install g++ or clang++, or set CXX"
    library.why_not.cache_clear()
    broken = tmp_path / "g++"
    broken.write_text("#!/bin/sh\necho 'product.cc:1: fatal error: nothing works' >&2\nexit 1\n")
    broken.chmod(0o755)
    assert onednn.why_not().endswith("g++ fails: product.cc:1: fatal error: nothing works")
    left = [path for path in (tmp_path / "cache").rglob("*") if path.is_file()]
    assert left == []
