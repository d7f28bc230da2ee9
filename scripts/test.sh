#!/usr/bin/env bash
# Installs everything the tests need into .venv, then runs the linter, the type checker and all tests.
# Arguments go to pytest:
#   scripts/test.sh -k tree
#   scripts/test.sh --quick      unit tests that trace and build nothing: under three minutes
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"
cd "$repository"
ensure_environment cpu,dev

ruff check .
ruff format --check .
mypy

# Two workers with one thread each: the tests are many small graphs, not few large ones.
export OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false
exec python -m pytest -n "${TEST_WORKERS:-2}" --dist loadscope --no-loadscope-reorder -m "not slow" "$@"
