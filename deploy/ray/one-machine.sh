#!/usr/bin/env bash
# Ray on one machine, in the foreground, with the settings of a cluster: for a server under systemd, or to try a Serve config.
# Ctrl-C or SIGTERM ends it and all it started. Further arguments go to `ray start`.
#
#   deploy/ray/one-machine.sh &
#   serve deploy deploy/serve/laptop.yaml
#
# `octavo serve MODEL` needs none of this: it brings its own Ray and takes it away again.
set -euo pipefail
here="$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)"
set -a
. "$here/cluster.env"
if [ -f ~/.octavo.env ]; then . ~/.octavo.env; fi
# One machine, and nobody else's: waiting for other nodes' proxies would only make a stop slow.
RAY_SERVE_DIRECT_INGRESS_MIN_DRAINING_PERIOD_S=1
ulimit -n "$(ulimit -Hn)"
files="$(ulimit -n)"
if [ "$files" != unlimited ] && [ $((files * 2 / 5 - 100)) -lt "$RAY_SERVE_HAPROXY_MAXCONN" ]; then
  RAY_SERVE_HAPROXY_MAXCONN=$((files * 2 / 5 - 100))
fi
set +a
ray get-auth-token --generate > /dev/null
exec ray start --head --block --dashboard-host=127.0.0.1 --object-store-memory=268435456 "$@"
