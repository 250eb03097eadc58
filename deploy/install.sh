#!/bin/sh
# What the container images install, and what a machine without containers can run as it is: install.sh api|worker, from the top of the source.
#   api     the REST service and the client: no torch, no Ray
#   worker  everything: controller and Ray nodes. For GPUs install the torch build of your platform first, in the version of constraints.txt
set -eu
case "${1:-}" in
    api) extras="telemetry" ;;
    worker) extras="worker,s3,telemetry" ;;
    *) echo "usage: install.sh api|worker" >&2; exit 2 ;;
esac
cd "$(dirname "$0")/.."
exec "${PYTHON:-python3}" -m pip install --no-cache-dir --disable-pip-version-check --constraint constraints.txt ".[$extras]"
