#!/usr/bin/env bash
# Train on a TPU VM, or on a pod slice of any number of hosts, from your own machine, through gcloud.
#
#     export NAME=demo ZONE=us-central2-b TYPE=v4-32
#     launch/tpu_vm.sh run CONFIG WORKDIR [FLAGS ...]
#         create, install, start, then check every POLL seconds (60): a preempted TPU is recreated, and training
#         resumes. Exits with the exit code of training. The TPU is kept: delete it when you are done.
#
# or one by one:
#     launch/tpu_vm.sh create                           create the TPU, and wait until it is ready
#     launch/tpu_vm.sh install                          copy this folder to all workers, and install it there
#     launch/tpu_vm.sh start CONFIG WORKDIR [FLAGS ...] on all workers, in a session that outlives the connection
#     launch/tpu_vm.sh attach                           that session on worker 0, or WORKER=3; Ctrl-b d detaches
#     launch/tpu_vm.sh logs                             its output there
#     launch/tpu_vm.sh state                            whether it runs, on all workers
#     launch/tpu_vm.sh stop                             save, and exit on all workers
#     launch/tpu_vm.sh delete
#
# QUEUED=1 creates a queued resource, SPOT=1 a spot TPU, RUNTIME=... selects another image than that of the TYPE.
# WORKDIR is a folder in a bucket, gs://BUCKET/runs/demo, or on a disk that all workers share: SETUP='sudo mount ...' is
# run on all of them before the installation. DRY_RUN=1 only prints the commands.
set -euo pipefail
cd "$(dirname "$0")/.."
# shellcheck source=launch/do_it.sh
. launch/do_it.sh
: "${NAME:?name the TPU}" "${ZONE:?name its zone}"
poll=${POLL:-60}

tpus() { do_it gcloud compute tpus "$@" --zone="$ZONE"; }
on_all() { tpus tpu-vm ssh "$NAME" --worker=all --command="$1"; }
on_one() { do_it gcloud compute tpus tpu-vm ssh "$NAME" --zone="$ZONE" --worker="${WORKER:-0}" --command="$1" -- -t; }

# The image for a type, as in https://cloud.google.com/tpu/docs/runtimes
image_of() {
  case $1 in
    v5litepod-*) echo v2-alpha-tpuv5-lite ;;
    v5p-*) echo v2-alpha-tpuv5 ;;
    v6e-*) echo v2-alpha-tpuv6e ;;
    *) echo tpu-ubuntu2204-base ;;
  esac
}

create() {
  : "${TYPE:?name its type, such as v5litepod-16}"
  local runtime=${RUNTIME:-$(image_of "$TYPE")} spot=()
  if [ -n "${SPOT:-}" ]; then spot=(--spot); fi
  if [ -n "${QUEUED:-}" ]; then
    tpus queued-resources create "$NAME" --node-id="$NAME" --accelerator-type="$TYPE" --runtime-version="$runtime" \
      ${spot[@]+"${spot[@]}"}
  else
    tpus tpu-vm create "$NAME" --accelerator-type="$TYPE" --version="$runtime" ${spot[@]+"${spot[@]}"}
  fi
}

# The state that gcloud reports; NONE if there is no such resource, UNKNOWN if the request failed.
ask() {
  local answer
  if answer=$(gcloud compute tpus "$1" describe "$NAME" --zone="$ZONE" --format="value($2)" 2>&1); then
    tail -n 1 <<<"$answer"
  elif [[ $answer == *NOT_FOUND* ]]; then
    echo NONE
  else
    echo UNKNOWN
  fi
}

# READY, WAITING, FAILED, GONE (preempted; its name is still taken) or ABSENT.
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

# Wait until it is ready; fail if it is neither ready nor being created.
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

check_arguments() {
  : "${1:?name a recipe, such as configs/demo.py}"
  : "${2:?name the folder of the run, in a bucket or on storage that all workers share}"
}

start() {
  check_arguments "$@"
  local config=$1 workdir=$2
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

# For each worker running, none, or its exit code; each different one once.
codes() { on_all 'cd jaxstages && launch/background.sh state' 2>/dev/null | sed -n 's/^code=//p' | sort -u | tr '\n' ' '; }

# Wait for the end of training, and exit with its code; return if the TPU is gone, or nothing runs on a worker.
look_after() {
  local states word
  while await_ready; do
    states=$(codes) || states=""  # the TPU may be going away: the next iteration decides
    for word in $states; do
      case $word in
        running | none | 0) ;;
        *)
          echo "tpu_vm.sh: a worker ended with code $word; launch/tpu_vm.sh logs says why" >&2
          on_all 'cd jaxstages && launch/background.sh stop' || true
          exit "$word"
          ;;
      esac
    done
    case $states in
      "0 ") exit 0 ;;
      *none*) return ;;
    esac
    sleep "$poll"
  done
}

run() {
  check_arguments "$@"
  local state existed=""
  if [ -n "${DRY_RUN:-}" ]; then
    create && install && start "$@"
    return
  fi
  while true; do
    state=$(state_of)
    if [ "$state" != ABSENT ]; then existed=yes; fi
    case $state in
      FAILED) echo "tpu_vm.sh: the request for $NAME failed; delete it, and create another" >&2 && exit 1 ;;
      WAITING) sleep "$poll" ;;
      ABSENT)
        if ! create; then
          if [ -z "$existed" ]; then exit 1; fi
          sleep "$poll"  # after a preemption the zone is often out of TPUs for a while
        fi
        ;;
      GONE)
        echo "tpu_vm.sh: $NAME was preempted; recreating it and resuming" >&2
        delete || sleep "$poll"
        ;;
      READY)
        # If training already runs there, only look after it.
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
