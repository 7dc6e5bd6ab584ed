"""What all tests share: strict JAX, one compilation cache, recipes cut down to seconds, one trained run."""

import gc
import json
import os
import shutil
import subprocess
import sys
import tempfile
from types import SimpleNamespace

# Before JAX is imported, and inherited by the processes that tests start.
os.environ.setdefault("JAX_PLATFORMS", "cpu")
_cache = tempfile.TemporaryDirectory(prefix="jax_diffusion_tests_")
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", _cache.name)
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.5")
os.environ.setdefault("JAX_NUMPY_RANK_PROMOTION", "raise")
# Half the time to compile or less (7.0 to 3.2 s, a transformer's 3.9 to 0.9; the fusions' emitters are most of it);
# nothing here runs long enough to miss the code that would have been made.
os.environ.setdefault(
    "XLA_FLAGS",
    "--xla_backend_optimization_level=0 --xla_cpu_use_fusion_emitters=false --xla_cpu_parallel_codegen_split_count=1",
)

# Modules and traced programs stay as long as the process: looking through them after every 700 new objects, as Python
# does, is 8 % of a worker's time.
gc.set_threshold(50_000, 20, 20)

import jax  # noqa: E402
import pytest  # noqa: E402

from jax_diffusion import config as configs  # noqa: E402
from jax_diffusion import onednn  # noqa: E402
from jax_diffusion.train import loop  # noqa: E402

DIGITS = ["train.batch_size=32", "train.steps=60", "optim.warmup=10", "train.log_every=10", "train.eval_every=30",
          "train.eval_batches=2", "train.sample_every=60", "train.checkpoint_every=30", "sampling.steps=4",
          "sampling.num=20", "sampling.batch_size=20"]  # fmt: skip
RECIPES = {
    "digits": ["model.channels=16", "model.heads=2", *DIGITS],
    # By a transformer: a third of the U-Net's time to trace and compile, for tests that do not ask which network it is.
    "digits_dit": ["model=dit", "model.size=", "model.width=32", "model.depth=1", "model.heads=2", "model.patch=2",
                   *DIGITS],
    "toy2d": ["model.width=32", "model.depth=2", "train.batch_size=64", "train.steps=50", "optim.warmup=5",
              "train.steps_per_dispatch=1", "train.log_every=10", "train.eval_every=25", "train.eval_batches=2",
              "train.sample_every=0", "train.checkpoint_every=25", "sampling.steps=4", "sampling.num=50",
              "sampling.batch_size=50"],
}  # fmt: skip


def pytest_configure():
    assert jax.config.jax_numpy_rank_promotion == "raise", "JAX was imported before tests/conftest.py"
    onednn.why_not()  # compiles its calls where that was not done yet, and says so: not in the middle of a test


# Minutes each: first, so that at the end no worker is left alone with one of them (with --no-loadscope-reorder).
LONG = ("test_sharding.py", "test_processes.py", "test_notebooks.py", "test_recipes_on_real_data.py", "test_scaling.py",
        "test_gates_tpu.py", "test_gates_cuda.py", "test_docs.py", "test_local.py")  # fmt: skip


def pytest_collection_finish():
    gc.freeze()


def pytest_collection_modifyitems(items):
    items.sort(key=lambda item: LONG.index(item.path.name) if item.path.name in LONG else len(LONG))


@pytest.fixture(scope="session")
def on_virtual_devices():
    """on_virtual_devices(script, *arguments, devices=8) -> the JSON object that it prints last, run in a process of
    its own with so many CPU devices."""

    def run(script, *arguments, devices=8, timeout=300):
        flags = f"{os.environ['XLA_FLAGS']} --xla_force_host_platform_device_count={devices}"
        done = subprocess.run(
            [sys.executable, script, *arguments],
            env={**os.environ, "XLA_FLAGS": flags}, capture_output=True, text=True, timeout=timeout,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr[-3000:]
        return json.loads(done.stdout.splitlines()[-1])

    return run


@pytest.fixture(scope="session")
def arguments():
    """arguments("digits", "train.steps=5") -> the command-line overrides of a recipe cut down to seconds; those of
    "digits_dit" go with --config=digits."""
    return lambda recipe, *fields: [f"--config.{field}" for field in (*RECIPES[recipe], *fields)]


@pytest.fixture(scope="session")
def tiny(arguments):
    """tiny("digits", "train.steps=5") -> the config those make."""
    return lambda recipe, *fields: configs.override(configs.resolve(recipe.split("_")[0]), arguments(recipe, *fields))


@pytest.fixture(scope="session")
def run(tiny, tmp_path_factory):
    """A finished run on the digits: its workdir, what it logged, its outcome and its config."""
    workdir, lines = tmp_path_factory.mktemp("run"), []
    config = tiny("digits")
    outcome = loop.train(config, workdir, log=lines.append)
    return SimpleNamespace(workdir=workdir, lines=lines, outcome=outcome, config=config)


@pytest.fixture(scope="session")
def conditioned_run(tiny, tmp_path_factory):
    """The same for a model conditioned on the digits at half the resolution."""
    workdir, lines = tmp_path_factory.mktemp("conditioned"), []
    config = tiny("digits", "condition=low_resolution", "condition.factor=2", "process.prediction=x0", "model.blocks=1",
                  "optim.learning_rate=2e-3", "train.sample_every=60", "sampling.num=6")  # fmt: skip
    outcome = loop.train(config, workdir, log=lines.append)
    return SimpleNamespace(workdir=workdir, lines=lines, outcome=outcome, config=config)


@pytest.fixture(scope="module")
def browser():
    """A headless Chromium: `pip install playwright` with `playwright install chromium-headless-shell`, or Debian's
    chromium-headless-shell; skips without."""
    playwright = pytest.importorskip("playwright.sync_api", reason="pip install playwright")
    names = ("chromium-headless-shell", "chromium", "chromium-browser", "google-chrome")
    found = next(filter(None, map(shutil.which, names)), None)
    with playwright.sync_playwright() as p:
        try:
            shown = p.chromium.launch(executable_path=found)
        except playwright.Error:
            pytest.skip("no Chromium here")
        yield shown
        shown.close()
