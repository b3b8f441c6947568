#!/usr/bin/env bash
# A command that goes on when the connection to its machine ends: in a tmux session, by `again.sh`. One at a time.
#
#     launch/background.sh start COMMAND [ARGUMENT ...]
#     launch/background.sh attach        look at it, and type to it; Ctrl-b d leaves it running
#     launch/background.sh logs          all that it has printed, and what it prints from now on
#     launch/background.sh stop          SIGTERM: it saves and ends; waits until it has
#     launch/background.sh state         code=running, code=none, or code=N once it has ended
#
# What it prints is kept in ~/jaxstages.log, its exit code in ~/jaxstages.code.
set -euo pipefail
log=$HOME/jaxstages.log
code=$HOME/jaxstages.code
pid=$HOME/jaxstages.pid
case ${1:?start, attach, logs, stop or state} in
  start)
    shift
    : "${1:?name a command}"
    if [ -f "$pid" ] && kill -0 "$(cat "$pid")" 2>/dev/null; then
      echo "background.sh: it runs already, as process $(cat "$pid"); stop it first" >&2
      exit 2
    fi
    rm -f "$code"
    # Several arguments are run as they are: no shell of tmux's reads them again.
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
    if [ ! -f "$pid" ] || ! kill -TERM "$(cat "$pid")" 2>/dev/null; then exit 0; fi
    for ((second = 0; second < 180; second++)); do
      if [ -f "$code" ]; then exit 0; fi
      sleep 1
    done
    echo "background.sh: it does not end; look at $log" >&2
    exit 1
    ;;
  state)
    if [ -f "$code" ]; then
      echo "code=$(cat "$code")"
    elif [ -f "$pid" ] && kill -0 "$(cat "$pid")" 2>/dev/null; then
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
