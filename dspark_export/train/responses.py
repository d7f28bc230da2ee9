"""What the target itself says to prompts: generated, deduplicated, kept as JSON lines of token ids.

Text that is not the target's own teaches a drafter little: it has to guess the target, not the world. The file grows by
whole lines; a run that is killed goes on behind the last complete one.
"""

from __future__ import annotations

import json
import random
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch

from dspark_runtime.errors import UsageError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from dspark_runtime.text import TextCodec

OnStep = Callable[[int], None]
_EVERY = 32


@dataclass(frozen=True)
class Response:
    """Token ids of a rendered prompt and of what the target answered; ``temperature`` 0 is greedy."""

    prompt: tuple[int, ...]
    response: tuple[int, ...]
    temperature: float


class ResponseFile:
    """Responses in a file of JSON lines, ``prompt``, ``response`` and ``temperature`` each."""

    def __init__(self, path: Path, read_only: bool = False) -> None:
        self.path = path
        if not read_only:
            self._drop_torn_line()

    def _drop_torn_line(self) -> None:
        if not self.path.exists():
            return
        with self.path.open("rb+") as file:
            content = file.read()
            end = content.rfind(b"\n") + 1
            if end != len(content):
                file.truncate(end)

    def __iter__(self) -> Iterator[Response]:
        if not self.path.exists():
            return
        with self.path.open(encoding="utf-8") as file:
            for number, line in enumerate(file, 1):
                yield _parse(line, f"{self.path}:{number}")

    def __len__(self) -> int:
        return sum(1 for _ in self)

    def append(self, responses: Sequence[Response]) -> None:
        """Add lines at the end."""
        with self.path.open("a", encoding="utf-8") as file:
            for item in responses:
                fields = {"prompt": item.prompt, "response": item.response, "temperature": item.temperature}
                file.write(json.dumps(fields) + "\n")


def _parse(line: str, where: str) -> Response:
    try:
        fields = json.loads(line)
        prompt, response = (tuple(int(t) for t in fields[name]) for name in ("prompt", "response"))
        return Response(prompt, response, float(fields.get("temperature", 0.0)))
    except (ValueError, KeyError, TypeError) as error:
        raise UsageError(
            f"{where} is no response ({error}); give JSON lines of prompt and response, both token ids"
        ) from error


def split(responses: Iterable[Response], held_out: int) -> tuple[list[Response], list[Response]]:
    """Responses to learn from and to judge by: of every 32 prompts one is kept apart, and ``held_out`` of those judge.

    What goes where follows from the prompt alone, so it stays as it is when responses are added. Drafters are judged by
    greedy responses only.
    """
    learn: list[Response] = []
    judge: list[Response] = []
    for item in responses:
        if not _kept_apart(item.prompt):
            learn.append(item)
        elif item.temperature == 0 and len(judge) < held_out:
            judge.append(item)
    return learn, judge


def _kept_apart(prompt: Sequence[int]) -> bool:
    return zlib.crc32(np.asarray(prompt, "<i4").tobytes()) % _EVERY == 0


def read_prompts(files: Sequence[Path]) -> list[str]:
    """The prompts of all files: ``.jsonl`` with ``prompt`` or ``turns``, otherwise a line each; duplicates once."""
    from dspark_export.bench.prompts import load_sets

    return list(dict.fromkeys(item.text for item in load_sets([str(file) for file in files]))) if files else []


def opening(codec: TextCodec) -> list[int]:
    """Token ids of the chat template up to where a user's text begins; ChatTemplateError without a template."""
    marks = [codec.encode_chat([{"role": "user", "content": mark}]) for mark in ("a", "7")]
    same = 0
    while same < min(map(len, marks)) and marks[0][same] == marks[1][same]:
        same += 1
    return marks[0][:same]


@torch.inference_mode()
def generate(
    model: PreTrainedModel,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    temperature: float,
    ends: Sequence[int],
    seed: int,
    top_p: float = 1.0,
) -> list[list[int]]:
    """Continuations of a batch of prompts, each up to and with its end token."""
    device = next(model.parameters()).device
    width = max(map(len, prompts))
    pad = ends[0] if ends else 0
    ids = torch.full((len(prompts), width), pad, device=device)
    mask = torch.zeros_like(ids)
    for row, prompt in enumerate(prompts):
        ids[row, width - len(prompt) :] = torch.tensor(prompt, device=device)
        mask[row, width - len(prompt) :] = 1
    torch.manual_seed(seed)
    drawn = {"do_sample": True, "temperature": temperature, "top_p": top_p, "top_k": 0} if temperature else {}
    out = model.generate(
        input_ids=ids,
        attention_mask=mask,
        max_new_tokens=max_new_tokens,
        pad_token_id=pad,
        eos_token_id=list(ends) or None,
        **({"do_sample": False} | drawn),
    )
    return [_until_end(row[width:].tolist(), ends) for row in out]


def _until_end(tokens: list[int], ends: Sequence[int]) -> list[int]:
    for place, token in enumerate(tokens):
        if token in ends:
            return tokens[: place + 1]
    return tokens


@dataclass(frozen=True)
class Plan:
    """How responses are made: ``count`` of them, ``max_new_tokens`` each, in batches; temperatures take turns."""

    count: int
    max_new_tokens: int = 256
    batch: int = 32
    temperatures: tuple[float, ...] = (0.0, 0.7)
    synthesise: int = 0
    seed: int = 0

    def __post_init__(self) -> None:
        for option, value, low in (
            ("--count", self.count, 1),
            ("--max-new-tokens", self.max_new_tokens, 2),
            ("--synthesise", self.synthesise, 0),
        ):
            if value < low:
                raise UsageError(f"{option} {value}: give at least {low}")
        if not self.temperatures or not all(0 <= t <= 100 for t in self.temperatures):
            raise UsageError(f"--temperatures {self.temperatures}: give numbers from 0 to 100, 0 for greedy")


def make_responses(
    model: PreTrainedModel,
    codec: TextCodec,
    prompts: Sequence[str],
    file: ResponseFile,
    plan: Plan,
    ends: Sequence[int],
    on_step: OnStep = lambda _: None,
) -> None:
    """Extend ``file`` to ``plan.count`` responses, or to one for every prompt; goes on where an earlier run stopped.

    Up to ``plan.synthesise`` prompts are written by the target, which continues its own chat template where a user's
    turn begins. Raises UsageError if there are no prompts at all.
    """
    done = {item.prompt for item in file}
    made = len(done)
    if not prompts and not plan.synthesise:
        raise UsageError(
            "there are no prompts: name files with --prompts, or let the model write some with --synthesise"
        )
    rendered_texts = list(dict.fromkeys(tuple(_render(codec, text)) for text in prompts))
    random.Random(plan.seed).shuffle(rendered_texts)
    texts = [ids for ids in rendered_texts if ids not in done]
    own_left = max(0, plan.synthesise - (made - (len(rendered_texts) - len(texts))))
    round_ = made // plan.batch
    while made < plan.count and (texts or own_left):
        wanted = min(plan.batch, plan.count - made)
        own = min(own_left, max(wanted - len(texts), round(wanted * own_left / (own_left + len(texts)))))
        own_left -= own
        rendered = _synthesised(model, codec, own, ends, plan.seed + round_) if own else []
        rendered += [texts.pop() for _ in range(min(wanted - own, len(texts)))]
        fresh = list(dict.fromkeys(ids for ids in rendered if ids and ids not in done))
        turn = plan.temperatures[round_ % len(plan.temperatures)]
        found: list[Response] = []
        for temperature in sorted({0.0, turn}):  # drafters are judged by greedy responses
            chosen = [ids for ids in fresh if (0.0 if _kept_apart(ids) else turn) == temperature]
            if not chosen:
                continue
            outputs = generate(
                model,
                chosen,
                max_new_tokens=plan.max_new_tokens,
                temperature=temperature,
                ends=ends,
                seed=plan.seed + round_,
            )
            found += [Response(p, tuple(r), temperature) for p, r in zip(chosen, outputs, strict=True) if len(r) > 1]
        file.append(found)
        done.update(fresh)
        made += len(found)
        on_step(made)
        round_ += 1


def _render(codec: TextCodec, text: str) -> list[int]:
    from dspark_runtime.errors import ChatTemplateError

    try:
        return codec.encode_chat([{"role": "user", "content": text}])
    except ChatTemplateError:
        return codec.encode(text)


def _synthesised(
    model: PreTrainedModel, codec: TextCodec, count: int, ends: Sequence[int], seed: int
) -> list[tuple[int, ...]]:
    start = opening(codec)
    written = generate(model, [start] * count, max_new_tokens=96, temperature=1.0, ends=ends, seed=seed, top_p=0.95)
    texts = [codec.decode(tokens[:-1] if tokens and tokens[-1] in ends else tokens).strip() for tokens in written]
    return [tuple(_render(codec, text)) for text in texts if len(text) > 3]
