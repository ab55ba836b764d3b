# shellcheck shell=bash disable=SC2154
# Functions of the job scripts, which source this file with $root set to the checkout.

# The environment that bash/setup.sh made; where there is none, the one that the job was submitted from.
use_environment() {
  [ -d "$root/.venv/bin" ] && PATH="$root/.venv/bin:$PATH"
  if ! command -v accelerate >/dev/null || ! command -v sedd >/dev/null; then
    echo "$root: no environment with accelerate and sedd; run ./bash/setup.sh there first, or submit from an active one." >&2
    exit 2
  fi
}

restarted() { [ "${SLURM_RESTART_COUNT:-0}" -gt 0 ]; }

# Sets `arguments`: flags from the environment, then "$@"; a job that SLURM starts again resumes where it was saved
# (with --resume auto and a checkpoint there, --overwrite deletes nothing).
train_arguments() {
  mapfile -d '' -t arguments < <(python "$root/train.py" --flags_from_environment)
  wait "$!"  # its failure ends the job here (set -e)
  arguments+=("$@")
  if restarted; then arguments+=(--resume auto); fi
}

# supervise TELL COMMAND...: runs COMMAND in the background and sets `status` to what it ends with. When SLURM asks this
# script to stop, `request` becomes USR1 or TERM and TELL (called with the signal and the pid of COMMAND) passes it on,
# every second until COMMAND has ended: a Python that is still importing does not listen yet.
supervise() {
  local tell=$1 pid
  shift
  request=
  status=0
  trap 'request=USR1' USR1
  trap 'request=TERM' TERM
  "$@" &
  pid=$!
  while kill -0 "$pid" 2>/dev/null; do
    if [ -n "$request" ]; then "$tell" "$request" "$pid" || true; fi
    sleep 1 &
    wait "$!" || true  # unlike sleep in the foreground, this lets a trap run at once
  done
  wait "$pid" || status=$?
}

# A launcher that does not hear: `accelerate launch` would die of TERM or USR1 and leave the training behind, or kill it
# before it has saved. Ignored signals stay ignored in its children until train.py installs its own handlers.
launch() {
  trap '' TERM USR1
  export PET_SIGNALS_TO_HANDLE=SIGQUIT  # what torchrun, which accelerate uses for several processes, calls the option
  exec accelerate launch "$@"
}

tell_training() { pkill "-$1" -P "$2" -f train.py; }  # the children of a launcher
tell_directly() { kill "-$1" "$2"; }
tell_to_end() { kill -TERM "$2"; }

# For commands that can be stopped at any time and done again: ended on request counts as 75 does for training.
stopped_means_again() {
  if [ -n "$request" ] && [ "$status" -ne 0 ]; then status=75; fi
}

# train_until_done TELL COMMAND...: supervise, with the exit status of train.py itself: a launcher turns every failure into 1.
train_until_done() {
  SEDD_STATUS_FILE=$(mktemp)
  export SEDD_STATUS_FILE
  supervise "$@"
  if [ -s "$SEDD_STATUS_FILE" ]; then status=$(cat "$SEDD_STATUS_FILE"); fi
  rm -f "$SEDD_STATUS_FILE"
}

# finish: ends the job. Status 75 means: stopped on request, saved, to be continued. The controller has decided already
# what becomes of a job that it cancels or requeues; one that it still holds for running (its time is nearly up, or the
# grace before a preemption began, of which SLURM tells only what runs under srun) goes back into the queue here.
finish() {
  if [ "$status" -eq 75 ] && [ -n "${SLURM_JOB_ID:-}" ]; then
    if [ "$(squeue --noheader --jobs "$SLURM_JOB_ID" --format %T 2>/dev/null)" = RUNNING ]; then
      echo "job $SLURM_JOB_ID: stopped${request:+ on SIG$request} with everything saved; back into the queue" >&2
      scontrol requeue "$SLURM_JOB_ID" || echo "job $SLURM_JOB_ID: cannot be requeued; submit it again with RESUME=auto" >&2
    fi
  fi
  exit "$status"
}
