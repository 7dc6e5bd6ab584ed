"""Kill -9, and nothing shows in the end. The long version, at twenty moments and more: kill_script.py."""

import random
import subprocess

from kill_script import MOMENTS as ALL
from kill_script import command, differences, endure, state_of

from jax_diffusion.train import stored

STEPS = 120
MOMENTS = ("any", "draft", "manifest")  # mid-step; mid-checkpoint; complete, without its name


def test_a_run_that_is_killed_is_the_run_that_is_not(tmp_path):
    assert set(MOMENTS) <= set(ALL)
    calm, killed, lines = tmp_path / "calm", tmp_path / "killed", []
    done = subprocess.run(command(calm, STEPS, tmp_path / "cache"), capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    endure(killed, len(MOMENTS), STEPS, tmp_path / "cache", random.Random(0), log=lines.append, moments=MOMENTS)
    assert len([line for line in lines if line.startswith("kill ")]) == len(lines) == 3, lines  # no complaint
    bad, leaves, files = differences(calm, killed)
    assert not bad and leaves > 50 and files >= 2
    assert int(state_of(killed).step) == STEPS == stored.steps(killed / "checkpoints")[-1]
