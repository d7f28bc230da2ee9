"""Names of the contract are written once: a second spelling could diverge."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from dspark_runtime.bundle.contract import VERIFY_CHAIN_INPUTS, VERIFY_INPUTS, VERIFY_OUTPUTS, past_name, present_name

ROOT = Path(__file__).resolve().parents[3]
CODE = ("dspark_export", "runtime/dspark_runtime")
HERE = ("runtime/dspark_runtime/bundle/contract.py", "runtime/dspark_runtime/bundle/engine_names.py")


def spelled(pattern: str) -> dict[str, list[str]]:
    """Lines of code that match, by file."""
    found = {
        str(path.relative_to(ROOT)): re.findall(rf"^.*{pattern}.*$", path.read_text("utf-8"), re.MULTILINE)
        for folder in CODE
        for path in (ROOT / folder).rglob("*.py")
    }
    return {name: lines for name, lines in found.items() if lines}


def test_names_of_cache_tensors() -> None:
    assert (past_name(3, "key"), present_name(0, "value")) == ("past_key_values.3.key", "present.0.value")


@pytest.mark.parametrize(
    "pattern",
    [
        r"[\"']past_key_values\.",
        r"[\"']present\.",
        r"\bNAMESPACE = ",
        r"(?:domain|namespace|Opset)\b.*[\"']dspark[\"']",
        r"[\"']ancestors[\"']",
        r"[\"']draw_uniforms[\"']",
        r"[\"']accept_uniforms[\"']",
    ],
)
def test_a_name_is_written_in_the_contract_alone(pattern: str) -> None:
    found = spelled(pattern)
    assert len(found) <= 1 and set(found) <= set(HERE), found


def test_verification_takes_and_gives_one_set_of_tensors() -> None:
    both = [[spec.name for spec in specs] for specs in (VERIFY_INPUTS, VERIFY_CHAIN_INPUTS)]
    assert both[0][:2] == both[1][:2] == ["logits", "tokens"]
    assert both[0][-4:] == both[1][-4:] == ["temperature", "top_k", "top_p", "min_p"]
    assert [spec.name for spec in VERIFY_OUTPUTS] == ["path", "emitted", "accepted"]
