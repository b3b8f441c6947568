#!/usr/bin/env bash
# On a fresh GPU VM with Python 3.11 or newer: install with CUDA, then run the same command as anywhere.
#
#     launch/gpu_vm.sh CONFIG WORKDIR [FLAGS ...]        e.g. launch/gpu_vm.sh configs/demo.py runs/demo
#     DRY_RUN=1 launch/gpu_vm.sh ...                     only says what it would do
set -euo pipefail
cd "$(dirname "$0")/.."
config=${1:?name a recipe, such as configs/demo.py}
workdir=${2:?name the folder of the run}
shift 2
do_it() {
  printf '+'
  printf ' %q' "$@"
  printf '\n'
  if [ -z "${DRY_RUN:-}" ]; then "$@"; fi
}
do_it nvidia-smi --query-gpu=name,memory.total --format=csv
do_it make .venv
do_it .venv/bin/pip install --quiet -e '.[gpu]'
do_it .venv/bin/python -c 'import jax; print(jax.devices())'
# Exit code 75 says: interrupted after a complete save. Until then it is started again.
while true; do
  code=0
  do_it .venv/bin/jaxstages run --config="$config" --workdir="$workdir" "$@" || code=$?
  if [ "$code" -ne 75 ]; then exit "$code"; fi
done
