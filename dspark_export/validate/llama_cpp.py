"""llama.cpp as a reference for GGUF files: another reader and another implementation, so a fault of ours shows.

It runs in a process of its own: a wheel built for another processor ends its process without an exception.
"""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from dspark_export.validate.checks import Check
from dspark_export.validate.tolerances import LLAMA_CPP, LLAMA_CPP_QUANTIZED
from dspark_runtime.errors import BackendError, UsageError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from dspark_export.checkpoints.gguf_file import GgufFile

LIBRARIES = ("xllamacpp", "llama_cpp")
"""Wheels of llama.cpp that can be used, the preferred one first; ``pip install xllamacpp`` is prebuilt."""

_TIMEOUT = 1800
_MARK = "LOGITS "


def installed() -> list[str]:
    """The libraries of :data:`LIBRARIES` that are installed."""
    return [name for name in LIBRARIES if importlib.util.find_spec(name) is not None]


def llama_cpp_logits(
    gguf: Path, texts: Sequence[Sequence[int]], context: int, threads: int = 1
) -> list[npt.NDArray[np.float64]]:
    """Logits after the last token of each text [vocab], NaN where llama.cpp gives none, each up to a constant.

    Args:
        context: positions of llama.cpp's context; LongRoPE models choose their factors by it.

    Raises:
        UsageError: no library is installed.
        BackendError: none of them can run the file.
    """
    if not installed():
        raise UsageError("llama.cpp is not installed; install a wheel of it: pip install xllamacpp")
    settings = {"model": str(gguf), "context": context, "threads": threads, "plain_token": _plain_token(gguf)}
    job = json.dumps({**settings, "texts": [list(text) for text in texts]})
    problems = []
    for library in installed():
        worker = str(Path(__file__).with_name("llama_cpp_worker.py"))
        try:
            done = subprocess.run(
                [sys.executable, worker, library], input=job, capture_output=True, text=True, timeout=_TIMEOUT
            )
        except subprocess.TimeoutExpired:
            problems.append(f"{library} gave no answer in {_TIMEOUT} s")
            continue
        rows = [json.loads(line[len(_MARK) :]) for line in done.stdout.splitlines() if line.startswith(_MARK)]
        if done.returncode == 0 and len(rows) == len(texts):
            return [_dense(row) for row in rows]
        last = (done.stderr.strip().splitlines() or ["no message"])[-1][:300]
        problems.append(f"{library} ended with code {done.returncode}: {last}")
    raise BackendError(f"llama.cpp cannot run {gguf}: {'; '.join(problems)}")


def _plain_token(gguf: Path) -> int:
    """A token whose text is one ASCII letter: llama.cpp's server gives no logits beside a part of a character."""
    from gguf import GGUFReader

    tokens = GGUFReader(gguf).fields["tokenizer.ggml.tokens"].contents()
    return next((index for index, text in enumerate(tokens) if len(text) == 1 and text.isascii() and text.isalpha()), 0)


def _dense(row: dict[str, float]) -> npt.NDArray[np.float64]:
    dense = np.full(max(map(int, row)) + 1, np.nan)
    for token, value in row.items():
        dense[int(token)] = value
    return dense


def difference(ours: npt.NDArray[np.float64], theirs: npt.NDArray[np.float64]) -> float:
    """Largest difference between two vectors of logits, both centred, over the tokens that both have."""
    both = min(len(ours), len(theirs))
    known = np.isfinite(theirs[:both]) & (theirs[:both] > -1e4)
    mine, other = ours[:both][known], theirs[:both][known]
    return float(np.abs((mine - mine.mean()) - (other - other.mean())).max())


def check_llama_cpp(file: GgufFile, model: PreTrainedModel, texts: Sequence[Sequence[int]], threads: int) -> Check:
    """What was read from ``file`` against llama.cpp's reading of it, by the logits after each text."""
    import torch

    began = time.perf_counter()
    theirs = llama_cpp_logits(file.path, texts, max(map(len, texts)) + 8, threads)
    with torch.no_grad():
        ours = [model(torch.tensor([list(text)]), use_cache=False).logits[0, -1].double().numpy() for text in texts]
    off = [difference(mine, other) / float(np.ptp(mine)) for mine, other in zip(ours, theirs, strict=True)]
    worst = int(np.argmax(off))
    floats = set(file.kinds.values()) == {"F32"}
    limit = LLAMA_CPP if floats else LLAMA_CPP_QUANTIZED
    passed = off[worst] <= limit
    return Check(
        id="numerics.llama.cpp",
        family="numerics",
        title="The GGUF file as llama.cpp reads it",
        status="passed" if passed else "failed",
        measured=off[worst],
        limit=limit,
        unit="largest difference of logits over their range",
        where="" if passed else f"after the {len(texts[worst])} tokens of text {worst + 1}",
        message=""
        if passed
        else "The model that was read from the file is not the one llama.cpp runs: a setting or a weight is read "
        "otherwise. Build from the model's safetensors checkpoint.",
        seconds=time.perf_counter() - began,
        data={"texts": off},
    )
