"""The comparison driven by frameworks that are fakes, in real worker processes."""

import functools
import json
import os
import pathlib
import signal
import subprocess
import sys
import time

import pytest

from jax_diffusion import onednn
from jax_diffusion.bench import run, settings, starts
from jax_diffusion.cli import main
from jax_diffusion.errors import UserError

HERE = pathlib.Path(__file__).parent


@pytest.fixture
def compare(tmp_path, monkeypatch):
    """compare(FAKE="", modes=..., ...) -> (result, log, order of the rounds); raises as the run does."""
    monkeypatch.setenv("PYTHONPATH", str(HERE))

    def compare(fake="", **options):
        monkeypatch.setenv("FAKE", fake)
        lines, saved = [], []
        chosen = {"modes": ("train",), "sides": ("fake_side", "fake_side"), **options}
        asked = settings.Options(rounds=2, steps=3, cases=("unet",), threads=1, **chosen)
        bench = run.Bench(asked, tmp_path, lines.append, lambda result: saved.append(json.loads(json.dumps(result))))
        compare.bench, compare.saved = bench, saved
        result = bench.run()
        order = [json.loads(line) for line in (tmp_path / "order.txt").read_text().splitlines()]
        return result, "\n".join(lines), order

    return compare


def test_each_variant_has_rounds_of_jax_beside_it(compare):
    result, log, order = compare()
    # A round that does not count, in which the fake is slow, and two that do.
    assert order == [[name, 3] for name in ("default", "eager", "default", "eager", "eager", "default",
                                            "default", "compile", "default", "compile", "compile", "default",
    )]  # fmt: skip
    rows = {row["variant"]: row for row in result["rows"]}
    assert rows["eager"]["ratio"]["median"] == pytest.approx(2)
    assert rows["compile"]["best_of_torch"] and rows["default"]["ratio"]["median"] == pytest.approx(1.5)
    assert rows["default"]["images_per_s"] == pytest.approx(16 / 0.01)
    assert rows["compile"]["share_of_ceiling"] == pytest.approx(1e9 / 0.015 / 2e12)
    assert result["complete"] and result["versions"]["fake"] == "1" and "1.50x" in log
    assert compare.saved[-1] == json.loads(json.dumps(result))
    assert all(worker.process is None for worker in compare.bench.workers.values())


def test_without_pytorch(compare):
    result, _, order = compare(only="jax", modes=("train", "sample"), batches=(1, 4))
    assert {name for name, _ in order} == {"default"}
    assert [(row["mode"], row["batch"], row["ratio"]) for row in result["rows"]] == [
        ("train", 1, None), ("train", 4, None), ("sample", 1, None), ("sample", 4, None)]  # fmt: skip


@pytest.mark.parametrize("mode", ["train", "forward", "sample"])
def test_nothing_is_timed_where_outputs_differ(compare, mode, tmp_path):
    with pytest.raises(UserError, match="differ") as error:
        compare("differ", modes=(mode,))
    assert "\n" not in str(error.value) and "1.0e+00" in str(error.value)
    assert not (tmp_path / "order.txt").exists()


def test_a_variant_that_fails_is_a_row_of_its_own(compare):
    result = compare("fail:eager")[0]
    rows = {row["variant"]: row for row in result["rows"]}
    assert rows["eager"]["why"] == "MemoryError: out of memory"
    assert rows["compile"]["ratio"]["median"] == pytest.approx(1.5)
    assert result["complete"]


def test_a_worker_that_dies_is_named_and_replaced(compare):
    result = compare("die:eager")[0]
    why = next(row["why"] for row in result["rows"] if row["variant"] == "eager")
    assert "exit status 9" in why and "the fake ran out of everything" in why and "fake_side worker" in why
    assert not result["complete"] and why in result["failures"][0]
    # The next variant has a new worker.
    assert next(row for row in result["rows"] if row["variant"] == "compile")["rounds"] == 2


def test_a_framework_that_does_not_start(compare):
    with pytest.raises(UserError, match=r"worker died \(exit status 1\).*No module named 'unheard_of'"):
        compare(sides=("unheard_of", "fake_side"))


def test_variants_of_another_mode_leave_jax_alone(compare):
    result = compare(variants=("pipeline",))[0]
    assert [(row["variant"], row["ratio"]) for row in result["rows"]] == [("default", None)]


def test_where_jax_dies_the_rest_goes_on(compare):
    result, _, order = compare("die:default", modes=("train", "forward"))
    assert [name for name, _ in order] == ["default", "default"]
    assert len(result["failures"]) == 2 and not result["complete"]


def test_ctrl_c_keeps_what_was_measured_and_ends_the_workers(tmp_path):
    code = f"""
import json, pathlib
from jax_diffusion.bench import report, run, settings
folder = pathlib.Path({str(tmp_path)!r})
sides = ("fake_side", "fake_side")
asked = settings.Options(rounds=3, steps=1, sides=sides, cases=("unet",), modes=("train",), threads=1)
bench = run.Bench(asked, folder, print, lambda result: report.write(folder / "bench.json", result))
try:
    bench.run()
except KeyboardInterrupt:
    print("interrupted")
"""
    env = {**os.environ, "FAKE": "hang", "PYTHONPATH": str(HERE)}
    # Shells ignore Ctrl-C for what they run in the background, and a process inherits that.
    heard = functools.partial(signal.signal, signal.SIGINT, signal.SIG_DFL)
    process = subprocess.Popen(
        [sys.executable, "-c", code], env=env, stdout=subprocess.PIPE, text=True, preexec_fn=heard
    )
    order = tmp_path / "order.txt"
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline and not (order.exists() and len(order.read_text().splitlines()) > 4):
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    out, _ = process.communicate(timeout=30)
    assert out.endswith("interrupted\n"), out
    result = json.loads((tmp_path / "bench.json").read_text())
    assert not result["complete"]
    assert {row["variant"]: row["rounds"] for row in result["rows"]} == {"default": 1, "eager": 1}
    workers = subprocess.run(["pgrep", "-f", f"bench.worker fake_side 1 {tmp_path}"], capture_output=True, text=True)
    assert not workers.stdout


@pytest.mark.parametrize(
    "arguments, words",
    [
        (["--cases=unet_haf"], ["--cases", "did you mean 'unet_half'?"]),
        (["--mode=trian"], ["--mode", "'train'"]),
        (["--batch=1,x"], ["--batch=1,x", "positive numbers"]),
        (["--batch=0"], ["--batch=0"]),
        (["--rounds=0"], ["--rounds=0", "at least 1"]),
        (["--dtype=float16"], ["--dtype", "bfloat16"]),
        (["--variants=eagr"], ["--variants", "'eager'"]),
        (["--out=/nowhere/bench.json"], ["--out=/nowhere/bench.json", "a folder that exists"]),
        (["--plot=picture.xyz"], ["--plot=picture.xyz"]),
        (["--only=jax", "--cases=unet", "--config.model.chanels=3", "--threads=1"], ["chanels", "channels"]),
    ],
)
def test_mistakes_in_one_line(arguments, words, capsys):
    assert main.main(["bench", *arguments, "--compile_cache=off"]) == 2
    error = capsys.readouterr().err
    assert error.startswith("jax-diffusion: error: ") and error.count("\n") == 1
    assert all(word in error for word in words), error


def test_what_is_not_installed_is_said_in_one_line(monkeypatch, capsys):
    import importlib.util

    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *a: None if name == "diffusers" else find(name, *a))
    assert main.main(["bench", "--cases=unet", "--compile_cache=off"]) == 2
    error = capsys.readouterr().err
    assert "diffusers is not installed" in error and "--only=jax" in error and error.count("\n") == 1


def test_the_compile_cache_is_timed_from_two_starts(tmp_path, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(HERE))
    lines = []
    rows = starts.measure(("unet",), 4, "float32", 3, (), 1, lines.append, side="fake_side")
    assert [(row["case"], row["mode"]) for row in rows] == [("unet", "train"), ("unet", "sample")]
    assert rows[0]["ratio"] == 1 and rows[0]["warm"]["total_s"] > 0 and len(lines) == 4
    assert "unet sample" in starts.table(rows)


def test_jax_alone_needs_no_pytorch():
    code = (
        "import sys; sys.modules.update(torch=None, diffusers=None); "
        "import jax_diffusion.bench.jax_side, jax_diffusion.bench.export, jax_diffusion.bench.run"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=100)
    assert done.returncode == 0, done.stderr


def test_the_whole_command(tmp_path, capsys):
    """Both frameworks in their own processes, from the command line to the files."""
    for package in ("torch", "diffusers", "matplotlib"):
        pytest.importorskip(package)
    fields = [f"--config.model.{f}" for f in ("width=16", "depth=1", "heads=2", "patch=8")]
    out, plot = tmp_path / "bench.json", tmp_path / "bench.png"
    arguments = ["--cases=dit_s2", "--mode=forward", "--batch=1,2", "--rounds=2", "--steps=1", "--variants=eager",
                 "--threads=1", f"--out={out}", f"--plot={plot}"]  # fmt: skip
    assert main.main(["bench", *arguments, *fields, "--compile_cache=off"]) == 0
    said = capsys.readouterr().out
    assert "same (eager, batch 2)" in said and "torch eager *" in said
    result = json.loads(out.read_text())
    assert result["complete"] and set(result["ceilings"]) == {"jax", "torch"}
    by_xla = [row["batch"] for row in result["rows"] if row["variant"] == "xla"]
    assert by_xla == ([1, 2] if onednn.taken() else [])
    rows = [row for row in result["rows"] if row["variant"] != "xla"]
    assert [(row["framework"], row["batch"], row["rounds"]) for row in rows] == [
        ("jax", 1, 2), ("torch", 1, 2), ("jax", 2, 2), ("torch", 2, 2)]  # fmt: skip
    for row in result["rows"]:
        assert row["flops_per_s"] > 0 and row["peak_memory"] > 0 and row["ratio"]["median"] > 0
    assert {"jax", "torch", "diffusers", "jax_diffusion"} <= set(result["versions"])
    assert max(check["relative_distance"]["output"] for check in result["checks"]) < 1e-5
    assert plot.stat().st_size > 10_000
