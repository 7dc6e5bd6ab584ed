"""Compiled programs are kept between two starts of a command, where the user wants them or not at all."""

import os
import pathlib
import re
import subprocess
import sys

import jax
import pytest

from jax_diffusion import onednn, runtime

KEPT = ("jax_compilation_cache_dir", "jax_persistent_cache_min_compile_time_secs",
        "jax_persistent_cache_min_entry_size_bytes", "jax_enable_compilation_cache")  # fmt: skip


@pytest.fixture
def restored(monkeypatch):
    """JAX's settings as they were, and no variable of the environment that decides them."""
    before = {name: getattr(jax.config, name) for name in KEPT}
    monkeypatch.delenv("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", raising=False)
    yield
    for name, value in before.items():
        jax.config.update(name, value)
    runtime._restart_cache()


def test_the_default_folder_is_the_users_cache_by_machine(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert runtime.default_folder() == tmp_path / "jax_diffusion" / "compiled" / runtime.machine()
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")  # the XDG specification: to be ignored
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert tmp_path / "home" / ".cache" in runtime.default_folder().parents
    assert not (tmp_path / "home").exists()  # asking makes nothing


def test_another_processor_is_another_machine(monkeypatch):
    here, read = runtime.machine(), pathlib.Path.read_text
    assert re.fullmatch(r"\w+-[0-9a-f]{8}", here) and runtime.machine() == here
    for flags, same in (("flags\t: sse avx2 fma\n", False), ("flags\t: fma avx2 sse\nother: 1\n", False)):
        monkeypatch.setattr(pathlib.Path, "read_text", lambda self, flags=flags: "model: x\n" + flags)
        assert (runtime.machine() == here) == same
        there = runtime.machine()
    monkeypatch.setattr(pathlib.Path, "read_text", lambda self: "flags : sse avx2 fma\n")
    assert runtime.machine() == there  # in any order
    monkeypatch.setattr(pathlib.Path, "read_text", read)
    assert runtime.machine() == here


@pytest.mark.parametrize("said, variable, used", [
    (None, None, "default"), (None, "variable", "variable"), ("said", "variable", "said"), ("off", "variable", "")
])  # fmt: skip
def test_what_is_said_counts_first(restored, monkeypatch, tmp_path, said, variable, used):
    monkeypatch.setattr(runtime, "default_folder", lambda: tmp_path / "default")
    jax.config.update("jax_compilation_cache_dir", str(tmp_path / variable) if variable else None)
    folder = runtime.keep_compiled(str(tmp_path / said) if said not in (None, "off") else said)
    assert folder == (str(tmp_path / used) if used else "")
    assert (jax.config.jax_compilation_cache_dir or "") == folder
    assert [p.name for p in tmp_path.iterdir()] == ([used] if used else [])
    assert jax.config.jax_persistent_cache_min_compile_time_secs < 1


def test_a_cache_that_is_switched_off_stays_off(restored):
    jax.config.update("jax_enable_compilation_cache", False)
    assert runtime.keep_compiled() == ""


def test_a_folder_that_cannot_be_written_is_one_line(restored, tmp_path):
    (tmp_path / "file").write_text("")
    lines = []
    assert runtime.keep_compiled(str(tmp_path / "file" / "below"), warn=lines.append) == ""
    (line,) = lines
    assert line.startswith("warning: ") and "\n" not in line
    assert all(word in line for word in (str(tmp_path), "Not a directory", "--compile_cache=DIR or off"))
    assert jax.config.jax_compilation_cache_dir is None


def test_buckets_are_taken_as_they_are():
    assert runtime.writable("gs://bucket/compiled") == ""


def command(folder, tmp_path, *more):
    """A process of its own: trains two steps of points. Returns its lines, and what went to stderr."""
    environment = {k: v for k, v in os.environ.items() if "CACHE" not in k} | {"XDG_CACHE_HOME": str(tmp_path / "xdg")}
    fields = ["model.width=32", "model.depth=2", "train.batch_size=64", "train.steps=2", "optim.warmup=0",
              "train.eval_every=0", "train.sample_every=0", "data.holdout=0.1"]  # fmt: skip
    arguments = ["train", "--config=toy2d", f"--workdir={tmp_path / folder}", *(f"--config.{f}" for f in fields), *more]
    done = subprocess.run(
        [sys.executable, "-m", "jax_diffusion.cli.main", *arguments],
        env={**environment, "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"},
        capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines(), done.stderr


def test_a_second_start_reads_what_the_first_compiled(tmp_path):
    first, error = command("first", tmp_path)
    again, nothing = command("again", tmp_path)
    folder = tmp_path / "xdg" / "jax_diffusion" / "compiled" / runtime.machine()
    (stated,) = (line for line in first if line.startswith("compiling the training step"))
    assert stated.endswith(f"; kept in {folder}") and any("jit_" in p.name for p in folder.iterdir())
    assert folder.stat().st_mode & 0o077 == 0  # what lies there is run
    # The calls of oneDNN lie beside the programs.
    assert error == ("compiling the calls of oneDNN, once: about 5 s\n" if onednn.taken() else "")
    assert nothing == ""
    assert any(line.startswith("compiled in ") for line in first)
    assert any(line.startswith("read from there in ") for line in again)
    losses = [[line.split("img/s")[0].split("  ")[1] for line in lines if "loss" in line] for lines in (first, again)]
    assert losses[0] == losses[1] and losses[0]


def test_importing_the_package_changes_nothing_in_jax():
    code = "import jax_diffusion.train.loop, jax_diffusion.cli.main, jax; print(jax.config.jax_compilation_cache_dir)"
    environment = {k: v for k, v in os.environ.items() if "CACHE" not in k}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=300)
    assert done.stdout.strip() == "None", done.stderr
