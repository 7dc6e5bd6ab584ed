"""Configs: one ml_collections tree of named fields, a recipe a file, overridden field by field.

A recipe is a Python file with `get_config() -> ConfigDict`, which starts from `default()` and says what
differs. `resolve` finds it by path, or by name among the recipes that ship with the package.
"""

import ast
import importlib.util
import json
import pathlib
from collections.abc import Iterable
from typing import Any

from ml_collections import ConfigDict

from jax_diffusion.errors import UserError, choose, did_you_mean


def default() -> ConfigDict:
    """Every field a recipe may set, with its default."""
    return ConfigDict(
        {
            "seed": 0,  # decides initialisation, data order, times, noise and dropout
            "data": {
                "source": "digits",  # a name in data.SOURCES
                "path": "",  # file or folder (tfds: its data_dir)
                "eval_path": "",  # held-out data, where it lies elsewhere
                "name": "",  # tfds dataset, or toy2d distribution
                "size": (),  # (H, W); () keeps the images' own
                "channels": 0,  # 1 or 3; 0 keeps the images' own
                "crop": "center",
                "labels": True,  # False trains unconditionally on labelled data
                "flip": False,  # random horizontal flips
                "holdout": 0.1,  # share kept for validation where there is no test set
                "max_bytes": 8 << 30,  # larger folders are decoded batch by batch
                "max_pixels": 1 << 26,  # an image with more is not decoded
                "workers": 0,  # processes that decode batch by batch, with grain; 0 is threads of this one
                "mixture": (),  # of source=mixture: ((weight, {"source": ..., "path": ...}), ...)
                "prefetch_bytes": 256 << 20,  # of batches made ahead, though never less than two batches
                "on_device": "auto",  # or never, replicate, shard: small sets on the devices, see data/resident.py
            },
            "condition": {"name": "none"},  # low_resolution, gray, and its options, see conditions.make
            "process": {
                "schedule": {"name": "linear"},  # and its options, see schedules.make
                "prediction": "epsilon",  # x0, epsilon, v, flow, score, edm
                "weighting": {"name": "simple"},  # and its options, see weighting.make
                "timesteps": {"name": "uniform"},  # and its options, see timesteps.make
                "learn_variance": False,
                "sigma_data": 0.5,
                "raw_inputs": False,  # no input scaling, and sigma itself as the time (score-SDE's VE networks)
            },
            "model": network("unet"),  # and its options, see models.unet and the other networks
            "optim": {
                "learning_rate": 2e-4,
                "schedule": "constant",  # constant, cosine, one_cycle, inverse_sqrt
                "warmup": 1000,  # steps
                "hold": 0,  # inverse_sqrt: steps before the rate falls; 0 is the warm-up's
                "b1": 0.9,
                "b2": 0.999,
                "eps": 1e-8,
                "weight_decay": 0.0,
                "clip": 1.0,  # global norm; 0 switches clipping off
            },
            "ema": {
                "decay": 0.9999,
                "warmup": True,
                "profiles": (),  # relative widths of further averages, from which any other is made later (EDM2)
                "snapshot_every": 1000,  # steps between the files these are kept in
                "snapshot_dtype": "float32",  # or float16, half the space
            },
            "train": {
                "batch_size": 128,
                "steps": 10_000,
                "accumulate": 1,  # microbatches per step
                "steps_per_dispatch": 1,  # steps compiled into one program
                "label_dropout": 0.1,  # for classifier-free guidance
                "rng": "threefry2x32",  # of noise, times and dropout; rbg and unsafe_rbg are faster on TPU and GPU
                "log_every": 100,
                "loggers": "",  # beside metrics.jsonl and TensorBoard: wandb, aim or both, "wandb,aim"
                "eval_every": 1000,  # 0 never
                "eval_batches": 8,
                "sample_every": 1000,  # 0 never
                "checkpoint_every": 1000,
                "keep": 2,  # the newest checkpoints kept, beside the best
                "max_bad_steps": 10,  # skipped in a row (not finite, or spikes) until a rollback; 0 never
                "max_rollbacks": 3,  # then the run stops with a diagnosis
                "spike": 0.0,  # skip steps whose loss or gradient norm is above this many times its mean; 0 none
                "stall_seconds": 600.0,  # without a step until the watchdog reports it; 0 never
            },
            "mesh": {"data": -1, "fsdp": 1, "tensor": 1, "rules": ("auto",)},  # see sharding.RULES
            "sampling": {  # the grids drawn while training, and the defaults of `sample`
                "solver": "ddim",
                "steps": 50,
                "grid": "",  # "" is the schedule's default
                "options": {},  # of the solver and its grid: variance, eta, offset, rho, ... see solvers.make
                "guidance": 1.0,
                "clip": True,  # x0_hat to [-1, 1]; False for points and latents
                "threshold": 0.0,  # percentile of dynamic thresholding in place of clipping; 0 is none
                "num": 64,
                "batch_size": 64,
            },
        }
    )


def network(name: str, **fields: Any) -> ConfigDict:
    """The model group of network `name`: all its options, those not given at their defaults. See models.MODELS."""
    from jax_diffusion import models

    known = models.options(name)
    for field in fields:
        choose(f"model {name!r}: option", field, known)
    return ConfigDict({"name": name, **known, **fields})


def named(name: str, **options: Any) -> ConfigDict:
    """A component and its options, `named("min_snr", gamma=5.0)`, to replace a default one."""
    return ConfigDict({"name": name, **options})


def options(node: ConfigDict) -> dict[str, Any]:
    """The options of a component: all its fields but the name."""
    return {k: v for k, v in node.items() if k != "name"}


def recipes() -> dict[str, pathlib.Path]:
    """The recipes that ship with the package, by name."""
    here = pathlib.Path(__file__).parent
    for folder in (here / "configs", here.parent / "configs"):  # installed; a checkout
        if folder.is_dir():
            return {p.stem: p for p in sorted(folder.glob("*.py")) if p.stem != "__init__"}
    return {}


def resolve(name: str) -> ConfigDict:
    """The config of a recipe, given by path ("configs/mnist.py") or by name ("mnist")."""
    path = pathlib.Path(name)
    if not path.is_file():
        known = recipes()
        if path.suffix or len(path.parts) > 1:
            raise UserError(f"--config={name}: there is no such file; shipped recipes: {', '.join(known)}")
        path = known[choose("--config", name, known)]
    spec: Any = importlib.util.spec_from_file_location(f"recipe_{path.stem}", path)
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
        return module.get_config()
    except Exception as e:
        raise UserError(f"--config={name}: the recipe fails with {type(e).__name__}: {e}") from e


def _parse(text: str) -> Any:
    """A command-line value: a Python literal, else (1,2)-less tuples "64,64", else the text itself."""
    lowered = {"true": True, "false": False, "none": None}
    if text.lower() in lowered:
        return lowered[text.lower()]
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return text


def _cast(field: str, old: Any, new: Any) -> Any:
    """`new` as the type of `old`; raises UserError where that would lose something."""
    if isinstance(old, ConfigDict):
        if isinstance(new, str) and "name" in old:
            # --config.process.schedule=cosine, --config.model=dit
            return network(new) if field == "model" else named(new)
        raise UserError(f"--config.{field}={new!r}: this is a group; set one of its fields: {', '.join(old)}")
    if isinstance(old, bool) or isinstance(new, bool):
        fits = isinstance(old, bool) and isinstance(new, bool)
    elif isinstance(old, float):
        fits = isinstance(new, int | float)
        new = float(new) if fits else new
    elif isinstance(old, tuple):
        new = (new,) if isinstance(new, int | float) else new
        new = tuple(new) if isinstance(new, list) else new
        new = (new,) if isinstance(new, str) and any(isinstance(v, str) for v in old) else new  # mesh.rules=tensor
        fits = isinstance(new, tuple)
    elif isinstance(old, str):
        fits, new = True, "none" if new is None else str(new)  # a name, as of model.remat
    elif isinstance(old, int) and isinstance(new, float) and new.is_integer():
        fits, new = True, int(new)  # 1e4 steps
    else:
        fits = isinstance(new, type(old)) or old is None
    if not fits:
        raise UserError(f"--config.{field}={new!r} should be {type(old).__name__}, like {old!r}")
    return new


def _unknown(field: str, group: str, name: str, known: Iterable[str]) -> UserError:
    hint = did_you_mean(name, known)
    return UserError(
        f"--config.{field}: {group or 'the config'} has no field {name!r}: {hint}it has {', '.join(known)}"
    )


def _open(groups: list[str], node: ConfigDict) -> bool:
    """Whether a group takes options that the config does not list: whoever is made with them checks them."""
    component = groups and groups[0] in ("process", "condition") and "name" in node
    return component or groups == ["sampling", "options"]


def _set(config: ConfigDict, field: str, value: Any) -> None:
    *groups, last = field.split(".")
    node = config
    for depth, name in enumerate(groups):
        if name not in node or not isinstance(node[name], ConfigDict):
            raise _unknown(field, ".".join(groups[:depth]), name, list(node))
        node = node[name]
    if last in node:
        value = _cast(field, node[last], value)
        if isinstance(value, ConfigDict):
            del node[last]  # a component is replaced with its options, not merged into the old one's
    elif not _open(groups, node):
        raise _unknown(field, ".".join(groups), last, list(node))
    with node.ignore_type():
        node[last] = value


def override(config: ConfigDict, arguments: Iterable[str]) -> ConfigDict:
    """Applies "--config.train.steps=100" arguments. Raises UserError on a wrong field or type."""
    config = config.copy_and_resolve_references()
    config.unlock()
    for argument in arguments:
        if not argument.startswith("--config.") or "=" not in argument:
            raise UserError(f"{argument}: unknown argument; config fields are set as --config.train.steps=100")
        field, value = argument.removeprefix("--config.").split("=", 1)
        _set(config, field, _parse(value))
    return config


# What younger configs have gained, with the value that says what older ones did.
_GAINED: dict[str, dict[str, Any]] = {
    "data": {"max_pixels": 1 << 26, "workers": 0, "mixture": (), "prefetch_bytes": 256 << 20, "on_device": "auto"},
    "condition": {"name": "none"},
    "process": {"raw_inputs": False},
    "optim": {"hold": 0},
    "ema": {"profiles": (), "snapshot_every": 1000, "snapshot_dtype": "float32"},
    "train": {
        "loggers": "",
        "rng": "threefry2x32",
        "max_bad_steps": 10,
        "max_rollbacks": 3,
        "spike": 0.0,
        "stall_seconds": 600.0,
    },
    "sampling": {"options": {}, "threshold": 0.0},
}


def _completed(fields: dict[str, Any]) -> dict[str, Any]:
    """A config's fields and those that it had before they were gained."""
    fields = fields | {group: {**gained, **fields.get(group, {})} for group, gained in _GAINED.items()}
    # A network's new option has as its default what it did without: older configs mean that.
    name = fields["model"].get("name", "unet")
    return fields | {"model": {**network(name).to_dict(), **fields["model"]}}


def _untupled(value: Any) -> Any:
    if isinstance(value, dict):  # of data.mixture
        return {k: _untupled(v) for k, v in value.items()}
    return tuple(_untupled(v) for v in value) if isinstance(value, list) else value


def to_json(config: ConfigDict) -> str:
    return json.dumps(config.to_dict(), indent=2) + "\n"


def from_json(text: str) -> ConfigDict:
    """The config saved by to_json; lists come back as the tuples they were, and fields that younger configs have
    gained are added."""

    def restore(node):
        if isinstance(node, dict):
            return {k: restore(v) for k, v in node.items()}
        return _untupled(node)

    return ConfigDict(_completed(restore(json.loads(text))))


def differences(old: ConfigDict, new: ConfigDict) -> list[str]:
    """What changed, a line a field: "train.steps: 100 -> 200"."""

    def flat(node, prefix=""):
        for k, v in node.items():
            yield from flat(v, f"{prefix}{k}.") if isinstance(v, dict) else [(prefix + k, v)]

    a, b = (dict(flat(_completed(c.to_dict()))) for c in (old, new))
    return [
        f"{k}: {a.get(k, '(unset)')} -> {b.get(k, '(unset)')}"
        for k in sorted(a.keys() | b.keys())
        if a.get(k) != b.get(k)
    ]
