"""The largest batch on memory functions that are known, meshes, and what samples look like without their data."""

import pytest

from jax_diffusion import config as configs
from jax_diffusion.errors import UserError
from jax_diffusion.plan import search, shapes


@pytest.mark.parametrize("unit", [1, 3, 8])
@pytest.mark.parametrize("start", [1, 8, 100, 5000])
@pytest.mark.parametrize("curve", ["straight", "bent", "steps"])
def test_the_largest_batch_is_enclosed(unit, start, curve):
    def needed(batch):
        return {"straight": 7.0 + 3 * batch, "bent": batch**1.5, "steps": 100.0 * (batch // 64)}[curve]

    truth = max(n for n in range(unit, 40_000, unit) if needed(n) <= 3000)
    seen = []
    found = search.largest(lambda b: seen.append(b) or needed(b), 3000, unit, start)
    assert found.batch % unit == 0 and found.batch <= truth < found.above
    assert found.above - found.batch <= max(unit, found.batch / 16)
    assert found.tried == len(seen) == len(set(seen)) <= 16


def test_the_very_largest_where_it_is_asked_for():
    assert search.largest(lambda b: 10 + 3 * b, 3000, 1, 64, resolution=0)[:2] == (996, 997)


def test_a_line_is_found_in_few_steps():
    """A compilation takes minutes: the interval is cut where a line meets the capacity."""
    assert search.largest(lambda b: 2.0 + b / 100, 15.75, 8, 512).tried <= 5


def test_nothing_fits():
    assert search.largest(lambda b: 50.0 + b, 40, 8, 32) == (0, 8, 3)


def test_no_end():
    assert search.largest(lambda b: 0.0, 40, 1, 1, most=1000) == (512, None, 10)


def test_meshes_are_all_factorisations():
    assert search.meshes(12) == [
        {"data": 12 // f, "fsdp": f, "tensor": 1} for f in (1, 2, 3, 4, 6, 12)
    ]  # fmt: skip
    with_tensor = search.meshes(8, tensor=True)
    assert len({tuple(m.values()) for m in with_tensor}) == len(with_tensor) == 10
    assert all(m["data"] * m["fsdp"] * m["tensor"] == 8 for m in with_tensor)


@pytest.mark.parametrize(
    "recipe, shape, classes",
    [
        ("digits", (8, 8, 1), 10),
        ("mnist", (28, 28, 1), 10),
        ("cifar10_ddpm", (32, 32, 3), 0),  # trained without labels
        ("cifar10_edm", (32, 32, 3), 10),
        ("flowers64", (64, 64, 3), 5),
        ("flowers64_sr", (64, 64, 3), 0),
        ("imagenet64_adm", (64, 64, 3), 1000),
        ("imagenet256_dit_xl2", (32, 32, 4), 1000),
        ("toy2d", (2,), 0),
    ],
)
def test_shapes_of_the_shipped_recipes(recipe, shape, classes):
    assert shapes.find(recipe, configs.resolve(recipe)) == (shape, classes)


def test_what_the_config_or_the_user_says_counts_more():
    config = configs.resolve("cifar10_edm")
    config.data.update(size=(64, 48), channels=1)
    assert shapes.find("cifar10_edm", config) == ((64, 48, 1), 10)
    config.data.labels = False
    assert shapes.find("cifar10_edm", config) == ((64, 48, 1), 0)
    assert shapes.find("cifar10_edm", config, (16, 16, 3), 7) == ((16, 16, 3), 7)


def test_a_data_set_is_known_by_its_name():
    config = configs.default()
    config.data.update(source="tfds", name="cifar100")
    assert shapes.find("mine.py", config) == ((32, 32, 3), 100)


def test_nobody_says():
    config = configs.default()
    config.data.source = "folder"
    with pytest.raises(UserError, match=r"mine.*add --shape=32x32x3 and --classes=10"):
        shapes.find("mine", config)
    with pytest.raises(UserError, match=r"add --classes=10 \("):
        shapes.find("mine", config, (8, 8, 3))
    config.data.labels = False
    with pytest.raises(UserError, match=r"add --shape=32x32x3 \("):
        shapes.find("mine", config)


@pytest.mark.parametrize("text", ["", "32", "32x32x3"])
def test_shapes_are_read(text):
    if not text:
        with pytest.raises(UserError, match="--shape="):
            shapes.parse(text)
    else:
        assert shapes.parse(text) == tuple(map(int, text.split("x")))


@pytest.mark.parametrize("text", ["32x", "0x3", "32,32,3", "1x2x3x4", "-1x2"])
def test_shapes_that_are_none(text):
    with pytest.raises(UserError, match="--shape="):
        shapes.parse(text)
