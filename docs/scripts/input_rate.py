"""Images a second, and a CPU-second, of our input pipeline beside torch's DataLoader.

    python docs/scripts/input_rate.py --data=DIR                          # DIR: the archives and IDX files below
    python docs/scripts/input_rate.py --data=DIR --cases=jpeg32,packed28 --rounds=3 --seconds=3 --page=docs/data.md

DIR holds cifar10-test.tar.gz, flowers64.tar.gz (JPEG files in class folders) and MNIST's IDX files. Every measurement
is a process of its own; ours and torch's take turns (A B C A B C ...) and the medians are reported. Both deliver
shuffled batches of uint8 images with int labels in the host's memory, "resident" excepted, where ours lie on the
device. CPU time is that of the process and of all processes below it, while batches are drawn. No torchvision: torch's
Dataset opens files with PIL as ours does, in two forms:

    items    __getitem__ and the default collate, as most code has it
    batched  __getitems__ that fills one array for the whole batch, and no collate: the strongest there is
"""

import argparse
import json
import os
import pathlib
import platform
import statistics
import subprocess
import sys
import tarfile
import tempfile
import time

import numpy as np
import page

# case: (what, side of the images, archive)
CASES = {
    "jpeg32": ("jpeg", 32, "cifar10-test.tar.gz"),
    "jpeg64": ("jpeg", 64, "flowers64.tar.gz"),
    "jpeg64to48": ("jpeg", 48, "flowers64.tar.gz"),
    "packed28": ("packed", 28, "idx"),
    "packed32": ("packed", 32, "cifar10-test.tar.gz"),
    "packed64": ("packed", 64, "flowers64.tar.gz"),
    "resident28": ("resident", 28, "idx"),
    "resident32": ("resident", 32, "cifar10-test.tar.gz"),
    "resident64": ("resident", 64, "flowers64.tar.gz"),
}
SIDES = ("ours", "items", "batched")


def config(what, size, path, workers):
    from jax_diffusion import config as configs

    c = configs.default()
    c.data.update(path=str(path), holdout=0.0)
    if what == "jpeg":
        # Never kept in memory: torch's does not either.
        c.data.update(source="folder", size=(size, size), channels=3, max_bytes=0, workers=workers)
    else:
        c.data.update(source="packed", on_device="replicate" if what == "resident" else "never")
    return c


def ours(what, size, path, batch, workers):
    """Batches, endless."""
    import jax

    from jax_diffusion import data, sharding
    from jax_diffusion.data import resident
    from jax_diffusion.data.order import Tasks

    c = config(what, size, path, workers)
    source = data.load(c.data, "train")
    if what != "resident":
        yield from source.batches(Tasks(source.order, 0, batch, 0))
        return
    place = sharding.batch_sharding(sharding.make_mesh(1, devices=jax.devices()[:1]))
    held = resident.load(source, "replicate", place, lambda line: None)
    with data.Batches(source, batch, 0, 0, sharding=place, resident=held) as batches:
        for _, found in batches:
            yield jax.block_until_ready(found)


def torch_set(what, size, path):
    """torch's Dataset of a case, with __getitem__ and __getitems__."""
    import torch
    from PIL import Image, ImageOps

    class Jpegs(torch.utils.data.Dataset):
        def __init__(self):
            root = pathlib.Path(path)
            classes = sorted({p.parent for p in root.rglob("*.jp*g")})
            self.files = [(str(f), i) for i, folder in enumerate(classes) for f in sorted(folder.iterdir())]

        def __len__(self):
            return len(self.files)

        def image(self, i):
            with Image.open(self.files[i][0]) as image:
                image = image if image.mode == "RGB" else image.convert("RGB")
                if image.size != (size, size):
                    image = ImageOps.fit(image, (size, size), Image.Resampling.LANCZOS)
                return np.asarray(image)

        def __getitem__(self, i):
            return torch.from_numpy(self.image(i).copy()), self.files[i][1]

        def batch(self, indices):
            images = np.empty((len(indices), size, size, 3), np.uint8)
            for j, i in enumerate(indices):
                images[j] = self.image(i)
            labels = np.array([self.files[i][1] for i in indices])
            return torch.from_numpy(images), torch.from_numpy(labels)

    class Mapped(torch.utils.data.Dataset):
        def __init__(self):
            # "resident": in memory, since torch has no set on the device.
            self.images = np.load(path / "train.npy", mmap_mode=None if what == "resident" else "r")
            self.labels = np.load(path / "train-labels.npy")

        def __len__(self):
            return len(self.images)

        def __getitem__(self, i):
            return torch.from_numpy(self.images[i].copy()), int(self.labels[i])

        def batch(self, indices):
            return torch.from_numpy(self.images[indices]), torch.from_numpy(self.labels[indices])

    return (Jpegs if what == "jpeg" else Mapped)()


def torchs(side, what, size, path, batch, workers):
    """Batches, endless."""
    import torch

    dataset, options = torch_set(what, size, path), {}
    if side == "batched":
        type(dataset).__getitems__ = type(dataset).batch
        options["collate_fn"] = _same
    if workers and what == "jpeg":
        options.update(num_workers=workers, prefetch_factor=4, persistent_workers=True)
    loader = torch.utils.data.DataLoader(dataset, batch, shuffle=True, drop_last=True, **options)
    while True:
        yield from loader


def _same(found):
    return found


def cpu_seconds() -> float:
    """Of this process and of all that descend from it and live."""
    parents, times = {}, {}
    for entry in pathlib.Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                fields = (entry / "stat").read_text().rpartition(")")[2].split()
            except OSError:
                continue
            parents[int(entry.name)] = int(fields[1])
            times[int(entry.name)] = (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")

    def mine(pid):
        while pid and pid != os.getpid():
            pid = parents.get(pid, 0)
        return pid == os.getpid()

    # Those that ended meanwhile are among the children's.
    return sum(t for pid, t in times.items() if mine(pid)) + sum(os.times()[2:4])


def side(options) -> None:
    """One measurement, in this process; prints it as JSON."""
    what, size, _ = CASES[options.case]
    arguments = what, size, pathlib.Path(options.path), options.batch, options.workers
    if options.side == "ours":
        made = ours(*arguments)
    else:
        import torch

        torch.set_num_threads(1)
        made = torchs(options.side, *arguments)
    start = time.perf_counter()
    while time.perf_counter() - start < options.warmup:  # workers start, files come into the page cache
        next(made)
    begin, cpu, count = time.perf_counter(), cpu_seconds(), 0
    while (seconds := time.perf_counter() - begin) < options.seconds:
        next(made)
        count += options.batch
    cpu = cpu_seconds() - cpu
    print(json.dumps({"second": count / seconds, "cpu_second": count / max(cpu, 1e-3)}), flush=True)
    os._exit(0)  # workers and prefetching threads need no farewell


def prepare(options, root: pathlib.Path) -> dict[str, pathlib.Path]:
    """The folders of JPEG files, and packed sets of them, by archive."""
    from jax_diffusion.data import packing

    out = {}
    for case in options.cases:
        what, size, archive = CASES[case]
        files = root / archive.partition(".")[0]
        if archive != "idx" and not files.exists():
            with tarfile.open(options.data / archive) as tar:
                tar.extractall(files, filter="data")
        out[case] = files
        if what != "jpeg":
            out[case] = root / f"packed{size}"
            if not out[case].exists():
                c = config("jpeg", size, files, 0).data
                c.update(max_bytes=1 << 30)
                if archive == "idx":
                    c.update(source="idx", path=str(options.data), size=(), channels=0)
                packing.pack(c, out[case], "array")
    return out


def table(results: dict[str, dict[str, dict[str, float]]]) -> str:
    lines = [
        "| input | ours, img/s | torch items | torch batched | ours, img per CPU-second | torch items | torch batched "
        "| ours / items | ours / batched |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for case, by in results.items():
        cells = [f"{by[s][unit]:,.0f}" for unit in ("second", "cpu_second") for s in SIDES]
        for other in SIDES[1:]:
            ratio = [by["ours"][unit] / by[other][unit] for unit in ("second", "cpu_second")]
            cells.append(f"{ratio[0]:.2f} ({ratio[1]:.2f})")
        lines.append(f"| {case} | {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--data", type=pathlib.Path, help="folder of the archives")
    add("--cases", default=",".join(CASES), help="comma-separated (default: all)")
    add("--rounds", type=int, default=5)
    add("--seconds", type=float, default=5.0, help="of one measurement (default: 5)")
    add("--warmup", type=float, default=3.0)
    add("--batch", type=int, default=128)
    add("--workers", type=int, default=2, help="processes that decode, of both (default: 2)")
    add("--page", help="Markdown page that gets the table")
    for name in ("--side", "--case", "--path"):
        add(name, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.side:
        side(options)
    if options.data is None:
        parser.error("--data=DIR is needed")
    options.cases = options.cases.split(",")
    # Torch with one thread a process, ours with the one that gathers: what is compared is Python and decoding.
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "JAX_PLATFORMS": "cpu"}
    with tempfile.TemporaryDirectory(prefix="input_rate_") as root:
        paths = prepare(options, pathlib.Path(root))
        seen = {case: {s: [] for s in SIDES} for case in options.cases}
        load = []
        for round_ in range(options.rounds):
            for case in options.cases:
                for s in SIDES:
                    command = [sys.executable, __file__, f"--side={s}", f"--case={case}", f"--path={paths[case]}"]
                    command += [f"--{n}={getattr(options, n)}" for n in ("seconds", "warmup", "batch", "workers")]
                    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
                    if done.returncode:
                        raise SystemExit(done.stderr[-3000:])
                    seen[case][s].append(json.loads(done.stdout.splitlines()[-1]))
                    load.append(os.getloadavg()[0])
                rates = ", ".join(f"{s} {seen[case][s][-1]['second']:,.0f}" for s in SIDES)
                print(f"round {round_ + 1}/{options.rounds}, {case}: {rates} img/s", file=sys.stderr, flush=True)
    results = {
        case: {s: {u: statistics.median(r[u] for r in runs) for u in runs[0]} for s, runs in by.items()}
        for case, by in seen.items()
    }
    text = table(results)
    import torch

    busy = statistics.median(load)
    text += (
        f"\n\nMedians of {options.rounds} rounds of {options.seconds:g} s, batches of {options.batch}, "
        f"{options.workers} worker processes for JPEG files, {os.cpu_count()} cores, load {busy:.0f}, "
        f"Python {platform.python_version()}, torch {torch.__version__}. In brackets: of images per CPU-second."
    )
    print(text)
    if options.page:
        page.insert(options.page, "input rate", text)


if __name__ == "__main__":
    main()
