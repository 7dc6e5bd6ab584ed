"""The site is built once, warnings as errors, and then read: links, menu, reference, and that nothing is fetched."""

import importlib.util
import os
import pathlib
import re
import subprocess
import sys

import pytest

import jax_diffusion as jd

from . import built_page, github

ROOT = pathlib.Path(__file__).parents[2]
SOURCES = sorted(p for p in (ROOT / "docs").rglob("*.md") if "_build" not in p.parts)
# Of commands and of Model.sample, in the table of names.
OPTIONS = ("jax-diffusion", "final", "guidance", "guidance_rescale", "autoguide", "img2img", "interpolate", "evaluate")
MARKDOWN = [*sorted(ROOT.glob("*.md")), *SOURCES]


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """{path: Page} of every page."""
    out = tmp_path_factory.mktemp("site")
    done = subprocess.run(
        [sys.executable, "-m", "sphinx", "-W", "--keep-going", "-q", "-b", "html", "-d", out / "trees", ROOT / "docs",
         out / "html"],
        capture_output=True, text=True, timeout=500, env={**os.environ, "JAX_PLATFORMS": "cpu"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-5000:]
    return {p.resolve(): built_page.Page(p) for p in sorted((out / "html").rglob("*.html"))}


def home(site) -> pathlib.Path:
    return next(path for path in site if path.name == "index.html" and path.parent.name == "html")


def documents(site) -> dict[str, pathlib.Path]:
    """{"howto/train": its page} of every source."""
    names = [p.relative_to(ROOT / "docs").with_suffix("").as_posix() for p in SOURCES]
    return {name: home(site).parent / f"{name}.html" for name in names}


def test_every_link_leads_somewhere(site):
    dead = []
    for path, page in site.items():
        for link in [*page.links, *page.nav, *page.fetched]:
            if built_page.is_external(link):
                continue
            target, fragment = built_page.resolve(path, link)
            whole = not fragment or target not in site or fragment in site[target].ids
            if not target.is_file() or not whole:
                dead.append(f"{path.name}: {link}")
    assert not dead


def test_nothing_is_fetched_from_elsewhere(site):
    """No stylesheet, script, font or picture of another host, in pages or in styles."""
    for path, page in site.items():
        assert not [link for link in page.fetched if built_page.is_external(link) and not link.startswith("data:")], (
            path
        )
    for style in home(site).parent.rglob("*.css"):
        urls = re.findall(r"url\(\s*['\"]?([^'\")]+)|@import\s+['\"]([^'\"]+)", style.read_text())
        for url in ("".join(u) for u in urls):
            assert url.startswith(("data:", "#")) or (style.parent / url.split("?")[0].split("#")[0]).is_file(), url


def test_links_to_other_hosts_are_well_formed(site):
    """That they answer is for `make linkcheck`, where there is a network."""
    outward = {link for page in site.values() for link in page.links if built_page.is_external(link)}
    for link in outward:
        assert re.fullmatch(r"https://[a-z0-9.-]+\.[a-z]{2,}(/[^\s<>\"]*)?", link), link


def test_every_page_is_in_the_menu(site):
    at = home(site)
    menu = {built_page.resolve(at, link)[0] for link in site[at].nav}
    assert not [name for name, path in documents(site).items() if path not in menu and path != at]


def test_equations_are_mathml_without_errors(site):
    text = documents(site)["concepts"].read_text()
    assert text.count("<math") > 40 and "<merror" not in text
    assert not re.search(r"<mi>\\\w|<mtext>\\", text)  # a command that the converter does not know


def test_every_public_name_is_in_the_reference(site):
    ids = {i for path, page in site.items() if path.parent.name == "reference" for i in page.ids}
    missing = []
    for name in jd.__all__:
        if name == "__version__":
            assert "jd.__version__" in documents(site)["reference/index"].read_text()
        elif not {f"jax_diffusion.{name}", f"module-jax_diffusion.{name}"} & ids:
            missing.append(name)
    for module in (importlib.import_module(f"jax_diffusion.{name}") for name in jd._MODULES):
        for name in getattr(module, "__all__", ()):
            thing = getattr(module, name)
            home = (
                f"{getattr(thing, '__module__', '')}.{getattr(thing, '__qualname__', '')}"  # of what a package hands on
            )
            if not {f"{module.__name__}.{name}", f"module-{module.__name__}.{name}", home} & ids:
                missing.append(f"{module.__name__}.{name}")
    assert not missing


def test_code_in_the_concepts_leads_to_the_reference(site):
    """`jd.process.make` in a page is a link; what is none is misspelt, or not in the reference."""
    for name in ("concepts", *(n for n in documents(site) if n.startswith("howto/"))):
        text = documents(site)[name].read_text()
        body = text[text.index("<article") : text.index("</article")]
        plain = re.sub(r"<a\b.*?</a>", "", body, flags=re.S)
        assert not re.findall(r'<code[^>]*><span class="pre">(jd\.[\w.]+)', plain), name


@pytest.mark.parametrize("page", MARKDOWN, ids=lambda p: p.relative_to(ROOT).as_posix())
def test_links_resolve_on_github(page):
    assert not github.dead(page, ROOT)


def test_the_solver_zoo_is_complete():
    """Every solver and every grid of the registries has its name in docs/solvers.md, and no other has."""
    text = (ROOT / "docs" / "solvers.md").read_text()
    families = re.search(r"^\| family .*?\n\n", text, re.M | re.S)[0]
    named = set()
    for code in re.findall(r"`([^`]+)`", families):
        named.add(code if not code.startswith("_") else f"dpm_solver{code}")
    assert named == {*jd.solvers.SOLVERS, *jd.solvers.METHODS}
    grids = re.search(r"Grids: (.*?), or the points", text, re.S)[1]
    assert set(re.findall(r"`(\w+)`", grids)) == set(jd.solvers.grids.SPACINGS)


def test_deadness_is_noticed(tmp_path):
    page = tmp_path / "page.md"
    page.write_text(
        "# A `b`, c\n[x](#a-b-c) [y](#none) [z](none.md) `[w](none.md)` [v](../page.md)\n```\n[u](none)\n```\n"
    )
    assert github.dead(page, tmp_path) == ["#none", "none.md", "../page.md"]
    html = tmp_path / "page.html"
    html.write_text('<link rel="stylesheet" href="https://x.org/a.css"><a id="b" href="p.html#c">d</a>')
    built = built_page.Page(html)
    assert (built.fetched, built.links, built.ids) == (["https://x.org/a.css"], ["p.html#c"], {"b"})


def test_equivalent_names_are_names():
    """Those of this project are in its registries and configs, those of installed packages in these."""

    def source(package):  # read, not imported
        folder = pathlib.Path(importlib.util.find_spec(package).submodule_search_locations[0])
        return "".join(p.read_text() for p in [*folder.glob("*.py"), *folder.glob("schedulers/*.py")])

    lucidrains, diffusers = source("denoising_diffusion_pytorch"), source("diffusers")
    text = (ROOT / "docs" / "from_pytorch.md").read_text().split("## Names")[1]
    rows = [line.strip("|").split("|") for line in text.splitlines() if line.startswith("| `")]
    assert len(rows) > 40
    config = jd.config.default()
    known = {*jd.solvers.SOLVERS, *jd.solvers.METHODS, *jd.solvers.grids.SPACINGS}
    known |= {*jd.schedules.SCHEDULES, *jd.models.MODELS, *OPTIONS}
    for ours, theirs, *_, lucid in rows:
        first = re.search(r"`([\w.]+)", ours)[1]
        if "." in first:
            group, field = first.split(".")[:2]
            assert field in config[group], first
        else:
            assert first in known, first
        for name in re.findall(r"`((?:[A-Z]\w+)?(?:Scheduler|Model|2DModel))`", theirs):
            assert f'"{name}"' in diffusers or f"class {name}" in diffusers, name
        for name in re.findall(r"`(\w+(?:_\w+)+)`", lucid):
            assert name in lucidrains or name == "denoising_diffusion_pytorch", name
