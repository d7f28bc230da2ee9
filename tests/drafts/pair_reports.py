"""Pair reports, and what tests ask of them."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from dspark_export.drafts.formats import recognise
from dspark_export.drafts.pair_check import Finding, PairReport, check_pair
from dspark_runtime.errors import (
    DraftMismatch,
)
from tests import tiny_models
from tests.drafts.conftest import Target
from tests.drafts.writers import (
    TARGET_TOKENS,
    Written,
)

Edit = Callable[[dict[str, Any]], Any]


def give_tokenizer(folder: Path, edit: Edit | None = None) -> None:
    """The target's tokenizer files, changed."""
    tiny_models.tokenizer(TARGET_TOKENS).save_pretrained(folder)
    if edit is not None:
        path = folder / "tokenizer.json"
        content = json.loads(path.read_text())
        edit(content)
        path.write_text(json.dumps(content))


def report(target: Target, written: Written, **options: Any) -> PairReport:
    return check_pair(target.checkpoint, recognise(str(written.folder)), **options)


def only_error(found: PairReport, kind: type[DraftMismatch], name: str) -> Finding:
    """The one error, which a build raises as ``kind`` and which says what to do."""
    assert [finding.id for finding in found.errors] == [name], [finding.message for finding in found.errors]
    error = found.error()
    assert error is not None and type(error) is kind and error.exit_code == 9
    finding = found.errors[0]
    assert finding.error is kind and finding.fix and finding.message in str(error)
    assert found.draft in str(error) and found.target in str(error) and found.fitted is None
    return finding


def of(found: PairReport, name: str) -> Finding:
    (finding,) = (finding for finding in found.findings if finding.id == name)
    return finding


def zlab_config(mask: int) -> dict[str, Any]:
    return {"target_layer_ids": [1, 3, 5], "mask_token_id": mask}
