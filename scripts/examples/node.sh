#!/usr/bin/env bash
# One machine's part of a run over several, whatever starts it (slurm.sh, kubernetes.yaml):
#
#   bash scripts/examples/node.sh train      one of NODES machines that meet at HEAD:PORT; PROCESSES of them on each
#   bash scripts/examples/node.sh extract    shard SHARD of SHARDS, by itself
#   bash scripts/examples/node.sh merge      once all shards are there: one descriptor file, and its scores
#
# From the environment: EXP, the experiment; FLAGS, train.py's for training, first of all a recipe; IMAGES, the training
# images; DATA, the folder of query_images, reference_images and training_images. All machines see the same folders.
# Each part can be started again and goes on where it was.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
python=${PYTHON:-$([ -x .venv/bin/python ] && echo .venv/bin/python || echo python3)}
case ${EXP:?names the experiment} in /*) results=$EXP;; *) results=exp/$EXP;; esac

train() {
    local nodes=${NODES:-${SLURM_NNODES:-1}} head=${HEAD:-}
    [ -n "$head" ] || head=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
    # --batch-size counts the images of one machine: halve it when the machines double, and the run stays comparable
    exec "$python" -m torch.distributed.run --nnodes "$nodes" --nproc-per-node "${PROCESSES:-1}" --max-restarts 3 \
        --rdzv-backend c10d --rdzv-id "$(basename "$EXP")" --rdzv-endpoint "$head:${PORT:-29500}" \
        train.py ${FLAGS:-@exp/v31.args} --exp "$EXP" --resume auto "${IMAGES:?folder of training images}"
}

extract() {
    local shard=${SHARD:-${SLURM_ARRAY_TASK_ID:-${JOB_COMPLETION_INDEX:?number of the shard}}}
    exec "$python" train.py --mode extract --exp "$EXP" --target-set "${TARGETS:-qrt}" --resume auto \
        --shard "$shard/${SHARDS:?number of shards}" "${DATA:?folder of images}"
}

merge() {
    local whole=$results/extract/fb-isc-submission.h5 truth=${DATA:?folder of images}/public_ground_truth.csv
    "$python" scripts/merge_shards.py "$results"/extract/fb-isc-submission.shard-*-of-"${SHARDS:?number of shards}".h5 \
        -o "$whole"
    [ ! -f "$truth" ] || "$python" scripts/eval_metrics.py "$whole" "$truth"
}

case ${1:-} in train | extract | merge) "$1";; *) echo "usage: node.sh train | extract | merge" >&2; exit 2;; esac
