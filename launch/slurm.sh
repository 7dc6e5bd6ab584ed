#!/usr/bin/env bash
# Submits one jax-diffusion command as a Slurm job with one task a GPU, which goes back into the queue until it is done.
#
#   launch/slurm.sh train --config=digits --workdir=runs/digits
#   launch/slurm.sh --dry-run train --config=digits --workdir=runs/digits      the job's script and the command
#   JOB_NODES=4 JOB_PARTITION=gpu JOB_SETUP="source ~/venv/bin/activate" launch/slurm.sh train ...
#   launch/slurm.sh sample --workdir=runs/digits
#
# Settings: launch/settings.env says which and how. The workdir lies where all nodes see it; beside it the log,
# WORKDIR.slurm-JOB.log. Training is told JOB_GRACE seconds before the time limit, and by Slurm where it preempts: it
# saves and ends with 75. Then, or when a signal ended it, the job is queued again, RESTARTS times at most; any other
# status is a mistake that a restart does not mend.
set -euo pipefail
# shellcheck source=launch/common.sh
. "$(dirname "${BASH_SOURCE[0]}")/common.sh"

case "${1:-}" in
    -h | --help) usage ;;
    --dry-run) dry_run=1; shift ;;
esac
(($#)) || fail "give a command, for instance: train --config=digits --workdir=runs/digits"
settings
workdir=""
for argument in "$@"; do
    case "$argument" in --workdir=*) workdir=${argument#--workdir=} ;; esac
done
workdir=${workdir%/}
[[ -n "$workdir" ]] || fail "give --workdir=DIR too: the log lies beside it"
need sbatch "run this where jobs are submitted"

if ((JOB_GPUS_PER_NODE)); then
    platform=gpu tasks=$JOB_GPUS_PER_NODE
else
    platform=cpu tasks=1
fi
read -ra more <<<"$JOB_OPTIONS"
options=(
    --job-name="$RUN_NAME"
    --nodes="$JOB_NODES"
    --ntasks-per-node="$tasks"
    --cpus-per-task="$JOB_CPUS_PER_TASK"
    --time="$JOB_TIME"
    --output="$workdir.slurm-%j.log"
    --open-mode=append
    --requeue
    --signal="TERM@$JOB_GRACE"
)
# For the node, not for the task: each task sees all GPUs of its node, of which JAX takes that of the task's number.
if ((JOB_GPUS_PER_NODE)); then options+=(--gres="gpu:${JOB_GPU_TYPE:+$JOB_GPU_TYPE:}$JOB_GPUS_PER_NODE"); fi
if [[ -n "$JOB_PARTITION" ]]; then options+=(--partition="$JOB_PARTITION"); fi
if [[ -n "$JOB_ACCOUNT" ]]; then options+=(--account="$JOB_ACCOUNT"); fi

job() {
    local option
    echo '#!/usr/bin/env bash'
    for option in "${options[@]}" ${more[@]+"${more[@]}"}; do echo "#SBATCH $(quoted "$option")"; done
    echo set -e
    if [[ -n "$JOB_SETUP" ]]; then echo "$JOB_SETUP"; fi
    if [[ "$platform" == cpu ]]; then echo export JAX_PLATFORMS=cpu; fi
    echo "command=($(quoted "$launch/flags.sh" "$platform" "${JAX_DIFFUSION:-jax-diffusion}" "$@"))"
    echo "statuses=$(quoted "$workdir").slurm-\$SLURM_JOB_ID.statuses"
    echo "restarts=$RESTARTS grace=$JOB_GRACE resume=$resume"
    # From here on nothing is filled in.
    cat <<'END'
set -uo pipefail
rm -rf "$statuses"
mkdir -p "$statuses"
# A signal to this shell ends the whole job, and Slurm knows whether it comes back: that one is not for us.
asked=0
trap asked=1 TERM
code=0
srun --cpus-per-task="$SLURM_CPUS_PER_TASK" --kill-on-bad-exit=0 --wait="$grace" bash -c '
    trap : TERM # the task gets it too, saves and ends: that is waited for
    code=0
    "${@:2}" || code=$?
    echo "$code" >"$1/$SLURM_PROCID"
    exit "$code"' task "$statuses" "${command[@]}" || code=$?
# Of several that end badly the one with a mistake of its own tells: the others only lost it.
for status in $(cat "$statuses"/*); do
    if ((status != 0 && status != resume && status <= 128)); then code=$status; fi
done
rm -rf "$statuses"
if ((asked || code != resume && code <= 128)); then exit "$code"; fi
if ((${SLURM_RESTART_COUNT:-0} >= restarts)); then
    echo "launch/slurm.sh: ended with status $code; submit it again to resume" >&2
    exit "$code"
fi
echo "launch/slurm.sh: ended with status $code: queued again" >&2
scontrol requeue "$SLURM_JOB_ID"
END
}

if ((dry_run)); then
    echo "sbatch --parsable <<'END_OF_JOB'"
    job "$@"
    echo END_OF_JOB
    exit 0
fi
queued=$(squeue --noheader --user="$(id -un)" --name="$RUN_NAME" --format=%A)
if [[ -n "$queued" ]]; then
    fail "job ${queued%%$'\n'*} is called $RUN_NAME too: scancel it, or choose another RUN_NAME"
fi
mkdir -p "$(dirname "$workdir")"
id=$(job "$@" | sbatch --parsable)
id=${id%%;*} # of a federation it names the cluster too
echo "job $id; follow it: tail -F $(quoted "$workdir.slurm-$id.log"); end it: scancel $id"
