#!/usr/bin/env bash
# Starts the server with the runtime of this folder; Python needs what requirements.txt lists.
# Environment: PYTHON (python3), DSPARK_ADDRESS (127.0.0.1), DSPARK_HTTP_PORT (8080), DSPARK_API_KEY. Arguments: those of
# `dspark-serve`.
set -euo pipefail
here="$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)"
export PYTHONPATH="$here/python${PYTHONPATH:+:$PYTHONPATH}"
exec "${PYTHON:-python3}" -m dspark_serve "${DSPARK_BUNDLE:-{{ bundle }}}" \
    --host "${DSPARK_ADDRESS:-127.0.0.1}" --port "${DSPARK_HTTP_PORT:-8080}" \
    {{ arguments | join(" ") }} "$@"
