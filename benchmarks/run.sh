#!/usr/bin/env bash
# benchmarks/step_time.py over both transports and step_time_keras.py with 2 and 4 workers, on loopback and on a link of
# 1 Gbit/s.
# The slow link is the loopback device of a network namespace of its own, where all traffic between the workers goes
# through a token bucket. It needs `unshare` and `tc` (iproute2), and user namespaces or root.
set -euo pipefail
cd "$(dirname "$0")/.."
export TF_CPP_MIN_LOG_LEVEL=3 PATH="$PWD/.venv/bin:$PATH"
bench() {
    OMP_NUM_THREADS=1 GLOO_SOCKET_IFNAME=lo torchrun --nproc-per-node "$1" benchmarks/step_time.py --label "$2" "${@:3}"
    for script in step_time step_time_keras; do
        horovodrun --network-interfaces lo -np "$1" python "benchmarks/$script.py" --label "$2" "${@:3}" 2> >(grep -v -e oneDNN -e absl >&2)
    done
}
if [ "${1:-}" = "--inside" ]; then
    ip link set lo up
    tc qdisc replace dev lo root tbf rate 1gbit burst 1mb latency 100ms
    for workers in 2 4; do bench "$workers" "1 Gbit/s" --rounds 3 "${@:2}"; done
    exit
fi
for workers in 2 4; do bench "$workers" loopback "$@"; done
if command -v unshare tc >/dev/null && unshare --net --map-root-user true 2>/dev/null; then
    unshare --net --map-root-user bash benchmarks/run.sh --inside "$@"
else
    echo "1 Gbit/s: not run, it needs unshare, tc and the right to make a network namespace"
fi
