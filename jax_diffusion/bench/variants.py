"""The ways in which PyTorch runs a network; the best of them is what JAX stands beside. Nothing is imported here.

Memory is contiguous in `eager` and `pipeline`, channels_last in the others where the network convolves.
"""

from typing import NamedTuple


class Variant(NamedTuple):
    """A way to run the network."""

    channels_last: bool = True
    compile: str | None = None  # torch.compile's mode
    graph: bool = False  # the whole step, or all steps of the sampler, as one CUDA graph
    gpu: bool = False  # only there
    loop: str = "tuned"  # of the sampler: tuned, pipeline, package

    @property
    def marks(self) -> bool:
        """Whether torch.compile makes CUDA graphs, whose results the next call overwrites."""
        return self.compile in ("reduce-overhead", "max-autotune")


_FASTER = {
    "compile": Variant(compile="default"),
    "compile_max_autotune_no_cudagraphs": Variant(compile="max-autotune-no-cudagraphs", gpu=True),
    "compile_reduce_overhead": Variant(compile="reduce-overhead", gpu=True),
    "compile_max_autotune": Variant(compile="max-autotune", gpu=True),
    "compile_cuda_graph": Variant(compile="default", graph=True, gpu=True),
}
_NETWORK = {"eager": Variant(channels_last=False), "eager_channels_last": Variant(), **_FASTER}
VARIANTS = {
    "train": {"package": Variant(channels_last=False, loop="package"), **_NETWORK},
    "forward": _NETWORK,
    "sample": {
        "package": Variant(channels_last=False, loop="package"),
        "pipeline": Variant(channels_last=False, loop="pipeline"),
        "pipeline_compile": Variant(compile="default", loop="pipeline"),
        "loop": Variant(),
        **{f"loop_{name}": v for name, v in _FASTER.items()},
    },
}
