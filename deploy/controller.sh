#!/bin/sh
# A controller of a Ray cluster by address. A Ray driver needs a raylet beside it: one without resources joins first, so that no step runs here.
# When either ends, the container does, and its restart begins anew.
set -eu
: "${NAS_RAY_ADDRESS:?expected the address of the cluster's head, HOST:PORT}"
ray start --address="$NAS_RAY_ADDRESS" --num-cpus=0 --num-gpus=0 --disable-usage-stats
python -m workers &
controller=$!
trap 'kill -TERM "$controller"' TERM INT
# `wait` returns early when a signal comes: wait again until the controller has ended.
code=0
while :; do
    wait "$controller" && code=0 || code=$?
    kill -0 "$controller" 2>/dev/null || break
done
exit "$code"
