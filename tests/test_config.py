"""Recipes, and the fields that are set over them."""

import pathlib

import jax
import pytest

from jax_diffusion import config as configs
from jax_diffusion import experiment
from jax_diffusion.errors import UserError
from jax_diffusion.train import optim

ROOT = pathlib.Path(__file__).parents[1]
RECIPES = sorted(p.stem for p in (ROOT / "configs").glob("*.py") if p.stem != "__init__")
SHAPES = {"cifar10_ddpm": (32, 32, 3), "cifar10_edm": (32, 32, 3), "digits": (8, 8, 1), "mnist": (28, 28, 1),
          "flowers64": (64, 64, 3), "toy2d": (2,)}  # fmt: skip


@pytest.mark.parametrize("name", RECIPES)
def test_every_recipe_builds(name):
    """By name as by path; its network, solver and optimizer are made, nothing is allocated."""
    config = configs.resolve(name)
    assert configs.differences(config, configs.resolve(str(ROOT / "configs" / f"{name}.py"))) == []
    shape = SHAPES.get(name) or (*(config.data["size"] or (32, 32)), config.data.channels or 3)
    classes = 10 if config.data.labels else 0
    parts = experiment.build(config, shape, classes)
    parameters = parts.network.parameter_count()
    # 35.7M in the paper; exactly, what the checkpoint on Hugging Face has.
    assert parameters == 35_746_307 if name == "cifar10_ddpm" else parameters > 1000
    assert len(experiment.default_table(config, parts.process)) >= config.sampling.steps
    optim.make(config.optim, config.train.steps)


@pytest.mark.parametrize("name", RECIPES)
def test_every_recipe_says_its_command(name):
    text = (ROOT / "configs" / f"{name}.py").read_text()
    assert f"jax-diffusion train --config={name} " in text


@pytest.mark.parametrize("name", RECIPES)
def test_json_round_trip(name):
    config = configs.resolve(name)
    back = configs.from_json(configs.to_json(config))
    assert configs.differences(config, back) == [] and back.to_dict() == config.to_dict()


def override(*arguments):
    return configs.override(configs.default(), [f"--config.{a}" for a in arguments])


@pytest.mark.parametrize(
    "argument, value",
    [
        ("train.steps=100", 100),
        ("train.steps=1e4", 10_000),
        ("optim.learning_rate=1", 1.0),
        ("data.flip=true", True),
        ("data.flip=False", False),
        ("data.size=64,48", (64, 48)),
        ("data.size=(64,48)", (64, 48)),
        ("data.size=[64,48]", (64, 48)),
        ("model.attention_levels=2", (2,)),
        ("data.path=123", "123"),
        ("data.path=a=b", "a=b"),
        ("seed=7", 7),
    ],
)
def test_overrides_keep_the_type_of_the_field(argument, value):
    node = override(argument)
    for name in argument.split("=")[0].split("."):
        node = node[name]
    assert node == value and type(node) is type(value)


@pytest.mark.parametrize(
    "argument, words",
    [
        ("train.stepps=1", ["train has no field 'stepps'", "did you mean 'steps'?"]),
        ("trian.steps=1", ["the config has no field 'trian'", "did you mean 'train'?"]),
        ("train.steps=many", ["--config.train.steps='many'", "int"]),
        ("train.steps=1.5", ["--config.train.steps=1.5", "int"]),
        ("train.steps=true", ["--config.train.steps=True", "int"]),
        ("optim.learning_rate=fast", ["--config.optim.learning_rate='fast'", "float"]),
        ("data.flip=1", ["--config.data.flip=1", "bool"]),
        ("data.size=big", ["--config.data.size='big'", "tuple"]),
        ("train=5", ["--config.train=5", "this is a group", "steps"]),
        ("train.steps", ["--config.train.steps: unknown argument", "--config.train.steps=100"]),
    ],
)
def test_wrong_overrides_are_answered_in_one_line(argument, words):
    with pytest.raises(UserError) as error:
        override(argument)
    message = str(error.value)
    assert "\n" not in message and all(w in message for w in words), message


def test_an_argument_that_is_no_field():
    with pytest.raises(UserError, match="--steps=3: unknown argument; config fields are set as --config"):
        configs.override(configs.default(), ["--steps=3"])


def test_overriding_leaves_the_original():
    config = configs.default()
    configs.override(config, ["--config.train.steps=5"])
    assert configs.differences(config, configs.default()) == []


def test_a_component_is_replaced_with_its_options():
    """EDM's sigma options would be nonsense to a flow."""
    start = configs.resolve("cifar10_edm")
    assert "mean" in start.process.timesteps
    fields = ["--config.process.timesteps=importance", "--config.process.timesteps.bins=20"]
    config = configs.override(start, fields)
    assert config.process.timesteps.to_dict() == {"name": "importance", "bins": 20}
    shifted = override(
        "process.schedule=flow", "process.schedule.shift=2", "process.prediction=flow", "model.channels=16"
    )
    assert experiment.build(shifted, (8, 8, 1), 0).process.schedule.shift == 2


def test_a_network_is_replaced_with_its_options():
    sizes = ("model.size=", "model.width=32", "model.depth=2", "model.heads=4", "model.patch=2")
    config = override("model.channels=16", "model=dit", *sizes)
    params = jax.eval_shape(experiment.build(config, (8, 8, 1), 10).network.init, jax.random.key(0))
    assert "channels" not in config.model and params["patch_embed"]["kernel"].shape == (4, 32)
    with pytest.raises(UserError, match=r"model\.channels: model has no field 'channels'"):
        override("model=dit", "model.channels=16")
    with pytest.raises(UserError, match="'dti' is unknown: did you mean 'dit'"):
        override("model=dti")


def test_an_option_its_component_does_not_take():
    config = override("process.schedule=cosine", "process.schedule.shifft=2", "model.channels=16")
    with pytest.raises(UserError, match=r"schedule 'cosine' has no option 'shifft': did you mean 'shift'"):
        experiment.build(config, (8, 8, 1), 0)


def test_differences_name_the_fields():
    a, b = configs.default(), override("train.steps=5", "process.schedule=flow", "process.schedule.shift=2")
    assert configs.differences(a, b) == [
        "process.schedule.name: linear -> flow",
        "process.schedule.shift: (unset) -> 2",
        "train.steps: 10000 -> 5",
    ]


@pytest.mark.parametrize(
    "name, words",
    [
        ("digit", ["--config='digit' is unknown", "did you mean 'digits'?"]),
        ("somewhere/else.py", ["--config=somewhere/else.py: there is no such file", "digits"]),
    ],
)
def test_a_missing_recipe(name, words):
    with pytest.raises(UserError) as error:
        configs.resolve(name)
    assert "\n" not in str(error.value) and all(w in str(error.value) for w in words), str(error.value)


def test_a_broken_recipe(tmp_path):
    path = tmp_path / "broken.py"
    path.write_text("def get_config():\n    return 1 / 0\n")
    with pytest.raises(UserError, match="the recipe fails with ZeroDivisionError: division by zero"):
        configs.resolve(str(path))
