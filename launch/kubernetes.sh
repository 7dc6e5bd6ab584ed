#!/usr/bin/env bash
# Trains in Kubernetes as a JobSet: on TPU slices of GKE, or on hosts with NVIDIA GPUs.
#
#   launch/kubernetes.sh image tpu     builds KUBE_IMAGE from this checkout with Docker and pushes it (or image gpu)
#   launch/kubernetes.sh apply tpu     fills in launch/jobset_tpu.yaml and creates it (or apply gpu)
#   launch/kubernetes.sh log           follows the output of process 0
#   launch/kubernetes.sh status        the JobSet's state, its restarts and its pods
#   launch/kubernetes.sh fetch         copies the run without its checkpoints to fetched/RUN_NAME
#   launch/kubernetes.sh delete        the JobSet; the run's folder stays
#
# Before the action: --dry-run prints the commands and the manifest instead. Settings: launch/settings.env.
#
#   KUBE_IMAGE=europe-docker.pkg.dev/me/repo/image:1 RUN_BUCKET=my-bucket launch/kubernetes.sh --dry-run apply tpu
#   RUN_NAME=digits-samples RUN_COMMAND=sample launch/kubernetes.sh apply gpu
#
# The JobSet controller restarts all pods when one ends with 75, by a signal or with its machine, RESTARTS times at
# most; any other status ends the run. A JobSet that exists is left as it is.
set -euo pipefail
# shellcheck source=launch/common.sh
. "$(dirname "${BASH_SOURCE[0]}")/common.sh"

arguments "$@"
action=${words[0]:-} kind=${words[1]:-}
case "$action" in
    image | apply) [[ "$kind" == tpu || "$kind" == gpu ]] || fail "$action ${kind:-what}: give tpu or gpu" ;;
    log | status | fetch | delete) ;;
    *) fail "${action:-nothing} is no action: give one of image, apply, log, status, fetch, delete" ;;
esac
settings
[[ -n "$KUBE_IMAGE" || "$action" =~ ^(log|status|delete)$ ]] || fail "KUBE_IMAGE is empty: give the image's full name"
kubectl=(kubectl --namespace="$KUBE_NAMESPACE")
selector=jobset.sigs.k8s.io/jobset-name=$RUN_NAME

# A text as YAML (and JSON) has it.
yaml() {
    local text=${1//\\/\\\\}
    text=${text//\"/\\\"}
    echo "\"${text//$'\n'/\\n}\""
}

# The run's folder for the pods, as one entry of their volumes.
volume() {
    local bucket options="implicit-dirs,metadata-cache:ttl-secs:0,metadata-cache:negative-ttl-secs:0"
    if [[ -n "$KUBE_CLAIM" ]]; then
        echo "{\"name\": \"runs\", \"persistentVolumeClaim\": {\"claimName\": $(yaml "$KUBE_CLAIM")}}"
    elif [[ -n "$RUN_BUCKET" ]]; then
        bucket="\"bucketName\": $(yaml "$RUN_BUCKET"), \"mountOptions\": \"$options\""
        bucket="\"driver\": \"gcsfuse.csi.storage.gke.io\", \"volumeAttributes\": {$bucket}"
        echo "{\"name\": \"runs\", \"csi\": {$bucket}}"
    else
        fail "the pods need a folder that all see: give RUN_BUCKET (on GKE) or KUBE_CLAIM"
    fi
}

manifest() {
    local chips hosts nodes tolerations restartable folder text name value
    tolerations="{\"key\": \"google.com/tpu\", \"operator\": \"Exists\", \"effect\": \"NoSchedule\"}"
    if [[ "$kind" == tpu ]]; then
        [[ "$KUBE_TPU_TOPOLOGY" =~ ^[1-9][0-9]*(x[1-9][0-9]*){1,2}$ ]] ||
            fail "KUBE_TPU_TOPOLOGY=$KUBE_TPU_TOPOLOGY: give the chips along each axis, for instance 4x4"
        chips=$((${KUBE_TPU_TOPOLOGY//x/*}))
        ((chips % KUBE_TPU_CHIPS == 0)) ||
            fail "KUBE_TPU_CHIPS=$KUBE_TPU_CHIPS: so many a host, and $KUBE_TPU_TOPOLOGY is $chips chips"
        hosts=$((chips / KUBE_TPU_CHIPS)) chips=$KUBE_TPU_CHIPS
        nodes="\"cloud.google.com/gke-tpu-accelerator\": $(yaml "$KUBE_TPU")"
        nodes+=", \"cloud.google.com/gke-tpu-topology\": $(yaml "$KUBE_TPU_TOPOLOGY")"
    else
        ((RUN_SLICES == 1)) || fail "RUN_SLICES=$RUN_SLICES: slices are of TPUs; give KUBE_GPU_NODES"
        tolerations=${tolerations/google.com\/tpu/nvidia.com\/gpu}
        hosts=$KUBE_GPU_NODES chips=$KUBE_GPUS
        nodes=""
        if [[ -n "$KUBE_GPU_LABEL" ]]; then
            nodes="$(yaml "${KUBE_GPU_LABEL%%=*}"): $(yaml "${KUBE_GPU_LABEL#*=}")"
        fi
    fi
    if ((RUN_SPOT)); then
        nodes+="${nodes:+, }\"cloud.google.com/gke-spot\": \"true\""
        tolerations+=", {\"key\": \"cloud.google.com/gke-spot\", \"operator\": \"Exists\", \"effect\": \"NoSchedule\"}"
    fi
    restartable="$resume, $(seq --separator=", " 129 165)" # 128 + a signal
    folder=$(volume) || exit
    declare -A values=(
        [NAME]=$RUN_NAME [NAMESPACE]=$KUBE_NAMESPACE [RESTARTS]=$RESTARTS [SLICES]=$RUN_SLICES [HOSTS]=$hosts
        [CHIPS]=$chips [NODES]="{$nodes}" [TOLERATIONS]="[$tolerations]" [VOLUME]=$folder
        [RESTARTABLE]="[$restartable]" [SERVICE_ACCOUNT]=$(yaml "$KUBE_SERVICE_ACCOUNT") [IMAGE]=$(yaml "$KUBE_IMAGE")
        [COMMAND]=$(yaml "exec /app/launch/flags.sh $kind jax-diffusion $RUN_COMMAND --workdir=$RUN_WORKDIR")
        [COORDINATOR]=$(yaml "$RUN_NAME-train-0-0.$RUN_NAME:12321")
    )
    text=$(<"$launch/jobset_$kind.yaml")
    for name in "${!values[@]}"; do
        value=${values[$name]}
        text=${text//"\${$name}"/"$value"}
    done
    echo "$text"
}

# A pod that sees the run's folder and does nothing else: those of the run may be gone.
reader() {
    local folder pod mount='"volumeMounts": [{"name": "runs", "mountPath": "/runs"}]'
    folder=$(volume) || exit
    pod="\"name\": \"reader\", \"image\": $(yaml "$KUBE_IMAGE"), \"command\": [\"sleep\", \"3600\"], $mount"
    cat <<END
{"apiVersion": "v1", "kind": "Pod",
 "metadata": {"name": "$RUN_NAME-reader", "annotations": {"gke-gcsfuse/volumes": "true"}},
 "spec": {"restartPolicy": "Never", "serviceAccountName": $(yaml "$KUBE_SERVICE_ACCOUNT"),
  "containers": [{$pod}],
  "volumes": [$folder]}}
END
}

# create TEXT: what does not exist yet.
create() {
    if ((dry_run)); then
        printf '%s <<'\''END'\''\n%s\nEND\n' "$(quoted "${kubectl[@]}" create --filename=-)" "$1"
    else
        "${kubectl[@]}" create --filename=- <<<"$1"
    fi
}

if [[ "$action" == image ]]; then
    need docker "https://docs.docker.com/engine/install"
    extras=tpu,data
    if [[ "$kind" == gpu ]]; then extras=cuda,data; fi
    run docker build --platform=linux/amd64 --file="$launch/Dockerfile" --build-arg=EXTRAS="$extras" \
        --tag="$KUBE_IMAGE" "$(dirname "$launch")"
    run docker push "$KUBE_IMAGE"
    exit 0
fi
need kubectl "https://kubernetes.io/docs/tasks/tools"
case "$action" in
    apply)
        text=$(manifest)
        exists=("${kubectl[@]}" get jobset "$RUN_NAME" --ignore-not-found --output=name)
        if ((dry_run)); then
            echo "# must find nothing; then:"
            quoted "${exists[@]}"
        elif [[ -n "$("${exists[@]}")" ]]; then
            fail "there is a JobSet $RUN_NAME already: delete it, or choose another RUN_NAME"
        fi
        create "$text"
        ;;
    log)
        run "${kubectl[@]}" logs --follow --tail=100 --container=train \
            --selector="$selector,jobset.sigs.k8s.io/job-index=0,batch.kubernetes.io/job-completion-index=0"
        ;;
    status)
        run "${kubectl[@]}" get jobset "$RUN_NAME"
        run "${kubectl[@]}" get pods --selector="$selector" --output=wide
        ;;
    fetch)
        text=$(reader)
        to=fetched/$RUN_NAME
        run mkdir -p "$to"
        create "$text"
        if ((!dry_run)); then
            # shellcheck disable=SC2064  # as it is now
            trap "$(quoted "${kubectl[@]}" delete pod "$RUN_NAME-reader" --wait=false)" EXIT
        fi
        run "${kubectl[@]}" wait --for=condition=Ready --timeout=600s "pod/$RUN_NAME-reader"
        run "${kubectl[@]}" exec "$RUN_NAME-reader" --container=reader -- \
            tar -czf /tmp/run.tar.gz -C "/runs/$RUN_WORKDIR" --exclude=./checkpoints .
        run "${kubectl[@]}" cp --container=reader "$RUN_NAME-reader:/tmp/run.tar.gz" "$to/run.tar.gz"
        run tar -xzf "$to/run.tar.gz" -C "$to"
        run rm "$to/run.tar.gz"
        if ((dry_run)); then quoted "${kubectl[@]}" delete pod "$RUN_NAME-reader" --wait=false; fi
        ;;
    delete) run "${kubectl[@]}" delete jobset "$RUN_NAME" --ignore-not-found ;;
esac
