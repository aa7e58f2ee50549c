#!/usr/bin/env bash
# Ends the jobs and the services that slurm-start.sh DIR started, by their own pid files.
# Usage: slurm-stop.sh DIR
set -uo pipefail
dir=$(realpath -m "$1")
export SLURM_CONF="$dir/slurm.conf"

stop() {
  local file="$dir/run/$1.pid" pid
  [ -s "$file" ] || return 0
  pid=$(cat "$file")
  kill "$pid" 2>/dev/null || return 0
  for _ in $(seq 100); do
    kill -0 "$pid" 2>/dev/null || return 0
    sleep 0.05
  done
  kill -KILL "$pid" 2>/dev/null
}

if squeue -h >/dev/null 2>&1; then
  scancel --user="$(id -un)" 2>/dev/null
  for _ in $(seq 80); do
    [ -z "$(squeue -h)" ] && break
    sleep 0.1
  done
fi
for service in slurmd.n1 slurmd.n2 slurmctld munged; do stop "$service"; done
