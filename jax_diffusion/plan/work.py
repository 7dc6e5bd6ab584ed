"""The arithmetic and the memory traffic of one device in one call of a compiled program, instruction by instruction.

FLOPs are those of matrix products and convolutions, two for each multiply-add whose input is neither padding nor a hole
between spread-out elements. Bytes are the arrays that instructions read and write in the device's large memory: what
stays on the chip (TPU's vector memory) is free, as is what a fusion keeps to itself; of an array that is only sliced or
updated in place, the slice counts.
"""

import functools
import re
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

from jax_diffusion.plan import hlo
from jax_diffusion.plan.collectives import KINDS
from jax_diffusion.plan.hlo import Instruction, Module

# Nothing moves where a name is given to what is there already.
NAMING = {
    "parameter", "constant", "get-tuple-element", "tuple", "bitcast", "while", "conditional", "call", "after-all",
    "partition-id", "replica-id", "async-start", "async-update", "optimization-barrier", "opt-barrier",
}  # fmt: skip
SLICING = {"dynamic-slice", "slice", "gather"}


class Work(NamedTuple):
    """Of one instruction, all its executions together."""

    flops: float
    bytes: float
    times: int


@functools.lru_cache(maxsize=4096)
def _valid(n: int, kernel: int, out: int, stride: int, low: int, spread: int, dilation: int) -> int:
    """How many pairs of an output's and a kernel's position meet an element, along one axis of length n."""
    position = np.arange(out)[:, None] * stride + np.arange(kernel)[None] * dilation - low
    return int(np.sum((position >= 0) & (position < (n - 1) * spread + 1) & (position % spread == 0)))


def _window(attributes: str) -> dict[str, list[str]]:
    found = re.search(r"window=\{([^}]*)\}", attributes)
    return {k: v.split("x") for k, v in re.findall(r"(\w+)=([\w-]+)", found[1])} if found else {}


def _convolution(i: Instruction, lhs: hlo.Array, rhs: hlo.Array) -> float:
    labels = re.search(r"dim_labels=(\w+)_(\w+)->(\w+)", i.attributes)
    if not labels:
        return 0.0
    inputs, kernel, output = labels[1], labels[2], labels[3]
    result = i.result[0].shape
    window = _window(i.attributes)
    products = 1
    for axis in (c for c in inputs if c.isdigit()):
        at = int(axis)

        def get(name: str, default: str, at=at) -> str:
            return window[name][at] if name in window else default

        products *= _valid(
            lhs.shape[inputs.index(axis)], rhs.shape[kernel.index(axis)], result[output.index(axis)],
            int(get("stride", "1")), int(get("pad", "0_0").split("_")[0]),
            int(get("lhs_dilate", "1")), int(get("rhs_dilate", "1")),
        )  # fmt: skip
    groups = re.search(r"batch_group_count=(\d+)", i.attributes)
    batch = lhs.shape[inputs.index("b")] / (int(groups[1]) if groups else 1)
    # The kernel's input features are those of one group of features already.
    return 2.0 * products * batch * rhs.shape[kernel.index("i")] * rhs.shape[kernel.index("o")]


def _cudnn_convolution(i: Instruction, operands: list[hlo.Array], target: str) -> float:
    """Of a call of cuDNN, whichever of the three arrays it makes: the labels are those of the forward convolution."""
    labels = re.search(r"dim_labels=(\w+)_(\w+)->(\w+)", i.attributes)
    if not labels or len(operands) < 2:
        return 0.0
    if "BackwardInput" in target:
        kernel, output = operands[1], operands[0]
    elif "BackwardFilter" in target:
        kernel, output = i.result[0], operands[1]
    else:
        kernel, output = operands[1], i.result[0]
    return 2.0 * output.size * kernel.size / kernel.shape[labels[2].index("o")]


def _attention(i: Instruction, operands: list[hlo.Array], target: str) -> float:
    """Of cuDNN's attention: two products of [B, N, T, S] scores forward, five backward, as those are made again."""
    scores = re.search(r'"intermediate_tensor_shape":.*?"dimensions": ?\[([^\]]*)\]', i.attributes)
    if not scores or not operands:
        return 0.0
    size = 1
    for n in re.findall(r"\d+", scores[1]):
        size *= int(n)
    return 2.0 * size * operands[0].shape[-1] * (5 if "Backward" in target else 2)


# Products of [B, N, T, S] in JAX's splash kernels for TPU: the gradients make the scores again, each for itself.
_SPLASH = {"fwd": 2, "dq": 3, "dkv": 4}


def _splash(i: Instruction, operands: list[hlo.Array]) -> float:
    products = next((n for kind, n in _SPLASH.items() if i.name.startswith(f"splash_mha_{kind}")), 0)
    heads = [o for o in operands if len(o.shape) == 4]  # q and k, [B, N, T, D] and [B, N, S, D], are the first
    return 2.0 * products * heads[0].size * heads[1].shape[2] if products and len(heads) > 1 else 0.0


def _flops(module: Module, where: str, i: Instruction) -> float:
    """Of one execution, without what it calls."""
    if i.opcode not in ("dot", "convolution", "custom-call"):
        return 0.0
    body = module.computations[where]
    operands = [body[o].result[0] for o in i.operands if o in body and body[o].result]
    if i.opcode == "convolution":
        return _convolution(i, *operands[:2])
    said = re.search(r'custom_call_target="([^"]*)"', i.attributes)
    target = said[1] if said else ""
    if "$conv" in target:
        return _cudnn_convolution(i, operands, target)
    if "fmha" in target:
        return _attention(i, operands, target)
    if target == "tpu_custom_call":
        return _splash(i, operands)
    if i.opcode == "dot" or "gemm" in target or "matmul" in target:
        axes = re.search(r'lhs_contracting_dim(?:s=\{|ensions":\[)([\d,"]*)', i.attributes)
        if not axes or not operands:
            return 0.0
        contracted = 1
        for axis in re.findall(r"\d+", axes[1]):
            contracted *= operands[0].shape[int(axis)]
        return 2.0 * i.result[0].size * contracted
    return 0.0


def _all_flops(module: Module, where: str, i: Instruction) -> float:
    """With the fusions that it calls."""
    total = _flops(module, where, i)
    if i.opcode == "fusion":
        for called in i.called():
            total += sum(_all_flops(module, called, inner) for inner in module.computations.get(called, {}).values())
    return total


def _large(arrays: tuple[hlo.Array, ...]) -> int:
    return sum(a.bytes for a in arrays if a.space == 0)


def _fusion_bytes(module: Module, body: dict[str, Instruction], i: Instruction) -> float:
    """Reads of the operands, writes of the results."""
    called = i.called()
    inner = module.computations.get(called[0], {}) if called else {}
    if not inner:
        return sum(_large(body[o].result) for o in i.operands if o in body) + _large(i.result)
    root = module.root(called[0])
    made = [inner[o] for o in root.operands if o in inner] if root.opcode == "tuple" else [root]
    users: dict[str, list[Instruction]] = {}
    for user in inner.values():
        for o in user.operands:
            users.setdefault(o, []).append(user)

    def behind(x: Instruction) -> Instruction:
        while x.opcode in ("bitcast", "copy", "convert") and x.operands and x.operands[0] in inner:
            x = inner[x.operands[0]]
        return x

    def read(name: str) -> tuple[float, bool]:
        """The share of a value that is read, in elements, and whether that is all of it."""
        total = 0.0
        for user in users.get(name, []):
            if user is root and root.opcode == "tuple":
                continue  # passed on
            if user.opcode in KINDS or user.opcode == "custom-call":
                continue  # on its way to another device: counted there
            if user.opcode in SLICING and user.operands[0] == name:
                total += user.result[0].size
            elif user.opcode == "dynamic-update-slice" and user.operands[0] == name:
                continue  # in place
            elif user.opcode == "bitcast":
                part, whole = read(user.name)
                if whole:
                    return 0, True
                total += part
            else:
                return 0, True
        return total, False

    total = 0.0
    for x in inner.values():
        if x.opcode != "parameter" or int(x.operands[0]) >= len(i.operands):
            continue
        outer = body.get(i.operands[int(x.operands[0])])
        if outer is None:
            continue
        size = _large(outer.result)
        part, whole = read(x.name)
        elements = sum(a.size for a in outer.result)
        total += size if whole or not elements else min(size, size * part / elements)
    for x, array in zip(made, i.result, strict=False):
        source = behind(x)
        if x.opcode == "parameter" or array.space:
            continue
        if source.opcode == "dynamic-update-slice" and source.operands[1] in inner:
            update = sum(a.size for a in inner[source.operands[1]].result)
            total += array.bytes * update / max(array.size, 1)
        else:
            total += array.bytes
    return total


def _bytes(module: Module, where: str, i: Instruction) -> float:
    if i.opcode in NAMING or i.opcode.endswith("-done"):
        return 0.0
    body = module.computations[where]
    if i.opcode == "fusion":
        return _fusion_bytes(module, body, i)
    read = [body[o].result for o in i.operands if o in body]
    if i.opcode in ("copy-start", "slice-start"):
        return _large(i.result[:1]) + (_large(read[0]) if i.opcode == "copy-start" and read else 0)
    if i.opcode in SLICING:
        return 2.0 * _large(i.result)
    if i.opcode == "dynamic-update-slice":
        return 2.0 * sum(map(_large, read[1:2]))
    if i.opcode.endswith("-start"):
        return 2.0 * sum(map(_large, read))
    made = i.result
    if i.opcode == "custom-call":  # but for the workspaces of cuBLAS and cuDNN, which nobody knows the use of
        made = tuple(a for a in made if not (a.dtype in ("s8", "u8") and len(a.shape) == 1))
    return float(sum(map(_large, read)) + _large(made))


@functools.lru_cache(maxsize=2)
def instructions(text: str) -> tuple[Work, ...]:
    """The work of each instruction that runs by itself: fusions are one."""
    return tuple(_instructions(text))


def _instructions(text: str) -> Iterator[Work]:
    module = hlo.parse(text)
    for where, i, n in hlo.walk(text, fused=False):
        flops, moved = _all_flops(module, where, i), _bytes(module, where, i)
        if flops or moved:
            yield Work(n * flops, n * moved, n)


def flops(text: str) -> float:
    return sum(w.flops for w in instructions(text))


def traffic(text: str) -> float:
    """Bytes read from and written to the device's memory."""
    return sum(w.bytes for w in instructions(text))


def serial_seconds(text: str, peak: float, bandwidth: float) -> float:
    """One instruction after another, each as fast as the arithmetic (FLOP/s) and the memory (bytes/s) allow it."""
    return sum(max(w.flops / peak, w.bytes / bandwidth) for w in instructions(text))
