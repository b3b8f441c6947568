#!/usr/bin/env bash
# Print the path of a Python that the project runs on, 3.11 or newer. If there is none, install one with apt: the images
# of TPU VMs have Python 3.10.
set -euo pipefail
for name in python3 python3.13 python3.12 python3.11; do
  if "$name" -c 'import ensurepip, sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
    command -v "$name"
    exit
  fi
done
sudo apt-get update -q >&2
sudo apt-get install -qy python3.11 python3.11-venv >&2
command -v python3.11
