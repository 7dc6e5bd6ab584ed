"""Imports peers whose dependencies are not installed.

`azula` and `denoising_diffusion_pytorch` are installed with --no-deps: their networks need torch and einops alone, but
their modules also import torchvision, accelerate and others at the top. Those get empty stand-ins for as long as the
import takes. They do not stay: diffusers would take an empty torchvision for a real one.

    from peers import stand_ins

    ddp = stand_ins.import_peer("denoising_diffusion_pytorch")
    adm = stand_ins.import_peer("azula.plugins.adm")
"""

import contextlib
import importlib
import importlib.util
import sys
import types

import pytest

ABSENT = ("torchvision", "accelerate", "gdown", "pytorch_fid", "ema_pytorch")
SUBMODULES = ("torchvision.transforms", "pytorch_fid.fid_score", "pytorch_fid.inception")


class _StandIn(types.ModuleType):
    """Any name imported from it is None."""

    __path__ = ()

    def __getattr__(self, name: str):
        if name.startswith("__"):
            raise AttributeError(name)


@contextlib.contextmanager
def _standing_in():
    # What is installed, and what has been imported, is used as it is.
    absent = {name for name in ABSENT if name not in sys.modules and importlib.util.find_spec(name) is None}
    names = [name for name in (*ABSENT, *SUBMODULES) if name.split(".")[0] in absent]
    sys.modules.update({name: _StandIn(name) for name in names})
    try:
        yield
    finally:
        for name in names:
            del sys.modules[name]


def import_peer(name: str) -> types.ModuleType:
    """The module `name`, with stand-ins for what it misses; skips the test where the peer itself is not installed."""
    if importlib.util.find_spec(name.split(".")[0]) is None:
        pytest.skip(f"{name.split('.')[0]} is not installed", allow_module_level=True)
    with _standing_in():
        return importlib.import_module(name)
