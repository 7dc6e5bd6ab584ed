"""Run by test_malformed.py in a process with bounded memory: loads sets of random inputs, counts what became of each
and prints one JSON object."""

import contextlib
import io
import json
import logging
import os
import pathlib
import resource
import sys
import tarfile
import tempfile
import time
import zipfile

import malformed_inputs
import numpy as np

from jax_diffusion import config as configs
from jax_diffusion import data
from jax_diffusion.data import ArraySource

PER_SET = 40
CONTAINERS = ("folder", "zip", "tar", "tar.gz")
FORMATS = (((16, 16), 3), ((64, 48), 1), ((512, 512), 0))


def in_folder(root, files):
    """Also what only a folder can hold: returns how many further inputs that makes."""
    for name, content in files:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(content)
    a = root / "a"
    os.mkfifo(a / "zz_pipe.png")  # to read it would take for ever
    (a / "zz_dangling.png").symlink_to("nowhere.png")
    (a / "zz_self.png").symlink_to("zz_self.png")
    (a / "zz_vast.png").touch()
    os.truncate(a / "zz_vast.png", 3 << 30)  # sparse: 3 GiB of nothing
    (a / "zz_folder.png").mkdir()
    for name in ("loop", "loop2"):  # folders that hold themselves, twice: 2^40 paths
        (a / name).symlink_to(root, target_is_directory=True)
    (a / "zz_locked.png").write_bytes(b"")
    (a / "zz_locked.png").chmod(0)
    return 5


def as_zip(path, files, bomb):
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in files:
            archive.writestr(name.encode("utf-8", "replace").decode(), content)
        with archive.open("a/zz_bomb.png", "w", force_zip64=True) as file:  # 600 MiB in 600 KB
            for _ in range(150 if bomb else 20):  # the smaller one is read, and no image
                file.write(bytes(4 << 20))
        archive.writestr("a/zz_liar.png", bytes(1 << 16))
    content = bytearray(path.read_bytes())
    at = content.rfind(b"a/zz_liar.png")  # in the central directory: it says the file is of 100 bytes
    content[at - 46 + 24 : at - 46 + 28] = (100).to_bytes(4, "little")
    path.write_bytes(content)
    return 2


def as_tar(path, files):
    with tarfile.open(path, "w:gz" if path.suffix == ".gz" else "w") as archive:
        for name, content in files:
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
        link = tarfile.TarInfo("a/zz_link.png")  # no file: not counted
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
        archive.addfile(link)
    if path.suffix == ".gz":
        return 0
    with path.open("r+b") as file:  # a last member of 3 GiB
        file.seek(0, 2)
        file.seek(-file.tell() % 512 + file.tell() - _trailer(path))
        member = tarfile.TarInfo("a/zz_vast.png")
        member.size = 3 << 30
        file.write(member.tobuf())
        file.truncate(file.tell() + member.size + 1024)  # sparse
    return 1


def _trailer(path):
    """Bytes of zeros at the end of a tar: where a further member begins."""
    with tarfile.open(path) as archive:
        archive.getmembers()
        return path.stat().st_size - archive.offset


def run_set(number, root):
    """Loads PER_SET inputs in one container, in memory and batch by batch."""
    first = number * PER_SET
    made = [malformed_inputs.make(i) for i in range(first, first + PER_SET)]
    good = malformed_inputs.encoded(np.random.default_rng(number), "PNG", "RGB")[0]  # so that there is something
    files = [("a/000000.png", good)]
    files += [(f"{'ab'[i % 2]}/{name}", content) for i, (_, name, content, _) in enumerate(made)]
    container = CONTAINERS[number % len(CONTAINERS)]
    path = root / f"set.{container}"
    if container == "folder":
        path.mkdir()
        more = in_folder(path, files)
    else:
        more = as_zip(path, files, number % 8 == 1) if container == "zip" else as_tar(path, files)
    size, channels = FORMATS[number % len(FORMATS)]
    c = configs.default().data
    c.update(source="folder", path=str(path), holdout=0.0, size=size, channels=channels)
    if channels == 0:
        c.channels = 3  # grey and colour are mixed here, which without a wish is refused
    sources = {}
    for way, most in (("memory", 1 << 30), ("lazy", 0)):
        if container == "tar.gz" and way == "lazy":
            continue  # a compressed tar is in memory or refused
        c.max_bytes = most
        sources[way] = source = data.load(c, "train")
        for start in range(0, len(source), 16):
            batch = source.batch(np.arange(start, min(start + 16, len(source))))
            assert batch["image"].shape[1:] == (*size, c.channels) and batch["image"].dtype == np.uint8
            assert set(batch["label"]) <= {0, 1}
    total, memory = len(files) + more, sources["memory"]
    assert isinstance(memory, ArraySource)
    out = {"inputs": total, "good": len(memory), "skipped": len(memory.skipped)}
    if "lazy" in sources:
        assert len(sources["lazy"]) == total, f"{len(sources['lazy'])} of {total} in set {number}"
        assert sources["lazy"].skipped == memory.skipped
    skipped = {pathlib.PurePosixPath(name).name[:6] for name in memory.skipped}
    wrong = [
        f"{i} ({kind}) should be {wanted}"
        for i, (kind, name, _, wanted) in enumerate(made, first)
        if (wanted == "good" and name[:6] in skipped) or (wanted == "bad" and name[:6] not in skipped)
    ]
    return out | {"wrong": wrong, "kinds": [kind for kind, *_ in made]}


def main(first, count, most):
    logging.disable(logging.WARNING)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    # Far more than any input may take, and far less than a bomb would: an allocation fails instead of the machine.
    pages = int(pathlib.Path("/proc/self/statm").read_text().split()[0])
    limit = pages * os.sysconf("SC_PAGE_SIZE") + most
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    out = {"inputs": 0, "good": 0, "skipped": 0, "wrong": [], "kinds": {}, "slowest": [0.0, None]}
    for number in range(first, first + count):
        started = time.perf_counter()
        with tempfile.TemporaryDirectory() as root, contextlib.redirect_stderr(io.StringIO()):
            found = run_set(number, pathlib.Path(root))
        for key in ("inputs", "good", "skipped", "wrong"):
            out[key] += found[key]
        for kind in found["kinds"]:
            out["kinds"][kind] = out["kinds"].get(kind, 0) + 1
        out["slowest"] = max(out["slowest"], [round(time.perf_counter() - started, 2), number], key=lambda s: s[0])
    out["grown"] = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024
    return out


if __name__ == "__main__":
    print(json.dumps(main(*map(int, sys.argv[1:]))))
