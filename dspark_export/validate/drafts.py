"""Trained drafters in PyTorch, and their graphs compared with them on recorded passes."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from dspark_export.drafts.export import kind_of
from dspark_export.drafts.formats import recognise
from dspark_export.drafts.formats.draft import DraftCheckpoint
from dspark_export.drafts.opened import TargetTables
from dspark_export.drafts.pair_check import require_pair
from dspark_export.drafts.recording import Call, record
from dspark_export.passes.packed_weights import load_plain
from dspark_export.validate.checks import Check
from dspark_export.validate.quantized import put_into
from dspark_export.validate.references import ModelRunner
from dspark_export.validate.tolerances import (
    AGAINST_MODEL,
    largest_relative,
    relative_rms,
)
from dspark_runtime import Bundle
from dspark_runtime.arrays import AnyArray
from dspark_runtime.bundle.contract import PAST, PRESENT, GraphContract
from dspark_runtime.bundle.draft_contract import (
    BEAM_PARENTS,
    BEAM_PROBS,
    CONFIDENCE_LOGITS,
    DRAFT_TOKENS,
)
from dspark_runtime.bundle.manifest import DrafterEntry
from dspark_runtime.drafters.parts import DraftOptions
from dspark_runtime.errors import UsageError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from dspark_export.checkpoints import Checkpoint

_AFTER_A_CHOICE = ("corrected_logits", "confidence_logits", "candidate_probs")
_REACHES = "beam_reaches"
_MEANING = {
    "ctx_features": "projection and norm of the target's features",
    "ctx_keys": "keys of the context",
    "ctx_values": "values of the context",
    "block_hidden": "decoder layers of the drafter",
    "base_logits": "head",
    "corrected_logits": "Markov head",
    "draft_tokens": "choice of the drafted tokens",
    "draft_probs": "distribution of the drafted tokens",
    "confidence_logits": "confidence head",
    "candidate_tokens": "candidates",
    "candidate_probs": "probabilities of the candidates",
    "beam_": "likely texts",
    "logits": "logits",
    "hidden": "decoder layer of the drafter",
}


@dataclass(frozen=True)
class Reference:
    """A drafter of the bundle in PyTorch. ``modules``: by graph, with their contracts, in float32; of a draft model
    ``model``."""

    entry: DrafterEntry
    modules: dict[str, tuple[torch.nn.Module, GraphContract]]
    model: PreTrainedModel | None = None


def references(
    bundle: Bundle, target: Checkpoint, model: PreTrainedModel, drafts: Sequence[str], allow_own_embeddings: bool = True
) -> dict[str, Reference]:
    """The drafters whose checkpoints ``drafts`` are, by their names in the bundle.

    Raises:
        UsageError: a draft that no drafter of the bundle was made from.
    """
    found: dict[str, Reference] = {}
    trained = [entry for entry in bundle.manifest.drafters if entry.trained]
    for draft in drafts:
        checkpoint = require_pair(target, recognise(draft), allow_own_embeddings=allow_own_embeddings)
        files = checkpoint.files if isinstance(checkpoint, DraftCheckpoint) else checkpoint.source().files
        entry = next((e for e in trained if e.source is not None and dict(e.source.files) == dict(files or {})), None)
        if entry is None:
            raise UsageError(
                f"--draft {draft}: no drafter of the bundle was made from these files; it has "
                f"{', '.join(e.name for e in trained) or 'no trained drafters'}"
            )
        if isinstance(checkpoint, DraftCheckpoint):
            found[entry.name] = Reference(entry, _modules(bundle, entry, checkpoint, model))
        else:
            kind = getattr(torch, bundle.files.graph(entry.graph_name).dtype)
            own = checkpoint.load_model(kind)
            torch.nn.Module.float(own)
            if bundle.manifest.precision.quantized:
                put_into(own, load_plain(bundle.files.path(bundle.files.graph(entry.graph_name).file)))
            found[entry.name] = Reference(entry, {}, own)
    return found


def _modules(
    bundle: Bundle, entry: DrafterEntry, checkpoint: DraftCheckpoint, model: PreTrainedModel
) -> dict[str, tuple[torch.nn.Module, GraphContract]]:
    kind = getattr(torch, bundle.files.graph(entry.graph_name).dtype)
    rounded = {name: tensor.to(kind).float() for name, tensor in checkpoint.tensors.items()}
    checkpoint = replace(checkpoint, tensors=rounded)
    path = entry.vocab_map
    ids = None if path is None else torch.from_numpy(np.load(bundle.files.path(path)))
    made = kind_of(checkpoint).modules(checkpoint, entry, TargetTables.of(model).float(), ids)
    return {contract.name: (module, contract) for module, contract in made}


@torch.inference_mode()
def in_pytorch(module: torch.nn.Module, contract: GraphContract, call: Call) -> dict[str, AnyArray]:
    """Outputs of ``module`` for a recorded pass, caches left out."""
    inputs = []
    for spec in contract.inputs:
        array = call.cache[spec.name] if spec.name.startswith(PAST) else call.inputs[spec.name]
        tensor = torch.from_numpy(np.array(array))
        inputs.append(tensor.float() if tensor.is_floating_point() else tensor)
    outputs = module(*inputs)
    return {
        spec.name: tensor.numpy()
        for spec, tensor in zip(contract.outputs, outputs, strict=False)
        if not spec.name.startswith(PRESENT)
    }


def check_drafter(bundle: Bundle, reference: Reference, prompts: Sequence[Sequence[int]], tokens: int) -> Check:
    """Every output of the drafter's graphs, inner values included, against PyTorch on the passes of real texts."""
    began = time.perf_counter()
    quantized = bundle.manifest.precision.quantized
    limit = bundle.manifest.precision.kind.draft_within or AGAINST_MODEL
    off: dict[str, float] = {}
    passes = 0
    for prompt in prompts:
        for options in (DraftOptions(branches=1), DraftOptions(branches=3)):
            calls = record(bundle, prompt, reference.entry.name, tokens, options, caches=True)[0].calls
            for call in calls:
                module, contract = reference.modules[call.graph]
                passes += 1
                for name, size in _differences(in_pytorch(module, contract, call), call.found, quantized).items():
                    off[name] = max(off.get(name, 0.0), size)
    wrong = next((name for name, size in off.items() if size > limit), "")
    worst = off[wrong] if wrong else max(off.values(), default=0.0)
    part = next((text for start, text in _MEANING.items() if wrong.startswith(start)), wrong)
    return Check(
        id=f"numerics.{reference.entry.name}",
        family="numerics",
        title=f"{reference.entry.name} against PyTorch",
        status="failed" if wrong else "passed",
        measured=float(worst) if np.isfinite(worst) else None,
        limit=limit,
        unit="root mean square, relative" if quantized else "of the largest magnitude",
        where=f"{wrong}: {part}" if wrong else "",
        message=f"{wrong} is the first value that is off, so look at its {part}; "
        "`dspark-export draft-trace` writes all of them."
        if wrong
        else "",
        seconds=time.perf_counter() - began,
        data={"values": {name: size if np.isfinite(size) else None for name, size in off.items()}, "passes": passes},
    )


def _differences(wanted: dict[str, AnyArray], found: dict[str, AnyArray], quantized: bool) -> dict[str, float]:
    """In the order of computation, so that the first that is off is the cause."""
    wanted, found = (_with_reaches(outputs) for outputs in (wanted, found))
    order = list(_MEANING)
    names = [name for name in wanted if name in found and wanted[name].size]
    names.sort(key=lambda name: next((i for i, start in enumerate(order) if name.startswith(start)), len(order)))
    off = {}
    for name in names:
        a, b = found[name], wanted[name]
        if b.dtype.kind in "iu":
            if not quantized and name == DRAFT_TOKENS:
                off[name] = float(np.mean(a != b))
        elif quantized and name == _REACHES:
            continue  # of other texts; the logits they follow from are compared
        elif quantized:
            a, b = np.where(np.isfinite(b), a, 0.0), np.where(np.isfinite(b), b, 0.0)
            if name in _AFTER_A_CHOICE and DRAFT_TOKENS in wanted:  # other drafts before it: another question
                same = np.cumprod(found[DRAFT_TOKENS] == wanted[DRAFT_TOKENS], 1)[:, :-1].astype(bool)
                same = np.concatenate([np.ones_like(same[:, :1]), same], 1)
                a, b = a[same], b[same]
            off[name] = relative_rms(a, b, 1.0 if name == CONFIDENCE_LOGITS else 1e-6)
        else:
            finite = np.isfinite(b)
            off[name] = largest_relative(np.where(finite, a, 0.0), np.where(finite, b, 0.0))
    return off


def _with_reaches(outputs: dict[str, AnyArray]) -> dict[str, AnyArray]:
    """The nodes of the likely texts as one sorted list of how likely they are to be reached: where two are equally
    likely, rounding decides which comes first."""
    if BEAM_PROBS not in outputs:
        return outputs
    reach = np.array(outputs[BEAM_PROBS], np.float32)
    for sequence, parents in zip(reach, outputs[BEAM_PARENTS], strict=True):
        for node, parent in enumerate(parents.tolist()):
            if parent >= 0:
                sequence[node] *= sequence[parent]
    others = {name: array for name, array in outputs.items() if not name.startswith("beam_")}
    return {**others, _REACHES: np.sort(reach, axis=1)}


def check_draft_model(bundle: Bundle, reference: Reference, checker: Any) -> Check:
    """The graph of an independent draft model against that model."""
    assert reference.model is not None
    model = reference.model
    graph = bundle.files.graph(reference.entry.graph_name, prefer=("onnxruntime-cpu",))
    layers = range(int(model.config.get_text_config().num_hidden_layers))
    found: Check = checker.against(graph, lambda passes: ModelRunner(model, passes, layers), reference.entry.name)
    return found
