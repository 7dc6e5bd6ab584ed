"""launch/flags.sh: sets of flags of which the installed jaxlib is asked before it would abort."""

import os
import pathlib
import subprocess
import sys

import pytest

SCRIPT = pathlib.Path(__file__).parents[2] / "launch" / "flags.sh"


def flags(*arguments, script=SCRIPT, **env):
    """(status, what it sets, stderr)."""
    base = {k: v for k, v in os.environ.items() if not k.startswith(("XLA_", "JAX_OPT"))}
    done = subprocess.run(
        [str(script), *arguments], capture_output=True, text=True, timeout=100,
        env={**base, "PYTHON": sys.executable, **env},
    )  # fmt: skip
    return done.returncode, dict(line.split("=", 1) for line in done.stdout.splitlines()), done.stderr


def test_every_flag_of_the_sets_is_known_to_jaxlib():
    """The GPU's flags too: XLA knows them on any platform. A command runs under them."""
    status, settings, error = flags("gpu", "env", XLA_FLAGS="--xla_dump_hlo_as_text=false")
    assert (status, error) == (0, "")
    *ours, users = settings["XLA_FLAGS"].split()
    assert len(ours) == 3 and users == "--xla_dump_hlo_as_text=false"  # the user's last: they win
    done = subprocess.run(
        [sys.executable, "-c", "import jax; jax.devices(); print(jax.config.jax_optimization_level)"],
        capture_output=True, text=True, timeout=100, env={**os.environ, **settings, "JAX_PLATFORMS": "cpu"},
    )  # fmt: skip
    assert done.returncode == 0 and done.stdout.strip() == "O1", done.stderr


def test_an_unknown_flag_is_left_out_and_said(tmp_path):
    script = tmp_path / "flags.sh"
    script.write_text(SCRIPT.read_text().replace("xla_flags=(\n", "xla_flags=(\n--xla_gpu_unheard_of=1\n"))
    script.chmod(0o755)
    status, settings, error = flags("gpu", script=script)
    assert status == 0 and error.count("\n") == 1 and "has no --xla_gpu_unheard_of: left out" in error
    assert "unheard" not in str(settings) and settings["export XLA_FLAGS"].count("--xla") == 3


def test_what_the_user_has_set_stays():
    status, settings, _ = flags("gpu", JAX_OPTIMIZATION_LEVEL="O2", XLA_PYTHON_CLIENT_MEM_FRACTION="0.5")
    assert status == 0 and set(settings) == {"export XLA_FLAGS"}


def test_tpus_and_cpus_keep_the_defaults():
    assert flags("tpu") == flags("cpu") == (0, {}, "")


@pytest.mark.parametrize("arguments, env, words", [
    ((), {}, "give gpu, tpu or cpu"), (("gpus",), {}, "gpus is no set"),
    (("gpu",), {"PYTHON": "/bin/false"}, "set PYTHON"),
])  # fmt: skip
def test_a_wrong_call_is_one_line(arguments, env, words):
    status, settings, error = flags(*arguments, **env)
    assert status == 2 and settings == {} and error.count("\n") == 1 and words in error
