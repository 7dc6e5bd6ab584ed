"""A residual MLP for points, [B, D]: toy distributions and tests."""

import jax
from flax import nnx

from jax_diffusion.models import layers
from jax_diffusion.models.network import Network, from_module


class Block(nnx.Module):
    def __init__(self, width: int, *, rngs: nnx.Rngs):
        self.norm = nnx.LayerNorm(width, rngs=rngs)
        self.embed = layers.dense(width, width, rngs=rngs)
        self.up = layers.dense(width, 2 * width, rngs=rngs)
        self.down = layers.dense(2 * width, width, zero=True, rngs=rngs)

    def __call__(self, x, emb):
        return x + self.down(jax.nn.silu(self.up(self.norm(x) + self.embed(emb))))


class MLP(nnx.Module):
    def __init__(self, *, rngs: nnx.Rngs, features, out_features, width, depth, num_classes):
        self.stem = layers.dense(features, width, rngs=rngs)
        self.time1 = layers.dense(width, width, rngs=rngs)
        self.time2 = layers.dense(width, width, rngs=rngs)
        self.label = nnx.Embed(num_classes + 1, width, rngs=rngs) if num_classes else None
        self.blocks = nnx.List([Block(width, rngs=rngs) for _ in range(depth)])
        self.norm = nnx.LayerNorm(width, rngs=rngs)
        self.head = layers.dense(width, out_features, zero=True, rngs=rngs)
        self.width, self.num_classes = width, num_classes

    def __call__(self, x, c_noise, cond, key):
        emb = layers.sinusoidal_embedding(c_noise, self.width)
        emb = self.time2(jax.nn.silu(self.time1(emb)))
        if self.label is not None:
            emb = emb + layers.embed_label(self.label, cond, len(c_noise), self.num_classes)
        emb, h = jax.nn.silu(emb), self.stem(x)
        for block in self.blocks:
            h = block(h, emb)
        return self.head(self.norm(h))


def mlp(
    shape: tuple[int],  # (D,)
    *,
    width: int = 128,
    depth: int = 4,
    num_classes: int = 0,
    learn_variance: bool = False,
    constrain=None,  # points need no activation sharding; taken for a uniform signature
) -> Network:
    """The MLP as a Network."""
    (features,) = shape
    return from_module(
        lambda rngs: MLP(
            rngs=rngs,
            features=features,
            out_features=features * (2 if learn_variance else 1),
            width=width,
            depth=depth,
            num_classes=num_classes,
        ),
        num_classes,
    )
