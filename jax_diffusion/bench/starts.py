"""How long the first step takes, from a cold and from a warm compile cache."""

import pathlib
import tempfile
import time
from collections.abc import Callable
from typing import Any

from jax_diffusion.bench import cases
from jax_diffusion.bench.worker import Worker

MODES = ("train", "sample")


def measure(
    names: tuple[str, ...], batch: int, dtype: str, sampler_steps: int, overrides: tuple[str, ...], threads: int,
    log: Callable[[str], None], side: str = "jax",
) -> list[dict[str, Any]]:  # fmt: skip
    """For each case and mode two processes, one after the other, on one folder that is empty at first. Seconds."""
    out = []
    for case in names:
        for mode in MODES:
            with tempfile.TemporaryDirectory(prefix="bench_starts_") as folder:
                row: dict[str, Any] = {"case": case, "mode": mode, "batch": batch}
                for kind in ("cold", "warm"):
                    work = cases.Work(case, mode, batch, dtype, sampler_steps, overrides)
                    row[kind] = _start(pathlib.Path(folder), work, threads, side)
                    log(f"{case} {mode}, {kind}: first call after {row[kind]['total_s']:.1f} s, of which compiling "
                        f"{row[kind]['compile_s']:.1f} s")  # fmt: skip
            row["ratio"] = row["cold"]["compile_s"] / max(row["warm"]["compile_s"], 1e-9)
            out.append(row)
    return out


def _start(folder: pathlib.Path, work: cases.Work, threads: int, side: str) -> dict[str, float]:
    worker, began = Worker(side, folder, threads), time.perf_counter()
    try:
        platform = worker.call("start", compile_cache=str(folder / "compiled"))["platform"]
        imported = time.perf_counter()
        work = work._replace(dtype=work.dtype or ("float32" if platform == "cpu" else "bfloat16"))
        worker.call("load", **work._asdict())
        loaded = time.perf_counter()
        ready = worker.call("prepare", key="default", mode=work.mode, variant="default", batch=work.batch, warmup=1)
        return {
            "import_s": imported - began,
            "init_s": loaded - imported,
            "compile_s": ready["compile_s"],
            "total_s": time.perf_counter() - began - 2 * ready["step_s"],
        }
    finally:
        worker.stop()


def table(rows: list[dict[str, Any]]) -> str:
    """For a terminal."""
    lines = [f"{'':24}{'compile, cold':>14}{'warm':>9}{'ratio':>8}{'to the first call, cold':>26}{'warm':>9}"]
    for r in rows:
        cold, warm = r["cold"], r["warm"]
        lines.append(
            f"{r['case'] + ' ' + r['mode']:24}{cold['compile_s']:12.1f} s{warm['compile_s']:7.1f} s{r['ratio']:7.1f}x"
            f"{cold['total_s']:24.1f} s{warm['total_s']:7.1f} s"
        )
    return "\n".join(lines)
