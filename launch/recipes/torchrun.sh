#!/bin/sh
# Training by torchrun alone, on one host or on several that share a file system:
#
#   launch/recipes/torchrun.sh configs/isic2020.yaml                               # one host, all its GPUs
#   NODES=2 HEAD=host-a:29400 launch/recipes/torchrun.sh configs/isic2020.yaml     # the same on each of two
#   NODES=1:2 HEAD=…                                                               # goes on with one if need be
#   GPUS=4 MODULE=train.embed …                                                    # processes a host; the stage
#
# `moleprint launch` does the same with settings chosen for the host, logs by rank and plain errors.
set -eu

if [ -n "${HEAD:-}" ]; then
  export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 # a host that comes back finds the others: pytorch #135712
  set -- --nnodes="${NODES:?how many hosts, or MIN:MAX}" --rdzv-backend=c10d --rdzv-endpoint="$HEAD" \
    --rdzv-id="${RUN:-moleprint}" --max-restarts="${RESTARTS:-3}" \
    --nproc-per-node="${GPUS:-auto}" -m "${MODULE:-train.encoder}" "$@"
else
  set -- --standalone --nproc-per-node="${GPUS:-auto}" -m "${MODULE:-train.encoder}" "$@"
fi
exec torchrun "$@"
