"""What a user did wrong, said in one line: the option, its value, the remedy."""

import difflib
from collections.abc import Iterable


class UserError(ValueError):
    """A mistake the user can mend. Commands print it as one line, without a traceback."""


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
