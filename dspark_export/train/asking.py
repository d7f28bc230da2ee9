"""Lets the target answer prompts, some of which it writes itself.

Files grow by whole lines; a killed run resumes after the last complete one.
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from dspark_export.prompts.answers import Response, opening
from dspark_export.prompts.sets import load_sets
from dspark_export.train.decode import DecodeOptions, Question, decode
from dspark_export.train.features import Rows
from dspark_export.train.responses import EVERY, ResponseFile, drop_torn_line, prompt_number
from dspark_runtime.errors import ChatTemplateError, UsageError
from dspark_runtime.speculation.sampling import SamplingParams

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from dspark_runtime.text.codec import TextCodec

OnStep = Callable[[int], None]
_PROMPT_TOKENS = 96  # of a prompt the target writes


def read_prompts(files: Sequence[Path]) -> list[str]:
    """The prompts of all files: ``.jsonl`` with ``prompt`` or ``turns``, otherwise a line each; duplicates once."""
    return list(dict.fromkeys(item.text for item in load_sets([str(file) for file in files]))) if files else []


@dataclass(frozen=True)
class Plan:
    """How responses are made: ``count`` of them, ``max_new_tokens`` each, ``slots`` at once. A prompt's temperature
    is one of ``temperatures``, by the prompt alone."""

    count: int
    max_new_tokens: int = 256
    slots: int = 64
    temperatures: tuple[float, ...] = (0.0, 0.7)
    synthesise: int = 0
    seed: int = 0

    def __post_init__(self) -> None:
        for option, value, low in (
            ("--count", self.count, 1),
            ("--max-new-tokens", self.max_new_tokens, 2),
            ("--slots", self.slots, 1),
            ("--synthesise", self.synthesise, 0),
        ):
            if value < low:
                raise UsageError(f"{option} {value}: give at least {low}")
        if not self.temperatures or not all(0 <= t <= 100 for t in self.temperatures):
            raise UsageError(f"--temperatures {self.temperatures}: give numbers from 0 to 100, 0 for greedy")

    def temperature(self, prompt: Sequence[int]) -> float:
        """What this prompt is answered at: greedily where the answer may judge the drafter."""
        number = prompt_number(prompt)
        return 0.0 if number % EVERY == 0 else self.temperatures[number // EVERY % len(self.temperatures)]


class PromptFile:
    """Prompts the target wrote itself, a JSON line each; like :class:`ResponseFile` it grows by whole lines."""

    def __init__(self, path: Path) -> None:
        self._path = path
        drop_torn_line(path)

    def __iter__(self) -> Iterator[str]:
        if self._path.exists():
            with self._path.open(encoding="utf-8") as file:
                yield from (str(json.loads(line)["prompt"]) for line in file)

    def append(self, text: str) -> None:
        """Add a prompt."""
        with self._path.open("a", encoding="utf-8") as file:
            file.write(json.dumps({"prompt": text}) + "\n")


def synthesise_prompts(
    model: PreTrainedModel,
    codec: TextCodec,
    file: PromptFile,
    plan: Plan,
    ends: Sequence[int],
    on_step: OnStep = lambda _: None,
) -> None:
    """Extend ``file`` to ``plan.synthesise`` prompts: the target continues its own chat template where a user's turn
    begins."""
    made = len(list(file))
    if made >= plan.synthesise:
        return
    params = SamplingParams(temperature=1.0, top_p=0.95)
    start = tuple(opening(codec) or ends[:1])
    questions = (Question(start, params, number) for number in range(made, plan.synthesise))
    options = DecodeOptions(plan.slots, _PROMPT_TOKENS, tuple(ends), plan.seed)
    for answer in decode(model, questions, options):
        said = answer.tokens[:-1] if answer.tokens[-1] in ends else answer.tokens
        file.append(codec.decode(said).strip())
        made += 1
        on_step(made)


def make_responses(
    model: PreTrainedModel,
    codec: TextCodec,
    prompts: Sequence[str],
    file: ResponseFile,
    plan: Plan,
    ends: Sequence[int],
    taps: Sequence[int] = (),
    top: int = 64,
    on_answer: Callable[[Response, Rows | None], None] = lambda *_: None,
) -> None:
    """Extend ``file`` to ``plan.count`` responses, or to one for every prompt; goes on where an earlier run stopped.

    ``on_answer`` gets every response once it is in the file, with the rows of it if there are ``taps``. Raises
    UsageError if there are no prompts at all.
    """
    if not prompts:
        raise UsageError(
            "there are no prompts: name files with --prompts, or let the model write some with --synthesise"
        )
    done = {item.prompt for item in file}
    rendered = list(dict.fromkeys(tuple(_render(codec, text)) for text in prompts if len(text) > 3))
    random.Random(plan.seed).shuffle(rendered)
    wanted = [ids for ids in rendered if ids and ids not in done][: max(0, plan.count - len(done))]
    questions = (Question(ids, SamplingParams(temperature=plan.temperature(ids))) for ids in wanted)
    options = DecodeOptions(plan.slots, plan.max_new_tokens, tuple(ends), plan.seed, tuple(taps), top)
    for answer in decode(model, questions, options):
        if len(answer.tokens) > 1:
            response = Response(answer.question.prompt, answer.tokens, answer.question.params.temperature)
            file.append([response])
            on_answer(response, answer.rows)


def _render(codec: TextCodec, text: str) -> list[int]:
    try:
        return codec.encode_chat([{"role": "user", "content": text}])
    except ChatTemplateError:
        return codec.encode(text)
