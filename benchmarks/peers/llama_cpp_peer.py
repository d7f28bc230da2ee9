"""llama.cpp through llama-cpp-python: the original GGUF file, and the same in F32 and F16."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial
from itertools import islice
from pathlib import Path

from benchmarks.peers.models import SharedModel
from benchmarks.peers.protocol import Candidate, Missing, Stopwatch, Timed, missing_package

_CONTEXT = 4096


class LlamaCppPeer:
    """Its greedy ``generate``, from an empty cache each time."""

    def __init__(self, path: Path, kind: str, threads: int) -> None:
        try:
            from llama_cpp import Llama
        except ImportError as error:
            raise missing_package("llama-cpp-python") from error
        self.name = f"llama.cpp {kind}"
        self.precision = kind
        self.family = "fp32" if kind in ("F32", "F16") else "int4"
        self._model = Llama(
            str(path), n_ctx=_CONTEXT, n_threads=threads, n_threads_batch=threads, n_gpu_layers=0, verbose=False
        )

    def generate(self, prompt: Sequence[int], max_new_tokens: int) -> Timed:
        """Tokens come one by one; an end-of-text token does not stop it."""
        self._model.reset()
        watch = Stopwatch()
        for token in islice(self._model.generate(list(prompt), temp=0.0, top_k=1), max_new_tokens):
            watch.arrived([token])
        return watch.result()


def candidates(model: SharedModel, threads: int) -> Iterator[Candidate]:
    """The types a GGUF checkpoint is available in; for other checkpoints, one candidate that says why it cannot run."""
    if not model.is_gguf:
        yield Candidate("llama.cpp", lambda: LlamaCppPeer(model.gguf("F32"), "F32", threads))
        return
    for kind in ("F32", "F16"):
        yield Candidate(f"llama.cpp {kind}", partial(_converted, model, kind, threads))
    kind = Path(model.source).stem.rsplit(".", 1)[-1]
    yield Candidate(f"llama.cpp {kind}", lambda: LlamaCppPeer(Path(model.source), kind, threads))


def _converted(model: SharedModel, kind: str, threads: int) -> LlamaCppPeer:
    try:
        return LlamaCppPeer(model.gguf(kind), kind, threads)
    except ImportError as error:
        raise missing_package("llama-cpp-python") from error
    except (OSError, ValueError) as error:
        raise Missing(f"llama.cpp cannot use {model.source} as {kind}: {error}") from error
