#!/usr/bin/env bash
# Measures again what README.md, RESULTS.md and the configs' headers state, and prints what was measured then and now.
#
#     launch/reproduce.sh [--cifar10] [FOLDER]
#
# FOLDER (default: runs/reproduce), which must be new, gets the runs and what each command printed. Nothing is downloaded,
# but for CIFAR-10 where --cifar10 asks for its ten epochs too and it is not cached yet. The commands are those of a user,
# run in FOLDER; `parameters` and `killed` are functions below. Speeds are those of two idle cores of a Xeon: a busy machine
# misses them. Exit codes: 0 all claims hold, 1 one does not or could not be measured, 2 wrong arguments.
#
# To set, where the default does not suit: PYTHON=python.
set -euo pipefail
shopt -s extglob

# claim|command|file and key of its number, or seconds: what the command took|measured then|holds where it is
claims=(
  "digits, test accuracy|python -m vit_jax.main --config digits --workdir digits|digits/summary.json test_accuracy|99.44 %|within 0.84"
  "digits, seconds of training|python -m vit_jax.main --config digits --workdir digits|digits/summary.json train_seconds|70|at most 74"
  "digits, images/s|python -m vit_jax.main --config digits --workdir digits|digits/summary.json images_per_second|2,091|at least 1953"
  "digits, parameters|python -m vit_jax.main --config digits --workdir digits|digits/summary.json parameters|136,010|exact"
  "main --help, seconds|python -m vit_jax.main --help|seconds|0.15|at most 0.45"
  "importing what trains, seconds|python -c 'from vit_jax.training import loop'|seconds|2.4|at most 7.2"
  "cifar100_tiny:reference, bare images/s|python -m vit_jax.benchmark --config cifar100_tiny:reference --bare --json tiny.json|tiny.json images_per_second|130.4|at least 65"
  "cifar10_tinyvit, bare images/s|python -m vit_jax.benchmark --config cifar10_tinyvit --bare --json tinyvit.json|tinyvit.json images_per_second|495.5|at least 248"
  "arrays that differ after kill -9|killed|killed.json differing|0|exact"
  "cifar10_tinyvit, parameters|parameters|parameters.json cifar10_tinyvit|208,202|exact"
  "its reference|parameters|parameters.json cifar10_tinyvit:reference|208,074|exact"
  "cifar100_tiny, parameters|parameters|parameters.json cifar100_tiny|1,515,940|exact"
  "for the CPU|parameters|parameters.json cifar100_tiny:cpu|1,529,764|exact"
  "its reference|parameters|parameters.json cifar100_tiny:reference|1,528,228|exact"
  "cifar10_vit, parameters|parameters|parameters.json cifar10_vit|6,167,562|exact"
  "its reference|parameters|parameters.json cifar10_vit:reference|6,268,810|exact"
  "cifar100_vit, parameters|parameters|parameters.json cifar100_vit|6,190,692|exact"
  "its reference|parameters|parameters.json cifar100_vit:reference|6,303,460|exact"
  "svhn_vit, parameters|parameters|parameters.json svhn_vit|6,167,562|exact"
  "its reference|parameters|parameters.json svhn_vit:reference|6,268,810|exact"
  "tiny_imagenet_vit, parameters|parameters|parameters.json tiny_imagenet_vit|6,288,520|exact"
  "its reference|parameters|parameters.json tiny_imagenet_vit:reference|21,264,072|exact"
  "tiny_imagenet_ti16, parameters|parameters|parameters.json tiny_imagenet_ti16|5,563,016|exact"
)
with_cifar10=(
  "cifar10_tinyvit, test accuracy|python -m vit_jax.main --config cifar10_tinyvit --workdir cifar10|cifar10/summary.json test_accuracy|79.05 %|within 1"
  "cifar10_tinyvit, images/s|python -m vit_jax.main --config cifar10_tinyvit --workdir cifar10|cifar10/summary.json images_per_second|772|at least 386"
)

wrong() {
  echo "error: $1" >&2
  exit 2
}

if [[ ${1:-} == --cifar10 ]]; then
  claims+=("${with_cifar10[@]}")
  shift
fi
if (($# > 1)) || [[ ${1:-} == -* ]]; then
  wrong "usage: launch/reproduce.sh [--cifar10] [FOLDER], as launch/reproduce.sh runs/reproduce"
fi
folder=${1:-runs/reproduce}
[[ ! -e $folder ]] || wrong "$folder is there already: give another folder, for what is there would not be measured again"
python=$(command -v "${PYTHON:-python}") || wrong "no ${PYTHON:-python}: set PYTHON"
[[ $python != */* ]] || python=$(cd "$(dirname "$python")" && pwd)/$(basename "$python")
root=$(cd "$(dirname "$0")/.." && pwd)
export PYTHONPATH=$root${PYTHONPATH:+:$PYTHONPATH} # this checkout is measured, whatever is installed
mkdir -p "$folder"
cd "$folder"

python() { "$python" "$@"; }

# Counts the parameters of the configs that the claims name, without their data.
parameters() {
  printf '%s\n' "${claims[@]}" > claims.txt
  python - << 'COUNT'
import json
import pathlib

import jax

from vit_jax import command_line
from vit_jax.data.stand_in import stand_in
from vit_jax.training import mesh, setup

found = {}
for claim in pathlib.Path("claims.txt").read_text().splitlines():
    _, command, source, *_ = claim.split("|")
    if command == "parameters":
        name = source.split()[1]
        config, _ = command_line.parse(name, [])
        train = stand_in(config.data.name).train
        devices = mesh.make_mesh(1)
        config = setup.resolve_data(setup.resolve_model(config), train, devices)
        shapes = setup.make_classifier(config, len(train.class_names), devices).shapes()
        found[name] = sum(leaf.size for leaf in jax.tree.leaves(shapes))
pathlib.Path("parameters.json").write_text(json.dumps(found))
COUNT
}

# Trains on digits, and does it again with a kill -9 after the first checkpoint; counts the arrays of weights that differ.
killed() {
  local run=("$python" -m vit_jax.main --config digits --config.train.epochs=20 --config.checkpoint.every=4) process name
  "${run[@]}" --workdir whole || return
  "${run[@]}" --workdir killed &
  process=$!
  until compgen -G "killed/checkpoints/+([0-9])" > /dev/null; do
    kill -0 "$process" || return
    sleep 0.1
  done
  kill -KILL "$process" || return
  wait "$process" || true
  "${run[@]}" --workdir killed || return
  for name in whole killed; do
    python -m vit_jax.export --workdir "$name" --format npz --output "$name.npz" || return
  done
  python - << 'COMPARE'
import json
import pathlib

import numpy as np

whole, killed = (np.load(f"{name}.npz") for name in ("whole", "killed"))
assert whole.files == killed.files
differing = sum(whole[name].tobytes() != killed[name].tobytes() for name in whole.files)
pathlib.Path("killed.json").write_text(json.dumps({"differing": differing}))
COMPARE
}

TIMEFORMAT=%R
last='' number=0
for claim in "${claims[@]}"; do
  IFS='|' read -r _ command _ <<< "$claim"
  if [[ $command != "$last" ]]; then
    last=$command number=$((number + 1)) code=0
    echo "$command"
    { time eval "$command" &> "$number.log" || code=$?; } 2> seconds.txt
    ((code == 0)) || echo "it ended with exit code $code: see $folder/$number.log"
  fi
  echo "$claim|$code|$(< seconds.txt)" >> measured.txt
done

python - << 'TABLE'
import json
import pathlib
import sys


def measured(source, code, seconds):
    """The number, None where there is none."""
    if source == "seconds" or code != "0":
        return float(seconds) if code == "0" else None
    file, key = source.split()
    try:
        found = json.loads(pathlib.Path(file).read_text())
        return (found[0] if isinstance(found, list) else found)[key]
    except (OSError, ValueError, LookupError):
        return None


def holds(now, then, rule):
    kind, _, bound = rule.rpartition(" ")
    return {
        "": lambda: now == then,
        "within": lambda: abs(now - then) <= float(bound),
        "at least": lambda: now >= float(bound),
        "at most": lambda: now <= float(bound),
    }[kind]()


failed = 0
print(f"{'claim':<40}{'then':>12}{'now':>12}  {'tolerance':<14}{'holds':<7}command")
for line in pathlib.Path("measured.txt").read_text().splitlines():
    claim, command, source, text, rule, code, seconds = line.split("|")
    number, percent = text.removesuffix(" %"), text.endswith("%")
    now, then = measured(source, code, seconds), float(number.replace(",", ""))
    if now is None:
        cell, good = "none", False
    else:
        now *= 100 if percent else 1
        cell, good = f"{now:,.{len(number.partition('.')[2])}f}" + " %" * percent, holds(now, then, rule)
    failed += not good
    print(f"{claim:<40}{text:>12}{cell:>12}  {rule:<14}{'yes' if good else 'NO':<7}{command}")
if failed:
    sys.exit(1)
TABLE
