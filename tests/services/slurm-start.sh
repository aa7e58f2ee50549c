#!/usr/bin/env bash
# Starts a real Slurm of two nodes on this host, on loopback alone, without systemd, cgroups or a
# database: munged, slurmctld and two slurmd. Needs root, Debian's slurm-wlm and munge.
# Usage: slurm-start.sh DIR CTLD_PORT N1_PORT N2_PORT; then export SLURM_CONF=DIR/slurm.conf.
set -euo pipefail
PATH="$PATH:/usr/sbin:/sbin"
dir=$(realpath -m "$1")
host=$(hostname -s)

mkdir -p "$dir"/{run,log,state,spool/n1,spool/n2}
# munged wants its folders closed to others, and its socket reachable.
chmod 755 "$dir" "$dir/run"
chmod 700 "$dir/log"
(umask 077; head -c 128 /dev/urandom >"$dir/munge.key")

cat >"$dir/slurm.conf" <<CONF
ClusterName=tests
SlurmctldHost=$host(127.0.0.1)
SlurmctldPort=$2
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket=$dir/run/munge.socket
CredType=cred/munge
MpiDefault=none
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SwitchType=switch/none
CommunicationParameters=NoCtldInAddrAny,NoInAddrAny
ReturnToService=2
StateSaveLocation=$dir/state
SlurmdSpoolDir=$dir/spool/%n
SlurmctldPidFile=$dir/run/slurmctld.pid
SlurmdPidFile=$dir/run/slurmd.%n.pid
SlurmctldLogFile=$dir/log/slurmctld.log
SlurmdLogFile=$dir/log/slurmd.%n.log
SchedulerType=sched/backfill
SchedulerParameters=sched_interval=1,bf_interval=1,batch_sched_delay=0,sched_min_interval=0
SlurmdTimeout=30
InactiveLimit=0
KillWait=5
MinJobAge=60
PlugStackConfig=/dev/null
SlurmdParameters=config_overrides
NodeName=n1 NodeHostname=$host NodeAddr=127.0.0.1 Port=$3 CPUs=4 RealMemory=8000 State=UNKNOWN
NodeName=n2 NodeHostname=$host NodeAddr=127.0.0.1 Port=$4 CPUs=4 RealMemory=8000 State=UNKNOWN
PartitionName=debug Nodes=n1,n2 Default=YES MaxTime=INFINITE State=UP OverSubscribe=NO
CONF

export SLURM_CONF="$dir/slurm.conf"
munged --force --key-file="$dir/munge.key" --socket="$dir/run/munge.socket" \
  --pid-file="$dir/run/munged.pid" --log-file="$dir/log/munged.log" --seed-file="$dir/run/munge.seed"
slurmctld -f "$SLURM_CONF"
for node in n1 n2; do slurmd -f "$SLURM_CONF" -N "$node"; done

for _ in $(seq 150); do
  [ "$(sinfo -h -N -o %T 2>/dev/null | grep -c '^idle')" -eq 2 ] && exit 0
  sleep 0.1
done
echo "Slurm's nodes did not become idle within 15 s:" >&2
sinfo -N >&2 || true
tail -n 20 "$dir"/log/*.log >&2
exit 1
