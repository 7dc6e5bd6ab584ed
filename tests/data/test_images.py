"""Decoding, colour, orientation and resizing of single images."""

import numpy as np
import pytest
from PIL import Image

from jax_diffusion.data.images import Format, decode, fit
from jax_diffusion.errors import UserError


def test_png_is_exact(noise, encode):
    for channels in (1, 3):
        image = noise(0, 5, 7, channels)
        np.testing.assert_array_equal(decode(encode(image), Format()), image)


def test_palette_means_its_colours(encode):
    palette = np.array([[255, 0, 0], [0, 128, 0], [10, 20, 30]], np.uint8)
    index = np.random.default_rng(0).integers(0, 3, (6, 4))
    image = Image.fromarray(index.astype(np.uint8), "L").convert("P")
    image.putpalette(palette.ravel().tolist())
    np.testing.assert_array_equal(decode(encode(image), Format()), palette[index])


@pytest.mark.parametrize("alpha", [0, 51, 255])
def test_alpha_is_composited_on_white(alpha, encode):
    colour = np.array([100, 0, 200])
    rgba = np.tile(np.uint8([*colour, alpha]), (3, 3, 1))
    expected = (colour * alpha + 255.0 * (255 - alpha)) / 255
    assert np.abs(decode(encode(rgba), Format()) - expected).max() <= 1


def test_transparent_palette_entry_and_grey_alpha_become_white(encode):
    image = Image.fromarray(np.array([[0, 1]], np.uint8), "L").convert("P")
    image.putpalette([9, 9, 9, 50, 60, 70])
    out = decode(encode(image, transparency=0), Format())
    np.testing.assert_array_equal(out[0], [[255, 255, 255], [50, 60, 70]])
    grey = Image.fromarray(np.array([[[7, 0], [7, 255]]], np.uint8), "LA")
    np.testing.assert_array_equal(decode(encode(grey), Format())[0], [[255], [7]])


def test_invisible_colour_does_not_bleed_when_resized(encode):
    rgba = np.zeros((16, 16, 4), np.uint8)  # invisible black everywhere
    assert (decode(encode(rgba), Format((4, 4), 3)) == 255).all()


def test_sixteen_bit_grey_is_scaled_not_clipped(encode):
    wide = (np.arange(256, dtype=np.uint16) * 257).reshape(16, 16)
    out = decode(encode(Image.fromarray(wide)), Format())
    np.testing.assert_array_equal(out[..., 0], np.arange(256).reshape(16, 16))


def test_cmyk_becomes_rgb(encode):
    cmyk = Image.new("CMYK", (16, 16), (0, 255, 255, 0))  # no cyan, all magenta and yellow: red
    out = decode(encode(cmyk, "JPEG", quality=95), Format()).reshape(-1, 3).mean(0)
    assert out[0] > 240 and out[1] < 15 and out[2] < 15


@pytest.mark.parametrize(
    ("orientation", "upright"),
    [(3, lambda x: x[::-1, ::-1]), (6, lambda x: np.rot90(x, -1)), (8, np.rot90), (2, lambda x: x[:, ::-1])],
)
def test_exif_orientation(orientation, upright, noise, encode):
    image = noise(1, 4, 6)
    exif = Image.Exif()
    exif[0x0112] = orientation
    np.testing.assert_array_equal(decode(encode(image, exif=exif), Format()), upright(image))


def test_channels_asked_for(noise, encode):
    grey, colour = noise(0, channels=1), noise(1)
    np.testing.assert_array_equal(decode(encode(grey), Format((), 3)), np.repeat(grey, 3, -1))
    luminance = colour @ np.array([0.299, 0.587, 0.114])
    assert np.abs(decode(encode(colour), Format((), 1))[..., 0] - luminance).max() <= 1
    np.testing.assert_array_equal(fit(colour[None], Format((), 1), "x")[0], decode(encode(colour), Format((), 1)))


@pytest.mark.parametrize("factor", [2, 4, 8])
def test_reducing_stripes_gives_mid_grey(factor, encode):
    """The mean of one-pixel stripes is 127.5; a resize that aliases would give 0 or 255."""
    stripes = np.zeros((16 * factor, 16 * factor), np.uint8)
    stripes[:, ::2] = 255
    out = decode(encode(stripes), Format((16, 16))).astype(int)
    assert np.abs(out[2:-2, 2:-2] - 127.5).max() < 8


def test_centre_crop_of_the_covering_resize(encode):
    """A wide image of three flat thirds keeps the middle one only."""
    wide = np.repeat(np.uint8([[[255, 0, 0]], [[0, 255, 0]], [[0, 0, 255]]]), 32, axis=0)
    wide = np.tile(wide.reshape(1, 96, 3), (32, 1, 1))
    out = decode(encode(wide), Format((16, 16)))
    assert out.shape == (16, 16, 3)
    np.testing.assert_array_equal(out[:, 3:-3], np.broadcast_to(np.uint8([0, 255, 0]), (16, 10, 3)))
    tall = decode(encode(wide.transpose(1, 0, 2).copy()), Format((16, 16)))
    np.testing.assert_array_equal(tall, out.transpose(1, 0, 2))


@pytest.mark.parametrize("size", [(31, 17), (3, 50), (64, 64), (1, 1)])
def test_any_size_is_met(size, noise, encode):
    assert decode(encode(noise(0, 20, 30), "JPEG"), Format(size)).shape == (*size, 3)


def test_upscaling_keeps_flat_images_flat(encode):
    assert (decode(encode(np.full((5, 4, 3), 93, np.uint8)), Format((40, 40))) == 93).all()


def test_draft_decoding_of_a_large_jpeg_agrees_with_the_full_one(encode):
    y, x = np.mgrid[:512, :512] / 512
    image = np.uint8(127 + 100 * np.sin(90 * x) * np.cos(150 * y))
    drafted, full = (decode(encode(image, kind), Format((100, 100))) for kind in ("JPEG", "PNG"))
    assert np.abs(drafted.astype(float) - full).max() < 8


@pytest.mark.parametrize("bad", [{"size": (0, 3)}, {"size": (1, 2, 3)}, {"channels": 2}, {"crop": "centre"}])
def test_bad_formats_are_user_errors(bad, cfg):
    with pytest.raises(UserError, match=f"config.data.{next(iter(bad))}"):
        Format.from_config(cfg(**bad))
