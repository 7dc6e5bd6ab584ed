"""Pictures and arrays, pixel by pixel."""

import numpy as np
import pytest
from PIL import Image

from jax_diffusion import io


def grey(levels, size=2):
    """Images [N, size, size, 1] of one grey level 0..255 each."""
    return np.stack([np.full((size, size, 1), v / 127.5 - 1, np.float32) for v in levels])


def test_grid_layout():
    """Three 1x2 colour images in two columns: margins of two white pixels, reading order, one empty place."""
    levels = np.array(
        [[[10, 20, 30], [40, 50, 60]], [[70, 80, 90], [100, 110, 120]], [[130, 140, 150], [160, 170, 180]]]
    )
    picture = io.grid(levels[:, None] / 127.5 - 1, columns=2, scale=1)
    expected = np.full((8, 10, 3), 255, np.uint8)
    expected[2, 2:4], expected[2, 6:8], expected[5, 2:4] = levels
    np.testing.assert_array_equal(picture, expected)


def test_grid_enlarges_by_whole_pixels_and_greys_are_rgb():
    picture = io.grid(grey([0, 200]), columns=2, scale=3)
    assert picture.shape == (10, 18, 3) and picture.dtype == np.uint8
    np.testing.assert_array_equal(picture[2:8, 2:8], 0)
    np.testing.assert_array_equal(picture[2:8, 10:16], 200)
    assert np.all(picture[:, 8:10] == 255)


@pytest.mark.parametrize("count, side", [(1, 1), (2, 2), (4, 2), (5, 3), (9, 3)])
def test_grid_is_about_square(count, side):
    picture = io.grid(grey([0] * count), scale=1)
    assert picture.shape == (4 * -(-count // side) + 2, 4 * side + 2, 3)


@pytest.mark.parametrize("value, byte", [(-1, 0), (1, 255), (-7, 0), (7, 255), (0.001, 128), (-0.005, 127), (0.9, 242)])
def test_pixels_are_rounded_and_clipped(value, byte):
    """round(127.5 (x + 1)); numpy's float64 is the judge."""
    assert byte == np.clip(np.round(127.5 * (value + 1)), 0, 255)
    assert np.all(io.grid(np.full((1, 1, 1, 1), value), scale=1)[2, 2] == byte)


def test_png_holds_the_grid(tmp_path):
    path = tmp_path / "new" / "folder" / "grid.png"
    samples = np.random.default_rng(0).uniform(-1, 1, (5, 4, 4, 3))
    io.save_grid(path, samples, columns=3)
    np.testing.assert_array_equal(np.asarray(Image.open(path)), io.grid(samples, columns=3))


def test_film_has_a_frame_each(tmp_path):
    path = tmp_path / "film.gif"
    io.save_film(path, [grey([v, 255 - v]) for v in (0, 80, 160)], fps=10)
    film = Image.open(path)
    assert film.n_frames == 3
    for i, v in enumerate((0, 80, 160)):
        film.seek(i)
        assert abs(int(np.asarray(film.convert("RGB"))[10, 10, 0]) - v) <= 2  # a palette of 256 colours
        assert film.info["duration"] == (2000 if i == 2 else 100)


def test_points_are_dots():
    picture = io.grid(np.array([[0.0, 0.0], [1.0, 1.0], [99.0, 0.0]]))
    y, x = np.nonzero(np.any(picture != 255, axis=-1))
    dots = {(a // 2, b // 2) for a, b in zip(y, x, strict=True)}
    assert picture.shape == (480, 480, 3) and 2 <= len(dots) <= 8
    upper = y < 200  # (1, 1) is drawn up and to the right, the origin in the middle, the outlier not at all
    assert np.all(x[upper] > 300) and np.all(np.abs(x[~upper] - 240) < 3) and np.any(upper)


def test_npz_of_images(tmp_path):
    samples, labels = grey([0, 128, 255]), np.array([2, 0, 1])
    io.save_npz(tmp_path / "x.npz", samples, labels)
    with np.load(tmp_path / "x.npz") as arrays:
        assert sorted(arrays) == ["arr_0", "arr_1"] and arrays["arr_0"].dtype == np.uint8
        np.testing.assert_array_equal(arrays["arr_0"][:, 0, 0, 0], [0, 128, 255])
        np.testing.assert_array_equal(arrays["arr_1"], labels)


def test_npz_of_points_is_not_rounded(tmp_path):
    points = np.array([[0.125, -1.7]], np.float32)
    io.save_npz(tmp_path / "x.npz", points)
    with np.load(tmp_path / "x.npz") as arrays:
        assert list(arrays) == ["arr_0"]
        np.testing.assert_array_equal(arrays["arr_0"], points)
