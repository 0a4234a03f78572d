#!/bin/bash
# One node's part of a training over several nodes, with torchrun and without a scheduler. On every node:
#   NUM_NODES=2 NODE_RANK=0 MASTER_ADDR=node7 bash experiments/slurm/torchrun.sh flashdecoder_xl_stage2 [key=value ...]
# NODE_RANK counts the nodes from 0; MASTER_ADDR is the first one. RUNS_ROOT must be on a disk that all nodes share.

set -euo pipefail
[ $# -ge 1 ] || { echo "error: which experiment? bash experiments/slurm/torchrun.sh NAME [key=value ...]" >&2; exit 2; }
python=${PYTHON:-.venv/bin/python}

# torchrun ends its processes on SIGTERM, but dies of SIGUSR1: it ignores that, and its processes get it from here.
(
    trap '' USR1
    exec "$python" -m torch.distributed.run --nnodes="${NUM_NODES:?}" --node-rank="${NODE_RANK:-${SLURM_NODEID:?}}" \
        --nproc-per-node=8 --master-addr="${MASTER_ADDR:?}" --master-port="${MASTER_PORT:-29500}" --max-restarts=0 \
        -m experiments.train "$@" trainer.devices=8 "trainer.num_nodes=$NUM_NODES"
) &
agent=$!
trap 'pkill -USR1 -P "$agent"' USR1
trap 'kill -TERM "$agent"' TERM INT
while true; do
    status=0
    wait "$agent" || status=$?
    kill -0 "$agent" 2>/dev/null || exit "$status"  # a signal interrupts wait: then there is more to wait for
done
