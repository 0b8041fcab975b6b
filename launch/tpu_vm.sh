#!/usr/bin/env bash
# Trains on a Cloud TPU, one host or a pod: makes it, installs, starts all its workers, follows the log, deletes it.
#
#     export PROJECT=my-project ZONE=us-west4-a BUCKET=my-bucket
#     launch/tpu_vm.sh --dry-run run configs/cifar100_vit.py     # prints every command, and does and costs nothing
#     launch/tpu_vm.sh run configs/cifar100_vit.py               # all of the below; deletes the TPU when it is done
#     launch/tpu_vm.sh up | train CONFIG [arguments of vit_jax.main] | log | stop | down
#
# A TPU COSTS MONEY from `up` to `down`, idle or not; `run` leaves it up where something fails, and says so. Training
# goes on when this script or the connection ends: `log` follows it again. After a preemption: `down`, then the same
# `run`, which goes on from what is in the bucket.
#
# To set in the environment:
#   PROJECT, ZONE            where (needed), and NAME (vit-jax)
#   ACCELERATOR, RUNTIME     what (v5litepod-8, v2-alpha-tpuv5-lite)
#   QUEUED=1                 waits in the queue for it; 0 asks for a VM at once
#   SPOT=1                   cheaper, and can be taken away; 0 for on-demand
#   BUCKET                   a Cloud Storage bucket (with a hierarchical namespace, for folders are renamed in it) for
#                            runs/, which all workers mount and which outlives the TPU. Without it runs/ lies on the
#                            TPU's own disk: for one host only, and gone with it
# It needs gcloud, logged in, and is called in a clone of the repository: what is committed there is what is installed.
# shellcheck disable=SC2016 # in single quotes is what the workers shall expand
set -euo pipefail

dry=
if [[ ${1:-} == --dry-run ]]; then
  dry=1
  shift
fi
action=${1:-}
shift || true

if [[ ! $action =~ ^(run|up|train|log|stop|down)$ || ($action =~ run|train && $# == 0) ]]; then
  echo "error: usage: launch/tpu_vm.sh [--dry-run] run CONFIG [arguments] | up | train CONFIG | log | stop | down" >&2
  exit 2
fi
if [[ -z ${PROJECT:-} || -z ${ZONE:-} ]]; then
  echo "error: set PROJECT, the Google Cloud project, and ZONE, as us-west4-a" >&2
  exit 2
fi
name=${NAME:-vit-jax}
place=(--project="$PROJECT" --zone="$ZONE")
what=(--accelerator-type="${ACCELERATOR:-v5litepod-8}")
runtime=${RUNTIME:-v2-alpha-tpuv5-lite}
spot=()
[[ ${SPOT:-1} == 1 ]] && spot=(--spot)
queued=${QUEUED:-1}
bucket=${BUCKET:-}

call() {
  if [[ -n $dry ]]; then
    printf '%q ' "$@"
    echo
  else
    "$@"
  fi
}

on() { # on WORKER COMMAND: in bash on that worker, or on all
  call gcloud compute tpus tpu-vm ssh "$name" "${place[@]}" --worker="$1" --command="$2"
}

up() {
  if [[ $queued == 1 ]]; then
    call gcloud compute tpus queued-resources create "$name" "${place[@]}" --node-id="$name" "${what[@]}" \
      --runtime-version="$runtime" "${spot[@]}"
    wait_for_it
  else
    call gcloud compute tpus tpu-vm create "$name" "${place[@]}" "${what[@]}" --version="$runtime" "${spot[@]}"
  fi

  local archive=${TMPDIR:-/tmp}/$name.tar.gz remote
  call git archive --format=tar.gz --output="$archive" HEAD
  call gcloud compute tpus tpu-vm scp "$archive" "$name:vit_jax.tar.gz" "${place[@]}" --worker=all
  # The machines' own Python is older than what the package needs.
  remote='set -e
    mkdir -p vit_jax/runs
    tar -xzf vit_jax.tar.gz -C vit_jax
    python3 -m pip install --quiet --user uv
    ~/.local/bin/uv venv --quiet --python 3.12 venv
    ~/.local/bin/uv pip install --quiet --python venv/bin/python -e "vit_jax[tpu]"'
  if [[ -n $bucket ]]; then
    remote+='
    key=/usr/share/keyrings/cloud.google.asc packages=https://packages.cloud.google.com/apt
    curl -fsS "$packages/doc/apt-key.gpg" | sudo tee "$key" > /dev/null
    echo "deb [signed-by=$key] $packages gcsfuse-$(lsb_release -cs) main" |
      sudo tee /etc/apt/sources.list.d/gcsfuse.list
    sudo apt-get -qq update
    sudo apt-get -qq install -y gcsfuse
    mountpoint -q vit_jax/runs ||
      gcsfuse --implicit-dirs --metadata-cache-ttl-secs 0 '"$(printf %q "$bucket")"' vit_jax/runs'
  fi
  on all "$remote"
}

wait_for_it() {
  [[ -n $dry ]] && return
  local state=
  until [[ $state == ACTIVE ]]; do
    state=$(gcloud compute tpus queued-resources describe "$name" "${place[@]}" --format='value(state.state)')
    echo "$(date +%T) $name: $state"
    case $state in
      FAILED | SUSPENDED | SUSPENDING) return 1 ;;
      ACTIVE) ;;
      *) sleep 30 ;;
    esac
  done
}

train() {
  local config=$1 arguments command
  shift
  printf -v arguments ' %q' --config "$config" "$@" --coordinator auto
  # It outlives the connection; its exit code is left in a file.
  printf -v command %q "../venv/bin/python -m vit_jax.main$arguments; echo \$? > ../code"
  on all "cd vit_jax && rm -f ../code &&
    (setsid nohup bash -c $command > ../train.log 2>&1 < /dev/null & echo \$! > ../pid)"
}

log() {
  on 0 'tail -n +1 --pid="$(cat pid)" -F train.log; exit "$(cat code)"'
}

stop() { # it saves first; the same `train` goes on
  on all 'pkill -TERM -P "$(cat pid)"'
}

down() {
  if [[ $queued == 1 ]]; then
    call gcloud compute tpus queued-resources delete "$name" "${place[@]}" --force --quiet
  else
    call gcloud compute tpus tpu-vm delete "$name" "${place[@]}" --quiet
  fi
}

case $action in
  run)
    trap 'echo "the TPU $name is still up, and costs money: launch/tpu_vm.sh down" >&2' EXIT
    up
    train "$@"
    log
    down
    trap - EXIT
    ;;
  *) "$action" "$@" ;;
esac
