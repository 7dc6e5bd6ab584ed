"""What a user did wrong, said in one line: the option, its value, the remedy."""

import difflib
import inspect
from collections.abc import Callable, Iterable, Mapping
from typing import Any


class UserError(ValueError):
    """A mistake the user can mend. Commands print it as one line, without a traceback."""

    def __str__(self) -> str:
        """With what a damaged file may have put into it, a terminal's escapes say, made visible."""
        return printable(super().__str__())


def printable(text: str) -> str:
    """`text` with what a terminal would obey, or could not encode, made visible."""
    return "".join(c if c.isprintable() or c == "\n" else ascii(c)[1:-1] for c in text)


def choose(option: str, value: str, choices: Iterable[str]) -> str:
    """Returns `value` if it is one of `choices`; otherwise raises a UserError naming the nearest one."""
    choices = sorted(choices)
    if value in choices:
        return value
    raise UserError(f"{option}={value!r} is unknown: {did_you_mean(value, choices)}choose one of {', '.join(choices)}")


def did_you_mean(value: str, choices: Iterable[str]) -> str:
    """ "did you mean 'ddim'? " for "ddmi", or "" where nothing is near. Of equals, swapped letters win."""

    def likeness(choice):
        return difflib.SequenceMatcher(None, str(value), choice).ratio(), sorted(choice) == sorted(str(value))

    near = max(choices, key=likeness, default="")
    return f"did you mean {near!r}? " if near and likeness(near)[0] >= 0.5 else ""


def check_options(
    owner: str, function: Callable, options: Mapping[str, Any], positional: int = 0, also: str = ""
) -> None:
    """Raises UserError unless `function` takes every one of `options`, and numbers where its defaults are numbers.

    positional: how many leading parameters are not options.  also: an option its caller has taken already.
    """
    parameters = list(inspect.signature(function).parameters.values())[positional:]
    if any(p.kind is p.VAR_KEYWORD for p in parameters):
        return
    known = {p.name: p.default for p in parameters} | ({also: None} if also else {})
    for option, value in options.items():
        if option not in known:
            takes = f"it takes {', '.join(known)}" if known else "it takes none"
            raise UserError(f"{owner} has no option {option!r}: {did_you_mean(option, known)}{takes}")
        if isinstance(known[option], int | float) and not isinstance(value, int | float):
            raise UserError(f"{option}={value!r} of {owner} should be a number, like {known[option]}")
