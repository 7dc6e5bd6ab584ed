"""One HTML page of a training run, or of several beside each other: `jax-diffusion report`.

run.py      what a workdir holds, read however unfinished or torn it is
series.py   metrics as series of a bounded number of points
findings.py what a reader should know first: restarts, rollbacks, skipped steps, corrupt files
tables.py   config, environment, checkpoints, evaluations as HTML
page.py     all of it in one file, with page.css and page.js
"""

from jax_diffusion.reporting.page import write

__all__ = ["write"]
