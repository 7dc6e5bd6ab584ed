"""Writing samples down."""

from jax_diffusion.io.images import grid, save_film, save_grid, save_npz, scatter

__all__ = ["grid", "save_film", "save_grid", "save_npz", "scatter"]
