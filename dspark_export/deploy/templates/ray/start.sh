#!/usr/bin/env bash
# Runs the application on this machine, or on the cluster that RAY_ADDRESS names, each of whose machines needs this folder
# at the same place. Python needs what requirements.txt lists.
# Environment: PYTHON (python3), DSPARK_ADDRESS (127.0.0.1), DSPARK_HTTP_PORT (8000), DSPARK_API_KEY.
set -euo pipefail
here="$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)"
export PYTHONPATH="$here/python${PYTHONPATH:+:$PYTHONPATH}"
exec "${PYTHON:-python3}" "$here/app.py"
