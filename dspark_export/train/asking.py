"""Lets a bundle of the target answer prompts, some of which it writes itself.

What is done is in the file of responses; a run that was killed goes on with the rest, and writes the same file.
"""

from __future__ import annotations

import hashlib
import itertools
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from dspark_export.prompts import ROWS
from dspark_export.prompts.answers import Response, answer, self_prompts
from dspark_export.prompts.packed import Origin, PackedResponses
from dspark_export.prompts.sets import load_sets
from dspark_export.prompts.spread import Copy, answer_with_actors
from dspark_export.prompts.texts import encode
from dspark_export.train.responses import EVERY, prompt_number
from dspark_runtime import Bundle, SamplingParams
from dspark_runtime.bundle.files import TOKENIZER_DIR
from dspark_runtime.errors import UsageError

OnStep = Callable[[int], None]
_SHORTEST = 4  # characters of a prompt that is worth an answer
_LONGEST = 1024  # tokens of one, or half of the model's positions: room is reserved for the longest in every row


def read_prompts(files: Sequence[Path]) -> list[str]:
    """The prompts of all files: ``.jsonl`` with ``prompt`` or ``turns``, otherwise a line each; duplicates once."""
    return list(dict.fromkeys(item.text for item in load_sets([str(file) for file in files]))) if files else []


@dataclass(frozen=True)
class Plan:
    """How responses are made: ``count`` of them, ``max_new_tokens`` each, ``rows`` at once, ``synthesise`` of them to
    prompts that the model wrote. A prompt's temperature is one of ``temperatures``, by the prompt alone. ``actors`` of
    Ray Data write, each ``rows`` at once; 0: this process."""

    count: int
    max_new_tokens: int = 256
    rows: int = ROWS
    temperatures: tuple[float, ...] = (0.0, 0.7)
    synthesise: int = 0
    seed: int = 0
    actors: int = 0

    def __post_init__(self) -> None:
        for option, value, low in (
            ("--count", self.count, 1),
            ("--max-new-tokens", self.max_new_tokens, 2),
            ("--rows", self.rows, 1),
            ("--synthesise", self.synthesise, 0),
            ("--actors", self.actors, 0),
        ):
            if value < low:
                raise UsageError(f"{option} {value}: give at least {low}")
        if not self.temperatures or not all(0 <= t <= 100 for t in self.temperatures):
            raise UsageError(f"--temperatures {self.temperatures}: give numbers from 0 to 100, 0 for greedy")

    def temperature(self, prompt: Sequence[int]) -> float:
        """What this prompt is answered at: greedily where the answer may judge the drafter."""
        number = prompt_number(prompt)
        return 0.0 if number % EVERY == 0 else self.temperatures[number // EVERY % len(self.temperatures)]


def origin_of(bundle: Bundle, plan: Plan) -> Origin:
    """What responses of ``bundle`` by ``plan`` depend on."""
    manifest = bundle.manifest
    return Origin(
        model=manifest.source.id,
        files=dict(manifest.source.files),
        tokenizer=manifest.files[f"{TOKENIZER_DIR}/tokenizer.json"].sha256,
        precision=manifest.precision.weights,
        vocab_size=manifest.model.vocab_size,
        seed=plan.seed,
        temperatures=plan.temperatures,
        max_new_tokens=plan.max_new_tokens,
    )


def write_prompts(bundle: Bundle, file: PackedResponses, plan: Plan, on_step: OnStep = lambda _: None) -> None:
    """Extend the prompts in ``file`` that the model wrote to ``plan.synthesise``."""
    first = len(file.own_prompts)
    if first >= plan.synthesise:
        return
    written = self_prompts(bundle, plan.synthesise, plan.seed, first=first, rows=plan.rows)
    for number, text in enumerate(written, first + 1):
        file.add_prompt(text)
        on_step(number)
    file.sync()


def write_responses(
    bundle: Bundle, prompts: Sequence[str], file: PackedResponses, plan: Plan, on_step: OnStep = lambda _: None
) -> None:
    """Extend ``file`` to ``plan.count`` responses, or to one for every prompt: first to those that the model wrote.

    Raises:
        UsageError: there are no prompts at all.
    """
    own = file.own_prompts[: plan.synthesise]
    if not prompts and not own:
        raise UsageError(
            "there are no prompts: name files with --prompts, or let the model write some with --synthesise"
        )
    file.add_source({"prompts": len(prompts), "sha256": _digest(prompts), "own": len(own)})
    asked = list(prompts)
    random.Random(plan.seed).shuffle(asked)
    done = {item.prompt for item in file}
    wanted = list(itertools.islice(_unanswered(bundle, [*own, *asked], done), max(0, plan.count - len(file))))
    for item in _answers(bundle, wanted, plan):
        file.add(item)
        on_step(len(file))
    file.sync()


def _answers(bundle: Bundle, prompts: Sequence[tuple[int, ...]], plan: Plan) -> Iterator[Response]:
    temperatures = [plan.temperature(prompt) for prompt in prompts]
    if plan.actors:
        root, threads = str(bundle.files.root.resolve()), bundle.engine_options.threads
        copy = Copy(root, threads, plan.rows, plan.max_new_tokens, plan.seed)
        return answer_with_actors(copy, prompts, temperatures, plan.actors)
    params = [SamplingParams(temperature=temperature) for temperature in temperatures]
    return answer(bundle, prompts, params, max_new_tokens=plan.max_new_tokens, seed=plan.seed, rows=plan.rows)


def _unanswered(bundle: Bundle, texts: Sequence[str], done: set[tuple[int, ...]]) -> Iterator[tuple[int, ...]]:
    seen = set(done)
    most = min(_LONGEST, bundle.limits.positions // 2)
    for text in texts:
        prompt = tuple(encode(bundle, text)) if len(text) >= _SHORTEST else ()
        if prompt and len(prompt) <= most and prompt not in seen:
            seen.add(prompt)
            yield prompt


def _digest(texts: Sequence[str]) -> str:
    return hashlib.sha256("\0".join(texts).encode("utf-8", "replace")).hexdigest()
