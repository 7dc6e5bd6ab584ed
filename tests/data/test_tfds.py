"""tensorflow-datasets' sets, built here by its own writer and read by its own reader, without tensorflow."""

import io
import subprocess
import sys

import numpy as np
import pytest

from jax_diffusion.data import ArraySource, load
from jax_diffusion.data.encoded import LazySource
from jax_diffusion.errors import UserError

tfds = pytest.importorskip("tensorflow_datasets")
pytest.importorskip("array_record")

COUNTS = {"train": 20, "test": 6}


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    """prepared(file_format, splits) -> the data_dir of a set `tiny`: 8x8 PNGs, label i % 2, seed by split."""
    from PIL import Image

    def examples(seed, count):
        rng = np.random.default_rng(seed)
        for i in range(count):
            file = io.BytesIO()
            Image.fromarray(rng.integers(0, 256, (8, 8, 3), dtype=np.uint8)).save(file, "PNG")
            file.seek(0)  # an encoded image: to encode an array itself, tfds would need tensorflow
            yield i, {"image": file, "label": i % 2}

    class Tiny(tfds.core.GeneratorBasedBuilder):
        VERSION = tfds.core.Version("1.0.0")

        def _info(self):
            image = tfds.features.Image(shape=(8, 8, 3))
            label = tfds.features.ClassLabel(names=["even", "odd"])
            features = tfds.features.FeaturesDict({"image": image, "label": label})
            return tfds.core.DatasetInfo(builder=self, features=features)

        def _split_generators(self, _):
            return {s: examples(seed, COUNTS[s]) for seed, s in enumerate(self.parts)}

        def _generate_examples(self):
            raise NotImplementedError

    def make(*parts):
        path = tmp_path_factory.mktemp("tfds")
        Tiny.parts = parts
        Tiny(data_dir=str(path), file_format="array_record").download_and_prepare()
        return path

    return make


@pytest.fixture(scope="module")
def both(prepared):
    return prepared("train", "test")


def pictures(seed, count):
    rng = np.random.default_rng(seed)
    return {rng.integers(0, 256, (8, 8, 3), dtype=np.uint8).tobytes(): i % 2 for i in range(count)}


@pytest.mark.parametrize("max_bytes", [1 << 20, 0])
@pytest.mark.parametrize("split", ["train", "eval"])
def test_splits(split, max_bytes, both, cfg):
    source = load(cfg(source="tfds", name="tiny", path=both, max_bytes=max_bytes), split)
    assert isinstance(source, ArraySource if max_bytes else LazySource)
    assert source.class_names == ("even", "odd") and source.shape == (8, 8, 3)
    batch = source.batch(np.arange(len(source)))
    got = {x.tobytes(): int(y) for x, y in zip(batch["image"], batch["label"], strict=True)}
    assert got == (pictures(0, 20) if split == "train" else pictures(1, 6))


def test_its_files_are_shards_like_any(both, cfg, monkeypatch, tmp_path):
    """As tensorflow-datasets writes them: tf.train.Example, the splits and the classes in the files' names."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    for split in ("train", "eval"):
        want = load(cfg(source="tfds", name="tiny", path=both), split)
        got = load(cfg(source="array_record", path=both / "tiny" / "1.0.0"), split)
        assert (got.class_names, len(got)) == (want.class_names, len(want))
        for key, leaf in want.batch(np.arange(len(want))).items():
            np.testing.assert_array_equal(got.batch(np.arange(len(want)))[key], leaf)
    assert not list(tmp_path.iterdir()), "with the classes known no labels are read"


def test_no_tensorflow_is_imported(both):
    code = f"""if True:
        import sys
        from types import SimpleNamespace as Config
        from jax_diffusion.data import load
        common = dict(channels=1, crop="center", labels=False, holdout=0.0, max_bytes=1 << 20)
        config = Config(source="tfds", name="tiny:1.0.0", path={str(both)!r}, size=(4, 4), **common)
        assert load(config, "train").shape == (4, 4, 1)
        assert "tensorflow" not in sys.modules
    """
    subprocess.run([sys.executable, "-c", code], check=True)


def test_holdout_where_there_is_no_test_split(prepared, cfg):
    path = prepared("train")
    parts = [load(cfg(source="tfds", name="tiny", path=path, holdout=0.2), s) for s in ("train", "eval")]
    images = [x.tobytes() for p in parts for x in p.batch(np.arange(len(p)))["image"]]
    assert [len(p) for p in parts] == [16, 4] and set(images) == set(pictures(0, 20))


def test_what_is_not_prepared_says_how_to(both, cfg):
    for name in ("mnist", "", "tiny:2.0.0"):
        with pytest.raises(UserError, match=r"file_format='array_record'.*download_and_prepare"):
            load(cfg(source="tfds", name=name, path=both), "train")


def test_files_without_random_access(both, cfg, tmp_path):
    folder = tmp_path / "tiny" / "1.0.0"
    folder.mkdir(parents=True)
    for file in (both / "tiny" / "1.0.0").iterdir():
        content = file.read_bytes()
        if file.suffix == ".json":
            content = content.replace(b'"array_record"', b'"tfrecord"')
        (folder / file.name.replace("array_record", "tfrecord")).write_bytes(content)
    with pytest.raises(UserError, match=r"tfrecord.*convert_format.*-array_record/tiny/1.0.0"):
        load(cfg(source="tfds", name="tiny", path=tmp_path), "train")
