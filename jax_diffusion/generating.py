"""The compiled programs that draw samples, and how their result leaves the devices."""

from collections.abc import Callable

import jax

from jax_diffusion import caching, editing, lowering
from jax_diffusion.guidance import model as guiding
from jax_diffusion.models import Network
from jax_diffusion.process import Gaussian
from jax_diffusion.solvers import sample, sample_keys
from jax_diffusion.solvers.sampling import prior


def make(network: Network, process: Gaussian, platform: str | None) -> Callable:
    """The one compiled function behind Model.sample. Solver, guidance scale, labels and seed are data.

    samples, shared: see guiding.denoiser.  start: {} from noise, {"x"} from a state, {"known", "mask"} inpainting.
    refreshes: bool [N], of a cache that keeps all but `depth` outer layers; None is no cache.
    """

    def generate(params, key, table, indices, samples, shared, start, refreshes=None, *, shape, clip, trajectory, weak,
                 depth=0):  # fmt: skip
        def denoiser(apply):
            return guiding.denoiser(apply, process, params, samples, shared, clipped=clip, weak=weak)

        denoise = denoiser(network.apply)
        if refreshes is not None:
            denoise = caching.remembering(network, denoiser, refreshes, depth)
        options = {"indices": indices, "trajectory": trajectory}
        if "known" in start:
            return editing.inpaint(key, denoise, table, process.schedule, **start, **options)
        return sample(key, denoise, table, shape, **start, **options)

    return lowering.jit(generate, platform, static_argnames=("shape", "clip", "trajectory", "weak", "depth"))


def make_portions(network: Network, process: Gaussian, platform: str | None = None) -> tuple[Callable, Callable]:
    """The same sampling, some rows of a table a call (streaming.py); arguments as of the function that `make` makes.

    begin(key, table, indices, start, *, shape) -> carry
    advance(params, key, table, indices, samples, shared, start, carry, count, *, clip) -> (carry, x0_hat [B, *shape])
    """

    def begin(key, table, indices, start, *, shape):
        keys = sample_keys(key, indices)
        if "known" in start:
            return table.begin(None, editing.inpainting_start(keys, table, process.schedule, **start))
        return table.begin(None, prior(keys, table, shape))

    def advance(params, key, table, indices, samples, shared, start, carry, count, *, clip):
        denoise = guiding.denoiser(network.apply, process, params, samples, shared, clipped=clip)
        if "known" in start:
            denoise = editing.replace_known(denoise, **start)
        return table.some(sample_keys(key, indices), denoise, carry, count)

    return (
        lowering.jit(begin, platform, static_argnames=("shape",)),
        lowering.jit(advance, platform, static_argnames=("clip",)),
    )


def gather(x):
    """Device arrays to NumPy; across processes, all parts."""
    if jax.process_count() > 1:
        from jax.experimental import multihost_utils

        return multihost_utils.process_allgather(x, tiled=True)
    return jax.device_get(x)
