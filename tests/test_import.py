"""Importing the package costs nothing that is not asked for."""

import json
import subprocess
import sys

import jax_diffusion as jd

HEAVY = ["tensorflow", "tensorflow_datasets", "clu", "grain", "torch", "diffusers", "sklearn", "PIL", "orbax"]
SCRIPT = f"""
import json, sys
import jax_diffusion as jd
early = [m for m in {HEAVY} if m in sys.modules]
from jax_diffusion import model, experiment, solvers
from jax_diffusion.cli import main
late = [m for m in {HEAVY} if m in sys.modules]
from jax._src import xla_bridge
print(json.dumps([early, late, list(xla_bridge._backends)]))
"""


def test_nothing_heavy_is_imported_and_no_device_is_taken():
    done = subprocess.run([sys.executable, "-c", SCRIPT], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    early, late, backends = json.loads(done.stdout)
    assert early == [] and late == [] and backends == []


def test_training_on_the_digits_starts_without_what_it_does_not_use(arguments, tmp_path):
    """torch is for comparisons, scikit-learn here for one file of its; each is seconds."""
    fields = arguments("digits_dit", "train.steps=1", "optim.warmup=0", "train.sample_every=0")
    typed = ["train", "--config=digits", f"--workdir={tmp_path}", *fields]
    code = f"import sys; from jax_diffusion.cli.main import main; assert main({typed}) == 0; print(sorted(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    imported = done.stdout.splitlines()[-1]
    assert "'tensorboardX'" in imported
    assert not [name for name in ("torch", "sklearn", "tensorflow", "clu", "grain") if f"'{name}'" in imported]


def test_training_and_loading_a_run_need_no_safetensors():
    code = "import sys; sys.modules['safetensors'] = None; import jax_diffusion.train.loop, jax_diffusion.interop"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr


def test_every_name_offered_is_there():
    assert set(jd.__all__) <= set(dir(jd))
    for name in jd.__all__:
        assert getattr(jd, name) is not None
    assert not hasattr(jd, "unheard_of")
