"""WORKDIR/environment.jsonl: a line a start, and nothing that should stay private; and the warnings that are kept."""

import json
import subprocess

import jax
import pytest

from jax_diffusion.train import environment, journal, loop


def test_a_line_a_start_with_its_step(tiny, tmp_path):
    config = tiny("toy2d", "train.steps=20", "train.eval_every=0")
    for stop in (10, 20, None):  # the third has nothing left to do
        loop.train(config, tmp_path, stop_at=stop, log=lambda line: None)
    starts = [json.loads(line) for line in (tmp_path / "environment.jsonl").read_text().splitlines()]
    assert [s["step"] for s in starts] == [0, 10]
    last = starts[-1]
    assert last["versions"]["jax"] == jax.__version__ and last["devices"] == {"cpu": jax.device_count()}
    assert last["mesh"] == {"data": jax.device_count(), "fsdp": 1, "tensor": 1} and last["processes"] == 1
    assert starts[0]["time"] < last["time"] and last["command"]


def test_only_jax_s_and_xla_s_variables_are_kept():
    environ = {
        "HOME": "/home/me",
        "AWS_SECRET_ACCESS_KEY": "s",
        "WANDB_API_KEY": "s",
        "XLA_FLAGS": "--xla_dump_to=/tmp/x",
        "LIBTPU_INIT_ARGS": "--a=1",
        "JAX_PLATFORMS": "cpu",
        "JAX_COORDINATOR_TOKEN": "s3cret",
        "JAX_COMPILATION_CACHE_DIR": "https://me:s3cret@host/cache",
        "MY_JAX_THING": "x",
    }
    kept = environment.variables(environ)
    assert set(kept) == {"XLA_FLAGS", "LIBTPU_INIT_ARGS", "JAX_PLATFORMS", "JAX_COORDINATOR_TOKEN",
                         "JAX_COMPILATION_CACHE_DIR"}  # fmt: skip
    assert kept["XLA_FLAGS"] == "--xla_dump_to=/tmp/x" and "s3cret" not in json.dumps(kept)


@pytest.mark.parametrize(
    "word, kept",
    [
        ("--config.seed=3", "--config.seed=3"),
        ("--api_key=abc", "--api_key=***"),
        ("--token abc", "--token ***"),
        ("https://me:pass@host/x", "https://***@host/x"),
        ("gs://bucket/run", "gs://bucket/run"),
        ("--config.model.heads=4", "--config.model.heads=4"),
    ],
)
def test_secrets_of_the_command_are_hidden(word, kept):
    mesh = jax.make_mesh((1,), ("data",), devices=jax.devices()[:1])
    assert environment.facts(mesh, 0, ["train", word])["command"] == ["train", kept]


def test_the_commit_of_a_working_copy(tmp_path):
    assert environment.git_commit(tmp_path) is None
    git = ["git", "-C", str(tmp_path), "-c", "user.name=a", "-c", "user.email=a@b", "-c", "commit.gpgsign=false"]
    (tmp_path / "a").write_text("1")
    for words in (["init", "-q"], ["add", "a"], ["commit", "-q", "-m", "x"]):
        if subprocess.run([*git, *words], capture_output=True).returncode:
            pytest.skip("git does not make a working copy here")
    found = environment.git_commit(tmp_path)
    assert len(found["commit"]) == 40 and found["changed"] is False
    (tmp_path / "new").write_text("untracked files are not of the code")
    assert environment.git_commit(tmp_path)["changed"] is False
    (tmp_path / "a").write_text("2")
    assert environment.git_commit(tmp_path)["changed"] is True


def test_no_git_is_no_commit(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    assert environment.git_commit(tmp_path) is None


def test_warnings_are_kept_and_shown(tmp_path):
    shown = []
    log = journal.keep_warnings(tmp_path, shown.append)
    for line in ("step 1", "warning: the disk is nearly full", "a warning: not at the start"):
        log(line)
    assert len(shown) == 3
    (kept,) = map(json.loads, (tmp_path / "warnings.jsonl").read_text().splitlines())
    assert kept["line"] == "the disk is nearly full" and kept["time"] > 1e9
    journal.keep_warnings(tmp_path / "absent", shown.append)("warning: nowhere to write it")
    assert shown[-1] == "warning: nowhere to write it"
