#!/usr/bin/env bash
# A command on a network of its own, where nobody else's traffic is counted or slows it down:
#     benchmarks/link.sh 1gbit horovodrun --network-interfaces lo -np 4 python benchmarks/gossip_transport.py
# The network is the loopback device of a new network namespace. All workers share it: the rate is the sum of what all of
# them may send. "none" in place of a rate leaves it as fast as it is. It needs `unshare` and `tc` (iproute2), and user
# namespaces or root.
set -euo pipefail
if [ "$1" = "--inside" ]; then
    ip link set lo up
    [ "$2" = none ] || tc qdisc replace dev lo root tbf rate "$2" burst 1mb latency 100ms
    exec "${@:3}"
fi
exec unshare --net --map-root-user bash "$0" --inside "$@"
