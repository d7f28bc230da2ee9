"""The Python API: open a bundle, generate text.

from dspark_runtime import Bundle

bundle = Bundle.open("smollm2.dspark")
print(bundle.generate("Once upon a time", max_new_tokens=64).text)
"""

from __future__ import annotations

import copy
import os
from collections.abc import Iterator, Sequence
from typing import Any, cast

from dspark_runtime.backends.engine import Engine, EngineOptions
from dspark_runtime.bundle import BundleFiles, GraphEntry, Manifest, Variant
from dspark_runtime.chat_template import Message
from dspark_runtime.costs import PassCosts
from dspark_runtime.drafters.base import Drafter
from dspark_runtime.drafters.ngram import NgramDrafter
from dspark_runtime.drafters.self_draft import SelfDrafter
from dspark_runtime.errors import IncompatibleBundle, UsageError
from dspark_runtime.loop import DecodingLoop, LoopOptions
from dspark_runtime.request import Limits, Request, make_requests
from dspark_runtime.sampling import SamplingParams
from dspark_runtime.schedule import Schedule
from dspark_runtime.sequence import Chunk, Generation
from dspark_runtime.text import TextCodec

SPECULATION_MODES = ("auto", "off", "ngram", "self-draft", "ngram+self-draft")
Speculate = str | Drafter | Sequence[Drafter]
Prompt = str | bytes | Sequence[int]
# Graph variants to look for, by whether several sequences share a pass; the standard graph takes any number.
_VARIANTS: dict[bool, tuple[Variant, ...]] = {False: ("onnxruntime-cpu",), True: ("onnxruntime-cpu-batch",)}


class Stream:
    """Text as it comes: iterate for :class:`Chunk` objects; ``generations`` holds the results at the end."""

    def __init__(self, loops: Iterator[DecodingLoop]) -> None:
        self._loops = loops
        self._current: DecodingLoop | None = None
        self._cancelled = False
        self.generations: list[Generation] = []

    def __iter__(self) -> Iterator[Chunk]:
        for loop in self._loops:
            self._current = loop
            if self._cancelled:
                loop.cancel()
            first = len(self.generations)
            for chunk in loop:
                yield chunk if not first else Chunk(chunk.index + first, chunk.text, chunk.tokens, chunk.finish_reason)
            self.generations += loop.generations()

    def cancel(self) -> None:
        """End all texts before the next round; they finish with the reason ``cancelled``."""
        self._cancelled = True
        if self._current is not None:
            self._current.cancel()


class Bundle:
    """An opened bundle. It may generate any number of times; each call has a cache of its own."""

    def __init__(self, files: BundleFiles, options: EngineOptions, exact: bool, capacity: int | None) -> None:
        self.files = files
        self.exact = exact
        self._engine_options = options
        self._engines: dict[str, Engine] = {}
        self.codec = TextCodec(files.tokenizer_dir)
        positions = self.manifest.model.max_positions
        self.limits = Limits(self.manifest.model.vocab_size, min(positions, capacity or positions))
        self._min_rows = 2 if exact else 1  # a row alone goes through other kernels than the same row among others
        self.schedule = Schedule(self._costs(), min_rows=self._min_rows)

    @classmethod
    def open(
        cls,
        path: str | os.PathLike[str],
        *,
        threads: int | None = None,
        exact: bool | None = None,
        capacity: int | None = None,
        spinning: bool = True,
        verify_digests: bool = True,
    ) -> Bundle:
        """Check the bundle at ``path``; its graphs are loaded when they are first needed.

        Args:
            threads: threads of one operator; None for one per physical core.
            exact: speculative text must equal plain text whatever the precision: no pass runs a single row alone,
                whose kernels round differently. None for the bundle's own setting.
            capacity: most tokens of prompt and text together; None for all positions of the model.
            spinning: worker threads wait busily, which is faster while nothing else wants the processor.
            verify_digests: compare every file with its digest first.

        Raises:
            BundleError: no bundle, or a damaged or incompatible one.
        """
        if capacity is not None and (isinstance(capacity, bool) or capacity < 2):
            raise UsageError(f"capacity={capacity}: give at least 2 tokens, or None for all the model has")
        files = BundleFiles.open(path, verify_digests)
        precision = files.manifest.precision
        wanted = precision.exact if exact is None else exact
        return cls(files, EngineOptions(threads, spinning, _accuracy(files.manifest, wanted)), wanted, capacity)

    def with_fresh_schedule(self) -> Bundle:
        """The same bundle and loaded graphs with a schedule that has learned nothing yet (for measurements)."""
        other = copy.copy(self)
        other.schedule = Schedule(self._costs(), min_rows=self._min_rows)
        return other

    @property
    def manifest(self) -> Manifest:
        """The bundle's manifest."""
        return self.files.manifest

    @property
    def target(self) -> Engine:
        """The engine that runs one sequence at a time."""
        return self.engine("target")

    def engine(self, name: str, batched: bool = False) -> Engine:
        """The engine of graph ``name``, loaded on first use; ``batched`` if passes hold more than one sequence."""
        graph: GraphEntry = self.files.graph(name, prefer=_VARIANTS[batched])
        if graph.file not in self._engines:
            from dspark_runtime.backends.ort import OrtEngine

            self._engines[graph.file] = OrtEngine(
                self.files.path(graph.file),
                name=name,
                cache=self.manifest.model.cache,
                layers=graph.layers,
                dtype=graph.dtype,
                options=self._engine_options,
            )
        return self._engines[graph.file]

    def generate(
        self,
        prompt: Prompt | Sequence[Prompt],
        *,
        max_new_tokens: int | None = None,
        speculate: Speculate = "auto",
        temperature: float = 0.0,
        top_k: int = 0,
        top_p: float = 1.0,
        min_p: float = 0.0,
        seed: int = 0,
        stop: str | Sequence[str] = (),
        stream: bool = False,
        chat: bool = False,
        ignore_eos: bool = False,
        draft_length: int | None = None,
        batch_size: int = 8,
    ) -> Any:
        """Generate text: a :class:`Generation`, a list of them for a list of prompts, or a :class:`Stream`.

        Args:
            prompt: text, UTF-8 bytes or token ids; or a list of those, which gives a list of generations.
            max_new_tokens: most tokens to generate; None for 256 or what fits.
            speculate: ``auto``, ``off``, ``ngram``, ``self-draft``, ``ngram+self-draft``, or drafters of your own. It
                changes the speed, never the text.
            temperature: 0 for greedy text. ``top_k``, ``top_p``, ``min_p``: filters, in this order.
            seed: of the random numbers, which depend on seed, prompt and position, not on what runs beside it.
            stop: strings that end the text.
            stream: return a :class:`Stream` instead of waiting.
            chat: each prompt is a user's message; the chat template is applied.
            ignore_eos: go on after an end-of-text token (for measurements).
            draft_length: draft so many tokens in every round, whether it pays or not; None adapts.
            batch_size: most prompts that run together.

        Raises:
            UsageError: an option or a prompt outside its range.
            CapacityError: a prompt with its new tokens does not fit.
        """
        single = _is_single(prompt)
        prompts = [cast(Prompt, prompt)] if single else list(cast(Sequence[Prompt], prompt))
        requests = make_requests(
            [self._encode(item, chat) for item in prompts],
            self.limits,
            max_new_tokens=max_new_tokens,
            params=SamplingParams(temperature, top_k, top_p, min_p),
            seed=seed,
            stop=stop,
            eos=() if ignore_eos else self.manifest.model.eos_token_ids,
        )
        _check_range("draft_length", draft_length, 0, 31)
        _check_range("batch_size", batch_size, 1, 1024)
        batched = min(len(requests), batch_size) > 1
        drafters = self._drafters(speculate, batched)
        schedule = self.schedule
        if draft_length is not None:
            schedule = Schedule(schedule.costs, draft_length, self._min_rows)
        result = Stream(self._loops(requests, self.engine("target", batched), drafters, schedule, batch_size))
        if stream:
            return result
        for _ in result:
            pass
        return result.generations[0] if single else result.generations

    def chat(self, messages: Sequence[Message], *, stream: bool = False, **options: Any) -> Any:
        """Answer a conversation: a list of ``{"role": ..., "content": ...}``. Options as for :meth:`generate`."""
        return self.generate(self.codec.encode_chat(messages), stream=stream, **options)

    def _loops(
        self,
        requests: Sequence[Request],
        target: Engine,
        drafters: Sequence[Drafter],
        schedule: Schedule,
        batch_size: int,
    ) -> Iterator[DecodingLoop]:
        options = LoopOptions(min_rows=self._min_rows)
        for start in range(0, len(requests), batch_size):
            part = requests[start : start + batch_size]
            yield DecodingLoop(target, schedule, drafters, part, self.codec.tokenizer, options)

    def _encode(self, prompt: Prompt, chat: bool) -> list[int]:
        if chat:
            return self.codec.encode_chat([{"role": "user", "content": prompt}])
        if isinstance(prompt, str | bytes):
            return self.codec.encode(prompt)
        if not hasattr(prompt, "__iter__"):
            raise UsageError(f"a prompt is text or token ids, not {type(prompt).__name__}")
        return list(prompt)

    def _costs(self) -> PassCosts:
        costs = self.manifest.costs
        known = costs.ms.get("target", {}) if costs is not None else {}
        return PassCosts({int(rows): ms for rows, ms in known.items() if ms > 0})

    def _drafters(self, speculate: Speculate, batched: bool) -> list[Drafter]:
        if isinstance(speculate, Drafter):
            return [speculate]
        if isinstance(speculate, list | tuple):
            chosen = list(speculate)
            if not all(isinstance(drafter, Drafter) for drafter in chosen):
                raise UsageError("speculate: a list may hold Drafter objects only")
            return chosen
        if not isinstance(speculate, str) or speculate not in SPECULATION_MODES:
            raise UsageError(
                f"speculate={speculate!r} is unknown; choose {', '.join(SPECULATION_MODES)} or give a Drafter"
            )
        if speculate == "off":
            return []
        drafters: list[Drafter] = [] if speculate == "self-draft" else [NgramDrafter()]
        if speculate in ("self-draft", "ngram+self-draft") or (speculate == "auto" and self._self_draft_may_pay()):
            drafters.append(self._self_drafter(batched))
        return drafters

    def _self_draft_entry(self) -> tuple[float, float] | None:
        """(agreement, milliseconds of a step) as far as the bundle knows; None without a self-draft graph."""
        if not self.files.has_graph("self_draft"):
            return None
        entry = next((d for d in self.manifest.drafters if d.kind == "self_draft"), None)
        agreement = 0.5 if entry is None or entry.agreement is None else entry.agreement
        costs = self.manifest.costs
        measured = costs.ms.get("self_draft", {}).get("1") if costs is not None else None
        if measured and costs is not None and costs.ms.get("target", {}).get("1"):
            share = measured / costs.ms["target"]["1"]
        else:
            layers = self.files.graph("self_draft").layers or ()
            share = (len(layers) + 1) / (self.manifest.model.num_layers + 1)
        return agreement, share * self.schedule.costs.ms(1)

    def _self_draft_may_pay(self) -> bool:
        """Whether a chain of the self-draft could beat plain decoding, before loading its graph for a try."""
        known = self._self_draft_entry()
        if known is None:
            return False
        agreement, step_ms = known
        costs = self.schedule.costs
        return any(
            sum(agreement**k for k in range(n + 1)) / (costs.ms(n + 1) + n * step_ms) > 1.05 / costs.ms(1)
            for n in range(1, 9)
        )

    def _self_drafter(self, batched: bool) -> SelfDrafter:
        known = self._self_draft_entry()
        if known is None:
            raise IncompatibleBundle(
                "this bundle has no self-draft graph; build it again with --self-draft, or use speculate='ngram'"
            )
        return SelfDrafter(self.engine("self_draft", batched), known[0], known[1])


def _accuracy(manifest: Manifest, exact: bool) -> int:
    """Arithmetic of quantized products: 8-bit activations, unless exact text was seen to need float32 ones."""
    precision = manifest.precision
    if precision.weights not in ("int4", "int8"):
        return 0
    noise = precision.row_noise
    proven = noise is not None and noise.without_single_rows == 0.0
    return 1 if exact and not proven else precision.accuracy_level or 4


def _is_single(prompt: object) -> bool:
    if isinstance(prompt, str | bytes):
        return True
    if not isinstance(prompt, Sequence) and not hasattr(prompt, "__len__"):
        raise UsageError(f"a prompt is text or token ids, or a list of those, not {type(prompt).__name__}")
    items = list(cast(Sequence[object], prompt))
    return not items or not (isinstance(items[0], str | bytes) or hasattr(items[0], "__len__"))


def _check_range(name: str, value: object, low: int, high: int) -> None:
    if value is None:
        return
    if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
        raise UsageError(f"{name}={value!r}: give a whole number from {low} to {high}")
