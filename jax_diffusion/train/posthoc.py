"""Averages of any width, made after training from snapshots of a few (Karras et al. 2024, section 3 and appendix C).

A run tracks power-function averages of some relative widths (ema.py) and keeps snapshots of them. A weighted sum of
snapshots i is an average of the weights with the profile sum_i x_i p_i; the x for which that is nearest to a wanted
profile p solve

    A x = b,   A_ij = <p_i, p_j>,   b_i = <p_i, p>                                                         (1)

where for profiles of exponents g, h ending at times s <= t (algorithm 3, eq. 151)

    <p, q> = (g + 1) (h + 1) (s / t)^h / ((g + h + 1) t).                                                  (2)
"""

import pathlib
import re
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from jax_diffusion.errors import UserError, choose
from jax_diffusion.io import tensors
from jax_diffusion.sharding import path_name
from jax_diffusion.train.ema import WIDEST, gamma_of

DTYPES = ("float32", "float16")


class Profile(NamedTuple):
    """The average over the steps until `step`, of relative width `std`."""

    step: int
    std: float


class Average(NamedTuple):
    """What `reconstruct` has made."""

    profile: Profile  # the wanted one
    path: pathlib.Path
    weights: dict[Profile, float]  # of the snapshots
    error: float  # of the profile that they make, relative in L2


def check(config) -> None:
    """Raises UserError where a config.ema cannot be."""
    for std in config.profiles:
        check_std("--config.ema.profiles", std)
    if len(set(config.profiles)) < len(config.profiles):
        raise UserError(f"--config.ema.profiles={config.profiles}: the widths have to differ")
    choose("ema.snapshot_dtype", config.snapshot_dtype, DTYPES)
    if config.profiles and config.snapshot_every < 1:
        raise UserError(f"--config.ema.snapshot_every={config.snapshot_every} must be at least 1")


def check_std(option: str, std: Any) -> float:
    if isinstance(std, bool) or not isinstance(std, int | float) or not 0 < std < WIDEST:
        raise UserError(f"{option}={std}: a relative width lies between 0 and {WIDEST:.4f}, for instance 0.1")
    return float(std)


def inner(p: Sequence[Profile], q: Sequence[Profile]) -> np.ndarray:
    """Eq. 2 of every p with every q, [len(p), len(q)] float64."""
    gammas = {std: gamma_of(std) for _, std in {*p, *q}}
    (s, g), (t, h) = (np.array([(step, gammas[std]) for step, std in profiles]).T for profiles in (p, q))
    s, g = s[:, None], g[:, None]
    exponent = np.where(s <= t, h, -g)  # of the profile that goes on for longer
    return (g + 1) * (h + 1) * (s / t) ** exponent / ((g + h + 1) * np.maximum(s, t))


def coefficients(snapshots: Sequence[Profile], wanted: Profile) -> tuple[np.ndarray, float]:
    """x of eq. 1 with sum 1, [N] float64, and how far the profile is from the wanted one, relative in L2."""
    gram, b = inner(snapshots, snapshots), inner(snapshots, [wanted])[:, 0]
    scale = 1 / np.sqrt(np.diag(gram))  # profiles of unit norm: early ones are high and narrow
    x = scale * np.linalg.lstsq(scale[:, None] * gram * scale, scale * b, rcond=1e-13)[0]
    x = x / x.sum()
    square = 1 + (x @ gram @ x - 2 * x @ b) / inner([wanted], [wanted])[0, 0]
    return x, float(np.sqrt(max(square, 0.0)))


def density(profile: Profile, s: np.ndarray) -> np.ndarray:
    """The profile at times s."""
    g, t = gamma_of(profile.std), profile.step
    return np.where(s <= t, (g + 1) / t * (np.minimum(s, t) / t) ** g, 0.0)


def _folder(workdir: str | pathlib.Path) -> pathlib.Path:
    return pathlib.Path(workdir) / "ema"


def _named(workdir: str | pathlib.Path, kind: str) -> dict[Profile, pathlib.Path]:
    """The files of a kind, in order."""
    found = {}
    for path in _folder(workdir).glob(f"{kind}_*.safetensors"):
        if m := re.fullmatch(rf"{kind}_(\d+)_([0-9.e-]+)\.safetensors", path.name):
            found[Profile(int(m[1]), float(m[2]))] = path
    return dict(sorted(found.items()))


def _path(workdir: str | pathlib.Path, kind: str, profile: Profile) -> pathlib.Path:
    return _folder(workdir) / f"{kind}_{profile.step:08d}_{profile.std:g}.safetensors"


def _save(path: pathlib.Path, leaves: dict[str, np.ndarray], profile: Profile) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    tensors.save(path, leaves, {"step": str(profile.step), "std": f"{profile.std:g}"})


def _whole(leaf: jax.Array) -> np.ndarray | None:
    """An array from its shards; of several processes the first gets it."""
    if not (leaf.is_fully_addressable or leaf.is_fully_replicated):
        from jax.experimental import multihost_utils

        return multihost_utils.process_allgather(leaf, tiled=True)  # every process takes part
    return np.asarray(leaf) if jax.process_index() == 0 else None


def save_snapshots(workdir: str | pathlib.Path, step: int, averages: tuple, config) -> None:
    """Writes each of a TrainState's averages under workdir/ema. Called by every process; the first one writes."""
    for std, average in zip(config.profiles, averages, strict=True):
        leaves = {}
        for path, leaf in jax.tree_util.tree_leaves_with_path(average):
            array = _whole(leaf)
            if jax.process_index() == 0:
                assert array is not None
                leaves[path_name(path)] = array.astype(config.snapshot_dtype)
        if leaves:
            profile = Profile(step, std)
            _save(_path(workdir, "snapshot", profile), leaves, profile)


def snapshots(workdir: str | pathlib.Path) -> dict[Profile, pathlib.Path]:
    """The snapshots of a run, in order. UserError where there are none."""
    found = _named(workdir, "snapshot")
    if not found:
        raise UserError(
            f"--workdir={workdir} has no snapshots of averages: train with --config.ema.profiles=0.05,0.10, and they "
            "are kept every ema.snapshot_every steps"
        )
    return found


def reconstruct(
    workdir: str | pathlib.Path,
    stds: Sequence[float],
    step: int | None = None,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> list[Average]:
    """Makes the average of each relative width `stds` at `step` (None: the last snapshot's), in one pass over the
    snapshots until then (or the next, where there is none at `step`).

    They are written to workdir/ema/average_STEP_STD.safetensors, float32.
    progress: called as progress(done, total) after each snapshot.
    """
    stds = [check_std("--std", std) for std in stds]
    found = snapshots(workdir)
    steps = sorted({profile.step for profile in found})
    step = steps[-1] if step is None else step
    if not 1 <= step <= steps[-1]:
        raise UserError(f"--step={step}: the snapshots go from step {steps[0]} to {steps[-1]}")
    last = next(n for n in steps if n >= step)
    used = {profile: path for profile, path in found.items() if profile.step <= last}
    wanted = [Profile(step, std) for std in stds]
    solved = [coefficients(list(used), profile) for profile in wanted]
    sums: list[dict[str, np.ndarray]] = [{} for _ in wanted]
    for i, path in enumerate(used.values()):
        for name, array in tensors.open_safetensors(path).items():
            array = array.astype(np.float32)
            for total, (x, _) in zip(sums, solved, strict=True):
                total[name] = np.float32(x[i]) * array + total.get(name, np.float32(0))
        progress(i + 1, len(used))
    out = []
    for profile, total, (x, error) in zip(wanted, sums, solved, strict=True):
        path = _path(workdir, "average", profile)
        _save(path, total, profile)
        out.append(Average(profile, path, dict(zip(used, map(float, x), strict=True)), error))
    return out


def load(workdir: str | pathlib.Path, std: float, shapes: Any, step: int | None = None) -> tuple[Any, int]:
    """What `reconstruct` has made of relative width `std`, as a tree like `shapes`, and its step (None: the last)."""
    made = {p: path for p, path in _named(workdir, "average").items() if p.std == float(f"{std:g}")}
    chosen = [p for p in made if step in (None, p.step)]
    if not chosen:
        at = "" if step is None else f" --step={step}"
        raise UserError(
            f"--ema_std={std:g}: this average is not made yet; make it with `jax-diffusion ema --workdir={workdir} "
            f"--std={std:g}{at}`"
        )
    file = tensors.open_safetensors(made[chosen[-1]])
    names = {path_name(path): leaf.shape for path, leaf in jax.tree_util.tree_leaves_with_path(shapes)}
    if names != file.shapes:
        raise UserError(f"{file.path} does not fit this config: it is of another network")
    return jax.tree_util.tree_map_with_path(lambda path, _: file[path_name(path)], shapes), chosen[-1].step
