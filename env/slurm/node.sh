#!/usr/bin/env bash
# One machine's part of env/slurm/stage.sbatch; MASTER_PORT comes from `dschat`.
set -euo pipefail
exec deepspeed --hostfile "$HOSTFILE" --no_ssh --node_rank "$SLURM_NODEID" --master_addr "$MASTER_ADDR" \
    --master_port "$MASTER_PORT" "$@"
