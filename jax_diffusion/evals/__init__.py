"""How good the samples are, measured against real data."""

from jax_diffusion.evals import classifier, frechet, judge, pairs

__all__ = ["classifier", "frechet", "judge", "pairs"]
