#!/usr/bin/env bash
# Ends the jobs and the services that slurm-start.sh DIR started, by their own pid files.
# Usage: slurm-stop.sh DIR
set -uo pipefail
dir=$(realpath -m "$1")
export SLURM_CONF="$dir/slurm.conf"

if squeue -h >/dev/null 2>&1; then
  scancel --user="$(id -un)" 2>/dev/null
  for _ in $(seq 80); do
    [ -z "$(squeue -h)" ] && break
    sleep 0.1
  done
fi

pids=()
for service in slurmd.n1 slurmd.n2 slurmctld munged; do
  [ -s "$dir/run/$service.pid" ] && pids+=("$(cat "$dir/run/$service.pid")")
done
[ "${#pids[@]}" -eq 0 ] && exit 0
kill "${pids[@]}" 2>/dev/null
for _ in $(seq 60); do
  kill -0 "${pids[@]}" 2>/dev/null || exit 0
  sleep 0.05
done
kill -KILL "${pids[@]}" 2>/dev/null
exit 0
