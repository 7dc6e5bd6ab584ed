"""launch/slurm.sh: what it submits, and that job really run by bash with stand-ins for srun and scontrol."""

import json
import shutil
import socket
import subprocess
import sys

import numpy as np
import pytest

ARGUMENTS = ["train", "--config=digits", "--workdir=runs/digits"]
JOB = {"JOB_NODES": "2", "JOB_GPUS_PER_NODE": "0"}  # two tasks on CPUs


@pytest.fixture
def run_job(fake):
    """run_job("exit 75", ...): what jax-diffusion does in each start -> the job as it ended, and what it asked."""

    def run(*acts, before="", **env):
        fake.acts(*acts)
        submitted = fake.run("slurm.sh", *ARGUMENTS, **JOB)
        assert submitted.returncode == 0, submitted.stderr
        slurm = {"SLURM_JOB_ID": "4242", "SLURM_NTASKS": "2", "SLURM_CPUS_PER_TASK": "8", **env}
        return subprocess.run(
            ["bash", "-c", f'{before}\nexec bash "$FAKE/job"'],
            cwd=fake.cwd, env={**fake.env, **slurm}, capture_output=True, text=True, timeout=300,
        )  # fmt: skip

    return run


def test_dry_run_is_the_job_and_the_command(fake, parses):
    done = fake.run(
        "slurm.sh", "--dry-run", *ARGUMENTS, "--config.data.name=it's here",
        RUN_NAME="dit", JOB_NODES="4", JOB_GPU_TYPE="h100", JOB_PARTITION="gpu", JOB_OPTIONS="--qos=high",
        JOB_SETUP="source ~/venv/bin/activate", RESTARTS="9", JOB_GRACE="60",
    )  # fmt: skip
    assert done.returncode == 0 and fake.calls() == []
    parses(done.stdout)
    head, _, body = done.stdout.partition("set -uo pipefail\n")
    assert head == (
        "sbatch --parsable <<'END_OF_JOB'\n"
        "#!/usr/bin/env bash\n"
        "#SBATCH --job-name=dit\n"
        "#SBATCH --nodes=4\n"
        "#SBATCH --ntasks-per-node=8\n"
        "#SBATCH --cpus-per-task=8\n"
        "#SBATCH --time=24:00:00\n"
        "#SBATCH --output=runs/digits.slurm-%j.log\n"
        "#SBATCH --open-mode=append\n"
        "#SBATCH --requeue\n"
        "#SBATCH --signal=TERM@60\n"
        "#SBATCH --gres=gpu:h100:8\n"
        "#SBATCH --partition=gpu\n"
        "#SBATCH --qos=high\n"
        "set -e\n"
        "source ~/venv/bin/activate\n"
        f"command=({fake.checkout}/launch/flags.sh gpu jax-diffusion train --config=digits --workdir=runs/digits "
        "'--config.data.name=it'\\''s here')\n"
        "statuses=runs/digits.slurm-$SLURM_JOB_ID.statuses\n"
        "restarts=9 grace=60 resume=75\n"
    )
    assert body.endswith('scontrol requeue "$SLURM_JOB_ID"\nEND_OF_JOB\n')


def test_what_is_submitted_is_what_was_shown(fake):
    shown = fake.run("slurm.sh", "--dry-run", *ARGUMENTS, **JOB).stdout
    done = fake.run("slurm.sh", *ARGUMENTS, **JOB)
    assert done.returncode == 0 and done.stdout.startswith("job 4242; follow it: tail -F runs/digits.slurm-4242.log; ")
    assert shown == f"sbatch --parsable <<'END_OF_JOB'\n{(fake.base / 'job').read_text()}END_OF_JOB\n"
    shellcheck = shutil.which("shellcheck") or shutil.which("shellcheck", path=sys.exec_prefix + "/bin")
    if shellcheck:
        job = subprocess.run([shellcheck, "--severity=warning", str(fake.base / "job")], capture_output=True, text=True)
        assert job.returncode == 0, job.stdout


def test_a_job_of_that_name_is_left_alone(fake):
    (fake.base / "exists").write_text("17\n")
    done = fake.run("slurm.sh", *ARGUMENTS)
    assert done.returncode == 2 and "job 17 is called jax-diffusion too" in done.stderr and fake.calls() == []


@pytest.mark.parametrize("act", ["exit 75", "kill -KILL $$", "if ((me)); then exit 75; else kill -ABRT $$; fi"])
def test_what_can_be_resumed_is_queued_again(fake, run_job, act):
    done = run_job(act)
    assert done.returncode == 0, done.stderr
    assert fake.calls()[-1] == "scontrol requeue 4242" and "queued again" in done.stderr
    srun = next(call for call in fake.calls() if call.startswith("srun"))
    assert "--kill-on-bad-exit=0 --wait=300" in srun and "--cpus-per-task=8" in srun
    assert sorted(fake.starts()) == [f"{i} train --config=digits --workdir=runs/digits" for i in (0, 1)]
    assert not [p.name for p in (fake.cwd / "runs").iterdir()]  # the statuses are tidied up


@pytest.mark.parametrize("act, env, before, status", [
    ("exit 0", {}, "", 0),
    ("if ((me)); then exit 2; else exit 75; fi", {}, "", 2),
    ("if ((me)); then exit 1; else kill -KILL $$; fi", {}, "", 1),
    ("exit 75", {"SLURM_RESTART_COUNT": "100"}, "", 75),
    # Slurm ends the job itself: its first signal reaches this shell too.
    ("kill -TERM $(cat job.pid); exit 75", {}, "echo $$ >job.pid", 75),
])  # fmt: skip
def test_what_is_done_or_wrong_is_not_queued_again(fake, run_job, act, env, before, status):
    done = run_job(act, before=before, **env)
    assert done.returncode == status and not any("scontrol" in call for call in fake.calls())


def test_two_tasks_train_together(fake, arguments):
    """Real ones: JAX finds the two by Slurm's variables."""
    (fake.base / "bin/jax-diffusion").unlink()
    overrides = arguments("toy2d", "train.steps=12", "train.log_every=4", "train.eval_every=12")
    words = ["train", "--config=toy2d", "--workdir=runs/toy", *overrides]
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = str(s.getsockname()[1])
    job = {"SLURM_JOB_ID": "1", "SLURM_NTASKS": "2", "SLURM_CPUS_PER_TASK": "1", "JAX_COORDINATOR_PORT": port}
    assert fake.run("slurm.sh", *words, **JOB).returncode == 0
    done = subprocess.run(
        ["bash", str(fake.base / "job")],
        cwd=fake.cwd, env={**fake.env, **job}, capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    assert "process 0 of 2" in done.stdout and "[1/2] process 1 of 2" in done.stdout
    rows = [json.loads(line) for line in (fake.cwd / "runs/toy/metrics.jsonl").read_text().splitlines()]
    assert rows[-1]["step"] == 12 and np.isfinite([r["loss"] for r in rows if "loss" in r]).all()
