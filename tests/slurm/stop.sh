#!/usr/bin/env bash
# stop.sh DIR: cancels the jobs and ends the controller, the nodes and the munge that start.sh started there.
set -uo pipefail
dir=$(cd "$1" && pwd) || exit 1
export SLURM_CONF="$dir/slurm.conf"
if squeue --noheader >/dev/null 2>&1; then
  scancel --user root --signal KILL --full 2>/dev/null
  scancel --user root 2>/dev/null
  for _ in $(seq 20); do
    [ -z "$(squeue --noheader 2>/dev/null)" ] && break
    sleep 0.5
  done
fi
for file in "$dir"/slurmd.n1.pid "$dir"/slurmd.n2.pid "$dir"/slurmctld.pid "$dir"/munge/pid; do
  [ -s "$file" ] || continue
  pid=$(cat "$file")
  kill "$pid" 2>/dev/null
  for _ in $(seq 20); do
    kill -0 "$pid" 2>/dev/null || break
    sleep 0.5
  done
done
exit 0
