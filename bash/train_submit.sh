#!/usr/bin/env bash
# Submits slurm/sb-ism.sbatch (slurm/sb-multinode.sbatch if NODES is more than 1), after asking the cluster whether it would take it.
#   DATA_PATH=atlas.zarr ./bash/train_submit.sh [OPTIONS OF SBATCH] [-- FLAGS OF TRAIN.PY]
# Training is set as for bash/train.sh (NUM_EPOCHS, BATCH_SIZE, ...), the job by these; what is not set is as in the script:
#   JOB_NAME, GPUS (0: none), GPU_TYPE, MEM_PER_GPU, CPUS_PER_TASK, TIME_LIMIT, QOS and PARTITION and ACCOUNT, NODES, JOB_OUTPUT
# QOS= (empty) leaves the quality of service to the cluster. sbatch's own SBATCH_... variables work too.
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)

options=()
while [ $# -gt 0 ] && [ "$1" != -- ]; do
  options+=("$1")
  shift
done
[ $# -eq 0 ] || shift
flags=("$@")

if [ -z "${DATA_PATH:-}" ] && [[ " ${flags[*]} " != *" --data"[_-]path[\ =]* && " ${flags[*]} " != *" --config"[\ =]* ]]; then
  echo "train_submit: no data to train on; set DATA_PATH=cells.h5ad (or pass -- --data_path cells.h5ad)." >&2
  exit 2
fi
if [ -n "${DATA_PATH:-}" ] && [[ $DATA_PATH != *://* ]] && [ ! -e "$DATA_PATH" ]; then
  echo "train_submit: DATA_PATH=$DATA_PATH does not exist; expected an .h5ad file or a .zarr store." >&2
  exit 2
fi
if ! command -v sbatch >/dev/null; then
  echo "train_submit: sbatch was not found; this is for a login node of a SLURM cluster. Without one use ./bash/train.sh." >&2
  exit 2
fi

script=$root/slurm/sb-ism.sbatch
job=()
if [ "${NODES:-1}" -gt 1 ]; then
  script=$root/slurm/sb-multinode.sbatch
  job+=(--nodes="$NODES")
fi
if [ "${GPUS:-}" = 0 ]; then
  job+=(--gres=none --mem-per-gpu=0)
elif [ -n "${GPUS:-}${GPU_TYPE+set}" ]; then
  type=${GPU_TYPE-rtx_6000}
  job+=(--gres="gpu:${type:+$type:}${GPUS:-1}")
  # A GPU is kept busy by the threads that decode and tokenise for it.
  if [ "${GPUS:-1}" -gt 1 ] && [ -z "${CPUS_PER_TASK:-}" ]; then job+=(--cpus-per-task=$((6 * GPUS))); fi
fi
set_option() { if [ -n "${!2:-}" ]; then job+=("$1=${!2}"); fi; }
set_option --job-name JOB_NAME
if [ "${GPUS:-}" != 0 ]; then set_option --mem-per-gpu MEM_PER_GPU; fi
set_option --cpus-per-task CPUS_PER_TASK
set_option --time TIME_LIMIT
if [ -n "${QOS+set}" ]; then job+=(--qos="$QOS"); fi
set_option --partition PARTITION
set_option --account ACCOUNT
set_option --output JOB_OUTPUT

"$root/bash/setup.sh"
export SEDD_ROOT=$root # a job runs a copy of its script, which does not know where it came from
mkdir -p slurm_out "$(dirname "${JOB_OUTPUT:-slurm_out/log}")" # a job does not make the folder of its output

if ! sbatch --test-only "${job[@]}" "${options[@]}" "$script" "${flags[@]}"; then
  echo "train_submit: the cluster would not accept this job (see above); nothing was submitted." >&2
  echo "train_submit: asked for: sbatch ${job[*]} ${options[*]} $script; other settings are the #SBATCH lines of the script." >&2
  exit 1
fi
id=$(sbatch --parsable "${job[@]}" "${options[@]}" "$script" "${flags[@]}")
id=${id%%;*}
log=$(scontrol --oneliner show job "$id" 2>/dev/null | grep -o 'StdOut=[^ ]*' | cut -d= -f2 || true)
log=${log:-slurm_out/sedd_rnaseq-$id.out}
directory=${CHECKPOINT_DIR:-experiments/rnaseq_diffusion}

cat <<TEXT
Submitted job $id.
  squeue --job $id --start               is it running, and when will it
  tail -F $log
  tail -f $directory/metrics.jsonl       loss, cells per second, share of time waiting for data
  scontrol requeue $id                   save, stop and start again from there
  scancel $id                            save and stop; continue with RESUME=auto ./bash/train_submit.sh
TEXT
