"""Weights & Biases and Aim, beside the files: config.train.loggers="wandb,aim".

Neither is needed, and neither may cost a run. A package that is missing is said before anything is compiled; whatever
fails later, the network above all, is one warning, and training goes on without that logger: metrics.jsonl has it all.

    wandb   WORKDIR/wandb. Nothing is sent unless WANDB_MODE=online says so; else `wandb sync` sends it later.
            WANDB_PROJECT, WANDB_ENTITY, WANDB_NAME and the others mean what they mean to wandb.
    aim     the repository .aim beside the workdir, so that `aim up --repo=runs` shows all of runs/.

A resumed run goes on under the id it had, which WORKDIR/loggers.json keeps.
"""

import functools
import importlib.util
import json
import os
import pathlib
import threading
from collections.abc import Callable, Mapping
from typing import Any, Protocol

import jax
import numpy as np

from jax_diffusion import config as configs
from jax_diffusion.errors import UserError, choose
from jax_diffusion.io.whole import whole

CLOSE_S = 30.0  # a logger that is still sending then is left alone: a preempted host has no longer


class Logger(Protocol):
    """What every writer can do; clu's method names."""

    def write_scalars(self, step: int, scalars: Mapping[str, float]) -> None: ...

    def write_images(self, step: int, images: Mapping[str, np.ndarray]) -> None:
        """images: name -> uint8 [H, W, 3]."""

    def close(self) -> None: ...


class WandB:
    """A run of Weights & Biases."""

    def __init__(self, config: configs.ConfigDict, workdir: pathlib.Path, id: str | None, log: Callable[[str], None]):
        # In the environment, before the import: were it given to init alone, wandb's telemetry would look for a server.
        if os.environ.setdefault("WANDB_MODE", "offline") == "offline":
            os.environ.setdefault("WANDB_ERROR_REPORTING", "false")
        import wandb

        try:
            self.run = wandb.init(
                id=os.environ.get("WANDB_RUN_ID", id),
                resume="allow",
                dir=workdir,
                project=os.environ.get("WANDB_PROJECT", "jax_diffusion"),
                name=os.environ.get("WANDB_NAME", workdir.absolute().name),
                config=config.to_dict(),
                settings=wandb.Settings(silent=True),
            )
        except wandb.errors.UsageError as e:  # not logged in, a project that may not be
            said = str(e).splitlines()[0].rstrip(". ")
            raise UserError(f"--config.train.loggers=wandb: {said}; run `wandb login` or set WANDB_MODE=offline") from e
        self.id, self._image = self.run.id, wandb.Image
        # Not wandb's own step, which drops what a resumed run measures again.
        self.run.define_metric("*", step_metric="step")
        if self.run.offline:
            log(f"wandb: kept in {self.run.dir.removesuffix('/files')}, nothing is sent; send it with `wandb sync "
                f"{workdir}/wandb/offline-run-*`, or as it is made with WANDB_MODE=online")  # fmt: skip
        else:
            log(f"wandb: {self.run.url}")

    def write_scalars(self, step: int, scalars: Mapping[str, float]) -> None:
        self.run.log({"step": step, **scalars})

    def write_images(self, step: int, images: Mapping[str, np.ndarray]) -> None:
        self.run.log({"step": step, **{name: self._image(image) for name, image in images.items()}})

    def close(self) -> None:
        self.run.finish()


class Aim:
    """A run of Aim."""

    def __init__(self, config: configs.ConfigDict, workdir: pathlib.Path, id: str | None, log: Callable[[str], None]):
        import aim
        from aim.sdk.errors import MissingRunError, RunLockingError
        from PIL import Image

        folder = workdir.absolute().parent
        repository = aim.Repo.from_path(str(folder), init=not (folder / ".aim").exists())
        options = {
            "repo": repository,
            "experiment": workdir.absolute().name,
            "system_tracking_interval": None,
            "capture_terminal_logs": False,
        }
        try:
            self.run = aim.Run(id, **options)
        except MissingRunError:  # the repository was thrown away
            self.run = aim.Run(**options)
        except RunLockingError:  # the lock of a killed run on a host that has gone
            self.run = aim.Run(id, force_resume=True, **options)
        self.id, self._image = self.run.hash, lambda array: aim.Image(Image.fromarray(array))
        self.run.name = workdir.absolute().name
        self.run["config"] = json.loads(configs.to_json(config))
        log(f"aim: run {self.id}; see it with `aim up --repo={folder}`")

    def write_scalars(self, step: int, scalars: Mapping[str, float]) -> None:
        for name, value in scalars.items():
            self.run.track(value, name=name, step=step)

    def write_images(self, step: int, images: Mapping[str, np.ndarray]) -> None:
        for name, image in images.items():
            self.run.track(self._image(image), name=name, step=step)

    def close(self) -> None:
        self.run.close()


LOGGERS: dict[str, Callable[..., Logger]] = {"wandb": WandB, "aim": Aim}


class Guarded:
    """A logger that may fail: after its first error it is one warning and then silent."""

    def __init__(self, name: str, make: Callable[[], Logger], log: Callable[[str], None]):
        """Raises UserError where `make` does: that is the user's to mend, and training has not begun."""
        self.name, self._log = name, log
        self.inner: Any = None
        self.inner = self._try(make)

    def _try(self, call: Callable[[], Any]) -> Any:
        try:
            return call()
        except UserError:
            raise
        except Exception as e:  # whatever a library and the network do
            said = (str(e).splitlines() or [""])[0]
            self._log(f"warning: {self.name} fails with {type(e).__name__}: {said}; the run goes on without it")
            self.inner = None

    def write_scalars(self, step: int, scalars: Mapping[str, float]) -> None:
        if self.inner is not None:
            self._try(lambda: self.inner.write_scalars(step, scalars))

    def write_images(self, step: int, images: Mapping[str, np.ndarray]) -> None:
        if self.inner is not None:
            self._try(lambda: self.inner.write_images(step, images))

    def close(self) -> None:
        """Waits for what is not sent yet, for CLOSE_S seconds at most."""
        if self.inner is None:
            return
        thread = threading.Thread(target=self._try, args=(self.inner.close,), daemon=True)
        thread.start()
        thread.join(CLOSE_S)
        if thread.is_alive():
            self._log(f"warning: {self.name} is still sending after {CLOSE_S:.0f} s; left alone")
        self.inner = None


def parse(said: str) -> list[str]:
    """ "wandb,aim" -> ["wandb", "aim"]. Raises UserError for an unknown name, and where a package is not installed."""
    names = list(dict.fromkeys(word.strip() for word in said.split(",") if word.strip()))
    for name in names:
        choose("--config.train.loggers", name, LOGGERS)
        package = importlib.util.find_spec(name)
        if package is None or package.origin is None:  # a folder wandb/ of files is none
            raise UserError(f"--config.train.loggers={said} needs the package {name}: pip install {name}")
    return names


def start(config: configs.ConfigDict, workdir: pathlib.Path, log: Callable[[str], None]) -> list[Logger]:
    """The loggers of a run, open; their ids in WORKDIR/loggers.json. None on other processes than the first.

    log: called with each line meant for the user.
    """
    if jax.process_index():
        return []
    names, path = parse(config.train.loggers), workdir / "loggers.json"
    ids = json.loads(path.read_text()) if path.exists() else {}
    loggers: list[Logger] = []
    for name in names:
        make = LOGGERS[name]
        guarded = Guarded(name, functools.partial(make, config, workdir, ids.get(name), log), log)
        if guarded.inner is not None:
            ids[name] = guarded.inner.id
            loggers.append(guarded)
    if loggers:
        with whole(path) as draft:
            draft.write_text(json.dumps(ids) + "\n")
    return loggers
