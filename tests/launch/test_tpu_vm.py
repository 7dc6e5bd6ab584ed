"""launch/tpu_vm.sh and launch/worker.sh with a stand-in for gcloud that keeps states and runs what ssh would."""

import contextlib
import os
import re
import shutil
import signal
import subprocess
import time

import pytest

ALL = ["create", "queue", "install", "train", "log", "status", "stop", "sample", "fetch", "resume", "watch", "delete"]
ASK = "if [ -e jax_diffusion/launch/worker.sh ]; then bash jax_diffusion/launch/worker.sh status digits;"
PLACE = "--zone=us-west4-a --project=mine"


@pytest.fixture
def tpu(fake):
    """tpu("watch", ...) -> the finished process; what it starts is ended with the test."""
    fake.commit()
    base = {"RUN_NAME": "digits", "GCP_PROJECT": "mine"}
    yield lambda *arguments, **settings: fake.run("tpu_vm.sh", *arguments, **{**base, **settings})
    for pid in fake.base.glob("home/*/launched/*/pid"):
        with contextlib.suppress(ProcessLookupError):
            os.kill(int(pid.read_text()), signal.SIGKILL)


def verbs(fake):
    """What gcloud was asked to do, without the questions."""
    words = [call.split() for call in fake.calls()]
    return [f"{w[2]} {w[3]}" for w in words if w[3] not in ("describe", "ssh")]


def until(condition):
    end = time.monotonic() + 120
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.05)


@pytest.mark.parametrize("settings", [
    {},
    {"RUN_SLICES": "4", "RUN_BUCKET": "bucket", "RUN_SPOT": "0"},
    {"RUN_SOURCE": "https://host/fork.git", "RUN_VERSION": "v1", "TPU_QUEUED": "0"},
])  # fmt: skip
def test_every_dry_run_is_commands_that_bash_reads(fake, parses, settings):
    for action in ALL:
        if action == "create" and "RUN_SLICES" in settings:
            continue
        done = fake.run("tpu_vm.sh", "--dry-run", action, **settings)
        assert done.returncode == 0 and done.stderr == "", done.stderr
        parses(done.stdout)
        commands = [line for line in done.stdout.splitlines() if not line.startswith("#")]
        assert commands and all(re.match("(gcloud|git|mkdir|tar|rm) ", line) for line in commands)
    assert fake.calls() == []


def test_dry_run_of_the_whole_way(tpu, fake):
    text = "".join(tpu("--dry-run", action).stdout for action in ("queue", "install", "train", "fetch", "delete"))
    ssh = f"gcloud compute tpus tpu-vm ssh digits {PLACE} --worker=all --command="
    ask = f"{ssh}'{ASK} else echo $(hostname) absent; fi'\n"
    describe = (
        f"gcloud compute tpus queued-resources describe digits {PLACE} --format='value(state.state)'\n"
        f"gcloud compute tpus tpu-vm describe digits {PLACE} --format='value(state)'\n"
    )
    packed = f"{fake.cwd}/digits.tar.gz"
    assert text == (
        f"{describe}# both must find nothing; then:\n"
        f"gcloud compute tpus queued-resources create digits {PLACE} --node-id=digits --accelerator-type=v5litepod-8 "
        "--runtime-version=v2-alpha-tpuv5-lite --spot\n"
        "# again every 0 s, until it is READY:\n"
        f"gcloud compute tpus tpu-vm describe digits {PLACE} --format='value(state)'\n"
        f"{ask}"
        f"git -C {fake.checkout} archive --format=tar.gz --output={packed} HEAD\n"
        f"gcloud compute tpus tpu-vm scp {packed} digits:jax_diffusion.tar.gz {PLACE} --worker=all\n"
        f"{ssh}'rm -rf jax_diffusion && mkdir jax_diffusion && tar -xzf jax_diffusion.tar.gz -C jax_diffusion && "
        "bash jax_diffusion/launch/worker.sh install 3.12'\n"
        f"{ask}"
        f"{ssh}'bash jax_diffusion/launch/worker.sh start digits train --config=digits --workdir=runs/digits'\n"
        "mkdir -p fetched/digits\n"
        f"gcloud compute tpus tpu-vm ssh digits {PLACE} --worker=0 "
        "--command='tar -czf fetch.tar.gz -C runs/digits --exclude=./checkpoints .'\n"
        f"gcloud compute tpus tpu-vm scp digits:fetch.tar.gz fetched/digits {PLACE} --worker=0\n"
        "tar -xzf fetched/digits/fetch.tar.gz -C fetched/digits\n"
        "rm fetched/digits/fetch.tar.gz\n"
        f"{describe}# where it was queued:\n"
        f"gcloud compute tpus queued-resources delete digits {PLACE} --force --quiet\n"
        "# else:\n"
        f"gcloud compute tpus tpu-vm delete digits {PLACE} --quiet\n"
    )


@pytest.mark.parametrize("action", ["create", "queue"])
def test_it_waits_and_creates_nothing_twice(tpu, fake, action):
    done = tpu(action, RUN_SPOT="0", TPU_CREATE_OPTIONS="--network=mine --tags=a")
    assert done.returncode == 0, done.stderr
    made = next(call for call in fake.calls() if " create " in call)
    assert "--spot" not in made and made.endswith("--network=mine --tags=a ")
    again = tpu(action)
    assert again.returncode == 2 and "there is a digits already (" in again.stderr and "TPU READY" in again.stderr
    assert len(verbs(fake)) == 1


def test_a_failing_gcloud_is_not_taken_for_an_absence(tpu, fake):
    (fake.base / "queued").write_text("broken")
    done = tpu("queue")
    assert done.returncode != 0 and verbs(fake) == []
    assert "cannot tell the state of digits: ERROR: (gcloud) There was a problem" in done.stderr


def test_from_nothing_to_samples(tpu, fake):
    """Really started, in the background, on two machines, once; stopped with SIGTERM; sampled, fetched, deleted."""
    fake.acts("trap 'exit 75' TERM; mkdir -p runs/digits/checkpoints; echo 1 >runs/digits/metrics.jsonl; echo begun; "
              "touch runs/digits/checkpoints/x; while :; do sleep 0.05; done", "echo sampled")  # fmt: skip
    assert tpu("train").returncode != 0 and verbs(fake) == []
    assert tpu("queue").returncode == 0
    refused = tpu("train")
    assert refused.returncode == 2 and "nothing is installed on 0-0: launch/tpu_vm.sh install" in refused.stderr
    assert tpu("install").returncode == 0
    assert [line.split()[1] for line in (fake.base / "uv").read_text().splitlines()] == ["venv", "pip"] * 2
    idle = tpu("status")
    assert idle.stdout == "digits: request ACTIVE, TPU READY\n0-0 idle\n0-1 idle\n"

    assert tpu("train").returncode == 0
    homes = sorted((fake.base / "home").iterdir())
    until(lambda: all("begun" in (home / "launched/digits/log").read_text() for home in homes))
    again = tpu("train")
    assert again.returncode == 0 and "it runs already" in again.stderr
    assert fake.starts() == [f"0-{i} train --config=digits --workdir=runs/digits" for i in (0, 1)]
    assert tpu("install").returncode == tpu("sample").returncode == 2  # it has the TPU

    assert tpu("stop").returncode == 0
    until(lambda: "running" not in tpu("status").stdout)
    assert tpu("status").stdout.endswith("\n0-0 ended 75\n0-1 ended 75\n")
    assert "sampled" in tpu("sample").stdout
    assert fake.starts()[2:] == [f"0-{i} sample --workdir=runs/digits --num=64" for i in (0, 1)]

    assert tpu("fetch").returncode == tpu("fetch").returncode == 0
    assert [p.name for p in (fake.cwd / "fetched/digits").iterdir()] == ["metrics.jsonl"]
    assert tpu("delete").returncode == 0 and "queued-resources delete" in verbs(fake)
    again = tpu("delete")
    assert again.returncode == 0 and "there is no digits" in again.stderr
    assert verbs(fake).count("queued-resources delete") == 1


def test_watch_resumes_after_a_preemption_until_it_is_done(tpu, fake):
    """Taken away in its first start, killed in the second, saved in the third, finished in the fourth."""
    taken = 'printf "%s\\n" SUSPENDING SUSPENDING SUSPENDED >"$FAKE/queued"'
    fake.acts(f'if [[ "$me" == 0-0 ]]; then {taken}; fi; exec sleep 600', "kill -KILL $$", "exit 75", "exit 0")
    done = tpu("watch", RUN_BUCKET="bucket")
    assert done.returncode == 0, done.stderr
    made = [v.split()[1] for v in verbs(fake) if "queued-resources" in v]
    assert made == ["create", "delete", "create"] and len(fake.starts()) == 8
    assert {line.split(" ", 1)[1] for line in fake.starts()} == {"train --config=digits --workdir=runs/digits"}
    assert verbs(fake).count("tpu-vm scp") == 2  # installed on the new machines, not at each start
    assert "after status 137" in done.stderr and "after status 75" in done.stderr and "it is finished" in done.stderr
    assert any("gcsfuse --implicit-dirs" in call and call.endswith("/bucket") for call in fake.calls())


def test_a_mistake_is_not_repeated(tpu, fake):
    fake.acts('if [[ "$me" == 0-1 ]]; then exit 2; fi; exit 75')
    done = tpu("watch")
    assert done.returncode == 2 and "ended with status 2, which a restart does not mend" in done.stderr
    assert len(fake.starts()) == 2


def test_it_is_not_started_for_ever_on_tpus(tpu, fake):
    fake.acts(*["exit 75"] * 9)
    done = tpu("watch", RESTARTS="2")
    assert done.returncode == 2 and "RESTARTS=2: it ended once more" in done.stderr and len(fake.starts()) == 6


def test_watch_outlives_a_gcloud_that_fails_now_and_then(tpu, fake):
    fake.acts("exit 0")
    (fake.base / "queued").write_text("broken\nbroken\nnone\n")
    done = tpu("watch")
    assert done.returncode == 0 and done.stderr.count("auth tokens") == 2
    (fake.base / "queued").write_text("broken\n")
    assert tpu("watch", RESTARTS="1").stderr.count("auth tokens") == 2


def test_resume_is_one_round(tpu, fake):
    fake.acts("exec sleep 600")
    (fake.base / "node").write_text("PREEMPTED")
    done = tpu("resume", TPU_QUEUED="0")
    assert done.returncode == 0, done.stderr
    assert [v for v in verbs(fake) if "scp" not in v] == ["tpu-vm delete", "tpu-vm create"]
    again = tpu("resume")
    assert again.returncode == 0 and len(fake.starts()) == 2 and len(verbs(fake)) == 3


def test_several_slices(tpu, fake):
    fake.acts("exit 0")
    done = tpu("watch", RUN_SLICES="2")
    assert done.returncode == 0, done.stderr
    made = next(call for call in fake.calls() if " create " in call)
    assert "--node-count=2 --node-prefix=digits" in made and "--node-id" not in made
    assert sorted(line.split()[0] for line in fake.starts()) == ["0-0", "0-1", "1-0", "1-1"]
    assert not any(call.startswith("compute tpus tpu-vm") for call in fake.calls())


@pytest.fixture
def worker(fake):
    """worker("status", "digits"): worker.sh by itself, on a machine where it is installed."""
    home = fake.base / "home/0-0"
    shutil.copytree(fake.checkout / "launch", home / "jax_diffusion/launch")

    def run(*words):
        command = [str(home / "jax_diffusion/launch/worker.sh"), *words]
        env = {**fake.env, "HOME": str(home), "MACHINE": "0-0"}
        return subprocess.run(command, env=env, capture_output=True, text=True, timeout=60)

    return run


def test_a_bucket_that_cannot_be_mounted_is_no_reason_to_start_again(worker, fake):
    (fake.base / "bin/gcsfuse").write_text("#!/bin/sh\nexit 1\n")
    assert worker("--bucket=b", "start", "digits", "train").returncode == 0
    until(lambda: "running" not in worker("status", "digits").stdout)
    assert worker("status", "digits").stdout == "0-0 ended 1\n" and fake.starts() == []


def test_what_mounts_the_bucket_does_not_hold_the_lock(worker, fake):
    daemon = fake.base / "daemon"
    (fake.base / "bin/gcsfuse").write_text(f"#!/bin/sh\nsleep 600 >/dev/null 2>&1 & echo $! >{daemon}\n")
    assert worker("--bucket=b", "start", "digits", "train", "--config=digits").returncode == 0
    try:
        until(lambda: "running" not in worker("status", "digits").stdout)
        assert worker("status", "digits").stdout == "0-0 ended 0\n"
        assert fake.starts() == ["0-0 train --config=digits"]
    finally:
        os.kill(int(daemon.read_text()), signal.SIGKILL)
