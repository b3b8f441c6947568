#!/usr/bin/env bash
# Train on a TPU VM, or on a pod slice of any number of hosts, from your own machine, through gcloud.
#
#     export NAME=demo ZONE=us-central2-b TYPE=v4-32
#     launch/tpu_vm.sh run CONFIG WORKDIR [FLAGS ...]
#         create, install, start, and look after it every POLL seconds (60): what was preempted is made again, and
#         goes on. Ends with the exit code of the training. The TPU stays: delete it when you are done.
#
# or one by one:
#     launch/tpu_vm.sh create                           ask for it, and wait until it is there
#     launch/tpu_vm.sh install                          copy this folder to all workers, and install it there
#     launch/tpu_vm.sh start CONFIG WORKDIR [FLAGS ...] on all workers, in a session that outlives the connection
#     launch/tpu_vm.sh attach                           that session on worker 0 (WORKER=3: on that); Ctrl-b d leaves
#     launch/tpu_vm.sh logs                             what it prints there
#     launch/tpu_vm.sh state                            whether it runs, on all workers
#     launch/tpu_vm.sh stop                             it saves, and ends everywhere
#     launch/tpu_vm.sh delete
#
# QUEUED=1 asks through a queued resource, SPOT=1 for what may be taken away, RUNTIME=... for another image.
# WORKDIR is a folder in a bucket, gs://BUCKET/runs/demo, or on a disk that all workers share: SETUP='sudo mount ...' is
# run on all of them before the installation. DRY_RUN=1 only says what would be done.
set -euo pipefail
cd "$(dirname "$0")/.."
# shellcheck source=launch/do_it.sh
. launch/do_it.sh
: "${NAME:?name the TPU}" "${ZONE:?name its zone}"
poll=${POLL:-60}

tpus() { do_it gcloud compute tpus "$@" --zone="$ZONE"; }
on_all() { tpus tpu-vm ssh "$NAME" --worker=all --command="$1"; }
on_one() { do_it gcloud compute tpus tpu-vm ssh "$NAME" --zone="$ZONE" --worker="${WORKER:-0}" --command="$1" -- -t; }

create() {
  : "${TYPE:?name its type, such as v5litepod-16}"
  local runtime=${RUNTIME:-v2-alpha-tpuv5-lite} spot=()
  if [ -n "${SPOT:-}" ]; then spot=(--spot); fi
  if [ -n "${QUEUED:-}" ]; then
    tpus queued-resources create "$NAME" --node-id="$NAME" --accelerator-type="$TYPE" --runtime-version="$runtime" \
      ${spot[@]+"${spot[@]}"}
  else
    tpus tpu-vm create "$NAME" --accelerator-type="$TYPE" --version="$runtime" ${spot[@]+"${spot[@]}"}
  fi
}

# A state as gcloud tells it; NONE where there is no such thing, UNKNOWN where it could not be asked.
ask() {
  local told
  if told=$(gcloud compute tpus "$1" describe "$NAME" --zone="$ZONE" --format="value($2)" 2>&1); then
    tail -n 1 <<<"$told"
  elif [[ $told == *NOT_FOUND* ]]; then
    echo NONE
  else
    echo UNKNOWN
  fi
}

# READY, WAITING, FAILED, GONE (taken away, its name is still there) or ABSENT.
state_of() {
  if [ -n "${QUEUED:-}" ]; then
    case $(ask queued-resources state.state) in
      ACTIVE) ;;
      NONE) echo ABSENT && return ;;
      FAILED) echo FAILED && return ;;
      SUSPENDING | SUSPENDED) echo GONE && return ;;
      *) echo WAITING && return ;;
    esac
  fi
  case $(ask tpu-vm state) in
    READY) echo READY ;;
    NONE) if [ -n "${QUEUED:-}" ]; then echo GONE; else echo ABSENT; fi ;;
    PREEMPTED | TERMINATED | STOPPED | STOPPING | DELETING) echo GONE ;;
    *) echo WAITING ;;
  esac
}

# Until it is there; false where it is not, and is not on its way.
await_ready() {
  if [ -n "${DRY_RUN:-}" ]; then return 0; fi
  local state
  while true; do
    state=$(state_of)
    case $state in
      READY) return 0 ;;
      WAITING) sleep "$poll" ;;
      *) echo "tpu_vm.sh: $NAME is $state" >&2 && return 1 ;;
    esac
  done
}

install() {
  local file=${TMPDIR:-/tmp}/jaxstages-$NAME.tar.gz
  { [ -z "${SETUP:-}" ] || on_all "$SETUP"; } && pack "$file" && tpus tpu-vm scp "$file" "$NAME:jaxstages.tar.gz" --worker=all &&
    on_all "$(unpacked tpu)"
}

start() {
  local config=${1:?name a recipe, such as configs/demo.py}
  local workdir=${2:?name the folder of the run, on storage that all workers share}
  shift 2
  # Each worker asks its TPU for its place among the others.
  on_all "cd jaxstages && launch/background.sh start .venv/bin/jaxstages run$(quoted --config="$config" \
    --workdir="$workdir" "$@")"
}

delete() {
  if [ -n "${QUEUED:-}" ]; then
    tpus queued-resources delete "$NAME" --quiet --force
  else
    tpus tpu-vm delete "$NAME" --quiet
  fi
}

# A word a worker: running, none, or its exit code.
codes() { on_all 'cd jaxstages && launch/background.sh state' 2>/dev/null | sed -n 's/^code=//p' | sort -u | tr '\n' ' '; }

# Until the training has ended, and then with its code; returns where the TPU is gone, or nothing runs on a worker.
look_after() {
  local found word
  while await_ready; do
    found=$(codes) || found=""  # it may be going away just now: the next look tells
    for word in $found; do
      case $word in
        running | none | 0) ;;
        *)
          echo "tpu_vm.sh: a worker ended with code $word; launch/tpu_vm.sh logs says why" >&2
          on_all 'cd jaxstages && launch/background.sh stop' || true
          exit "$word"
          ;;
      esac
    done
    case $found in
      "0 ") exit 0 ;;
      *none*) return ;;
    esac
    sleep "$poll"
  done
}

run() {
  local state
  if [ -n "${DRY_RUN:-}" ]; then
    create && install && start "$@"
    return
  fi
  while true; do
    state=$(state_of)
    case $state in
      FAILED) echo "tpu_vm.sh: $NAME can't be had; \`launch/tpu_vm.sh delete\`, and ask for another" >&2 && exit 1 ;;
      WAITING) sleep "$poll" ;;
      ABSENT) create ;;
      GONE)
        echo "tpu_vm.sh: $NAME was taken away; it is made again, and goes on" >&2
        delete || sleep "$poll"
        ;;
      READY)
        # Started again on a machine where it runs, this only looks after it.
        if [ "$(codes)" != "running " ]; then
          if ! { install && on_all 'cd jaxstages && launch/background.sh stop' && start "$@"; }; then
            if [ "$(state_of)" = READY ]; then exit 1; fi
            continue
          fi
        fi
        look_after
        ;;
    esac
  done
}

command=${1:?run, create, install, start, attach, logs, state, stop or delete}
shift
case $command in
  run | start | install | delete) "$command" "$@" ;;
  create) create && await_ready ;;
  attach) on_one 'cd jaxstages && launch/background.sh attach' ;;
  logs) on_one 'cd jaxstages && launch/background.sh logs' ;;
  state | stop) on_all "cd jaxstages && launch/background.sh $command" ;;
  *)
    echo "tpu_vm.sh: $command is none of run, create, install, start, attach, logs, state, stop, delete" >&2
    exit 2
    ;;
esac
