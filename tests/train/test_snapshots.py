"""A run with profiles: its averages, their snapshots, and the command that makes averages of them."""

import json
import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jax_diffusion import config as configs
from jax_diffusion import model as models
from jax_diffusion.cli import main
from jax_diffusion.errors import UserError
from jax_diffusion.io import tensors
from jax_diffusion.train import loop, posthoc
from jax_diffusion.train.checkpoint import Checkpointer
from jax_diffusion.train.posthoc import Profile
from jax_diffusion.train.state import TrainState

FIELDS = ["train.steps=16", "ema.profiles=0.05,0.1", "ema.snapshot_every=4", "train.eval_every=0",
          "train.checkpoint_every=100", "model.uncertainty=8"]  # fmt: skip


@pytest.fixture(scope="module")
def runs(tiny, tmp_path_factory):
    """16 steps at once, and 6 + 10."""
    config, out = tiny("toy2d", *FIELDS), []
    for stops in ((None,), (6, None)):
        workdir = tmp_path_factory.mktemp("run")
        for stop in stops:
            outcome = loop.train(config, workdir, stop_at=stop, log=lambda line: None)
        out.append((workdir, outcome.state))
    return out


def test_a_resumed_run_has_the_same_averages(runs):
    (_, one), (_, resumed) = runs
    assert int(one.step) == int(resumed.step) == 16 and len(one.averages) == 2
    jax.tree.map(np.testing.assert_array_equal, one, resumed)
    leaves = [jax.tree.leaves(tree)[0] for tree in (one.params, one.ema, *one.averages)]
    assert len({leaf.tobytes() for leaf in map(np.asarray, leaves)}) == 4


def test_a_resumed_run_keeps_the_same_snapshots(runs):
    files = [posthoc.snapshots(workdir) for workdir, _ in runs]
    assert list(files[0]) == [Profile(n, std) for n in (4, 8, 12, 16) for std in (0.05, 0.1)] == list(files[1])
    for a, b in zip(*(f.values() for f in files), strict=True):
        a, b = map(tensors.open_safetensors, (a, b))
        assert a.shapes == b.shapes
        for name in a:
            np.testing.assert_array_equal(a[name], b[name])
    assert not list((runs[0][0] / "ema").glob("*.draft"))


def test_snapshots_are_the_averages(runs):
    workdir, state = runs[0]
    file = tensors.open_safetensors(posthoc.snapshots(workdir)[Profile(16, 0.1)])
    np.testing.assert_array_equal(file["head/kernel"], state.averages[1]["head"]["kernel"])
    assert len(file) == len(jax.tree.leaves(state.params))


def test_the_command_makes_what_load_finds(runs, capsys, tmp_path):
    workdir, state = runs[0]
    assert (
        main.main(["ema", f"--workdir={workdir}", "--std=0.1,0.15", "--std=0.2", f"--plot={tmp_path / 'p.png'}"]) == 0
    )
    said = capsys.readouterr().out
    assert said.count("profile error") == 3 and "--ema_std=0.1" in said and (tmp_path / "p.png").stat().st_size > 5000
    model = models.load(workdir, ema_std=0.1)
    assert model.step == 16
    # Tracked, so no more than rounding away.
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), model.params, state.averages[1])
    with pytest.raises(UserError, match=r"--ema_std=0.1 is an average, and --no-ema"):
        models.load(workdir, ema_std=0.1, ema=False)
    other = models.load(workdir, ema_std=0.15, step=16)
    assert np.any(other.params["head"]["kernel"] != model.params["head"]["kernel"])
    assert other.sample(jax.random.key(0), num=2).shape == (2, 2)


@pytest.mark.parametrize(
    "said, words",
    [
        (["--std=0"], ["--std=0.0", "between 0 and 0.2887"]),
        (["--std=0.3"], ["--std=0.3", "between 0 and 0.2887"]),
        (["--std=wide"], ["'wide' is no number"]),
        (["--std=0.1", "--step=17"], ["--step=17", "from step 4 to 16"]),
        (["--std=0.1", "--step=0"], ["--step=0", "from step 4 to 16"]),
    ],
)
def test_mistakes_of_the_command(runs, capsys, said, words):
    assert main.main(["ema", f"--workdir={runs[0][0]}", *said]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and all(w in error for w in words), error


def test_a_run_without_snapshots(runs, capsys, tmp_path):
    for name in ("config.json", "dataset.json"):
        (tmp_path / name).write_text((runs[0][0] / name).read_text())
    assert main.main(["ema", f"--workdir={tmp_path}", "--std=0.1"]) == 2
    assert "has no snapshots of averages: train with --config.ema.profiles=0.05,0.10" in capsys.readouterr().err
    assert main.main(["sample", f"--workdir={tmp_path}", "--ema_std=0.1"]) == 2
    assert f"make it with `jax-diffusion ema --workdir={tmp_path} --std=0.1`" in capsys.readouterr().err


@pytest.mark.parametrize(
    "field, words",
    [
        ("ema.profiles=0.05,0.5", "--config.ema.profiles=0.5: a relative width lies between"),
        ("ema.profiles=0.05,0.05", "the widths have to differ"),
        ("ema.snapshot_every=0", "--config.ema.snapshot_every=0 must be at least 1"),
        ("ema.snapshot_dtype=float8", "ema.snapshot_dtype='float8' is unknown"),
    ],
)
def test_mistakes_of_the_config(tiny, tmp_path, field, words):
    with pytest.raises(UserError, match=words):
        loop.train(tiny("toy2d", *FIELDS, field), tmp_path, log=lambda line: None)


def test_profiles_are_part_of_the_run_and_their_files_are_not(runs, tiny):
    with pytest.raises(UserError, match=r"ema.profiles: \(0.05, 0.1\) -> \(0.05, 0.2\)"):
        loop.train(tiny("toy2d", *FIELDS, "ema.profiles=0.05,0.2"), runs[1][0], log=lambda line: None)
    assert loop.train(tiny("toy2d", *FIELDS, "ema.snapshot_every=5"), runs[1][0], log=lambda line: None).finished


def test_a_state_without_averages_is_saved_as_before(tmp_path):
    """Older checkpoints have no such leaves, and are still restored."""
    w = {"w": jnp.arange(3.0)}
    with Checkpointer(tmp_path) as checkpoints:
        checkpoints.save(TrainState(jnp.int32(1), w, (), w, ()))
        checkpoints.wait()
        shapes = jax.tree.map(
            lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding),
            TrainState(jnp.int32(0), w, (), w, ()),
        )
        assert checkpoints.restore(shapes).averages == ()


def test_a_config_of_before(tiny):
    config = tiny("digits")
    fields = json.loads(configs.to_json(config))
    for group, name in (("model", "uncertainty"), ("model", "null_label"), ("optim", "hold"), ("ema", "profiles"),
                        ("ema", "snapshot_every"), ("ema", "snapshot_dtype")):  # fmt: skip
        del fields[group][name]
    old = configs.from_json(json.dumps(fields))
    assert configs.differences(old, config) == [] and old.ema.profiles == () and old.model.null_label is True


SHARDED = """
import sys, jax
from jax_diffusion import config as configs
from jax_diffusion.train import loop
assert len(jax.devices()) == 2
config = configs.override(configs.resolve("toy2d"), sys.argv[2:])
state = loop.train(config, sys.argv[1], log=lambda line: None).state
assert any(not leaf.is_fully_replicated for leaf in jax.tree.leaves(state.averages))
"""


def test_sharded_averages_are_saved_whole(runs, arguments, tmp_path):
    flags = os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=2"
    done = subprocess.run(
        [sys.executable, "-c", SHARDED, str(tmp_path), *arguments("toy2d", *FIELDS, "mesh.fsdp=2")],
        env={**os.environ, "XLA_FLAGS": flags}, capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    for profile, path in posthoc.snapshots(tmp_path).items():
        whole = tensors.open_safetensors(posthoc.snapshots(runs[0][0])[profile])
        for name, array in tensors.open_safetensors(path).items():
            np.testing.assert_allclose(array, whole[name], atol=1e-4, err_msg=name)
