"""benchmarks/losslessness.py: equal texts pass, near ties are told from wrong tokens."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

from dspark_export.prompts.sets import PromptItem
from dspark_export.validate import lossless
from dspark_runtime import Bundle

PROGRAM = Path(__file__).parents[2] / "benchmarks" / "losslessness.py"


@pytest.fixture(scope="module")
def program() -> ModuleType:
    spec = importlib.util.spec_from_file_location("losslessness", PROGRAM)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["losslessness"] = module
    spec.loader.exec_module(module)
    return module


def test_the_whole_program(bundle: Path, tmp_path: Path) -> None:
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text("".join(json.dumps({"prompt": text}) + "\n" for text in ("one two one", "red", "a b a b a")))
    command = [sys.executable, str(PROGRAM), str(bundle), str(prompts), "--batch", "1,2", "--max-new-tokens", "16"]
    done = subprocess.run([*command, "--threads", "1"], capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["prompts"] == 3 and found["wrong"] == 0 and found["divergences"] == []
    measured = {(row["mode"], row["batch"]): row["equal"] for row in found["results"]}
    assert set(measured) >= {("ngram", 1), ("ngram", 2), ("self-draft", 2), ("off", 2)} and ("off", 1) not in measured
    assert set(measured.values()) == {3}


@pytest.mark.parametrize("arguments", [["--batch", "x"], ["--batch", "0"], ["--modes", "magic"]])
def test_wrong_options(bundle: Path, arguments: list[str]) -> None:
    command = [sys.executable, str(PROGRAM), str(bundle), "math", "--limit", "1", "--max-new-tokens", "2", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 2
    assert "Traceback" not in done.stderr and done.stdout == ""


def test_teacher_forced_logits_choose_the_plain_token(opened: Bundle) -> None:
    prompt = opened.codec.encode("one two one two")
    tokens = opened.generate(prompt, max_new_tokens=6, speculate="off", ignore_eos=True).tokens
    for position in range(len(tokens)):
        logits = lossless.next_logits(opened, [*prompt, *tokens[:position]])
        assert logits.shape[1] == opened.limits.vocab_size
        assert int(np.argmax(logits[0])) == tokens[position]
        assert np.abs(logits - logits[0]).max() < 1e-3


@pytest.mark.parametrize(
    ("promised", "gap", "verdict"), [(False, 1e-5, "near tie"), (False, 1.0, "WRONG"), (True, 1e-5, "WRONG")]
)
def test_verdicts(bundle: Path, monkeypatch: pytest.MonkeyPatch, promised: bool, gap: float, verdict: str) -> None:
    opened = Bundle.open(bundle, threads=1)
    noise = opened.manifest.precision.row_noise
    assert noise is not None
    logits = np.zeros((2, 10), np.float32)
    logits[:, 3] = 5.0
    logits[:, 4] = 5.0 - (0.5 * noise.max_abs_logit_diff if gap < 1 else gap)
    monkeypatch.setattr(lossless, "next_logits", lambda *_: logits)
    found = lossless.judge(opened, [1], [3], 0, [3, 4], promised)
    assert found["verdict"] == verdict
    assert found["margin"] == pytest.approx(float(logits[0, 3] - logits[0, 4]))
    # A token far below the two best is wrong, however near these are to each other.
    assert lossless.judge(opened, [1], [3], 0, [3, 5], promised)["verdict"] == "WRONG"
    assert lossless.judge(opened, [1], [3], 0, [3, None], promised)["verdict"] == "WRONG"


def test_prompts_are_taken_in_turn(program: ModuleType) -> None:
    items = [PromptItem(name, f"{name}{i}") for name in "ab" for i in range(3)]
    assert [item.text for item in program.in_turn(items, 5)] == ["a0", "b0", "a1", "b1", "a2"]
