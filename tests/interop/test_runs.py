"""Imported weights as a workdir: sampled from, fine-tuned, resumed."""

import json

import jax
import numpy as np
import pytest

from jax_diffusion import config as configs
from jax_diffusion import experiment, interop, loading
from jax_diffusion.cli.main import main
from jax_diffusion.errors import UserError
from jax_diffusion.interop import Architecture, Imported
from jax_diffusion.interop.imported import make_config
from jax_diffusion.train import loop

NET = {"name": "unet", "channels": 8, "multipliers": (1, 2), "blocks": 1, "attention_levels": (), "heads": 1}


def imported(num_classes=10, ema=True):
    config = make_config(
        Architecture(NET, (8, 8, 1), num_classes),
        {"schedule": configs.named("cosine"), "prediction": "v"},
        {"solver": "ddim", "steps": 3, "num": 4, "options": {"eta": 0.5}},
    )
    config.data.update(source="digits", path="", size=(), channels=0)
    config.train.update(batch_size=16, steps=6, log_every=2, eval_every=0, sample_every=0, checkpoint_every=4)
    parts = experiment.build(config, (8, 8, 1), num_classes)
    weights = [jax.tree.map(np.asarray, parts.network.init(jax.random.key(i))) for i in (1, 2)]
    names = tuple(f"class {i}" for i in range(num_classes))
    return Imported(config, (8, 8, 1), names, weights[0], weights[1] if ema else None, ("a note",))


def equal(a, b, atol=0.0):
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=0, atol=atol), a, b)


@pytest.mark.parametrize("ema", (True, False))
def test_a_workdir_holds_the_weights_and_samples(tmp_path, ema):
    one = imported(ema=ema)
    interop.to_workdir(one, tmp_path, source="there")
    model = loading.load(tmp_path)
    equal(model.params, one.ema if ema else one.params)
    equal(loading.load(tmp_path, ema=False).params, one.params)
    assert model.class_names == one.class_names and model.step == 0
    table = model.default_table()
    assert len(table) == 3 and table.C.max() > 0  # ddim, with the eta that it came with
    key = jax.random.key(3)
    np.testing.assert_array_equal(model.sample(key, num=2), interop.to_model(one).sample(key, num=2))
    facts = json.loads((tmp_path / "dataset.json").read_text())
    assert facts["imported"] == {"source": "there", "notes": ["a note"]}
    with pytest.raises(UserError, match="holds a run already"):
        interop.to_workdir(one, tmp_path)


def test_fine_tuning_starts_at_the_weights_and_resumes(tmp_path):
    """With a learning rate of nothing, training leaves them as they were; the average goes on from its own."""
    one = imported()
    for name, rate in (("still", 1e-30), ("moving", 1e-3), ("whole", 1e-3)):
        interop.to_workdir(one, tmp_path / name)
        config = one.config.copy_and_resolve_references()
        config.optim.update(learning_rate=rate, warmup=0)
        lines = []
        stop = {"moving": 4}.get(name)
        out = loop.train(config, tmp_path / name, stop_at=stop, log=lines.append)
        assert any("starting from the weights" in line for line in lines)
        if name == "still":
            jax.tree.map(
                lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=1e-25), out.state.params, one.params
            )
    # Once trained it is a run like any other: bit for bit, and its fields are fixed.
    resumed = loop.train(None, tmp_path / "moving", log=lines.append)
    assert lines[-1].startswith("done") and resumed.step == 6
    equal(jax.device_get(resumed.state), jax.device_get(out.state))
    config.optim.learning_rate = 5.0
    with pytest.raises(UserError, match="started with another config"):
        loop.train(config, tmp_path / "moving", log=lines.append)


def test_fields_are_set_on_the_command_line(tmp_path, capsys):
    interop.to_workdir(imported(), tmp_path)
    assert main(["train", f"--workdir={tmp_path}", "--config.train.steps=2", "--config.optim.learning_rate=1e-4"]) == 0
    saved = configs.from_json((tmp_path / "config.json").read_text())
    assert saved.train.steps == 2 and saved.optim.learning_rate == 1e-4
    assert "imported" in json.loads((tmp_path / "dataset.json").read_text())


@pytest.mark.parametrize(("fields", "says"), [
    (["data.labels=False"], "a network for 8x8x1 and 10 classes"),
    (["data.size=16,16"], "--config.data.size"),
])  # fmt: skip
def test_other_data_is_said(tmp_path, capsys, fields, says):
    interop.to_workdir(imported(), tmp_path)
    assert main(["train", f"--workdir={tmp_path}", *(f"--config.{f}" for f in fields)]) == 2
    err = capsys.readouterr().err
    assert says in err and err.count("\n") == 1
