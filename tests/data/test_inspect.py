"""Statistics and what is shown of a set."""

import numpy as np
import pytest

from jax_diffusion import config as configs
from jax_diffusion.data import ArraySource, inspecting


@pytest.mark.parametrize("dtype", [np.uint8, np.float32])
def test_statistics_are_those_of_all_values(dtype):
    rng = np.random.default_rng(0)
    images = rng.integers(3, 250, (700, 5, 4, 2)).astype(dtype)
    seen = images / 127.5 - 1 if dtype == np.uint8 else images.astype(np.float64)
    found = inspecting.survey(ArraySource(images, np.arange(700) % 3))
    flat = seen.reshape(-1, 2)
    np.testing.assert_allclose(found.mean, flat.mean(0), rtol=1e-9)
    np.testing.assert_allclose(found.std, flat.std(0), rtol=1e-6)
    np.testing.assert_allclose([found.least, found.most], [flat.min(0), flat.max(0)])
    assert found.dtype == dtype and (found.labels == np.arange(700) % 3).all()


def test_a_sample_is_spread_over_the_set():
    source = ArraySource(np.zeros((1000, 2, 2, 1), np.uint8))
    found = inspecting.survey(source, 10)
    assert len(found.indices) == 10 and found.indices[0] == 0 and found.indices[-1] == 999 and found.labels is None
    assert len(inspecting.survey(source, 5000).indices) == len(inspecting.survey(source, 0).indices) == 1000


def test_rows_are_classes():
    labels = np.array([0] * 50 + [1] * 2 + [2] * 48)
    source = ArraySource(np.zeros((100, 2, 2, 1), np.uint8), labels, num_classes=4)
    indices, columns = inspecting.chosen(source, inspecting.survey(source), 0, 20)
    assert columns == 5 and labels[indices].reshape(3, 5).tolist() == [[0] * 5, [1] * 5, [2] * 5]
    assert len(set(indices[:5])) == 5, "no example twice where there are enough"


def test_training_pictures_are_flipped_and_others_not():
    config = configs.default()
    config.data.flip = True
    left = np.zeros((40, 8, 8, 1), np.uint8)
    left[:, :, 0] = 255
    source = ArraySource(left)
    found = inspecting.survey(source)
    pictures = {split: inspecting.grid(config, source, split, found, 40) for split in ("train", "eval")}
    assert (pictures["train"] != pictures["eval"]).any()
    config.data.flip = False
    np.testing.assert_array_equal(inspecting.grid(config, source, "train", found, 40), pictures["eval"])
