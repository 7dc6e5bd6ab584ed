"""The compiled program that draws samples, and how its result leaves the devices."""

from collections.abc import Callable

import jax

from jax_diffusion import caching, editing, lowering
from jax_diffusion.guidance import model as guiding
from jax_diffusion.models import Network
from jax_diffusion.process import Gaussian
from jax_diffusion.solvers import sample


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


def gather(x):
    """Device arrays to NumPy; across processes, all parts."""
    if jax.process_count() > 1:
        from jax.experimental import multihost_utils

        return multihost_utils.process_allgather(x, tiled=True)
    return jax.device_get(x)
