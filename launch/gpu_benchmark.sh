#!/usr/bin/env bash
# Times training on one GPU, beside PyTorch where that is installed, and prints one table last.
#
#     launch/gpu_benchmark.sh [FOLDER]
#
# In this order, as far as the time goes: CIFAR-100 with 1.5M and with 6.2M parameters and ViT-B/16 at 224 pixels, bare
# and in turn with PyTorch; the first two again with all their augmentation, what each part takes, and a profile; how
# the cost of the smallest grows with the batch; ViT-B/16 again with all of it. FOLDER (default: runs/gpu_benchmark) gets
# the rows as JSON, what each run printed, and the traces. Data sets need not be here. What failed or was left out for
# want of time is named; the exit code is 0 if every run ended well, else 1.
#
# To set, where the defaults do not suit: PYTHON=python, MINUTES=9 for all of it, and CUDA_VISIBLE_DEVICES.
set -euo pipefail

if (($# > 1)) || [[ ${1:-} == -* ]]; then
  echo "error: usage: launch/gpu_benchmark.sh [FOLDER], as launch/gpu_benchmark.sh runs/gpu_benchmark" >&2
  exit 2
fi
minutes=${MINUTES:-9}
if ! [[ $minutes =~ ^[1-9][0-9]{0,3}$ ]]; then
  echo "error: MINUTES=$minutes: give a whole number of minutes, as MINUTES=9" >&2
  exit 2
fi
folder=${1:-runs/gpu_benchmark} python=${PYTHON:-python}
limit=$((60 * minutes - 10)) # seconds; the rest is for the table
mkdir -p "$folder"
rm -f "$folder"/*.json "$folder"/*.log # of an earlier time
failed=0

# run NAME ARGUMENTS: a benchmark whose rows go to FOLDER/NAME.json, given the time that is left
run() {
  local name=$1 left=$((limit - SECONDS)) code=0
  shift
  if ((left < 30)); then
    echo "$name: left out, the time is over"
    failed=1
    return
  fi
  timeout --kill-after=5 "$left" "$python" -m vit_jax.benchmark --windows 3 --seconds 1 --json "$folder/$name.json" "$@" \
    > "$folder/$name.log" 2>&1 || code=$?
  if ((code)); then
    echo "$name: exit code $code, see $folder/$name.log"
    failed=1
  else
    echo "$name: done after $SECONDS s"
  fi
}

beside=--bare
if "$python" -c 'import torch; raise SystemExit(not torch.cuda.is_available())' 2> /dev/null; then
  beside=--peer
else
  echo "no PyTorch that sees a GPU: timed without it"
fi
tiny=(--config configs/cifar100_tiny.py --config.train.batch_size=1024 --config.train.dtype=bfloat16)
small=(--config configs/cifar100_vit.py --config.train.batch_size=1024)
base=(--config configs/cifar100_b16.py --config.optim.accumulate=4)

run tiny_bare "${tiny[@]}" "$beside"
run small_bare "${small[@]}" "$beside"
run base_bare "${base[@]}" "$beside"
run tiny "${tiny[@]}" --profile "$folder/tiny_trace"
run small "${small[@]}" --profile "$folder/small_trace"
run tiny_sweep "${tiny[@]}" --sweep batch=256,512,1024,2048
run base "${base[@]}"

"$python" - "$folder" << 'TABLE'
import json
import pathlib
import sys


def cell(value, form):
    return "" if value is None else format(value, form)


print(f"{'run':<12}{'':<7}{'batch':>6}{'images/s':>10}{'ms/step':>9}{'spread':>8}{'MFU':>7}{'x torch':>8}{'cold s':>8}"
      f"{'warm s':>8}{'MiB':>8}{'augm.':>7}{'optim.':>7}{'eval.':>7}{'saving':>7}")
for path in sorted(pathlib.Path(sys.argv[1]).glob("*.json"), key=lambda path: path.stat().st_mtime_ns):
    for row in json.loads(path.read_text()):
        parts, memory = row.get("parts") or {}, row["peak_memory_bytes"]
        shares = [parts.get(name) for name in ("augmentation", "optimizer_and_ema", "evaluation", "checkpointing")]
        print(f"{path.stem:<12}{'torch' if 'torch' in row else 'ours':<7}{row['batch_size']:>6}"
              f"{row['images_per_second']:>10.0f}{row['milliseconds_per_step']:>9.2f}{row['spread']:>8.1%}"
              f"{cell(row['mfu'], '.1%'):>7}{cell(row.get('ratio_to_peer'), '.2f'):>8}{row['compile_seconds']:>8.1f}"
              f"{cell(row.get('compile_seconds_warm'), '.1f'):>8}{cell(memory and memory / 2**20, '.0f'):>8}"
              + "".join(f"{cell(share, '.1%'):>7}" for share in shares))
TABLE
exit "$failed"
