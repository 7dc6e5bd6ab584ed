"""Several sets in one."""

import jax
import numpy as np
import pytest

from jax_diffusion import config as configs
from jax_diffusion.data import Batches, load, load_splits
from jax_diffusion.data.encoded import LazySource
from jax_diffusion.errors import UserError

A = {f"{c}/{i}.png": 10 * n + i for n, c in enumerate(("cat", "dog")) for i in range(5)}
B = {f"emu/{i}.png": 50 + i for i in range(8)} | {f"fox/{i}.png": 70 + i for i in range(8)}


@pytest.fixture
def mixed(tree, cfg):
    """mixed(fields of a, fields of b, options of the whole) -> the config of 3/4 a and 1/4 b."""

    def make(files_a=A, files_b=B, a=(), b=(), **options):
        parts = [
            {"source": "folder", "path": str(tree(files, root)), **dict(more)}
            for files, root, more in ((files_a, "a", a), (files_b, "b", b))
        ]
        return cfg(source="mixture", mixture=((0.75, parts[0]), (0.25, parts[1])), **options)

    return make


@pytest.mark.parametrize("max_bytes", [1 << 30, 0])
def test_shares_labels_and_images(max_bytes, mixed, noise):
    source = load(mixed(max_bytes=max_bytes), "train")
    assert source.class_names == ("cat", "dog", "emu", "fox") and len(source) == 26
    seeds = [*range(5), *range(10, 15), *range(50, 58), *range(70, 78)]
    truth = {noise(s).tobytes(): np.searchsorted([5, 15, 60], s, side="right") for s in seeds}
    everything = source.batch(np.arange(26))
    assert {x.tobytes() for x in everything["image"]} == set(truth)
    with Batches(source, 8, 1, 0, stop_step=20) as batches:
        for _, batch in batches:
            batch = jax.device_get(batch)
            assert [truth[x.tobytes()] for x in batch["image"]] == batch["label"].tolist()
            assert (batch["label"] < 2).sum() == 6, "three quarters of each batch"


def test_the_same_classes_are_shared(mixed, tree, cfg):
    same = {f"{c}/{i}.png": 30 + i for c in ("cat", "dog") for i in range(3)}
    source = load(mixed(files_b=same), "train")
    assert source.class_names == ("cat", "dog")
    assert sorted(source.batch(np.arange(10, 16))["label"]) == [0, 0, 0, 1, 1, 1]
    assert load(mixed(labels=False), "train").num_classes is None


def test_the_held_out_part_has_the_same_shares(mixed):
    c = mixed(holdout=0.4)
    train, held_out = load_splits(c, "train", "eval")
    rows = [{x.tobytes() for x in s.batch(np.arange(len(s)))["image"]} for s in (train, held_out)]
    assert not rows[0] & rows[1]
    labels = held_out.batch(np.arange(len(held_out)))["label"]
    # 4 of a and 6 of b were held out: it ends where the fifth of a would come.
    assert len(held_out) == 5 and (labels < 2).sum() == 4
    again = load(c, "eval")
    np.testing.assert_array_equal(again.batch(np.arange(5))["image"], held_out.batch(np.arange(5))["image"])


def test_parts_inherit_what_they_do_not_say(mixed):
    source = load(mixed(size=(4, 4), b={"labels": True, "max_bytes": 10}.items()), "train")
    assert source.shape == (4, 4, 3) and isinstance(source.parts[1], LazySource)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"b": {"size": (4, 4)}.items()}, r"8x8x3.*4x4x3.*--config.data.size"),
        ({"b": {"labels": False}.items()}, r"has no labels, others have.*labels=False"),
        ({"b": {"sorce": "x"}.items()}, r"field of part 1='sorce'.*did you mean 'source'"),
        ({"b": {"source": "mixture"}.items()}, "part 1 has no source"),
        ({"b": {"path": "nowhere"}.items()}, "'nowhere' does not exist"),
    ],
)
def test_parts_that_do_not_fit(options, message, mixed):
    with pytest.raises(UserError, match=message):
        load(mixed(**options), "train")


@pytest.mark.parametrize("parts", [(), (1,), ((0, {}),), ((True, {"source": "digits"}),), (("a", {}),), ((1, 2),)])
def test_no_mixtures(parts, cfg):
    with pytest.raises(UserError, match=r"config.data.mixture.*--config.data.mixture=\"\(\(0.7"):
        load(cfg(source="mixture", mixture=parts), "train")


def test_from_the_command_line_and_back():
    said = "((0.7, {'source': 'digits', 'size': (8, 8)}), (0.3, {'source': 'idx', 'path': 'b'}))"
    config = configs.override(configs.default(), ["--config.data.source=mixture", f"--config.data.mixture={said}"])
    again = configs.from_json(configs.to_json(config))
    assert configs.differences(config, again) == [] and again.data.mixture[0] == (
        0.7,
        {"source": "digits", "size": (8, 8)},
    )
    config = configs.override(
        config, ["--config.data.mixture=((0.5, {'source': 'digits'}), (0.5, {'source': 'digits'}))"]
    )
    source = load(config.data, "train")
    assert len(source) == 2 * 1617 and source.num_classes == 10 and source.shape == (8, 8, 1)
