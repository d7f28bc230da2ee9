#!/usr/bin/env bash
# Liveness: one token. Triton's own health routes go on saying "ready" after the model's process has died.
# A full queue, or one that is longer than ten seconds, is a sign of life too.
set -uo pipefail
url="http://127.0.0.1:${DSPARK_HTTP_PORT:-8000}/v2/models/{{ name }}/generate"
answer="$(curl --silent --max-time 15 --data '{"input_ids": [0], "max_tokens": 1, "timeout": 10000000}' "$url")" || exit 1
case "$answer" in
    *'"finish_reason"'* | *'"error":"Overloaded:'* | *'"error":"DeadlineExceeded:'*) exit 0 ;;
esac
echo "$answer" >&2
exit 1
