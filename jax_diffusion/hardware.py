"""What accelerators can do at most: the figures of their makers' data sheets, one chip each.

Sources: Google Cloud's pages "TPU v4", "TPU v5e", "TPU v5p" and "TPU v6e" (peak, HBM, interchip interconnect); NVIDIA's
data sheets "A100 Tensor Core GPU", "H100 Tensor Core GPU" (SXM), "H200" and "DGX B200" (dense rates, NVLink). A TPU's
clock is its peak by the multiply-adds of its matrix units: v4 and v5p have 8 of 128 x 128 (Jouppi et al. 2023, table
1), v5e 4 of them, v6e 4 of 256 x 256.
"""

from typing import NamedTuple


class Chip(NamedTuple):
    """One accelerator. Rates are a second, dense (no sparsity); memory is what a program may use."""

    name: str
    kinds: tuple[str, ...]  # how jax.Device.device_kind begins; the longest match counts
    bfloat16: float  # FLOP/s of matrix units
    bandwidth: float  # bytes/s of memory
    memory: float  # bytes
    link: float  # bytes/s to its neighbours in one direction, all links together
    clock: float = 0.0  # Hz, in which the compiler counts a TPU's cycles


GB, GiB, GIGA, TERA = 1e9, 2**30, 1e9, 1e12

CHIPS = {
    chip.name: chip
    for chip in (
        Chip("v4", ("TPU v4",), 275 * TERA, 1228 * GB, 31.75 * GiB, 300 * GB, 1.05 * GIGA),
        Chip("v5e", ("TPU v5 lite", "TPU v5e"), 197 * TERA, 819 * GB, 15.75 * GiB, 200 * GB, 1.5 * GIGA),
        Chip("v5p", ("TPU v5", "TPU v5p"), 459 * TERA, 2765 * GB, 95.74 * GiB, 600 * GB, 1.75 * GIGA),
        Chip("v6e", ("TPU v6 lite", "TPU v6e"), 918 * TERA, 1640 * GB, 31.25 * GiB, 448 * GB, 1.75 * GIGA),
        Chip("a100", ("NVIDIA A100",), 312 * TERA, 2039 * GB, 79.3 * GiB, 300 * GB),
        Chip("h100", ("NVIDIA H100",), 989 * TERA, 3352 * GB, 79.6 * GiB, 450 * GB),
        Chip("h200", ("NVIDIA H200",), 989 * TERA, 4800 * GB, 140 * GiB, 450 * GB),
        Chip("b200", ("NVIDIA B200",), 2250 * TERA, 8000 * GB, 179 * GiB, 900 * GB),
    )
}


def chip_of(device_kind: str) -> Chip | None:
    """The chip that calls itself `device_kind` (jax.devices()[0].device_kind); None where it is not known (CPUs)."""
    fits = [(len(kind), chip) for chip in CHIPS.values() for kind in chip.kinds if device_kind.startswith(kind)]
    return max(fits)[1] if fits else None
