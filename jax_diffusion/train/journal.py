"""The warnings of a run, kept: what scrolled away a week ago is what `jax-diffusion report` begins with."""

import json
import pathlib
import time
from collections.abc import Callable

import jax

FILE = "warnings.jsonl"


def keep_warnings(workdir: pathlib.Path, log: Callable[[str], None]) -> Callable[[str], None]:
    """`log`, which also appends each line that starts with "warning: " to WORKDIR/warnings.jsonl (process 0 does)."""
    if jax.process_index():
        return log

    def kept(line: str) -> None:
        log(line)
        if line.startswith("warning: "):
            record = {"time": round(time.time(), 3), "line": line.removeprefix("warning: ")}
            try:
                with (workdir / FILE).open("a") as f:
                    f.write(json.dumps(record) + "\n")
            except OSError:  # a full disk: the line was shown, and whoever needs the disk says so
                pass

    return kept
