"""The documentation's site: `make docs` writes docs/_build/html, which fetches nothing from anywhere."""

import importlib.util
import os
import pathlib
import sys

HERE = pathlib.Path(__file__).parent
sys.path[:0] = [str(HERE / "_ext"), str(HERE.parent)]
os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax_diffusion  # noqa: E402

project = "jax_diffusion"
author = "the authors of jax_diffusion"
copyright = f"{author}, Apache-2.0"
version = release = jax_diffusion.__version__

extensions = [
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx_copybutton",
    # Of docs/_ext.
    "docstrings",
    "code_links",
    "mathml",
    "commands",
]
exclude_patterns = ["_build", "_ext"]
highlight_language = "text"
smartquotes = False  # "--steps" is an option, not a dash

myst_enable_extensions = ["dollarmath"]
myst_heading_anchors = 4
myst_dmath_allow_digits = False

autodoc_default_options = {"members": True, "undoc-members": True, "no-value": True}
autodoc_member_order = "bysource"
autodoc_typehints_format = "short"
python_use_unqualified_type_names = True
python_maximum_signature_line_length = 88
add_module_names = False
toc_object_entries_show_parents = "hide"

html_theme = "furo"
html_title = f"jax_diffusion {version}"
# A font with the measures that equations need, which not every system has, from the package that carries it.
MATH_FONT = pathlib.Path(importlib.util.find_spec("ziamath").origin).parent / "fonts" / "STIXTwoMath-Regular.ttf"
html_static_path = ["_static", str(MATH_FONT)]
html_css_files = ["site.css"]
html_copy_source = False
html_math_renderer = "mathml"
copybutton_prompt_text = r"\$ "
copybutton_prompt_is_regexp = True
copybutton_exclude = ".linenos, .gp, .go"

# `make linkcheck`, where there is a network.
linkcheck_timeout = 20
linkcheck_retries = 2
linkcheck_workers = 4
