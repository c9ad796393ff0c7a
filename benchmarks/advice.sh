#!/usr/bin/env bash
# benchmarks/advice.py on loopback, 1 Gbit/s and 100 Mbit/s with 2 and 4 workers (a quarter of an hour):
#     benchmarks/advice.sh results/advice.jsonl
# On loopback the processors compute; on a link a wait stands for a device that does, as in bandwidth.sh. The models are
# small, so that a message takes at most seconds. It ends with the ratios of predicted to measured step times.
set -euo pipefail
cd "$(dirname "$0")/.."
export TF_CPP_MIN_LOG_LEVEL=3 OMP_NUM_THREADS=1 PATH="$PWD/.venv/bin:$PATH"
out=$(realpath -m "$1")
mkdir -p "$(dirname "$out")"
compare() {
    benchmarks/link.sh "$1" hvd-slowmo run --network-interfaces lo -np "$2" python benchmarks/advice.py --label "$1" \
        --out "$out" "${@:3}"
}
for workers in 2 4; do
    compare none "$workers" --shrink 2
    compare 1gbit "$workers" --shrink 4 --pause 130
    compare 100mbit "$workers" --shrink 4 --pause 130 --rounds 2 --steps 2
done
python - "$out" <<'PYTHON'
import json
import sys

rows = [json.loads(line) for line in open(sys.argv[1])]
for kind in ("median", "least"):
    ratios = [row[f"{kind} predicted"] / row[f"{kind} measured"] for row in rows]
    within = sum(0.85 <= ratio <= 1.15 for ratio in ratios)
    print(f"{kind}: {within} of {len(ratios)} within 15 %, ratios from {min(ratios):.2f} to {max(ratios):.2f}")
PYTHON
