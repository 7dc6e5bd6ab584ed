"""What an image may cost: nothing is decoded that its header says is too large."""

import io
import struct
import zlib

import numpy as np
import pytest
from PIL import Image

from jax_diffusion.data import load
from jax_diffusion.data.images import Format, decode
from jax_diffusion.errors import UserError


def png(width, height, rows=b""):
    """A PNG that declares a size, whatever it holds."""

    def chunk(kind, body):
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    header = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")  # a filter that pytest takes back
def test_the_header_decides(monkeypatch):
    assert decode(png(1, 1, b"\0\0"), Format()).shape == (1, 1, 1)  # and Pillow's formats are loaded
    monkeypatch.setattr(Image.Image, "load", lambda self: pytest.fail("decoded"))
    for width, height in ((8193, 8193), (1, (1 << 26) + 1), (13_000, 13_000), (30_000, 30_000)):
        with pytest.raises((ValueError, Image.DecompressionBombError, Image.DecompressionBombWarning)):
            decode(png(width, height), Format())


@pytest.mark.parametrize("max_pixels", [100, 99])
def test_max_pixels(max_pixels, tree, cfg, encode, noise):
    path = tree({"a.png": encode(noise(0, 10, 10)), "b.png": encode(noise(1, 4, 4))})
    source = load(cfg(path=path, size=(4, 4), max_pixels=max_pixels), "train")
    assert source.skipped == (() if max_pixels == 100 else ("a.png",))
    with pytest.raises(UserError, match=r"config.data.max_pixels=0 "):
        load(cfg(path=path, max_pixels=0), "train")


def test_pillows_limit_gives_way_to_one_set_on_purpose(monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 50)
    image = png(20, 10, b"".join(b"\0" + bytes(20) for _ in range(10)))
    assert decode(image, Format((), 0, 1000)).shape == (10, 20, 1)


def test_a_vast_tile_of_a_small_tiff(encode, noise):
    whole = encode(noise(0, 16, 16), "TIFF")
    assert decode(whole, Format()).shape == (16, 16, 3)
    tags = {256: 16, 257: 16, 258: 8, 259: 1, 262: 1, 277: 1, 322: 60_000, 323: 60_000, 324: 8, 325: 256}
    entries = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in sorted(tags.items()))
    tiled = b"II*\0" + struct.pack("<IH", 8, len(tags)) + entries + bytes(4) + bytes(256)
    with pytest.raises(ValueError, match="tiles of 60000x60000"):
        decode(tiled, Format())


def test_no_program_is_started_for_postscript(monkeypatch):
    """Pillow would hand an .eps, whatever its name, to Ghostscript."""
    import subprocess

    monkeypatch.setattr(subprocess, "check_call", lambda *a, **k: pytest.fail("started"))
    file = io.BytesIO()
    Image.new("RGB", (8, 8)).save(file, "EPS")
    with pytest.raises(Image.UnidentifiedImageError):
        decode(file.getvalue(), Format())


@pytest.mark.parametrize("kind", ["GIF", "WEBP", "PNG", "TIFF"])
def test_the_first_frame(kind, encode):
    frames = [Image.new("RGB", (6, 4), colour) for colour in ("red", "blue", "green")]
    file = io.BytesIO()
    options = {"lossless": True} if kind == "WEBP" else {}
    frames[0].save(file, kind, save_all=True, append_images=frames[1:], **options)
    np.testing.assert_array_equal(decode(file.getvalue(), Format()), np.tile(np.uint8([255, 0, 0]), (4, 6, 1)))


def test_text_that_swells_is_refused():
    body = zlib.compress(bytes(64 << 20), 9)
    chunk = b"zTXt" + b"Comment\0\0" + body
    chunk = struct.pack(">I", len(chunk) - 4) + chunk + struct.pack(">I", zlib.crc32(chunk))
    image = png(2, 1, b"\0\0\0")
    assert decode(image, Format()).shape == (1, 2, 1)
    with pytest.raises(ValueError, match="too large"):
        decode(image[:33] + chunk + image[33:], Format())
