#!/usr/bin/env bash
# Trains on Cloud TPU VMs: one slice, or several over the network between them.
#
#   launch/tpu_vm.sh create      a TPU VM at once, or not at all; waits until it is ready
#   launch/tpu_vm.sh queue       a request for one slice or several, served when there is room; waits for it
#   launch/tpu_vm.sh install     copies this checkout (or clones RUN_SOURCE) to all workers and installs it
#   launch/tpu_vm.sh train       starts RUN_COMMAND on all workers; it goes on when you log out
#   launch/tpu_vm.sh log         follows the output of worker 0
#   launch/tpu_vm.sh status      of the TPU and of the command on each worker
#   launch/tpu_vm.sh stop        training saves and ends; train goes on from there
#   launch/tpu_vm.sh sample      samples with all workers, into RUN_WORKDIR/samples.png
#   launch/tpu_vm.sh fetch       copies the run without its checkpoints to fetched/RUN_NAME
#   launch/tpu_vm.sh resume      what is missing of all this until it trains: after a preemption, say
#   launch/tpu_vm.sh watch       resume, again and again until the training is finished
#   launch/tpu_vm.sh delete      the TPU, so that it costs nothing
#
# Before the action: --dry-run prints the commands instead. Settings: launch/settings.env says which and how.
#
#   launch/tpu_vm.sh --dry-run queue
#   RUN_COMMAND="train --config=digits" RUN_BUCKET=my-bucket launch/tpu_vm.sh watch
#   SETTINGS=dit.env launch/tpu_vm.sh log
#
# Nothing that exists is created anew, nothing is started twice, and every action may be given again.
set -euo pipefail
# shellcheck source=launch/common.sh
. "$(dirname "${BASH_SOURCE[0]}")/common.sh"

actions="create queue install train log status stop sample fetch resume watch delete"
arguments "$@"
action=${words[*]:-}
[[ "$action" != *" "* && " $actions " == *" ${action:-none} "* ]] ||
    fail "${action:-nothing} is no action: give one of ${actions// /, }"
settings
[[ -n "$GCP_ZONE" ]] || fail "GCP_ZONE is empty: give the zone, for instance us-west4-a"
need gcloud "install the Google Cloud CLI, https://cloud.google.com/sdk/docs/install"

place=(--zone="$GCP_ZONE" ${GCP_PROJECT:+--project="$GCP_PROJECT"})
read -ra create_options <<<"$TPU_CREATE_OPTIONS"
read -ra ssh_options <<<"$TPU_SSH_OPTIONS"
if ((RUN_SPOT)); then create_options=(--spot ${create_options[@]+"${create_options[@]}"}); fi
# A slice by itself is a TPU VM of the same name, however it was asked for; several are reached through their request.
if ((RUN_SLICES > 1)); then group="queued-resources"; else group="tpu-vm"; fi
worker="bash jax_diffusion/launch/worker.sh${RUN_BUCKET:+ --bucket=$RUN_BUCKET}"
errors=$(mktemp)
trap 'rm -f "$errors"' EXIT
exec 3>&1
# shellcheck source=launch/tpu_resource.sh
. "$launch/tpu_resource.sh"

# remote all COMMAND, remote 0 COMMAND: on these workers of all slices, or of the first.
remote() {
    local where=(--worker="$1")
    if ((RUN_SLICES > 1)); then
        where+=(--node="$1")
        # Else in turns of 64, of which the first would wait for the others.
        if [[ "$1" == all ]]; then where+=(--batch-size=all); fi
    fi
    run gcloud compute tpus "$group" ssh "$RUN_NAME" "${place[@]}" "${where[@]}" \
        ${ssh_options[@]+"${ssh_options[@]}"} --command="$2"
}

copy() { # worker FROM TO
    local where=(--worker="$1")
    if ((RUN_SLICES > 1)); then where+=(--node="$1"); fi
    run gcloud compute tpus "$group" scp "$2" "$3" "${place[@]}" "${where[@]}" ${ssh_options[@]+"${ssh_options[@]}"}
}

# A line a worker: HOST absent (nothing is installed), idle, running or ended STATUS.
statuses() {
    local out ask="if [ -e jax_diffusion/launch/worker.sh ]; then $worker status $RUN_NAME;"
    ask+=" else echo \$(hostname) absent; fi"
    if ((dry_run)); then
        remote all "$ask" >&3
    else
        out=$(remote all "$ask") || return 1
        grep -E "^[^ ]+ (absent|idle|running|ended [0-9]+)\$" <<<"$out" || true
    fi
}

install() {
    local packed=${TMPDIR:-/tmp}/$RUN_NAME.tar.gz unpack
    if [[ -n "$RUN_SOURCE" ]]; then
        unpack="rm -rf jax_diffusion && git clone --quiet $(quoted "$RUN_SOURCE") jax_diffusion"
        unpack+=" && git -C jax_diffusion checkout --quiet $(quoted "$RUN_VERSION")"
    else
        unpack="rm -rf jax_diffusion && mkdir jax_diffusion && tar -xzf jax_diffusion.tar.gz -C jax_diffusion"
        if ((!dry_run)) && [[ -n "$(git -C "$launch" status --porcelain)" ]]; then
            say "what is not committed here stays here"
        fi
        run git -C "$(dirname "$launch")" archive --format=tar.gz --output="$packed" "$RUN_VERSION" >&3 &&
            copy all "$packed" "$RUN_NAME:jax_diffusion.tar.gz" >&3 || return 1
    fi
    remote all "$unpack && $worker install $TPU_PYTHON" >&3
}

train() { remote all "$worker start $RUN_NAME $RUN_COMMAND --workdir=$RUN_WORKDIR" >&3; }

ask() { if ((TPU_QUEUED || RUN_SLICES > 1)); then queue; else create; fi; }

show_resume() {
    look
    delete
    echo "# when nothing is left of it:"
    ask
    await
    statuses
    echo "# where nothing is installed:"
    install
    echo "# where it does not run, and did not end with a mistake of its own:"
    train
}

# Whatever is missing until the command runs on all workers. Leaves in `next` whether it is finished; in vain where
# gcloud fails, which another time it may not.
resume() {
    local lines codes code
    next=again
    look || return 1
    if [[ "$phase" == gone ]]; then
        say "$(found): deleting what is left of it"
        delete || return 1
        phase=none
    fi
    if [[ "$phase" == none ]]; then
        say "there is no $RUN_NAME: asking for it"
        ask || return 1
    fi
    await || return 1
    lines=$(statuses) || return 1
    [[ -n "$lines" ]] || return 1
    if grep -q ' running$' <<<"$lines"; then return 0; fi
    codes=$(sed -n 's/.* ended //p' <<<"$lines" | sort -un)
    for code in $codes; do
        if ((code != 0 && code != resume && code <= 128)); then
            fail "the command ended with status $code, which a restart does not mend: see launch/tpu_vm.sh log"
        fi
    done
    if [[ "$codes" == 0 ]] && ! grep -qE ' (absent|idle)$' <<<"$lines"; then
        next=finished
        return 0
    fi
    if ((starts > RESTARTS)); then fail "RESTARTS=$RESTARTS: it ended once more; see launch/tpu_vm.sh log"; fi
    if grep -q ' absent$' <<<"$lines"; then install || return 1; fi
    say "starting the command on all workers${codes:+, after status ${codes//$'\n'/ and }}"
    train || return 1
    starts=$((starts + 1))
}

starts=0
finished="it is finished; launch/tpu_vm.sh sample, fetch and delete are left"
case "$action" in
    create | queue)
        look
        if ((dry_run)); then
            echo "# both must find nothing; then:"
        elif [[ "$phase" != none ]]; then
            fail "there is a $RUN_NAME already ($(found)): use it, delete it, or choose another RUN_NAME"
        fi
        "$action"
        await || fail "$RUN_NAME was not to be had ($(found))"
        ;;
    install | train)
        lines=$(statuses)
        if grep -q ' running$' <<<"$lines"; then
            [[ "$action" == train ]] || fail "the command runs: launch/tpu_vm.sh stop, before anything is installed"
            say "it runs already: see launch/tpu_vm.sh log"
            exit 0
        fi
        if [[ "$action" == train ]] && grep -q ' absent$' <<<"$lines"; then
            fail "nothing is installed on ${lines%% *}: launch/tpu_vm.sh install"
        fi
        "$action"
        ;;
    log) remote 0 "$worker log $RUN_NAME" ;;
    status)
        look
        ((dry_run)) || echo "$RUN_NAME: $(found)"
        if ((dry_run)) || [[ "$phase" == ready ]]; then statuses; fi
        ;;
    stop) remote all "$worker stop $RUN_NAME" ;;
    sample)
        lines=$(statuses)
        ! grep -q " running$" <<<"$lines" || fail "the command runs and has the TPU: launch/tpu_vm.sh stop first"
        remote all "$worker run sample --workdir=$RUN_WORKDIR $RUN_SAMPLE"
        ;;
    fetch)
        to=fetched/$RUN_NAME
        run mkdir -p "$to"
        if [[ -n "$RUN_BUCKET" ]]; then
            run gcloud storage rsync --recursive --exclude='^checkpoints/' "gs://$RUN_BUCKET/$RUN_WORKDIR" "$to"
        else
            remote 0 "tar -czf fetch.tar.gz -C $RUN_WORKDIR --exclude=./checkpoints ."
            copy 0 "$RUN_NAME:fetch.tar.gz" "$to"
            run tar -xzf "$to/fetch.tar.gz" -C "$to"
            run rm "$to/fetch.tar.gz"
        fi
        ;;
    resume)
        if ((dry_run)); then
            show_resume
        else
            resume || fail "it did not come about: see above, and give the same command again"
            if [[ "$next" == finished ]]; then say "$finished"; fi
        fi
        ;;
    watch)
        if ((dry_run)); then
            echo "# what is needed of this, again every $TPU_POLL s until the training is finished:"
            show_resume
            exit 0
        fi
        misses=0
        while :; do
            if resume; then
                misses=0
            elif ((misses++ >= RESTARTS)); then
                fail "it did not come about $misses times in a row: see above"
            fi
            if [[ "$next" == finished ]]; then break; fi
            sleep "$TPU_POLL"
        done
        say "$finished"
        ;;
    delete)
        look
        if ((!dry_run)) && [[ "$phase" == none ]]; then
            say "there is no $RUN_NAME"
            exit 0
        fi
        delete
        ;;
esac
