"""A network of PyTorch's and ours on the same weights: outputs, and gradients of the same scalar."""

import pathlib
import re

import jax
import jax.numpy as jnp
import numpy as np
import torch

from jax_diffusion.interop import weights
from jax_diffusion.interop.tensors import Tensors


def randomize(net: torch.nn.Module, seed: int = 0) -> torch.nn.Module:
    """Moves every parameter off its initial value, so that what starts at zero or one counts."""
    noise = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in net.parameters():
            if p.requires_grad:
                p += 0.1 * torch.randn(p.shape, generator=noise)
    return net


def tensors_of(arrays: dict[str, np.ndarray], path: str = "net.pt") -> Tensors:
    """Arrays in memory as the Tensors of a file."""
    return Tensors(pathlib.Path(path), {k: a.shape for k, a in arrays.items()}, arrays.__getitem__)


def state_of(net: torch.nn.Module) -> dict[str, np.ndarray]:
    return {name: tensor.detach().numpy() for name, tensor in net.state_dict().items()}


def relative(a, b) -> float:
    """The largest difference in units of b's largest number."""
    return float(np.abs(np.asarray(a) - b).max() / np.abs(b).max())


def differences(
    net, forward, network, entries, *, shape, t, labels=None, ignore=lambda name: False, watch=None
) -> dict[str, float]:
    """{"output": ..., "input": ..., "each/parameter": ...}: relative differences of ours from theirs.

    forward(net, x [B, C, H, W], t, labels) -> theirs, [B, C', H, W]. The scalar is a random projection of the output.
    A parameter of ours that is several copies of theirs has the sum of their gradients.
    watch: patterns of the parameters of ours whose gradients are compared (each must meet one); None is all.
    """
    abstract = jax.eval_shape(network.init, jax.random.key(0))
    entries = list(entries)
    params = weights.load(entries, tensors_of(state_of(net)), abstract, ignore=ignore)

    rng = np.random.default_rng(0)
    t = np.asarray(t, np.float32)
    x = rng.standard_normal((len(t), *shape)).astype(np.float32)
    x_torch = torch.tensor(x.transpose(0, 3, 1, 2), requires_grad=True)
    y_torch = forward(net, x_torch, torch.tensor(t), None if labels is None else torch.tensor(labels))
    theirs = y_torch.detach().numpy().transpose(0, 2, 3, 1)
    direction = rng.standard_normal(theirs.shape).astype(np.float32)
    (y_torch * torch.tensor(direction.transpose(0, 3, 1, 2))).sum().backward()
    assert np.abs(theirs).max() > 0.1

    leaves = weights.flat(params)
    watched = [name for name in leaves if watch is None or any(re.fullmatch(pattern, name) for pattern in watch)]
    assert watch is None or all(any(re.fullmatch(pattern, name) for name in watched) for pattern in watch)

    @jax.jit
    def run(leaves, x):
        def scalar(some, x):
            params = weights.nested({**leaves, **some})
            cond = {} if labels is None else {"label": jnp.asarray(labels, jnp.int32)}
            out = network.apply(params, x, jnp.asarray(t), cond)
            return jnp.sum(out * direction), out

        gradients, out = jax.grad(scalar, argnums=(0, 1), has_aux=True)({k: leaves[k] for k in watched}, x)
        return out, gradients

    ours, (of_params, of_x) = run(leaves, x)
    found = {"output": relative(ours, theirs)}
    found["input"] = relative(of_x, x_torch.grad.numpy().transpose(0, 2, 3, 1))
    gradients, of_params = {k: p.grad for k, p in net.named_parameters()}, of_params
    for e in entries:
        # Buffers and frequencies are never trained.
        if e.ours not in of_params or any(gradients.get(name) is None for name in e.theirs):
            continue
        parts = [gradients[name].numpy() for name in e.theirs]
        if len(parts) > 1 and of_params[e.ours].size == parts[0].size:
            parts = [sum(parts)] * len(parts)
        found[e.ours] = relative(of_params[e.ours], e.layout.to_ours(parts))
    return found
