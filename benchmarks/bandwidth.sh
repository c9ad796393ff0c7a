#!/usr/bin/env bash
# The time of a step over the bandwidth of the link between two workers, and the figure of it (about 15 minutes):
#     benchmarks/bandwidth.sh results/bandwidth.jsonl docs/bandwidth.png
# One run per rate; Horovod's DistributedOptimizer, whose steps take many seconds on the slower links, has a shorter one.
set -euo pipefail
cd "$(dirname "$0")/.."
export TF_CPP_MIN_LOG_LEVEL=3 OMP_NUM_THREADS=1 PATH="$PWD/.venv/bin:$PATH"
measure() {
    benchmarks/link.sh "$1" horovodrun --network-interfaces lo -np 2 python benchmarks/step_time.py --label "$1" \
        --pause 130 --out "$out" "${@:2}"
}
out=$(realpath -m "$1")
mkdir -p "$(dirname "$out")"
for rate in 1gbit 250mbit 100mbit; do
    measure "$rate" --rounds 3 --methods "PyTorch PostLocalSGD" "ours: SlowMo" "ours: SlowMo, streamed" \
        "ours: SlowMo, streamed, 8 bits, 1 late"
    measure "$rate" --rounds 1 --steps 4 --methods "Horovod DistributedOptimizer"
done
python benchmarks/bandwidth_figure.py "$out" "$2"
