"""diffusers' schedulers in float64, where agreement is to rounding: they keep sigmas and states in float32."""

import types

import jax.numpy as jnp
import numpy as np
import pytest
import torch
from diffusers.schedulers import (
    scheduling_edm_euler,
    scheduling_euler_ancestral_discrete,
    scheduling_euler_discrete,
    scheduling_flow_match_heun_discrete,
    scheduling_heun_discrete,
    scheduling_k_dpm_2_ancestral_discrete,
    scheduling_k_dpm_2_discrete,
)

from .test_peers import BAR, INDICES, KEY, net, torch_net
from .toys import alpha_sigma, draws

# float64 on both sides; errors of 1e-15 relative to states of 160 (1 / alpha_T), carried down.
ROUNDING = {"rtol": 1e-8, "atol": 1e-9}
MODULES = [
    scheduling_edm_euler,
    scheduling_euler_ancestral_discrete,
    scheduling_euler_discrete,
    scheduling_flow_match_heun_discrete,
    scheduling_heun_discrete,
    scheduling_k_dpm_2_ancestral_discrete,
    scheduling_k_dpm_2_discrete,
]


class InFloat64(types.ModuleType):
    """torch or NumPy, with float64 where a peer asks for float32."""

    def __init__(self, module):
        super().__init__(module.__name__)
        self.module, self.float32 = module, module.float64

    def __getattr__(self, name):
        return getattr(self.module, name)


@pytest.fixture
def peers_in_float64(monkeypatch):
    for module in MODULES:
        monkeypatch.setattr(module, "torch", InFloat64(torch))
        if hasattr(module, "np"):
            monkeypatch.setattr(module, "np", InFloat64(np))


def scheduler(cls, steps, **options):
    peer = cls(beta_schedule="linear", beta_start=1e-4, beta_end=0.02, **options)
    peer.alphas_cumprod = torch.from_numpy(BAR)
    peer.set_timesteps(steps)
    assert peer.sigmas.dtype == torch.float64
    return peer


def inject(monkeypatch, peer, noises):
    """Every randn_tensor of the peer's module is the next of `noises`, [n, B, D]."""
    left = iter(noises)
    module = next(m for m in MODULES if m.__name__ == type(peer).__module__)
    monkeypatch.setattr(module, "randn_tensor", lambda *a, **k: torch.from_numpy(np.asarray(next(left), np.float64)))


def run(peer, x, network=torch_net):
    x = torch.from_numpy(x)
    for t in peer.timesteps:
        x = peer.step(network(peer.scale_model_input(x, t), t), t, x).prev_sample
    assert x.dtype == torch.float64
    return x.numpy()


def between(x, t):
    """test_peers.denoise, at times between the integers too."""
    a, s = alpha_sigma("linear")(t)
    return (x - s * net(x, t, jnp)) / a


def row_noises(table):
    """xi of every row, [rows, B, D]."""
    return np.asarray(draws(KEY, INDICES, len(table), (4,)), np.float64)
