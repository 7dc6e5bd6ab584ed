"""What the README and the docs print is run as printed, and prints what they say."""

import contextlib
import io
import os
import pathlib
import re
import shlex
import subprocess
import sys
import warnings

import pytest

import jax_diffusion as jd
from jax_diffusion.cli import main

ROOT = pathlib.Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
BLOCKS = re.findall(r"```python\n(.*?)```", README, re.S)
DOCS = sorted(p for p in (ROOT / "docs").rglob("*.md") if "_build" not in p.parts)
# (a block of Python, and what it prints where a block of text right after it says so)
PRINTED = re.compile(r"```python\n(.*?)```(?:\n\n```text\n(.*?)```)?", re.S)
PAGES = [page for page in DOCS if PRINTED.search(page.read_text())]
COMMANDS = [
    page for page in [ROOT / "README.md", *DOCS] if re.search("^(    |\\$ )jax-diffusion ", page.read_text(), re.M)
]

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


@pytest.mark.parametrize("block", BLOCKS[1:])
def test_readme_examples_on_their_own(block, tmp_path):
    if "one compiled program" in block:
        block += "\nassert draw._cache_size() == 1"
    assert run_python(block, tmp_path)


@pytest.fixture
def registries(monkeypatch):
    """Copies, which a page may add to."""
    for module, name in (
        (jd.solvers, "SOLVERS"), (jd.schedules, "SCHEDULES"), (jd.models, "MODELS"), (jd.data, "SOURCES"),
    ):  # fmt: skip
        monkeypatch.setattr(module, name, dict(getattr(module, name)))


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.stem)
def test_pages_run_and_print_what_they_say(page, request, registries, tmp_path, monkeypatch):
    """The blocks of a page are one program, each as it is printed, in a folder of its own or after `make demo`."""
    text = page.read_text()
    monkeypatch.chdir(request.getfixturevalue("demo") if "runs/demo" in PRINTED.search(text)[0] else tmp_path)
    names = {"__name__": "__main__"}
    for code, says in PRINTED.findall(text):
        said = io.StringIO()
        with contextlib.redirect_stdout(said), warnings.catch_warnings():
            warnings.filterwarnings("error", module="jax_diffusion")
            exec(compile(code, str(page), "exec"), names)
        assert not says or said.getvalue().rstrip() == says.rstrip()


@pytest.mark.parametrize("page", COMMANDS, ids=lambda p: p.stem)
def test_commands_parse(page, capsys):
    """Every command line of the README and the docs is one that the parser accepts."""
    lines = page.read_text().replace("\\\n", " ")
    program = r"(?:jax-diffusion|launch/local\.sh(?: --dry-run)? \d+)"
    commands = re.findall(rf"^ *(?:\$ )?(?:\w+=\S+ )*{program} ([^`\n]*?)(?:\s+#[^`\n]*)?$", lines, re.M)
    parser = main._parser()
    for command in commands:
        _, rest = parser.parse_known_args(shlex.split(command))
        assert all(word.startswith("--config.") for word in rest), command


def test_readme_paths_exist():
    for path in re.findall(r"\]\(([^)#]+)\)|`((?:launch|colab|docs|configs)/[\w./]+)`", README):
        target = next(filter(None, path))
        assert (ROOT / target).exists(), target
