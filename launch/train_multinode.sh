#!/usr/bin/env bash
# Train over several machines with DeepSpeed's launcher and a hostfile.
#
#   ./launch/train_multinode.sh HOSTFILE --phase 1 --output-dir /shared/runs/phase1
#
# HOSTFILE has a line per machine, `name slots=GPUS`. The machines need passwordless ssh, this
# repository and its environment at the same path, and one file system that all see for the data
# and --output-dir. DRY_RUN=1 prints the command instead of running it.
set -euo pipefail
cd "$(dirname "$0")/.."

[ $# -ge 1 ] || { echo "usage: $0 HOSTFILE [settings of cdpvae.train]" >&2; exit 2; }
hostfile=$1
shift
[ -r "$hostfile" ] || { echo "error: hostfile '$hostfile' cannot be read" >&2; exit 2; }
grep -Eq '^[^#[:space:]]+[[:space:]]+slots=[0-9]+' "$hostfile" \
    || { echo "error: hostfile '$hostfile' needs lines like 'node1 slots=2'" >&2; exit 2; }

command=(deepspeed --hostfile "$hostfile" --module cdpvae.train "$@")
if [ "${DRY_RUN:-0}" = 1 ]; then
    printf '%q ' "${command[@]}"
    echo
else
    exec "${command[@]}"
fi
