"""Where activations lie on a mesh, told to a network while it is traced."""

import contextlib
from collections.abc import Iterator

import jax
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec

from jax_diffusion import lowering, sharding


@contextlib.contextmanager
def tracing_for(mesh: Mesh) -> Iterator[None]:
    """What is traced within runs on `mesh`, wherever this process runs: networks choose their kernels by it."""
    with lowering.compiling_for(mesh.devices.flat[0].platform), jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
        yield


def traced_mesh() -> AbstractMesh | None:
    """The mesh of `tracing_for`; None outside of it, and where the caller has cut the arrays over it himself."""
    mesh = jax.sharding.get_abstract_mesh()
    ours = mesh.axis_names == sharding.AXES and all(kind == AxisType.Auto for kind in mesh.axis_types)
    return mesh if ours else None


class Constraint:
    """Where activations and weights lie inside a network; without a mesh it says nothing.

    Without it FSDP makes XLA split features, at three times the collectives (measured: 55 against 18 on a U-Net step).
    """

    def __init__(self, mesh: Mesh | None = None):
        self.mesh = None if mesh is None or mesh.size == 1 else mesh
        self.tensor = 1 if mesh is None else mesh.shape["tensor"]  # over how many devices heads and features are split

    def __call__(self, x: jax.Array) -> jax.Array:
        """Activations [B, ...] split by batch alone."""
        return self._batch(x, ())

    def features(self, x: jax.Array, axis: int) -> jax.Array:
        """Activations [B, ...] split by batch, and `axis` (heads, hidden features) over tensor."""
        return x if self.tensor == 1 else self._batch(x, (None,) * (axis - 1) + ("tensor",))

    def whole(self, x: jax.Array) -> jax.Array:
        """Activations [B, ...] of which a matmul over split features leaves partial sums or parts: all of each."""
        return x if self.tensor == 1 else self(x)

    def weight(self, w: jax.Array, axis: int | None = None) -> jax.Array:
        """A weight whole but for `axis`, over tensor: as a matmul of split features wants it."""
        if self.tensor == 1:
            return w
        spec = PartitionSpec() if axis is None else PartitionSpec(*(None,) * axis, "tensor")
        assert self.mesh is not None
        return jax.lax.with_sharding_constraint(w, NamedSharding(self.mesh, spec))

    def _batch(self, x: jax.Array, rest: tuple) -> jax.Array:
        # Odd batches (a lone sample) are left to XLA.
        if self.mesh is None or x.shape[0] % sharding.batch_shards(self.mesh):
            return x
        return jax.lax.with_sharding_constraint(x, NamedSharding(self.mesh, PartitionSpec(sharding.BATCH, *rest)))


UNCONSTRAINED = Constraint()
