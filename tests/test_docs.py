"""What the README and the notebooks print is run as printed."""

import json
import os
import pathlib
import re
import shlex
import subprocess
import sys

import pytest

from jax_diffusion.cli import main

ROOT = pathlib.Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
BLOCKS = re.findall(r"```python\n(.*?)```", README, re.S)
PAGES = [
    b
    for page in sorted((ROOT / "docs").glob("*.md"))
    for b in re.findall(r"```python\n(.*?)```", page.read_text(), re.S)
]
NOTEBOOKS = sorted((ROOT / "colab").glob("*.ipynb"))

STRICT = "import warnings\nwarnings.filterwarnings('error', module='jax_diffusion')\n"


def run_python(code: str, cwd: pathlib.Path) -> str:
    done = subprocess.run(
        [sys.executable, "-c", STRICT + code],
        cwd=cwd,
        capture_output=True,
        text=True,
        timeout=400,
        env={**os.environ, "JAX_PLATFORMS": "cpu"},
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    """What `make demo` leaves, after fewer steps."""
    root = tmp_path_factory.mktemp("readme")
    fields = ["train.steps=20", "optim.warmup=2", "train.sample_every=0", "model.channels=8", "model.heads=2"]
    arguments = ["train", "--config=digits", f"--workdir={root}/runs/demo", *(f"--config.{f}" for f in fields)]
    assert main.main(arguments) == 0
    return root


def test_readme_example_after_the_demo(demo):
    out = run_python(BLOCKS[0], demo)
    assert "20 evaluations" in out
    assert (demo / "runs/demo/threes_and_sevens.png").stat().st_size > 100
    assert len([line for line in BLOCKS[0].splitlines() if line]) <= 10


@pytest.mark.parametrize("block", [*BLOCKS[1:], *PAGES])
def test_readme_examples_on_their_own(block, tmp_path):
    if "one compiled program" in block:
        block += "\nassert draw._cache_size() == 1"
    assert run_python(block, tmp_path)


def test_readme_commands_parse(demo, capsys):
    """Every command line of the README is one the parser accepts."""
    lines = README.replace("\\\n", " ")
    commands = re.findall(r"^    (jax-diffusion .*?)(?:\s+#.*)?$", lines, re.M)
    assert len(commands) >= 4
    parser = main._parser()
    for command in commands:
        _, rest = parser.parse_known_args(shlex.split(command)[1:])
        assert all(word.startswith("--config.") for word in rest), command


def test_readme_paths_exist():
    for path in re.findall(r"\]\(([^)#]+)\)|`((?:launch|colab|docs|configs)/[\w./]+)`", README):
        target = next(filter(None, path))
        assert (ROOT / target).exists(), target


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
def test_notebook_runs_and_is_stripped(path, tmp_path):
    """All code cells in order, as one program; training is cut short through the config's own field."""
    cells = [c for c in json.loads(path.read_text())["cells"] if c["cell_type"] == "code"]
    assert all(not c["outputs"] and c["execution_count"] is None for c in cells)
    code = "\n\n".join("".join(c["source"]) for c in cells)
    code = re.sub(r"^( *)%pip .*$", r"\1pass", code, flags=re.M)
    code = re.sub(r"config\.train\.steps = \d+", "config.train.steps = 15; config.optim.warmup = 2", code)
    code = re.sub(r"config\.train\.sample_every = \d+", "config.train.sample_every = 0", code)
    run_python(code, tmp_path)


def test_version_is_said_once():
    import jax_diffusion

    others = [p for p in ("setup.py", "pyproject.toml") if jax_diffusion.__version__ in (ROOT / p).read_text()]
    assert not others
