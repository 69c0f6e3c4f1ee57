#!/usr/bin/env bash
# Starts a Ray cluster of this machine alone, which stays for many runs and jobs; stop.sh ends it, and no other.
#
# Usage: [PORT=6379] [DASHBOARD_PORT=8265] [METRICS_PORT=8080] start.sh [option of `ray start`]...
# A second cluster beside the first wants three other ports. RAY_AUTH_MODE=disabled does without the token.
set -euo pipefail

port=${PORT:-6379} dashboard=${DASHBOARD_PORT:-8265} metrics=${METRICS_PORT:-8080}
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
home=/tmp/datm-ray-$(id -u) # short, for sockets below it may not have paths of more than 107 characters
folder=$home/$port
log=$folder/start.log

fail() {
    echo "$1" >&2
    exit 2
}

command -v ray >/dev/null || PATH=$here/../../.venv/bin:$PATH
command -v ray >/dev/null || fail "There is no command ray: activate the environment that datm-ray is installed in."

[[ -d $home ]] || mkdir -m 700 "$home"
[[ -O $home && ! -L $home ]] || fail "$home belongs to someone else: remove it, for what is in it could be theirs."
chmod 700 "$home"
mkdir -p "$folder"
if [[ -e $folder/pid ]] && ps -ww -o command= -p "$(<"$folder/pid")" | grep -qF -- "--temp-dir=$folder"; then
    fail "A cluster runs on port $port already: $here/stop.sh stops it, PORT=... starts another."
fi

# Ray's own ports listen on all interfaces, and whoever reaches them may run programs. The token keeps others out.
export RAY_AUTH_MODE=${RAY_AUTH_MODE:-token}
if [[ $RAY_AUTH_MODE == token ]]; then
    answer=$(umask 077 && ray get-auth-token --generate 2>&1) ||
        fail "There is no token: $(tail -n 1 <<<"$answer") Ray 2.52 and newer make one; RAY_AUTH_MODE=disabled does without."
    for made in ~/.ray ~/.ray/auth_token; do # Ray itself leaves them to be read by all
        [[ ! -O $made ]] || chmod go= "$made"
    done
fi
ulimit -n 65536 2>/dev/null || ulimit -n "$(ulimit -Hn)" # connections and files at a time
# Who stops the cluster means it; Ray would wait half a minute for actors that are at work.
export RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S=${RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S:-0}

: >"$log"
set -m # so that the cluster is a process group of its own
nohup ray start --head --block --disable-usage-stats --include-dashboard=true --temp-dir="$folder" --port="$port" \
    --dashboard-host=127.0.0.1 --dashboard-port="$dashboard" --metrics-export-port="$metrics" \
    --dashboard-agent-listen-port=0 --min-worker-port=0 --max-worker-port=0 --ray-client-server-port="$((port + 1))" \
    "$@" >"$log" 2>&1 </dev/null &
pid=$!
echo "$pid" >"$folder/pid"

for ((waited = 0; waited < 240; waited++)); do
    grep -q "Ray runtime started" "$log" && break
    if ! kill -0 "$pid" 2>/dev/null; then
        rm -f "$folder/pid"
        fail "Ray did not start: $(tail -n 1 "$log") (all of it: $log)"
    fi
    sleep 0.5
done
if ((waited == 240)); then
    PORT=$port "$here/stop.sh" >/dev/null
    fail "Ray did not start in two minutes; see $log"
fi

echo "Ray runs on port $port, dashboard http://127.0.0.1:$dashboard, metrics on port $metrics, logs in $folder."
[[ $RAY_AUTH_MODE != token ]] || echo "It asks for the token of \`ray get-auth-token\`. Once in each terminal:

    export RAY_AUTH_MODE=token
"
echo "Next: datm-ray run digits-ipc1 --address 127.0.0.1:$port
or:   datm-ray job submit digits-ipc1 --address http://127.0.0.1:$dashboard --out $PWD/runs
Stop: ${PORT:+PORT=$port }$here/stop.sh"
