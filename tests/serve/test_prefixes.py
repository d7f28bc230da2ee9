"""Context is reused among requests of one API key, and never among those of two."""

from __future__ import annotations

from pathlib import Path

from dspark_runtime import Bundle
from dspark_serve.access import AccessRules, ApiKeys
from tests.serve.running import NAME, running

LONG = "one two three four five six seven eight nine ten " * 4


def test_prefixes_are_reused_within_a_key_only(bundle: Path) -> None:
    opened = Bundle.open(bundle, threads=1, exact=False)  # where rows need padding to be exact, nothing is reused
    rules = AccessRules(ApiKeys({"first-key": "one", "second-key": "two"}))
    with running(opened, rules=rules) as server:

        def cached(key: str) -> int:
            client = server.client(key)
            found = client.completions.create(model=NAME, prompt=LONG, max_tokens=4, temperature=0)
            assert found.usage is not None and found.usage.prompt_tokens_details is not None
            return found.usage.prompt_tokens_details.cached_tokens or 0

        assert cached("first-key") == 0
        again = cached("first-key")
        assert again > 32
        assert cached("second-key") == 0
        assert cached("second-key") == again
