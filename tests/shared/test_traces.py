"""A shared trace is the trace: the same bytes, the test's own weights, and never the trace of something else."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import onnx_ir as ir
import pytest
import torch
from transformers import AutoModelForCausalLM

from dspark_export.graphs.decoder import DecoderTrace
from dspark_export.graphs.self_draft import export_self_draft
from dspark_export.graphs.target import export_target
from tests import tiny_models
from tests.shared import digests, folders, traces


@pytest.fixture
def empty(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(folders, "CACHE", tmp_path)
    return tmp_path


def stored(empty: Path) -> int:
    return len(list(empty.glob("traces/*/" + traces.GRAPH)))


def digest(*values: Any) -> str:
    made = digests.Digest()
    for value in values:
        made.add(value)
    return made.hexdigest()


def graph_bytes(trace: DecoderTrace) -> list[bytes]:
    cut = (export_target(trace, taps=(-1, 0)), export_self_draft(trace, (0,)))
    return [ir.to_proto(model).SerializeToString(deterministic=True) for model in cut]


def test_graphs_of_a_shared_trace_are_those_of_a_trace_of_ones_own(
    empty: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def make(seed: int) -> DecoderTrace:
        return DecoderTrace(tiny_models.make("mistral", seed=seed, num_hidden_layers=1)[1])

    with monkeypatch.context() as alone:
        alone.setattr(torch.onnx, "export", traces._export)
        own = graph_bytes(make(seed=1))
    assert stored(empty) == 0
    other = graph_bytes(make(seed=0))
    assert stored(empty) == 1
    assert graph_bytes(make(seed=1)) == own != other  # of the same entry, with other weights
    assert stored(empty) == 1


class Small(torch.nn.Module):
    """A tied weight, a buffer, a constant that is neither, and a plain attribute."""

    def __init__(self, power: float = 2.0, constant: float = 3.0) -> None:
        super().__init__()
        self.first = torch.nn.Linear(4, 4, bias=False)
        self.second = torch.nn.Linear(4, 4)
        self.second.weight = self.first.weight
        self.register_buffer("shift", torch.ones(4))
        self.constant = torch.full((4,), constant)
        self.power = power
        self.eval()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.second(self.first(x) + self.shift) ** self.power + self.constant


EXAMPLE = (torch.ones(2, 4),)


def test_weights_are_bound_and_constants_kept(empty: Path) -> None:
    for _ in range(2):
        module = Small()
        model = traces.shared_export(module, EXAMPLE, dynamo=True, optimize=False, verbose=False).model
        tensors = {name: value.const_value.raw for name, value in model.graph.initializers.items()}
        for own in (module.first.weight, module.second.bias, module.shift):
            assert sum(tensor is own for tensor in tensors.values()) == 1, list(tensors)
        (constant,) = [tensor for name, tensor in tensors.items() if "constant" in name]
        assert torch.equal(constant, module.constant)
    assert stored(empty) == 1


def test_a_digest_is_of_all_but_the_weights_numbers() -> None:
    same = digest(Small(), EXAMPLE)
    assert digest(Small(), EXAMPLE) == same
    untied = Small()
    untied.second.weight = torch.nn.Parameter(torch.ones(4, 4))
    hooked = Small()
    hooked.register_forward_hook(lambda module, args, output: output + 1)
    different = {
        "attribute": digest(Small(power=3.0), EXAMPLE),
        "constant": digest(Small(constant=4.0), EXAMPLE),
        "tied weights": digest(untied, EXAMPLE),
        "type": digest(Small().half(), EXAMPLE),
        "hook": digest(hooked, EXAMPLE),
        "example": digest(Small(), (torch.ones(3, 4),)),
        "settings": digest(Small(), EXAMPLE, {"opset_version": 24}),
    }
    assert len({same, *different.values()}) == len(different) + 1, different


def test_a_digest_is_of_models_not_of_where_they_lie(tmp_path: Path) -> None:
    loaded = [
        AutoModelForCausalLM.from_pretrained(tiny_models.save_checkpoint("llama", tmp_path / name, seed=seed))
        for seed, name in enumerate(("one", "other"))
    ]
    for model in loaded:
        model.requires_grad_(False)
    assert digest(loaded[0]) == digest(loaded[1]) == digest(tiny_models.make("llama")[1])
    assert digest(tiny_models.make("llama")[1]) != digest(tiny_models.make("llama", rms_norm_eps=1e-3)[1])


def test_a_digest_is_of_the_source_files(monkeypatch: pytest.MonkeyPatch) -> None:
    made = digests.Digest()
    made.add(Small())
    read = {digests._place(file) for file in digests.closure({*made.files, *digests.ALWAYS_READ})}
    assert {"tests/shared/test_traces.py", "tests/tiny_models.py", "dspark_export/tracing/seams.py"} <= read
    assert "runtime/dspark_runtime/bundle/contract.py" in read
    before, real = made.hexdigest(), digests._hash_of
    monkeypatch.setattr(digests, "_hash_of", lambda file: "edited" if file.name == "experts.py" else real(file))
    assert made.hexdigest() != before


@pytest.mark.parametrize("value", [object(), torch.Generator(), iter([1]), tiny_models.tokenizer().backend_tokenizer])
def test_what_cannot_be_read_has_no_digest(value: object) -> None:
    with pytest.raises(digests.NoDigest):
        digest({"attribute": value})


def test_what_has_no_digest_is_traced_each_time(empty: Path) -> None:
    module = Small()
    module.unreadable = object()  # type: ignore[assignment]
    traces.shared_export(module, EXAMPLE, dynamo=True, optimize=False, verbose=False)
    assert stored(empty) == 0


def test_a_folder_is_made_once_or_not_at_all(empty: Path) -> None:
    def fail(folder: Path) -> None:
        (folder / "half").touch()
        raise ValueError("made to fail")

    with pytest.raises(ValueError, match="made to fail"):
        folders.shared_folder("kind", "digest", fail)
    assert not list(empty.glob("kind/digest*/"))
    made = folders.shared_folder("kind", "digest", lambda folder: (folder / "whole").touch())
    assert folders.shared_folder("kind", "digest", fail) == made
    assert [path.name for path in made.iterdir()] == ["whole"]
    folders.remove_unused(days=1)
    assert made.is_dir()
    folders.remove_unused(days=-1)
    assert not made.exists()
