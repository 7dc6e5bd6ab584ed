"""What the commands that edit images share: their options, the pictures they read and the picture they write."""

import argparse
import pathlib
import time
from typing import Any, NamedTuple

import numpy as np

from jax_diffusion.cli import guiding, sample
from jax_diffusion.errors import UserError

DEFAULT_HELD_OUT = 8
TILE = 64  # pixels that small images are enlarged to in the picture
TRAINS = {"low_resolution": "flowers64_sr", "gray": "flowers64_color"}  # the recipe that shows how
COMMANDS = {"low_resolution": "upscale", "gray": "colorize"}


class Job(NamedTuple):
    """A model and the pictures it is to edit."""

    model: Any
    images: np.ndarray  # [N, h, w, c] float32 in [-1, 1]
    labels: np.ndarray | None  # [N]
    guidance: dict[str, Any]  # keyword arguments of Model.sample
    variants: int  # results of each image
    held_out: bool  # whether the images are from the run's own data
    began: float

    def repeated(self, x: Any) -> Any:
        """[N, ...] -> [variants * N, ...], all images in turn; None stays None."""
        return None if x is None else np.concatenate([x] * self.variants)


def add_arguments(parser: argparse.ArgumentParser, variants: bool = True) -> None:
    sample.add_sampling_arguments(parser)
    add = parser.add_argument
    add("--images", metavar="PATH[,PATH...]", help="PNG or JPEG files, or folders of them")
    add("--from_data", type=int, metavar="N", help="N held-out images of the run's own data "
        f"(default: {DEFAULT_HELD_OUT}, where --images is not given)")  # fmt: skip
    add("--fit", action="store_true", help="scale and crop --images of another size to the model's")
    add("--labels", metavar="L[,L...]", help="classes of the results by number or name, repeated in turn; 'none': "
        "unconditional (default: the held-out images' own; none for --images)")  # fmt: skip
    if variants:
        add("--variants", type=int, default=1, metavar="N", help="results of each image (default: %(default)s)")
    add("--batch_size", type=int, metavar="N", help="images per call (default: the recipe's)")
    add("--out", metavar="FILE", help="picture of inputs and results (default: WORKDIR/COMMAND.png)")
    add("--npz", metavar="FILE", help="the results as arrays: arr_0 uint8 [N, H, W, C], arr_1 the labels")


def _files(text: str) -> list[pathlib.Path]:
    """The files that --images names, folders opened, in order."""
    from jax_diffusion.data.trees import SUFFIXES

    files = []
    for name in text.split(","):
        path = pathlib.Path(name)
        if path.is_dir():
            inside = sorted(p for p in path.iterdir() if p.suffix.lower() in SUFFIXES)
            if not inside:
                raise UserError(f"--images={name}: there is no picture in this folder ({', '.join(SUFFIXES)})")
            files += inside
        elif path.is_file():
            files.append(path)
        else:
            raise UserError(f"--images={name}: there is no such file or folder")
    return files


def read_picture(option: str, path: pathlib.Path, channels: int, size: tuple[int, ...] = ()) -> np.ndarray:
    """A picture as uint8 [H, W, channels]; scaled and cropped to `size` where one is given."""
    from jax_diffusion.data.images import Format, decode

    try:
        return decode(path.read_bytes(), Format(size, channels))
    except FileNotFoundError:
        raise UserError(f"{option}={path}: there is no such file") from None
    except Exception as e:
        raise UserError(f"{option}={path} is no picture that can be read ({e})") from e


def read_images(text: str, shapes: tuple[tuple[int, ...], ...], fit: bool) -> np.ndarray:
    """Pictures of one of `shapes` [(h, w, c), ...], all of the same: [N, h, w, c] float32 in [-1, 1].

    fit: pictures of other sizes are scaled and cropped to the first shape.
    """
    from jax_diffusion.data import to_float

    sizes = {s[:2]: s for s in shapes}
    images: list[np.ndarray] = []
    for path in _files(text):
        size = shapes[0][:2] if fit else ()
        image = read_picture("--images", path, shapes[0][2], size)
        if image.shape[:2] not in sizes or (images and image.shape != images[0].shape):
            h, w = image.shape[:2]
            takes = " or ".join(f"{s[1]}x{s[0]}" for s in sizes)
            raise UserError(f"--images={path} is {w}x{h} (width x height): this model takes {takes}; add --fit to "
                            "scale and crop")  # fmt: skip
        images.append(image)
    return np.asarray(to_float(np.stack(images)))


def load(options: argparse.Namespace, condition: str | None = None) -> Job:
    """Checks the options, loads the model and reads the pictures. condition: what the model must be conditioned
    on; None is no image."""
    import jax  # noqa: F401  so that a missing backend is said before the work

    from jax_diffusion import data
    from jax_diffusion import model as models

    began = time.perf_counter()
    variants = getattr(options, "variants", 1)
    for name, value in (("from_data", options.from_data), ("batch_size", options.batch_size), ("variants", variants)):
        if value is not None and value < 1:
            raise UserError(f"--{name}={value} must be at least 1")
    if options.images is not None and options.from_data is not None:
        raise UserError(f"--images={options.images} --from_data={options.from_data}: give one of the two")
    if options.fit and options.images is None:
        raise UserError("--fit belongs to --images, and none are given")
    if options.out:
        sample.check_picture("--out", options.out)
    model = models.load(options.workdir, step=options.checkpoint, ema=options.ema, ema_std=options.ema_std)
    _check_kind(options, model, condition)
    labels: Any = None
    if options.images is not None:
        observed = (model.condition.observed,) if model.condition and condition == "low_resolution" else ()
        images = read_images(options.images, (model.shape, *observed), options.fit)
    else:
        source = data.load(model.config.data, "eval")
        count = min(options.from_data or DEFAULT_HELD_OUT, len(source))
        batch = source.batch(np.linspace(0, len(source) - 1, count).astype(int))
        images = np.asarray(data.to_float(batch["image"]))
        labels = batch["label"] if model.class_names else None
    if options.labels is not None:
        labels = sample.parse_labels(options.labels, model.class_names)
        labels = None if labels is None else np.resize(labels, len(images))
    guidance = guiding.sampling(options, model, labels)
    return Job(model, images, labels, guidance, variants, options.images is None, began)


def no_table(options: argparse.Namespace) -> None:
    """For commands that make a grid of their own."""
    if options.table is not None:
        raise UserError(f"--table={options.table} starts from pure noise, `{options.command}` does not: use --solver")


def _check_kind(options: argparse.Namespace, model, condition: str | None) -> None:
    if len(model.shape) != 3:
        raise UserError(f"--workdir={options.workdir} is a model of points: `{options.command}` edits images")
    has: Any = model.condition.name if model.condition else None
    if has == condition:
        return
    if has is None and condition is not None:
        recipe = TRAINS[condition]
        raise UserError(
            f"--workdir={options.workdir} is a model without an image condition, and `{options.command}` needs one of "
            f"{condition!r}: train it with `jax-diffusion train --config={recipe} --workdir=runs/{recipe}`"
        )
    raise UserError(
        f"--workdir={options.workdir} is a model conditioned on an image ({has}): use it with "
        f"`jax-diffusion {COMMANDS[has]}`"
    )


def call(options: argparse.Namespace, job: Job, what: str, total: int, guidance: dict | None = None) -> dict:
    """Keyword arguments for Model.sample that every command gives."""
    return {
        **(job.guidance if guidance is None else guidance),
        "batch_size": options.batch_size or job.model.config.sampling.batch_size,
        "progress": sample.progress_line(what, total),
    }


def draw(options: argparse.Namespace, job: Job, what: str, table, **inputs) -> np.ndarray:
    """[variants * N, ...] samples by Model.sample; inputs: what else it is given."""
    import jax

    total = job.variants * len(job.images)
    key, labels = jax.random.key(options.seed), job.repeated(job.labels)
    return job.model.sample(key, table, total, labels=labels, **inputs, **call(options, job, what, total))


def rows(job: Job, results: np.ndarray) -> list[np.ndarray]:
    """[variants * N, ...] as a list of [N, ...]."""
    return np.split(results, job.variants)


def finish(
    options: argparse.Namespace,
    job: Job,
    parts: list[np.ndarray],
    results: np.ndarray,
    done: str,
    said: str = "",
    columns: int = 0,
) -> None:
    """Writes the picture (a row each of `parts`; where there are many images, side by side instead; `columns` asks
    for so many) and --npz, and prints what was done."""
    from jax_diffusion import io

    path = options.out or f"{options.workdir}/{options.command}.png"
    channels = max(p.shape[-1] for p in parts)
    parts = [np.broadcast_to(p, (*p.shape[:3], channels)) for p in parts]
    n = len(parts[0])
    in_rows = columns or n <= 16
    scale = max(1, TILE // max(parts[0].shape[1:3]))
    picture = io.grid(np.concatenate(parts), columns or n, scale) if in_rows else io.side_by_side(*parts)
    io.save_picture(path, picture)
    written = [path]
    if options.npz:
        io.save_npz(options.npz, results, job.repeated(job.labels))
        written.append(options.npz)
    seconds = time.perf_counter() - job.began
    print(f"{done}, in {seconds:.1f} s (compilation included): {', '.join(written)}" + (f"\n{said}" if said else ""))


def psnr(a: np.ndarray, b: np.ndarray) -> float:
    """Peak signal-to-noise ratio of two sets [N, H, W, C] in [-1, 1], clipped to it: dB, averaged over images."""
    error = np.square(np.clip(a, -1, 1) - np.clip(b, -1, 1)).mean((1, 2, 3))
    return float(np.mean(10 * np.log10(4 / np.maximum(error, 1e-12))))


def psnr_line(originals: str, truth: np.ndarray, levels: dict[str, np.ndarray]) -> str:
    """ "PSNR against the originals: noisy 9.20 dB, draw 20.05 dB"; levels: images [N, H, W, C] by name."""
    return f"PSNR against the {originals}: " + ", ".join(
        f"{name} {psnr(x, truth):.2f} dB" for name, x in levels.items()
    )
