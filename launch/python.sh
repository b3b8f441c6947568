#!/usr/bin/env bash
# Print the path of a Python that the project runs on, 3.11 or newer. If there is none, or it can't make environments,
# install it with apt: the images of TPU VMs have Python 3.10, and Ubuntu has `venv` in a package of its own.
set -euo pipefail
if made=$(.venv/bin/python -c 'import sys; print(sys._base_executable); sys.exit(sys.version_info < (3, 11))' 2>/dev/null); then
  echo "$made"
  exit
fi
install() {
  sudo apt-get -o DPkg::Lock::Timeout=300 update -q >&2
  sudo apt-get -o DPkg::Lock::Timeout=300 install -qy "$@" >&2
}
for name in python3 python3.13 python3.12 python3.11; do
  if ! "$name" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then continue; fi
  if ! "$name" -c 'import ensurepip' 2>/dev/null; then install "$name-venv"; fi
  command -v "$name"
  exit
done
install python3.11 python3.11-venv
command -v python3.11
