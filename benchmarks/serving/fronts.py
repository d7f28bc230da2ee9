"""What a load can be sent to: the service in this process, generate() one after another, any OpenAI server."""

from __future__ import annotations

import json
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any
from unittest.mock import patch
from urllib.request import Request, urlopen

import psutil

from benchmarks.serving.load import Answer
from dspark_runtime import Bundle, Chunk, Service, ServiceOptions, api
from dspark_runtime.decoding import loop
from dspark_runtime.decoding.round import Flight
from dspark_runtime.serving import service
from dspark_runtime.serving.events import Event, Tokens
from dspark_runtime.serving.observer import ServiceObserver

clock = time.perf_counter


@contextmanager
def on_this_thread(read: Callable[[], float]) -> Iterator[None]:
    """Services that are made inside run on the calling thread, by :meth:`Service.turn`; all times, also those the
    schedule learns from, are those of ``read``."""
    with ExitStack() as stack:
        stack.enter_context(patch.object(api, "Service", partial(Service, threaded=False)))
        for module, name in ((loop, "_clock"), (service, "_clock"), (sys.modules[__name__], "clock")):
            stack.enter_context(patch.object(module, name, read))
        yield


class Rounds(ServiceObserver):
    """Adds up the rounds of a loop: seconds, tokens, and sequences that took part."""

    def __init__(self) -> None:
        names = ("rounds", "round_seconds", "round_tokens", "sequence_rounds", "drafted_rounds")
        self.totals = dict.fromkeys(names, 0.0)

    def finished(self, flight: Flight) -> None:
        """See :class:`Observer`."""
        self.totals["rounds"] += 1
        self.totals["round_seconds"] += clock() - flight.began
        self.totals["sequence_rounds"] += len(flight.sequences)
        self.totals["drafted_rounds"] += any(len(tree) > 1 for tree in flight.trees)

    def settled(self, chunks: Sequence[Chunk], began: float, ended: float) -> None:
        """See :class:`Observer`."""
        self.totals["round_seconds"] += ended - began
        self.totals["round_tokens"] += sum(len(chunk.tokens) for chunk in chunks)


class ServiceFront:
    """:class:`Service` in this process."""

    def __init__(self, bundle: Bundle, prompts: Sequence[Sequence[int]], tokens: int, rows: int, mode: str) -> None:
        self.name = f"service {mode}"
        self._prompts, self._tokens = prompts, tokens
        self._rounds = Rounds()
        options = ServiceOptions(rows=rows, capacity=2048, queue=1024, speculate=mode, reuse_prefixes=False)
        self.service = bundle.serve(options, self._rounds)

    def ask(self, number: int) -> Answer:
        """See :class:`Front`."""
        answer = Answer(number, clock())

        def listen(event: Event) -> None:
            if isinstance(event, Tokens):
                answer.arrivals.append(clock())

        request = self.service.request(self._prompts[number], max_new_tokens=self._tokens, ignore_eos=True)
        generation = self.service.submit(request, listen).result()
        answer.tokens, answer.text = len(generation.tokens), tuple(generation.tokens)
        return answer

    def counters(self) -> dict[str, float]:
        """See :class:`Front`."""
        return dict(self._rounds.totals)

    def close(self) -> None:
        """See :class:`Front`."""
        self.service.close()


class GenerateFront:
    """:meth:`Bundle.generate`, one call after another."""

    def __init__(self, bundle: Bundle, prompts: Sequence[Sequence[int]], tokens: int, mode: str) -> None:
        self.name = f"generate {mode}"
        self._prompts, self._tokens, self._mode = prompts, tokens, mode
        self._rounds = Rounds()
        self._bundle = bundle.with_fresh_schedule().with_observer(self._rounds)
        self._one = threading.Lock()

    def ask(self, number: int) -> Answer:
        """See :class:`Front`."""
        answer = Answer(number, clock())
        with self._one:
            prompt = list(self._prompts[number])
            stream = self._bundle.generate(
                prompt, speculate=self._mode, max_new_tokens=self._tokens, ignore_eos=True, stream=True
            )
            for _ in stream:
                answer.arrivals.append(clock())
        tokens = stream.generations[0].tokens
        answer.tokens, answer.text = len(tokens), tuple(tokens)
        return answer

    def counters(self) -> dict[str, float]:
        """See :class:`Front`."""
        return dict(self._rounds.totals)

    def close(self) -> None:
        """See :class:`Front`."""


class OpenAIFront:
    """The completions route of a running server: token ids in, text out, one event a part.

    ``process``: the server's number on this machine, whose CPU time is counted; 0 to leave it out. ``stream``: whether
    answers come in parts.
    """

    def __init__(
        self,
        name: str,
        url: str,
        model: str,
        prompts: Sequence[Sequence[int]],
        tokens: int,
        process: int = 0,
        stream: bool = True,
    ) -> None:
        self.name, self._stream = name, stream
        self._process = psutil.Process(process) if process else None
        self._url, self._model = url.rstrip("/"), model
        self._prompts, self._tokens = prompts, tokens

    def ask(self, number: int) -> Answer:
        """See :class:`Front`."""
        answer = Answer(number, clock())
        body = {
            "model": self._model,
            "prompt": list(self._prompts[number]),
            "max_tokens": self._tokens,
            "temperature": 0,
            "ignore_eos": True,
            "stream": True,
            "stream_options": {"include_usage": True},
            "cache_prompt": False,
        }
        if "llama" not in self.name:
            del body["cache_prompt"]
        if not self._stream:
            del body["stream"], body["stream_options"]
        request = Request(
            f"{self._url}/v1/completions", json.dumps(body).encode(), {"Content-Type": "application/json"}
        )
        parts = []
        with urlopen(request, timeout=600) as reply:
            if not self._stream:
                return self._whole(answer, json.load(reply))
            for line in reply:
                field, _, data = line.decode().strip().partition(":")
                if field != "data" or data.strip() == "[DONE]":  # others are comments, which keep a connection alive
                    continue
                event = json.loads(data)
                if event.get("usage"):
                    answer.tokens = event["usage"]["completion_tokens"]
                for choice in event.get("choices", ()):
                    if choice.get("text"):
                        answer.arrivals.append(clock())
                        parts.append(choice["text"])
        answer.text = "".join(parts)
        return answer

    @staticmethod
    def _whole(answer: Answer, reply: Any) -> Answer:
        answer.arrivals.append(clock())
        answer.tokens, answer.text = reply["usage"]["completion_tokens"], reply["choices"][0]["text"]
        return answer

    def counters(self) -> dict[str, float]:
        """See :class:`Front`."""
        if self._process is None:
            return {}
        times = self._process.cpu_times()
        return {"cpu_seconds": times.user + times.system}

    def close(self) -> None:
        """See :class:`Front`."""
