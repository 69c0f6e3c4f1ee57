#!/usr/bin/env bash
# Stops the cluster that start.sh started on this port, and no other (`ray stop` stops every cluster of the machine).
#
# Usage: [PORT=6379] stop.sh
set -euo pipefail

port=${PORT:-6379}
folder=/tmp/datm-ray-$(id -u)/$port

pid=$(cat "$folder/pid" 2>/dev/null || true)
# A number may have gone to another process since.
if [[ -z $pid ]] || ! ps -ww -o command= -p "$pid" | grep -qF -- "--temp-dir=$folder"; then
    rm -f "$folder/pid"
    echo "No cluster that start.sh started runs on port $port."
    exit 0
fi

kill -TERM "$pid"
for ((waited = 0; waited < 60; waited++)); do
    kill -0 -- "-$pid" 2>/dev/null || break # the whole group
    sleep 0.5
done
kill -KILL -- "-$pid" 2>/dev/null || true
rm -f "$folder/pid"
echo "The cluster on port $port has stopped. Its logs are in $folder."
