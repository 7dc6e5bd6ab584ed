#!/usr/bin/env bash
# Runs one jax-diffusion command as N processes on this machine, as a cluster would run it on N hosts.
#
#   launch/local.sh 2 train --config=digits --workdir=runs/two --config.train.steps=200
#   launch/local.sh --dry-run 2 train --config=digits --workdir=runs/two
#
# Every process holds one CPU device; process 0 prints, the others log to WORKDIR.process-I.log beside the workdir.
# PORT (default 12321) is where they meet on 127.0.0.1.
set -euo pipefail

usage() {
    sed -n '2,9s/^# \{0,1\}//p' "$0"
    exit "${1:-0}"
}

dry_run=0
case "${1:-}" in
    -h | --help) usage ;;
    --dry-run) dry_run=1; shift ;;
esac
if ! [[ "${1:-}" =~ ^[1-9][0-9]*$ ]] || [[ $# -lt 2 ]]; then
    echo "launch/local.sh: error: give the number of processes and a command, for instance: 2 train --config=digits --workdir=runs/two" >&2
    exit 2
fi
processes=$1
shift

log=local
for argument in "$@"; do
    case "$argument" in --workdir=*) log="${argument#--workdir=}" ;; esac
done
program=${JAX_DIFFUSION:-jax-diffusion}
export JAX_PLATFORMS=cpu JAX_CPU_COLLECTIVES_IMPLEMENTATION=gloo
export JAX_COORDINATOR_ADDRESS="127.0.0.1:${PORT:-12321}" JAX_NUM_PROCESSES="$processes"

if ((dry_run)); then
    for ((i = 0; i < processes; i++)); do
        echo "JAX_PLATFORMS=cpu JAX_CPU_COLLECTIVES_IMPLEMENTATION=gloo JAX_COORDINATOR_ADDRESS=$JAX_COORDINATOR_ADDRESS" \
            "JAX_NUM_PROCESSES=$processes JAX_PROCESS_ID=$i $program $*"
    done
    exit 0
fi

mkdir -p "$(dirname "$log")"
pids=()
stop() { kill -- "${pids[@]}" 2>/dev/null || true; }
trap stop EXIT
for ((i = 1; i < processes; i++)); do
    JAX_PROCESS_ID=$i "$program" "$@" >"$log.process-$i.log" 2>&1 &
    pids+=($!)
done
JAX_PROCESS_ID=0 "$program" "$@" &
pids+=($!)
status=0
for pid in "${pids[@]}"; do
    wait "$pid" || status=$?
done
if ((status)); then
    echo "launch/local.sh: a process failed with status $status; see $log.process-*.log" >&2
fi
exit "$status"
