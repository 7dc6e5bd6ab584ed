#!/usr/bin/env bash
# Settings of JAX and XLA for a kind of accelerator, for one command or for the shell:
#
#   launch/flags.sh gpu jax-diffusion train --config=imagenet256_dit_xl2 --workdir=runs/dit
#   eval "$(launch/flags.sh gpu)"
#   launch/flags.sh tpu                     # prints the set; gpu, tpu or cpu
#
# An unknown flag aborts the process, so the installed jaxlib is asked first and what it does not know is left out with
# a warning. What is set already stays: your own XLA_FLAGS come last and win. PYTHON (default python3) is the
# interpreter that has jax. Why these and no others: docs/performance.md.
set -euo pipefail

usage() {
    sed -n '2,11s/^# \{0,1\}//p' "$0"
    exit "${1:-0}"
}

settings=() # NAME=VALUE
xla_flags=()
case "${1:-}" in
    -h | --help) usage ;;
    gpu)
        # O1: collectives are hidden behind computation (the latency-hiding scheduler), at longer compile times.
        settings=(JAX_OPTIMIZATION_LEVEL=O1 XLA_CLIENT_MEM_FRACTION=0.9)
        # At least one layer in each collective: a block of DiT-XL/2 is 96 MB of float32 gradients.
        xla_flags=(
            --xla_gpu_all_reduce_combine_threshold_bytes=134217728
            --xla_gpu_all_gather_combine_threshold_bytes=134217728
            --xla_gpu_reduce_scatter_combine_threshold_bytes=134217728
        )
        ;;
    tpu | cpu) ;; # the defaults; what TPUs take goes into LIBTPU_INIT_ARGS
    *)
        echo "launch/flags.sh: error: ${1:-nothing} is no set of flags: give gpu, tpu or cpu, and a command to run or none" >&2
        exit 2
        ;;
esac
shift

if ((${#xla_flags[@]})); then
    starts=1
    # The message of an unknown flag is one that this variable can hide.
    said=$(TF_CPP_MIN_LOG_LEVEL=0 JAX_PLATFORMS=cpu XLA_FLAGS="${xla_flags[*]}" "${PYTHON:-python3}" \
        -c 'import jax; jax.devices()' 2>&1) || starts=0
    unknown=""
    if ((!starts)); then
        unknown=$(sed -n 's/.*Unknown flags\{0,1\} in XLA_FLAGS: \(.*\)/ \1 /p' <<<"$said")
        if [[ -z "$unknown" ]]; then
            echo "launch/flags.sh: error: jax does not start under ${PYTHON:-python3}, set PYTHON: ${said##*$'\n'}" >&2
            exit 2
        fi
    fi
    known=()
    for flag in "${xla_flags[@]}"; do
        case "$unknown" in
            *" $flag "*) echo "launch/flags.sh: warning: this jaxlib has no ${flag%%=*}: left out" >&2 ;;
            *) known+=("$flag") ;;
        esac
    done
    settings+=("XLA_FLAGS=${known[*]}${XLA_FLAGS:+ $XLA_FLAGS}")
fi

for setting in ${settings[@]+"${settings[@]}"}; do
    name=${setting%%=*}
    if [[ "$name" != XLA_FLAGS && -n "${!name:-}" ]]; then continue; fi
    # The older name of the same setting, beside which JAX does not take the new one.
    if [[ "$name" == XLA_CLIENT_MEM_FRACTION && -n "${XLA_PYTHON_CLIENT_MEM_FRACTION:-}" ]]; then continue; fi
    if (($#)); then export "${setting?}"; else printf 'export %s=%q\n' "$name" "${setting#*=}"; fi
done
if (($#)); then exec "$@"; fi
