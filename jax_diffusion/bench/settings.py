"""What is asked of a comparison, and how long it may take."""

from typing import NamedTuple

from jax_diffusion.bench.cases import MODES


class Options(NamedTuple):
    """What the command line says; None and () are the defaults of the device."""

    cases: tuple[str, ...] = ()
    modes: tuple[str, ...] = MODES
    batches: tuple[int, ...] = ()
    dtype: str = ""
    rounds: int = 0
    steps: int = 0  # of a round
    sampler_steps: int = 50
    threads: int = 0
    only: str = ""  # "jax"
    variants: tuple[str, ...] = ()  # of PyTorch
    xla_flags: str = ""  # of a further process of JAX
    quick: bool = False
    onednn: bool = True  # False: no variant of JAX's is by it
    overrides: tuple[str, ...] = ()
    compile_cache: str = "off"  # a folder: compiled programs are read from it, and seconds to compile are not told
    sides: tuple[str, str] = ("jax", "torch")  # modules, see worker.py


class Pace(NamedTuple):
    """How long and how often."""

    rounds: int
    steps: int  # of a round, at most
    seconds: float  # of a round, at most: fewer steps then
    warmup: int
    ceiling_size: int
    ceiling_seconds: float


PACES = {
    "quick": Pace(3, 10, 1.0, 1, 1024, 0.5),
    "cpu": Pace(5, 50, 4.0, 2, 2048, 3.0),
    "accelerator": Pace(5, 50, 30.0, 20, 8192, 3.0),
}
QUICK_VARIANTS = ("package", "eager", "eager_channels_last", "pipeline", "loop")


def default_cases(memory: int) -> tuple[str, ...]:
    """Of an accelerator with so many bytes: DiT-XL/2 and ADM only where both frameworks' fit."""
    return ("unet", "dit_s2", "ddpm_pytorch") + (("dit_xl2", "adm64") if memory > 60e9 else ())
