"""llama.cpp through the wheel xllamacpp: the original GGUF file, and the same in other types.

Q4_0 and Q8_0 are the types llama.cpp repacks for the processor when it loads them.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks.peers.models import SharedModel
from benchmarks.peers.protocol import Candidate, Missing, Timed, missing_package

_CONTEXT = 4096
_FAMILIES = {"F32": "fp32", "F16": "fp32", "BF16": "fp32", "Q8_0": "int8"}  # all others: int4


class LlamaCppPeer:
    """Greedy completions of its server's engine, called in the process, from an empty cache each time."""

    setting = None

    def __init__(self, path: Path, kind: str, threads: int) -> None:
        try:
            import xllamacpp
        except ImportError as error:
            raise missing_package("xllamacpp") from error
        self.name = f"llama.cpp {kind}"
        self.precision = kind
        self.family = _FAMILIES.get(kind, "int4")
        settings = xllamacpp.CommonParams()
        settings.model.path = str(path)
        settings.n_ctx, settings.n_parallel = _CONTEXT, 1
        settings.cpuparams.n_threads = settings.cpuparams_batch.n_threads = threads
        self._server: Any = xllamacpp.Server(settings)
        self._ids: dict[tuple[tuple[int, ...], int], tuple[int, ...]] = {}

    def generate(self, prompt: Sequence[int], max_new_tokens: int) -> Timed:
        """Tokens come one by one; an end-of-text token does not stop it.

        Streamed text has no ids, and asking for them costs time: a run of its own, once for each prompt, does.
        """
        key = (tuple(prompt), max_new_tokens)
        if key not in self._ids:
            self._ids[key] = tuple(self._run(prompt, max_new_tokens, n_probs=1)[0])
        _, times = self._run(prompt, max_new_tokens)
        return Timed(self._ids[key], 1, times[0], times[-1])

    def _run(self, prompt: Sequence[int], max_new_tokens: int, **more: int) -> tuple[list[int], list[float]]:
        """Ids, if ``more`` asks for probabilities, and the seconds at which text arrived."""
        request = {
            "prompt": list(prompt),
            "n_predict": max_new_tokens,
            "temperature": 0.0,
            "ignore_eos": True,
            "cache_prompt": False,
            "stream": True,
            **more,
        }
        ids: list[int] = []
        times: list[float] = []
        refused: list[str] = []

        def heard(chunk: Any) -> bool:
            for part in chunk if isinstance(chunk, list) else [chunk]:
                if "error" in part:
                    refused.append(str(part["error"]))
                for choice in part.get("choices", ()):
                    if choice["finish_reason"] is None:
                        times.append(time.perf_counter() - began)
                        ids.extend(entry["id"] for entry in (choice["logprobs"] or {}).get("content", ()))
            return False

        began = time.perf_counter()
        self._server.handle_completions(request, heard)
        if refused or not times:
            raise RuntimeError(f"llama.cpp did not complete a prompt of {len(prompt)} tokens: {refused}")
        return ids, times


def candidates(model: SharedModel, threads: int) -> Iterator[Candidate]:
    """The types a GGUF checkpoint is available in; for other checkpoints, one candidate that says why it cannot run."""
    if not model.is_gguf:
        yield Candidate("llama.cpp", lambda: LlamaCppPeer(model.gguf("F32"), "F32", threads))
        return
    own = Path(model.source).stem.rsplit(".", 1)[-1]
    for kind in ("F32", "BF16", "Q8_0", "Q4_0"):
        if kind != own:
            yield Candidate(f"llama.cpp {kind}", partial(_converted, model, kind, threads))
    yield Candidate(f"llama.cpp {own}", lambda: LlamaCppPeer(Path(model.source), own, threads))


def _converted(model: SharedModel, kind: str, threads: int) -> LlamaCppPeer:
    try:
        return LlamaCppPeer(model.gguf(kind), kind, threads)
    except (OSError, ValueError, RuntimeError) as error:
        raise Missing(f"llama.cpp cannot use {model.source} as {kind}: {error}") from error
