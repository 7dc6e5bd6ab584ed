"""The notebooks run in a kernel of their own, cell by cell, in their smallest setting; in git they hold no outputs.

The first three share one trained run: whichever comes first trains it.
"""

import base64
import io
import itertools
import os
import pathlib
import re
import sys

import nbclient
import nbformat
import numpy as np
import pytest
from IPython.core.inputtransformer2 import TransformerManager
from PIL import Image

COLAB = pathlib.Path(__file__).parents[1] / "colab"
STEMS = ["01_quickstart", "02_solvers", "03_editing", "04_from_pytorch", "05_tpu"]
# And as in conftest.py: what is imported and traced stays.
STARTUP = """
import gc, warnings
warnings.filterwarnings("error", module="jax_diffusion")
gc.set_threshold(50_000, 20, 20)
"""


def read(stem: str):
    return nbformat.read(COLAB / f"{stem}.ipynb", as_version=4)


def code_cells(notebook) -> list:
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


@pytest.fixture(scope="module")
def execute(tmp_path_factory):
    """execute(stem) -> (what it printed, {MIME type: [bytes of its pictures]}); an exception where a cell fails."""
    shared = tmp_path_factory.mktemp("notebooks")
    startup = shared / "ipython" / "profile_default" / "startup"
    startup.mkdir(parents=True)
    (startup / "startup.py").write_text(STARTUP)
    # One thread for PyTorch: where another test has the other core, two spin for each other (8 passes of a small U-Net
    # take 3 to 6 s instead of 0.15).
    env = {**os.environ, "NOTEBOOK_SIZE": "test", "NOTEBOOK_RUN": str(shared / "run"),
           "IPYTHONDIR": str(shared / "ipython"), "OMP_NUM_THREADS": "1"}  # fmt: skip
    env.pop("MPLBACKEND", None)  # the kernel's own shows figures inline

    def run(stem):
        notebook, folder = read(stem), tmp_path_factory.mktemp(stem)
        client = nbclient.NotebookClient(notebook, timeout=300, resources={"metadata": {"path": str(folder)}})
        client.execute(env=env)
        outputs = [output for cell in code_cells(notebook) for output in cell.outputs]
        pictures = {}
        for kind, data in (item for o in outputs for item in o.get("data", {}).items()):
            if kind.startswith("image/"):
                pictures.setdefault(kind, []).append(base64.b64decode(data))
        return "".join(o.text for o in outputs if o.output_type == "stream" and o.name == "stdout"), pictures

    return run


def look(pictures: list[bytes], number: int) -> None:
    """So many pictures, none of them empty."""
    assert len(pictures) == number
    for data in pictures:
        assert len(data) > 500
        assert np.asarray(Image.open(io.BytesIO(data)).convert("L"), float).std() > 5


def numbers(pattern: str, text: str) -> list[float]:
    """The group of every match, as numbers; "97.5%" is 0.975."""
    found = re.findall(pattern, text)
    assert found, f"nothing like {pattern!r} in:\n{text}"
    return [float(f.rstrip("%")) / (100 if f.endswith("%") else 1) for f in found]


def test_quickstart(execute):
    out, pictures = execute("01_quickstart")
    look(pictures["image/png"], 5)
    assert Image.open(io.BytesIO(pictures["image/gif"][0])).n_frames == 20
    assert numbers(r"class agreement (\S+%)", out)[0] > 0.6
    assert numbers(r"right on (\S+%) of real", out)[0] > 0.95
    assert "20 evaluations" in out


def test_solvers(execute):
    out, pictures = execute("02_solvers")
    look(pictures["image/png"], 7)
    orders = re.findall(r"(\w+): order (\d), measured (\S+)", out)
    assert [name for name, *_ in orders] == ["ddim", "heun", "dpmpp_2m", "unipc", "dpm_solver_3"]
    for name, order, measured in orders:
        assert abs(float(measured) - int(order)) < 0.15, name
    assert "4 solvers, 1 compiled program\n" in out
    lines = re.findall(r"^ *\w+: 6 evaluations: RMS.*", out, re.M)
    assert len(lines) == 4
    for line in lines:
        few, more = numbers(r"RMS (\S+?)(?:,|$)", line)
        assert 0 < more < few, line
    scales = numbers(r"guidance +(\S+):", out)
    agreement = numbers(r"class agreement (\S+%), diversity", out)
    diversity = numbers(r"diversity (\d\S+)", out)
    assert len(scales) == len(agreement) == len(diversity) == 6
    assert agreement[0] > 0.5
    assert max(agreement[2:]) > agreement[0] - 0.02
    assert diversity[0] > diversity[1] > diversity[2] > diversity[3]


def test_editing(execute):
    out, pictures = execute("03_editing")
    look(pictures["image/png"], 6)
    assert "known pixels unchanged: True" in out
    assert numbers(r"unchanged: True; class agreement (\S+%)", out)[0] > 0.7
    change = numbers(r"RMS change (\S+),", out)
    assert len(change) == 4
    assert all(a < b for a, b in itertools.pairwise(change))
    assert set(numbers(r"strength \S+: (\d+) evaluations", out)) == {8}
    assert numbers(r"RMS error (\S+)", out)[0] < 0.3
    mean, deviation = (numbers(rf"{name} (\S+?),?\s", out)[0] for name in ("encodings: mean", "standard deviation"))
    assert abs(mean) < 0.2
    assert 0.7 < deviation < 1.3


def test_from_pytorch(execute):
    out, pictures = execute("04_from_pytorch")
    look(pictures["image/png"], 3)
    assert numbers(r"network: largest difference (\S+),", out)[0] < 1e-4
    assert numbers(r"samples: largest difference (\S+) of", out)[0] < 1e-3
    assert re.search(r"all \d+ tensors equal: True", out)
    assert len(numbers(r"(?:diffusers|jax_diffusion): +(\S+) images/s", out)) == 2
    for side in ("jax default", "torch eager"):
        assert numbers(rf"forward, batch 1: {side} (\S+) images/s", out)[0] > 0


def test_tpu(execute):
    out, pictures = execute("05_tpu")
    look(pictures["image/png"], 4)
    assert "8 devices" in out
    losses = numbers(r": loss (\S+),", out)
    assert len(losses) == 4
    assert max(losses) - min(losses) < 1e-4
    held = dict(zip(("data", "data x fsdp", "fsdp", "fsdp x tensor"), numbers(r"(\S+) MB of state", out), strict=True))
    assert held["fsdp"] < held["data x fsdp"] < held["data"] / 3
    sent = dict(re.findall(r"^ *(\S[^:]*): a device sends (.*)", out, re.M))
    assert "all-reduce" in sent["data"]
    assert "all-gather" not in sent["data"]
    assert "all-gather" in sent["fsdp"]
    assert min(numbers(r": ([\d,.]+) images/s on", out.replace(",", ""))) > 0
    assert "toy2d for cpu:8: 8 device(s)" in out
    assert re.search(r"training step, batch \S+ on 8 device\(s\)", out)


@pytest.mark.parametrize("stem", STEMS)
def test_holds_no_outputs(stem):
    notebook = read(stem)
    nbformat.validate(notebook)
    assert "widgets" not in notebook.metadata
    for cell in code_cells(notebook):
        assert not cell.outputs
        assert cell.execution_count is None
        assert not cell.metadata


def test_all_notebooks_are_here():
    assert sorted(p.stem for p in COLAB.glob("*.ipynb")) == STEMS


@pytest.mark.parametrize("stem", STEMS)
def test_badge_and_links(stem):
    text = "\n".join(cell.source for cell in read(stem).cells if cell.cell_type == "markdown")
    repository = re.search(r'REPOSITORY = "https://github.com/([^"]+)"', code_cells(read(stem))[0].source)[1]
    assert f"(https://colab.research.google.com/github/{repository}/blob/main/colab/{stem}.ipynb)" in text
    for target in re.findall(r"\]\((?!https?:)([^)]+)\)", text):
        assert (COLAB / target).exists(), target
    for target in re.findall(r"`(docs/[^`]+)`", text):
        assert (COLAB.parent / target).exists(), target


@pytest.mark.parametrize("stem", STEMS)
def test_install_cell(stem, monkeypatch):
    """Nothing where the package is there; else pip, with extras that there are."""
    source = TransformerManager().transform_cell(code_cells(read(stem))[0].source)
    ran = []

    class Shell:
        @staticmethod
        def run_line_magic(name, line):
            ran.append((name, line.format(**namespace)))  # as IPython expands it

    namespace = {"get_ipython": Shell}
    exec(source, namespace)
    assert not ran
    monkeypatch.setitem(sys.modules, "jax_diffusion", None)  # as if it were not installed
    exec(source, namespace)
    ((name, line),) = ran
    pattern = r'install -q "jax_diffusion\[([\w,]+)\] @ git\+https://github\.com/[^/" ]+/jax_diffusion"'
    known = re.findall(r'^        "(\w+)": ', (COLAB.parent / "setup.py").read_text(), re.M)
    assert name == "pip"
    assert set(re.fullmatch(pattern, line)[1].split(",")) <= set(known)
