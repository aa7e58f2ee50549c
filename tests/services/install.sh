#!/usr/bin/env bash
# Installs the services that the tests of the clusters start themselves: Slurm and munge, sshd, and ip
# for network namespaces. Debian or Ubuntu, as root; does nothing where they are there.
set -euo pipefail

missing=()
for pair in sbatch:slurm-wlm slurmctld:slurm-wlm munged:munge sshd:openssh-server ip:iproute2; do
  PATH="$PATH:/usr/sbin:/sbin" command -v "${pair%%:*}" >/dev/null || missing+=("${pair##*:}")
done
[ "${#missing[@]}" -eq 0 ] && exit 0

if ! command -v apt-get >/dev/null || [ "$(id -u)" -ne 0 ]; then
  echo "Not installed, and not installable here without apt-get and root: ${missing[*]}" >&2
  exit 1
fi
# Packages start their services on installation; the tests start their own.
policy=/usr/sbin/policy-rc.d
if [ ! -e "$policy" ]; then
  printf '#!/bin/sh\nexit 101\n' >"$policy"
  chmod +x "$policy"
  trap 'rm -f "$policy"' EXIT
fi
apt-get update -qq
DEBIAN_FRONTEND=noninteractive apt-get install -qq -y --no-install-recommends "${missing[@]}" >/dev/null
