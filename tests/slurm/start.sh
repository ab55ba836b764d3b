#!/usr/bin/env bash
# start.sh DIR: a SLURM controller and two nodes (n1, n2) on this host, with all their state under DIR. Root only.
# Then `export SLURM_CONF=DIR/slurm.conf` for sbatch and the others; stop.sh DIR ends what was started.
# The nodes claim more than the host has (eight cores, a GPU, 200 GB), so that the job scripts' defaults are accepted. There
# is no accounting, so that any quality of service is. Jobs in the partition `urgent` preempt those in `main`
# (the default) at once and those in `patient` after a grace of 90 seconds.
set -euo pipefail
for program in munged slurmctld slurmd sbatch; do
  if ! command -v "$program" >/dev/null; then
    echo "start.sh: $program was not found; apt-get install --no-install-recommends slurmctld slurmd slurm-client munge" >&2
    exit 1
  fi
done
mkdir -p "$1"
dir=$(cd "$1" && pwd)
host=$(hostname -s)
mkdir -p "$dir"/{state,spool,log}
getent hosts "$host" >/dev/null || echo "127.0.0.1 $host" >>/etc/hosts
read -r controller one two < <(python3 - <<'PYTHON'
import socket

sockets = [socket.socket() for _ in range(3)]
for s in sockets:
    s.bind(("127.0.0.1", 0))
print(*(s.getsockname()[1] for s in sockets))
PYTHON
)

# A munge of its own, so that none needs to run on the host and none that runs is touched.
chmod 755 "$dir"
(umask 077 && head -c 128 /dev/urandom >"$dir/munge.key")
mkdir -p "$dir/munge"
munged --force --key-file="$dir/munge.key" --socket="$dir/munge/socket" --pid-file="$dir/munge/pid" \
  --log-file="$dir/log/munged.log" --seed-file="$dir/munge/seed"

cat >"$dir/slurm.conf" <<CONF
ClusterName=test
SlurmctldHost=$host(127.0.0.1)
SlurmctldPort=$controller
AuthType=auth/munge
# cred_expire: also how long a requeued job waits before it may start again (120 s by default).
AuthInfo=socket=$dir/munge/socket,cred_expire=5
CredType=cred/munge
SlurmUser=root
SlurmdUser=root
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
MpiDefault=none
ReturnToService=2
SlurmctldPidFile=$dir/slurmctld.pid
SlurmdPidFile=$dir/slurmd.%n.pid
SlurmdSpoolDir=$dir/spool/%n
StateSaveLocation=$dir/state
SlurmctldLogFile=$dir/log/slurmctld.log
SlurmdLogFile=$dir/log/slurmd.%n.log
SlurmdParameters=config_overrides
SelectType=select/cons_tres
SelectTypeParameters=CR_Core_Memory
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
SchedulerParameters=batch_sched_delay=1,sched_interval=2
GresTypes=gpu
KillWait=60
NodeName=n1 NodeHostname=$host NodeAddr=127.0.0.1 Port=$one CPUs=8 RealMemory=200000 Gres=gpu:rtx_6000:1 State=UNKNOWN
NodeName=n2 NodeHostname=$host NodeAddr=127.0.0.1 Port=$two CPUs=8 RealMemory=200000 Gres=gpu:rtx_6000:1 State=UNKNOWN
PartitionName=main Nodes=ALL Default=YES DefMemPerNode=2000 PriorityTier=1
PartitionName=patient Nodes=ALL DefMemPerNode=2000 PriorityTier=1 GraceTime=90
PartitionName=urgent Nodes=ALL DefMemPerNode=2000 PriorityTier=2
CONF
echo 'NodeName=n[1-2] Name=gpu Type=rtx_6000 File=/dev/null' >"$dir/gres.conf"

export SLURM_CONF="$dir/slurm.conf"
slurmctld
slurmd -N n1
slurmd -N n2
for _ in $(seq 30); do
  [ "$(sinfo --noheader --Node --partition main --states idle 2>/dev/null | wc -l)" = 2 ] && exit 0
  sleep 1
done
echo "start.sh: the nodes did not come up: see $dir/log" >&2
exit 1
