"""A checkpoint folder without tokenizer files still builds; its bundle works with token ids."""

from __future__ import annotations

from pathlib import Path

import pytest

from dspark_export.build.options import BuildOptions
from dspark_export.build.pipeline import build
from dspark_export.checkpoints.tokenizer import MissingTokenizer
from dspark_runtime import Bundle
from dspark_runtime.errors import UsageError
from tests.checkpoints.checkpoint_samples import write_checkpoint


def test_a_folder_without_tokenizer_builds_with_a_warning_and_takes_token_ids(tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path / "model")
    (folder / "tokenizer.json").unlink()
    out = tmp_path / "out.dspark"
    with pytest.warns(MissingTokenizer, match="token ids only"):
        build(BuildOptions(model=str(folder), out=out))
    bundle = Bundle.open(out)
    plain = bundle.generate([5, 6, 7], max_new_tokens=12, speculate="off", ignore_eos=True)
    fast = bundle.generate([5, 6, 7], max_new_tokens=12, ignore_eos=True)
    assert plain.tokens == fast.tokens and len(plain.tokens) == 12 and plain.text == ""
    for asked in (lambda: bundle.generate("text"), lambda: bundle.generate([5], stop="x")):
        with pytest.raises(UsageError, match="tokenizer"):
            asked()
