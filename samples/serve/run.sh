#!/usr/bin/env bash
# Installs dspark-export into .venv, builds a bundle of SmolLM2-135M-Instruct, serves it and asks it a question.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/../../scripts/environment.sh"
cd "$repository"
[ -f .venv/.dspark-installed ] && grep -q '^cpu,dev' .venv/.dspark-installed && ensure_environment cpu,dev || ensure_environment cpu,serve
exec python samples/serve/serve.py "$@"
