"""How good the samples are, measured against real data."""

from jax_diffusion.evals import frechet, judge

__all__ = ["frechet", "judge"]
