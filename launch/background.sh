#!/usr/bin/env bash
# Run a command in a tmux session, so that it outlives the connection to its machine. `again.sh` restarts it. One at a
# time.
#
#     launch/background.sh start COMMAND [ARGUMENT ...]
#     launch/background.sh attach        attach to the session; Ctrl-b d detaches
#     launch/background.sh logs          print its output, and follow it
#     launch/background.sh stop          SIGTERM: it saves and exits; waits for that
#     launch/background.sh state         code=running, code=none, or code=N once it has ended
#
# Its output is in ~/jaxstages-HOST.log, its exit code in ~/jaxstages-HOST.code: hosts may share a home folder.
set -euo pipefail
log=$HOME/jaxstages-$(hostname).log
code=${log%.log}.code
pid=${log%.log}.pid

# A process ID that is left from before a reboot may be that of another process.
is_running() { [ -f "$pid" ] && kill -0 "$(cat "$pid")" 2>/dev/null && tmux has-session -t jaxstages 2>/dev/null; }

case ${1:?start, attach, logs, stop or state} in
  start)
    shift
    : "${1:?name a command}"
    if is_running; then
      echo "background.sh: it is already running, as process $(cat "$pid"); stop it first" >&2
      exit 2
    fi
    rm -f "$code"
    # tmux runs several arguments as they are, without a shell.
    tmux new-session -d -s jaxstages "$0" inside "$@"
    ;;
  inside)
    shift
    "$(dirname "$0")/again.sh" "$@" > >(tee -a "$log") 2>&1 &
    echo $! >"$pid"
    wait $! && ended=0 || ended=$?
    rm -f "$pid"
    echo "$ended" >"$code"
    ;;
  attach) exec tmux attach-session -t jaxstages ;;
  logs) exec tail -n +1 -F "$log" ;;
  stop)
    if ! is_running || ! kill -TERM "$(cat "$pid")" 2>/dev/null; then exit 0; fi
    for ((second = 0; second < 180; second++)); do
      if [ -f "$code" ]; then exit 0; fi
      sleep 1
    done
    echo "background.sh: it has not ended after 180 seconds; see $log" >&2
    exit 1
    ;;
  state)
    if [ -f "$code" ]; then
      echo "code=$(cat "$code")"
    elif is_running; then
      echo "code=running"
    else
      echo "code=none"
    fi
    ;;
  *)
    echo "background.sh: $1 is none of start, attach, logs, stop, state" >&2
    exit 2
    ;;
esac
