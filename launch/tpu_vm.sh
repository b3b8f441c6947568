#!/usr/bin/env bash
# Create a TPU VM, install the project on it, and start the same command there.
#
#     NAME=demo ZONE=us-central2-b TYPE=v4-8 launch/tpu_vm.sh CONFIG WORKDIR [FLAGS ...]
#     DRY_RUN=1 ...                                      only says what it would do
#
# TYPE is one of a single host. The VM stays: delete it when you are done (the last line says how).
set -euo pipefail
cd "$(dirname "$0")/.."
: "${NAME:?name the VM}" "${ZONE:?name its zone}" "${TYPE:?name its type, such as v5litepod-8}"
config=${1:?name a recipe, such as configs/demo.py}
workdir=${2:?name the folder of the run}
shift 2
do_it() {
  printf '+'
  printf ' %q' "$@"
  printf '\n'
  if [ -z "${DRY_RUN:-}" ]; then "$@"; fi
}
on_all() { do_it gcloud compute tpus tpu-vm ssh "$NAME" --zone="$ZONE" --worker=all --command="$1"; }

do_it gcloud compute tpus tpu-vm create "$NAME" --zone="$ZONE" --accelerator-type="$TYPE" \
  --version="${RUNTIME:-v2-alpha-tpuv5-lite}"
do_it tar --exclude=.git --exclude=.venv --exclude=runs -czf "/tmp/jaxstages-$NAME.tar.gz" .
do_it gcloud compute tpus tpu-vm scp "/tmp/jaxstages-$NAME.tar.gz" "$NAME:jaxstages.tar.gz" --zone="$ZONE" --worker=all
on_all "mkdir -p jaxstages && tar -xzf jaxstages.tar.gz -C jaxstages && cd jaxstages && make .venv && \
.venv/bin/pip install --quiet -e '.[tpu]'"
command=$(printf ' %q' run --config="$config" --workdir="$workdir" "$@")
on_all "cd jaxstages && .venv/bin/jaxstages$command"
echo "delete it with: gcloud compute tpus tpu-vm delete $NAME --zone=$ZONE"
