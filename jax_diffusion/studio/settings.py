"""What is drawn: checked, as a solver's table, as JSON and as a command line."""

import argparse
import dataclasses
import inspect
import math
import shlex
from collections.abc import Mapping
from typing import Any

from jax_diffusion import solvers
from jax_diffusion.cli import sample
from jax_diffusion.errors import UserError, choose

MOST_STEPS, MOST_IMAGES, MOST_SEED = 4000, 100, 2**31 - 1
# Options of solvers with a field of their own; others are typed as OPTION=VALUE.
FIELDS = ("eta", "S_churn", "jump_length", "resamples")
UNCONDITIONAL = "none"  # among the labels


@dataclasses.dataclass(frozen=True)
class Settings:
    """All that decides the samples of a model, but for what is inpainted."""

    solver: str
    steps: int
    grid: str = ""  # "" is the recipe's, or the schedule's default
    options: Mapping[str, Any] = dataclasses.field(default_factory=dict)  # of the solver or its grid
    guidance: float = 1.0
    labels: tuple[int, ...] | None = None  # repeated in turn; None is unconditional
    seed: int = 0
    num: int = 1

    def checked(self, model: Any) -> "Settings":
        """These settings, if the model can draw them. Raises UserError with the field, its value and the remedy."""
        choose("solver", self.solver, known_solvers())
        whole("steps", self.steps, 1, MOST_STEPS)
        whole("seed", self.seed, 0, MOST_SEED)
        whole("number of images", self.num, 1, MOST_IMAGES)
        number("guidance", self.guidance)
        names = model.class_names
        if self.labels is not None and not names:
            raise UserError("labels: this model was trained without labels; leave them out")
        for label in self.labels or ():
            if not 0 <= label < len(names):
                raise UserError(f"label {label}: the classes are 0 to {len(names) - 1}")
        self.table(model)
        return self

    def table(self, model: Any) -> Any:
        """The solver's table, as `jax-diffusion sample` makes it."""
        said = [f"{name}={value}" for name, value in self.options.items()]
        options = argparse.Namespace(solver=self.solver, steps=self.steps, grid=self.grid, set=said, table=None)
        try:
            return sample.make_table(model, options)
        except (AssertionError, ArithmeticError) as e:  # numbers that no table comes out of
            raise UserError(f"{self.solver} with {', '.join(said) or 'these settings'}: {e}; try other numbers") from e

    @property
    def scale(self) -> float:
        """Of guidance; without labels there is nothing to guide by."""
        return 1.0 if self.labels is None else self.guidance

    def command(self, workdir: str, step: int, classes: int) -> str:
        """The command line that draws the same samples."""
        words = ["jax-diffusion", "sample", f"--workdir={workdir}", f"--checkpoint={step}"]
        words += [f"--solver={self.solver}", f"--steps={self.steps}"]
        words += [f"--grid={self.grid}"] if self.grid else []
        for name, value in self.options.items():
            words += ["--set", f"{name}={value}"]
        if self.labels is not None:
            words += [f"--guidance={self.guidance:g}"]
            if self.labels != tuple(range(classes)):
                words += ["--labels=" + ",".join(map(str, self.labels))]
        elif classes:
            words += [f"--labels={UNCONDITIONAL}"]
        words += [f"--seed={self.seed}", f"--num={self.num}"]
        return shlex.join(words)

    def to_json(self) -> dict[str, Any]:
        return {**dataclasses.asdict(self), "options": dict(self.options)}

    @classmethod
    def from_json(cls, fields: Any) -> "Settings":
        """What to_json wrote. Raises UserError where it is something else."""
        try:
            labels = fields["labels"]
            return cls(
                solver=str(fields["solver"]),
                steps=fields["steps"],
                grid=str(fields["grid"]),
                options={str(k): v for k, v in fields["options"].items() if isinstance(v, int | float | str)},
                guidance=fields["guidance"],
                labels=None if labels is None else tuple(whole("label", l, 0, MOST_SEED) for l in labels),
                seed=fields["seed"],
                num=fields["num"],
            )
        except (KeyError, TypeError, AttributeError) as e:
            raise UserError(f"the settings are incomplete or of another kind ({type(e).__name__}: {e})") from None


def known_solvers() -> list[str]:
    return [*solvers.SOLVERS, *solvers.METHODS]


def fields_of(solver: str) -> dict[str, Any]:
    """FIELDS that a solver has, with its defaults."""
    made = {**solvers.SOLVERS, **solvers.METHODS}.get(solver)
    parameters = inspect.signature(made).parameters if made else {}
    return {name: parameters[name].default for name in FIELDS if name in parameters}


def number(name: str, value: Any) -> float:
    """`value` as a finite number; UserError where it is none."""
    if value is None or value == "":
        raise UserError(f"{name} is empty: give a number")
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise UserError(f"{name}={value}: give a number")
    return value


def whole(name: str, value: Any, least: int, most: int) -> int:
    """`value` as a whole number from least to most; UserError where it is none."""
    given = number(name, value)
    if given != int(given) or not least <= given <= most:
        raise UserError(f"{name}={given:g}: give a whole number from {least} to {most:,}")
    return int(given)


def parse_labels(words: list[str], class_names: tuple[str, ...]) -> tuple[int, ...] | None:
    """["3", "roses"] -> (3, 2); [] is all classes in turn; "none", or a model without labels, is None."""
    if not class_names:
        return None
    if not words:
        return tuple(range(len(class_names)))
    if UNCONDITIONAL in words:
        if len(words) > 1:
            raise UserError(f"labels {', '.join(words)}: {UNCONDITIONAL!r} goes with no other")
        return None
    labels: list[int] = []
    for word in words:
        try:  # a name may hold a comma, which separates labels on the command line
            labels += [class_names.index(word)] if word in class_names else sample.parse_labels(word, class_names) or []
        except UserError as e:
            raise UserError(str(e).removeprefix("--")) from None
    return tuple(labels)


def show_labels(labels: tuple[int, ...] | None, class_names: tuple[str, ...]) -> list[str]:
    """What parse_labels read."""
    if labels is None:
        return [UNCONDITIONAL] if class_names else []
    return [] if labels == tuple(range(len(class_names))) else [class_names[l] for l in labels]


def read(model: Any, values: Mapping[str, Any]) -> Settings:
    """The Settings of a page's fields: solver, steps, grid, FIELDS, more ("OPTION=VALUE ..."), guidance, labels (a list
    of words), seed, num. Raises UserError where they make none."""
    solver = choose("solver", str(values["solver"]), known_solvers())
    options = {}
    for name, default in fields_of(solver).items():
        value = number(name, values[name])
        if isinstance(default, int) and not isinstance(default, bool):
            value = whole(name, value, 1, MOST_STEPS)
        options[name] = value
    try:
        options |= sample.parse_options((values["more"] or "").split())
    except UserError as e:
        raise UserError(f"more options: {str(e).removeprefix('--set ')}".replace("--set ", "")) from None
    settings = Settings(
        solver=solver,
        steps=whole("steps", values["steps"], 1, MOST_STEPS),
        grid=(values["grid"] or "").strip(),
        options=options,
        guidance=float(number("guidance", values["guidance"])) if model.class_names else 1.0,
        labels=parse_labels(list(values["labels"] or []), model.class_names),
        seed=whole("seed", values["seed"], 0, MOST_SEED),
        num=whole("number of images", values["num"], 1, MOST_IMAGES),
    )
    return settings.checked(model)


def show(settings: Settings, class_names: tuple[str, ...]) -> dict[str, Any]:
    """The fields of a page that `read` makes these settings of."""
    own = fields_of(settings.solver)
    return {
        "solver": settings.solver,
        "steps": settings.steps,
        "grid": settings.grid,
        **{name: settings.options.get(name, own.get(name, 0)) for name in FIELDS},
        "more": " ".join(f"{k}={v}" for k, v in settings.options.items() if k not in own),
        "guidance": settings.guidance,
        "labels": show_labels(settings.labels, class_names),
        "seed": settings.seed,
        "num": settings.num,
    }


def of_recipe(model: Any) -> Settings:
    """What the run's recipe samples with, of few images."""
    said, classes = model.config.sampling, len(model.class_names)
    return Settings(
        solver=said.solver,
        steps=said.steps,
        grid=said.grid or "",
        options=dict(said.options),
        guidance=float(said.guidance),
        labels=tuple(range(classes)) or None,
        num=classes if 1 < classes <= 20 else 9,
    )


def of_inpainting(model: Any) -> Settings:
    """What `jax-diffusion inpaint` fills in with: RePaint, four results."""
    options = {"jump_length": 10, "resamples": 4, "eta": 1.0}
    return dataclasses.replace(of_recipe(model), solver="repaint", steps=50, options=options, labels=None, num=4)
