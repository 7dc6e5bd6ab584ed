"""Stand-ins for the programs that the launch scripts drive: each records what it was asked and answers like the real
one from files, so that the scripts' control flow runs for real."""

import os
import pathlib
import shutil
import subprocess
import sys
from types import SimpleNamespace

import pytest

ROOT = pathlib.Path(__file__).parents[2]
LAUNCH = ROOT / "launch"
SETTINGS = [line.split("=")[0] for line in (LAUNCH / "settings.env").read_text().splitlines() if line[:1].isalpha()]

# gcloud. $FAKE/queued and $FAKE/node hold the states that describe tells, a line each time and the last for ever;
# "broken" is an error that has nothing to do with it. Machines are folders in $FAKE/home.
GCLOUD = r"""
printf '%q ' "$@" >>"$FAKE/calls"; echo >>"$FAKE/calls"
command="" worker=0 node=0
for word in "$@"; do
    case "$word" in
        --command=*) command=${word#--command=} ;;
        --worker=*) worker=${word#--worker=} ;;
        --node=*) node=${word#--node=} ;;
        --node-count=*) echo "${word#--node-count=}" >"$FAKE/slices" ;;
    esac
done
next() {
    local state lines
    mapfile -t lines <"$1"
    state=${lines[0]}
    if ((${#lines[@]} > 1)); then printf '%s\n' "${lines[@]:1}" >"$1"; fi
    if [[ "$state" == broken ]]; then echo "ERROR: (gcloud) There was a problem refreshing auth tokens" >&2; exit 1; fi
    if [[ "$state" == none ]]; then missing; fi
    echo "$state"
}
missing() { echo "ERROR: (gcloud.$3) NOT_FOUND: Resource 'projects/p/$1' was not found" >&2; exit 1; }
end() { cat "$FAKE"/home/*/launched/*/pid 2>/dev/null | xargs -r kill -KILL 2>/dev/null || true; }
machines() {
    local n w
    for ((n = 0; n < $(<"$FAKE/slices"); n++)); do
        for ((w = 0; w < 2; w++)); do
            if [[ "$node" != all && "$node" != "$n" ]] || [[ "$worker" != all && "$worker" != "$w" ]]; then continue; fi
            mkdir -p "$FAKE/home/$n-$w"
            echo "$n-$w"
        done
    done
}
case "$3 $4" in
    "queued-resources describe") [[ -e "$FAKE/queued" ]] || missing queued; next "$FAKE/queued" ;;
    "tpu-vm describe")
        [[ -e "$FAKE/node" ]] || missing node
        if [[ -e "$FAKE/queued" && "$(head -n 1 "$FAKE/queued")" != ACTIVE ]]; then missing node; fi
        next "$FAKE/node" ;;
    "queued-resources create")
        printf '%s\n' WAITING_FOR_RESOURCES PROVISIONING ACTIVE >"$FAKE/queued"; echo READY >"$FAKE/node" ;;
    "tpu-vm create") printf '%s\n' CREATING READY >"$FAKE/node" ;;
    "queued-resources delete") end; rm -rf "$FAKE/queued" "$FAKE/node" "$FAKE/home" ;;
    "tpu-vm delete") end; rm -rf "$FAKE/node" "$FAKE/home" ;;
    "tpu-vm ssh" | "queued-resources ssh")
        [[ -e "$FAKE/node" ]] || missing node
        code=0
        for machine in $(machines); do
            (cd "$FAKE/home/$machine" && HOME=$PWD MACHINE=$machine bash -c "$command") || code=$?
        done
        exit "$code" ;;
    "tpu-vm scp" | "queued-resources scp")
        for machine in $(machines); do
            case "$6" in
                *:*) cp "$5" "$FAKE/home/$machine/${6#*:}" ;;
                *) cp "$FAKE/home/$machine/${5#*:}" "$6" ;;
            esac
        done ;;
esac
"""
# What a worker has: uv "installs" the program, which does at its n-th start on a machine number what line n says.
UV = r"""
echo "$MACHINE $*" >>"$FAKE/uv"
if [[ "$1" == venv ]]; then mkdir -p "$HOME/venv/bin"; cp "$(command -v true)" "$HOME/venv/bin/python"; fi
if [[ "$1" == pip ]]; then cp "$FAKE/bin/program" "$HOME/venv/bin/jax-diffusion"; fi
"""
PROGRAM = r"""
me=${MACHINE:-${SLURM_PROCID:-0}}
echo "$me $*" >>"$FAKE/starts"
act=$(sed -n "$(grep -c "^$me " "$FAKE/starts")p" "$FAKE/acts")
echo "doing: $act"
eval "$act"
"""
SBATCH = r"""
printf '%q ' "$@" >>"$FAKE/calls"; echo >>"$FAKE/calls"
cat >"$FAKE/job"
echo "${JOB_ID:-4242};cluster"
"""
SRUN = r"""
printf '%s\n' "srun $*" >>"$FAKE/calls"
while [[ "$1" == --* ]]; do shift; done
export SLURM_STEP_NODELIST=localhost
code=0 pids=()
for ((i = 0; i < SLURM_NTASKS; i++)); do SLURM_PROCID=$i SLURM_LOCALID=$i "$@" & pids+=($!); done
for pid in "${pids[@]}"; do
    one=0; wait "$pid" || one=$?
    if ((one > code)); then code=$one; fi
done
exit "$code"
"""
KUBECTL = r"""
printf '%q ' "$@" >>"$FAKE/calls"; echo >>"$FAKE/calls"
case "$2" in
    get) if [[ -e "$FAKE/exists" ]]; then cat "$FAKE/exists"; fi ;;
    create) cat >"$FAKE/manifest" ;;
    cp) cp "$FAKE/run.tar.gz" "${!#}" ;;
esac
"""
RECORD = 'echo "$(basename "$0") $*" >>"$FAKE/calls"\n'


@pytest.fixture
def fake(tmp_path):
    """fake.run(script, *arguments, NAME="value"): a launch script among the stand-ins, from a checkout of its own.

    fake.calls(): what the stand-ins were asked. fake.acts(*lines): what jax-diffusion does at each start on a machine.
    """
    base, checkout = tmp_path / "fake", tmp_path / "checkout"
    (base / "bin").mkdir(parents=True)
    (base / "slices").write_text("1")
    (base / "acts").write_text("")
    scripts = {"gcloud": GCLOUD, "uv": UV, "program": PROGRAM, "sbatch": SBATCH, "srun": SRUN, "kubectl": KUBECTL}
    scripts |= dict.fromkeys(("scontrol", "docker", "gcsfuse"), RECORD)
    scripts |= {"squeue": 'cat "$FAKE/exists" 2>/dev/null || true', "hostname": 'echo "$MACHINE"'}
    scripts["mountpoint"] = "exit 1"
    for name, text in scripts.items():
        (base / "bin" / name).write_text(f"#!/usr/bin/env bash\n{text}")
        (base / "bin" / name).chmod(0o755)
    (base / "bin" / "jax-diffusion").symlink_to("program")
    shutil.copytree(LAUNCH, checkout / "launch")
    env = {k: v for k, v in os.environ.items() if k not in SETTINGS and not k.startswith(("SLURM_", "SBATCH_"))}
    # The interpreter's folder after the system's: the stand-ins win, and python3 has jax.
    path = os.pathsep.join([str(base / "bin"), str(pathlib.Path(sys.executable).parent), env["PATH"]])
    env |= {"PATH": path, "FAKE": str(base), "TPU_POLL": "0", "TMPDIR": str(tmp_path)}

    def run(script, *arguments, timeout=300, **settings):
        return subprocess.run(
            [str(checkout / "launch" / script), *arguments],
            cwd=tmp_path, env={**env, **settings}, capture_output=True, text=True, timeout=timeout,
        )  # fmt: skip

    def commit():
        git = ["git", "-C", str(checkout), "-c", "user.name=a", "-c", "user.email=a@b", "-c", "commit.gpgsign=false"]
        for words in (["init", "--quiet"], ["add", "."], ["commit", "--quiet", "--message=a"]):
            subprocess.run([*git, *words], check=True)

    return SimpleNamespace(
        run=run, commit=commit, base=base, checkout=checkout, env=env, cwd=tmp_path,
        calls=lambda: (base / "calls").read_text().splitlines() if (base / "calls").exists() else [],
        starts=lambda: (base / "starts").read_text().splitlines() if (base / "starts").exists() else [],
        acts=lambda *lines: (base / "acts").write_text("\n".join(lines) + "\n"),
    )  # fmt: skip


@pytest.fixture
def parses():
    """parses(text): asserts that bash can read it, as a whole and, but for here-documents, line by line."""

    def check(text):
        pieces = [text] if "<<'END" in text else [text, *text.splitlines()]
        for piece in pieces:
            done = subprocess.run(["bash", "-n"], input=piece, capture_output=True, text=True, timeout=30)
            assert done.returncode == 0, f"{piece}\n{done.stderr}"

    return check
