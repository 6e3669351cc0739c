#!/usr/bin/env bash
# What meshwright does, in two minutes: a plan for a model that needs 64 GPUs, then plans that run here, one with generated kernels.
set -euo pipefail
cd "$(dirname "$0")/../.."
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
run() { printf '\n$ %s\n' "$*"; "$@"; }

run meshwright plan examples/models/llama-3.1-70b.json --cluster 8x8xH100-SXM --global-batch 1024 --seq 8192

printf '\nNow a small model on four CPU ranks of this machine, and the same model on one.\n'
small=(examples/models/tiny-llama.json --global-batch 16 --seq 64)
run meshwright plan "${small[@]}" --cluster 4xcpu --fix tp=2,pp=2,micro_batch=4 -o "$work/four.json"
run meshwright plan "${small[@]}" --cluster 1xcpu -o "$work/one.json" >/dev/null
run meshwright emit "$work/four.json" -o "$work/four"
run meshwright emit "$work/one.json" -o "$work/one"
bash "$work/four/launch.sh" --steps 20 >"$work/four.log"
bash "$work/one/launch.sh" --steps 20 >"$work/one.log"

python - "$work/four.log" "$work/one.log" <<'PY'
import sys

def losses(path):
    return [float(line.split()[3]) for line in open(path) if line.startswith("step ")]

four, one = (losses(path) for path in sys.argv[1:])
if not (len(four) == len(one) == 20):
    sys.exit(f"expected 20 losses of each run, found {len(four)} and {len(one)}")
print("\nstep   4 ranks (tp=2 pp=2)   1 process   difference")
for step, (a, b) in enumerate(zip(four, one)):
    print(f"{step:4d}   {a:19.6f}   {b:9.6f}   {a - b:+.6f}")
worst = max(abs(a - b) / b for a, b in zip(four, one))
print(f"largest relative difference: {worst:.1e}")
if worst > 1e-4:
    sys.exit("the losses of the two layouts differ")
PY

printf '\nAnd with generated kernels on two ranks. Without a GPU they run in Triton'\''s interpreter: right, and slow.\n'
run meshwright plan examples/models/tiny-llama.json --global-batch 4 --seq 32 --cluster 2xcpu --fix tp=2,micro_batch=4 --kernels auto \
  -o "$work/kernels.json" >/dev/null
printf '\n$ meshwright kernels show kernels.json | head\n'
meshwright kernels show "$work/kernels.json" >"$work/kernels.txt"
sed -n 1,10p "$work/kernels.txt"
run meshwright run "$work/kernels.json" --steps 3
