#!/usr/bin/env bash
# Starts a private sshd on loopback, with keys of its own, that lets in the user who starts it.
# Usage: sshd-start.sh DIR PORT; the client's key is DIR/client_key. End it by the pid in DIR/sshd.pid.
set -euo pipefail
PATH="$PATH:/usr/sbin:/sbin"
dir=$(realpath -m "$1")
port=$2

mkdir -p "$dir"
chmod 700 "$dir"
for key in host_key client_key; do
  [ -s "$dir/$key" ] || ssh-keygen -q -t ed25519 -N '' -f "$dir/$key"
done
cp "$dir/client_key.pub" "$dir/authorized_keys"
chmod 600 "$dir/authorized_keys"
printf '[127.0.0.1]:%s %s\n' "$port" "$(cut -d' ' -f1,2 "$dir/host_key.pub")" >"$dir/known_hosts"

cat >"$dir/sshd_config" <<CONF
ListenAddress 127.0.0.1
Port $port
HostKey $dir/host_key
PidFile $dir/sshd.pid
AuthorizedKeysFile $dir/authorized_keys
AllowUsers $(id -un)
PermitRootLogin prohibit-password
PasswordAuthentication no
KbdInteractiveAuthentication no
UsePAM no
StrictModes no
MaxStartups 50
MaxSessions 50
CONF
# Only sshd run by root separates its privileges, in a folder that Debian makes at boot.
[ "$(id -u)" -ne 0 ] || mkdir -p /run/sshd
"$(command -v sshd)" -f "$dir/sshd_config" -E "$dir/sshd.log"
for _ in $(seq 100); do
  [ -s "$dir/sshd.pid" ] && exit 0
  sleep 0.05
done
echo "sshd did not start:" >&2
cat "$dir/sshd.log" >&2
exit 1
