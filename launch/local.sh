#!/usr/bin/env bash
# Trains with several processes on this machine.
#
#     launch/local.sh 2 configs/digits.py --workdir runs/two --config.train.epochs=10
#     launch/local.sh N CONFIG.py[:VARIANT] [arguments of vit_jax.main]
#
# GPUs are dealt out evenly; on the CPU the processes share its cores, which is good for trying several of them. Ctrl-C
# and SIGTERM reach all of them: they save and end. When one fails the others end too. The same command goes on. The
# exit code is that of the process that failed first, 75 where all were stopped after saving.
#
# To set, where the defaults do not suit: PYTHON=python, PORT=(a free one) for process 0, and CUDA_VISIBLE_DEVICES.
set -euo pipefail

if [[ $# -lt 2 || ! $1 =~ ^[1-9][0-9]*$ ]]; then
  echo "error: usage: launch/local.sh N CONFIG [arguments], with N processes, as launch/local.sh 2 configs/digits.py" >&2
  exit 2
fi
count=$1 config=$2
shift 2
python=${PYTHON:-python}
grace=40 # seconds for the others to end, when one has failed
port=${PORT:-$("$python" -c 'import socket; s = socket.socket(); s.bind(("", 0)); print(s.getsockname()[1])')}

gpus=0
if [[ ${JAX_PLATFORMS:-} != cpu ]] && command -v nvidia-smi > /dev/null; then
  gpus=$(nvidia-smi -L 2> /dev/null | grep -c '^GPU' || true)
  if [[ -n ${CUDA_VISIBLE_DEVICES:-} ]]; then
    IFS=, read -ra visible <<< "$CUDA_VISIBLE_DEVICES"
    gpus=${#visible[@]}
  fi
fi
share=$((gpus / count))
if ((gpus > 0 && share == 0)); then
  echo "error: $count processes for $gpus GPUs: give at most $gpus, or JAX_PLATFORMS=cpu" >&2
  exit 2
fi

pids=()
forward() {
  for pid in "${pids[@]+"${pids[@]}"}"; do kill "-$1" "$pid" 2> /dev/null || true; done
}
for signal in INT TERM USR1; do
  # shellcheck disable=SC2064 # the signal's name is meant now
  trap "forward $signal" "$signal"
done
trap 'forward TERM' HUP

set -m # process groups of their own: Ctrl-C reaches them from here alone, and once
for ((i = 0; i < count; i++)); do
  if ((share > 0)); then
    export JAX_LOCAL_DEVICE_IDS
    JAX_LOCAL_DEVICE_IDS=$(seq -s, $((i * share)) $((i * share + share - 1)))
  fi
  "$python" -m vit_jax.main --config "$config" "$@" \
    --coordinator "localhost:$port" --num_processes "$count" --process_id "$i" < /dev/null &
  pids+=($!)
done
set +m

code=0
deadline=
while ((${#pids[@]})); do
  sleep 0.2 || true # it ends early where a signal comes
  running=()
  for pid in "${pids[@]}"; do
    if kill -0 "$pid" 2> /dev/null; then
      running+=("$pid")
      continue
    fi
    status=0
    wait "$pid" || status=$?
    if ((status && !code)); then
      code=$status
      deadline=$((SECONDS + grace))
      ((code == 75)) || echo "a process ended with exit code $code; the others end too" >&2
    fi
  done
  pids=("${running[@]+"${running[@]}"}")
  if [[ -n $deadline ]] && ((SECONDS > deadline)); then
    forward KILL
  fi
done
exit "$code"
