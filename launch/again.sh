#!/usr/bin/env bash
# Run a command, and again whenever it ends with code 75: interrupted after a complete save, or a host was lost.
#
#     launch/again.sh COMMAND [ARGUMENT ...]
#     DRY_RUN=1 launch/again.sh ...      only says what it would do
#
# SIGTERM, SIGINT and SIGUSR1 go to the command, and after its end nothing is started any more. Between two runs lie
# PAUSE seconds, for the other hosts to end too, and there are at most MOST runs. The exit code is the last run's.
set -uo pipefail
pause=${PAUSE:-10}
most=${MOST:-1000}
: "${1:?name a command}"
printf '+'
printf ' %q' "$@"
printf '\n'
if [ -n "${DRY_RUN:-}" ]; then exit 0; fi

asked=""
child=""
pass_on() {
  asked=1
  if [ -n "$child" ]; then kill -TERM "$child" 2>/dev/null; fi
}
trap pass_on TERM INT USR1
# A signal cuts `wait` short: the child is waited for until it is gone.
until_gone() {
  local code
  while true; do
    wait "$child"
    code=$?
    if ! kill -0 "$child" 2>/dev/null; then return "$code"; fi
  done
}
for ((run = 1; ; run++)); do
  "$@" &
  child=$!
  until_gone
  code=$?
  if [ "$code" -ne 75 ] || [ -n "$asked" ] || [ "$run" -ge "$most" ]; then exit "$code"; fi
  echo "again.sh: code 75 after run $run; starts again in $pause s" >&2
  sleep "$pause" &
  child=$!
  until_gone
  child=""
  if [ -n "$asked" ]; then exit 75; fi
done
