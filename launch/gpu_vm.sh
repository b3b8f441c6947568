#!/usr/bin/env bash
# On a GPU VM: install with CUDA, then run the same command as anywhere.
#
#     launch/gpu_vm.sh CONFIG WORKDIR [FLAGS ...]        e.g. launch/gpu_vm.sh configs/demo.py runs/demo
#
# On several, from one machine that reaches all of them by ssh: the first of HOSTS is process 0, which listens at port
# 8476 of the address by which it is named here. WORKDIR must lie on storage that all of them share.
#
#     export HOSTS="10.0.0.2 10.0.0.3"
#     launch/gpu_vm.sh install                           copy this folder to all of them, and install it there
#     launch/gpu_vm.sh start CONFIG WORKDIR [FLAGS ...]  on all of them, in a session that outlives the connection
#     launch/gpu_vm.sh attach                            that session on the first; Ctrl-b d leaves it
#     launch/gpu_vm.sh logs                              what it prints there
#     launch/gpu_vm.sh state                             whether it runs, on all of them
#     launch/gpu_vm.sh stop                              save, and exit on all of them
#
# A command that ends with code 75 is restarted, on one machine and on several. DRY_RUN=1 only prints the commands.
set -euo pipefail
cd "$(dirname "$0")/.."
# shellcheck source=launch/do_it.sh
. launch/do_it.sh
read -ra hosts <<<"${HOSTS:-}"

here() {
  local config=${1:?name a recipe, such as configs/demo.py}
  local workdir=${2:?name the folder of the run}
  shift 2
  do_it nvidia-smi --query-gpu=name,memory.total --format=csv
  local python=python3
  if [ -z "${DRY_RUN:-}" ]; then python=$(launch/python.sh); fi
  do_it make PYTHON="$python" .venv
  do_it .venv/bin/pip install --quiet -e '.[gpu,bucket]'
  do_it .venv/bin/python -c 'import jax; print(jax.devices())'
  exec launch/again.sh .venv/bin/jaxstages run --config="$config" --workdir="$workdir" "$@"
}

install() {
  local file=${TMPDIR:-/tmp}/jaxstages.tar.gz host
  pack "$file"
  for host in "${hosts[@]}"; do
    do_it scp "$file" "$host:jaxstages.tar.gz"
    do_it ssh "$host" "$(unpacked gpu)"
  done
}

start() {
  local config=${1:?name a recipe, such as configs/demo.py}
  local workdir=${2:?name the folder of the run, on storage that all hosts share}
  shift 2
  local i
  for i in "${!hosts[@]}"; do
    do_it ssh "${hosts[i]}" "cd jaxstages && launch/background.sh start .venv/bin/jaxstages run$(quoted \
      --coordinator="${hosts[0]#*@}:8476" --process_count="${#hosts[@]}" --process_id="$i" \
      --config="$config" --workdir="$workdir" "$@")"
  done
}

on_all() {
  local host
  for host in "${hosts[@]}"; do do_it ssh "$host" "cd jaxstages && launch/background.sh $1"; done
}

if [ "${#hosts[@]}" -eq 0 ]; then here "$@"; fi
command=${1:?install, start, attach, logs, state or stop}
shift
case $command in
  install | start) "$command" "$@" ;;
  attach | logs) do_it ssh -t "${hosts[0]}" "cd jaxstages && launch/background.sh $command" ;;
  state | stop) on_all "$command" ;;
  *)
    echo "gpu_vm.sh: $command is none of install, start, attach, logs, state, stop" >&2
    exit 2
    ;;
esac
