#!/usr/bin/env bash
# Train on two L40S (48 GB each) of one machine with DeepSpeed ZeRO-2.
#
#   ./launch/train_2xl40s.sh --phase 1 --output-dir runs/phase1
#   NUM_GPUS=1 ./launch/train_2xl40s.sh --phase 1
#
# Every setting of `python -m cdpvae.train --help` may follow. NCCL's variables are left alone: see
# launch/nccl_pcie.sh for when the first all-reduce hangs. PYTORCH_NO_CUDA_MEMORY_CACHING is not set:
# it turns the caching allocator off, and every tensor then costs a cudaMalloc and a cudaFree.
# The launcher and its workers get a process group of their own, and stopping this script stops all of
# it: the launcher alone would leave its workers behind, holding the GPUs.
set -euo pipefail
cd "$(dirname "$0")/.."

# Micro-batches differ in length: segments that grow are not cut into pieces too small to use again.
export PYTORCH_CUDA_ALLOC_CONF="${PYTORCH_CUDA_ALLOC_CONF:-expandable_segments:True}"
setsid deepspeed --num_gpus "${NUM_GPUS:-2}" --module cdpvae.train \
    --ds-config ds_configs/zero2_2xl40s.json "$@" &
group=$!
trap 'kill -TERM -- "-$group" 2>/dev/null || true' TERM INT
wait "$group"
