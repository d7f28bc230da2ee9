"""Files of prompts."""

from __future__ import annotations

import json
from pathlib import Path

from dspark_export.prompts.sets import read_prompts


def test_only_a_newline_ends_a_prompt(tmp_path: Path) -> None:
    """JSON may hold every other character that ends a line of Unicode text."""
    texts = ["one\u2028still one", "two\x85and", "three\x0b\x0cand", "four\u2029"]
    structured, plain = tmp_path / "a.jsonl", tmp_path / "b.txt"
    structured.write_bytes("\r\n".join(json.dumps({"prompt": t}, ensure_ascii=False) for t in texts).encode())
    plain.write_bytes("\n\n".join(texts).encode())
    for path in (structured, plain):
        assert [item.text for item in read_prompts(path)] == texts
