"""Lets copies of a bundle answer prompts side by side, as actors of Ray Data.

Prompts go out in shards, and the answers of a shard come back when all of them are there. Every text depends on its
prompt and the seed alone, so which actor has which shard makes no difference, and a run that goes on later sends the
prompts that were not answered, in other shards.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from dspark_export.prompts.answers import Response, answer
from dspark_runtime import Bundle, SamplingParams
from dspark_runtime.errors import UsageError

_WAVES = 8  # prompts of a shard, in rows: the last texts of a shard leave rows empty


@dataclass(frozen=True)
class Copy:
    """What each actor runs: the bundle at ``path``, with ``threads`` (None: all cores), ``rows`` texts at once
    of up to ``max_new_tokens`` tokens, drawn with ``seed``."""

    path: str
    threads: int | None
    rows: int
    max_new_tokens: int
    seed: int


class ShardWriter:
    """One copy of the bundle, that answers shards: JSON of prompts and temperatures in, of responses out."""

    def __init__(self, copy: dict[str, Any]) -> None:
        self._copy = Copy(**copy)
        self._bundle = Bundle.open(self._copy.path, threads=self._copy.threads)

    def __call__(self, row: dict[str, Any]) -> dict[str, Any]:
        """``row["shard"]`` holds the prompts; the responses are in ``"shard"`` of the result."""
        asked, copy = json.loads(row["shard"]), self._copy
        params = [SamplingParams(temperature=temperature) for _, temperature in asked]
        prompts = [prompt for prompt, _ in asked]
        answers = answer(
            self._bundle, prompts, params, max_new_tokens=copy.max_new_tokens, seed=copy.seed, rows=copy.rows
        )
        return {"shard": json.dumps([(item.prompt, item.response, item.temperature) for item in answers])}


def answer_with_actors(
    copy: Copy, prompts: Sequence[Sequence[int]], temperatures: Sequence[float], actors: int
) -> Iterator[Response]:
    """What ``actors`` copies answer to different ``prompts``, shard by shard as they come.

    ``copy.path`` must lead to the bundle on every machine of the Ray cluster that this process has joined or, without
    one, on this machine.

    Raises:
        UsageError: Ray Data is not installed.
    """
    try:
        import ray
        import ray.data
    except ImportError as error:
        raise UsageError(
            f"--actors needs Ray Data, and there is no {error.name}: pip install 'ray[data]', or leave it out"
        ) from error
    if not prompts:
        return
    pairs = list(zip(map(list, prompts), temperatures, strict=True))
    size = max(1, min(_WAVES * copy.rows, -(-len(pairs) // actors)))
    shards = [{"shard": json.dumps(pairs[first : first + size])} for first in range(0, len(pairs), size)]
    answered = ray.data.from_items(shards, override_num_blocks=len(shards)).map(
        ShardWriter,
        fn_constructor_args=(asdict(copy),),
        compute=ray.data.ActorPoolStrategy(size=min(actors, len(shards))),
        num_cpus=copy.threads or 1,
    )
    for row in answered.iter_rows():
        for prompt, response, temperature in json.loads(row["shard"]):
            yield Response(tuple(prompt), tuple(response), temperature)
