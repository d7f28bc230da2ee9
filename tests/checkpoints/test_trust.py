"""The trust gate: closed by default, one for the whole code base, and what it opens works."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import dspark_export
import dspark_runtime
from dspark_export.checkpoints import Trust, resolve
from dspark_runtime.errors import UntrustedCheckpoint
from tests.checkpoints.checkpoint_samples import edit_config, refusal, write_checkpoint

GATE = "dspark_export/checkpoints/trust.py"
FORBIDDEN = re.compile(
    r"trust_remote_code|torch\s*\.\s*load\b|weights_only|allow_pickle|use_safetensors"
    r"|^\s*(?:import|from)\s+(?:pickle|cPickle|dill|cloudpickle|joblib|shelve|marshal)\b|\bpickle\s*\.|\beval\(|\bexec\(",
    re.MULTILINE,
)


def test_only_the_gate_names_unsafe_options() -> None:
    found = {}
    for package in (dspark_export, dspark_runtime):
        root = Path(next(iter(package.__path__)))
        for path in root.rglob("*.py"):
            if hits := FORBIDDEN.findall(_without_method_eval(path.read_text())):
                found[f"{root.name}/{path.relative_to(root)}"] = hits
    assert set(found) == {GATE}


def _without_method_eval(text: str) -> str:
    return re.sub(r"\.(?:eval|exec)\(", "", text)


def test_the_gate_is_closed_by_default() -> None:
    assert not Trust.closed().allow_unsafe and Trust() == Trust.closed()
    assert Trust.closed().code_options() == {"trust_remote_code": False}


def pickled(folder: Path) -> Path:
    write_checkpoint(folder)
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    return folder


def test_a_pickle_needs_the_open_gate(tmp_path: Path) -> None:
    folder = pickled(tmp_path / "model")
    caught = refusal(str(folder), tmp_path / "out" / "bundle")
    assert type(caught) is UntrustedCheckpoint and caught.exit_code == 4
    assert "pytorch_model.bin" in str(caught)
    model = resolve(str(folder), trust=Trust.opened()).load_model(torch.float32)
    reference = resolve(str(write_checkpoint(tmp_path / "safe"))).load_model(torch.float32)
    ids = torch.arange(8)[None]
    assert torch.equal(model(ids).logits, reference(ids).logits)


def test_a_pickle_beside_safetensors_is_ignored(tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path / "model")
    (folder / "pytorch_model.bin").write_bytes(b"cos\nsystem\n(S'false'\ntR.")
    weights = resolve(str(folder)).weights
    assert weights is not None and weights.names == ("model.safetensors",)


def test_code_of_a_checkpoint_does_not_run(tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path / "model")
    evidence = tmp_path / "ran"
    (folder / "evil.py").write_text(f"open({str(evidence)!r}, 'w')\nclass Evil: pass\n")
    edit_config(folder, model_type="evil", auto_map={"AutoConfig": "evil.Evil", "AutoModelForCausalLM": "evil.Evil"})
    assert type(refusal(str(folder), tmp_path / "out" / "bundle")) is UntrustedCheckpoint
    edit_config(folder, model_type="llama")
    resolve(str(folder))
    assert not evidence.exists(), "an auto_map of a known architecture must be ignored"


@pytest.mark.parametrize("file", ["tokenizer_config.json"])
def test_code_of_a_tokenizer_does_not_run(file: str, tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path / "model")
    evidence = tmp_path / "ran"
    (folder / "evil.py").write_text(f"open({str(evidence)!r}, 'w')\nclass Evil: pass\n")
    (folder / file).write_text('{"tokenizer_class": "Evil", "auto_map": {"AutoTokenizer": ["evil.Evil", "evil.Evil"]}}')
    refusal(str(folder), tmp_path / "out" / "bundle")
    assert not evidence.exists()
