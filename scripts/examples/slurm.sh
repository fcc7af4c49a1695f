#!/usr/bin/env bash
# On Slurm: train on NODES machines, extract in SHARDS, merge and score. On the login node, in the project's folder:
#
#   EXP=v31 FLAGS=@exp/v31.args IMAGES=input/training_images DATA=input bash scripts/examples/slurm.sh
#
# Three jobs, each once the one before it is done. A job that is requeued goes on from its newest checkpoint or block.
# Partition, account and time limits are the cluster's: SBATCH_PARTITION, SBATCH_ACCOUNT, SBATCH_TIMELIMIT.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
export EXP=${EXP:?names the experiment} IMAGES=${IMAGES:-input/training_images} DATA=${DATA:-input}
export PROCESSES=${PROCESSES:-4} SHARDS=${SHARDS:-8}  # PROCESSES: one per GPU
node='bash scripts/examples/node.sh'
logs=${LOGS:-slurm}
mkdir -p "$logs"
submit() { sbatch --parsable --requeue --export=ALL --output="$logs"/%x-%A_%a.log "$@"; }
train=$(submit --job-name="$(basename "$EXP")-train" --nodes="${NODES:-2}" --ntasks-per-node=1 \
    --gpus-per-node="$PROCESSES" --cpus-per-task="${CPUS:-32}" --exclusive --wrap="srun $node train")
extract=$(submit --job-name="$(basename "$EXP")-extract" --dependency="afterok:$train" --array="0-$((SHARDS - 1))" \
    --gpus=1 --cpus-per-task="${CPUS_OF_A_SHARD:-8}" --wrap="$node extract")
submit --job-name="$(basename "$EXP")-merge" --dependency="afterok:$extract" --wrap="$node merge"
