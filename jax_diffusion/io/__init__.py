"""Writing samples down."""

from jax_diffusion.io.images import (
    class_columns,
    grid,
    save_film,
    save_grid,
    save_npz,
    save_picture,
    scatter,
    side_by_side,
)

__all__ = ["class_columns", "grid", "save_film", "save_grid", "save_npz", "save_picture", "scatter", "side_by_side"]
