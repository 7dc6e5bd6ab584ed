"""`jax-diffusion plan` end to end on virtual devices, its cache, its end, and mistakes in one line."""

import json
import subprocess
import sys

import pytest

from jax_diffusion import config as configs
from jax_diffusion.cli import plan
from jax_diffusion.cli.main import main
from jax_diffusion.errors import UserError
from jax_diffusion.plan import launch, targets

TINY = ["--config=toy2d", "--config.model.width=32", "--config.model.depth=2", "--config.sampling.batch_size=6",
        "--config.sampling.steps=3", "--config.train.steps_per_dispatch=1", "--topology=cpu:4"]  # fmt: skip


@pytest.fixture(scope="module")
def planned(tmp_path_factory):
    """(what was printed, the JSON) of a plan, and of the same plan again."""
    folder = tmp_path_factory.mktemp("plan")
    runs = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(folder))
        for i in range(2):
            out = folder / f"{i}.json"
            command = ["plan", *TINY, "--batch=64", "--mesh=data=2,fsdp=2", f"--out={out}"]
            script = f"from jax_diffusion.cli.main import main; raise SystemExit(main({command!r}))"
            done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=240)
            assert done.returncode == 0, done.stderr[-3000:]
            runs.append((done.stdout, json.loads(out.read_text())))
    return runs, folder


def test_the_plan_is_of_the_real_programs(planned):
    (text, found), _ = planned[0]
    train, sample = found["train"], found["sample"]
    assert found["mesh"] == {"data": 2, "fsdp": 2, "tensor": 1} and found["shape"] == [2]
    assert (train["batch"], train["devices"], sample["batch"]) == (64, 4, 8)  # 6 rounded up to the devices
    # XLA may repeat small products on devices that share a shard.
    assert 1 <= train["flops"] / (train["model_flops"] * 64 / 4) < 1.2
    assert 1 <= sample["flops"] / (sample["model_flops"] * 8 / 4) < 1.2
    assert train["collectives"]["all-gather"]["bytes"] >= train["parts"]["parameters"]  # of shards of a half
    assert sample["parts"]["parameters"] > train["parts"]["parameters"]  # sampling replicates them
    assert train["images_per_s"] is None
    for words in ("training step, batch 64 on 4 device(s)", "sampler, batch 8", "all-gather", "parameters", "virtual"):
        assert words in text
    assert configs.from_json(json.dumps(found["config"])).train.batch_size == 64


def test_nothing_is_compiled_twice(planned):
    """The seconds are those of the first compilation, to the last digit."""
    ((_, first), (_, second)), folder = planned
    assert first == second
    assert len(list((folder / "jax_diffusion" / "plans").glob("*.json.gz"))) == 2


def request(topology: str = "cpu:4", **changes) -> launch.Request:
    config = configs.override(configs.resolve("toy2d"), TINY[1:-1])
    return launch.Request(topology, configs.to_json(config), (2,), 0, **changes)


def test_a_sweep_tries_all_meshes():
    rows = list(launch.events(request("cpu:2", sweep=True)))
    rows = [r["row"] for r in rows if "row" in r]
    assert [(r["mesh"]["data"], r["mesh"]["fsdp"]) for r in rows] == [(2, 1), (1, 2)]
    sizes = [r["estimate"]["parts"]["parameters"] for r in rows]
    assert sizes[1] < 0.6 * sizes[0]
    assert "all-gather" not in rows[0]["estimate"]["collectives"]


def test_whoever_stops_listening_stops_the_compiler(monkeypatch):
    """Ctrl-C is an exception at the yield."""
    started, popen = [], subprocess.Popen
    monkeypatch.setattr(launch.subprocess, "Popen", lambda *a, **k: started.append(popen(*a, **k)) or started[0])
    events = launch.events(request())
    assert "device" in next(events)
    assert started[0].poll() is None
    with pytest.raises(KeyboardInterrupt):
        events.throw(KeyboardInterrupt)
    assert started[0].poll() is not None


def test_a_compiler_that_dies_is_said_in_its_last_words(monkeypatch):
    monkeypatch.setattr(launch.sys, "executable", "/bin/false")
    with pytest.raises(UserError, match="ended with status 1: no message"):
        list(launch.events(request()))


@pytest.mark.parametrize(
    "arguments, words",
    [
        (["--topology=v5e"], ["--topology=v5e", "how many", "v5e:4x4"]),
        (["--topology=v5e:4"], ["v5e is given by 2 numbers", "v5e:4x4"]),
        (["--topology=h100:2x4"], ["h100 is given by 1 number,", "h100:8"]),
        (["--topology=v5x:2x2"], ["--topology='v5x' is unknown", "did you mean 'v5"]),
        (["--topology=cpu:0"], ["--topology=cpu:0"]),
        (["--topology=cpu:4", "--batch=0"], ["--batch=0 must be at least 1"]),
        (["--topology=cpu:4", "--mesh=rows=2"], ["--mesh=rows=2", "data, fsdp, tensor"]),
        (["--topology=cpu:4", "--shape=3x"], ["--shape=3x", "32x32x3"]),
        (["--topology=cpu:4", "--out=/no/such/folder/plan.json"], ["--out=", "no folder"]),
        (["--topology=cpu:4", "--config.train.batch=3"], ["train has no field 'batch'"]),
        (["--topology=cpu:4", "--config.data.source=folder"], []),  # toy2d's recipe name still says its shape
    ],
)
def test_mistakes_are_one_line(arguments, words, capsys, monkeypatch):
    monkeypatch.setattr(launch, "events", lambda request: iter(()))
    status = main(["plan", "--config=toy2d", *arguments])
    said = capsys.readouterr().err.strip()
    assert status == (2 if words else 0)
    assert len(said.splitlines()) <= 1 and all(w in said for w in words), said


@pytest.mark.parametrize(
    "change, words",
    [
        ({"train.batch_size": 6}, "--batch=6 does not divide over 4 devices"),
        ({"mesh.fsdp": 3}, "mesh.fsdp=3, mesh.tensor=1 does not use the 4 devices"),
    ],
)
def test_mistakes_that_the_compiling_process_finds(change, words):
    config = configs.override(configs.resolve("toy2d"), [f"--config.{k}={v}" for k, v in change.items()])
    with pytest.raises(UserError) as e:
        list(launch.events(launch.Request("cpu:4", configs.to_json(config), (2,), 0)))
    assert words in str(e.value) and "\n" not in str(e.value)


def test_without_libtpu_the_remedy_is_said(monkeypatch):
    monkeypatch.setitem(sys.modules, "libtpu", None)
    with pytest.raises(UserError, match=r"--topology=v5e:2x2: .*pip install 'jax\[tpu\]'"):
        targets.devices("v5e:2x2")


@pytest.mark.parametrize(
    "text, sizes",
    [
        ("fsdp=4", {"data": -1, "fsdp": 4, "tensor": 1}),
        ("data=2,fsdp=-1", {"data": 2, "fsdp": -1, "tensor": 1}),
        ("fsdp=-1", {"data": 1, "fsdp": -1, "tensor": 1}),
        ("data=2,tensor=2", {"data": 2, "fsdp": 1, "tensor": 2}),
    ],
)
def test_meshes_are_read(text, sizes):
    assert plan.parse_mesh(text) == sizes


def test_interrupted(capsys, monkeypatch):
    def interrupted(request):
        raise KeyboardInterrupt
        yield

    monkeypatch.setattr(launch, "events", interrupted)
    assert main(["plan", "--config=toy2d", "--topology=cpu:4"]) == 130
    assert "interrupted" in capsys.readouterr().err


def test_the_line_that_is_shown(capsys, monkeypatch):
    now = [100.0]
    monkeypatch.setattr(launch.time, "monotonic", lambda: now[0])
    watch = launch.Watch()
    watch.start("training step", [1, 4])
    now[0] += 1
    watch.tick()
    assert not capsys.readouterr().err  # quiet for two seconds
    now[0] += 59
    watch.tick()
    assert capsys.readouterr().err == "compiling: 1/4: training step: 1:00 elapsed\n"
    watch.start("training step", [2, 4])
    now[0] += 10
    watch.tick()
    assert capsys.readouterr().err == "compiling: 2/4: training step: 0:10 elapsed, about 3:00 left\n"
