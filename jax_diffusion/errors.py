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
    near = difflib.get_close_matches(str(value), choices, n=1, cutoff=0.4)
    hint = f"did you mean {near[0]!r}? " if near else ""
    raise UserError(f"{option}={value!r} is unknown: {hint}choose one of {', '.join(choices)}")
