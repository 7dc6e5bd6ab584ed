"""The networks that are compared. Each is a recipe with a few fields changed, so that what is timed is what trains.

Nothing here imports JAX or PyTorch: both workers read it.
"""

from collections.abc import Iterable
from typing import Any, NamedTuple

import numpy as np

from jax_diffusion import config as configs

MODES = ("train", "forward", "sample")
LATENT = (32, 32, 4)  # of a 256x256 picture


class Case(NamedTuple):
    """Batches are (on CPUs, on accelerators); a batch to train on, those to sample."""

    about: str
    recipe: str
    shape: tuple[int, int, int]
    classes: int
    fields: dict[str, Any]  # of config.model, beside the recipe's
    train_batch: tuple[int, int]
    sample_batches: tuple[tuple[int, ...], tuple[int, ...]]
    guidance: float = 1.0
    network: str = ""  # another one than the recipe's
    needs: tuple[str, ...] = ("diffusers",)  # packages of PyTorch's network


# PyTorch's network: 32 groups everywhere, and for DiT diffusers' two odd constants (interop/diffusers/dit.py).
_UNET = {"norm_groups": 32}
_DIT = {"frequency_shift": 1.0, "mlp_norm_eps": 1e-5}
_MANY = ((1, 16), (1, 16, 64, 256))
_LARGE = ((1,), (1, 4, 16, 64))

CASES = {
    "unet": Case("DDPM's U-Net for CIFAR-10, 35.7M", "cifar10_ddpm", (32, 32, 3), 0, _UNET, (16, 128), _MANY),
    "unet_half": Case("the same at half the width, 9.0M", "cifar10_ddpm", (32, 32, 3), 0, _UNET | {"channels": 64},
                      (16, 128), _MANY),
    "dit_s2": Case("DiT-S/2 on latents of 256x256, 32.9M", "imagenet256_dit_xl2", LATENT, 1000, _DIT | {"size": "S/2"},
                   (16, 256), ((1, 4), (1, 16, 64, 256)), guidance=1.5),
    "dit_xl2": Case("DiT-XL/2 on latents of 256x256, 674.8M", "imagenet256_dit_xl2", LATENT, 1000, _DIT, (2, 32),
                    _LARGE, guidance=1.5),
    "adm64": Case("ADM for ImageNet 64x64, 296M", "imagenet64_adm", (64, 64, 3), 1000, {"remat": False}, (2, 32),
                  _LARGE),
    "ddpm_pytorch": Case("denoising-diffusion-pytorch's own network at 32x32, 35.7M", "cifar10_ddpm", (32, 32, 3), 0,
                         {}, (16, 128), _MANY, network="linear_attention_unet",
                         needs=("denoising_diffusion_pytorch", "torchvision", "ema_pytorch")),
}  # fmt: skip


class Work(NamedTuple):
    """What one comparison is of; travels to the workers as JSON."""

    case: str
    mode: str
    batch: int
    dtype: str  # of matmuls and convolutions: float32, bfloat16
    sampler_steps: int
    overrides: tuple[str, ...] = ()  # --config.FIELD=VALUE

    @property
    def about(self) -> Case:
        return CASES[self.case]

    def same_network(self, other: "Work") -> bool:
        """Whether the two are of the same weights."""
        sampled = (self.mode == "sample") == (other.mode == "sample")  # jax_side.weights
        return sampled and self._replace(mode=other.mode, batch=other.batch) == other

    @property
    def convolves(self) -> bool:
        """Whether PyTorch's memory format matters."""
        return not self.case.startswith("dit")

    @property
    def in_pixels(self) -> bool:
        """Data is uint8 images; else latents, float32."""
        return self.about.shape[-1] == 3


def make_config(w: Work) -> configs.ConfigDict:
    """The recipe as both frameworks run it: a constant learning rate, DDIM on diffusers' grid."""
    case = w.about
    c = configs.resolve(case.recipe)
    if case.network:
        c.model = configs.network(case.network)
    c.model.update(**case.fields, dtype=w.dtype)
    c.optim.update(schedule="constant", warmup=0)
    c.train.update(batch_size=w.batch, accumulate=1, steps_per_dispatch=1)
    c.mesh.update(data=1, fsdp=1, tensor=1)
    options = {"use_clipped_model_output": False} if c.sampling.clip else {}
    grid = "leading"
    if w.case == "ddpm_pytorch":
        from jax_diffusion.interop.denoising_diffusion_pytorch import ddim_times

        # Its own trainer flips on the host, and its sampler has its own times and clipping.
        c.data.flip, options = False, {}
        grid = ",".join(map(str, ddim_times(1000, w.sampler_steps)))
        c.optim.b2 = 0.99
    c.sampling.update(solver="ddim", steps=w.sampler_steps, grid=grid, guidance=case.guidance)
    c.sampling.options = configs.ConfigDict(options)
    return configs.override(c, w.overrides) if w.overrides else c


def inputs(w: Work, batch: int) -> dict[str, np.ndarray]:
    """What both networks are shown: x [B, H, W, C] noise, t [B] and labels [B]; clean data x0 to train on, and the
    noise that the first comparison adds to it."""
    rng = np.random.default_rng(0)
    shape, classes = w.about.shape, w.about.classes
    x0 = rng.integers(0, 256, (batch, *shape), np.uint8) if w.in_pixels else rng.standard_normal((batch, *shape))
    return {
        "x": rng.standard_normal((batch, *shape)).astype(np.float32),
        "t": np.linspace(0, 999, batch + 1).astype(np.int32)[:batch],
        "label": rng.integers(0, max(classes, 1), batch).astype(np.int32),
        "x0": x0 if w.in_pixels else x0.astype(np.float32),
        "noise": rng.standard_normal((batch, *shape)).astype(np.float32),
    }


def tolerance(dtype: str, platform: str, mode: str) -> float:
    """The largest relative distance |a - b| / |b| of two outputs that are taken for the same network's.

    Matrix units round their inputs to 10 (TF32) or 8 bits (bfloat16); 50 steps of a solver add such errors up.
    """
    one = {"float32": 1e-4 if platform == "cpu" else 5e-3, "bfloat16": 3e-2}[dtype]
    return one * (5 if mode == "sample" and dtype == "float32" else 1)


def distance(a: np.ndarray, b: np.ndarray) -> float:
    """|a - b| / |b|, Euclidean over everything; infinite where the shapes differ or something is not finite."""
    if a.shape != b.shape or not (np.isfinite(a).all() and np.isfinite(b).all()):
        return float("inf")
    a, b = a.astype(np.float64), b.astype(np.float64)
    return float(np.linalg.norm(a - b) / max(float(np.linalg.norm(b)), 1e-30))


def default_batches(case: str, mode: str, accelerator: bool) -> Iterable[int]:
    c = CASES[case]
    return c.sample_batches[accelerator] if mode == "sample" else (c.train_batch[accelerator],)
