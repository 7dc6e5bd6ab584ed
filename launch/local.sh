#!/usr/bin/env bash
# Runs one jax-diffusion command as N processes on this machine, as a cluster would run it on N hosts.
#
#   launch/local.sh 2 train --config=digits --workdir=runs/two --config.train.steps=200
#   RESTARTS=5 launch/local.sh 2 train --config=digits --workdir=runs/two
#   launch/local.sh --dry-run 2 train --config=digits --workdir=runs/two
#   launch/local.sh 2 sample --workdir=runs/two
#
# Every process holds one CPU device; process 0 prints, the others log to WORKDIR.process-I.log beside the workdir.
# When one ends badly all are ended. RESTARTS (default 0) starts all again that often, if what ended them was a signal
# or the status 75, with which training says "start me again"; the run then resumes where it was saved.
# PORT is where they meet on 127.0.0.1 (default: a free one). GRACE (default 30) is the seconds that processes have to
# save and end by themselves before they are killed.
set -euo pipefail

usage() {
    sed -n '2,15s/^# \{0,1\}//p' "$0"
    exit "${1:-0}"
}

fail() {
    echo "launch/local.sh: error: $1" >&2
    exit 2
}

dry_run=0
case "${1:-}" in
    -h | --help) usage ;;
    --dry-run) dry_run=1; shift ;;
esac
if ! [[ "${1:-}" =~ ^[1-9][0-9]*$ ]] || [[ $# -lt 2 ]]; then
    fail "give the number of processes and a command, for instance: 2 train --config=digits --workdir=runs/two"
fi
processes=$1
shift
for name in RESTARTS GRACE PORT; do
    [[ "${!name:-0}" =~ ^[0-9]+$ ]] || fail "$name=${!name} is no whole number"
done
restarts=${RESTARTS:-0}
grace=${GRACE:-30}
resume=75

log=local
for argument in "$@"; do
    case "$argument" in --workdir=*) log="${argument#--workdir=}" ;; esac
done
log=${log%/}
program=${JAX_DIFFUSION:-jax-diffusion}

free_port() { # above those that systems hand out, unless something listens there
    local port
    for ((port = 20000 + RANDOM % 10000; ; port++)); do
        if ! (exec 3<>"/dev/tcp/127.0.0.1/$port") 2>/dev/null; then
            echo "$port"
            return
        fi
    done
}

export JAX_PLATFORMS=cpu JAX_CPU_COLLECTIVES_IMPLEMENTATION=gloo JAX_NUM_PROCESSES="$processes"

if ((dry_run)); then
    for ((i = 0; i < processes; i++)); do
        echo "JAX_PLATFORMS=cpu JAX_CPU_COLLECTIVES_IMPLEMENTATION=gloo JAX_COORDINATOR_ADDRESS=127.0.0.1:${PORT:-12321}" \
            "JAX_NUM_PROCESSES=$processes JAX_PROCESS_ID=$i $program $*"
    done
    exit 0
fi

pids=() # by process; "" for one that has ended
running() {
    local pid
    for pid in ${pids[@]+"${pids[@]}"}; do
        if [[ -n "$pid" ]] && kill -0 "$pid" 2>/dev/null; then echo "$pid"; fi
    done
}

# Ends what runs: asked first, so that training saves, then killed.
stop() {
    local pid end=$((SECONDS + grace))
    for pid in $(running); do kill "$pid" 2>/dev/null || true; done
    while [[ -n "$(running)" ]] && ((SECONDS < end)); do sleep 0.2; done
    for pid in $(running); do kill -KILL "$pid" 2>/dev/null || true; done
}

# Passed on: all save, and nothing is started again.
asked=0
trap 'asked=1; for pid in $(running); do kill -TERM "$pid" 2>/dev/null || true; done' TERM
trap 'asked=1; for pid in $(running); do kill -INT "$pid" 2>/dev/null || true; done' INT
trap stop EXIT

# Whether all are to be started again after a status: that of a run that was saved, or of a signal.
restartable() { (($1 == resume || $1 > 128)); }

# One start of all; leaves in `status` that of the first to end badly. What it does to the others does not count.
attempt() {
    JAX_COORDINATOR_ADDRESS="127.0.0.1:${PORT:-$(free_port)}"
    export JAX_COORDINATOR_ADDRESS
    pids=()
    local i code before left=$processes limit=""
    for ((i = 1; i < processes; i++)); do
        JAX_PROCESS_ID=$i "$program" "$@" >>"$log.process-$i.log" 2>&1 &
        pids[i]=$!
    done
    JAX_PROCESS_ID=0 "$program" "$@" &
    pids[0]=$!
    status=0
    while ((left)); do
        before=$status
        for ((i = 0; i < processes; i++)); do
            if [[ -z "${pids[i]}" ]] || kill -0 "${pids[i]}" 2>/dev/null; then continue; fi
            code=0
            wait "${pids[i]}" || code=$?
            pids[i]=""
            left=$((left - 1))
            # Of two that end at one time the one with a mistake of its own tells.
            if ((code)) && { ((status == 0)) || { ((before == 0)) && ! restartable "$code"; }; }; then status=$code; fi
        done
        # By itself each of the others would find out, and some only after minutes. After a save all are about to end.
        if ((status && before == 0)); then limit=$((SECONDS + (status == resume ? grace : 0))); fi
        if ((left)) && [[ -n "$limit" ]] && ((SECONDS >= limit)); then stop; fi
        if ((left)); then sleep 0.2; fi
    done
}

mkdir -p "$(dirname "$log")"
for ((i = 1; i < processes; i++)); do : >"$log.process-$i.log"; done
for ((starts = 0; ; starts++)); do
    attempt "$@"
    if ((status == 0)); then exit 0; fi
    if ! restartable "$status"; then
        echo "launch/local.sh: a process failed with status $status; see $log.process-*.log" >&2
        exit "$status"
    fi
    if ((asked || starts >= restarts)); then
        echo "launch/local.sh: ended with status $status; start it again to resume" >&2
        exit "$status"
    fi
    echo "launch/local.sh: ended with status $status: start $((starts + 2)) of at most $((restarts + 1))" >&2
done
