#!/usr/bin/env bash
# A SLURM cluster of this one machine, for the tests of launch/slurm.sbatch; needs root, and Debian's slurm-wlm and munge.
#
#     export SLURM_CONF=$(tests/launch/slurm.sh start DIR)    # all of it lies in DIR, nothing in /etc
#     sinfo; sbatch ...
#     tests/launch/slurm.sh stop DIR
set -euo pipefail

action=${1:?start or stop}
dir=$(realpath -m "${2:?a folder}")

case $action in
  start)
    mkdir -p "$dir"/{state,spool}
    chmod 755 "$dir" # munged wants to be reached, and that nobody else can write there
    dd if=/dev/urandom of="$dir/munge.key" bs=128 count=1 status=none
    chmod 400 "$dir/munge.key"
    munged --force --key-file="$dir/munge.key" --socket="$dir/munge.socket" --pid-file="$dir/munge.pid" \
      --log-file="$dir/munge.log" --seed-file="$dir/munge.seed" > /dev/null 2>&1
    host=$(hostname -s)
    read -r first second < <(python3 -c '
import socket
pair = [socket.socket() for _ in range(2)]
for one in pair: one.bind(("", 0))
print(*(one.getsockname()[1] for one in pair))')
    cat > "$dir/slurm.conf" << CONF
ClusterName=here
SlurmctldHost=$host(localhost)
SlurmUser=root
SlurmctldPort=$first
SlurmdPort=$second
AuthType=auth/munge
AuthInfo=socket=$dir/munge.socket,cred_expire=5
StateSaveLocation=$dir/state
SlurmdSpoolDir=$dir/spool
SlurmctldPidFile=$dir/slurmctld.pid
SlurmdPidFile=$dir/slurmd.pid
SlurmctldLogFile=$dir/slurmctld.log
SlurmdLogFile=$dir/slurmd.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SchedulerParameters=sched_interval=1,bf_interval=1
MpiDefault=none
ReturnToService=2
SlurmdParameters=config_overrides
NodeName=$host NodeAddr=localhost CPUs=4
PartitionName=main Nodes=$host Default=YES State=UP
CONF
    export SLURM_CONF=$dir/slurm.conf
    slurmctld > /dev/null 2>&1
    slurmd > /dev/null 2>&1
    for _ in {1..100}; do
      if [[ $(sinfo -h -o %t 2> /dev/null) == idle ]]; then
        echo "$SLURM_CONF"
        exit 0
      fi
      sleep 0.2
    done
    tail -n 5 "$dir"/*.log >&2
    "$0" stop "$dir"
    exit 1
    ;;
  stop)
    for daemon in slurmd slurmctld munge; do
      [[ -e $dir/$daemon.pid ]] && kill "$(< "$dir/$daemon.pid")" || true
    done
    ;;
esac
