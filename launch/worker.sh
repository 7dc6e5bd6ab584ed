#!/usr/bin/env bash
# The part of tpu_vm.sh that runs on the workers, in their home folders; it lies there in jax_diffusion/launch.
#
#   launch/worker.sh [--bucket=NAME] install PYTHON           installs the checkout it lies in into ~/venv
#   launch/worker.sh [--bucket=NAME] start NAME train ...     starts jax-diffusion train ..., which outlives the session
#   launch/worker.sh [--bucket=NAME] run sample ...           runs jax-diffusion sample ... and waits for it
#   launch/worker.sh status NAME                              one line: HOST idle, running or ended STATUS
#   launch/worker.sh stop NAME                                SIGTERM: training saves and ends with 75
#   launch/worker.sh log NAME                                 its output, and what follows
#
# Commands run in the bucket, mounted at ~/bucket, or in the home folder. One of a NAME runs at a time: it holds a lock
# that goes with it, however it ends. Its output and status are in ~/launched/NAME.
set -euo pipefail
# shellcheck source=launch/common.sh
. "$(dirname "${BASH_SOURCE[0]}")/common.sh"

[[ "${1:-}" != -h && "${1:-}" != --help ]] || usage
bucket=""
if [[ "${1:-}" == --bucket=* ]]; then
    bucket=${1#--bucket=}
    shift
fi
action=${1:-} name=${2:-}
[[ -n "$name" ]] || fail "give an action and what it needs, see --help"
shift 2
folder=$HOME/launched/$name

mount_bucket() {
    if mountpoint --quiet "$HOME/bucket"; then return; fi
    if ! command -v gcsfuse >/dev/null; then
        local key=/usr/share/keyrings/cloud.google.asc packages=https://packages.cloud.google.com/apt
        curl -fsSL "$packages/doc/apt-key.gpg" | sudo tee "$key" >/dev/null
        echo "deb [signed-by=$key] $packages gcsfuse-$(lsb_release -cs) main" |
            sudo tee /etc/apt/sources.list.d/gcsfuse.list >/dev/null
        sudo apt-get -qq update
        sudo apt-get -qq install gcsfuse
    fi
    mkdir -p "$HOME/bucket"
    # Nothing is remembered of the other workers' files: they write into one checkpoint together.
    gcsfuse --implicit-dirs --metadata-cache-ttl-secs=0 --metadata-cache-negative-ttl-secs=0 "$bucket" "$HOME/bucket"
}

enter() {
    if [[ -n "$bucket" ]]; then
        mount_bucket
        cd "$HOME/bucket"
    else
        cd "$HOME"
    fi
    PATH=$HOME/venv/bin:$PATH
}

# Runs the command and keeps its status, in place of the ssh session that is gone by then.
keep() {
    code=1 # where it does not come to the command
    exec 9>"$folder/lock"
    flock --timeout 5 9 || exit 0 # those who only ask hold it for an instant
    trap 'echo "$code" >"$folder/status"' EXIT
    enter 9>&- # what mounts the bucket stays, and must not keep the lock
    "$launch/flags.sh" tpu "${JAX_DIFFUSION:-jax-diffusion}" "$@" 9>&- &
    echo "$!" >"$folder/pid"
    code=0
    wait "$!" || code=$?
}

runs() { [[ -e "$folder/lock" ]] && ! flock --shared --nonblock "$folder/lock" true; }

case "$action" in
    install)
        PATH=$HOME/.local/bin:$PATH
        if ! command -v uv >/dev/null; then curl -LsSf https://astral.sh/uv/install.sh | sh; fi
        if [[ ! -x "$HOME/venv/bin/python" ]]; then uv venv --quiet --python="$name" "$HOME/venv"; fi
        uv pip install --quiet --python="$HOME/venv/bin/python" "$(dirname "$launch")[tpu,data]"
        if [[ -n "$bucket" ]]; then mount_bucket; fi
        ;;
    start)
        mkdir -p "$folder"
        if runs; then
            say "$name runs already"
            exit 0
        fi
        rm -f "$folder/status"
        printf '%s\n' "$(date --iso-8601=seconds) jax-diffusion $(quoted "$@")" >>"$folder/log"
        setsid nohup "$launch/worker.sh" ${bucket:+"--bucket=$bucket"} keep "$name" "$@" \
            >>"$folder/log" 2>&1 </dev/null &
        for ((i = 0; i < 100; i++)); do
            if runs || [[ -e "$folder/status" ]]; then exit 0; fi
            sleep 0.1
        done
        fail "$name was not started: see $folder/log"
        ;;
    keep) keep "$@" ;;
    run)
        enter
        exec "$launch/flags.sh" tpu "${JAX_DIFFUSION:-jax-diffusion}" "$name" "$@"
        ;;
    status)
        state=idle
        if runs; then
            state=running
        elif [[ -s "$folder/status" ]]; then
            state="ended $(<"$folder/status")"
        elif [[ -e "$folder/lock" ]]; then
            state="ended 137" # killed with all that watched over it
        fi
        echo "$(hostname) $state"
        ;;
    stop) if runs; then kill -TERM "$(<"$folder/pid")"; fi ;;
    log) exec tail --lines=100 --follow=name --retry "$folder/log" ;;
    *) fail "there is no action $action, see --help" ;;
esac
