"""What was not finite first in a step that had to be skipped, found by a program of its own on that step's batch."""

import json
import pathlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jax_diffusion import lowering, placement, sharding
from jax_diffusion.data import Batches
from jax_diffusion.io.whole import whole
from jax_diffusion.train import step
from jax_diffusion.train.setup import Setup
from jax_diffusion.train.state import TrainState

ORDER = ("parameters", "moments", "input", "prediction", "loss", "gradient")  # as a step comes by them
SHOWN = 20  # examples and paths listed of each


def _leaf(x: jax.Array) -> dict[str, jax.Array]:
    """How many numbers of a leaf are not finite, and the largest of the others."""
    x = x.astype(jnp.float32)
    fine = jnp.isfinite(x)
    return {"bad": jnp.sum(~fine), "largest": jnp.max(jnp.where(fine, jnp.abs(x), 0.0), initial=0.0)}


def _rows(x: jax.Array) -> jax.Array:
    """Which samples of [B, ...] are finite, [B]."""
    return jnp.all(jnp.isfinite(x).reshape(x.shape[0], -1), axis=1)


def make_examine(objective: step.Objective):
    """`examine(state, batch)`: for each of ORDER which leaves or which samples are not finite."""

    def examine(state: TrainState, batch: step.Batch) -> dict[str, Any]:
        drawn = objective.draw(state, batch)

        def predict(micro: step.Drawn):
            inputs, c_noise = objective.process.network_inputs(micro.x_t, micro.t)
            return _rows(objective.network.apply(state.params, inputs, c_noise, micro.cond, key=micro.dropout))

        predicted = jax.lax.map(predict, step.microbatches(drawn, objective.accumulate))
        loss, losses, grads = objective.gradients(state.params, drawn)
        image = batch["image"].astype(jnp.float32)
        fine = jnp.isfinite(image)
        number = jnp.maximum(jnp.sum(fine), 1)
        mean = jnp.sum(jnp.where(fine, image, 0.0)) / number
        return {
            "parameters": jax.tree.map(_leaf, state.params),
            "moments": jax.tree.map(_leaf, state.opt_state),
            "input": _rows(image),
            "prediction": predicted.swapaxes(0, 1).reshape(-1),
            "loss": jnp.isfinite(losses),
            "gradient": jax.tree.map(_leaf, grads),
            "times": drawn.t,
            "losses": losses,
            "objective": loss,
            "statistics": {
                "min": jnp.min(jnp.where(fine, image, jnp.inf)),
                "max": jnp.max(jnp.where(fine, image, -jnp.inf)),
                "mean": mean,
                "std": jnp.sqrt(jnp.sum(jnp.where(fine, jnp.square(image - mean), 0.0)) / number),
            },
        }

    return examine


def diagnose(s: Setup, state: TrainState, at: int, shift: int) -> dict[str, Any]:
    """What a JSON file can say of the step that starts after `at` steps, with the parameters of `state`."""
    t, place = s.config.train, sharding.batch_sharding(s.mesh)
    shardings = jax.tree.map(lambda x: x.sharding, state)
    state = _at(state, at, shift)
    with Batches(
        s.source, t.batch_size, s.config.seed, at + shift, sharding=place, stop_step=at + shift + 1
    ) as batches:
        _, batch = next(batches)
    examine = lowering.jit(
        make_examine(s.program.objective()),
        s.mesh.devices.flat[0].platform,
        in_shardings=(shardings, place),
        out_shardings=sharding.replicated(s.mesh),
    )
    with placement.tracing_for(s.mesh):
        found = jax.device_get(examine(state, batch))
    begin = (at + shift) * t.batch_size
    examples = s.source.order.indices(s.config.seed, begin, begin + t.batch_size)
    return {
        "step": at + 1,
        "first": _first(found),
        "position": {"batch": at + shift, "shift": shift, "examples": examples.tolist()},
        "input": {**_samples(found, "input", examples), **_plain(found["statistics"])},
        "prediction": _samples(found, "prediction", examples),
        "loss": {**_samples(found, "loss", examples), "objective": _number(found["objective"])},
        **{k: _leaves(found[k]) for k in ("gradient", "parameters", "moments")},
    }


def _at(state: TrainState, at: int, shift: int) -> TrainState:
    """`state` as it was before step `at`, since when it has been kept."""
    place = lambda x, like: jax.device_put(np.asarray(x, like.dtype), like.sharding)  # noqa: E731
    faults = {**state.faults, "shift": place(shift, state.faults["shift"])}
    return TrainState(
        place(at, state.step), state.params, state.opt_state, state.ema, state.timesteps, state.averages, faults
    )


def _is_leaf(x: Any) -> bool:
    return isinstance(x, dict) and x.keys() == {"bad", "largest"}


def _named(tree: Any) -> list[tuple[str, dict]]:
    return [
        (sharding.path_name(path), leaf) for path, leaf in jax.tree_util.tree_leaves_with_path(tree, is_leaf=_is_leaf)
    ]


def _bad(part: Any) -> list[str]:
    """Paths of a tree's leaves, or numbers of samples, that are not finite."""
    if isinstance(part, np.ndarray):
        return [f"sample {i}" for i in np.flatnonzero(~part)]
    return [name for name, leaf in _named(part) if leaf["bad"]]


def _first(found: dict[str, Any]) -> dict[str, Any]:
    """The first of ORDER with something that is not finite; {"what": "none"} where all is."""
    for what in ORDER:
        if names := _bad(found[what]):
            return {"what": what, "path": names[0], "more": len(names) - 1}
    return {"what": "none"}


def _samples(found: dict[str, Any], what: str, examples: np.ndarray) -> dict[str, Any]:
    bad = np.flatnonzero(~found[what])
    listed = [{"sample": int(i), "example": int(examples[i]), "time": _number(found["times"][i]),
               "loss": _number(found["losses"][i])} for i in bad[:SHOWN]]  # fmt: skip
    return {"not_finite": len(bad), "of": len(found[what]), "samples": listed}


def _leaves(tree: Any) -> dict[str, Any]:
    named = _named(tree)
    top = max(named, key=lambda item: item[1]["largest"], default=("", {"largest": np.float32(0)}))
    bad = [name for name, leaf in named if leaf["bad"]]
    return {"not_finite": len(bad), "of": len(named), "paths": bad[:SHOWN], "largest": _number(top[1]["largest"]),
            "largest_path": top[0]}  # fmt: skip


def _number(x: Any) -> float | str:
    """JSON has no NaN."""
    return float(x) if np.isfinite(x) else str(float(x))


def _plain(numbers: dict[str, Any]) -> dict[str, Any]:
    return {k: _number(v) for k, v in numbers.items()}


def write(folder: pathlib.Path, found: dict[str, Any]) -> pathlib.Path:
    """folder/diagnosis-STEP.json, by the first process alone."""
    path = folder / f"diagnosis-{found['step']}.json"
    if jax.process_index() == 0:
        with whole(path) as draft:
            draft.write_text(json.dumps(found, indent=1) + "\n")
    return path


def sentence(found: dict[str, Any]) -> str:
    """The diagnosis in a few words."""
    first = found["first"]
    if first["what"] == "none":
        gradient = found["gradient"]
        return (f"every number of it is finite, the largest gradient is {gradient['largest']:.3g} in "
                f"{gradient['largest_path']}")  # fmt: skip
    more = f" and {first['more']} more" if first["more"] else ""
    of = {"input": "the input", "loss": "the loss", "prediction": "the prediction"}.get(first["what"], first["what"])
    return f"the first that is not finite is {of}: {first['path']}{more}"
