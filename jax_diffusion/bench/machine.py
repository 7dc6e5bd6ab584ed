"""What this is measured on, and whether something else runs there."""

import hashlib
import os
import pathlib
import platform
import threading
import time
from typing import Any

BUSY = 0.85  # of the cores: with less, other work is going on


def cores() -> int:
    """That this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def describe() -> dict[str, Any]:
    """Of the host; the workers add the device."""
    model = ""
    try:
        lines = pathlib.Path("/proc/cpuinfo").read_text().splitlines()
        model = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "")
    except OSError:
        pass
    return {
        "system": platform.platform(),
        "processor": model or platform.processor(),
        "cores": cores(),
        "python": platform.python_version(),
    }


def free_share(threads: int, seconds: float = 0.4) -> float:
    """How much of so many cores this process gets: near 1 where nothing else runs."""
    data, used = bytes(1 << 18), []

    def work() -> None:
        began, end = time.thread_time(), time.perf_counter() + seconds
        while time.perf_counter() < end:
            hashlib.sha256(data)  # lets go of Python's lock
        used.append(time.thread_time() - began)

    running = [threading.Thread(target=work) for _ in range(threads)]
    started = time.perf_counter()
    for thread in running:
        thread.start()
    for thread in running:
        thread.join()
    return min(sum(used) / (threads * (time.perf_counter() - started)), 1.0)


# glibc: keep memory that is freed, in pages of 2 MiB. JAX's side does so too (lowering.keep_memory); PyTorch trains
# 10 % faster with the first, and 2 to 4 % with the second.
KEPT = {
    "MALLOC_ARENA_MAX": "1",  # autograd's thread too
    "MALLOC_MMAP_MAX_": "0",
    "MALLOC_TRIM_THRESHOLD_": str(2**40),
    "MALLOC_TOP_PAD_": str(2**26),
    "GLIBC_TUNABLES": "glibc.malloc.hugetlb=1",
}


def torch_environment(share: float) -> dict[str, str]:
    """The environment in which PyTorch does best: where it keeps freed memory, and how its threads wait.

    On free cores its own default, spinning, is the fastest. Where other processes take the cores it is slower by 10 to
    100 times (measured), since a thread spins while the one it waits for has none: there it sleeps.
    """
    kept = {name: value for name, value in KEPT.items() if name not in os.environ}
    said = any(name in os.environ for name in ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT"))
    return kept if said or share >= BUSY else {**kept, "OMP_WAIT_POLICY": "passive"}
