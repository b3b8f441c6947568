# shellcheck shell=bash
# Say a command, so that it could be typed again, and run it; with DRY_RUN=1 only say it.
do_it() {
  printf '+'
  printf ' %q' "$@"
  printf '\n'
  if [ -z "${DRY_RUN:-}" ]; then "$@"; fi
}

# Words as a shell on another machine reads them back: spaces, quotes and $ stay what they are.
quoted() { printf ' %q' "$@"; }

# This folder as one file, $1.
pack() { do_it tar --exclude=./.git --exclude=./.venv --exclude=./runs -czf "$1" .; }

# What makes that file an installed project on another machine; $1 is the extra of its accelerator.
# A .venv that is there already is kept: make knows whether it is too old.
unpacked() {
  printf '%s' "mkdir -p jaxstages && tar -xzf jaxstages.tar.gz -C jaxstages && cd jaxstages && " \
    "python=\$(launch/python.sh) && make PYTHON=\$python .venv && " \
    ".venv/bin/pip install --quiet -e '.[$1,bucket]' && (command -v tmux >/dev/null || sudo apt-get install -qy tmux)"
}
