"""oneDNN's convolution beside XLA's and torch's, and where it is taken."""

import functools
import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from jax_diffusion import convolution, lowering
from jax_diffusion.cli import main

NHWC = convolution.NHWC
needs_it = pytest.mark.skipif(not convolution.available(), reason="no x86 CPU, several devices, or an unknown jaxlib")


@pytest.fixture(autouse=True)
def by_onednn(monkeypatch):
    monkeypatch.setattr(convolution, "LEAST", 0)  # small ones too
    # XLA cannot write down the programs, and warns.
    before = jax.config.jax_enable_compilation_cache
    jax.config.update("jax_enable_compilation_cache", False)
    with lowering.onednn():
        yield
    jax.config.update("jax_enable_compilation_cache", before)


def draw(*shape, dtype=jnp.float32):
    return jnp.asarray(np.random.default_rng(sum(shape)).standard_normal(shape), dtype)


def convolve(x, kernel, strides=(1, 1), padding=((1, 1), (1, 1))):
    return convolution.convolve(x, kernel, strides, padding, dimension_numbers=NHWC)


def program(x, kernel, *window):
    return jax.jit(lambda x, kernel: convolve(x, kernel, *window)).lower(x, kernel).compile().as_text()


@needs_it
@pytest.mark.parametrize(
    "shape, kernel, padding",
    [
        ((2, 8, 8, 16), (3, 3, 16, 32), ((1, 1), (1, 1))),
        ((3, 5, 7, 3), (3, 3, 3, 9), ((1, 1), (1, 1))),  # channels and sizes of no vector's length
        ((1, 6, 6, 8), (2, 2, 8, 8), ((1, 0), (0, 1))),  # of an upsampled image, by parity
        ((2, 9, 9, 4), (5, 3, 4, 1), ((2, 2), (0, 0))),
        ((17, 4, 5, 6), (1, 1, 6, 8), ((0, 0), (0, 0))),
    ],
)
def test_values_and_both_gradients_are_torchs(shape, kernel, padding):
    x, k = draw(*shape), draw(*kernel)
    y, back = jax.vjp(jax.jit(functools.partial(convolve, padding=padding)), x, k)
    gradient = draw(*y.shape)
    their_x = torch.tensor(np.asarray(x).transpose(0, 3, 1, 2), requires_grad=True)
    their_k = torch.tensor(np.asarray(k).transpose(3, 2, 0, 1), requires_grad=True)
    (top, bottom), (left, right) = padding
    theirs = torch.nn.functional.conv2d(torch.nn.functional.pad(their_x, (left, right, top, bottom)), their_k)
    theirs.backward(torch.tensor(np.asarray(gradient).transpose(0, 3, 1, 2)))
    expected = theirs.detach().permute(0, 2, 3, 1), their_x.grad.permute(0, 2, 3, 1), their_k.grad.permute(2, 3, 1, 0)
    for ours, other in zip((y, *back(gradient)), expected, strict=True):
        # The order of sums of up to 288 products (of up to 190 in the kernel's gradient, 340 of the last).
        np.testing.assert_allclose(ours, other, rtol=0, atol=1e-5 * float(other.abs().max()))


@needs_it
def test_derivatives_of_derivatives_are_xlas():
    """How the gradients of kernel and input change as both do."""
    x, k = draw(2, 6, 7, 4), draw(3, 2, 4, 5)

    def second():
        def first(x, k):
            return jax.grad(lambda *a: jnp.sum(convolve(*a, padding=((1, 1), (0, 1))) ** 3), (0, 1))(x, k)

        return jax.jit(jax.grad(lambda *a: sum(jnp.sum(g**2) for g in first(*a)), (0, 1)))(x, k)

    ours = second()
    with lowering.onednn(False):
        theirs = second()
    for a, b in zip(ours, theirs, strict=True):
        # The order of sums, four products one after another.
        np.testing.assert_allclose(a, b, rtol=0, atol=2e-6 * float(jnp.abs(b).max()))


@needs_it
def test_it_is_taken_for_what_it_does_and_left_for_the_rest():
    x, k = draw(2, 8, 8, 4), draw(3, 3, 4, 4)
    assert "__onednn$convolution" in program(x, k)
    assert "__onednn$convolution" in program(x, draw(1, 1, 4, 4), (1, 1), ((0, 0), (0, 0)))
    both = jax.jit(jax.grad(lambda x, k: convolve(x, k).sum(), (0, 1))).lower(x, k).compile().as_text()
    assert both.count('custom_call_target="__onednn$convolution"') == 2 and " convolution(" not in both
    plain = [
        (x, k, (2, 2)),
        (x.astype(jnp.bfloat16), k.astype(jnp.bfloat16)),
        (x, k, (1, 1), "SAME"),
    ]
    assert not any("__onednn" in program(*a) for a in plain)
    with lowering.onednn(False):
        assert "__onednn" not in program(x, k)
    with lowering.differentiable_forward():
        assert "__onednn" not in program(x, k)
        assert np.all(np.isfinite(jax.jvp(convolve, (x, k), (x, k))[1]))


@needs_it
def test_small_ones_are_xlas_and_the_gradients_of_their_kernels_are_not(monkeypatch):
    x, k = draw(2, 8, 8, 4), draw(3, 3, 4, 4)
    operations = 2 * 2 * 8 * 8 * 3 * 3 * 4 * 4
    for least, calls in ((operations, 2), (operations + 1, 1)):
        monkeypatch.setattr(convolution, "LEAST", least)
        traced = jax.jit(jax.value_and_grad(lambda k, x=x: (convolve(x, k) ** 2).sum())).lower(k)
        assert traced.compile().as_text().count('custom_call_target="__onednn$convolution"') == calls


@needs_it
def test_it_can_be_mapped_and_lowered_for_other_platforms():
    x, k = draw(3, 2, 8, 8, 4), draw(3, 3, 4, 4)
    np.testing.assert_allclose(jax.vmap(convolve, (0, None))(x, k)[1], convolve(x[1], k), atol=1e-5)
    lowered = jax.jit(convolve).trace(x[0], k).lower(lowering_platforms=("tpu",)).as_text()
    assert "stablehlo.convolution" in lowered and "onednn" not in lowered


def test_several_devices_have_xlas():
    """XLA cannot cut the operation over them."""
    code = "from jax_diffusion import convolution; print(convolution.available())"
    env = {"XLA_FLAGS": "--xla_force_host_platform_device_count=2", "JAX_PLATFORMS": "cpu"}
    done = subprocess.run([sys.executable, "-c", code], env={**os.environ, **env}, capture_output=True, text=True)
    assert done.stdout.strip() == "False", done.stderr


@needs_it
def test_products_are_its_too():
    a = draw(40, 30)
    compiled = lowering.jit(lambda a: a @ a.T, "cpu").lower(a).compile()
    assert "onednn_fusion" in compiled.as_text()
    np.testing.assert_allclose(compiled(a), np.asarray(a) @ np.asarray(a).T, rtol=1e-5, atol=1e-5)


@needs_it
def test_a_run_by_onednn_samples_what_another_does(run, tmp_path, capsys, monkeypatch):
    """The command's option, on a trained network: the same digits but for rounding."""
    call, traced, outputs = convolution._call, [], []
    monkeypatch.setattr(convolution, "_call", lambda *a: traced.append(a) or call(*a))
    for option in ("--onednn", "--compile_cache=off"):
        out, before = tmp_path / f"{option[2:6]}.npz", len(traced)
        arguments = [f"--workdir={run.workdir}", "--num=4", "--steps=5", f"--npz={out}", f"--out={tmp_path}/x.png"]
        with lowering.onednn(False):
            assert main.main(["sample", *arguments, option]) == 0
        assert (len(traced) > before) == (option == "--onednn")
        outputs.append(np.load(out)["arr_0"].astype(int))
    assert np.abs(outputs[0] - outputs[1]).max() <= 1  # of 256 grey levels
    capsys.readouterr()


def test_it_and_a_folder_for_programs_exclude_each_other(tmp_path, capsys):
    assert main.main(["train", "--config=digits", "--onednn", f"--compile_cache={tmp_path}", "--workdir=w"]) == 2
    assert "with --onednn no program can be kept" in capsys.readouterr().err
