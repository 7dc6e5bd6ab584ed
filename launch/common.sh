# What the launch scripts share; read by them, not run.
# shellcheck shell=bash

launch=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
script=launch/$(basename "$0")
dry_run=0
# shellcheck disable=SC2034  # the scripts use it
resume=75 # the status with which training says "start me again"

fail() {
    echo "$script: error: $1" >&2
    exit 2
}

say() { echo "$script: $1" >&2; }

# The comment at the head of a script, down to its first line of code.
usage() {
    sed -n '2,/^[^#]/{/^#/s/^# \{0,1\}//p}' "$0"
    exit 0
}

# Leaves the words of a command line in `words`; --help and --dry-run may stand anywhere.
arguments() {
    local word
    words=()
    for word in "$@"; do
        case "$word" in
            -h | --help) usage ;;
            --dry-run) dry_run=1 ;;
            *) words+=("$word") ;;
        esac
    done
}

# Sets the settings of a file that are not set yet. Nothing in it is executed.
read_settings() {
    local line name value number=0 known
    known=" $(sed -n 's/^\([A-Z_]*\)=.*/\1/p' "$launch/settings.env" | tr '\n' ' ')"
    [[ -r "$1" ]] || fail "SETTINGS=$1 cannot be read"
    while IFS= read -r line || [[ -n "$line" ]]; do
        number=$((number + 1))
        if [[ "$line" =~ ^[[:space:]]*(#.*)?$ ]]; then continue; fi
        [[ "$line" =~ ^([A-Za-z_]+)=(.*)$ ]] || fail "$1:$number: \"$line\" is no NAME=value"
        name=${BASH_REMATCH[1]} value=${BASH_REMATCH[2]}
        [[ "$known" == *" $name "* ]] || fail "$1:$number: there is no setting $name; launch/settings.env has them all"
        # Quotes around the whole of it, as a shell would take them off.
        if [[ "$value" =~ ^\"([^\"]*)\"$ || "$value" =~ ^\'([^\']*)\'$ ]]; then value=${BASH_REMATCH[1]}; fi
        if [[ -z "${!name+set}" ]]; then printf -v "$name" '%s' "$value"; fi
    done <"$1"
}

# All settings: the environment, the file SETTINGS, the defaults.
settings() {
    if [[ -n "${SETTINGS:-}" ]]; then read_settings "$SETTINGS"; fi
    read_settings "$launch/settings.env"
    local name
    [[ "$RUN_NAME" =~ ^[a-z]([-a-z0-9]{0,38}[a-z0-9])?$ ]] ||
        fail "RUN_NAME=$RUN_NAME: give small letters, digits and -, beginning with a letter, at most 40"
    for name in RUN_SPOT TPU_QUEUED; do
        [[ "${!name}" =~ ^[01]$ ]] || fail "$name=${!name}: give 0 or 1"
    done
    for name in RUN_SLICES JOB_NODES JOB_CPUS_PER_TASK KUBE_TPU_CHIPS KUBE_GPU_NODES KUBE_GPUS; do
        [[ "${!name}" =~ ^[1-9][0-9]*$ ]] || fail "$name=${!name}: give a whole number, at least 1"
    done
    for name in RESTARTS TPU_POLL JOB_GPUS_PER_NODE JOB_GRACE; do
        [[ "${!name}" =~ ^[0-9]+$ ]] || fail "$name=${!name}: give a whole number"
    done
    RUN_BUCKET=${RUN_BUCKET#gs://} RUN_BUCKET=${RUN_BUCKET%/} RUN_WORKDIR=${RUN_WORKDIR%/}
    [[ -n "$RUN_WORKDIR" ]] || fail "RUN_WORKDIR is empty: give the run's folder, for instance runs/digits"
}

# Words as a shell would read them again, quoted where that is needed.
quoted() {
    local word out=()
    for word in "$@"; do
        if [[ "$word" =~ ^[A-Za-z0-9_./:=@,%+-]+$ ]]; then
            out+=("$word")
        elif [[ "$word" =~ ^(--[a-z-]+=)(.*)$ ]]; then
            out+=("${BASH_REMATCH[1]}'${BASH_REMATCH[2]//\'/\'\\\'\'}'")
        else
            out+=("'${word//\'/\'\\\'\'}'")
        fi
    done
    echo "${out[*]}"
}

# A command that changes something: run, or with --dry-run printed.
run() {
    if ((dry_run)); then
        quoted "$@"
    else
        "$@" 3>&- # where a dry run prints to: nothing that stays behind may hold it
    fi
}

# A command of other people's that a script needs.
need() {
    if ((!dry_run)) && ! command -v "$1" >/dev/null; then fail "there is no $1 here: $2"; fi
}
