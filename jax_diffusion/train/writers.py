"""Where the numbers go: metrics.jsonl always, TensorBoard beside it. clu's method names.

clu.metric_writers itself needs tensorflow, which this project does without.
"""

import json
import pathlib
import time
from collections.abc import Mapping

import numpy as np


class MetricWriter:
    """Writes scalars and pictures under workdir; on other processes than the first it writes nothing.

    A resumed run appends: of two lines for one step in metrics.jsonl the later one counts.
    """

    def __init__(self, workdir: pathlib.Path, active: bool = True):
        self._lines = self._board = None
        if active:
            from tensorboardX import SummaryWriter

            self._lines = (workdir / "metrics.jsonl").open("a")
            self._board = SummaryWriter(str(workdir / "tensorboard"))

    def write_scalars(self, step: int, scalars: Mapping[str, float]) -> None:
        if self._lines is None:
            return
        scalars = {k: float(v) for k, v in scalars.items()}
        self._lines.write(json.dumps({"step": step, "time": round(time.time(), 3), **scalars}) + "\n")
        self._lines.flush()
        for name, value in scalars.items():
            self._board.add_scalar(name, value, step)

    def write_images(self, step: int, images: Mapping[str, np.ndarray]) -> None:
        """images: name -> uint8 [H, W, 3]."""
        if self._board is not None:
            for name, image in images.items():
                self._board.add_image(name, image, step, dataformats="HWC")

    def flush(self) -> None:
        if self._board is not None:
            self._board.flush()

    def close(self) -> None:
        if self._lines is not None:
            self._lines.close()
            self._board.close()
