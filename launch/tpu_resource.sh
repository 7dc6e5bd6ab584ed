# What Google Cloud has under our name: read by tpu_vm.sh, which says where, in `place`, and how, in `create_options`.
# shellcheck shell=bash
# shellcheck disable=SC2154  # settings, and what tpu_vm.sh has set

# state GROUP FIELD: of what has our name, nothing where nothing has. In vain where gcloud fails otherwise.
state() {
    local command=(gcloud compute tpus "$1" describe "$RUN_NAME" "${place[@]}" --format="value($2)")
    if ((dry_run)); then
        quoted "${command[@]}" >&3
    elif ! "${command[@]}" 2>"$errors" && ! grep -q NOT_FOUND "$errors"; then
        fail "gcloud cannot tell the state of $RUN_NAME: $(tail -n 1 "$errors")"
    fi
}

# Leaves in `phase` what that comes to: none, waiting, ready, gone or stopped.
look() {
    queued=$(state queued-resources state.state) || return 1
    node=""
    if ((RUN_SLICES == 1)); then node=$(state tpu-vm state) || return 1; fi
    case "$queued/$node" in
        /) phase=none ;;
        /READY | ACTIVE/READY) phase=ready ;;
        # Taken away, but not all of it yet: only then can it be deleted.
        SUSPENDING/* | DELETING/* | */DELETING) phase=waiting ;;
        ACTIVE/) if ((RUN_SLICES > 1)); then phase=ready; else phase=waiting; fi ;;
        SUSPENDED/* | FAILED/* | */PREEMPTED | */TERMINATED) phase=gone ;;
        */STOPPED) phase=stopped ;;
        *) phase=waiting ;;
    esac
}

found() { echo "${queued:+request $queued}${queued:+${node:+, }}${node:+TPU $node}"; }

# Until it is ready; in vain where it will not become so.
await() {
    local said="" begin=$SECONDS
    if ((dry_run)); then
        echo "# again every $TPU_POLL s, until it is READY:" >&3
        state "$group" "$(if ((RUN_SLICES > 1)); then echo state.; fi)state"
        return
    fi
    while :; do
        look || return 1
        case "$phase" in
            ready) return 0 ;;
            gone | none) return 1 ;;
            stopped) fail "$RUN_NAME is stopped: start it with gcloud, or delete it" ;;
        esac
        if [[ "$(found)" != "$said" ]]; then
            said=$(found)
            say "$said after $((SECONDS - begin)) s; Ctrl-C does not take it back, launch/tpu_vm.sh delete does"
        fi
        sleep "$TPU_POLL"
    done
}

create() {
    ((RUN_SLICES == 1)) || fail "RUN_SLICES=$RUN_SLICES can only be queued: launch/tpu_vm.sh queue"
    run gcloud compute tpus tpu-vm create "$RUN_NAME" "${place[@]}" --accelerator-type="$TPU_TYPE" \
        --version="$TPU_RUNTIME" ${create_options[@]+"${create_options[@]}"} >&3
}

queue() {
    local nodes=(--node-id="$RUN_NAME")
    if ((RUN_SLICES > 1)); then nodes=(--node-count="$RUN_SLICES" --node-prefix="$RUN_NAME"); fi
    run gcloud compute tpus queued-resources create "$RUN_NAME" "${place[@]}" "${nodes[@]}" \
        --accelerator-type="$TPU_TYPE" --runtime-version="$TPU_RUNTIME" ${create_options[@]+"${create_options[@]}"} >&3
}

# By the request where there is one: it takes its TPUs along.
delete() {
    if ((dry_run)); then
        echo "# where it was queued:" >&3
        queued=ACTIVE
    fi
    if [[ -n "$queued" ]]; then
        run gcloud compute tpus queued-resources delete "$RUN_NAME" "${place[@]}" --force --quiet >&3
    fi
    if ((dry_run && RUN_SLICES == 1)); then echo "# else:" >&3; fi
    if [[ -z "$queued" ]] || ((dry_run && RUN_SLICES == 1)); then
        run gcloud compute tpus tpu-vm delete "$RUN_NAME" "${place[@]}" --quiet >&3
    fi
}
