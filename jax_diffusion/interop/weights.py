"""Which of our parameters is which of theirs: a list of entries, read in both directions.

    entries = [*affine("stem", "conv_in", CONV), *norm("norm", "conv_norm_out"), ...]
    params  = load(entries, tensors, shapes)     # theirs -> ours; every misfit in one error
    tensors = save(entries, params)              # ours -> theirs, bit for bit

A layout says how the arrays differ. PyTorch keeps convolutions [O, I, H, W] and matrices [O, I]; here they are
[H, W, I, O] and [I, O].
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from jax_diffusion.errors import UserError
from jax_diffusion.interop.tensors import Tensors


class Layout(NamedTuple):
    """to_ours: their arrays -> ours.  to_theirs: the inverse.  Both only move numbers, so nothing is rounded."""

    to_ours: Callable[[Sequence[np.ndarray]], np.ndarray]
    to_theirs: Callable[[np.ndarray], Sequence[np.ndarray]]


def _one(to_ours: Callable[[np.ndarray], np.ndarray], to_theirs: Callable[[np.ndarray], np.ndarray]) -> Layout:
    return Layout(lambda arrays: to_ours(*arrays), lambda array: (to_theirs(array),))


AS_IS = _one(lambda a: a, lambda a: a)
CONV = _one(lambda a: a.transpose(2, 3, 1, 0), lambda a: a.transpose(3, 2, 0, 1))
DENSE = _one(lambda a: a.T, lambda a: a.T)
CONV1X1 = _one(lambda a: a[:, :, 0, 0].T, lambda a: a.T[:, :, None, None])  # their 1x1 convolution, our matrix
CONV1 = _one(lambda a: a[:, :, 0].T, lambda a: a.T[:, :, None])  # the same in one dimension


def joined(layout: Layout, parts: int) -> Layout:
    """`parts` of their arrays, each in `layout`, side by side along our last axis: q, k and v as one matrix."""
    return Layout(
        lambda arrays: np.concatenate([layout.to_ours([a]) for a in arrays], axis=-1),
        lambda array: tuple(layout.to_theirs(part)[0] for part in np.split(array, parts, axis=-1)),
    )


def stacked(layout: Layout, parts: int = 1) -> Layout:
    """Theirs, `parts` arrays a layer and layer by layer, stacked along our first axis: the layers of a scan."""

    def to_ours(arrays):
        return np.stack([layout.to_ours(arrays[i : i + parts]) for i in range(0, len(arrays), parts)])

    return Layout(to_ours, lambda array: tuple(a for part in array for a in layout.to_theirs(part)))


def repeated(layout: Layout, copies: int) -> Layout:
    """Theirs is written `copies` times, ours once. UserError where the copies are not the same."""

    def to_ours(arrays):
        if not all(np.array_equal(a, arrays[0]) for a in arrays):
            raise UserError("whose copies differ from block to block, where this network has one for all")
        return layout.to_ours(arrays[:1])

    return Layout(to_ours, lambda array: tuple(layout.to_theirs(array)) * copies)


def patches(patch: int) -> Layout:
    """Their convolution of stride `patch` and that size; our matrix on the pixels of a patch."""

    def to_theirs(array):
        return array.reshape(patch, patch, -1, array.shape[-1]).transpose(3, 2, 0, 1)

    return _one(lambda a: a.transpose(2, 3, 1, 0).reshape(-1, a.shape[0]), to_theirs)


class Entry(NamedTuple):
    """One of our parameters ("down/0/block/conv1/kernel") and the tensors of theirs that it is made of."""

    ours: str
    theirs: tuple[str, ...]
    layout: Layout = AS_IS


def affine(ours: str, theirs: str, layout: Layout = DENSE, *, bias: bool = True) -> list[Entry]:
    """kernel and bias of a matrix or convolution."""
    out = [Entry(f"{ours}/kernel", (f"{theirs}.weight",), layout)]
    return [*out, Entry(f"{ours}/bias", (f"{theirs}.bias",))] if bias else out


def stacked_affine(
    ours: str, theirs: Sequence[Sequence[str]], layout: Layout = DENSE, *, bias: bool = True
) -> list[Entry]:
    """kernel and bias of the matrices of a scan's layers: for each layer those of theirs that ours joins."""
    parts, names = len(theirs[0]), [name for layer in theirs for name in layer]

    def of(layout):
        return stacked(joined(layout, parts), parts)

    out = [Entry(f"{ours}/kernel", tuple(f"{name}.weight" for name in names), of(layout))]
    return [*out, Entry(f"{ours}/bias", tuple(f"{name}.bias" for name in names), of(AS_IS))] if bias else out


def norm(ours: str, theirs: str) -> list[Entry]:
    """scale and bias of a normalisation."""
    return [Entry(f"{ours}/scale", (f"{theirs}.weight",)), Entry(f"{ours}/bias", (f"{theirs}.bias",))]


def flat(params: Any, prefix: str = "") -> dict[str, Any]:
    """Nested dict -> {"down/0/block/conv1/kernel": leaf}."""
    out: dict[str, np.ndarray] = {}
    for key, value in params.items():
        out |= flat(value, f"{prefix}{key}/") if isinstance(value, Mapping) else {f"{prefix}{key}": value}
    return out


def nested(leaves: Mapping[str, Any]) -> dict[str, Any]:
    """The inverse of `flat`."""
    out: dict[str, Any] = {}
    for path, leaf in leaves.items():
        *groups, last = path.split("/")
        node = out
        for group in groups:
            node = node.setdefault(group, {})
        node[last] = leaf
    return out


def load(
    entries: Iterable[Entry],
    tensors: Tensors,
    shapes: Any,
    *,
    ignore: Callable[[str], bool] = lambda name: False,
) -> dict[str, Any]:
    """Our parameters, float32 NumPy, from their tensors.

    shapes: the network's abstract parameters (jax.eval_shape of its init).
    ignore: tensors of theirs that are known and not needed (buffers that follow from the config).

    Raises UserError, one that lists everything, where a tensor is missing, unknown, of a wrong shape or not finite.
    """
    entries, wanted = list(entries), flat(shapes)
    missing = [name for e in entries for name in e.theirs if name not in tensors.shapes]
    used = {name for e in entries for name in e.theirs}
    unknown = [name for name in tensors if name not in used and not ignore(name)]
    ours = {e.ours for e in entries}
    odd = sorted(ours ^ set(wanted))  # the table of entries and the network disagree: our own mistake
    if odd and not (missing or unknown):
        raise AssertionError(f"entries and network differ in {odd[:8]}")
    leaves, wrong, contradictory, broken = {}, [], [], []
    for e in entries:
        if e.ours not in wanted or any(name in missing for name in e.theirs):
            continue
        want = tuple(wanted[e.ours].shape)
        arrays = [tensors[name] for name in e.theirs]
        try:
            leaf = e.layout.to_ours(arrays)
            fits = leaf.shape == want
        except UserError as error:  # of the layout itself
            contradictory.append(f"{e.theirs[0]} {error}")
            continue
        except (ValueError, IndexError):
            fits = False
        if not fits:
            theirs = ", ".join(f"{name} {list(tensors.shapes[name])}" for name in e.theirs[:3])
            wrong.append(f"{theirs} for our {list(want)}")
            continue
        if leaf.dtype.kind in "biuc":
            wrong.append(f"{e.theirs[0]} of type {leaf.dtype}")
            continue
        leaves[e.ours] = np.asarray(leaf, np.float32, order="C")  # ascontiguousarray would make [] into [1]
        if not np.isfinite(leaves[e.ours]).all():
            broken.append(e.theirs[0])
    problems = [("missing", missing), ("unknown", unknown), ("of another shape", wrong),
                ("contradictory", contradictory), ("not finite", broken)]  # fmt: skip
    if any(names for _, names in problems):
        said = "; ".join(f"{len(names)} {what}: {_some(names)}" for what, names in problems if names)
        raise UserError(f"{tensors.path} does not fit the network its config describes: {said}")
    return nested(leaves)


def _some(names: Sequence[str], most: int = 8) -> str:
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")


def save(entries: Iterable[Entry], params: Any) -> dict[str, np.ndarray]:
    """Their tensors from our parameters, float32 NumPy. Every parameter must have an entry."""
    leaves, entries = flat(params), list(entries)
    left = sorted(set(leaves) ^ {e.ours for e in entries})
    if left:
        raise AssertionError(f"entries and network differ in {left[:8]}")
    out: dict[str, np.ndarray] = {}
    for e in entries:
        arrays = e.layout.to_theirs(np.asarray(leaves[e.ours], np.float32))
        out |= {name: np.asarray(a, order="C") for name, a in zip(e.theirs, arrays, strict=True)}
    return out
