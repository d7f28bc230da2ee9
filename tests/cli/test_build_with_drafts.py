"""``build --draft`` and its options, and ``generate`` with the drafter that came of it."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from dspark_runtime import Bundle
from tests.cli.conftest import Invoke
from tests.drafts.tensors import Sizes
from tests.drafts.writers import target_tables, write_deepspec, write_target

IDS = [5, 6, 7, 8, 9, 30, 31, 32]


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Folders of a target and its draft."""
    folder = tmp_path_factory.mktemp("pair")
    target = write_target(folder / "target")
    return target, write_deepspec(folder / "draft", tables=target_tables(target)).folder


def test_a_draft_of_few_tokens_and_candidates(pair: tuple[Path, Path], tmp_path: Path, invoke: Invoke) -> None:
    target, draft = pair
    allowed = list(range(0, 384, 3))
    (tmp_path / "vocabulary.json").write_text(json.dumps(allowed))
    out = tmp_path / "b.dspark"
    options = ("--draft", draft, "--draft-vocab", tmp_path / "vocabulary.json", "--markov-topk", 8)
    built = invoke("build", "--phrases", "0", target, "--out", out, *options, "--self-draft", "none")
    assert built.exit_code == 0, built.output
    assert "without tokenizer files" in built.stderr and "dspark" in built.stdout
    facts = Bundle.open(out).manifest.drafters[-1].block
    assert facts is not None and facts.block == 4
    (tmp_path / "ids.json").write_text(json.dumps(IDS))
    run = ("generate", out, "--prompt-ids", tmp_path / "ids.json", "--max-new-tokens", 16, "--json")
    plain = invoke(*run, "--speculate", "off")
    assert plain.exit_code == 0, plain.output
    tokens = json.loads(plain.stdout)["tokens"]
    for extra in ((), ("--draft-length", 3), ("--draft-length", 4, "--confidence-threshold", 0.4)):
        found = invoke(*run, "--speculate", "dspark", *extra)
        assert found.exit_code == 0, found.output
        assert json.loads(found.stdout)["tokens"] == tokens
    trace = invoke("draft-trace", out, "--prompt-ids", tmp_path / "ids.json", "--out", tmp_path / "t.npz")
    assert trace.exit_code == 0, trace.output
    arrays = np.load(tmp_path / "t.npz")
    assert arrays["base_logits"].shape == (4, len(allowed))
    assert set(arrays["draft_tokens"].tolist()) <= set(allowed)


@pytest.mark.parametrize("markov", ["gated"])
def test_a_quantized_pair(pair: tuple[Path, Path], tmp_path: Path, invoke: Invoke, markov: str) -> None:
    sizes = Sizes(rank=32)  # blocks of 32 weights share a scale
    draft = write_deepspec(tmp_path / "draft", markov=markov, sizes=sizes, tables=target_tables(pair[0])).folder
    out = tmp_path / "b.dspark"
    built = invoke("build", "--phrases", "0", pair[0], "--out", out, "--draft", draft, "--precision", "int8", "--exact")
    assert built.exit_code == 0, built.output
    bundle = Bundle.open(out, threads=1)
    plain = bundle.generate(IDS, max_new_tokens=16, speculate="off", ignore_eos=True).tokens
    found = bundle.generate(IDS, max_new_tokens=16, speculate="dspark", draft_length=4, ignore_eos=True)
    assert found.tokens == plain and found.stats.per_drafter["dspark"].drafted > 20


@pytest.mark.parametrize(
    ("options", "code", "message"),
    [
        (("--draft-vocab", "nowhere.json"), 2, "nowhere.json"),
        (("--markov-topk", "0"), 2, "markov"),
        (("--draft", "/no/such/folder"), 3, "/no/such/folder"),
    ],
)
def test_wrong_options_leave_nothing(
    pair: tuple[Path, Path], tmp_path: Path, invoke: Invoke, options: tuple[str, str], code: int, message: str
) -> None:
    result = invoke(
        "build",
        "--phrases",
        "0",
        pair[0],
        "--out",
        tmp_path / "b",
        "--draft",
        pair[1],
        "--self-draft",
        "none",
        *options,
    )
    assert (result.exit_code, result.stdout) == (code, "") and message in result.stderr, result.output
    assert list(tmp_path.iterdir()) == []
