"""A foreign model in our terms: what every format's `read` returns."""

import dataclasses
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

import jax

from jax_diffusion import config as configs
from jax_diffusion import experiment
from jax_diffusion.interop import weights
from jax_diffusion.interop.tensors import Tensors
from jax_diffusion.interop.weights import Entry


class Architecture(NamedTuple):
    """A network in our terms, however it was described."""

    model: dict[str, Any]  # models.make's options, and "name"
    shape: tuple[int, ...]  # of one sample, (H, W, C)
    num_classes: int = 0
    learn_variance: bool = False
    cond_channels: int = 0  # of an image concatenated to the input, which Model.sample has to be given


@dataclasses.dataclass(frozen=True)
class Imported:
    """config is complete: `sample`, `train` and `evaluate` need nothing else. params and ema are nested dicts of
    float32 NumPy arrays; ema is None where the source has one set of weights."""

    config: configs.ConfigDict
    shape: tuple[int, ...]
    class_names: tuple[str, ...]
    params: dict[str, Any]
    ema: dict[str, Any] | None = None
    notes: tuple[str, ...] = ()  # what was assumed or left out, a line each


def make_config(
    architecture: Architecture, process: Mapping[str, Any] | None = None, sampling: Mapping[str, Any] | None = None
) -> configs.ConfigDict:
    """A whole config around an architecture. process, sampling: fields of those groups that differ from the default;
    components as config.named("cosine")."""
    c = configs.default()
    c.unlock()
    c.model = configs.network(**architecture.model)
    c.process.learn_variance = architecture.learn_variance
    c.data.labels = bool(architecture.num_classes)
    if architecture.shape[-1] in (1, 3):
        c.data.update(source="folder", size=architecture.shape[:2], channels=architecture.shape[-1])
    else:
        c.data.source = "numpy"  # latents, which come in their own shape
    c.optim.update(learning_rate=1e-5, warmup=100)  # fine-tuning, not training
    c.sampling.update(num=16, batch_size=16)
    for group, fields in (("process", process), ("sampling", sampling)):
        for name, value in (fields or {}).items():
            with c[group].ignore_type():
                if isinstance(value, configs.ConfigDict) and name in c[group]:
                    del c[group][name]
                c[group][name] = value
    return c


def build(
    architecture: Architecture,
    entries: Iterable[Entry],
    tensors: Tensors,
    *,
    ema: Tensors | None = None,
    ignore: Callable[[str], bool] = lambda name: False,
    process: Mapping[str, Any] | None = None,
    sampling: Mapping[str, Any] | None = None,
    class_names: Iterable[str] | None = None,
    notes: Iterable[str] = (),
) -> Imported:
    """The Imported of an architecture and the tensors that its entries name. class_names: None numbers them."""
    config = make_config(architecture, process, sampling)
    parts = experiment.build(config, architecture.shape, architecture.num_classes)
    experiment.default_table(config, parts.process)  # a solver that cannot be made is said now
    shapes = jax.eval_shape(parts.network.init, jax.random.key(0))
    entries = list(entries)
    params = weights.load(entries, tensors, shapes, ignore=ignore)
    averaged = None if ema is None else weights.load(entries, ema, shapes, ignore=ignore)
    # Only now: a damaged file may speak of any number of classes.
    names = map(str, range(architecture.num_classes)) if class_names is None else class_names
    return Imported(config, tuple(architecture.shape), tuple(names), params, averaged, tuple(notes))
