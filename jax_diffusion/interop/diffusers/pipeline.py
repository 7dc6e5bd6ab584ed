"""A folder of diffusers': a pipeline (model_index.json) or a lone component (config.json), read and written.

runs/ddpm/model_index.json
          unet/config.json  unet/diffusion_pytorch_model.safetensors
          scheduler/scheduler_config.json
"""

import contextlib
import importlib
import json
import pathlib
import re
from collections.abc import Iterator, Mapping
from typing import Any

from jax_diffusion import config as configs
from jax_diffusion.errors import UserError, did_you_mean
from jax_diffusion.interop import tensors, weights
from jax_diffusion.interop.diffusers import COMPONENTS, fields, ncsnpp, scheduler, scheduler_export
from jax_diffusion.interop.imported import Architecture, Imported, build

WEIGHTS = "diffusion_pytorch_model"
KINDS = ("safetensors", "safetensors.index", "bin", "bin.index")
# NAME.safetensors, NAME.fp16.safetensors, and as an index of shards NAME.safetensors.index[.fp16].json
FILE = re.compile(
    rf"{WEIGHTS}(\.(?P<before>\w+))?\.(?P<kind>safetensors|bin|(safetensors|bin)\.index(?=(\.\w+)?\.json$))"
    r"((\.(?P<after>\w+))?\.json)?"
)


def is_folder(path: pathlib.Path) -> bool:
    """Whether this is a folder of diffusers' (and not one of our runs)."""
    if (path / "model_index.json").is_file():
        return True
    return (path / "config.json").is_file() and "_class_name" in read_json(path / "config.json")


def read_json(path: pathlib.Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text())
    except FileNotFoundError:
        raise UserError(f"{path} is missing: the download is incomplete, or this is no folder of diffusers'") from None
    except (ValueError, OSError, RecursionError) as error:  # not JSON, not UTF-8
        raise UserError(f"{path} is damaged: {error}") from None
    if not isinstance(content, dict):
        raise UserError(f"{path} is damaged: it holds a {type(content).__name__}, not an object")
    fields.check(path, content)
    return content


@contextlib.contextmanager
def _blaming(path: pathlib.Path) -> Iterator[None]:
    """Errors name the file that they come from."""
    try:
        yield
    except UserError as error:
        raise error if str(path) in str(error) else UserError(f"{path}: {error}") from None
    except (TypeError, ValueError, LookupError, AttributeError, ArithmeticError) as error:
        said = " ".join(str(error).split())
        raise UserError(f"{path} describes what cannot be built: {type(error).__name__}: {said}") from None


def component(name: str, path: pathlib.Path | str):
    """The module that knows diffusers' class `name`."""
    if name not in COMPONENTS:
        raise UserError(
            f"{path}: {name!r} has no equivalent here: {did_you_mean(name, COMPONENTS)}{', '.join(COMPONENTS)} have"
        )
    return importlib.import_module(f"jax_diffusion.interop.diffusers.{COMPONENTS[name]}")


def weights_file(folder: pathlib.Path, variant: str | None = None) -> pathlib.Path:
    """The file of weights in a component's folder: the variant asked for ("fp16"), else the full precision, else the
    only one there is; safetensors before pickles."""
    found: dict[tuple[str | None, int], pathlib.Path] = {}  # (variant, kind) -> file
    for path in sorted(folder.glob(f"{WEIGHTS}*")):
        named = FILE.fullmatch(path.name)
        if named:
            found.setdefault((named["before"] or named["after"], KINDS.index(named["kind"])), path)
    variants = {of for of, _ in found}
    chosen = next(iter(variants)) if variant is None and len(variants) == 1 else variant
    kinds = [kind for of, kind in found if of == chosen]
    if kinds:
        return found[chosen, min(kinds)]
    there = ", ".join(p.name for p in found.values()) or "none"
    hint = "name one with variant=..." if found else "the download is incomplete"
    wanted = f"{WEIGHTS}.{variant}" if variant else WEIGHTS
    raise UserError(f"{folder} holds no weights {wanted}.safetensors (there: {there}): {hint}")


def read(path: str | pathlib.Path, *, variant: str | None = None) -> Imported:
    """The network, weights and sampling of a pipeline or component. UserError for whatever does not fit.

    variant: "fp16" and the like, of the weight files' names.
    """
    path = pathlib.Path(path)
    if not (path / "model_index.json").is_file():
        return _read(path, None, None, variant)
    index = read_json(path / "model_index.json")
    parts = {name: value[1] for name, value in index.items() if isinstance(value, list) and len(value) == 2}
    networks = [name for name in ("unet", "transformer") if parts.get(name)]
    if len(networks) != 1:
        raise UserError(
            f"{path}/model_index.json names {', '.join(parts) or 'no component'}: one 'unet' or 'transformer' is needed"
        )
    network = _part(path, networks[0])
    said = read_json(network / "config.json").get("_class_name", parts[networks[0]])
    if said != parts[networks[0]]:
        raise UserError(f"{path}: model_index.json says {parts[networks[0]]} and {networks[0]}/config.json {said}")
    known = (networks[0], "scheduler")
    left_out = [f"{name} ({cls}) was left out" for name, cls in parts.items() if cls and name not in known]
    if not parts.get("scheduler"):
        raise UserError(f"{path}/model_index.json names no scheduler, which every pipeline has: it is damaged")
    scheduler_config = read_json(_part(path, "scheduler") / "scheduler_config.json")
    if scheduler_config.setdefault("_class_name", parts["scheduler"]) != parts["scheduler"]:
        said = scheduler_config["_class_name"]
        raise UserError(f"{path}: model_index.json says {parts['scheduler']} and scheduler_config.json {said}")
    return _read(network, scheduler_config, index, variant, left_out)


def _part(path: pathlib.Path, name: str) -> pathlib.Path:
    """A component's folder; the oldest pipelines (google/ddpm-cifar10-32) lie flat in one."""
    return path / name if (path / name).is_dir() or not (path / "config.json").is_file() else path


def _read(
    folder: pathlib.Path,
    scheduler_config: dict[str, Any] | None,
    index: Mapping[str, Any] | None,
    variant: str | None,
    notes: list[str] | None = None,
) -> Imported:
    config = read_json(folder / "config.json")
    module = component(str(config.get("_class_name")), folder)
    notes = list(notes or [])
    if scheduler_config is None:
        scheduler_config = {
            "_class_name": "DDIMScheduler",
            "clip_sample": config.get("in_channels") != 4,
        }
        notes.append("no scheduler was found: DDPM's linear schedule and DDIM's solver were assumed")
    with _blaming(folder / "config.json"):
        architecture = module.architecture(config)
    with _blaming(folder.parent if index is not None else folder):
        process, sampling, more = scheduler.read(scheduler_config)
    if architecture.learn_variance and sampling["solver"] == "ddpm":
        sampling["options"].pop("variance", None)  # the network's channels say so; not every scheduler's config does
    if architecture.model.get("time_embedding") == "log_fourier" and not process.get("raw_inputs"):
        raise UserError(
            f"{folder}: the network is shown sigma and predicts the score, and its scheduler is "
            f"{scheduler_config['_class_name']}{'' if index else ' (assumed: none was found)'}: a pipeline's folder "
            "with a ScoreSdeVeScheduler is needed"
        )
    # Published score models are of images in [0, 1]; ours say so.
    unit_range = (config.get(ncsnpp.OURS) or {}).get("unit_range", True)
    if process.get("raw_inputs") and ncsnpp.is_ncsnpp(config) and unit_range:
        architecture, process = ncsnpp.in_our_range(architecture, process)
    found = tensors.open_file(weights_file(folder, variant)).renamed(module.rename)
    with _blaming(folder):
        return build(
            architecture,
            module.entries(architecture),
            found,
            ignore=module.ignore,
            process={k: v for k, v in process.items() if k != "learn_variance"},
            sampling=sampling,
            class_names=_class_names(index, architecture),
            notes=[*notes, *more],
        )


def _class_names(index: Mapping[str, Any] | None, architecture: Architecture) -> tuple[str, ...] | None:
    """DiTPipeline's id2label: the first of each class's names."""
    names = (index or {}).get("id2label")
    if not isinstance(names, dict) or not names:
        return None
    try:
        named = {int(i): str(name).split(",")[0].strip() for i, name in names.items()}
    except ValueError:
        return None
    return tuple(named.get(i, str(i)) for i in range(architecture.num_classes))


def write(
    folder: str | pathlib.Path, architecture: Architecture, config: configs.ConfigDict, params: Any, class_names=()
) -> pathlib.Path:
    """Writes a pipeline folder that diffusers opens. UserError where diffusers has no such network or process."""
    folder = pathlib.Path(folder)
    cls, name, pipeline = _home(architecture)
    module = component(cls, folder)
    network_config = module.config_of(architecture)
    unit_range = architecture.model.get("unit_range", False)
    scheduler_config = scheduler_export.write(config.process, config.sampling, unit_range=unit_range)
    found = weights.save(module.entries(architecture), params)
    if pipeline == "DDPMPipeline" and scheduler_config["_class_name"] == "DDIMScheduler":
        pipeline = "DDIMPipeline"
    index: dict[str, Any] = {
        "_class_name": pipeline,
        "_diffusers_version": "0.33.0",
        name: ["diffusers", cls],
        "scheduler": ["diffusers", scheduler_config["_class_name"]],
    }
    if class_names and pipeline == "DiTPipeline":
        index["id2label"] = {str(i): n for i, n in enumerate(class_names)}
    for sub in (name, "scheduler"):
        (folder / sub).mkdir(parents=True, exist_ok=True)
    tensors.save(folder / name / f"{WEIGHTS}.safetensors", found)
    for file, content in (
        (folder / name / "config.json", {"_class_name": cls, "_diffusers_version": "0.33.0", **network_config}),
        (folder / "scheduler" / "scheduler_config.json", scheduler_config),
        (folder / "model_index.json", index),
    ):
        file.write_text(json.dumps(content, indent=2) + "\n")
    return folder


def _home(architecture: Architecture) -> tuple[str, str, str]:
    """(diffusers' class, its place in a pipeline, the pipeline)."""
    homes = {
        "song_unet": ("UNet2DModel", "unet", "ScoreSdeVePipeline"),
        "unet": ("UNet2DModel", "unet", "DDPMPipeline"),
        "dit": ("DiTTransformer2DModel", "transformer", "DiTPipeline"),
    }
    name = architecture.model["name"]
    if name not in homes:
        raise UserError(f"model.name={name!r} has no equivalent in diffusers: {', '.join(homes)} have")
    return homes[name]
