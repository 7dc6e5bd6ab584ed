"""The sdist, the wheel made of it, and a run with that wheel far from the repository."""

import email
import json
import os
import pathlib
import shutil
import site
import subprocess
import sys
import sysconfig
import tarfile
import venv
import zipfile
from types import SimpleNamespace

import pytest

import jax_diffusion
from jax_diffusion import config as configs
from jax_diffusion.onednn import library

ROOT = pathlib.Path(__file__).parents[2]
FOLDERS = ("jax_diffusion", "configs", "tests", "docs", "launch", "colab")


def checked(*command, **options):
    done = subprocess.run([*map(str, command)], capture_output=True, text=True, timeout=300, **options)
    assert done.returncode == 0, (done.stdout + done.stderr)[-3000:]
    return done.stdout


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """The paths of what `python -m build` makes of the source tree: the sdist and, of the sdist, the wheel."""
    root = tmp_path_factory.mktemp("build")
    source = root / "source"
    source.mkdir()
    # Of a copy: a build writes beside setup.py, and what an earlier one left there would be in the wheel.
    for path in ROOT.iterdir():
        if path.is_file():
            shutil.copy(path, source)
    for name in FOLDERS:
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__", "_build"))
    checked(sys.executable, "-m", "build", "--no-isolation", "--outdir", root / "dist", source, cwd=root)
    (sdist,), (wheel,) = (root / "dist").glob("*.tar.gz"), (root / "dist").glob("*.whl")
    return SimpleNamespace(sdist=sdist, wheel=wheel)


def files(folder):
    """Every file of a folder of the repository, as the packages should hold them."""
    return {str(p.relative_to(ROOT)) for p in folder.rglob("*") if p.is_file() and "__pycache__" not in p.parts}


def test_the_wheel_is_the_package_its_data_and_the_recipes(built):
    with zipfile.ZipFile(built.wheel) as wheel:
        names = {n for n in wheel.namelist() if ".dist-info/" not in n}
        (metadata,) = (wheel.read(n).decode() for n in wheel.namelist() if n.endswith(".dist-info/METADATA"))
    recipes = {f"jax_diffusion/{name}" for name in files(ROOT / "configs")}
    assert names == files(ROOT / "jax_diffusion") | recipes
    assert "jax_diffusion/py.typed" in names and any(n.endswith(".css") for n in names)
    assert {f"jax_diffusion/onednn/{path.name}" for path in library.SOURCES} <= set(names)
    assert email.message_from_string(metadata)["Version"] == jax_diffusion.__version__


def test_the_sdist_holds_what_makes_the_wheel_and_no_tests_or_docs(built):
    with tarfile.open(built.sdist) as sdist:
        names = {m.name.split("/", 1)[1] for m in sdist.getmembers() if m.isfile()}
    code = files(ROOT / "jax_diffusion") | files(ROOT / "configs")
    beside = {n for n in names - code if ".egg-info/" not in n}
    assert code <= names
    assert not any("/" in n for n in beside), "more than packages and the files of the top folder"
    assert {"LICENSE", "README.md", "CITATION.cff", "setup.py", "pyproject.toml"} <= beside


@pytest.fixture(scope="module")
def elsewhere(built, tmp_path_factory):
    """run(name, *arguments, **environment): a program of a virtual environment in which nothing but the wheel is
    installed, in a folder of its own. What the wheel requires is borrowed from the environment of the tests."""
    root = tmp_path_factory.mktemp("elsewhere")
    venv.create(root / "env", symlinks=os.name != "nt")
    at = {"base": str(root / "env"), "platbase": str(root / "env")}
    programs = pathlib.Path(sysconfig.get_path("scripts", "venv", at))
    # Paths alone: the .pth files in them, that of the editable repository among them, are not read.
    borrowed = "\n".join([*site.getsitepackages(), ""])
    pathlib.Path(sysconfig.get_path("purelib", "venv", at), "borrowed.pth").write_text(borrowed)
    pip = (sys.executable, "-m", "pip", "--python", programs / "python", "--disable-pip-version-check")
    checked(*pip, "install", "--no-deps", "--no-index", "--no-compile", built.wheel, cwd=root)
    work = root / "work"
    work.mkdir()
    base = {k: v for k, v in os.environ.items() if not k.startswith(("PYTHON", "VIRTUAL_ENV"))}

    def run(name, *arguments, **environment):
        return checked(programs / name, *arguments, cwd=work, env={**base, **environment})

    return SimpleNamespace(run=run, work=work, env=root / "env")


FACTS = """
import importlib.util, json, sys
import jax_diffusion
from jax_diffusion import config
for name in config.recipes():
    config.resolve(name)
found = importlib.util.find_spec("configs")  # as the repository calls them
print(json.dumps([jax_diffusion.__file__, jax_diffusion.__version__, list(config.recipes()), str(found), sys.path]))
"""


def test_nothing_of_it_comes_from_the_repository(elsewhere):
    at, version, recipes, found, paths = json.loads(elsewhere.run("python", "-c", FACTS))
    assert pathlib.Path(at).is_relative_to(elsewhere.env) and not pathlib.Path(at).is_relative_to(ROOT)
    assert str(ROOT) not in paths and found == "None"
    assert version == jax_diffusion.__version__
    assert recipes == list(configs.recipes()) and "digits" in recipes


def test_the_demo_runs_there(elsewhere, arguments):
    fields = arguments("digits", "train.steps=4", "optim.warmup=1", "train.eval_every=0", "train.sample_every=0",
                       "model.channels=8", "model.blocks=1", "model.multipliers=(1,)")  # fmt: skip
    elsewhere.run("jax-diffusion", "train", "--config=digits", "--workdir=run", *fields)
    elsewhere.run("jax-diffusion", "sample", "--workdir=run", "--num=4", "--steps=2", "--out=grid.png")
    assert (elsewhere.work / "grid.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    elsewhere.run("jax-diffusion", "report", "--workdir=run")  # of style sheets and scripts that lie in the package
    (page,) = elsewhere.work.glob("**/*.html")
    assert "digits" in page.read_text() and "<style>" in page.read_text()
