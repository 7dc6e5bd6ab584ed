"""Random inputs, most of them malformed: each is a function of its number alone."""

import functools
import io
import struct
import zlib

import numpy as np
from PIL import Image, ImageDraw

GOOD, BAD, EITHER = "good", "bad", "either"

# format: the modes it is written in
WRITTEN = {
    "PNG": ("1", "L", "LA", "P", "RGB", "RGBA", "I;16"),
    "JPEG": ("L", "RGB", "CMYK"),
    "TIFF": ("1", "L", "LA", "P", "RGB", "RGBA", "CMYK", "I;16", "YCbCr", "LAB"),
    "WEBP": ("RGB", "RGBA"),
    "GIF": ("L", "P", "RGB"),
    "BMP": ("1", "L", "RGB", "RGBA"),  # Pillow 12.3 cannot read all that it writes of mode P
    "PPM": ("1", "L", "RGB", "I;16"),
    "JPEG2000": ("L", "LA", "RGB", "RGBA"),
}
SUFFIX = {"PNG": ".png", "JPEG": ".jpg", "TIFF": ".tiff", "WEBP": ".webp", "GIF": ".gif", "BMP": ".bmp",
          "PPM": ".ppm", "JPEG2000": ".jp2"}  # fmt: skip
SIZES = ((1, 1), (1, 7), (2, 2), (5000, 20), (20, 5000), (3, 400), (60_000, 1), (64, 64), (33, 17), (250, 190))
NAMES = ("image", "ünïcödé", "日本語", "a b", "-dash", "emoji🙂", "quote'\"", "new\nline", "tab\t", "per%20cent",
         "dots..", "‮rtl", "very" * 40, "\x1b[31mred", "*", "c:\\windows", "\udcff\udcfe")  # fmt: skip


def picture(rng, mode, width, height):
    """A random Pillow image: noise, or flat shapes, which compress well."""
    if mode == "I;16":
        return Image.fromarray(rng.integers(0, 65536, (height, width), np.uint16))
    channels = len(Image.new(mode, (1, 1)).getbands())
    if rng.random() < 0.5:
        noise = rng.integers(0, 256, (height, width, channels), np.uint8)
        if mode in ("1", "P"):
            image = Image.fromarray(noise[..., 0], "L").convert(mode)
        else:
            bands = [Image.fromarray(noise[..., c]) for c in range(channels)]
            image = bands[0] if channels == 1 else Image.merge(mode, bands)
    else:
        image = Image.new(mode, (width, height), 1 if mode == "1" else 40 if channels == 1 else (40,) * channels)
        ImageDraw.Draw(image).rectangle((0, 0, width // 2, height // 2), fill=0 if channels == 1 else (0,) * channels)
    return image


def encoded(rng, kind=None, mode=None):
    """(bytes of an image of random format, mode and size, its suffix)."""
    kind = kind or str(rng.choice(list(WRITTEN)))
    mode = mode or str(rng.choice(WRITTEN[kind]))
    options, file = {}, io.BytesIO()
    width, height = SIZES[rng.integers(len(SIZES))]
    image = picture(rng, mode, min(width, 16_000) if kind in ("WEBP", "JPEG") else width, height)
    if mode == "P" and kind in ("PNG", "GIF") and rng.random() < 0.5:
        options["transparency"] = int(rng.integers(0, 4))
    if kind == "JPEG":
        options |= {"progressive": bool(rng.random() < 0.3) and height > 8, "quality": int(rng.integers(5, 96))}
        if rng.random() < 0.3:
            exif = Image.Exif()
            exif[0x0112] = int(rng.integers(0, 12))
            options["exif"] = exif
    if kind == "TIFF" and rng.random() < 0.5 and mode != "LAB":
        options["compression"] = "tiff_lzw"
    image.save(file, kind, **options)
    return file.getvalue(), SUFFIX[kind]


def animated(rng):
    kind = str(rng.choice(["GIF", "PNG", "WEBP"]))
    frames = [picture(rng, "RGB", 24, 16) for _ in range(3)]
    file = io.BytesIO()
    frames[0].save(file, kind, save_all=True, append_images=frames[1:], duration=50)
    return file.getvalue(), SUFFIX[kind]


def truncated(rng):
    data, suffix = encoded(rng)
    return data[: rng.integers(0, len(data))], suffix


def flipped(rng):
    data, suffix = encoded(rng)
    data = bytearray(data)
    for _ in range(int(rng.integers(1, 12))):
        data[rng.integers(min(len(data), 200) if rng.random() < 0.5 else len(data))] = rng.integers(256)
    return bytes(data), suffix


def spliced(rng):
    """The beginning of one format with the end of another."""
    (a, suffix), (b, _) = encoded(rng), encoded(rng)
    return a[: rng.integers(1, len(a) + 1)] + b[rng.integers(0, len(b)) :], suffix


def chunk(name, data):
    return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))


@functools.cache
def zeros(size):
    """So many of them, compressed."""
    return zlib.compress(bytes(size), 6)


def png_of(width, height, rows, depth=8, colour=2):
    head = struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0)
    body = zeros(rows)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", body) + chunk(b"IEND", b"")


def bomb(rng):
    """A small file that declares a huge image."""
    side = int(rng.choice([20_000, 65_500, 1 << 20]))
    kind = rng.integers(6)
    if kind == 0:
        return png_of(side, side, 1 << 20), ".png"
    if kind == 1:  # all of whose pixels are there, in a thousandth of their size
        return png_of(20_000, 8_000, 8_000 * 2_501, 1, 0), ".png"
    if kind == 2:
        return struct.pack("<2sIHHI", b"BM", 100, 0, 0, 54) + struct.pack(
            "<IiiHHIIiiII", 40, side, side, 1, 24, 0, 0, 0, 0, 0, 0
        ) + bytes(500), ".bmp"  # fmt: skip
    if kind == 3:
        return b"GIF89a" + struct.pack("<HH", 65535, 65535) + b"\x80\0\0" + bytes(6) + b"," + struct.pack(
            "<HHHH", 0, 0, 65535, 65535
        ) + b"\0\x02\x02\x44\x01\0;", ".gif"  # fmt: skip
    if kind == 4:
        return f"P6 {side} {side} 255\n".encode() + bytes(1000), ".ppm"
    data = bytearray(encoded(rng, "JPEG", "RGB")[0])
    at = 2
    while data[at + 1] not in (0xC0, 0xC2):  # segment by segment to the frame's header
        at += 2 + int.from_bytes(data[at + 2 : at + 4], "big")
    data[at + 5 : at + 9] = struct.pack(">HH", 65500, 65500)
    return bytes(data), ".jpg"


def late_bomb(rng):
    """A PNG whose text, profile or further frames decompress to much."""
    plain = encoded(rng, "PNG", "RGB")[0]
    heads = ((b"zTXt", b"Comment\0\0"), (b"iCCP", b"ICC\0\0"), (b"iTXt", b"XML:com.adobe.xmp\0\1\0\0\0"))
    name, head = heads[rng.integers(3)]
    return plain[:33] + chunk(name, head + zeros(40 << 20)) + plain[33:], ".png"


def no_image(rng):
    kind = rng.integers(6)
    if kind == 0:
        return b"", ".png"
    if kind == 1:
        return rng.bytes(int(rng.integers(1, 3000))), str(rng.choice(list(SUFFIX.values())))
    if kind == 2:
        return b"<svg xmlns='http://www.w3.org/2000/svg'><image href='/etc/passwd'/></svg>", ".png"
    if kind == 3:
        return b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n%%EndComments\nshowpage\n", ".jpg"
    if kind == 4:
        return b"This is text with the name of a picture.\n" * 20, ".gif"
    file = io.BytesIO()
    np.savez(file, x=np.zeros(3))
    return file.getvalue(), ".webp"


def floating(rng):
    file = io.BytesIO()
    Image.fromarray(rng.standard_normal((8, 8)).astype(np.float32)).save(file, "TIFF")
    return file.getvalue(), ".tif"


# kind: (share, make, what it has to come to)
KINDS = {
    "plain": (30, encoded, GOOD),
    "animated": (6, animated, GOOD),
    "truncated": (20, truncated, EITHER),
    "flipped": (20, flipped, EITHER),
    "spliced": (6, spliced, EITHER),
    "bomb": (5, bomb, BAD),
    "late bomb": (1, late_bomb, EITHER),
    "no image": (10, no_image, BAD),
    "floating": (2, floating, BAD),
}


def make(number):
    """(kind, name, bytes, what it has to come to) of input `number`."""
    rng = np.random.default_rng((number, 4))
    shares = np.array([share for share, _, _ in KINDS.values()])
    kind = list(KINDS)[rng.choice(len(KINDS), p=shares / shares.sum())]
    data, suffix = KINDS[kind][1](rng)
    if rng.random() < 0.1:  # whatever the name says, the content counts
        suffix = str(rng.choice(list(SUFFIX.values())))
    stem = NAMES[rng.integers(len(NAMES))] if rng.random() < 0.3 else "image"
    return kind, f"{number:06d}{stem}{suffix.upper() if rng.random() < 0.1 else suffix}", data, KINDS[kind][2]
