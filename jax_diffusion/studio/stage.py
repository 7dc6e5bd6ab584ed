"""What the page shows of a drawing, as HTML."""

import base64
import html
import time
from typing import Any

import numpy as np

from jax_diffusion.studio import png
from jax_diffusion.studio.drawing import Shot

ABOUT = 560  # pixels that a picture is enlarged to, by a whole number


def data_url(file: bytes) -> str:
    return "data:image/png;base64," + base64.b64encode(file).decode()


def complaint(text: str) -> str:
    return f'<div class="complaint" role="alert">{html.escape(text)}</div>'


def note(text: str) -> str:
    return f'<div class="note" role="status">{html.escape(text)}</div>' if text else ""


def progress(shot: Shot) -> str:
    """How far a drawing is, and how long it took."""
    if shot.file:
        share, text = 1.0, shot.said
    elif shot.done == 0:
        share, text = 0.0, "Starting; the first picture of its kind compiles its program."
        if not shot.rows:
            text += " This solver shows nothing on the way."
    else:
        share, text = shot.done / shot.rows, f"{shot.done} of {shot.rows} evaluations, {shot.seconds:.1f} s"
    return f'<div class="bar"><div style="width: {share:.1%}"></div></div><p role="status">{html.escape(text)}</p>'


def picture(shown: np.ndarray, shot: Shot, name: str, command: str = "") -> str:
    """A shot's picture enlarged; when it is done with a link that saves it. name: of the file, without its ending."""
    height, width = shown.shape[:2]
    wide = max(1, round(ABOUT / width)) * width
    out = (
        f'<img class="picture" style="width: {wide}px" width="{width}" height="{height}" decoding="sync" '
        f'alt="samples after {shot.done} evaluations" src="{data_url(shot.file or png.encode(shown))}">'
    )
    if shot.file:
        name = html.escape(name, quote=True)
        # A drawing that came out as the one before is new all the same: data-at tells.
        out += (
            f'<a class="save" data-at="{time.time_ns()}" download="{name}.png" href="{data_url(shot.file)}">'
            "Save the PNG with its settings</a>"
        )
    if shot.file and command:
        out += f'<p class="made">The same from the command line: <code>{html.escape(command)}</code></p>'
    return out


def canvas(image: np.ndarray | None, fill: np.ndarray | None = None) -> dict[str, Any]:
    """What canvas.js shows: an image, uint8 [H, W, C], and its mask, bool [H, W]."""
    if image is None:
        return {}
    height, width = image.shape[:2]
    painted = "" if fill is None else "".join("01"[f] for f in fill.ravel().astype(int))
    return {"image": data_url(png.encode(image)), "width": width, "height": height, "fill": painted}


def painted(value: Any, shape: tuple[int, ...]) -> np.ndarray | None:
    """The mask of a canvas, bool [H, W]; None where nothing is painted."""
    fill = value.get("fill") if isinstance(value, dict) else None
    if not isinstance(fill, str) or len(fill) != shape[0] * shape[1]:
        return None
    return np.array([c == "1" for c in fill]).reshape(shape[:2])
