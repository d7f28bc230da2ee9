#!/usr/bin/env bash
# Starts Triton with the model of this folder; `tritonserver` must be on the PATH, as in NVIDIA's images.
# Environment: DSPARK_ADDRESS (127.0.0.1), DSPARK_HTTP_PORT (8000), DSPARK_GRPC_PORT (8001), DSPARK_METRICS_PORT (8002).
# Arguments go to tritonserver.
set -euo pipefail
here="$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)"
if ! command -v tritonserver >/dev/null; then
    echo "tritonserver is not on the PATH; start the container instead: docker compose up --build" >&2
    exit 127
fi
export PYTHONPATH="$here/python${PYTHONPATH:+:$PYTHONPATH}"
address="${DSPARK_ADDRESS:-127.0.0.1}"
# Reading and hashing a large bundle takes longer than the 30 seconds Triton gives a model by default.
exec tritonserver --model-repository="$here/models" \
    --model-control-mode=none --strict-readiness=true --exit-on-error=true --disable-auto-complete-config \
    --backend-config=python,stub-timeout-seconds=600 --exit-timeout-secs={{ exit_seconds }} \
    --http-address="$address" --http-port="${DSPARK_HTTP_PORT:-8000}" \
    --grpc-address="$address" --grpc-port="${DSPARK_GRPC_PORT:-8001}" \
    --metrics-address="$address" --metrics-port="${DSPARK_METRICS_PORT:-8002}" "$@"
