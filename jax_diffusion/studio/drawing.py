"""A run that is played with: its samples and fillings as pictures, frame by frame."""

import pathlib
import time
import zlib
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
import numpy as np

from jax_diffusion import data, io, solvers
from jax_diffusion import model as models
from jax_diffusion.cli import images
from jax_diffusion.errors import UserError
from jax_diffusion.streaming import Stream
from jax_diffusion.studio import png
from jax_diffusion.studio.settings import Settings
from jax_diffusion.train.workdir import read_meta
from jax_diffusion.version import __version__


class Shot(NamedTuple):
    """What there is to see of a drawing."""

    picture: np.ndarray | None  # uint8 [H', W', 3]; None where there is nothing yet
    done: int  # network evaluations
    rows: int  # of how many; 0 where the solver decides by itself
    seconds: float
    images: np.ndarray | None = None  # uint8 [num, H, W, C], at the end
    file: bytes = b""  # the picture as a PNG with its settings, at the end
    said: str = ""  # what was done, at the end


class Studio:
    """A trained model of images, and the held-out images of its data."""

    def __init__(self, workdir: str, checkpoint: int | None = None):
        """Raises UserError where there is no such run, or it makes no pictures that can be shown."""
        self.workdir = str(workdir)
        _check(self.workdir)
        self.model = models.load(workdir, step=checkpoint)
        self.stream = Stream(self.model)
        self.crc = _checksum(self.model.params)
        self._held_out: Any = None

    @property
    def name(self) -> str:
        return pathlib.Path(self.workdir).resolve().name

    def sample(self, settings: Settings) -> Iterator[Shot]:
        """Shots of samples, [num]; the last picture is that of `jax-diffusion sample`."""
        labels = settings.labels
        columns = io.class_columns(len(labels)) if labels and settings.num > len(labels) else None
        record = self.record("sample", settings)
        yield from self._draw(settings, record, lambda images: io.grid(images, columns))

    def inpaint(self, settings: Settings, image: np.ndarray | None, fill: np.ndarray | None) -> Iterator[Shot]:
        """Shots of `num` fillings of one image, uint8 [H, W, C], where `fill`, bool [H, W], is true.

        The picture shows the image, what is known of it (grey: to fill) and the results.
        """
        if image is None:
            raise UserError("there is no image to fill in: choose one first")
        if fill is None or not fill.any():
            raise UserError("no mask is drawn: paint with the mouse over what is to be filled in")
        known = np.asarray(data.to_float(image))[None]
        mask = ~fill
        inputs = np.concatenate([known, np.where(mask[..., None], known, np.float32(0))])
        record = {**self.record("inpaint", settings), "image": png.pack(image), "mask": png.pack(fill)}
        yield from self._draw(
            settings,
            record,
            lambda images: io.grid(np.concatenate([inputs, images])),
            known=np.repeat(known, settings.num, axis=0),
            mask=mask,
        )

    def held_out(self, index: int) -> tuple[np.ndarray, int | None]:
        """One image of the data that the run was not trained on, uint8 [H, W, C], and its label. Raises UserError where
        the data is not at hand, or has no such image."""
        if self._held_out is None:
            self._held_out = data.load(self.model.config.data, "eval")
        count = len(self._held_out)
        if not 0 <= index < count:
            raise UserError(f"held-out image {index}: there are 0 to {count - 1}")
        batch = self._held_out.batch(np.array([index]))
        image = np.asarray(data.to_uint8(np.asarray(data.to_float(batch["image"]))))[0]
        return image, int(batch["label"][0]) if self.model.class_names else None

    def uploaded(self, file: bytes) -> np.ndarray:
        """A picture of any size, scaled and cropped to the model's: uint8 [H, W, C]."""
        from jax_diffusion.data.images import Format, decode

        try:
            return decode(file, Format(self.model.shape[:2], self.model.shape[2]))
        except Exception as e:
            raise UserError(f"this file is no picture that can be read ({e})") from None

    def record(self, kind: str, settings: Settings) -> dict[str, Any]:
        """What is written into a picture."""
        model = self.model
        return {
            "version": __version__,
            "kind": kind,
            "model": {"run": self.name, "step": model.step, "crc32": self.crc, "shape": list(model.shape)},
            "settings": settings.to_json(),
            **({"command": self.command(settings)} if kind == "sample" else {}),
        }

    def command(self, settings: Settings) -> str:
        return settings.command(self.workdir, self.model.step, len(self.model.class_names))

    def restored(self, file: bytes) -> tuple[str, Settings, np.ndarray | None, np.ndarray | None, str]:
        """(kind, settings, image, fill, warning) of a picture saved earlier; "" is no warning.

        Raises UserError where there are none in it, or none that this model can draw.
        """
        record = png.read_record(file)
        kind, made_by = record.get("kind"), record.get("model")
        if kind not in ("sample", "inpaint") or not isinstance(made_by, dict):
            raise UserError(f"the settings in this PNG are of a kind unknown here ({kind!r})")
        settings = Settings.from_json(record.get("settings")).checked(self.model)
        image = fill = None
        if kind == "inpaint":
            shape = self.model.shape
            image, fill = png.unpack(record.get("image"), shape), png.unpack(record.get("mask"), shape[:2]) > 127
        if made_by.get("crc32") == self.crc:
            return kind, settings, image, fill, ""
        run, step = made_by.get("run"), made_by.get("step")
        warning = f"This picture was drawn by another model ({run}, step {step}): here the same settings draw another."
        return kind, settings, image, fill, warning

    def _draw(self, settings: Settings, record: dict, picture, **inputs) -> Iterator[Shot]:
        """Shots of samples as `picture` arranges them, [num, H, W, C] -> uint8 [H', W', 3]."""
        table = settings.table(self.model)
        began = time.perf_counter()
        key, seconds = jax.random.key(settings.seed), lambda: time.perf_counter() - began
        given = {
            "labels": settings.labels,
            "guidance": settings.scale,
            "batch_size": self.model.config.sampling.batch_size,
            **inputs,
        }
        rows = len(table) if isinstance(table, solvers.Table) else 0
        yield Shot(None, 0, rows, 0.0)
        if rows:
            for moment in self.stream(key, table, settings.num, **given):
                samples = moment.images
                if moment.done < rows:
                    yield Shot(picture(samples), moment.done, rows, seconds())
        else:  # adaptive steps and Langevin correctors: one call
            samples = self.model.sample(key, table, settings.num, **given)
        shown, pixels = picture(samples), np.asarray(data.to_uint8(samples))
        said = f"{settings.num} images with {table.name}, {solvers.cost(table)}, in {seconds():.1f} s"
        yield Shot(shown, rows, rows, seconds(), pixels, png.encode(shown, record), said)


def _check(workdir: str) -> None:
    """Raises UserError where a run makes no pictures that the page can show."""
    config, facts = read_meta(workdir)
    shape, condition = tuple(facts["shape"]), config.condition.name
    if len(shape) != 3:
        raise UserError(
            f"--workdir={workdir} is a model of points: the studio shows images; use `jax-diffusion sample`"
        )
    if shape[2] not in (1, 3):
        raise UserError(
            f"--workdir={workdir} is a model of {shape[2]} channels: the studio shows images of 1 or 3; use "
            "`jax-diffusion sample`"
        )
    if condition != "none":
        raise UserError(
            f"--workdir={workdir} is a model conditioned on an image ({condition}), which the studio has no place for: "
            f"use `jax-diffusion {images.COMMANDS[condition]}`"
        )


def _checksum(params: Any) -> str:
    """Of all parameters: another training step, another sum."""
    crc = 0
    for leaf in jax.tree.leaves(params):
        crc = zlib.crc32(np.asarray(jax.device_get(leaf)).tobytes(), crc)
    return f"{crc:08x}"
